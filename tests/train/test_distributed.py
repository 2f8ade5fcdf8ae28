"""Training on two real processes: gradients, statistics, whole runs, a stop, bad steps.

This file is also the program of each rank: ``python test_distributed.py SCENARIO RANK FOLDER``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fastagglo.distill import Distiller, Matching
from fastagglo.features import Features
from fastagglo.model import HeadSpec, PackedBatch, StudentOutput, create_student
from fastagglo.ops import LossTerm, term_image_weights

ROOT = Path(__file__).parents[2]
RANK_SECONDS = 60  # a rank that waits longer for the other fails instead of hanging
SIZES = (32, 64)
# Images of each size on each rank: unequal, so that means of means would be wrong.
COUNTS = ((3, 1), (2, 4))
TAIL = ((3, 0), (1, 2))  # one rank has none of a size

WIDTH = 192  # of the tiny student


class Data(NamedTuple):
    """What the distiller is called with, and by name the average student's side."""

    batch: PackedBatch
    targets: list[dict[str, Features]]
    shifts: list[dict[str, torch.Tensor]]
    average: dict[str, Any]


# One step of the distiller, on one rank's images or on all of them.


def make_distiller() -> Distiller:
    torch.manual_seed(1)
    heads = {"a": HeadSpec(summary=6, spatial=12), "b": HeadSpec(summary=None, spatial=8)}
    student = create_student("tiny", heads=heads, depth=2, max_resolution=64, registers=1)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    matching = {
        "a": Matching(6, 12, summary_loss="angular"),
        "b": Matching(None, 8, spatial_loss="smooth_l1"),
    }
    # In eval mode nothing is drawn at random.
    distiller = Distiller(student.double(), matching, balance="uncertainty", mesa_weight=0.3)
    distiller.balancer.double()  # parameters that are sharded together have one dtype
    return distiller.eval()


def data(ranks: tuple[int, ...], counts: tuple[tuple[int, int], ...] = COUNTS) -> Data:
    """The images, teacher features and shifts of these ranks, joined."""
    images: list[list[torch.Tensor]] = [[], []]
    features: list[dict[str, list[torch.Tensor]]] = [
        {"summary": [], "a": [], "b": [], "shift": [], "average": [], "average_shift": []}
        for _ in SIZES
    ]
    for rank in ranks:
        g = torch.Generator().manual_seed(10 + rank)

        def draw(*shape: int, g: torch.Generator = g) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        for index, (n, size) in enumerate(zip(counts[rank], SIZES, strict=True)):
            if n == 0:
                continue
            cells = size // 16
            images[index].append(torch.rand(n, 3, size, size, generator=g, dtype=torch.float64))
            group = features[index]
            group["summary"].append(draw(n, 6) + 1)
            scales = torch.arange(1.0, 13.0, dtype=torch.float64)
            group["a"].append(40 * (draw(n, cells, cells, 12) * scales + 3 + rank))
            # A grid of its own, half as fine.
            group["b"].append(0.01 * draw(n, cells // 2, cells // 2, 8) * scales[:8])
            group["shift"].append(draw(n, 2))
            group["average"].append(draw(n, cells, cells, WIDTH))
            group["average_shift"].append(draw(n, 2))
    joined = [
        {name: torch.cat(parts) for name, parts in group.items()}
        for group in features
        if group["a"]
    ]
    targets = [
        {"a": Features(group["summary"], group["a"]), "b": Features(None, group["b"])}
        for group in joined
    ]
    batch = PackedBatch.from_images([torch.cat(group) for group in images if group])
    features = Features(None, [group["average"] for group in joined])
    average = {
        "average": StudentOutput({}, features),
        "average_shifts": [group["average_shift"] for group in joined],
    }
    return Data(batch, targets, [{"a": group["shift"]} for group in joined], average)


def step(
    ranks: tuple[int, ...],
    wrap: Callable[[Distiller], torch.nn.Module],
    counts: tuple[tuple[int, int], ...] = COUNTS,
) -> dict[str, Any]:
    distiller = make_distiller()
    batch, targets, shifts, average = data(ranks, counts)
    distiller.observe(targets)
    distiller.refresh(settle=True)
    dispersion = distiller.dispersion_a.clone()
    module = wrap(distiller)
    output = module(batch, targets, shifts, **average)
    output.total.backward()
    return {
        "total": output.total.detach(),
        "mesa": output.teachers["mesa"],
        "gradients": {name: p.grad for name, p in distiller.named_parameters()},
        "bases": distiller.bases.state_dict(),
        "dispersion": dispersion,
    }


def gathered(rank: int) -> dict[str, Any]:
    """What is put into use after two checkpoints in the midst of the fit."""
    distiller = make_distiller()
    targets = data((rank,)).targets
    distiller.observe(targets[:0])  # a batch that was not finite somewhere
    distiller.observe(targets)
    distiller.gather_statistics()
    distiller.gather_statistics()
    counts = [int(phi.count) for phi in distiller.fitting.values()]
    distiller.refresh(settle=True)
    in_use = {"bases": distiller.bases.state_dict(), "dispersion": distiller.dispersion_a}
    return in_use | {"counts": counts}


class Sent(TorchDispatchMode):
    """Elements of weights and of gradients that FSDP2 sends, in rings of two."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if "c10d._allgather_base_" in str(func):
            self.gathered += args[0].numel() // 2
        elif "c10d._reduce_scatter_base_" in str(func):
            self.reduced += args[0].numel()
        return func(*args, **(kwargs or {}))


def rank_of_distiller(rank: int, folder: Path) -> None:
    from fastagglo.ops.sharded import whole
    from fastagglo.train.config import DistributedSettings
    from fastagglo.train.parallel import Parallel

    def on_ranks(strategy: str, counts: tuple = COUNTS, reduce: str = "float32") -> dict[str, Any]:
        settings = DistributedSettings(strategy=strategy, reduce=reduce)
        parallel = Parallel(settings, torch.device("cpu"))

        def wrap(distiller: Distiller) -> torch.nn.Module:
            parallel.shard(distiller, distiller.student)
            return parallel.wrap(distiller)

        found = step((rank,), wrap, counts)
        gradients = {name: whole(g) for name, g in found["gradients"].items()}
        return found | {"gradients": gradients}

    def accumulated(strategy: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gradients after the first of two equal micro-steps, and after both."""
        parallel = Parallel(DistributedSettings(strategy=strategy), torch.device("cpu"))
        distiller = make_distiller()
        batch, targets, shifts, average = data((rank,))
        distiller.observe(targets)
        distiller.refresh(settle=True)
        parallel.shard(distiller, distiller.student)
        module = parallel.wrap(distiller)
        found = []
        for last in (False, True):
            with parallel.micro_step(module, last=last):
                module(batch, targets, shifts, **average).total.backward()
            given = {n: p.grad for n, p in distiller.named_parameters() if p.grad is not None}
            found.append({name: whole(grad).clone() for name, grad in given.items()})
        return found[0], found[1]

    found = on_ranks("ddp") | {"gathered": gathered(rank)}
    found["alone"] = step((rank,), lambda distiller: distiller)  # not averaged
    for strategy in ("ddp", "fsdp2"):
        found[strategy] = on_ranks(strategy)
        found[strategy, "tail"] = on_ranks(strategy, TAIL)
        found[strategy, "bfloat16"] = on_ranks(strategy, reduce="bfloat16")
        found[strategy, "accumulated"] = accumulated(strategy)
    with Sent() as sent:
        on_ranks("fsdp2")
    found["sent"] = sent.gathered, sent.reduced
    torch.save(found, folder / f"{rank}.pt")


# Whole runs of the trainer.


def settings(photos: Path) -> dict[str, Any]:
    """Six steps with the trunk frozen for two and statistics fitted over four."""
    stage = {"steps": 6, "lr": 1e-3, "warmup_steps": 1, "phi_s_steps": 4, "freeze_trunk_steps": 2}
    groups = [{"images": 4, "sizes": [32]}, {"images": 2, "sizes": [48, 64]}]
    return {
        "seed": 3,
        "threads": 1,
        "device": "cpu",
        "student": {"preset": "tiny", "depth": 2, "registers": 2, "max_resolution": 64},
        "teachers": {
            "hog": {"model": "hog", "summary_weight": 0.0},
            "lite0": {
                "model": "efficientnet-lite0",
                "sizes": [64],
            },
        },
        "data": {"images": [str(photos)], "holdout_photos": 0.2},
        "stages": [stage | {"groups": groups}],
        "optimiser": {"accumulate": 1},
        "distill": {"balance": "adaloss", "shift_std": 0.5, "ema_decay": 0.9, "mesa_weight": 0.1},
        "eval": {"points": 2, "photos": 2, "pictures": 0},
        "log": {"interval": 1, "progress": False, "tensorboard": False, "checkpoint_every": 4},
    }


def rank_of_trainer(rank: int, folder: Path) -> None:
    from fastagglo.train import Trainer, loop
    from fastagglo.train.recipe import config_from_dict

    config = config_from_dict(json.loads((folder / "settings.json").read_text()), "test")

    def trainer(resume: Path | None = None) -> Trainer:
        return Trainer(config, torch.device("cpu"), resume)

    def place(name: str) -> Path:
        path = folder / f"{name}{rank}"  # a rank that must not write gets a folder to betray itself
        path.mkdir()
        return path

    def keep(name: str, done: Trainer) -> None:
        state = done._state()
        # Each rank fits its own statistics; what is put into use is common.
        own = ("fitting.", "dispersions.")
        state["distiller"] = {
            name: value for name, value in state["distiller"].items() if not name.startswith(own)
        }
        torch.save(state, folder / f"{name}{rank}.pt")

    whole = trainer()
    keep("fresh", whole)
    assert whole.run(place("whole"))
    keep("whole", whole)

    # One rank alone is told to stop, in the midst of the fit and while the trunk is frozen.
    stopped, here = trainer(), place("stopped")
    one_step = stopped._one_step

    def then_stop(batches: object) -> None:
        one_step(batches)
        if stopped.step == 0 and rank == 1:
            stopped.stop_requested = True  # which the other one hears at the end of the next step

    stopped._one_step = then_stop
    assert not stopped.run(here)
    keep("early", stopped)
    dist.barrier()
    resumed = trainer(resume=folder / "stopped0")
    assert resumed.run(here)
    keep("stopped", resumed)

    # The second rank has a loss that is not finite in the last step before the thaw, and a
    # teacher that is not in the step that settles the statistics.
    bad, bad_loss, bad_features = trainer(), 1, 3
    forward, features = bad._forward, loop.teacher_features

    def spoilt_forward(*arguments: object) -> object:
        output = forward(*arguments)
        if rank == 1 and bad.step == bad_loss:
            output.total.data.fill_(torch.nan)
        return output

    def spoilt_features(*arguments: object) -> object:
        found = features(*arguments)
        if rank == 1 and bad.step == bad_features:
            found[0]["hog"].spatial[0, 0, 0, 0] = torch.inf
        return found

    bad._forward, loop.teacher_features = spoilt_forward, spoilt_features
    assert bad.run(place("bad"))
    keep("bad", bad)


SCENARIOS = {"distiller": rank_of_distiller, "trainer": rank_of_trainer}


def main(scenario: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{scenario}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=RANK_SECONDS),
    )
    SCENARIOS[scenario](rank, folder)
    dist.destroy_process_group()


def run_ranks(scenario: str, folder: Path) -> None:
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error::FutureWarning",
                __file__,
                scenario,
                str(rank),
                str(folder),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n\n".join(errors)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("distiller", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def joined() -> dict[str, Any]:
    return step((0, 1), lambda distiller: distiller)


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "settings.json").write_text(json.dumps(settings(photos)))
    run_ranks("trainer", folder)
    return folder


class TestStep:
    """One step on two ranks is the step of one process on all their images."""

    def test_the_case_tells_global_from_local_means(self) -> None:
        # Were the ranks' sums of image weights alike, local denominators would do.
        term = LossTerm("mse")
        sums = [
            sum(
                term_image_weights((n, s // 16, s // 16, 12), (n, s // 16, s // 16, 12), term).sum()
                for n, s in zip(counts, SIZES, strict=True)
            )
            for counts in COUNTS
        ]
        assert abs(sums[0] / sums[1] - 1) > 0.3

    def test_statistics_are_those_of_all_images(
        self, both: list[dict[str, Any]], joined: dict[str, Any]
    ) -> None:
        for name, expected in joined["bases"].items():
            first, second = (rank["bases"][name] for rank in both)
            if isinstance(expected, torch.Tensor):
                assert torch.equal(first, second), name
                # Kept in float32.
                torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5, msg=name)
            else:
                assert first == second == expected
        assert all(joined["bases"][f"{n}._extra_state"]["settled"] for n in ("a", "b"))
        assert torch.equal(both[0]["dispersion"], both[1]["dispersion"])
        # Sums of the ranks in float64, kept in float32.
        torch.testing.assert_close(both[0]["dispersion"], joined["dispersion"], rtol=1e-6, atol=0)
        assert 0.1 < float(joined["dispersion"]) < 2

    def test_a_checkpoint_of_the_first_rank_holds_the_statistics_of_all(
        self, both: list[dict[str, Any]]
    ) -> None:
        images = [sum(counts) for counts in zip(*COUNTS, strict=True)]
        rows = [
            sum(n * (size // cell) ** 2 for n, size in zip(images, SIZES, strict=True))
            for cell in (16, 32)
        ]
        assert both[0]["gathered"]["counts"] == rows
        assert both[1]["gathered"]["counts"] == [0, 0]
        for rank in both:
            torch.testing.assert_close(rank["gathered"]["dispersion"], rank["dispersion"])
            for name, expected in rank["bases"].items():
                if isinstance(expected, torch.Tensor):
                    found = rank["gathered"]["bases"][name]
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)

    @pytest.mark.parametrize("counts", [COUNTS, TAIL], ids=["uneven", "tail"])
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_averaged_gradients_are_those_of_all_images(
        self, both: list[dict[str, Any]], joined: dict[str, Any], strategy: str, counts: tuple
    ) -> None:
        if counts == TAIL:
            joined = step((0, 1), lambda distiller: distiller, TAIL)
        ranks = [rank[(strategy, "tail") if counts == TAIL else strategy] for rank in both]
        assert joined["gradients"].keys() == ranks[0]["gradients"].keys()
        for name, expected in joined["gradients"].items():
            first, second = (rank["gradients"][name] for rank in ranks)
            assert torch.equal(first, second), name
            largest = float(expected.abs().max())
            assert largest > 0, name
            # Denominators and normalisers are float32.
            torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5 * largest, msg=name)
        for loss in ("total", "mesa"):
            mean = (ranks[0][loss] + ranks[1][loss]) / 2
            torch.testing.assert_close(mean, joined[loss], rtol=1e-5, atol=0)
        assert joined["mesa"] > 0.1

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_gradients_travel_with_the_last_micro_step(
        self, both: list[dict[str, Any]], strategy: str
    ) -> None:
        for rank in both:
            first, second = rank[strategy, "accumulated"]
            if strategy == "fsdp2":
                assert not first  # still whole, beside the shards
            else:
                alone = rank["alone"]["gradients"]
                assert first.keys() == alone.keys()
                for name, gradient in first.items():
                    torch.testing.assert_close(gradient, alone[name], rtol=1e-12, atol=1e-14)
            for name, gradient in rank[strategy]["gradients"].items():
                torch.testing.assert_close(second[name], 2 * gradient, rtol=1e-12, atol=1e-14)

    def test_a_plan_counts_what_is_sent(self, both: list[dict[str, Any]]) -> None:
        from fastagglo.train.config import DistributedSettings, RunConfig
        from fastagglo.train.sharing import sent_bytes

        config = RunConfig(distributed=DistributedSettings(strategy="fsdp2"))
        expected = sent_bytes(config, make_distiller().student, 2)
        found = [4 * elements for elements in both[0]["sent"]]  # were they float32
        # Each rank pads what does not divide evenly.
        assert found == pytest.approx(expected, rel=0.01)

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_reduction_in_bfloat16(self, both: list[dict[str, Any]], strategy: str) -> None:
        """Each rank's gradient is rounded once, their sum once, and half of it is exact."""
        coarser = 0
        for name, exact in both[0][strategy]["gradients"].items():
            found = both[0][strategy, "bfloat16"]["gradients"][name]
            alone = torch.stack([rank["alone"]["gradients"][name] for rank in both])
            # Half a unit in the last of 8 bits each time; the second one of what the first left.
            unit = 2.0**-8
            budget = unit * (1 + unit) * alone.abs().mean(0) + unit * exact.abs()
            error = (found - exact).abs()
            assert (error <= budget + 1e-30).all(), name
            coarser += int((error > 2.0**-16 * exact.abs()).sum())
        assert coarser > 1000  # it was indeed rounded


class TestRun:
    """Whole runs of the trainer on two ranks."""

    @staticmethod
    def states(folder: Path, name: str) -> list[dict[str, Any]]:
        return [torch.load(folder / f"{name}{rank}.pt") for rank in range(2)]

    @staticmethod
    def events(folder: Path, kind: str) -> list[dict[str, Any]]:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if row["kind"] == kind]

    @pytest.mark.parametrize("name", ["whole", "stopped", "bad"])
    def test_both_ranks_hold_the_same(self, folder: Path, name: str) -> None:
        first, second = self.states(folder, name)
        for part in ("distiller", "ema"):
            assert first[part].keys() == second[part].keys()
            for key, value in first[part].items():
                same = second[part][key]
                assert (
                    torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
                )

    @pytest.mark.parametrize("name", ["whole", "stopped", "bad"])
    def test_only_the_first_rank_writes(self, folder: Path, name: str) -> None:
        written = {path.name for path in (folder / f"{name}0").iterdir()}
        assert {"checkpoint.pt", "config.toml", "metrics.jsonl", "report.html"} <= written
        assert {path.name for path in (folder / f"{name}0" / "student").iterdir()} == {
            "config.json",
            "model.safetensors",
        }
        assert not list((folder / f"{name}1").iterdir())

    def test_the_trunk_learns_once_it_is_thawed(self, folder: Path) -> None:
        done, stopped = self.states(folder, "whole")[0], self.states(folder, "early")[0]
        trunk = "student.blocks.0.attn.qkv.weight"
        assert done["step"] == 6
        assert not torch.equal(done["distiller"][trunk], stopped["distiller"][trunk])
        fresh = self.states(folder, "fresh")[0]
        assert torch.equal(stopped["distiller"][trunk], fresh["distiller"][trunk])

    def test_a_stop_on_one_rank_stops_both_and_the_resumed_run_ends_as_the_whole_one(
        self, folder: Path
    ) -> None:
        assert self.states(folder, "early")[1]["step"] == 2
        whole, resumed = self.states(folder, "whole")[0], self.states(folder, "stopped")[0]
        for part in ("distiller", "ema"):
            for key, value in whole[part].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(resumed[part][key], value), key
                else:
                    assert resumed[part][key] == value

    def test_a_bad_step_on_one_rank_is_skipped_by_both(self, folder: Path) -> None:
        skipped = {
            row["step"]: row["reason"] for row in self.events(folder / "bad0", "skipped_step")
        }
        assert list(skipped) == [1, 3]
        assert "loss" in skipped[1]
        assert "features of" in skipped[3]
        for state in self.states(folder, "bad"):
            assert state["step"] == 6
            assert state["bad_steps"] == 0
            # Two of six steps left no trace in the optimiser.
            counts = {int(s["step"]) for s in state["optimiser"]["state"].values()}
            assert max(counts) == 4
            # The step that was to settle the statistics did so without its own features.
            for name in ("hog", "lite0"):
                basis = state["distiller"][f"bases.{name}._extra_state"]
                assert basis == {"ready": True, "settled": True}
            finite = [v for v in state["distiller"].values() if isinstance(v, torch.Tensor)]
            assert all(value.isfinite().all() for value in finite)


# Rank 1 comes to the run's folder only when rank 0 has begun to write there.
LATE = """
import os, runpy, sys, time
from pathlib import Path
from fastagglo.train import Trainer

make = Trainer.__init__

def late(trainer, config, *arguments):
    make(trainer, config, *arguments)
    deadline = time.monotonic() + {seconds}
    while os.environ["RANK"] == "1" and not (Path(config.out) / "config.toml").exists():
        assert time.monotonic() < deadline, "rank 0 has not begun"
        time.sleep(0.01)

Trainer.__init__ = late
sys.argv = [{train!r}, *sys.argv[1:]]
runpy.run_path({train!r}, run_name="__main__")
"""


def test_train_py_under_torchrun(photos: Path, tmp_path: Path) -> None:
    import tomli_w

    changed = settings(photos)
    changed["stages"][0] |= {"steps": 4, "phi_s_steps": 2, "freeze_trunk_steps": 2}
    changed["distributed"] = {"strategy": "fsdp2", "reduce": "bfloat16"}
    changed["optimiser"]["precision"] = "bf16"
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(changed))
    (tmp_path / "late.py").write_text(
        LATE.format(seconds=RANK_SECONDS, train=str(ROOT / "train.py"))
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launch, "late.py", "--recipe", "tiny.toml", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: see") == 1
    assert done.stdout.count("\n") == 1
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "config.toml", "metrics.jsonl", "report.html", "student"} <= written
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
