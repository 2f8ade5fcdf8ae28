"""What the multi-teacher loss's kernels read and write: strides, neighbours, addresses, traffic."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from huge_tensors import untouched
from loss_cases import (
    DEVICE,
    GEOMETRIES,
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
    score,
    token_mask,
    total,
)
from torch import Tensor
from triton.runtime import interpreter

from fastagglo.kernels import loss as kernel
from fastagglo.ops import LossTerm, multi_teacher_loss, use_backend
from fastagglo.ops.backend import INTERPRETED
from fastagglo.ops.loss import Affine

# --- strides and neighbours


def surrounded(x: Tensor, channels: tuple[int, int] = (8, 8), fill: float = NAN) -> Tensor:
    """A view of x in memory that holds something else on all sides."""
    outer = [n + 2 for n in x.shape[:-1]] + [channels[0] + x.shape[-1] + channels[1]]
    memory = x.new_full(outer, fill)
    inner = tuple(slice(1, -1) for _ in x.shape[:-1])
    view = memory[(*inner, slice(channels[0], channels[0] + x.shape[-1]))]
    return view.copy_(x)


@pytest.mark.parametrize("margin", [(8, 8), (3, 2)], ids=["units_of_eight", "odd"])
@pytest.mark.parametrize("geometry", ["equal", "shift_each", "shift_and_resize", "prediction_down"])
def test_poisoned_neighbours_do_not_leak(
    geometry: str, margin: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of features, masks, normalisers and shifts; and nothing is copied to be read."""
    cases = []
    for i, kind in enumerate(("mse", "angular") if "resize" in geometry else KINDS[::2]):
        case = make_case(kind, geometry, 16, normaliser="each_scale", mask="grid", seed=i)
        term, valid = moved(case.term, DEVICE), case.valid.to(DEVICE)
        mean, scale = (surrounded(x, (8, 8)) for x in (term.normaliser.mean, term.normaliser.scale))
        shift = term.shift
        if isinstance(shift, Tensor):
            shift = surrounded(shift.double(), (0, 0))
        cases.append(
            Case(
                surrounded(case.x.to(DEVICE), margin),
                surrounded(case.t.to(DEVICE), margin),
                replace(term, normaliser=Affine(mean, scale), shift=shift),
                surrounded(valid, (1, 2), True),
            )
        )
    with monkeypatch.context() as patch:
        copies: list[Tensor] = []
        usual = Tensor.contiguous
        patch.setattr(Tensor, "contiguous", lambda x: copies.append(x) or usual(x))
        actual = run(cases)
        assert not any(x.dim() == 4 for x in copies)
    assert_right(cases, actual)


def test_other_strides() -> None:
    """As from a convolution, sliced, repeated, with channels apart (which are copied)."""
    wide = randn(2, 6, 8, 24).to(DEVICE)
    x = [
        randn(2, 24, 3, 4).to(DEVICE).permute(0, 2, 3, 1),
        wide[:, ::2, ::2],
        wide[:, 1:4, 2:6].transpose(1, 2).contiguous().transpose(1, 2),
        randn(2, 3, 4, 48).to(DEVICE)[..., ::2],
        randn(2, 1, 4, 24).to(DEVICE).expand(2, 3, 4, 24),
    ]
    targets = [*x[1:], x[0]]
    mask = token_mask(2, (4, 3)).mT.to(DEVICE)
    terms = [LossTerm(kind) for kind in KINDS]
    views = [Case(*parts, mask) for parts in zip(x, targets, terms, strict=True)]
    dense = [
        Case(case.x.contiguous(), case.t.contiguous(), case.term, mask.contiguous())
        for case in views
    ]
    assert_same(run(views, what=total), run(dense, what=total))
    assert_right(views)


@pytest.mark.parametrize("kind", ["smooth_l1", "cosine_smooth_l1"])
@pytest.mark.parametrize(("channels", "offset"), [(16, 1), (16, 4), (12, 0), (3, 3), (257, 5)])
def test_addresses_out_of_step(kind: str, channels: int, offset: int) -> None:
    """Where 16 bytes cannot be read at once; beside a term where they can."""
    even = make_case(kind, "equal", 16)
    odd = make_case(kind, "equal", channels, normaliser="each_scale", seed=1)
    for name in ("x", "t"):
        value = getattr(odd, name).to(DEVICE)
        memory = value.new_full((value.numel() + offset + 1,), NAN)
        view = memory[offset:-1].view(value.shape).copy_(value)
        assert kernel._aligned(term_of(replace(odd, **{name: view}))) == (
            channels % 8 == 0 and offset % 4 == 0
        )
        odd = replace(odd, **{name: view})
    assert_right([even, odd])


def term_of(case: Case, **options: Any) -> kernel.Term:
    """For the kernels themselves, without a normaliser or a mask."""
    x, t = case.x.to(DEVICE), case.t.to(DEVICE)
    x, t = (z if z.dim() == 4 else z[:, None, None] for z in (x, t))
    grids = x.shape[1:3], t.shape[1:3]
    grid = {"student": grids[0], "teacher": grids[1]}.get(case.term.resize, tuple(map(max, *grids)))
    shift = case.term.shift
    if shift is not None:
        shift = torch.as_tensor(shift, dtype=torch.float64, device=DEVICE).reshape(-1, 2)
    return kernel.Term(x, t, case.term.kind, *grid, shift=shift, **options)


# --- addresses


@pytest.mark.parametrize("geometry", ["equal", "prediction_up", "shift_part"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_beyond_2_31_elements(axis: int, geometry: str) -> None:
    """Of images, rows or columns, in features and masks."""
    torch.use_deterministic_algorithms(False)  # which would fill huge tensors with NaN
    case = make_case("cosine_smooth_l1", geometry, 16, mask="grid", dtype=torch.float16)
    far = []
    for value in (case.x, case.t, case.valid):
        value = value.to(DEVICE)
        stride = list(torch.empty(value.shape).stride())
        stride[axis] = 2**31 + 8
        size = sum((n - 1) * s for n, s in zip(value.shape, stride, strict=True)) + 1
        memory = untouched(size, dtype=value.dtype, device=DEVICE)
        far.append(memory.as_strided(value.shape, stride).copy_(value))
    assert_same(run([Case(far[0], far[1], case.term, far[2])]), run([case]))


# --- traffic


@dataclass
class Traffic:
    """Addresses that the interpreted kernels load and store."""

    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)

    @staticmethod
    def within(accesses: list[tuple[np.ndarray, int]], x: Tensor) -> Counter[int]:
        """How often each byte offset of a contiguous tensor is accessed."""
        found: Counter[int] = Counter()
        for addresses, size in accesses:
            offsets = addresses.astype(np.int64) - x.data_ptr()
            inside = offsets[(offsets >= 0) & (offsets < x.numel() * x.element_size())]
            assert not len(inside) or size == x.element_size()
            found.update(inside.tolist())
        return found


@contextlib.contextmanager
def recorded() -> Iterator[Traffic]:
    traffic = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        of = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        return of, pointers.get_element_ty().primitive_bitwidth // 8

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        traffic.loads.append(addresses(ptrs, mask))
        return load(self, ptrs, mask, *others)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        traffic.stores.append(addresses(ptrs, mask))
        return store(self, ptrs, value, mask, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", create_masked_load)
        patch.setattr(builder, "create_masked_store", create_masked_store)
        yield traffic


interpreted = pytest.mark.skipif(not INTERPRETED, reason="loads of a GPU cannot be listed")


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [24, 37, 300])
def test_each_element_moves_once(kind: str, channels: int) -> None:
    """6 bytes for an element in bf16: no loss needs to read anything twice."""
    case = make_case(kind, "equal", channels, dtype=torch.bfloat16)
    summary = make_case(kind, "", channels, images=3, dtype=torch.bfloat16, seed=1)
    terms = [term_of(case), term_of(summary)]
    with recorded() as found:
        gradients = kernel.forward(terms).gradients
    for term, gradient in zip(terms, gradients, strict=True):
        for accesses, x in (
            (found.loads, term.prediction),
            (found.loads, term.target),
            (found.stores, gradient),
        ):
            assert found.within(accesses, x) == dict.fromkeys(range(0, 2 * x.numel(), 2), 1)
        for accesses, x in (
            (found.stores, term.prediction),
            (found.stores, term.target),
            (found.loads, gradient),
        ):
            assert not found.within(accesses, x)
    assert kernel.traffic(terms) == 6 * sum(gradient.numel() for gradient in gradients)


@interpreted
@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [(name, torch.float32) for name in list(GEOMETRIES)[1:]]
    + [("prediction_up", torch.float16), ("prediction_down", torch.bfloat16)],
    ids=str,
)
def test_traffic_is_what_moves(geometry: str, dtype: torch.dtype) -> None:
    """Of resampled features; shifts leave out some."""
    case = make_case("mse", geometry, 12, dtype=dtype, target_dtype=torch.bfloat16)
    for wants_gradient in (True, False):
        term = term_of(case, wants_gradient=wants_gradient)
        with recorded() as found:
            gradients = kernel.forward([term]).gradients
        moves = [(found.loads, x) for x in (term.prediction, term.target)]
        moves += [(found.stores, x) for x in gradients]
        counted = sum(
            sum(found.within(accesses, x).values()) * x.element_size() for accesses, x in moves
        )
        if term.shift is None:
            assert counted == kernel.traffic([term])
        else:
            assert counted <= kernel.traffic([term])
            outside = kernel.traffic([replace(term, shift=term.shift * 0)]) - counted
            assert outside % 12 == 0


def test_nothing_is_computed_for_no_gradient() -> None:
    case = make_case("mse", "prediction_up", 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "spread_kernel", None)
        losses = kernel.forward([term_of(case, wants_gradient=False)])
    assert losses.gradients == []
    assert torch.equal(losses.per_term, kernel.forward([term_of(case)]).per_term)


# --- the backward


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that forwards compute."""
    found: list[Tensor] = []
    usual = kernel.kept_gradient
    monkeypatch.setattr(kernel, "kept_gradient", lambda x: found.append(usual(x)) or found[-1])
    return found


def two_terms(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Callable[[], Any]]:
    cases = [
        make_case("mse", "equal", 24, dtype=dtype, mask="grid", weight=0.7),
        make_case("cosine", "", 40, dtype=dtype, images=3, weight=torch.tensor(1.3)),
    ]
    leaves = [case.x.to(DEVICE).requires_grad_() for case in cases]

    def forward() -> Any:
        with use_backend("triton"):
            return multi_teacher_loss(
                leaves,
                [case.t.to(DEVICE) for case in cases],
                [case.term for case in cases],
                [moved(case.valid, DEVICE) for case in cases],
            )

    return leaves, forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_of_the_total_has_nothing_to_do(kept: list[Tensor], dtype: torch.dtype) -> None:
    """The gradient of the forward is the result, and no program writes it anew."""
    leaves, forward = two_terms(dtype)
    loss = forward()
    before = [gradient.clone() for gradient in kept]
    with recorded() if INTERPRETED else contextlib.nullcontext() as found:
        grads = torch.autograd.grad(loss.total, leaves)
    for grad, gradient, copy in zip(grads, kept, before, strict=True):
        assert grad.data_ptr() == gradient.data_ptr()
        assert torch.equal(grad.view_as(copy), copy)
        assert copy.any()
        if INTERPRETED:
            assert not found.within(found.stores, gradient)
            assert not found.within(found.loads, gradient)


def test_leaves_take_the_gradients_over(kept: list[Tensor]) -> None:
    """No copy for ``.grad``, either."""
    leaves, forward = two_terms()
    loss = forward()
    places = [gradient.data_ptr() for gradient in kept]
    kept.clear()  # another owner would keep autograd from it
    loss.total.backward()
    assert [leaf.grad.data_ptr() for leaf in leaves] == places


def test_another_factor_scales_in_place(kept: list[Tensor]) -> None:
    leaves, forward = two_terms()
    loss = forward()
    before = [gradient.clone() for gradient in kept]
    grads = torch.autograd.grad(1.5 * loss.total, leaves)
    for grad, gradient, copy in zip(grads, kept, before, strict=True):
        assert grad.data_ptr() == gradient.data_ptr()
        torch.testing.assert_close(grad.view_as(copy), 1.5 * copy, rtol=2e-7, atol=0)


def test_images_are_scaled_singly(kept: list[Tensor]) -> None:
    """And elements beyond a program's share of an image as the first."""
    x = randn(3, 5, 5, 2560).to(DEVICE).requires_grad_()
    with use_backend("triton"):
        loss = multi_teacher_loss([x], [randn(3, 5, 5, 2560, seed=1).to(DEVICE)], [LossTerm("mse")])
    (before,) = (gradient.clone() for gradient in kept)
    upstream = torch.tensor([0.0, 2.0, -1.0], device=DEVICE)
    (grad,) = torch.autograd.grad(loss.per_image[0], x, upstream)
    # Of the total, each image has a third.
    torch.testing.assert_close(grad, before * 3 * upstream[:, None, None, None], rtol=1e-6, atol=0)
    assert not grad[0].any()


def test_a_kept_graph_keeps_its_gradients(kept: list[Tensor]) -> None:
    leaves, forward = two_terms()
    loss = forward()
    before = [gradient.clone() for gradient in kept]
    first = torch.autograd.grad(loss.total, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss.total, leaves, retain_graph=True)
    last = torch.autograd.grad(2 * loss.total, leaves)
    for a, b, c, gradient, copy in zip(first, second, last, kept, before, strict=True):
        assert torch.equal(a.view_as(copy), copy)
        assert torch.equal(b.view_as(copy), 2 * copy)
        assert torch.equal(c, b)
        assert c.data_ptr() == gradient.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss.total, leaves)


def test_float16_is_kept_in_full(kept: list[Tensor]) -> None:
    leaves, forward = two_terms(torch.float16)
    loss = forward()
    grads = torch.autograd.grad(65536.0 * loss.total, leaves)
    for gradient, grad in zip(kept, grads, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(grad.view_as(gradient), (gradient * 65536).half())


def test_memory() -> None:
    """Nothing large but the gradients; nothing at all where there are none."""
    case = Case(randn(4, 9, 9, 64), randn(4, 12, 12, 64), LossTerm("mse"))
    sizes: list[int] = []
    usual = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = usual(*size, **options)
        if made.dtype.is_floating_point:
            sizes.append(made.numel())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        kernel.forward([term_of(case, wants_gradient=False)])
        assert max(sizes) <= 4 * 144
        patch.setattr(kernel, "spread_kernel", {(4 * 81,): lambda *a, **k: None})
        kernel.forward([term_of(case)])
    assert sorted(sizes)[-2:] == [3 * 4 * 144, case.x.numel()]


def test_two_runs_give_the_same_bits() -> None:
    cases = [
        make_case("cosine_smooth_l1", "shift_and_resize", 40, normaliser="each_scale"),
        make_case("angular", "", 300, images=3),
    ]
    assert_same(run(cases, what=score), run(cases, what=score))


@pytest.mark.parametrize("name", ["mean", "scale"])
def test_normalisers_of_any_stride(name: str) -> None:
    """Columns of a matrix, one mean for all channels, at odd addresses, in fp64."""
    plain = affine("each_scale", 16)
    value = getattr(plain, name).to(DEVICE)
    matrix = value.new_full((16, 3), NAN)
    memory = value.new_full((18,), NAN)
    views = [matrix[:, 1].copy_(value), memory[1:-1].copy_(value), value.double()]
    cases = [
        make_case("mse", "equal", 16, normaliser="none", seed=i) for i in range(len(views) + 1)
    ]
    for case, view in zip(cases, [*views, value[3]], strict=True):
        pair = {"mean": plain.mean.to(DEVICE), "scale": plain.scale.to(DEVICE), name: view}
        case.term = replace(case.term, normaliser=Affine(**pair))
    assert_right(cases)
