"""The steps of a transformer's or an adaptor head's MLP, with everything but the GEMM folded in.

The road of a call: the functions here check and pick dtypes; those of ``mlp_library.py`` say what
is kept for the backward, and its operators are what a compiler sees; ``mlp_torch.py`` and
``mlp_triton.py`` compute.

What a GELU or a LayerNorm gives is not kept for the backward unless asked for: it is a short sum
over what stands before it, which is kept anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.ops import exporting, mlp_triton
from fastagglo.ops.autocast import autocast_enabled
from fastagglo.ops.backend import resolve
from fastagglo.ops.mlp_library import LinearGelu, NormGelu, NormGeluLinear, SharedLinear

__all__ = ["gelu_linear_residual", "layer_norm_gelu", "linear_bias_gelu"]

_BACKENDS = ("torch", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FORMS = ("none", "tanh")


def layer_norm_gelu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    approximate: str = "none",
) -> Tensor:
    """``F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps), approximate=approximate)``.

    Computed in fp32 (fp64 for fp64) and rounded once. Kept for the backward: x and two numbers a
    row, where PyTorch also keeps the normalised x.

    Args:
        x: ``(..., C)``, float64, float32, bfloat16 or float16, any strides.
        weight: ``(C,)`` of LayerNorm, any of these dtypes, or None for ones.
        bias: ``(C,)``, likewise, or None for zeros.
        eps: of LayerNorm, at least 0.
        approximate: the form of GELU, ``"none"`` (erf) or ``"tanh"``, as for ``F.gelu``.

    Returns:
        ``(..., C)`` in the dtype of x, or in autocast's where that is on: what follows is a GEMM.

    Differentiable once in x, weight and bias. The backend ``"triton"``, the default on CUDA, takes
    bfloat16, float16 and float32; the rest runs on ``"torch"``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes or devices that do not fit each other, an unknown form, or a backend that
            this op does not have.
    """
    owner = "layer_norm_gelu"
    _check_x(owner, x)
    _check_norm(owner, x, weight, bias, eps)
    tanh = _is_tanh(owner, approximate)
    if exporting.exporting():
        return exporting.norm_gelu(x, weight, bias, float(eps), tanh, compute_dtype(x))
    triton = uses_triton(owner, x, norm=True)
    y = NormGelu.apply(_rows(x), weight, bias, float(eps), tanh, compute_dtype(x), triton)
    return y.view(x.shape)


def linear_bias_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias), approximate=approximate)``: the first half of an MLP.

    Kept for the backward: x and what the GELU was given.

    Args:
        x: ``(..., C)``, float64, float32, bfloat16 or float16, any strides.
        weight: ``(N, C)``, in the dtype of x, except under autocast.
        bias: ``(N,)``, likewise, or None.
        approximate: the form of GELU, ``"none"`` (erf) or ``"tanh"``, as for ``F.gelu``.

    Returns:
        ``(..., N)`` in the dtype of x, or in autocast's.

    Differentiable once in x, weight and bias. Gradients have the dtypes of what they
    are of, also under autocast.

    Raises:
        TypeError, ValueError: as :func:`layer_norm_gelu`.
    """
    owner = "linear_bias_gelu"
    _check_x(owner, x)
    _check_linear(owner, x, weight, bias)
    tanh = _is_tanh(owner, approximate)
    if exporting.exporting():
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate=approximate)
    triton = uses_triton(owner, x, norm=False)
    y = LinearGelu.apply(_rows(x), weight, bias, tanh, compute_dtype(x), triton)
    return y.view(*x.shape[:-1], weight.shape[0])


def gelu_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    approximate: str = "none",
) -> Tensor:
    """``residual + F.linear(F.gelu(x, approximate=approximate), weight, bias)``.

    The second half of an MLP. Kept for the backward: x, where PyTorch also keeps its GELU.

    Args:
        x: ``(..., C)``, float64, float32, bfloat16 or float16, any strides.
        weight: ``(N, C)``, in the dtype of x, except under autocast.
        bias: ``(N,)``, likewise, or None.
        residual: ``(..., N)``, any of these dtypes, or None. It may be x itself.
        approximate: the form of GELU, ``"none"`` (erf) or ``"tanh"``, as for ``F.gelu``.

    Returns:
        ``(..., N)`` in the dtype of x, or in autocast's, or in the residual's if that is wider.

    Differentiable once in x, weight, bias and residual. Gradients have the dtypes of
    what they are of, also under autocast.

    Raises:
        TypeError, ValueError: as :func:`layer_norm_gelu`.
    """
    owner = "gelu_linear_residual"
    _check_x(owner, x)
    _check_linear(owner, x, weight, bias)
    _check_residual(owner, x, residual, weight)
    tanh = _is_tanh(owner, approximate)
    triton = uses_triton(owner, x, norm=False)
    return _step(x, None, None, weight, bias, residual, False, 0.0, tanh, True, 1, triton)


def norm_gelu_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    approximate: str = "none",
    recompute: bool = True,
    upsample: int = 1,
) -> Tensor:
    """``residual + F.linear(F.gelu(F.layer_norm(x)), weight, bias)``: a step of an adaptor head.

    Args:
        x: ``(..., C)``.
        norm_weight, norm_bias: ``(C,)`` or None, as of :func:`layer_norm_gelu`.
        weight, bias, residual: as of :func:`gelu_linear_residual`.
        eps: of LayerNorm, at least 0.
        approximate: the form of GELU.
        recompute: keep x and two numbers a row, and make the GELU's output again in the backward;
            False keeps that output too.
        upsample: beyond 1, x is ``(..., h, w, C)``, there is no residual, and what would be
            ``(..., h, w, N)`` is stored where ``pixel_shuffle`` would put it; its gradient is read
            from there.

    Returns:
        ``(..., N)``, or ``(..., h * upsample, w * upsample, N / upsample**2)``, in a dtype as of
        :func:`gelu_linear_residual`.

    Raises:
        TypeError, ValueError: as :func:`layer_norm_gelu`.
    """
    owner = "norm_gelu_linear"
    _check_x(owner, x)
    _check_norm(owner, x, norm_weight, norm_bias, eps)
    _check_linear(owner, x, weight, bias)
    _check_residual(owner, x, residual, weight)
    tanh = _is_tanh(owner, approximate)
    triton = uses_triton(owner, x, norm=True, strict=False)
    return _step(
        *(x, norm_weight, norm_bias, weight, bias, residual, True, float(eps), tanh, recompute),
        *(upsample, triton),
    )


def shared_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """``[F.linear(x, w, b) for w, b in zip(weights, biases)]`` that reads x once where it can.

    Args:
        x: ``(..., C)``.
        weights: at least one ``(N_i, C)``, in the dtype of x, except under autocast.
        biases: an ``(N_i,)`` or None for each.

    Returns:
        a ``(..., N_i)`` for each. Its rows may lie apart in memory.

    Raises:
        TypeError, ValueError: as :func:`layer_norm_gelu`.
    """
    _check_x("shared_linear", x)
    for weight, bias in zip(weights, biases, strict=True):
        _check_linear("shared_linear", x, weight, bias)
    if exporting.exporting():
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    found = SharedLinear.apply(_rows(x), compute_dtype(x), len(weights), *weights, *biases)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in found]


def uses_triton(owner: str, x: Tensor, *, norm: bool, strict: bool = True) -> bool:
    """Whether a call runs on the Triton kernels.

    Args:
        norm: it has a LayerNorm.
        strict: raise ValueError where a backend was asked for that the op lacks or that cannot run
            it; else, inside a model of which other ops have that backend, run on "torch".
    """
    if exporting.exporting():
        return False
    try:
        unable = {"triton": mlp_triton.unable(x, norm)}
        return resolve(owner, x.device, _BACKENDS, unable) == "triton"
    except ValueError:
        if strict:
            raise
        return False


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a GEMM's operands, and of what is made for one."""
    if autocast_enabled(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _step(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    normalise: bool,
    eps: float,
    tanh: bool,
    recompute: bool,
    upsample: int,
    triton: bool,
) -> Tensor:
    dtype = compute_dtype(x)
    out_dtype = dtype if residual is None else torch.promote_types(residual.dtype, dtype)
    if exporting.exporting():
        norm = (norm_weight, norm_bias, eps) if normalise else None
        return exporting.norm_gelu_linear(
            *(x, norm, weight, bias, residual, tanh, dtype, out_dtype, upsample)
        )
    # The gradient of x then has both shares, and torch.compile takes no tensor twice.
    skip = residual is x
    keep = not recompute and weight.requires_grad and torch.is_grad_enabled()
    y = NormGeluLinear.apply(
        *(_rows(x), norm_weight, norm_bias, weight, bias),
        None if residual is None or skip else _rows(residual),
        *(skip, normalise, eps, tanh, dtype, out_dtype, keep),
        *(upsample, 1 if upsample == 1 else max(x.shape[-2], 1), triton),
    )
    if upsample == 1:
        return y.view(*x.shape[:-1], weight.shape[0])
    *lead, height, width, _ = x.shape
    return y.view(*lead, height * upsample, width * upsample, y.shape[1])


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


# --- checks ---------------------------------------------------------------------------------------


def _check_x(owner: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{owner}: x must be a float64, float32, bfloat16 or float16 tensor, got {kind}"
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{owner}: x must be (..., channels), got shape {tuple(x.shape)}")


def _check_parameter(
    owner: str, name: str, value: Any, x: Tensor, shape: tuple[int, ...], *, same: bool
) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{owner}: {name} must be a floating-point tensor, got {kind}")
    if value.shape != shape:
        raise ValueError(
            f"{owner}: {name} must be {shape} for x of shape {tuple(x.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(
            f"{owner}: {name} must be on the device of x, {x.device}, got {value.device}"
        )
    if same and value.dtype != x.dtype and not autocast_enabled(x.device):
        raise TypeError(
            f"{owner}: {name} must have the dtype of x, {x.dtype}, got {value.dtype}; cast one of "
            "them, or use torch.autocast"
        )


def _check_norm(
    owner: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    for name, value in (("norm's weight", weight), ("norm's bias", bias)):
        if value is not None:
            _check_parameter(owner, name, value, x, (x.shape[-1],), same=False)
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"{owner}: eps must be a number, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{owner}: eps must be finite and at least 0, got {eps!r}")


def _check_linear(owner: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else "outputs"
    _check_parameter(owner, "weight", weight, x, (rows, x.shape[-1]), same=True)
    if bias is not None:
        _check_parameter(owner, "bias", bias, x, (weight.shape[0],), same=True)


def _check_residual(owner: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    if residual is not None:
        shape = (*x.shape[:-1], weight.shape[0])
        _check_parameter(owner, "residual", residual, x, shape, same=False)


def _is_tanh(owner: str, approximate: str) -> bool:
    if not isinstance(approximate, str):
        raise TypeError(f"{owner}: approximate must be a string, got {approximate!r}")
    if approximate not in _FORMS:
        raise ValueError(f"{owner}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return approximate == "tanh"
