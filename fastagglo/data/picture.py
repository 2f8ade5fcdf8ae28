"""An image file that is decoded when its pixels are wanted, and no larger than they are wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastagglo.data.decode import MAX_PIXELS, BadImage, decode, jpeg_header, upright

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    import simplejpeg
except ImportError:  # Pillow decodes to the same pixels, and takes half as long again
    simplejpeg = None

SHRINKS = (8, 4, 2)
"""Divisors of a JPEG's sides at which it decodes faster: its transform's finer parts are left out.
Scales between them cost more than the whole."""

# EXIF and XMP, by which a camera says which side is up. Pillow reads them; most files of a data set
# have neither, and then need not be opened a second time.
_ORIENTED = (b"Exif\0\0", b"tiff:Orientation")


_END = b"\xff\xd9"


class Picture:
    """An upright RGB image: its size at once, its pixels on demand.

    Args:
        data: the bytes of an image file.
        max_pixels: the largest width times height that is decoded.

    Attributes:
        width, height: of the file's pixels, upright.

    Raises:
        BadImage: "too_large", or "corrupt" as far as the header tells.
    """

    def __init__(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
        self._data = data
        self._max_pixels = max_pixels
        self._image: Image | None = None
        self._pixels: np.ndarray | None = None
        found = _jpeg_header(data)
        if found is None:  # of other formats Pillow knows no cheaper form
            self._set(decode(data, max_pixels=max_pixels))
            return
        width, height, self._orientation = found
        if width * height > max_pixels:
            raise BadImage("too_large", f"{width} x {height} is above {max_pixels} pixels")
        self.width, self.height = (height, width) if self._orientation > 4 else (width, height)

    @classmethod
    def of(cls, image: Image, pixels: np.ndarray | None = None) -> Picture:
        """A decoded image as a picture; ``pixels`` is the same as an array, if there is one."""
        picture = cls.__new__(cls)
        picture._set(image)
        picture._pixels = pixels
        return picture

    def _set(self, image: Image) -> None:
        self._image = image
        self.width, self.height = image.size

    def shrink(self, most: float) -> int:
        """The largest divisor up to ``most``, of 8, 4, 2 and 1, that makes decoding cheaper."""
        if self._image is not None:
            return 1
        # Turned or mirrored, a side's last pixel comes first: it must not be one cut short.
        sides = self.width | self.height if self._orientation > 1 else 0
        return next((s for s in SHRINKS if s <= most and sides % s == 0), 1)

    def image(self) -> Image:
        """The pixels (Pillow, RGB). It may be shared: do not change it in place.

        Raises:
            BadImage: "corrupt".
        """
        if self._image is None:
            self._image = decode(self._data, max_pixels=self._max_pixels)
        return self._image

    @property
    def decoded(self) -> bool:
        """Whether the pixels are in memory."""
        return self._image is not None

    @property
    def plain_jpeg(self) -> bytes | None:
        """The file, if it is a whole JPEG whose pixels lie as they are shown; else None."""
        whole = self._image is None and self._orientation == 1 and self._data.endswith(_END)
        return self._data if whole else None

    def pixels(self, shrink: int = 1, rows: int | None = None) -> Image | np.ndarray:
        """The pixels at a scale, in the form that costs least.

        Args:
            shrink: a divisor that :meth:`shrink` gave, or 1.
            rows: so many of the first rows are wanted; None for all. What lies below may be
                missing from the result.

        Returns:
            ``(ceil(height / shrink), ceil(width / shrink), 3)`` uint8, or a Pillow image, RGB, of
            that size: ``shrink`` by ``shrink`` of the file's pixels make one.

        Raises:
            BadImage: "corrupt".
        """
        if self._image is not None:
            return self._image if self._pixels is None else self._pixels
        if simplejpeg is not None:
            turned = self._orientation > 4
            sides = (self.width, self.height) if turned else (self.height, self.width)
            data = self._data
            if rows is not None and self._orientation == 1:
                data, sides = _first_rows(data, sides, rows * shrink)
            least = [-(-side // shrink) for side in sides]
            try:
                array = simplejpeg.decode_jpeg(
                    data,
                    min_height=least[0],
                    min_width=least[1],
                    min_factor=shrink,
                    strict=data is self._data,  # else the rest of the rows is a surprise
                )
            except ValueError:  # broken, or of a rare kind that Pillow may know
                array = None
            if array is not None and list(array.shape) == [*least, 3]:
                return array if self._orientation == 1 else _turned(array, self._orientation)
        return decode(self._data, max_pixels=self._max_pixels, shrink=shrink)


_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, in Huffman codes
_WORTH = 16  # rows are left out where they are at least this part of all: the copy costs, too


def _first_rows(
    data: bytes, sides: tuple[int, int], rows: int
) -> tuple[bytes | bytearray, tuple[int, int]]:
    """A JPEG file that ends early, which costs a decoder less; or the file itself.

    A header that claims fewer rows than there are makes a decoder stop after them. What it has
    decoded by then is the same as of the whole file: blocks come row by row, in each scan. One row
    of blocks more is kept than is wanted, for colours are interpolated between neighbours.

    Args:
        data: a JPEG file.
        sides: its height and width.
        rows: so many of its first rows are wanted.

    Returns:
        The file, and its height and width.
    """
    height, width = sides
    # Without its end mark a file is broken, and whoever decodes all of it finds out.
    if rows >= height - height // _WORTH or not data.endswith(_END):
        return data, sides
    at = 2
    while data[at : at + 1] == b"\xff" and at + 9 < len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            block = 8 * max((data[i] & 15 for i in range(at + 11, at + 2 + length, 3)), default=0)
            keep = -(-rows // block) * block + block if block else height
            stated = int.from_bytes(data[at + 5 : at + 7], "big")
            if keep > height - height // _WORTH or stated != height:
                return data, sides
            short = bytearray(data)
            short[at + 5 : at + 7] = keep.to_bytes(2, "big")
            return short, (keep, width)
        at += 2 + length
    return data, sides


def _turned(array: np.ndarray, orientation: int) -> Image:
    from PIL import Image

    return upright(Image.fromarray(array), orientation)


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """As ``decode.jpeg_header``, faster for files whose orientation cannot but be 1."""
    if not data.startswith(b"\xff\xd8"):
        return None
    head = data[: data.find(b"\xff\xda")]  # up to the pixels, or to those of a thumbnail in EXIF
    if simplejpeg is not None and not any(mark in head for mark in _ORIENTED):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return jpeg_header(data)
        return (width, height, 1) if colours in ("Gray", "RGB", "YCbCr") else None
    return jpeg_header(data)
