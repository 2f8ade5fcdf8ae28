"""``fastagglo.tome``: token merging inside somebody else's vision transformer, for speed.

Token Merging (ToMe, arXiv 2210.09461): in every block, between attention and MLP, the tokens that
are most alike are merged into their mean, so that the blocks behind have less to compute. The keys
of the attention, averaged over its heads, say who is alike; in the attention behind a merged token
counts as the tokens that it stands for (the logarithm of their number is added to its logits).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastagglo.interop.attend import Segments, even_layout
from fastagglo.interop.patching import check_module, is_patched, patch
from fastagglo.interop.swap import Swapped, qualified, restore, swap
from fastagglo.ops import MergedTokens, merge_tokens, unmerge_tokens

__all__ = ["Schedule", "apply", "remove"]

Schedule = Literal["constant", "decreasing"] | Sequence[int]


def apply(
    model: nn.Module, tokens: float | None = None, *, schedule: Schedule = "constant"
) -> nn.Module:
    """Merge tokens in every block of a vision transformer.

    Fewer and fewer tokens go through the blocks. After the last one every original token gets the
    features of the token it was merged into, so that the model's results keep their shapes, and
    pooling sees each token as often as it counts. Prefix tokens (CLS, registers) are never merged.
    The merged tokens of a model with rotary embeddings are turned by the mean of their rows.

    The model is changed in place, and patched first (:func:`fastagglo.patch`) where it is not;
    names and state dict stay. Gradients flow, through the tokens and not through the choice. What
    a model gives of blocks before the last (``forward_intermediates``, ``hidden_states``) has the
    tokens that were left there, which is an error where it is made a grid. Batches must hold
    images of one size, without a mask.

    Args:
        model: timm's ``VisionTransformer``, ``Eva`` or ``NaFlexVit``; transformers' CLIP, SigLIP,
            SigLIP 2, DINOv2, DINOv3 or ViT; open_clip's; or a model with one of them inside.
        tokens: how many are left behind the last block, prefix tokens apart: an int for images of
            any size, or a float in (0, 1], the share of the patches. With a schedule of numbers
            leave it out. Images with fewer patches stay as they are.
        schedule: ``"constant"``: every block merges away as many. ``"decreasing"``: the first block
            twice the mean, the last block none, and evenly between: faster, and coarser. A list
            with the number of tokens to merge away in each block: at most half of those left, as in
            the paper. (To reach ``tokens`` a block merges more than half in several rounds.)

    Returns:
        The model.

    Raises:
        TypeError: a model without such a transformer, or arguments of another kind.
        ValueError: several transformers in one model (give one of them), other values, blocks or
            attention that are not known, or merging is already there.
    """
    check_module("tome.apply", model)
    tower, kind = _tower(model)
    blocks = list(operator.attrgetter(kind.blocks)(tower))
    plan = _Plan(*_checked(tokens, schedule, len(blocks)), len(blocks), kind.prefix(tower))
    if any(isinstance(block, _TomeBlock) for block in blocks):
        raise ValueError("tome.apply: this model merges already; call tome.remove(model) first")
    _patch_blocks(tower, kind.blocks, blocks)
    for index, block in enumerate(blocks):
        swap(block, _TomeBlock)
        block.fastagglo_tome, block.fastagglo_index = plan, index
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`; the model stays patched. :func:`fastagglo.unpatch` undoes both.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module("tome.remove", model)
    for module in model.modules():
        if isinstance(module, _TomeBlock):
            restore(module)
    return model


def _checked(
    tokens: float | None, schedule: Schedule, depth: int
) -> tuple[float | None, Literal["constant", "decreasing"] | tuple[int, ...]]:
    named = isinstance(schedule, str)
    if named and schedule not in ("constant", "decreasing"):
        raise ValueError(
            f"tome.apply: schedule must be 'constant', 'decreasing' or a list, got {schedule!r}"
        )
    if not named:
        if not isinstance(schedule, Iterable):
            came = type(schedule).__name__
            raise TypeError(f"tome.apply: schedule must be a name or a list, got {came}")
        if tokens is not None:
            raise ValueError("tome.apply: give tokens or a list as schedule, not both")
        numbers = tuple(operator.index(number) for number in schedule)
        if len(numbers) != depth or min(numbers, default=0) < 0:
            raise ValueError(
                f"tome.apply: schedule must have a number, 0 or more, for each of the {depth} "
                f"blocks, got {list(numbers)}"
            )
        return None, numbers
    if tokens is None:
        raise ValueError("tome.apply: say how many tokens are to be left: tokens=64, or 0.5")
    if isinstance(tokens, bool) or not isinstance(tokens, Real):
        raise TypeError(f"tome.apply: tokens must be an int or float, got {type(tokens).__name__}")
    whole = isinstance(tokens, Integral)
    if not (tokens >= 1 if whole else 0 < tokens <= 1):
        raise ValueError(
            f"tome.apply: tokens must be an int of at least 1 or a float in (0, 1], got {tokens}"
        )
    return int(tokens) if whole else float(tokens), schedule


class _Stage(NamedTuple):
    """What a block is given beside its tokens (N, L, C).

    Attributes:
        size: (N, L), how many original tokens each stands for; None: one.
        rope: (N, patches left, 2 D) rotary rows, sines or cosines first, as the model has them;
            None: no such embedding, or the model's own.
        slots: (N, original L), where each original token is now; None: in its own place.
        patches: how many there were.
        address: of the tokens that belong to it; 0 where nobody can say (compiled).
    """

    size: Tensor | None
    rope: Tensor | None
    slots: Tensor | None
    patches: int
    address: int = 0


@dataclass(eq=False)
class _Plan:
    """What the blocks of a model share.

    Attributes:
        tokens: of :func:`apply`.
        schedule: of :func:`apply`.
        depth: blocks.
        prefix: tokens that are never merged.
        stages: what each block is given in the current call. Each keeps its own, so that a block
            that is run again for its gradients finds it.
    """

    tokens: float | None
    schedule: Literal["constant", "decreasing"] | tuple[int, ...]
    depth: int
    prefix: int
    stages: dict[int, _Stage] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"stages": {}}

    def keep(self, index: int, length: int, patches: int) -> int:
        """How many of ``length`` tokens block ``index`` leaves of an image of so many patches."""
        left = length - self.prefix
        if isinstance(self.schedule, tuple):
            return length - min(self.schedule[index], left // 2)
        if isinstance(self.tokens, float):
            target = max(1, math.ceil(self.tokens * patches))
        else:
            target = min(patches, int(self.tokens or patches))
        done = (index + 1) / self.depth
        if self.schedule == "decreasing" and self.depth > 1:
            last = self.depth - 1
            done = (index + 1) * (2 * last - index) / (last * self.depth)
        return self.prefix + min(left, patches - round((patches - target) * done))


class _TomeBlock(Swapped):
    """A pre-norm block that merges tokens between its attention and its MLP."""

    fastagglo_tome: _Plan
    fastagglo_index: int
    fastagglo_names: _Names

    @classmethod
    def fastagglo_constants(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {"fastagglo_names": _BLOCKS[f"{original.__module__}.{original.__qualname__}"]}

    def fastagglo_leave(self) -> None:
        del self.fastagglo_tome, self.fastagglo_index

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        plan, index, names = self.fastagglo_tome, self.fastagglo_index, self.fastagglo_names
        masks += tuple(options.pop(name, None) for name in ("attn_mask", "attention_mask"))
        if any(mask is not None for mask in masks) or options.pop("is_causal", False):
            raise ValueError(
                "tome: merged tokens know no masks: give batches of images of one size, without "
                "padding, one size at a time"
            )
        attention = getattr(self, names.attention)
        if not is_patched(attention):
            raise ValueError("tome: the attention was unpatched; call fastagglo.patch(model)")
        if index == 0:
            patches = x.shape[1] - plan.prefix
            plan.stages[0] = _Stage(None, None, None, patches)
        stage = plan.stages[index]
        if index and _in_backward() and stage.address != x.data_ptr():
            raise ValueError(
                "tome: a checkpointed block is computed again for its gradients after another call "
                "of the model; call backward after each forward, or turn checkpointing off"
            )
        rope, options = _own_rope(options) if stage.rope is None else (stage.rope, options)
        if stage.rope is not None:
            options = _with_rope(options, stage.rope)
        keys: list[Tensor] = []
        bias = None if stage.size is None else stage.size.log().flatten()
        where = Segments(even_layout(x), bias, keys=keys)
        out = names.call(attention, getattr(self, names.norm1)(x), where, options)
        x = x + _scaled(self, names.after1, out)
        keep = plan.keep(index, x.shape[1], stage.patches)
        if keep < x.shape[1]:
            x, stage = _merge(x, keys[0], keep, plan.prefix, stage, rope)
        out = getattr(self, names.mlp)(getattr(self, names.norm2)(x))
        x = x + _scaled(self, names.after2, out)
        if index + 1 < plan.depth:
            address = 0 if torch.compiler.is_compiling() else x.data_ptr()
            plan.stages[index + 1] = stage._replace(address=address)
        elif not torch.is_grad_enabled():
            plan.stages.clear()
        return x if index + 1 < plan.depth else _unmerged(x, stage)


def _in_backward() -> bool:
    """Whether autograd is at work, which runs checkpointed blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _merge(
    x: Tensor, keys: Tensor, keep: int, prefix: int, stage: _Stage, rope: Tensor | None
) -> tuple[Tensor, _Stage]:
    """The tokens that are left, and what goes with them."""
    channels = x.shape[-1]
    both = x
    if rope is not None:
        # Rows of the rotary embedding are merged as if they were channels: of equal keys, the mean
        # of the turned keys is the key turned by the mean.
        rope = rope.expand(len(x), *rope.shape[-2:])
        still = rope.new_zeros(len(x), x.shape[1] - rope.shape[1], rope.shape[-1])
        both = torch.cat((x, torch.cat((still, rope), dim=1)), dim=-1)
    merged = merge_tokens(both, keep, size=stage.size, metric=keys.detach(), protect=prefix)
    slots = merged.index if stage.slots is None else merged.index.gather(1, stage.slots)
    found = merged.x
    if rope is not None:
        rope = found[:, prefix:, channels:].detach().to(rope.dtype)
        found = found[..., :channels].to(x.dtype)
    return found, _Stage(merged.size, rope, slots, stage.patches)


def _unmerged(x: Tensor, stage: _Stage) -> Tensor:
    """Every original token with the features of the one it was merged into."""
    if stage.slots is None:
        return x
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return unmerge_tokens(x, MergedTokens(x, stage.size, stage.slots, None, stage.slots + first))


def _own_rope(options: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """The rotary rows (patches, 2 D) that a model gives its first blocks."""
    rope = options.get("rope")
    if options.get("position_embeddings") is not None:
        rope = torch.cat(options["position_embeddings"], dim=-1)
    if rope is None:
        return None, options
    if rope.dim() == 2:
        return rope[None], options
    raise ValueError(
        "tome: rotary embeddings of another form than one row for each patch (mixed, or masked)"
    )


def _with_rope(options: dict[str, Any], rope: Tensor) -> dict[str, Any]:
    """A block's options with the rows of merged tokens, for all heads."""
    rope = rope[:, None]
    if "position_embeddings" in options:
        return options | {"position_embeddings": rope.chunk(2, dim=-1)}
    return options | {"rope": rope}


def _scaled(block: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Layer scale and drop path, modules or parameters, where the block has them."""
    for name in names:
        step = getattr(block, name)
        if isinstance(step, nn.Module):
            x = step(x)
        elif step is not None:
            x = step * x
    return x


# --- which models, and how their blocks call what they hold --------------------------------------


def _call_timm(attention: nn.Module, x: Tensor, where: Segments, options: dict[str, Any]) -> Tensor:
    return attention(x, attn_mask=where, **options)


def _call_transformers(
    attention: nn.Module, x: Tensor, where: Segments, options: dict[str, Any]
) -> Tensor:
    return attention(x, attention_mask=where, **options)[0]


def _call_torch(
    attention: nn.Module, x: Tensor, where: Segments, options: dict[str, Any]
) -> Tensor:
    return attention(x, x, x, need_weights=False, attn_mask=where)[0]


class _Names(NamedTuple):
    """Of a pre-norm block: the names of what it holds, and how it calls its attention."""

    norm1: str
    attention: str
    after1: tuple[str, ...]
    norm2: str
    mlp: str
    after2: tuple[str, ...]
    call: Callable[[nn.Module, Tensor, Segments, dict[str, Any]], Tensor]


_HF = "transformers.models.{0}.modeling_{0}.{1}"
_SCALED = ("norm1", "attention", ("layer_scale1", "drop_path"), "norm2", "mlp")
_PLAIN = ("layer_norm1", "self_attn", (), "layer_norm2", "mlp", ())
_DINO = _Names(*_SCALED, ("layer_scale2", "drop_path"), _call_transformers)
_CLIP = _Names(*_PLAIN, _call_transformers)
_BLOCKS: dict[str, _Names] = {
    "timm.models.vision_transformer.Block": _Names(
        *("norm1", "attn", ("ls1", "drop_path1"), "norm2", "mlp", ("ls2", "drop_path2")), _call_timm
    ),
    "timm.models.eva.EvaBlock": _Names(
        *("norm1", "attn", ("gamma_1", "drop_path1")),
        *("norm2", "mlp", ("gamma_2", "drop_path2")),
        _call_timm,
    ),
    "open_clip.transformer.ResidualAttentionBlock": _Names(
        *("ln_1", "attn", ("ls_1",), "ln_2", "mlp", ("ls_2",)), _call_torch
    ),
    _HF.format("clip", "CLIPEncoderLayer"): _CLIP,
    _HF.format("siglip", "SiglipEncoderLayer"): _CLIP,
    _HF.format("siglip2", "Siglip2EncoderLayer"): _CLIP,
    _HF.format("dinov2", "Dinov2Layer"): _DINO,
    _HF.format("dinov2_with_registers", "Dinov2WithRegistersLayer"): _DINO,
    _HF.format("dinov3_vit", "DINOv3ViTLayer"): _DINO,
    _HF.format("vit", "ViTLayer"): _Names(
        *("layernorm_before", "attention", ("dropout",)),
        *("layernorm_after", "mlp", ("dropout",)),
        _call_transformers,
    ),
}


class _Tower(NamedTuple):
    """Where a transformer keeps its blocks, and how many prefix tokens it has."""

    blocks: str
    prefix: Callable[[nn.Module], int]


def _timm_prefix(tower: nn.Module) -> int:
    return tower.num_prefix_tokens


def _registers(tower: nn.Module) -> int:
    return 1 + tower.config.num_register_tokens


def _none(tower: nn.Module) -> int:
    return 0


def _cls(tower: nn.Module) -> int:
    return 1


_TOWERS: dict[str, _Tower] = {
    "timm.models.vision_transformer.VisionTransformer": _Tower("blocks", _timm_prefix),
    "timm.models.eva.Eva": _Tower("blocks", _timm_prefix),
    "timm.models.naflexvit.NaFlexVit": _Tower("blocks", _timm_prefix),
    "open_clip.transformer.VisionTransformer": _Tower("transformer.resblocks", _cls),
    _HF.format("clip", "CLIPVisionModel"): _Tower("encoder.layers", _cls),
    _HF.format("siglip", "SiglipVisionModel"): _Tower("encoder.layers", _none),
    _HF.format("siglip2", "Siglip2VisionModel"): _Tower("encoder.layers", _none),
    _HF.format("dinov2", "Dinov2Model"): _Tower("encoder.layer", _cls),
    _HF.format("dinov2_with_registers", "Dinov2WithRegistersModel"): _Tower(
        "encoder.layer", _registers
    ),
    _HF.format("dinov3_vit", "DINOv3ViTModel"): _Tower("model.layer", _registers),
    _HF.format("vit", "ViTModel"): _Tower("layers", _cls),
}


def _tower(model: nn.Module) -> tuple[nn.Module, _Tower]:
    """The one transformer in a model."""
    found = []
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if (kind := _TOWERS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
                found.append((name, module, kind))
                break
    if not found:
        raise TypeError(
            "tome.apply: model must hold timm's VisionTransformer, Eva or NaFlexVit, open_clip's "
            "VisionTransformer, or transformers' CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3 or ViT, "
            f"got {type(model).__name__}"
        )
    if len(found) > 1:
        names = ", ".join(name or "(the model)" for name, *_ in found)
        raise ValueError(f"tome.apply: model holds several transformers, give one of: {names}")
    (_, tower, kind), *_ = found
    return tower, kind


def _patch_blocks(tower: nn.Module, path: str, blocks: list[nn.Module]) -> None:
    """See that attention of all blocks takes merged tokens."""
    for index, block in enumerate(blocks):
        if qualified(block) not in _BLOCKS:
            raise ValueError(
                f"tome.apply: {path}.{index} is a {type(block).__name__}, a block that is not known"
            )

    def unpatched() -> Iterable[str]:
        for index, block in enumerate(blocks):
            name = _BLOCKS[qualified(block)].attention
            if not is_patched(getattr(block, name)):
                yield f"{path}.{index}.{name}"

    if any(unpatched()):
        report = patch(tower)
        reasons = {module.name: module.what for module in report.left}
        for name in unpatched():
            why = reasons.get(name, "it is no attention that is known")
            raise ValueError(f"tome.apply: {name} is not patched: {why}")
