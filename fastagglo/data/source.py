"""Sources of images: random access by index, with a stable id for each image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from fastagglo.data.decode import MAX_PIXELS, BadImage
from fastagglo.data.picture import Picture
from fastagglo.data.plan import check_float

if TYPE_CHECKING:
    from PIL.Image import Image


class Source(ABC):
    """Images by index, ``0 .. len(source) - 1``. Subclasses give ``__len__``, ``key``, ``read``.

    Attributes:
        shards: how many consecutive indices lie in one file or on one disk region; the order of an
            epoch stays within a few of them at a time. One shard by default.
        held_out: the keys that :func:`fastagglo.data.split` holds out by default, or None.
    """

    held_out: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The stable id of an image: the same in every run and on every machine."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of the image file. Raises OSError where they cannot be read."""

    @property
    def shards(self) -> Sequence[int]:
        return (len(self),)

    def image(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Image:
        """The upright RGB image (Pillow). It may be shared: do not change it in place.

        Raises:
            BadImage: "unreadable", "too_large" or "corrupt".
        """
        return self.picture(index, max_pixels=max_pixels).image()

    def picture(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Picture:
        """The upright RGB image, decoded when its pixels are wanted.

        Raises:
            BadImage: "unreadable", "too_large", or "corrupt" as far as the header tells.
        """
        try:
            data = self.read(index)
        except OSError as error:
            raise BadImage("unreadable", str(error)) from error
        return Picture(data, max_pixels=max_pixels)


class CachedImages:
    """The RGB images last used, decoded, up to a number of bytes; the oldest go first.

    An image that is asked for as an array takes three quarters of its bytes once more.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._images: OrderedDict[int, Image] = OrderedDict()
        self._pixels: dict[int, np.ndarray] = {}
        self._bytes = 0

    def get(self, index: int) -> Image | None:
        image = self._images.get(index)
        if image is not None:
            self._images.move_to_end(index)
        return image

    def pixels(self, index: int) -> np.ndarray | None:
        """The image as ``(height, width, 3)`` uint8, also kept: a part of it is no copy."""
        image = self.get(index)
        if image is not None and index not in self._pixels:
            self._pixels[index] = np.array(image)
        return self._pixels.get(index)

    def put(self, index: int, image: Image) -> None:
        if index in self._images or self._size(image) > self.capacity:
            return
        self._images[index] = image
        self._bytes += self._size(image)
        while self._bytes > self.capacity:
            oldest, dropped = self._images.popitem(last=False)
            self._pixels.pop(oldest, None)
            self._bytes -= self._size(dropped)

    @staticmethod
    def _size(image: Image) -> int:
        return 4 * image.width * image.height  # Pillow pads RGB to four bytes

    def __reduce__(self) -> tuple[type[CachedImages], tuple[int]]:
        return CachedImages, (self.capacity,)  # a spawned worker fills its own


class Subset(Source):
    """Some images of another source, in the given order of its indices, which must rise."""

    def __init__(self, source: Source, indices: Iterable[int]) -> None:
        self.source = source
        self.indices = np.asarray(list(indices), dtype=np.int64)
        if len(self.indices) and (
            self.indices[0] < 0
            or self.indices[-1] >= len(source)
            or (np.diff(self.indices) <= 0).any()
        ):
            raise ValueError(f"indices must rise within 0 .. {len(source) - 1}")

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def image(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Image:
        return self.source.image(int(self.indices[index]), max_pixels=max_pixels)

    def picture(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Picture:
        return self.source.picture(int(self.indices[index]), max_pixels=max_pixels)

    @property
    def shards(self) -> Sequence[int]:
        ends = np.cumsum(np.asarray(self.source.shards, dtype=np.int64))
        counts = np.diff(np.searchsorted(self.indices, ends), prepend=0)
        return [int(count) for count in counts if count]


class Mixture(Source):
    """Several sources, drawn from in fixed proportions.

    Each source is gone through in epochs of its own, so a small source with a large weight
    repeats sooner; proportions are exact to 1/10,000 over each 10,000 images, with at least one
    image of each source among them.

    Args:
        parts: (source, weight) pairs; the weights need not sum to 1.

    Raises:
        TypeError: a part that is no such pair.
        ValueError: no parts, an empty source, a weight that is not above 0.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]) -> None:
        self.sources: list[Source] = []
        weights: list[float] = []
        for part in parts:
            if not (isinstance(part, (tuple, list)) and len(part) == 2):
                raise TypeError(f"parts must be (source, weight) pairs, got {part!r}")
            source, weight = part
            if not isinstance(source, Source):
                raise TypeError(f"a part must start with a source, got {type(source).__name__}")
            if check_float("a weight", weight, 0.0, float("inf")) == 0:
                raise ValueError("a weight must be above 0, got 0; leave the source out instead")
            if len(source) == 0:
                raise ValueError(f"a source of the mixture is empty: {type(source).__name__}")
            self.sources.append(source)
            weights.append(float(weight))
        if not self.sources:
            raise ValueError("parts must hold at least one (source, weight) pair, got none")
        self.weights = [weight / sum(weights) for weight in weights]
        self.starts = np.cumsum([0, *(len(source) for source in self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Which source an index falls into, and the index within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0 .. {len(self) - 1}")
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def key(self, index: int) -> str:
        part, local = self.locate(index)
        return self.sources[part].key(local)

    def read(self, index: int) -> bytes:
        part, local = self.locate(index)
        return self.sources[part].read(local)

    def image(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Image:
        part, local = self.locate(index)
        return self.sources[part].image(local, max_pixels=max_pixels)

    def picture(self, index: int, *, max_pixels: int = MAX_PIXELS) -> Picture:
        part, local = self.locate(index)
        return self.sources[part].picture(local, max_pixels=max_pixels)

    @property
    def shards(self) -> Sequence[int]:
        return [count for source in self.sources for count in source.shards]


def file_digest(source: Source, index: int) -> bytes:
    """16 bytes that stand for an image file's bytes. Raises OSError where they cannot be read."""
    return blake2b(source.read(index), digest_size=16).digest()


def find_duplicates(source: Source) -> np.ndarray:
    """Which images are byte for byte another image of a lower index.

    Reads every file once. A file that cannot be read is no duplicate.

    Returns:
        ``(len(source),)`` bool.
    """
    seen: set[bytes] = set()
    duplicate = np.zeros(len(source), dtype=bool)
    for index in range(len(source)):
        try:
            digest = file_digest(source, index)
        except OSError:
            continue
        duplicate[index] = digest in seen
        seen.add(digest)
    return duplicate
