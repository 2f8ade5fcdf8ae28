"""Autocast, asked about on any device."""

from __future__ import annotations

import torch


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; never on one that has none, such as "meta"."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
