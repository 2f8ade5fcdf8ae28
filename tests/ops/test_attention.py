from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastagglo.ops import attention_torch
from fastagglo.ops.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.reference.attention import packed_attention as twin

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BIASES = [None, "token", "head"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


def random_inputs(
    lengths, heads=2, width=16, *, spare=0, dtype=torch.float32, bias=None, seed=0, grad=True
):
    """(q, k, v, key_bias or None), leaves of autograd, and their layout."""
    layout = PackedLayout.from_lengths(lengths, sum(lengths) + spare)
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.capacity, heads, width)
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    key_bias = None
    if bias is not None:
        shape = shape[:1] if bias == "token" else shape[:2]
        key_bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        key_bias[torch.rand(shape, generator=generator) < 0.2] = -math.inf
        key_bias = key_bias.to(dtype).requires_grad_(grad)
    return [x.to(dtype).requires_grad_(grad) for x in qkv], key_bias, layout


def sdpa_per_image(q, k, v, layout, *, key_bias=None, scale=None):
    """What a user would write: one call of PyTorch's attention for each image."""
    pieces = []
    for a, b in itertools.pairwise(layout.cu_seqlens_cpu.tolist()):
        mask = None
        if key_bias is not None:
            mask = key_bias[a:b].to(q.dtype).reshape(b - a, -1).T[:, None]
        pieces.append(
            F.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1) for x in (q, k, v)), attn_mask=mask, scale=scale
            ).transpose(0, 1)
        )
    return torch.cat([*pieces, torch.zeros_like(q[layout.total :])])


def with_gradients(function, qkv, key_bias, layout, seed=1, **options):
    """The output, and the gradients for a random upstream gradient, by name."""
    out = function(*qkv, layout, key_bias=key_bias, **options)
    leaves = dict(zip("qkv", qkv, strict=True))
    if key_bias is not None and key_bias.requires_grad:
        leaves["key_bias"] = key_bias
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    if out.grad_fn is None:  # a loop over no segments depends on nothing
        grads = [torch.zeros_like(leaf) for leaf in leaves.values()]
    else:
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_as_exact_as(plain: dict, actual: dict, truth: dict) -> None:
    """The op may be about as wrong as PyTorch is in the same dtype, measured against fp64.

    Twice its largest error, for another order of summation, plus one rounding of the largest value
    (four in fp32, where PyTorch may take a kernel that never rescales its sums, as ours does).
    In fp64 the truth itself is as wrong as either: a thousand roundings there, as many as terms.
    """
    for name, true in truth.items():
        got = actual[name]
        assert got.isfinite().all(), f"{name} is not finite"
        if true.numel() == 0:
            continue
        error, budget = ((x[name].double() - true).abs().max().item() for x in (actual, plain))
        roundings = {torch.float64: 1000, torch.float32: 4}.get(got.dtype, 1)
        largest = true.abs().max().item()
        budget = 2 * budget + roundings * torch.finfo(got.dtype).eps * largest
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def assert_equal_results(actual: dict, expected: dict, **tolerances) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerances
        )


# fp64 sums of at most some hundred terms of order one.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


# --- values and gradients


@pytest.mark.parametrize("bias", BIASES)
def test_gradcheck_of_op_and_twin(bias):
    qkv, key_bias, layout = random_inputs(
        [3, 1, 0, 3, 3], width=3, spare=2, dtype=torch.float64, bias=bias
    )
    leaves = qkv if key_bias is None else [*qkv, key_bias]
    if key_bias is not None:  # finite differences of -inf have no meaning; other tests have them
        with torch.no_grad():
            key_bias[key_bias == -math.inf] = -2.0
    for function in (packed_attention, twin):

        def call(q, k, v, key_bias=None, function=function):
            return function(q, k, v, layout, key_bias=key_bias, scale=0.7)

        assert torch.autograd.gradcheck(call, leaves)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 5, 5, 17, 40]), max_size=6),
    heads=st.integers(1, 4),
    width=st.integers(2, 16).map(lambda i: 8 * i),
    spare=st.integers(0, 3),
    bias=st.sampled_from(BIASES),
    scale=st.sampled_from([None, 0.3, 0.0, -1, 2]),
    bias_grad=st.booleans(),
    seed=st.integers(0, 2**30),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_twin_on_random_mixes(lengths, heads, width, spare, bias, scale, bias_grad, seed):
    qkv, key_bias, layout = random_inputs(
        lengths, heads, width, spare=spare, dtype=torch.float64, bias=bias, seed=seed
    )
    if key_bias is not None:
        key_bias.requires_grad_(bias_grad)
    actual = with_gradients(packed_attention, qkv, key_bias, layout, scale=scale)
    expected = with_gradients(twin, qkv, key_bias, layout, scale=scale)
    assert_equal_results(actual, expected, **EXACT)
    assert actual["out"].is_contiguous()
    for result in actual.values():
        assert not result[layout.total :].any()


@pytest.mark.parametrize("bias", [None, "head"])
@pytest.mark.parametrize("width", [16, 24, 80, 88, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_sdpa_per_image(dtype, width, bias):
    """Long enough for several blocks of the flash kernel, short enough for odd ends."""
    qkv, key_bias, layout = random_inputs(
        [64, 64, 1, 33, 345], width=width, dtype=dtype, bias=bias, spare=3
    )
    if key_bias is not None:
        key_bias = key_bias.detach()
    actual = with_gradients(packed_attention, qkv, key_bias, layout)
    plain = with_gradients(sdpa_per_image, qkv, key_bias, layout)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = with_gradients(twin, exact, None if bias is None else key_bias.double(), layout)
    assert all(result.dtype == dtype for result in actual.values())
    assert_as_exact_as(plain, actual, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", BIASES)
def test_the_path_of_other_devices(monkeypatch, dtype, bias):
    """What runs on a GPU under the backend "torch" is plain PyTorch, so that a CPU can test it."""
    qkv, key_bias, layout = random_inputs(
        [33, 33, 1, 0, 100], width=24, dtype=dtype, bias=bias, spare=3
    )
    if bias is not None:
        with torch.no_grad():
            key_bias[33:66] = -math.inf
    plain = with_gradients(twin, qkv, key_bias, layout)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    exact_bias = None if bias is None else key_bias.detach().double().requires_grad_()
    truth = with_gradients(twin, exact, exact_bias, layout)
    monkeypatch.setattr(attention_torch, "_flash_forward", attention_torch._plain_forward)
    monkeypatch.setattr(attention_torch, "_flash_backward", attention_torch._plain_backward)
    for block in (
        attention_torch._BLOCK_ELEMENTS,
        1000,
        1,
    ):  # all queries at once, some, one by one
        monkeypatch.setattr(attention_torch, "_BLOCK_ELEMENTS", block)
        assert_as_exact_as(plain, with_gradients(packed_attention, qkv, key_bias, layout), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gradient_is_as_exact_as_the_twin(dtype):
    qkv, key_bias, layout = random_inputs([300, 7, 7], dtype=dtype, bias="head")
    plain = with_gradients(twin, qkv, key_bias, layout)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = with_gradients(twin, exact, key_bias.detach().double().requires_grad_(), layout)
    assert_as_exact_as(plain, with_gradients(packed_attention, qkv, key_bias, layout), truth)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_each_subset_of_gradients(needed):
    qkv, key_bias, layout = random_inputs([5, 3, 3], dtype=torch.float64, bias="head")
    leaves = [*qkv, key_bias]
    everything = list(with_gradients(twin, qkv, key_bias, layout).values())[1:]
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(need)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    out = packed_attention(*qkv, layout, key_bias=key_bias)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(out, asked, upstream)
    expected = [grad for grad, need in zip(everything, needed, strict=True) if need]
    torch.testing.assert_close(grads, tuple(expected), **EXACT)


def test_the_bias_has_a_dtype_of_its_own():
    qkv, key_bias, layout = random_inputs([40, 9], bias="token")
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    out = packed_attention(*low, layout, key_bias=key_bias)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().sum(), key_bias)
    assert grad.dtype == torch.float32
    # Added in fp32: 1000.5 and 1001 are one number in bf16.
    step = torch.tensor([1000.5, 1001.0])
    layout = PackedLayout.from_lengths([2])
    zero, v = torch.zeros(2, 1, 16), torch.tensor([0.0, 1.0])[:, None, None].expand(2, 1, 16)
    out = packed_attention(*(x.bfloat16() for x in (zero, zero, v)), layout, key_bias=step)
    torch.testing.assert_close(out.float(), torch.full((2, 1, 16), 0.6225), atol=2e-3, rtol=0)


# --- how the inputs lie in memory


def _fused_heads(T, H, D):
    return torch.randn(T, 3, H, D, dtype=torch.float64).unbind(1)


def _fused_tail(T, H, D):
    return torch.randn(T, H, D, 3, dtype=torch.float64).unbind(-1)


def _head_major(T, H, D):
    return [torch.randn(H, T, D, dtype=torch.float64).transpose(0, 1) for _ in range(3)]


def _one_key_head(T, H, D):
    q, k, v = (torch.randn(T, h, D, dtype=torch.float64) for h in (H, 1, 1))
    return q, k.expand(T, H, D), v.expand(T, H, D)


def _one_row(T, H, D):
    return [torch.randn(1, H, D, dtype=torch.float64).expand(T, H, D) for _ in range(3)]


def _overlapping_rows(T, H, D):
    return [torch.randn(T + H * D, dtype=torch.float64).as_strided((T, H, D), (1, D, 1))] * 3


def _every_other_row(T, H, D):
    return [torch.randn(2 * T, H, 2 * D, dtype=torch.float64)[::2, :, D:] for _ in range(3)]


@pytest.mark.parametrize(
    "make",
    [
        _fused_heads,
        _fused_tail,
        _head_major,
        _one_key_head,
        _one_row,
        _overlapping_rows,
        _every_other_row,
    ],
)
def test_strides(make):
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths([7, 7, 20], 36)
    qkv = [x.detach().requires_grad_() for x in make(36, 3, 24)]
    key_bias = torch.randn(3, 36, dtype=torch.float64).T
    actual = with_gradients(packed_attention, qkv, key_bias, layout)
    assert_equal_results(actual, with_gradients(twin, qkv, key_bias, layout), **EXACT)


def test_views_of_a_fused_projection_are_read_in_place():
    q, k, v = _fused_heads(10, 2, 16)
    assert all(attention_torch._readable(x) is x for x in (q, k, v))
    run = (0, 2, 5)
    assert attention_torch._dense(k, run).data_ptr() == k.data_ptr()


@pytest.mark.parametrize("bias", BIASES)
def test_fused_projection(bias):
    """One gradient for the projection, the same as three put together."""
    _, key_bias, layout = random_inputs([7, 7, 20], spare=2, dtype=torch.float64, bias=bias)
    qkv = torch.randn(36, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    leaves = [qkv] if bias is None else [qkv, key_bias]
    results = []
    for out in (
        packed_attention_qkv(qkv, layout, key_bias=key_bias, scale=0.3),
        packed_attention(*qkv.unbind(1), layout, key_bias=key_bias, scale=0.3),
        twin(*qkv.unbind(1), layout, key_bias=key_bias, scale=0.3),
    ):
        torch.manual_seed(0)
        results.append((out, *torch.autograd.grad(out, leaves, torch.randn_like(out))))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], **EXACT)
    assert results[0][1].is_contiguous()


def test_upstream_gradients_of_any_stride():
    qkv, _, layout = random_inputs([5, 9], dtype=torch.float64)
    shape = qkv[0].shape
    for upstream in (
        torch.tensor(2.0, dtype=torch.float64).expand(shape),
        torch.randn(shape[2], dtype=torch.float64).expand(shape),
        torch.randn(shape[::-1], dtype=torch.float64).permute(2, 1, 0),
    ):
        actual = torch.autograd.grad(packed_attention(*qkv, layout), qkv, upstream)
        expected = torch.autograd.grad(twin(*qkv, layout), qkv, upstream)
        torch.testing.assert_close(actual, expected, **EXACT)


def test_one_tensor_as_query_key_and_value():
    (x, *_), _, layout = random_inputs([5, 9], dtype=torch.float64)
    actual = with_gradients(
        lambda q, *rest, **_: packed_attention(q, q, q, layout), [x] * 3, None, layout
    )
    expected = with_gradients(lambda q, *rest, **_: twin(q, q, q, layout), [x] * 3, None, layout)
    assert_equal_results(actual, expected, **EXACT)


# --- who sees whom


def test_nan_in_padding_rows_does_not_leak():
    qkv, key_bias, layout = random_inputs([6, 11], spare=4, bias="head", dtype=torch.float64)
    clean = with_gradients(packed_attention, qkv, key_bias, layout)
    with torch.no_grad():
        for x in [*qkv, key_bias]:
            x[layout.total :] = NAN
    torch.manual_seed(0)
    upstream = torch.randn(clean["out"].shape, dtype=torch.float64)
    upstream[layout.total :] = NAN
    for bias in (key_bias, key_bias.detach()):
        leaves = [*qkv, bias] if bias.requires_grad else qkv
        out = packed_attention(*qkv, layout, key_bias=bias)
        assert torch.equal(out, clean["out"])
        for grad in torch.autograd.grad(out, leaves, upstream):
            assert not grad[layout.total :].any()
            assert grad.isfinite().all()


def test_nan_in_one_segment_stays_there():
    for lengths in ([6, 11, 6], [6, 6, 6]):  # dense batches of their own, and one for all three
        qkv, key_bias, layout = random_inputs(lengths, bias="token", dtype=torch.float64)
        clean = with_gradients(packed_attention, qkv, key_bias, layout)
        middle = layout.segment_ids == 1
        with torch.no_grad():
            for x in [*qkv, key_bias]:
                x[middle] = NAN
        poisoned = with_gradients(packed_attention, qkv, key_bias, layout)
        for name, result in poisoned.items():
            assert torch.equal(result[~middle], clean[name][~middle]), name
        assert poisoned["out"][middle].isnan().all()


def test_moving_segments_moves_their_results():
    lengths = [4, 9, 9, 1, 30]
    qkv, key_bias, layout = random_inputs(lengths, bias="head", dtype=torch.float64)
    results = with_gradients(packed_attention, qkv, key_bias, layout, seed=3)
    order = [2, 4, 0, 3, 1]
    rows = torch.cat([torch.where(layout.segment_ids == i)[0] for i in order])
    moved = [x.detach()[rows].requires_grad_() for x in [*qkv, key_bias]]
    other = PackedLayout.from_lengths([lengths[i] for i in order])
    out = packed_attention(*moved[:3], other, key_bias=moved[3])
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)[rows]
    grads = torch.autograd.grad(out, moved, upstream)
    for name, actual in zip(results, [out, *grads], strict=True):
        torch.testing.assert_close(actual, results[name][rows], **EXACT)


def test_removing_a_key_is_leaving_it_out():
    qkv, _, layout = random_inputs([12], dtype=torch.float64)
    q, k, v = qkv
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 5, 11]] = False
    key_bias = torch.zeros(12, dtype=torch.float64).masked_fill(~keep, -math.inf)
    out = packed_attention(q, k, v, layout, key_bias=key_bias)
    d = [x.transpose(0, 1) for x in (q, k[keep], v[keep])]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*d).transpose(0, 1), **EXACT)
    grads = torch.autograd.grad(out, (k, v), torch.randn_like(out))
    assert all(not grad[~keep].any() and grad[keep].all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_rows_without_keys_are_zeros(dtype, bias_grad):
    """Also where the first blocks of a long image are removed, for kernels that go by blocks."""
    qkv, key_bias, layout = random_inputs([5, 5, 1100, 1], dtype=dtype, bias="head")
    with torch.no_grad():
        key_bias.zero_()
        key_bias[0:5] = -math.inf
        key_bias[5:10, 1] = -math.inf
        key_bias[10:1090] = -math.inf
    key_bias.requires_grad_(bias_grad)
    results = with_gradients(packed_attention, qkv, key_bias, layout)
    for name, result in results.items():
        assert result.isfinite().all(), name
        assert not result[0:5].any(), name
        assert not result[5:10, 1].any(), name
    assert results["out"][5:10, 0].any()
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = with_gradients(twin, exact, key_bias.detach().double(), layout)
    plain = with_gradients(twin, qkv, key_bias.detach(), layout)
    assert_as_exact_as(plain, results, truth)


def test_layouts_without_rows():
    for lengths, spare in ([], 0), ([], 5), ([0, 0], 0), ([0], 2):
        qkv, key_bias, layout = random_inputs(lengths, spare=spare, bias="token")
        for result in with_gradients(packed_attention, qkv, key_bias, layout).values():
            assert result.shape[0] == spare
            assert not result.any()


def test_one_token_returns_its_value():
    (q, k, v), _, layout = random_inputs([1, 1, 1])
    assert torch.equal(packed_attention(q, k, v, layout), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_huge_logits(dtype, bias_grad):
    qkv, key_bias, layout = random_inputs([40, 7], dtype=dtype, bias="head")
    torch.manual_seed(0)
    with torch.no_grad():
        key_bias.copy_(torch.where(torch.rand(key_bias.shape) < 0.5, -1e4, 1e4))
        for x in qkv[:2]:
            x.mul_(50.0)
    key_bias.requires_grad_(bias_grad)
    results = with_gradients(packed_attention, qkv, key_bias, layout)
    assert all(result.isfinite().all() for result in results.values())
    # A softmax this sharp picks one value: the largest logit wins.
    exact = [x.detach().double() for x in qkv]
    truth = twin(*exact, layout, key_bias=key_bias.detach().double())
    plain = twin(*(x.detach() for x in qkv), layout, key_bias=key_bias.detach())
    assert_as_exact_as({"out": plain}, {"out": results["out"]}, {"out": truth})


def test_two_runs_are_equal():
    for dtype in DTYPES:
        qkv, key_bias, layout = random_inputs([196, 64, 64, 577], dtype=dtype, bias="head")
        for bias in (None, key_bias):
            first = with_gradients(packed_attention, qkv, bias, layout)
            second = with_gradients(packed_attention, qkv, bias, layout)
            assert all(torch.equal(first[name], second[name]) for name in first)


# --- living with the rest of PyTorch


@pytest.mark.parametrize("bias_grad", [False, True])
def test_autocast(bias_grad):
    (q, k, v), key_bias, layout = random_inputs([40, 9], bias="token")
    k = k.detach().bfloat16().requires_grad_()
    key_bias.requires_grad_(bias_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradients(packed_attention, [q, k, v], key_bias, layout)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = with_gradients(packed_attention, low, key_bias, layout)
    assert actual["out"].dtype == torch.bfloat16
    assert [actual[name].dtype for name in "qkv"] == [torch.float32, torch.bfloat16, torch.float32]
    for name in expected:  # nothing inside the op is cast a second time
        assert torch.equal(actual[name], expected[name].to(actual[name].dtype)), name
    double = [x.detach().double() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed_attention(*double, layout).dtype == torch.float64


def test_shapes_on_the_meta_device():
    layout = PackedLayout.from_lengths([2, 3], 6, device="meta")
    q = torch.empty(6, 2, 8, device="meta", requires_grad=True)
    out = packed_attention(q, q, q, layout, key_bias=torch.empty(6, device="meta"))
    assert out.shape == (6, 2, 8)
    out.sum().backward()
    assert q.grad.shape == (6, 2, 8)


def test_no_grad_and_inference_mode():
    qkv, key_bias, layout = random_inputs([5, 9], bias="token")
    expected = packed_attention(*qkv, layout, key_bias=key_bias)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = packed_attention(*qkv, layout, key_bias=key_bias)
        assert not out.requires_grad
        assert torch.equal(out, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    qkv, key_bias, layout = random_inputs([5, 9], bias="token")
    expected = with_gradients(packed_attention, qkv, key_bias, layout)

    def recomputed(q, k, v, layout, *, key_bias):
        def block(q, k, v, key_bias):
            return packed_attention(q, k, v, layout, key_bias=key_bias)

        return checkpoint(block, q, k, v, key_bias, use_reentrant=use_reentrant)

    if use_reentrant:  # which wants backward() and not grad()
        out = recomputed(*qkv, layout, key_bias=key_bias)
        generator = torch.Generator().manual_seed(1)
        out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
        actual = {"out": out.detach(), "q": qkv[0].grad, "k": qkv[1].grad, "v": qkv[2].grad}
        actual["key_bias"] = key_bias.grad
    else:
        actual = with_gradients(recomputed, qkv, key_bias, layout)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_second_derivatives_are_refused():
    qkv, _, layout = random_inputs([5])
    (grad,) = torch.autograd.grad(
        packed_attention(*qkv, layout).square().sum(), qkv[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [None, "token"])
def test_opcheck(bias, dtype):
    (x, *_), key_bias, layout = random_inputs([5, 3, 3], 6, spare=2, bias=bias, grad=False)
    qkv = x.to(dtype).unflatten(1, (3, 2)).unbind(1)
    if key_bias is not None:
        key_bias = key_bias[:, None].expand(-1, 2)
    arguments = (*qkv, key_bias, layout.cu_seqlens_cpu, 0, 0.3)
    ops = torch.ops.fastagglo
    torch.library.opcheck(ops.packed_attention_fwd.default, arguments)
    out, lse = ops.packed_attention_fwd(*arguments)
    for bias_grad, fused in itertools.product({False, key_bias is not None}, [False, True]):
        backward = (torch.randn_like(out), *arguments[:6], out, lse, 0.3, bias_grad, fused)
        torch.library.opcheck(ops.packed_attention_bwd.default, backward)


def test_one_compiled_graph_serves_every_mix():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attend(qkv, key_bias, layout):
        return packed_attention(*qkv.unbind(1), layout, key_bias=key_bias)

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    torch.manual_seed(0)
    mixes = [[9, 0, 15], [12, 12], [2, 3, 5, 7], [30], [1] * 20, [10, 6, 1]]
    for i, mix in enumerate(mixes):
        layout = PackedLayout.from_lengths(mix, 30)
        qkv = torch.randn(30, 3, 2, 16, requires_grad=True)
        key_bias = torch.randn(30, requires_grad=True)
        results = []
        for function in (compiled, attend):
            out = function(qkv, key_bias, layout)
            results.append((out, *torch.autograd.grad(out.square().sum(), (qkv, key_bias))))
        torch.testing.assert_close(*results)
        if i == 1:
            warm = counter.frame_count
    # The first change of the number of segments makes that one dimension dynamic.
    assert warm <= 2
    assert counter.frame_count == warm


def test_compiled_self_attention_of_one_tensor():
    torch._dynamo.reset()
    layout = PackedLayout.from_lengths([4, 6])
    compiled = torch.compile(
        lambda x: packed_attention(x, x, x, layout), backend="aot_eager", fullgraph=True
    )
    x = torch.randn(10, 2, 16, requires_grad=True)
    results = []
    for out in (compiled(x), packed_attention(x, x, x, layout)):
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_threads():
    qkv, key_bias, layout = random_inputs([64, 9, 9], bias="token")
    expected = with_gradients(packed_attention, qkv, key_bias, layout)
    results = [None] * 4

    def work(i):
        results[i] = with_gradients(packed_attention, qkv, key_bias, layout)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert all(torch.equal(result[name], expected[name]) for name in expected)
