"""GELU and its derivative, in fp32, for the kernels that fold them in (Hendrycks and Gimpel,
arXiv 1606.08415): exact, ``x * Phi(x)`` with an erf, or the tanh form."""

from __future__ import annotations

import math

import triton
import triton.language as tl

# Each stands behind the tensor it multiplies: before it, the interpreter takes the product for a
# constant.
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_HALF_LOG2E = tl.constexpr(-0.5 * math.log2(math.e))
# (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3): these are the
# factors of x and x^3 in -2u * log2(e). Where exp2 overflows the quotient is the right zero.
_LINEAR = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_CUBIC = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e) * 0.044715)
_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_SLOPE_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 3 * 0.044715)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU of fp32 x."""
    if TANH:
        return x / (1.0 + tl.exp2(x * (x * x * _CUBIC + _LINEAR)))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_slope(x, TANH: tl.constexpr):
    """Derivative of GELU at fp32 x."""
    square = x * x
    if TANH:
        # Of share and 1 - share, which the slope multiplies, neither may come from a difference.
        small = tl.exp2(tl.abs(x) * (square * _CUBIC + _LINEAR))
        large = 1.0 / (1.0 + small)
        share = tl.where(x >= 0.0, large, small * large)
        return share + x * (small * large) * large * (square * _SLOPE_CUBIC + _SLOPE)
    else:
        share = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        return share + x * _INV_SQRT_2PI * tl.exp2(square * _HALF_LOG2E)
