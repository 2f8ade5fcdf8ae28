"""LayerNorm + GELU and GELU alone, forward and backward, against PyTorch in fp64."""

from __future__ import annotations

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

from fastagglo.kernels import mlp_pointwise as kernel

EPS = 1e-5
FORMS = {False: "none", True: "tanh"}


def make_inputs(
    rows: int, channels: int, dtype: torch.dtype, affine: bool = True
) -> dict[str, Tensor | None]:
    # A mean that is no zero, so that it must be subtracted well.
    inputs: dict[str, Tensor | None] = {
        "x": randn(rows, channels, seed=0, dtype=dtype, scale=2.0) + 1.0,
        "grad": randn(rows, channels, seed=1, dtype=dtype),
        "weight": randn(channels, seed=2, dtype=dtype) if affine else None,
        "bias": randn(channels, seed=3, dtype=dtype) if affine else None,
    }
    return inputs


def run_norm(inputs: dict[str, Tensor | None], tanh: bool) -> Results:
    x, grad, weight, bias = (inputs[name] for name in ("x", "grad", "weight", "bias"))
    y, mean, rstd = kernel.norm_gelu_forward(x, weight, bias, EPS, tanh)
    grad_x, grad_weight, grad_bias = kernel.norm_gelu_backward(
        grad, x, mean, rstd, weight, bias, tanh
    )
    assert y.dtype == grad_x.dtype == x.dtype
    assert {t.dtype for t in (mean, rstd, grad_weight, grad_bias)} == {torch.float32}
    return {
        "y": y, "mean": mean, "rstd": rstd,
        "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias,
    }  # fmt: skip


def norm_twin(tanh: bool):
    def twin(x, grad, weight, bias) -> Results:
        x = x.detach().requires_grad_()
        # Gradients of an affine map that is not there: of ones and zeros.
        one = torch.ones(x.shape[1]).to(x) if weight is None else weight.detach().clone()
        zero = torch.zeros(x.shape[1]).to(x) if bias is None else bias.detach().clone()
        one.requires_grad_(), zero.requires_grad_()
        normal = F.layer_norm(x, x.shape[1:], one, zero, EPS)
        y = F.gelu(normal, approximate=FORMS[tanh])
        grads = torch.autograd.grad(y, (x, one, zero), grad)
        names = ("y", "grad_x", "grad_weight", "grad_bias")
        return dict(zip(names, (y.detach(), *grads), strict=True))

    return twin


@pytest.mark.parametrize("tanh", FORMS, ids=FORMS.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(1, 16), (37, 100), (5, 1520), (3, 13)])
def test_norm_gelu(rows, channels, dtype, tanh):
    inputs = make_inputs(rows, channels, dtype)
    found = run_norm(inputs, tanh)
    assert_within_budget(found, norm_twin(tanh), inputs)


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
def test_without_parameters(absent):
    inputs = make_inputs(9, 48, torch.float32)
    inputs |= {name: None for name in ("weight", "bias") if absent in (name, "both")}
    assert_within_budget(run_norm(inputs, False), norm_twin(False), inputs)


def test_statistics_alone():
    x = make_inputs(9, 48, torch.float16)["x"]
    _, mean, rstd = kernel.norm_gelu_forward(x, None, None, EPS)
    found = kernel.row_statistics(x, EPS)
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], rstd)
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-6, atol=1e-6)
    expected = (wide.var(1, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-6, atol=0)


def test_a_constant_row():
    """Variance zero, at a mean far from it."""
    inputs = make_inputs(3, 64, torch.float32)
    inputs["x"][1] = 300.0
    found = run_norm(inputs, False)
    assert found["rstd"][1].item() == pytest.approx(EPS**-0.5)
    assert_within_budget(found, norm_twin(False), inputs)


def run_gelu(inputs: dict[str, Tensor], tanh: bool) -> Results:
    y = kernel.gelu_forward(inputs["x"], tanh)
    grad_x, columns = kernel.gelu_backward(inputs["grad"], inputs["x"], tanh)
    assert y.dtype == grad_x.dtype == inputs["x"].dtype
    assert columns.dtype == torch.float32
    return {"y": y, "grad_x": grad_x, "columns": columns}


def gelu_twin(tanh: bool):
    def twin(x, grad) -> Results:
        x = x.detach().requires_grad_()
        y = F.gelu(x, approximate=FORMS[tanh])
        (grad_x,) = torch.autograd.grad(y, x, grad)
        columns = grad_x.sum(0)
        return {"y": y.detach(), "grad_x": grad_x, "columns": columns}

    return twin


@pytest.mark.parametrize("tanh", FORMS, ids=FORMS.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(1, 16), (37, 100), (5, 600), (3, 13)])
def test_gelu(rows, channels, dtype, tanh):
    inputs = {name: make_inputs(rows, channels, dtype)[name] for name in ("x", "grad")}
    assert_within_budget(run_gelu(inputs, tanh), gelu_twin(tanh), inputs)


@pytest.mark.parametrize("tanh", FORMS, ids=FORMS.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero(dtype, tanh):
    """Where exponentials overflow, and where a square leaves fp32."""
    largest = 6e4 if dtype == torch.float16 else 1e18
    x = torch.tensor([[-largest, -300, -20, -9, -5, -0.0, 0.0, 5, 9, 20, 300, largest]])
    inputs = {"x": x.to(dtype).to(DEVICE), "grad": torch.ones_like(x).to(dtype).to(DEVICE)}
    found = run_gelu(inputs, tanh)
    y, slope = found["y"][0], found["grad_x"][0]
    assert y.isfinite().all()
    assert slope.isfinite().all()
    assert torch.equal(y[-3:], inputs["x"][0, -3:])
    assert torch.equal(slope[-3:], torch.ones_like(slope[-3:]))
    assert not y[:2].any()
    assert not slope[:2].any()
    assert slope[5].item() == slope[6].item() == 0.5


# --- rows and memory


@pytest.mark.parametrize("shape", [(0, 24), (7, 0)])
def test_nothing_to_do(shape):
    x = torch.empty(shape, device=DEVICE)
    assert kernel.gelu_forward(x).shape == shape
    grad, columns = kernel.gelu_backward(x, x)
    assert grad.shape == shape
    assert columns.tolist() == [0.0] * shape[1]
    if shape[1]:
        y, mean, rstd = kernel.norm_gelu_forward(x, None, None)
        assert (y.shape, mean.shape, rstd.shape) == (shape, (0,), (0,))
        grads = kernel.norm_gelu_backward(x, x, mean, rstd, None, None)
        assert [tuple(g.shape) for g in grads] == [shape, (24,), (24,)]
        assert not grads[1].any()
        assert not grads[2].any()


@pytest.mark.parametrize("margin", [8, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poisoned_neighbours_change_no_bit(dtype, margin):
    for channels in (100, 24):
        inputs = make_inputs(6, channels, dtype)
        views = inputs | {name: amid_nan(inputs[name], margin) for name in ("x", "grad")}
        assert_same(run_norm(views, False), run_norm(inputs, False))
        pick = {"x", "grad"}
        assert_same(
            run_gelu({name: views[name] for name in pick}, True),
            run_gelu({name: inputs[name] for name in pick}, True),
        )


def test_nothing_beyond_the_last_number_is_read():
    inputs = make_inputs(7, 27, torch.float32)
    ends = {name: at_the_end_of_memory(x) for name, x in inputs.items()}
    assert_same(run_norm(ends, False), run_norm(inputs, False))
    assert_same(run_gelu(ends, False), run_gelu(inputs, False))


def test_a_bad_row_stays_one(monkeypatch):
    monkeypatch.setattr(kernel, "PARTS", 2)
    inputs = make_inputs(21, 40, torch.float32)
    clean = run_norm(inputs, False)
    inputs["x"][4, 7] = NAN
    found = run_norm(inputs, False)
    others = torch.arange(21) != 4
    for name in ("y", "grad_x", "mean", "rstd"):
        assert torch.equal(found[name][others], clean[name][others]), name
        assert found[name][4].isnan().all(), name


@pytest.mark.parametrize("parts", [1, 3, 528])
def test_rows_are_shared_out(monkeypatch, parts):
    """Each row counts once in the sums, however many programs there are."""
    monkeypatch.setattr(kernel, "PARTS", parts)
    inputs = make_inputs(200, 40, torch.float32)
    assert_within_budget(run_norm(inputs, False), norm_twin(False), inputs)
    chosen = {name: inputs[name] for name in ("x", "grad")}
    assert_within_budget(run_gelu(chosen, False), gelu_twin(False), chosen)


def test_twice_the_same():
    inputs = make_inputs(200, 40, torch.float16)
    assert_same(run_norm(inputs, False), run_norm(inputs, False))
    chosen = {name: inputs[name] for name in ("x", "grad")}
    assert_same(run_gelu(chosen, False), run_gelu(chosen, False))


def test_sums_only_where_asked_for():
    inputs = make_inputs(9, 48, torch.float32)
    x, grad, weight, bias = inputs.values()
    full = run_norm(inputs, False)
    grad_x, *rest = kernel.norm_gelu_backward(
        grad, x, full["mean"], full["rstd"], weight, bias, sums=False
    )
    assert torch.equal(grad_x, full["grad_x"])
    assert [tuple(r.shape) for r in rest] == [(0,), (0,)]
    grad_h, columns = kernel.gelu_backward(grad, x, sums=False)
    assert torch.equal(grad_h, kernel.gelu_backward(grad, x)[0])
    assert columns.shape == (0,)


# --- errors


def test_errors():
    x = torch.zeros(4, 8, device=DEVICE)
    wrong = torch.zeros(8, 4, device=DEVICE).T
    with pytest.raises(ValueError, match=r"x must be .* unit last stride.*\(1, 4\)"):
        kernel.norm_gelu_forward(wrong, None, None)
    with pytest.raises(ValueError, match=r"h must be .*float64"):
        kernel.gelu_forward(x.double())
    with pytest.raises(ValueError, match=r"weight must be .*of shape \(8,\), got .*\(4,\)"):
        kernel.norm_gelu_forward(x, x[:, 0].contiguous(), None)
    with pytest.raises(ValueError, match=r"grad_y must have the shape \(4, 8\)"):
        kernel.gelu_backward(x[:2], x)
    with pytest.raises(ValueError, match="1 to 8192 channels"):
        kernel.norm_gelu_forward(torch.zeros(1, 8193, device=DEVICE), None, None)
