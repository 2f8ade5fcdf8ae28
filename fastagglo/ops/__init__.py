"""The public ops: each checks its input, is registered with torch.library, and has an eager twin
of the same name in `fastagglo.ops.reference`, the executable specification."""

from fastagglo.ops import reference
from fastagglo.ops.attention import packed_attention, packed_attention_qkv
from fastagglo.ops.backend import use_backend
from fastagglo.ops.heads import AdaptorHeads, AdaptorMLP, HeadSpec, adaptor_mlp
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.loss import (
    Affine,
    LossTerm,
    MultiTeacherLoss,
    multi_teacher_loss,
    term_image_weights,
)
from fastagglo.ops.merge import MergedTokens, merge_tokens, unmerge_tokens

__all__ = [
    "AdaptorHeads",
    "AdaptorMLP",
    "Affine",
    "HeadSpec",
    "LossTerm",
    "MergedTokens",
    "MultiTeacherLoss",
    "PackedLayout",
    "adaptor_mlp",
    "merge_tokens",
    "multi_teacher_loss",
    "packed_attention",
    "packed_attention_qkv",
    "reference",
    "term_image_weights",
    "unmerge_tokens",
    "use_backend",
]
