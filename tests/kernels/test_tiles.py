"""The table of block sizes: complete, and how an entry is found; and the command that writes it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from fastagglo.kernels import tiles, tune
from fastagglo.kernels.chips import CHIPS
from fastagglo.kernels.tiles import Tile, arch_of, head_pieces, tile_for, widest_piece


@pytest.mark.parametrize("head_dim", range(16, 129, 8))
@pytest.mark.parametrize("widest", [32, 64, 128])
def test_pieces_add_up_to_the_next_multiple_of_16(head_dim: int, widest: int) -> None:
    pieces = head_pieces(head_dim, widest)
    assert sum(pieces) == -(-head_dim // 16) * 16
    assert list(pieces) == sorted(pieces, reverse=True)
    assert all(16 <= piece <= widest and piece & (piece - 1) == 0 for piece in pieces)


def test_pieces_by_generation() -> None:
    assert head_pieces(72) == head_pieces(80) == (64, 16)
    assert head_pieces(112) == (64, 32, 16)
    assert head_pieces(128, widest_piece(90, 2)) == (128,)
    assert (
        head_pieces(128, widest_piece(80, 2)) == head_pieces(128, widest_piece(120, 2)) == (64, 64)
    )
    assert head_pieces(128, widest_piece(90, 4)) == (32,) * 4


def _on(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    monkeypatch.setattr(tiles, "arch_of", lambda x: arch)


def _inputs(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(4, 2, head_dim, dtype=dtype, device="meta")


@pytest.mark.parametrize("arch", [*(sm.capability for sm in CHIPS.values()), 87, 103, 121])
def test_every_launch_has_a_tile(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    _on(monkeypatch, arch)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for kernel, dtype, head_dim, tile_rows in product(
        ("fwd", "dq", "dkv"), dtypes, range(16, 129, 8), (64, 128)
    ):
        tile = tile_for(kernel, _inputs(head_dim, dtype), tile_rows)
        assert tile_rows % tile.rows == 0
        assert tile.warps in (4, 8)


def test_where_a_missing_entry_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {80: 16, 90: 32, 100: 64}
    made = {arch: {("fwd", 2, 80, 64): Tile(rows, 16, 4, 2)} for arch, rows in sizes.items()}
    made[80]["fwd", 2, 72, 64] = Tile(8, 16, 4, 2)
    monkeypatch.setattr(tiles, "table", lambda: made)
    tiles._tile.cache_clear()
    found = {}
    for arch in (80, 86, 90, 99, 100, 103, 120):
        _on(monkeypatch, arch)
        found[arch] = tile_for("fwd", _inputs(80, torch.bfloat16), 64).rows
    assert found == {80: 16, 86: 16, 90: 32, 99: 32, 100: 64, 103: 64, 120: 16}
    for arch, rows in ((86, 8), (90, 32)):  # of its own, or of the width it is padded to
        _on(monkeypatch, arch)
        assert tile_for("fwd", _inputs(72, torch.bfloat16), 64).rows == rows
    _on(monkeypatch, 75)
    with pytest.raises(
        ValueError, match=r"capability 8.0 or later, this one has 7.5; use the backend"
    ):
        tile_for("fwd", _inputs(72, torch.bfloat16), 64)
    tiles._tile.cache_clear()


def test_the_generation_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastagglo.kernels.stub import stub_device

    with stub_device("sm_89"):
        assert arch_of(torch.empty(1)) == 89


def test_the_table_says_what_made_it() -> None:
    for part in json.loads(tiles.TABLE.read_text()).values():
        assert part["source"]["method"] in ("measured", "estimated from machine code, not measured")
        assert part["source"]["triton"]
        assert ("device" in part["source"]) == (part["source"]["method"] == "measured")


def test_tune_writes_the_entries_that_it_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The second is no power of two: a candidate may fail.
    sizes = [Tile(64, 32, 4, 2), Tile(64, 48, 4, 2), Tile(128, 64, 8, 2)]
    monkeypatch.setattr(tune, "candidates", lambda *_: sizes)
    out = tmp_path / "tiles.json"
    old = {"80": {"source": {}, "tiles": [["fwd", 2, 64, 64, 64, 64, 4, 2]]}}
    out.write_text(json.dumps(old))
    command = "--arch sm_90 --heads 64 --dtype bf16 --jobs 1 --out"
    assert tune.main([*command.split(), str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["80"] == old["80"]
    chosen = {tuple(entry[:4]): Tile(*entry[4:]) for entry in table["90"]["tiles"]}
    assert set(chosen) == set(product(("fwd", "dq", "dkv"), [2], [64], [64, 128]))
    assert all(chosen[key] == sizes[0] for key in chosen if key[3] == 64)
    assert chosen["fwd", 2, 64, 128] == sizes[2]  # it reads keys and values half as often


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--measure", "--measure needs a CUDA device, and there is none"),
        ("--arch sm_75", "--arch: 'sm_75' is not known; choose from sm_80"),
        ("--heads 20", "--heads: choose from"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
