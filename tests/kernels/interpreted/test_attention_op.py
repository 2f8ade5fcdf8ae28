"""The public op on the backend "triton", in the company of the rest of PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from packed_cases import (
    DEVICE,
    DTYPES,
    HALVES,
    NAN,
    Case,
    Results,
    assert_right,
    assert_same,
    make_case,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastagglo.kernels import attention as kernel
from fastagglo.ops import attention_torch, use_backend
from fastagglo.ops.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.layout import PackedLayout


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_torch, "forward", None)  # no other backend may do the work
    monkeypatch.setattr(attention_torch, "backward", None)
    with use_backend("triton"):
        yield


def leaves_of(case: Case) -> dict[str, torch.Tensor]:
    found = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
    del found["grad_out"]
    return found


def run_op(case: Case, function: Callable[..., torch.Tensor] = packed_attention) -> Results:
    """The output, and the gradients for the case's upstream gradient, by name."""
    leaves = leaves_of(case)
    q, k, v, key_bias = (leaves.get(name) for name in ("q", "k", "v", "key_bias"))
    out = function(q, k, v, case.layout, key_bias=key_bias, scale=case.scale)
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, bias):
    case = make_case([19, 5], 2, 24, dtype=dtype, bias=bias)
    results = run_op(case)
    assert_right(case, results)
    assert results["out"].is_contiguous()
    assert all(not x[case.layout.total :].any() for x in results.values())


def test_default_scale():
    case = make_case([9], width=24, bias=False)
    out = packed_attention(case.q, case.k, case.v, case.layout)
    assert torch.equal(out, run_op(case)["out"])


def test_a_bias_per_token():
    case = make_case([19, 5], 2)
    one = case.key_bias[:, 0].clone().requires_grad_()
    case.key_bias[:, 1] = one.detach()
    out = packed_attention(case.q, case.k, case.v, case.layout, key_bias=one, scale=case.scale)
    (grad,) = torch.autograd.grad(out, one, case.grad_out)
    expected = run_op(case)
    assert torch.equal(out, expected["out"])
    torch.testing.assert_close(grad, expected["key_bias"].sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_bias_of_another_dtype(dtype):
    case = make_case([19, 5], 2)
    other = case.key_bias.to(dtype).requires_grad_()
    out = packed_attention(case.q, case.k, case.v, case.layout, key_bias=other)
    (grad,) = torch.autograd.grad(out, other, case.grad_out)
    expected = run_op(replace(case, key_bias=other.detach().float()))
    assert torch.equal(out, expected["out"])
    assert torch.equal(grad, expected["key_bias"].to(dtype))


def test_layouts_without_rows():
    for lengths, spare in ([], 0), ([], 5), ([0], 2):
        case = make_case(lengths, 2, spare=spare)
        for name, result in run_op(case).items():
            assert result.shape[0] == spare, name
            assert not result.any(), name


# --- how the inputs lie in memory


def _last_stride_of_two(x):
    return torch.stack([x, torch.full_like(x, NAN)], 3)[..., 0]


def _rows_of_an_odd_stride(x):
    wide = x.new_full((*x.shape[:2], x.shape[2] + 1), NAN)
    wide[..., 1:] = x
    return wide[..., 1:]


def _at_an_odd_address(x):
    memory = x.new_full((x.numel() + 1,), NAN)
    return memory[1:].view_as(x).copy_(x)


@pytest.mark.parametrize(
    "arrange", [_last_stride_of_two, _rows_of_an_odd_stride, _at_an_odd_address]
)
def test_what_the_kernels_cannot_read_is_copied(arrange):
    """Inputs and the upstream gradient, contiguous ones at an odd address too."""
    case = make_case([9, 5], 2, 24, dtype=torch.float16)
    other = {name: arrange(x) for name, x in case.tensors.items() if name != "key_bias"}
    assert not any(kernel.readable(x) for x in other.values())
    assert_same(run_op(replace(case, **other)), run_op(case))


def test_upstream_gradients_of_any_stride():
    case = make_case([9, 5], 2, spare=0)
    for upstream in (
        torch.tensor(2.0).expand(case.q.shape),
        torch.randn(16).expand(case.q.shape),
        torch.randn(16, 2, 14).permute(2, 1, 0),
    ):
        strided = replace(case, grad_out=upstream.to(DEVICE))
        dense = replace(case, grad_out=strided.grad_out.contiguous())
        assert_same(run_op(strided), run_op(dense))


def test_fused_projections_are_read_in_place(monkeypatch):
    """And their gradient is one tensor, the same as three put together."""
    case = make_case([9, 5], 2, 24, dtype=torch.float16)
    qkv = torch.stack([case.q, case.k, case.v], 1).requires_grad_()
    expected = run_op(case)

    def never(self, *arguments, **options):
        raise AssertionError("copied")

    options = {"key_bias": case.key_bias.requires_grad_(), "scale": case.scale}
    monkeypatch.setattr(torch.Tensor, "clone", never)
    for out in (
        packed_attention_qkv(qkv, case.layout, **options),
        packed_attention(*qkv.unbind(1), case.layout, **options),
    ):
        grad, grad_bias = torch.autograd.grad(out, (qkv, options["key_bias"]), case.grad_out)
        q, k, v = grad.unbind(1)
        assert grad.is_contiguous()
        results = {"out": out.detach(), "q": q, "k": k, "v": v, "key_bias": grad_bias}
        assert_same(results, expected)


def test_one_tensor_as_query_key_and_value():
    case = make_case([9, 5], 2, bias=False)
    x = case.q.requires_grad_()
    (grad,) = torch.autograd.grad(
        packed_attention(x, x, x, case.layout, scale=case.scale), x, case.grad_out
    )
    three = run_op(replace(case, k=case.q, v=case.q))
    torch.testing.assert_close(grad, three["q"] + three["k"] + three["v"])


# --- living with the rest of PyTorch


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_each_subset_of_gradients(needed):
    case = make_case([5, 3])
    leaves = leaves_of(case)
    expected = run_op(case)
    for leaf, need in zip(leaves.values(), needed, strict=True):
        leaf.requires_grad_(need)
    asked = {name: x for name, x in leaves.items() if x.requires_grad}
    q, k, v, key_bias = leaves.values()
    out = packed_attention(q, k, v, case.layout, key_bias=key_bias, scale=case.scale)
    grads = torch.autograd.grad(out, list(asked.values()), case.grad_out)
    results = dict(zip(asked, grads, strict=True))
    assert_same(results, {name: expected[name] for name in asked})


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype):
    case = make_case([9, 5], 2)
    case = replace(case, k=case.k.to(dtype))
    with torch.autocast(DEVICE, dtype=dtype):
        actual = run_op(case)
    low = {name: x.to(dtype) for name, x in case.tensors.items() if name != "key_bias"}
    expected = run_op(replace(case, **low))
    assert actual["out"].dtype == dtype
    assert [actual[name].dtype for name in "qkv"] == [torch.float32, dtype, torch.float32]
    for name in expected:  # nothing inside the op is cast a second time
        assert torch.equal(actual[name], expected[name].to(actual[name].dtype)), name


def test_no_grad_and_inference_mode():
    case = make_case([9, 5])
    expected = run_op(case)["out"]
    q, k, v, key_bias = leaves_of(case).values()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = packed_attention(q, k, v, case.layout, key_bias=key_bias, scale=case.scale)
        assert not out.requires_grad
        assert torch.equal(out, expected)


def test_checkpointing(monkeypatch):
    """The backend comes from the environment, which the thread that recomputes sees as well."""
    monkeypatch.setenv("FASTAGGLO_BACKEND", "triton")
    case = make_case([9, 5], 2)

    def recomputed(q, k, v, layout, **options):
        def block(*qkv):
            return packed_attention(*qkv, layout, **options)

        return checkpoint(block, q, k, v, use_reentrant=False)

    expected = run_op(case)
    with use_backend("triton"):
        assert_same(run_op(case, recomputed), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, dtype):
    """The schema, and that shapes, dtypes and strides are as the fake kernels tell a compiler."""
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, and NaN is not NaN
    case = make_case([5], 2, 24, dtype=dtype, bias=bias, spare=0)
    qkv = torch.stack([case.q, case.k, case.v], 1).unbind(1)
    key_bias = None if case.key_bias is None else case.key_bias.T.contiguous().T
    arguments = (*qkv, key_bias, case.layout.tiles, case.layout.tile_rows, 0.3)
    ops = torch.ops.fastagglo
    torch.library.opcheck(ops.packed_attention_fwd.default, arguments)
    out, lse = ops.packed_attention_fwd(*arguments)
    upstreams = (case.grad_out, case.grad_out.transpose(0, 1).contiguous().transpose(0, 1))
    for (bias_grad, fused), upstream in zip(
        itertools.product({False, bias}, [False, True]), itertools.cycle(upstreams)
    ):
        backward = (upstream, *arguments[:6], out, lse, 0.3, bias_grad, fused)
        torch.library.opcheck(ops.packed_attention_bwd.default, backward)


def test_one_compiled_graph_serves_every_mix():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(qkv, key_bias, layout):
        return packed_attention_qkv(qkv, layout, key_bias=key_bias)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for mix in ([9, 0, 6], [15], [2, 3, 5, 5], [1] * 6):
        layout = PackedLayout.from_lengths(mix, 18, DEVICE, max_segments=6)
        _ = layout.tiles
        qkv = torch.randn(18, 3, 1, 16, device=DEVICE, requires_grad=True)
        key_bias = torch.randn(18, device=DEVICE, requires_grad=True)
        upstream = torch.randn(18, 1, 16, device=DEVICE)
        results = []
        for function in (compiled, attend):
            out = function(qkv, key_bias, layout)
            results.append((out, *torch.autograd.grad(out, (qkv, key_bias), upstream)))
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert counter.frame_count == 1


# --- on a GPU alone

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_one_cuda_graph_serves_every_mix():
    torch.use_deterministic_algorithms(False)
    mixes = [[64, 64, 64], [150], [1] * 12, [], [100, 0, 92]]
    layout = PackedLayout.from_lengths(mixes[0], 192, "cuda", max_segments=12)
    qkv = torch.randn(192, 3, 2, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key_bias = torch.randn(192, 2, device="cuda", requires_grad=True)
    upstream = torch.randn(192, 2, 72, device="cuda", dtype=torch.bfloat16)

    def step():
        out = packed_attention_qkv(qkv, layout, key_bias=key_bias)
        return out, *torch.autograd.grad(out, (qkv, key_bias), upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for mix in mixes:
        layout.copy_(PackedLayout.from_lengths(mix, 192, "cuda", max_segments=12))
        graph.replay()
        for name, got, expected in zip(("out", "qkv", "bias"), captured, step(), strict=True):
            assert torch.equal(got, expected), (mix, name)


@pytest.mark.gpu
@on_a_gpu
def test_a_call_never_waits_for_the_device():
    case = make_case([40, 9], 2)
    run_op(case)  # compiles
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = PackedLayout.from_lengths([9, 40], 52, "cuda")
        results = run_op(replace(case, layout=layout))  # a wait would raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert results["out"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    case = make_case([40, 9], 2)
    there = {name: x.to("cuda:1") for name, x in case.tensors.items()}
    results = run_op(replace(case, **there, layout=case.layout.to("cuda:1")))
    assert_same({name: x.to("cuda:0") for name, x in results.items()}, run_op(case))
