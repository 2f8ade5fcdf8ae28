"""Photographs as a student takes them: RGB in [0, 1], sides that the patch divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SIZE", "fit_size", "prepare"]

# Squares, so that any photographs make one batch; the side that C-RADIO's cards use.
SIZE = {"height": 512, "width": 512}


def prepare(
    images: Any, size: Mapping[str, int] | str, patch: int, max_resolution: int
) -> list[Tensor]:
    """Images of any kind as (3, H, W) float32 tensors in [0, 1].

    Args:
        images: one or a sequence of: a PIL image; a numpy array or tensor (H, W), (H, W, 3) or
            (3, H, W), uint8 or floating point in [0, 1]; a batch (N, 3, H, W) or (N, H, W, 3).
        size, patch, max_resolution: as of :func:`fit_size`.

    Raises:
        TypeError, ValueError: not an image, or a size that is not understood.
    """
    found = []
    for image in _flat(images):
        pixels = _rgb(image)
        height, width = fit_size(pixels.shape[1], pixels.shape[2], size, patch, max_resolution)
        if pixels.shape[1:] != (height, width):
            pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
        found.append(pixels.clamp(0, 1))
    return found


def fit_size(
    height: int, width: int, size: Mapping[str, int] | str, patch: int, max_resolution: int
) -> tuple[int, int]:
    """The size that an image of ``height`` x ``width`` pixels gets: multiples of the patch.

    Args:
        size: ``{"height": h, "width": w}``, ``{"shortest_edge": s}``, which keeps the aspect
            ratio, or ``"native"``, the image's own size.
        patch: pixels per patch and side.
        max_resolution: the longest side; larger images shrink, keeping their aspect ratio.
    """
    if size != "native":
        given = {} if isinstance(size, str) else dict(size)
        given = {key: value for key, value in given.items() if value is not None}
        if set(given) == {"height", "width"}:
            height, width = given["height"], given["width"]
        elif set(given) == {"shortest_edge"}:
            scale = given["shortest_edge"] / min(height, width)
            height, width = height * scale, width * scale
        else:
            raise ValueError(
                'size must be {"height": h, "width": w}, {"shortest_edge": s} or "native", got '
                f"{size!r}"
            )
    shrink = min(1.0, max_resolution / max(height, width))
    most = max_resolution // patch
    fitted = (max(1, min(round(side * shrink / patch), most)) for side in (height, width))
    return tuple(side * patch for side in fitted)


def _flat(images: Any) -> Sequence[Any]:
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return list(images)
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flat(part)]
    return [images]


def _rgb(image: Any) -> Tensor:
    if hasattr(image, "convert") and hasattr(image, "mode"):  # PIL's
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))
    if not isinstance(image, Tensor):
        raise TypeError(
            f"images must be PIL images, numpy arrays or tensors, got {type(image).__name__}"
        )
    if image.dim() == 2:
        image = image[None].expand(3, -1, -1)
    elif image.dim() == 3 and image.shape[0] != 3 and image.shape[2] == 3:
        image = image.permute(2, 0, 1)
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"images must be (H, W), (H, W, 3) or (3, H, W), got {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {image.dtype}")
    return image.float()
