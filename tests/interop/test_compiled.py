"""A student compiled for a CPU, by torch.compile and ahead of time by AOTInductor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastagglo
from fastagglo.errors import UserError
from fastagglo.model import Student, create_student

SIZES = [(64, 64), (96, 160), (32, 512)]

# fp32 sums over at most 768 products; features are of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

# In a process that cannot import fastagglo.
ALONE = """
import sys
sys.modules["fastagglo"] = None
import torch
folder = sys.argv[1]
package = torch._inductor.aoti_load_package(f"{folder}/student.pt2")
batches = torch.load(f"{folder}/images.pt")
torch.save([package(images)["backbone_spatial"] for images in batches], f"{folder}/out.pt")
"""


@pytest.fixture
def student() -> Student:
    model = create_student("tiny", depth=1, width=48, num_heads=3, max_resolution=512).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.rand(i + 1, 3, *size) for i, size in enumerate(SIZES)]


def test_a_package(student: Student, batches: list[Tensor], tmp_path: Path) -> None:
    fastagglo.export_package(student, tmp_path / "student.pt2")
    torch.save(batches, tmp_path / "images.pt")
    command = [sys.executable, "-c", ALONE, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        wanted = [student(images).backbone.spatial[0] for images in batches]
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_package_needs_a_compiler(student: Student, tmp_path: Path) -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        fastagglo.export_package(student, tmp_path / "student.pt2")


def test_torch_compile(student: Student, batches: list[Tensor]) -> None:
    with torch.no_grad():
        found, wanted = torch.compile(student)(batches[1]).backbone, student(batches[1]).backbone
    torch.testing.assert_close(found.spatial, wanted.spatial, **CLOSE)
    torch.testing.assert_close(found.summary, wanted.summary, **CLOSE)
