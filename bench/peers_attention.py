"""Public Triton attention kernels through the same gate as ours: compiled for a named NVIDIA GPU on
a machine without one, and compared by what their machine code issues per tensor-core FLOP.

    python -m bench.peers_attention --arch sm_90 --heads 64,72,80,128 --json peers_sm90.json

The peers go into an environment of their own, since some pin other versions of our dependencies:

    python -m venv peers && . peers/bin/activate
    pip install -c constraints.txt torch numpy && pip install --no-deps -e .
    pip install einops pyyaml packaging sqlalchemy
    pip install --no-deps flag-gems==5.0.2 fla-core==0.6.0 xformers==0.0.35 sglang==0.5.23

A peer that is not installed is skipped. FlexAttention comes with torch: inductor writes its kernels
from traced graphs, here as if a GPU were there.

What is compared. Dense bf16, one sequence of 4096 rows, 16 heads, no mask; where a peer's kernel is
causal only, its unmasked loop. Each peer's own launcher makes the launch. Only the kernel object in
its module is replaced, by one that compiles the launch in every configuration that the peer's
autotuner would time, if it has one; shown is the one that fits the chip and issues least, loop by
loop. So a peer may look better here than its autotuner would leave it, but not worse. A low count
is no speed: a loop that waits for its loads (one stage) counts few instructions too.

Columns. FLOP: tensor-core FLOPs issued per useful one (2 per product, logit and head dim, without
padding). Non-tensor/MFLOP: other instructions, summed over warps, per million tensor-core FLOPs
issued. /useful: the same per million useful FLOPs. A head of 72 padded to 128 has 1.8 times the
FLOPs for the same softmax, which makes the first figure better and the kernel slower: for odd head
dims go by the second. Bound: see `fastagglo.kernels.analysis`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import json
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from fastagglo.kernels import attention
from fastagglo.kernels.analysis import Loop, Report, analyse
from fastagglo.kernels.chips import chip
from fastagglo.kernels.stub import Launch, stub_device
from fastagglo.ops import PackedLayout

ROWS, HEADS, DTYPE = 4096, 16, torch.bfloat16
OURS = "fastagglo"
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products per logit
NAMES = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H100", "sm_100": "NVIDIA B200"}

# Part of the computation -> the names of the constants that hold its tile: rows that stay, rows of
# a step of the loop.
Tiles = dict[str, tuple[str, str]]
FORWARD: Tiles = {"fwd": ("BLOCK_M", "BLOCK_N")}
BACKWARD: Tiles = {"dq": ("BLOCK_M2", "BLOCK_N2"), "dkv": ("BLOCK_N1", "BLOCK_M1")}


@dataclass(frozen=True)
class Row:
    """One line of the table; figures are None where ``note`` says why there are none."""

    peer: str
    version: str
    kernel: str
    part: str
    head_dim: int
    note: str = ""
    configurations: int = 0
    tile: tuple[int, int] | None = None
    warps: int | None = None
    stages: int | None = None
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    flops_per_useful: float | None = None
    non_tensor_per_mflop: float | None = None
    non_tensor_per_useful_mflop: float | None = None
    bound: float | None = None


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
            self.failed.append((name, tiles, _why(error)))
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


def _why(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE)


def _module_file(package: str, path: str, **modules: types.ModuleType) -> types.ModuleType:
    """One file of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(package)
    file = Path(spec.submodule_search_locations[0]) / path
    return _execute(file, **modules)


def _execute(file: Path, **modules: types.ModuleType) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    named = {name.replace("__", "."): value for name, value in modules.items()}
    with mock.patch.dict(sys.modules, named | {spec.name: module}):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _as_if_on(arch: str) -> Iterator[None]:
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


def _ours(session: Session, dim: int) -> None:
    layout = PackedLayout.from_lengths([ROWS])
    q, k, v = _empty(ROWS, 3, HEADS, dim).unbind(1)
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


def _fla(session: Session, dim: int) -> None:
    from fla.ops.attn import parallel
    from fla.utils.hardware import Backend

    def shared_memory(arch: str = "none", index: int | None = 0) -> bool:
        # Its own asks the driver about the tensor's device, which a CPU tensor does not have.
        return chip(session.arch).shared_cta >= Backend.get_shared_memory(arch)

    name, tile = "parallel_attn (causal)", ("BT", "BS")
    q, k, v, grad = (_empty(1, ROWS, HEADS, dim) for _ in range(4))
    with (
        mock.patch.object(parallel, "check_shared_mem", shared_memory),
        mock.patch.object(parallel, "parallel_attn_bwd_kernel_preprocess", _Ignored()),
        _replaced(session, parallel, "parallel_attn_fwd_kernel", name, {"fwd": tile}),
        _replaced(session, parallel, "parallel_attn_bwd_kernel_dq", name, {"dq": tile}),
        _replaced(session, parallel, "parallel_attn_bwd_kernel_dkv", name, {"dkv": tile}),
    ):
        out, lse = parallel.parallel_attn_fwd(q, k, v, None, None, dim**-0.5)
        parallel.parallel_attn_bwd(q, k, v, out, None, lse, grad, scale=dim**-0.5)


def _flag_gems(session: Session, dim: int) -> None:
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
        q, k, v = (_empty(ROWS, HEADS, dim) for _ in range(3))
        ends = torch.tensor([0, ROWS], dtype=torch.int32)
        sdpa.flash_attn_varlen_func(q, k, v, ROWS, ends, ROWS, cu_seqlens_k=ends)
        q, k, v = (_empty(1, ROWS, HEADS, dim) for _ in range(3))
        sdpa.flash_attention_forward(
            q, k, v, None, None, ROWS, ROWS, 0.0, False, False, disable_splitkv=True
        )
        q, k, v, grad = (_empty(1, HEADS, ROWS, dim) for _ in range(4))
        try:
            out, lse = sdpa.scaled_dot_product_attention_forward(q, k, v)
        except AssertionError:
            session.failed.append((name, FORWARD, f"rejects a head dim of {dim}"))
            session.failed.append((backward, BACKWARD, f"rejects a head dim of {dim}"))
        else:
            sdpa.scaled_dot_product_attention_backward(grad, q, k, v, out, lse, is_causal=True)


def _xformers(session: Session, dim: int) -> None:
    from xformers.ops import fmha
    from xformers.ops.fmha import triton_splitk

    operator = triton_splitk.FwOp
    name = "triton_splitk"
    if reasons := operator.shape_not_supported_reasons(ROWS, ROWS, dim, dim):
        session.failed.append((name, FORWARD, "; ".join(reasons)))
        return
    kernel = StandIn(session, operator.get_kernel(), name, FORWARD)
    q, k, v = (_empty(1, ROWS, HEADS, dim) for _ in range(3))
    with (
        mock.patch.object(operator, "get_kernel", return_value=kernel),
        mock.patch.object(triton_splitk, "merge_attentions"),
        mock.patch.object(triton_splitk, "_splitK_reduce", _Ignored()),
    ):
        operator.apply(fmha.Inputs(q, k, v), needs_gradient=False)


def _sglang(session: Session, dim: int) -> None:
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
    q, k, v, out = (_empty(ROWS, HEADS, dim) for _ in range(4))
    starts = torch.tensor([0], dtype=torch.int32)
    lengths = torch.tensor([ROWS], dtype=torch.int32)
    with _replaced(session, prefill, "_fwd_kernel", "context_attention_fwd", FORWARD):
        prefill.context_attention_fwd(q, k, v, out, starts, lengths, ROWS, is_causal=False)


# --- FlexAttention: trace on the CPU, lower as if on the GPU --------------------------------------


class _Traced(Exception):
    """Ends a compilation whose graphs are all that was wanted."""


def _flex(session: Session, dim: int) -> None:
    from torch._inductor import config
    from torch._inductor.virtualized import V

    parts = {"fwd": FORWARD, "bwd": BACKWARD}
    for name, document, tuned in (
        ("flex_attention", False, False),
        ("flex_attention, max-autotune", False, True),
        ("flex_attention, document mask", True, False),
    ):
        graphs = _flex_graphs(dim, document)
        with config.patch(max_autotune=tuned):
            choices = {
                "fwd": V.choices.get_flex_attention_fwd_configs(dim, ROWS, DTYPE, "cuda"),
                "bwd": V.choices.get_flex_attention_bwd_configs(dim, DTYPE, "cuda"),
            }
        for part, tiles in parts.items():
            names = ("num_warps", "num_stages", *(size for tile in tiles.values() for size in tile))
            for found in choices[part]:
                options = {option: getattr(found, option.lower()) for option in names}
                _compile_flex(session, name, tiles, *graphs[part], options)


def _flex_graphs(dim: int, document: bool) -> dict[str, tuple[torch.fx.GraphModule, list[Any]]]:
    """The forward and backward graphs of FlexAttention, traced on CPU tensors and not run."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config
    from torch._inductor.decomposition import select_decomp_table
    from torch.nn.attention import flex_attention as flex

    graphs = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs[name] = (graph, list(inputs))

            def run(*args: Any) -> None:
                raise _Traced

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiler

    q, k, v = (_empty(1, HEADS, ROWS, dim).requires_grad_() for _ in range(3))
    segment = torch.arange(ROWS) // (ROWS // 4)

    def same_segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segment[i] == segment[j]

    def accept(*tensors: Tensor) -> None:
        """Trace a backward on the CPU, which FlexAttention does not run there."""

    if document:
        mask = flex.create_block_mask(same_segment, None, None, ROWS, ROWS, device="cpu")
    else:
        mask = flex._create_empty_block_mask(q, k)
    backend = aot_autograd(
        fw_compiler=keep("fwd"), bw_compiler=keep("bwd"), decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    with (
        # Dynamo would ask for the streams and random states of the GPU that is not there.
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        config.patch(force_non_lazy_backward_lowering=True),
        mock.patch.object(flex, "_validate_device", accept),
        contextlib.suppress(_Traced),
    ):
        compiled = torch.compile(
            flex.flex_attention, fullgraph=True, dynamic=False, backend=backend
        )
        compiled(q, k, v, block_mask=mask)
    return graphs


def _compile_flex(
    session: Session,
    name: str,
    tiles: Tiles,
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    options: dict[str, Any],
) -> None:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.runtime import triton_heuristics
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    fake = FakeTensorMode()

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with fake:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    graph = copy.deepcopy(graph)
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            node.meta["val"] = moved(node.meta.get("val"))
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": torch.device("cuda")}
            if "flex_attention" in str(node.target) and node.op == "call_function":
                node.args = tuple(a | options if isinstance(a, dict) else a for a in node.args)
        module.recompile()
    moved_inputs = [moved(x) for x in inputs]
    FakeTensorProp(graph, mode=fake).propagate_dont_convert_inputs(*moved_inputs)

    sources: list[str] = []
    kernel = types.SimpleNamespace(run=lambda *args, **kwargs: None)

    def keep(self: AsyncCompile, kernel_name: str, source: str, *args: Any, **kwargs: Any) -> Any:
        sources.append(source)
        return kernel

    try:
        with (
            tracing(TracingContext(fake)),
            config.patch(force_disable_caches=True, compile_threads=1),
            mock.patch.object(AsyncCompile, "triton", keep),
        ):
            compile_fx_inner(graph, moved_inputs)
    except Exception as error:  # inductor wraps what its lowerings raise
        session.failed.append((name, tiles, _why(error)))
        return

    def template(num_stages: int, num_warps: int, triton_meta: Any, inductor_meta: Any) -> Any:
        return lambda jit: (jit, num_stages, num_warps, triton_meta, inductor_meta)

    for number, source in enumerate(s for s in sources if "triton_heuristics.template" in s):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"flex{number}.py"
            file.write_text(source)
            with mock.patch.object(triton_heuristics, "template", template):
                found = [v for n, v in vars(_execute(file)).items() if n.startswith("triton_tem")]
            jit, stages, warps, launch, meta = found[0]
            args = [torch.empty(64, dtype=_TYPES[t]) for t in launch["signature"].values()]
            settings = {"num_stages": stages, "num_warps": warps}
            session.compile(name, tiles, jit, args, settings, meta["config_args"])


_TYPES = {
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*i32": torch.int32,
    "*i64": torch.int64,
}

# Name -> (how to launch it, distribution, what to install).
PEERS: dict[str, tuple[Callable[[Session, int], None], str, str]] = {
    OURS: (_ours, "fastagglo", "-e ."),
    "FlexAttention": (_flex, "torch", "torch"),
    "flag-gems": (_flag_gems, "flag-gems", "flag-gems==5.0.2 sqlalchemy==2.0.48"),
    "fla-core": (_fla, "fla-core", "fla-core==0.6.0 einops"),
    "sglang": (_sglang, "sglang", "sglang==0.5.23"),
    "xformers": (_xformers, "xformers", "xformers==0.0.35"),
}


# --- the table ------------------------------------------------------------------------------------


def rows_of(peer: str, arch: str, dim: int) -> list[Row]:
    """What a peer's kernels come to for one head dim.

    Raises:
        ModuleNotFoundError: the peer is not installed.
    """
    run, distribution, _ = PEERS[peer]
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(str(error)) from None
    with stub_device(arch) as launches, _as_if_on(arch):
        session = Session(arch, launches)
        try:
            run(session, dim)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # another version of the peer, say; the others still count
            if peer == OURS:
                raise
            session.failed.append((distribution, FORWARD, _why(error)))
    found: dict[tuple[str, str], list[Row]] = {}
    for name, tiles, constants, launch in session.compiled:
        report = analyse(launch)
        for part, (rows, columns) in tiles.items():
            base = Row(peer, version, name, part, dim)
            row = _row(base, report, (constants[rows], constants[columns]))
            found.setdefault((name, part), []).append(row)
    for name, tiles, why in session.failed:
        for part in tiles:
            found.setdefault((name, part), []).append(Row(peer, version, name, part, dim, why))
    return [_best(rows) for rows in found.values()]


def _row(base: Row, report: Report, tile: tuple[int, int]) -> Row:
    row = replace(
        base,
        tile=tile,
        warps=report.num_warps,
        stages=report.num_stages,
        registers=report.registers,
        spilled=report.stack,
        shared=report.shared,
    )
    if not report.fits:
        return replace(row, note="; ".join(report.notes))
    # What the loop multiplies: ours pads to 16, every peer that pads does so to a power of two.
    dim = base.head_dim
    width = -(-dim // 16) * 16 if base.peer == OURS else triton.next_power_of_2(dim)
    products = 2 * PRODUCTS[base.part] * tile[0] * tile[1]
    loop = _loop(report, products * width)
    if loop is None or not loop.tensor_flops or not loop.unroll:
        return replace(row, note="its loop was not recognised")
    useful = products * dim * loop.unroll
    return replace(
        row,
        flops_per_useful=loop.tensor_flops / useful,
        non_tensor_per_mflop=loop.non_tensor / loop.tensor_flops * 1e6,
        non_tensor_per_useful_mflop=loop.non_tensor / useful * 1e6,
        bound=loop.bound,
    )


def _loop(report: Report, flops: int) -> Loop | None:
    """The loop of these products; the unmasked one where there are twins."""
    fitting = [x for x in report.loops if x.unroll and x.dot_flops == flops * x.unroll]
    return min(fitting, key=lambda x: x.non_tensor / (x.unroll or 1)) if fitting else None


def _best(rows: list[Row]) -> Row:
    measured = [row for row in rows if row.non_tensor_per_mflop is not None]
    best = min(measured or rows, key=lambda row: row.non_tensor_per_mflop or 0.0)
    return replace(best, configurations=len(rows))


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each head dim and part: ours against the peer that issues least, and the FLOPs saved."""
    found = []
    for mine in rows:
        if mine.peer != OURS or mine.non_tensor_per_mflop is None:
            continue
        rivals = [
            row
            for row in rows
            if row.peer != OURS
            and row.head_dim == mine.head_dim
            and row.part == mine.part
            and row.non_tensor_per_mflop is not None
        ]
        if not rivals:
            continue
        verdict: dict[str, Any] = {"head_dim": mine.head_dim, "part": mine.part}
        for key in ("non_tensor_per_mflop", "non_tensor_per_useful_mflop"):
            best = min(rivals, key=lambda row: getattr(row, key))
            verdict[key] = {
                "ours": getattr(mine, key),
                "best_peer": f"{best.peer} {best.kernel}",
                "peer": getattr(best, key),
                "fewer": getattr(mine, key) < getattr(best, key),
            }
        least = min(row.flops_per_useful or 0.0 for row in rivals)
        verdict["flops_saved"] = 1 - (mine.flops_per_useful or 0.0) / least
        verdict["spills"] = bool(mine.spilled)
        verdict["against"] = [f"{row.peer} {row.kernel}" for row in rivals]
        found.append(verdict)
    return found


def _print(rows: Sequence[Row], arch: str) -> None:
    print(f"\n{arch}, bf16, {ROWS} rows, {HEADS} heads")
    header = ("D", "part", "peer", "kernel", "tile", "w", "s", "regs", "spill", "smem")
    figures = ("FLOP", "non-tensor/MFLOP", "/useful", "bound")
    form = (
        "{:>3} {:<6} {:<25} {:<30.30} {:>7} {:>2} {:>2} {:>4} {:>5} {:>6} {:>5} {:>16} {:>7} {:>5}"
    )
    print(form.format(*header, *figures))
    order = {part: number for number, part in enumerate(PRODUCTS)}
    for row in sorted(rows, key=lambda r: (r.head_dim, order[r.part], r.peer != OURS)):
        who = f"{row.peer} {row.version}"
        if row.non_tensor_per_mflop is None:
            print(f"{row.head_dim:>3} {row.part:<6} {who:<25} {row.kernel:<30.30} {row.note}")
            continue
        print(
            form.format(
                row.head_dim,
                row.part,
                who,
                row.kernel,
                "x".join(map(str, row.tile or ())),
                row.warps,
                row.stages,
                row.registers,
                row.spilled,
                row.shared,
                f"{row.flops_per_useful:.2f}",
                f"{row.non_tensor_per_mflop:.0f}",
                f"{row.non_tensor_per_useful_mflop:.0f}",
                "" if row.bound is None else f"{row.bound:.2f}",
            )
        )


def _print_verdicts(found: Sequence[dict[str, Any]]) -> None:
    print()
    for verdict in found:
        texts = []
        for key, unit in (
            ("non_tensor_per_mflop", "MFLOP"),
            ("non_tensor_per_useful_mflop", "useful MFLOP"),
        ):
            one = verdict[key]
            relation = "fewer than" if one["fewer"] else "NOT fewer than"
            texts.append(
                f"{one['ours']:.0f} per {unit}, {relation} the best peer's "
                f"{one['peer']:.0f} ({one['best_peer']})"
            )
        print(
            f"D {verdict['head_dim']:>3} {verdict['part']:<4}: {'; '.join(texts)}; "
            f"{verdict['flops_saved']:.0%} fewer tensor-core FLOPs than the least padded "
            f"of {len(verdict['against'])} peer kernels"
            f"{'; SPILLS' if verdict['spills'] else ''}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers_attention", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--arch", default="sm_90", choices=list(NAMES))
    parser.add_argument("--heads", default="64,72,80,128", help="head dims, with commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of these, with commas")
    parser.add_argument("--json", type=Path, help="write rows and verdicts to this file")
    args = parser.parse_args(arguments)
    heads = [int(dim) for dim in re.split(r"[,\s]+", args.heads)]
    chosen = args.peers.split(",")
    if unknown := [peer for peer in chosen if peer not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)} not known; choose from {', '.join(PEERS)}")
    rows: list[Row] = []
    skipped = []
    for peer in chosen:
        try:
            for dim in heads:
                print(f"compiling {peer}, head dim {dim}", file=sys.stderr)
                rows += rows_of(peer, args.arch, dim)
        except ModuleNotFoundError as error:
            skipped.append(peer)
            print(f"skipped {peer} ({error}): pip install --no-deps {PEERS[peer][2]}")
    _print(rows, args.arch)
    found = verdicts(rows)
    _print_verdicts(found)
    if args.json:
        result = {
            "arch": args.arch,
            "shape": {"rows": ROWS, "heads": HEADS, "dtype": "bfloat16"},
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "rows": [asdict(row) for row in rows],
            "verdicts": found,
            "skipped": skipped,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
