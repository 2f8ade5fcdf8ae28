"""Public Triton attention kernels, each launched as its own launcher would, on a stub device."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from fastagglo.kernels import attention
from fastagglo.kernels.chips import chip
from fastagglo.kernels.stub import Launch
from fastagglo.ops import PackedLayout

ROWS, HEADS, DTYPE = 4096, 16, torch.bfloat16
NAMES = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H100", "sm_100": "NVIDIA B200"}

# Part of the computation -> the names of the constants that hold its tile: rows that stay, rows of
# a step of the loop.
Tiles = dict[str, tuple[str, str]]
FORWARD: Tiles = {"fwd": ("BLOCK_M", "BLOCK_N")}
BACKWARD: Tiles = {"dq": ("BLOCK_M2", "BLOCK_N2"), "dkv": ("BLOCK_N1", "BLOCK_M1")}


class Session:
    """Compiles the launches of one kernel after another for one architecture."""

    def __init__(self, arch: str, launches: list[Launch]) -> None:
        self.arch = arch
        self.launches = launches
        self.compiled: list[tuple[str, Tiles, dict[str, Any], Launch]] = []
        self.failed: list[tuple[str, Tiles, str]] = []

    def compile(
        self,
        name: str,
        tiles: Tiles,
        jit: triton.runtime.JITFunction,
        args: Sequence[Any],
        settings: dict[str, Any],
        constants: dict[str, Any] | None = None,
    ) -> None:
        before = len(self.launches)
        try:
            jit[(1,)](*args, **settings)
        except Exception as error:  # the compiler's and the peers' own errors are of many types
            self.failed.append((name, tiles, why(error)))
        for launch in self.launches[before:]:
            self.compiled.append((name, tiles, launch.constants | (constants or {}), launch))


class StandIn:
    """Takes a kernel's place in its module: a launch of it compiles every configuration."""

    def __init__(self, session: Session, kernel: Any, name: str, tiles: Tiles) -> None:
        self.session, self.name, self.tiles = session, name, tiles
        self.heuristics: dict[str, Callable[[dict[str, Any]], Any]] = {}
        configurations: list[dict[str, Any]] = []
        while not isinstance(kernel, triton.runtime.JITFunction):
            configurations += [config.all_kwargs() for config in getattr(kernel, "configs", ())]
            if isinstance(kernel, triton.runtime.autotuner.Heuristics):
                self.heuristics |= kernel.values
            kernel = kernel.fn
        self.jit = kernel
        self.configurations = configurations or [{}]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        seen = []
        for configuration in self.configurations:
            settings = kwargs | configuration
            named = dict(zip(self.jit.arg_names, args, strict=False)) | settings
            settings |= {name: rule(named) for name, rule in self.heuristics.items()}
            if settings not in seen:
                seen.append(settings)
                self.session.compile(self.name, self.tiles, self.jit, args, settings)


class _Ignored:
    """Takes the place of a kernel without a loop of products."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def why(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE)


def _module_file(package: str, path: str, **modules: types.ModuleType) -> types.ModuleType:
    """One file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(package)
    file = Path(spec.submodule_search_locations[0]) / path
    return execute(file, **modules)


def execute(file: Path, **modules: types.ModuleType) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    named = {name.replace("__", "."): value for name, value in modules.items()}
    with mock.patch.dict(sys.modules, named | {spec.name: module}):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def as_if_on(arch: str) -> Iterator[None]:
    """``torch.cuda`` answers as on a machine with one such GPU."""
    from torch._dynamo.device_interface import CudaInterface

    sm = chip(arch)
    capability = divmod(sm.capability, 10)
    properties = types.SimpleNamespace(
        name=NAMES[arch],
        major=capability[0],
        minor=capability[1],
        multi_processor_count=sm.sms,
        total_memory=80 << 30,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=sm.shared_cta,
        shared_memory_per_multiprocessor=sm.shared_sm,
        regs_per_multiprocessor=sm.registers,
        max_threads_per_multi_processor=sm.threads,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=50 << 20,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAMES[arch],
        "get_device_capability": capability,
        "get_device_properties": properties,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
    }

    def answering(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    with contextlib.ExitStack() as patches:
        for name, value in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answering(value)))
            for holder in (CudaInterface, CudaInterface.Worker):
                if name in vars(holder):
                    method = staticmethod(answering(value))
                    patches.enter_context(mock.patch.object(holder, name, method))
        patches.enter_context(mock.patch.object(torch.cuda, "device", contextlib.nullcontext))
        patches.callback(_forget_whether_triton_works)
        _forget_whether_triton_works()
        yield


def _forget_whether_triton_works() -> None:
    for function in vars(importlib.import_module("torch.utils._triton")).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


# --- the peers: each launches what its own launcher would, for one head dim -----------------------


def ours(session: Session, dim: int) -> None:
    layout = PackedLayout.from_lengths([ROWS])
    q, k, v = empty(ROWS, 3, HEADS, dim).unbind(1)
    tile = ("ROWS", "COLUMNS")
    with (
        _replaced(session, attention, "forward_kernel", "forward", {"fwd": tile}),
        _replaced(session, attention, "dq_kernel", "dq", {"dq": tile}),
        _replaced(session, attention, "dkv_kernel", "dkv", {"dkv": tile}),
    ):
        work = (layout.tiles, layout.tile_rows)
        out, lse = attention.forward(q, k, v, None, *work, dim**-0.5)
        attention.backward(
            torch.empty_like(out), q, k, v, None, *work, out, lse, dim**-0.5, fused=True
        )


def _replaced(session: Session, module: Any, kernel: str, name: str, tiles: Tiles) -> Any:
    stand_in = StandIn(session, getattr(module, kernel), name, tiles)
    return mock.patch.object(module, kernel, stand_in)


def fla(session: Session, dim: int) -> None:
    from fla.ops.attn import parallel
    from fla.utils.hardware import Backend

    def shared_memory(arch: str = "none", index: int | None = 0) -> bool:
        # Its own asks the driver about the tensor's device, which a CPU tensor does not have.
        return chip(session.arch).shared_cta >= Backend.get_shared_memory(arch)

    name, tile = "parallel_attn (causal)", ("BT", "BS")
    q, k, v, grad = (empty(1, ROWS, HEADS, dim) for _ in range(4))
    with (
        mock.patch.object(parallel, "check_shared_mem", shared_memory),
        mock.patch.object(parallel, "parallel_attn_bwd_kernel_preprocess", _Ignored()),
        _replaced(session, parallel, "parallel_attn_fwd_kernel", name, {"fwd": tile}),
        _replaced(session, parallel, "parallel_attn_bwd_kernel_dq", name, {"dq": tile}),
        _replaced(session, parallel, "parallel_attn_bwd_kernel_dkv", name, {"dkv": tile}),
    ):
        out, lse = parallel.parallel_attn_fwd(q, k, v, None, None, dim**-0.5)
        parallel.parallel_attn_bwd(q, k, v, out, None, lse, grad, scale=dim**-0.5)


def flag_gems(session: Session, dim: int) -> None:
    with mock.patch.dict("os.environ", GEMS_VENDOR="nvidia"):
        import flag_gems
        from flag_gems.ops import attention as sdpa
        from flag_gems.ops import flash_api

    dense, varlen = "flash_attention_forward", "flash_attn_varlen_func"
    name, backward = "scaled_dot_product_attention", "sdpa backward (causal)"
    with (
        mock.patch.object(flag_gems, "device", "cpu"),  # what it asserts of its arguments
        mock.patch.object(sdpa, "_attn_bwd_preprocess", _Ignored()),
        _replaced(session, flash_api, "flash_fwd_kernel", dense, FORWARD),
        _replaced(session, flash_api, "flash_varlen_fwd_kernel", varlen, FORWARD),
        _replaced(session, sdpa, "_attn_fwd", name, FORWARD),
        _replaced(session, sdpa, "_attn_bwd", backward, BACKWARD),
    ):
        q, k, v = (empty(ROWS, HEADS, dim) for _ in range(3))
        ends = torch.tensor([0, ROWS], dtype=torch.int32)
        sdpa.flash_attn_varlen_func(q, k, v, ROWS, ends, ROWS, cu_seqlens_k=ends)
        q, k, v = (empty(1, ROWS, HEADS, dim) for _ in range(3))
        sdpa.flash_attention_forward(
            q, k, v, None, None, ROWS, ROWS, 0.0, False, False, disable_splitkv=True
        )
        q, k, v, grad = (empty(1, HEADS, ROWS, dim) for _ in range(4))
        try:
            out, lse = sdpa.scaled_dot_product_attention_forward(q, k, v)
        except AssertionError:
            session.failed.append((name, FORWARD, f"rejects a head dim of {dim}"))
            session.failed.append((backward, BACKWARD, f"rejects a head dim of {dim}"))
        else:
            sdpa.scaled_dot_product_attention_backward(grad, q, k, v, out, lse, is_causal=True)


def xformers(session: Session, dim: int) -> None:
    from xformers.ops import fmha
    from xformers.ops.fmha import triton_splitk

    operator = triton_splitk.FwOp
    name = "triton_splitk"
    if reasons := operator.shape_not_supported_reasons(ROWS, ROWS, dim, dim):
        session.failed.append((name, FORWARD, "; ".join(reasons)))
        return
    kernel = StandIn(session, operator.get_kernel(), name, FORWARD)
    q, k, v = (empty(1, ROWS, HEADS, dim) for _ in range(3))
    with (
        mock.patch.object(operator, "get_kernel", return_value=kernel),
        mock.patch.object(triton_splitk, "merge_attentions"),
        mock.patch.object(triton_splitk, "_splitK_reduce", _Ignored()),
    ):
        operator.apply(fmha.Inputs(q, k, v), needs_gradient=False)


def sglang(session: Session, dim: int) -> None:
    utils = types.ModuleType("sglang.srt.utils")
    utils.is_cuda = lambda: True  # type: ignore[attr-defined]
    utils.is_hip = lambda: False  # type: ignore[attr-defined]
    prefill = _module_file(
        "sglang",
        "kernels/ops/attention/prefill_attention.py",
        sglang=types.ModuleType("sglang"),
        sglang__srt=types.ModuleType("sglang.srt"),
        sglang__srt__utils=utils,
    )
    q, k, v, out = (empty(ROWS, HEADS, dim) for _ in range(4))
    starts = torch.tensor([0], dtype=torch.int32)
    lengths = torch.tensor([ROWS], dtype=torch.int32)
    with _replaced(session, prefill, "_fwd_kernel", "context_attention_fwd", FORWARD):
        prefill.context_attention_fwd(q, k, v, out, starts, lengths, ROWS, is_causal=False)
