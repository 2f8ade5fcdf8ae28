"""The transformer block's stochastic-depth factors."""

from __future__ import annotations

import torch

from fastagglo.model.vit import Block
from fastagglo.ops.layout import PackedLayout


def test_each_branch_has_its_own_factor_per_row() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 2, 16, layer_scale=0.5).double(), torch.randn(5, 8, dtype=torch.float64)
    layout = PackedLayout.from_lengths([2, 3])
    keep = torch.rand(2, 5, 1, dtype=torch.float64)
    middle = x + keep[0] * block.ls1(block.attn(block.norm1(x), layout))
    expected = middle + keep[1] * block.ls2(block.mlp(block.norm2(middle)))
    torch.testing.assert_close(block(x, layout, keep), expected)
    assert torch.equal(block(x, layout, torch.zeros_like(keep)), x)
    torch.testing.assert_close(block(x, layout, torch.ones_like(keep)), block(x, layout))
