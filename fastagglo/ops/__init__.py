"""The public ops: each checks its input, is registered with torch.library, and has an eager twin
of the same name in `fastagglo.ops.reference`, the executable specification."""

from fastagglo.ops import reference
from fastagglo.ops.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.backend import use_backend
from fastagglo.ops.heads import AdaptorHeads, AdaptorMLP, AdaptorMLPv1, HeadSpec, adaptor_mlp
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.loss import (
    Affine,
    LossTerm,
    MultiTeacherLoss,
    multi_teacher_loss,
    term_image_weights,
)
from fastagglo.ops.merge import MergedTokens, merge_tokens, unmerge_tokens
from fastagglo.ops.mlp import gelu_linear_residual, layer_norm_gelu, linear_bias_gelu

__all__ = [
    "AdaptorHeads",
    "AdaptorMLP",
    "AdaptorMLPv1",
    "Affine",
    "HeadSpec",
    "LossTerm",
    "MergedTokens",
    "MultiTeacherLoss",
    "PackedLayout",
    "adaptor_mlp",
    "gelu_linear_residual",
    "layer_norm_gelu",
    "linear_bias_gelu",
    "merge_tokens",
    "multi_teacher_loss",
    "packed_attention",
    "packed_attention_qkv",
    "reference",
    "term_image_weights",
    "unmerge_tokens",
    "use_backend",
]
