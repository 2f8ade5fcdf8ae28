"""The training step as a public multi-teacher trainer writes it: what the suite ``step`` compares.

Plain PyTorch and nothing of fastagglo but the draw of position crops, so that both sides draw the
same. A resolution at a time: the student's forward and backward over all images of that size, its
gradients added up over sizes; then clipping and the optimiser. Blocks as timm writes them with
``scaled_dot_product_attention``, heads as ``nn.Sequential``, losses in eager mode, features of
unequal grids resized by ``F.interpolate``. PHI-S (arXiv 2410.01680) is a C x C matrix product with
every target token, in float64 as NVIDIA's TAO keeps it, or one of two cheaper forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.model.positions import crop_boxes

Target = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class PlainConfig:
    """Shape of the student.

    Attributes:
        width, depth, num_heads, mlp_width, patch, grid, registers: as the names say; ``grid`` is
            the side of the position table.
        layer_scale: initial value, or None for none.
        norm_eps: of the blocks' LayerNorms.
        heads: by teacher, in the order of CLS tokens: channels of its summary (or None) and of its
            spatial features, hidden width, and the factor by which the spatial grid is refined.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch: int
    grid: int
    registers: int
    layer_scale: float | None
    norm_eps: float
    heads: Mapping[str, tuple[int | None, int, int, int]]


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))


class MLP(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class LayerScale(nn.Module):
    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        width, scale = config.width, config.layer_scale
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.num_heads)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.mlp_width)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def head(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out)
    )


class PlainStudent(nn.Module):
    """A vision transformer with a CLS token and two heads for each teacher."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        width, teachers = config.width, config.heads
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.cls_tokens = nn.Parameter(torch.zeros(len(teachers), width))
        self.registers = nn.Parameter(torch.zeros(config.registers, width))
        self.positions = nn.Parameter(torch.zeros(1, width, config.grid, config.grid))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.summary_heads = nn.ModuleDict()
        self.spatial_heads = nn.ModuleDict()
        for name, (summary, spatial, hidden, upsample) in teachers.items():
            if summary is not None:
                self.summary_heads[name] = head(width, hidden, summary)
            self.spatial_heads[name] = head(width, hidden, spatial * upsample**2)
        for name, values in (
            ("mean", (0.48145466, 0.4578275, 0.40821073)),
            ("std", (0.26862954, 0.26130258, 0.27577711)),
        ):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, uniform: Tensor) -> dict[str, tuple[Tensor | None, Tensor]]:
        """``images`` (N, 3, S, S) uint8 and ``uniform`` (N, 4), which draws the position crops.

        Returns:
            by teacher its summary (N, C) or None, and spatial features (N, C, h, w).
        """
        config, n = self.config, len(images)
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed((images.to(dtype) / 255 - self.mean) / self.std)
        h, w = x.shape[2:]
        x = (x + self._positions(uniform, h, w)).flatten(2).transpose(1, 2)
        prefix = torch.cat([self.cls_tokens, self.registers]).expand(n, -1, -1)
        x = torch.cat([prefix, x.to(prefix.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = x[:, prefix.shape[1] :]
        found = {}
        for slot, (name, (_, spatial, _, upsample)) in enumerate(config.heads.items()):
            maps = self.spatial_heads[name](patches)
            # nn.PixelShuffle wants the cells of a patch behind its channels; these lie before.
            maps = maps.view(n, h, w, upsample, upsample, spatial)
            maps = maps.permute(0, 5, 1, 3, 2, 4).reshape(n, spatial, h * upsample, w * upsample)
            vector = self.summary_heads[name](x[:, slot]) if name in self.summary_heads else None
            found[name] = vector, maps
        return found

    def _positions(self, uniform: Tensor, h: int, w: int) -> Tensor:
        """Random crops of the table, one an image, by ``grid_sample`` (arXiv 2312.06709)."""
        start, side = crop_boxes(uniform)
        rows, columns = (torch.linspace(0, 1, s, device=uniform.device) for s in (h, w))
        y = start[:, :1] + side[:, :1] * rows
        x = start[:, 1:] + side[:, 1:] * columns
        at = torch.stack([x[:, None].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)], dim=-1)
        table = self.positions.expand(len(uniform), -1, -1, -1)
        at = (at * 2 - 1).to(table.dtype)
        with torch.autocast(uniform.device.type, enabled=False):
            return F.grid_sample(table, at, mode="bilinear", align_corners=True)


class MatrixNormaliser(nn.Module):
    """PHI-S with its rotation: ``(y - mean) @ matrix.T``, the scale in the matrix."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, rotation: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mean", mean.to(dtype))
        self.register_buffer("matrix", (rotation.double() / scale.double()).to(dtype))

    def forward(self, y: Tensor) -> Tensor:
        return ((y.to(self.mean.dtype) - self.mean) @ self.matrix.T).to(y.dtype)


class AffineNormaliser(nn.Module):
    """PHI-S without its rotation, to which mse is blind."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    def forward(self, y: Tensor) -> Tensor:
        return (y - self.mean) / self.scale


def mse(x: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error of (N, C, h, w) features, on the larger of both grids."""
    size = [max(sides) for sides in zip(x.shape[2:], goal.shape[2:], strict=True)]
    pair = [
        y
        if list(y.shape[2:]) == size
        else F.interpolate(y, size, mode="bilinear", align_corners=False)
        for y in (x, goal)
    ]
    return F.mse_loss(*pair)


class PlainTrainer:
    """Student, normalisers and optimiser, and the step over them.

    Args:
        student: may be compiled.
        config: its shape.
        normalisers: of spatial targets, by teacher.
        optimiser: over the student's parameters.
        learning_rate: of a step.
        clip: largest norm of the gradient.
        bf16: run the student under autocast.
        number: of the first step.
    """

    def __init__(
        self,
        student: nn.Module,
        config: PlainConfig,
        normalisers: Mapping[str, nn.Module],
        optimiser: torch.optim.Optimizer,
        learning_rate: Callable[[int], float],
        *,
        clip: float,
        bf16: bool,
        number: int = 0,
    ) -> None:
        self.student, self.config, self.normalisers = student, config, normalisers
        self.optimiser, self.learning_rate = optimiser, learning_rate
        self.parameters = list(student.parameters())
        self.clip, self.bf16 = clip, bf16
        self.number = number

    def step(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Target]],
        uniform: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step on images of several resolutions.

        Args:
            images: per resolution (N, 3, S, S) uint8.
            targets: per resolution and teacher its summary (N, C) or None and its spatial features
                (N, h, w, C).
            uniform: (all images, 4) random numbers of the position crops.

        Returns:
            each term's loss times its share of the images, ``<teacher>.<kind>.<resolution>``, and
            the gradient's norm before clipping.
        """
        self.optimiser.zero_grad(set_to_none=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.number)
        losses: dict[str, Tensor] = {}
        shares = self._shares(images, targets)
        crops = uniform.split([len(x) for x in images])
        for index, (x, crop, goals) in enumerate(zip(images, crops, targets, strict=True)):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                output = self.student(x, crop)
            terms = {}
            for name, (goal_summary, goal_spatial) in goals.items():
                summary, spatial = output[name]
                goal = self.normalisers[name](goal_spatial).permute(0, 3, 1, 2)
                loss = mse(spatial.to(goal.dtype), goal)
                terms[f"{name}.spatial.{index}"] = loss * shares[index][name]
                if summary is not None and goal_summary is not None:
                    summary = summary.to(goal_summary.dtype)
                    loss = 1 - F.cosine_similarity(summary, goal_summary, dim=-1).mean()
                    terms[f"{name}.summary.{index}"] = loss * (len(x) / len(uniform))
            torch.stack(list(terms.values())).sum().backward()
            losses |= {name: term.detach() for name, term in terms.items()}
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if norm.isfinite():
            self.optimiser.step()
        self.number += 1
        return losses, norm

    def _shares(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Target]]
    ) -> list[dict[str, float]]:
        """Of each resolution in each spatial loss: an image counts as the root of its cells."""
        weights = [
            {
                name: len(x) * self._side(name, x.shape[-1], goal.shape[2])
                for name, (_, goal) in goals.items()
            }
            for x, goals in zip(images, targets, strict=True)
        ]
        whole = {name: sum(w[name] for w in weights) for name in weights[0]}
        return [{name: w[name] / whole[name] for name in w} for w in weights]

    def _side(self, name: str, pixels: int, cells: int) -> int:
        """Cells along the grid, a square one, on which student and teacher are compared."""
        return max(pixels // self.config.patch * self.config.heads[name][3], cells)
