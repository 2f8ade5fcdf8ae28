"""PHI-S statistics against exact ones, and on the features of real teachers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from skimage import data
from torch import Tensor

from fastagglo.distill import PhiS, hadamard, hadamard_order_exists
from fastagglo.teachers import load_teacher

CHUNKS = (1, 999_983, 7, 2_345_678, 123_457)


def integers(rows: int, mixing: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    """Correlated whole numbers far from zero: sums of their products are exact in fp64."""
    z = torch.randint(-8, 9, (rows, len(mixing)), dtype=torch.int8, generator=generator)
    return z.float() @ mixing + offset


def exact_covariance(count: int, sums: Tensor, products: Tensor) -> Tensor:
    """In rational numbers, rounded once."""
    s, p = ([[int(v) for v in row] for row in m.tolist()] for m in (sums[None], products))
    size = range(len(sums))
    rows = [
        [float(Fraction(count * p[i][j] - s[0][i] * s[0][j], count * (count - 1))) for j in size]
        for i in size
    ]
    return torch.tensor(rows, dtype=torch.float64)


def test_ten_million_samples() -> None:
    """8 channels of spread 15 at 1000, in chunks of uneven sizes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randint(-3, 4, (8, 8), generator=generator).float()
    count, left, chunk = 10**7, 10**7, 0
    phi = PhiS(8)
    sums, products = torch.zeros(8).double(), torch.zeros(8, 8).double()
    while left:
        rows = min(left, CHUNKS[chunk % len(CHUNKS)])
        left, chunk = left - rows, chunk + 1
        y = integers(rows, mixing, 1000.0, generator)
        phi.update(y)
        y = y.double()
        sums += y.sum(0)
        products += y.T @ y
    assert products.max() < 2**53  # so every addition above was exact
    exact = exact_covariance(count, sums, products)
    assert int(phi.count) == count
    torch.testing.assert_close(phi.running_mean, sums / count, rtol=1e-13, atol=0)
    error = (phi.running_moment / (count - 1) - exact).abs()
    # Asked for: 1e-6. Every entry, also those near zero, is better than that by far.
    assert (error / exact.abs()).max() < 1e-8
    assert error.max() < 1e-10 * exact.abs().max()
    z = phi.finish().transform(y)
    torch.testing.assert_close(z.var(0), torch.ones(8).double(), rtol=0.02, atol=0)


def test_2048_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randint(-1, 2, (2048, 2048), generator=generator).float()
    mixing *= torch.rand(2048, 2048, generator=generator) < 0.02
    y = integers(1500, mixing, 1000.0, generator)
    phi = PhiS(2048)
    for part in y.split([1, 700, 799]):
        phi.update(part)
    y = y.double()
    sums, products = y.sum(0), y.T @ y
    # Both sides of this difference are whole numbers below 2^53.
    exact = (1500 * products - torch.outer(sums, sums)) / (1500 * 1499)
    assert (1500 * products).max() < 2**53
    error = (phi.running_moment / 1499 - exact).abs().max()
    assert error < 1e-11 * exact.abs().max()


def test_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(m.dtype) or eigh(m))
    phi = PhiS(24)
    for part in torch.randn(300, 24).split(50):
        phi.update(part)
        _ = phi.affine  # of the early estimates
    assert calls == []
    y = torch.randn(5, 24)
    phi.finish().finish(src=0).inverse(phi.transform(y))
    fresh = PhiS(24)
    fresh.load_state_dict(phi.state_dict())
    assert torch.equal(fresh.finish().transform(y), phi.transform(y))
    assert calls == [torch.float64]


# Real teachers on real photographs


def photos(size: int) -> Tensor:
    crops = []
    for photo in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket()):
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        crops += [image[:, :size, :size], image[:, -size:, -size:], image[:, 40:, 40:]]
    return torch.stack([crop[:, :size, :size] for crop in crops])


@torch.no_grad()
def features_of(name: str, folder: Path) -> Tensor:
    if name == "hog":
        return load_teacher("builtin", "hog")(photos(224)).spatial
    if name.startswith("lite0"):
        layer = name.partition(" ")[2]
        return load_teacher("builtin", "efficientnet-lite0", layer=layer)(photos(224)).spatial
    import timm

    network = timm.create_model(
        "vit_small_patch16_dinov3", depth=2, embed_dim=192, num_heads=3, img_size=64
    )
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    teacher = load_teacher("timm", "vit_small_patch16_dinov3", checkpoint=folder)
    return teacher(photos(224)).spatial


TEACHERS = {
    "hog": 36,
    "lite0 stride8": 40,
    "lite0 stride16": 112,
    "lite0 stride32": 1280,  # wider than it has rows here
    "dinov3": 192,
}


@pytest.mark.parametrize(("name", "channels"), TEACHERS.items())
def test_features_of_real_teachers(name: str, channels: int, tmp_path: Path) -> None:
    y = features_of(name, tmp_path)
    assert y.shape[-1] == channels
    phi = PhiS.fit(iter(y))  # image by image
    rows = y.double().flatten(0, 2)
    spread = rows.var(0)
    assert spread.max() > 1.3 * spread.min()  # what has to be balanced
    z = phi.transform(rows)
    torch.testing.assert_close(z.mean(0), torch.zeros(channels).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(z.var(0), torch.ones(channels).double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(phi.inverse(z), rows, rtol=0, atol=1e-12 * rows.abs().max().item())
    # By a true Hadamard matrix: each channel holds the same share of every principal axis.
    assert hadamard_order_exists(channels)
    axes = hadamard(channels).T / channels**0.5 @ phi.final_rotation
    covariance = torch.cov(((rows - rows.mean(0)) @ axes.T).T)
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 1e-9 * covariance.max()
    assert (covariance.diagonal().diff() < 1e-9 * covariance.max()).all()
