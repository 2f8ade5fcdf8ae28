from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastagglo.distill import (
    AdaLoss,
    Balancer,
    FixedWeights,
    LossRatioWeights,
    UncertaintyWeights,
    make_balancer,
    teacher_dropping,
)

KINDS = ["fixed", "uncertainty", "adaloss", "ratio"]
NAMES = ["sam", "clip", "dino"]


def scalars(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_total_is_the_weighted_sum(kind: str) -> None:
    losses = scalars(clip=0.5, dino=2.0, sam=30.0)
    balancer = make_balancer(kind, NAMES)
    total, weights = balancer(losses)
    assert total.dim() == 0
    assert set(weights) == set(losses)
    by_hand = sum(weights[n] * losses[n] for n in losses)  # log-variances start at 0
    torch.testing.assert_close(total, by_hand)
    (3 * total).backward()
    for name, loss in losses.items():
        assert not weights[name].requires_grad
        torch.testing.assert_close(loss.grad, 3 * weights[name])


@pytest.mark.parametrize("kind", KINDS)
def test_teachers_may_be_absent_and_in_any_order(kind: str) -> None:
    balancer = make_balancer(kind, NAMES)
    balancer(scalars(sam=3.0, dino=2.0, clip=1.0))
    total, weights = balancer(scalars(sam=3.0, clip=1.0))
    assert set(weights) == {"sam", "clip"}
    other = make_balancer(kind, NAMES[::-1])
    other.load_state_dict(balancer.state_dict())
    again, other_weights = other.eval()(scalars(clip=1.0, sam=3.0))
    balancer.eval()
    torch.testing.assert_close(again, balancer(scalars(sam=3.0, clip=1.0))[0])
    assert set(other_weights) == {"sam", "clip"}
    assert torch.isfinite(total)


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = make_balancer(kind, NAMES), make_balancer(kind, NAMES)
    steps = [dict(zip(NAMES, torch.rand(3, generator=g).unbind(), strict=True)) for _ in range(6)]
    for step in steps[:3]:
        a(step)
    b.load_state_dict(a.state_dict())
    for step in steps[3:]:
        assert torch.equal(a(step)[0], b(step)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    losses = {n: torch.tensor(1.5, dtype=dtype, requires_grad=True) for n in NAMES}
    total, weights = make_balancer(kind, NAMES)(losses)
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    assert all(w.dtype == torch.float32 for w in weights.values())
    total.backward()
    assert losses["sam"].grad.dtype == dtype


def test_fixed() -> None:
    total, weights = FixedWeights(NAMES, {"sam": 0.25, "clip": 0})(
        scalars(sam=8.0, clip=5.0, dino=1.0)
    )
    assert total.item() == 3.0
    assert {n: w.item() for n, w in weights.items()} == {"sam": 0.25, "clip": 0.0, "dino": 1.0}
    assert not FixedWeights(NAMES).state_dict()


def test_uncertainty_fixed_point() -> None:
    """The gradient of the log-variance vanishes exactly where exp(s) is the loss."""
    losses = {"sam": torch.tensor(30.0), "clip": torch.tensor(0.5), "dino": torch.tensor(2.0)}
    balancer = UncertaintyWeights(NAMES)
    balancer(losses)[0].backward()
    values = torch.tensor([0.5, 2.0, 30.0])  # in the order of the sorted names
    torch.testing.assert_close(balancer.log_variance.grad, (1 - values) / 2)
    optimiser = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        total, weights = balancer(losses)
        total.backward()
        optimiser.step()
    torch.testing.assert_close(balancer.log_variance.exp(), values, rtol=1e-3, atol=0)
    for name, loss in losses.items():
        torch.testing.assert_close(weights[name] * loss, torch.tensor(0.5), rtol=2e-3, atol=0)


def test_adaloss_makes_scales_equal() -> None:
    g = torch.Generator().manual_seed(0)
    balancer = AdaLoss(NAMES, momentum=0.9)
    shares = torch.zeros(3)
    for step in range(300):
        noise = 1 + 0.2 * torch.rand(3, generator=g)
        losses = {
            "sam": 1000 * noise[0] * 0.99**step,
            "clip": noise[1],
            "dino": 1e-3 * noise[2],
        }
        total, weights = balancer(losses)
        if step == 0:
            assert total.item() == pytest.approx(3.0)
        if step >= 200:
            shares += torch.stack([weights[n] * losses[n] for n in NAMES]) / 100
    # "sam" falls by 1 % a step, and a mean of ten steps lags by about nine of them.
    torch.testing.assert_close(shares, torch.tensor([0.917, 1.0, 1.0]), rtol=0.02, atol=0)


def test_adaloss_mean_is_bias_corrected() -> None:
    balancer = AdaLoss(["a"], momentum=0.9)
    for value in (4.0, 1.0):
        _, weights = balancer({"a": torch.tensor(value)})
    mean = (0.9 * 0.1 * 4 + 0.1 * 1) / (1 - 0.9**2)
    assert weights["a"].item() == pytest.approx(1 / mean, rel=1e-6)
    balancer.eval()
    _, weights = balancer({"a": torch.tensor(100.0)})
    assert weights["a"].item() == pytest.approx(1 / mean, rel=1e-6)
    assert AdaLoss(["a"]).eval()({"a": torch.tensor(5.0)})[1]["a"].item() == 1.0


def test_adaloss_of_a_zero_loss() -> None:
    total, weights = AdaLoss(["a"], eps=1e-4)({"a": torch.tensor(0.0)})
    assert total.item() == 0
    assert weights["a"].item() == pytest.approx(1e4)


def test_ratio_favours_the_teacher_that_stalls() -> None:
    balancer = LossRatioWeights(NAMES)
    for step in range(60):
        losses = {
            "sam": torch.tensor(500.0 * 0.95**step),
            "clip": torch.tensor(0.1),
            "dino": torch.tensor(1.0 + 0.02 * step),
        }
        _, weights = balancer(losses)
        if step == 0:
            assert all(w.item() == pytest.approx(1.0) for w in weights.values())
        assert sum(w.item() for w in weights.values()) == pytest.approx(3.0)
    assert weights["sam"] < 0.9 < weights["clip"] < weights["dino"]
    even = LossRatioWeights(NAMES, temperature=1e6)
    even.load_state_dict(balancer.state_dict())
    _, weights = even(losses)
    assert all(w.item() == pytest.approx(1.0, abs=1e-4) for w in weights.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["adaloss", "ratio"])
def test_bad_losses_do_not_enter_the_means(kind: str, bad: float) -> None:
    clean, hit = make_balancer(kind, NAMES), make_balancer(kind, NAMES)
    step = {"sam": torch.tensor(3.0), "clip": torch.tensor(2.0), "dino": torch.tensor(1.0)}
    for balancer in (clean, hit):
        balancer(step)
    clean({n: step[n] for n in ("sam", "dino")})
    total, weights = hit(step | {"clip": torch.tensor(bad)})
    assert not torch.isfinite(total)
    assert all(torch.isfinite(w) for w in weights.values())
    for key, value in hit.state_dict().items():
        assert torch.equal(value, clean.state_dict()[key])
    assert torch.isfinite(hit(step)[0])


def test_bad_first_loss() -> None:
    balancer = AdaLoss(["a", "b"])
    balancer({"a": torch.tensor(math.nan), "b": torch.tensor(2.0)})
    total, _ = balancer({"a": torch.tensor(7.0), "b": torch.tensor(2.0)})
    assert total.item() == pytest.approx(2.0)


def test_means_keep_their_precision() -> None:
    balancer = AdaLoss(NAMES).to(torch.bfloat16)
    assert balancer.running.average.dtype == torch.float32


def test_wrong_losses() -> None:
    balancer = make_balancer("fixed", NAMES)
    with pytest.raises(
        ValueError, match=r"unknown teacher 'cat'; known: \['clip', 'dino', 'sam'\]"
    ):
        balancer({"cat": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="at least one"):
        balancer({})
    with pytest.raises(ValueError, match=r"'sam'.*0-d.*\(1,\)"):
        balancer({"sam": torch.ones(1)})
    with pytest.raises(TypeError, match="float"):
        balancer({"sam": 1.0})
    with pytest.raises(TypeError, match="int64"):
        balancer({"sam": torch.tensor(1)})
    with pytest.raises(ValueError, match="meta"):
        balancer({"sam": torch.ones((), device="meta")})


def test_wrong_construction() -> None:
    with pytest.raises(ValueError, match="did you mean 'uncertainty'"):
        make_balancer("uncertanty", NAMES)
    with pytest.raises(ValueError, match="'adaloss'"):
        make_balancer("zzz", NAMES)
    with pytest.raises(TypeError, match="temperature"):
        make_balancer("fixed", NAMES, temperature=2)
    with pytest.raises(ValueError, match="names"):
        make_balancer("fixed", [])
    with pytest.raises(ValueError, match="names"):
        make_balancer("fixed", ["a", "a"])
    with pytest.raises(TypeError, match="names"):
        make_balancer("fixed", "sam")
    with pytest.raises(ValueError, match="'cat'"):
        FixedWeights(NAMES, {"cat": 1.0})
    with pytest.raises(ValueError, match="-1"):
        FixedWeights(NAMES, {"sam": -1.0})
    with pytest.raises(ValueError, match="momentum"):
        AdaLoss(NAMES, momentum=1.0)
    with pytest.raises(ValueError, match="eps"):
        AdaLoss(NAMES, eps=0.0)
    with pytest.raises(ValueError, match="slow_momentum"):
        LossRatioWeights(NAMES, momentum=0.9, slow_momentum=0.5)
    with pytest.raises(ValueError, match="temperature"):
        LossRatioWeights(NAMES, temperature=0.0)
    with pytest.raises(TypeError, match="make_balancer"):
        Balancer(NAMES)({"sam": torch.tensor(1.0)})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dropping_keeps_the_hardest_teacher() -> None:
    losses = torch.rand(4, 5000, generator=seeded())
    c = teacher_dropping(losses, 0.5, seeded(1))
    assert c.shape == losses.shape
    torch.testing.assert_close(c.sum(0), torch.ones(5000))
    hardest = losses.argmax(0, keepdim=True)
    assert (c.gather(0, hardest) > 0).all()
    others = torch.ones(4, 5000, dtype=torch.bool).scatter(0, hardest, False)
    assert (c[others] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    # Kept teachers of one image weigh the same.
    kept = (c > 0).sum(0)
    torch.testing.assert_close(c, (c > 0) / kept.float())


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 1.0])
def test_dropping_probability(p: float) -> None:
    losses = torch.rand(3, 4000, generator=seeded())
    kept = (teacher_dropping(losses, p, seeded(1)) > 0).float().sum(0) - 1
    assert (kept / 2).mean().item() == pytest.approx(1 - p, abs=0.02)


def test_dropping_respects_absent_teachers() -> None:
    losses = torch.rand(3, 2000, generator=seeded())
    losses[0, :1000] = math.nan
    losses[1, :500] = math.inf
    mask = torch.ones(3, 2000)
    mask[2, 1500:] = 0
    losses[2, 1500:] = 100.0  # the largest, were it there
    losses[:, 7] = math.nan
    c = teacher_dropping(losses, 0.5, seeded(1), mask)
    assert torch.isfinite(c).all()
    assert (c[0, :1000] == 0).all()
    assert (c[1, :500] == 0).all()
    assert (c[2, 1500:] == 0).all()
    expected = torch.ones(2000)
    expected[7] = 0
    torch.testing.assert_close(c.sum(0), expected)
    late = torch.where(c > 0, losses, 0.0)[:2, 1500:]
    assert torch.equal(late.amax(0), losses[:2, 1500:].amax(0))


def test_dropping_is_reproducible_and_has_no_gradient() -> None:
    losses = torch.rand(3, 50, dtype=torch.float64, generator=seeded()).requires_grad_()
    c = teacher_dropping(losses, 0.5, seeded(2))
    assert torch.equal(c, teacher_dropping(losses, 0.5, seeded(2)))
    assert not torch.equal(c, teacher_dropping(losses, 0.5, seeded(3)))
    assert c.dtype == torch.float64
    assert not c.requires_grad
    (c * losses).sum().backward()
    assert torch.equal(losses.grad, c)
    assert teacher_dropping(losses.bfloat16()).dtype == torch.float32


def test_dropping_edge_cases() -> None:
    assert torch.equal(teacher_dropping(torch.rand(1, 6), 1.0), torch.ones(1, 6))
    assert teacher_dropping(torch.rand(3, 0)).shape == (3, 0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        teacher_dropping(torch.rand(2, 3), 1.5)
    with pytest.raises(ValueError, match=r"\(T, N\)"):
        teacher_dropping(torch.rand(3))
    with pytest.raises(ValueError, match=r"mask.*\(2, 3\).*\(3, 2\)"):
        teacher_dropping(torch.rand(2, 3), mask=torch.ones(3, 2))
    with pytest.raises(TypeError, match="int64"):
        teacher_dropping(torch.ones(2, 3, dtype=torch.int64))
