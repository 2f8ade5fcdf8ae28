"""From JPEG files to a normalised batch of crops: ours, and the usual ways, one thread each."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data_cases import MEAN, STD, Batch, Crop, normaliser
from bench.engine import OURS, Results, Unavailable
from fastagglo.data.picture import Picture

Images = Callable[[], Tensor]
Decoder = Callable[[bytes], Tensor]


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core: data workers have one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Run:
    """A pipeline that makes the whole batch, ``(N, 3, S, S)`` float32 on the batch's device."""

    def __init__(self, batch: Batch, images: Images, **info: Any) -> None:
        self.images = images
        self.info: Mapping[str, Any] = info
        self.input_bytes = sum(len(crop.data) for crop in batch.crops)

    def __call__(self) -> Tensor:
        with one_thread():
            return self.images()

    def results(self) -> Results:
        """The pixels, images in our order."""
        return {"pixels": self()}


def library(name: str, pip: str) -> ModuleType:
    """An optional package, or ``Unavailable``."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise Unavailable(f"{pip} is not installed: pip install {pip}") from error


def ours(batch: Batch) -> Run:
    """A step of the stream as the trainer asks for it, and a teacher's normalisation."""
    teacher = normaliser(batch.case.size).to(batch.device)

    def images() -> Tensor:
        pixels = batch.stream[0].to(batch.device).groups[0].student
        return teacher(pixels).spatial

    return Run(batch, images)


class Floor(Run):
    """What a library takes for decoding alone; the crops are made only to be compared."""

    def __init__(self, batch: Batch, decode: Callable[[], list[Any]], crops: Any) -> None:
        super().__init__(batch, decode)  # type: ignore[arg-type]
        self.decoded, self.finished = decode, crops

    def results(self) -> Results:
        return {"pixels": self.finished(self.decoded())}


def simplejpeg_floor(batch: Batch) -> Floor:
    """simplejpeg at the scale that a crop allows: no pipeline around it can take less."""
    decode_jpeg = library("simplejpeg", "simplejpeg").decode_jpeg
    size, width, height = batch.case.size, batch.case.width, batch.case.height
    shrinks = [
        Picture(crop.data).shrink(min(crop.width, crop.height) / size) for crop in batch.crops
    ]
    parts = [
        dataclasses.replace(
            crop,
            left=crop.left // s,
            top=crop.top // s,
            width=-(-crop.width // s),
            height=-(-crop.height // s),
        )
        for crop, s in zip(batch.crops, shrinks, strict=True)
    ]

    def decode() -> list[np.ndarray]:
        return [
            decode_jpeg(c.data, min_height=-(-height // s), min_width=-(-width // s), min_factor=s)
            for c, s in zip(batch.crops, shrinks, strict=True)
        ]

    crop_of = _v2_crop(batch)

    def crops(images: list[np.ndarray]) -> Tensor:
        planes = (torch.from_numpy(image).permute(2, 0, 1) for image in images)
        return torch.stack([crop_of(c, image) for c, image in zip(parts, planes, strict=True)]).to(
            batch.device
        )

    return Floor(batch, decode, crops)


def pil(batch: Batch) -> Run:
    """Pillow and torchvision's first transforms: what most training code does."""
    crop_of = _pillow(batch.case.size)

    def images() -> Tensor:
        return torch.stack([crop_of(crop, _opened(crop.data)) for crop in batch.crops]).to(
            batch.device
        )

    return Run(batch, images)


def _opened(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _pillow(size: int) -> Callable[[Crop, Any], Tensor]:
    transforms = library("torchvision.transforms", "torchvision")
    functional = transforms.functional
    normalise = transforms.Normalize(MEAN, STD)

    def crop_of(crop: Crop, image: Any) -> Tensor:
        image = functional.resized_crop(
            image,
            crop.top,
            crop.left,
            crop.height,
            crop.width,
            [size, size],
            transforms.InterpolationMode.BILINEAR,
        )
        if crop.flip:
            image = functional.hflip(image)
        return normalise(functional.to_tensor(image))

    return crop_of


def _v2_crop(batch: Batch) -> Callable[[Crop, Tensor], Tensor]:
    """torchvision's second transforms in the order of its documentation: uint8 up to the crop."""
    v2 = library("torchvision.transforms.v2", "torchvision")
    functional, size = v2.functional, [batch.case.size] * 2
    normalise = v2.Normalize(MEAN, STD)

    def crop_of(crop: Crop, image: Tensor) -> Tensor:
        image = functional.resized_crop(
            image,
            crop.top,
            crop.left,
            crop.height,
            crop.width,
            size,
            v2.InterpolationMode.BILINEAR,
            antialias=True,
        )
        if crop.flip:
            image = functional.horizontal_flip(image)
        return normalise(functional.to_dtype(image, torch.float32, scale=True))

    return crop_of


def _v2(batch: Batch, decoder: Decoder, **info: Any) -> Run:
    """A decoder, and torchvision's second transforms."""
    crop_of = _v2_crop(batch)

    def images() -> Tensor:
        return torch.stack([crop_of(c, decoder(c.data)) for c in batch.crops]).to(batch.device)

    return Run(batch, images, **info)


def torchvision(batch: Batch) -> Run:
    """``decode_jpeg`` and the second transforms."""
    io_ = library("torchvision.io", "torchvision")

    def decoder(data: bytes) -> Tensor:
        # The copy makes it writable memory, which from_buffer asks for.
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return io_.decode_jpeg(raw, io_.ImageReadMode.RGB)

    return _v2(batch, decoder)


def _array(decode: Callable[[bytes], np.ndarray]) -> Decoder:
    return lambda data: torch.from_numpy(decode(data)).permute(2, 0, 1)


def simplejpeg(batch: Batch) -> Run:
    """simplejpeg, whole images, and the second transforms."""
    return _v2(batch, _array(library("simplejpeg", "simplejpeg").decode_jpeg))


def turbojpeg(batch: Batch) -> Run:
    """PyTurboJPEG, whole images, and the second transforms."""
    package = library("turbojpeg", "PyTurboJPEG")
    try:
        codec = package.TurboJPEG()
    except RuntimeError as error:
        raise Unavailable("PyTurboJPEG finds no libturbojpeg on this machine") from error
    return _v2(batch, _array(functools.partial(codec.decode, pixel_format=package.TJPF_RGB)))


def kornia(batch: Batch) -> Run:
    """kornia-rs, whole images, and the second transforms."""
    package = library("kornia_rs.io", "kornia-rs")
    decode = getattr(package, "decode_image_jpegturbo", None)
    if decode is None:
        raise Unavailable("this kornia-rs has no decode_image_jpegturbo in kornia_rs.io")
    return _v2(batch, _array(lambda data: np.asarray(decode(data, "rgb"))))


def webdataset(batch: Batch) -> Run:
    """webdataset's reader of the shard, Pillow and the first transforms, as its users have it."""
    wds = library("webdataset", "webdataset")
    if batch.shard is None:
        raise Unavailable("reads tar shards only")
    crops = {crop.key: crop for crop in batch.crops}
    rows = {crop.key: row for row, crop in enumerate(batch.crops)}
    crop_of = _pillow(batch.case.size)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        data = wds.WebDataset(str(batch.shard), shardshuffle=False).decode("pil")
        for sample in data:
            key = sample["__key__"]
            yield key, crop_of(crops[key], sample["jpg"])

    def images() -> Tensor:
        return torch.stack([image for _, image in pairs()]).to(batch.device)

    class Sorted(Run):
        def results(self) -> Results:
            found = dict(pairs())
            return {"pixels": torch.stack([found[key] for key in rows]).to(batch.device)}

    return Sorted(batch, images)


def nvjpeg(batch: Batch) -> Run:
    """Decoding and transforms on the GPU."""
    if batch.device != "cuda":
        raise Unavailable("needs CUDA")
    io_ = library("torchvision.io", "torchvision")
    v2 = library("torchvision.transforms.v2", "torchvision")
    functional, size = v2.functional, [batch.case.size] * 2
    normalise = v2.Normalize(MEAN, STD)

    def images() -> Tensor:
        raw = [torch.frombuffer(bytearray(crop.data), dtype=torch.uint8) for crop in batch.crops]
        decoded = io_.decode_jpeg(raw, io_.ImageReadMode.RGB, device=batch.device)
        found = []
        for crop, image in zip(batch.crops, decoded, strict=True):
            place = (crop.top, crop.left, crop.height, crop.width)
            image = functional.resized_crop(image, *place, size, antialias=True)
            found.append(functional.horizontal_flip(image) if crop.flip else image)
        return normalise(functional.to_dtype(torch.stack(found), torch.float32, scale=True))

    return Run(batch, images)


PEERS: dict[str, tuple[str, Callable[[Batch], Run]]] = {
    OURS: ("fastagglo's CropStream (simplejpeg at DCT scale) and a teacher's normalisation", ours),
    "PIL": ("Pillow, torchvision v1 resized crop, ToTensor, Normalize", pil),
    "torchvision": ("torchvision decode_jpeg, v2 resized crop, ToDtype, Normalize", torchvision),
    "simplejpeg": ("simplejpeg whole, v2 resized crop, ToDtype, Normalize", simplejpeg),
    "turbojpeg": ("PyTurboJPEG whole, v2 resized crop, ToDtype, Normalize", turbojpeg),
    "kornia": ("kornia-rs whole, v2 resized crop, ToDtype, Normalize", kornia),
    "webdataset": ("webdataset's reader, Pillow, torchvision v1 transforms", webdataset),
    "decode": ("simplejpeg's decoding alone, at the scale that the crop allows", simplejpeg_floor),
    "nvjpeg": ("torchvision decode_jpeg (nvJPEG) and v2 transforms on the GPU", nvjpeg),
}
