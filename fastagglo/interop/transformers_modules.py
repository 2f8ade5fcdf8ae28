"""Vision transformers of Hugging Face's transformers, through its registry of attentions.

Their attention modules look up a function by ``config._attn_implementation``. Ours is registered
there as ``"fastagglo"``, and a patched model is one whose config names it: no module changes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastagglo.interop.attend import attend, refuse_segments, segments_of
from fastagglo.interop.swap import Swapped
from fastagglo.interop.timm_modules import WIDEST, biased_grid_attention, sam_limit, widened

# In config._attn_implementation; and what a config must have named before, and names again after.
NAME, BEFORE = "fastagglo", "sdpa"

_CLASS = "transformers.models.{0}.modeling_{0}.{1}"
ATTENTIONS = tuple(
    _CLASS.format(family, name)
    for family, name in (
        ("clip", "CLIPAttention"),
        ("siglip", "SiglipAttention"),
        ("siglip2", "Siglip2Attention"),
        ("dinov2", "Dinov2Attention"),
        ("dinov2_with_registers", "Dinov2WithRegistersAttention"),
        ("dinov3_vit", "DINOv3ViTAttention"),
        ("vit", "ViTAttention"),
    )
)
MLPS: dict[str, tuple[str, ...]] = {
    _CLASS.format(family, name): tuple(layers)
    for family, name, *layers in (
        ("clip", "CLIPMLP", "fc1", "activation_fn", "fc2"),
        ("siglip", "SiglipMLP", "fc1", "activation_fn", "fc2"),
        ("siglip2", "Siglip2MLP", "fc1", "activation_fn", "fc2"),
        ("dinov2", "Dinov2MLP", "fc1", "activation_fn", "fc2"),
        ("dinov2_with_registers", "Dinov2WithRegistersMLP", "fc1", "activation_fn", "fc2"),
        ("dinov3_vit", "DINOv3ViTMLP", "up_proj", "act_fn", "down_proj"),
        ("vit", "ViTMLP", "fc1", "activation_fn", "fc2"),
        ("sam", "SamMLPBlock", "lin1", "act", "lin2"),
    )
}
_SAM = "transformers.models.sam.modeling_sam."
SAM_ATTENTION = _SAM + "SamVisionSdpaAttention"
LIMITS = {
    _SAM + "SamVisionAttention": "it gives its weights; load with attn_implementation='sdpa'",
    _SAM + "SamAttention": "SAM's mask decoder: its queries are not the tokens",
}


def why_not(attention: nn.Module) -> str | None:
    """What keeps an attention of a class in ``ATTENTIONS`` from the registry's function."""
    if type(attention.config).__name__ == "CLIPTextConfig":
        return "a causal text tower: packed attention lets every token see all others of its image"
    if (named := attention.config._attn_implementation) not in (NAME, BEFORE):
        return (
            f"its attn_implementation is {named!r}; call "
            f"model.set_attn_implementation({BEFORE!r}) first"
        )
    return None


def enter(attention: nn.Module) -> None:
    """Name our function in the config of an attention module."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, interface)
    AttentionMaskInterface.register(NAME, mask_interface)
    attention.config._attn_implementation = NAME


def leave(module: nn.Module) -> None:
    """Undo :func:`enter` for whatever module has such a config."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) == NAME:
        config._attn_implementation = BEFORE


def interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for ``"fastagglo"``; ``"sdpa"`` where packed attention cannot.

    Args:
        module: the attention.
        query, key, value: (N, H, L, D).
        attention_mask: None, or (N or 1, 1, L or 1, L): bool, True where to attend, or added.
        dropout: of attention weights; above 0 is for ``"sdpa"``.
        scaling: factor on ``query @ key``.
        is_causal: default ``module.is_causal``.
        options: none that packed attention knows, but those that mean nothing.

    Returns:
        (N, L, H, D), and no weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    where = None
    if not (causal or asked or dropout > 0) and query.shape == key.shape == value.shape:
        where = segments_of(query.transpose(1, 2), attention_mask)
    if where is not None:
        # Rotary embeddings leave queries and keys wider than the values under autocast.
        rows = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        return attend(*rows, where, scaling), None
    refuse_segments(attention_mask, "dropout of attention weights or a causal mask")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[BEFORE](
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )


def mask_interface(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask of ``"sdpa"``; one of keys alone with a stride of 0 along the queries."""
    from transformers import masking_utils

    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[BEFORE](*arguments, **options)
    every = options.get("mask_function") is masking_utils.bidirectional_mask_function
    return mask[:, :, :1].expand_as(mask) if every and mask is not None else mask


class SamAttention(Swapped):
    """Attention of SAM's encoder: see :class:`fastagglo.interop.timm_modules.SamAttention`."""

    def forward(self, hidden_states: Tensor, output_attentions: Any = False) -> tuple[Tensor, None]:
        x = hidden_states
        height, width = x.shape[1:3]
        head = self.qkv.out_features // 3 // self.num_attention_heads
        if output_attentions or (self.use_rel_pos and widened(head, height, width) > WIDEST):
            return super().forward(hidden_states, output_attentions)
        rows = columns = None
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_attention_heads, -1))
        if self.use_rel_pos:
            rows = self.get_rel_pos(height, height, self.rel_pos_h)
            columns = self.get_rel_pos(width, width, self.rel_pos_w)
        out = biased_grid_attention(*qkv.unbind(2), (height, width), rows, columns, self.scale)
        return self.proj(out).view(x.shape), None


def why_not_sam(attention: nn.Module) -> str | None:
    """What keeps one of SAM's attentions from :class:`SamAttention`."""
    if not attention.use_rel_pos:
        return None
    head = attention.qkv.out_features // 3 // attention.num_attention_heads
    return sam_limit(head, attention.rel_pos_h, attention.rel_pos_w)
