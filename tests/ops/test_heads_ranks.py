"""Heads under DDP and FSDP, in real processes: zero gradients for what one rank leaves out.

This file is also the program of each rank: ``python test_heads_ranks.py SCENARIO RANK FOLDER``.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastagglo.ops import AdaptorHeads, HeadSpec

RANKS = {"ddp": 2, "fsdp": 1, "fsdp_steps": 2}

SPECS = {
    "a": HeadSpec(summary=4, spatial=3, hidden=8, blocks=1),
    "b": HeadSpec(spatial=5, hidden=7),
    "c": HeadSpec(summary=2, spatial=2, pre_norm=True),
}


def heads() -> AdaptorHeads:
    torch.manual_seed(0)
    return AdaptorHeads(6, SPECS).double()


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 + rank)
    shapes = ((2, 3, 6), (5, 6))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=g) for shape in shapes)


def total(out: dict) -> Tensor:
    return sum(x.square().sum() for pair in out.values() for x in pair if x is not None)


def gradients(model: AdaptorHeads) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def ddp(rank: int, folder: Path) -> None:
    """Rank 1 leaves b and c out; then both, and all summaries."""
    model = DistributedDataParallel(heads())
    for step, only in enumerate((None if rank == 0 else ["a"], ["a"])):
        model.zero_grad()
        summary, spatial = tokens(rank)
        total(model(summary if step == 0 else None, spatial, only=only)).backward()
        torch.save(gradients(model.module), folder / f"{step}-{rank}.pt")


def fsdp(rank: int, folder: Path) -> None:
    """All heads as one group, and each head by itself, against plain modules."""
    from torch.distributed.fsdp import fully_shard

    for each in (False, True):
        model, plain = heads(), heads()
        if each:
            for head in (*model.summary.values(), *model.spatial.values()):
                fully_shard(head)
        fully_shard(model)
        summary, spatial = tokens(rank)
        losses = [total(m(summary, spatial)) for m in (model, plain)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses), each
        for (name, one), (_, other) in zip(
            model.named_parameters(), plain.named_parameters(), strict=True
        ):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad, msg=f"{each} {name}")
    model = heads()
    fully_shard(model)
    total(model(None, spatial, only=["b"])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        zero = not parameter.grad.full_tensor().any()
        assert zero == (not name.startswith("spatial.b")), name
    (folder / "done").touch()


def optimiser(model: AdaptorHeads) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2, weight_decay=0.1)


# What each rank computes in each step, where all heads are one group, and where each is sharded by
# itself: then a head's own pass gathers its weights, which both ranks must take part in.
ONLY = {
    False: ((None, None), (None, ["a"]), (["c"], ["a", "b"])),
    True: ((None, None), (None, None)),
}


def fsdp_steps(rank: int, folder: Path) -> None:
    """A few steps of training."""
    from torch.distributed.fsdp import fully_shard

    for each in (False, True):
        model = heads()
        if each:
            for head in (*model.summary.values(), *model.spatial.values()):
                fully_shard(head)
        fully_shard(model)
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if len(p) > 1)
        optimizer = optimiser(model)
        for only in ONLY[each]:
            optimizer.zero_grad()
            total(model(*tokens(rank), only=only[rank])).backward()
            optimizer.step()
        state = {name: p.full_tensor() for name, p in model.named_parameters()}
        state |= {f"grad {name}": p.grad.full_tensor() for name, p in model.named_parameters()}
        torch.save(state, folder / f"{each}-{rank}.pt")


def main(scenario: str, rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS[scenario],
        timeout=timedelta(seconds=60),
    )
    {"ddp": ddp, "fsdp": fsdp, "fsdp_steps": fsdp_steps}[scenario](rank, folder)
    dist.destroy_process_group()


def launch(scenario: str, folder: Path) -> None:
    ranks = RANKS[scenario]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, scenario, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)


def test_a_rank_that_leaves_heads_out(tmp_path: Path) -> None:
    launch("ddp", tmp_path)
    model = heads()
    summary, spatial = tokens(0)
    (total(model(summary, spatial)) / 2).backward()
    summary, spatial = tokens(1)
    (total(model(summary, spatial, only=["a"])) / 2).backward()
    expected = gradients(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"0-{rank}.pt")
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)
    for name, gradient in torch.load(tmp_path / "1-0.pt").items():
        assert gradient is not None, name
        assert bool(gradient.any()) == name.startswith("spatial.a."), name


def test_sharded(tmp_path: Path) -> None:
    launch("fsdp", tmp_path)
    assert (tmp_path / "done").exists()


def test_sharded_over_two_ranks_trains_as_one_process(tmp_path: Path) -> None:
    launch("fsdp_steps", tmp_path)
    start = dict(heads().named_parameters())
    for each, steps in ONLY.items():
        model = heads()
        optimizer = optimiser(model)
        for only in steps:
            # What a rank leaves out has zero gradients: the mean is over both ranks.
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            for rank in (0, 1):
                (total(model(*tokens(rank), only=only[rank])) / 2).backward()
            optimizer.step()
        states = [torch.load(tmp_path / f"{each}-{rank}.pt") for rank in (0, 1)]
        for name, parameter in model.named_parameters():
            for state in states:
                message = f"{each} {name}"
                torch.testing.assert_close(state[name], parameter.detach(), msg=message)
                torch.testing.assert_close(state[f"grad {name}"], parameter.grad, msg=message)
            assert (parameter != start[name]).any(), name


@pytest.mark.parametrize("only", [["a"], ["b", "c"]])
def test_alone_a_dropped_teacher_has_no_gradient(only: list[str]) -> None:
    model = heads()
    total(model(*tokens(0), only=only)).backward()
    for name, gradient in gradients(model).items():
        assert (gradient is not None) == (name.split(".")[1] in only)


def test_compiles_without_breaks() -> None:
    model = heads()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for only in (None, ["a", "b"]):
        expected, found = (m(*tokens(0), only=only) for m in (model, compiled))
        torch.testing.assert_close(total(found), total(expected))
        model.zero_grad()
        total(expected).backward()
        right = gradients(model)
        model.zero_grad()
        total(found).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, right[name])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
