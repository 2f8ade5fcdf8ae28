"""Tensors larger than memory, for tests of addresses."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor


def untouched(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """A tensor that may be larger than memory: only the pages that someone touches exist.

    A GPU has no such pages: a test whose tensor does not fit is skipped there.
    """
    size = math.prod(shape) * dtype.itemsize
    if device == "cuda":
        if size > torch.cuda.mem_get_info()[0] * 0.9:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of GPU memory")
        return torch.empty(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, flags=flags)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
