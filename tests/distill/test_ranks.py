"""Statistics over ranks, in two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fastagglo.distill import Dispersion, PhiS

RANK = """
import sys
import torch
import torch.distributed as dist
from fastagglo.distill import Dispersion, PhiS, make_balancer

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
y = torch.load(f"{folder}/features.pt")

phi = PhiS(8)
phi.update([y[:150], y[150:]][rank])
phi.all_reduce()
if rank == 0:
    phi.finish()
phi.broadcast()
torch.save(phi.state_dict(), f"{folder}/{rank}.pt")

together = PhiS(8)
together.update([y[:150], y[150:]][rank])
together.all_reduce()
if rank == 1:  # decomposes nothing itself

    def refused(matrix):
        raise AssertionError("eigh on a rank that was to be told")

    torch.linalg.eigh, eigh = refused, torch.linalg.eigh
assert together.finish(src=0) is together
if rank == 1:
    torch.linalg.eigh = eigh
torch.save(together.state_dict(), f"{folder}/together{rank}.pt")

constant = PhiS(8)  # refused on both ranks, so neither waits for the other
constant.update(torch.ones(3 + rank, 8))
constant.all_reduce()
try:
    constant.finish(src=0)
except ValueError as error:
    assert "all 7 rows of features are equal" in str(error)
else:
    raise AssertionError("constant features were accepted")

dispersion = Dispersion(8)
dispersion.update([y[:150], y[150:]][rank])
torch.save(dispersion.merged().state_dict(), f"{folder}/dispersion{rank}.pt")
assert float(dispersion.count) == [150, 250][rank]

lonely = PhiS(8)  # only the second rank has seen anything
if rank == 1:
    lonely.update(y)
lonely.all_reduce()
torch.save(lonely.state_dict(), f"{folder}/lonely{rank}.pt")

nothing = PhiS(8)
nothing.all_reduce()
assert int(nothing.count) == 0

balancer = make_balancer("adaloss", ["a", "b", "c"])
losses = [{"a": 1.0, "b": 6.0}, {"a": 3.0, "c": 5.0}][rank]  # each rank with its own teachers
balancer({name: torch.tensor(x) for name, x in losses.items()})
torch.testing.assert_close(balancer.running.mean(), torch.tensor([2.0, 6.0, 5.0]))
dist.destroy_process_group()
"""


def test_two_ranks_end_with_the_statistics_of_all_rows(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(400, 8, generator=g).double() @ torch.randn(8, 8, generator=g).double() + 1e3
    torch.save(y, tmp_path / "features.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected = PhiS.fit(y)
    scale = expected.running_moment.max().item()
    for name in ("", "together", "lonely"):
        first, second = (
            torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2)
        )
        for key, value in first.items():
            assert torch.equal(value, second[key]), key
        phi = PhiS(8)
        phi.load_state_dict(second)
        assert phi.finished is (name != "lonely")
        phi.finish()
        assert int(phi.count) == 400
        torch.testing.assert_close(phi.running_mean, expected.running_mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            phi.running_moment, expected.running_moment, rtol=0, atol=1e-13 * scale
        )
        torch.testing.assert_close(phi.final_rotation, expected.final_rotation, rtol=0, atol=1e-9)
    whole = Dispersion(8)
    whole.update(y)
    for rank in range(2):
        found = torch.load(tmp_path / f"dispersion{rank}.pt", weights_only=True)
        assert float(found["count"]) == 400
        torch.testing.assert_close(found["direction"], whole.direction, rtol=1e-12, atol=0)
