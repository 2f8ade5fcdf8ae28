"""Cropped position embeddings: the rule in evaluation, the crops in training."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.model.packing import geometry
from fastagglo.model.positions import CroppedPositions, corners, crop_boxes, resize_table

CPU = torch.device("cpu")


def positions(grid: int = 9, width: int = 4) -> CroppedPositions:
    torch.manual_seed(0)
    module = CroppedPositions(grid, width).double()
    torch.nn.init.normal_(module.table)
    return module


def as_image(module: CroppedPositions) -> Tensor:
    return module.table.reshape(1, module.grid, module.grid, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 7), (7, 2), (9, 5), (1, 1), (1, 9)])
def test_evaluation_resizes_then_takes_the_corner(h: int, w: int) -> None:
    module, m = positions(), max(h, w)
    resized = F.interpolate(as_image(module), (m, m), mode="bilinear", align_corners=False)
    expected = resized[0, :, :h, :w].permute(1, 2, 0).reshape(h * w, -1)
    got = module(((2, h, w),))
    # The weights are fp32.
    torch.testing.assert_close(got, expected.repeat(2, 1), rtol=1e-5, atol=1e-6)


def test_evaluation_at_the_tables_size_is_the_identity() -> None:
    module = positions()
    assert torch.equal(module(((1, 9, 9),)), module.table[0])
    assert torch.equal(module(((1, 9, 4),)), module.table.view(9, 9, -1)[:, :4].reshape(36, -1))


def test_groups_follow_each_other() -> None:
    module = positions()
    both = module(((1, 3, 4), (0, 2, 2), (2, 5, 2)))
    assert torch.equal(both, torch.cat([module(((1, 3, 4),)), module(((2, 5, 2),))]))


@pytest.mark.parametrize(("h", "w"), [(5, 5), (3, 6), (1, 1)])
def test_training_equals_grid_sample(h: int, w: int) -> None:
    module, n = positions(), 3
    place = geometry(((n, h, w),), 2, None, CPU)
    got = module.crop(place.unit, place.image_ids, n, torch.Generator().manual_seed(7))
    start, side = crop_boxes(torch.rand(n, 4, generator=torch.Generator().manual_seed(7)))
    for i in range(n):
        reach = [(s - 1) / max(h - 1, w - 1, 1) for s in (h, w)]
        ys, xs = (
            start[i, d] + side[i, d] * torch.linspace(0, reach[d], s) for d, s in enumerate((h, w))
        )
        at = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1) * 2 - 1
        image = F.grid_sample(as_image(module), at[None].double(), align_corners=True)
        expected = image[0].permute(1, 2, 0).reshape(h * w, -1)
        torch.testing.assert_close(got[i * h * w : (i + 1) * h * w], expected, rtol=1e-5, atol=1e-5)


def test_crop_statistics() -> None:
    start, side = crop_boxes(torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)))
    assert start.min() >= 0
    assert (start + side).max() <= 1 + 1e-6
    aspect = side[:, 1] / side[:, 0]
    assert 3 / 4 - 1e-6 <= aspect.min() < 0.76
    assert 1.32 < aspect.max() <= 4 / 3 + 1e-6
    # The product of the sides is the squared scale where nothing was clamped to 1.
    free = side.amax(1) < 1
    scale = (side.prod(1)).sqrt()
    assert math.sqrt(0.1) - 1e-6 <= scale.min() < 0.33
    assert scale.max() <= 1
    assert free.float().mean() > 0.85
    # Uniform scale, log-uniform aspect, uniform place: means within 4 standard errors.
    small = scale[scale < 0.8]
    assert abs(small.mean() - (math.sqrt(0.1) + 0.8) / 2) < 4 * 0.14 / math.sqrt(len(small))
    assert abs(aspect[free].log().mean()) < 4 * 0.17 / math.sqrt(free.sum())
    room = start[free] / (1 - side[free])
    assert (room.mean(0) - 0.5).abs().max() < 4 * 0.29 / math.sqrt(free.sum())
    assert abs(torch.corrcoef(room.T)[0, 1]) < 0.03


def test_each_image_has_its_own_crop_from_the_given_source() -> None:
    module = positions()
    place = geometry(((2, 4, 4), (1, 4, 4)), 2, None, CPU)

    def crop(generator: torch.Generator | None) -> Tensor:
        return module.crop(place.unit, place.image_ids, 3, generator)

    first = crop(torch.Generator().manual_seed(1))
    images = first.view(3, 16, -1)
    assert (images[0] - images[1]).abs().max() > 0.1
    assert (images[1] - images[2]).abs().max() > 0.1
    assert torch.equal(first, crop(torch.Generator().manual_seed(1)))
    state = torch.get_rng_state()
    crop(torch.Generator().manual_seed(2))
    assert torch.equal(state, torch.get_rng_state())
    drawn = crop(None)
    assert not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    assert torch.equal(drawn, crop(None))


def test_an_oblong_image_keeps_its_proportions() -> None:
    unit = geometry(((1, 3, 5),), 1, None, CPU).unit.view(3, 5, 2)
    assert torch.equal(unit[1, 0], torch.tensor([0.25, 0.0]))
    assert torch.equal(unit[2, 4], torch.tensor([0.5, 1.0]))


def test_corner_weights() -> None:
    index, weight = corners(torch.tensor([[0.0, 0.0], [1.25, 2.5], [3.0, 3.0], [5.0, -1.0]]), 4)
    assert index[1].tolist() == [6, 7, 10, 11]
    assert weight[1].tolist() == [0.375, 0.375, 0.125, 0.125]
    assert weight[2].tolist() == [1, 0, 0, 0]
    assert index[2, 0] == 15
    assert index[3, 0] == 12  # outside: the nearest cell
    torch.testing.assert_close(weight.sum(1), torch.ones(4))


def test_gradient_reaches_the_table_alone() -> None:
    module = positions(grid=4, width=3)
    place = geometry(((2, 3, 3),), 1, None, CPU)

    def read(table: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = (place.unit, place.image_ids, 2, generator)
        return torch.func.functional_call(_Crop(module), {"module.table": table}, arguments)

    assert torch.autograd.gradcheck(read, module.table)


class _Crop(torch.nn.Module):
    def __init__(self, module: CroppedPositions) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments) -> Tensor:
        return self.module.crop(*arguments)


def test_a_bf16_table_is_read_in_fp32() -> None:
    module = positions().bfloat16()
    assert module(((1, 4, 4),)).dtype == torch.float32


def test_resizing_a_table() -> None:
    table = positions().table.detach()
    assert torch.equal(resize_table(table, 9), table)
    larger = resize_table(table, 18)
    assert larger.shape == (1, 18 * 18, 4)
    # A constant and a ramp survive both ways, away from the border.
    ramp = torch.arange(9.0).repeat(9, 1).reshape(1, 81, 1)
    up = resize_table(ramp, 27).view(27, 27)[5, 1:-1]
    torch.testing.assert_close(up, (torch.arange(1.0, 26) + 0.5) / 3 - 0.5)
    down = resize_table(torch.arange(18.0).repeat(18, 1).reshape(1, 324, 1), 9).view(9, 9)[4, 1:-1]
    torch.testing.assert_close(down, torch.arange(1.0, 8) * 2 + 0.5, rtol=1e-5, atol=1e-5)
