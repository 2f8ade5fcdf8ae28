"""``train.py export``: files, and what is said where there can be none."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.interop import PlainStudent
from fastagglo.model import HeadSpec, Student, create_student, save_student
from fastagglo.train import export_command


@pytest.fixture
def student() -> Student:
    heads = {"clip": HeadSpec(summary=8, spatial=8), "sam": HeadSpec(spatial=8)}
    return create_student("tiny", heads=heads, depth=1).eval()


def test_files(student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_student(student, tmp_path / "run" / "student")
    onnx, program = tmp_path / "a.onnx", tmp_path / "new" / "b.pt2"
    files = ["--onnx", str(onnx), "--program", str(program)]
    export_command.main([str(tmp_path / "run"), *files, "--teachers", "clip"])
    assert capsys.readouterr().out == f"wrote {onnx}\nwrote {program}\n"
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        wanted = PlainStudent(student, ["clip"])(images)
        loaded = torch.export.load(program).module()(images)
    torch.testing.assert_close(loaded, wanted)
    session = onnxruntime.InferenceSession(onnx)
    assert [output.name for output in session.get_outputs()] == list(wanted)


def test_errors(student: Student, tmp_path: Path) -> None:
    save_student(student, tmp_path / "student")
    with pytest.raises(UserError, match="say what to write"):
        export_command.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"--onnx must end in \.onnx, got 'a\.pb'"):
        export_command.main([str(tmp_path), "--onnx", "a.pb"])
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        export_command.main([str(tmp_path / "nothing"), "--onnx", "a.onnx"])
    with pytest.raises(UserError, match="no head 'dinov2'; it has clip, sam"):
        export_command.main([str(tmp_path), "--onnx", "a.onnx", "--teachers", "dinov2"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        export_command.main([str(tmp_path), "--program", str(tmp_path / "file" / "a.pt2")])
