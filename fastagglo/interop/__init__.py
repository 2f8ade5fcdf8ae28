"""The ops inside models of other libraries: timm, transformers, open_clip."""

from fastagglo.interop.patching import PatchedModule, PatchReport, patch, unpatch

__all__ = ["PatchReport", "PatchedModule", "patch", "unpatch"]
