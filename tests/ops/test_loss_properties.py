"""The multi-teacher loss at the edges of its domain, one property a test, op and twin alike."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastagglo.ops.loss import KINDS, Affine, LossTerm, multi_teacher_loss
from fastagglo.ops.reference import loss as reference

TWINS = {"op": multi_teacher_loss, "twin": reference.multi_teacher_loss}
COSINES = ("cosine", "cosine_smooth_l1", "angular")


@pytest.fixture(params=TWINS)
def function(request: pytest.FixtureRequest):
    return TWINS[request.param]


def of_one_token(kind: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The loss of one token from PyTorch's own losses, without the clamps of the op."""
    cosine = F.cosine_similarity(x, t, dim=-1)
    smooth = F.smooth_l1_loss(x, t, beta=2.0)
    return {
        "mse": F.mse_loss(x, t),
        "cosine": 1 - cosine,
        "smooth_l1": smooth,
        "cosine_smooth_l1": 0.9 * (1 - cosine) + 0.1 * smooth,
        "angular": cosine.acos().square(),
    }[kind]


@pytest.mark.parametrize("channels", [1, 5, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_one_valid_token(function, kind, channels):
    """The image's loss is that token's, its weight one, and nothing else moves."""
    x = torch.randn(2, 3, 4, channels, dtype=torch.float64)
    t = torch.randn(2, 3, 4, channels, dtype=torch.float64)
    if channels == 1:  # the cosine of two numbers is a sign: no slope, and a limit of the angle
        x, t = x.abs(), -t.abs()
    x.requires_grad_()
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2, 1] = True
    t[~mask] = math.inf
    loss = function([x], [t], [LossTerm(kind)], [mask])
    wanted = of_one_token(kind, x[1, 2, 1], t[1, 2, 1])
    rtol = 1e-3 if (kind, channels) == ("angular", 1) else 1e-12  # acos(-1 + 1e-6) = pi - 0.0014
    torch.testing.assert_close(loss.total, wanted, rtol=rtol, atol=0)
    assert loss.per_image[0].tolist() == [0, loss.total.item()]
    assert loss.image_weights[0].tolist() == [0, 1]
    (gradient,) = torch.autograd.grad(loss.total, x)
    assert (gradient[~mask] == 0).all()
    if not (kind in ("cosine", "angular") and channels == 1):
        (slope,) = torch.autograd.grad(wanted, x)
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)
        assert (gradient[mask] != 0).all()
    else:
        assert gradient[mask].abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_images_without_a_valid_token(function, kind, dtype):
    """Zero loss and zero gradient, whatever target and prediction hold there."""
    affine = Affine(torch.randn(6), torch.tensor(0.5), torch.linalg.qr(torch.randn(6, 6)).Q)
    cases = {"equal": (3, 3), "up": (5, 4), "down": (2, 2)}
    for grid, dirty, shift in itertools.product(cases.values(), (math.nan, math.inf), (None, 0.5)):
        x, t = torch.randn(3, 3, 3, 6).to(dtype), torch.randn(3, *grid, 6).to(dtype)
        x[1], t[1], t[2] = dirty, dirty, dirty
        x.requires_grad_()
        shift = None if shift is None else (shift, -shift)
        for resize in ("larger", "student", "teacher"):
            term = LossTerm(kind, normaliser=affine, shift=shift, resize=resize)
            loss = function([x], [t], [term], [torch.tensor([True, False, False])])
            assert loss.total > 0
            assert loss.total.isfinite()
            assert loss.per_image[0][1:].tolist() == [0, 0]
            (gradient,) = torch.autograd.grad(loss.total, x)
            assert gradient.isfinite().all()
            assert (gradient[1:] == 0).all()
            assert (gradient[0] != 0).any()
            nothing = function([x], [t], [term], [torch.zeros(3)])
            assert nothing.total == 0
            assert (torch.autograd.grad(nothing.total, x)[0] == 0).all()


@pytest.mark.parametrize("resize", ["larger", "student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_odd_widths(function, kind, resize):
    """C = 1, whose cosine is a sign, and C of no multiple, with a mask, a shift and a rotation."""
    for channels in (1, 13):
        x = torch.randn(2, 2, 3, channels, dtype=torch.float64)
        t = torch.randn(2, 3, 2, channels, dtype=torch.float64)
        if channels == 1:  # keep away from zero, where the sign jumps
            x, t = x.abs() + 0.5, t.abs() + 0.5
        turn = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        affine = Affine(torch.zeros(channels), torch.tensor(0.7), turn)
        term = LossTerm(kind, normaliser=affine, resize=resize, shift=(0.25, -0.5))
        mask = [torch.tensor([[[1, 1], [1, 1], [1, 0]], [[1, 1], [0, 1], [1, 1]]])]
        assert torch.autograd.gradcheck(
            lambda x, t=t, term=term, mask=mask: function([x], [t], [term], mask)[:2],
            (x.requires_grad_(),),
            fast_mode=channels > 1,
        )


@pytest.mark.parametrize("channels", [1, 63, 65, 1000, 4095, 4096, 4097])
@pytest.mark.parametrize("kind", KINDS)
def test_any_width_fp32(kind, channels):
    x = torch.randn(2, 3, 2, channels, requires_grad=True)
    t = torch.randn(2, 2, 3, channels)
    results = []
    for run in TWINS.values():
        loss = run([x], [t], [LossTerm(kind)])
        results.append((loss.total, torch.autograd.grad(loss.total, x)[0]))
    (total, gradient), (other, expected) = results
    # A row of C terms of one size, added in some order: sqrt(C) ulp at most, here.
    torch.testing.assert_close(total, other, rtol=2e-6, atol=1e-7)
    largest = expected.abs().max().item()
    # The slope of a cosine of two numbers is nothing but rounding: eps / |x| / tokens.
    atol = 1e-6 if channels == 1 else 1e-5 * largest
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("value", [6e4, -6e4, 65504])
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_values_whose_squares_overflow(function, kind, value):
    """Both sides in fp16, apart by up to 131,008, with an affine of PHI-S and with a resize."""
    x = torch.full((2, 2, 2, 48), value, dtype=torch.float16)
    x[..., ::3] *= -1
    t = x.roll(1, -1).flip(0)
    x.requires_grad_()
    affine = Affine(torch.full((48,), 5e4), torch.tensor(3e4))
    for target, normaliser in itertools.product((t, t.repeat(1, 2, 1, 1)), (None, affine)):
        loss = function([x], [target], [LossTerm(kind, normaliser=normaliser)])
        assert loss.total.isfinite()
        assert loss.total > 0
        truth = function([x.double()], [target.double()], [LossTerm(kind, normaliser=normaliser)])
        torch.testing.assert_close(loss.total.double(), truth.total, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(loss.total, x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", COSINES)
def test_vectors_without_direction_on_both_sides(function, kind):
    wanted = {"cosine": 1.0, "cosine_smooth_l1": 0.9, "angular": math.pi**2 / 4}[kind]
    for length in (0.0, 1e-9, 1e-30):
        direction = F.normalize(torch.randn(3, 2, 2, 8), dim=-1)
        x = (length * direction).requires_grad_()
        loss = function([x], [length * direction], [LossTerm(kind)])
        assert loss.total.item() == pytest.approx(wanted, rel=1e-6)
        assert (torch.autograd.grad(loss.total, x)[0] == 0).all()


@pytest.mark.parametrize("kind", COSINES)
def test_a_vector_without_direction_among_others(function, kind):
    """Only its own loss and gradient are special."""
    x, t = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    x[0, 0, 1] = 0
    x.requires_grad_()
    loss = function([x], [t], [LossTerm(kind)])
    mask = torch.ones(1, 2, 2)
    mask[0, 0, 1] = 0
    others = function([x], [t], [LossTerm(kind)], [mask])
    alone = function([x], [t], [LossTerm(kind)], [1 - mask])
    torch.testing.assert_close(4 * loss.total, 3 * others.total + alone.total)
    got, want, special = (
        torch.autograd.grad(total, x)[0]
        for total in (4 * loss.total, 3 * others.total, alone.total)
    )
    torch.testing.assert_close(got, want + special, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_cosines_of_exactly_one(function, sign, dtype):
    """Along an axis the cosine is +-1 to the bit, where the slope of arccos has no bound."""
    x = torch.zeros(4, 8, dtype=dtype)
    x[range(4), [0, 3, 5, 7]] = torch.tensor([1.0, 0.5, 2.0, 4.0], dtype=dtype)
    t = 2 * sign * x
    x.requires_grad_()
    loss = function([x], [t], [LossTerm("angular", dispersion=0.5)])
    edge = math.acos(sign * (1 - 1e-6)) ** 2 / 0.5
    # 1 - 1e-6 in fp32 is off by up to 3e-8, and arccos doubles what that is relative to 1e-6.
    assert loss.total.item() == pytest.approx(edge, rel=0.05 if dtype != torch.float64 else 1e-9)
    assert (torch.autograd.grad(loss.total, x)[0] == 0).all()
    loss = function([x], [t], [LossTerm("cosine")])
    assert loss.total.item() == 1 - sign
    assert (torch.autograd.grad(loss.total, x)[0] == 0).all()
    # 5e-9 from there the slope without the clamp is -2 theta / sin theta times t's own.
    near = t.detach() * sign
    near[:, 1] = 1e-4 * near.float().norm(dim=1)
    near.requires_grad_()
    loss = function([near], [t], [LossTerm("angular")])
    assert (torch.autograd.grad(loss.total, near)[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_see_a_rotation(function, kind):
    """The mathematics that folding rests on."""
    x = torch.randn(2, 3, 3, 16, dtype=torch.float64)
    t = torch.randn(2, 4, 2, 16, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    mean, scale = torch.randn(16, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    rotated = LossTerm(kind, normaliser=Affine(mean, scale, turn), beta=0.5, shift=(0.5, 0.0))
    plain = LossTerm(kind, normaliser=Affine(mean, scale), beta=0.5, shift=(0.5, 0.0))
    left = function([x], [t], [rotated]).total
    right = function([x @ turn], [t], [plain]).total  # turn.T on each prediction
    if kind in ("smooth_l1", "cosine_smooth_l1"):
        assert ((left - right) / right).abs() > 1e-4
    else:
        torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


def test_teachers_of_all_kinds_in_any_order(function):
    """Unequal widths, grids, batch sizes and dtypes; values and gradients to the bit."""
    shapes = [
        ((2, 3, 4, 7), (2, 5, 2, 7)),
        ((3, 1), (3, 1)),
        ((1, 2, 2, 4096), (1, 2, 2, 4096)),
        ((4, 130), (4, 130)),
        ((2, 5, 5, 33), (2, 2, 3, 33)),
    ]
    weights = (0.5, 2.0, 1.0, 0.25, 1.5)
    cases = []
    for kind, weight, (ours, theirs) in zip(KINDS, weights, shapes, strict=True):
        mask = None if len(theirs) == 2 else torch.rand(theirs[:3]) < 0.8
        x = torch.randn(ours).to(torch.bfloat16 if kind == "smooth_l1" else torch.float32)
        affine = Affine(torch.randn(ours[-1]), torch.tensor(1.7))
        term = LossTerm(kind, weight, affine)
        cases.append((x.requires_grad_(), torch.randn(theirs), term, mask))
    expected = None
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        loss = function(*([cases[i][j] for i in order] for j in range(4)))
        gradients = torch.autograd.grad(loss.total, [case[0] for case in cases])
        back = [order.index(i) for i in range(5)]
        found = (loss.per_term[back], *(loss.per_image[i] for i in back), *gradients)
        if expected is None:
            expected, total = found, loss.total
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(loss.total, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["cosine", "cosine_smooth_l1", "angular"])
@pytest.mark.parametrize("zero", ["prediction", "target"])
def test_a_vector_without_direction_hides_no_nan(kind: str, zero: str) -> None:
    nothing, bad = torch.zeros(2, 5), torch.full((2, 5), torch.nan)
    x, t = (nothing, bad) if zero == "prediction" else (bad, nothing)
    for op in (multi_teacher_loss, reference.multi_teacher_loss):
        assert op([x], [t], [LossTerm(kind)]).total.isnan()
