"""The fused MLP steps against their twins, plain PyTorch and gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.ops import (
    gelu_linear_residual,
    layer_norm_gelu,
    linear_bias_gelu,
    mlp_torch,
    reference,
    use_backend,
)
from fastagglo.ops.heads import pixel_shuffle
from fastagglo.ops.mlp import norm_gelu_linear, shared_linear

WIDTH, OUT = 17, 13  # no multiple of anything
FORMS = ("none", "tanh")
Call = Callable[..., Tensor]


def norm_gelu_linear_twin(
    x: Tensor, g: Tensor, b: Tensor, w: Tensor, c: Tensor, r: Tensor | None, approximate: str
) -> Tensor:
    h = reference.layer_norm_gelu(x, g, b, approximate=approximate)
    y = F.linear(h, w, c)
    return y if r is None else r + y


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def inputs(
    op: str, lead: tuple[int, ...] = (3, 4), dtype: torch.dtype = torch.float64
) -> tuple[Call, Call, list[Tensor]]:
    """An op, its twin, and its tensors: x first."""
    x = draw(*lead, WIDTH, dtype=dtype)
    gamma, beta = (draw(WIDTH, dtype=dtype, seed=s) for s in (1, 2))
    weight, bias = draw(OUT, WIDTH, dtype=dtype) / 4, draw(OUT, dtype=dtype, seed=3)
    residual = draw(*lead, OUT, dtype=dtype)
    found = {
        "layer_norm_gelu": (layer_norm_gelu, reference.layer_norm_gelu, [gamma, beta]),
        "linear_bias_gelu": (linear_bias_gelu, reference.linear_bias_gelu, [weight, bias]),
        "gelu_linear_residual": (
            gelu_linear_residual,
            reference.gelu_linear_residual,
            [weight, bias, residual],
        ),
        "norm_gelu_linear": (
            norm_gelu_linear,
            norm_gelu_linear_twin,
            [gamma, beta, weight, bias, residual],
        ),
    }
    call, twin, others = found[op]
    return call, twin, [x, *others]


OPS = ("layer_norm_gelu", "linear_bias_gelu", "gelu_linear_residual", "norm_gelu_linear")


def results(call: Call, tensors: list[Tensor], **more: Any) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves, **more)
    upstream = draw(*y.shape, dtype=y.dtype, seed=9)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("lead", [(3, 4), (1,), (), (0,), (2, 0, 3)])
def test_equals_the_twin_with_gradients(op: str, approximate: str, lead: tuple[int, ...]) -> None:
    call, twin, tensors = inputs(op, lead)
    found = results(call, tensors, approximate=approximate)
    assert_same(found, results(twin, tensors, approximate=approximate))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck(op: str, approximate: str) -> None:
    call, _, tensors = inputs(op, (2,))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: call(*t, approximate=approximate), leaves)


@pytest.mark.parametrize("op", OPS)
def test_many_blocks_are_as_one(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, _, tensors = inputs(op, (41,))
    whole = results(call, tensors)
    monkeypatch.setattr(mlp_torch, "BLOCK", 5 * WIDTH)
    assert len(list(mlp_torch._blocks(tensors[0], WIDTH))) == 9
    assert_same(results(call, tensors), whole)


@pytest.mark.parametrize("op", OPS)
def test_strided_and_expanded_tensors(op: str) -> None:
    call, twin, tensors = inputs(op, (6,))
    wide = draw(6, 2 * WIDTH)
    for x in (wide[:, ::2], wide[:, 3 : 3 + WIDTH], draw(WIDTH, 6).T, draw(1, WIDTH).expand(6, -1)):
        assert_same(
            results(call, [x, *tensors[1:]], approximate="none"),
            results(twin, [x, *tensors[1:]], approximate="none"),
        )
    leaves = [t.requires_grad_() for t in tensors]  # the gradient of a sum is expanded
    found, expected = (
        torch.autograd.grad(f(*leaves, approximate="none").sum(), leaves) for f in (call, twin)
    )
    assert_same(list(found), list(expected))


def test_without_parameters() -> None:
    x = draw(5, WIDTH)
    weight = draw(OUT, WIDTH)
    for call, twin, tensors in (
        (layer_norm_gelu, reference.layer_norm_gelu, [x]),
        (linear_bias_gelu, reference.linear_bias_gelu, [x, weight]),
        (gelu_linear_residual, reference.gelu_linear_residual, [x, weight]),
    ):
        assert_same(results(call, tensors), results(twin, tensors))
    only_bias = draw(WIDTH)
    expected = F.gelu(F.layer_norm(x, (WIDTH,)) + only_bias)
    torch.testing.assert_close(layer_norm_gelu(x, bias=only_bias), expected)


def test_eps() -> None:
    x = draw(5, WIDTH) * 1e-2
    expected = reference.layer_norm_gelu(x, eps=0.1)
    torch.testing.assert_close(layer_norm_gelu(x, eps=0.1), expected)
    assert (layer_norm_gelu(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (7, 2), (0, 2, 3), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("upsample", [2, 3])
@pytest.mark.parametrize("block", [None, 4 * WIDTH])
def test_shuffled(
    shape: tuple[int, ...], upsample: int, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pixel shuffle's places: grids that are not square, several of them, block by block."""
    if block is not None:
        monkeypatch.setattr(mlp_torch, "BLOCK", block)
    x, channels = draw(*shape, WIDTH), 5 * upsample**2
    parameters = [draw(WIDTH, seed=1), draw(WIDTH, seed=2), draw(channels, WIDTH), draw(channels)]

    def twin(*tensors: Tensor) -> Tensor:
        return pixel_shuffle(norm_gelu_linear_twin(*tensors, None, "none"), upsample)

    for recompute in (True, False):
        found = results(norm_gelu_linear, [x, *parameters], upsample=upsample, recompute=recompute)
        assert_same(found, results(twin, [x, *parameters]))


def test_shuffled_under_autocast_and_compiled() -> None:
    x = draw(2, 30, 11, WIDTH, dtype=torch.float32)
    parameters = [t.float() for t in (draw(WIDTH, seed=1), draw(WIDTH), draw(20, WIDTH), draw(20))]

    def twin(*tensors: Tensor) -> Tensor:
        return pixel_shuffle(norm_gelu_linear_twin(*tensors, None, "none"), 2)

    exact = results(twin, [t.double() for t in (x, *parameters)])
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(twin, [x, *parameters])
        found = results(norm_gelu_linear, [x, *parameters], upsample=2)
    for got, theirs, right in zip(found, plain, exact, strict=True):
        assert got.dtype == theirs.dtype
        error, budget = ((v.double() - right).norm() for v in (got, theirs))
        assert error <= 1.1 * budget
    compiled = torch.compile(norm_gelu_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 7):
        given = [draw(rows, rows + 1, WIDTH, dtype=torch.float32), *parameters]
        assert_same(
            results(compiled, given, upsample=2), results(norm_gelu_linear, given, upsample=2)
        )


@pytest.mark.parametrize("op", ["gelu_linear_residual", "norm_gelu_linear"])
def test_the_input_as_its_own_residual(op: str) -> None:
    call, twin, (x, *others) = inputs(op)
    square, bias = draw(WIDTH, WIDTH), draw(WIDTH)
    norms = others[:2] if op == "norm_gelu_linear" else []

    def step(f: Call) -> Call:
        return lambda x, *t: f(x, *t, x, approximate="none")

    tensors = [x, *norms, square, bias]
    assert_same(results(step(call), tensors), results(step(twin), tensors))


def test_a_transformers_mlp_in_fp32() -> None:
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(48), nn.Linear(48, 190), nn.Linear(190, 48)
    plain = nn.Sequential(norm, first, nn.GELU(), second)
    x = torch.randn(2, 33, 48)
    pre = norm(x)
    torch.testing.assert_close(
        gelu_linear_residual(
            F.linear(pre, first.weight, first.bias), second.weight, second.bias, x
        ),
        x + plain(x),
    )
    torch.testing.assert_close(
        F.linear(linear_bias_gelu(pre, first.weight, first.bias), second.weight, second.bias),
        plain(x),
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch_in_half_precision(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, twin, tensors = inputs(op, (400,))
    tensors = [t.to(dtype) for t in tensors]
    exact = results(twin, [t.double() for t in tensors], approximate="none")
    plain = results(twin, tensors, approximate="none")
    for block in (mlp_torch.BLOCK, 100 * WIDTH):
        monkeypatch.setattr(mlp_torch, "BLOCK", block)
        found = results(call, tensors, approximate="none")
        for got, theirs, right in zip(found, plain, exact, strict=True):
            assert got.dtype == theirs.dtype == dtype
            error, budget = ((v.double() - right).norm() for v in (got, theirs))
            # One rounding of a result may be all there is: then both have the same error.
            assert error <= 1.1 * budget


@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str) -> None:
    call, twin, tensors = inputs(op, (400,), torch.float32)
    exact = results(twin, [t.double() for t in tensors], approximate="none")
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(twin, tensors, approximate="none")
        found = results(call, tensors, approximate="none")
    residual = len(tensors) > 3
    assert found[0].dtype == (torch.float32 if residual else torch.bfloat16)
    for got, theirs, right in zip(found, plain, exact, strict=True):
        error, budget = ((v.double() - right).norm() for v in (got, theirs))
        # layer_norm_gelu rounds for the GEMM that follows, PyTorch in that GEMM: 2**-9 of a norm.
        assert error <= 1.1 * budget + (2**-9 * right.norm() if op == "layer_norm_gelu" else 0)
    assert all(grad.dtype == torch.float32 for grad in found[1:])


@pytest.mark.parametrize("parameter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["linear_bias_gelu", "gelu_linear_residual", "shared_linear"])
def test_weight_gradients_are_added_up_in_fp32(op: str, parameter: torch.dtype) -> None:
    """Of 8,192 rows, one rounding is all that is lost: sums in bf16 would keep no digit."""
    rows = 8192
    x = draw(rows, WIDTH, dtype=torch.bfloat16) + 1
    weight = (draw(OUT, WIDTH) / 4).to(parameter).requires_grad_()
    upstream = draw(rows, OUT, dtype=torch.bfloat16) + 1
    with torch.autocast("cpu", torch.bfloat16):
        if op == "linear_bias_gelu":
            pre = F.linear(x, weight.detach())
            slope = torch.autograd.functional.vjp(F.gelu, pre.float(), upstream.float())[1]
            left, right = slope.bfloat16(), x
            y = linear_bias_gelu(x, weight)
        elif op == "gelu_linear_residual":
            left, right = upstream, F.gelu(x.float()).bfloat16()
            y = gelu_linear_residual(x, weight)
        else:
            left, right = upstream, x
            (y,) = shared_linear(x, [weight], [None])
        assert y.dtype == torch.bfloat16
    y.backward(upstream)
    exact = left.double().T @ right.double()
    assert weight.grad.dtype == parameter
    # bf16 rounds at 2**-8; an fp32 sum of 8,192 terms alike in sign is off by far less.
    assert ((weight.grad.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 0.05).all()


def test_a_wide_weight_gets_its_gradient_unrounded_off_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tensors without memory: what the product is asked for."""
    asked: list[torch.dtype | None] = []
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: (asked.append(k.get("out_dtype")), mm(*a, **k))[1]
    )
    grad, x = (torch.empty(9, n, dtype=torch.bfloat16, device="meta") for n in (4, 5))
    for dtype in (torch.float32, torch.bfloat16):
        found = mlp_torch.weight_product(grad, x, dtype)
        assert (found.shape, found.dtype) == ((4, 5), dtype)
    assert asked == [torch.float32]


def test_autocast_leaves_fp64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for op in OPS:
            call, twin, tensors = inputs(op)
            found = results(call, tensors, approximate="none")
            assert all(x.dtype == torch.float64 for x in found)
    assert_same(found, results(twin, tensors, approximate="none"))


@pytest.mark.parametrize("op", OPS)
def test_frozen_subsets(op: str) -> None:
    call, _, tensors = inputs(op)
    everything = results(call, tensors)[1:]
    for frozen in range(1, 2 ** len(tensors)):
        leaves = [t.detach().requires_grad_(not frozen >> i & 1) for i, t in enumerate(tensors)]
        y = call(*leaves)
        if not y.requires_grad:
            assert frozen == 2 ** len(tensors) - 1
            continue
        y.backward(draw(*y.shape, seed=9))
        for leaf, expected in zip(leaves, everything, strict=True):
            assert (leaf.grad is None) == (not leaf.requires_grad)
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("joined", [False, True])
def test_shared_linear(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_torch, "joined", lambda *_: joined)  # as on a CPU, and as on CUDA
    x = draw(2, 5, WIDTH)
    parameters = [draw(n, WIDTH) for n in (3, 4)] + [draw(3)]

    def ours(x: Tensor, *p: Tensor) -> Tensor:
        return torch.cat(shared_linear(x, p[:2], [p[2], None]), -1)

    def theirs(x: Tensor, *p: Tensor) -> Tensor:
        return torch.cat([F.linear(x, p[0], p[2]), F.linear(x, p[1])], -1)

    assert_same(results(ours, [x, *parameters]), results(theirs, [x, *parameters]))
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    _, used = shared_linear(x, parameters[:2], [parameters[2], None])
    used.sum().backward()
    assert parameters[0].grad is None
    assert parameters[2].grad is None
    torch.testing.assert_close(x.grad, parameters[1].sum(0).expand_as(x))
    assert len(leaves) == 4


@pytest.mark.parametrize("op", OPS)
def test_what_is_kept(op: str) -> None:
    """Bytes that autograd holds beyond the arguments."""
    call, _, tensors = inputs(op, (50,), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]

    def held(**more: Any) -> int:
        given = {t.untyped_storage().data_ptr() for t in leaves}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call(*leaves, **more)
        return sum(kept.values())

    numbers = {
        "layer_norm_gelu": 2,
        "linear_bias_gelu": OUT,
        "gelu_linear_residual": 0,
        "norm_gelu_linear": 2,
    }
    assert held() == 50 * 4 * numbers[op]
    if op == "norm_gelu_linear":
        assert held(recompute=False) == 50 * 4 * (2 + WIDTH)
        kept = results(call, tensors, recompute=False)
        for one, other in zip(kept, results(call, tensors), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_breaks(op: str) -> None:
    call, _, tensors = inputs(op)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 7):
        call, _, tensors = inputs(op, (rows,))
        assert_same(results(compiled, tensors), results(call, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    ops, check = torch.ops.fastagglo, torch.library.opcheck
    x, y = draw(6, WIDTH, dtype=dtype), draw(6, OUT, dtype=dtype)
    gamma, beta = draw(WIDTH, dtype=dtype), draw(WIDTH, dtype=dtype)
    weight, bias, residual = draw(OUT, WIDTH, dtype=dtype), draw(OUT, dtype=dtype), y
    half = torch.bfloat16
    mean, rstd = torch.randn(6), torch.rand(6)
    check(ops.norm_gelu_fwd.default, (x, gamma, None, 1e-5, False, half, False))
    check(ops.norm_gelu_bwd.default, (x, x, mean, rstd, gamma, None, True, 1e-5, False, [True] * 3))
    check(ops.linear_gelu_fwd.default, (x, weight, bias, False, half, False))
    pre = residual.to(half)
    check(
        ops.linear_gelu_bwd.default, (pre, pre, x, weight, bias, True, False, [True, False, True])
    )
    for keep, skip in ((False, False), (True, False), (False, True)):
        w, c = (weight[:, :OUT], bias) if skip else (weight, bias)
        given = y if skip else x
        norms = (None, None) if skip else (gamma, beta)
        settings = (skip, not skip, 1e-5, False, half)
        arguments = (given, *norms, w, c, None if skip or keep else residual, *settings)
        check(ops.norm_gelu_linear_fwd.default, (*arguments, dtype, keep, 1, 1, False))
        act = given.to(half) if keep else given.new_empty(0, given.shape[1], dtype=half)
        kept = (given, mean, rstd, act, *norms, w, c)
        settings = (*settings, 1, 1, False, [True] * 5)
        check(ops.norm_gelu_linear_bwd.default, (residual, *kept, *settings))
    layer = (gamma, beta, weight[:12], bias[:12])  # shuffled: a grid of 2 x 3
    settings = (False, True, 1e-5, False, half)
    more = (half, False, 2, 3, False)
    check(ops.norm_gelu_linear_fwd.default, (x, *layer, None, *settings, *more))
    kept = (x, mean, rstd, x.new_empty(0, WIDTH, dtype=half), *layer)
    cells = draw(24, 3, dtype=half)
    check(ops.norm_gelu_linear_bwd.default, (cells, *kept, *settings, 2, 3, False, [True] * 5))
    lists = ([weight, weight], [bias, None])
    check(ops.shared_linear_fwd.default, (x, *lists, half))
    upstream = [residual.to(half)] * 2
    check(ops.shared_linear_bwd.default, (upstream, x, *lists, half, [True] * 4 + [False]))


def test_shapes_on_the_meta_device() -> None:
    for op in OPS:
        call, _, tensors = inputs(op)
        shape = call(*tensors).shape
        assert call(*(t.to("meta") for t in tensors)).shape == shape


class TestErrors:
    x = torch.zeros(2, 3)
    weight = torch.zeros(4, 3)

    def test_x(self) -> None:
        for call in (layer_norm_gelu, lambda x: linear_bias_gelu(x, self.weight)):
            with pytest.raises(TypeError, match=r"x must be a float64, .* got list"):
                call([1.0])
            with pytest.raises(TypeError, match=r"got torch\.int64"):
                call(torch.zeros(2, 3, dtype=torch.int64))
            with pytest.raises(ValueError, match=r"\(\.\.\., channels\), got shape \(\)"):
                call(torch.tensor(1.0))

    def test_parameters(self) -> None:
        with pytest.raises(ValueError, match=r"norm's weight must be \(3,\) .* got \(4,\)"):
            layer_norm_gelu(self.x, torch.zeros(4))
        with pytest.raises(TypeError, match=r"norm's bias must be a floating-point .* got int"):
            layer_norm_gelu(self.x, None, 3)
        with pytest.raises(ValueError, match=r"weight must be \(4, 3\) .* got \(4, 5\)"):
            linear_bias_gelu(self.x, torch.zeros(4, 5))
        with pytest.raises(ValueError, match=r"weight must be \('outputs', 3\) .* got \(3,\)"):
            linear_bias_gelu(self.x, torch.zeros(3))
        with pytest.raises(ValueError, match=r"bias must be \(4,\) .* got \(3,\)"):
            gelu_linear_residual(self.x, self.weight, torch.zeros(3))
        with pytest.raises(ValueError, match=r"residual must be \(2, 4\) .* got \(2, 3\)"):
            gelu_linear_residual(self.x, self.weight, residual=self.x)
        with pytest.raises(ValueError, match="bias must be on the device of x, cpu, got meta"):
            linear_bias_gelu(self.x, self.weight, torch.zeros(4, device="meta"))
        with pytest.raises(TypeError, match="weight must have the dtype of x, torch"):
            linear_bias_gelu(self.x, self.weight.double())

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
            layer_norm_gelu(self.x, approximate="erf")
        with pytest.raises(TypeError, match="approximate must be a string, got True"):
            linear_bias_gelu(self.x, self.weight, approximate=True)
        with pytest.raises(TypeError, match="eps must be a number, got None"):
            layer_norm_gelu(self.x, eps=None)
        for eps in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="eps must be finite and at least 0"):
                layer_norm_gelu(self.x, eps=eps)

    def test_backend(self) -> None:
        with use_backend("xformers"), pytest.raises(ValueError, match="layer_norm_gelu has no"):
            layer_norm_gelu(self.x)
        with use_backend("torch"):
            layer_norm_gelu(self.x)
