"""Images for training and evaluation: sources, held-out data, crops, deterministic batches."""

from fastagglo.data.build import build_source
from fastagglo.data.decode import BadImage, decode
from fastagglo.data.folder import FolderSource
from fastagglo.data.loader import make_loader
from fastagglo.data.photos import PhotoSource
from fastagglo.data.plan import GroupPlan, GroupViews, StepPlan, TrainBatch
from fastagglo.data.source import Mixture, Source, Subset, find_duplicates
from fastagglo.data.split import Split, split
from fastagglo.data.stream import CropStream, Filters, SkipCounter
from fastagglo.data.tar import TarSource
from fastagglo.data.views import eval_views

__all__ = [
    "BadImage",
    "CropStream",
    "Filters",
    "FolderSource",
    "GroupPlan",
    "GroupViews",
    "Mixture",
    "PhotoSource",
    "SkipCounter",
    "Source",
    "Split",
    "StepPlan",
    "Subset",
    "TarSource",
    "TrainBatch",
    "build_source",
    "decode",
    "eval_views",
    "find_duplicates",
    "make_loader",
    "split",
]
