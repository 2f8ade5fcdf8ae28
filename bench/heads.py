"""The adaptor heads of several teachers over one x, forward and backward, against their peers.

    pytest bench/heads.py               # or `python -m bench heads`, which keeps the results
    pytest bench/heads.py -k four-heads --peers eager

Before any timing a peer's outputs and gradients are compared with ours. Beside time and peak memory
stands what autograd keeps from the forward to the backward: each block of memory once, without x
and the parameters. On CUDA: bfloat16. On a CPU: float32, smaller cases, the backend "torch".
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
from bench.heads_cases import cases
from bench.heads_peers import PEERS, Batch

# Largest difference of an output or a gradient, relative to its norm; bfloat16 rounds each step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Outputs, then the gradients of x and of each parameter."""
    assert found.keys() == expected.keys(), f"{peer}: {list(found)}"
    for name, right in expected.items():
        assert found[name].shape == right.shape, f"{peer}: {name} has another shape"
        close(peer, name, found[name].flatten(), right.flatten(), TOLERANCE[right.dtype])


SUITE = Suite(
    name="heads",
    cases=cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="rows x channels of x, hidden and output channels of the heads",
    goals={("four-heads", "eager"): Goal(time=1.0, saved=0.6)},
    notes={
        "moved_mb": "what our passes read and write, each tensor of a pass once",
        "saved_mb": "what autograd keeps for the backward, without x and the parameters",
        "compile_s": "the first call of the compiled peer, in a fresh cache",
    },
    seconds={"cpu": 4.5, "cuda": 0.5},
)
