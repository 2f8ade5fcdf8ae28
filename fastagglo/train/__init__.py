"""The trainer: configuration, loop, checkpoints, telemetry."""

from fastagglo.train.config import RunConfig
from fastagglo.train.distributed import choose_device, process_group
from fastagglo.train.loop import Trainer
from fastagglo.train.recipe import load_recipe, parse_arguments, recipe_names
from fastagglo.train.student import build_student, stated_widths

__all__ = [
    "RunConfig",
    "Trainer",
    "build_student",
    "choose_device",
    "load_recipe",
    "parse_arguments",
    "process_group",
    "recipe_names",
    "stated_widths",
]
