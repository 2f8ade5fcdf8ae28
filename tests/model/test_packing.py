"""Batches of mixed sizes and the order of their tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastagglo.model import PackedBatch
from fastagglo.model.packing import PIXEL_MEAN, PIXEL_STD, geometry, patchify, reorder

CPU = torch.device("cpu")
GRIDS = ((2, 4, 2), (0, 2, 2), (1, 2, 6))


def images(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator)


class TestPackedBatch:
    def test_properties(self) -> None:
        batch = PackedBatch.from_images([images(2, 32, 48), images(0, 16, 16), images(1, 64, 16)])
        assert batch.num_images == 3
        assert batch.sizes == ((32, 48), (16, 16), (64, 16))
        assert batch.device == CPU
        assert len(batch.groups) == 3

    def test_moves(self) -> None:
        batch = PackedBatch.from_images([images(1, 16, 16)])
        moved = batch.to("meta", non_blocking=True)
        assert moved.device.type == "meta"
        assert moved.sizes == batch.sizes
        assert torch.equal(batch.to("cpu").groups[0], batch.groups[0])
        pinned = batch.pin_memory()
        assert torch.equal(pinned.groups[0], batch.groups[0])
        assert pinned.groups[0].is_pinned() == torch.cuda.is_available()

    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    )
    def test_accepts(self, dtype: torch.dtype) -> None:
        group = images(1, 16, 16) if dtype == torch.uint8 else torch.rand(1, 3, 16, 16).to(dtype)
        for given in ([group], (group.contiguous(memory_format=torch.channels_last),)):
            batch = PackedBatch.from_images(given)
            assert batch.groups[0].dtype == dtype
            assert torch.equal(batch.groups[0], group)

    def test_rejects(self) -> None:
        with pytest.raises(TypeError, match=r"got one tensor \(1, 3, 16, 16\); wrap it in a list"):
            PackedBatch.from_images(images(1, 16, 16))
        with pytest.raises(TypeError, match=r"expected a list of .* tensors, got NoneType"):
            PackedBatch.from_images(None)
        with pytest.raises(ValueError, match="at least one group"):
            PackedBatch.from_images([])
        with pytest.raises(TypeError, match=r"images\[1\] must be a tensor .*, got list"):
            PackedBatch.from_images([images(1, 16, 16), [1]])
        with pytest.raises(TypeError, match=r"images\[0\] must be uint8 or floating point.*int64"):
            PackedBatch.from_images([images(1, 16, 16).long()])
        with pytest.raises(ValueError, match=r"got \(3, 16, 16\); add the batch dimension"):
            PackedBatch.from_images([images(1, 16, 16)[0]])
        with pytest.raises(ValueError, match=r"must be \(N, 3, H, W\), got \(1, 16, 16, 3\)"):
            PackedBatch.from_images([images(1, 16, 16).permute(0, 2, 3, 1)])
        with pytest.raises(ValueError, match=r"got \(1, 3, 0, 16\)"):
            PackedBatch.from_images([images(1, 0, 16)])
        with pytest.raises(ValueError, match=r"images\[0\] on cpu and images\[1\] on meta"):
            PackedBatch.from_images([images(1, 16, 16), images(1, 16, 16).to("meta")])

    @pytest.mark.parametrize("bad", [-0.5, 1.5, 255.0, float("nan"), float("inf")])
    def test_rejects_floats_outside_the_unit_range(self, bad: float) -> None:
        group = torch.rand(1, 3, 16, 16)
        group[0, 1, 2, 3] = bad
        with pytest.raises(ValueError, match=r"images\[0\] must lie in \[0, 1\].*not normalised"):
            PackedBatch.from_images([group])


class TestPatchify:
    def test_equals_a_convolution_on_normalised_images(self) -> None:
        groups = [images(2, 32, 48), images(1, 16, 64, seed=1)]
        weight = torch.randn(5, 3, 16, 16, dtype=torch.float64)
        got = patchify(groups, 16).double() @ weight.flatten(1).T
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD)
        )
        expected = torch.cat(
            [
                torch.nn.functional.conv2d((g.double() / 255 - mean) / std, weight, stride=16)
                .permute(0, 2, 3, 1)
                .reshape(-1, 5)
                for g in groups
            ]
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)

    def test_uint8_and_floats_agree_and_mix(self) -> None:
        a, b = images(1, 32, 32), images(2, 16, 16, seed=1)
        expected = patchify([a, b], 16)
        assert expected.dtype == torch.float32
        torch.testing.assert_close(patchify([a, b.float() / 255], 16), expected)
        torch.testing.assert_close(patchify([a / 255, b / 255], 16), expected)
        assert patchify([a.double() / 255, b], 16).dtype == torch.float64
        assert patchify([a.bfloat16() / 255], 16).dtype == torch.float32

    def test_float_images_get_gradients(self) -> None:
        x = torch.rand(1, 3, 16, 16, requires_grad=True)
        patchify([x], 16).sum().backward()
        expected = (1 / torch.tensor(PIXEL_STD)).view(1, 3, 1, 1).expand_as(x)
        torch.testing.assert_close(x.grad, expected)


class TestGeometry:
    def test_tokens_lie_image_by_image(self) -> None:
        place = geometry(GRIDS, 3, None, CPU)
        assert place.layout.lengths == (11, 11, 15)
        assert place.patch_layout.lengths == (8, 8, 12)
        assert place.prefix_rows == 9
        apart = [f"i{i}p{p}" for i in range(3) for p in range(3)]
        apart += [f"i{i}t{t}" for i, n in enumerate((8, 8, 12)) for t in range(n)]
        packed = []
        for i, n in enumerate((8, 8, 12)):
            packed += [f"i{i}p{p}" for p in range(3)] + [f"i{i}t{t}" for t in range(n)]
        assert [apart[r] for r in place.pack.tolist()] == packed
        assert [packed[r] for r in place.unpack.tolist()] == apart
        assert place.image_ids.tolist() == [0] * 8 + [1] * 8 + [2] * 12
        assert place.windows is None

    def test_windows_hold_neighbours(self) -> None:
        place = geometry(GRIDS, 3, 2, CPU)
        windows = place.windows
        assert windows.layout.lengths == (4,) * 7
        # (image, row, column) of every packed row; prefix tokens have none.
        where = []
        for i, (h, w) in enumerate([(4, 2), (4, 2), (2, 6)]):
            where += [None] * 3 + [(i, y, x) for y in range(h) for x in range(w)]
        order = [where[r] for r in windows.enter.tolist()]
        assert order[:9] == [None] * 9
        for start in range(9, len(order), 4):
            (i, y, x), *_ = window = order[start : start + 4]
            assert y % 2 == x % 2 == 0
            assert window == [(i, y, x), (i, y, x + 1), (i, y + 1, x), (i, y + 1, x + 1)]
        assert [i for i, _, _ in order[9:]] == place.image_ids.tolist()

    @pytest.mark.parametrize("window", [1, 2, 4])
    def test_orders_and_their_inverses(self, window: int) -> None:
        place = geometry(((2, 4, 8), (1, 8, 4)), 2, window, CPU)
        for index, inverse in (
            (place.pack, place.unpack),
            (place.windows.enter, place.windows.leave),
        ):
            rows = torch.arange(len(index))
            assert torch.equal(index.sort().values, rows)
            assert torch.equal(index[inverse], rows)
            x = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
            back = reorder(reorder(x, index, inverse), inverse, index)
            assert torch.equal(back, x)
            assert torch.autograd.gradcheck(lambda x: reorder(x, index, inverse), x)  # noqa: B023

    def test_no_images(self) -> None:
        place = geometry(((0, 4, 4),), 2, 2, CPU)
        assert len(place.pack) == place.layout.num_segments == place.windows.layout.total == 0

    def test_made_once_per_mix(self) -> None:
        assert geometry(GRIDS, 3, 2, CPU) is geometry(GRIDS, 3, 2, torch.device("cpu"))
        assert geometry(GRIDS, 3, 2, CPU) is not geometry(GRIDS, 4, 2, CPU)
