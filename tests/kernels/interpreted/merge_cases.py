"""Token merging on random tokens: the kernels' results, PyTorch's, and what may differ.

PyTorch's are those of the backend "torch" on the CPU, which tests/ops/test_merge.py holds against a
model of the papers. Rows of no image are NaN in all inputs and in the upstream gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastagglo.kernels import merge as kernel
from fastagglo.kernels.merge import Tile
from fastagglo.ops import (
    MergedTokens,
    PackedLayout,
    merge_tokens,
    merge_torch,
    unmerge_tokens,
    use_backend,
)
from fastagglo.ops.backend import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
PARTITIONS = ("alternate", "strided", "random2d")
NAN = float("nan")

# Several blocks of sources, destinations and channels, cut off and whole, at lengths that the
# interpreter can bear.
SMALL = Tile(16, 16, 16, 1, 2)
WIDE = Tile(16, 32, 32, 2, 2)
TALL = Tile(32, 16, 32, 2, 2)


@dataclass
class Case:
    """Arguments of ``merge_tokens``, on the CPU."""

    x: Tensor
    keep: int | Sequence[int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int | None:
        """Rows that belong to an image, of packed tokens."""
        layout = self.options.get("layout")
        return None if layout is None else layout.total


@dataclass
class Results:
    """What came of a case: the merged tokens, the tokens that unmerging gives, and gradients."""

    merged: MergedTokens
    back: Tensor
    grad_x: Tensor
    grad_y: Tensor

    def tensors(self) -> dict[str, Tensor]:
        names = ("x", "size", "index", "slot", "order", "starts")
        found = {name: getattr(self.merged, name) for name in names}
        return found | {"back": self.back, "grad_x": self.grad_x, "grad_y": self.grad_y}


def set_blocks(monkeypatch: pytest.MonkeyPatch, first: Tile = SMALL, select_rows: int = 64) -> None:
    """For a test: small blocks in the place of the table's."""
    monkeypatch.setattr(kernel, "tiles_for", lambda metric: (first, SMALL))
    monkeypatch.setattr(kernel, "SELECT_ROWS", select_rows)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed_case(
    grids: Sequence[tuple[int, int]],
    keeps: Sequence[int],
    channels: int = 20,
    *,
    protect: int = 0,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
    sizes: bool = True,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Packed images of these grids; an image without cells has no protected tokens either."""
    lengths = [h * w and protect + h * w for h, w in grids]
    layout = PackedLayout.from_lengths(lengths, sum(lengths) + spare)
    x = randn(layout.capacity, channels, seed=seed, dtype=dtype)
    x[layout.total :] = NAN
    if sizes:
        options["size"] = randn(layout.capacity, seed=seed + 1).abs() + 0.5
        options["size"][layout.total :] = NAN
    return Case(x, keeps, {"layout": layout, "grid": grids, "protect": protect, **options})


def run(case: Case, backend: str) -> Results:
    device = DEVICE if backend == "triton" else "cpu"
    options = {
        name: value.to(device) if isinstance(value, Tensor | PackedLayout) else value
        for name, value in case.options.items()
    }
    x = case.x.detach().to(device).requires_grad_()
    with use_backend(backend):
        merged = merge_tokens(x, case.keep, **options)
        y = merged.x.detach().requires_grad_()
        back = unmerge_tokens(y, merged)
        up_x = randn(*merged.x.shape, seed=7).to(y)
        up_y = randn(*back.shape, seed=8).to(y)
        if case.total is not None:
            up_y[case.total :] = NAN
        (grad_x,) = torch.autograd.grad(merged.x, x, up_x)
        (grad_y,) = torch.autograd.grad(back, y, up_y)
    return Results(merged, back.detach(), grad_x, grad_y)


def assert_right(case: Case, actual: Results | None = None) -> Results:
    """The same choice as PyTorch's, and values as exact as a sum in float32 can promise."""
    actual = actual or run(case, "triton")
    expected = run(case, "torch")
    found, wanted = actual.tensors(), expected.tensors()
    for name in ("index", "slot", "order", "starts"):
        assert found[name].dtype == wanted[name].dtype
        assert found[name].tolist() == wanted[name].tolist(), name
    for name in ("x", "size", "back", "grad_x", "grad_y"):
        assert found[name].shape == wanted[name].shape, name
        assert found[name].dtype == wanted[name].dtype, name
        assert found[name].is_contiguous(), name
    layouts = [results.merged.layout for results in (actual, expected)]
    assert len({layout and tuple(layout.lengths) for layout in layouts}) == 1
    # A mean or a sum of n terms of up to m, in float32, whose weights were rounded twice; two of
    # them differ by twice as much. Then each is rounded to its dtype.
    terms = int(expected.merged.starts.diff().max()) if len(expected.merged.starts) > 1 else 0
    sums = 2 * (terms + 2) * 2.0**-24
    for name, worst in (("x", 1), ("size", terms), ("grad_x", 1), ("grad_y", terms)):
        a, b = (tensors[name].cpu().double() for tensors in (found, wanted))
        largest = max(float(case.x.nan_to_num().abs().max()), 6.0) if a.numel() else 0.0
        rounding = torch.finfo(found[name].dtype).eps * b.abs()
        assert (a - b).abs().le(rounding + sums * worst * largest).all(), name
    # Of the same rows.
    rows = actual.merged.slot.reshape(-1)
    flat = actual.merged.x.detach().reshape(-1, actual.merged.x.shape[-1])
    copies = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])[rows]
    assert torch.equal(actual.back.reshape(copies.shape), copies)
    if case.total is not None:
        for name in ("back", "grad_x"):
            assert not found[name][case.total :].any(), f"{name} of rows of no image"
        assert (found["slot"][case.total :] == -1).all()
    return actual


def assert_same(actual: Results, expected: Results) -> None:
    """Equal to the last bit; NaN where the other has NaN."""
    for name, x in expected.tensors().items():
        torch.testing.assert_close(
            actual.tensors()[name], x, rtol=0, atol=0, equal_nan=True, msg=name
        )


def check_selection(case: Case, results: Results) -> None:
    """Every slot is taken, in the order of its survivors, and the order is by slot and position."""
    slot, order, starts = (
        getattr(results.merged, name).reshape(-1).cpu() for name in ("slot", "order", "starts")
    )
    expected_order, expected_starts = merge_torch.group(slot, len(starts) - 1)
    assert torch.equal(order, expected_order)
    assert torch.equal(starts, expected_starts)
    assert (starts.diff() > 0).all()
