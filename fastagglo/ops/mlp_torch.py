"""The PyTorch path of the fused MLP steps: on a CPU block by block, elsewhere at once.

What to compute is said in ``mlp.py``. Matrices are (rows, channels); ``dtype`` is that of a GEMM's
operands. Statistics, activations and the gradients of parameters are computed in at least fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the widest matrix of a block, 4 MiB in fp32: what a block makes for itself stays in
# the cache of an ordinary CPU, and a GEMM of so many rows is as fast as one of all.
BLOCK = 1 << 20


def wider(dtype: torch.dtype) -> torch.dtype:
    """In which pointwise steps are computed."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(x: Tensor, widest: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the rows of x, nearly equal multiples; on a CPU alone more than one."""
    rows = x.shape[0]
    count = -(-rows * widest // BLOCK) if x.device.type == "cpu" else min(rows, 1)
    each = -(-rows // (max(count, 1) * multiple)) * multiple
    for start in range(0, rows, max(each, 1)):
        yield slice(start, min(start + each, rows))


def _gelu(x: Tensor, tanh: bool) -> Tensor:
    return F.gelu(x, approximate="tanh" if tanh else "none")


def _gelu_slope(grad: Tensor, x: Tensor, tanh: bool) -> Tensor:
    """``grad * gelu'(x)``."""
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if tanh else "none")


def _widened(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(wider(x.dtype))


def runs_of(cells: Tensor, upsample: int, width: int) -> Tensor:
    """The tokens of a pixel shuffle's result, a run of channels for each of their rows of cells.

    Args:
        cells: (rows * width * upsample**2, C), a grid's rows one after the other.

    Returns:
        (rows, width, upsample, upsample * C), a view where ``cells`` is contiguous.
    """
    rows = cells.shape[0] // (width * upsample**2)
    runs = cells.reshape(rows, upsample, width, upsample * cells.shape[1])
    return runs.transpose(1, 2)


def weight_product(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad.T @ x``, a weight's gradient, in the dtype of the weight.

    Operands of half precision are multiplied and added up in fp32, and the sum is rounded once if
    the weight has their dtype. A wider one, as under autocast, gets the sum unrounded on a GPU; on
    a CPU it gets what PyTorch's autocast gives it, rounded to the operands' dtype. (cuBLAS may add
    up parts of a sum in half precision where ``torch.backends.cuda.matmul`` allows it.)
    """
    if dtype == torch.float32 != x.dtype and not x.is_cpu:
        return torch.mm(grad.T, x, out_dtype=dtype)
    return (grad.T @ x).to(dtype)


class _Norm:
    """LayerNorm, or nothing, before a GELU."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: bool, eps: float
    ) -> None:
        self.wide = wider(x.dtype)
        self.shape, self.norm, self.eps = [x.shape[1]], norm, eps
        self.weight, self.bias = (
            None if v is None else v.to(self.wide).contiguous() for v in (weight, bias)
        )

    def __call__(self, block: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A block normalised, in ``wide``, and its rows' statistics, (n, 1) each."""
        block = block.to(self.wide)
        if not self.norm:
            return block, None, None
        return torch.native_layer_norm(block, self.shape, self.weight, self.bias, self.eps)

    def backward(
        self, grad: Tensor, block: Tensor, mean: Tensor, rstd: Tensor, wants: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the block, of weight and of bias."""
        wants = [wants[0], wants[1] and self.weight is not None, wants[2] and self.bias is not None]
        return torch.ops.aten.native_layer_norm_backward(
            *(grad, block.to(self.wide), self.shape, mean[:, None], rstd[:, None]),
            *(self.weight, self.bias, wants),
        )


class _Rows:
    """A result whose rows are computed block by block; what is made in one block is not copied."""

    def __init__(self, like: Tensor, rows: int, channels: int, dtype: torch.dtype) -> None:
        self.like, self.shape, self.dtype = like, (rows, channels), dtype
        self.memory: Tensor | None = None

    def __getitem__(self, part: slice) -> Tensor:
        """Where a block's rows go."""
        if self.memory is None:
            self.memory = self.like.new_empty(self.shape, dtype=self.dtype)
        return self.memory[part]

    def put(self, part: slice, value: Tensor) -> None:
        if value.shape == self.shape and value.dtype == self.dtype and value.is_contiguous():
            self.memory = value
        else:
            self[part].copy_(value)

    def result(self) -> Tensor:
        return self[:] if self.memory is None else self.memory


class _Sums:
    """Gradients that are sums over blocks, None until something came."""

    def __init__(self, count: int) -> None:
        self.sums: list[Tensor | None] = [None] * count

    def add(self, i: int, term: Tensor | None) -> None:
        if term is not None:
            so_far = self.sums[i]
            self.sums[i] = _widened(term) if so_far is None else so_far.add_(term)

    def add_product(self, i: int, a: Tensor, b: Tensor) -> None:
        """Add ``a.T @ b``; a sum of several only where the products are not rounded to less."""
        so_far = self.sums[i]
        if so_far is None:
            self.add(i, a.T @ b)
        else:
            so_far.addmm_(a.T, b)

    def result(self, i: int, like: Tensor | None, wanted: bool) -> Tensor | None:
        """The sum in the dtype of a parameter; None if it is not wanted."""
        if like is None or not wanted:
            return None
        found = self.sums[i]
        return torch.zeros_like(like) if found is None else found.to(like.dtype)


def norm_gelu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(layer_norm(x))`` and the rows' means and inverse deviations."""
    rows, channels = x.shape
    norm = _Norm(x, weight, bias, True, eps)
    y = x.new_empty(rows, channels, dtype=dtype)
    mean, rstd = (x.new_empty(rows, dtype=norm.wide) for _ in range(2))
    for part in _blocks(x, channels):
        h, m, r = norm(x[part])
        y[part] = _gelu(h, tanh)
        mean[part], rstd[part] = m[:, 0], r[:, 0]
    return y, mean, rstd


def norm_gelu_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tanh: bool,
    eps: float,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, of those that are wanted."""
    norm = _Norm(x, weight, bias, True, eps)
    grad_x = x.new_empty(x.shape) if wants[0] else None
    sums = _Sums(2)
    for part in _blocks(x, x.shape[1]):
        h, _, _ = norm(x[part])
        grad = _gelu_slope(grad_y[part].to(norm.wide), h, tanh)
        gx, gw, gb = norm.backward(grad, x[part], mean[part], rstd[part], wants)
        if grad_x is not None:
            grad_x[part] = gx
        sums.add(0, gw)
        sums.add(1, gb)
    return grad_x, sums.result(0, weight, wants[1]), sums.result(1, bias, wants[2])


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``gelu(linear(x))`` and what the GELU was given."""
    pre = linear(x, weight, bias, dtype)
    return _gelu(pre, tanh), pre


def linear_gelu_backward(
    grad_y: Tensor,
    pre: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tanh: bool,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, of those that are wanted."""
    dtype, wide = pre.dtype, wider(pre.dtype)
    narrow, of_x = weight.to(dtype), x.to(dtype)
    grad_x = x.new_empty(x.shape) if wants[0] else None
    sums = _Sums(2)
    narrow_grads = torch.empty_like(pre) if wants[1] and dtype != wide else None
    for part in _blocks(x, max(weight.shape)):
        grad = _gelu_slope(grad_y[part].to(wide), pre[part].to(wide), tanh)
        if wants[2]:
            sums.add(1, grad.sum(0))
        if narrow_grads is not None:
            grad = narrow_grads[part].copy_(grad)
        elif wants[1]:
            sums.add_product(0, grad, of_x[part])
        if grad_x is not None:
            _product(grad.to(dtype), narrow, grad_x[part])
    if narrow_grads is None:
        grad_weight = sums.result(0, weight, wants[1])
    else:
        grad_weight = weight_product(narrow_grads, of_x, weight.dtype)
    return grad_x, grad_weight, sums.result(1, bias, wants[2])


def norm_gelu_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    normalise: bool,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    keep: bool,
    upsample: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``residual + linear(gelu(layer_norm(x)))``, statistics, and the GELU's output if kept.

    With ``upsample`` beyond 1 in shuffled place, row of a grid by row; there is no residual then.
    """
    rows, channels = x.shape
    norm = _Norm(x, norm_weight, norm_bias, normalise, eps)
    narrow, narrow_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    y = _Rows(x, rows, weight.shape[0], out_dtype)
    mean, rstd = (_Rows(x, rows if normalise else 0, 1, norm.wide) for _ in range(2))
    kept = _Rows(x, rows if keep else 0, channels, dtype)
    if upsample > 1:
        cells = upsample**2
        y = _Rows(x, rows * cells, weight.shape[0] // cells, out_dtype)
        runs = runs_of(y.result(), upsample, width)
    for part in _blocks(x, max(weight.shape), width):
        h, m, r = norm(x[part])
        if normalise:
            mean.put(part, m)
            rstd.put(part, r)
        h = _gelu(h, tanh).to(dtype)
        if keep:
            kept.put(part, h)
        if residual is None and upsample == 1 and part.stop - part.start < rows:
            _linear_into(y[part], h, narrow, narrow_bias)
            continue
        product = F.linear(h, narrow, narrow_bias)
        if upsample > 1:
            place = runs[part.start // width : part.stop // width]
            place.copy_(product.view(place.shape))
        else:
            y.put(part, product if residual is None else torch.add(product, residual[part]))
    return y.result(), mean.result()[:, 0], rstd.result()[:, 0], kept.result()


def norm_gelu_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    kept: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    skip: bool,
    normalise: bool,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
    upsample: int,
    width: int,
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, norm_weight, norm_bias, weight and bias, of those that are wanted.

    With ``skip``, x was the residual too, and its gradient has both shares.
    """
    norm = _Norm(x, norm_weight, norm_bias, normalise, eps)
    narrow = weight.to(dtype)
    grad_x = _Rows(x, *x.shape, x.dtype)
    sums = _Sums(3)
    again = wants[3] and not len(kept)
    # Products of half precision are rounded: there must be one, not a sum of them.
    whole = wants[3] and dtype != wider(dtype)
    acts = x.new_empty(x.shape, dtype=dtype) if again and whole else kept
    if upsample > 1:
        runs = runs_of(grad_y, upsample, width)
        grad_y = runs.reshape(x.shape[0], weight.shape[0]) if whole else grad_y
    for part in _blocks(x, max(weight.shape), width):
        block = x[part]
        grad = grad_y[part]
        if upsample > 1 and not whole:
            grad = runs[part.start // width : part.stop // width].reshape(-1, weight.shape[0])
        grad = grad.to(dtype)
        h, _, _ = norm(block)
        if again and whole:
            acts[part] = _gelu(h, tanh)
        elif wants[3] and not whole:
            sums.add_product(2, grad, _gelu(h, tanh).to(dtype) if again else kept[part])
        if not any(wants[:3]):
            continue
        grad = _gelu_slope((grad @ narrow).to(norm.wide), h, tanh)
        if normalise:
            grad, gw, gb = norm.backward(grad, block, mean[part], rstd[part], wants)
            sums.add(0, gw)
            sums.add(1, gb)
        if wants[0]:
            grad_x.put(part, grad.add_(grad_y[part]) if skip else grad)
    if whole:
        grad_weight = weight_product(grad_y.to(dtype), acts, weight.dtype)
    else:
        grad_weight = sums.result(2, weight, wants[3])
    grad_bias = None
    if bias is not None and wants[4]:
        each = (runs, (0, 1)) if upsample > 1 else (grad_y, 0)
        grad_bias = torch.sum(*each, dtype=wider(grad_y.dtype)).flatten().to(bias.dtype)
    norms = sums.result(0, norm_weight, wants[1]), sums.result(1, norm_bias, wants[2])
    return grad_x.result() if wants[0] else None, *norms, grad_weight, grad_bias


def joined(x: Tensor, layers: int) -> bool:
    """Whether the layers of one x are one GEMM, whose outputs then stand side by side.

    On a CPU that costs a copy of the weights, and what follows reads rows apart: no gain.
    """
    return x.is_cuda and layers > 1


def shared_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """Several linear layers of one x: an output for each, or one of all channels if ``joined``."""
    if not joined(x, len(weights)):
        return [linear(x, w, b, dtype) for w, b in zip(weights, biases, strict=True)]
    weight = torch.cat([w.to(dtype) for w in weights])
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat(
            [
                w.new_zeros(len(w), dtype=dtype) if b is None else b.to(dtype)
                for w, b in zip(weights, biases, strict=True)
            ]
        )
    return [F.linear(x.to(dtype), weight, bias)]


def shared_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    wants: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of x, of the weights and of the biases, of those that are wanted."""
    count = len(weights)
    of_x, wide = x.to(dtype), wider(dtype)
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None] * count
    grad_biases: list[Tensor | None] = [None] * count
    for i, (grad, weight, bias) in enumerate(zip(grads, weights, biases, strict=True)):
        grad = grad.to(dtype)
        if wants[0]:
            narrow = weight.to(dtype)
            grad_x = grad @ narrow if grad_x is None else grad_x.addmm_(grad, narrow)
        if wants[1 + i]:
            grad_weights[i] = weight_product(grad, of_x, weight.dtype)
        if bias is not None and wants[1 + count + i]:
            grad_biases[i] = grad.sum(0, dtype=wide).to(bias.dtype)
    return None if grad_x is None else grad_x.to(x.dtype), grad_weights, grad_biases


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A linear layer in a dtype."""
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, rounded once more if out has another dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
