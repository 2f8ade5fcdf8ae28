from __future__ import annotations

import pytest
import torch

from fastagglo.distill import hadamard, hadamard_order_exists, mixing_rotation

# Multiples of 4 up to 512 that neither Sylvester's nor Paley's construction with a prime reaches.
MISSING = {
    *(52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244, 260, 268, 292),
    *(324, 340, 344, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508),
}
WIDTHS = [640, 768, 832, 896, 1024, 1152, 1280, 1408, 1440, 1536, 1664, 1792]
WIDE = [2048, 2304, 2560, 3072, 3200, 3584, 4096]


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


@pytest.mark.parametrize("n", WIDTHS + WIDE)
def test_widths_of_real_models(n: int) -> None:
    h = hadamard(n)
    assert h.shape == (n, n)
    assert torch.equal(h.abs().amin(), h.abs().amax())
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:64]
    gram = h[rows] @ h.T
    expected = torch.zeros(64, n).double()
    expected[torch.arange(64), rows] = n
    assert torch.equal(gram, expected)


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
