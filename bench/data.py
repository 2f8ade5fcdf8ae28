"""From the bytes of JPEG files to a normalised batch of crops, against the usual pipelines.

    pytest bench/data.py                # or `python -m bench data`, which keeps the results
    pytest bench/data.py -k large --peers torchvision

A call makes one step's crops, with one thread: images a second and core are the case's images over
the time. Every peer is told the boxes and flips that our stream draws, and drawing them counts as
our work. Before any timing its pixels are compared with ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from bench.data_cases import STD, Batch, cases
from bench.data_peers import PEERS
from bench.engine import (
    Goal,
    Results,
    Suite,
    pytest_generate_tests,  # noqa: F401
    test_duel,  # noqa: F401
)

CELL = 8
"""Side of the squares of a crop whose means are compared."""

# A colour of 255, in an average channel's normalised units.
COLOUR = 1 / 255 / (sum(STD) / len(STD))

# Root of the mean square of an image's differences, in colours. From the same decoded pixels: two
# resizings round to a colour after either axis, which gives at most 0.29 * 2 ** 0.5 an axis and
# image, less where weights are alike. From a JPEG at a part of its scale, or by nvJPEG, whose
# colours are not interpolated: what the pixels of a crop still show of that, and its means hardly.
PIXELS, DETAILS = 0.5, 4.0
CELLS, NVJPEG_CELLS = 0.5, 1.5


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Image by image, pixels and means of cells."""
    a, b = found["pixels"], expected["pixels"]
    assert a.shape == b.shape, f"{peer}: {tuple(a.shape)}, ours {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{peer}: {a.dtype}, ours {b.dtype}"
    difference = (a - b) / COLOUR
    nvjpeg = peer == "nvjpeg"
    less = [nvjpeg or min(c.width, c.height) >= 2 * batch.case.size for c in batch.crops]
    limits = torch.where(torch.tensor(less), DETAILS, PIXELS)
    _within(peer, "pixels", _size(difference), limits)
    cells = limits.clamp_max(NVJPEG_CELLS if nvjpeg else CELLS)
    _within(peer, f"means of {CELL}×{CELL} pixels", _size(avg_pool2d(difference, CELL)), cells)


def _size(difference: Tensor) -> Tensor:
    return difference.square().mean((1, 2, 3)).sqrt().cpu()


def _within(peer: str, name: str, sizes: Tensor, limits: Tensor) -> None:
    worst = int((sizes / limits).argmax())
    assert (sizes <= limits).all(), (
        f"{peer}: {name} of image {worst} differ from ours by {sizes[worst]:.2g} colours "
        f"(limit {limits[worst]:g})"
    )


SUITE = Suite(
    name="data",
    cases=cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="photographs -> side of a crop in pixels",
    goals={
        ("small", "PIL"): Goal(time=0.435),
        ("small", "torchvision"): Goal(time=0.74),
        ("large", "torchvision"): Goal(time=0.5),
    },
    notes={
        "images": "of a call; images over the time are images a second and core",
        "file_kb": "an average file, quality 90; enlarged photographs hold less than a camera's",
        "memory_mb": "PyTorch's share alone: the decoders' own memory is not seen",
    },
    seconds={"cpu": 5.0, "cuda": 2.0},
)
