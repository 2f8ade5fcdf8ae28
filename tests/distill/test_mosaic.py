from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.distill import MosaicPlan, mosaic, mosaic_plan


class PatchTeacher(nn.Module):
    """A teacher whose features depend on one patch alone: a strided linear map."""

    def __init__(self, patch: int, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, width, patch, patch).double()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).permute(0, 2, 3, 1)


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(
    ("image", "tiles"), [(128, 9), (192, 6), (224, 5), (256, 4), (384, 3), (432, 2)]
)
def test_table_of_the_recipe(image: int, tiles: int) -> None:
    plan = mosaic_plan(image, 1152, 16)
    assert plan.tiles == tiles
    assert plan.per_canvas == tiles**2
    assert plan.cells == image // 16
    assert plan.grid == 72
    assert plan.valid() is None


@pytest.mark.parametrize(
    ("image", "tiles"), [(128, 8), (192, 5), (224, 4), (256, 4), (384, 2), (432, 2), (1024, 1)]
)
def test_canvas_of_1024(image: int, tiles: int) -> None:
    assert mosaic_plan(image, 1024, 16).tiles == tiles


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9, 23])
@pytest.mark.parametrize(("side", "canvas", "patch"), [(12, 36, 4), (8, 20, 4), (28, 28, 4)])
def test_a_patch_local_teacher_sees_no_difference(
    count: int, side: int, canvas: int, patch: int
) -> None:
    plan = mosaic_plan(side, canvas, patch)
    x = images(count, side)
    canvases = mosaic.assemble(x, plan)
    assert canvases.shape == (plan.canvases(count), 3, canvas, canvas)
    teacher = PatchTeacher(patch)
    features = mosaic.split(teacher(canvases), plan, count)
    assert features.shape == (count, plan.cells, plan.cells, 5)
    torch.testing.assert_close(features, teacher(x), rtol=1e-12, atol=1e-12)


def test_images_that_are_not_whole_patches() -> None:
    plan = mosaic_plan(10, 40, 4)
    assert (plan.cells, plan.pitch, plan.tiles) == (3, 12, 3)
    valid = plan.valid()
    assert valid.dtype == torch.bool
    assert valid.tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    x = images(11, 10)
    teacher = PatchTeacher(4)
    features = mosaic.split(teacher(mosaic.assemble(x, plan)), plan, 11)
    alone = teacher(F.pad(x, (0, 2, 0, 2)))
    torch.testing.assert_close(features, alone, rtol=1e-12, atol=1e-12)


def test_layout_row_by_row_and_zero_elsewhere() -> None:
    plan = mosaic_plan(2, 7, 1)
    x = torch.arange(1, 11, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 1, 2, 2)
    canvases = mosaic.assemble(x, plan)
    assert canvases.dtype == torch.uint8
    first = canvases[0, 0]
    assert first[:6:2, :6:2].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert first[6].sum() == first[:, 6].sum() == 0
    assert canvases[1, 0].sum() == 40  # the tenth image alone, four pixels
    assert canvases[1, 0, :2, :2].eq(10).all()


def test_one_image_to_a_canvas() -> None:
    plan = mosaic_plan(24, 32, 8)
    assert plan == MosaicPlan(24, 32, 8, 1)
    x = images(3, 24)
    canvases = mosaic.assemble(x, plan)
    assert torch.equal(canvases[:, :, :24, :24], x)
    assert canvases[:, :, 24:].abs().sum() == 0


def test_non_contiguous_images_and_features() -> None:
    plan = mosaic_plan(8, 16, 4)
    x = images(6, 8)
    expected = mosaic.assemble(x, plan)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mosaic.assemble(channels_last, plan), expected)
    maps = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    view = maps.permute(0, 2, 3, 1)
    split = mosaic.split(view, plan, 6)
    assert torch.equal(split, mosaic.split(view.contiguous(), plan, 6))
    assert torch.equal(split[1], view[0, :2, 2:])
    assert torch.equal(split[2], view[0, 2:, :2])
    assert torch.equal(split[4], view[1, :2, :2])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((2048, 1024, 16), ValueError, "do not fit"),
        ((128, 1000, 16), ValueError, "multiple of the patch"),
        ((0, 1024, 16), ValueError, "image_px"),
        ((128, 1024, 0), ValueError, "patch"),
        ((128.0, 1024, 16), TypeError, "image_px"),
        ((128, True, 16), TypeError, "canvas_px"),
    ],
)
def test_impossible_plans(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mosaic_plan(*arguments)


def test_wrong_shapes() -> None:
    plan = mosaic_plan(8, 16, 4)
    with pytest.raises(ValueError, match=r"\(N, 3, 8, 8\), got \(2, 3, 8, 9\)"):
        mosaic.assemble(torch.zeros(2, 3, 8, 9), plan)
    with pytest.raises(ValueError, match=r"expected \(2, 4, 4, C\) for 5 images"):
        mosaic.split(torch.zeros(1, 4, 4, 6), plan, 5)
    with pytest.raises(ValueError, match=r"expected \(1, 4, 4, C\)"):
        mosaic.split(torch.zeros(1, 2, 4, 6), plan, 4)
