"""``fastagglo.patch``: packed attention and lean MLPs inside models of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from torch import Tensor, nn

from fastagglo.interop import torch_modules, transformers_modules
from fastagglo.interop.swap import Swapped, qualified, restore, swap
from fastagglo.interop.timm_modules import (
    SamAttention,
    TimmAttention,
    TimmRopeAttention,
    sam_limit,
)

__all__ = ["PatchReport", "PatchedModule", "patch", "unpatch"]

_ATTENTIONS: dict[str, type[Swapped]] = {
    "timm.layers.attention.Attention": TimmAttention,
    "timm.models.vision_transformer.Attention": TimmAttention,  # before timm 1.0.20
    "timm.layers.attention.AttentionRope": TimmRopeAttention,
    "timm.models.eva.EvaAttention": TimmRopeAttention,
    "timm.models.vision_transformer_sam.Attention": SamAttention,
    "torch.nn.modules.activation.MultiheadAttention": torch_modules.MultiheadAttention,
    transformers_modules.SAM_ATTENTION: transformers_modules.SamAttention,
}
_POOLING = "pooling: its queries are not the tokens"
_KNOWN_LIMITS = {
    **transformers_modules.LIMITS,
    "timm.models.beit.Attention": "a relative-position bias for each pair of tokens",
    "timm.layers.diff_attention.DiffAttention": "it subtracts one softmax from another",
    "timm.layers.attention_pool.AttentionPoolLatent": _POOLING,
    "open_clip.transformer.AttentionalPooler": _POOLING,
}
_PACKED, _LEAN = "packed attention", "gelu_linear_residual"
_CAUSAL = "a causal text tower: packed attention lets every token see all others of its image"


@dataclass(frozen=True)
class PatchedModule:
    """One module and what became of it.

    Attributes:
        name: as in ``model.named_modules()``.
        kind: the name of its class.
        what: how it computes now, or why it was left alone.
    """

    name: str
    kind: str
    what: str


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did; ``print(report)`` groups it by class and reason.

    Attributes:
        patched: modules that compute another way now.
        left: attention and MLP modules that were left alone, each with the reason.
    """

    patched: tuple[PatchedModule, ...]
    left: tuple[PatchedModule, ...]

    def __str__(self) -> str:
        lines = [f"patched {len(self.patched)} modules, left {len(self.left)} alone"]
        for title, modules in (("patched", self.patched), ("left alone", self.left)):
            grouped = sorted(modules, key=lambda x: (x.kind, x.what))
            for (kind, what), same in groupby(grouped, key=lambda x: (x.kind, x.what)):
                names = [x.name for x in same]
                shown = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
                lines.append(f"  {title}: {len(names)} x {kind} ({shown}): {what}")
        return "\n".join(lines)


def patch(model: nn.Module, *, attention: bool = True, mlp: bool = True) -> PatchReport:
    """Packed attention inside vision transformers of timm, transformers, open_clip and torchvision.

    The model is changed in place and stays what it is: module names, state dict, hooks, outputs and
    gradients (up to rounding) are the same. Self-attention runs on
    :func:`fastagglo.ops.packed_attention` and ``Linear -> GELU -> Linear`` keeps one tensor less
    for the backward (:func:`fastagglo.ops.gelu_linear_residual`). A patched module gets a subclass
    of its own class. Attention of transformers' models goes through its registry instead: their
    config then names the attention implementation ``"fastagglo"``, as
    ``model.set_attn_implementation`` would set it, for all models that share the config. Nothing
    but the model's own library is imported.

    What packed attention cannot say runs the model's own code, in that call alone: a mask over
    pairs of tokens, a causal mask, dropout of attention weights in training, weights asked for. A
    mask of keys alone becomes a bias. What is never patched is in the report with its reason.

    Works with autocast, fp16, bf16 and ``torch.compile``, with gradients once (not twice), and
    survives ``copy.deepcopy`` and pickling; a pickle of a patched model needs fastagglo to load,
    and one of transformers' another call of ``patch``.
    ``torch.jit.script`` does not take a patched model: unpatch it first. A second call changes
    nothing, and gives the same report.

    Args:
        model: any module; parts of it may come from several libraries.
        attention: patch attention.
        mlp: patch MLPs.

    Returns:
        :class:`PatchReport`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is nothing to patch; the message says what was seen and why not.
    """
    check_module("patch", model)
    causal = set(_causal_text(model))
    pooling = set(_pooling(model))
    patched: list[PatchedModule] = []
    left: list[PatchedModule] = []
    for name, module in model.named_modules():
        plan = _plan(module, attention, mlp)
        if plan is None:
            continue
        if plan.change is not None and plan.what == _PACKED:
            if module in causal:
                plan = _Plan(_CAUSAL)
            elif module in pooling:
                plan = _Plan(_POOLING)
        of_transformers = qualified(module) in transformers_modules.ATTENTIONS
        if plan.change is not None and not of_transformers and "forward" in vars(module):
            plan = _Plan("its object has a forward of its own (accelerate, a monkey patch)")
        if plan.change is not None:
            plan.change(module)
        where = left if plan.change is None else patched
        where.append(PatchedModule(name or "(the model)", type(module).__name__, plan.what))
    report = PatchReport(tuple(patched), tuple(left))
    if not patched:
        raise ValueError(nothing_to_patch(model, report))
    return report


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`: every module gets its own class back.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("unpatch", model)
    for module in model.modules():
        if isinstance(module, Swapped):
            restore(module)
        transformers_modules.leave(module)
    return model


def is_patched(attention: nn.Module) -> bool:
    """Whether an attention module takes packed tokens."""
    if qualified(attention) in transformers_modules.ATTENTIONS:
        return attention.config._attn_implementation == transformers_modules.NAME
    return isinstance(attention, Swapped)


def check_module(owner: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")


def nothing_to_patch(model: nn.Module, report: PatchReport) -> str:
    """The error of a model without a module that we know."""
    text = (
        f"patch: found nothing to patch in {type(model).__name__}: it takes vision transformers "
        "of timm and transformers (ViT, CLIP, SigLIP, DINOv2, DINOv3, SAM; timm's EVA too), "
        "open_clip and torchvision"
    )
    if not report.left:
        return text + "; this model has no attention or MLP of a class that it knows"
    return f"{text}.\n{report}"


class _Plan(NamedTuple):
    """What a module computes once it is changed; without a change, why it stays."""

    what: str
    change: Callable[[nn.Module], None] | None = None


def _plan(module: nn.Module, attention: bool, mlp: bool) -> _Plan | None:
    """What to do with a module; None: it is no attention and no MLP."""
    name = qualified(module)
    kind = type(module).__name__
    if name in torch_modules.MLPS:
        if name.endswith(".Sequential") and not hasattr(module, "c_fc"):
            return None
        why = torch_modules.why_not_mlp(module) if mlp else "mlp=False"
        return _Plan(why) if why else _Plan(_LEAN, partial(swap, mixin=torch_modules.Mlp))
    if name in _ATTENTIONS or name in transformers_modules.ATTENTIONS:
        why = _why_not_attention(module, name) if attention else "attention=False"
        if why:
            return _Plan(why)
        if name in _ATTENTIONS:
            return _Plan(_PACKED, partial(swap, mixin=_ATTENTIONS[name]))
        return _Plan(_PACKED, transformers_modules.enter)
    if name in _KNOWN_LIMITS:
        return _Plan(_KNOWN_LIMITS[name])
    if any(True for _ in module.parameters(recurse=True)) and kind.endswith(
        ("Attention", "Attn", "AttentionPool", "AttentionalPooler")
    ):
        return _Plan("a class that is not known")
    if kind.endswith(("Mlp", "MLP", "SwiGLU", "SwiGLUPacked", "SwiGLUFFN")):
        return _Plan("another form than Linear, GELU, Linear")
    return None


def _why_not_attention(module: nn.Module, name: str) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return torch_modules.unusual(module)
    if name in transformers_modules.ATTENTIONS:
        return transformers_modules.why_not(module)
    if name == transformers_modules.SAM_ATTENTION:
        return transformers_modules.why_not_sam(module)
    if "sam" not in name:
        return None
    if module.rope is not None:
        return "rotary embeddings of its own"
    if not module.use_rel_pos:
        return None
    head = module.qkv.out_features // 3 // module.num_heads
    return sam_limit(head, module.rel_pos_h, module.rel_pos_w)


def _causal_text(model: nn.Module) -> Iterator[nn.Module]:
    """Everything in open_clip's text towers that run under a mask of their own."""
    for module in model.modules():
        if isinstance(getattr(module, "attn_mask", None), Tensor):
            yield from getattr(module, "transformer", module).modules()


def _pooling(model: nn.Module) -> Iterator[nn.Module]:
    """Attention inside of pooling heads."""
    for module in model.modules():
        if "Pool" in type(module).__name__:
            yield from module.modules()
