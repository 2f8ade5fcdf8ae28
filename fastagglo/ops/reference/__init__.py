"""Eager twins of the public ops: plain torch, autograd only, the executable specification."""

from fastagglo.ops.reference.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.reference.heads import adaptor_mlp
from fastagglo.ops.reference.loss import multi_teacher_loss
from fastagglo.ops.reference.merge import merge_tokens, unmerge_tokens

__all__ = [
    "adaptor_mlp",
    "merge_tokens",
    "multi_teacher_loss",
    "packed_attention",
    "packed_attention_qkv",
    "unmerge_tokens",
]
