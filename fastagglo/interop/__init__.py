"""The ops inside models of other libraries, and the student in other libraries' formats."""

from importlib import import_module
from typing import Any

from fastagglo.interop import tome
from fastagglo.interop.export import PlainStudent, export_onnx, export_package, export_program
from fastagglo.interop.load import load
from fastagglo.interop.packing import PackedModel, pack
from fastagglo.interop.patching import PatchedModule, PatchReport, patch, unpatch
from fastagglo.interop.radio import (
    RadioMismatch,
    RadioReport,
    RadioStudent,
    from_radio,
    load_radio,
    save_radio,
    to_radio,
)
from fastagglo.interop.transformers_model import register_transformers

# Found when first asked for: they stand on optional packages.
_LATER = {
    "FastaggloConfig": "transformers_model",
    "FastaggloImageProcessor": "transformers_model",
    "FastaggloModel": "transformers_model",
    "PretrainedStudent": "hub",
}

__all__ = [
    "PackedModel",
    "PatchReport",
    "PatchedModule",
    "PlainStudent",
    "RadioMismatch",
    "RadioReport",
    "RadioStudent",
    "export_onnx",
    "export_package",
    "export_program",
    "from_radio",
    "load",
    "load_radio",
    "pack",
    "patch",
    "register_transformers",
    "save_radio",
    "to_radio",
    "tome",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"fastagglo.interop.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
