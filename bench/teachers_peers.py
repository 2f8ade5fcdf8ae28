"""A step's teacher features: as the trainer has them, and from the library's model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.engine import OURS, Results, Unavailable
from bench.teachers_cases import NAME, Batch
from fastagglo.features import Features
from fastagglo.train.targets import teacher_features


class Run:
    """A peer that gives the features of all images.

    Attributes:
        parts: makes them: batches of (summary or None, map), images in order.
    """

    def __init__(
        self, batch: Batch, parts: Callable[[], list[tuple[Tensor | None, Tensor]]]
    ) -> None:
        self.parts = parts
        model = batch.teacher if batch.model is None else batch.model
        weights = sum(p.nbytes for p in model.parameters())
        self.input_bytes = weights + batch.images.nbytes
        self.info: Mapping[str, Any] = {}

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.parts()

    def results(self) -> Results:
        """Summaries, where the teacher has them, and maps."""
        summaries, maps = zip(*self(), strict=True)
        found = {"map": torch.cat(maps)}
        if summaries[0] is not None:
            found["summary"] = torch.cat(summaries)
        return found


def ours(batch: Batch) -> Run:
    """What the training step calls."""
    teachers, settings = {NAME: batch.teacher}, {NAME: batch.settings}

    def parts() -> list[tuple[Tensor | None, Tensor]]:
        found: list[Features] = [
            group[NAME] for group in teacher_features(teachers, batch.groups, settings)
        ]
        return [(features.summary, features.spatial) for features in found]

    return Run(batch, parts)


def _normalised(batch: Batch, images: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(colour, device=batch.device).view(1, 3, 1, 1)
        for colour in (batch.teacher.spec.mean, batch.teacher.spec.std)
    )
    return ((images.float() / 255 - mean) / std).to(batch.case.dtype)


def _features(batch: Batch, images: Tensor) -> tuple[Tensor | None, Tensor]:
    summary, map_ = batch.plain(_normalised(batch, images))
    return None if summary is None else summary.float(), map_.float()


def _canvas(images: Tensor, side: int, tiles: int, pitch: int) -> Tensor:
    """Images laid on canvases row by row, by hand."""
    count = -(-len(images) // tiles**2)
    canvas = images.new_zeros(count, 3, side, side)
    for index, image in enumerate(images):
        place, tile = divmod(index, tiles**2)
        top, left = (pitch * i for i in divmod(tile, tiles))
        canvas[place, :, top : top + image.shape[1], left : left + image.shape[2]] = image
    return canvas


def plain(batch: Batch) -> Run:
    """One call of the library's model for all images, or for all canvases of a mosaic."""
    if batch.model is None:
        raise Unavailable("the library takes one image at a time")
    if not batch.case.mosaic:
        return Run(batch, lambda: [_features(batch, batch.images)])
    spec, size = batch.teacher.spec, batch.case.size
    side, cells = spec.input_size, -(-size // spec.patch_size)
    pitch = cells * spec.patch_size
    tiles = side // pitch

    def parts() -> list[tuple[Tensor | None, Tensor]]:
        images = batch.images
        _, maps = _features(batch, _canvas(images, side, tiles, pitch))
        windows = []
        for index in range(len(images)):
            place, tile = divmod(index, tiles**2)
            row, column = (cells * i for i in divmod(tile, tiles))
            windows.append(maps[place, row : row + cells, column : column + cells])
        return [(None, torch.stack(windows))]

    return Run(batch, parts)


def per_image(batch: Batch) -> Run:
    """A call of the library's model for each image."""
    return Run(batch, lambda: [_features(batch, image[None]) for image in batch.images])


def alone(batch: Batch) -> Run:
    """A teacher of one large input without mosaics: a canvas for each image, one call for each."""
    spec, size = batch.teacher.spec, batch.case.size
    cells = -(-size // spec.patch_size)

    def parts() -> list[tuple[Tensor | None, Tensor]]:
        found = []
        for image in batch.images:
            _, map_ = _features(batch, _canvas(image[None], spec.input_size, 1, 0))
            found.append((None, map_[:, :cells, :cells]))
        return found

    return Run(batch, parts)


PEERS: dict[str, tuple[str, Callable[[Batch], Run]]] = {
    OURS: ("fastagglo's teacher_features, as the training step calls it", ours),
    "batch": ("the library's model, one call for all images, or for all canvases", plain),
    "per-image": ("the library's model, a call for each image", per_image),
    "alone": ("the library's model, each image alone on a canvas of the teacher's size", alone),
}
