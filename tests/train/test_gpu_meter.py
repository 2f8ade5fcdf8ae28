"""Readings of the GPU. There is no driver here, so the functions of NVML's module are stood in
for, no more of it: its names and constants are checked against the real package."""

from __future__ import annotations

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastagglo.train.gpu_meter import _REASONS, GpuMeter
from fastagglo.train.telemetry import Telemetry

CUDA = torch.device("cuda", 0)


class Nvml(ModuleType):
    """The functions of pynvml that the meter calls, of a GPU whose readings the test sets."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.joules, self.reasons, self.open, self.lacks = 1000.0, 0, 0, ()

    def _given(self, name, value):
        if name in self.lacks:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self):
        self._given("init", None)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        return self._given("energy", int(self.joules * 1000))

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._given("power", 400_000)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return self._given("rates", SimpleNamespace(gpu=97, memory=41))

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._given("temperature", 66)

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return self._given("clocks", {1: 1755, 2: 2619}[clock])

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._given("reasons", self.reasons)


@pytest.fixture
def nvml(monkeypatch):
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return module


def test_the_names_are_those_of_the_package():
    pynvml = pytest.importorskip("pynvml")
    for name in (n for n in vars(Nvml) if n.lower().startswith("nvml")):
        assert hasattr(pynvml, name), name
    for name in ("NVML_TEMPERATURE_GPU", "NVML_CLOCK_SM", "NVML_CLOCK_MEM"):
        assert getattr(pynvml, name) == getattr(Nvml, name)
    for bit in _REASONS:
        names = [n for n in vars(pynvml) if n.startswith("nvmlClocksThrottleReason")]
        assert bit in [getattr(pynvml, n) for n in names if isinstance(getattr(pynvml, n), int)]


def test_a_cpu_has_no_readings():
    meter = GpuMeter(torch.device("cpu"))
    assert meter.problem is None
    meter.restart()
    assert meter.read(10) == {}
    meter.close()


def test_energy_is_that_of_the_interval(nvml, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = GpuMeter(CUDA)
    nvml.joules += 1200
    clock[0] += 2.0
    nvml.reasons = 0x4 | 0x20 | 0x1  # the last one means idle, which holds nothing back
    assert meter.read(images=600) == {
        "power_w": 600.0,
        "joules_per_image": 2.0,
        "utilisation": 0.97,
        "memory_utilisation": 0.41,
        "temperature_c": 66,
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "throttled": ["power cap", "thermal"],
    }
    clock[0] += 1.0
    nvml.reasons = 0
    found = meter.read(images=0)  # nothing was used since, and nothing trained
    assert found["power_w"] == 0
    assert "joules_per_image" not in found
    assert found["throttled"] == []
    meter.close()
    assert nvml.open == 0
    assert meter.read(1) == {}


def test_evaluations_belong_to_no_interval(nvml, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = GpuMeter(CUDA)
    with meter.paused():
        nvml.joules += 5000
        clock[0] += 60.0
    nvml.joules += 1200
    clock[0] += 2.0
    found = meter.read(images=600)
    assert (found["power_w"], found["joules_per_image"]) == (600.0, 2.0)


def test_what_a_gpu_does_not_support_is_left_out(nvml, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    nvml.lacks = ("energy", "rates", "temperature", "clocks", "reasons")
    meter = GpuMeter(CUDA)
    clock[0] += 3.0
    assert meter.read(images=100) == {"power_w": 400.0, "joules_per_image": 12.0}
    nvml.lacks += ("power",)
    assert meter.read(images=100) == {}


def test_without_nvml_the_run_says_so_once(nvml, tmp_path, capsys):
    nvml.lacks = ("init",)
    with Telemetry(tmp_path, 2, [], tensorboard=False, interval=1, meter=GpuMeter(CUDA)) as run:
        for step in range(2):
            run.step(step, {}, images=1, tokens=1, lr=0.1)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["gpu_meter", "train", "train"]
    assert rows[0]["problem"] == "NVML: Not Supported"
    assert not any("gpu" in row for row in rows)
    assert "NVML: Not Supported" in capsys.readouterr().out


def test_without_the_package_the_run_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "fastagglo[gpu]" in GpuMeter(CUDA).problem


def test_rows_and_lines_have_the_readings(nvml, tmp_path, capsys):
    """Joules are of this rank's images: a half of them with two ranks."""
    with Telemetry(
        tmp_path, 2, [], tensorboard=False, interval=1, ranks=2, meter=GpuMeter(CUDA)
    ) as run:
        nvml.joules += 30
        nvml.reasons = 0x4
        run.step(0, {}, images=20, tokens=1, lr=0.1)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["gpu"]["joules_per_image"] == 3.0
    assert row["gpu"]["throttled"] == ["power cap"]
    line = capsys.readouterr().out
    for words in ("GPU 97% busy", "3 J/image", "1755 MHz", "throttled: power cap"):
        assert words in line
    assert nvml.open == 0
