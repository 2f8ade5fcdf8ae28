"""The student on mixed and single resolutions against timm's ViT with the same weights.

    pytest bench/student.py              # or `python -m bench student`, which keeps the results
    pytest bench/student.py -k "mix and B-"

The trunk alone, without heads: uint8 images in, normed CLS tokens and patches out, and the
gradients of all parameters. In evaluation mode, in which positions are resized rather than cropped
at random, so that all peers must agree; drop path is off. On CUDA: bfloat16 weights. On a CPU:
float32 and small students.
"""

from __future__ import annotations

import torch

from bench import student_cases
from bench.engine import Goal, Results, Suite, close, pytest_generate_tests, test_duel  # noqa: F401
from bench.student_peers import PEERS, Batch

# Largest difference of a row, relative to its own norm and to that of an average row. fp32: sums of
# some thousand products in another order, through all layers. bfloat16: eight bits, likewise.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


def compare(peer: str, found: Results, expected: Results, batch: Batch) -> None:
    """Features of each image's tokens, and the gradient of each parameter.

    Raises:
        AssertionError: something differs, or is missing.
    """
    assert found.keys() == expected.keys(), f"{peer}: {set(found) ^ set(expected)} on one side only"
    for name, right in expected.items():
        close(peer, name, found[name], right, TOLERANCE[right.dtype])


def _goals() -> dict[tuple[str, str], Goal]:
    goals = {}
    for name in ("mix-demo", "mix-radio"):
        case = f"{name}-tiny-forward+backward"
        goals[case, "per-image"] = Goal(time=0.77, memory=0.5)
        goals[case, "padded"] = Goal(time=0.33, memory=0.5)
    return goals


SUITE = Suite(
    name="student",
    cases=student_cases.cases,
    batch=Batch.of,
    peers=PEERS,
    compare=compare,
    rows="student and its batch",
    goals=_goals(),
    notes={
        "tokens": "patches, CLS and register tokens of all images",
        "tokens_padded": "the same, each image as long as the longest",
        "compile_seconds": "of two calls that compile the blocks for all resolutions",
    },
)
