"""Crops that the device decodes: the CPU's crops, from its own decoder in nvJPEG's place."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastagglo.data import (
    CropStream,
    Filters,
    GroupPlan,
    PhotoSource,
    Source,
    StepPlan,
    TrainBatch,
    make_loader,
)
from fastagglo.data.nvjpeg import decode_crops
from fastagglo.errors import UserError

torchvision_io = pytest.importorskip("torchvision.io")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def library(files: list[Tensor]) -> list[Tensor]:
    return torchvision_io.decode_jpeg(files, torchvision_io.ImageReadMode.RGB)


def encode(image: Image.Image, kind: str = "JPEG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


class Photos(Source):
    """Photographs: JPEGs, one of them turned, and every fourth a PNG; and what else is given."""

    def __init__(self, *others: bytes, count: int = 8) -> None:
        photos = PhotoSource()
        images = [photos.image(i) for i in range(count)]
        self.files = [
            encode(image, "PNG" if i % 4 == 3 else "JPEG", 6 if i == 1 else 1)
            for i, image in enumerate(images)
        ] + list(others)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return f"photo{index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


PLAN = StepPlan(
    (GroupPlan(64, 5, {"a": 64, "b": 96}), GroupPlan(48, 3, {"a": 32}), GroupPlan(8, 0))
)


def stream(source: Source, **options: object) -> CropStream:
    return CropStream(source, lambda step: PLAN, seed=3, scale=(0.05, 0.5), **options)  # type: ignore[arg-type]


def views(batch: TrainBatch) -> list[Tensor]:
    return [view for g in batch.groups for view in (g.student, *g.teachers.values())]


def test_crops_are_those_of_the_cpu() -> None:
    source = Photos()
    steps = [stream(source)[step] for step in range(3)]
    asked = stream(source, encoded=True)
    done = 0
    for right, batch in zip(steps, (asked[step] for step in range(3)), strict=True):
        waiting = [group.encoded for group in batch.groups]
        done += sum(len(crops.rows) for crops in waiting if crops is not None)
        assert waiting[2] is None
        found = decode_crops(pickle.loads(pickle.dumps(batch)), library)  # as from a worker
        assert all(group.encoded is None for group in found.groups)
        assert found.groups[0].teachers["a"] is found.groups[0].student
        assert (found.keys, found.skipped, found.bad) == (right.keys, {}, [])
        for one, other in zip(views(found), views(right), strict=True):
            assert one.shape == other.shape
            difference = (one.float() - other.float()).abs()
            # Whole pixels, also of a photo that the CPU decodes at a part of its scale.
            assert difference.numel() == 0 or difference.mean() < 6
    assert 24 * 0.4 < done < 24  # without the PNGs and the turned one


def test_equal_but_for_rounding_where_the_cpu_decodes_the_whole() -> None:
    """Crops below twice the view: both resize the same pixels."""
    source = Photos(count=3)
    plan = StepPlan((GroupPlan(224, 6),))
    options = {"seed": 1, "scale": (0.3, 1.0)}
    right = CropStream(source, lambda step: plan, **options)[0]  # type: ignore[arg-type]
    batch = CropStream(source, lambda step: plan, encoded=True, **options)[0]  # type: ignore[arg-type]
    assert batch.groups[0].encoded is not None
    sides = [min(place[2:]) for place in batch.groups[0].encoded.places]
    small = [r for r, s in zip(batch.groups[0].encoded.rows, sides, strict=True) if s < 448]
    assert len(small) >= 2
    found = decode_crops(batch, library)
    for row in small:
        difference = found.groups[0].student[row].int() - right.groups[0].student[row].int()
        assert difference.abs().max() <= 1
        assert difference.float().mean().abs() < 0.25  # rounded, not cut off


def broken(image: Image.Image) -> bytes:
    """A JPEG with a whole header and an end, and nothing that any decoder takes between them."""
    data = bytearray(encode(image))
    at = data.find(b"\xff\xc4")  # Huffman tables that claim more codes than there can be
    data[at + 5 : at + 21] = b"\xff" * 16
    return bytes(data)


def test_a_broken_file_is_counted_and_its_row_shows_another() -> None:
    bad = broken(PhotoSource().image(0))
    with pytest.raises(RuntimeError):
        library([torch.frombuffer(bytearray(bad), dtype=torch.uint8)])
    source = Photos(bad, count=3)
    plan = StepPlan((GroupPlan(32, 4, {"a": 48}),))
    batch = CropStream(source, lambda step: plan, seed=0, encoded=True)[0]
    assert sorted(batch.keys) == ["photo0", "photo1", "photo2", "photo3"]
    row = batch.keys.index("photo3")
    found = decode_crops(batch, library)
    assert found.skipped == {"corrupt": 1}
    assert found.bad == [("photo3", "corrupt")]
    other = next(r for r in (row + 1, 0) if r < 4)
    assert found.keys[row] == found.keys[other] != "photo3"
    for view in views(found):
        assert view[row].equal(view[other])
        assert view[row].float().std() > 5


def test_a_group_of_broken_files_shows_another_groups_photo() -> None:
    bad = broken(PhotoSource().image(0))
    plan = StepPlan((GroupPlan(48, 1, {"a": 64}), GroupPlan(32, 2), GroupPlan(8, 0)))
    batch = CropStream(Photos(bad, count=2), lambda step: plan, seed=0, encoded=True)
    step = next(i for i in range(20) if batch[i].keys[0] == "photo2")
    found = decode_crops(batch[step], library)
    assert found.keys[0] == found.keys[1] != "photo2"
    assert found.skipped == {"corrupt": 1}
    alone, others, _ = found.groups
    assert alone.student.shape == (1, 3, 48, 48)
    whole = others.student[:1].float()
    for view in (alone.student, alone.teachers["a"]):
        right = torch.nn.functional.interpolate(
            whole, view.shape[2:], mode="bilinear", antialias=True
        )
        assert (view - right).abs().max() <= 0.5


def test_a_batch_of_broken_files_ends_the_run() -> None:
    class Broken(Photos):
        def __init__(self) -> None:
            self.files = [broken(PhotoSource().image(0))] * 2

    plan = StepPlan((GroupPlan(32, 2),))
    batch = CropStream(Broken(), lambda step: plan, seed=0, encoded=True)[0]
    with pytest.raises(UserError, match="none of the 2 images of a batch"):
        decode_crops(batch, library)


def test_what_pillow_takes_is_taken() -> None:
    """As of a file that nvJPEG knows nothing of."""

    def none(files: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("unsupported")

    source = Photos(count=3)
    right = decode_crops(stream(source, encoded=True)[0], library)
    found = decode_crops(stream(source, encoded=True)[0], none)
    assert found.skipped == {}
    assert all(map(torch.equal, views(found), views(right)))


def test_what_does_not_go_together() -> None:
    source = Photos(count=2)
    with pytest.raises(ValueError, match="a CUDA device, got cpu"):
        make_loader(stream(source, encoded=True), 0, 1, device="cpu")
    with pytest.raises(ValueError, match="a CUDA device, got None"):
        make_loader(stream(source, encoded=True), 0, 1)
    with pytest.raises(ValueError, match="encoded goes with fixed_crops 0"):
        stream(source, encoded=True, fixed_crops=2)
    with pytest.raises(ValueError, match=r"filters.uniform_std 0, got 0 and 2"):
        stream(source, encoded=True, filters=Filters(uniform_std=2.0))
    shifted = StepPlan((GroupPlan(64, 1, shift_std=0.5),))
    with pytest.raises(ValueError, match="encoded goes with shift_std 0"):
        CropStream(source, lambda step: shifted, seed=0, encoded=True)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_nvjpeg_gives_nearly_the_same(workers: int) -> None:
    source = Photos()
    loader = make_loader(stream(source, encoded=True), 0, 4, workers=workers, device="cuda")
    for step, batch in enumerate(loader):
        right = stream(source)[step]
        assert batch.keys == right.keys
        for one, other in zip(views(batch), views(right), strict=True):
            difference = (one.cpu().float() - other.float()).abs()
            assert difference.numel() == 0 or difference.mean() < 6
