"""One model on several ranks: DDP, FSDP2 and hybrid shards train as one process does.

This file is also a program that forks its ranks: ``python test_parallel.py FOLDER``.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from fastagglo.data import GroupViews, TrainBatch
from fastagglo.errors import UserError
from fastagglo.model import Student, load_student
from fastagglo.train import Trainer, loop
from fastagglo.train.inputs import crop_stream
from fastagglo.train.parallel import check_ranks
from fastagglo.train.recipe import config_from_dict
from fastagglo.train.schedule import Planner
from fastagglo.train.targets import load_teachers
from fastagglo.train.telemetry import Telemetry

CPU = torch.device("cpu")
RANK_SECONDS = 60  # a rank that waits longer for the others fails instead of hanging
RANKS = 4
STEPS = 3
HALF = 2  # the step after which runs are resumed under another strategy

FSDP2 = {"strategy": "fsdp2"}
HYBRID = {"strategy": "fsdp2", "shard": 2}


# What a rank does.


def settings(photos: str) -> dict[str, Any]:
    """Steps of two micro-steps: statistics, thaw, average, learned weights of the losses."""
    stage = {"steps": STEPS, "lr": 1e-3, "phi_s_steps": 2, "freeze_trunk_steps": 1}
    groups = [{"images": 8, "sizes": [32]}, {"images": 8, "sizes": [48]}]
    return {
        "seed": 3,
        "threads": 1,
        "device": "cpu",
        "student": {"preset": "tiny", "depth": 2, "registers": 3, "max_resolution": 64},
        "teachers": {
            "hog": {"model": "hog", "summary_weight": 0.0, "head": {"spatial_blocks": 1}},
            "lite0": {
                "model": "efficientnet-lite0",
                "layer": "stride16",
                "sizes": [48],
                "summary_loss": "angular",
                "spatial_loss": "smooth_l1",
            },
        },
        "data": {"images": [photos], "holdout_photos": 0.2},
        "stages": [stage | {"groups": groups}],
        "optimiser": {"accumulate": 2, "clip": 0.5},
        "distill": {
            "balance": "uncertainty",
            "shift_std": 0.5,
            "ema_decay": 0.9,
            "mesa_weight": 0.1,
        },
        "eval": {"points": 2, "photos": 1, "pictures": 0},
        "log": {"interval": 1, "progress": False, "tensorboard": False},
    }


class Joined(Dataset[TrainBatch]):
    """The batches of some of the four ranks as one."""

    encoded = False  # pixels, not files

    def __init__(self, trainer: Trainer, ranks: range) -> None:
        config, specs = trainer.config, trainer.planner.specs
        patch = trainer.planner.patch_size
        planners = [Planner(config, specs, patch, RANKS, rank) for rank in ranks]
        self.streams = [crop_stream(config, trainer.data, planner) for planner in planners]

    def __getitem__(self, index: int) -> TrainBatch:
        batches = [stream[index] for stream in self.streams]
        groups = [join(groups) for groups in zip(*(b.groups for b in batches), strict=True)]
        keys = [key for group in groups for key in group.keys]
        return dataclasses.replace(batches[0], groups=groups, keys=keys)


def join(groups: tuple[GroupViews, ...]) -> GroupViews:
    def cat(field: str) -> dict[str, torch.Tensor]:
        parts = [getattr(group, field) for group in groups]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return dataclasses.replace(
        groups[0],
        student=torch.cat([group.student for group in groups]),
        teachers=cat("teachers"),
        shifts=cat("shifts"),
        keys=tuple(key for group in groups for key in group.keys),
    )


@dataclasses.dataclass
class Run:
    """A run of the trainer on so many ranks."""

    name: str
    distributed: dict[str, Any]
    world: int = 1
    resume: str | None = None
    changes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class Rank:
    """One rank, in groups of any size, one after the other."""

    def __init__(self, rank: int, folder: Path, photos: str, meet: Barrier) -> None:
        self.rank, self.folder, self.photos, self.meet = rank, folder, photos, meet

    def together(self, name: str, rank: int, world: int, work: Callable[[], object]) -> None:
        """Do something as one of ``world`` ranks; one alone has no process group."""
        if world == 1:
            work()
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/store-{name}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=RANK_SECONDS),
        )
        work()
        dist.destroy_process_group()

    def train(self, run: Run, rank: int) -> None:
        self.together(run.name, rank, run.world, lambda: self.one_run(run, rank))

    def one_run(self, run: Run, rank: int) -> None:
        """A run, with a copy of the checkpoint at half its way, its losses and what it held."""
        name = run.name
        values = settings(self.photos) | {"distributed": run.distributed}
        for section, change in run.changes.items():
            values[section] = values[section] | change
        here = self.folder / f"{name}-{rank}"  # a rank that must not write would betray itself
        here.mkdir()
        resume = self.folder / run.resume if run.resume else None
        trainer = Trainer(config_from_dict(values, "test"), CPU, resume)
        share = RANKS // run.world
        trainer.stream = Joined(trainer, range(rank * share, (rank + 1) * share))
        rows: list[dict[str, float]] = []
        save = trainer._save

        def save_and_keep(folder: Path) -> int:
            step = save(folder)
            if rank == 0 and step == HALF:
                (self.folder / f"{name}-half").mkdir()
                os.link(folder / "checkpoint.pt", self.folder / f"{name}-half" / "checkpoint.pt")
            return step

        def report(telemetry: Telemetry, step: int, losses: Any, **named: Any) -> None:
            figures = {**losses, "norm": named["grad_norm"]}
            rows.append({key: float(value) for key, value in figures.items()})
            telemetry_step(telemetry, step, losses, **named)

        trainer._save = save_and_keep
        telemetry_step, Telemetry.step = Telemetry.step, report
        try:
            assert trainer.run(here)
        finally:
            Telemetry.step = telemetry_step
        parts = [p.to_local() if hasattr(p, "to_local") else p for p in trainer_state(trainer)]
        numbers = {"rows": rows, "held": sum(part.numel() for part in parts)}
        (self.folder / f"{name}-{rank}.json").write_text(json.dumps(numbers))

    def work(self) -> None:
        try:
            self.everything()
        except BaseException:
            self.meet.abort()
            raise

    def everything(self) -> None:
        # As people train: float32, bfloat16 autocast, crops of positions drawn at random.
        mixed = {"optimiser": {"precision": "bf16"}}
        both = [Run("mixed-ddp", {}, 2, changes=mixed), Run("mixed-fsdp2", FSDP2, 2, changes=mixed)]
        self.at_once(both)
        # In float64 what is left is the order of sums; in float32 Adam would blow up the rounding
        # of gradients that are nearly zero to steps of the learning rate.
        torch.set_default_dtype(torch.float64)
        # In eval mode nothing is drawn at random: an image is the same on any rank.
        Student.train = lambda student, mode=True: nn.Module.train(student, False)
        lamb = {"optimiser": {"name": "lamb"}}
        half = {"log": {"checkpoint_every": HALF}}
        memory = {"student": {"checkpoint_blocks": True}} | half
        for runs in (
            [Run("hybrid", HYBRID, 4, changes=half)],
            [Run("ddp", {}, 2, changes=half), Run("one", {}), Run("lamb-one", {}, changes=lamb)],
            [Run("fsdp2", FSDP2, 2, changes=memory), Run("lamb-fsdp2", FSDP2, 2, changes=lamb)],
            [
                Run("hybrid-ddp", {}, 2, "hybrid-half"),
                Run("fsdp2-again", FSDP2, 2, "fsdp2-half", memory),
            ],
            [Run("ddp-fsdp2", FSDP2, 2, "ddp-half"), Run("fsdp2-one", {}, 1, "fsdp2-half")],
        ):
            self.at_once(runs)

    def at_once(self, runs: list[Run]) -> None:
        """Runs side by side, on other ranks each."""
        first = 0
        for run in runs:
            if first <= self.rank < first + run.world:
                self.train(run, self.rank - first)
            first += run.world
        self.meet.wait(2 * RANK_SECONDS)


def trainer_state(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, the optimiser's averages of them, and the average student."""
    found = list(trainer.distiller.parameters()) + list(trainer.ema.module.parameters())
    for values in trainer.optimiser.state.values():
        found += [value for value in values.values() if value.dim() > 0]
    return found


def main(folder: Path, photos: str) -> None:
    torch.set_num_threads(1)
    # Forked with what they need, since imports and teachers take seconds.
    teachers = load_teachers(config_from_dict(settings(photos), "test"), CPU)
    loop.load_teachers = lambda *_: teachers
    fork = multiprocessing.get_context("fork")
    meet = fork.Barrier(RANKS)
    ranks = [fork.Process(target=Rank(r, folder, photos, meet).work) for r in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


# Tests.


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", __file__, str(folder), str(photos)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def state(folder: Path, run: str) -> dict[str, Any]:
    """A checkpoint, but for the settings and the number of images, of which a rank counts its."""
    found = torch.load(folder / f"{run}-0" / "checkpoint.pt", weights_only=True)
    return {key: value for key, value in found.items() if key not in ("config", "images")}


def numbers(folder: Path, run: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{run}-{rank}.json").read_text())


def held_out(folder: Path, run: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / f"{run}-0" / "metrics.jsonl").read_text().splitlines())
    found = [row for row in rows if row["kind"] == "held_out"]
    return [{k: v for k, v in row.items() if k != "time"} for row in found]


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Nested states agree to the rounding of float64 in a few steps (up to 1e-13 was seen)."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{where}.{index}")
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale + 1e-14, msg=where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12), where
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("run", "reference"),
    [
        ("ddp", "one"),
        ("fsdp2", "one"),
        ("hybrid", "one"),
        ("hybrid-ddp", "one"),
        ("ddp-fsdp2", "one"),
        ("fsdp2-one", "one"),
        ("lamb-fsdp2", "lamb-one"),
    ],
)
def test_a_run_ends_as_in_one_process(folder: Path, run: str, reference: str) -> None:
    """Checkpoint, exported students, losses and held-out figures; also of resumed runs."""
    assert_close(state(folder, run), state(folder, reference))
    for name in ("student", "student-average"):
        ours, theirs = (load_student(folder / f"{r}-0" / name) for r in (run, reference))
        assert_close(ours.state_dict(), theirs.state_dict())
    whole = numbers(folder, reference)["rows"]
    resumed = "-" in run and "lamb" not in run
    rows = whole[HALF:] if resumed else whole
    assert len(whole) == STEPS
    assert_close(numbers(folder, run)["rows"], rows)
    figures = held_out(folder, reference)
    assert {row["step"] for row in figures} == {0, STEPS}
    assert_close(held_out(folder, run), [r for r in figures if r["step"] >= HALF or not resumed])


def test_the_run_has_all_that_must_work_on_shards(folder: Path) -> None:
    found = state(folder, "one")
    assert found["distiller"]["bases.lite0._extra_state"] == {"ready": True, "settled": True}
    assert found["distiller"]["dispersion_lite0"] < 1
    assert found["distiller"]["balancer.log_variance"].abs().min() > 0
    rows = numbers(folder, "one")["rows"]
    assert all(row["norm"] > 0.5 for row in rows)  # clipped
    assert rows[-1]["mesa"] > 0
    # Frozen in the first step; the rotated head starts afresh in the second.
    steps = [int(values["step"]) for values in found["optimiser"]["state"].values()]
    assert set(steps) == {STEPS - 1, STEPS}
    lamb = state(folder, "lamb-one")["distiller"]
    weight = "student.blocks.0.attn.qkv.weight"
    assert not torch.equal(lamb[weight], found["distiller"][weight])


def test_a_run_that_goes_on_alike_is_the_same_bit_for_bit(
    folder: Path, differences: Callable[..., list[str]]
) -> None:
    assert differences(state(folder, "fsdp2-again"), state(folder, "fsdp2")) == []


def test_bfloat16_trains_alike(folder: Path) -> None:
    """Blocks on shards are gathered in bfloat16, which autocast would round their weights to."""
    shards, replicas = (numbers(folder, f"mixed-{run}")["rows"] for run in ("fsdp2", "ddp"))
    for ours, theirs in zip(shards, replicas, strict=True):
        # Norms and LayerScales are rounded to 8 bits, which the losses average out.
        assert ours == pytest.approx(theirs, rel=2.0**-8)
    assert shards != replicas
    exact = state(folder, "mixed-fsdp2")["distiller"]["student.blocks.0.norm1.weight"]
    assert exact.dtype == torch.float32
    assert not torch.equal(exact, exact.bfloat16().float())  # rounded where used, not where kept


@pytest.mark.parametrize(("run", "ranks"), [("ddp", 2), ("fsdp2", 2), ("hybrid", 4)])
def test_a_rank_holds_its_part_of_everything(folder: Path, run: str, ranks: int) -> None:
    """Weights, averages of the optimiser and average student; only rank 0 writes."""
    alone = numbers(folder, "one")["held"]
    share = {"ddp": 1.0, "fsdp2": 0.5, "hybrid": 0.5}[run]
    for rank in range(ranks):
        # Short parameters are not cut evenly.
        assert numbers(folder, run, rank)["held"] == pytest.approx(share * alone, rel=0.01)
        assert rank == 0 or not list((folder / f"{run}-{rank}").iterdir())


@pytest.mark.parametrize(
    ("distributed", "world", "message"),
    [
        (FSDP2, 1, "distributed.strategy is 'fsdp2': one process has no others"),
        ({"reduce": "bfloat16"}, 1, "distributed.reduce is 'bfloat16': one process has no"),
        ({**FSDP2, "shard": 3}, 8, "distributed.shard is 3: it must divide the 8 ranks; 2, 4, 8"),
        ({**FSDP2, "shard": 16}, 8, "distributed.shard is 16"),
        ({**FSDP2, "shard": 1}, 8, "distributed.shard is 1: a whole copy on every rank is"),
        ({**FSDP2, "shard": -2}, 8, "distributed.shard is -2: it must be at least 0"),
        ({"shard": 8}, 8, "distributed.shard is 8: with strategy ddp nothing is sharded"),
    ],
)
def test_what_cannot_be_is_refused(distributed: dict, world: int, message: str) -> None:
    values = settings("photos") | {"distributed": distributed}
    with pytest.raises(UserError, match=message):
        check_ranks(config_from_dict(values, "test").distributed, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
