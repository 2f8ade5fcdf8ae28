"""What the multi-teacher loss is measured on: terms as recipes have them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

EAGER = ("matrix", "matrix-fp32", "eager", "twin")
ALL = (*EAGER, "compile")


@dataclass(frozen=True)
class Term:
    """One prediction and its target.

    Attributes:
        kind: of the loss, as in ``fastagglo.ops.LossTerm``.
        channels: of both.
        prediction: rows and columns of the student's grid; None for a summary, ``(N, C)``.
        target: those of the teacher.
        affine: the target is normalised, as PHI-S leaves it once its rotation is folded away.
        dispersion: of "angular".
        shifted: both views are shifted against each other, by whole cells, each image by its own.
        valid: share of the target's tokens that count; 1 is no mask.
    """

    kind: str
    channels: int
    prediction: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    affine: bool = False
    dispersion: float = 1.0
    shifted: bool = False
    valid: float = 1.0

    @property
    def words(self) -> str:
        """``27x27x1024 mse affine``, with the target's grid after an arrow where it differs."""
        ours, theirs = ("x".join(map(str, g)) if g else "" for g in (self.prediction, self.target))
        size = ours if ours == theirs else f"{ours}->{theirs}"
        marks = (" affine" * self.affine, " shifted" * self.shifted, " masked" * (self.valid < 1))
        return f"{size}{'x' if size else ''}{self.channels} {self.kind}{''.join(marks)}"

    @property
    def elements(self) -> tuple[int, int]:
        """Of the prediction and of the target, per image."""
        grids = (self.prediction or (1, 1), self.target or (1, 1))
        return tuple(rows * columns * self.channels for rows, columns in grids)


@dataclass(frozen=True)
class Case:
    """One thing to measure, forward and backward: as many terms as a step has.

    Attributes:
        name: of the kind of terms.
        images: N of each term.
        terms: what is compared.
        size: bytes of an element.
        peers: who takes part beside us, by name in ``loss_peers.PEERS``.
    """

    name: str
    images: int
    terms: tuple[Term, ...]
    size: int = 4
    peers: tuple[str, ...] = EAGER

    @property
    def id(self) -> str:
        return f"{self.name}-{self.images}"

    @property
    def elements(self) -> int:
        """Of all that must be moved: read x, read y, write dx."""
        return self.images * sum(2 * x + y for x, y in (term.elements for term in self.terms))

    @property
    def label(self) -> str:
        """For plots."""
        if len(self.terms) == 1:
            return f"{self.name}: {self.images}x{self.terms[0].words}"
        widths = "/".join(str(c) for c in sorted({term.channels for term in self.terms}))
        return f"{self.name}: {self.images} images, {len(self.terms)} terms of {widths}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of a case."""
        return {
            "label": self.label,
            "images": self.images,
            "terms": [term.words for term in self.terms],
            "pass": "forward+backward",
            "bytes": self.elements * self.size,
        }


def plain(images: int, side: int, channels: int) -> Case:
    """PHI-S on one grid; the case that the targets on a CPU are stated for."""
    term = Term("mse", channels, (side, side), (side, side), affine=True)
    return Case("phi-s", images, (term,))


def shifted(images: int, side: int, channels: int) -> Case:
    """C-RADIOv4's shift-equivariant loss (arXiv 2601.17237) with a tenth of the tokens masked."""
    (term,) = plain(images, side, channels).terms
    return Case("shifted", images, (replace(term, shifted=True, valid=0.9),))


def resized(images: int, side: int, target: int, channels: int) -> Case:
    """A teacher with a finer grid: the prediction is resized, and its gradient with it."""
    term = Term("mse", channels, (side, side), (target, target), affine=True)
    return Case("resized", images, (term,))


def teachers(images: int, side: int, grids: tuple[int, ...], widths: tuple[int, ...]) -> Case:
    """Four teachers' spatial features, PHI-S or as AM-RADIO has them, and three summaries."""
    kinds = ("mse", "cosine_smooth_l1", "mse", "cosine_smooth_l1")
    spatial = tuple(
        Term(kind, width, (side, side), (grid, grid), affine=kind == "mse")
        for kind, width, grid in zip(kinds, widths, grids, strict=True)
    )
    summaries = (
        Term("angular", widths[0], dispersion=0.694),
        Term("angular", widths[1], dispersion=2.12),
        Term("cosine", widths[2]),
    )
    return Case("four-teachers", images, spatial + summaries)


WIDTHS = (768, 1024, 1152, 1280)


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``. Compiling takes 20 s: on a CPU once."""
    if quick:
        small = teachers(2, 4, (4, 6, 5, 4), (32, 48, 72, 80))
        found = [plain(2, 7, 64), small, resized(2, 4, 7, 64), shifted(2, 7, 64)]
        return [replace(case, size=2 if device == "cuda" else 4) for case in found]
    if device == "cpu":
        others = [
            teachers(4, 16, (16, 27, 24, 16), WIDTHS),
            resized(8, 16, 27, 1024),
            shifted(8, 27, 1024),
        ]
        few = tuple(name for name in EAGER if name != "matrix-fp32")
        first = replace(plain(16, 27, 1024), peers=ALL)
        return [first, *(replace(case, peers=few) for case in others)]
    found = [
        plain(64, 32, 1280),
        plain(32, 64, 1024),
        teachers(64, 32, (32, 37, 27, 64), WIDTHS),
        resized(64, 16, 27, 1280),
        shifted(64, 32, 1280),
    ]
    return [replace(case, size=2, peers=ALL) for case in found]
