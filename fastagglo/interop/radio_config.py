"""The student that a RADIO checkpoint is of: from the names and shapes of its entries.

What these do not say (attention heads, how many of the token rows are CLS tokens, whose they are,
cells per patch) comes from the arguments that the file was trained with, where it has them, or
from what is published of RADIOv2.5 and C-RADIO.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError
from fastagglo.interop.radio_names import Layout, find_layout
from fastagglo.model import HeadSpec, StudentConfig
from fastagglo.model.config import PIXEL_MEAN, PIXEL_STD
from fastagglo.ops.heads_state import read_heads

__all__ = ["describe"]

# Attention heads by width: timm's vision transformers from Ti to bigG, and SO400M.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24, 1664: 16}
# Rows of the token table: (CLS tokens, how many of them make the summary). RADIOv2.5-B, L and H
# and C-RADIOv2 and v3 have 4 + 4, C-RADIOv4 3 + 7, RADIOv2.5-g 1 + 4; SAM's is in no summary.
_TOKENS = {8: (4, 3), 10: (3, 2), 5: (1, 1)}
# Teachers in the order of their tokens.
_ORDERS = (
    ("clip", "siglip", "dino_v2", "sam"),
    ("clip", "siglip2-g", "dino_v2", "sam"),
    ("siglip2-g", "dino_v3", "sam3"),
)


@dataclass(frozen=True)
class _Teacher:
    name: str
    key: str  # its number in the list, as older files name heads
    slot: int
    in_summary: bool | None = None  # None: not known
    upsample: int = 1


def describe(
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    *,
    teachers: Sequence[str] | None = None,
    num_heads: int | None = None,
    cls_tokens: int | None = None,
    upsample: Mapping[str, int] | None = None,
) -> tuple[StudentConfig, Layout]:
    """The configuration and the layout; arguments as of :func:`~fastagglo.interop.from_radio`.

    Args:
        state: tensors by name; only shapes are looked at, but for input statistics and summary
            indices, which may be on the meta device to stand for the published ones.
        args: what the file says of its training; empty if nothing.
    """
    layout = find_layout(state)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    native = layout.style == "native"
    generator = f"{layout.trunk}{'embeddings' if native else 'patch_generator'}."
    embedder = generator + ("patch_projection" if native else "embedder")
    if len(shapes[f"{embedder}.weight"]) != 2:
        raise UserError(f"RADIO: {embedder}.weight must be (C, 3 * p**2)")
    width, pixels = shapes[f"{embedder}.weight"]
    patch = math.isqrt(pixels // 3)
    block = f"{layout.trunk}{'encoder.layer' if native else 'blocks'}."
    numbers = [
        int(match[1])
        for match in (re.match(re.escape(block) + r"(\d+)\.", n) for n in shapes)
        if match
    ]
    if not numbers:
        raise UserError(f"RADIO: no transformer blocks; they are called {block}0.* and so on")
    gated, mlp_width = _mlp(shapes, block, layout.split_gate)
    table = shapes.get(generator + ("position_embedding" if native else "pos_embed"), ())
    grid = math.isqrt(table[1]) if len(table) == 3 else 128
    rows = shapes.get(generator + ("cls_register_token" if native else "cls_token.token"), (8,))[0]

    found = layout.find_heads(state)
    named = {key for _, key in found}
    count = _cls_count(args, teachers, named, rows, cls_tokens)
    known = _teachers(args, teachers, named, upsample or {}, shared=count == 1)
    first = {t.name: t for t in reversed(known)}
    names = _cls_names(list(first.values()), count)
    by_key = {t.key: t for t in known} | first
    keys: dict[str, str] = {}  # teacher to its name in the file, in the order of the tokens
    for key in sorted(named, key=lambda key: (_place(known, key), key)):
        # Of a teacher that is named twice RADIO's own loader takes the first, too.
        keys.setdefault(by_key[key].name if key in by_key else key, key)
    for name in keys:
        if count > 1 and name in first and names[first[name].slot] != name:
            raise UserError(
                f"RADIO: heads {names[first[name].slot]!r} and {name!r} read one CLS token; "
                "fastagglo has a token per teacher, or one for all"
            )
    heads = _heads(state, found, keys, {t.name: t.upsample for t in known})
    chosen = _summary(state, layout, names, known, args, rows)
    values = _statistics(state, layout)
    heads_of = num_heads or args.get("num_attention_heads") or _HEADS.get(width)
    if heads_of is None:
        raise UserError(
            f"RADIO: a trunk of width {width} does not say how many attention heads it has; give "
            f"num_heads=... (published: {', '.join(f'{w}: {h}' for w, h in _HEADS.items())})"
        )
    normalised = any(name.startswith(layout.normaliser) for name in shapes)
    rotation = shapes.get(f"{layout.block_normaliser}rotation")
    between = any(name.startswith(layout.block_normaliser) for name in shapes)
    config = StudentConfig(
        name=str(args.get("model") or "radio"),
        width=width,
        depth=max(numbers) + 1,
        num_heads=heads_of,
        mlp_width=mlp_width,
        mlp="swiglu" if gated else "gelu",
        patch_size=patch,
        registers=max(rows - count, 0),
        layer_scale=1e-5 if _has_scale(shapes, block, layout.scale) else None,
        max_resolution=grid * patch,
        # For windows, as published: 8 layers of the g models stay global, 4 of the others.
        global_layers=8 if width == 1536 else 4,
        norm_eps=args.get("layer_norm_eps", 1e-6),
        patch_bias=f"{embedder}.bias" in shapes,
        final_norm=any(f"{layout.trunk}norm.{kind}" in shapes for kind in ("weight", "bias")),
        cls=names,
        summary=() if chosen == names else chosen,
        pixel_mean=values[0],
        pixel_std=values[1],
        feature_normaliser=normalised,
        block_normaliser=None
        if not between
        else ("layer" if rotation is not None and len(rotation) == 3 else "shared"),
        heads=heads,
    )
    differing = {name: key for name, key in keys.items() if name != key}
    return config, replace(layout, heads=differing)


def _place(known: Sequence[_Teacher], key: str) -> tuple[int, int]:
    """The token that the heads of this name read, and their place in the list of teachers."""
    places = ((t.slot, i) for i, t in enumerate(known) if key in (t.key, t.name))
    return next(places, (len(known), 0))


def _mlp(shapes: Mapping[str, tuple[int, ...]], block: str, split_gate: bool) -> tuple[bool, int]:
    """Whether blocks are gated, and their hidden width: what most of them say."""
    widths: dict[str, Counter[int]] = {"fc1": Counter(), "w3": Counter(), "down_proj": Counter()}
    for name, shape in shapes.items():
        if name.startswith(block) and len(shape) == 2:
            layer = name.removesuffix(".weight").rpartition(".mlp.")[2]
            if layer in widths:
                widths[layer][shape[0] if layer == "fc1" else shape[1]] += 1
    gated = split_gate or sum(widths["w3"].values()) > sum(widths["fc1"].values())
    counts = widths["down_proj" if split_gate else "w3" if gated else "fc1"]
    if not counts:
        raise UserError(f"RADIO: no MLP in the blocks; it is called {block}0.mlp.fc1.* and so on")
    return gated, counts.most_common(1)[0][0]


def _has_scale(shapes: Mapping[str, Any], block: str, scale: str) -> bool:
    parts = [scale.format(n) for n in (1, 2)]
    return any(name.startswith(block) and name.endswith(tuple(parts)) for name in shapes)


def _cls_count(
    args: Mapping[str, Any],
    teachers: Sequence[str] | None,
    named: set[str],
    rows: int,
    given: int | None,
) -> int:
    """How many of the token rows are CLS tokens."""
    if given is None:
        given = args.get("num_cls_tokens")
    if given is None and args.get("teachers"):
        per_teacher = args.get("cls_token_per_teacher", True)
        given = len({t["name"] for t in args["teachers"]}) if per_teacher else 1
    if given is None and teachers and _TOKENS.get(rows, (0,))[0] != 1:
        given = len(set(teachers))
    if given is None:
        given = _TOKENS[rows][0] if rows in _TOKENS else len(named) or None
    if given is None:
        raise UserError(
            f"RADIO: {rows} rows of tokens: how many of them are CLS tokens, the file does not "
            "say; give cls_tokens=..., the rest are registers"
        )
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= rows:
        raise UserError(f"RADIO: cls_tokens must be 1 to the {rows} rows of tokens, got {given!r}")
    return given


def _teachers(
    args: Mapping[str, Any],
    given: Sequence[str] | None,
    named: set[str],
    upsample: Mapping[str, int],
    shared: bool,
) -> list[_Teacher]:
    """Whose the tokens and heads are, in the order of the tokens, as far as anything says."""
    if isinstance(given, str):
        raise TypeError(f"teachers must be a sequence of names, got the string {given!r}")
    configured = args.get("teachers") or []
    if given is None and configured:
        adaptors = args.get("adaptor_configs") or {}
        found = []
        for i, teacher in enumerate(configured):
            name = str(teacher["name"])
            cells = teacher.get("fd_upsample_factor")
            if cells is None:
                cells = adaptors.get(name, {}).get("feature", {}).get("upsample_factor")
            slot = 0 if shared else int(teacher.get("token_slot", i))
            chosen = bool(teacher.get("use_summary", True))
            found.append(_Teacher(name, str(i), slot, chosen, upsample.get(name, int(cells or 1))))
        return found
    if given is None and named and not all(key.isdigit() for key in named):
        given = next((order for order in _ORDERS if named <= set(order)), None)
        if given is None and not shared:
            raise UserError(
                f"RADIO: which CLS tokens the heads {', '.join(sorted(named))} read, the file does "
                "not say; give teachers=[...], all names in the order of the tokens"
            )
        given = given or sorted(named)
    if given is None:
        given = [str(i) for i in range(max(map(int, named), default=-1) + 1)]
    return [
        _Teacher(name, str(i), 0 if shared else i, None, upsample.get(name, 1))
        for i, name in enumerate(given)
    ]


def _cls_names(known: Sequence[_Teacher], count: int) -> tuple[str, ...]:
    if count == 1:
        return (known[0].name,) if len(known) == 1 else ("backbone",)
    names = {t.slot: t.name for t in known}
    if wrong := [f"{name} ({slot})" for slot, name in names.items() if slot >= count]:
        raise UserError(
            f"RADIO: {count} CLS tokens, but a teacher reads another: {', '.join(wrong)}; give "
            "cls_tokens=..."
        )
    return tuple(names.get(slot, str(slot)) for slot in range(count))


def _heads(
    state: Mapping[str, Tensor],
    found: Mapping[tuple[str, str], Mapping[str, str]],
    keys: Mapping[str, str],
    upsample: Mapping[str, int],
) -> dict[str, HeadSpec]:
    """The heads' specs, in the order of ``keys``."""
    if not keys:
        return {}
    plain: dict[str, Tensor] = {}
    extra: dict[str, dict[str, Any]] = {}
    for name, key in keys.items():
        for parameter, entry in found.get(("summary", key), {}).items():
            plain[f"summary.{name}.{parameter}"] = _shape(state[entry])
        spatial = found.get(("spatial", key), {})
        nested = any(parameter.startswith("mlp.") for parameter in spatial)
        for parameter, entry in spatial.items():
            if not nested or parameter.startswith("mlp."):
                plain[f"spatial.{name}.{parameter.removeprefix('mlp.')}"] = _shape(state[entry])
        if nested:
            numbers = [int(p.split(".")[1]) for p in spatial if re.match(r"blocks\.\d+\.", p)]
            extra[name] = {
                "spatial_blocks": max(numbers, default=-1) + 1,
                "spatial_block": "student"
                if any(p.endswith(".attn.qkv.bias") for p in spatial)
                else "timm",
            }
    names = {name: name for name in keys}
    cells = {n: upsample[n] for n in keys if upsample.get(n, 1) > 1}
    try:
        specs = read_heads(plain, names, cells).specs
        return {name: HeadSpec(**specs[name], **extra.get(name, {})) for name in keys}
    except ValueError as error:
        raise UserError(f"RADIO: {error}") from error


def _shape(value: Tensor) -> Tensor:
    return torch.empty(value.shape, device="meta")


def _summary(
    state: Mapping[str, Tensor],
    layout: Layout,
    names: tuple[str, ...],
    known: Sequence[_Teacher],
    args: Mapping[str, Any],
    rows: int,
) -> tuple[str, ...]:
    """The CLS tokens that make up the backbone's summary."""
    if len(names) == 1:
        return names
    slots = state.get(f"{layout.root}summary_idxs")
    if slots is not None and not slots.is_meta and slots.dim() == 1:
        chosen = slots.tolist()
        if not chosen or any(not 0 <= slot < len(names) for slot in chosen):
            raise UserError(
                f"RADIO: summary_idxs {chosen} must be of the {len(names)} CLS tokens; give "
                "cls_tokens=..."
            )
        return tuple(names[slot] for slot in chosen)
    if args.get("summary_idxs"):
        return tuple(names[slot] for slot in args["summary_idxs"])
    if known and known[0].in_summary is not None:
        first = {t.name: t for t in reversed(known)}
        chosen = sorted(t.slot for t in first.values() if t.in_summary and t.slot < len(names))
        return tuple(names[slot] for slot in chosen) or names
    count, taken = _TOKENS.get(rows, (0, 0))
    return names[:taken] if count == len(names) else names


def _statistics(
    state: Mapping[str, Tensor], layout: Layout
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    values = []
    for kind, default in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
        value = state.get(f"{layout.root}input_conditioner.norm_{kind}")
        if value is None or value.is_meta or value.numel() != 3:
            values.append(default)
            continue
        value = value.flatten()
        # The default itself, not its rounding to the file's precision.
        usual = torch.equal(value.cpu(), torch.tensor(default))
        values.append(default if usual else tuple(value.double().tolist()))
    return values[0], values[1]
