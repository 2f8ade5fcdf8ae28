"""The student: configuration, packed batches of mixed resolutions, the ViT, saving and loading."""

from fastagglo.model.budget import run_budget
from fastagglo.model.config import StudentConfig
from fastagglo.model.io import WarmStart, load_student, save_student, warm_start
from fastagglo.model.packing import PackedBatch
from fastagglo.model.student import Student, StudentOutput, create_student
from fastagglo.ops.heads import AdaptorHeads, AdaptorMLP, HeadSpec

__all__ = [
    "AdaptorHeads",
    "AdaptorMLP",
    "HeadSpec",
    "PackedBatch",
    "Student",
    "StudentConfig",
    "StudentOutput",
    "WarmStart",
    "create_student",
    "load_student",
    "run_budget",
    "save_student",
    "warm_start",
]
