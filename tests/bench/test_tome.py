"""Merging inside a trained transformer: the same model in timm, the figures, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from bench.tome import as_timm, cost, main, resized, shrunk
from fastagglo.model import HeadSpec, create_student, save_student

HEADS = {"a": HeadSpec(summary=8, spatial=8), "b": HeadSpec(spatial=8)}


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_a_student_as_timms(layer_scale: float | None) -> None:
    torch.manual_seed(0)
    student = create_student("tiny", heads=HEADS, depth=2, layer_scale=layer_scale).eval()
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    photos = torch.rand(2, 3, 96, 96)
    mean, std = (
        torch.tensor(x).view(3, 1, 1)
        for x in (
            student.config.pixel_mean,
            student.config.pixel_std,
        )
    )
    model = as_timm(student, 96)
    assert model.num_prefix_tokens == student.config.prefix_tokens
    with torch.no_grad():
        found, expected = (
            model.forward_features((photos - mean) / std),
            student.forward_features(photos),
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_parts_that_timm_lacks() -> None:
    with pytest.raises(ValueError, match="GELU"):
        as_timm(create_student("tiny", heads=HEADS, depth=1, mlp="swiglu"), 32)


def test_costs_by_hand() -> None:
    exact = torch.tensor([[[9.0, 9], [0, 2], [2, 0]]])
    assert cost(exact, exact, 1) == {"lost": 0, "cosine": 1, "prefix_cosine": 1}
    found = torch.tensor([[[9.0, -9], [1, 1], [1, 1]]])
    assert cost(found, exact, 1) == {
        "lost": 1,
        "cosine": pytest.approx(0.5**0.5, abs=1e-4),
        "prefix_cosine": 0,
    }
    assert shrunk(512, 0.25, 16) == 256
    assert shrunk(64, 0.5, 16) == 48
    tokens = torch.cat((torch.full((1, 2, 3), 7.0), torch.ones(1, 4, 3)), dim=1)
    assert torch.equal(resized(tokens, 2, 4), torch.cat((tokens[:, :2], torch.ones(1, 16, 3)), 1))


def check(folder: Path, text: str) -> None:
    results = json.loads((folder / "tome.json").read_text())
    rows = {(row["way"], row["share"]): row for row in results["rows"]}
    assert len(rows) == 2 + 3 * 4
    assert rows["timm", 1.0]["lost"] == 0
    assert rows["timm", 1.0]["speed"] == [1, 1, 1]
    assert rows["patched", 1.0]["lost"] < 1e-4
    assert 0 < rows["constant", 0.75]["lost"] < rows["constant", 0.125]["lost"]
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert text.count("| decreasing |") == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    student = create_student("tiny", heads=HEADS, depth=2)
    save_student(student, tmp_path / "run" / "student")
    quick = ["--size", "64", "--rounds", "2", "--out", str(tmp_path)]
    assert main(["--student", str(tmp_path / "run" / "student"), *quick]) == 0
    text = capsys.readouterr().out
    assert "the student of run, 192 wide, 2 blocks; photos of 64 px, 16 patches" in text
    check(tmp_path, text)


def test_the_command_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    arguments = ["--model", "test_vit", "--checkpoint", str(tmp_path / "vit.safetensors")]
    quick = ["--size", "64", "--rounds", "2", "--out", str(tmp_path)]
    assert main([*arguments, *quick]) == 0
    check(tmp_path, capsys.readouterr().out)


def test_what_the_command_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--student", str(tmp_path)], "run `python train.py` first"),
        (["--model", "test_vit"], "go together"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err
