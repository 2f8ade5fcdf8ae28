"""A step of ranks with unlike images is the step of one process on all their images.

This file is also the program of each rank: ``python test_uneven_ranks.py RANK WORLD FOLDER``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastagglo.data import GroupViews, StepPlan, TrainBatch
from fastagglo.features import Features
from fastagglo.train import Trainer
from fastagglo.train.inputs import crop_stream
from fastagglo.train.recipe import config_from_dict
from fastagglo.train.schedule import Planner
from fastagglo.train.telemetry import Telemetry

RANK_SECONDS = 60  # a rank that waits longer for the others fails instead of hanging
STEPS = 3

Settings = dict[str, Any]


def settings(photos: Path) -> Settings:
    """On two ranks the second has none of the large images, and more of the small ones."""
    groups = [{"images": 6, "sizes": [32]}, {"images": 1, "sizes": [80, 96]}]
    return {
        "seed": 3,
        "threads": 1,
        "device": "cpu",
        "student": {"preset": "tiny", "depth": 2, "registers": 2, "max_resolution": 96},
        "teachers": {
            "hog": {"model": "hog", "summary_weight": 0.0, "spatial_loss": "smooth_l1"},
            "lite0": {"model": "efficientnet-lite0", "normaliser": "standardize"},
        },
        "data": {"images": [str(photos)], "holdout_photos": 0.0},
        "stages": [{"steps": STEPS, "lr": 1e-3, "phi_s_steps": 2, "groups": groups}],
        "optimiser": {"clip": 0.0},  # which would hide a common factor
        "distill": {"shift_std": 0.5, "ema_decay": 0.9, "mesa_weight": 0.5},
        "eval": {"points": 0, "pictures": 0},
        "log": {"interval": 1, "progress": False, "tensorboard": False},
    }


class Steps:
    """Runs a trainer's steps in float64 with nothing drawn at random; keeps its gradients."""

    def __init__(self, chosen: Settings, folder: Path) -> None:
        self.trainer = Trainer(config_from_dict(chosen, "test"), torch.device("cpu"))
        self.folder, distiller = folder, self.trainer.distiller
        distiller.double().eval()
        self.trainer.ema.double()
        distiller.balancer.train()
        distiller.train = lambda mode=True: distiller
        self.trainer.optimiser.step = lambda: None
        self.gradients: list[dict[str, Tensor]] = []
        targets = self.trainer._targets
        self.trainer._targets = lambda groups: [
            {name: wide(features) for name, features in group.items()} for group in targets(groups)
        ]

    def run(self, batches: Iterable[TrainBatch]) -> dict[str, Any]:
        trainer, distiller = self.trainer, self.trainer.distiller
        names = list(trainer.config.teachers)
        with Telemetry(
            self.folder, STEPS, names, quiet=True, tensorboard=False, interval=1
        ) as trainer.telemetry:
            each: Iterator[TrainBatch] = iter(batches)
            for step in range(STEPS):
                trainer._one_step(each)
                self.gradients.append({n: p.grad for n, p in distiller.named_parameters()})
                trainer.step = step + 1
        return {"gradients": self.gradients, "bases": distiller.bases.state_dict()}


def wide(features: Features) -> Features:
    return Features(
        *(None if v is None else v.double() for v in (features.summary, features.spatial))
    )


def rank_batches(trainer: Trainer, chosen: Settings, rank: int, world: int) -> list[TrainBatch]:
    config = config_from_dict(chosen, "test")
    planner = Planner(config, trainer.planner.specs, 16, world, rank)
    stream = crop_stream(config, trainer.data, planner)
    return [stream[step] for step in range(STEPS)]


def joined(parts: list[TrainBatch], counts: Any) -> TrainBatch:
    """The batch of one process, from those of ranks that have ``counts`` (groups, ranks)."""
    groups = []
    for number, row in enumerate(counts):
        views = [
            part.groups[int((counts[:number, rank] > 0).sum())]
            for rank, part in enumerate(parts)
            if row[rank]
        ]
        groups.append(
            GroupViews(
                student=torch.cat([view.student for view in views]),
                teachers={n: torch.cat([v.teachers[n] for v in views]) for n in views[0].teachers},
                shifts={n: torch.cat([v.shifts[n] for v in views]) for n in views[0].shifts},
                keys=tuple(key for view in views for key in view.keys),
            )
        )
    keys = [key for group in groups for key in group.keys]
    return TrainBatch(groups, keys, {}, plan=StepPlan((), parts[0].plan.window))


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=RANK_SECONDS),
    )
    chosen = json.loads((folder / "settings.json").read_text())
    (folder / f"rank{rank}").mkdir()
    steps = Steps(chosen, folder / f"rank{rank}")
    found = steps.run(rank_batches(steps.trainer, chosen, rank, world))
    weights = {n: len(list(t.tower.parameters())) for n, t in steps.trainer.teachers.items()}
    torch.save(found | {"weights": weights}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_ranks(world: int, chosen: Settings, folder: Path) -> list[dict[str, Any]]:
    (folder / "settings.json").write_text(json.dumps(chosen))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def losses(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def check_equal(
    world: int, chosen: Settings, alone: Settings, folder: Path
) -> list[dict[str, Any]]:
    """The steps of ``chosen`` on some ranks are those of ``alone`` on the joined batches."""
    found = run_ranks(world, chosen, folder)
    (folder / "alone").mkdir()
    one = Steps(alone, folder / "alone")
    planner = Planner(config_from_dict(chosen, "test"), one.trainer.planner.specs, 16, world)
    parts = [rank_batches(one.trainer, chosen, rank, world) for rank in range(world)]
    batches = [
        joined(list(each), planner.whole(step).counts[:, 0])
        for step, each in enumerate(zip(*parts, strict=True))
    ]
    expected = one.run(batches)
    for name, value in expected["bases"].items():
        for rank in found:
            if isinstance(value, Tensor):
                # Statistics are merged in float64; what is put into use is kept in float32 first.
                torch.testing.assert_close(rank["bases"][name], value, rtol=1e-6, atol=1e-6)
            else:
                assert rank["bases"][name] == value
    for step, gradients in enumerate(expected["gradients"]):
        for name, value in gradients.items():
            for rank in found:
                got = rank["gradients"][step][name]
                assert torch.equal(got, found[0]["gradients"][step][name])
                # Float64, sums of a few hundred terms that cancel; 3e-14 was seen.
                bound = 1e-11 * float(value.abs().max())
                torch.testing.assert_close(got, value, rtol=0, atol=bound, msg=name)
    for got, value in zip(losses(folder / "rank0"), losses(folder / "alone"), strict=True):
        assert got == pytest.approx(value, rel=1e-5)  # summed over ranks in float32
    return found


def partitioned(photos: Path) -> Settings:
    """Two ranks with small images for one teacher, one with others for both, and a rank with large
    ones for the other teacher; two images may go to any rank."""
    groups = [
        {"images": 5, "sizes": [32], "ranks": [0, 1], "teachers": ["hog"]},
        {"images": 2, "sizes": [48], "ranks": [2, 2]},
        {"images": 1, "sizes": [80, 96], "ranks": [3, 3], "teachers": ["lite0"]},
        {"images": 2, "sizes": [32], "teachers": ["hog"]},
    ]
    chosen = settings(photos)
    chosen["stages"][0]["groups"] = groups
    chosen["distill"]["balance"] = "uncertainty"
    return chosen


def test_uneven_ranks(photos: Path, tmp_path: Path) -> None:
    check_equal(2, settings(photos), settings(photos), tmp_path)


def test_partitions(photos: Path, tmp_path: Path) -> None:
    """Four ranks of three partitions do the step of one process on all their images."""
    chosen = partitioned(photos)
    alone = json.loads(json.dumps(chosen))
    for group in alone["stages"][0]["groups"]:
        group.pop("ranks", None)
    found = check_equal(4, chosen, alone, tmp_path)
    # Ranks 1 and 0 have no images for this teacher; rank 0 needs it for held-out photos.
    assert [rank["weights"]["lite0"] > 0 for rank in found] == [True, False, True, True]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
