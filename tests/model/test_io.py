"""Saving, loading and warm starts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastagglo.errors import UserError
from fastagglo.model import (
    HeadSpec,
    PackedBatch,
    Student,
    create_student,
    io,
    load_student,
    save_student,
    warm_start,
)
from fastagglo.model.positions import resize_table

HEADS = {
    "z": HeadSpec(summary=10, spatial=12),
    "a": HeadSpec(spatial=8, upsample=2, spatial_blocks=1),
}


def student(seed: int = 0, **overrides) -> Student:
    torch.manual_seed(seed)
    settings = {"heads": HEADS, "width": 48, "depth": 2, "mlp_width": 64, "max_resolution": 128}
    return create_student("tiny", **(settings | overrides))


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    model = student(drop_path=0.1, window=2, global_layers=(1,))
    save_student(model, tmp_path / "new" / "folder")
    back = load_student(tmp_path / "new" / "folder")
    assert back.config == model.config
    assert list(back.config.heads) == ["z", "a"]
    assert list(back.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    batch = PackedBatch.from_images([torch.rand(1, 3, 64, 32)])
    a, b = (m.eval()(batch)["a"].spatial[0] for m in (model, back))
    assert torch.equal(a, b)
    assert all(p.requires_grad for p in back.parameters())
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    back.train()(batch)["a"].spatial[0].sum().backward()


def test_dtypes_are_kept(tmp_path: Path) -> None:
    save_student(student().bfloat16(), str(tmp_path))
    assert {p.dtype for p in load_student(str(tmp_path)).parameters()} == {torch.bfloat16}


def test_an_interrupted_save_leaves_the_old_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = student()
    save_student(old, tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot save the student to .*No space left"):
        save_student(student(1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    back = load_student(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), back.parameters(), strict=True))


def test_a_pair_from_two_saves_is_refused(tmp_path: Path) -> None:
    save_student(student(), tmp_path)
    save_student(student(depth=3), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"config.json is not the one that model.safetensors"):
        load_student(tmp_path)


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save_student(student(), tmp_path)
        return tmp_path

    def edit_config(self, folder: Path, **changes: object) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(UserError, match=rf"{name} does not exist"):
            load_student(folder)

    def test_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config.json cannot be read as JSON"):
            load_student(folder)
        (folder / "config.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match=r"config.json cannot be read as JSON"):
            load_student(folder)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"format": 99}'])
    def test_other_format(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"has format .* reads format 1"):
            load_student(folder)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"width": "wide"}, "config.json: StudentConfig: width must be an int"),
            ({"colour": 3}, "unknown setting 'colour'"),
            ({"heads": {"a": {"spatail": 3}}}, r"'spatail'; did you mean 'spatial'\?"),
            ({"heads": 3}, "heads must be a mapping"),
        ],
    )
    def test_wrong_values(self, folder: Path, changes: dict, match: str) -> None:
        self.edit_config(folder, **changes)
        with pytest.raises(UserError, match=match):
            load_student(folder)

    def test_truncated_weights(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match=r"model.safetensors cannot be read as safetensors"):
            load_student(folder)

    def test_parameters_that_do_not_fit(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state["norm.bias"]
        state["extra"] = torch.zeros(1)
        state["registers"] = torch.zeros(3, 48)
        save_file(state, folder / "model.safetensors")
        with pytest.raises(UserError) as caught:
            load_student(folder)
        text = str(caught.value)
        assert "missing: norm.bias; unexpected: extra; of another shape: registers (3, 48)" in text
        assert "expected (4, 48)" in text
        assert "\n" not in text
        for name in list(state)[:20]:
            del state[name]
        save_file(state, folder / "model.safetensors")
        with pytest.raises(UserError, match=r"and 1[0-9] more"):
            load_student(folder)

    def test_safetensors_is_optional(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(UserError, match=r"fastagglo\[train\]"):
            load_student(folder)
        with pytest.raises(UserError, match=r"fastagglo\[train\]"):
            save_student(student(), folder)

    def test_unwritable(self, folder: Path) -> None:
        with pytest.raises(UserError, match="cannot save the student to"):
            save_student(student(), folder / "config.json" / "below")

    def test_kinds(self, folder: Path) -> None:
        with pytest.raises(TypeError, match="expected a Student, got Linear"):
            save_student(torch.nn.Linear(2, 2), folder)
        with pytest.raises(TypeError, match="expected a Student, got Linear"):
            warm_start(torch.nn.Linear(2, 2), folder)


class TestWarmStart:
    def test_teachers_move_with_their_names(self, tmp_path: Path) -> None:
        old = student(0)
        save_student(old, tmp_path)
        new = student(1, heads={"new": HeadSpec(summary=3), "a": HEADS["a"], "z": HEADS["z"]})
        report = warm_start(new, tmp_path)
        assert torch.equal(new.cls_tokens["z"], old.cls_tokens["z"])
        assert torch.equal(
            new.head_blocks["a"][0].attn.qkv.weight, old.head_blocks["a"][0].attn.qkv.weight
        )
        assert set(report.copied) == set(old.state_dict())
        assert all("new" in name for name in report.untouched)
        assert len(report.untouched) == 7
        assert not report.skipped
        assert not report.resized
        assert (
            str(report)
            == f"warm start: {len(report.copied)} copied, 0 resized, 0 skipped, 7 untouched"
        )
        assert all(p.requires_grad and p.grad is None for p in new.parameters())

    def test_each_head_reads_the_token_of_its_name(self) -> None:
        """With the same tokens in all, a teacher's features do not depend on who else there is."""
        heads = {name: HeadSpec(summary=5, spatial=4) for name in ("z", "m", "a")}
        old = student(0, heads=heads).eval()
        new = student(1, heads={name: heads[name] for name in ("m", "a", "z")}).eval()
        warm_start(new, old.state_dict())
        x = torch.rand(2, 3, 64, 48)
        for name, features in old(x).items():
            torch.testing.assert_close(new(x)[name].summary, features.summary)

    def test_skips_and_resizes_by_name(self) -> None:
        old = student(0)
        new = student(1, heads={"z": HeadSpec(summary=10, spatial=13)}, max_resolution=192, depth=1)
        before = new.heads.spatial["z"].final[2].weight.clone()
        state = old.state_dict() | {"step": 3}
        report = warm_start(new.double(), state)
        assert report.resized == ("positions.table",)
        assert torch.equal(new.positions.table, resize_table(old.positions.table, 12).double())
        assert (
            report.skipped["heads.spatial.z.final.2.weight"]
            == "shape (12, 48), the student's is (13, 48)"
        )
        assert report.skipped["cls_tokens.a"] == "the student has no such parameter"
        assert "blocks.1.norm1.weight" in report.skipped
        assert report.skipped["step"] == "the student has no such parameter"
        assert torch.equal(new.heads.spatial["z"].final[2].weight, before.double())
        assert "heads.spatial.z.final.2.weight" in report.untouched
        assert new.norm.weight.dtype == torch.float64

    def test_from_a_file(self, tmp_path: Path) -> None:
        old = student(0)
        save_file({k: v.clone() for k, v in old.state_dict().items()}, tmp_path / "x.safetensors")
        warm_start(new := student(1), tmp_path / "x.safetensors")
        assert all(
            torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)
        )

    def test_odd_tables_are_skipped(self) -> None:
        new = student()
        report = warm_start(
            new, {"positions.table": torch.zeros(1, 63, 48), "norm.bias": torch.ones(48)}
        )
        assert list(report.skipped) == ["positions.table"]
        assert new.norm.bias.sum() == 48

    def test_nothing_fits(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nothing in the state fits the student .*no such"):
            warm_start(student(), {"conv.weight": torch.zeros(3)})
        with pytest.raises(UserError, match="it is empty"):
            warm_start(student(), {})
        with pytest.raises(UserError, match="does not exist"):
            warm_start(student(), tmp_path)
