"""Adaptor heads from the entries of a checkpoint: which heads there are, how large, what is wrong.

RADIO's checkpoints name a teacher's summary head ``_heads.<teacher>`` and its spatial head
``_feature_projections.<teacher>``; older ones count teachers. Heads of version 1 have the layers
``fc1, norm, inner.0, inner.1, inner.3, ..., fc2``, those of version 2 ``pre_norm.0, fc1,
blocks.i.{0,2}, final.{0,2}``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastagglo.errors import suggestion

VERSIONS = ("v1", "v2")

_KINDS = {
    "_heads": "summary",
    "summary": "summary",
    "_feature_projections": "spatial",
    "spatial": "spatial",
}
# The first kind in a name counts: a teacher may be called like one.
_ENTRY = re.compile(rf"(?:.*?\.)??({'|'.join(_KINDS)})\.([^.]+)\.(.+)")


@dataclass(frozen=True)
class Found:
    """The heads of a state.

    Attributes:
        in_features: width of what they read.
        specs: fields of a ``HeadSpec`` by teacher.
        entries: of the heads, by the names that ``AdaptorHeads`` has for them.
        origin: those names to the state's own.
    """

    in_features: int
    specs: dict[str, dict[str, Any]]
    entries: dict[str, Tensor]
    origin: dict[str, str]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError, naming each entry that does not fit the expected names and shapes."""
        problems = {
            "missing": [self._name(name) for name in expected if name not in self.entries],
            "unexpected": [self._name(name) for name in self.entries if name not in expected],
            "of another shape": [
                f"{self._name(name)} {tuple(self.entries[name].shape)}, expected {shape}"
                for name, shape in expected.items()
                if name in self.entries and self.entries[name].shape != shape
            ],
        }
        if wrong := [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]:
            raise ValueError(f"from_state_dict: entries {'; '.join(wrong)}")

    def _name(self, name: str) -> str:
        if name in self.origin:
            return self.origin[name]
        # A missing one, as its neighbours are called.
        head = ".".join(name.split(".")[:2]) + "."
        near = next(ours for ours in self.origin if ours.startswith(head))
        return self.origin[near].removesuffix(near.removeprefix(head)) + name.removeprefix(head)


def read_heads(
    state: Mapping[str, Tensor],
    teachers: Mapping[str, str] | None,
    upsample: Mapping[str, int],
) -> Found:
    """The heads of a state; arguments and errors as of ``AdaptorHeads.from_state_dict``."""
    if not isinstance(state, Mapping):
        raise TypeError(f"from_state_dict: state must be a mapping, got {type(state).__name__}")
    grouped: dict[str, dict[str, dict[str, str]]] = {}  # teacher, kind, parameter: the state's name
    for key in state:
        if match := _ENTRY.fullmatch(key):
            kind, teacher, parameter = match.groups()
            head = grouped.setdefault(teacher, {}).setdefault(_KINDS[kind], {})
            if parameter in head:
                raise ValueError(
                    f"from_state_dict: {head[parameter]!r} and {key!r} are the same parameter; "
                    "give the entries of one model"
                )
            head[parameter] = key
            if not isinstance(state[key], Tensor):
                kind = type(state[key]).__name__
                raise TypeError(f"from_state_dict: {key!r} must be a tensor, got {kind}")
    if not grouped:
        raise ValueError(
            "from_state_dict: no heads in the state; their entries are called "
            "'_heads.<teacher>.*' and '_feature_projections.<teacher>.*', or "
            "'summary.<teacher>.*' and 'spatial.<teacher>.*'"
        )
    names = {teacher: teacher for teacher in grouped} if teachers is None else dict(teachers)
    for teacher in names:
        if teacher not in grouped:
            raise ValueError(
                f"teachers: no teacher {teacher!r} in the state{suggestion(teacher, grouped)}"
            )
    for name in upsample:
        if name not in names.values():
            raise ValueError(f"upsample: no teacher {name!r}{suggestion(name, names.values())}")
    specs, entries, origin, widths = {}, {}, {}, Counter()
    for teacher, name in names.items():
        if name in specs:
            raise ValueError(f"teachers: two teachers cannot both become {name!r}")
        sizes = {}
        for kind, head in grouped[teacher].items():
            sizes[kind] = _sizes({parameter: state[key] for parameter, key in head.items()})
            widths.update(sizes[kind].pop("in_features"))
            for parameter, key in head.items():
                ours = f"{kind}.{name}.{parameter}"
                entries[ours], origin[ours] = state[key], key
        specs[name] = _spec(teacher, sizes, upsample.get(name, 1))
    return Found(_most_common(widths), specs, entries, origin)


def _sizes(head: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of a head say; where they disagree, what most of them say."""
    if any(name.startswith(("fc2.", "norm.", "inner.")) for name in head):
        version, last = "v1", "fc2"
        blocks = _count(r"inner\.(\d+)\..*", head, 3)
        inner = {f"inner.{3 * i}.weight" for i in range(blocks)}
        vectors = ("fc1.bias", "norm.weight", "norm.bias")
    else:
        version, last = "v2", "final.2"
        blocks = _count(r"blocks\.(\d+)\..*", head, 1)
        inner = {f"blocks.{i}.2.weight" for i in range(blocks)}
        vectors = ("fc1.bias", "final.0.weight", "final.0.bias")
    hidden, out, width = Counter(), Counter(), Counter()
    for name, value in head.items():
        shape = tuple(value.shape)
        if name in ("fc1.weight", f"{last}.weight", *inner) and len(shape) == 2:
            (out if name.startswith(last) else hidden).update(shape[:1])
            (width if name == "fc1.weight" else hidden).update(shape[1:])
        elif len(shape) == 1:
            if name in vectors:
                hidden.update(shape)
            elif name == f"{last}.bias":
                out.update(shape)
            elif name.startswith("pre_norm."):
                width.update(shape)
    return {
        "version": version,
        "blocks": blocks,
        "pre_norm": any(name.startswith("pre_norm.") for name in head),
        "hidden": _most_common(hidden),
        "out": _most_common(out),
        "in_features": width,
    }


def _count(pattern: str, names: Iterable[str], step: int) -> int:
    """How many layers are numbered."""
    matches = (re.fullmatch(pattern, name) for name in names)
    return max((int(match.group(1)) // step + 1 for match in matches if match), default=0)


def _most_common(sizes: Counter[int]) -> int:
    """1 where nothing says anything: then the entries that would are named as missing."""
    return max(1, sizes.most_common(1)[0][0]) if sizes else 1


def _spec(teacher: str, sizes: dict[str, dict[str, Any]], upsample: int) -> dict[str, Any]:
    summary, spatial = sizes.get("summary"), sizes.get("spatial")
    both = [size for size in (summary, spatial) if size is not None]
    for field in ("version", "pre_norm"):
        values = [size[field] for size in both]
        if len(set(values)) > 1:
            raise ValueError(
                f"from_state_dict: the summary and the spatial head of teacher {teacher!r} must "
                f"have the same {field}, got {values[0]!r} and {values[1]!r}"
            )
    if spatial is not None and spatial["out"] % upsample**2:
        raise ValueError(
            f"upsample: the spatial head of teacher {teacher!r} has {spatial['out']} outputs, "
            f"which {upsample}**2 does not divide"
        )
    return {
        "summary": summary and summary["out"],
        "spatial": spatial and spatial["out"] // upsample**2,
        "hidden": both[-1]["hidden"],
        "summary_hidden": summary and summary["hidden"],
        **{field: both[-1][field] for field in ("version", "blocks", "pre_norm")},
        "summary_blocks": both[0]["blocks"] if both[0]["blocks"] != both[-1]["blocks"] else None,
        "upsample": upsample if spatial else 1,
    }
