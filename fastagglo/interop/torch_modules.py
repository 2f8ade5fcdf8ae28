"""PyTorch's own attention module, as open_clip and torchvision use it, and everybody's MLP."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.interop import transformers_modules
from fastagglo.interop.attend import Segments, attend_qkv, refuse_segments, segments_of
from fastagglo.interop.swap import Swapped, plain, qualified, watched
from fastagglo.ops import gelu_linear_residual


class MultiheadAttention(Swapped):
    """``nn.MultiheadAttention`` of one sequence over itself.

    Other calls run PyTorch's code: queries that are not the keys, weights asked for, dropout of
    weights, a mask over pairs, added keys.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        where = self._where(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if where is None:
            refuse_segments(attn_mask, "dropout of attention weights, or weights asked for")
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        out = attend_qkv(qkv.unflatten(-1, (3, self.num_heads, -1)), where)
        out = self.out_proj(out.flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None

    def _where(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        weights: bool,
        mask: Any,
        causal: bool,
    ) -> Segments | None:
        apart = key is not query or value is not query or query.dim() != 3 or query.is_nested
        if apart or weights or causal or (self.training and self.dropout > 0):
            return None
        if unusual(self) is not None:
            return None
        if padding is not None:
            if mask is not None:
                return None
            keep = ~padding if padding.dtype == torch.bool else padding
            mask = keep[:, None, None]
        elif isinstance(mask, Tensor):
            return None  # (L, L) or (N * heads, L, L), True where not to attend
        return segments_of(query if self.batch_first else query.transpose(0, 1), mask)


def unusual(attention: nn.MultiheadAttention) -> str | None:
    """What packed attention lacks of a MultiheadAttention's settings."""
    if not attention._qkv_same_embed_dim:
        return "keys and values of another width than the queries (cross-attention)"
    if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
        return "added keys (add_bias_kv, add_zero_attn)"
    return None


class Mlp(Swapped):
    """Linear, GELU, Linear, under whatever names: what the GELU gives is not kept for the backward.

    With an adapter or a hook on the second layer, or dropout between the two, the module's own code
    runs.
    """

    fastagglo_layers: tuple[str, ...]

    @classmethod
    def fastagglo_constants(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {"fastagglo_layers": MLPS[f"{original.__module__}.{original.__qualname__}"]}

    def forward(self, x: Tensor) -> Tensor:
        first, act, second, *others = self.fastagglo_layers
        layer = getattr(self, second)
        form = gelu_form(getattr(self, act))
        rest = [getattr(self, name) for name in others]
        dropped = self.training and any(isinstance(y, nn.Dropout) and y.p > 0 for y in rest)
        skipped = (getattr(self, act), *rest)  # their calls are left out
        if form is None or dropped or not plain(layer) or any(map(watched, skipped)):
            return super().forward(x)
        hidden = getattr(self, first)(x)
        return gelu_linear_residual(hidden, layer.weight, layer.bias, approximate=form)


# Class -> the names of its first layer, activation, second layer, and of what else it runs, which
# must do nothing.
MLPS: dict[str, tuple[str, ...]] = {
    **transformers_modules.MLPS,
    "timm.layers.mlp.Mlp": ("fc1", "act", "fc2", "drop1", "norm", "drop2"),
    "torch.nn.modules.container.Sequential": ("c_fc", "gelu", "c_proj"),
}


def why_not_mlp(module: nn.Module) -> str | None:
    """What keeps a module of a class in ``MLPS`` from :class:`Mlp`."""
    names = MLPS[qualified(module)]
    layers = [getattr(module, name, None) for name in names]
    first, act, second, *others = layers
    if None in layers:
        return "layers of other names than known"
    if gelu_form(act) is None:
        return f"its activation is {type(act).__name__}, not GELU"
    if not plain(second) or not isinstance(first, nn.Linear):
        kind = type(first if plain(second) else second).__name__
        return f"one of its layers is a {kind} or carries a hook"
    between = next((x for x in others if not isinstance(x, nn.Identity | nn.Dropout)), None)
    if between is not None:
        return f"a {type(between).__name__} between its layers"
    return None


def gelu_form(act: Any) -> str | None:
    """``"none"`` or ``"tanh"`` for a module that computes that form of GELU, else None."""
    if type(act) is nn.GELU:
        return act.approximate
    name = qualified(act) if isinstance(act, nn.Module) else ""
    if name == "timm.layers.activations.GELU":
        return "none"
    if name == "timm.layers.activations.GELUTanh":
        return "tanh"
    if name == "transformers.activations.GELUActivation":
        return "none" if act.act is F.gelu else None
    if name == "transformers.activations.GELUTanh":
        return "tanh" if isinstance(act.act, functools.partial) else None
    return None
