"""The folder of a run: who may write there, and what lies in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastagglo.errors import UserError
from fastagglo.train.checkpoint import FILE_NAME
from fastagglo.train.config import RunConfig
from fastagglo.train.distributed import restarted
from fastagglo.train.recipe import CONFIG_FILE

METRICS = "metrics.jsonl"
STUDENT = "student"
AVERAGE = "student-average"
PICTURES = "pictures"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
_OURS = (CONFIG_FILE, METRICS, STUDENT, AVERAGE, PICTURES, REPORT, TENSORBOARD, FILE_NAME)

# Settings that say where and how fast a run goes, not what it computes; all others must agree
# between a checkpoint and the run that goes on from it.
_FREE = (
    *("recipe", "out", "resume", "overwrite", "device", "threads", "log", "data.workers"),
    *("cache.folder", "cache.store", "student.checkpoint_blocks", "teacher_stream"),
    *("distributed.strategy", "distributed.shard", "distributed.reduce"),
)


def folder_of(config: RunConfig) -> Path:
    """Where a run is written."""
    return Path(config.out or Path("runs") / Path(config.recipe).stem)


def to_resume(config: RunConfig) -> Path | None:
    """The folder of the run to go on with, or None for a new run.

    It is the one that the user names, or after torchrun has started all ranks again (a rank died,
    ``--max-restarts``) that of this very run, if it has come to a checkpoint.
    """
    if config.resume:
        return Path(config.resume)
    folder = folder_of(config)
    return folder if restarted() and (folder / FILE_NAME).is_file() else None


def claim(config: RunConfig) -> Path:
    """Make the folder of a new run.

    Raises:
        UserError: it holds another run or other files; the message says what to do.
    """
    folder = folder_of(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"setting out: {folder} is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / CONFIG_FILE).exists():
            raise UserError(
                f"setting out: {folder} holds other files and no run of ours; choose another "
                "folder with --out"
            )
        # Before its first checkpoint a run that torchrun starts again has nothing to lose.
        if not config.overwrite and not restarted():
            raise UserError(
                f"setting out: {folder} already holds a run; go on with it (--resume {folder}), "
                "replace it (--overwrite) or choose another folder (--out)"
            )
        for name in _OURS:  # only what a run writes: never a stranger's files
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"setting out: cannot make {folder}: {error.strerror}") from error
    return folder


def check_same_run(config: RunConfig, saved: dict, folder: Path) -> None:
    """Refuse to go on from a checkpoint of another configuration.

    Args:
        config: of the run that wants to go on.
        saved: `RunConfig.to_dict` of the run that wrote the checkpoint.

    Raises:
        UserError: names the first setting that differs, with both values.
    """
    ours, theirs = _flat(config.to_dict()), _flat(saved)
    for key in sorted(ours.keys() | theirs.keys()):
        free = any(key == name or key.startswith(name + ".") for name in _FREE)
        if not free and ours.get(key) != theirs.get(key):
            raise UserError(
                f"checkpoint in {folder}: it was written with {key} = {theirs.get(key)!r}, but "
                f"this run has {ours.get(key)!r}; go on with the setting it had, or start a new "
                f"run from its student (--student.init {folder / STUDENT})"
            )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, child in items:
        flat.update(_flat(child, f"{prefix}.{key}" if prefix else str(key)))
    return flat
