"""Whether autocast is on, asked in a way that every supported torch.compile can trace."""

from __future__ import annotations

import torch

# Asked at import: tensors on "meta" (and other devices without autocast) may still be passed.
_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)
)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; False for one that has none, such as "meta"."""
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)
