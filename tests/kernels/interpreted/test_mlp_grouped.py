"""Many products in one launch: each equal, to the last bit, to what it is alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mlp_cases import DEVICE, DTYPES, amid_nan, assert_same, assert_within_budget, randn
from torch import Tensor

from fastagglo.kernels import mlp as kernel
from fastagglo.kernels.mlp import Problem
from fastagglo.kernels.mlp_choice import GemmTile

TILE = GemmTile(32, 32, 16, 4, 2)
# Whole blocks, one row, nothing, tails.
SIZES = [(64, 32, 48), (1, 40, 24), (0, 24, 24), (37, 40, 56), (5, 13, 27)]


def make_problem(
    rows: int, columns: int, inner: int, dtype: torch.dtype, seed: int, **options
) -> Problem:
    x = randn(rows, inner, seed=seed, dtype=dtype) + 0.5
    weight = randn(columns, inner, seed=seed + 1, dtype=dtype, scale=inner**-0.5)
    if options.pop("norm", False):
        vectors = (randn(inner, seed=seed + i, dtype=dtype) for i in (2, 3))
        options["norm"] = (*kernel.row_statistics(x), *vectors)
    if options.pop("bias", False):
        options["bias"] = randn(columns, seed=seed + 4, dtype=dtype)
    if options.pop("residual", False):
        options["residual"] = randn(rows, columns, seed=seed + 5, dtype=dtype)
    return Problem(x, weight, **options)


def alone(problem: Problem) -> Tensor | tuple[Tensor, Tensor]:
    return kernel.linear(**vars(problem), tile=TILE)


def named(results: list[Tensor | tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pairs = [(r if isinstance(r, tuple) else (r,)) for r in results]
    return {f"{i}, {j}": y for i, pair in enumerate(pairs) for j, y in enumerate(pair)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "gelu_out": True, "keep_pre": True},
        {"norm": True, "gelu_in": True, "bias": True, "residual": True, "tanh": True},
    ],
    ids=["plain", "first layer", "block"],
)
def test_as_each_alone(options, dtype):
    problems = [make_problem(*sizes, dtype, 10 * i, **options) for i, sizes in enumerate(SIZES)]
    found = named(kernel.grouped_linear(problems, tile=TILE))
    expected = named([alone(problem) for problem in problems])
    assert_same(found, expected)
    assert_same(named(kernel.grouped_linear(problems, tile=TILE)), found)


def test_unlike_problems(monkeypatch):
    """Dtypes, parts and alignments that one launch cannot serve get several."""
    launches = []
    real = kernel.mlp_table.build

    def counted(columns, device):
        launches.append(len(columns))
        return real(columns, device)

    monkeypatch.setattr(kernel.mlp_table, "build", counted)
    small, large = torch.float16, torch.float32
    problems = [
        make_problem(37, 40, 56, small, 0, bias=True),
        make_problem(5, 24, 16, large, 10, bias=True),
        make_problem(20, 48, 16, small, 20, bias=True),
        make_problem(5, 13, 27, small, 30, bias=True),
        make_problem(9, 40, 24, small, 40, bias=True, gelu_in=True),
        make_problem(9, 40, 24, small, 50, bias=True, residual=True),
        make_problem(9, 40, 24, small, 60),
    ]
    other_bias = replace(problems[0], bias=problems[0].bias.float())
    problems.append(other_bias)
    found = named(kernel.grouped_linear(problems, tile=TILE))
    assert sorted(launches) == [1] * 6 + [2]
    assert_same(found, named([alone(problem) for problem in problems]))


def test_values():
    """Against fp64, with the blocks of the table."""
    problem = make_problem(37, 40, 56, torch.float16, 0, bias=True, gelu_out=True)
    many = [problem] * 20
    found = kernel.grouped_linear(many)

    def twin(x, weight, bias):
        return {"y": torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))}

    inputs = {"x": problem.x, "weight": problem.weight, "bias": problem.bias}
    for y in found:
        assert_within_budget({"y": y}, twin, inputs)
    assert len(found) == 20


@pytest.mark.parametrize("gelu", [False, True])
def test_input_grads(gelu):
    cases = []
    for i, (rows, columns, inner) in enumerate(SIZES):
        grad = randn(rows, columns, seed=10 * i, dtype=torch.float16)
        weight = randn(columns, inner, seed=10 * i + 1, dtype=torch.float16)
        gelu_of = randn(rows, inner, seed=10 * i + 2, dtype=torch.float16) if gelu else None
        cases.append((grad, weight, gelu_of))
    found = named(kernel.grouped_linear_input_grad(cases, tile=TILE))
    expected = [
        kernel.linear_input_grad(grad, weight, gelu_of=gelu_of, tile=TILE)
        for grad, weight, gelu_of in cases
    ]
    assert_same(found, named(expected))


@pytest.mark.parametrize("margin", [8, 3])
def test_poisoned_neighbours_change_no_bit(margin):
    options = {"bias": True, "gelu_out": True, "residual": True}
    problems = [make_problem(*size, torch.float16, 0, **options) for size in SIZES if size[0]]
    views = [
        replace(p, **{n: amid_nan(getattr(p, n), margin) for n in ("x", "weight", "residual")})
        for p in problems
    ]
    found = named(kernel.grouped_linear(views, tile=TILE))
    assert_same(found, named([alone(problem) for problem in problems]))


def test_nothing_to_do():
    assert kernel.grouped_linear([]) == []
    empty = torch.empty(0, 24, device=DEVICE)
    (y,) = kernel.grouped_linear([Problem(empty, torch.empty(8, 24, device=DEVICE))])
    assert y.shape == (0, 8)
    # Of no inner size: the bias alone.
    bias = torch.arange(8.0, device=DEVICE)
    x, weight = torch.empty(3, 0, device=DEVICE), torch.empty(8, 0, device=DEVICE)
    (y,) = kernel.grouped_linear([Problem(x, weight, bias)])
    assert torch.equal(y, bias.expand(3, 8))


def test_errors():
    good = make_problem(4, 8, 8, torch.float32, 0)
    bad = replace(good, weight=good.weight[:, :4])
    with pytest.raises(ValueError, match=r"weight must be \(N, 8\)"):
        kernel.grouped_linear([good, bad])
