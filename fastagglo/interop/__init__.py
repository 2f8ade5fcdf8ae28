"""The ops inside models of other libraries."""

from fastagglo.interop.patching import PatchedModule, PatchReport, patch, unpatch

__all__ = ["PatchReport", "PatchedModule", "patch", "unpatch"]
