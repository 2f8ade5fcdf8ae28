"""How our own cost grows: with tokens, images, teachers, resolutions in a mix, and ranks.

    pytest bench/scaling.py            # or `python -m bench scaling`, which fits the exponents
    pytest bench/scaling.py -k ranks

Each point is a case without peers. The results fit an exponent to each curve; beside it stands the
one that the curve's FLOPs have. Ranks are real processes of one core or one GPU each, which all
make one step on images of their own: a flat curve (exponent 0) is a perfect one.

On CUDA: bfloat16. On a CPU: float32, smaller works, the backend "torch".
"""

from __future__ import annotations

from typing import Any

from bench.engine import (
    Results,
    Suite,
    pytest_generate_tests,  # noqa: F401
    test_duel,  # noqa: F401
)
from bench.scaling_cases import cases
from bench.scaling_runs import prepare


def compare(peer: str, found: Results, expected: Results, batch: Any) -> None:
    """There is nobody to compare with."""
    raise AssertionError(f"{peer}: the curves have no peers")


SUITE = Suite(
    name="scaling",
    cases=cases,
    batch=prepare,
    peers={"fastagglo": ("fastagglo", lambda run: run)},
    compare=compare,
    rows="what is done, and how much of it",
    notes={
        "expected_exponent": "that of a curve's FLOPs over the same points; for ranks 0: each has "
        "as much to do, whatever their number",
        "flops": "of ranks: of one of them",
        "rank_memory_bytes": "most memory of a rank beyond its inputs during a step; memory_mb is "
        "that of the process which waits for the ranks",
    },
    seconds={"cpu": 0.4, "cuda": 0.3},
)
