"""A rank is killed in the middle of a run: torchrun starts all anew, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch

ROOT = Path(__file__).parents[2]
SECONDS = 120  # for a whole run; a hang fails


def settings(photos: Path) -> dict:
    stage = {"steps": 12, "lr": 1e-3, "phi_s_steps": 3, "freeze_trunk_steps": 2}
    return {
        "seed": 3,
        "threads": 1,
        "device": "cpu",
        "student": {"preset": "tiny", "depth": 2, "registers": 2, "max_resolution": 64},
        "teachers": {"hog": {"model": "hog", "summary_weight": 0.0}},
        "data": {"images": [str(photos)], "holdout_photos": 0.2},
        "stages": [stage | {"groups": [{"images": 4, "sizes": [32, 64]}]}],
        "distill": {"shift_std": 0.5, "ema_decay": 0.9, "mesa_weight": 0.1},
        "eval": {"points": 0},
        "log": {"interval": 1, "progress": False, "tensorboard": False, "checkpoint_every": 4},
    }


def launch(folder: Path, out: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "train.py")]
    command += ["--recipe", "tiny.toml", "--out", out]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank among the launcher's children."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(path.parent.name)
    raise AssertionError(f"rank {rank} is not running")


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finish(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "tiny.toml").write_text(tomli_w.dumps(settings(photos)))
    finish(launch(folder, "whole"))
    return folder


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks through /proc")
@pytest.mark.parametrize(("after", "rank"), [(1, 0), (6, 1)], ids=["early", "later"])
def test_a_killed_rank(folder: Path, after: int, rank: int) -> None:
    """Before the first checkpoint, and after it; then as the run that nobody disturbed."""
    out = f"disturbed{rank}"
    disturbed = launch(folder, out)
    try:
        deadline = time.monotonic() + SECONDS
        while not any(r["kind"] == "train" and r["step"] >= after for r in rows(folder / out)):
            assert time.monotonic() < deadline
            assert disturbed.poll() is None, disturbed.communicate()[0]
            time.sleep(0.005)
        os.kill(rank_process(disturbed.pid, rank), signal.SIGKILL)
    except BaseException:
        os.killpg(disturbed.pid, signal.SIGKILL)
        raise
    output = finish(disturbed)
    assert output.count("finished: see") == 1
    steps = [row["step"] for row in rows(folder / out) if row["kind"] == "train"]
    assert steps == list(range(12))
    states = [
        torch.load(folder / name / "checkpoint.pt", weights_only=True) for name in (out, "whole")
    ]
    assert states[0]["step"] == states[1]["step"] == 12
    for key, value in states[1]["distiller"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(states[0]["distiller"][key], value), key
