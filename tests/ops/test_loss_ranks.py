"""Two real processes with unequal images against one with all of them: losses and gradients.

This file is also the program of each rank: ``python test_loss_ranks.py RANK FOLDER``. It follows
the recipe of ``LossTerm.denominator``: image weights are summed over ranks before the loss, and
DDP averages gradients, so each rank divides by its share, the sum over the world size.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastagglo.ops import Affine, LossTerm, multi_teacher_loss, term_image_weights

KINDS = ("mse", "cosine", "smooth_l1", "cosine_smooth_l1", "angular")
GRIDS = (((4, 4), (4, 4)), ((3, 3), (5, 4)), ((5, 5), (2, 3)), ((4, 3), (6, 6)), None)
COUNTS = (3, 5)  # images of each rank


def share(rank: int) -> list[tuple[Tensor, Tensor, LossTerm, Tensor]]:
    """One rank's inputs of its heads, targets, terms and masks."""
    g = torch.Generator().manual_seed(10 + rank)
    images, cases = COUNTS[rank], []
    for index, (kind, grids) in enumerate(zip(KINDS, GRIDS, strict=True)):
        ours, theirs = grids or ((), ())
        x = torch.randn(images, *ours, 6, generator=g, dtype=torch.float64)
        t = torch.randn(images, *theirs, 7 + index, generator=g, dtype=torch.float64)
        t = t * (1 + rank)
        affine = Affine(torch.full((7 + index,), 0.5), torch.tensor(2.0))
        shift = torch.randn(images, 2, generator=g) / 2 if index == 1 else None
        valid = torch.rand(images, *theirs, generator=g) < 0.7
        valid[0] = False
        if index == 2 and rank == 0:
            valid[:] = False  # a term of which this rank has nothing
        t[~valid] = torch.nan
        cases.append((x, t, LossTerm(kind, 0.5 + index, affine, shift=shift), valid))
    return cases


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(6, 7 + i) for i in range(len(KINDS))).double()

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [head(x) for head, x in zip(self.heads, inputs, strict=True)]


def step(model: nn.Module, cases: list, *, world: int) -> dict[str, Tensor]:
    inputs, targets, terms, masks = (list(column) for column in zip(*cases, strict=True))
    predictions = model(inputs)
    sums = torch.stack(
        [
            term_image_weights(x.shape, t.shape, term, mask).sum()
            for x, t, term, mask in zip(predictions, targets, terms, masks, strict=True)
        ]
    )
    if world > 1:
        dist.all_reduce(sums)
    terms = [
        dataclasses.replace(term, denominator=total / world)
        for term, total in zip(terms, sums, strict=True)
    ]
    loss = multi_teacher_loss(predictions, targets, terms, masks)
    loss.total.backward()
    return {"total": loss.total.detach(), "per_term": loss.per_term.detach(), "sums": sums}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Heads()
    found = step(DistributedDataParallel(model), share(rank), world=2)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save(found | gradients, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    cases = []
    for (x, t, term, valid), other in zip(share(0), share(1), strict=True):
        if term.shift is not None:
            term = dataclasses.replace(term, shift=torch.cat([term.shift, other[2].shift]))
        joined = (torch.cat([x, other[0]]), torch.cat([t, other[1]]))
        cases.append((*joined, term, torch.cat([valid, other[3]])))
    model = Heads()
    found = step(model, cases, world=1)
    return found | {name: p.grad for name, p in model.named_parameters()}


def test_two_ranks_are_one_process_on_the_joined_batch(
    ranks: list[dict[str, Tensor]], one: dict[str, Tensor]
) -> None:
    # Denominators are fp32: 16 additions in another order.
    for name in ("total", "per_term"):
        torch.testing.assert_close(
            sum(rank[name] for rank in ranks) / 2, one[name], rtol=1e-6, atol=0
        )
    gradients = [name for name in one if name.startswith("heads.")]
    assert len(gradients) == 2 * len(KINDS)
    for name in gradients:
        assert torch.equal(ranks[0][name], ranks[1][name])
        largest = one[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(ranks[0][name], one[name], rtol=1e-6, atol=1e-7 * largest)
    assert ranks[0]["per_term"][2] == 0
    assert ranks[1]["per_term"][2] > 0


def test_local_means_would_give_something_else(one: dict[str, Tensor]) -> None:
    """So that the test above can fail."""
    local = []
    for rank in range(2):
        inputs, targets, terms, masks = (list(c) for c in zip(*share(rank), strict=True))
        with torch.no_grad():
            local.append(multi_teacher_loss(Heads()(inputs), targets, terms, masks).per_term)
    error = ((local[0] + local[1]) / 2 - one["per_term"]).abs() / one["per_term"]
    assert error.min() > 1e-3
    assert error.max() > 0.1


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
