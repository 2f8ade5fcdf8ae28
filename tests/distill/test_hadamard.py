from __future__ import annotations

import pytest
import torch

from fastagglo.distill import hadamard, hadamard_order_exists, mixing_rotation

# Multiples of 4 up to 512 that neither Sylvester's nor Paley's construction with a prime reaches.
MISSING = {
    *(52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244, 260, 268, 292),
    *(324, 340, 344, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508),
}
# Real teachers' widths and what each is made of: vision transformers from tiny to DINOv3-7B (4096)
# and InternViT-6B (3200), convolutional networks, SAM's neck (256), oriented gradients (36).
# One number: Sylvester (a power of two) or Paley; several: their Kronecker product.
WIDTHS = {
    **{36: (36,), 40: (2, 20), 96: (8, 12), 112: (4, 28), 120: (2, 60), 192: (192,), 256: (256,)},
    **{320: (16, 20), 384: (384,), 448: (16, 28), 512: (512,), 576: (16, 36), 640: (32, 20)},
    **{768: (64, 12), 832: (8, 104), 896: (32, 28), 960: (16, 60), 1024: (1024,), 1088: (1088,)},
    **{1152: (1152,), 1280: (1280,), 1408: (32, 44), 1440: (1440,), 1536: (128, 12)},
    **{1664: (1664,), 1792: (64, 28), 2048: (2048,), 2304: (64, 36), 2560: (128, 20)},
    **{3072: (256, 12), 3200: (16, 200), 3584: (3584,), 3712: (8, 464), 4096: (4096,)},
}


def test_orders_that_exist() -> None:
    found = {n for n in range(1, 513) if hadamard_order_exists(n)}
    assert found == {1, 2} | (set(range(4, 513, 4)) - MISSING)


def test_all_orders_to_512() -> None:
    for n in range(1, 513):
        if hadamard_order_exists(n):
            h = hadamard(n)
            assert h.dtype == torch.float64
            assert h.shape == (n, n)
            assert torch.equal(h.abs(), torch.ones(n, n).double()), n
            assert torch.equal(h @ h.T, n * torch.eye(n).double()), n


@pytest.mark.parametrize("n", WIDTHS)
def test_widths_of_real_teachers(n: int) -> None:
    assert hadamard_order_exists(n)
    h = hadamard(n)
    assert h.shape == (n, n)
    assert torch.equal(h.abs(), torch.ones(n, n).double())
    # All of H H^T up to 1024 channels, 64 of its rows beyond; whole numbers, so exact.
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(n))[: n if n <= 1024 else 64]
    gram = h[rows] @ h.T
    expected = torch.zeros(len(rows), n).double()
    expected[torch.arange(len(rows)), rows] = n
    assert torch.equal(gram, expected)
    # It is this matrix that the channels are mixed with.
    assert torch.equal(mixing_rotation(n), h / n**0.5)


@pytest.mark.parametrize("n", WIDTHS)
def test_constructions(n: int) -> None:
    product = torch.ones(1, 1).double()
    for factor in WIDTHS[n]:
        product = torch.kron(product, hadamard(factor))
    assert torch.equal(hadamard(n), product)


def test_same_matrix_every_time() -> None:
    assert torch.equal(hadamard(1408), hadamard(1408))
    # The fewest blocks, and of those the largest power of two: not 16 x 48, nor 4 x 12 x 16.
    assert torch.equal(hadamard(768), torch.kron(hadamard(64), hadamard(12)))
    assert torch.equal(hadamard(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double())


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 52, 92, 513])
def test_orders_without_a_construction_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        hadamard(n)


@pytest.mark.parametrize("n", [4.0, "4", True, None])
def test_order_must_be_an_int(n: object) -> None:
    for function in (hadamard, hadamard_order_exists, mixing_rotation):
        with pytest.raises(TypeError, match="expected an int"):
            function(n)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 10, 14, 18, 50, 52, 92, 100, 257, 514, 1026])
def test_mixing_rotation_is_orthogonal_and_bounded(n: int) -> None:
    w = mixing_rotation(n)
    torch.testing.assert_close(w @ w.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    bound = (1.0 if hadamard_order_exists(n) else 2.0) / n
    assert (w * w).max() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 24, 52, 100, 257])
@pytest.mark.parametrize("shape", ["power law", "one", "random", "equal", "zero"])
def test_variances_become_exactly_equal(n: int, shape: str) -> None:
    variances = {
        "power law": torch.arange(1, n + 1).double() ** -1.5 * 1e-9,
        "one": torch.eye(n)[0].double(),
        "random": torch.rand(n, generator=torch.Generator().manual_seed(0)).double(),
        "equal": torch.full((n,), 7.0).double(),
        "zero": torch.zeros(n).double(),
    }[shape]
    w = mixing_rotation(n, variances)
    torch.testing.assert_close(w @ w.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    mixed = (w * w) @ variances
    torch.testing.assert_close(mixed, variances.mean().expand(n), rtol=1e-11, atol=0)


def test_variances_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5,\)"):
        mixing_rotation(5, torch.ones(4))
