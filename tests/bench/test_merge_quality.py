"""The figure of merging's quality: by hand, and on real features small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import merge_quality
from bench.merge_quality import METHODS, lost, main, segments, window


def test_what_is_lost_by_hand() -> None:
    x = torch.tensor([[[1.0, 0], [3, 0]], [[0, 2], [0, 2]]])
    # The mean is (1, 1): squares 1, 5, 2, 2 of distances; the mean itself loses all.
    assert lost(x, x) == {"lost": 0, "cosine": pytest.approx(1)}
    assert lost(x, x.new_ones(2, 2, 2))["lost"] == pytest.approx(1)
    y = x.clone()
    y[0, 0] = torch.tensor([0.0, 1])  # at right angles, 2 away
    assert lost(x, y) == {"lost": pytest.approx(2 / 10), "cosine": pytest.approx(0.75)}


def test_windows() -> None:
    x = torch.arange(16.0).view(4, 4, 1)
    mean, sampled = (METHODS[name][1](x, 4)[..., 0] for name in ("window-mean", "sampled"))
    assert mean.tolist() == [[2.5] * 2 + [4.5] * 2] * 2 + [[10.5] * 2 + [12.5] * 2] * 2
    assert sampled.tolist() == [[5, 5, 7, 7]] * 2 + [[13, 13, 15, 15]] * 2
    with pytest.raises(ValueError, match="no 5 square windows fill a grid of 4 x 4"):
        window(x, 5)
    with pytest.raises(ValueError, match="4 x 6"):
        window(torch.zeros(4, 6, 1), 4)


def test_no_method_loses_what_repeats() -> None:
    cells = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    x = cells.repeat_interleave(2, 0).repeat_interleave(2, 1)
    for name in METHODS.keys() - {"alternate"}:  # whose second round has rows of its own to pair
        found = lost(x, METHODS[name][1](x, 16))["lost"]
        assert found == pytest.approx(0, abs=1e-12), name


def test_segments() -> None:
    photo = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 0], [1, 2]])
    picture = segments(photo, index)
    assert picture.shape == (8, 8, 3)
    plain = photo.permute(1, 2, 0).numpy()
    # Outlines are white, on both sides; a lone patch keeps its colours, a merged one does not.
    assert (picture[3:5] == 1).all()
    assert (picture[5:, 3:5] == 1).all()
    np.testing.assert_array_equal(picture[5:, :3], plain[5:, :3])
    assert np.abs(picture[:3] - plain[:3]).min(axis=2).max() > 0.05
    assert (picture[:3, 3:5] < 1).any()


def test_on_real_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_quality, "SIZE", 384)
    monkeypatch.setattr(merge_quality, "TOKENS", (144, 64, 16))
    photographs = merge_quality.photographs

    def three(size: int) -> dict[str, torch.Tensor]:
        found = photographs(size)
        assert len(found) == 10
        return {name: found[name] for name in ("coffee", "flower", "rocket")}

    monkeypatch.setattr(merge_quality, "photographs", three)
    assert main(["--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "merge-quality.json").read_text())
    assert found["grid"] == [24, 24]
    table = {(row["method"], row["tokens"]): row["lost"] for row in found["rows"]}
    assert len(table) == 15
    for tokens in (144, 64, 16):
        # What the paper says: similarity keeps more than windows do.
        assert table["strided", tokens] < table["window-mean", tokens] < table["sampled", tokens]
    for method in METHODS:
        assert table[method, 144] < table[method, 16]
    assert (tmp_path / "merge-quality.jpg").stat().st_size <= 300_000
