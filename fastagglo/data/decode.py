"""From the bytes of an image file to an upright RGB image."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from fastagglo.errors import require

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485
"""The largest image that is decoded, width times height: Pillow's own warning limit (1 GiB of
memory at 4 bytes and 3 copies). A header that claims more is rejected before any decoding."""

EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pnm"]
)
"""File name extensions, lower case, that the sources take for images."""

# Named so that no other decoder of Pillow ever sees bytes from outside: EPS starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112


class BadImage(Exception):
    """An image that cannot be used.

    Attributes:
        reason: one word that is counted, e.g. ``"corrupt"``.
        detail: what was found, for the reader of the report.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, shrink: int = 1) -> Image:
    """Decode an image file.

    Greyscale, palette and CMYK images become RGB; 16-bit ones keep their high byte; alpha is laid
    over white, as browsers do; EXIF orientation is applied; of several frames the first counts.

    Args:
        data: the bytes of a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM file.
        max_pixels: the largest width times height that is decoded.
        shrink: 2, 4 or 8 leaves out what a JPEG's pixels have in detail: a pixel then covers so
            many of the file's, along both sides. Other formats come whole.

    Returns:
        A loaded Pillow image of mode RGB (``numpy.asarray`` of it is ``(H, W, 3)`` uint8).

    Raises:
        BadImage: "too_large", or "corrupt" for bytes that are no whole image of these formats.
        UserError: Pillow is not installed.
    """
    pil = require("PIL.Image", extra="train", purpose="decoding images")
    try:
        with pil.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage("too_large", f"{width} x {height} is above {max_pixels} pixels")
            if shrink > 1:
                image.draft("RGB", (width // shrink, height // shrink))
            image.load()
            return upright(_to_rgb(image), _orientation(image))
    except BadImage:
        raise
    except pil.DecompressionBombError as error:
        raise BadImage("too_large", str(error)) from error
    except Exception as error:
        # Decoders meet broken bytes with nearly every exception there is: OSError, SyntaxError,
        # ValueError, struct.error, KeyError, ... None of them may end a training run.
        raise BadImage("corrupt", f"{len(data)} bytes, {error or type(error).__name__}") from error


def jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and EXIF orientation of a JPEG file in grey or RGB; None for any other file."""
    pil = require("PIL.Image", extra="train", purpose="decoding images")
    try:
        with pil.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.mode in ("L", "RGB"):
                return *image.size, _orientation(image)
    except Exception:  # no JPEG, or a broken one: as many kinds as above
        pass
    return None


def _to_rgb(image: Image) -> Image:
    from PIL import Image as pil

    if image.mode.startswith("I"):  # 16 bits, also where Pillow keeps them in 32 (PGM)
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return pil.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # floats in [0, 1] or in [0, 255]
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        values = values * 255 if values.max(initial=0) <= 1 else values
        return pil.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = pil.new("RGBA", colours.size, "white")
        return pil.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block on a sound image: as if it had none
        return 1


def upright(image: Image, orientation: int) -> Image:
    """The image as its EXIF orientation, 1 to 8, wants it shown."""
    from PIL.Image import Transpose

    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)
