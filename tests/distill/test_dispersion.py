"""The spread of a teacher's summaries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastagglo.distill import Dispersion


def summaries(spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    return torch.arange(1.0, 7.0) * 0.3 + spread * x


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_mean_squared_angle_to_the_mean_direction(spread: float) -> None:
    x = summaries(spread)
    unit = F.normalize(x, dim=1)
    mean = F.normalize(unit.mean(0), dim=0)
    expected = torch.arccos((unit @ mean).clamp(-1, 1)).square().mean()
    at_once = Dispersion(6)
    at_once.update(x)
    torch.testing.assert_close(at_once.value.double(), expected, atol=1e-6, rtol=1e-5)
    # In batches the early angles are to an early mean: about one batch in all is off.
    streamed = Dispersion(6)
    for part in x.split(100):
        streamed.update(part)
    torch.testing.assert_close(streamed.value.double(), expected, atol=0, rtol=0.02)


def test_length_does_not_matter() -> None:
    one, other = Dispersion(6), Dispersion(6)
    one.update(summaries(1.0))
    other.update(summaries(1.0) * 100)
    assert one.value == pytest.approx(other.value.item(), rel=1e-6)


def test_before_the_first_batch_and_after_reset() -> None:
    dispersion = Dispersion(6)
    dispersion.update(summaries(1.0)[:0])
    assert dispersion.value == 1
    dispersion.update(summaries(0.0))
    assert dispersion.value == pytest.approx(1e-4)  # never a division by zero
    dispersion.reset()
    assert dispersion.value == 1


def test_rides_in_a_checkpoint() -> None:
    one, other = Dispersion(6), Dispersion(6)
    one.update(summaries(1.0))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.value, other.value)
    assert torch.equal(one.merged().value, one.value)


def test_errors() -> None:
    dispersion = Dispersion(6)
    with pytest.raises(ValueError, match=r"summaries: expected the shape \(N, 6\), got \(3, 5\)"):
        dispersion.update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"got \(6,\)"):
        dispersion.update(torch.zeros(6))
    with pytest.raises(TypeError, match="summaries: expected a floating-point tensor, got list"):
        dispersion.update([1.0])
    with pytest.raises(ValueError, match="channels: expected a positive int, got 0"):
        Dispersion(0)
    bad = summaries(1.0)
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="summaries: 1 of 2000 rows contain NaN or infinity"):
        dispersion.update(bad)
    assert dispersion.value == 1
