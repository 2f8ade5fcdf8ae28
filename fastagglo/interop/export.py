"""The student outside of this library: ``torch.export``, ONNX, and AOTInductor's compiled package.

While ``torch.export`` traces, the ops give standard operators (``fastagglo/ops/exporting.py``), so
what is written here runs where fastagglo is not installed. One file serves every number of images,
height and width.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastagglo.errors import UserError, require
from fastagglo.features import Features
from fastagglo.model import Student

__all__ = ["PlainStudent", "export_onnx", "export_package", "export_program"]


class PlainStudent(nn.Module):
    """A student with plain tensors on both sides, as other runtimes expect them.

    Args:
        student: the student, whose parameters it shares.
        only: names of the teachers to compute, as of :meth:`fastagglo.model.Student.forward`. None
            means all; an empty collection leaves the backbone alone.

    Raises:
        TypeError: not a :class:`~fastagglo.model.Student`.
        ValueError: an unknown teacher.
    """

    def __init__(self, student: Student, only: Collection[str] | None = None) -> None:
        super().__init__()
        if not isinstance(student, Student):
            raise TypeError(f"PlainStudent: expected a Student, got {type(student).__name__}")
        self.student = student
        self.only = student.heads.select(only)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features by name.

        Args:
            images: (N, 3, H, W) RGB in [0, 1]; H and W multiples of the patch (of the window).

        Returns:
            ``backbone_summary`` (N, CLS tokens * C), ``backbone_spatial`` (N, h, w, C), and of each
            teacher ``<name>_summary`` (N, C) and ``<name>_spatial`` (N, h, w, C) where it has them.
        """
        output = self.student(images, only=self.only)
        found: dict[str, Features] = {"backbone": output.backbone, **output}
        tensors = {}
        for name, features in found.items():
            if features.summary is not None:
                tensors[f"{name}_summary"] = features.summary
            if features.spatial is not None:
                tensors[f"{name}_spatial"] = features.spatial[0]
        return tensors


def export_program(model: nn.Module, *, only: Collection[str] | None = None) -> ExportedProgram:
    """Trace a student, or a module around one, into standard operators of PyTorch.

    Batch, height and width of the images stay open: any number of images; sides from two patches
    (windows) up to the student's ``max_resolution``, multiples of the patch (window) on both.
    Dropout and position crops are off, as in evaluation.

    Args:
        model: a :class:`~fastagglo.model.Student`, which is wrapped in :class:`PlainStudent`; or a
            module that contains one and whose ``forward`` takes images (N, 3, H, W) alone and gives
            tensors, or tuples, lists or dicts of them. Its mode and parameters are left as they
            are.
        only: the teachers to compute, of a :class:`~fastagglo.model.Student`; None means all.

    Returns:
        a ``torch.export.ExportedProgram`` for ``torch.export.save``, ``torch.onnx.export`` and
        ``torch._inductor.aoti_compile_and_package``; ``program.module()`` runs it. Images must be
        fp32, on the device that the model is on now.

    Raises:
        TypeError: a model without a student, or ``only`` for another module than a student.
        ValueError: an unknown teacher, or a student of too few patches to leave its sizes open.
    """
    model, student = _plain(model, only)
    config = student.config
    unit = config.patch_size * (config.window or 1)
    most = config.grid * config.patch_size // unit
    if most < 3:
        raise ValueError(
            f"export: open sizes need a max_resolution of at least {3 * unit} px, three times the "
            f"patch or window; the student's is {config.grid * config.patch_size}"
        )
    # Two sides that differ, and more than one image: an example must not look like a special case.
    example = torch.rand(2, 3, 2 * unit, 3 * unit, device=student.patch_embed.weight.device)
    with _evaluating(model), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=(_open_sizes(unit, most),))
        program = program.run_decompositions({})
    program.graph_module.graph.eliminate_dead_code()
    return program


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], *, only: Collection[str] | None = None
) -> None:
    """Write a student, or a module around one, as ONNX with open batch, height and width.

    The input is ``images``, fp32 (N, 3, H, W) in [0, 1]. The outputs of a student are named as
    those of :class:`PlainStudent`; of another module ``<key>`` or ``output_<i>``. Weights beyond
    2 GB, which ONNX cannot hold in one file, go to ``<path>.data``.

    Args:
        model, only: as of :func:`export_program`.
        path: the file; its folder is made if need be.

    Raises:
        TypeError, ValueError: as of :func:`export_program`.
        UserError: onnx or onnxscript is not installed, or the file cannot be written.
    """
    require("onnx", extra="export", purpose="ONNX export")
    require("onnxscript", extra="export", purpose="ONNX export")
    with writing(path):
        onnx_program = torch.onnx.export(
            program := export_program(model, only=only),
            input_names=["images"],
            output_names=_output_names(program),
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            dynamo=True,
            verbose=False,
        )
        onnx_program.save(path)


def export_package(
    model: nn.Module, path: str | os.PathLike[str], *, only: Collection[str] | None = None
) -> None:
    """Compile a student, or a module around one, with AOTInductor for the device that it is on.

    ``torch._inductor.aoti_load_package(path)(images)`` runs it, from Python or C++, on this kind of
    machine. Compiling takes a C++ compiler and, for a large student, minutes.

    Args:
        model, only: as of :func:`export_program`.
        path: the file, ending in ``.pt2``; its folder is made if need be.

    Raises:
        TypeError, ValueError: as of :func:`export_program`, or a path with another ending.
        UserError: there is no C++ compiler, or the file cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"export_package: path must end in .pt2, got {str(path)!r}")
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    with writing(path):
        try:
            aoti_compile_and_package(export_program(model, only=only), package_path=str(path))
        except InductorError as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler):
                raise
            raise UserError("export_package needs a C++ compiler, such as g++") from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make the folder of a file first; whatever cannot be written is a UserError with its name."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _plain(model: nn.Module, only: Collection[str] | None) -> tuple[nn.Module, Student]:
    if isinstance(model, Student):
        return PlainStudent(model, only), model
    if not isinstance(model, nn.Module):
        raise TypeError(f"export: expected a Student or a module, got {type(model).__name__}")
    if only is not None:
        raise TypeError("export: only= chooses among the heads of a Student; leave it out here")
    student = next((m for m in model.modules() if isinstance(m, Student)), None)
    if student is None:
        raise TypeError(
            f"export: {type(model).__name__} contains no Student; export it with "
            "torch.export.export or torch.onnx.export, in which the ops are standard operators"
        )
    return model, student


def _open_sizes(unit: int, most: int) -> dict[int, Any]:
    return {
        0: Dim("batch", min=1),
        2: unit * Dim("rows", min=2, max=most),
        3: unit * Dim("columns", min=2, max=most),
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _output_names(program: ExportedProgram) -> list[str]:
    """A name per tensor: the keys that lead to it."""
    spec = program.call_spec.out_spec
    leaves = torch.utils._pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = torch.utils._pytree.tree_flatten_with_path(leaves)
    names = []
    for path, i in paths:
        keys = [str(key.key) for key in path if hasattr(key, "key")]
        names.append("_".join(keys) if keys else f"output_{i}")
    return names
