from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastagglo.ops import loss_torch
from fastagglo.ops.loss import Affine, LossTerm, multi_teacher_loss, term_image_weights
from fastagglo.ops.reference import loss as reference

KINDS = ["mse", "cosine", "smooth_l1", "cosine_smooth_l1", "angular"]
TWINS = {"op": multi_teacher_loss, "twin": reference.multi_teacher_loss}
# Prediction's grid, target's grid, resize.
GEOMETRIES = {
    "equal": ((3, 2), (3, 2), "larger"),
    "prediction_up": ((2, 3), (5, 4), "larger"),
    "target_up": ((4, 5), (3, 2), "student"),
    "one_axis_each": ((2, 5), (4, 3), "larger"),
    "prediction_down": ((5, 4), (2, 3), "teacher"),
    "target_down": ((2, 2), (5, 4), "student"),
}
SHIFTS = {
    "still": None,
    "one": (0.75, -0.5),
    "each": torch.tensor([[1.0, 0.25], [-0.5, -0.75]]),
}


def small_blocks(monkeypatch):
    """Blocks of one row or one image, so that small tensors meet every edge of the loop."""
    monkeypatch.setattr(loss_torch, "BLOCK", 8)


def normaliser(channels, dtype=torch.float64, rotation=False):
    turn = torch.linalg.qr(torch.randn(channels, channels, dtype=dtype)).Q if rotation else None
    return Affine(torch.randn(channels, dtype=dtype), torch.tensor(1.3, dtype=dtype), turn)


def features(images, grid, channels, dtype=torch.float64, grad=False):
    return torch.randn(images, *grid, channels, dtype=dtype).requires_grad_(grad)


def token_mask(images, grid):
    """Some tokens of some images; the last image keeps one, and an image between has none."""
    mask = torch.rand(images, *grid) < 0.8
    mask[-1] = False
    mask[-1, grid[0] // 2, grid[1] // 2] = True
    if images > 2:
        mask[1] = False
    return mask


def gradients(loss, leaves):
    """Of a weighted sum of everything that is differentiable: no upstream gradient is 1."""
    images = torch.cat([x.flatten() * (0.5 + i) for i, x in enumerate(loss.per_image)])
    ramp = torch.linspace(0.3, 1.7, len(images), dtype=images.dtype)
    score = 1.7 * loss.total + (ramp * images).sum() + (loss.per_term * 0.6).sum()
    return torch.autograd.grad(score, leaves, retain_graph=True)


def assert_same(predictions, targets, terms, valid=None, rtol=1e-9):
    """Op and twin agree on every value and gradient, fp64: positions are exact to 1e-13 or so."""
    leaves = [x for x in predictions if x.requires_grad]
    got = multi_teacher_loss(predictions, targets, terms, valid)
    want = reference.multi_teacher_loss(predictions, targets, terms, valid)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    for name in ("per_image", "image_weights"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    if leaves:
        pairs = zip(gradients(got, leaves), gradients(want, leaves), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    return got


# First principles


@pytest.mark.parametrize("implementation", TWINS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradcheck(implementation, kind, geometry, shift, monkeypatch):
    small_blocks(monkeypatch)
    ours, theirs, resize = GEOMETRIES[geometry]
    x, t = features(2, ours, 3, grad=True), features(2, theirs, 3)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    masks = [token_mask(2, theirs), None, torch.tensor([1.0, 0.0])]
    for mask in masks[: 3 if implementation == "op" else 1]:

        def run(x, weight, mask=mask):
            term = LossTerm(
                kind, weight, normaliser(3), beta=0.8, resize=resize, shift=SHIFTS[shift]
            )
            torch.manual_seed(3)  # of the normaliser
            loss = TWINS[implementation]([x], [t], [term], [mask])
            return loss.total, loss.per_term, loss.per_image[0]

        torch.manual_seed(3)
        assert torch.autograd.gradcheck(run, (x, weight), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_every_element(kind):
    x, t = features(2, (2, 3), 4, grad=True), features(2, (3, 2), 4)
    term = LossTerm(kind, normaliser=normaliser(4, rotation=True), shift=(0.25, 0))
    mask = [torch.rand(2, 3, 2) < 0.7]
    assert torch.autograd.gradcheck(lambda x: multi_teacher_loss([x], [t], [term], mask)[:2], x)


def test_hand_computed():
    x, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    angle = math.acos(0.8)
    wanted = {
        "mse": 9.0,
        "cosine": 0.2,
        "smooth_l1": 2.0,
        "cosine_smooth_l1": 0.9 * 0.2 + 0.1 * 2,
        "angular": angle**2 / 0.5,
    }
    for kind, value in wanted.items():
        for function in TWINS.values():
            loss = function([x], [t], [LossTerm(kind, 3.0, dispersion=0.5)])
            assert loss.per_term.tolist() == pytest.approx([value], rel=1e-6)
            assert loss.total.item() == pytest.approx(3 * value, rel=1e-6)
            assert loss.image_weights[0].tolist() == [1]


def test_against_the_library():
    """PyTorch's own losses and F.interpolate, without the twin between."""
    x, t = features(3, (4, 5), 6, grad=True), features(3, (6, 7), 6)
    up = F.interpolate(x.permute(0, 3, 1, 2), (6, 7), mode="bilinear").permute(0, 2, 3, 1)
    wanted = {
        "mse": F.mse_loss(up, t),
        "cosine": 1 - F.cosine_similarity(up, t, dim=-1).mean(),
        "smooth_l1": F.smooth_l1_loss(up, t, beta=2.0),
    }
    for kind, value in wanted.items():
        got = multi_teacher_loss([x], [t], [LossTerm(kind)]).total
        torch.testing.assert_close(got, value)
        pair = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, value)]
        torch.testing.assert_close(*pair)


def test_reduction_over_tokens_and_images():
    """Images weigh the square root of their number of valid tokens."""
    x, t = torch.zeros(3, 2, 2, 1), torch.zeros(3, 2, 2, 1)
    x[0], x[1, 0, 0], x[2] = 1, 2, 9
    mask = torch.zeros(3, 2, 2)
    mask[0] = 1
    mask[1, 0, 0] = 1
    for function in TWINS.values():
        loss = function([x], [t], [LossTerm("mse")], [mask])
        assert loss.per_image[0].tolist() == [1, 4, 0]
        assert loss.image_weights[0].tolist() == [2, 1, 0]
        assert loss.total.item() == pytest.approx((2 * 1 + 1 * 4) / 3)
        for denominator in (12.0, torch.tensor(12.0)):
            loss = function([x], [t], [LossTerm("mse", denominator=denominator)], [mask])
            assert loss.total.item() == pytest.approx((2 * 1 + 1 * 4) / 12)


def test_groups_with_a_global_denominator_are_one_batch():
    x, t = features(5, (3, 4), 4), features(5, (2, 4), 4)
    mask, term = torch.rand(5, 2, 4) < 0.7, LossTerm("mse")
    parts = (slice(0, 2), slice(2, 5))
    total = sum(
        term_image_weights(x[p].shape, t[p].shape, term, mask[p]).sum() for p in parts
    ).item()
    piece = dataclasses.replace(term, denominator=total)
    halves = [multi_teacher_loss([x[p]], [t[p]], [piece], [mask[p]]).total for p in parts]
    torch.testing.assert_close(sum(halves), multi_teacher_loss([x], [t], [term], [mask]).total)


def test_phi_s_rotation_need_not_touch_the_target():
    """|x - R (y - mu) / phi|^2 = |R^T x - (y - mu) / phi|^2."""
    x, y, phi_s = features(2, (3, 3), 8), features(2, (3, 3), 8), normaliser(8, rotation=True)
    term = LossTerm("mse", normaliser=phi_s)
    plain = LossTerm("mse", normaliser=Affine(phi_s.mean, phi_s.scale))
    left = multi_teacher_loss([x], [y], [term]).total
    right = multi_teacher_loss([x @ phi_s.rotation], [y], [plain]).total
    torch.testing.assert_close(left, right)
    by_hand = (x - (y - phi_s.mean) @ phi_s.rotation.T / phi_s.scale).square().mean()
    torch.testing.assert_close(left, by_hand)


# The op is the twin


@st.composite
def pairs(draw):
    images, channels = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 7, 33, 4096]))
    sides = st.integers(1, 4 if channels == 4096 else 9)
    spatial = draw(st.booleans())
    ours, theirs = ((draw(sides), draw(sides)) if spatial else () for _ in "xt")
    x, t = features(images, ours, channels, grad=True), features(images, theirs, channels)
    if draw(st.booleans()):  # a zero among the vectors
        x.data[:1], t[-1:] = 0, 0
    shift = None
    if spatial:
        sixteenths = st.integers(-40, 40).map(lambda i: i / 16)
        pair = st.tuples(sixteenths, sixteenths)
        shift = draw(st.one_of(st.none(), pair, st.lists(pair, min_size=images, max_size=images)))
        if isinstance(shift, list):
            shift = torch.tensor(shift, dtype=torch.float32).reshape(images, 2)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(images, *(theirs if draw(st.booleans()) else ())) < 0.8
        mask = mask if draw(st.booleans()) else mask.float()
        t[(mask <= 0.5).view(mask.shape + (1,) * (t.ndim - mask.ndim - 1)).expand(t.shape[:-1])] = (
            math.nan
        )
    affine = None
    if draw(st.booleans()):
        affine = normaliser(channels, rotation=channels < 99 and draw(st.booleans()))
    term = LossTerm(
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from([1.0, 0.25, 0])),
        affine,
        beta=draw(st.sampled_from([0, 0.3, 2.0])),
        dispersion=draw(st.sampled_from([1.0, torch.tensor(2.1)])),
        resize=draw(st.sampled_from(["larger", "student", "teacher"])),
        shift=shift,
        denominator=draw(st.sampled_from([None, 3.5])),
    )
    return x, t, term, mask


@pytest.fixture
def _poisoned():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned")
@given(st.lists(pairs(), min_size=1, max_size=3), st.sampled_from([16, 1000, 1 << 18]))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_op_is_the_twin(cases, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_torch, "BLOCK", block)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
        loss = assert_same(*(list(column) for column in zip(*cases, strict=True)))
    assert loss.total.isfinite()
    for (x, t, term, mask), weights in zip(cases, loss.image_weights, strict=True):
        counted = term_image_weights(x.shape, t.shape, term, mask)
        torch.testing.assert_close(counted, weights, check_dtype=False)


@pytest.mark.parametrize("block", [1, 20, 50, 170, 700])
def test_ragged_blocks(block, monkeypatch):
    """Blocks of some rows or some images of which the last has fewer."""
    monkeypatch.setattr(loss_torch, "BLOCK", block)
    x, t = features(5, (7, 3), 4, grad=True), features(5, (7, 3), 4)
    assert_same([x, x], [t, t[:, :5]], [LossTerm("mse"), LossTerm("cosine", resize="teacher")])
    low = x.detach().bfloat16().requires_grad_()
    assert_same([low], [t], [LossTerm("smooth_l1")], rtol=2**-7)  # two roundings against one


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    nchw = features(2, (6, 4), 5, grad=True)  # as (N, C, h, w)
    views = [
        (nchw.permute(0, 2, 3, 1), features(2, (6, 4), 5).permute(0, 2, 3, 1)),
        (nchw[:, ::2, 1:], features(1, (1, 1), 5).expand(2, 3, 3, 5)),
        (nchw.transpose(1, 2), features(2, (9, 6), 10)[:, ::2, :, ::2][:, :4]),
    ]
    for x, t in views:
        mask = torch.rand(2, *t.shape[1:3]).transpose(1, 2).contiguous().transpose(1, 2) > 0.2
        flat = x.contiguous()
        dense = multi_teacher_loss([flat], [t.contiguous()], [LossTerm(kind)], [mask.clone()])
        loss = multi_teacher_loss([x], [t], [LossTerm(kind)], [mask])
        assert torch.equal(loss.total, dense.total)
        got, want = (torch.autograd.grad(v.total, nchw)[0] for v in (loss, dense))
        assert torch.equal(got, want)


def test_many_teachers_in_any_order():
    widths, grids = [1, 7, 4096, 768], [(3, 5), (1, 1), (2, 3), None]
    cases = []
    for kind, width, grid in zip(KINDS, widths, grids, strict=False):
        shape = (2, width) if grid is None else (2, *grid, width)
        other = shape if grid is None else (2, grid[0] + 1, grid[1], width)
        cases.append((torch.randn(shape), torch.randn(other), LossTerm(kind, 0.5)))
    alone = [multi_teacher_loss([x], [t], [term]).per_term for x, t, term in cases]
    for order in itertools.permutations(range(4)):
        loss = multi_teacher_loss(*([cases[i][j] for i in order] for j in range(3)))
        assert torch.equal(loss.per_term, torch.cat([alone[i] for i in order]))
        assert loss.total.item() == pytest.approx(0.5 * sum(alone).item(), rel=1e-6)


def test_whole_shift_is_slicing():
    x, t = features(2, (5, 6), 4, grad=True), features(2, (5, 6), 4)
    loss = assert_same([x], [t], [LossTerm("mse", shift=(2, -1))])
    wanted = (x[:, 2:, :5] - t[:, :3, 1:]).square().mean()
    torch.testing.assert_close(loss.total, wanted)
    assert loss.image_weights[0].tolist() == [math.sqrt(15)] * 2
    (gradient,) = torch.autograd.grad(loss.total, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, x)[0])
    # Half a cell further the outermost centres lie on the edge, which still counts; beyond it not.
    for shift, rows in ((0.5, 5), (0.51, 4), (5, 0), (1e9, 0)):
        weights = term_image_weights(x.shape, t.shape, LossTerm("mse", shift=(shift, 0)))
        assert weights.square().tolist() == pytest.approx([rows * 6] * 2)


def test_shift_across_grids_compares_the_same_place():
    """A linear ramp over the world is read alike at any resolution, away from the borders."""
    for cells_x, cells_t, resize in ((6, 12, "larger"), (12, 6, "student"), (12, 8, "teacher")):
        # Views 24 wide that start at 10 and 14; the value of a cell is the place of its centre.
        x, t = (
            start + (torch.arange(cells, dtype=torch.float64) + 0.5) * 24 / cells
            for start, cells in ((10, cells_x), (14, cells_t))
        )
        mask = ((t > 17) & (t < 29))[None, :, None].expand(1, cells_t, cells_t)
        x, t = (v[:, None, None].expand(1, len(v), len(v), 1) for v in (x, t))
        term = LossTerm("mse", resize=resize, shift=(4 * cells_x / 24, 0.0))
        loss = multi_teacher_loss([x], [t], [term], [mask])
        assert loss.image_weights[0].item() > 3
        assert loss.total.item() < 1e-20


# NaN, zero, one, huge


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [None, (0.5, 0.25)])
def test_masked_nan_does_not_leak(kind, shift, monkeypatch):
    small_blocks(monkeypatch)
    for ours, theirs in (((4, 4), (4, 4)), ((3, 3), (5, 5)), ((5, 5), (3, 3))):
        x, t = features(3, ours, 4, grad=True), features(3, theirs, 4)
        mask = token_mask(3, theirs)
        term = LossTerm(kind, shift=shift)
        dirty = torch.where(mask[..., None], t, math.nan)
        results = []
        for target in (t, dirty):
            for function in TWINS.values():
                loss = function([x], [target], [term], [mask])
                results.append((loss.total, *torch.autograd.grad(loss.total, x)))
        for total, gradient in results[1:]:
            torch.testing.assert_close(total, results[0][0])
            torch.testing.assert_close(gradient, results[0][1])
        assert results[0][0] > 0
        assert (results[0][1][1] == 0).all()  # the image without a valid token


def test_prediction_under_a_mask_gets_no_gradient():
    x, t = features(1, (2, 2), 3), features(1, (2, 2), 3)
    x[0, 0, 0] = math.nan
    x.requires_grad_()
    mask = torch.ones(1, 2, 2)
    mask[0, 0, 0] = 0
    for kind in KINDS:
        loss = multi_teacher_loss([x], [t], [LossTerm(kind)], [mask])
        (gradient,) = torch.autograd.grad(loss.total, x)
        assert loss.total.isfinite()
        assert (gradient[0, 0, 0] == 0).all()
        assert (gradient != 0).sum() == 9


@pytest.mark.parametrize("kind", KINDS)
def test_unmasked_nan_is_seen(kind):
    for where in ("prediction", "target"):
        x, t = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 2, 4)
        {"prediction": x, "target": t}[where][1, 0, 0, 2] = math.nan
        for function in TWINS.values():
            loss = function([x.requires_grad_()], [t], [LossTerm(kind)], [torch.ones(3)])
            assert loss.total.isnan()
            assert loss.per_image[0].isnan().tolist() == [False, True, False]
            assert torch.autograd.grad(loss.total, x)[0][1].isnan().any()


def test_nothing_to_compare_is_zero():
    for images in (0, 2):
        x, t = features(images, (2, 3), 4, grad=True), features(images, (4, 3), 4)
        mask = torch.zeros(images, dtype=torch.bool)
        for kind, denominator in itertools.product(KINDS, (None, 0.0, torch.tensor(0.0))):
            term = LossTerm(kind, denominator=denominator, shift=torch.zeros(images, 2))
            loss = assert_same([x], [t], [term], [mask])
            assert loss.total == 0
            assert (torch.autograd.grad(loss.total, x)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["cosine", "cosine_smooth_l1", "angular"])
def test_no_direction(kind, dtype):
    """A zero vector, on either side: cos 0, gradient 0 (of smooth L1 alone where there is one)."""
    plain = LossTerm(kind, beta=1.0)
    wanted = {"cosine": 1, "cosine_smooth_l1": 0.9 + 0.1 / 2, "angular": math.pi**2 / 4}[kind]
    for a, b in ((0, 1), (1, 0)):
        x = torch.full((1, 4), float(a), dtype=dtype, requires_grad=True)
        t = torch.full((1, 4), float(b))
        loss = assert_same([x], [t], [plain], rtol=1e-6 if dtype == torch.float32 else 1e-3)
        assert loss.total.item() == pytest.approx(wanted, rel=1e-6)
        gradient = torch.autograd.grad(loss.total, x)[0]
        slope = 0.1 * (a - b) / 4 if kind == "cosine_smooth_l1" else 0
        assert gradient[0].tolist() == pytest.approx([slope] * 4, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_angle_at_its_limits(dtype, sign):
    x = torch.randn(5, 16, dtype=dtype).requires_grad_()
    t = 2.5 * sign * x.detach()
    edge = math.acos(sign * (1 - 1e-6)) ** 2
    for function in TWINS.values():
        loss = function([x], [t], [LossTerm("angular")])
        # arccos near -1 is as ill-conditioned as its argument: 1e-6 / theta' of fp32.
        assert loss.total.item() == pytest.approx(edge, rel=0.05)
        assert (torch.autograd.grad(loss.total, x)[0] == 0).all()
    loss = multi_teacher_loss([x], [t], [LossTerm("cosine")])
    assert loss.total.item() == pytest.approx(1 - sign, abs=1e-6)
    assert torch.autograd.grad(loss.total, x)[0].abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(), (1, 1)])
def test_fp16_range(kind, grid):
    """Norms, squares and differences beyond 65504; with loss scaling, gradients below 6e-8."""
    big = torch.full((2, *grid, 4096), 6e4, dtype=torch.float16)
    big[..., ::2] *= -1
    x = big.clone().requires_grad_()
    for scale in (1.0,) if kind == "mse" else (1.0, 2.0**15):
        results = []
        for function in TWINS.values():
            loss = function([x], [-big.float() + 100 * torch.arange(4096)], [LossTerm(kind)])
            assert loss.total.isfinite()
            results.append((loss.total, torch.autograd.grad(loss.total * scale, x)[0]))
            assert results[-1][1].isfinite().all()
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
        # One rounding to fp16 each, of fp32 that may lie on either side, and fp16's smallest step.
        torch.testing.assert_close(results[0][1], results[1][1], rtol=2**-10, atol=2**-23)
    assert (results[0][1] != 0).any()


# Precision and dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resize", ["equal", "up"])
def test_error_budget(kind, dtype, resize):
    """About as wrong as the twin in the same dtype, the truth being the twin in fp64."""
    x = features(2, (5, 6), 96).to(dtype).double().requires_grad_()
    t = features(2, (5, 6) if resize == "equal" else (8, 9), 96).to(dtype).double()
    affine = normaliser(96)
    term, scale = LossTerm(kind, normaliser=affine, shift=(0.5, 1)), 4096.0
    mask = [torch.rand(t.shape[:3]) < 0.9]

    def run(function, dtype):
        y = x.detach().to(dtype).requires_grad_()
        loss = function([y], [t.to(dtype)], [term], mask).total
        return loss.detach().double(), torch.autograd.grad(loss * scale, y)[0].double()

    truth, twin = (run(reference.multi_teacher_loss, d) for d in (torch.float64, dtype))
    op = run(multi_teacher_loss, dtype)
    eps = torch.finfo(dtype).eps
    # The sums are fp32 in any dtype: 4 ulp for another order of additions.
    assert (op[0] - truth[0]).abs() <= (twin[0] - truth[0]).abs() + 5e-7 * truth[0]
    # Kept and scaled are two roundings of half an eps each; resizing adds up to the size of all.
    allowed = (twin[1] - truth[1]).abs() + eps * truth[1].abs() + 1e-6 * truth[1].abs().max()
    used = ((op[1] - truth[1]).abs() / allowed).max()
    assert used <= 1, f"{used:.2f} of the error budget"


def test_mixed_dtypes_and_autocast():
    x, t = torch.randn(2, 3, 3, 8), torch.randn(2, 3, 3, 8)
    low = x.bfloat16().requires_grad_()
    term = LossTerm("cosine", normaliser=normaliser(8, rotation=True))
    plain = multi_teacher_loss([low], [t], [term])
    with torch.autocast("cpu", torch.bfloat16):
        cast = multi_teacher_loss([low], [t], [term])
    assert torch.equal(plain.total, cast.total)
    assert plain.total.dtype == torch.float32
    assert torch.autograd.grad(cast.total, low)[0].dtype == torch.bfloat16
    both = multi_teacher_loss([low, x.double()], [t, t], [term, term])
    assert both.total.dtype == torch.float64
    assert [p.dtype for p in both.per_image] == [torch.float32, torch.float64]


def test_some_predictions_learn():
    t = features(2, (2, 2), 3)
    for learns in itertools.product((False, True), repeat=3):
        predictions = [features(2, (2, 2), 3, grad=g) for g in learns]
        loss = assert_same(predictions, [t] * 3, [LossTerm(k) for k in KINDS[:3]])
        assert loss.total.requires_grad == any(learns)
    with torch.no_grad():
        assert not multi_teacher_loss(
            [features(2, (), 3, grad=True)], [t[:, 0, 0]], [LossTerm("mse")]
        ).total.requires_grad
