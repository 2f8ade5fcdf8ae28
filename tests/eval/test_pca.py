"""PCA colours: deterministic, comparable, robust; and the pictures made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.eval import PcaBasis, backbone_figure, feature_figure, pca_rgb

Image = pytest.importorskip("PIL.Image")


def feature_maps(channels=12, sizes=(4, 6, 9), seed=0):
    """Maps of one smooth scene at several resolutions, with three strong directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3, channels, generator=generator, dtype=torch.float64)
    maps = []
    for size in sizes:
        y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
        scene = torch.stack([3 * x, 2 * (y > 0.5), (x * y * 6).sin()], -1).double()
        noise = 0.01 * torch.randn(size, size, channels, generator=generator)
        maps.append(scene @ mixing + noise)
    return maps


def test_colours_have_the_maps_shapes():
    maps = [torch.randn(3, 5, 8), torch.randn(1, 2, 8).half(), np.random.randn(4, 4, 8)]
    colours = pca_rgb(maps)
    assert [c.shape for c in colours] == [(3, 5, 3), (1, 2, 3), (4, 4, 3)]
    assert all(c.dtype == np.uint8 for c in colours)
    assert max(c.max() for c in colours) == 255
    assert min(c.min() for c in colours) == 0


def test_the_basis_is_that_of_a_singular_value_decomposition():
    (features,) = feature_maps(sizes=(9,))
    basis = PcaBasis.fit([features])
    tokens = features.reshape(-1, 12).numpy()
    expected = np.linalg.svd(tokens - tokens.mean(0))[2][:3].T
    overlap = np.abs((expected * basis.components.numpy()).sum(0))
    np.testing.assert_allclose(overlap, 1, atol=1e-9)


def test_colours_are_the_same_every_time_whatever_the_sign_of_the_basis():
    maps = feature_maps()
    first, again = pca_rgb(maps), pca_rgb([m.clone() for m in maps])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    # The sign rule: the entry of largest magnitude of each component is positive.
    components = PcaBasis.fit(maps).components
    assert (components.gather(0, components.abs().argmax(0, keepdim=True)) > 0).all()
    # Rounding noise in the features does not flip a colour.
    noisy = pca_rgb([m * (1 + 1e-9 * torch.randn(m.shape, dtype=m.dtype)) for m in maps])
    worst = max(
        np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(first, noisy, strict=True)
    )
    assert worst <= 1


def test_resolutions_and_predictions_share_their_colours():
    maps = feature_maps()
    small, _, large = pca_rgb(maps)
    # The left edge of the scene has the same features, so the same colours, at each resolution.
    assert np.abs(small[0, 0].astype(int) - large[1, 1].astype(int)).max() < 60
    basis = PcaBasis.fit(maps)
    assert np.array_equal(basis.rgb(maps[0]), small)
    # A map of another model on this basis: equal features, equal colours; the mean is mid-way.
    assert np.array_equal(basis.rgb(maps[0][:1]), small[:1])
    # Fitted alone, a part of the scene has other colours: sharing the basis is what compares.
    assert not np.array_equal(pca_rgb([maps[0][:2]])[0], small[:2])


def test_every_map_weighs_the_same():
    # One token varies along axis 0; a hundred others vary less along axis 1.
    few = torch.zeros(1, 2, 4)
    few[0, 0, 0] = 4
    many = torch.zeros(10, 10, 4)
    many[::2, :, 1] = 3
    basis = PcaBasis.fit([few, many])
    assert basis.components[0, 0] > 0.9


def test_outliers_do_not_grey_out_the_rest():
    features = torch.rand(20, 20, 3)
    features[0, 0] = 1e4
    rgb = pca_rgb([features])[0].reshape(-1, 3)
    # The outlier owns the first component's direction, yet the others use its whole range too.
    assert (np.percentile(rgb[1:], 95, axis=0) > 200).all()
    assert (np.percentile(rgb[1:], 5, axis=0) < 55).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_leave_grey(channels):
    rgb = pca_rgb([torch.randn(6, 6, channels)])[0]
    assert rgb.shape == (6, 6, 3)
    assert (rgb[..., channels:] == 128).all()
    assert (rgb[..., 0].min(), rgb[..., 0].max()) == (0, 255)


def test_constant_and_rank_one_maps_are_calm():
    assert (pca_rgb([torch.full((3, 3, 8), 0.1)])[0] == 128).all()
    line = torch.linspace(0, 1, 9).view(3, 3, 1) * torch.randn(8) + 5
    assert (pca_rgb([line])[0][..., 1:] == 128).all()


def test_wrong_maps_are_named():
    with pytest.raises(ValueError, match="at least one"):
        pca_rgb([])
    with pytest.raises(ValueError, match=r"map 1 has \(4, 4\)"):
        pca_rgb([torch.zeros(2, 2, 3), torch.zeros(4, 4)])
    with pytest.raises(ValueError, match=r"same number of channels, got \[3, 4\]"):
        pca_rgb([torch.zeros(2, 2, 3), torch.zeros(2, 2, 4)])
    with pytest.raises(ValueError, match="map 0 has values that are not finite"):
        pca_rgb([torch.full((2, 2, 3), torch.inf)])
    with pytest.raises(ValueError, match="12 channels"):
        PcaBasis.fit(feature_maps()).rgb(torch.zeros(2, 2, 3))


# Pictures.


def scene(photos=2, names=("one", "two")):
    maps = {
        name: {
            size: [feature_maps(8 + i, (size // 16,), seed=p)[0] for p in range(photos)]
            for size in (64, 96, 160)
        }
        for i, name in enumerate(names)
    }
    return [torch.randint(256, (3, 160, 160), dtype=torch.uint8) for _ in range(photos)], maps


def test_one_picture_a_teacher_of_limited_size(tmp_path):
    photos, teachers = scene(photos=4, names=("one", "a/b <$x$>"))
    student = {
        name: {size: [m + 0.5 for m in maps] for size, maps in by_size.items()}
        for name, by_size in teachers.items()
    }
    pictures = feature_figure(photos, student, teachers, tmp_path / "pictures")
    assert [path.name for _, _, path in pictures] == ["features-one.png", "features-a_b_x_.png"]
    for (title, caption, path), name in zip(pictures, teachers, strict=True):
        assert name in title
        assert name in caption
        assert path.stat().st_size <= 300_000  # noise photos: the size limit is at work
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > image.height  # seven columns, four rows
    assert not list(tmp_path.rglob("*.partial"))


def colours_in(path):
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 24)
    return {colour for _, colour in found}


def test_student_and_teacher_have_one_basis(tmp_path):
    photos, teachers = scene(photos=1, names=("one",))
    same = feature_figure(photos, teachers, teachers, tmp_path / "same")
    basis = PcaBasis.fit([m for maps in teachers["one"].values() for m in maps])
    expected = {tuple(int(v) for v in c) for c in basis.rgb(teachers["one"][64][0]).reshape(-1, 3)}
    assert expected <= colours_in(same[0][2])
    # A student that is off by one bright direction has colours of its own, the teacher its old.
    off = {"one": {size: [m * -1 for m in maps] for size, maps in teachers["one"].items()}}
    other = feature_figure(photos, off, teachers, tmp_path / "other")
    assert expected <= colours_in(other[0][2])
    wrong = {tuple(int(v) for v in c) for c in basis.rgb(off["one"][64][0]).reshape(-1, 3)}
    assert wrong <= colours_in(other[0][2])


def test_names_that_look_alike_get_files_of_their_own(tmp_path):
    photos, teachers = scene(photos=1, names=("a b", "a/b"))
    paths = [path for _, _, path in feature_figure(photos, teachers, teachers, tmp_path)]
    assert len(set(paths)) == 2
    assert all(path.exists() for path in paths)


def test_the_backbone_has_a_picture(tmp_path):
    photos, teachers = scene()
    _, caption, path = backbone_figure(photos, teachers["one"], tmp_path / "deep" / "backbone.png")
    assert "mode" in caption
    with Image.open(path) as image:
        assert image.mode == "RGBA"  # transparent: it stands on light and dark pages
    # Float photos of the other layout are the same photos.
    floats = [photo.permute(1, 2, 0).numpy() / 255.0 for photo in photos]
    backbone_figure(floats, teachers["one"], tmp_path / "floats.png")
    assert colours_in(path) == colours_in(tmp_path / "floats.png")


def test_of_many_resolutions_four_are_shown(tmp_path):
    photos = [torch.zeros(3, 32, 32, dtype=torch.uint8)]
    sizes = {16 * s: [feature_maps(8, (s,))[0]] for s in range(2, 12)}
    _, _, many = backbone_figure(photos, sizes, tmp_path / "many.png")
    four = {size: sizes[size] for size in (32, 80, 128, 176)}
    _, _, few = backbone_figure(photos, four, tmp_path / "few.png")
    with Image.open(many) as a, Image.open(few) as b:
        assert a.size == b.size


def test_wrong_pictures_are_named(tmp_path):
    photos, teachers = scene()
    with pytest.raises(ValueError, match="no predictions of teacher 'two'"):
        feature_figure(photos, {"one": teachers["one"]}, teachers, tmp_path)
    short = {**teachers, "two": {64: teachers["two"][64]}}
    with pytest.raises(ValueError, match="same resolutions of 'two'"):
        feature_figure(photos, short, teachers, tmp_path)
    with pytest.raises(ValueError, match="2 maps for 1 photos"):
        feature_figure(photos[:1], teachers, teachers, tmp_path)
    with pytest.raises(ValueError, match=r"photos must have shape .*got \(160, 160\)"):
        feature_figure([photos[0][0]] * 2, teachers, teachers, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"picture .*backbone\.png: cannot be written"):
        backbone_figure(photos, teachers["one"], tmp_path / "file" / "backbone.png")
