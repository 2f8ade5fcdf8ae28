"""Packed attention against every other way to run a mixed batch.

    pytest bench/attention.py           # or `python -m bench attention`, which keeps the results
    pytest bench/attention.py -k SO400M --peers varlen,padded

Before any timing a peer's output, and its gradient, are compared with ours.

On CUDA: bfloat16, whole batches of about 32,000 tokens. On a CPU: float32, small batches, the
backend "torch". One call is the road from the QKV matrix to the output's. fla-core is no peer: its
packed attention is causal.
"""

from __future__ import annotations

import torch

from bench.attention_cases import cases
from bench.attention_peers import PEERS, Batch
from bench.engine import (
    Goal,
    Results,
    Suite,
    close,
    pytest_generate_tests,  # noqa: F401
    test_duel,  # noqa: F401
)

# Largest difference of a row, relative to its own norm and to that of an average row. Rounding
# stays well below; a key too many or too few does not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Row by row, so that an error in the shortest segment shows."""
    assert found.keys() == expected.keys(), f"{peer}: {list(found)}"
    for name, right in expected.items():
        close(peer, name, found[name], right, TOLERANCE[right.dtype])


SUITE = Suite(
    name="attention",
    cases=cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="student, heads x channels of each, batch (segments x rows of each)",
    goals={
        (f"B-mix-{direction}", peer): Goal(time=most)
        for direction in ("forward", "forward+backward")
        for peer, most in (("padded", 0.25), ("per-image", 1.05))
    },
    notes={
        "batch": "segments x rows of each",
        "tflops": "TFLOP/s at the median: 4 heads head_dim sum(rows^2), times 3.5 with the "
        "backward",
    },
    seconds={"cpu": 1.2, "cuda": 0.5},
)
