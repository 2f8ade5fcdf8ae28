"""Packed attention: backends that cannot run here, xformers, and wrong arguments."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.errors import UserError
from fastagglo.ops import attention, backend
from fastagglo.ops.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.backend import use_backend
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.reference.attention import packed_attention as twin


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


def random_inputs(lengths: list[int], spare: int = 0) -> tuple[list[Tensor], PackedLayout]:
    layout = PackedLayout.from_lengths(lengths, sum(lengths) + spare)
    shape = (layout.capacity, 2, 16)
    qkv = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return qkv, layout


@pytest.mark.parametrize("name", ["triton", "xformers"])
def test_backends_that_cannot_run(name):
    qkv, layout = random_inputs([5])
    with use_backend(name), pytest.raises(ValueError, match=r"runs on cuda tensors"):
        packed_attention(*qkv, layout)


@pytest.mark.parametrize(
    ("dtype", "width", "match"),
    [
        (torch.float64, 16, r"got torch.float64 and 16"),
        (torch.float32, 12, r"head dims of 16, 24, ..., 128, got torch.float32 and 12"),
        (torch.bfloat16, 136, r"got torch.bfloat16 and 136"),
    ],
)
def test_calls_that_the_kernels_cannot_run(monkeypatch, dtype, width, match):
    """As in Triton's interpreter, which would take tensors of a CPU."""
    monkeypatch.setattr(backend, "INTERPRETED", True)
    layout = PackedLayout.from_lengths([5])
    x = torch.zeros(5, 2, width, dtype=dtype)
    with use_backend("triton"), pytest.raises(ValueError, match=match):
        packed_attention(x, x, x, layout)
    assert packed_attention(x, x, x, layout).shape == x.shape


def _pretend_cuda(monkeypatch):
    monkeypatch.setattr(attention, "resolve", lambda *_: "xformers")


def test_xformers_is_called_with_the_layout(monkeypatch):
    """The kernel needs CUDA; here its place is taken by the mathematics of its mask."""
    xformers_ops = pytest.importorskip("xformers.ops")

    def attend(q, k, v, attn_bias, scale):
        mask = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
        d = [x.transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*d, attn_mask=mask, scale=scale).transpose(1, 2)

    monkeypatch.setattr(xformers_ops, "memory_efficient_attention", attend)
    _pretend_cuda(monkeypatch)
    for lengths, spare in ([3, 0, 7], 2), ([4, 4], 0), ([0], 3):
        qkv, layout = random_inputs(lengths, spare)
        upstream = torch.randn(qkv[0].shape, dtype=torch.float64)
        expected = twin(*qkv, layout, scale=0.3)
        if layout.total:
            expected_grads = torch.autograd.grad(expected, qkv, upstream)
        with torch.no_grad():
            for x in qkv:
                x[layout.total :] = math.nan
        actual = packed_attention(*qkv, layout, scale=0.3)
        # fp64 sums of a few terms of order one.
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        if layout.total:
            grads = torch.autograd.grad(actual, qkv, upstream)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_xformers_says_what_it_lacks(monkeypatch):
    _pretend_cuda(monkeypatch)
    qkv, layout = random_inputs([5])
    with pytest.raises(ValueError, match="'xformers' has no per-key bias"):
        packed_attention(*qkv, layout, key_bias=torch.zeros(5, dtype=torch.float64))
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r'xformers.*pip install "fastagglo\[xformers\]"'):
        packed_attention(*qkv, layout)


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD = {"q": _x(6, 2, 8), "k": _x(6, 2, 8), "v": _x(6, 2, 8)}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a tensor, got list"),
        ({"v": None}, TypeError, r"v must be a tensor, got NoneType"),
        ({"layout": [2, 4]}, TypeError, r"layout must be a PackedLayout.*got list"),
        ({"q": _x(1, 6, 2, 8)}, ValueError, r"q must be \(tokens, heads, head dim\).*1, 6, 2, 8"),
        ({"q": _x(6, 0, 8)}, ValueError, r"q must be .*\(6, 0, 8\)"),
        ({"k": _x(6, 1, 8)}, ValueError, r"k must have the shape of q, \(6, 2, 8\).*\(6, 1, 8\)"),
        ({"v": _x(6, 2, 16)}, ValueError, r"v must have the shape of q.*\(6, 2, 16\)"),
        ({"k": _x(6, 2, 8).half()}, TypeError, r"k must have the dtype of q.*float16"),
        ({"q": _x(6, 2, 8).int()}, TypeError, r"q must be float64.*got torch.int32"),
        ({"v": _x(6, 2, 8).to("meta")}, ValueError, r"v must be on the device of q, cpu, got meta"),
        (
            {"layout": PackedLayout.from_lengths([4])},
            ValueError,
            r"6 tokens, but the layout has a capacity of 4",
        ),
        (
            {"layout": PackedLayout.from_lengths([6], device="meta")},
            ValueError,
            r"layout must be on the device of q, cpu, got meta; use layout.to\('cpu'\)",
        ),
        ({"key_bias": 1.0}, TypeError, r"key_bias must be a tensor or None, got float"),
        ({"key_bias": _x(6).int()}, TypeError, r"key_bias must be float64.*got torch.int32"),
        ({"key_bias": _x(2)}, ValueError, r"key_bias must be .*\(6,\) or \(6, 2\), got \(2,\)"),
        ({"key_bias": _x(6, 1)}, ValueError, r"key_bias must be .*got \(6, 1\)"),
        ({"key_bias": _x(6).to("meta")}, ValueError, r"key_bias must be on the device.*got meta"),
        ({"scale": "1"}, TypeError, r"scale must be a number or None, got '1'"),
        ({"scale": math.nan}, ValueError, r"scale must be finite, got nan"),
    ],
)
def test_errors(changes, error, match):
    arguments = {**GOOD, "layout": PackedLayout.from_lengths([2, 4]), **changes}
    with pytest.raises(error, match=match):
        packed_attention(**arguments)


@pytest.mark.parametrize("qkv", [torch.zeros(5, 2, 16), torch.zeros(5, 2, 2, 16)])
def test_fused_projections_of_a_wrong_shape(qkv):
    with pytest.raises(ValueError, match=r"qkv must be \(tokens, 3, heads, head dim\), got shape"):
        packed_attention_qkv(qkv, PackedLayout.from_lengths([5]))
    with pytest.raises(TypeError, match="qkv must be a tensor, got list"):
        packed_attention_qkv([qkv], PackedLayout.from_lengths([5]))
