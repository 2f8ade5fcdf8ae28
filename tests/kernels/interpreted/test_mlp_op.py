"""The fused MLP steps and the adaptor heads through their public functions, on the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from mlp_cases import DEVICE, DTYPES, randn
from torch import Tensor

from fastagglo import ops
from fastagglo.kernels import mlp_choice
from fastagglo.ops import (
    AdaptorHeads,
    AdaptorMLP,
    HeadSpec,
    mlp_triton,
    reference,
    use_backend,
)
from fastagglo.ops.mlp import norm_gelu_linear

M, K, N = 37, 48, 40
ROADS = ("cublas", "triton")


@pytest.fixture(params=ROADS)
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both roads of a product, whatever the table says."""
    rows = dict.fromkeys(mlp_choice.MOST_ROWS, 0 if request.param == "cublas" else 1 << 30)
    monkeypatch.setattr(mlp_choice, "MOST_ROWS", rows)
    return request.param


def twin(x: Tensor, g: Tensor, b: Tensor, w: Tensor, c: Tensor, r: Tensor, **more: str) -> Tensor:
    h = reference.layer_norm_gelu(x, g, b, **more)
    return r + torch.nn.functional.linear(h, w, c)


def cases(dtype: torch.dtype) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    x, residual = randn(M, K, seed=0, dtype=dtype), randn(M, N, seed=1, dtype=dtype)
    gamma, beta = (randn(K, seed=s, dtype=dtype) for s in (2, 3))
    weight, bias = randn(N, K, seed=4, dtype=dtype, scale=0.2), randn(N, seed=5, dtype=dtype)
    return {
        "layer_norm_gelu": (ops.layer_norm_gelu, reference.layer_norm_gelu, [x, gamma, beta]),
        "linear_bias_gelu": (ops.linear_bias_gelu, reference.linear_bias_gelu, [x, weight, bias]),
        "gelu_linear_residual": (
            ops.gelu_linear_residual,
            reference.gelu_linear_residual,
            [x, weight, bias, residual],
        ),
        "norm_gelu_linear": (norm_gelu_linear, twin, [x, gamma, beta, weight, bias, residual]),
    }


def results(call: Callable, tensors: Sequence[Tensor], **more: object) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves, **more)
    upstream = randn(*y.shape, seed=9, dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def assert_as_exact(
    found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    for i, (got, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        error, budget = ((v.double() - right).norm() for v in (got, theirs))
        assert error <= 2 * budget + 2.0**-21 * right.norm(), f"result {i}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("op", list(cases(torch.float32)))
def test_as_exact_as_pytorch(op: str, approximate: str, dtype: torch.dtype, road: str) -> None:
    call, eager, tensors = cases(dtype)[op]
    exact = results(eager, [t.double() for t in tensors], approximate=approximate)
    plain = results(eager, tensors, approximate=approximate)
    with use_backend("triton"):
        found = results(call, tensors, approximate=approximate)
    assert all(x.dtype == dtype for x in found)
    assert_as_exact(found, plain, exact)


def test_a_wide_weight_under_autocast(road: str) -> None:
    """Its gradient is the kernel's fp32 sum, not rounded to fp16 on the way."""
    x = randn(M, K, seed=0, dtype=torch.float16)
    weight = randn(N, K, seed=4, dtype=torch.float32, scale=0.2).requires_grad_()
    upstream = randn(M, N, seed=9, dtype=torch.float16)
    with torch.autocast(DEVICE, torch.float16), use_backend("triton"):
        y = ops.gelu_linear_residual(x, weight)
    y.backward(upstream)
    assert y.dtype == torch.float16
    assert weight.grad.dtype == torch.float32
    exact = upstream.double().T @ torch.nn.functional.gelu(x.float()).half().double()
    error = (weight.grad - exact).norm() / exact.norm()
    # Of what is summed some may be rounded to fp16 the other way, GELU's last bit being another.
    assert error <= (2e-5 if road == "triton" or DEVICE == "cuda" else 2**-11)


def test_the_kernels_run(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("linear", "linear_weight_grad", "linear_input_grad", "norm_gelu_forward"):
        real = getattr(mlp_triton.kernel, name)

        def spy(*a: object, name: str = name, real: Callable = real, **k: object) -> object:
            ran.append(name)
            return real(*a, **k)

        monkeypatch.setattr(mlp_triton.kernel, name, spy)
    call, _, tensors = cases(torch.float16)["norm_gelu_linear"]
    with use_backend("triton"):
        results(call, tensors)
    if road == "triton":
        assert ran == ["linear", "linear_weight_grad", "linear_input_grad"]
    else:
        assert ran == ["norm_gelu_forward"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [True, False])
def test_an_upsampling_head(
    recompute: bool, dtype: torch.dtype, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's tile is stored in shuffled place and its gradient read from there."""
    torch.manual_seed(0)
    head = AdaptorMLP(24, 33, 5, blocks=1, upsample=2, recompute=recompute).to(DEVICE, dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    x = randn(2, 3, 5, 24, seed=1, dtype=dtype)
    seen: list[str] = []
    for name in ("linear", "linear_weight_grad", "linear_input_grad"):
        real = getattr(mlp_triton.kernel, name)

        def spy(*a: object, name: str = name, real: Callable = real, **k: object) -> object:
            if k.get("cells", mlp_triton.kernel.PLAIN).upsample == 2:
                seen.append(name)
            return real(*a, **k)

        monkeypatch.setattr(mlp_triton.kernel, name, spy)

    def everything(call: Callable, tensors: Sequence[Tensor]) -> list[Tensor]:
        return results(lambda x, *_: call(x, head), tensors[:1]) + [
            g.detach()
            for g in torch.autograd.grad(
                call(tensors[0], head).float().square().sum(), list(head.parameters())
            )
        ]

    plain = everything(reference.adaptor_mlp, [x])
    with use_backend("triton"):
        found = everything(ops.adaptor_mlp, [x])
    by_kernel = ["linear", "linear_weight_grad", "linear_input_grad"]
    fused = road == "triton" and recompute and dtype != torch.float32
    assert seen == (by_kernel * 2 if fused else [])
    head.double()
    assert_as_exact(found, plain, everything(reference.adaptor_mlp, [x.double()]))


@pytest.mark.parametrize("recompute", [True, False])
def test_heads(recompute: bool, road: str) -> None:
    torch.manual_seed(0)
    specs = {
        "a": HeadSpec(summary=24, spatial=40, hidden=32, blocks=1),
        "b": HeadSpec(spatial=9, hidden=33, upsample=2),
        "c": HeadSpec(summary=16, spatial=8, pre_norm=True),
    }
    heads = AdaptorHeads(32, specs, recompute).to(DEVICE, torch.float16)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    summary = randn(3, 3, 32, seed=1, dtype=torch.float16)
    spatial = randn(21, 32, seed=2, dtype=torch.float16)
    parameters = list(heads.parameters())

    def flat(s: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return torch.cat(
            [x.flatten() for pair in heads(s, t).values() for x in pair if x is not None]
        )

    plain = results(flat, [summary, spatial])
    with use_backend("triton"):
        found = results(flat, [summary, spatial])
        gradients = torch.autograd.grad(flat(summary, spatial).float().sum(), parameters)
    with use_backend("torch"):
        others = torch.autograd.grad(flat(summary, spatial).float().sum(), parameters)
    heads.double()
    exact = results(flat, [summary.double(), spatial.double()])
    assert_as_exact(found, plain, exact)
    for (name, _), one, other in zip(heads.named_parameters(), gradients, others, strict=True):
        # Two ways through fp16: some roundings of 2**-11 each, of sums that may cancel.
        assert (one - other).norm() <= 2e-2 * other.norm(), name


class TestSummariesTogether:
    specs = {  # noqa: RUF012
        "a": HeadSpec(summary=24, hidden=32, blocks=2),
        "b": HeadSpec(summary=9, hidden=33, blocks=1, pre_norm=True),
        "c": HeadSpec(spatial=16),
        "d": HeadSpec(summary=16, hidden=40),
    }

    def heads(self) -> AdaptorHeads:
        torch.manual_seed(0)
        heads = AdaptorHeads(32, self.specs).to(DEVICE, torch.float16)
        with torch.no_grad():
            for p in heads.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        return heads

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
        """Grouped launches, by name and number of problems."""
        made: list[tuple[str, int]] = []
        for name in ("grouped_linear", "grouped_linear_input_grad"):
            real = getattr(mlp_triton.kernel, name)

            def spy(problems: list, name: str = name, real: Callable = real) -> list:
                made.append((name, len(problems)))
                return real(problems)

            monkeypatch.setattr(mlp_triton.kernel, name, spy)
        return made

    def test_values_and_gradients(self, launches: list) -> None:
        heads, summary = self.heads(), randn(5, 4, 32, seed=1, dtype=torch.float16)
        parameters = list(heads.summary.parameters())

        def flat(s: Tensor, *_: Tensor) -> Tensor:
            return torch.cat([x.flatten() for x, _ in heads(s, None).values() if x is not None])

        def everything(s: Tensor) -> list[Tensor]:
            s = s.detach().requires_grad_()
            y = flat(s)
            upstream = randn(*y.shape, seed=9, dtype=torch.float32).to(y.dtype)
            return [y.detach(), *torch.autograd.grad(y, [s, *parameters], upstream)]

        plain = everything(summary)
        assert not launches
        with use_backend("triton"):
            found = everything(summary)
        forward = [count for name, count in launches if name == "grouped_linear"]
        assert forward == [2, 1, 2, 1, 3]  # first layers, with pre_norm, two blocks, last layers
        assert sum(count for name, count in launches if name != "grouped_linear") == sum(forward)
        heads.double()
        parameters = list(heads.summary.parameters())
        assert_as_exact(found, plain, everything(summary.double()))

    def test_frozen_parameters_and_slots(self, launches: list) -> None:
        heads, summary = self.heads(), randn(5, 4, 32, seed=1, dtype=torch.float16)
        for name, parameter in heads.named_parameters():
            parameter.requires_grad_(".a." in name and "fc1" in name)
        with use_backend("triton"):
            sum(x.sum() for x, _ in heads(summary, None).values() if x is not None).backward()
        found = {name: p.grad for name, p in heads.named_parameters()}
        heads.zero_grad()
        with use_backend("torch"):
            sum(x.sum() for x, _ in heads(summary, None).values() if x is not None).backward()
        for name, parameter in heads.named_parameters():
            assert (found[name] is None) == (parameter.grad is None)
            if parameter.grad is not None:
                error = (found[name] - parameter.grad).norm()
                assert error <= 2e-2 * parameter.grad.norm(), name
        # Nothing of the other heads, and nothing before a's first layer.
        grads = [count for name, count in launches if name == "grouped_linear_input_grad"]
        assert grads == [1, 1, 1]

    def test_opcheck(self) -> None:
        x, y = (randn(5, n, seed=n, dtype=torch.float16) for n in (16, 24))
        gamma, bias = randn(16, seed=2, dtype=torch.float16), randn(24, seed=3, dtype=torch.float16)
        weight = randn(24, 16, seed=4, dtype=torch.float16)
        lists = ([x, x], [gamma, None], [None, gamma], [weight, weight], [bias, bias])
        calls = torch.ops.fastagglo
        torch.library.opcheck(calls.grouped_step_fwd.default, (*lists, [1e-5, 1e-6], True, False))
        stats = [torch.randn(5, device=DEVICE), torch.rand(5, device=DEVICE)]
        wants = [True, True, True, False, False, True, True, False, True, True]
        torch.library.opcheck(
            calls.grouped_step_bwd.default, ([y, y], stats, stats, *lists, True, False, wants)
        )

    def test_many_rows_and_fp32_go_alone(self, launches: list) -> None:
        heads = self.heads()
        with use_backend("triton"), torch.no_grad():
            heads(
                randn(mlp_choice.MOST_ROWS["grouped"] + 1, 4, 32, seed=1, dtype=torch.float16), None
            )
            heads.float()(randn(5, 4, 32, seed=1, dtype=torch.float32), None)
        assert not launches


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int, road: str) -> None:
    for call, eager, tensors in cases(torch.float32).values():
        cut = [t[:rows] if len(t) == M else t for t in tensors]
        with use_backend("triton"):
            found = results(call, cut, approximate="none")
        expected = results(eager, cut, approximate="none")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_input_as_its_own_residual_and_frozen_parameters(road: str) -> None:
    x = randn(M, K, seed=0, dtype=torch.float16)
    _, _, (_, g, b, *_) = cases(torch.float16)["norm_gelu_linear"]
    weight, bias = randn(K, K, seed=4, dtype=torch.float16, scale=0.2), b.clone()

    def step(x: Tensor) -> Tensor:
        return norm_gelu_linear(x, g, b, weight, bias, x)

    with use_backend("triton"):
        found = results(step, [x])
    plain = results(lambda x: twin(x, g, b, weight, bias, x), [x])
    wide = [t.double() for t in (g, b, weight, bias)]
    exact = results(lambda x: twin(x, *wide, x), [x.double()])
    assert_as_exact(found, plain, exact)


def test_autocast_and_limits() -> None:
    call, _, tensors = cases(torch.float32)["norm_gelu_linear"]
    with torch.autocast(DEVICE, torch.bfloat16), use_backend("triton"):
        y = ops.layer_norm_gelu(*tensors[:3])
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ops.layer_norm_gelu(*tensors[:3]), rtol=1e-2, atol=1e-2)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="float64"):
            ops.layer_norm_gelu(tensors[0].double())
        with pytest.raises(ValueError, match="up to 8192 channels, got 8193"):
            ops.layer_norm_gelu(torch.zeros(1, 8193, device=DEVICE))
        assert call(*(t.double() for t in tensors)).dtype == torch.float64  # within a model
