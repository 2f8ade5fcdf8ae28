"""A student as a torch.export program and as ONNX: what it says stays the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import skimage.data
import timm
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fastagglo
from fastagglo.errors import UserError
from fastagglo.interop import PlainStudent
from fastagglo.model import HeadSpec, Student, create_student

HEADS = {
    "clip": HeadSpec(summary=24, spatial=32, blocks=1, upsample=2),
    "sam": HeadSpec(spatial=8, spatial_blocks=1, pre_norm=True),
    "old": HeadSpec(summary=8, version="v1"),
}
SIZES = [(64, 64), (96, 160), (224, 128)]

# fp32 sums over at most 768 products, some ten deep; features are of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

# Runs a file on all arrays of an npz in a process that cannot import fastagglo.
ALONE = """
import sys
sys.modules["fastagglo"] = None
import numpy as np
path, images, out = sys.argv[1:]
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    call = lambda x: dict(zip(names, session.run(None, {"images": x})))
else:
    import torch
    model = torch.export.load(path).module()
    call = lambda x: {k: v.detach().numpy() for k, v in model(torch.from_numpy(x)).items()}
with np.load(images) as file:
    found = {f"{i} {k}": v for i in file.files for k, v in call(file[i]).items()}
np.savez(out, **found)
"""


def photos(height: int, width: int) -> Tensor:
    """Two real photographs at one size, (2, 3, H, W) in [0, 1]."""
    pictures = [skimage.data.astronaut(), skimage.data.chelsea()]
    batch = [torch.from_numpy(p).permute(2, 0, 1)[None] / 255 for p in pictures]
    sized = [nn.functional.interpolate(p, (height, width), mode="bilinear") for p in batch]
    return torch.cat(sized).clamp(0, 1)


def shaken(model: nn.Module) -> nn.Module:
    """The model with every parameter moved, so that none is without effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def small(window: int | None = None, **options: object) -> Student:
    torch.manual_seed(1)
    settings = {"depth": 2, "width": 48, "num_heads": 3, "max_resolution": 512, "heads": HEADS}
    settings |= {"window": window, "global_layers": (1,)} if window else {}
    return shaken(create_student("tiny", **(settings | options)))


@pytest.fixture(scope="module")
def student() -> Student:
    return small()


@pytest.fixture(scope="module")
def program(student: Student) -> ExportedProgram:
    assert student.training
    program = fastagglo.export_program(student)
    assert all(module.training for module in student.modules())
    return program


@pytest.fixture(autouse=True)
def _evaluation(student: Student) -> Iterator[None]:
    student.eval()
    yield
    student.train()


@torch.no_grad()
def expected(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return PlainStudent(model.eval())(images)


def assert_alone(path: Path, model: nn.Module, batches: list[Tensor], folder: Path) -> None:
    """A file says of the batches what the model says, in a process without fastagglo."""
    inputs = {str(i): images.numpy() for i, images in enumerate(batches)}
    np.savez(folder / "images.npz", **inputs)
    command = [sys.executable, "-c", ALONE, path, folder / "images.npz", folder / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = {
        f"{i} {name}": value
        for i, images in enumerate(batches)
        for name, value in expected(model, images).items()
    }
    with np.load(folder / "out.npz") as found:
        tensors = {name: torch.from_numpy(found[name]) for name in found.files}
    torch.testing.assert_close(tensors, wanted, **CLOSE)


def test_a_program_holds_standard_operators_alone(program: ExportedProgram) -> None:
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    libraries = {t.namespace for t in called if isinstance(t, torch._ops.OpOverload)}
    assert libraries == {"aten"}


@pytest.mark.parametrize("size", [*SIZES, (32, 512)], ids=str)
def test_a_program_serves_every_size(
    size: tuple[int, int], program: ExportedProgram, student: Student
) -> None:
    images = photos(*size)
    for batch in (images, images[:1], images.repeat(3, 1, 1, 1)):
        with torch.no_grad():
            found = program.module()(batch)
        wanted = expected(student, batch)
        assert {"backbone_summary", "clip_spatial", "sam_spatial", "old_summary"} < set(wanted)
        assert all(value.std() > 0.1 for value in wanted.values())
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_sizes_that_the_student_cannot_take_are_refused(program: ExportedProgram) -> None:
    for size in [(60, 64), (544, 64), (16, 64)]:
        with pytest.raises((RuntimeError, AssertionError)):
            program.module()(torch.rand(1, 3, *size))


def test_a_saved_program_runs_without_this_library(
    program: ExportedProgram, student: Student, tmp_path: Path
) -> None:
    torch.export.save(program, tmp_path / "student.pt2")
    batches = [photos(*size) for size in SIZES]
    assert_alone(tmp_path / "student.pt2", student, batches, tmp_path)


def test_onnx(student: Student, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "student.onnx"
    fastagglo.export_onnx(student, path)
    assert [p.name for p in path.parent.iterdir()] == ["student.onnx"]
    session = onnxruntime.InferenceSession(path)
    (images,) = session.get_inputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, "height", "width"])
    names = [output.name for output in session.get_outputs()]
    assert names == list(expected(student, photos(32, 32)))
    both = [photos(*size) for size in SIZES]
    assert_alone(path, student, [*both, both[0][:1]], tmp_path)


class Tower(nn.Module):
    """What a language model of LLaVA's kind sees of images: an encoder, a bridge, a projector."""

    def __init__(self, student: Student, tokens: int) -> None:
        super().__init__()
        self.student = student
        self.compress = fastagglo.Compress(tokens)
        width = student.config.width
        self.projector = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.compress(self.student(images, only=[]).backbone)
        return {"embeddings": self.projector(found.tokens), "mask": found.mask}


def test_the_bridge_to_a_language_model(tmp_path: Path) -> None:
    tower = Tower(small(window=2, heads={}), 49).eval()
    fastagglo.export_onnx(tower, tmp_path / "tower.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx")
    assert [output.name for output in session.get_outputs()] == ["embeddings", "mask"]
    for size in SIZES:  # 4 x 4, 6 x 10 and 14 x 8 patches
        images = photos(*size)
        embeddings, mask = session.run(None, {"images": images.numpy()})
        assert embeddings.shape == (2, 49, 64)
        with torch.no_grad():
            wanted = tower(images)
        assert torch.equal(torch.from_numpy(mask), wanted["mask"])
        assert mask.sum() == 2 * min(49, size[0] * size[1] // 256)
        torch.testing.assert_close(torch.from_numpy(embeddings), wanted["embeddings"], **CLOSE)


@torch.no_grad()
def test_a_patched_model_of_timm() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=2).eval()
    images = photos(64, 64)
    wanted = vit(images)
    assert not fastagglo.patch(vit).left
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(vit, (images,), dynamic_shapes=sizes).run_decompositions({})
    assert not [n for n in program.graph.nodes if "fastagglo" in str(n.target)]
    for batch in (images, images[:1]):
        torch.testing.assert_close(program.module()(batch), wanted[: len(batch)], **CLOSE)


def test_some_heads_alone(student: Student) -> None:
    for only, names in ((["clip"], ["clip_summary", "clip_spatial"]), ([], [])):
        images = torch.rand(1, 3, 32, 48)
        with torch.no_grad():
            found = PlainStudent(student, only)(images)
        assert list(found) == ["backbone_summary", "backbone_spatial", *names]
    with pytest.raises(ValueError, match="no teacher 'dinov'"):
        fastagglo.export_program(student, only=["dinov"])


def test_what_cannot_be_exported(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="Linear contains no Student"):
        fastagglo.export_program(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="got dict"):
        fastagglo.export_program({})
    with pytest.raises(TypeError, match="only= chooses among the heads"):
        fastagglo.export_program(nn.Sequential(student), only=["clip"])
    with pytest.raises(ValueError, match="at least 48 px"):
        fastagglo.export_program(create_student("tiny", depth=1, max_resolution=32))
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        fastagglo.export_package(student, tmp_path / "student.so")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'pip install "fastagglo\[export\]"'):
        fastagglo.export_onnx(student, tmp_path / "student.onnx")
