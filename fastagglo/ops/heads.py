"""Adaptor heads: the small MLPs that turn a student's tokens into each teacher's features.

Every teacher has its own pair (AM-RADIO, arXiv 2312.06709): a summary head on its CLS token and a
spatial head on the patch tokens. The parameter names (``fc1``, ``blocks.i.{0,2}``,
``final.{0,2}``) are those of the published RADIO weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.errors import suggestion
from fastagglo.ops.autocast import autocast_enabled
from fastagglo.ops.backend import resolve

__all__ = [
    "AdaptorHeads",
    "AdaptorMLP",
    "HeadSpec",
    "LayerNorm",
    "adaptor_mlp",
    "check_teacher_name",
    "pixel_shuffle",
    "suggestion",
]

# The modules' own torch code, on any device.
_BACKENDS = ("torch",)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed in at least fp32, whatever the input and autocast say.

    The result has the input's dtype, except under autocast, where it stays fp32 for the GELU or
    the GEMM that follows: what CUDA's autocast does by itself and the CPU's does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., C) -> (..., C)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        y = F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)
        return y if autocast_enabled(x.device) else y.to(x.dtype)


def pixel_shuffle(tokens: Tensor, upsample: int) -> Tensor:
    """Unfold the channels of a grid of tokens into ``upsample`` x ``upsample`` cells each.

    Channel order: cell row, cell column, feature. Channel ``(i * upsample + j) * C + c`` of token
    ``(y, x)`` becomes feature ``c`` of cell ``(y * upsample + i, x * upsample + j)``.

    Args:
        tokens: (..., h, w, C * upsample**2).
        upsample: cells per token and side, at least 1.

    Returns:
        (..., h * upsample, w * upsample, C).

    Raises:
        ValueError: fewer than three dimensions, or channels that ``upsample**2`` does not divide.
    """
    if tokens.dim() < 3 or tokens.shape[-1] % upsample**2:
        raise ValueError(
            f"pixel_shuffle: tokens must be (..., h, w, C * {upsample}**2), got {shape_of(tokens)}"
        )
    *lead, h, w, channels = tokens.shape
    cells = tokens.reshape(*lead, h, w, upsample, upsample, channels // upsample**2)
    return cells.transpose(-4, -3).reshape(*lead, h * upsample, w * upsample, cells.shape[-1])


class AdaptorMLP(nn.Module):
    """One adaptor head: ``[LN, GELU] -> fc1 -> n x {x + Linear(GELU(LN(x)))} -> LN, GELU, Linear``.

    Linear weights start as a truncated normal of standard deviation 0.02, biases as zero.

    Args:
        in_features: channels of the student's tokens.
        hidden: width of the head.
        out_features: channels of the teacher's features.
        blocks: residual blocks between ``fc1`` and ``final``.
        upsample: output cells per token and side; see :func:`pixel_shuffle` for the channel order.
        pre_norm: put LayerNorm and GELU before ``fc1``.

    Raises:
        TypeError: a size that is not an int, or ``pre_norm`` that is not a bool.
        ValueError: a size that is too small.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        blocks: int = 0,
        upsample: int = 1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("hidden", hidden, 1),
            ("out_features", out_features, 1),
            ("blocks", blocks, 0),
            ("upsample", upsample, 1),
        ):
            _check_int("AdaptorMLP", name, value, least)
        _check_bool("AdaptorMLP", "pre_norm", pre_norm)
        self.in_features = in_features
        self.out_features = out_features
        self.upsample = upsample
        self.pre_norm = nn.Sequential(LayerNorm(in_features), nn.GELU()) if pre_norm else None
        self.fc1 = nn.Linear(in_features, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)
        )
        self.final = nn.Sequential(
            LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out_features * upsample**2)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # The cells of a patch start out equal, as from nearest-neighbour upsampling: independent
        # draws would print a checkerboard that takes long to unlearn (ICNR, arXiv 1707.02937).
        with torch.no_grad():
            last = self.final[2].weight
            last.copy_(last[:out_features].repeat(upsample**2, 1))

    def forward(self, x: Tensor, rotation: Tensor | None = None, *, shuffle: bool = True) -> Tensor:
        """Features of the teacher.

        Args:
            x: (..., in_features); (N, h, w, in_features) when ``upsample`` > 1. In the dtype of
                the parameters, except under autocast.
            rotation: (C, C) with C = ``out_features``, or None. The output is then
                ``rotation.T @ y`` for each feature ``y``: with the rotation of a PHI-S target
                (arXiv 2410.01680) the head predicts normalised features inside and the teacher's
                own axes outside. It is folded into the last weight in fp32, so no per-token
                C x C product is paid.
            shuffle: False leaves out the pixel shuffle; see :meth:`tokens`.

        Returns:
            (..., out_features); (N, h * upsample, w * upsample, out_features) when upsampling.

        Raises:
            TypeError: ``x`` or ``rotation`` is not a floating-point tensor, or ``x`` has not the
                dtype of the parameters while autocast is off.
            ValueError: a wrong shape or device.
        """
        _check_input("AdaptorMLP", x, self)
        shuffle = shuffle and self.upsample > 1
        if shuffle and x.dim() != 4:
            raise ValueError(
                f"AdaptorMLP: x must be (N, h, w, {self.in_features}) because upsample is "
                f"{self.upsample}, got {shape_of(x)}; use head.tokens(x) for packed tokens"
            )
        if rotation is not None:
            _check_rotation("rotation", rotation, self.out_features, x.device)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = self.fc1(x)
        for block in self.blocks:
            x = x + block(x)
        norm, gelu, last = self.final
        x = gelu(norm(x))
        if rotation is None:
            y = last(x)
        else:
            weight, bias = self._rotated(rotation.mT)
            y = F.linear(x, weight.to(last.weight.dtype), bias.to(last.bias.dtype))
        return pixel_shuffle(y, self.upsample) if shuffle else y

    def tokens(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Without the pixel shuffle, for packed tokens: (..., in) -> (..., out * upsample**2)."""
        # Through __call__, so that hooks (FSDP's among them) see it.
        return self(x, rotation, shuffle=False)

    def _rotated(self, matrix: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``matrix @ W, matrix @ b`` of the last layer, per replica, in ``dtype`` or wider."""
        last = self.final[2]
        wide = torch.promote_types(last.weight.dtype, dtype)
        weight = last.weight.to(wide).unflatten(0, (-1, self.out_features))
        bias = last.bias.to(wide).unflatten(0, (-1, self.out_features))
        device = last.weight.device
        plain = autocast_enabled(device)
        with torch.autocast(device.type, enabled=False) if plain else nullcontext():
            matrix = matrix.to(wide)
            return (matrix @ weight).flatten(0, 1), (bias @ matrix.mT).flatten()

    @torch.no_grad()
    def rotate_output_(self, rotation: Tensor) -> None:
        """``W <- R W, b <- R b`` in the last layer, in place, computed in fp64.

        ``forward(x, rotation=R)`` afterwards equals ``forward(x)`` before, for an orthogonal R:
        a head that has learned in the teacher's own axes can start on PHI-S targets.

        Args:
            rotation: (out_features, out_features).
        """
        _check_rotation("rotation", rotation, self.out_features, self.fc1.weight.device)
        weight, bias = self._rotated(rotation, torch.float64)
        self.final[2].weight.copy_(weight)
        self.final[2].bias.copy_(bias)

    @torch.no_grad()
    def fold_affine_(
        self, mean: Tensor, scale: Tensor | float, rotation: Tensor | None = None
    ) -> None:
        """``W <- scale * R^T W, b <- scale * R^T b + mean`` in place, computed in fp64.

        A head that predicts the normalised target ``R (y - mean) / scale`` then predicts ``y``,
        the teacher's own features: what an exported model should give.

        Args:
            mean: (out_features,).
            scale: a number, a 0-d tensor or (out_features,).
            rotation: (out_features, out_features), or None for no rotation.
        """
        device, size = self.fc1.weight.device, self.out_features
        mean, scale = (torch.as_tensor(v).to(device, torch.float64) for v in (mean, scale))
        if mean.shape != (size,):
            raise ValueError(f"fold_affine_: mean must be ({size},), got {shape_of(mean)}")
        if scale.shape not in ((), (size,)):
            raise ValueError(f"fold_affine_: scale must be () or ({size},), got {shape_of(scale)}")
        if rotation is None:
            rotation = torch.eye(size, dtype=torch.float64, device=device)
        _check_rotation("rotation", rotation, size, device)
        weight, bias = self._rotated(rotation.mT, torch.float64)
        rows = scale.expand(size).repeat(self.upsample**2)
        self.final[2].weight.copy_(weight * rows[:, None])
        self.final[2].bias.copy_(bias * rows + mean.repeat(self.upsample**2))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, upsample={self.upsample}"


def adaptor_mlp(x: Tensor, head: AdaptorMLP, *, rotation: Tensor | None = None) -> Tensor:
    """Apply one adaptor head; the same as ``head(x, rotation)``.

    Args:
        x: (..., in_features), or (N, h, w, in_features) for a head that upsamples.
        head: the head's parameters.
        rotation: (C, C) or None; see :meth:`AdaptorMLP.forward`.

    Returns:
        (..., out_features), or (N, h * upsample, w * upsample, out_features).

    Raises:
        TypeError: ``head`` is not an :class:`AdaptorMLP`, or ``x`` not a tensor of its dtype.
        ValueError: a wrong shape or device, or a backend that this op does not have.
    """
    if not isinstance(head, AdaptorMLP):
        raise TypeError(f"adaptor_mlp: head must be an AdaptorMLP, got {type(head).__name__}")
    _check_input("adaptor_mlp", x, head)
    resolve("adaptor_mlp", x.device, _BACKENDS)
    return head(x, rotation)


@dataclass(frozen=True)
class HeadSpec:
    """What one teacher asks of the student.

    Attributes:
        summary: channels of the teacher's summary vector, or None for no summary head.
        spatial: channels of the teacher's spatial features, or None for no spatial head.
        hidden: width of the heads; None means the student's width.
        summary_hidden: width of the summary head; None means ``hidden``.
        blocks: residual MLP blocks in each head.
        upsample: spatial cells per patch and side.
        pre_norm: LayerNorm and GELU before each head's first layer.
        spatial_blocks: transformer blocks on the patch tokens before the spatial head
            (C-RADIOv4 has 2). The student owns them; :class:`AdaptorHeads` does not.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value that is too small, neither summary nor spatial, or a setting of the
            spatial head without one.
    """

    summary: int | None = None
    spatial: int | None = None
    hidden: int | None = None
    summary_hidden: int | None = None
    blocks: int = 0
    upsample: int = 1
    pre_norm: bool = False
    spatial_blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("summary", "spatial", "hidden", "summary_hidden"):
            if getattr(self, name) is not None:
                _check_int("HeadSpec", name, getattr(self, name), 1)
        _check_int("HeadSpec", "blocks", self.blocks, 0)
        _check_int("HeadSpec", "upsample", self.upsample, 1)
        _check_int("HeadSpec", "spatial_blocks", self.spatial_blocks, 0)
        _check_bool("HeadSpec", "pre_norm", self.pre_norm)
        if self.summary is None and self.spatial is None:
            raise ValueError("HeadSpec: give summary, spatial or both (channels of the teacher)")
        if self.spatial is None and (self.upsample > 1 or self.spatial_blocks):
            raise ValueError("HeadSpec: upsample and spatial_blocks need a spatial head")
        if self.summary is None and self.summary_hidden is not None:
            raise ValueError("HeadSpec: summary_hidden needs a summary head")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or TOML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadSpec:
        """The inverse of :meth:`to_dict`; an unknown key is a ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"HeadSpec: expected a mapping of settings, got {values!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"HeadSpec: unknown setting {key!r}{suggestion(key, known)}")
        return cls(**values)


class AdaptorHeads(nn.Module):
    """The heads of all teachers, in ``summary.<teacher>`` and ``spatial.<teacher>``.

    Args:
        in_features: the student's width.
        heads: a spec per teacher name; their order is the order of the CLS slots.

    Raises:
        TypeError: ``heads`` is not a mapping of names to :class:`HeadSpec`.
        ValueError: a name that cannot name a module (empty, with a dot, or taken by torch).
    """

    def __init__(self, in_features: int, heads: Mapping[str, HeadSpec]) -> None:
        super().__init__()
        _check_int("AdaptorHeads", "in_features", in_features, 1)
        if not isinstance(heads, Mapping):
            raise TypeError(f"AdaptorHeads: heads must map names to HeadSpec, got {heads!r}")
        self.specs: dict[str, HeadSpec] = {}
        self.summary = nn.ModuleDict()
        self.spatial = nn.ModuleDict()
        for name, spec in heads.items():
            check_teacher_name(name)
            if not isinstance(spec, HeadSpec):
                raise TypeError(f"heads[{name!r}] must be a HeadSpec, got {spec!r}")
            self.specs[name] = spec
            hidden = spec.hidden or in_features
            if spec.summary is not None:
                self.summary[name] = AdaptorMLP(
                    in_features,
                    spec.summary_hidden or hidden,
                    spec.summary,
                    spec.blocks,
                    pre_norm=spec.pre_norm,
                )
            if spec.spatial is not None:
                self.spatial[name] = AdaptorMLP(
                    in_features, hidden, spec.spatial, spec.blocks, spec.upsample, spec.pre_norm
                )

    def select(self, only: Collection[str] | None) -> list[str]:
        """The names in ``only`` (None: all) in the order of the slots; ValueError if unknown."""
        if only is None:
            return list(self.specs)
        if isinstance(only, str):
            raise TypeError(f"only must be a collection of teacher names, got the string {only!r}")
        for name in only:
            self._check_known("only", name)
        return [name for name in self.specs if name in only]

    def forward(
        self,
        summary: Tensor | Mapping[str, Tensor] | None,
        spatial: Tensor | Mapping[str, Tensor] | None,
        rotations: Mapping[str, Tensor] | None = None,
        only: Collection[str] | None = None,
    ) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Features of the teachers from the student's tokens.

        Args:
            summary: (N, number of heads, C), a slot per teacher, or a (N, C) per teacher name.
                None leaves the summaries out.
            spatial: (T, C) patch tokens shared by all teachers, or a (T, C) per teacher name.
                None leaves the spatial features out.
            rotations: a (C_s, C_s) per teacher name for its spatial head; see
                :meth:`AdaptorMLP.forward`. Names outside ``only`` are not used.
            only: the teachers to compute; the others cost nothing. None means all.

        Returns:
            per teacher ``(summary (N, C_summary) | None, spatial (T, C_spatial * upsample**2) |
            None)``; the spatial tokens await :func:`pixel_shuffle`.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: an unknown or missing teacher, or a shape that does not fit.
        """
        names = self.select(only)
        rotations = {} if rotations is None else rotations
        if not isinstance(rotations, Mapping):
            kind = type(rotations).__name__
            raise TypeError(f"rotations must map teacher names to (C, C) tensors, got {kind}")
        for argument, value in (("summary", summary), ("spatial", spatial)):
            if value is not None and not isinstance(value, Tensor | Mapping):
                raise TypeError(
                    f"AdaptorHeads: {argument} must be a tensor, a mapping of teacher names to "
                    f"tensors or None, got {type(value).__name__}"
                )
        for name in rotations:
            self._check_known("rotations", name)
            if name not in self.spatial:
                raise ValueError(f"rotations: teacher {name!r} has no spatial head to rotate")
        if isinstance(summary, Tensor) and (
            summary.dim() != 3 or summary.shape[1] != len(self.specs)
        ):
            raise ValueError(
                f"AdaptorHeads: summary must be (N, {len(self.specs)}, C), one slot per teacher, "
                f"got {shape_of(summary)}"
            )
        slots = {name: slot for slot, name in enumerate(self.specs)}
        output: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for name in names:
            vector = tokens = None
            if summary is not None and name in self.summary:
                x = summary[:, slots[name]] if isinstance(summary, Tensor) else summary.get(name)
                vector = self.summary[name](_given("summary", name, x))
            if spatial is not None and name in self.spatial:
                x = spatial if isinstance(spatial, Tensor) else spatial.get(name)
                tokens = self.spatial[name].tokens(_given("spatial", name, x), rotations.get(name))
            output[name] = (vector, tokens)
        return output

    def _check_known(self, argument: str, name: str) -> None:
        if name not in self.specs:
            raise ValueError(f"{argument}: no teacher {name!r}{suggestion(name, self.specs)}")


def check_teacher_name(name: str) -> None:
    """Raise unless ``name`` can name a module: a string, not empty, no dot, not torch's own."""
    if not isinstance(name, str):
        raise TypeError(f"a teacher's name must be a string, got {name!r}")
    if not name or "." in name:
        raise ValueError(f"a teacher's name must be non-empty and without dots, got {name!r}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name == "training":
        raise ValueError(
            f"a teacher cannot be called {name!r}: torch uses that name; choose another"
        )


def shape_of(x: Tensor) -> str:
    """A shape as errors print it."""
    return str(tuple(x.shape))


def _check_int(owner: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def _check_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a bool, got {value!r}")


def _check_input(owner: str, x: Tensor, head: AdaptorMLP) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{owner}: x must be a floating-point tensor, got {kind}")
    if x.dim() == 0 or x.shape[-1] != head.in_features:
        raise ValueError(f"{owner}: x must be (..., {head.in_features}), got {shape_of(x)}")
    if x.device != head.fc1.weight.device:
        raise ValueError(f"{owner}: x is on {x.device}, the head on {head.fc1.weight.device}")
    dtype = head.fc1.weight.dtype
    if x.dtype != dtype and not autocast_enabled(x.device):
        raise TypeError(
            f"{owner}: x must have the head's dtype, {dtype}, got {x.dtype}; cast one of them, or "
            "use torch.autocast"
        )


def _check_rotation(name: str, rotation: Tensor, size: int, device: torch.device) -> None:
    if not isinstance(rotation, Tensor) or not rotation.is_floating_point():
        kind = rotation.dtype if isinstance(rotation, Tensor) else type(rotation).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if rotation.shape != (size, size):
        raise ValueError(f"{name} must be ({size}, {size}), got {shape_of(rotation)}")
    if rotation.device != device:
        raise ValueError(f"{name} is on {rotation.device}, the head on {device}")


def _given(argument: str, name: str, x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError(f"AdaptorHeads: {argument} lacks teacher {name!r}")
    return x
