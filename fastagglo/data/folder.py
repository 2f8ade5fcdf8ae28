"""Images in a folder and the folders below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastagglo.data.decode import EXTENSIONS
from fastagglo.data.source import Source
from fastagglo.errors import UserError


class FolderSource(Source):
    """Every image file in a folder and below it, in the order of their paths.

    Hidden files and folders are left out. Links to folders are followed, each folder once. An
    image's key is its path below the folder, with forward slashes.

    Args:
        path: the folder.

    Raises:
        UserError: no such folder, or no image file in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            kind = "is a file" if self.path.exists() else "does not exist"
            raise UserError(
                f"the image folder {str(self.path)!r} {kind}: give a folder of images, "
                'tar shards such as "shards/{000..010}.tar", or "builtin"'
            )
        self._keys = sorted(_image_files(self.path))
        if not self._keys:
            tars = any(self.path.glob("*.tar"))
            hint = f'; it holds tar shards: give "{self.path}/*.tar"' if tars else ""
            raise UserError(
                f"no images in the folder {str(self.path)!r} (looked for "
                f"{', '.join(sorted(EXTENSIONS))}, also in its subfolders){hint}"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        return self._keys[index]

    def read(self, index: int) -> bytes:
        return (self.path / self._keys[index]).read_bytes()


def _image_files(root: Path) -> Iterator[str]:
    visited = {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # Sorted first, so that of two links to one folder the same is followed on every machine.
        kept = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in visited:
                visited.add(real)
                kept.append(name)
        subfolders[:] = kept
        for name in files:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in EXTENSIONS:
                yield Path(folder, name).relative_to(root).as_posix()
