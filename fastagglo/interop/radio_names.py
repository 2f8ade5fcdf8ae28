"""The names that RADIO's published weights give to a student's parameters, and what is wrong.

From the names and shapes of RADIOv2.5 and C-RADIOv2, v3 and v4 (arXiv 2312.06709, 2412.07679,
2601.17237), which come in three layouts:

- ``"hub"``, a torch.hub file: ``base_model.*`` (the trunk), ``input_conditioner.*``,
  ``_heads.<teacher>.*``, ``_feature_projections.<teacher>.*``, ``_feature_normalizer.*``,
  ``_intermediate_feature_normalizer.*``; older files count teachers;
- ``"transformers"``, a model folder: ``radio_model.model.*``, ``radio_model.input_conditioner.*``,
  ``radio_model.summary_idxs``, ``radio_model.adaptors.<teacher>.{head_mlp,feat_mlp}.*``,
  ``radio_model.{feature_normalizer,inter_feature_normalizer}.*``;
- ``"native"``, the parameters of transformers' own ``RadioModel`` in memory: ``embeddings.*``,
  ``encoder.layer.*``. On disk it uses the names above.

All may follow a prefix: ``vision_model.`` in a vision-language model, ``module.`` after DDP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastagglo.model import Student, StudentConfig

__all__ = ["LAYOUTS", "Entry", "Layout", "RadioReport", "constants", "entries", "find_layout"]

LAYOUTS = ("hub", "transformers", "native")

_TRUNK = re.compile(
    r"(?P<root>.*?)(?P<middle>base_model\.|model\.|)(?P<inner>inner\.)?"
    r"(?P<token>patch_generator|embeddings)\.(embedder|patch_projection)\.weight"
)
_SCALES = ("ls{}.grandma", "ls{}.gamma", "layer_scale{}.lambda1")

# Entries of published files that take no part in image features: a position-free register tensor
# and a mask token left over from other trunks, an embedding of video frames, statistics that the
# model's own input conditioner overrides. They are kept and written back.
UNUSED = (
    "reg_token",
    "mask_token",
    "patch_generator.video_embedder.weight",
    "embeddings.video_patch_projection.weight",
)
_UNUSED_STATISTICS = ("input_conditioner.norm_mean", "input_conditioner.norm_std")


@dataclass(frozen=True)
class Layout:
    """How one file calls the parts of a model.

    Attributes:
        style: one of :data:`LAYOUTS`.
        root: what precedes heads, normalisers and input statistics.
        trunk: what precedes the trunk's entries.
        scale: the name of a block's LayerScale, with ``{}`` for 1 or 2.
        split_gate: a SwiGLU's first layer is two, ``gate_proj`` and ``up_proj``.
        heads: teacher to its name or number in the file, where they differ.
    """

    style: str = "hub"
    root: str = ""
    trunk: str = "base_model."
    scale: str = _SCALES[0]
    split_gate: bool = False
    heads: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, style: str) -> Layout:
        """The layout of a style, without a prefix."""
        if style not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {style!r}")
        if style == "hub":
            return cls()
        # As transformers' own RadioModel reads and writes them.
        return cls(
            style,
            root="radio_model." if style == "transformers" else "",
            trunk="radio_model.model." if style == "transformers" else "",
            scale=_SCALES[2],
            split_gate=True,
        )

    def spatial(self, teacher: str) -> str:
        """What precedes the entries of a spatial head."""
        name = self.heads.get(teacher, teacher)
        if self.style == "hub":
            return f"{self.root}_feature_projections.{name}."
        return f"{self.root}adaptors.{name}.feat_mlp."

    def summary(self, teacher: str) -> str:
        """What precedes the entries of a summary head."""
        name = self.heads.get(teacher, teacher)
        if self.style == "hub":
            return f"{self.root}_heads.{name}."
        return f"{self.root}adaptors.{name}.head_mlp."

    def find_heads(self, names: Collection[str]) -> dict[tuple[str, str], dict[str, str]]:
        """(kind, teacher's name in the file) to {parameter: entry}."""
        if self.style == "hub":
            pattern = rf"{re.escape(self.root)}(_heads|_feature_projections)\.([^.]+)\.(.+)"
        else:
            pattern = rf"{re.escape(self.root)}adaptors\.([^.]+)\.(head_mlp|feat_mlp)\.(.+)"
        found: dict[tuple[str, str], dict[str, str]] = {}
        for name in names:
            if match := re.fullmatch(pattern, name):
                kind, teacher, parameter = match.groups()
                if self.style != "hub":
                    kind, teacher = teacher, kind
                kind = "summary" if kind in ("_heads", "head_mlp") else "spatial"
                found.setdefault((kind, teacher), {})[parameter] = name
        return found

    @property
    def normaliser(self) -> str:
        """What precedes the feature normaliser's buffers."""
        return f"{self.root}{'_' if self.style == 'hub' else ''}feature_normalizer."

    @property
    def block_normaliser(self) -> str:
        """What precedes the buffers of the normaliser of intermediate features."""
        hub = self.style == "hub"
        return f"{self.root}{'_intermediate' if hub else 'inter'}_feature_normalizer."

    def is_unused(self, name: str) -> bool:
        """Whether an entry is one of RADIO's that image features do not need."""
        unused = [self.trunk + part for part in UNUSED]
        if self.style == "hub":
            unused += [f"{self.root}base_model.{part}" for part in _UNUSED_STATISTICS]
        return name in unused


def find_layout(names: Collection[str]) -> Layout:
    """The layout of a state dict with these names.

    Raises:
        ValueError: no RADIO trunk in it, or several.
    """
    found = [match for match in map(_TRUNK.fullmatch, names) if match]
    if len(found) != 1:
        several = ", ".join(match.group() for match in found)
        raise ValueError(
            f"several RADIO trunks: {several}; give the entries of one"
            if found
            else "no RADIO trunk: its patch embedding is called "
            "'base_model.patch_generator.embedder.weight' (a torch.hub file) or "
            "'radio_model.model.patch_generator.embedder.weight' (a transformers folder)"
        )
    parts = found[0].groupdict()
    if parts["token"] == "embeddings":
        root = parts["root"] + parts["middle"]
        style, trunk, block = "native", root, f"{root}encoder.layer."
    else:
        style = "transformers" if parts["middle"] == "model." else "hub"
        root = parts["root"]
        trunk = root + parts["middle"] + (parts["inner"] or "")
        block = f"{trunk}blocks."
    scales = [s for s in _SCALES if any(f"{block}{i}.{s.format(1)}" in names for i in (0, 1))]
    gates = any(name.startswith(block) and ".mlp.gate_proj." in name for name in names)
    return Layout(style, root, trunk, scales[0] if scales else _SCALES[0], gates)


@dataclass(frozen=True)
class Entry:
    """Entries of a file and the student's parameters that hold the same rows.

    Attributes:
        names: in the file, in the order of their rows.
        shapes: of these.
        ours: the student's, in the order of their rows.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ours: tuple[str, ...]

    def read(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's parameters, from the file's entries; ``own`` has their shapes."""
        values = [state[name] for name in self.names]
        value = values[0] if len(values) == 1 else torch.cat(values)
        if len(self.ours) == 1:
            return {self.ours[0]: value.reshape(own[self.ours[0]].shape)}
        rows = [own[name].numel() // math.prod(value.shape[1:]) for name in self.ours]
        parts = value.split(rows)
        # Copies: one parameter must not share the storage of another.
        return {
            name: part.reshape(own[name].shape).clone()
            for name, part in zip(self.ours, parts, strict=True)
        }

    def write(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's entries, from the student's parameters."""
        tail = self.shapes[0][1:]
        values = [own[name].reshape(-1, *tail) for name in self.ours]
        value = values[0] if len(values) == 1 else torch.cat(values)
        parts = value.split([shape[0] for shape in self.shapes])
        return {
            name: part.reshape(shape).contiguous() if len(parts) == 1 else part.clone()
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }


def entries(config: StudentConfig, layout: Layout) -> list[Entry]:
    """Every entry that a file of this layout has for the parameters of such a student."""
    with torch.device("meta"):
        student = Student(config)
    shapes = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    tokens = (*(f"cls_tokens.{name}" for name in student.cls_tokens), "registers")
    found = []
    for ours, names in _names(config, layout, shapes, tokens):
        if "registers" in ours:
            size: tuple[int, ...] = (config.prefix_tokens, config.width)
        else:
            shape = shapes[ours[0]]
            size = (shape[0] // len(names), *shape[1:])
        found.append(Entry(names, (size,) * len(names), ours))
    return found


def _names(
    config: StudentConfig, layout: Layout, own: Collection[str], tokens: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(the student's, the file's) names that hold the same rows."""
    native, trunk = layout.style == "native", layout.trunk
    generator = f"{trunk}{'embeddings' if native else 'patch_generator'}."
    fixed = {
        "positions.table": generator + ("position_embedding" if native else "pos_embed"),
        "patch_embed.": generator + ("patch_projection." if native else "embedder."),
        "norm.": f"{trunk}norm.",
        "feature_normaliser.": layout.normaliser,
        "block_normaliser.": layout.block_normaliser,
    }
    yield tokens, (generator + ("cls_register_token" if native else "cls_token.token"),)
    block = re.compile(r"blocks\.(\d+)\.(.+)")
    head_block = re.compile(r"head_blocks\.([^.]+)\.(\d+)\.(.+)")
    for name in own:
        if name in tokens:
            continue
        if match := block.fullmatch(name):
            prefix = f"{trunk}{'encoder.layer' if native else 'blocks'}.{match[1]}."
            yield (name,), tuple(prefix + part for part in _in_block(match[2], layout))
        elif match := head_block.fullmatch(name):
            # timm's names: LayerScale is `gamma` there.
            yield (name,), (f"{layout.spatial(match[1])}blocks.{match[2]}.{match[3]}",)
        elif name.startswith("heads.summary."):
            teacher, parameter = name.removeprefix("heads.summary.").split(".", 1)
            yield (name,), (layout.summary(teacher) + parameter,)
        elif name.startswith("heads.spatial."):
            teacher, parameter = name.removeprefix("heads.spatial.").split(".", 1)
            middle = "mlp." if config.heads[teacher].spatial_blocks else ""
            yield (name,), (layout.spatial(teacher) + middle + parameter,)
        else:
            start = next(start for start in fixed if name.startswith(start))
            yield (name,), (fixed[start] + name.removeprefix(start),)


def _in_block(name: str, layout: Layout) -> tuple[str, ...]:
    """What a file calls the parameter of a block."""
    part, _, kind = name.rpartition(".")
    if part in ("ls1", "ls2"):
        return (layout.scale.format(part[-1]),)
    if layout.style == "native" and part == "attn.qkv":
        return tuple(f"attention.{which}_proj.{kind}" for which in "qkv")
    if layout.style == "native" and part == "attn.proj":
        return (f"attention.o_proj.{kind}",)
    if layout.split_gate and part == "mlp.w12":
        return (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
    if layout.split_gate and part == "mlp.w3":
        return (f"mlp.down_proj.{kind}",)
    return (name,)


def constants(config: StudentConfig, layout: Layout) -> dict[str, Tensor]:
    """Entries that say what a student's configuration says: input statistics, summary tokens."""
    if layout.style == "hub" and layout.trunk == layout.root:  # a trunk alone
        return {}
    found = {
        f"{layout.root}input_conditioner.norm_{kind}": torch.tensor(value).view(3, 1, 1)
        for kind, value in (("mean", config.pixel_mean), ("std", config.pixel_std))
    }
    if layout.style != "hub":
        chosen = config.summary or config.cls_names
        slots = [config.cls_names.index(name) for name in chosen]
        found[f"{layout.root}summary_idxs"] = torch.tensor(slots, dtype=torch.int64)
    return found


@dataclass(frozen=True)
class RadioReport:
    """How a state dict differs from what RADIO's layout says, by the names of its entries.

    Attributes:
        missing: entries that the model needs and the state lacks.
        unexpected: entries that belong to no part of the model.
        misshapen: entry to (its shape, the expected one).
        unused: known entries of RADIO's that image features do not need; they are kept.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is missing, unexpected or misshapen."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        shapes = [f"{n} {got}, expected {want}" for n, (got, want) in self.misshapen.items()]
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": shapes,
        }
        found = [f"{kind}: {_some(list(names))}" for kind, names in kinds.items() if names]
        return "; ".join(found) or "nothing is missing, unexpected or misshapen"


def report(config: StudentConfig, layout: Layout, shapes: Mapping[str, tuple]) -> RadioReport:
    """Compare a state dict, given as shapes by name, with the layout of such a student.

    Entries outside the layout's prefix belong to other models and are not looked at.
    """
    expected = {
        n: s for e in entries(config, layout) for n, s in zip(e.names, e.shapes, strict=True)
    }
    expected |= {n: tuple(t.shape) for n, t in constants(config, layout).items()}
    unused = tuple(n for n in shapes if n not in expected and layout.is_unused(n))
    return RadioReport(
        missing=tuple(n for n in expected if n not in shapes),
        unexpected=tuple(
            n for n in shapes if n not in expected and n not in unused and n.startswith(layout.root)
        ),
        misshapen={
            n: (tuple(shapes[n]), shape)
            for n, shape in expected.items()
            if n in shapes and tuple(shapes[n]) != shape
        },
        unused=unused,
    )


def _some(names: list[str], shown: int = 8) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
