"""The bench on the library's own attention: the table's tiles, and sweeps."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from fastagglo.kernels import candidates
from fastagglo.kernels.inspect import main, run_job
from fastagglo.kernels.tiles import Tile


@pytest.mark.parametrize(
    ("kernel", "products", "head_dim"), [("fwd", 2, 72), ("dq", 3, 64), ("dkv", 4, 80)]
)
def test_useful_work_is_that_of_the_head_dim(kernel: str, products: int, head_dim: int) -> None:
    (job,) = candidates.jobs(["sm_90"], [kernel], [head_dim])
    (row,) = run_job(job)
    report = row.report
    assert report is not None
    assert report.kernel == candidates.KERNELS[kernel][0]
    assert report.main is not None
    logits = report.constants["ROWS"] * report.constants["COLUMNS"]
    assert report.main.useful_flops == 2 * products * head_dim * logits
    padded = -(-head_dim // 16) * 16  # what a tensor core multiplies at least
    assert report.main.tensor_flops == 2 * products * padded * logits
    assert report.main.dot_flops == report.main.tensor_flops
    assert report.fits


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", "fp16"), ("tf32", "tf32"), ("fp32", None)])
def test_precision_is_what_was_asked_for(dtype: str, kind: str | None) -> None:
    former = torch.backends.cuda.matmul.fp32_precision
    (job,) = candidates.jobs(["sm_80"], ["fwd"], [64], dtype=dtype, tile_rows=64)
    (row,) = run_job(job)
    assert row.report is not None
    assert row.report.main is not None
    assert row.report.main.operand_type == kind
    assert torch.backends.cuda.matmul.fp32_precision == former


def test_a_bias_costs_instructions() -> None:
    totals = []
    for bias in (False, True):
        (job,) = candidates.jobs(["sm_90"], ["fwd"], [64], bias=bias)
        (row,) = run_job(job)
        assert row.report is not None
        assert row.report.main is not None
        assert row.report.constants["HAS_BIAS"] is bias
        totals.append(row.report.main.counts["total"])
    assert totals[0] < totals[1]


def test_candidates_suit_the_work_list() -> None:
    for kernel, dtype, tile_rows in product(candidates.KERNELS, ("bf16", "fp32"), (64, 128)):
        tiles = candidates.candidates(kernel, dtype, 64, tile_rows)
        assert len(set(tiles)) == len(tiles) >= 4
        assert {tile_rows % tile.rows for tile in tiles} == {0}


def test_a_sweep_ranks_its_candidates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    tiles = [Tile(64, 32, 4, 2), Tile(64, 48, 4, 2), Tile(128, 64, 8, 3)]  # 48 is no power of two
    monkeypatch.setattr(candidates, "candidates", lambda *_: tiles)
    file = tmp_path / "sweep.json"
    command = "attention --sweep --heads 64 --kernel fwd --arch sm_90,sm_80 --jobs 1 --json"
    assert main([*command.split(), str(file)]) == 0  # a candidate may fail
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output if "KiB of" in line] == [
        "sm_90 fwd d64",
        "sm_80 fwd d64",
    ]
    assert max(map(len, output)) <= 120
    rows = json.loads(file.read_text())["rows"]
    assert [row["arch"] for row in rows] == ["sm_90"] * 3 + ["sm_80"] * 3
    for part in (rows[:3], rows[3:]):
        first, second = (row["report"]["loops"][0] for row in part[:2])
        assert first["non_tensor_per_useful_mflop"] <= second["non_tensor_per_useful_mflop"]
        assert part[2]["label"] == "fwd d64 64x48 w4 s2"
        assert part[2]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heads 20", "'20' is not known; choose from 16, 24"),
        ("--kernel forward", "'forward' is not known; choose from fwd, dq, dkv"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--arch h100", "'h100' is not known; choose from sm_80"),
        ("--tile-rows 32", "invalid choice: 32"),
        ("--json no/such/folder.json", "'no/such/folder.json' is not a file in a folder"),
    ],
)
def test_bad_arguments_end_in_one_line(
    capsys: pytest.CaptureFixture, arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["attention", *arguments.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_table_of_the_librarys_tiles(capsys: pytest.CaptureFixture) -> None:
    assert main(["attention", "--heads", "64", "--kernel", "fwd,dq", "--jobs", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " d64 " in line]
    assert [row.split()[0] for row in rows] == ["fwd", "dq"]
    assert all("x" in row.split()[2] for row in rows)
