"""The multi-teacher loss, forward and backward, against every other way to compute it.

    pytest bench/loss.py                # or `python -m bench loss`, which keeps the results
    pytest bench/loss.py -k phi-s --peers matrix,eager

Before any timing a peer's total and its gradients are compared with ours, token by token.

On CUDA: bfloat16. On a CPU: float32, smaller cases, the backend "torch". The bytes that nobody can
do without are: read x, read y, write dx; 6 for each bfloat16 element where the grids are equal.
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
from bench.loss_cases import cases
from bench.loss_peers import PEERS, Batch

# Largest difference: of the total relative to it, of a token's gradient relative to its own norm
# and to that of an average token. PHI-S's rotation of bfloat16 predictions rounds them once more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Token by token, so that an error at one edge shows."""
    assert found.keys() == expected.keys(), f"{peer}: {list(found)}"
    limit = TOLERANCE[batch.targets[0].dtype]
    for name, right in expected.items():
        close(peer, name, found[name], right, limit)


SUITE = Suite(
    name="loss",
    cases=cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="images x grid of prediction (and target, after an arrow) x channels, kind of loss",
    goals={
        ("phi-s-16", "matrix"): Goal(time=0.08),  # at least 12 times as fast
        ("phi-s-16", "eager"): Goal(time=0.4, memory=0.5),
    },
    notes={
        "terms": "grid of prediction and target, or ->, x channels, kind; no grid: summaries",
        "bytes": "read the predictions, read the targets, write the gradients: no less will do",
        "compile_s": "the first call of the compiled peer, in a fresh cache",
    },
    seconds={"cpu": 2.5, "cuda": 0.5},
)
