"""Sources: what is found, how it is named, and what is said when nothing is."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastagglo.data import (
    BadImage,
    FolderSource,
    Mixture,
    PhotoSource,
    Source,
    Subset,
    TarSource,
    build_source,
    find_duplicates,
)
from fastagglo.data.source import CachedImages
from fastagglo.data.tar import expand_braces
from fastagglo.errors import UserError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, samples: int, per_shard: int) -> list[Path]:
    """Shards in img2dataset's layout; sample i is a uniform image of value i."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=per_shard, verbose=0) as writer:
        for i in range(samples):
            writer.write(
                {
                    "__key__": f"{i:09d}",
                    "png": png(i),
                    "txt": f"image {i}",
                    "json": {"key": f"{i:09d}", "status": "success"},
                }
            )
    return sorted(folder.glob("*.tar"))


def value(source: Source, index: int) -> int:
    return int(np.asarray(source.image(index))[0, 0, 0])


# The built-in photos


def test_photos_are_read_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the built-in photos must not open a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    source = PhotoSource()
    keys = [source.key(i) for i in range(len(source))]
    assert len(set(keys)) == len(keys) == 16
    assert set(source.held_out) < set(keys)
    assert set(source.credits) == set(keys)
    assert "CC BY 2.0" in source.credits["china"]
    assert "CC BY 2.0" in source.credits["flower"]
    for i in range(len(source)):
        image = source.image(i)
        assert image.mode == "RGB"
        assert min(image.size) >= 300
        assert np.asarray(image).std() > 5  # no photo is blank
        assert len(source.read(i)) > 10_000


def test_one_picture_of_the_stereo_pair() -> None:
    # The right picture shows what the held-out strip of the left one hides.
    source = PhotoSource()
    assert sum("motorcycle" in source.key(i) for i in range(len(source))) == 1


def test_photos_are_decoded_once_and_the_limit_still_holds() -> None:
    source = PhotoSource()
    assert source.image(3) is source.image(3)
    with pytest.raises(BadImage, match="too_large"):
        source.image(3, max_pixels=1000)


def test_missing_photo_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastagglo.data.photos.find_spec", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(UserError, match=r"fastagglo\[demo\]"):
        PhotoSource()


def test_missing_photo_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastagglo.data.photos._package_folder", lambda package: tmp_path)
    with pytest.raises(UserError, match="'astronaut' is not in the installed skimage"):
        PhotoSource()


def test_cache_keeps_its_limit_and_drops_the_oldest() -> None:
    cache = CachedImages(1000)
    images = [Image.new("RGB", (10, 10)) for _ in range(3)]  # 400 bytes each
    for i, image in enumerate(images[:2]):
        cache.put(i, image)
    assert cache.get(0) is images[0]  # 1 is now the oldest
    cache.put(2, images[2])
    assert cache.get(1) is None
    assert cache.get(0) is images[0]
    assert cache.get(2) is images[2]
    cache.put(3, Image.new("RGB", (100, 100)))  # larger than the cache: never kept
    assert cache.get(3) is None
    assert cache.get(2) is images[2]


def test_cache_keeps_an_image_as_an_array_beside_it() -> None:
    cache = CachedImages(1000)
    for i in range(2):
        cache.put(i, Image.new("RGB", (10, 8), (i, 2, 3)))
    pixels = cache.pixels(0)
    assert pixels is not None
    assert pixels.shape == (8, 10, 3)
    assert pixels[0, 0].tolist() == [0, 2, 3]
    assert cache.pixels(0) is pixels
    cache.put(2, Image.new("RGB", (10, 10)))  # drops 1, not 0, which was asked for
    assert cache.pixels(1) is None
    cache.put(3, Image.new("RGB", (10, 10)))
    assert cache.pixels(0) is None  # gone with its image
    cache.put(0, Image.new("RGB", (10, 8), (9, 9, 9)))
    assert cache.pixels(0)[0, 0].tolist() == [9, 9, 9]


def test_built_in_photos_are_the_same_in_either_form() -> None:
    source = PhotoSource()
    picture = source.picture(0)
    assert np.array_equal(picture.pixels(), np.asarray(picture.image()))
    assert picture.pixels() is source.picture(0).pixels()  # no copy each time


# Folders


def test_folder_is_recursive_sorted_and_selective(tmp_path: Path) -> None:
    names = ["b.PNG", "a/z.png", "a/deep/er/x.jpg", "c.jpeg"]
    for i, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    for name in ["notes.txt", ".hidden.png", "noextension", "a/._z.png"]:
        (tmp_path / name).write_bytes(png(99))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.png").write_bytes(png(99))
    source = FolderSource(tmp_path)
    assert [source.key(i) for i in range(len(source))] == sorted(names)
    assert [value(source, i) for i in range(4)] == [names.index(n) for n in sorted(names)]
    assert source.shards == (4,)


def test_folder_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(png(1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "data")
    (root / "again").symlink_to(tmp_path / "data")
    (root / "loop").symlink_to(root)
    source = FolderSource(root)
    assert [source.key(i) for i in range(len(source))] == ["again/x.png"]


def test_folder_file_that_vanishes_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(1))
    source = FolderSource(tmp_path)
    (tmp_path / "x.png").unlink()
    with pytest.raises(BadImage) as caught:
        source.image(0)
    assert caught.value.reason == "unreadable"


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    (tmp_path / "file.png").write_bytes(png(0))
    with pytest.raises(UserError, match="is a file"):
        FolderSource(tmp_path / "file.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no images in the folder .*jpg"):
        FolderSource(empty)
    (empty / "000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"tar shards: give .*/\*\.tar"):
        FolderSource(empty)


# Tar shards


def test_tar_shards_of_webdataset(tmp_path: Path) -> None:
    write_shards(tmp_path, 10, 4)
    source = TarSource(str(tmp_path / "{000..002}.tar"))
    assert len(source) == 10
    assert source.shards == [4, 4, 2]
    assert [value(source, i) for i in (9, 0, 5, 4, 3)] == [9, 0, 5, 4, 3]
    assert source.key(0) == "000.tar/000000000"
    assert source.key(9) == "002.tar/000000009"
    assert source.truncated == []
    assert source.read(6) == png(6)
    moved = TarSource([tmp_path / "001.tar", tmp_path / "000.tar"])
    assert [value(moved, i) for i in (0, 4)] == [4, 0]
    assert moved.key(4) == source.key(0)


def test_tar_survives_pickling(tmp_path: Path) -> None:
    write_shards(tmp_path, 5, 5)
    source = pickle.loads(pickle.dumps(TarSource(str(tmp_path / "*.tar"))))
    assert value(source, 3) == 3


def test_tar_keys_stay_apart_when_shards_share_a_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, 2, 2)
    source = TarSource(str(tmp_path / "{a,b}" / "000.tar"))
    keys = [source.key(i) for i in range(len(source))]
    assert len(set(keys)) == 4


def test_tar_members_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("d/1.jpg", png(1)),
            ("d/1.mask.png", png(2)),  # webdataset: extension "mask.png" of key 1
            ("d/1.png", png(3)),  # a second image of the same key
            ("d/2.JPG", png(4)),
            ("d/3.cls", b"7"),
            ("d/.png", png(5)),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d/4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = TarSource(path)
    assert [source.key(i) for i in range(len(source))] == ["x.tar/d/1", "x.tar/d/2"]
    assert [value(source, i) for i in range(2)] == [1, 4]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_long_names(tmp_path: Path, format: int) -> None:
    path = tmp_path / "x.tar"
    name = "n" * 150 + "ü"
    with tarfile.open(path, "w", format=format) as tar:
        info = tarfile.TarInfo(f"{name}.png")
        info.size = len(png(3))
        tar.addfile(info, io.BytesIO(png(3)))
    source = TarSource(path)
    assert source.key(0) == f"x.tar/{name}"
    assert value(source, 0) == 3


def cut_inside_last_image(path: Path) -> bytes:
    with tarfile.open(path) as tar:
        last = [m for m in tar if m.name.endswith(".png")][-1]
    return path.read_bytes()[: last.offset_data + last.size - 1]


def cut_inside_last_header(path: Path) -> bytes:
    with tarfile.open(path) as tar:
        last = [m for m in tar if m.name.endswith(".png")][-1]
    return path.read_bytes()[: last.offset + 100]


def garbage_for_last_header(path: Path) -> bytes:
    with tarfile.open(path) as tar:
        last = [m for m in tar if m.name.endswith(".png")][-1]
    data = bytearray(path.read_bytes())
    data[last.offset : last.offset + 512] = b"\xaa" * 512
    return bytes(data)


@pytest.mark.parametrize(
    "damage", [cut_inside_last_image, cut_inside_last_header, garbage_for_last_header]
)
def test_truncated_shard_is_used_as_far_as_it_is_whole(tmp_path: Path, damage: object) -> None:
    paths = write_shards(tmp_path, 8, 4)
    paths[0].write_bytes(damage(paths[0]))  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"000\.tar' ends early: 3 whole images"):
        source = TarSource(str(tmp_path / "*.tar"))
    assert source.truncated == [str(paths[0])]
    assert source.shards == [3, 4]
    assert [value(source, i) for i in range(7)] == [0, 1, 2, 4, 5, 6, 7]


def test_shard_cut_between_members_is_noticed(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3, 3)
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.warns(UserWarning, match="ends early: 3 whole images"):
        assert len(TarSource(path)) == 3


def test_shard_that_shrinks_later_is_unreadable(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, 3, 3)
    source = TarSource(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadImage) as caught:
        source.image(2)
    assert caught.value.reason == "unreadable"


def test_tar_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"001\.tar' does not exist, nor do 2 others"):
        TarSource(str(tmp_path / "{001..003}.tar"))
    with pytest.raises(UserError, match="no tar shard matches"):
        TarSource(str(tmp_path / "*.tar"))
    for content in (b"", b"garbage" * 200):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.tar' cannot be read as a tar shard"):
            TarSource(tmp_path / "bad.tar")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(__file__, "x.png")
    with pytest.raises(UserError, match="not compressed"):
        build_source(str(tmp_path / "c.tar.gz"))
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(__file__, "x.py")
    with pytest.raises(UserError, match=r"no images in the tar shards .*KEY\.EXT"):
        TarSource(tmp_path / "none.tar")


@pytest.mark.parametrize(
    "address", ["pipe:curl example.org/x.tar", "s3://bucket/{000..010}.tar", "https://h/x.tar"]
)
def test_remote_shards_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="remote address"):
        build_source(address)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x.tar", ["x.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{one}.tar", ["{one}.tar"]),
        (
            "{00..02}-{x,}.tar",
            ["00-x.tar", "00-.tar", "01-x.tar", "01-.tar", "02-x.tar", "02-.tar"],
        ),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


# Subsets, mixtures, duplicates, building


def test_subset_keeps_shards_and_keys(tmp_path: Path) -> None:
    write_shards(tmp_path, 10, 4)
    source = TarSource(str(tmp_path / "*.tar"))
    subset = Subset(source, [1, 2, 8, 9])
    assert subset.shards == [2, 2]  # none of the middle shard
    assert [value(subset, i) for i in range(4)] == [1, 2, 8, 9]
    assert subset.key(2) == source.key(8)
    assert subset.read(3) == png(9)
    assert len(Subset(source, [])) == 0
    for wrong in ([2, 1], [1, 1], [-1], [10]):
        with pytest.raises(ValueError, match="indices must rise within 0"):
            Subset(source, wrong)


def test_mixture_is_the_sources_one_after_the_other(tmp_path: Path) -> None:
    for name, values in (("a", [1, 2]), ("b", [3, 4, 5])):
        (tmp_path / name).mkdir()
        for v in values:
            (tmp_path / name / f"{v}.png").write_bytes(png(v))
    mixture = build_source([(str(tmp_path / "a"), 3), [str(tmp_path / "b"), 1.0]])
    assert isinstance(mixture, Mixture)
    assert [value(mixture, i) for i in range(5)] == [1, 2, 3, 4, 5]
    assert mixture.key(2) == "3.png"
    assert mixture.weights == [0.75, 0.25]
    assert mixture.read(4) == png(5)
    for index in (5, -1):
        with pytest.raises(IndexError):
            mixture.key(index)
    equal = build_source([str(tmp_path / "a"), tmp_path / "b"])
    assert isinstance(equal, Mixture)
    assert equal.weights == [0.5, 0.5]


def test_mixture_errors(tmp_path: Path) -> None:
    photos = PhotoSource()
    with pytest.raises(ValueError, match="at least one"):
        Mixture([])
    with pytest.raises(ValueError, match="above 0"):
        Mixture([(photos, 0.0)])
    with pytest.raises(ValueError, match="a weight must be"):
        Mixture([(photos, float("nan"))])
    with pytest.raises(ValueError, match="empty"):
        Mixture([(Subset(photos, []), 1.0)])
    with pytest.raises(TypeError, match="pairs"):
        Mixture([photos])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="must start with a source"):
        Mixture([("builtin", 1.0)])  # type: ignore[list-item]
    with pytest.raises(UserError, match="at least one"):
        build_source([])
    with pytest.raises(UserError, match="above 0"):
        build_source([("builtin", -0.0)])
    with pytest.raises(UserError, match="a part of a mixture"):
        build_source([("builtin", 1.0, 2.0)])  # type: ignore[list-item]
    with pytest.raises(UserError, match="a weight must be a number"):
        build_source([("builtin", "much")])  # type: ignore[list-item]
    with pytest.raises(UserError, match="does not exist"):
        build_source([(str(tmp_path / "nowhere"), 1.0)])
    with pytest.raises(TypeError, match="got int 3"):
        build_source(3)  # type: ignore[arg-type]


def test_build_source_by_kind(tmp_path: Path) -> None:
    assert isinstance(build_source("builtin"), PhotoSource)
    write_shards(tmp_path, 2, 1)
    assert isinstance(build_source(str(tmp_path / "{000..001}.tar")), TarSource)
    assert isinstance(build_source(tmp_path / "000.tar"), TarSource)
    (tmp_path / "x.png").write_bytes(png(0))
    assert isinstance(build_source(tmp_path), FolderSource)


def test_duplicates_are_the_later_ones(tmp_path: Path) -> None:
    for name, v in (("a", 1), ("b", 2), ("c", 1), ("d", 3), ("e", 1)):
        (tmp_path / f"{name}.png").write_bytes(png(v))
    source = FolderSource(tmp_path)
    (tmp_path / "d.png").unlink()  # cannot be read: judged when it is decoded, not here
    assert find_duplicates(source).tolist() == [False, False, True, False, True]
