from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = str(Path(__file__).parent)


@pytest.fixture(scope="session")
def kernels() -> Iterator[ModuleType]:
    """The module example_kernels.py beside this file, importable by name as from its own folder."""
    sys.path.insert(0, FOLDER)
    try:
        yield importlib.import_module("example_kernels")
    finally:
        sys.path.remove(FOLDER)
