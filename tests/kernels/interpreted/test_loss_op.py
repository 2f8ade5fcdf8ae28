"""The multi-teacher loss on the backend "triton": edges of its domain, and the rest of PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    DEVICE,
    KINDS,
    NAN,
    Case,
    affine,
    assert_right,
    assert_same,
    make_case,
    moved,
    randn,
    run,
    token_mask,
    total,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastagglo.kernels import loss as kernel
from fastagglo.ops import LossTerm, loss_torch, multi_teacher_loss, use_backend
from fastagglo.ops.loss import term_image_weights


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loss_torch, "_term_loss", None)  # no other backend may do the work
    with use_backend("triton"):
        yield


def on_device(*values: Any) -> list[Any]:
    return [moved(value, DEVICE) for value in values]


# --- NaN, zero, one, huge


@pytest.mark.parametrize("geometry", ["equal", "target_down", "prediction_down", "shift_each"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_nan_does_not_leak(kind: str, geometry: str) -> None:
    """In targets, infinities too, and in predictions where nothing but masked tokens is."""
    cases = [
        make_case(kind, geometry, mask="grid", normaliser=normaliser, images=3, seed=i)
        for i, normaliser in enumerate(("none", "each_scale")[: 1 if "pred" in geometry else 2])
    ]
    for case in cases:
        case.t[~case.valid] = torch.tensor([NAN, math.inf, -math.inf]).repeat(4)
        if geometry == "equal":
            case.x[~case.valid] = NAN
        case.x[1] = NAN  # of three images, the one without a valid token
    results = assert_right(cases)
    for case, grad in zip(cases, results.grads, strict=True):
        assert not grad[1].any()
        if geometry == "equal":
            assert not grad.cpu()[~case.valid].any()


@pytest.mark.parametrize("geometry", ["", "equal", "prediction_up", "shift_away"])
def test_nothing_valid(geometry: str) -> None:
    cases = [make_case(kind, geometry, images=2) for kind in KINDS]
    for case in cases:
        case.x.fill_(NAN)
        case.t.fill_(NAN)
        if geometry != "shift_away":
            case.valid = torch.zeros(2)
    for results in (run(cases), run(cases, what=total)):
        for name, value in results.tensors().items():
            assert not value.any(), name


def test_nan_that_counts_reaches_the_total() -> None:
    """Of either side, whatever the other holds; terms without it are as they were."""
    for kind, side, other in itertools.product(KINDS, "xt", (0.0, 1.0)):
        case = make_case(kind, "", 12)
        getattr(case, side)[0, 3] = NAN
        getattr(case, "t" if side == "x" else "x")[0] = other
        clean = make_case("mse", "equal", seed=1)
        results = run([case, clean], what=total)
        assert results.total.isnan(), (kind, side, other)
        assert results.per_image[0][0].isnan()
        assert results.per_image[0][1].isfinite()
        assert torch.equal(results.per_term[1:], run([clean]).per_term)
    resized = make_case("mse", "prediction_up")
    resized.x[0, 0, 0, 0] = NAN
    results = run([resized], what=total)
    assert results.total.isnan()
    assert results.grads[0][0, 0, 0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vectors_without_direction(dtype: torch.dtype) -> None:
    """cos is 0 and so is its gradient; of smooth L1 there is one."""
    wanted = {"cosine": 1.0, "cosine_smooth_l1": 0.9 + 0.1 / 2, "angular": math.pi**2 / 4}
    for a, b in ((0.0, 1.0), (1.0, 0.0), (1e-9, 1.0)):
        cases = [
            Case(torch.full((1, 4), a).to(dtype), torch.full((1, 4), b), LossTerm(kind, beta=1.0))
            for kind in wanted
        ]
        results = run(cases, what=total)
        assert results.per_term.tolist() == pytest.approx(list(wanted.values()), rel=1e-6)
        for case, grad in zip(cases, results.grads, strict=True):
            slope = 0.1 * (a - b) / 4 if case.term.kind == "cosine_smooth_l1" else 0.0
            assert grad[0].tolist() == pytest.approx([slope] * 4, rel=1e-3)
    both = [Case(torch.zeros(2, 4), torch.zeros(2, 4), LossTerm(kind)) for kind in wanted]
    assert_right(both)


@pytest.mark.parametrize("sign", [1, -1])
def test_angle_at_its_limits(sign: int) -> None:
    """No gradient beyond them, but just within."""
    x = randn(5, 16)
    for function, beyond in (
        (lambda t: 2.5 * t, True),
        (lambda t: t + 0.01 * randn(16, seed=9), False),
    ):
        case = Case(x, sign * function(x), LossTerm("angular"))
        results = run([case], what=total)
        if beyond:
            edge = math.acos(sign * (1 - 1e-6)) ** 2
            # arccos near -1 is as ill-conditioned as its argument: 1e-6 / theta' of fp32.
            assert results.total.item() == pytest.approx(edge, rel=0.05)
            assert not results.grads[0].any()
        else:
            assert results.grads[0].any(1).all()
            assert_right([case])
    cosine = run([Case(x, 2.5 * sign * x, LossTerm("cosine"))], what=total)
    assert cosine.total.item() == pytest.approx(1 - sign, abs=1e-6)
    assert cosine.grads[0].abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_range(kind: str) -> None:
    """Norms, squares and differences beyond 65504; with loss scaling, gradients below 6e-8."""
    big = torch.full((2, 512), 6e4, dtype=torch.float16)
    big[..., ::2] *= -1
    # Not of one direction, where a gradient would be what rounding leaves of a difference.
    case = Case(big, -big.float() + 100 * torch.arange(512), LossTerm(kind))
    for scale in (1.0,) if kind == "mse" else (1.0, 2.0**15):
        results = assert_right([case], what=lambda loss, scale=scale: scale * loss.total)
        assert (results.grads[0] != 0).any() or scale == 1


def test_l1() -> None:
    """beta = 0; a difference of 0 has no slope."""
    case = make_case("smooth_l1", "equal", beta=0)
    case.x[0, 0, 0, :3] = case.t[0, 0, 0, :3]
    results = assert_right([case, replace(case, term=LossTerm("cosine_smooth_l1", beta=0))])
    assert not results.grads[0][0, 0, 0, :3].any()


def test_cells_on_the_edge_of_a_target_count() -> None:
    """Half a cell beyond its outermost centres, at both of its ends, but for rounding."""
    cases = [
        Case(
            randn(1, ours, 1, 1),
            randn(1, source, 1, 1),
            LossTerm("mse", shift=(sign * (0.5 + off) * ours / max(ours, source), 0)),
            learns=False,
        )
        for ours, source in ((5, 5), (70, 70), (3, 97), (33, 2))
        for sign in (1, -1)
        for off in (1e-7 / source, 1e-4)
    ]
    results = run(cases)
    for case, weights in zip(cases, results.image_weights, strict=True):
        wanted = term_image_weights(case.x.shape, case.t.shape, case.term)
        assert torch.equal(weights.cpu(), wanted)
    counts = [round(weights.item() ** 2) for weights in results.image_weights]
    assert counts == [n - off for n in (5, 70, 97, 33) for _ in "+-" for off in (0, 1)]


# --- numbers, on the host, the CPU and the device


def test_weights_denominators_and_dispersions() -> None:
    """As numbers, as tensors on the CPU and on the device, and of any dtype: the same bits."""
    fields = {"weight": 0.75, "denominator": 3.5, "dispersion": 0.25}
    mask = token_mask(3, (2, 3)).to(DEVICE)
    x, t = on_device(randn(3, 2, 3, 8), randn(3, 2, 3, 8, seed=1))
    results = []
    for make in (
        float,
        torch.tensor,
        lambda v: torch.tensor([v], dtype=torch.float64),
        lambda v: torch.tensor(v, device=DEVICE),
        lambda v: torch.tensor([[v]], device=DEVICE, dtype=torch.bfloat16),
    ):
        term = LossTerm("angular", **{name: make(value) for name, value in fields.items()})
        leaf = x.clone().requires_grad_()
        loss = multi_teacher_loss([leaf], [t], [term], [mask])
        score = loss.total + loss.per_image[0].sum()
        results.append((loss.total, loss.per_term, *torch.autograd.grad(score, leaf)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
    assert_right([Case(x, t, LossTerm("angular", **fields), mask)])


def test_denominator_zero() -> None:
    """Says that nothing is valid anywhere: nothing is divided by it."""
    for zero in (0, torch.tensor(0.0, device=DEVICE)):
        case = make_case("mse", "equal", denominator=zero)
        case.valid = torch.zeros(2)
        assert not run([case]).per_term.any()


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_weight_zero(kind: str) -> None:
    """The total does not see the term; a gradient that comes by another way is the term's own."""
    off = [make_case(kind, "equal", weight=w) for w in (0, torch.tensor(0.0, device=DEVICE))]
    other = make_case("mse", "", seed=1)
    plain = run([make_case(kind, "equal")], what=total)
    results = run([*off, other], what=total)
    assert torch.equal(results.total, results.per_term[2])
    assert not results.grads[0].any()
    assert not results.grads[1].any()
    direct = run([*off, other], what=lambda loss: loss.per_term[:2].sum())
    for grad in direct.grads[:2]:
        torch.testing.assert_close(grad, plain.grads[0], rtol=1e-6, atol=0)
    assert not direct.grads[2].any()
    assert_right([*off, other])


def test_weights_learn() -> None:
    x, t = on_device(randn(2, 3), randn(2, 3, seed=1))
    x.requires_grad_()
    for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.bfloat16)):
        weight = torch.full((1,), 0.5, dtype=dtype, device=device, requires_grad=True)
        loss = multi_teacher_loss([x, x], [t, t], [LossTerm("mse", weight), LossTerm("cosine")])
        got, of_x = torch.autograd.grad(loss.total, (weight, x))
        assert got.item() == pytest.approx(loss.per_term[0].item(), rel=torch.finfo(dtype).eps)
        want = run(
            [Case(x.detach(), t, LossTerm("mse", 0.5)), Case(x.detach(), t, LossTerm("cosine"))],
            what=total,
        )
        torch.testing.assert_close(of_x, want.grads[0] + want.grads[1])


# --- who gets gradients


@pytest.mark.parametrize("learns", list(itertools.product([False, True], repeat=3)), ids=str)
def test_some_predictions_learn(learns: tuple[bool, ...]) -> None:
    geometries = ("equal", "prediction_up", "")
    cases = [
        replace(make_case(kind, geometry, seed=i), learns=learn)
        for i, (kind, geometry, learn) in enumerate(zip(KINDS, geometries, learns, strict=False))
    ]
    results = assert_right(cases)
    assert [x is not None for x in results.grads] == list(learns)


def test_targets_and_constants_get_none() -> None:
    x, t = (z.requires_grad_() for z in on_device(randn(2, 4), randn(2, 4, seed=1)))
    normaliser = moved(affine("each_scale", 4), DEVICE)
    constants = [normaliser.mean, normaliser.scale, torch.tensor(3.0), torch.tensor(0.5)]
    for constant in constants:
        constant.requires_grad_()
    term = LossTerm(
        "angular", normaliser=normaliser, denominator=constants[2], dispersion=constants[3]
    )
    loss = multi_teacher_loss([x], [t], [term])
    loss.total.backward()
    assert x.grad is not None
    assert [z.grad for z in (t, *constants)] == [None] * 5
    assert not loss.image_weights[0].requires_grad


def test_no_grad_and_inference_mode() -> None:
    x, t = on_device(randn(2, 3, 3, 8), randn(2, 3, 3, 8, seed=1))
    x.requires_grad_()
    expected = multi_teacher_loss([x], [t], [LossTerm("cosine")])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = multi_teacher_loss([x], [t], [LossTerm("cosine")])
        assert not loss.total.requires_grad
        assert torch.equal(loss.per_term, expected.per_term)
        assert torch.equal(loss.total, expected.total)


def test_one_prediction_in_two_terms() -> None:
    x, t = on_device(randn(2, 2, 2, 3), randn(2, 2, 2, 3, seed=1))
    x.requires_grad_()
    loss = multi_teacher_loss([x, x], [t, t], [LossTerm("mse"), LossTerm("mse", 2.0)])
    loss.total.backward()
    alone = run([Case(x.detach(), t, LossTerm("mse"))], what=total)
    torch.testing.assert_close(x.grad, 3 * alone.grads[0])


def test_upstream_gradients_one_by_one() -> None:
    """Of the total, of a term, of an image: each alone is the twin's."""
    cases = [
        make_case("mse", "equal", weight=0.5, images=3, mask="grid"),
        make_case("angular", "shift_each", weight=2.0, dispersion=0.3),
    ]
    for what in (
        lambda loss: -2.5 * loss.total,
        lambda loss: 3 * loss.per_term[1],
        lambda loss: loss.per_image[0][2] * 5,
        lambda loss: loss.per_image[1].square().sum(),
    ):
        assert_right(cases, what=what)


def test_second_derivatives_are_refused() -> None:
    x = randn(2, 3).to(DEVICE).requires_grad_()
    loss = multi_teacher_loss([x], [torch.zeros_like(x)], [LossTerm("mse")])
    factor = torch.ones((), device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(factor * loss.total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_float64_and_wide_features_are_pytorchs() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"multi_teacher_loss: .*float64.*'torch'"):
        multi_teacher_loss([x], [x], [LossTerm("mse")])
    wide = torch.zeros(1, kernel.MOST_CHANNELS + 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"8193 channels, more than 8192"):
        multi_teacher_loss([wide], [wide], [LossTerm("mse")])
    tokens = torch.empty(2**21, 1, 1, 1, device="meta")
    assert "tokens" in kernel.unable(tokens, tokens, 2**10)
    many = torch.empty(2**21, 32, 32, 1, device="meta")  # compared on a smaller grid
    assert "tokens" in kernel.unable(many, tokens, 1)
    assert kernel.unable(tokens, tokens, 2**10 - 1) is None


# --- the company of the rest of PyTorch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    cases = [
        make_case("cosine", "equal", 8, normaliser="rotation"),
        make_case("mse", "", 8, dtype=dtype, normaliser="one_scale"),
    ]
    plain = run(cases)
    with torch.autocast(DEVICE, dtype=dtype):
        cast = run(cases)
    assert cast.total.dtype == torch.float32
    assert_same(cast, plain)


def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
    """Of the operator: a plain term, one with all there is, one that gets no gradient."""
    x = [randn(2, 3, 2, 5), randn(2, 2, 1, 8), randn(3, 1, 1, 4)]
    t = [randn(2, 3, 2, 5, seed=1), randn(2, 2, 2, 8, seed=1), randn(3, 1, 1, 4, seed=1)]
    x, t = ([z.to(DEVICE, dtype) for z in part] for part in (x, t))
    mean, scale = on_device(randn(8), torch.tensor(2.0))
    lists = (
        x,
        t,
        [None, token_mask(2, (2, 2)).to(DEVICE), None],
        [None, mean, None],
        [None, scale, None],
        [None, torch.full((2, 2), 0.25, dtype=torch.float64, device=DEVICE), None],
        [None, torch.tensor(0.5, device=DEVICE), None],
        [None, torch.tensor(3.0), None],
        [None, None, None],
    )
    numbers = [2.0, 1.0, -1.0, 1.0] * 3
    return *lists, [0, 4, 2], numbers, [3, 2, 2, 2, 1, 1], [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """The schema, and that shapes, dtypes and strides are as the fake kernels tell a compiler."""
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, and NaN is not NaN
    ops = torch.ops.fastagglo
    torch.library.opcheck(ops.multi_teacher_loss_fwd.default, arguments(dtype))
    per_term, per_image, _, shares, weights, kept = ops.multi_teacher_loss_fwd(*arguments(dtype))
    narrow = [dtype == torch.float16] * 2
    backward = (kept, [0, 1], [2, 2, 3], narrow, per_term, per_image, shares, weights)
    torch.library.opcheck(ops.multi_teacher_loss_bwd.default, backward)


def test_one_compiled_graph_serves_every_grid() -> None:
    torch._dynamo.reset()

    def function(x: Tensor, summary: Tensor, t: Tensor, mask: Tensor, weight: Tensor) -> Any:
        terms = [
            LossTerm("mse", weight, shift=(0.5, 0.0)),
            LossTerm("angular", 0.3, dispersion=0.7),
            LossTerm("cosine_smooth_l1", resize="student"),
        ]
        targets = [t, summary.detach() + 1, t]
        loss = multi_teacher_loss([x, summary, x], targets, terms, [mask, None, None])
        return loss.total, loss.per_term, loss.per_image

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for images, side in ((2, 3), (3, 2), (3, 4)):  # the second makes sizes symbols
        x, summary = randn(images, side, side, 6), randn(images, 8)
        weight = torch.tensor(0.7)
        leaves = [z.to(DEVICE).requires_grad_() for z in (x, summary, weight)]
        others = on_device(
            randn(images, side, side, 6, seed=1), token_mask(images, (side, side)).float()
        )
        results = []
        for call in (compiled, function):
            loss, per_term, per_image = call(*leaves[:2], *others, leaves[2])
            score = loss * 2 + per_term[0] + sum(p.square().sum() for p in per_image)
            results.append((loss, per_term, *torch.autograd.grad(score, leaves)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 2


# --- on a GPU alone

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


def gpu_step() -> Any:
    cases = [
        make_case("mse", "equal", 64, dtype=torch.bfloat16, normaliser="one_scale", mask="grid"),
        make_case("cosine_smooth_l1", "prediction_up", 24, dtype=torch.bfloat16),
        make_case("angular", "", 24, images=3),
    ]
    x = [case.x.cuda().requires_grad_() for case in cases]
    t, terms, masks = (
        [moved(getattr(case, name), "cuda") for case in cases] for name in ("t", "term", "valid")
    )

    def step() -> tuple[Tensor, ...]:
        loss = multi_teacher_loss(x, t, terms, masks)
        return loss.total, loss.per_term, *torch.autograd.grad(1.5 * loss.total, x)

    return t, step


@pytest.mark.gpu
@on_a_gpu
def test_a_call_never_waits_for_the_device() -> None:
    _, step = gpu_step()
    step()  # compiles
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = step()  # a wait would raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert results[0].isfinite()


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph() -> None:
    torch.use_deterministic_algorithms(False)
    targets, step = gpu_step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        for target in targets:
            target.copy_(randn(*target.shape, seed=seed))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)
