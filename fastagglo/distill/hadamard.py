"""Hadamard matrices, and rotations that spread variance evenly over all channels.

PHI-S (arXiv 2410.01680) rotates features to their principal axes and then mixes these with a
Hadamard matrix: each of its entries is +-1, so each mixed channel carries the same share of every
principal variance. Orders without a Hadamard matrix get an orthogonal matrix of the same purpose.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def hadamard_order_exists(n: int) -> bool:
    """Whether :func:`hadamard` can build order ``n``.

    It can for 1, 2 and every multiple of 4 that is a product of powers of two (Sylvester),
    ``q + 1`` with a prime ``q = 3 mod 4`` (Paley I) and ``2 (q + 1)`` with a prime ``q = 1 mod 4``
    (Paley II). That leaves out a few orders for which a Hadamard matrix is known (52 = 2 (25 + 1)
    needs a prime power, 92 a search).

    Raises:
        TypeError: ``n`` is not an int. ValueError: ``n < 1``.
    """
    return _factors(_checked(n)) is not None


def hadamard(n: int) -> Tensor:
    """The Hadamard matrix of order ``n``: ``(n, n)`` float64, entries +-1, ``H H^T = n I``.

    The same matrix on every call and machine: the Kronecker product of as few building blocks
    (see :func:`hadamard_order_exists`) as possible, and of those the one with the largest power of
    two. Examples: 1024 Sylvester; 384, 1152 and 1280 Paley I; 36 Paley II; 768 = 64 x 12;
    1408 = 32 x 44.

    Raises:
        TypeError: ``n`` is not an int. ValueError: ``n < 1``, or no construction gives order ``n``.
    """
    factors = _factors(_checked(n))
    if factors is None:
        raise ValueError(
            f"no Hadamard matrix of order {n}: expected 1, 2 or a multiple of 4 that Sylvester's "
            "or Paley's constructions reach; mixing_rotation(n) is orthogonal for any order"
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in factors:
        matrix = torch.kron(matrix, _block(order))
    return matrix


def mixing_rotation(n: int, variances: Tensor | None = None) -> Tensor:
    """An orthogonal ``(n, n)`` float64 matrix ``W`` that spreads variance evenly.

    If the inputs are uncorrelated with variances ``v``, output channel ``i`` has the variance
    ``sum_j W_ij^2 v_j``.

    - Where a Hadamard matrix exists: ``W = H / sqrt(n)``. All outputs have exactly the mean
      variance, whatever ``v`` is.
    - Elsewhere: the Kronecker product of the largest Hadamard matrix whose order divides ``n`` and
      the discrete Hartley transform of the rest. Entries are at most ``sqrt(2 / n)`` in magnitude,
      so no output has more than twice the mean variance. With ``variances`` given, at most
      ``n - 1`` plane rotations follow, after which all outputs have exactly the mean variance
      (one always exists, by the Schur-Horn theorem); it then depends on the variances.

    Args:
        n: order, at least 1.
        variances: ``(n,)`` non-negative, on the CPU; unused where a Hadamard matrix exists.

    Raises:
        TypeError: ``n`` is not an int.
        ValueError: ``n < 1``, or ``variances`` does not have the shape ``(n,)``.
    """
    n = _checked(n)
    if variances is not None and tuple(variances.shape) != (n,):
        raise ValueError(f"variances: expected the shape ({n},), got {tuple(variances.shape)}")
    largest = max(d for d in _divisors(n) if _factors(d) is not None)
    mix = hadamard(largest) / math.sqrt(largest)
    rest = n // largest
    if rest == 1:
        return mix
    index = torch.arange(rest)
    # Reducing the product to one period first keeps the angles, and so orthogonality, exact.
    angle = (index[:, None] * index % rest).double() * (2 * math.pi / rest)
    mix = torch.kron(mix, (angle.cos() + angle.sin()) / math.sqrt(rest))
    return mix if variances is None else _equalise(mix, variances.double())


def _equalise(mix: Tensor, variances: Tensor) -> Tensor:
    """Rotates pairs of rows of ``mix`` until ``diag(W diag(v) W^T)`` is constant."""
    w = mix.numpy().copy()
    v = variances.numpy() / max(variances.mean().item(), 1e-300)
    excess = (w * w) @ v - 1  # of each row's variance over the mean; a row that is done has 0
    for _ in range(len(v) - 1):
        low, high = int(excess.argmin()), int(excess.argmax())
        if excess[low] >= 0 or excess[high] <= 0:
            break
        # The rotation by atan(t) moves the low row to the mean: excess_high t^2 - 2 c t +
        # excess_low = 0 has two real roots, of which the smaller disturbs the mixing least.
        c = (w[low] * v) @ w[high]
        q = c + math.copysign(math.sqrt(c * c - excess[low] * excess[high]), c)
        t = excess[low] / q
        cos = 1 / math.sqrt(1 + t * t)
        w[low], w[high] = cos * (w[low] - t * w[high]), cos * (w[high] + t * w[low])
        excess[high] += excess[low]
        excess[low] = 0.0
    return torch.from_numpy(w)


def _checked(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected an order of at least 1, got {n}")
    return n


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _is_block(n: int) -> bool:
    """Whether one construction alone gives order ``n``."""
    if n & (n - 1) == 0:
        return True
    if n % 4:
        return False
    return _is_prime(n - 1) or ((n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1))


@lru_cache(maxsize=1024)
def _factors(n: int) -> tuple[int, ...] | None:
    """The orders of the building blocks, a power of two first; None if there are none."""
    if _is_block(n):
        return (n,)
    best: tuple[int, ...] | None = None
    for block in _divisors(n)[1:-1]:
        if not _is_block(block) or (rest := _factors(n // block)) is None:
            continue
        candidate = tuple(sorted((block, *rest), key=lambda k: (k & (k - 1) != 0, k)))
        if best is None or _preference(candidate) < _preference(best):
            best = candidate
    return best


def _preference(factors: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    power_of_two = max((f for f in factors if f & (f - 1) == 0), default=1)
    return len(factors), -power_of_two, factors


def _block(n: int) -> Tensor:
    if n & (n - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while len(matrix) < n:
            matrix = torch.kron(pair, matrix)
        return matrix
    if _is_prime(n - 1):
        return _bordered_residues(n - 1) + torch.eye(n, dtype=torch.float64)
    conference = _bordered_residues(n // 2 - 1)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, off) + torch.kron(torch.eye(n // 2, dtype=torch.float64), on)


def _bordered_residues(q: int) -> Tensor:
    """Paley's ``S`` of order ``q + 1``: zero diagonal, +-1 elsewhere, ``S S^T = q I``.

    ``chi(i - j)``, the quadratic character modulo the prime ``q``, with a border of ones. ``S`` is
    skew for ``q = 3 mod 4``, so ``I + S`` is Hadamard, and symmetric for ``q = 1 mod 4``.
    """
    index = torch.arange(q)
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[index * index % q] = 1.0
    chi[0] = 0.0
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0.0
    matrix[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    matrix[1:, 1:] = chi[(index[:, None] - index) % q]
    return matrix
