"""What a frozen teacher costs a training step, against its library's model called plainly.

    pytest bench/teachers.py            # or `python -m bench teachers`, which keeps the results
    pytest bench/teachers.py -k dinov2 --peers batch

Ours is what the step calls: two groups of uint8 crops joined, normalised and put through the
teacher as it is loaded from the files that the library saved. A teacher that only wraps a
library's model can be no faster than that; built-in ones and mosaics can. Before any timing
features are compared.

On CUDA: bfloat16 and the recipes' own teachers. On a CPU: float32 and small ones.
"""

from __future__ import annotations

import torch

from bench.engine import (
    Goal,
    Results,
    Suite,
    close,
    pytest_generate_tests,  # noqa: F401
    test_duel,  # noqa: F401
)
from bench.teachers_cases import Batch, cases
from bench.teachers_peers import PEERS

# Of a feature's norm. float32: twelve layers of sums of up to 1,536 products, in another order for
# another batch, and normalisations folded into weights. bfloat16 rounds each of some 400 steps at
# 2 ** -9, in kernels that a batch's size chooses.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Summaries and maps, feature by feature.

    An image alone on its canvas attends to black where a tile attends to its neighbours: that is
    what a mosaic trades, so that only its shape and its being finite are compared.
    """
    assert found.keys() == expected.keys(), f"{peer}: {list(found)}, ours {list(expected)}"
    for name, right in expected.items():
        value = found[name]
        assert value.shape == right.shape, (
            f"{peer}: {name} has shape {tuple(value.shape)}, ours {tuple(right.shape)}"
        )
        assert value.isfinite().all(), f"{peer}: {name} is not finite"
        if peer != "alone":
            close(peer, name, value, right, TOLERANCE[batch.case.dtype])


SUITE = Suite(
    name="teachers",
    cases=cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="library and model, images × their sides in pixels",
    goals={
        ("efficientnet", "batch"): Goal(time=1.05),
        ("vit-s", "batch"): Goal(time=1.05),
        ("dinov2-s", "batch"): Goal(time=1.05),
        ("clip-s", "batch"): Goal(time=1.05),
        ("mosaic", "batch"): Goal(time=1.05),
    },
    notes={
        "images": "of a call",
        "alone": "features of another context than a tile's: its time and memory are compared",
    },
    seconds={"cpu": 2.5, "cuda": 1.0},
)
