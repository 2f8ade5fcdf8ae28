"""What the device can do, measured in the run whose figures are held against it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bench.measure import finish

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes, beyond any cache
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices
QUICK = {"copied": 1 << 22, "side": 256}
TRIES, WARM = 12, 3


def measure(device: str, quick: bool = False) -> dict[str, Any]:
    """The roofs of a device.

    Args:
        device: "cpu" or "cuda".
        quick: small sizes, which say nothing about the device.

    Returns:
        ``copy_gb_s``: GB read and written per second by a plain copy. ``matmul_tflops``: of a
        square product, by the type of its operands; "tf32" is float32 with rounded operands. The
        fastest of some tries each.
    """
    side = QUICK["side"] if quick else SIDE[device]
    kinds = ("float32",) if device == "cpu" else ("float32", "tf32", "bfloat16")
    return {
        "copy_gb_s": copy_bandwidth(device, QUICK["copied"] if quick else COPIED[device]) / 1e9,
        "matmul_tflops": {kind: matmul_rate(device, kind, side) / 1e12 for kind in kinds},
    }


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes per second, read and written ones, of a copy of so many bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    into = torch.zeros_like(source)
    return 2 * size / _fastest(lambda: into.copy_(source), device)


def matmul_rate(device: str, kind: str, side: int) -> float:
    """FLOP per second of a product of two square matrices; "tf32" is a kind of float32."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    made = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=made, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with _tf32(kind == "tf32") if device == "cuda" else nullcontext():
        return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device)


def roofs(
    facts: Mapping[str, Any], roofline: Mapping[str, Any], device: str
) -> tuple[float, str] | None:
    """The seconds that nobody can do without, and which roof they are of.

    Args:
        facts: of a case; ``flops`` and ``bytes`` count, and ``dtype`` says whose peak: by default
            float32 on a CPU and bfloat16 elsewhere.
        roofline: of :func:`measure`.
        device: "cpu" or "cuda".

    Returns:
        None where the facts have neither, or the type's peak was not measured.
    """
    peak = roofline["matmul_tflops"].get(facts.get("dtype") or default_dtype(device))
    limits = []
    if "bytes" in facts:
        limits.append((facts["bytes"] / roofline["copy_gb_s"] / 1e9, "memory"))
    if "flops" in facts and peak:
        limits.append((facts["flops"] / peak / 1e12, "compute"))
    return max(limits, default=None)


def default_dtype(device: str) -> str:
    """What the suites compute in."""
    return "float32" if device == "cpu" else "bfloat16"


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fastest(call: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(WARM + TRIES):
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[WARM:])
