"""``fastagglo.pack``: images of any sizes in one call of somebody else's vision transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastagglo.interop.attend import Segments
from fastagglo.interop.patching import check_module, is_patched, patch
from fastagglo.ops import PackedLayout

__all__ = ["PackedModel", "pack"]


def pack(model: nn.Module) -> PackedModel:
    """Let a vision transformer take a list of images of any sizes in one call.

    Every image gets its own resized positions; then the tokens of all images go through the blocks
    as one ``(1, T, C)`` matrix, in which attention keeps to the image (NaViT, arXiv 2307.06304):
    no padding, no masks, no loop over sizes. The results are those of one call per image.

    Args:
        model: of timm: ``VisionTransformer`` or ``Eva`` (DINOv3, EVA, PE, ...), made with
            ``dynamic_img_size=True``, or ``NaFlexVit``; or transformers' ``Siglip2VisionModel``.
            It is patched in place (:func:`fastagglo.patch`) if it is not yet.

    Returns:
        :class:`PackedModel`, which holds ``model`` and no weights of its own.

    Raises:
        TypeError: another model.
        ValueError: a block whose attention cannot be patched; the message says why.
    """
    check_module("pack", model)
    family = _family(model)
    if not all(is_patched(attention) for _, attention in _attentions(model, family)):
        report = patch(model)
        reasons = {module.name: module.what for module in report.left}
        for name, attention in _attentions(model, family):
            if not is_patched(attention):
                why = reasons.get(name, "it is no attention that is known")
                raise ValueError(f"pack: {name} is not patched: {why}")
    return PackedModel(model, family)


class PackedModel:
    """A model that takes lists of images; made by :func:`pack`.

    Attributes:
        model: the patched model itself.
    """

    def __init__(self, model: nn.Module, family: type[_Family]) -> None:
        self.model = model
        self._family = family

    def __call__(self, images: Sequence[Tensor]) -> list[Any]:
        """What the model gives for each image.

        Args:
            images: each (3, H, W), or (n, 3, H, W) for several of one size, prepared as the model
                wants them.

        Returns:
            For each entry what ``model(entry)`` gives: for (3, H, W) without the batch dimension.
            Siglip2's is what its model gives for the patches of the image.

        Raises:
            TypeError: ``images`` is no list of tensors.
            ValueError: another shape or dtype, or sizes that the model does not take; training
                with drop path or patch dropout, which are per image; the model was unpatched.
        """
        return self._run(images, head=True)

    def forward_features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The normalised tokens (L, C) or (n, L, C) of each entry, prefix tokens first."""
        return self._run(images, head=False)

    def _run(self, images: Sequence[Tensor], head: bool) -> list[Any]:
        model, family = self.model, self._family
        _check_images(images)
        self._check_state()
        groups = _groups(images)
        embedded = [self._embed(group.images) for group in groups]
        lengths = [x.shape[1] for x, _ in embedded for _ in x]
        x = torch.cat([tokens.flatten(0, 1) for tokens, _ in embedded])[None]
        rope = _joined_rope([(len(tokens), tokens.shape[1], rope) for tokens, rope in embedded])
        where = Segments(PackedLayout.from_lengths(lengths, device=x.device), rotate_all=True)
        for index, block in enumerate(family.blocks(model)):
            x = family.step(model, block, x, rope if rope is None else rope(index), where)
        x = family.norm(model, x)
        results: list[Any] = [None] * len(images)
        start = 0
        for group, (tokens, _) in zip(groups, embedded, strict=True):
            count, length = tokens.shape[:2]
            stop = start + count * length
            out: Any = x[0, start:stop].unflatten(0, (count, length))
            start = stop
            if head:
                out = family.head(model, out)
            for entry, rows in zip(group.entries, group.rows, strict=True):
                results[entry] = _part(out, rows)
        return results

    def _embed(self, images: Tensor) -> Any:
        try:
            return self._family.embed(self.model, images)
        except AssertionError as error:  # how timm says that it does not take a size
            h, w = images.shape[-2:]
            raise ValueError(
                f"pack: {type(self.model).__name__} does not take images of {h} x {w}: {error}"
            ) from error

    def _check_state(self) -> None:
        model, family = self.model, self._family
        for name, attention in _attentions(model, family):
            if not is_patched(attention):
                raise ValueError(f"pack: {name} was unpatched; call fastagglo.pack(model) again")
        if not model.training:
            return
        for name, module in model.named_modules():
            kind = type(module).__name__
            rate = getattr(module, "drop_prob", None) or getattr(module, "prob", None)
            if rate and ("DropPath" in kind or "PatchDropout" in kind):
                raise ValueError(
                    f"pack: {name} drops {rate:g} of the images or patches, each by itself, which "
                    "packed tokens do not; call model.eval() or set it to 0"
                )


class _Group(NamedTuple):
    """Images of one size, and which entries of the list they are."""

    images: Tensor
    entries: list[int]
    rows: list[int | slice]


def _groups(images: Sequence[Tensor]) -> list[_Group]:
    by_size: dict[tuple[int, ...], list[int]] = {}
    for entry, image in enumerate(images):
        by_size.setdefault(tuple(image.shape[-3:]), []).append(entry)
    found = []
    for entries in by_size.values():
        rows: list[int | slice] = []
        start = 0
        for entry in entries:
            count = 1 if images[entry].dim() == 3 else len(images[entry])
            rows.append(start if images[entry].dim() == 3 else slice(start, start + count))
            start += count
        batch = torch.cat(
            [x[None] if x.dim() == 3 else x for x in map(images.__getitem__, entries)]
        )
        found.append(_Group(batch, entries, rows))
    return found


def _part(out: Any, rows: int | slice) -> Any:
    """One entry's part of a tensor, or of a tuple or dict of tensors."""
    if isinstance(out, Tensor):
        return out[rows]
    if isinstance(out, tuple):
        return tuple(_part(x, rows) for x in out)
    return type(out)(**{key: _part(x, rows) for key, x in out.items()})


def _check_images(images: Sequence[Tensor]) -> None:
    if not isinstance(images, Sequence) or not all(isinstance(x, Tensor) for x in images):
        came = type(images).__name__
        if isinstance(images, Sequence):
            came = f"a {came} with {sorted({type(x).__name__ for x in images})}"
        raise TypeError(f"pack: images must be a list of tensors, got {came}")
    if not images:
        raise ValueError("pack: the list of images is empty")
    for entry, image in enumerate(images):
        if image.dim() not in (3, 4) or 0 in image.shape:
            raise ValueError(
                f"pack: images must be (C, H, W) or (n, C, H, W), got {tuple(image.shape)} at "
                f"position {entry}"
            )
        if not image.is_floating_point():
            raise ValueError(
                f"pack: images must be float, prepared as the model wants them, got {image.dtype} "
                f"at position {entry}; divide uint8 by 255 and normalise first"
            )


def _attentions(model: nn.Module, family: type[_Family]) -> Iterator[tuple[str, nn.Module]]:
    for index, block in enumerate(family.blocks(model)):
        attention = getattr(block, family.attention, block)
        name = f"{family.path}.{index}.{family.attention}"
        yield name, attention


def _joined_rope(groups: list[tuple[int, int, Tensor | None]]) -> Any:
    """Of each group its images, tokens and rotary rows: a function of the block, or None.

    Rows are (patches, 2 D), or (depth, heads, patches, 2 D) for each block its own; the sines come
    first. Prefix tokens, which are not turned, get sines of 0 and cosines of 1.
    """
    parts = []
    for count, length, rope in groups:
        if rope is None:
            return None
        half = rope.shape[-1] // 2
        still = torch.cat((rope.new_zeros(half), rope.new_ones(half)))
        still = still.expand(*rope.shape[:-2], length - rope.shape[-2], 2 * half)
        whole = torch.cat((still, rope), dim=-2)
        parts.append(whole.repeat(*(1,) * (whole.dim() - 2), count, 1))
    joined = torch.cat(parts, dim=-2)
    return (lambda _: joined) if joined.dim() == 2 else joined.__getitem__


class _Family:
    """How a kind of model goes from images to tokens, and from tokens to its results."""

    path = "blocks"
    attention = "attn"

    @staticmethod
    def blocks(model: nn.Module) -> Any:
        return model.blocks

    @staticmethod
    def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, 3, H, W) to (n, L, C) and rotary rows, see :func:`_joined_rope`."""
        _check_size(model, images)
        x = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(model.patch_drop(x)), None

    @staticmethod
    def step(
        model: nn.Module, block: nn.Module, x: Tensor, rope: Tensor | None, where: Segments
    ) -> Tensor:
        options: dict[str, Any] = {"attn_mask": where}
        if rope is not None:
            options["rope"] = rope
        if model.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)

    @staticmethod
    def norm(model: nn.Module, x: Tensor) -> Tensor:
        return model.norm(x)

    @staticmethod
    def head(model: nn.Module, x: Tensor) -> Any:
        return model.forward_head(x)


class _Eva(_Family):
    @staticmethod
    def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        _check_size(model, images)
        x, rope = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(x), rope


class _NaFlex(_Family):
    @staticmethod
    def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = model._forward_embeds(images, None, None, None)
        return found["patches"], found["rope_embeds"]


class _Siglip2(_Family):
    path = "encoder.layers"
    attention = "self_attn"

    @staticmethod
    def blocks(model: nn.Module) -> Any:
        return model.encoder.layers

    @staticmethod
    def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        side = model.config.patch_size
        height, width = images.shape[-2:]
        if height % side or width % side:
            raise ValueError(
                f"pack: height and width must be multiples of the patch, {side}, got "
                f"{height} x {width}"
            )
        cells = images.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
        patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        # On the CPU, where the model reads them one by one.
        shapes = torch.tensor([[height // side, width // side]] * len(images))
        return model.embeddings(patches, shapes), None

    @staticmethod
    def step(
        model: nn.Module, block: nn.Module, x: Tensor, rope: Tensor | None, where: Segments
    ) -> Tensor:
        return block(x, attention_mask=where)

    @staticmethod
    def norm(model: nn.Module, x: Tensor) -> Tensor:
        return model.post_layernorm(x)

    @staticmethod
    def head(model: nn.Module, x: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooled = model.head(x) if model.use_head else None
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


_FAMILIES: dict[str, type[_Family]] = {
    "timm.models.vision_transformer.VisionTransformer": _Family,
    "timm.models.eva.Eva": _Eva,
    "timm.models.naflexvit.NaFlexVit": _NaFlex,
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel": _Siglip2,
}


def _family(model: nn.Module) -> type[_Family]:
    for cls in type(model).__mro__:
        family = _FAMILIES.get(f"{cls.__module__}.{cls.__qualname__}")
        # A subclass that computes its features another way is another model.
        if family is not None and getattr(type(model), "forward_features", None) is getattr(
            cls, "forward_features", None
        ):
            return family
    raise TypeError(
        "pack: model must be timm's VisionTransformer, Eva or NaFlexVit, or transformers' "
        f"Siglip2VisionModel (of a Siglip2Model, model.vision_model), got {type(model).__name__}"
    )


def _check_size(model: nn.Module, images: Tensor) -> None:
    native = tuple(model.patch_embed.img_size or images.shape[-2:])
    if not model.dynamic_img_size and tuple(images.shape[-2:]) != native:
        raise ValueError(
            f"pack: this model takes images of {native[0]} x {native[1]} alone, got "
            f"{images.shape[-2]} x {images.shape[-1]}; create it with dynamic_img_size=True"
        )
