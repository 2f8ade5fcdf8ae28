"""FlexAttention through the gate: traced on the CPU, lowered by inductor as if a GPU were there."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.peer_kernels import (
    BACKWARD,
    DTYPE,
    FORWARD,
    HEADS,
    ROWS,
    Session,
    Tiles,
    empty,
    execute,
    why,
)

_TYPES = {
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


class _Traced(Exception):
    """Ends a compilation whose graphs are all that was wanted."""


def flex(session: Session, dim: int) -> None:
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
    from torch.nn.attention import flex_attention

    graphs = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs[name] = (graph, list(inputs))

            def run(*args: Any) -> None:
                raise _Traced

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compiler

    q, k, v = (empty(1, HEADS, ROWS, dim).requires_grad_() for _ in range(3))
    segment = torch.arange(ROWS) // (ROWS // 4)

    def same_segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segment[i] == segment[j]

    def accept(*tensors: Tensor) -> None:
        """Trace a backward on the CPU, which FlexAttention does not run there."""

    if document:
        mask = flex_attention.create_block_mask(same_segment, None, None, ROWS, ROWS, device="cpu")
    else:
        mask = flex_attention._create_empty_block_mask(q, k)
    backend = aot_autograd(
        fw_compiler=keep("fwd"), bw_compiler=keep("bwd"), decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    with (
        # Dynamo would ask for the streams and random states of the GPU that is not there.
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        config.patch(force_non_lazy_backward_lowering=True),
        mock.patch.object(flex_attention, "_validate_device", accept),
        contextlib.suppress(_Traced),
    ):
        compiled = torch.compile(
            flex_attention.flex_attention, fullgraph=True, dynamic=False, backend=backend
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
        session.failed.append((name, tiles, why(error)))
        return

    def template(num_stages: int, num_warps: int, triton_meta: Any, inductor_meta: Any) -> Any:
        return lambda jit: (jit, num_stages, num_warps, triton_meta, inductor_meta)

    for number, source in enumerate(s for s in sources if "triton_heuristics.template" in s):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"flex{number}.py"
            file.write_text(source)
            with mock.patch.object(triton_heuristics, "template", template):
                found = [v for n, v in vars(execute(file)).items() if n.startswith("triton_tem")]
            jit, stages, warps, launch, meta = found[0]
            args = [torch.empty(64, dtype=_TYPES[t]) for t in launch["signature"].values()]
            settings = {"num_stages": stages, "num_warps": warps}
            session.compile(name, tiles, jit, args, settings, meta["config_args"])
