"""``fastagglo.patch``: packed attention and lean MLPs inside models of other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from fastagglo.interop import torch_modules
from fastagglo.interop.swap import Swapped, qualified, restore, swap
from fastagglo.interop.timm_modules import (
    WIDEST,
    SamAttention,
    TimmAttention,
    TimmRopeAttention,
    widened,
)

__all__ = ["PatchReport", "PatchedModule", "patch", "unpatch"]

_ATTENTIONS: dict[str, type[Swapped]] = {
    "timm.layers.attention.Attention": TimmAttention,
    "timm.models.vision_transformer.Attention": TimmAttention,  # before timm 1.0.20
    "timm.layers.attention.AttentionRope": TimmRopeAttention,
    "timm.models.eva.EvaAttention": TimmRopeAttention,
    "timm.models.vision_transformer_sam.Attention": SamAttention,
    "torch.nn.modules.activation.MultiheadAttention": torch_modules.MultiheadAttention,
}
_POOLING = "pooling: its queries are not the tokens"
_KNOWN_LIMITS = {
    "timm.models.beit.Attention": "a relative-position bias for each pair of tokens",
    "timm.layers.diff_attention.DiffAttention": "it subtracts one softmax from another",
    "timm.layers.attention_pool.AttentionPoolLatent": _POOLING,
    "open_clip.transformer.AttentionalPooler": _POOLING,
}
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
        notes: what still takes another road, call by call.
    """

    patched: tuple[PatchedModule, ...]
    left: tuple[PatchedModule, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"patched {len(self.patched)} modules, left {len(self.left)} alone"]
        for title, modules in (("patched", self.patched), ("left alone", self.left)):
            grouped = sorted(modules, key=lambda x: (x.kind, x.what))
            for (kind, what), same in groupby(grouped, key=lambda x: (x.kind, x.what)):
                names = [x.name for x in same]
                shown = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
                lines.append(f"  {title}: {len(names)} x {kind} ({shown}): {what}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def patch(model: nn.Module, *, attention: bool = True, mlp: bool = True) -> PatchReport:
    """Let a vision transformer of timm, open_clip or torchvision run packed attention.

    The model is changed in place and stays what it is: module names, state dict, hooks, outputs and
    gradients (up to rounding) are the same. Self-attention runs on
    :func:`fastagglo.ops.packed_attention` and ``Linear -> GELU -> Linear`` keeps one tensor less
    for the backward (:func:`fastagglo.ops.gelu_linear_residual`). A patched module gets a subclass
    of its own class. Nothing but the model's own library is imported.

    What packed attention cannot say runs the model's own code, in that call alone: a mask over
    pairs of tokens, a causal mask, dropout of attention weights in training, weights asked for. A
    mask of keys alone becomes a bias. What is never patched is in the report with its reason.

    Works with autocast, fp16, bf16 and ``torch.compile``, with gradients once (not twice), and
    survives ``copy.deepcopy`` and pickling; a pickle of a patched model needs fastagglo to load.
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
        name = name or "(the model)"
        kind = type(module).__name__
        mixin, why = _plan(module, attention, mlp)
        if mixin is None and why is None:
            continue
        if mixin is not None and not issubclass(mixin, torch_modules.Mlp):
            if module in causal:
                mixin, why = None, _CAUSAL
            elif module in pooling:
                mixin, why = None, _POOLING
        if mixin is None:
            left.append(PatchedModule(name, kind, str(why)))
            continue
        if not isinstance(module, Swapped):
            swap(module, mixin)
        what = "packed attention"
        if issubclass(mixin, torch_modules.Mlp):
            what = "gelu_linear_residual"
        patched.append(PatchedModule(name, kind, what))
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
    return model


def check_module(owner: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")


def nothing_to_patch(model: nn.Module, report: PatchReport) -> str:
    """The error of a model without a module that we know."""
    text = (
        f"patch: found nothing to patch in {type(model).__name__}: it takes vision transformers "
        "of timm (ViT, CLIP, SigLIP, DINOv2, DINOv3, EVA, SAM), open_clip and torchvision"
    )
    if not report.left:
        return text + "; this model has no attention or MLP of a class that it knows"
    return f"{text}.\n{report}"


def _plan(module: nn.Module, attention: bool, mlp: bool) -> tuple[type[Swapped] | None, str | None]:
    """What should replace a module's forward, or why nothing; (None, None): not a candidate."""
    name = qualified(module)
    kind = type(module).__name__
    if name in torch_modules.MLPS:
        if name.endswith(".Sequential") and not hasattr(module, "c_fc"):
            return None, None
        if not mlp:
            return None, "mlp=False"
        why = torch_modules.why_not_mlp(module)
        return (None, why) if why else (torch_modules.Mlp, None)
    if name in _ATTENTIONS:
        if not attention:
            return None, "attention=False"
        why = _why_not_attention(module, name)
        return (None, why) if why else (_ATTENTIONS[name], None)
    if name in _KNOWN_LIMITS:
        return None, _KNOWN_LIMITS[name]
    if any(True for _ in module.parameters(recurse=True)) and kind.endswith(
        ("Attention", "Attn", "AttentionPool", "AttentionalPooler")
    ):
        return None, "a class that is not known"
    if kind.endswith(("Mlp", "MLP", "SwiGLU", "SwiGLUPacked", "SwiGLUFFN")):
        return None, "another form than Linear, GELU, Linear"
    return None, None


def _why_not_attention(module: nn.Module, name: str) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return torch_modules.unusual(module)
    if "sam" not in name:
        return None
    if module.rope is not None:
        return "rotary embeddings of its own"
    if module.use_rel_pos:
        height, width = ((len(x) + 1) // 2 for x in (module.rel_pos_h, module.rel_pos_w))
        if widened(module, height, width) > WIDEST:
            return sam_limit(module, height, width)
    return None


def sam_limit(module: nn.Module, height: int, width: int) -> str:
    """Why SAM's global attention stays."""
    return (
        f"its relative-position bias over {height} x {width} tokens would make a head of "
        f"{widened(module, height, width)} channels; the kernels take {WIDEST}"
    )


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
