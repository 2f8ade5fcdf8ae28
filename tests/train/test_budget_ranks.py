"""Steps of a fixed number of tokens on two ranks: as one process with two micro-steps.

This file is also a program that forks its ranks: ``python test_budget_ranks.py FOLDER PHOTOS``.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastagglo.model import Student, load_student
from fastagglo.train import Trainer, budget
from fastagglo.train.recipe import config_from_dict

RANK_SECONDS = 200  # a rank that waits longer for the other fails instead of hanging
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "compiled": {"student": {"compile": True, "checkpoint_blocks": True}},
    "fsdp2": {"distributed": {"strategy": "fsdp2"}},
}


def train(name: str, folder: Path, photos: str, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "seed": 3,
        "threads": 1,
        "device": "cpu",
        "student": {"preset": "tiny", "depth": 2, "registers": 2, "max_resolution": 64},
        "teachers": {
            "hog": {
                "model": "hog",
                "summary_weight": 0.0,
                "head": {"spatial_blocks": 1},
                # Statistics would be settled after one micro-step, or after two at once.
                "normaliser": "none",
            }
        },
        "data": {"images": [photos], "holdout_photos": 0.0},
        "stages": [
            {
                "steps": 3,
                "lr": 1e-3,
                "freeze_trunk_steps": 1,
                "tokens": 150,
                "groups": [{"images": 2, "sizes": [32, 48]}, {"images": 1, "sizes": [64, 32]}],
            }
        ],
        "eval": {"points": 0, "pictures": 0},
        "log": {"interval": 1, "progress": False, "tensorboard": False},
    }
    for section, change in changes.items():
        settings[section] = settings.get(section, {}) | change
    trainer = Trainer(config_from_dict(settings, "test"), torch.device("cpu"))
    assert trainer.planner(0).capacity == 75
    (folder / name).mkdir(exist_ok=True)
    assert trainer.run(folder / name)


def work(rank: int, folder: Path, photos: str) -> None:
    """All runs, as one of two ranks."""
    # In float64 what is left is the order of sums; in eval mode nothing is drawn at random.
    torch.set_default_dtype(torch.float64)
    Student.train = lambda student, mode=True: nn.Module.train(student, False)
    budget.torch.compile = functools.partial(torch.compile, backend="aot_eager")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=RANK_SECONDS),
    )
    for name, changes in RUNS.items():
        train(name, folder, photos, **changes)
    dist.destroy_process_group()
    if rank == 0:
        train("one", folder, photos, optimiser={"accumulate": 2})


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program left."""
    found = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(found), str(photos)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    program = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert program.returncode == 0, program.stderr[-4000:]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_as_one_process(folder: Path, name: str) -> None:
    ours, theirs = (load_student(folder / run / "student").state_dict() for run in (name, "one"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-10)


if __name__ == "__main__":
    ranks = [
        multiprocessing.get_context("fork").Process(
            target=work, args=(rank, Path(sys.argv[1]), sys.argv[2])
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
