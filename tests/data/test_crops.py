"""Crop geometry: the student's and the teachers' views show what their boxes and shifts say."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastagglo.data import CropStream, GroupPlan, GroupViews, Source, StepPlan
from fastagglo.data.crops import CropRange, draw_views
from fastagglo.data.order import sample_generator


class One(Source):
    """A single image, again and again."""

    def __init__(self, array: np.ndarray) -> None:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        self.data = file.getvalue()

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return "one"

    def read(self, index: int) -> bytes:
        return self.data


SLOPE = 0.94  # colours per pixel, so that 250 pixels and the dither fit


def coordinates(width: int = 250, height: int = 240) -> np.ndarray:
    """Red tells x and green y, so a view's colours tell where it lies. Noise keeps the rounding of
    colours from adding up: means over a view's rows or columns are far finer than one colour."""
    y, x = (np.mgrid[:height, :width] + 0.5) * SLOPE
    dither = np.random.default_rng(0).uniform(0, 16, (2, height, width))
    return np.floor(np.stack([x + dither[0], y + dither[1], x * 0], -1)).astype(np.uint8)


def noise(width: int = 220, height: int = 200) -> np.ndarray:
    """Noise, enlarged so that resizing keeps contrast."""
    small = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def views(array: np.ndarray, plan: GroupPlan, seed: int = 0, **options: object) -> GroupViews:
    stream = CropStream(One(array), lambda step: StepPlan((plan,)), seed=seed, **options)  # type: ignore[arg-type]
    return stream[0].groups[0]


def extent(view: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and lengths of views of ``coordinates``, ``(N, 2)`` as (y, x), from a line through
    the middle half: the rows and columns where no filter meets the image's edge. A mirrored view
    has a negative length along x."""
    size = view.shape[-1]
    middle = slice(size // 4, size - size // 4)
    place = (torch.arange(size)[middle] + 0.5) / size
    offset = place - place.mean()
    centres, lengths = [], []
    for channel, other in ((1, -1), (0, -2)):
        line = view[:, channel].double().mean(other)[:, middle] / SLOPE
        centres.append(line.mean(1))
        lengths.append((line * offset).sum(1) / (offset**2).sum())
    return torch.stack(centres, 1), torch.stack(lengths, 1)


# In pixels of the image, three times what was seen; one patch below is 9 pixels or more. Shifted
# views see other noise, and the length's error enters up to four times an eighth.
CENTRE, LENGTH = 0.2, 0.8


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_student_and_teachers_see_one_box(flip: float) -> None:
    plan = GroupPlan(64, 24, {"same": 64, "large": 150, "small": 33})
    group = views(coordinates(), plan, flip=flip)
    centre, length = extent(group.student)
    assert ((length[:, 1] < 0) == bool(flip)).all()
    for name in ("large", "small"):
        other_centre, other_length = extent(group.teachers[name])
        assert (other_centre - centre).abs().max() < CENTRE, name
        assert (other_length - length).abs().max() < LENGTH, name
    assert group.shifts == {}


def test_views_of_one_size_are_one_tensor() -> None:
    group = views(noise(), GroupPlan(32, 3, {"a": 32, "b": 48, "c": 48}))
    assert group.teachers["a"] is group.student
    assert group.teachers["b"] is group.teachers["c"]
    assert group.student.shape == (3, 3, 32, 32)
    assert group.teachers["b"].shape == (3, 3, 48, 48)
    assert group.student.dtype == torch.uint8
    for view in (group.student, group.teachers["b"]):
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_shifted_views_are_apart_by_whole_patches() -> None:
    plan = GroupPlan(64, 64, {"same": 64, "large": 160}, shift_std=1.0, patch_size=8)
    group = views(coordinates(), plan)
    centre, length = extent(group.student)
    for name, teacher in group.teachers.items():
        shift = group.shifts[name]
        assert shift.shape == (64, 2)
        assert shift.dtype == torch.float32
        assert torch.equal(shift, shift.round())
        assert (shift != 0).any(0).all()  # both axes do shift
        other_centre, other_length = extent(teacher)
        assert (other_length - length).abs().max() < 3 * LENGTH
        # One patch is patch_size / size of the view; along a mirrored x its length is negative,
        # so the same formula holds: shifts are told as the views lie after the flip.
        assert (other_centre - centre - shift * length * 8 / 64).abs().max() < 5 * CENTRE
    assert not torch.equal(group.shifts["same"], group.shifts["large"])  # each on its own
    flipped = length[:, 1] < 0
    assert flipped.any()
    assert not flipped.all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_shifted_contents_are_the_same_pixels(flip: float) -> None:
    plan = GroupPlan(64, 32, {"t": 64}, shift_std=1.0, patch_size=8)
    group = views(noise(), plan, flip=flip)
    seen = set()
    for student, teacher, (dy, dx) in zip(
        group.student.int(),
        group.teachers["t"].int(),
        (group.shifts["t"] * 8).int().tolist(),
        strict=True,
    ):
        seen.add((dy, dx))
        # Row r of the teacher's view is row r + dy of the student's, where both have it.
        in_student = student[:, max(0, dy) : 64 + min(0, dy), max(0, dx) : 64 + min(0, dx)]
        in_teacher = teacher[:, max(0, -dy) : 64 + min(0, -dy), max(0, -dx) : 64 + min(0, -dx)]
        # Pillow takes boxes in float32: a weight may differ in its last place, a colour by one.
        assert (in_student - in_teacher).abs().max() <= 1
        if (dy, dx) != (0, 0):
            assert (student - teacher).abs().float().mean() > 5
    assert len(seen) > 5


def test_flip_mirrors_everything_and_turns_the_sign_of_dx() -> None:
    plan = GroupPlan(32, 16, {"a": 48}, shift_std=1.0, patch_size=4)
    plain = views(noise(), plan, flip=0.0)
    mirrored = views(noise(), plan, flip=1.0)
    assert torch.equal(mirrored.student, plain.student.flip(-1))
    assert torch.equal(mirrored.teachers["a"], plain.teachers["a"].flip(-1))
    assert torch.equal(mirrored.shifts["a"], plain.shifts["a"] * torch.tensor([1.0, -1.0]))
    assert (plain.shifts["a"][:, 1] != 0).any()


def test_shift_statistics() -> None:
    # round(N(0, 0.5)) is +-1 with probability 2 * (1 - Phi(1)) = 0.3173, +-2 with 0.0027.
    counts = np.zeros(3)
    for i in range(3000):
        cells = draw_views(
            sample_generator(0, i, 0), 100, 100, CropRange(), views=2, shift_std=0.5, grid=14
        ).cells
        for size in range(3):
            counts[size] += (np.abs(cells) == size).sum()
    share = counts / 12_000
    # Standard deviation of the share of ones: sqrt(0.317 * 0.683 / 12000) = 0.004; 5 of them.
    assert abs(share[1] - 0.3146) < 0.021
    assert abs(share[0] - 0.6827) < 0.021
    assert share[2] < 0.006


def test_wide_shifts_leave_half_of_the_view_in_common() -> None:
    for i in range(200):
        drawn = draw_views(
            sample_generator(1, i, 0), 97, 61, CropRange(), views=4, shift_std=50.0, grid=8
        )
        assert np.abs(drawn.cells).max() <= 2
        for box in drawn.boxes:
            assert box.left >= 0
            assert box.top >= 0
            assert box.left + box.width <= 97 + 1e-9
            assert box.top + box.height <= 61 + 1e-9


@pytest.mark.parametrize("shift_std", [0.0, 0.5])
@pytest.mark.parametrize(("width", "height"), [(100, 80), (400, 40), (30, 500), (1, 1), (3, 200)])
def test_boxes_lie_inside_and_keep_their_range(width: int, height: int, shift_std: float) -> None:
    crops = CropRange((0.3, 0.9), (0.75, 1.25), 0.5)
    for i in range(100):
        drawn = draw_views(
            sample_generator(2, i, 0), width, height, crops, views=3, shift_std=shift_std, grid=8
        )
        for box, cell in zip(drawn.boxes, drawn.cells, strict=True):
            assert box.left >= 0
            assert box.top >= 0
            assert box.left + box.width <= width + 1e-9
            assert box.top + box.height <= height + 1e-9
            assert 0.75 - 1e-9 <= box.width / box.height <= 1.25 + 1e-9
            assert box.width * box.height <= 0.9 * width * height + 1e-9
            # No shift was cut short at the image's edge.
            moved = (cell - drawn.cells[0]) * (box.height / 8, box.width / 8)
            assert box.top - drawn.boxes[0].top == pytest.approx(moved[0], abs=1e-9)
            assert box.left - drawn.boxes[0].left == pytest.approx(moved[1], abs=1e-9)


def test_scale_range_is_met_where_it_fits() -> None:
    areas = []
    for i in range(500):
        box = draw_views(sample_generator(3, i, 0), 100, 100, CropRange((0.2, 0.6))).boxes[0]
        areas.append(box.width * box.height / 10_000)
    assert min(areas) >= 0.2
    assert max(areas) <= 0.6
    # Uniform on [0.2, 0.6]: mean 0.4, standard deviation of the mean 0.1155 / sqrt(500) = 0.0052.
    assert abs(float(np.mean(areas)) - 0.4) < 0.026


def test_crops_are_everywhere() -> None:
    lefts, tops = zip(
        *(
            draw_views(sample_generator(4, i, 0), 200, 100, CropRange()).boxes[0][:2]
            for i in range(300)
        ),
        strict=True,
    )
    assert min(lefts) < 5
    assert max(lefts) > 80
    assert min(tops) < 2
    assert max(tops) > 20


def test_downscaling_is_antialiased() -> None:
    # A checkerboard of single pixels averages to grey; picking pixels would give 0 or 255.
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    plan = GroupPlan(32, 4)
    group = views(np.stack([board] * 3, -1), plan, scale=(0.9, 1.0))
    assert (group.student.int() - 127).abs().max() <= 8  # weights of a triangle 16 pixels wide


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"scale": (0.0, 1.0)}, ValueError, "scale must be"),
        ({"scale": (0.5, 0.4)}, ValueError, "scale must be"),
        ({"scale": (0.5, 1.1)}, ValueError, r"scale\[1\] must be between"),
        ({"scale": 0.5}, TypeError, "scale must be a pair"),
        ({"ratio": (0.5, float("inf"))}, ValueError, "ratio"),
        ({"ratio": ("a", 2)}, TypeError, "ratio"),
        ({"flip": 1.5}, ValueError, "flip must be between"),
        ({"flip": True}, TypeError, "flip must be a number"),
    ],
)
def test_crop_errors(options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        views(noise(), GroupPlan(16, 1), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 1), ValueError, "size must be at least 1, got 0"),
        ((16.0, 1), TypeError, "size must be an int, got float"),
        ((16, -1), ValueError, "count must be at least 0"),
        ((16, True), TypeError, "count must be an int, got bool"),
        ((16, 1, {"a": 0}), ValueError, r"teachers\['a'\] must be at least 1"),
        ((16, 1, ["a"]), TypeError, "teachers must map"),
        ((16, 1, {}, -0.5), ValueError, "shift_std must be at least 0"),
        ((16, 1, {}, float("nan")), ValueError, "shift_std"),
        ((16, 1, {}, 0.5, 0), ValueError, "patch_size must be at least 1"),
        ((20, 1, {}, 0.5, 16), ValueError, "size must be a multiple of patch_size 16, got 20"),
    ],
)
def test_plan_errors(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        GroupPlan(*arguments)


def test_step_plan() -> None:
    plan = StepPlan([GroupPlan(16, 3), GroupPlan(32, 4)])  # type: ignore[arg-type]
    assert plan.images == 7
    assert isinstance(plan.groups, tuple)
    with pytest.raises(TypeError, match="GroupPlans, got int"):
        StepPlan((3,))  # type: ignore[arg-type]
