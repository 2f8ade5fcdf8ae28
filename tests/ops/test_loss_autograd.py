"""What the loss keeps for its backward, who gets gradients, torch.library and torch.compile."""

from __future__ import annotations

import pytest
import torch

from fastagglo.ops import loss_torch
from fastagglo.ops.loss import Affine, LossTerm, multi_teacher_loss


def normaliser(channels, dtype=torch.float64, rotation=False):
    turn = torch.linalg.qr(torch.randn(channels, channels, dtype=dtype)).Q if rotation else None
    return Affine(torch.randn(channels, dtype=dtype), torch.tensor(1.3, dtype=dtype), turn)


def features(images, grid, channels, dtype=torch.float64, grad=False):
    return torch.randn(images, *grid, channels, dtype=dtype).requires_grad_(grad)


def test_target_gets_no_gradient():
    x, t = features(2, (), 3, grad=True), features(2, (), 3, grad=True)
    affine = Affine(
        features(3, (), 1)[:, 0].requires_grad_(), torch.tensor(2.0, requires_grad=True)
    )
    denominator = torch.tensor(3.0, requires_grad=True)
    term = LossTerm("mse", normaliser=affine, denominator=denominator)
    multi_teacher_loss([x], [t], [term]).total.backward()
    assert x.grad is not None
    assert (t.grad, affine.mean.grad, affine.scale.grad, denominator.grad) == (None,) * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_twice(dtype):
    """The kept gradient is scaled in place only when the graph is not kept."""
    x = features(3, (4, 4), 8, dtype, grad=True)
    loss = multi_teacher_loss([x], [features(3, (4, 4), 8)], [LossTerm("mse")])
    first = torch.autograd.grad(loss.total, x, retain_graph=True)[0]
    copy = first.clone()
    second = torch.autograd.grad(loss.total * 2, x, retain_graph=True)[0]
    last = torch.autograd.grad(loss.total * 2, x)[0]
    assert torch.equal(first, copy)
    assert torch.equal(second, 2 * first)
    assert torch.equal(last, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss.total, x)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "angular"])
def test_total_is_not_scaled_again(kind, monkeypatch):
    """The kept gradient has all factors of the total in it, to the bit; other sums scale it."""
    x, t = features(3, (4, 5), 8, torch.float32, grad=True), features(3, (6, 4), 8)
    mask = torch.rand(3, 6, 4) < 0.8
    mask[1] = False
    calls = []
    scale = loss_torch._scale_gradient
    monkeypatch.setattr(
        loss_torch, "_scale_gradient", lambda *given: calls.append(given) or scale(*given)
    )
    for weight in (0.37, torch.tensor(0.37, requires_grad=True)):
        for denominator in (None, 7.3, torch.tensor(7.3)):
            term = LossTerm(kind, weight, dispersion=0.694, denominator=denominator)
            multi_teacher_loss([x], [t], [term], [mask]).total.backward()
    assert not calls
    multi_teacher_loss([x], [t], [term], [mask]).per_term.sum().backward()
    assert len(calls) == 1


def test_weight_of_zero():
    """The total does not see the term, yet its losses have gradients."""
    x, t = features(2, (3, 3), 4, grad=True), features(2, (3, 3), 4)
    want = torch.autograd.grad(multi_teacher_loss([x], [t], [LossTerm("mse")]).total, x)[0]
    for weight in (0.0, torch.tensor(0.0)):
        loss = multi_teacher_loss([x], [t], [LossTerm("mse", weight)])
        total, per_term, per_image = (
            torch.autograd.grad(score, x, retain_graph=True)[0]
            for score in (loss.total, loss.per_term.sum(), loss.per_image[0].mean())
        )
        assert not total.any()
        torch.testing.assert_close(per_term, want)
        torch.testing.assert_close(per_image, want)


def test_one_prediction_in_two_terms_accumulates():
    x, t = features(2, (2, 2), 3, grad=True), features(2, (2, 2), 3)
    loss = multi_teacher_loss([x, x], [t, t], [LossTerm("mse"), LossTerm("mse", 2.0)])
    loss.total.backward()
    alone = multi_teacher_loss([x], [t], [LossTerm("mse")]).total
    torch.testing.assert_close(x.grad, 3 * torch.autograd.grad(alone, x)[0])


def test_what_is_kept_for_the_backward():
    kept = []
    x, t = features(4, (9, 9), 32, torch.float32, grad=True), torch.randn(4, 12, 12, 32)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        multi_teacher_loss([x], [t], [LossTerm("mse", normaliser=normaliser(32))])
    sizes = sorted(k.numel() for k in kept)
    assert sizes[-1] == x.numel()
    assert sum(sizes[:-1]) < 50


def test_weights_learn():
    x, t = features(2, (), 3, grad=True), features(2, (), 3)
    for shape, dtype in (((), torch.float64), ((1,), torch.float32), ((), torch.bfloat16)):
        weight = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
        loss = multi_teacher_loss([x, x], [t, t], [LossTerm("mse", weight), LossTerm("cosine")])
        assert loss.total.shape == ()
        got = torch.autograd.grad(loss.total, weight)[0]
        assert got.item() == pytest.approx(loss.per_term[0].item(), rel=torch.finfo(dtype).eps)


def test_bit_equal_runs():
    x, t = torch.randn(3, 7, 5, 40, requires_grad=True), torch.randn(3, 9, 9, 40)
    runs = []
    for _ in range(2):
        total = multi_teacher_loss([x], [t], [LossTerm("cosine_smooth_l1", shift=(0.3, 0))]).total
        runs.append((total, torch.autograd.grad(total, x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def op_arguments(kind, dtype, with_gradient, geometry):
    ours, theirs, grid = geometry
    full = {"cells": None, "mean": None, "scale": None, "rotation": None, "shift": None}
    if theirs != ours:
        full["cells"] = torch.rand(2, *grid) < 0.8
        full["mean"], full["scale"] = torch.randn(5), torch.tensor(2.0)
        full["rotation"], full["shift"] = torch.randn(5, 5), torch.ones(2, 2).double()
    tensors = (features(2, ours, 5, dtype), features(2, theirs, 5, dtype))
    count, factor = torch.tensor([12.0, 3]), torch.rand(2)
    return (*tensors, *full.values(), count, factor, kind, 1.0, *grid, with_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(dtype, with_gradient):
    for kind, geometry in (("mse", ((3, 4),) * 3), ("cosine", ((3, 4), (5, 2), (5, 4)))):
        arguments = op_arguments(kind, dtype, with_gradient, geometry)
        torch.library.opcheck(torch.ops.fastagglo.term_loss.default, arguments)
    kept = (features(2, (3, 4), 5, dtype), torch.randn(2), dtype)
    torch.library.opcheck(torch.ops.fastagglo.term_loss_backward.default, kept)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def run(x, summary, t, mask, shift, weight):
        terms = [
            LossTerm("mse", weight, Affine(t[0, 0, 0], t[0, 0, 0, 0].exp()), shift=shift),
            LossTerm("angular", 0.3, dispersion=0.7),
            LossTerm("cosine_smooth_l1", resize="student", shift=(0.5, 0)),
        ]
        targets = [t, summary.detach() + 1, t]
        loss = multi_teacher_loss([x, summary, x], targets, terms, [mask, None, mask])
        return loss.total, loss.per_term, loss.per_image

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for images, side in ((2, 3), (3, 5)):
        x, summary = features(images, (side, 4), 6, grad=True), features(images, (), 8, grad=True)
        t, weight = features(images, (4, side), 6), torch.tensor(0.7, requires_grad=True)
        others = (t, torch.rand(images, 4, side) < 0.8, torch.rand(images, 2), weight)
        leaves, results = (x, summary, weight), []
        for function in (run, compiled):
            total, per_term, per_image = function(x, summary, *others)
            score = total * 2 + per_term[0] + sum(p.square().sum() for p in per_image)
            results.append((total, per_term, *torch.autograd.grad(score, leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
