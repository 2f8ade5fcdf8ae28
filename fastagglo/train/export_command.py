"""``python train.py export``: the student of a run for other runtimes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastagglo.errors import UserError
from fastagglo.interop import export_onnx, export_package, export_program
from fastagglo.interop.export import writing
from fastagglo.model import Student, load_student
from fastagglo.train.run_folder import STUDENT


def main(arguments: Sequence[str]) -> None:
    """Export the student of a run; ``arguments`` are those after ``export``."""
    chosen = parse(arguments)
    student = load(chosen.run)
    for name in chosen.teachers or ():
        if name not in student.config.heads:
            known = ", ".join(student.config.heads) or "none"
            raise UserError(f"--teachers: the student has no head {name!r}; it has {known}")
    if chosen.onnx:
        export_onnx(student, chosen.onnx, only=chosen.teachers)
    if chosen.program:
        with writing(chosen.program):
            torch.export.save(export_program(student, only=chosen.teachers), chosen.program)
    if chosen.package:
        export_package(student, chosen.package, only=chosen.teachers)
    for path in filter(None, (chosen.onnx, chosen.program, chosen.package)):
        print(f"wrote {path}", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The folder and the files of a command line after ``export``.

    Raises:
        UserError: no file to write, or one with an ending that does not fit.
    """
    parser = argparse.ArgumentParser(
        prog="train.py export",
        allow_abbrev=False,
        description="Write the student of a run as files that run without fastagglo, for any "
        "number of images, height and width.",
    )
    parser.add_argument("run", type=Path, help="a run's folder, or that of a saved student")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="ONNX")
    parser.add_argument(
        "--program", type=Path, metavar="FILE.pt2", help="for torch.export.load: any device"
    )
    parser.add_argument(
        "--package",
        type=Path,
        metavar="FILE.pt2",
        help="compiled by AOTInductor for this machine's CPU; needs a C++ compiler",
    )
    parser.add_argument(
        "--teachers",
        nargs="*",
        metavar="NAME",
        help="the heads to keep (default all); without a name the backbone alone",
    )
    chosen = parser.parse_args(list(arguments))
    files = {name: getattr(chosen, name) for name in ("onnx", "program", "package")}
    if not any(files.values()):
        raise UserError("export: say what to write: --onnx FILE, --program FILE or --package FILE")
    for name, path in files.items():
        ending = ".onnx" if name == "onnx" else ".pt2"
        if path and path.suffix != ending:
            raise UserError(f"--{name} must end in {ending}, got {str(path)!r}")
    return chosen


def load(folder: Path) -> Student:
    """The student of a run's folder, or of a folder of ``save_student``.

    Raises:
        UserError: neither holds a student, or it is damaged.
    """
    inside = folder / STUDENT
    return load_student(inside if inside.is_dir() else folder)
