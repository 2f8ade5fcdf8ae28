"""The pictures of a result file: ratios to peers, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, Any], out: Path, device: str) -> list[Path]:
    """Nothing yet drawn of an empty run."""
    return []
