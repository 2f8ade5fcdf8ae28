"""The student's shape: one frozen dataclass and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastagglo.errors import suggestion
from fastagglo.ops.heads import HeadSpec, check_bool, check_teacher_name

__all__ = ["PIXEL_MEAN", "PIXEL_STD", "PRESETS", "StudentConfig", "preset"]

# RGB statistics of CLIP's training images (arXiv 2103.00020), which RADIO students use.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class StudentConfig:
    """Everything that fixes a student's parameters and its forward pass.

    Attributes:
        name: the preset's name, or any label.
        width: channels C of a token.
        depth: transformer blocks.
        num_heads: attention heads; must divide ``width``.
        mlp_width: hidden width of each block's MLP.
        mlp: ``"gelu"`` (fc1, GELU, fc2) or ``"swiglu"`` (w12, SiLU gate, w3: arXiv 2002.05202).
        patch_size: pixels per patch and side.
        registers: register tokens (arXiv 2309.16588), beside one CLS token per teacher.
        layer_scale: initial LayerScale (arXiv 2103.17239), or None for none.
        drop_path: stochastic depth rate (arXiv 1603.09382) of the last block; it grows linearly
            from 0 in the first. Whole images are dropped, in training only.
        max_resolution: pixels per side that the position table covers; the table has
            ``max_resolution // patch_size`` rows and columns.
        window: patches per side of a ViTDet window (arXiv 2203.16527), or None: all layers global.
        global_layers: with windows, how many layers stay global, or which; the last always does.
            A number n means the layers i with ``i % p == p - 1``, p = depth // n, and the last:
            one more than n where n does not divide the depth evenly, and all layers if n is more
            than half of them.
        norm_eps: epsilon of the trunk's LayerNorms.
        patch_bias: the patch embedding has a bias; RADIO's trunks have none.
        final_norm: a LayerNorm ends the trunk; RADIO's trunks have none.
        cls: names of the CLS tokens, where they are not the heads': RADIO's weights without some or
            all heads, or with one token that every head reads. A head reads the token of its own
            name. Empty: a token per head, but in alphabetical order of the names, as students were
            saved at first; :func:`~fastagglo.model.create_student` fills it in.
        summary: the CLS tokens that make up the backbone's summary (RADIO leaves out SAM's). Empty:
            all.
        pixel_mean, pixel_std: RGB statistics that normalise images; CLIP's (arXiv 2103.00020).
        feature_normaliser: the backbone's patch features pass through an affine map, buffers
            ``mean`` (C,) and ``tx`` (C, C): PHI-S (arXiv 2410.01680) of the student's own features.
        block_normaliser: ``"shared"`` or ``"layer"``: each block's patch tokens that
            ``forward_intermediates`` gives pass through such a map, with one rotation for all
            blocks or one for each. None for none.
        heads: a :class:`~fastagglo.ops.heads.HeadSpec` per teacher name, in the order of the CLS
            slots. Empty: a plain backbone with one CLS token.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value out of range, or two that contradict each other.
    """

    name: str
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    mlp: str = "gelu"
    patch_size: int = 16
    registers: int = 4
    layer_scale: float | None = None
    drop_path: float = 0.0
    max_resolution: int = 2048
    window: int | None = None
    global_layers: int | tuple[int, ...] = 4
    norm_eps: float = 1e-6
    patch_bias: bool = True
    final_norm: bool = True
    cls: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()
    pixel_mean: tuple[float, float, float] = PIXEL_MEAN
    pixel_std: tuple[float, float, float] = PIXEL_STD
    feature_normaliser: bool = False
    block_normaliser: str | None = None
    heads: Mapping[str, HeadSpec] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"StudentConfig: name must be a string, got {self.name!r}")
        for key in ("width", "depth", "num_heads", "mlp_width", "patch_size", "max_resolution"):
            self._check_int(key, getattr(self, key), 1)
        self._check_int("registers", self.registers, 0)
        if self.width % self.num_heads:
            raise ValueError(
                f"StudentConfig: num_heads must divide width, got num_heads={self.num_heads} and "
                f"width={self.width}"
            )
        if self.mlp not in ("gelu", "swiglu"):
            raise ValueError(f"StudentConfig: mlp must be 'gelu' or 'swiglu', got {self.mlp!r}")
        if self.max_resolution < self.patch_size:
            raise ValueError(
                f"StudentConfig: max_resolution must be at least patch_size={self.patch_size}, "
                f"got {self.max_resolution}"
            )
        if self.layer_scale is not None:
            self._check_number("layer_scale", self.layer_scale)
        self._check_number("drop_path", self.drop_path)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"StudentConfig: drop_path must be in [0, 1), got {self.drop_path}")
        self._check_number("norm_eps", self.norm_eps)
        if self.norm_eps <= 0:
            raise ValueError(f"StudentConfig: norm_eps must be positive, got {self.norm_eps}")
        if self.window is not None:
            self._check_int("window", self.window, 1)
        for key in ("patch_bias", "final_norm", "feature_normaliser"):
            check_bool("StudentConfig", key, getattr(self, key))
        if self.block_normaliser not in (None, "shared", "layer"):
            raise ValueError(
                "StudentConfig: block_normaliser must be 'shared', 'layer' or None, got "
                f"{self.block_normaliser!r}"
            )
        self._check_pixels()
        self._check_global_layers()
        self._check_heads()
        self._check_tokens()

    @property
    def grid(self) -> int:
        """Rows (and columns) of the position table."""
        return self.max_resolution // self.patch_size

    @property
    def cls_names(self) -> tuple[str, ...]:
        """Whose the CLS tokens are; a student without heads has one, called "backbone"."""
        return self.cls or tuple(self.heads) or ("backbone",)

    @property
    def prefix_tokens(self) -> int:
        """CLS and register tokens of each image."""
        return len(self.cls_names) + self.registers

    @property
    def global_layer_set(self) -> frozenset[int]:
        """The layers that attend globally when windows are on."""
        if isinstance(self.global_layers, int):
            period = max(self.depth // self.global_layers, 1)
            layers = {i for i in range(self.depth) if i % period == period - 1}
        else:
            layers = set(self.global_layers)
        return frozenset(layers | {self.depth - 1})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: tuples become lists."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | {"heads": {name: spec.to_dict() for name, spec in self.heads.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudentConfig:
        """The inverse of :meth:`to_dict`; an unknown or a missing key is a ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"StudentConfig: expected a mapping of settings, got {values!r}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"StudentConfig: unknown setting {key!r}{suggestion(key, known)}")
        needed = ("name", "width", "depth", "num_heads", "mlp_width")
        if missing := [n for n in needed if n not in values]:
            raise ValueError(f"StudentConfig: missing {', '.join(missing)}")
        heads = values.get("heads", {})
        if not isinstance(heads, Mapping):
            raise TypeError(f"StudentConfig: heads must be a mapping, got {heads!r}")
        specs = {
            name: spec if isinstance(spec, HeadSpec) else HeadSpec.from_dict(spec)
            for name, spec in heads.items()
        }
        return cls(**{**values, "heads": specs})

    def _check_int(self, key: str, value: object, least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"StudentConfig: {key} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"StudentConfig: {key} must be at least {least}, got {value}")

    def _check_number(self, key: str, value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"StudentConfig: {key} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"StudentConfig: {key} must be finite, got {value}")

    def _check_global_layers(self) -> None:
        layers = self.global_layers
        if isinstance(layers, list | tuple):
            for layer in layers:
                self._check_int("global_layers", layer, 0)
            if len(set(layers)) != len(layers) or any(i >= self.depth for i in layers):
                raise ValueError(
                    f"StudentConfig: global_layers must be distinct layers of 0..{self.depth - 1}, "
                    f"got {layers!r}"
                )
            object.__setattr__(self, "global_layers", tuple(sorted(layers)))
            return
        self._check_int("global_layers", layers, 1)

    def _check_pixels(self) -> None:
        for key in ("pixel_mean", "pixel_std"):
            values = getattr(self, key)
            if not isinstance(values, list | tuple) or len(values) != 3:
                raise TypeError(f"StudentConfig: {key} must be three numbers, got {values!r}")
            for value in values:
                self._check_number(key, value)
            object.__setattr__(self, key, tuple(float(value) for value in values))
        if min(self.pixel_std) <= 0:
            raise ValueError(f"StudentConfig: pixel_std must be positive, got {self.pixel_std}")

    def _check_tokens(self) -> None:
        for key in ("cls", "summary"):
            names = getattr(self, key)
            if not isinstance(names, list | tuple):
                raise TypeError(f"StudentConfig: {key} must be a tuple of names, got {names!r}")
            for name in names:
                check_teacher_name(name)
            if len(set(names)) != len(names):
                raise ValueError(f"StudentConfig: {key} must be distinct names, got {names!r}")
            object.__setattr__(self, key, tuple(names))
        for name in self.summary:
            if name not in self.cls_names:
                raise ValueError(
                    f"StudentConfig: summary: no CLS token {name!r}"
                    f"{suggestion(name, self.cls_names)}"
                )
        for name, spec in self.heads.items():
            if spec.summary is not None and len(self.cls_names) > 1 and name not in self.cls_names:
                raise ValueError(
                    f"StudentConfig: cls must name the token of each head with a summary, or one "
                    f"token for all; it lacks {name!r}: {self.cls_names}"
                )
            if spec.spatial_block == "timm" and self.width % 16:
                raise ValueError(
                    f"StudentConfig: spatial_block='timm' of head {name!r} has 16 attention heads, "
                    f"which must divide width={self.width}"
                )

    def _check_heads(self) -> None:
        if not isinstance(self.heads, Mapping):
            raise TypeError(
                f"StudentConfig: heads must map teacher names to HeadSpec, got {self.heads!r}"
            )
        for name, spec in self.heads.items():
            check_teacher_name(name)
            if not isinstance(spec, HeadSpec):
                raise TypeError(f"StudentConfig: heads[{name!r}] must be a HeadSpec, got {spec!r}")
        # A copy: whoever passed the dict may go on changing it.
        object.__setattr__(self, "heads", dict(self.heads))


# Shapes of the RADIO family (arXiv 2312.06709, 2412.07679), and a tiny one for CPUs and tests.
PRESETS: dict[str, StudentConfig] = {
    c.name: c
    for c in (
        StudentConfig("tiny", 192, 6, 3, 768, global_layers=2),
        StudentConfig("B", 768, 12, 12, 3072, layer_scale=1e-5),
        StudentConfig("L", 1024, 24, 16, 4096, layer_scale=1e-5),
        StudentConfig("SO400M", 1152, 27, 16, 4304),
        StudentConfig("H", 1280, 32, 16, 5120),
        # RADIOv2.5-g: DINOv2-g's block and patch; 128 patches of 14 px make 1792 px.
        StudentConfig(
            "g",
            1536,
            40,
            24,
            4096,
            mlp="swiglu",
            patch_size=14,
            layer_scale=1e-5,
            max_resolution=1792,
            global_layers=8,
        ),
    )
}


def preset(
    name: str, heads: Mapping[str, HeadSpec] | None = None, **overrides: Any
) -> StudentConfig:
    """The preset ``name`` with some settings replaced; each head's CLS token carries its name.

    Raises:
        ValueError: no such preset, or a value out of range.
        TypeError: no such setting, or a value of the wrong kind.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown student {name!r}{suggestion(name, PRESETS)}")
    known = [f.name for f in dataclasses.fields(StudentConfig)]
    for key in overrides:
        if key not in known:
            raise TypeError(f"unknown setting {key!r} of a student{suggestion(key, known)}")
    heads = {} if heads is None else heads
    # Named, so that the head called so reads it: unnamed tokens lie in alphabetical order.
    names = {"cls": tuple(heads)} if isinstance(heads, Mapping) else {}
    return dataclasses.replace(PRESETS[name], heads=heads, **(names | overrides))
