"""The student: one ViT trunk for any mix of resolutions, and the adaptor heads of its teachers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastagglo.features import Features
from fastagglo.model.budget import BudgetRun, Grids, budget_inputs, run_budget
from fastagglo.model.config import StudentConfig, preset
from fastagglo.model.exported import exported_geometry
from fastagglo.model.normaliser import BlockNormaliser, FeatureNormaliser
from fastagglo.model.packing import Geometry, PackedBatch, geometry, patchify, reorder
from fastagglo.model.positions import CroppedPositions
from fastagglo.model.vit import Block
from fastagglo.ops.exporting import exporting
from fastagglo.ops.heads import AdaptorHeads, HeadSpec, LayerNorm, pixel_shuffle

__all__ = ["Student", "StudentOutput", "create_student"]


class StudentOutput(dict[str, Features]):
    """Features per teacher name; ``summary`` or ``spatial`` is None where the head is.

    Attributes:
        backbone: the trunk's own features: ``summary`` (N, CLS tokens * C), the CLS tokens side
            by side in the order of the heads (or those that ``config.summary`` names), and
            ``spatial``, a (N_i, h_i, w_i, C) per group.
    """

    def __init__(self, features: Mapping[str, Features], backbone: Features) -> None:
        super().__init__(features)
        self.backbone = backbone


class Student(nn.Module):
    """A vision transformer that learns from several teachers (AM-RADIO, arXiv 2312.06709).

    Attributes:
        config: its :class:`StudentConfig`.
        checkpoint_blocks: recompute each block's activations in the backward pass: less memory,
            about a third more time. Off at first; set it at will.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        if not isinstance(config, StudentConfig):
            raise TypeError(f"Student: config must be a StudentConfig, got {config!r}")
        self.config = config
        self.checkpoint_blocks = False
        width = config.width

        def block(layer_scale: float | None, kind: str = "student") -> Block:
            if kind == "timm":
                return Block(width, 16, 4 * width, "gelu", layer_scale, config.norm_eps, False)
            return Block(
                width, config.num_heads, config.mlp_width, config.mlp, layer_scale, config.norm_eps
            )

        self.patch_embed = nn.Linear(3 * config.patch_size**2, width, bias=config.patch_bias)
        # By name, so that a warm start with other teachers moves each CLS token to its new slot.
        tokens = ((name, nn.Parameter(torch.empty(width))) for name in config.cls_names)
        # torch sorts a plain dict; an OrderedDict keeps the heads' order.
        self.cls_tokens = nn.ParameterDict(OrderedDict(tokens))
        self.registers = nn.Parameter(torch.empty(config.registers, width))
        for parameter in (self.patch_embed.weight, self.registers, *self.cls_tokens.values()):
            nn.init.trunc_normal_(parameter, std=0.02)
        if config.patch_bias:
            nn.init.zeros_(self.patch_embed.bias)
        self.positions = CroppedPositions(config.grid, width)
        self.blocks = nn.ModuleList(block(config.layer_scale) for _ in range(config.depth))
        self.norm = LayerNorm(width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.feature_normaliser = FeatureNormaliser(width) if config.feature_normaliser else None
        self.block_normaliser = (
            BlockNormaliser(width, config.depth, config.block_normaliser == "layer")
            if config.block_normaliser
            else None
        )
        # C-RADIOv4's spatial heads begin with transformer blocks (LayerScale 1e-5).
        self.head_blocks = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    block(1e-5, spec.spatial_block) for _ in range(spec.spatial_blocks)
                )
                for name, spec in config.heads.items()
                if spec.spatial_blocks
            }
        )
        self.heads = AdaptorHeads(width, config.heads)

    def forward(
        self,
        batch: PackedBatch | Tensor,
        rotations: Mapping[str, Tensor] | None = None,
        window: int | str | None = "config",
        only: Collection[str] | None = None,
        generator: torch.Generator | None = None,
        run: BudgetRun = run_budget,
    ) -> StudentOutput:
        """Features of a batch for every teacher.

        Each image gets what it would get alone, to rounding; in training, position crops and
        stochastic depth are drawn per image.

        Args:
            batch: a :class:`PackedBatch`, or (N, 3, H, W) images as its ``from_images`` takes.
                Height and width must be multiples of the patch size, up to ``max_resolution``.
            rotations: per teacher (C, C), the rotation R of a PHI-S target; its spatial features
                are then ``R.T (W x + b)``. See :meth:`fastagglo.ops.heads.AdaptorMLP.forward`.
            window: patches per side of a ViTDet window (arXiv 2203.16527), None for global
                attention everywhere, or ``"config"`` for the configuration's. Only patches take
                part in windowed layers; CLS and register tokens pass by unchanged.
            only: names of the teachers to compute; the others cost nothing. None means all.
            generator: random source for training; None is torch's global one. It may be a CPU
                generator whatever the device.
            run: of a batch with a capacity, what computes the part of constant shapes;
                ``torch.compile(run_budget, dynamic=False)``, say.

        Returns:
            a dict of teacher name to :class:`~fastagglo.features.Features`: ``summary``
            (N, C_summary) over all images in batch order, ``spatial`` a list with one
            (N_i, h_i * upsample, w_i * upsample, C_spatial) per group; and ``.backbone``.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: a size that the patch or the window does not divide or that is too large,
                a batch on another device or beyond its own capacity, or an unknown teacher.
        """
        if isinstance(batch, Tensor):
            batch = PackedBatch.from_images([batch])
        names = self.heads.select(only)
        grids, window = self._mix(batch, window)
        if batch.capacity is not None:
            return self._at_capacity(batch, grids, window, rotations, names, generator, run)
        place = self._geometry(grids, window)
        summary, spatial = self._trunk(batch, place, generator)
        per_teacher: Tensor | dict[str, Tensor] = spatial
        if self.head_blocks:
            per_teacher = {n: self._head_tokens(n, spatial, place) for n in names}
        outputs = self.heads(self.head_summaries(summary), per_teacher, rotations, names)
        return self._output(summary, spatial, outputs, grids)

    def _at_capacity(
        self,
        batch: PackedBatch,
        grids: Grids,
        window: int | None,
        rotations: Mapping[str, Tensor] | None,
        names: Sequence[str],
        generator: torch.Generator | None,
        run: BudgetRun,
    ) -> StudentOutput:
        slots, uniform = batch.max_images, None
        if self.training:
            uniform = self.positions.draw(slots, generator)
        keep = self._draw_keep(slots, self.registers, generator)
        inputs = budget_inputs(
            self, batch.groups, grids, batch.capacity, slots, window, uniform, keep
        )
        summary, rows, outputs = run(self, inputs, rotations or {}, tuple(names))
        images = batch.num_images
        found = {n: (None if a is None else a[:images], b) for n, (a, b) in outputs.items()}
        return self._output(summary[:images], rows, found, grids)

    def _output(
        self,
        summary: Tensor,
        spatial: Tensor,
        outputs: Mapping[str, tuple[Tensor | None, Tensor | None]],
        grids: Grids,
    ) -> StudentOutput:
        features = {
            name: Features(
                vector,
                None if tokens is None else _split(tokens, grids, self.config.heads[name].upsample),
            )
            for name, (vector, tokens) in outputs.items()
        }
        if self.config.summary:
            slots = [self.config.cls_names.index(name) for name in self.config.summary]
            summary = torch.stack([summary[:, slot] for slot in slots], dim=1)
        return StudentOutput(features, Features(summary.flatten(1), _split(spatial, grids, 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """The trunk's tokens of images of one size, as timm's vision transformers give them.

        Args:
            x: (N, 3, H, W) images as ``PackedBatch.from_images`` takes.

        Returns:
            (N, prefix + h * w, C): CLS tokens, registers, patches row by row, after the last norm
            (and before a feature normaliser).

        Raises:
            TypeError, ValueError: as of :meth:`forward`; ``x`` must be one tensor.
        """
        return self.forward_intermediates(x, 1, norm=True, output_fmt="NLC")[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Outputs of chosen blocks, with the arguments of timm's method of this name.

        Args:
            x: (N, 3, H, W) images as ``PackedBatch.from_images`` takes.
            indices: a number n for the last n blocks, block numbers (negative: from the end), or
                None for all.
            return_prefix_tokens: pair each output with its CLS and register tokens.
            norm: apply the last norm to each output.
            output_fmt: ``"NCHW"`` for (N, C, h, w), ``"NLC"`` for (N, h * w, C).
            intermediates_only: leave out the final tokens.

        Returns:
            the outputs in the order of the blocks, each a patch tensor or (patches, (N, prefix,
            C)); unless ``intermediates_only``, after the final tokens (N, prefix + h * w, C).

        Raises:
            TypeError, ValueError: as of :meth:`forward`, or an unknown block or format.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"student: x must be a (N, 3, H, W) tensor, got {type(x).__name__}")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"student: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken = self._taken(indices)
        batch = PackedBatch.from_images([x])
        place = self._geometry(*self._mix(batch, "config"))
        images, prefix = batch.num_images, self.config.prefix_tokens
        tokens = self._embed(batch, place, None)
        last = self._run_blocks(tokens, place, self._draw_keep(images, tokens, None), taken)
        (_, h, w), found = place.grids[0], []
        for i, value in taken.items():
            before, patches = value.view(images, prefix + h * w, -1).tensor_split([prefix], dim=1)
            if self.block_normaliser is not None:
                patches = self.block_normaliser(patches, i)
            before, patches = (self.norm(v) if norm else v for v in (before, patches))
            if output_fmt == "NCHW":
                patches = patches.unflatten(1, (h, w)).permute(0, 3, 1, 2).contiguous()
            found.append((patches, before) if return_prefix_tokens else patches)
        if intermediates_only:
            return found
        return self.norm(last).view(images, prefix + h * w, -1), found

    def _taken(self, indices: int | Sequence[int] | None) -> dict[int, Tensor | None]:
        depth = self.config.depth
        if indices is None or isinstance(indices, int):
            count = depth if indices is None else indices
            if isinstance(indices, bool) or not 1 <= count <= depth:
                raise ValueError(f"student: indices must be 1 to {depth} blocks, got {indices!r}")
            return dict.fromkeys(range(depth - count, depth))
        if bad := [i for i in indices if not -depth <= i < depth]:
            raise ValueError(f"student: indices must be blocks 0 to {depth - 1}, got {bad}")
        return dict.fromkeys(sorted({i % depth for i in indices}))

    def _trunk(
        self, batch: PackedBatch, place: Geometry, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The backbone: CLS tokens (N, CLS tokens, C) and patches (sum of N_i h_i w_i, C)."""
        images, prefix = batch.num_images, self.config.prefix_tokens
        x = self._embed(batch, place, generator)
        x = self.norm(self._run_blocks(x, place, self._draw_keep(images, x, generator)))
        x = reorder(x, place.unpack, place.pack)
        tokens, patches = x.split([place.prefix_rows, x.shape[0] - place.prefix_rows])
        if self.feature_normaliser is not None:
            patches = self.feature_normaliser(patches)
        return tokens.view(images, prefix, self.config.width)[:, : len(self.cls_tokens)], patches

    def _embed(
        self, batch: PackedBatch, place: Geometry, generator: torch.Generator | None
    ) -> Tensor:
        """What the first block reads: (T, C) in packed order."""
        images = batch.num_images
        config, dtype = self.config, self.patch_embed.weight.dtype
        pixels = patchify(batch.groups, config.patch_size, config.pixel_mean, config.pixel_std)
        patches = self.patch_embed(pixels.to(dtype))
        if self.training:
            patches = patches + self.positions.crop(place.unit, place.image_ids, images, generator)
        else:
            patches = patches + self.positions(place.grids)
        tokens = torch.cat([torch.stack(list(self.cls_tokens.values())), self.registers])
        rows = torch.cat([tokens.repeat(images, 1), patches.to(tokens.dtype)])
        return reorder(rows, place.pack, place.unpack)

    def _run_blocks(
        self,
        x: Tensor,
        place: Geometry,
        keep: Tensor | None,
        taken: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The last block's output in packed order; ``taken`` gets that of the layers it names."""
        windows, global_layers = place.windows, self.config.global_layer_set
        bypass: Tensor | None = None  # the prefix tokens, while in windowed layers
        for i, block in enumerate(self.blocks):
            windowed = windows is not None and i not in global_layers
            if windowed and bypass is None:
                x = reorder(x, windows.enter, windows.leave)
                bypass, x = x.split([place.prefix_rows, x.shape[0] - place.prefix_rows])
            elif not windowed and bypass is not None:
                x = reorder(torch.cat([bypass, x]), windows.leave, windows.enter)
                bypass = None
            layout = windows.layout if windowed else place.layout
            factors = None
            if keep is not None:
                image = place.image_ids if windowed else place.layout.segment_ids
                factors = keep[i].index_select(1, image)[..., None]
            x = self.run_block(block, x, layout, factors)
            if taken is not None and i in taken:
                taken[i] = x
                if windowed:
                    taken[i] = reorder(torch.cat([bypass, x]), windows.leave, windows.enter)
        return x  # in packed order: the last layer is always global

    def run_block(self, block: Block, *args: Any) -> Tensor:
        """A block's output, by recomputation in the backward pass if ``checkpoint_blocks``."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # Nothing inside draws random numbers, so there is no state to stash.
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def _draw_keep(
        self, images: int, like: Tensor, generator: torch.Generator | None
    ) -> Tensor | None:
        """Stochastic depth's factors (depth, 2, N): 0 or 1 / keep probability; None when off."""
        depth, drop = self.config.depth, self.config.drop_path
        if not self.training or drop == 0:
            return None
        draw_on = like.device if generator is None else generator.device
        uniform = torch.rand(depth, 2, images, device=draw_on, generator=generator)
        rates = torch.linspace(0, drop, depth, device=draw_on)[:, None, None]
        keep = (uniform >= rates) / (1 - rates)
        return keep.to(like.device, like.dtype, non_blocking=True)

    def head_summaries(self, cls: Tensor) -> Tensor | dict[str, Tensor] | None:
        """The CLS tokens (N, CLS tokens, C) as the summary heads read them."""
        names = self.config.cls_names
        if not self.heads.specs or names == tuple(self.heads.specs):
            return cls if self.heads.specs else None
        return {
            name: cls[:, names.index(name) if len(names) > 1 else 0] for name in self.heads.summary
        }

    def _head_tokens(self, name: str, spatial: Tensor, place: Geometry) -> Tensor:
        """The patches as one teacher's spatial head reads them."""
        if name not in self.head_blocks:
            return spatial
        for block in self.head_blocks[name]:
            spatial = self.run_block(block, spatial, place.patch_layout)
        return spatial

    def _geometry(self, grids: Grids, window: int | None) -> Geometry:
        make = exported_geometry if exporting() else geometry
        return make(grids, self.config.prefix_tokens, window, self.patch_embed.weight.device)

    def _mix(self, batch: PackedBatch, window: int | str | None) -> tuple[Grids, int | None]:
        """(images, h, w) in patches of each group of a batch, and its window, if all is well."""
        if not isinstance(batch, PackedBatch):
            raise TypeError(
                f"student: expected a PackedBatch or a (N, 3, H, W) tensor, got "
                f"{type(batch).__name__}"
            )
        device = self.patch_embed.weight.device
        if batch.device != device:
            raise ValueError(
                f"student: the batch is on {batch.device}, the student on {device}; "
                f"call batch.to({str(device)!r})"
            )
        window = self._window(window)
        p, grids = self.config.patch_size, []
        for group, (height, width) in zip(batch.groups, batch.sizes, strict=True):
            for size in (height, width):
                _check_size(size, p, self.positions.grid)
            grids.append((group.shape[0], height // p, width // p))
            if window is not None and (height // p % window or width // p % window):
                unit = window * p
                odd = dict.fromkeys(s for s in (height, width) if s % unit)
                near = ", ".join(f"{s} -> {_near(s, unit)}" for s in odd)
                raise ValueError(
                    f"student: windows of {window} patches must divide the image, got "
                    f"{height} x {width} px ({height // p} x {width // p} patches); use multiples "
                    f"of {unit} px (nearest: {near}), or another window"
                )
        return tuple(grids), window

    def _window(self, window: int | str | None) -> int | None:
        if window == "config":
            return self.config.window
        if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
            raise TypeError(f"student: window must be an int, None or 'config', got {window!r}")
        if window is not None and window < 1:
            raise ValueError(f"student: window must be at least 1 patch, got {window}")
        return window

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but the heads'."""
        return (p for name, p in self.named_parameters() if not _is_head(name))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters: MLPs and the blocks before them."""
        return (p for name, p in self.named_parameters() if _is_head(name))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to exempt: norms, biases, LayerScale, tokens, positions."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() < 2 or name in ("registers", "positions.table")
        }

    def layer_id(self, name: str) -> int:
        """The depth of a parameter, for layer-wise learning rates.

        0 for the embeddings, 1 .. depth for the blocks, depth + 1 for the final norm and heads.
        """
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        if _is_head(name) or name.startswith("norm."):
            return self.config.depth + 1
        return 0

    def layer_ids(self) -> dict[str, int]:
        """:meth:`layer_id` of every parameter."""
        return {name: self.layer_id(name) for name, _ in self.named_parameters()}


def create_student(
    name: str, heads: Mapping[str, HeadSpec] | None = None, **overrides: Any
) -> Student:
    """A student with fresh weights.

    Args:
        name: ``"tiny"`` (192 wide, 6 blocks), ``"B"``, ``"L"``, ``"SO400M"``, ``"H"`` or ``"g"``.
            ``"g"`` is RADIOv2.5-g's (patch 14, SwiGLU); C-RADIO's is ``create_student("g",
            patch_size=16, mlp="gelu", mlp_width=6144, max_resolution=2048)``.
        heads: a :class:`HeadSpec` per teacher, in the order of the CLS slots; None or empty gives
            a plain backbone with one CLS token.
        overrides: any other field of :class:`StudentConfig`, e.g. ``window=16``.

    Raises:
        ValueError: no such preset, or a value out of range.
        TypeError: no such setting, or a value of the wrong kind.
    """
    return Student(preset(name, heads, **overrides))


def _is_head(name: str) -> bool:
    return name.startswith(("heads.", "head_blocks."))


def _split(tokens: Tensor, grids: Grids, upsample: int) -> list[Tensor]:
    """Patch tokens (T, C * upsample**2) as one (n, h * upsample, w * upsample, C) per group.

    Rows behind the patches are left out.
    """
    counts = [n * h * w for n, h, w in grids]
    *parts, _ = tokens.split([*counts, tokens.shape[0] - sum(counts)])
    found = [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]
    return [pixel_shuffle(g, upsample) for g in found] if upsample > 1 else found


def _near(size: int, unit: int) -> str:
    below, above = size // unit * unit, -(-size // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


def _check_size(size: int, patch: int, grid: int) -> None:
    if size % patch:
        raise ValueError(
            f"student: image sizes must be multiples of the patch, {patch} px, got {size}; "
            f"nearest: {_near(size, patch)}"
        )
    if size > grid * patch:
        raise ValueError(
            f"student: image sizes can be at most max_resolution={grid * patch} px, got {size}; "
            "create the student with a larger max_resolution"
        )
