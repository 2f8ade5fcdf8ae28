"""The ops inside models of other libraries, and the student in other libraries' formats."""

from fastagglo.interop.load import load
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
    "PatchReport",
    "PatchedModule",
    "RadioMismatch",
    "RadioReport",
    "RadioStudent",
    "from_radio",
    "load",
    "load_radio",
    "patch",
    "save_radio",
    "to_radio",
    "unpatch",
]
