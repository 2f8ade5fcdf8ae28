"""Crops of JPEG files that the GPU decodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastagglo.data.decode import BadImage, decode
from fastagglo.data.plan import MAX_BAD, GroupViews, TrainBatch
from fastagglo.errors import UserError, require

Decode = Callable[[list[Tensor]], list[Tensor]]
"""JPEG files, ``(bytes,)`` uint8 on the CPU, to images ``(3, H, W)`` uint8 on the device."""


def nvjpeg(device: torch.device) -> Decode:
    """torchvision's decoder on a CUDA device (nvJPEG), on the stream that is current at a call.

    Its colours are not interpolated between the pixels that share them, and it has no DCT scale.
    torchvision 0.29 has it, and announces that its decoders will move to TorchCodec.

    Raises:
        UserError: torchvision is not installed.
    """
    io = require("torchvision.io", extra="train", purpose="decoding by nvJPEG")

    def decoded(files: list[Tensor]) -> list[Tensor]:
        # It decodes on a stream of its own, which does not wait for this one, into memory that
        # this one's last kernels may still read.
        torch.cuda.current_stream(device).synchronize()
        return io.decode_jpeg(files, mode=io.ImageReadMode.RGB, device=device)

    return decoded


def decode_crops(batch: TrainBatch, decoder: Decode) -> TrainBatch:
    """Fill in the views that a batch has as files.

    A crop's edges lie on whole pixels, and it is resized as on the CPU, to within a colour. A file
    that cannot be decoded is counted, and its row shows what the next good row shows, of its group
    or, resized, of another.

    Args:
        batch: on a device; its views are written to.
        decoder: for that device.

    Raises:
        UserError: no file of the batch can be decoded.
    """
    skipped, bad = Counter(batch.skipped), list(batch.bad)
    found = [
        group if group.encoded is None else _group(group, decoder, skipped, bad)
        for group in batch.groups
    ]
    if not (whole := [group for group in found if group is not None and group.keys]):
        raise UserError(
            f"none of the {len(batch.keys)} images of a batch can be decoded, for example "
            f"{batch.keys[0]!r}; mend the data"
        )
    groups = [
        _shown(group, whole[0]) if new is None else new
        for group, new in zip(batch.groups, found, strict=True)
    ]
    return replace(
        batch,
        groups=groups,
        keys=[key for group in groups for key in group.keys],
        skipped=dict(skipped),
        bad=bad[:MAX_BAD],
    )


def _group(
    group: GroupViews, decoder: Decode, skipped: Counter[str], bad: list[tuple[str, str]]
) -> GroupViews | None:
    """The group with its views, or None if none of its files can be decoded."""
    crops = group.encoded
    views = list({id(view): view for view in (group.student, *group.teachers.values())}.values())
    broken = []
    images = _images(crops.files(), decoder, group.student.device)
    for row, place, flip, image in zip(crops.rows, crops.places, crops.flips, images, strict=True):
        if image is None:
            broken.append(row)
            skipped["corrupt"] += 1
            bad.append((group.keys[row], "corrupt"))
            continue
        left, top, wide, high = place
        # Planes of floats: PyTorch resizes no bytes on CUDA.
        part = image[None, :, top : top + high, left : left + wide].float()
        for view in views:
            resized = interpolate(part, view.shape[2:], mode="bilinear", antialias=True)
            view[row] = (resized.flip(3) if flip else resized)[0].round_().clamp_(0, 255)
    keys = list(group.keys)
    good = sorted(set(range(len(keys))) - set(broken))
    if broken and not good:
        return None
    for row in broken:
        other = next((g for g in good if g > row), good[0] if good else row)
        keys[row] = keys[other]
        for view in views:
            view[row] = view[other]
    return replace(group, keys=tuple(keys), encoded=None)


def _shown(group: GroupViews, other: GroupViews) -> GroupViews:
    """The group with the first image of another in all its rows."""
    part = other.student[:1].float()
    for view in {id(view): view for view in (group.student, *group.teachers.values())}.values():
        resized = interpolate(part, view.shape[2:], mode="bilinear", antialias=True)
        view.copy_(resized.round_().clamp_(0, 255).expand(view.shape))
    return replace(group, keys=other.keys[:1] * len(group.keys), encoded=None)


def _images(files: list[Tensor], decoder: Decode, device: torch.device) -> list[Tensor | None]:
    try:
        return list(decoder(files))
    except RuntimeError:  # one of them is broken, or of a kind that Pillow may know
        return [_one(file, decoder, device) for file in files]


def _one(file: Tensor, decoder: Decode, device: torch.device) -> Tensor | None:
    try:
        return decoder([file])[0]
    except RuntimeError:
        try:
            image = np.array(decode(file.numpy().tobytes()))
        except BadImage:
            return None
        return torch.from_numpy(image).permute(2, 0, 1).to(device)
