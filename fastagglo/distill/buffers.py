"""Modules whose running statistics keep their precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class PreciseBuffers(nn.Module):
    """A module whose buffers move with ``.to(device)`` and never change their dtype.

    ``model.to(torch.bfloat16)`` would otherwise round running statistics to 8 bits, after which a
    slow average stands still.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreciseBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(device=new.device)
        return self
