"""Students as transformers' models: ``AutoConfig``, ``AutoModel`` and ``AutoImageProcessor``.

Registered classes are local code, so nothing asks for ``trust_remote_code``. They are made when
:func:`register_transformers` is first called, for transformers is an extra.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError, require
from fastagglo.interop.hub import share, write_preprocessor
from fastagglo.interop.images import SIZE, prepare
from fastagglo.interop.load import from_pairs
from fastagglo.model import PackedBatch, Student, StudentConfig
from fastagglo.model.config import PRESETS
from fastagglo.model.io import MODEL_TYPE

__all__ = ["register_transformers"]

_CLASSES = ("FastaggloConfig", "FastaggloImageProcessor", "FastaggloModel", "FastaggloOutput")


def register_transformers() -> None:
    """Let transformers' Auto classes read students; call it once a process, again is harmless.

    Afterwards ``AutoModel.from_pretrained(folder)`` gives a ``FastaggloModel`` for a folder of
    ``train.py``, ``save_student``, ``PretrainedStudent`` or ``FastaggloModel``, without
    ``trust_remote_code``; its ``student`` is the :class:`~fastagglo.model.Student`. The model takes
    ``pixel_values`` (N, 3, H, W) in [0, 1], as ``AutoImageProcessor`` gives them, and returns
    ``last_hidden_state`` (N, prefix + patches, C), ``pooler_output`` (N, C_summary), ``features``
    (N, patches, C) and, when asked, ``hidden_states``.

    Raises:
        UserError: transformers is not installed; the message names the extra.
    """
    auto = require("transformers", extra="hub", purpose="register_transformers")
    made = _classes()
    auto.AutoConfig.register(MODEL_TYPE, made.FastaggloConfig, exist_ok=True)
    auto.AutoModel.register(made.FastaggloConfig, made.FastaggloModel, exist_ok=True)
    auto.AutoImageProcessor.register(
        made.FastaggloConfig,
        image_processor_classes={
            "torchvision": made.FastaggloImageProcessor,
            "pil": made.FastaggloImageProcessor,
        },
        exist_ok=True,
    )


@functools.cache
def _classes() -> SimpleNamespace:
    transformers = require("transformers", extra="hub", purpose="FastaggloModel")
    outputs = require("transformers.utils", extra="hub", purpose="FastaggloModel").ModelOutput
    processing = require(
        "transformers.image_processing_utils", extra="hub", purpose="FastaggloImageProcessor"
    )
    BatchFeature = processing.BatchFeature

    class FastaggloConfig(transformers.PreTrainedConfig):
        """A student's configuration for transformers.

        Args:
            student: a :class:`~fastagglo.model.StudentConfig`, or its fields as of ``to_dict``
                (``heads`` may be a list of pairs); None is the preset ``"B"``.
        """

        model_type = MODEL_TYPE

        def __init__(
            self, student: Mapping[str, Any] | StudentConfig | None = None, **kwargs: Any
        ) -> None:
            student = PRESETS["B"] if student is None else student
            if not isinstance(student, StudentConfig):
                student = from_pairs(student)
            # transformers sorts keys, but the order of the heads is that of their CLS tokens.
            pairs = [[name, spec.to_dict()] for name, spec in student.heads.items()]
            self.student = {**student.to_dict(), "heads": pairs}
            super().__init__(**kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            if "format" in config_dict:  # of save_student, whose fields stand at the top
                fields = [field.name for field in dataclasses.fields(StudentConfig)]
                student = {key: config_dict[key] for key in fields if key in config_dict}
                config_dict = {"model_type": MODEL_TYPE, "student": student}
            return super().from_dict(config_dict, **kwargs)

        @property
        def student_config(self) -> StudentConfig:
            """The configuration itself."""
            return from_pairs(self.student)

        # Under the names that other code of transformers asks for.
        hidden_size = property(lambda self: self.student["width"])
        num_hidden_layers = property(lambda self: self.student["depth"])
        num_attention_heads = property(lambda self: self.student["num_heads"])
        intermediate_size = property(lambda self: self.student["mlp_width"])
        patch_size = property(lambda self: self.student["patch_size"])
        image_size = property(lambda self: self.student["max_resolution"])
        num_channels = property(lambda self: 3)

    @dataclass
    class FastaggloOutput(outputs):
        """What a :class:`FastaggloModel` returns.

        Attributes:
            last_hidden_state: (N, prefix + patches, C), CLS tokens, registers, patches row by row.
            pooler_output: (N, C_summary), the summary: CLS tokens side by side.
            features: (N, patches, C), the patches, through the feature normaliser if there is one.
            hidden_states: depth + 1 tensors like the first, before the first block and after each.
        """

        last_hidden_state: Tensor | None = None
        pooler_output: Tensor | None = None
        features: Tensor | None = None
        hidden_states: tuple[Tensor, ...] | None = None

    class FastaggloModel(transformers.PreTrainedModel):
        """A student as a model of transformers; its ``student`` gives the teachers' features."""

        config_class = FastaggloConfig
        base_model_prefix = "student"
        main_input_name = "pixel_values"
        input_modalities = ("image",)
        _no_split_modules = ("Block",)

        def __init__(self, config: FastaggloConfig) -> None:
            super().__init__(config)
            self.student = Student(config.student_config)
            self.post_init()

        @classmethod
        def of(cls, student: Student) -> FastaggloModel:
            """A model with the very parameters of this student."""
            if not isinstance(student, Student):
                raise TypeError(
                    f"FastaggloModel.of: expected a Student, got {type(student).__name__}"
                )
            with torch.device("meta"):
                model = cls(FastaggloConfig(student.config))
            share(student, model.student)
            return model.train(student.training)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            """As of every model of transformers, but weights that do not fit are an error."""
            wanted = kwargs.pop("output_loading_info", False)
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[kind]:
                    names = ", ".join(map(str, sorted(info[kind])[:5]))
                    raise UserError(f"{args[0]} does not fit its config.json; {kind}: {names}")
            return (model, info) if wanted else model

        def save_pretrained(
            self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
        ) -> None:
            """As of every model of transformers; an image processor's settings come with it."""
            super().save_pretrained(save_directory, *args, **kwargs)
            write_preprocessor(self.student.config, Path(save_directory))

        def _init_weights(self, module: torch.nn.Module) -> None:
            """Nothing: a student has initialised itself."""

        def forward(
            self,
            pixel_values: Tensor,
            output_hidden_states: bool | None = None,
            return_dict: bool | None = None,
        ) -> FastaggloOutput | tuple[Any, ...]:
            """Features of (N, 3, H, W) images in [0, 1] (uint8: 0..255), not normalised."""
            student, config = self.student, self.student.config
            if output_hidden_states is None:
                output_hidden_states = self.config.output_hidden_states
            if return_dict is None:
                return_dict = self.config.return_dict
            batch = PackedBatch.from_images([pixel_values])
            place = student._geometry(*student._mix(batch, "config"))
            first = student._embed(batch, place, None)
            taken = dict.fromkeys(range(config.depth)) if output_hidden_states else {}
            keep = student._draw_keep(batch.num_images, first, None)
            last = student._run_blocks(first, place, keep, taken)
            first, last = (x.unflatten(0, (batch.num_images, -1)) for x in (first, last))
            tokens = student.norm(last)
            slots = [config.cls_names.index(name) for name in config.summary or config.cls_names]
            patches = tokens[:, config.prefix_tokens :]
            if student.feature_normaliser is not None:
                patches = student.feature_normaliser(patches)
            hidden = None
            if output_hidden_states:
                hidden = (first, *(value.view_as(first) for value in taken.values()))
            output = FastaggloOutput(tokens, tokens[:, slots].flatten(1), patches, hidden)
            return output if return_dict else output.to_tuple()

    class FastaggloImageProcessor(processing.BaseImageProcessor):
        """Photographs as a student takes them: RGB in [0, 1], sides that the patch divides.

        The student normalises pixels itself.

        Args:
            patch_size: pixels per patch and side.
            max_resolution: the longest side.
            size: ``{"height": h, "width": w}``, so that any images make one batch;
                ``{"shortest_edge": s}``, which keeps aspect ratios; or ``"native"``, each image's
                own size. Sides are rounded to the nearest multiple of ``patch_size``.
        """

        model_input_names = ("pixel_values",)

        def __init__(
            self,
            patch_size: int = 16,
            max_resolution: int = 2048,
            size: Mapping[str, int] | str = SIZE,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self.patch_size = patch_size
            self.max_resolution = max_resolution
            self.size = size if isinstance(size, str) else dict(size)

        def preprocess(
            self,
            images: Any,
            size: Mapping[str, int] | str | None = None,
            return_tensors: str | None = None,
        ) -> Any:
            """``pixel_values``: a list of (3, H, W), or with ``return_tensors`` one batch.

            Args:
                images: one or a list of PIL images, numpy arrays or tensors.
                size: as of the processor; None is the processor's.
                return_tensors: ``"pt"`` or ``"np"``; the images must have one size then.
            """
            size = self.size if size is None else size
            found = prepare(images, size, self.patch_size, self.max_resolution)
            sizes = sorted({tuple(image.shape[1:]) for image in found})
            if return_tensors is not None:
                if len(sizes) > 1:
                    raise ValueError(
                        f"images of sizes {sizes} make no one batch; give size as height and "
                        "width, or leave out return_tensors and use PackedBatch.from_images"
                    )
                found = torch.stack(found)
            return BatchFeature({"pixel_values": found}, tensor_type=return_tensors)

    made = SimpleNamespace(**{name: value for name, value in locals().items() if name in _CLASSES})
    for name in _CLASSES:  # as if they stood in the module: pickles find them by name
        kind = getattr(made, name)
        kind.__module__, kind.__qualname__ = __name__, name
    return made


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(_classes(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
