"""A student with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

These are of huggingface_hub's mixin. The folders are those of ``save_student``: what reads one
reads the other.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastagglo.errors import require
from fastagglo.interop.images import SIZE
from fastagglo.interop.load import load
from fastagglo.model import Student, StudentConfig, save_student
from fastagglo.model.io import CONFIG, WEIGHTS

__all__ = ["share", "write_preprocessor"]

PREPROCESSOR = "preprocessor_config.json"


def write_preprocessor(config: StudentConfig, folder: Path) -> None:
    """What transformers' AutoImageProcessor reads, unless the folder has it."""
    values = {
        "image_processor_type": "FastaggloImageProcessor",
        "max_resolution": config.max_resolution,
        "patch_size": config.patch_size,
        "size": SIZE,
    }
    if not (folder / PREPROCESSOR).exists():
        (folder / PREPROCESSOR).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@functools.cache
def _pretrained_student() -> type[Student]:
    hub = require("huggingface_hub", extra="hub", purpose="PretrainedStudent")

    class PretrainedStudent(
        Student,
        hub.PyTorchModelHubMixin,
        library_name="fastagglo",
        pipeline_tag="image-feature-extraction",
        tags=["vision-foundation-model", "distillation"],
    ):
        """A :class:`~fastagglo.model.Student` that saves itself and loads from a folder or the Hub.

        ``save_pretrained(folder)``, ``push_to_hub(name)`` and ``from_pretrained(folder or name)``
        are those of ``huggingface_hub.PyTorchModelHubMixin``; a loaded one is in evaluation mode.
        Needs the extra ``fastagglo[hub]``.

        Args:
            config: as of a student; the weights are fresh.
        """

        def __init__(self, config: StudentConfig) -> None:
            Student.__init__(self, config)

        @classmethod
        def of(cls, student: Student) -> PretrainedStudent:
            """This student, with the same parameters: both see what is trained."""
            if not isinstance(student, Student):
                raise TypeError(
                    f"PretrainedStudent.of: expected a Student, got {type(student).__name__}"
                )
            with torch.device("meta"):
                made = cls(student.config)
            return share(student, made)

        def _save_pretrained(self, save_directory: Path) -> None:
            save_student(self, save_directory)
            write_preprocessor(self.config, Path(save_directory))

        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            config: object = None,  # the mixin's reading of config.json; load() reads it itself
            map_location: str = "cpu",
        ) -> PretrainedStudent:
            folder = model_id
            if not os.path.isdir(model_id):
                folder = hub.snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[WEIGHTS, CONFIG],
                )
            return cls.of(load(folder, map_location)).eval()

    # As if it stood in the module: pickles find it by name.
    PretrainedStudent.__module__ = __name__
    PretrainedStudent.__qualname__ = "PretrainedStudent"
    return PretrainedStudent


def share(student: Student, other: Any) -> Any:
    """Give ``other``, a student of the same configuration, the very parameters of ``student``."""
    for name, module in student.named_modules():
        twin = other.get_submodule(name)
        twin._parameters.update(module._parameters)
        twin._buffers.update(module._buffers)
    return other.train(student.training)


def __getattr__(name: str) -> Any:
    if name == "PretrainedStudent":
        return _pretrained_student()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
