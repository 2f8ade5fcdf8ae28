"""The bias per key, removed keys, scales and extreme logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from packed_cases import (
    DEVICE,
    DTYPES,
    SMALL,
    TALL,
    WIDE,
    assert_right,
    assert_same,
    make_case,
    run_kernel,
    truth_of,
)

from fastagglo.ops.layout import PackedLayout


def _transposed(bias):
    return bias.T.contiguous().T


def _every_other_row(bias):
    wide = bias.new_full((2 * bias.shape[0], bias.shape[1] + 1), math.nan)
    wide[::2, 1:] = bias
    return wide[::2, 1:]


@pytest.mark.parametrize("arrange", [_transposed, _every_other_row])
def test_strides_of_the_bias(arrange):
    case = make_case([5, 17], 2)
    key_bias = arrange(case.key_bias)
    assert key_bias.stride() != case.key_bias.stride()
    assert_same(run_kernel(replace(case, key_bias=key_bias)), run_kernel(case))


@pytest.mark.parametrize("shape", [(22, 1), (1, 2), (1, 1)], ids=str)
def test_an_expanded_bias(shape):
    case = make_case([5, 17], 2, spare=0)
    expanded = torch.randn(shape, device=DEVICE).expand(22, 2)
    assert 0 in expanded.stride()
    expected = run_kernel(replace(case, key_bias=expanded.contiguous()))
    assert_same(run_kernel(replace(case, key_bias=expanded)), expected)


def test_removing_keys_is_leaving_them_out():
    case = make_case([40], spare=0)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[0, 5, 39, *range(16, 32)]] = False
    removed = torch.zeros(40, 1).masked_fill(~keep[:, None], -math.inf).to(DEVICE)
    case = replace(case, key_bias=removed)
    results = run_kernel(case)
    assert_right(case, results)
    for name in ("k", "v", "key_bias"):
        assert not results[name][~keep].any(), name
        assert results[name][keep].any(), name
    # The same 40 queries over the keys that are left: a twin that never saw the others.
    q, k, v = (x[:, 0].double().cpu() for x in (case.q, case.k, case.v))
    out = torch.softmax(q @ k[keep].T * case.scale, 1) @ v[keep]
    torch.testing.assert_close(results["out"][:, 0].double().cpu(), out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [(SMALL, WIDE, TALL), (TALL, SMALL, SMALL)], ids=str)
def test_rows_without_keys_are_zeros(tiles, dtype):
    """All keys of a head or a segment; the first blocks of a segment; whole and cut off blocks."""
    case = make_case([5, 5, 70, 16], 2, dtype=dtype)
    key_bias = torch.zeros_like(case.key_bias)
    key_bias[:5] = -math.inf  # a cut off block alone
    key_bias[5:10, 1] = -math.inf
    key_bias[10 : 10 + 68] = -math.inf  # four whole blocks of 16, and two rows of the last
    key_bias[80:] = -math.inf  # a whole block alone
    case = replace(case, key_bias=key_bias)
    results = run_kernel(case, tiles)
    for name, x in results.items():
        assert not x[:5].any(), name
        assert not x[5:10, 1].any(), name
        assert not x[80:].any(), name
        assert x[5:10, 0].any(), name
        assert x[10:80].any(), name
    assert_right(case, results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype):
    """±1e4, from the bias, from q and k, and from the scale: finite, and as exact as the twin."""
    case = make_case([40, 7], 2, dtype=dtype)
    signs = torch.where(torch.rand(case.key_bias.shape) < 0.5, -1e4, 1e4).to(DEVICE)
    from_bias = replace(case, key_bias=signs)
    plain = make_case([40, 7], 2, dtype=dtype, bias=False)
    from_products = replace(plain, q=plain.q * 50, k=plain.k * 50)
    from_scale = make_case([40, 7], 2, dtype=dtype, bias=False, scale=2.5e3)
    for huge in (from_bias, from_products, from_scale):
        assert truth_of(huge)["lse"].abs().max() > 1e4
        assert_right(huge, run_kernel(huge))


def test_keys_far_below_the_largest():
    """A block whose weights are all zero next to the first one's, and the other way round."""
    case = make_case([48])
    for offset in (-300.0, 300.0, -1e30, 1e30):
        key_bias = torch.zeros_like(case.key_bias)
        key_bias[:16] = offset
        key_bias[48:] = math.nan
        far = replace(case, key_bias=key_bias)
        assert_right(far, run_kernel(far))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [-1.0, -2e-3, 0.0, 1e-6, 30.0, -200.0])
def test_scales(scale, bias):
    case = make_case([18, 5], width=24, bias=bias, scale=scale)
    results = run_kernel(case)
    assert_right(case, results)
    if scale == 0.0:
        assert not results["q"].any()
        assert not results["k"].any()


def test_a_negative_scale_is_a_negative_query():
    case = make_case([18, 5], scale=-0.3)
    other = make_case([18, 5], scale=0.3)
    expected = run_kernel(replace(other, q=-other.q))
    results = run_kernel(case)
    assert torch.equal(results["q"], -expected.pop("q"))
    del results["q"]
    assert_same(results, expected)


def test_segments_without_keys_between_others():
    """A layout's every other segment removed: the others do not change."""
    case = make_case([9, 20, 9, 20], spare=0)
    zero = torch.zeros_like(case.key_bias)
    removed = zero.clone()
    removed[9:29] = removed[38:] = -math.inf
    rows = torch.tensor([*range(9), *range(29, 38)])
    results = run_kernel(replace(case, key_bias=removed))
    assert_same(results, run_kernel(replace(case, key_bias=zero)), rows)
    layout = PackedLayout.from_lengths([9, 9], device=DEVICE)
    alone = {name: x[rows] for name, x in replace(case, key_bias=zero).tensors.items()}
    expected = run_kernel(replace(case, **alone, layout=layout))
    assert_same({name: x[rows] for name, x in results.items()}, expected)
