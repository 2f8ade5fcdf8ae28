"""Adaptor heads: the small MLPs that turn a student's tokens into each teacher's features.

Every teacher has its own pair (AM-RADIO, arXiv 2312.06709): a summary head on its CLS token and a
spatial head on the patch tokens. One head is in ``head_mlp.py``, the names of published weights in
``heads_state.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastagglo.errors import suggestion
from fastagglo.ops.head_mlp import (
    AdaptorMLP,
    AdaptorMLPv1,
    Head,
    LayerNorm,
    adaptor_mlp,
    check_bool,
    check_input,
    check_int,
    pixel_shuffle,
    shape_of,
)
from fastagglo.ops.heads_state import VERSIONS, read_heads
from fastagglo.ops.mlp import shared_linear
from fastagglo.ops.mlp_grouped import Step, grouped_step, worth_grouping

__all__ = [
    "AdaptorHeads",
    "AdaptorMLP",
    "AdaptorMLPv1",
    "HeadSpec",
    "LayerNorm",
    "adaptor_mlp",
    "check_bool",
    "check_teacher_name",
    "pixel_shuffle",
    "shape_of",
    "suggestion",
]


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
        spatial_block: ``"student"`` for blocks like the student's own, ``"timm"`` for C-RADIOv4's:
            16 attention heads, no bias of queries, keys and values, a GELU MLP of 4 C.
        summary_blocks: residual MLP blocks in the summary head; None means ``blocks``.
        version: ``"v2"`` for :class:`AdaptorMLP`, ``"v1"`` for :class:`AdaptorMLPv1`.

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
    version: str = "v2"
    spatial_block: str = "student"
    summary_blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("summary", "spatial", "hidden", "summary_hidden"):
            if getattr(self, name) is not None:
                check_int("HeadSpec", name, getattr(self, name), 1)
        check_int("HeadSpec", "blocks", self.blocks, 0)
        check_int("HeadSpec", "upsample", self.upsample, 1)
        check_int("HeadSpec", "spatial_blocks", self.spatial_blocks, 0)
        check_bool("HeadSpec", "pre_norm", self.pre_norm)
        if self.summary_blocks is not None:
            check_int("HeadSpec", "summary_blocks", self.summary_blocks, 0)
        if self.spatial_block not in ("student", "timm"):
            raise ValueError(
                f"HeadSpec: spatial_block must be 'student' or 'timm', got {self.spatial_block!r}"
            )
        if self.version not in VERSIONS:
            raise ValueError(f"HeadSpec: version must be one of {VERSIONS}, got {self.version!r}")
        if self.version == "v1" and self.pre_norm:
            raise ValueError("HeadSpec: heads of version 'v1' have no pre_norm; leave it False")
        if self.summary is None and self.spatial is None:
            raise ValueError("HeadSpec: give summary, spatial or both (channels of the teacher)")
        if self.spatial is None and (self.upsample > 1 or self.spatial_blocks):
            raise ValueError("HeadSpec: upsample and spatial_blocks need a spatial head")
        for name in ("summary_hidden", "summary_blocks"):
            if self.summary is None and getattr(self, name) is not None:
                raise ValueError(f"HeadSpec: {name} needs a summary head")

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

    Spatial heads that read one x, and have no ``pre_norm``, have their first layers as one: x is
    read once, and one gradient of it is summed up. Shard (FSDP) all heads together: of heads
    sharded one by one, each reads x for itself, and all ranks must compute the same ones.

    Args:
        in_features: the student's width.
        heads: a spec per teacher name; their order is the order of the CLS slots.
        recompute: as of :class:`AdaptorMLP`, for all heads.

    Raises:
        TypeError: ``heads`` is not a mapping of names to :class:`HeadSpec`.
        ValueError: a name that cannot name a module (empty, with a dot, or taken by torch).
    """

    def __init__(
        self, in_features: int, heads: Mapping[str, HeadSpec], recompute: bool = True
    ) -> None:
        super().__init__()
        check_int("AdaptorHeads", "in_features", in_features, 1)
        check_bool("AdaptorHeads", "recompute", recompute)
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
                width = spec.summary_hidden or hidden
                blocks = spec.blocks if spec.summary_blocks is None else spec.summary_blocks
                self.summary[name] = _head(spec, in_features, width, spec.summary, blocks, 1)
            if spec.spatial is not None:
                self.spatial[name] = _head(
                    spec, in_features, hidden, spec.spatial, spec.blocks, spec.upsample
                )
        self.recompute = recompute

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        teachers: Mapping[str, str] | None = None,
        upsample: Mapping[str, int] | None = None,
    ) -> AdaptorHeads:
        """Heads with the weights of a RADIO checkpoint, or of another :class:`AdaptorHeads`.

        Sizes, depth and version (``fc1, norm, inner, fc2`` or ``fc1, blocks, final``) are read from
        names and shapes. Entries that belong to no head, such as the backbone's, are not looked at.

        Args:
            state: entries ``_heads.<teacher>.*`` (summary) and ``_feature_projections.<teacher>.*``
                (spatial), or ``summary.<teacher>.*`` and ``spatial.<teacher>.*``, after any prefix.
            teachers: the state's name of a teacher (older checkpoints count: ``"0"``, ``"1"``) to
                the name it gets here, in the order of the CLS slots; others are left out. None
                takes all, in the state's order, under their own names.
            upsample: cells per token and side of spatial heads, by the names they get; default 1.

        Returns:
            heads with copies of the entries, on their devices and in their dtypes.

        Raises:
            TypeError: ``state`` is not a mapping of names to tensors.
            ValueError: no head in it; or entries that are missing, unexpected or of another shape,
                each of them named; or a teacher whose two heads no :class:`HeadSpec` describes.
        """
        found = read_heads(state, teachers, upsample or {})
        with torch.device("meta"):
            specs = {name: HeadSpec(**values) for name, values in found.specs.items()}
            heads = cls(found.in_features, specs)
        found.check({name: tuple(v.shape) for name, v in heads.state_dict().items()})
        copies = {name: value.detach().clone() for name, value in found.entries.items()}
        heads.load_state_dict(copies, assign=True)
        return heads.requires_grad_(True)

    @property
    def recompute(self) -> bool:
        """Whether every head recomputes; see :class:`AdaptorMLP`. Setting it sets all heads."""
        return all(head.recompute for head in self._fused())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        check_bool("AdaptorHeads", "recompute", value)
        for head in self._fused():
            head.recompute = value

    def _fused(self) -> list[AdaptorMLP]:
        heads = (*self.summary.values(), *self.spatial.values())
        return [head for head in heads if isinstance(head, AdaptorMLP)]

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
            only: the teachers to compute; for the others nothing is computed. None means all.

        Where ``torch.distributed`` is initialised, the parameters of heads that are left out get
        zero gradients with the others' backward, which DDP and FSDP wait for; elsewhere none.

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
        jobs: dict[tuple[str, str], tuple[Head, Tensor]] = {}
        for name in names:
            if summary is not None and name in self.summary:
                x = summary[:, slots[name]] if isinstance(summary, Tensor) else summary.get(name)
                jobs["summary", name] = self.summary[name], _given("summary", name, x)
            if spatial is not None and name in self.spatial:
                x = spatial if isinstance(spatial, Tensor) else spatial.get(name)
                jobs["spatial", name] = self.spatial[name], _given("spatial", name, x)
        entered = self._enter(spatial, jobs) if isinstance(spatial, Tensor) else {}
        found = self._summaries(jobs)
        for key, (head, x) in jobs.items():
            if key in found:
                continue
            rotation = rotations.get(key[1]) if key[0] == "spatial" else None
            if key in entered:
                found[key] = head(entered.pop(key), rotation, shuffle=False, entered=True)
            else:
                found[key] = head.tokens(x, rotation)
        if found and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
            idle = [p for p in self._idle(jobs) if p.requires_grad]
            key = next(iter(found))
            found[key] = _ZeroGradients.apply(found[key], *idle) if idle else found[key]
        return {
            name: (found.get(("summary", name)), found.get(("spatial", name))) for name in names
        }

    def _enter(
        self, x: Tensor, jobs: Mapping[tuple[str, str], tuple[Head, Tensor]]
    ) -> dict[tuple[str, str], Tensor]:
        """The first layers of the spatial heads that can share the reading of x."""
        sharing = {
            key: head
            for key, (head, _) in jobs.items()
            if key[0] == "spatial"
            and getattr(head, "pre_norm", None) is None
            and not _is_sharded(head)
        }
        if len(sharing) < 2:
            return {}
        for head in sharing.values():
            check_input("AdaptorHeads", x, head)
        layers = [head.fc1 for head in sharing.values()]
        hidden = shared_linear(x, [f.weight for f in layers], [f.bias for f in layers])
        return dict(zip(sharing, hidden, strict=True))

    def _summaries(
        self, jobs: Mapping[tuple[str, str], tuple[Head, Tensor]]
    ) -> dict[tuple[str, str], Tensor]:
        """The summary heads together, step by step, where the kernels have a launch for many."""
        together = {
            key: (head, x)
            for key, (head, x) in jobs.items()
            if key[0] == "summary" and isinstance(head, AdaptorMLP) and not _is_sharded(head)
        }
        heads = {key: head for key, (head, _) in together.items()}
        for head, x in together.values():
            check_input("AdaptorHeads", x, head)
        widest = max((max(h.last.weight.shape) for h in heads.values()), default=0)
        if not worth_grouping([x for _, x in together.values()], widest):
            return {}
        found = {key: x for key, (_, x) in together.items()}
        for pre_norm in (False, True):
            layers = {
                key: (head.pre_norm[0] if pre_norm else None, head.fc1)
                for key, head in heads.items()
                if (head.pre_norm is not None) == pre_norm
            }
            _grouped(layers, found)
        for i in range(max(len(head.blocks) for head in heads.values())):
            blocks = {key: h.blocks[i] for key, h in heads.items() if i < len(h.blocks)}
            _grouped({key: (block[0], block[2]) for key, block in blocks.items()}, found, skip=True)
        _grouped({key: (head.final[0], head.last) for key, head in heads.items()}, found)
        return found

    def _idle(self, jobs: Collection[tuple[str, str]]) -> list[nn.Parameter]:
        """The parameters of the heads that have nothing to do."""
        return [
            parameter
            for kind, heads in (("summary", self.summary), ("spatial", self.spatial))
            for name, head in heads.items()
            if (kind, name) not in jobs
            for parameter in head.parameters()
        ]

    def _check_known(self, argument: str, name: str) -> None:
        if name not in self.specs:
            raise ValueError(f"{argument}: no teacher {name!r}{suggestion(name, self.specs)}")


class _ZeroGradients(torch.autograd.Function):
    """The first argument as it is; zero gradients for the others."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        return grad_y, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _is_sharded(head: Head) -> bool:
    """Whether the weights are shards (FSDP's), until the head's own hooks run."""
    return hasattr(head.fc1.weight, "to_local")


def _grouped(
    layers: Mapping[tuple[str, str], Sequence[nn.Module]],
    values: dict[tuple[str, str], Tensor],
    skip: bool = False,
) -> None:
    """One (norm or None, linear) of each head, from and to its value."""
    if not layers:
        return
    norms = [norm for norm, _ in layers.values()]
    steps = []
    for key, (norm, linear) in layers.items():
        of_norm = (None, None) if norm is None else (norm.weight, norm.bias)
        steps.append(Step(values[key], *of_norm, linear.weight, linear.bias))
    activate = norms[0] is not None
    eps = [norm.eps if activate else 0.0 for norm in norms]
    values.update(zip(layers, grouped_step(steps, eps, activate=activate, skip=skip), strict=True))


def _head(
    spec: HeadSpec, in_features: int, hidden: int, out: int, blocks: int, upsample: int
) -> Head:
    if spec.version == "v1":
        return AdaptorMLPv1(in_features, hidden, out, blocks, upsample)
    return AdaptorMLP(in_features, hidden, out, blocks, upsample, spec.pre_norm)


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


def _given(argument: str, name: str, x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError(f"AdaptorHeads: {argument} lacks teacher {name!r}")
    return x
