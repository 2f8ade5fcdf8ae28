"""Medians with their uncertainty: percentile bootstrap, with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLED = 4000
LEVEL = 0.95

Array = np.ndarray


def median_interval(samples: Sequence[float] | Array, level: float = LEVEL) -> list[float]:
    """[low, median, high] of samples that are independent of one another."""
    found = medians(np.asarray(samples, float)[None], generator())[0]
    return bounds(float(np.median(samples)), found, level)


def medians(samples: Array, rng: np.random.Generator, count: int = RESAMPLED) -> Array:
    """Medians of resampled rounds.

    Args:
        samples: (series, rounds); a round is drawn for all series at once.
        rng: draws the rounds.
        count: of resamples.

    Returns:
        (series, count).
    """
    drawn = rng.integers(0, samples.shape[1], (count, samples.shape[1]))
    return np.median(samples[:, drawn], axis=-1)


def bounds(centre: float, resampled: Array, level: float = LEVEL) -> list[float]:
    """[low, centre, high], the centre always within."""
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return [min(float(low), centre), centre, max(float(high), centre)]


def exponent(points: Sequence[tuple[float, Sequence[float]]], level: float = LEVEL) -> list[float]:
    """[low, exponent, high] of a power law through medians, least squares of the logarithms.

    Args:
        points: at least two different x > 0, each with its samples > 0.
        level: of the interval, by resampling the samples at each x.
    """
    x = np.log([at for at, _ in points])
    x = x - x.mean()
    weights = x / np.square(x).sum()
    rng = generator()
    resampled = np.stack([medians(np.asarray(s, float)[None], rng)[0] for _, s in points])
    centre = weights @ np.log([np.median(s) for _, s in points])
    return bounds(float(centre), weights @ np.log(resampled), level)


def generator() -> np.random.Generator:
    """The same draws in every run."""
    return np.random.default_rng(0)
