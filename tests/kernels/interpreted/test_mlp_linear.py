"""Products with their prologues and epilogues, one by one, against PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from mlp_cases import (
    DEVICE,
    DTYPES,
    NAN,
    Results,
    amid_nan,
    assert_same,
    assert_within_budget,
    at_the_end_of_memory,
    randn,
)
from torch import Tensor

from fastagglo.kernels import mlp as kernel
from fastagglo.kernels.mlp import Cells
from fastagglo.kernels.mlp_choice import GemmTile

# Several blocks each way, at sizes that the interpreter can bear.
TILE = GemmTile(32, 32, 16, 4, 2)
# Rows, columns, inner size: whole blocks; one row; one of everything; tails of 8; tails everywhere.
SIZES = [(64, 32, 48), (1, 40, 24), (1, 1, 1), (37, 40, 56), (37, 13, 27)]
EPS = 1e-5


def make_inputs(
    rows: int, columns: int, inner: int, dtype: torch.dtype, *, seed: int = 0
) -> dict[str, Tensor | None]:
    return {
        "x": randn(rows, inner, seed=seed, dtype=dtype, scale=1.5) + 0.5,
        "weight": randn(columns, inner, seed=seed + 1, dtype=dtype, scale=inner**-0.5),
        "bias": randn(columns, seed=seed + 2, dtype=dtype),
        "ln_weight": randn(inner, seed=seed + 3, dtype=dtype),
        "ln_bias": randn(inner, seed=seed + 4, dtype=dtype),
        "residual": randn(rows, columns, seed=seed + 5, dtype=dtype),
        "grad": randn(rows, columns, seed=seed + 6, dtype=dtype),
    }


def arguments(inputs: dict[str, Tensor | None], parts: str, tanh: bool = False) -> dict:
    """Of ``linear``: those parts that are named."""
    named = parts.split()
    norm = None
    if "norm" in named:
        statistics = kernel.row_statistics(inputs["x"], EPS)
        norm = (*statistics, inputs["ln_weight"], inputs["ln_bias"])
    return {
        "bias": inputs["bias"] if "bias" in named else None,
        "residual": inputs["residual"] if "residual" in named else None,
        "norm": norm,
        "gelu_in": "gelu_in" in named,
        "gelu_out": "gelu_out" in named,
        "keep_pre": "pre" in named,
        "tanh": tanh,
    }


def run_linear(inputs: dict[str, Tensor | None], parts: str, tanh: bool = False) -> Results:
    options = arguments(inputs, parts, tanh)
    result = kernel.linear(inputs["x"], inputs["weight"], **options, tile=TILE)
    named = dict(zip(("y", "pre"), result if "pre" in parts else (result,), strict=False))
    assert {y.dtype for y in named.values()} == {inputs["x"].dtype}
    return named


def activated(x, ln_weight, ln_bias, parts: str, tanh: bool) -> Tensor:
    if "norm" in parts.split():
        x = F.layer_norm(x, x.shape[1:], ln_weight, ln_bias, EPS)
    form = "tanh" if tanh else "none"
    return F.gelu(x, approximate=form) if "gelu_in" in parts.split() else x


def linear_twin(parts: str, tanh: bool = False):
    named = parts.split()

    def twin(x, weight, bias, ln_weight, ln_bias, residual, grad) -> Results:
        act = activated(x, ln_weight, ln_bias, parts, tanh)
        pre = F.linear(act, weight, bias if "bias" in named else None)
        y = F.gelu(pre, approximate="tanh" if tanh else "none") if "gelu_out" in named else pre
        y = y + residual if "residual" in named else y
        return {"y": y} | ({"pre": pre} if "pre" in named else {})

    return twin


# --- forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("parts", "tanh"),
    [
        ("", False),
        ("norm gelu_in bias residual", False),
        ("norm gelu_in bias gelu_out residual pre", False),
        ("norm gelu_in bias gelu_out residual pre", True),
    ],
    ids=["plain", "block", "all", "all tanh"],
)
def test_linear(parts, sizes, dtype, tanh):
    inputs = make_inputs(*sizes, dtype)
    assert_within_budget(run_linear(inputs, parts, tanh), linear_twin(parts, tanh), inputs)


@pytest.mark.parametrize(
    "parts", ["bias", "bias gelu_out pre", "gelu_in bias residual", "norm bias", "residual"]
)
def test_parts_by_themselves(parts):
    inputs = make_inputs(37, 40, 56, torch.float16)
    assert_within_budget(run_linear(inputs, parts), linear_twin(parts), inputs)


@pytest.mark.parametrize("absent", ["ln_weight", "ln_bias"])
def test_norm_without_parameters(absent):
    inputs = make_inputs(37, 40, 56, torch.float32) | {absent: None}
    parts = "norm gelu_in bias"
    assert_within_budget(run_linear(inputs, parts), linear_twin(parts), inputs)


def test_columns_in_quarters():
    """Tiles of 256 columns, of which the last is not whole."""
    inputs = make_inputs(20, 300, 24, torch.float32)
    parts = "bias gelu_out residual pre"
    result = kernel.linear(
        inputs["x"], inputs["weight"], **arguments(inputs, parts), tile=GemmTile(32, 256, 16, 4, 2)
    )
    found = dict(zip(("y", "pre"), result, strict=True))
    assert_within_budget(found, linear_twin(parts), inputs)


def test_tiles_of_the_table():
    """As a caller who names none gets them: larger than the problem."""
    for dtype in DTYPES:
        inputs = make_inputs(9, 24, 40, dtype)
        parts = "norm gelu_in bias residual"
        x, weight = inputs["x"], inputs["weight"]
        found = {"y": kernel.linear(x, weight, **arguments(inputs, parts))}
        assert_within_budget(found, linear_twin(parts), inputs)


# --- gradients


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_input_grad(sizes, dtype, tanh):
    inputs = make_inputs(*sizes, dtype)

    def twin(x, weight, grad, **_) -> Results:
        x = x.detach().requires_grad_()
        act = F.gelu(x, approximate="tanh" if tanh else "none")
        (through,) = torch.autograd.grad(act, x, grad @ weight)
        return {"plain": grad @ weight, "gelu": through}

    grad, weight, x = inputs["grad"], inputs["weight"], inputs["x"]
    found = {
        "plain": kernel.linear_input_grad(grad, weight, tile=TILE),
        "gelu": kernel.linear_input_grad(grad, weight, gelu_of=x, tanh=tanh, tile=TILE),
    }
    assert {y.dtype for y in found.values()} == {dtype}
    assert_within_budget(found, twin, inputs)


def run_weight_grad(inputs, parts: str, tanh: bool = False, **options) -> Results:
    chosen = arguments(inputs, parts, tanh)
    grad_weight, grad_bias = kernel.linear_weight_grad(
        inputs["grad"], inputs["x"], norm=chosen["norm"], gelu_in=chosen["gelu_in"], tanh=tanh,
        tile=TILE, **options,
    )  # fmt: skip
    return {"weight": grad_weight, "bias": grad_bias}


def weight_twin(parts: str, tanh: bool = False):
    def twin(x, grad, ln_weight, ln_bias, **_) -> Results:
        return {
            "weight": grad.T @ activated(x, ln_weight, ln_bias, parts, tanh),
            "bias": grad.sum(0),
        }

    return twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("parts", "tanh"), [("", False), ("norm gelu_in", False), ("norm gelu_in", True)]
)
def test_weight_grad(parts, sizes, dtype, tanh):
    inputs = make_inputs(*sizes, dtype)
    found = run_weight_grad(inputs, parts, tanh)
    assert {y.dtype for y in found.values()} == {torch.float32}
    assert_within_budget(found, weight_twin(parts, tanh), inputs)


@pytest.mark.parametrize("rows_each", [16, 32, 64])
def test_rows_of_a_weight_grad_are_shared_out(monkeypatch, rows_each):
    monkeypatch.setattr(kernel, "splits", lambda *_: rows_each)
    inputs = make_inputs(75, 40, 24, torch.float32)
    found = run_weight_grad(inputs, "norm gelu_in")
    assert_within_budget(found, weight_twin("norm gelu_in"), inputs)
    assert_same(run_weight_grad(inputs, "norm gelu_in"), found)
    low = run_weight_grad(inputs, "norm gelu_in", dtype=torch.float16)
    assert torch.equal(low["weight"], found["weight"].half())
    alone = run_weight_grad(inputs, "norm gelu_in", sums=False)
    assert torch.equal(alone["weight"], found["weight"])
    assert alone["bias"].shape == (0,)


# --- in the places of a pixel shuffle

# Grid rows of all images, tokens in one, cells of a token on a side, channels of a cell: runs of
# whole blocks, of less than one, with tails; grids that are not square; one of everything.
GRIDS = [(2, 16, 2, 16), (6, 7, 2, 9), (3, 5, 3, 11), (37, 1, 2, 10), (1, 37, 2, 3), (1, 1, 2, 1)]


def shuffled(tokens: Tensor, cells: Cells) -> Tensor:
    """(M, N) -> (M * upsample**2, N / upsample**2)."""
    u, width = cells
    split = tokens.unflatten(0, (-1, width)).unflatten(-1, (u, u, -1))
    return split.transpose(1, 2).flatten(0, 3)


def in_order(cells_of: Tensor, cells: Cells) -> Tensor:
    u, width = cells
    return cells_of.unflatten(0, (-1, u, width, u)).transpose(1, 2).flatten(2, 4).flatten(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shuffled(grid, dtype, monkeypatch):
    """The same bits as without, elsewhere; and every number of the result is written."""
    (down, width, u, channels), inner = grid, 24
    cells = Cells(u, width)
    inputs = make_inputs(down * width, u * u * channels, inner, dtype)
    monkeypatch.setattr(torch.Tensor, "new_empty", filled_with_nan)
    for parts in ("norm gelu_in bias", "bias gelu_out pre residual"):
        options = arguments(inputs, parts)
        plain, found = (
            kernel.linear(inputs["x"], inputs["weight"], **options, **more, tile=TILE)
            for more in ({}, {"cells": cells})
        )
        if "pre" in parts:
            (plain, pre), (found, also) = plain, found
            assert torch.equal(also, pre)
        assert found.shape == (down * width * u * u, channels)
        assert torch.equal(found, shuffled(plain, cells))
    grad, weight, x = shuffled(inputs["grad"], cells), inputs["weight"], inputs["x"]
    assert torch.equal(in_order(grad, cells), inputs["grad"])
    for gelu_of in (None, x):
        found, plain = (
            kernel.linear_input_grad(g, weight, gelu_of=gelu_of, tile=TILE, **more)
            for g, more in ((grad, {"cells": cells}), (inputs["grad"], {}))
        )
        # Sums over the channels begin anew with each run: another order.
        width_of_sum = weight.shape[0]
        torch.testing.assert_close(
            found, plain, rtol=2 * torch.finfo(dtype).eps, atol=2.0**-22 * width_of_sum
        )
    for rows_each in (16, 1 << 20):
        monkeypatch.setattr(kernel, "splits", lambda *_, each=rows_each: each)
        plain = run_weight_grad(inputs, "norm gelu_in")
        assert_same(run_weight_grad(inputs | {"grad": grad}, "norm gelu_in", cells=cells), plain)


def filled_with_nan(like: Tensor, *shape, dtype=None, device=None) -> Tensor:
    """For ``new_empty``."""
    shape = shape[0] if isinstance(shape[0], Sequence) else shape
    return torch.full(shape, NAN, dtype=dtype or like.dtype, device=device or like.device)


def test_shuffled_in_quarters_and_in_the_tables_tiles():
    cells = Cells(2, 5)
    inputs = make_inputs(20, 4 * 75, 24, torch.float32)
    for tile in (GemmTile(32, 256, 16, 4, 2), None):
        plain, found = (
            kernel.linear(inputs["x"], inputs["weight"], inputs["bias"], tile=tile, **more)
            for more in ({}, {"cells": cells})
        )
        assert torch.equal(found, shuffled(plain, cells))


def test_shuffled_reads_nothing_beyond_the_last_number():
    cells = Cells(2, 7)
    inputs = make_inputs(21, 4 * 9, 24, torch.float32)
    inputs["grad"] = shuffled(inputs["grad"], cells)
    ends = {name: at_the_end_of_memory(x) for name, x in inputs.items()}
    for call in (
        lambda i: kernel.linear_input_grad(i["grad"], i["weight"], cells=cells, tile=TILE),
        lambda i: kernel.linear_weight_grad(i["grad"], i["x"], cells=cells, tile=TILE)[0],
    ):
        assert torch.equal(call(ends), call(inputs))


def test_nothing_shuffled():
    x, weight, cells = torch.empty(0, 24), torch.ones(12, 24), Cells(2, 5)
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    grad = kernel.linear(x, weight, cells=cells)
    assert grad.shape == (0, 3)
    assert kernel.linear_input_grad(grad, weight, cells=cells).shape == (0, 24)
    weight_grad, sums = kernel.linear_weight_grad(grad, x, cells=cells)
    assert (weight_grad.shape, sums.shape) == ((12, 24), (12,))
    assert not weight_grad.any()
    assert not sums.any()
    grad = torch.arange(10 * 4 * 3.0, device=DEVICE).view(40, 3)
    weight_grad, sums = kernel.linear_weight_grad(
        grad, torch.empty(10, 0, device=DEVICE), cells=cells
    )
    assert weight_grad.shape == (12, 0)
    assert torch.equal(sums, in_order(grad, cells).sum(0))


# --- memory


@pytest.mark.parametrize("margin", [8, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(37, 40, 56), (5, 13, 27)], ids=str)
def test_poisoned_neighbours_change_no_bit(sizes, dtype, margin):
    inputs = make_inputs(*sizes, dtype)
    views = inputs | {
        name: amid_nan(inputs[name], margin) for name in ("x", "weight", "residual", "grad")
    }
    parts = "norm gelu_in bias gelu_out residual pre"
    assert_same(run_linear(views, parts), run_linear(inputs, parts))
    assert_same(run_weight_grad(views, parts), run_weight_grad(inputs, parts))
    for gelu_of in (False, True):
        clean, poisoned = (
            kernel.linear_input_grad(
                case["grad"], case["weight"], gelu_of=case["x"] if gelu_of else None, tile=TILE
            )
            for case in (inputs, views)
        )
        assert torch.equal(poisoned, clean)


@pytest.mark.parametrize("sizes", [(37, 40, 56), (5, 13, 27)], ids=str)
def test_nothing_beyond_the_last_number_is_read(sizes):
    inputs = make_inputs(*sizes, torch.float32)
    ends = {name: at_the_end_of_memory(x) for name, x in inputs.items()}
    parts = "norm gelu_in bias gelu_out residual pre"
    assert_same(run_linear(ends, parts), run_linear(inputs, parts))
    assert_same(run_weight_grad(ends, parts), run_weight_grad(inputs, parts))
    ends_grad, grad = (
        kernel.linear_input_grad(case["grad"], case["weight"], gelu_of=case["x"], tile=TILE)
        for case in (ends, inputs)
    )
    assert torch.equal(ends_grad, grad)


def test_a_bad_row_stays_one():
    inputs = make_inputs(37, 40, 56, torch.float32)
    clean = run_linear(inputs, "norm gelu_in bias residual")["y"]
    inputs["x"][36, 3] = NAN
    found = run_linear(inputs, "norm gelu_in bias residual")["y"]
    assert torch.equal(found[:36], clean[:36])
    assert found[36].isnan().all()


def test_twice_the_same():
    inputs = make_inputs(37, 40, 56, torch.float16)
    parts = "norm gelu_in bias gelu_out residual pre"
    assert_same(run_linear(inputs, parts), run_linear(inputs, parts))


def test_nothing_to_do():
    def empty(*shape):
        return torch.empty(shape, device=DEVICE)

    x, weight = empty(0, 24), empty(40, 24)
    assert kernel.linear(x, weight, gelu_out=True).shape == (0, 40)
    assert kernel.linear_input_grad(empty(0, 40), weight).shape == (0, 24)
    grad_weight, grad_bias = kernel.linear_weight_grad(empty(0, 40), x)
    assert grad_weight.shape == (40, 24)
    assert not grad_weight.any()
    assert grad_bias.tolist() == [0.0] * 40
    # Of no inner size: the bias alone.
    bias = torch.arange(40.0, device=DEVICE)
    y = kernel.linear(empty(3, 0), empty(40, 0), bias)
    assert torch.equal(y, bias.expand(3, 40))
    grad = torch.ones(3, 40, device=DEVICE)
    grad_weight, grad_bias = kernel.linear_weight_grad(grad, empty(3, 0))
    assert grad_weight.shape == (40, 0)
    assert grad_bias.tolist() == [3.0] * 40


# --- errors


def test_errors():
    x, weight = torch.zeros(4, 8, device=DEVICE), torch.zeros(6, 8, device=DEVICE)
    y = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight must be \(N, 8\).*got \(8, 6\)"):
        kernel.linear(x, weight.T.contiguous())
    with pytest.raises(ValueError, match=r"weight must be .* unit last stride"):
        kernel.linear(x, torch.zeros(8, 6, device=DEVICE).T)
    with pytest.raises(ValueError, match=r"weight must have the dtype torch\.float32.*float16"):
        kernel.linear(x, weight.half())
    with pytest.raises(ValueError, match=r"residual must be of the result's shape \(4, 6\)"):
        kernel.linear(x, weight, residual=x)
    with pytest.raises(ValueError, match=r"bias must be .*of shape \(6,\), got shape \(4,\)"):
        kernel.linear(x, weight, x[:, 0].contiguous())
    with pytest.raises(ValueError, match=r"rstd must be .*of shape \(4,\), got shape \(6,\)"):
        kernel.linear(x, weight, norm=(y[:, 0].contiguous(), y[0], None, None))
    with pytest.raises(ValueError, match=r"weight must be \(8, K\)"):
        kernel.linear_input_grad(x, weight)
    with pytest.raises(ValueError, match=r"gelu_of must be of the result's shape \(4, 8\)"):
        kernel.linear_input_grad(y, weight, gelu_of=y)
    with pytest.raises(ValueError, match="grad_y must have the 4 rows"):
        kernel.linear_weight_grad(y[:2], x)
    with pytest.raises(ValueError, match="rows of 3 tokens do not make up 4"):
        kernel.linear(x, torch.zeros(12, 8, device=DEVICE), cells=Cells(2, 3))
    with pytest.raises(ValueError, match="weight must have a multiple of 4 rows, got 6"):
        kernel.linear(x, weight, cells=Cells(2, 2))
    wide = torch.zeros(16, 8, device=DEVICE)[:, :3]
    with pytest.raises(ValueError, match=r"grad_y must be contiguous with 4 rows .*\(16, 3\)"):
        kernel.linear_input_grad(wide, torch.zeros(12, 8, device=DEVICE), cells=Cells(2, 2))
    with pytest.raises(ValueError, match=r"grad_y must be contiguous with 4 rows .*\(16, 3\)"):
        kernel.linear_weight_grad(wide, x, cells=Cells(2, 2))
