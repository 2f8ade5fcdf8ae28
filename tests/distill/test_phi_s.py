from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastagglo.distill import PhiS, hadamard
from fastagglo.ops.loss import LossTerm, multi_teacher_loss

CHANNELS = [1, 2, 5, 24, 52, 64]


def correlated(rows: int, channels: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Features like a teacher's: a power-law spectrum, random axes, a mean off zero."""
    g = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(channels, channels, generator=g).double())
    spread = torch.arange(1, channels + 1).double() ** -0.75
    x = torch.randn(rows, channels, generator=g).double() * spread
    return scale * (x @ axes.T) + torch.randn(channels, generator=g).double()


def collected(*batches: Tensor, kind: str = "phi-s") -> PhiS:
    phi = PhiS(batches[0].shape[-1], kind)
    for batch in batches:
        phi.update(batch)
    return phi


def assert_same_statistics(a: PhiS, b: PhiS, rtol: float = 1e-12) -> None:
    assert torch.equal(a.count, b.count)
    torch.testing.assert_close(a.running_mean, b.running_mean, rtol=rtol, atol=rtol)
    scale = b.running_moment.abs().max().item()
    torch.testing.assert_close(a.running_moment, b.running_moment, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("channels", CHANNELS)
def test_every_channel_has_variance_one(channels: int) -> None:
    y = correlated(3000, channels)
    phi = PhiS.fit(y)
    z = phi.transform(y)
    torch.testing.assert_close(z.mean(0), torch.zeros(channels).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(0), torch.ones(channels).double(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("channels", CHANNELS)
def test_definition(channels: int) -> None:
    y = correlated(500, channels)
    phi = PhiS.fit(y)
    covariance = torch.cov(y.T).reshape(channels, channels)
    expected = (covariance.trace() / channels).sqrt()
    torch.testing.assert_close(phi.mean, y.mean(0).float())
    torch.testing.assert_close(phi.scale, expected.float())
    assert phi.scale.dim() == 0
    assert phi.mean.dtype == phi.scale.dtype == phi.rotation.dtype == torch.float32
    by_hand = (y.float() - phi.mean) / phi.scale @ phi.rotation.T
    torch.testing.assert_close(phi.transform(y).float(), by_hand, rtol=1e-4, atol=1e-4)
    # A rotation: it keeps every distance, so errors mean the same in both spaces.
    eye = torch.eye(channels).double()
    r = phi.final_rotation
    torch.testing.assert_close(r @ r.T, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["phi-s", "global", "standardize"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_inverse(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    y = correlated(64, 24).to(dtype).reshape(2, 4, 8, 24)
    phi = PhiS.fit(y, kind=kind)
    z = phi.transform(y)
    assert z.dtype == dtype
    assert z.shape == y.shape
    back = phi.inverse(z)
    assert back.dtype == dtype
    torch.testing.assert_close(back, y, rtol=tolerance, atol=tolerance * y.abs().max().item())


def test_maps_are_differentiable() -> None:
    y = correlated(10, 5).requires_grad_()
    phi = PhiS.fit(y)
    assert torch.autograd.gradcheck(phi.transform, (y,))
    assert torch.autograd.gradcheck(phi.inverse, (y,))


def test_other_kinds() -> None:
    y = correlated(800, 12)
    y[:, 3] = 5.0  # a channel that is constant
    each = PhiS.fit(y, kind="standardize")
    assert each.scale.shape == (12,)
    assert each.rotation is None
    expected = torch.ones(12).double()
    expected[3] = 0.0
    torch.testing.assert_close(each.transform(y).var(0), expected, rtol=1e-12, atol=1e-20)
    whole = PhiS.fit(y, kind="global")
    assert whole.rotation is None
    torch.testing.assert_close(whole.scale, PhiS.fit(y).scale)
    torch.testing.assert_close(whole.transform(y).var(0).mean(), torch.tensor(1.0).double())


def test_mse_does_not_see_the_rotation() -> None:
    y, x = correlated(100, 24), correlated(100, 24, seed=1)
    phi, whole = PhiS.fit(y), PhiS.fit(y, kind="global")
    rotated = (phi.transform(x) - phi.transform(y)).square().mean()
    plain = (whole.transform(x) - whole.transform(y)).square().mean()
    torch.testing.assert_close(rotated, plain)


def test_normalises_the_targets_of_the_loss() -> None:
    """As a term's normaliser, and with the rotation folded into the prediction instead."""
    y = correlated(60, 24).reshape(2, 5, 6, 24)
    x = correlated(60, 24, seed=1).reshape(2, 5, 6, 24)
    phi = PhiS.fit(y)
    expected = (x - phi.transform(y)).square().mean()
    full = multi_teacher_loss([x], [y], [LossTerm("mse", normaliser=phi)]).total
    torch.testing.assert_close(full, expected, rtol=1e-5, atol=0)
    folded = multi_teacher_loss(
        [x @ phi.final_rotation], [y], [LossTerm("mse", normaliser=phi.affine)]
    ).total
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=0)


def test_teachers_pull_equally() -> None:
    """Two teachers, one with features a thousand times larger, train a shared trunk equally."""
    x = correlated(2000, 24, seed=2).float()

    def gradient_norm(seed: int, scale: float, normalise: bool) -> float:
        mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(seed))
        y = scale * (x @ mix + 1)
        target = PhiS.fit(y).transform(y) if normalise else y
        trunk = torch.eye(24).requires_grad_()
        (0.01 * x @ trunk - target).square().mean().backward()
        return trunk.grad.norm().item()

    assert gradient_norm(1, 1000.0, False) > 500 * gradient_norm(0, 1.0, False)
    ratio = gradient_norm(1, 1000.0, True) / gradient_norm(0, 1.0, True)
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("splits", [[3000], [1, 2999], [700, 1, 299, 2000], [1] * 20 + [2980]])
def test_streaming_equals_batch(splits: list[int]) -> None:
    y = correlated(3000, 24)
    phi = collected(*y.split(splits))
    torch.testing.assert_close(phi.running_mean, y.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(phi.running_moment / 2999, torch.cov(y.T), rtol=1e-11, atol=1e-13)
    assert int(phi.count) == 3000


def test_chunks_inside_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    y = correlated(1000, 24)
    whole = collected(y)
    monkeypatch.setattr("fastagglo.distill.phi_s._CHUNK_ELEMENTS", 24 * 37 + 5)
    assert_same_statistics(collected(y), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_features(dtype: torch.dtype) -> None:
    y = correlated(2000, 24).to(dtype)
    phi = collected(*y.split(300))
    expected = torch.cov(y.double().T)
    scale = expected.abs().max().item()
    torch.testing.assert_close(phi.running_moment / 1999, expected, rtol=0, atol=1e-12 * scale)
    assert phi.running_mean.dtype == torch.float64


@pytest.mark.parametrize("split", [1, 7, 5000])
def test_large_mean_small_variance(split: int) -> None:
    """Mean 1e4, spread 1e-2: E[y^2] - E[y]^2 would lose twelve of sixteen digits."""
    noise = torch.randn(5000, 6, generator=torch.Generator().manual_seed(0)).double() * 1e-2
    y = noise + 1e4
    phi = collected(*y.split(split))
    exact = torch.cov((y - 1e4).T)
    scale = exact.diagonal().mean().item()
    torch.testing.assert_close(phi.running_moment / 4999, exact, rtol=0, atol=1e-7 * scale)
    z = phi.finish().transform(y)
    torch.testing.assert_close(z.var(0), torch.ones(6).double(), rtol=1e-7, atol=0)


def test_shapes_strides_and_empty_batches() -> None:
    y = correlated(240, 8)
    whole = collected(y)
    assert_same_statistics(collected(y.reshape(4, 6, 10, 8)), whole)
    assert_same_statistics(collected(y.T.contiguous().T), whole)
    assert_same_statistics(collected(y.repeat_interleave(2, dim=0)[::2]), whole)
    assert_same_statistics(collected(*y.unbind(0)), whole)  # rows one by one, as (C,)
    assert_same_statistics(collected(y, y[:0], y[:0].reshape(0, 3, 3, 8)), whole)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_masked_rows_do_not_count(mask_dtype: torch.dtype) -> None:
    y = correlated(240, 8).reshape(4, 6, 10, 8)
    mask = torch.rand(4, 6, 10, generator=torch.Generator().manual_seed(1)) > 0.4
    expected = collected(y[mask])
    y[~mask] = math.nan
    phi = PhiS(8)
    phi.update(y, mask.to(mask_dtype))
    assert_same_statistics(phi, expected)


def test_mask_of_whole_images() -> None:
    y = correlated(240, 8).reshape(4, 6, 10, 8)
    phi = PhiS(8)
    phi.update(y, torch.tensor([True, False, True, False]))
    phi.update(y, torch.zeros(4))
    assert_same_statistics(phi, collected(y[::2]))


def test_bad_rows_are_counted_and_change_nothing() -> None:
    y = correlated(100, 8)
    phi = collected(y)
    before = copy.deepcopy(phi.state_dict())
    broken = y.clone()
    broken[3, 0] = math.nan
    broken[50] = math.inf
    with pytest.raises(ValueError, match="2 of 100 rows"):
        phi.update(broken)
    for key, value in phi.state_dict().items():
        assert torch.equal(value, before[key])


def test_merge() -> None:
    y = correlated(900, 24)
    parts = [collected(part) for part in y.split([500, 1, 399])]
    merged = PhiS(24)
    for part in parts:
        merged.merge(part)
    merged.merge(PhiS(24))
    assert_same_statistics(merged, collected(y))
    assert int(parts[0].count) == 500
    merged.finish()
    assert_same_statistics(merged, PhiS.fit(y))


def test_one_process_is_all_ranks() -> None:
    y = correlated(50, 8)
    phi = collected(y)
    phi.all_reduce()
    phi.broadcast()
    assert_same_statistics(phi, collected(y))


def test_fewer_rows_than_channels() -> None:
    y = correlated(10, 64)
    phi = PhiS.fit(y)
    z = phi.transform(y)
    torch.testing.assert_close(z.var(0), torch.ones(64).double(), rtol=1e-11, atol=0)
    torch.testing.assert_close(phi.inverse(z), y, rtol=1e-12, atol=1e-12)


def test_tiny_and_huge_features() -> None:
    y = correlated(200, 24)
    rotation = PhiS.fit(y).final_rotation
    for factor in (2.0**-60, 2.0**60):
        phi = PhiS.fit(y * factor)
        torch.testing.assert_close(phi.final_rotation, rotation, rtol=0, atol=1e-8)


def test_signs_and_order_are_stable() -> None:
    y = correlated(4000, 16)
    again = y.flip(0)  # other rounding, same statistics
    rotation = PhiS.fit(y).final_rotation
    torch.testing.assert_close(PhiS.fit(again).final_rotation, rotation, rtol=0, atol=1e-9)
    # The rule itself: undo the mixing and look at the axes, strongest first.
    axes = (hadamard(16).T / 4) @ rotation
    energy = (y - y.mean(0)) @ axes.T
    assert (energy.var(0).diff() <= 1e-12).all()
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()


def test_affine_while_statistics_settle() -> None:
    y = correlated(600, 24)
    phi = collected(y[:300])
    early = phi.affine
    assert early.rotation is None
    torch.testing.assert_close(early.mean, y[:300].mean(0).float())
    torch.testing.assert_close(early.scale, y[:300].var(0).mean().sqrt().float())
    phi.update(y[300:])
    torch.testing.assert_close(phi.affine.scale, y.var(0).mean().sqrt().float())
    assert phi.rotation is None
    assert not phi.finished
    assert phi.finish() is phi
    assert phi.finished
    assert phi.affine.rotation is None
    assert phi.rotation.shape == (24, 24)


@pytest.mark.parametrize("kind", ["phi-s", "global", "standardize"])
@pytest.mark.parametrize("finished", [False, True])
def test_checkpoint(kind: str, finished: bool, tmp_path: Path) -> None:
    y = correlated(300, 20)
    phi = collected(y[:200], kind=kind)
    if finished:
        phi.finish()
    torch.save(phi.state_dict(), tmp_path / "phi.pt")
    fresh = PhiS(20, kind)
    fresh.load_state_dict(torch.load(tmp_path / "phi.pt", weights_only=True))
    assert fresh.finished is finished
    if not finished:
        phi.update(y[200:])
        fresh.update(y[200:])
        phi.finish()
        fresh.finish()
    assert torch.equal(fresh.transform(y), phi.transform(y))
    assert (fresh.rotation is None) == (phi.rotation is None) == (kind != "phi-s")
    assert torch.equal(copy.deepcopy(phi).transform(y), phi.transform(y))


def test_loading_unfinished_state_undoes_finish() -> None:
    y = correlated(50, 4)
    state = collected(y).state_dict()
    phi = PhiS.fit(y)
    phi.load_state_dict(state)
    assert not phi.finished
    assert phi.rotation is None


def test_statistics_keep_their_precision_in_a_half_precision_model() -> None:
    y = correlated(100, 8)
    model = nn.Sequential(nn.Linear(8, 8), PhiS.fit(y)).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].running_moment.dtype == torch.float64
    assert_same_statistics(model[1], PhiS.fit(y))
    assert model.half()[1].rotation.dtype == torch.float32


def test_reset_starts_anew() -> None:
    y = correlated(100, 8)
    phi = PhiS.fit(correlated(50, 8, seed=4))
    phi.reset()
    assert not phi.finished
    assert phi.rotation is None
    phi.update(y)
    assert_same_statistics(phi, collected(y))


def test_fit_takes_an_iterable() -> None:
    y = correlated(96, 8).reshape(2, 6, 8, 8)
    assert_same_statistics(PhiS.fit(iter(y)), PhiS.fit(y))
    with pytest.raises(TypeError, match=r"features: expected a tensor or an iterable.*NoneType"):
        PhiS.fit(None)
    with pytest.raises(ValueError, match="empty"):
        PhiS.fit([])
    with pytest.raises(ValueError, match="valid"):
        PhiS.fit([y], valid=torch.ones(2))


def test_a_finished_normaliser_is_frozen() -> None:
    y = correlated(100, 8)
    phi = PhiS.fit(y)
    with pytest.raises(RuntimeError, match="reset"):
        phi.update(y)
    with pytest.raises(RuntimeError, match="reset"):
        phi.merge(collected(y))
    with pytest.raises(RuntimeError, match="reset"):
        phi.all_reduce()
    rotation = phi.rotation
    phi.finish()
    assert torch.equal(phi.rotation, rotation)


def test_maps_need_finish() -> None:
    phi = collected(correlated(100, 8))
    with pytest.raises(RuntimeError, match="finish"):
        phi.transform(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="finish"):
        phi.inverse(torch.zeros(2, 8))


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(rows: int) -> None:
    phi = collected(correlated(rows, 8))
    with pytest.raises(ValueError, match=f"{rows} seen"):
        phi.finish()
    with pytest.raises(ValueError, match="at least 2 rows"):
        _ = phi.scale
    with pytest.raises(ValueError, match="at least 2 rows"):
        _ = phi.affine


@pytest.mark.parametrize("split", [1, 13, 1000])
def test_constant_features_are_refused(split: int) -> None:
    # In float64 not even the sum of equal numbers is exact; the variance must be zero all the same.
    row = torch.randn(8, generator=torch.Generator().manual_seed(0)).double() / 3
    phi = collected(*row.expand(977, 8).split(split))
    with pytest.raises(ValueError, match="all 977 rows of features are equal"):
        phi.finish()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="channels"):
        PhiS(8.0)
    with pytest.raises(ValueError, match="channels"):
        PhiS(0)
    with pytest.raises(ValueError, match="phi-s, global, standardize"):
        PhiS(8, "pca")
    phi = PhiS(8)
    with pytest.raises(TypeError, match="floating"):
        phi.update(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        phi.update([1.0])
    with pytest.raises(ValueError, match=r"\(\.\.\., 8\).*\(3, 7\)"):
        phi.update(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="valid"):
        phi.update(torch.zeros(3, 8), torch.ones(4))
    with pytest.raises(TypeError, match="valid"):
        phi.update(torch.zeros(3, 8), [1, 1, 1])
    with pytest.raises(TypeError, match="PhiS"):
        phi.merge(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="8 channels, got 9"):
        phi.merge(PhiS(9))
    with pytest.raises(TypeError, match="features"):
        PhiS.fit(torch.zeros(4, 4, dtype=torch.int32))


def test_unpacks_into_mean_scale_and_rotation() -> None:
    phi_s = PhiS.fit(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    mean, scale, rotation = phi_s
    assert torch.equal(mean, phi_s.mean)
    assert torch.equal(scale, phi_s.scale)
    assert torch.equal(rotation, phi_s.rotation)
