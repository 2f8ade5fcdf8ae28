"""fastagglo: fast, open training of agglomerative vision foundation models, and its fused ops.

Importing it takes no GPU, no network, and no package but torch, triton and numpy.
"""

import importlib
from importlib.metadata import version
from typing import Any

from fastagglo import distill, kernels, model, ops
from fastagglo.compress import Compress, compress
from fastagglo.features import Features

__version__ = version("fastagglo")

# Found when first asked for.
_INTEROP = (
    *("export_onnx", "export_package", "export_program", "load", "pack", "patch", "tome"),
    "unpatch",
)

__all__ = [
    "Compress",
    "Features",
    "__version__",
    "compress",
    "distill",
    "kernels",
    "model",
    "ops",
    *_INTEROP,
]


def __getattr__(name: str) -> Any:
    if name == "interop" or name in _INTEROP:
        interop = importlib.import_module("fastagglo.interop")
        return interop if name == "interop" else getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
