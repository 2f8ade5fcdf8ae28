"""Run the modules of ``interpreted/`` in Triton's interpreter, each in a process of its own.

Kernels are wrapped for the interpreter when their module is imported, so that it cannot be switched
on here. One test for each module, so that the workers of pytest-xdist share them out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton

ROOT = Path(__file__).parents[2]
MODULES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


@pytest.mark.skipif(
    _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4),
    reason="this Triton's interpreter takes arrays for numbers, which this numpy does not allow",
)
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_in_the_interpreter(module: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        # A worker's own settings are not for the processes that it starts.
        if not name.startswith(("PYTEST_", "COV_")) and name != "FASTAGGLO_BACKEND"
    }
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(module), "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}"
    passed = re.search(r"^(\d+) passed", run.stdout, re.MULTILINE)
    assert passed, run.stdout
    assert int(passed[1]) > 0


def test_there_are_modules() -> None:
    assert MODULES
