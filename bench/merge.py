"""Token merging, forward and backward, against every other way to have fewer tokens.

    pytest bench/merge.py               # or `python -m bench merge`, which keeps the results
    pytest bench/merge.py -k bridge --peers eager

Before any timing the merged tokens, sizes and gradients of those that merge are compared with ours,
token by token; peers that do not merge are there for their time and memory.

On CUDA: bfloat16. On a CPU: float32, smaller batches, the backend "torch". The rate is that of the
product of sources and destinations over the whole time of a peer.
"""

from __future__ import annotations

import torch

from bench.engine import (
    Goal,
    Results,
    Suite,
    pytest_generate_tests,  # noqa: F401
    test_duel,  # noqa: F401
)
from bench.merge_cases import cases
from bench.merge_peers import PEERS, Batch

# Largest difference of two results for a token, relative to an average token's norm, that counts as
# none; and which share of the tokens must agree. A choice between similarities that differ by less
# than they are rounded by may go either way, and bfloat16 similarities of an eager form are rounded
# at 1/256: there only the distance to the original tokens is compared, to 5 %.
TOLERANCE, SHARE, DISTANCE = 1e-4, 0.995, 0.05

WINDOWS = ("unshuffle", "bicubic", "product")  # who does another job


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Token by token, so that a slot that went elsewhere shows."""
    if peer in WINDOWS:
        assert not found, f"{peer}: {list(found)}"
        return
    assert found.keys() == expected.keys(), f"{peer}: {list(found)}"
    x = batch.x.detach()
    if x.dtype != torch.float32:
        one, right = ((y["tokens"] - x).float().square().sum() for y in (found, expected))
        off = abs(one.item() / right.item() - 1)
        assert off <= DISTANCE, f"{peer}: {off:.2g} off our distance to the tokens ({DISTANCE})"
        return
    for name, right in expected.items():
        assert found[name].shape == right.shape, f"{peer}: {name} has another shape"
        a, b = (y if y.ndim == 3 else y[..., None] for y in (found[name], right))
        size = b.norm(dim=2).square().mean().sqrt()
        share = ((a - b).norm(dim=2) <= TOLERANCE * size).float().mean().item()
        assert share >= SHARE, f"{peer}: only {share:.2%} of its {name} agree with ours ({SHARE})"


SUITE = Suite(
    name="merge",
    cases=cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="images x grid x channels -> tokens that are left of each image",
    goals={(case, "eager"): Goal(time=1.0, memory=0.15) for case in ("bridge-1", "half-1")},
    notes={
        "tflops": "TFLOP/s of the product of sources and destinations at the median of the whole",
        "unshuffle": "the number of tokens nearest to ours that whole windows give",
    },
    seconds={"cpu": 2.0, "cuda": 0.5},
)
