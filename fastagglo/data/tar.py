"""Images in webdataset tar shards, read by position."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path, PurePosixPath

import numpy as np

from fastagglo.data.decode import EXTENSIONS
from fastagglo.data.source import Source
from fastagglo.errors import UserError

_REMOTE = re.compile(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")


class TarSource(Source):
    """Images in tar shards of the webdataset layout, as img2dataset writes them.

    A member ``folder/000123.jpg`` is an image of key ``000123`` (all before the first dot of the
    file name, webdataset's rule); the ``.json``, ``.txt`` and other members beside it are not read.
    The headers are scanned once, when the source is made; images are then read by position, so any
    order costs the same and no shard is ever unpacked.

    A shard that ends early (an interrupted download) is used as far as it is whole, with a warning.

    Args:
        paths: a path or a pattern, or a list of them. Patterns may hold braces,
            ``shards/{000..010}.tar``, ``{a,b}.tar``, and the wildcards ``*``, ``?``, ``[...]``.

    Attributes:
        paths: the shards, in order.
        truncated: the shards that end early.

    Raises:
        UserError: a remote address, a missing shard, a pattern that matches none, a compressed or
            unreadable tar, no images.
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self.paths = [path for pattern in given for path in _expand(os.fspath(pattern))]
        if missing := [path for path in self.paths if not os.path.isfile(path)]:
            raise UserError(
                f"the tar shard {missing[0]!r} does not exist"
                + (f", nor do {len(missing) - 1} others" if len(missing) > 1 else "")
            )
        self.truncated: list[str] = []
        names = [Path(path).name for path in self.paths]
        # Names alone stay the same when the data set moves, unless two shards share theirs.
        labels = names if len(set(names)) == len(names) else self.paths
        keys: list[str] = []
        spans: list[tuple[int, int]] = []
        counts = []
        for path, label in zip(self.paths, labels, strict=True):
            before = len(keys)
            for key, start, size in self._scan(path):
                keys.append(f"{label}/{key}")
                spans.append((start, size))
            counts.append(len(keys) - before)
        if not keys:
            raise UserError(
                f"no images in the tar shards {', '.join(map(str, given))!r}: members must be "
                f"named KEY.EXT, with no other dot, EXT one of {', '.join(sorted(EXTENSIONS))}"
            )
        self._keys = keys
        self._spans = np.asarray(spans, dtype=np.int64)
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._counts = counts

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> bytes:
        start, size = (int(value) for value in self._spans[index])
        shard = int(np.searchsorted(self._ends, index, side="right"))
        with open(self.paths[shard], "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.paths[shard]} has become shorter since it was indexed")
        return data

    @property
    def shards(self) -> Sequence[int]:
        return [count for count in self._counts if count]

    def _scan(self, path: str) -> Iterator[tuple[str, int, int]]:
        """Yields (key, position, size) of the whole images of a shard."""
        seen: set[str] = set()
        end = 0  # of the last whole member, rounded up to tar's blocks
        try:
            size = os.path.getsize(path)
            # "r:" reads plain tars only: a compressed one has no positions to read from.
            with tarfile.open(path, "r:") as tar:
                while (member := _next(tar)) is not None:
                    if member.size < 0 or member.offset_data + member.size > size:
                        break
                    end = tar.offset
                    key = _image_key(member)
                    if key and key not in seen:
                        seen.add(key)
                        yield key, member.offset_data, member.size
            whole = _ends_well(path, end)
        except (OSError, tarfile.ReadError) as error:
            raise UserError(
                f"{path!r} cannot be read as a tar shard ({error}); accepted are plain tar files "
                "of the webdataset layout, not compressed ones"
            ) from error
        if not whole:
            self.truncated.append(path)
            warnings.warn(
                f"the tar shard {path!r} ends early: {len(seen)} whole images of it are used",
                stacklevel=3,
            )


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.ReadError:
        return None  # the file ends within a member: _ends_well will say so
    finally:
        tar.members.clear()  # tarfile would keep every header of the shard


def _image_key(member: tarfile.TarInfo) -> str:
    """webdataset's key of an image member; empty for any other member."""
    path = PurePosixPath(member.name)
    stem, _, extension = path.name.partition(".")
    if not stem or extension.lower() not in EXTENSIONS:
        return ""
    return str(path.with_name(stem)) if member.isreg() and not member.issparse() else ""


def _ends_well(path: str, end: int) -> bool:
    """Whether an archive's end mark, a block of zeros, follows its last member."""
    with open(path, "rb") as file:
        file.seek(end)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _expand(pattern: str) -> list[str]:
    """The paths that a pattern stands for: braces first, then wildcards."""
    if _REMOTE.match(pattern):
        raise UserError(
            f"{pattern!r} is a remote address, and shards are read from local or mounted files "
            "only: download them, or mount the bucket, and give the path"
        )
    paths: list[str] = []
    for path in expand_braces(os.path.expanduser(pattern)):
        if glob.has_magic(path) and not os.path.exists(path):
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise UserError(f"no tar shard matches {path!r}")
            paths += found
        else:
            paths.append(path)
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{000..010}`` (zeros kept) and ``{a,b}``, all combinations, leftmost slowest."""
    choices: list[list[str]] = []
    position = 0
    for match in _BRACES.finditer(pattern):
        choices.append([pattern[position : match.start()]])
        choices.append(_alternatives(match))
        position = match.end()
    choices.append([pattern[position:]])
    return ["".join(parts) for parts in product(*choices)]


def _alternatives(match: re.Match[str]) -> list[str]:
    if numbers := _RANGE.match(match[1]):
        first, last = numbers[1], numbers[2]
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        return [f"{i:0{width}d}" for i in range(int(first), int(last) + step, step)]
    return match[1].split(",") if "," in match[1] else [match[0]]
