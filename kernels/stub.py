"""A Triton driver that compiles each launch for a named GPU and launches nothing.

    with stub_device("sm_90") as launches:
        matmul[(8,)](a, b, c, 1024, BLOCK=64, num_warps=4)  # tensors of the CPU, or of "meta"

The real launcher specialises and compiles the kernel, so that what is recorded is what a GPU of
that generation would run. Works with Triton 3.6 to 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from fastagglo.kernels.chips import Chip, chip


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled.

    Attributes:
        kernel: name of the compiled function.
        arch: e.g. ``"sm_90"``.
        grid: programs in x, y and z.
        warps, stages, ctas: ``num_warps`` (with those of warp specialisation), ``num_stages`` and
            ``num_ctas``.
        shared: bytes of shared memory per CTA.
        tmem: columns of tensor memory per CTA.
        constants: the constexpr arguments, and others that the launcher specialised to a constant.
        signature: argument name -> Triton type.
        cubin: the binary.
        ttgir: Triton's GPU dialect, the last stage before LLVM; empty where Triton's cache keeps
            binaries only.
    """

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    warps: int
    stages: int
    ctas: int
    shared: int
    tmem: int
    constants: dict[str, Any]
    signature: dict[str, Any]
    cubin: bytes = field(repr=False)
    ttgir: str = field(repr=False)


@contextmanager
def stub_device(arch: str) -> Iterator[list[Launch]]:
    """Within the context every Triton launch is compiled for ``arch``, recorded, and not run.

    Tensors may be on the CPU or on "meta" (shapes of any size, no memory); outputs keep what they
    held. Shared memory is not limited, so that a kernel that would not fit is compiled and can be
    looked at. An autotuned kernel yields one launch per configuration, and one more for the
    configuration that is taken, which says nothing here. The driver is Triton's own global one: do
    not launch on a real GPU from another thread meanwhile.

    Args:
        arch: one of `chips.CHIPS`, e.g. ``"sm_90"``.

    Yields:
        The launches so far, in order. The former driver is back after the context, in every case.

    Raises:
        ValueError: the architecture is not known.
        RuntimeError: ``TRITON_INTERPRET`` is set, where nothing is compiled.
    """
    driver = _StubDriver(chip(arch))
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so that Triton compiles nothing: unset it")
    config = triton.runtime.driver
    former = config._active  # None where no driver was asked for yet; `.active` would create one
    config.set_active(driver)
    try:
        yield driver.launches
    finally:
        config.set_active(former)


class _StubUtils:
    def __init__(self, sm: Chip) -> None:
        self._sm = sm

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {
            "max_shared_mem": 1 << 30,
            "max_num_regs": self._sm.registers,
            "multiprocessor_count": self._sm.sms,
            "warpSize": 32,
            "sm_clock_rate": 1_500_000,
            "mem_clock_rate": 2_000_000,
            "mem_bus_width": 4096,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: object) -> tuple:
        # Module, function, registers, spills, threads at most. The module stays None: Triton then
        # has nothing to unload, whichever driver is active when it drops the kernel.
        return None, cubin, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing was loaded."""


class _StubDriver(DriverBase):
    def __init__(self, sm: Chip) -> None:
        super().__init__()
        self.sm = sm
        self.utils = _StubUtils(sm)
        self.launcher_cls = _StubLauncher
        self.launches: list[Launch] = []

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm.capability, 32)

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels per device: a name of its own for each architecture, which
        # no real device can have.
        return f"stub:{self.sm.arch}"

    def set_current_device(self, device: object) -> None:
        """There is only one."""

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        def once(call: Callable[[], object], **options: Any) -> list[float]:
            call()
            return [1.0] * len(options.get("quantiles") or (0.5,))

        return once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int32)

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()


class _StubLauncher:
    """What Triton calls instead of the CUDA launch; it belongs to one compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._metadata = metadata
        names = src.fn.arg_names
        self._constants = {_name(names, at): value for at, value in src.constants.items()}
        self._signature = dict(src.signature)
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json") or {}
        found = [path for name, path in group.items() if name.endswith(".ttgir")]
        self._ttgir = Path(found[0]).read_text() if found else ""

    def __call__(self, x: int, y: int, z: int, stream: int, cubin: bytes, *rest: Any) -> None:
        # A compiled kernel outlives the context; the driver of this launch is the active one.
        driver = triton.runtime.driver.active
        assert isinstance(driver, _StubDriver)
        driver.launches.append(
            Launch(
                kernel=self._metadata.name,
                arch=driver.sm.arch,
                grid=(x, y, z),
                warps=self._metadata.num_warps,
                stages=self._metadata.num_stages,
                ctas=self._metadata.num_ctas,
                shared=self._metadata.shared,
                tmem=getattr(self._metadata, "tmem_size", None) or 0,
                constants=self._constants,
                signature=self._signature,
                cubin=cubin,
                ttgir=self._ttgir,
            )
        )


def _name(names: Sequence[str], at: Any) -> str:
    """Of a constant argument: its path is (position,), or longer inside of a tuple."""
    if isinstance(at, str):
        return at
    position, *rest = at if isinstance(at, tuple) else (at,)
    return names[position] + "".join(f"[{index}]" for index in rest)
