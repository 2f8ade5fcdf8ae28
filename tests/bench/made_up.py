"""Raw results as pytest-benchmark and bench/conftest.py write them, made up with a fixed seed."""

from __future__ import annotations

from typing import Any

import numpy as np

PEERS = {
    "attention": {"per-image": "SDPA, looped per image", "padded": "SDPA, padded and masked"},
    "loss": {
        "matrix": "eager PHI-S, matrix in fp64",
        "eager": "eager without the matrix",
        "compile": "torch.compile without the matrix",
    },
    "merge": {"eager": "eager, as in the papers"},
    "heads": {"eager": "eager twin (nn.Sequential)", "compile": "torch.compile of it"},
    "student": {
        "per-image": "timm's ViT, image by image",
        "per-resolution": "timm's ViT, a batch per resolution",
        "padded": "timm's ViT, padded and masked",
    },
    "step": {"plain": "the plain trainer"},
    "data": {"torchvision": "torchvision, v2 transforms"},
    "teachers": {"one": "one teacher after the other"},
    "scaling": {"plain": "the plain trainer"},
}
RATIOS = (0.06, 0.7, 0.98, 1.6)  # of our times to the peers'


def raw(
    names: tuple[str, ...] = tuple(PEERS),
    *,
    cases: int = 3,
    rounds: int = 20,
    noise: float = 0.05,
    ours: float = 1.0,
    machine: float = 1.0,
    device: str = "CPU",
    seed: int = 0,
) -> dict[str, Any]:
    """All suites, each with some cases of every pass.

    Args:
        names: of suites.
        cases: of each.
        rounds: of each case.
        noise: of a round's time, standard deviation of its logarithm; half of it all peers share.
        ours: factor of our own times.
        machine: factor of all times.
        device: "CPU" or a GPU's name.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)

    def entry(suite: str, number: int) -> dict[str, Any]:
        passes = ("forward+backward", "forward")
        facts: dict[str, Any] = {
            "label": f"{suite} {number // 2}: 16x27x27x1024",
            "pass": passes[number % 2],
        }
        if suite != "data":
            facts |= {"flops": 10 ** (6 + len(suite) // 3) << number, "bytes": len(suite) * 10**7}
        if suite == "scaling":
            facts |= {"label": f"scaling {number}", "pass": "step"}
            facts |= {"series": "tokens of the step", "axis": "tokens", "x": 2**number}
        base = 0.01 * machine * 2**number
        common = rng.normal(0, noise, rounds)
        sizes = {"memory_bytes": 50_000_000, "input_bytes": 20_000_000, "repeats": 2}

        def seconds(factor: float) -> list[float]:
            own = rng.normal(0, noise, rounds)
            return list(2 * factor * base * np.exp((common + own) / 2**0.5))

        rows: dict[str, dict[str, Any]] = {"fastagglo": {**sizes, "saved_bytes": 10_000_000}}
        for place, peer in enumerate(PEERS[suite]):
            ratio = RATIOS[(place + number + len(suite)) % len(RATIOS)]
            rows[peer] = {**sizes, "memory_bytes": 150_000_000, "saved_bytes": 30_000_000}
            rows[peer]["seconds"] = seconds(1 / ratio)
        info = {"suite": suite, "case": f"{suite}-{number}", "facts": facts, "rows": rows}
        info["absent"] = {"liger": "liger-kernel is not installed: pip install liger-kernel"}
        return {"extra_info": info, "stats": {"data": seconds(ours)}}

    suites = {
        name: {
            "peers": {"fastagglo": "fastagglo", **PEERS[name], "liger": "Liger"},
            "rows": "made up",
            "notes": {"saved_bytes": "what autograd keeps"},
            "goals": [{"case": f"{name}-0", "peer": p, "time": 0.9} for p in PEERS[name]],
            "seconds": 30.0,
            "skipped": {},
            "failed": {},
        }
        for name in names
    }
    about: dict[str, Any] = {"device": device, "cpu": "AMD EPYC", "threads": 2, "commit": "abc1234"}
    about |= {"date": "2026-11-25 03:00 UTC", "versions": {"torch": "2.14.1", "timm": None}}
    peaks = {"float32": 0.21} if device == "CPU" else {"float32": 50.0, "bfloat16": 800.0}
    roofline = {"copy_gb_s": 33.0 if device == "CPU" else 3000.0, "matmul_tflops": peaks}
    return {
        "machine_info": {"bench": about},
        "bench": {"suites": suites, "roofline": roofline, "seconds": 333.0},
        "benchmarks": [entry(name, number) for name in names for number in range(cases)],
    }
