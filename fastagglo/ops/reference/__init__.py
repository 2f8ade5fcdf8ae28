"""Eager twins of the public ops: plain torch, autograd only, the executable specification."""

from fastagglo.ops.reference.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.reference.heads import adaptor_mlp
from fastagglo.ops.reference.loss import multi_teacher_loss
from fastagglo.ops.reference.merge import merge_tokens, unmerge_tokens
from fastagglo.ops.reference.mlp import gelu_linear_residual, layer_norm_gelu, linear_bias_gelu

__all__ = [
    "adaptor_mlp",
    "gelu_linear_residual",
    "layer_norm_gelu",
    "linear_bias_gelu",
    "merge_tokens",
    "multi_teacher_loss",
    "packed_attention",
    "packed_attention_qkv",
    "unmerge_tokens",
]
