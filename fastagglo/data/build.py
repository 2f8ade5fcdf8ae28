"""From what a configuration says to a source."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from fastagglo.data.folder import FolderSource
from fastagglo.data.photos import PhotoSource
from fastagglo.data.source import Mixture, Source
from fastagglo.data.tar import TarSource
from fastagglo.errors import UserError

_TAR = re.compile(r"\.(tar|tgz|tar\.\w+)$|://|^pipe:", re.IGNORECASE)

SourceSpec = str | os.PathLike[str] | Sequence["SourceSpec | tuple[SourceSpec, float]"]


def build_source(spec: SourceSpec) -> Source:
    """Make the source that a configuration names.

    Args:
        spec: one of

            - ``"builtin"``: the photographs that ship with scikit-image and scikit-learn;
            - a path to a folder of images;
            - a path or pattern of tar shards, ``"shards/{000..010}.tar"``, ``"shards/*.tar"``;
            - a list of these, each alone (weight 1) or as a pair ``(spec, weight)``: a mixture.

    Raises:
        UserError: no such folder or shard, no images in it, a bad weight, an empty list.
        TypeError: a spec of another kind.
    """
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if isinstance(spec, str):
        if spec == "builtin":
            return PhotoSource()
        return TarSource(spec) if _TAR.search(spec) else FolderSource(spec)
    if not isinstance(spec, (list, tuple)):
        raise TypeError(
            'a source must be "builtin", a path, or a list of (source, weight) pairs, got '
            f"{type(spec).__name__} {spec!r}"
        )
    parts = [_part(item) for item in spec]
    try:
        return Mixture([(build_source(source), weight) for source, weight in parts])
    except (
        TypeError,
        ValueError,
    ) as error:  # what a configuration file got wrong, not a caller's program
        raise UserError(f"the mixture {spec!r} cannot be built: {error}") from error


def _part(item: object) -> tuple[SourceSpec, float]:
    if isinstance(item, (str, os.PathLike)):
        return item, 1.0
    if isinstance(item, (list, tuple)) and len(item) == 2:
        return item[0], item[1]
    raise UserError(
        f"a part of a mixture must be a source or a (source, weight) pair, got {item!r}"
    )
