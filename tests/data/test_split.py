"""Held-out photos and strips: nothing that is held out is ever trained on."""

from __future__ import annotations

import io
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image

from fastagglo.data import (
    BadImage,
    CropStream,
    GroupPlan,
    Mixture,
    PhotoSource,
    Source,
    StepPlan,
    Subset,
    eval_views,
    split,
)
from fastagglo.errors import UserError


def encoded(array: np.ndarray | None) -> bytes:
    if array is None:
        return b"broken"
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


class Painted(Source):
    """Images from arrays; ``None`` is a file that cannot be decoded."""

    def __init__(self, arrays: list[np.ndarray | None], name: str = "image") -> None:
        self.files = [encoded(array) for array in arrays]
        self.name = name

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return f"{self.name}{index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


def keys(source: Source) -> set[str]:
    return {source.key(i) for i in range(len(source))}


def marked(width: int, height: int, region: float) -> np.ndarray:
    """Green, with the held-out columns painted red and the last training column painted blue."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 1] = np.random.default_rng(width).integers(0, 256, (height, width))
    start = width - ceil(width * region)
    image[:, start:] = (255, 0, 0)
    if start:
        image[:, start - 1] = (0, 0, 255)
    return image


# Whole photos


def test_builtin_photos_have_a_fixed_choice() -> None:
    result = split(PhotoSource())
    assert keys(result.held_out) == set(PhotoSource.held_out)
    assert len(result.held_out) == 4
    assert len(result.train) == 12
    assert not keys(result.train) & keys(result.held_out)
    assert result.region == 0.3


def test_share_by_hash_is_stable_and_about_right() -> None:
    many = Painted([None] * 2000)
    result = split(many, photos=0.1)
    held = keys(result.held_out)
    # 2000 draws of probability 0.1: standard deviation 13.4; 5 of them.
    assert abs(len(held) - 200) < 67
    assert held == keys(split(many, photos=0.1).held_out)
    assert keys(result.train) | held == keys(many)
    # A photo stays on its side when others go away.
    fewer = split(Painted([None] * 1000), photos=0.1)
    assert keys(fewer.held_out) == {k for k in held if int(k.removeprefix("image")) < 1000}
    # A larger share holds out the same ones and more.
    assert held < keys(split(many, photos=0.2).held_out)


def test_small_sources_hold_out_at_least_one() -> None:
    for count in (2, 3, 5):
        result = split(Painted([None] * count), photos=0.01)
        assert len(result.held_out) == 1
        assert len(result.train) == count - 1
    assert len(split(Painted([None]), photos=0.1).held_out) == 0
    assert len(split(Painted([None] * 5), photos=0).held_out) == 0


def test_listed_keys() -> None:
    source = Painted([None] * 5)
    result = split(source, photos=["image3", "image1"], region=0)
    assert keys(result.held_out) == {"image1", "image3"}
    assert keys(result.train) == {"image0", "image2", "image4"}
    assert len(split(source, photos=[]).held_out) == 0


def test_mixture_stays_a_mixture() -> None:
    mixture = Mixture([(Painted([None] * 6, "a"), 3.0), (Painted([None] * 4, "b"), 1.0)])
    result = split(mixture, photos=["a0", "b3"])
    assert isinstance(result.train, Mixture)
    assert result.train.weights == [0.75, 0.25]
    assert [len(source) for source in result.train.sources] == [5, 3]
    assert keys(result.train) == keys(mixture) - {"a0", "b3"}
    assert keys(result.held_out) == {"a0", "b3"}
    with pytest.raises(UserError, match="every photo of a Painted"):
        split(mixture, photos=["b0", "b1", "b2", "b3"])


def test_split_errors() -> None:
    source = Painted([None] * 3)
    with pytest.raises(UserError, match=r"'nobody'; its 3 keys are like 'image0'"):
        split(source, photos=["nobody"])
    with pytest.raises(UserError, match="all 3 photos are held out"):
        split(source, photos=1.0)
    with pytest.raises(ValueError, match="photos must be between 0"):
        split(source, photos=1.5)
    with pytest.raises(TypeError, match="list of keys"):
        split(source, photos="image0")
    for region in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="region must be"):
            split(source, region=region)
    with pytest.raises(TypeError, match="region must be a number"):
        split(source, region="0.3")  # type: ignore[arg-type]


# Strips


@pytest.mark.parametrize("shift_std", [0.0, 1.5])
@pytest.mark.parametrize("region", [0.3, 0.5, 0.01])
def test_training_never_sees_the_strip(region: float, shift_std: float) -> None:
    sizes = [(64, 64), (101, 64), (37, 90), (200, 33), (10, 10), (2, 2)]
    source = Painted([marked(w, h, region) for w, h in sizes])
    plan = StepPlan(
        (GroupPlan(32, 6, {"a": 32, "b": 100}, shift_std, 8), GroupPlan(64, 6, {"a": 17}))
    )
    stream = CropStream(source, lambda step: plan, seed=3, region=region)
    blue = 0
    for step in range(12):
        for group in stream[step].groups:
            for view in (group.student, *group.teachers.values()):
                # One red pixel of one strip, even through the filter of the resize, would show.
                assert view[:, 0].max() == 0
                blue = max(blue, int(view[:, 2].max()))
    assert blue > 100  # the last training column is used: nothing is wasted either


def test_whole_width_is_used_without_a_region() -> None:
    source = Painted([marked(64, 64, 0.3)])
    plan = StepPlan((GroupPlan(32, 8),))
    batch = CropStream(source, lambda step: plan, seed=0, scale=(1, 1), ratio=(1, 1))[0]
    assert (batch.groups[0].student[:, 0].amax((1, 2)) == 255).all()


def test_image_too_narrow_for_a_strip_is_skipped() -> None:
    source = Painted([marked(1, 8, 0.3), marked(40, 40, 0.3)])
    plan = StepPlan((GroupPlan(16, 2),))
    batch = CropStream(source, lambda step: plan, seed=0, region=0.3)[0]
    assert batch.keys == ["image1", "image1"]
    assert batch.skipped["too_small"] >= 1
    assert set(batch.skipped) == {"too_small"}


# Evaluation


@pytest.mark.parametrize("crops", [1, 2, 5])
def test_region_views_stay_inside_the_strip(crops: int) -> None:
    sizes = [(64, 64), (101, 64), (37, 90), (200, 33), (10, 10), (1, 5)]
    source = Painted([marked(w, h, 0.3) for w, h in sizes])
    plan = GroupPlan(32, 4, {"a": 32, "b": 48})
    groups = list(eval_views(source, plan, "regions", region=0.3, crops=crops))
    assert sum(len(group.keys) for group in groups) == len(sizes) * crops
    assert [len(group.keys) for group in groups[:-1]] == [4] * (len(groups) - 1)
    for group in groups:
        for view in (group.student, *group.teachers.values()):
            assert (view[:, 0] == 255).all()
            assert (view[:, 1:] == 0).all()
        assert group.teachers["a"] is group.student
        assert group.shifts == {}


def test_region_views_cover_the_strip() -> None:
    image = np.zeros((90, 100, 3), dtype=np.uint8)
    image[..., 1] = np.arange(90)[:, None]
    (group,) = eval_views(Painted([image]), GroupPlan(30, 3), "regions", region=0.3, crops=3)
    rows = group.student[:, 1].float()
    # Squares of side 30 from rows 0, 30 and 60, at their own resolution.
    for view, first in zip(rows, (0, 30, 60), strict=True):
        assert torch.equal(view, torch.arange(first, first + 30.0)[:, None].expand(30, 30))


def test_photo_views_are_the_centre_and_the_corners() -> None:
    y, x = np.mgrid[:80, :120]
    image = np.stack([x, y, x * 0], -1).astype(np.uint8)
    (group,) = eval_views(Painted([image]), GroupPlan(60, 8), "photos", crops=5)
    corner = group.student[:, :2, 0, 0].tolist()  # (x, y) of each crop's first pixel; sides of 60
    assert corner == [[30, 10], [0, 0], [60, 20], [60, 0], [0, 20]]
    assert group.keys == ("image0",) * 5


def test_views_are_the_same_every_time_and_ignore_shifts() -> None:
    source = split(PhotoSource()).held_out
    plan = GroupPlan(32, 3, {"a": 48}, shift_std=0.5)
    first = list(eval_views(source, plan, "photos", crops=2))
    second = list(eval_views(source, plan, "photos", crops=2))
    assert [g.keys for g in first] == [g.keys for g in second]
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.student, two.student)
        assert torch.equal(one.teachers["a"], two.teachers["a"])
        assert one.shifts == {}


def test_limit_is_spread_over_the_source() -> None:
    source = Painted([marked(20, 20, 0.3)] * 10)
    (group,) = eval_views(source, GroupPlan(8, 99), "photos", crops=1, limit=4)
    assert group.keys == ("image0", "image2", "image5", "image7")
    (all_of_them,) = eval_views(source, GroupPlan(8, 99), "photos", crops=1, limit=100)
    assert len(all_of_them.keys) == 10


def test_bad_held_out_photos_are_left_out_with_a_warning() -> None:
    source = Painted([marked(20, 20, 0.3), None, marked(30, 30, 0.3)])
    with pytest.warns(UserWarning, match=r"1 of 3 held-out photos cannot be read.*'image1'"):
        (group,) = eval_views(source, GroupPlan(8, 8), "photos", crops=1)
    assert group.keys == ("image0", "image2")
    with pytest.raises(UserError, match="none of the 1 held-out photos"):
        list(eval_views(Painted([None]), GroupPlan(8, 8), "regions"))
    assert list(eval_views(Subset(source, []), GroupPlan(8, 8), "photos")) == []


def test_eval_errors_come_at_once() -> None:
    source = Painted([marked(20, 20, 0.3)])
    plan = GroupPlan(8, 1)
    with pytest.raises(ValueError, match=r'"regions" or "photos", got \'strip\''):
        eval_views(source, plan, "strip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crops must be at most 5"):
        eval_views(source, plan, "photos", crops=6)
    with pytest.raises(ValueError, match="crops must be at least 1"):
        eval_views(source, plan, "photos", crops=0)
    with pytest.raises(ValueError, match="nothing is held out"):
        eval_views(source, plan, "regions", region=0.0)
    with pytest.raises(ValueError, match=r"plan\.count must be at least 1"):
        eval_views(source, GroupPlan(8, 0), "photos")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        eval_views(source, plan, "photos", limit=0)


def test_bad_image_says_what_it_is() -> None:
    error = BadImage("corrupt", "why")
    assert str(error) == "corrupt: why"
