"""The transformer block, on packed tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.ops.attention import packed_attention_qkv
from fastagglo.ops.heads import LayerNorm
from fastagglo.ops.layout import PackedLayout

__all__ = ["Attention", "Block", "GeluMLP", "LayerScale", "SwiGLU"]


class Attention(nn.Module):
    """Multi-head self-attention within each segment of a packed token matrix."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """``x`` (T, C) -> (T, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(packed_attention_qkv(qkv, layout).flatten(1))


class GeluMLP(nn.Module):
    """``fc2(GELU(fc1(x)))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (T, C) -> (T, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """``w3(SiLU(a) * b)`` with ``a, b = w12(x)`` (arXiv 2002.05202); names as in DINOv2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (T, C) -> (T, C)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (T, C) -> (T, C)."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to its input.

    Args:
        width: channels C.
        num_heads: attention heads.
        mlp_width: hidden width of the MLP.
        mlp: ``"gelu"`` or ``"swiglu"``.
        layer_scale: initial LayerScale, or None for none.
        norm_eps: epsilon of the LayerNorms.
        qkv_bias: queries, keys and values have a bias.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        mlp: str = "gelu",
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

        self.norm1 = LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, qkv_bias)
        self.ls1 = scale()
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = (SwiGLU if mlp == "swiglu" else GeluMLP)(width, mlp_width)
        self.ls2 = scale()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, layout: PackedLayout, keep: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: (T, C) packed tokens.
            layout: which rows attend to each other.
            keep: (2, T, 1) factors of the attention and the MLP branch (stochastic depth: 0 or
                1 / keep probability, the same for all tokens of an image), or None.

        Returns:
            (T, C).
        """
        branch = self.ls1(self.attn(self.norm1(x), layout))
        x = x + (branch if keep is None else branch * keep[0])
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if keep is None else branch * keep[1])
