"""The ops inside models of other libraries, and the student in other libraries' formats."""

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

__all__ = [
    "PackedModel",
    "PatchReport",
    "PatchedModule",
    "RadioMismatch",
    "RadioReport",
    "RadioStudent",
    "from_radio",
    "load",
    "load_radio",
    "pack",
    "patch",
    "save_radio",
    "to_radio",
    "unpatch",
]
