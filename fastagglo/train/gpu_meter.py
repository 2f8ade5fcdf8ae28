"""What NVML says of the GPU: how busy, how hot, how much energy, and what holds it back.

NVML is NVIDIA's management library; the package nvidia-ml-py (extra ``gpu``) calls it. Energy is a
counter of the driver's, so power and joules are means over the interval; the rest is what NVML
reports at its end. One reading costs some calls into the driver, once an interval.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["GpuMeter"]

# The bits of nvmlDeviceGetCurrentClocksEventReasons that are worth a word (nvml.h).
_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class GpuMeter:
    """Readings of the GPU that this process uses.

    Attributes:
        problem: why there are no readings, or None.

    Args:
        device: whose GPU; of any other device than CUDA nothing is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.problem: str | None = None
        self._handle: Any = None
        self._energy: int | None = None
        self._at = time.perf_counter()
        if device.type != "cuda":
            return
        try:
            self._nvml = importlib.import_module("pynvml")
        except ModuleNotFoundError:
            self.problem = 'no nvidia-ml-py: pip install "fastagglo[gpu]"'
            return
        try:
            self._nvml.nvmlInit()
            # By UUID: CUDA_VISIBLE_DEVICES may number the devices anew.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            self.problem = f"NVML: {error}"
            return
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._energy, self._at = self._total_energy(), time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside belongs to no interval."""
        energy, began = self._total_energy(), time.perf_counter()
        try:
            yield
        finally:
            after = self._total_energy()
            if self._energy is not None and energy is not None and after is not None:
                self._energy += after - energy
            self._at += time.perf_counter() - began

    def read(self, images: float) -> dict[str, Any]:
        """What the interval so far has cost, and begin another; empty where there is no GPU.

        Args:
            images: that this GPU has trained on since the last reading.

        Returns:
            Of these what the GPU supports: ``utilisation`` and ``memory_utilisation`` (shares of
            NVML's own last sample, at most a second), ``power_w``, ``joules_per_image``,
            ``temperature_c``, ``sm_clock_mhz``, ``memory_clock_mhz``, ``throttled`` (a list of
            reasons, empty if none).
        """
        if self._handle is None:
            return {}
        nvml, device, found = self._nvml, self._handle, {}
        before, began = self._energy, self._at
        self.restart()
        seconds = self._at - began
        if before is not None and self._energy is not None and seconds > 0:
            joules = (self._energy - before) / 1000
            found["power_w"] = joules / seconds
            if images > 0:
                found["joules_per_image"] = joules / images
        else:  # GPUs before Volta have no counter of energy
            with suppress(nvml.NVMLError):
                found["power_w"] = nvml.nvmlDeviceGetPowerUsage(device) / 1000
                if images > 0:
                    found["joules_per_image"] = found["power_w"] * seconds / images
        with suppress(nvml.NVMLError):
            rates = nvml.nvmlDeviceGetUtilizationRates(device)
            found["utilisation"], found["memory_utilisation"] = rates.gpu / 100, rates.memory / 100
        with suppress(nvml.NVMLError):
            found["temperature_c"] = nvml.nvmlDeviceGetTemperature(
                device, nvml.NVML_TEMPERATURE_GPU
            )
        for name, clock in (
            ("sm_clock_mhz", nvml.NVML_CLOCK_SM),
            ("memory_clock_mhz", nvml.NVML_CLOCK_MEM),
        ):
            with suppress(nvml.NVMLError):
                found[name] = nvml.nvmlDeviceGetClockInfo(device, clock)
        with suppress(nvml.NVMLError):
            bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)
            found["throttled"] = [name for bit, name in _REASONS.items() if bits & bit]
        return found

    def close(self) -> None:
        """Let go of NVML."""
        if self._handle is not None:
            self._handle = None
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _total_energy(self) -> int | None:
        """Millijoules since the driver was loaded; None where the GPU does not count them."""
        if self._handle is None:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            return None
