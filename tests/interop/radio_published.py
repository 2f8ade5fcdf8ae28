"""Names and shapes of RADIO's published files, written down, and a plain forward pass over them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

V25 = {"clip": (1024, 1280), "siglip": (1152, 1152), "dino_v2": (1536, 1536), "sam": (None, 256)}
V3 = {"clip": (1024, 1280), "siglip2-g": (1536,) * 2, "dino_v2": (1536,) * 2, "sam": (None, 256)}
V4 = {"siglip2-g": (1536, 1536), "dino_v3": (4096, 4096), "sam3": (None, 1024)}


@dataclass(frozen=True)
class Version:
    """What is published of one model; ``heads``: teacher to (summary, spatial) channels."""

    width: int
    depth: int
    mlp: int
    attention: int  # heads
    teachers: dict[str, tuple[int | None, int]]
    cls: int = 4
    registers: int = 4
    scale: bool = False  # LayerScale
    dino: bool = False  # v2.5-g: DINOv2's block, bias, norm and names
    patch: int = 16
    grid: int = 128
    head: str = "v2"  # "v1", "v2" or "attn"
    hidden: int = 1920
    summary: int = 3  # CLS tokens in the summary


VERSIONS = {
    "radio_v2.5-b": Version(768, 12, 3072, 12, V25, scale=True),
    "radio_v2.5-l": Version(1024, 24, 4096, 16, V25, scale=True),
    "radio_v2.5-h": Version(1280, 32, 5120, 16, V25, hidden=2560),
    "radio_v2.5-g": Version(
        1536, 40, 4096, 24, V25, cls=1, scale=True, dino=True, patch=14, summary=1
    ),
    "c-radio_v2-g": Version(1536, 40, 6144, 24, V25),
    "c-radio_v3-b": Version(768, 12, 3072, 12, V3, scale=True),
    "c-radio_v3-l": Version(1024, 24, 4096, 16, V3, scale=True),
    "c-radio_v3-h": Version(1280, 32, 5120, 16, V3),
    "c-radio_v3-g": Version(1536, 40, 6144, 24, V3),
    "c-radio_v4-so400m": Version(1152, 27, 4304, 16, V4, 3, 7, head="attn", summary=2),
    "c-radio_v4-h": Version(1280, 32, 5120, 16, V4, 3, 7, head="attn", summary=2),
}


def tiny(version: Version) -> Version:
    """The same names, for as little memory as may be; attention heads stay."""
    teachers = {
        name: (s and 6 + i, 7 + i) for i, (name, (s, _)) in enumerate(version.teachers.items())
    }
    width = 2 * version.attention
    return replace(version, width=width, depth=2, mlp=24, grid=6, hidden=20, teachers=teachers)


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, width: int, mlp: int, scale: str | None, swiglu: bool, bias: bool) -> Shapes:
    shapes = norm(f"{name}.norm1", width) | linear(f"{name}.attn.qkv", 3 * width, width, bias)
    shapes |= linear(f"{name}.attn.proj", width, width) | norm(f"{name}.norm2", width)
    if swiglu:
        shapes |= linear(f"{name}.mlp.w12", 2 * mlp, width) | linear(f"{name}.mlp.w3", width, mlp)
    else:
        shapes |= linear(f"{name}.mlp.fc1", mlp, width) | linear(f"{name}.mlp.fc2", width, mlp)
    if scale:
        shapes |= {f"{name}.ls1.{scale}": (width,), f"{name}.ls2.{scale}": (width,)}
    return shapes


def mlp_head(name: str, into: int, hidden: int, out: int, version: str, blocks: int) -> Shapes:
    shapes = linear(f"{name}.fc1", hidden, into)
    if version == "v1":
        shapes |= norm(f"{name}.norm", hidden)
        for i in range(blocks):
            shapes |= linear(f"{name}.inner.{3 * i}", hidden, hidden)
            shapes |= norm(f"{name}.inner.{3 * i + 1}", hidden)
        return shapes | linear(f"{name}.fc2", out, hidden)
    for i in range(blocks):
        shapes |= norm(f"{name}.blocks.{i}.0", hidden) | linear(
            f"{name}.blocks.{i}.2", hidden, hidden
        )
    return shapes | norm(f"{name}.final.0", hidden) | linear(f"{name}.final.2", out, hidden)


def trunk(v: Version, prefix: str) -> Shapes:
    p, c = prefix + ("inner." if v.dino else ""), v.width
    shapes: Shapes = {
        f"{p}patch_generator.pos_embed": (1, v.grid**2, c),
        f"{p}patch_generator.cls_token.token": (v.cls + v.registers, c),
    }
    shapes |= linear(f"{p}patch_generator.embedder", c, 3 * v.patch**2, v.dino)
    for i in range(v.depth):
        scale = "grandma" if v.scale else None
        shapes |= block(f"{p}blocks.{i}", c, v.mlp, scale, v.dino, True)
    if v.dino:
        shapes |= norm(f"{p}norm", c) | {f"{p}mask_token": (1, c)}
    elif v.scale:
        shapes[f"{p}reg_token"] = (1, 4, c)
    return shapes


def heads(v: Version, summary: str, spatial: str, names: dict[str, str], blocks: int = 1) -> Shapes:
    shapes: Shapes = {}
    kind = "v2" if v.head == "attn" else v.head
    for teacher, (vector, features) in v.teachers.items():
        into = summary.format(names[teacher]), spatial.format(names[teacher])
        shapes |= mlp_head(into[0], v.width, v.hidden, vector or features, kind, blocks)
        if v.head == "attn":
            for i in range(2):
                name = f"{into[1]}.blocks.{i}"
                shapes |= block(name, v.width, 4 * v.width, "gamma", False, False)
            shapes |= mlp_head(f"{into[1]}.mlp", v.width, v.hidden, features, kind, 0)
        else:
            shapes |= mlp_head(into[1], v.width, v.hidden, features, kind, blocks)
    return shapes


def statistics(prefix: str) -> Shapes:
    return {f"{prefix}input_conditioner.norm_{k}": (3, 1, 1) for k in ("mean", "std")}


def hub(v: Version, by_name: bool = True, normalisers: str | None = None) -> Shapes:
    """A torch.hub file's state dict."""
    names = {t: t if by_name else str(i) for i, t in enumerate(v.teachers)}
    shapes = trunk(v, "base_model.") | statistics("")
    shapes |= heads(v, "_heads.{}", "_feature_projections.{}", names)
    if normalisers:
        n, c = v.depth, v.width
        shapes |= {"_feature_normalizer.mean": (c,), "_feature_normalizer.tx": (c, c)}
        start = "_intermediate_feature_normalizer."
        shapes |= {
            f"{start}alphas": (n,),
            f"{start}rotation": (n, c, c) if normalisers == "layer" else (c, c),
            f"{start}means": (n, c),
        }
    return shapes


def folder(v: Version, prefix: str = "") -> Shapes:
    """A transformers folder's state dict."""
    p = f"{prefix}radio_model."
    names = {t: t for t in v.teachers}
    shapes = trunk(v, f"{p}model.") | statistics(p) | {f"{p}summary_idxs": (v.summary,)}
    return shapes | heads(v, p + "adaptors.{}.head_mlp", p + "adaptors.{}.feat_mlp", names)


def fill(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values; statistics that can be divided by, indices that exist."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("summary_idxs"):
            state[name] = torch.arange(shape[0])
            continue
        value = torch.randn(shape, generator=generator)
        if name.endswith("norm_std"):
            value = 0.2 + 0.1 * value.abs()
        elif len(shape) > 1 and "norm_mean" not in name:
            value *= shape[-1] ** -0.5
        state[name] = value.to(dtype)
    return state


def arguments(v: Version) -> dict[str, object]:
    """What a checkpoint says of its training, as far as it matters."""
    teachers = [
        {"name": name, "type": "open_clip", "use_summary": i < v.summary or v.cls == 1}
        for i, name in enumerate(v.teachers)
    ]
    return {"model": "vit", "teachers": teachers, "cls_token_per_teacher": v.cls > 1}


# A plain forward pass, from the names alone.


def attend(x: Tensor, s: dict[str, Tensor], name: str, count: int, eps: float) -> Tensor:
    c = x.shape[-1]
    y = F.layer_norm(x, (c,), s[f"{name}.norm1.weight"], s[f"{name}.norm1.bias"], eps)
    qkv = F.linear(y, s[f"{name}.attn.qkv.weight"], s.get(f"{name}.attn.qkv.bias"))
    q, k, v = (t.unflatten(-1, (count, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    weights = (q @ k.transpose(2, 3) * (c // count) ** -0.5).softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    y = F.linear(y, s[f"{name}.attn.proj.weight"], s[f"{name}.attn.proj.bias"])
    one = torch.ones(c, dtype=x.dtype)
    scale = [s.get(f"{name}.ls{i}.grandma", s.get(f"{name}.ls{i}.gamma", one)) for i in (1, 2)]
    x = x + scale[0] * y
    y = F.layer_norm(x, (c,), s[f"{name}.norm2.weight"], s[f"{name}.norm2.bias"], eps)
    if f"{name}.mlp.w12.weight" in s:
        gate, y = F.linear(y, s[f"{name}.mlp.w12.weight"], s[f"{name}.mlp.w12.bias"]).chunk(2, -1)
        y = F.linear(F.silu(gate) * y, s[f"{name}.mlp.w3.weight"], s[f"{name}.mlp.w3.bias"])
    else:
        y = F.gelu(F.linear(y, s[f"{name}.mlp.fc1.weight"], s[f"{name}.mlp.fc1.bias"]))
        y = F.linear(y, s[f"{name}.mlp.fc2.weight"], s[f"{name}.mlp.fc2.bias"])
    return x + scale[1] * y


def head(x: Tensor, s: dict[str, Tensor], name: str) -> Tensor:
    def layer(x: Tensor, part: str) -> Tensor:
        return F.linear(x, s[f"{name}.{part}.weight"], s[f"{name}.{part}.bias"])

    def normal(x: Tensor, part: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.{part}.weight"], s[f"{name}.{part}.bias"])

    x = layer(x, "fc1")
    if f"{name}.fc2.weight" in s:
        x, i = normal(x, "norm").relu(), 0
        while f"{name}.inner.{i}.weight" in s:
            x, i = normal(layer(x, f"inner.{i}"), f"inner.{i + 1}").relu(), i + 3
        return layer(x, "fc2")
    i = 0
    while f"{name}.blocks.{i}.0.weight" in s:
        x, i = x + layer(F.gelu(normal(x, f"blocks.{i}.0")), f"blocks.{i}.2"), i + 1
    return layer(F.gelu(normal(x, "final.0")), "final.2")


def forward(
    v: Version, state: dict[str, Tensor], images: Tensor, names: dict[str, str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """(summary (N, C), spatial (N, h, w, C)) of the backbone and of every teacher; fp64."""
    s = {k: t.double() if t.is_floating_point() else t for k, t in state.items()}
    p = "base_model." + ("inner." if v.dino else "")
    x = (images.double() - s["input_conditioner.norm_mean"]) / s["input_conditioner.norm_std"]
    n, (h, w) = len(x), (side // v.patch for side in x.shape[2:])
    weight = s[f"{p}patch_generator.embedder.weight"].unflatten(1, (3, v.patch, v.patch))
    x = F.conv2d(x, weight, s.get(f"{p}patch_generator.embedder.bias"), v.patch)
    table = s[f"{p}patch_generator.pos_embed"].unflatten(1, (v.grid, v.grid)).permute(0, 3, 1, 2)
    table = F.interpolate(table, (max(h, w),) * 2, mode="bilinear", align_corners=False)
    x = (x + table[..., :h, :w]).flatten(2).transpose(1, 2)
    tokens = s[f"{p}patch_generator.cls_token.token"]
    x = torch.cat([tokens.expand(n, -1, -1), x], dim=1)
    for i in range(v.depth):
        x = attend(x, s, f"{p}blocks.{i}", v.attention, 1e-6)
    if v.dino:
        x = F.layer_norm(x, x.shape[-1:], s[f"{p}norm.weight"], s[f"{p}norm.bias"], 1e-6)
    cls, patches = x[:, : v.cls], x[:, v.cls + v.registers :]
    if "_feature_normalizer.mean" in s:
        patches = (patches - s["_feature_normalizer.mean"]) @ s["_feature_normalizer.tx"].T
    out = {"backbone": (cls[:, : v.summary].flatten(1), patches.unflatten(1, (h, w)))}
    for i, teacher in enumerate(v.teachers):
        name = teacher if names is None else names[teacher]
        y, start = patches, f"_feature_projections.{name}"
        if v.head == "attn":
            for j in range(2):
                y = attend(y, s, f"{start}.blocks.{j}", 16, 1e-6)
            start += ".mlp"
        summary = head(cls[:, i if v.cls > 1 else 0], s, f"_heads.{name}")
        out[teacher] = summary, head(y, s, start).unflatten(1, (h, w))
    return out
