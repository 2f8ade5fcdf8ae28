"""Tests of kernels that run: on a GPU as they are, without one in Triton's interpreter.

The interpreter must be chosen before Triton is imported: a plain ``pytest`` on a machine without a
GPU leaves this folder out, and ``tests/kernels/test_interpreter.py`` runs each of its modules in a
process of its own. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastagglo.ops.backend import INTERPRETED

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

# The modules here share files, which pytest's importlib mode would not find by name.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("packed_cases", "merge_cases", "loss_cases")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    """Fresh tensors hold NaN, so that a row that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(()).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
