"""The student, and timm's VisionTransformer with the same weights run in the ways that users do.

timm's module holds our architecture exactly: one CLS token, registers, LayerScale, SwiGLU, and
positions for patches alone. Two things differ from it as it comes. Its positions are resized with
antialiasing by bicubic splines; here they are resized as ours are, bilinearly, once per resolution
and call. And it takes one resolution a call: that is what the peers are about.

All read the same uint8 images, and normalise them. The gradient of the features is given, zero for
registers, so that no loss is timed; all give the gradients of all parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine import Unavailable
from bench.student_cases import Case
from fastagglo.model import PackedBatch, Student
from fastagglo.model.packing import PIXEL_MEAN, PIXEL_STD


@dataclass(frozen=True)
class Batch:
    """The inputs of a case, the same for all peers.

    Attributes:
        case: what they are for.
        student: ours, whose weights the peers copy.
        images: (n, 3, H, W), uint8, per size.
        upstream: (n, prefix + h w, C) per size: the gradient of the normed tokens, 0 for registers.
    """

    case: Case
    student: Student
    images: list[Tensor]
    upstream: list[Tensor]

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """Random weights, images and gradients: bfloat16 on CUDA, float32 on a CPU."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        config = case.config
        random = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            student = Student(config).eval()
        for name, parameter in student.named_parameters():
            _fill(name, parameter, random)
        images, upstream = [], []
        for count, grid in case.grids:
            size = (count, 3, grid * config.patch_size, grid * config.patch_size)
            images.append(
                torch.randint(256, size, generator=random, device=device, dtype=torch.uint8)
            )
            shape = (count, case.prefix + grid**2, config.width)
            gradient = torch.randn(shape, generator=random, device=device, dtype=dtype)
            gradient[:, 1 : case.prefix] = 0
            upstream.append(gradient)
        student.to(dtype).requires_grad_(case.backward)
        return cls(case, student, images, upstream)


@torch.no_grad()
def _fill(name: str, parameter: Tensor, random: torch.Generator) -> None:
    """Weights under which every layer counts, as after training; fresh ones hide most."""
    draw = torch.randn(
        parameter.shape, generator=random, device=parameter.device, dtype=parameter.dtype
    )
    if "norm" in name or name.endswith("gamma"):
        base = 0.0 if name.endswith("bias") else 0.5 if name.endswith("gamma") else 1.0
        parameter.copy_(base + 0.1 * draw)
    elif name.endswith("weight"):
        parameter.copy_(draw * parameter.shape[1] ** -0.5)
    else:  # biases, tokens, positions
        parameter.copy_(0.3 * draw)


@dataclass(frozen=True)
class Run:
    """A way to run a batch.

    Attributes:
        batch: the inputs.
        module: whose parameters are differentiated.
        features: what is timed: tensors.
        upstream: the gradient of each of them.
        tidy: from these tensors to (n, 1 + h w, C) per size: normed CLS tokens and patches.
        named: from the parameters' gradients to those of ours, by name.
        info: for the results.
    """

    batch: Batch
    module: nn.Module
    features: Callable[[], list[Tensor]]
    upstream: list[Tensor]
    tidy: Callable[[list[Tensor]], list[Tensor]]
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        parameters = sum(p.nbytes for p in self.module.parameters())
        inputs = sum(x.nbytes for x in self.batch.images)
        return parameters + inputs + self.batch.case.backward * sum(x.nbytes for x in self.upstream)

    def __call__(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        features = self.features()
        if not self.batch.case.backward:
            return features, ()
        return features, torch.autograd.grad(
            features, list(self.module.parameters()), self.upstream
        )

    def results(self) -> dict[str, Tensor]:
        """Features of each size, and the gradients under our parameters' names."""
        features, gradients = self()
        found = {
            f"features of {tuple(images.shape)}": tokens.detach()
            for images, tokens in zip(self.batch.images, self.tidy(features), strict=True)
        }
        if gradients:
            names = [name for name, _ in self.module.named_parameters()]
            by_name = self.named(dict(zip(names, gradients, strict=True)))
            found |= {f"gradient of {name}": value for name, value in by_name.items()}
        return found


def ours(batch: Batch) -> Run:
    """The student on the packed batch."""
    student, packed = batch.student, PackedBatch.from_images(batch.images)
    prefix = batch.case.prefix

    def features() -> list[Tensor]:
        backbone = student(packed).backbone
        return [backbone.summary, *backbone.spatial]

    def tidy(found: list[Tensor]) -> list[Tensor]:
        summary, *spatial = found
        pieces = summary.split([len(x) for x in spatial])
        return [
            torch.cat([cls[:, None], patches.flatten(1, 2)], 1)
            for cls, patches in zip(pieces, spatial, strict=True)
        ]

    def named(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = [gradients.pop("cls_tokens.backbone")[None], gradients.pop("registers")]
        return gradients | {"tokens": torch.cat(tokens)}

    shapes = [(n, grid, grid, -1) for n, grid in batch.case.grids]
    upstream = [torch.cat([x[:, 0] for x in batch.upstream])]
    upstream += [
        x[:, prefix:].reshape(shape) for x, shape in zip(batch.upstream, shapes, strict=True)
    ]
    return Run(batch, student, features, upstream, tidy, named)


# --- timm -----------------------------------------------------------------------------------------


def plain(batch: Batch) -> nn.Module:
    """timm's VisionTransformer with our weights; ``model(images, positions, key mask)``.

    Raises:
        Unavailable: timm is not installed.
    """
    try:
        from timm.layers import SwiGLUPacked
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise Unavailable("timm is not installed: pip install timm") from None
    config = batch.case.config
    gated = config.mlp == "swiglu"

    class Plain(VisionTransformer):
        """Takes the positions of its images, already resized."""

        def embed(self, images: Tensor, positions: Tensor) -> Tensor:
            patches = self.patch_embed(images) + positions
            tokens = torch.cat([self.cls_token, self.reg_token], dim=1)
            return torch.cat([tokens.expand(len(images), -1, -1), patches], dim=1)

        def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            for block in self.blocks:
                x = block(x, attn_mask=mask)
            return self.norm(x)

        def forward(self, images: Tensor, positions: Tensor) -> Tensor:
            return self.encode(self.embed(images, positions))

    hidden = config.mlp_width * (2 if gated else 1)
    first = next(batch.student.parameters())
    with torch.device(first.device):
        model = Plain(
            img_size=config.grid * config.patch_size,
            patch_size=config.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=(hidden + 0.5) / config.width,  # timm rounds the product down
            init_values=config.layer_scale,
            no_embed_class=True,
            reg_tokens=batch.case.prefix - 1,
            embed_layer=_embed_layer(),
            weight_init="skip",
            **({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}),
        )
    model.eval().to(first.dtype).requires_grad_(batch.case.backward)
    model.load_state_dict(_timm_state(batch.student))
    return model


def _embed_layer() -> Callable[..., nn.Module]:
    from timm.layers import PatchEmbed

    def embed(**settings: Any) -> nn.Module:
        return PatchEmbed(**settings, strict_img_size=False)

    return embed


# Where timm's names differ from ours.
_NAMES = {
    "positions.table": "pos_embed",
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
}
_GATED = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


def _timm_name(name: str) -> str:
    name = _NAMES.get(name, name)
    for mine, theirs in _GATED.items():
        name = name.replace(mine, theirs)
    return name


def _timm_state(student: Student) -> dict[str, Tensor]:
    state = student.state_dict()
    cls, registers = state.pop("cls_tokens.backbone"), state.pop("registers")
    found = {_timm_name(name): value for name, value in state.items()}
    patch = student.config.patch_size
    found["patch_embed.proj.weight"] = state["patch_embed.weight"].unflatten(1, (3, patch, patch))
    return found | {"cls_token": cls[None, None], "reg_token": registers[None]}


def _our_gradients(batch: Batch) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """From gradients by timm's names to ours."""
    names = [n for n, _ in batch.student.named_parameters()]

    def named(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {
            name: gradients[_timm_name(name)]
            for name in names
            if name not in ("cls_tokens.backbone", "registers")
        }
        found["patch_embed.weight"] = found["patch_embed.weight"].flatten(1)
        tokens = torch.cat([gradients["cls_token"][0], gradients["reg_token"][0]])
        return found | {"tokens": tokens}

    return named


@dataclass(frozen=True)
class _Plain:
    """timm's module and what all ways to run it share."""

    batch: Batch
    model: Any
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Plain:
        device = batch.images[0].device
        statistics = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=device)[..., None, None]
        return cls(batch, plain(batch), statistics[0], statistics[1])

    def normalised(self, images: Tensor) -> Tensor:
        return ((images / 255 - self.mean) / self.std).to(self.model.pos_embed.dtype)

    def positions(self, grid: int) -> Tensor:
        """The table for a square image of ``grid`` patches: (1, grid**2, C)."""
        table, side = self.model.pos_embed, self.batch.case.config.grid
        square = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return F.interpolate(square, (grid, grid), mode="bilinear").flatten(2).transpose(1, 2)

    def run(
        self,
        features: Callable[[], list[Tensor]],
        upstream: list[Tensor],
        whole: Callable[[list[Tensor]], list[Tensor]] = lambda found: found,
        **info: Any,
    ) -> Run:
        """A run; ``whole`` makes of its tensors (n, prefix + h w, C) per size."""
        prefix = self.batch.case.prefix

        def tidy(found: list[Tensor]) -> list[Tensor]:
            return [torch.cat([x[:, :1], x[:, prefix:]], 1) for x in whole(found)]

        named = _our_gradients(self.batch)
        return Run(self.batch, self.model, features, upstream, tidy, named, info)

    @property
    def groups(self) -> Sequence[tuple[Tensor, int]]:
        """Images and patches per side of each size."""
        grids = self.batch.case.grids
        return [(x, grid) for x, (_, grid) in zip(self.batch.images, grids, strict=True)]


def per_image(batch: Batch) -> Run:
    """timm's module on one image after the other."""
    peer = _Plain.of(batch)
    counts = [len(x) for x in batch.images]

    def features() -> list[Tensor]:
        found = []
        for images, grid in peer.groups:
            positions = peer.positions(grid)
            found += [peer.model(peer.normalised(x), positions) for x in images.split(1)]
        return found

    def whole(found: list[Tensor]) -> list[Tensor]:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [torch.cat(found[b - n : b]) for n, b in zip(counts, ends, strict=True)]

    return peer.run(features, [x for group in batch.upstream for x in group.split(1)], whole)


def per_resolution(batch: Batch) -> Run:
    """timm's module on one dense batch per resolution."""
    return _dense(_Plain.of(batch))


def _dense(peer: _Plain, **info: Any) -> Run:
    def features() -> list[Tensor]:
        return [
            peer.model(peer.normalised(images), peer.positions(grid))
            for images, grid in peer.groups
        ]

    return peer.run(features, peer.batch.upstream, **info)


def compiled(batch: Batch) -> Run:
    """The same with each block under torch.compile: PyTorch's advice for repeated layers."""
    peer = _Plain.of(batch)
    torch.compiler.reset()
    for block in peer.model.blocks:
        block.compile()
    run = _dense(peer)
    start = time.perf_counter()
    run()
    run()
    return _dense(peer, compile_seconds=round(time.perf_counter() - start, 1))


def padded(batch: Batch) -> Run:
    """timm's module on one batch, padded to the longest image, with a mask over keys.

    As timm's NaFlexVit does it, but for the embedding, which needs no padding.
    """
    peer = _Plain.of(batch)
    lengths = batch.case.lengths
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = valid[:, None, None].to(batch.images[0].device)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, longest - x.shape[1]))

    def features() -> list[Tensor]:
        parts = [
            pad(peer.model.embed(peer.normalised(images), peer.positions(grid)))
            for images, grid in peer.groups
        ]
        return [peer.model.encode(torch.cat(parts), mask)]

    def whole(found: list[Tensor]) -> list[Tensor]:
        parts = found[0].split([len(x) for x in batch.images])
        return [x[:, : y.shape[1]] for x, y in zip(parts, batch.upstream, strict=True)]

    return peer.run(features, [torch.cat([pad(x) for x in batch.upstream])], whole)


PEERS: Mapping[str, tuple[str, Callable[[Batch], Run]]] = {
    "fastagglo": ("fastagglo, one packed batch", ours),
    "per-image": ("timm's ViT, image by image", per_image),
    "per-resolution": ("timm's ViT, a batch per resolution", per_resolution),
    "padded": ("timm's ViT, padded and masked", padded),
    "compile": ("timm's ViT, blocks compiled, a batch per resolution", compiled),
}
"""By name: what it is in words, and what makes it ready for a batch."""
