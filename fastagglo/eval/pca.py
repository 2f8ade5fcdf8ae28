"""PCA pictures: dense features as colours, on one basis so that colours can be compared.

The three leading principal components of a model's patch features, as red, green and blue, show
what it tells apart. With one basis for all resolutions, a model that switches modes with the
resolution (RADIOv2.5, arXiv 2412.07679) shows itself by its changing colours.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastagglo.errors import UserError, require

Map = Tensor | np.ndarray
Picture = tuple[str, str, Path]
"""Title, caption and file of a picture, as `write_report` takes them."""

_PERCENTILES = (1.0, 99.0)  # a few outlying tokens must not grey out all others
_MAX_BYTES = 300_000
_MAX_RESOLUTIONS = 4
_LABEL = "#7a7f87"  # readable on white and on near black


@dataclass(frozen=True)
class PcaBasis:
    """A map from features to colours.

    Attributes:
        mean: ``(C,)`` fp64.
        components: ``(C, 3)`` fp64, orthonormal, the leading one first, signed so that the
            entry of largest magnitude is positive; zero columns beyond the features' rank.
        low, high: ``(3,)`` fp64, the projections that become 0 and 255.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, maps: Sequence[Map]) -> PcaBasis:
        """Fit one basis to all the maps of a model.

        Each map has the same weight, whatever its number of tokens, so that high resolutions do
        not drown low ones. Takes C^3 operations.

        Args:
            maps: one or more ``(h, w, C)`` with the same C.

        Raises:
            ValueError: no maps, maps of other shapes or different widths, or a value that is not
                finite.
        """
        tokens = [_tokens(features, index) for index, features in enumerate(maps)]
        if not tokens:
            raise ValueError("maps must hold at least one (h, w, C) feature map, got none")
        widths = {features.shape[-1] for features in tokens}
        if len(widths) > 1:
            raise ValueError(f"maps must have the same number of channels, got {sorted(widths)}")
        mean = torch.stack([features.mean(0) for features in tokens]).mean(0)
        centred = [features - mean for features in tokens]
        covariance = sum(c.T @ c / len(c) for c in centred) / len(centred)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values[-3:].flip(0), vectors[:, -3:].flip(1)
        # Beyond the rank, eigenvectors are arbitrary and would paint noise.
        noise = values[0] * 1e-10 + mean.square().sum() * 1e-24
        vectors = torch.where(values > noise, vectors, 0.0)
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        components = torch.zeros(len(mean), 3, dtype=torch.float64)
        components[:, : vectors.shape[1]] = vectors * signs
        projected = (torch.cat(centred) @ components).numpy()
        low, high = torch.from_numpy(np.percentile(projected, _PERCENTILES, axis=0))
        return cls(mean, components, low, high)

    def rgb(self, features: Map) -> np.ndarray:
        """Colours of a map, also of one that the basis was not fitted to.

        Args:
            features: ``(h, w, C)``.

        Returns:
            ``(h, w, 3)`` uint8; components that do not vary are mid-grey.
        """
        tokens = _tokens(features, 0)
        if tokens.shape[-1] != len(self.mean):
            raise ValueError(
                f"features must have {len(self.mean)} channels like those of the basis, got "
                f"{tokens.shape[-1]}"
            )
        span = self.high - self.low
        scaled = ((tokens - self.mean) @ self.components - self.low) / span.clamp(min=1e-300)
        scaled = torch.where(span > 0, scaled.clamp(0, 1), 0.5)
        return (scaled * 255).round().to(torch.uint8).reshape(*features.shape[:2], 3).numpy()


def pca_rgb(maps: Sequence[Map]) -> list[np.ndarray]:
    """Colours of the feature maps of one model, on one basis.

    Args:
        maps: ``(h, w, C)`` each, with the same C; resolutions may differ.

    Returns:
        ``(h, w, 3)`` uint8 for each; the same input gives the same colours every time.

    Raises:
        ValueError: see `PcaBasis.fit`.
    """
    basis = PcaBasis.fit(maps)
    return [basis.rgb(features) for features in maps]


def feature_figure(
    photos: Sequence[Map],
    student: Mapping[str, Mapping[int, Sequence[Map]]],
    teachers: Mapping[str, Mapping[int, Sequence[Map]]],
    folder: Path,
) -> list[Picture]:
    """One picture a teacher: its features of each photo and the student's prediction of them.

    The basis is fitted to the teacher's maps alone, so the student's colours are right only where
    its prediction is. Of more than four resolutions, four spread over them are shown.

    Args:
        photos: held-out photos, ``(H, W, 3)`` or ``(3, H, W)``, uint8 or floats in [0, 1].
        student: predictions by teacher and student resolution in pixels: for each photo an
            ``(h, w, C)`` map.
        teachers: the teachers' features, likewise; the keys are the same.
        folder: where ``features-<teacher>.png`` are written; made if it is not there.

    Returns:
        Title, caption and file of each picture, for `write_report`. Files are 300 kB at most.

    Raises:
        UserError: matplotlib is missing or a file cannot be written.
        ValueError: keys or numbers of maps do not match; see also `PcaBasis.fit`.
    """
    pictures: list[Picture] = []
    for name, by_resolution in teachers.items():
        if name not in student:
            raise ValueError(f"student has no predictions of teacher {name!r}")
        if set(student[name]) != set(by_resolution):
            raise ValueError(
                f"student and teachers must have the same resolutions of {name!r}, got "
                f"{sorted(student[name])} and {sorted(by_resolution)}"
            )
        basis = PcaBasis.fit([m for maps in by_resolution.values() for m in maps])
        shown = _spread_out(sorted(by_resolution))
        columns = [
            [(f"{size} px", [basis.rgb(m) for m in source[size]]) for size in shown]
            for source in (by_resolution, student[name])
        ]
        groups = [(name, columns[0]), (f"student's prediction of {name}", columns[1])]
        caption = (
            f"First three principal components of {name}'s features of held-out photos, and the "
            "student's prediction in the same colours, by student resolution."
        )
        path = folder / f"features-{_slug(name, [p.name for _, _, p in pictures])}.png"
        _draw(photos, groups, path)
        pictures.append((f"Features of {name}", caption, path))
    return pictures


def backbone_figure(
    photos: Sequence[Map], backbone: Mapping[int, Sequence[Map]], path: Path
) -> Picture:
    """The student's own features over the resolutions: do they keep their colours?

    Args:
        photos: see `feature_figure`.
        backbone: features by student resolution in pixels: for each photo an ``(h, w, C)`` map.
        path: the PNG to write; its folder is made if it is not there.

    Returns:
        Title, caption and file, for `write_report`.
    """
    basis = PcaBasis.fit([m for maps in backbone.values() for m in maps])
    shown = _spread_out(sorted(backbone))
    columns = [(f"{size} px", [basis.rgb(m) for m in backbone[size]]) for size in shown]
    _draw(photos, [("student's backbone", columns)], path)
    caption = (
        "First three principal components of the student's backbone features, one basis for all "
        "resolutions: a change of colour with the resolution is a change of mode."
    )
    return "Backbone features over resolutions", caption, path


def _tokens(features: Map, index: int) -> Tensor:
    tensor = torch.as_tensor(features)
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(
            f"maps must have shape (h, w, C), none of them 0; map {index} has {tuple(tensor.shape)}"
        )
    tensor = tensor.detach().to("cpu", torch.float64).reshape(-1, tensor.shape[-1])
    if not tensor.isfinite().all():
        raise ValueError(f"map {index} has values that are not finite")
    return tensor


def _spread_out(values: list[int]) -> list[int]:
    if len(values) <= _MAX_RESOLUTIONS:
        return values
    last = len(values) - 1
    return [values[round(i * last / (_MAX_RESOLUTIONS - 1))] for i in range(_MAX_RESOLUTIONS)]


def _slug(name: str, taken: Sequence[str]) -> str:
    slug = re.sub(r"[^\w.-]+", "_", name)
    return f"{slug}-{len(taken)}" if f"features-{slug}.png" in taken else slug


def _photo(photo: Map) -> np.ndarray:
    array = torch.as_tensor(photo).detach().cpu()
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.movedim(0, -1)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"photos must have shape (H, W, 3) or (3, H, W), got {tuple(photo.shape)}")
    return array.numpy() if array.dtype == torch.uint8 else array.float().clamp(0, 1).numpy()


def _draw(
    photos: Sequence[Map],
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[np.ndarray]]]]],
    path: Path,
) -> None:
    """A row for each photo, a block of columns for each group, on a transparent ground."""
    purpose = "drawing pictures"
    figure_module = require("matplotlib.figure", extra="train", purpose=purpose)
    for title, columns in groups:
        for label, maps in columns:
            if len(maps) != len(photos):
                raise ValueError(
                    f"{title}, {label}: {len(maps)} maps for {len(photos)} photos; one each is "
                    "needed"
                )
    if not photos:
        raise ValueError("photos must hold at least one photo, got none")
    blocks = [("", [("photo", [_photo(photo) for photo in photos])]), *groups]
    # In cells: a gap between blocks, and a head for the two lines of labels.
    gap, head, space = 0.18, 0.44, 0.06
    width = sum(len(columns) for _, columns in blocks) + gap * len(groups)
    height = len(photos) + head
    figure = figure_module.Figure(figsize=(1.25 * width, 1.25 * height))
    left = 0.0
    for title, columns in blocks:
        centre = (left + len(columns) / 2) / width
        figure.text(
            centre, 1 - 0.14 / height, title, ha="center", va="center", fontsize=10,
            fontweight="bold", color=_LABEL, parse_math=False,
        )  # fmt: skip
        for label, images in columns:
            for row, image in enumerate(images):
                axes = figure.add_axes(_cell(left, row + head, width, height, space))
                # Photos are resampled smoothly; each cell of a feature map stays a square.
                axes.imshow(image, interpolation="nearest" if title else "antialiased")
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(label, fontsize=9, color=_LABEL, pad=4, parse_math=False)
            left += 1
        left += gap
    _save(figure, path)


def _cell(x: float, y: float, width: float, height: float, space: float) -> tuple[float, ...]:
    """Left, bottom, width and height, in shares of the figure, of the cell at (x, y) from above."""
    side = 1 - space
    return (x + space / 2) / width, 1 - (y + side) / height, side / width, side / height


def _save(figure: Any, path: Path) -> None:
    dpi = 160.0
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, transparent=True)
        if buffer.tell() <= _MAX_BYTES or dpi < 20:
            break
        dpi *= 0.8
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(buffer.getvalue())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"picture {path}: cannot be written ({error.strerror or error})") from error
