"""Decoding: every kind of file becomes upright RGB, or is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastagglo.data import BadImage, decode


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def scene(height: int = 24, width: int = 40) -> np.ndarray:
    """An image without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, (x + 2 * y) * 2], -1).clip(0, 255).astype(np.uint8)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(kind: str) -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(scene()), kind)), scene())


def test_webp_and_jpeg_are_close() -> None:
    webp = encoded(Image.fromarray(scene()), "WEBP", lossless=True)
    assert np.array_equal(pixels(webp), scene())
    jpeg = pixels(encoded(Image.fromarray(scene()), "JPEG", quality=95))
    assert np.abs(jpeg.astype(int) - scene()).mean() < 3  # quality 95 keeps smooth ramps


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette(mode: str) -> None:
    image = Image.fromarray(scene()).convert(mode)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    mean = pixels(encoded(red, "JPEG", quality=95)).mean((0, 1))
    assert np.abs(mean - (220, 30, 40)).max() < 6  # JPEG's rounding; inverted would be far off


def test_16_bit_keeps_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 128, 255]
    assert pixels(encoded(Image.fromarray(values)))[0, :, 0].tolist() == expected
    pgm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    assert pixels(pgm)[0, :, 2].tolist() == expected
    tiff = encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert pixels(tiff)[0, :, 1].tolist() == expected


def test_float_images() -> None:
    unit = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 127, 255]
    wide = np.array([[-5.0, np.nan, 200.0, np.inf]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 0, 200, 255]


def test_alpha_lies_over_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    assert pixels(encoded(Image.fromarray(rgba)))[0, :, 0].tolist() == [255, 127, 0]
    la = Image.fromarray(rgba).convert("LA")
    assert pixels(encoded(la))[0, :, 1].tolist() == [255, 127, 0]


def test_transparent_palette_entry_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG", transparency=0)
    assert pixels(data)[0].tolist() == [[255, 255, 255], [0, 200, 0]]
    assert pixels(encoded(image, "GIF", transparency=0))[0].tolist()[1] == [0, 200, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(scene()), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    found = pixels(data)
    assert found.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert np.array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_as_none() -> None:
    data = encoded(Image.fromarray(scene()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff")
    assert pixels(data).shape == (24, 40, 3)


def test_one_pixel() -> None:
    assert pixels(encoded(Image.new("L", (1, 1), 7))).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_is_corrupt(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(BadImage) as caught:
        decode(data[: len(data) // 2])
    assert caught.value.reason == "corrupt"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image at all",
        b"<html>404</html>",
        b"\xff\xd8\xff",
        # A format with an interpreter behind it is not even tried.
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
    ],
)
def test_not_an_image_is_corrupt(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == "corrupt"
    assert f"{len(data)} bytes" in caught.value.detail


@pytest.mark.parametrize("side", [9_460, 60_000])  # above our limit; above Pillow's own as well
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_header_is_refused_before_decoding(side: int) -> None:
    with pytest.raises(BadImage) as caught:
        decode(bomb(side, side))
    assert caught.value.reason == "too_large"


def test_pixel_limit_is_exact() -> None:
    data = encoded(Image.new("RGB", (10, 10)))
    assert decode(data, max_pixels=100).size == (10, 10)
    with pytest.raises(BadImage, match=r"10 x 10 is above 99 pixels"):
        decode(data, max_pixels=99)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_flipped_bytes_give_an_image_or_bad_image(kind: str) -> None:
    random = np.random.default_rng(5)
    data = np.frombuffer(encoded(Image.fromarray(scene()), kind), dtype=np.uint8)
    reasons = set()
    for _ in range(150):
        broken = data.copy()
        places = random.integers(0, min(len(data), 200), 3)
        broken[places] = random.integers(0, 256, 3)
        try:
            mode = decode(broken.tobytes(), max_pixels=10_000).mode
        except BadImage as error:  # any other exception fails the test
            reasons.add(error.reason)
        else:
            assert mode == "RGB"
    assert "corrupt" in reasons
    assert reasons <= {"corrupt", "too_large"}
