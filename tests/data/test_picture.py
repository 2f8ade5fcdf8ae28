"""Pictures decoded late and small: Pillow's pixels, from fewer of the file's details."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from torch import Tensor

from fastagglo.data import (
    BadImage,
    CropStream,
    Filters,
    GroupPlan,
    GroupViews,
    Source,
    StepPlan,
    decode,
    picture,
)
from fastagglo.data.crops import Box, cut, draw_views, render, resize, whole
from fastagglo.data.order import sample_generator
from fastagglo.data.picture import Picture
from fastagglo.data.variety import spread, varies
from fastagglo.errors import UserError

ORIENTATION = 0x0112


def waves(width: int, height: int) -> Image.Image:
    """Colours that vary over some ten pixels, without any symmetry."""
    y, x = np.mgrid[:height, :width]
    bands = [np.sin(x / 9 + y / 31), np.cos(x * y / 9000), np.sin(x / 40 - y / 23)]
    return Image.fromarray((127.5 + 120 * np.stack(bands, axis=-1)).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    if orientation != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 90} | options))
    return file.getvalue()


def drafted(data: bytes, shrink: int) -> np.ndarray:
    """What Pillow makes of a JPEG at a scale, upright."""
    with Image.open(io.BytesIO(data)) as image:
        size = tuple(-(-side // shrink) for side in image.size)
        image.draft("RGB", (image.width // shrink, image.height // shrink))
        assert image.size == size
        return np.asarray(ImageOps.exif_transpose(image.convert("RGB")))


@pytest.fixture(params=["simplejpeg", "Pillow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Pillow":
        monkeypatch.setattr(picture, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_pixels_are_pillows(library: str, shrink: int, sampling: int) -> None:
    data = jpeg(waves(333, 217), subsampling=sampling)
    found = Picture(data)
    assert (found.width, found.height) == (333, 217)
    assert found.shrink(shrink) == shrink
    assert np.array_equal(np.asarray(found.pixels(shrink)), drafted(data, shrink))
    assert isinstance(found.pixels(shrink), np.ndarray) == (library == "simplejpeg")


@pytest.mark.parametrize("kind", ["L", "RGB as it is", "progressive"])
def test_other_jpegs(library: str, kind: str) -> None:
    image = waves(96, 64).convert("L" if kind == "L" else "RGB")
    data = jpeg(image, keep_rgb=kind.startswith("RGB"), progressive=kind == "progressive")
    for shrink in (1, 4):
        found = Picture(data)
        assert found.shrink(shrink) == shrink
        assert np.array_equal(np.asarray(found.pixels(shrink)), drafted(data, shrink))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(library: str, orientation: int) -> None:
    data = jpeg(waves(160, 96), orientation)
    found = Picture(data)
    assert (found.width, found.height) == ((160, 96) if orientation < 5 else (96, 160))
    for shrink in (1, 2, 8):
        assert found.shrink(shrink) == shrink
        assert np.array_equal(np.asarray(found.pixels(shrink)), drafted(data, shrink))
    assert np.array_equal(np.asarray(found.image()), drafted(data, 1))


def test_orientation_in_xmp_only(library: str) -> None:
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'
    plain = jpeg(waves(160, 96))
    data = plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:]
    found = Picture(data)
    assert (found.width, found.height) == decode(data).size == (96, 160)
    assert np.array_equal(np.asarray(found.pixels()), np.asarray(decode(data)))


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "grey": {"mode": "L"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "exif": {"exif": Image.Exif()},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [1, 2, 8])
def test_the_first_rows_are_those_of_the_whole(library: str, kind: str, shrink: int) -> None:
    options = dict(KINDS[kind])
    data = jpeg(waves(233, 417).convert(options.pop("mode", "RGB")), **options)
    whole = np.asarray(Picture(data).pixels(shrink))
    for rows in (1, 7, len(whole) // 2, len(whole) - 30 // shrink, len(whole)):
        found = np.asarray(Picture(data).pixels(shrink, rows))
        assert rows <= len(found) <= len(whole)
        assert np.array_equal(found[:rows], whole[:rows])
        if library == "simplejpeg" and rows <= len(whole) // 2:
            assert len(found) <= rows + 32 // shrink + 1  # two rows of blocks, of 16 pixels


def test_a_turned_picture_has_all_rows(library: str) -> None:
    data = jpeg(waves(160, 96), 3)
    assert np.array_equal(np.asarray(Picture(data).pixels(1, 8)), drafted(data, 1))


def test_a_file_without_its_end_is_broken_wherever_one_looks(library: str) -> None:
    data = jpeg(waves(200, 400))
    with pytest.raises(BadImage, match="corrupt"):
        Picture(data[: len(data) // 2]).pixels(1, 8)


def test_shrink_is_the_largest_that_fits() -> None:
    found = Picture(jpeg(waves(64, 64)))
    assert [found.shrink(most) for most in (0.4, 1, 1.9, 2, 3.9, 4, 7.9, 8, 99)] == [
        1, 1, 1, 2, 2, 4, 4, 8, 8,
    ]  # fmt: skip
    # Mirrored, a cut-off pixel would come first and move all the others.
    assert Picture(jpeg(waves(60, 68), 2)).shrink(8) == 4
    assert Picture(jpeg(waves(61, 64), 2)).shrink(8) == 1
    assert Picture(jpeg(waves(61, 64))).shrink(8) == 8


def test_other_formats_come_whole(library: str) -> None:
    image = waves(64, 48)
    file = io.BytesIO()
    image.save(file, "PNG")
    for found in (Picture(file.getvalue()), Picture.of(image)):
        assert (found.width, found.height, found.shrink(8)) == (64, 48, 1)
        assert np.array_equal(np.asarray(found.pixels()), np.asarray(image))
        assert found.image() is found.pixels()
    cmyk = Picture(jpeg(image.convert("CMYK")))
    assert cmyk.shrink(8) == 1
    assert cmyk.image().mode == "RGB"


def test_bad_files(library: str) -> None:
    data = jpeg(waves(200, 160))
    with pytest.raises(BadImage, match="200 x 160 is above 31999 pixels"):
        Picture(data, max_pixels=31_999)
    assert Picture(data, max_pixels=32_000).width == 200
    short = Picture(data[: len(data) // 2])
    for call in (short.pixels, lambda: short.pixels(4), short.image):
        with pytest.raises(BadImage, match="corrupt"):
            call()
    for broken in (b"", b"\xff\xd8\xff", data[:60]):
        with pytest.raises(BadImage, match="corrupt"):
            Picture(broken)


def test_what_only_pillow_takes_is_taken(library: str) -> None:
    """A file with rubbish before its end mark: a warning to the one, nothing to the other."""
    data = jpeg(waves(64, 48))
    odd = data[:-2] + b"\x12\x34\x56" + data[-2:]
    assert np.array_equal(np.asarray(Picture(odd).pixels()), np.asarray(decode(odd)))


class One(Source):
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return "one"

    def read(self, index: int) -> bytes:
        return self.data


def views(data: bytes, plan: GroupPlan, **options: object) -> GroupViews:
    stream = CropStream(One(data), lambda step: StepPlan((plan,)), seed=0, **options)  # type: ignore[arg-type]
    return stream[0].groups[0]


def crops(data: bytes, plan: GroupPlan, **options: object) -> Tensor:
    return views(data, plan, **options).student


@pytest.mark.parametrize("shift_std", [0.0, 0.5])
def test_crops_of_a_large_photo_show_their_boxes(
    library: str, shift_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, height, count = 1000, 760, 12
    data = jpeg(waves(width, height))
    seen = []
    pixels = Picture.pixels
    monkeypatch.setattr(
        Picture,
        "pixels",
        lambda self, shrink=1, rows=None: seen.append(shrink) or pixels(self, shrink, rows),
    )
    plan = GroupPlan(112, count, {"a": 96}, shift_std=shift_std)
    found = crops(data, plan, scale=(0.1, 1.0))
    assert {2, 4} <= set(seen) <= {1, 2, 4}
    image = decode(data)
    for row in range(count):
        views = draw_views(
            sample_generator(0, row, 0),
            width,
            height,
            CropStream(One(data), lambda _: StepPlan(()), seed=0, scale=(0.1, 1.0)).crops,
            views=2 if shift_std else 1,
            shift_std=shift_std,
            grid=7,
        )
        assert min(views.boxes[0][2:]) >= 112 * seen[row]
        box = views.boxes[0]
        if not shift_std:  # whole pixels of those that were decoded
            sides = (-(-side // seen[row]) for side in (width, height))
            box = Box(
                *(edge * seen[row] for edge in whole(views.scaled(1 / seen[row]).boxes[0], *sides))
            )
        right = render(image, box, 112, views.flip)
        # The filters differ in what is finer than a pixel of the crop; a pixel of a box's place is
        # up to 90 colours here.
        error = (found[row].float() - Tensor(right.copy()).float()).abs()
        assert error.mean() < 4, row


@pytest.mark.parametrize("shift_std", [0.0, 0.5])
@pytest.mark.parametrize("size", [(320, 410), (1000, 760)])
def test_crops_do_not_depend_on_the_rows_that_are_left_out(
    size: tuple[int, int], shift_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(waves(*size))
    plan = GroupPlan(64, 24, {"a": 96, "b": 32}, shift_std=shift_std)
    options = {"scale": (0.05, 0.5), "filters": Filters(uniform_std=2.0)}
    pixels, missing = Picture.pixels, []

    def seen(self: Picture, shrink: int = 1, rows: int | None = None) -> object:
        found = pixels(self, shrink, rows)
        missing.append(-(-self.height // shrink) - np.asarray(found).shape[0])
        return found

    monkeypatch.setattr(Picture, "pixels", seen)
    found = views(data, plan, **options)
    assert sum(rows > 0 for rows in missing) >= 6 or picture.simplejpeg is None
    monkeypatch.setattr(Picture, "pixels", lambda self, shrink=1, rows=None: pixels(self, shrink))
    right = views(data, plan, **options)
    assert found.student.equal(right.student)
    assert all(view.equal(right.teachers[name]) for name, view in found.teachers.items())


def test_no_pixel_of_the_held_out_strip_is_seen(library: str) -> None:
    for width in (512, 515):  # 256 columns are allowed, which 8 divides; 257 are, which it does not
        allowed = width - (width + 1) // 2
        array = np.zeros((400, width, 3), dtype=np.uint8)
        array[:, allowed:] = 255
        found = crops(
            jpeg(Image.fromarray(array), quality=100), GroupPlan(16, 8), region=0.5, flip=0.0
        )
        # A block of the JPEG that holds the edge rings; where none does there is nothing to see.
        assert found.max() <= (0 if allowed % 8 == 0 else 8)


def test_fine_grain_is_not_uniform(library: str) -> None:
    noise = np.random.default_rng(0).normal(128, 8, (512, 512)).clip(0, 255).astype(np.uint8)
    data = jpeg(Image.fromarray(noise), quality=95)
    assert np.asarray(Picture(data).pixels(8)).std() < 3  # what is left of it at an eighth
    assert crops(data, GroupPlan(32, 1), filters=Filters(uniform_std=3.0)).shape[0] == 1


def test_a_few_pixels_tell_what_all_of_them_would() -> None:
    """Never that an image varies if it does not, and of most that it does."""
    random = np.random.default_rng(0)
    told = 0
    for trial in range(200):
        image = np.full((int(random.integers(1, 200)), int(random.integers(1, 200)), 3), 128)
        part = image[random.integers(len(image)) :] if trial % 2 else image
        part += random.normal(0, 1 + trial / 4, part.shape).astype(int)
        image = image.clip(0, 255).astype(np.uint8)
        rows = int(random.integers(1, len(image) + 1))
        for least in (1.0, 2.0, 6.0):
            found = varies(image[:rows], len(image), least)
            assert not found or spread(image) >= least
            cut = np.hstack([image, image])[:rows, : image.shape[1]]  # of a held-out strip
            assert varies(cut, len(image), least) == found
            told += found
    assert told > 150
    assert not varies(np.full((64, 64, 3), 9, dtype=np.uint8), 64, 1.0)
    assert not varies(np.full((32, 64, 3), 9, dtype=np.uint8), 8000, 1.0)  # no pixel is looked at


@pytest.mark.parametrize("place", ["above", "below", "in one colour", "nowhere"])
def test_the_filter_looks_at_the_whole_photo(place: str) -> None:
    """Also where a crop's rows alone are decoded: of most of the crops here they are uniform."""
    array = np.full((480, 160, 3), 100, dtype=np.uint8)
    rows = np.s_[-24:] if place == "below" else np.s_[:24]
    colours = np.s_[2:] if place == "in one colour" else np.s_[:]
    if place != "nowhere":
        array[rows, :, colours] += np.arange(0, 160, dtype=np.uint8)[:, None] // 2
    data = jpeg(Image.fromarray(array), quality=95, subsampling=0)
    plan, options = GroupPlan(64, 8), {"scale": (0.02, 0.05), "filters": Filters(uniform_std=2.0)}
    if place == "nowhere":
        with pytest.raises(UserError, match="16 uniform"):
            crops(data, plan, **options)
    else:
        assert crops(data, plan, **options).shape[0] == 8


def test_cut_moves_edges_to_whole_pixels_within_the_image() -> None:
    image = waves(40, 30)
    array = np.asarray(image)
    for box, place in (
        (Box(0.4, 1.6, 10.4, 9.6), np.s_[2:12, 0:10]),
        (Box(29.7, 20.2, 10.3, 9.8), np.s_[20:30, 30:40]),
        (Box(5.0, 5.0, 0.2, 0.3), np.s_[5:6, 5:6]),
        (Box(0.0, 0.0, 40.0, 30.0), np.s_[:, :]),
    ):
        for form in (image, array):
            found = cut(form, whole(box, 40, 30))
            assert np.array_equal(found, array[place])
            assert found.flags.c_contiguous


@pytest.mark.parametrize("size", [16, 40, 96])
def test_resize_is_pillows_filter(size: int) -> None:
    pixels = np.array(waves(61, 47))
    image = Image.fromarray(pixels)
    right = render(image, Box(0, 0, 61, 47), size)
    found = resize(pixels, size)
    # Both round weights to integers, each in its own way, and after either axis.
    assert np.abs(found.numpy().astype(int) - right).max() <= 1
    assert np.array_equal(resize(pixels, size, flip=True).numpy(), found.numpy()[:, :, ::-1])
