"""What the data pipeline is measured on: photographs as JPEG files, and the crops of a step."""

from __future__ import annotations

import functools
import io
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.data import CropStream, Filters, GroupPlan, PhotoSource, Source, StepPlan, TarSource
from fastagglo.data.crops import draw_views, whole
from fastagglo.data.order import sample_generator
from fastagglo.data.picture import Picture
from fastagglo.teachers import Teacher, TeacherSpec

QUALITY = 90
SMALL, LARGE = (500, 375), (2000, 1500)
SIZE = 224

# Of ImageNet, as most pipelines subtract them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGES = ("PIL", "torchvision", "simplejpeg", "turbojpeg", "kornia", "decode")


@dataclass(frozen=True)
class Case:
    """One step's crops from JPEG files.

    Attributes:
        id: for tests and results.
        width, height: of the photographs.
        count: images of the step.
        size: side of a crop.
        shard: read from a tar shard, else from memory.
        peers: who takes part beside us, by name in ``data_peers.PEERS``.
    """

    id: str
    width: int
    height: int
    count: int
    size: int = SIZE
    shard: bool = False
    peers: tuple[str, ...] = IMAGES

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of a case."""
        files = photos(self.width, self.height, self.count)
        where = "tar shard" if self.shard else "bytes"
        return {
            "label": f"{self.width}×{self.height} {where} -> {self.size}",
            "pass": "decode, crop, flip, resize, normalise",
            "images": self.count,
            "file_kb": round(sum(map(len, files)) / len(files) / 1e3, 1),
        }


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``; on CUDA the crops end there."""
    if quick:
        return [
            Case("small", 150, 112, 2, 32, peers=("PIL", "torchvision")),
            Case("shard", 150, 112, 2, 32, shard=True, peers=("webdataset",)),
        ]
    peers = (*IMAGES, "nvjpeg") if device == "cuda" else IMAGES
    small, large = (64, 32) if device == "cuda" else (16, 8)
    found = [
        Case("small", *SMALL, small, peers=peers),
        Case("large", *LARGE, large, peers=peers),
        Case("shard", *SMALL, small, shard=True, peers=("webdataset",)),
    ]
    if device == "cuda":  # RADIOv2.5's and C-RADIOv4's larger crops
        found.insert(2, Case("large-432", *LARGE, large, 432, peers=peers))
        found.insert(3, Case("large-768", *LARGE, large, 768, peers=peers))
    return found


@functools.cache
def photos(width: int, height: int, count: int) -> tuple[bytes, ...]:
    """The built-in photographs, enlarged or reduced to a size, their edges cut, as JPEG files.

    Enlarged ones hold less detail, and take fewer bytes a pixel, than a camera's: of what a decoder
    does for each of them it has less to do. The results say how large the files are.
    """
    from PIL import Image

    source = PhotoSource()
    files: dict[int, bytes] = {}
    indices = [
        i * len(source) // count if count < len(source) else i % len(source) for i in range(count)
    ]
    for index in indices:
        if index in files:
            continue
        image = source.image(index)
        factor = max(width / image.width, height / image.height)
        sides = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = (sides[0] - width) // 2, (sides[1] - height) // 2
        file = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=QUALITY)
        files[index] = file.getvalue()
    return tuple(files[index] for index in indices)


class Memory(Source):
    """Files in memory."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return f"{index:04d}"

    def read(self, index: int) -> bytes:
        return self.files[index]


@dataclass(frozen=True)
class Crop:
    """What every peer is told to make of an image.

    Attributes:
        key: of the image.
        data: the file.
        left, top, width, height: of the box, in whole pixels of the file.
        flip: left to right.
    """

    key: str
    data: bytes
    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Batch:
    """A step of our stream, and the same crops for the others.

    Attributes:
        case: as above.
        device: where the crops go.
        stream: ours.
        crops: what it shows at step 0, in its order.
        shard: the tar file, if the case has one.
        mean, std: ``(1, 3, 1, 1)`` on the CPU.
    """

    case: Case
    device: str
    stream: CropStream
    crops: tuple[Crop, ...]
    shard: Path | None
    mean: Tensor = field(default_factory=lambda: torch.tensor(MEAN).view(1, 3, 1, 1))
    std: Tensor = field(default_factory=lambda: torch.tensor(STD).view(1, 3, 1, 1))
    folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """The same in every run."""
        files = photos(case.width, case.height, case.count)
        folder = shard = None
        source: Source = Memory(files)
        if case.shard:
            folder = tempfile.TemporaryDirectory()
            shard = Path(folder.name) / "photos-000.tar"
            with tarfile.open(shard, "w") as tar:
                for index, data in enumerate(files):
                    entry = tarfile.TarInfo(f"{index:04d}.jpg")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
            source = TarSource(shard)
        plan = StepPlan((GroupPlan(case.size, case.count),))
        # The filter is the recipes' own: it costs us something, and none of the others has it.
        stream = CropStream(source, lambda step: plan, seed=0, filters=Filters(uniform_std=2.0))
        keys = {source.key(index): index for index in range(len(source))}
        crops = []
        for position, key in enumerate(stream[0].keys):
            data = source.read(keys[key])
            views = draw_views(
                sample_generator(stream.seed, position, 0), case.width, case.height, stream.crops
            )
            shrink = Picture(data).shrink(min(views.boxes[0][2:]) / case.size)
            sides = (-(-side // shrink) for side in (case.width, case.height))
            left, top, width, height = (
                edge * shrink for edge in whole(views.scaled(1 / shrink).boxes[0], *sides)
            )
            box = (left, top, min(width, case.width - left), min(height, case.height - top))
            crops.append(Crop(key.rpartition("/")[2], data, *box, views.flip))
        return cls(case, device, stream, tuple(crops), shard, folder=folder)


class Normaliser(torch.nn.Module):
    """A tower that hands out what it is given."""

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, x


def normaliser(size: int) -> Teacher:
    """How the trainer normalises a batch: a teacher's own first steps, and nothing after them."""
    spec = TeacherSpec("normaliser", size, size, size, MEAN, STD, None, size)
    return Teacher(spec, Normaliser())
