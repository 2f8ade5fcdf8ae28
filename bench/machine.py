"""The machine under the figures: device, driver, clocks, versions, threads, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# What runs, and every package that takes part as a peer.
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pytest-benchmark",
    "xformers",
    "flag-gems",
    "fla-core",
    "liger-kernel",
    "quack-kernels",
    "sglang",
    "flash-attn",
    "tomesd",
    "timm",
    "kornia",
    "torchvision",
    "pillow",
    "webdataset",
    "open_clip_torch",
    "transformers",
    "torchao",
)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fix_threads() -> int:
    """Fix PyTorch's threads, before it is imported: ``OMP_NUM_THREADS``, or one for each core."""
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(cores())))
    # Threads that spin at a barrier lose whole time slices to any other busy process (LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler is used for memory; it chatters
    import torch

    torch.set_num_threads(threads)
    return threads


def describe(processor: str, commit: str) -> dict[str, Any]:
    """What a reader needs to know to believe the figures; no host name and no paths.

    Args:
        processor: the CPU in words.
        commit: of the code that ran.
    """
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "device": "CPU",
        "cpu": processor or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if clock := cpu_clock():
        found["cpu_clock_mhz"] = clock
    found["versions"] = versions()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        found |= driver_and_clocks()
    return found


def versions() -> dict[str, str | None]:
    """Of all packages that matter, None where one is not installed."""
    import torch

    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {"torch": torch.__version__}  # with the CUDA that it was built for


def cpu_clock() -> int | None:
    """The median of the cores' clocks at this moment in MHz; None where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    clocks = sorted(float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz"))
    return round(clocks[len(clocks) // 2]) if clocks else None


def driver_and_clocks() -> dict[str, Any]:
    """From NVML, of the first device that PyTorch sees; says so where NVML cannot be asked."""
    try:
        import pynvml
    except ImportError:
        return {"driver": None, "nvml": "nvidia-ml-py is not installed"}
    import torch

    try:
        pynvml.nvmlInit()
        try:
            # By UUID: CUDA_VISIBLE_DEVICES may number the devices anew.
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            sm, memory = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
            return {
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(device, sm),
                "sm_clock_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(device, sm),
                "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(device, memory),
                "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(device) // 1000,
                "temperature_c": pynvml.nvmlDeviceGetTemperature(
                    device, pynvml.NVML_TEMPERATURE_GPU
                ),
            }
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"driver": None, "nvml": f"NVML: {error}"}


def commit(root: Path) -> str:
    """The short commit, with "+" where tracked files of the code differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
