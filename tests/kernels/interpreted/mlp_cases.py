"""What the tests of the adaptor heads' kernels share: inputs amid NaN, and a budget for errors."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastagglo.ops.backend import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
NAN = float("nan")

Results = dict[str, Tensor]


def randn(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The same numbers in every dtype but for rounding."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype).to(DEVICE)


def amid_nan(x: Tensor, columns: int = 8) -> Tensor:
    """A view equal to x (M, K) of memory that holds NaN otherwise: rows, and columns on the right.

    With 8 columns, rows begin at 16 bytes as before; with others they do not.
    """
    memory = x.new_full((x.shape[0] + 2, x.shape[1] + columns), NAN)
    view = memory[1:-1, : x.shape[1]]
    view.copy_(x)
    return view


def at_the_end_of_memory(x: Tensor) -> Tensor:
    """A copy of x behind whose last number the process may not read: it would die of it.

    For the interpreter, which reads what it is told to; on a GPU just x.
    """
    if x.is_cuda or not x.numel():
        return x
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size)
    end = ctypes.c_void_p(copy.data_ptr() + size)
    no_access = 0  # PROT_NONE
    if ctypes.CDLL(None, use_errno=True).mprotect(end, mmap.PAGESIZE, no_access):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    copy.copy_(x.reshape(-1))
    return copy.view(x.shape)


def assert_within_budget(
    found: Results, twin: Callable[..., Results], inputs: Mapping[str, Tensor | None]
) -> None:
    """As exact as twice the error of plain PyTorch in the same dtype, against fp64.

    Where PyTorch happens to be exact, which it may be for a few numbers, another four roundings of
    the largest value to fp32 are allowed.

    Args:
        found: of the kernel, by name.
        twin: the same in PyTorch, from ``inputs``; a name that it lacks is not compared.
        inputs: in the dtype of the test.
    """
    wide = {name: None if x is None else x.double() for name, x in inputs.items()}
    truth, plain = twin(**wide), twin(**inputs)
    for name, expected in truth.items():
        actual = found[name].double()
        assert actual.shape == expected.shape, name
        assert actual.isfinite().all(), f"{name} has {(~actual.isfinite()).sum()} that are none"
        if not actual.numel():
            continue
        for kind, norm in (("largest", _largest), ("mean square", _mean_square)):
            error, allowed = norm(actual - expected), 2 * norm(plain[name].double() - expected)
            allowed += 2.0**-22 * norm(expected)
            assert error <= allowed, f"{kind} error of {name}: {error:.3g}, allowed {allowed:.3g}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_same(found: Results, expected: Results) -> None:
    """Equal to the last bit."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), f"{name} differs"
