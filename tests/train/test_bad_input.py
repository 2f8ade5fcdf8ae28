"""What is wrong ends in one line that names it and the remedy, and leaves nothing half written."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.model import load_student
from fastagglo.train.telemetry import Telemetry


def rows(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_refused(outcome, *parts: str) -> str:
    """The one line of an outcome with status 2; it has all the parts."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    return line


@pytest.fixture
def check_refused(tiny):
    """Runs settings that are refused: the line names the parts, and no folder was made."""

    def check(change: dict, *parts: str) -> str:
        folder = tiny.folder / "run"
        recipe = tiny.recipe(tiny.settings(change))
        line = assert_refused(tiny.cli("--recipe", recipe, "--out", folder), *parts)
        assert not folder.exists()
        return line

    return check


# Images.


def test_no_images_in_the_folder(tiny, check_refused):
    empty = tiny.folder / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    check_refused({"data": {"images": [str(empty)]}}, "no images", str(empty), "looked for", "png")


def test_nvjpeg_where_it_cannot_be(tiny, check_refused):
    nvjpeg = {"decoder": "nvjpeg", "uniform_std": 0.0}
    change = {"device": "cpu", "data": nvjpeg}
    check_refused(change, "setting data.decoder", "'nvjpeg'", "a CUDA device", "cpu")
    for setting, value in (("uniform_std", 2.0), ("crops_per_photo", 4)):
        change["data"] = nvjpeg | {setting: value}
        check_refused(change, f"setting data.{setting} is {value}", "data.decoder nvjpeg", "0")
    change = {"device": "cpu", "data": nvjpeg, "distill": {"shift_std": 0.5}}
    check_refused(change, "setting distill.shift_std is 0.5", "data.decoder nvjpeg")


def test_no_image_folder(tiny, check_refused):
    missing = tiny.folder / "missing"
    check_refused({"data": {"images": [str(missing)]}}, str(missing), "does not exist", "builtin")
    missing.write_text("")
    check_refused({"data": {"images": [str(missing)]}}, str(missing), "is a file", "give a folder")


def test_no_tar_shard(tiny, check_refused):
    check_refused(
        {"data": {"images": [str(tiny.folder / "x-{00..03}.tar")]}}, "x-00.tar", "not exist"
    )


def test_corrupt_images_are_counted_reported_and_skipped(tiny):
    photos = shutil.copytree(tiny.photos, tiny.folder / "photos")
    (photos / "broken1.jpg").write_bytes(b"broken")
    png = (photos / "photo0.png").read_bytes()
    (photos / "broken2.png").write_bytes(png[: len(png) // 2])
    trainer, folder = tiny.trained(tiny.settings({"data": {"images": [str(photos)]}}))
    train = rows(folder, "train")
    counts = [row["skipped"].get("corrupt", 0) for row in train]
    assert counts == sorted(counts)
    # 16 images were used; 12 files in epochs of 12.
    assert 2 <= counts[-1] <= 8
    assert [row["images_per_second"] * row["seconds"] for row in train] == pytest.approx([4] * 4)
    keys = {key for step in range(4) for key in trainer.stream[step].keys}
    assert not any("broken" in key for key in keys)
    assert "corrupt" in (folder / "report.html").read_text()


def test_too_many_corrupt_images_stop_the_run(tiny):
    photos = shutil.copytree(tiny.photos, tiny.folder / "photos")
    for number in range(8):
        (photos / f"broken{number}.jpg").write_bytes(b"broken")
    stage = {"steps": 20, "lr": 1e-3, "phi_s_steps": 1}
    settings = tiny.settings(
        {
            "data": {"images": [str(photos)], "max_bad_share": 0.2},
            "stages": [{**stage, "groups": [{"images": 16, "sizes": [32]}]}],
            "log": {"checkpoint_every": 1},
        }
    )
    folder = tiny.folder / "run"
    outcome = tiny.cli("--recipe", tiny.recipe(settings), "--out", folder)
    assert_refused(outcome, "data.max_bad_share", "20.0%", "corrupt", "broken", "raise the limit")
    # What was there before the limit was met is whole.
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] >= 1
    assert len(rows(folder, "train")) >= 1
    # At the default limit the same folder is fine with mended images.
    for path in photos.glob("broken*"):
        shutil.copy(photos / "photo0.png", path)
    assert tiny.cli("--resume", folder).status == 0


def test_images_that_cannot_be_used_at_all_stop_the_run(tiny):
    photos = tiny.folder / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"broken{number}.jpg").write_bytes(b"broken")
    recipe = tiny.recipe(tiny.settings({"data": {"images": [str(photos)]}}))
    outcome = tiny.cli("--recipe", recipe, "--out", tiny.folder / "run")
    assert_refused(outcome, "images in a row cannot be used", "corrupt", ".jpg'", "mend the data")


# Settings.


def one_group(**group: object) -> dict:
    stage = {"steps": 4, "phi_s_steps": 2}
    return {"stages": [{**stage, "groups": [{"images": 2, "sizes": [32]}, {"images": 2, **group}]}]}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (one_group(sizes=[64, 40]), ["stages.0.groups.1.sizes", "40", "32 and 48 would do"]),
        (one_group(sizes=[8]), ["stages.0.groups.1.sizes", "8", "16 and 32 would do"]),
        (one_group(sizes=[128]), ["stages.0.groups.1.sizes", "128", "student.max_resolution"]),
        ({"eval": {"sizes": [72]}}, ["eval.sizes", "72", "64 and 80 would do"]),
        (one_group(ranks=[2, 1]), ["stages.0.groups.1.ranks is (2, 1)", "first and the last rank"]),
        (one_group(ranks=[-1, 1]), ["stages.0.groups.1.ranks is (-1, 1)", "counted from 0"]),
        (one_group(ranks=[0, 1]), ["stages.0.groups.1.ranks is (0, 1)", "0 to 0", "torchrun"]),
        (one_group(ranks=[0]), ["stages.0.groups.1.ranks"]),
        (
            {"stages": [{"phi_s_steps": 2, "tokens": 400, "groups": [{"ranks": [0, 0]}]}]},
            ["stages.0.groups.0.ranks is (0, 0)", "tokens", "leave one of them out"],
        ),
        (one_group(teachers=["hgo"]), ["stages.0.groups.1.teachers has 'hgo'", "hog"]),
        (one_group(teachers=[]), ["stages.0.groups.1.teachers is ()", "leave it out for all"]),
        (
            {
                "stages": [{"phi_s_steps": 2, "groups": [{"teachers": ["hog"]}]}],
                "teachers": {"lite0": {"model": "efficientnet-lite0"}},
            },
            ["stages.0.groups has no images for teacher 'lite0'"],
        ),
        (
            {"student": {"patch_size": 14}},
            ["stages.0.groups.0.sizes", "32", "28 and 42 would do"],
        ),
        (
            {"teachers": {"hog": {"sizes": [50]}}},
            ["teachers.hog.sizes", "50", "multiples of 16"],
        ),
        (
            {"student": {"windows": [3], "window_probability": 0.5}},
            ["student.windows", "(3,)", "divides"],
        ),
        ({"teachers": {"hog": {"model": "hug"}}}, ["'hog'", "'hug'", "efficientnet-lite0"]),
        ({"teachers": {"hog": {"layer": "stride7"}}}, ["'hog'", "'stride7'", "stride8"]),
        ({"teachers": {"hog": {"summary_weight": 1.0}}}, ["teachers.hog.summary_weight", "to 0"]),
        ({"teachers": {"hog": {"spatial_width": 7}}}, ["teachers.hog.spatial_width is 7", "36"]),
        ({"optimiser": {"accumulate": 5}}, ["stages.0.groups has 4 images", "at least 5"]),
        (
            {"optimiser": {"accumulate": 4}},
            ["stages.0.groups.0.images is 2", "a multiple of optimiser.accumulate (4)"],
        ),
        ({"student": {"init": "nowhere"}}, ["student.init", "nowhere", "does not exist"]),
        ({"student": {"max_resolution": 8}}, ["student", "max_resolution", "patch_size=16"]),
        ({"student": {"depth": 0}}, ["student.depth is 0", "at least 1"]),
        ({"student": {"registers": -1}}, ["student.registers is -1", "at least 0"]),
        (
            {"student": {"windows": [0], "window_probability": 1.0}},
            ["student.windows is 0", "at least 1"],
        ),
        ({"teachers": {"hog": {"head": {"hidden": 0}}}}, ["teachers.hog.head.hidden is 0"]),
        ({"teachers": {"hog": {"sizes": [-16]}}}, ["teachers.hog.sizes is -16"]),
        ({"teachers": {"hog": {"scale": 0.0}}}, ["teachers.hog.scale is 0.0", "above 0"]),
        ({"data": {"uniform_std": 300.0}}, ["data.uniform_std is 300.0", "at most 255"]),
        ({"data": {"weights": [0.0]}}, ["data.weights is 0.0", "above 0"]),
        ({"optimiser": {"betas": [2.0, 0.9]}}, ["optimiser.betas is 2.0", "at most"]),
        ({"seed": -1}, ["seed is -1", "at least 0"]),
        ({"threads": -1}, ["threads is -1", "at least 0"]),
        ({"eval": {"photos": 0}}, ["eval.photos is 0", "at least 1"]),
        ({"eval": {"pictures": -1}}, ["eval.pictures is -1", "at least 0"]),
        ({"studnet": {}}, ["recipe.toml", "'studnet'", "did you mean 'student'"]),
        ({"student": {"drop_pth": 0.1}}, ["'student.drop_pth'", "did you mean 'drop_path'"]),
        (
            {"teachers": {"hog": {"normalizer": "none"}}},
            ["'teachers.hog.normalizer'", "did you mean 'normaliser'"],
        ),
        ({"log": {"interval": "ten"}}, ["'log.interval'", "valid integer", "'ten'"]),
        ({"distill": {"balance": "uncertain"}}, ["distill.balance", "uncertainty", "'uncertain'"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_setting_is_refused_before_anything_is_written(check_refused, change, parts):
    check_refused(change, *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stages.0.lr", "nan"], ["stages.0.lr is nan"]),
        (["--stages.0.lr", "inf"], ["stages.0.lr is inf", "finite"]),
        (["--teachers.hog.spatial-weight", "inf"], ["teachers.hog.spatial_weight is inf"]),
        (["--distill.shift-std", "inf"], ["distill.shift_std is inf"]),
        (["--teachers.hog.scale", "nan"], ["teachers.hog.scale is nan"]),
        (["--device", "cuda"], ["device is 'cuda'", "use cpu or auto"]),
    ],
)
def test_numbers_on_the_command_line_are_numbers(tiny, monkeypatch, arguments, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tiny.folder / "run"
    recipe = tiny.recipe(tiny.settings())
    assert_refused(tiny.cli("--recipe", recipe, "--out", folder, *arguments), *parts)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stages.0.steps", "ten"], ["--stages.0.steps", "ten"]),
        (["--student.presett", "B"], ["--student.presett", "--student.preset"]),
        (["--student.preset", "XL"], ["--student.preset", "XL"]),
        (["--optimiser.clip", "yes"], ["--optimiser.clip", "yes"]),
    ],
)
def test_an_unknown_or_ill_typed_argument_is_named(tiny, arguments, parts):
    folder = tiny.folder / "run"
    outcome = tiny.cli("--recipe", tiny.recipe(tiny.settings()), "--out", folder, *arguments)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.out + outcome.err
    assert not folder.exists()


def test_help_shows_every_setting_with_the_value_of_the_recipe(tiny):
    outcome = tiny.cli("--recipe", tiny.recipe(tiny.settings()), "--help")
    assert outcome.status == 0
    for part in ("--stages.0.lr", "--teachers.hog.spatial-weight", "--log.max-bad-steps", "demo"):
        assert part in outcome.out


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [
        ("open_clip", "open_clip", "teachers"),
        ("transformers", "transformers", "teachers"),
        ("timm", "timm", "teachers"),
        ("builtin", "efficientnet_lite_pytorch", "demo"),
    ],
)
def test_a_teacher_whose_package_is_not_installed(
    check_refused, monkeypatch, source, module, extra
):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # what import makes of it: not found
    model = "efficientnet-lite0" if source == "builtin" else "ViT-B-32"
    check_refused(
        {"teachers": {"clip": {"source": source, "model": model}}},
        "'clip'",
        f"package '{module}'",
        f'pip install "fastagglo[{extra}]"',
    )


def test_a_recipe_that_is_not_there_or_no_toml(tiny):
    folder = tiny.folder / "run"
    line = assert_refused(
        tiny.cli("--recipe", "dmeo", "--out", folder), "'dmeo'", "did you mean 'demo'"
    )
    assert "radio-v2.5-b" in line
    path = tiny.folder / "mine.toml"
    path.write_text("[student\n")
    assert_refused(
        tiny.cli("--recipe", path, "--out", folder), "mine.toml", "not valid TOML", "line 1"
    )
    assert not folder.exists()


# Folders.


def test_a_folder_that_holds_another_run(tiny):
    settings = tiny.settings()
    _, folder = tiny.trained(settings)
    before = contents(folder)
    recipe = tiny.recipe(settings)
    outcome = tiny.cli("--recipe", recipe, "--out", folder)
    assert_refused(outcome, "setting out", str(folder), "--resume", "--overwrite", "--out")
    # Nor does a setting that is wrong in another way cost the run that is there.
    outcome = tiny.cli(
        "--recipe", recipe, "--out", folder, "--overwrite", "--stages.0.groups.0.sizes", "40"
    )
    assert_refused(outcome, "stages.0.groups.0.sizes")
    assert contents(folder) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_that_holds_other_files(tiny, overwrite):
    folder = tiny.folder / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    recipe = tiny.recipe(tiny.settings())
    outcome = tiny.cli("--recipe", recipe, "--out", folder, *overwrite)
    assert_refused(outcome, "setting out", str(folder), "other files", "--out")
    assert contents(folder) == {"thesis.tex": b"years of work"}


def test_a_folder_that_cannot_be_made(tiny):
    file = tiny.folder / "file"
    file.write_text("")
    recipe = tiny.recipe(tiny.settings())
    assert_refused(
        tiny.cli("--recipe", recipe, "--out", file), "setting out", str(file), "is a file"
    )
    line = assert_refused(
        tiny.cli("--recipe", recipe, "--out", file / "run"), "setting out", str(file)
    )
    assert "Not a directory" in line


def test_nothing_to_resume(tiny):
    missing = tiny.folder / "missing"
    assert_refused(tiny.cli("--resume", missing), "setting resume", str(missing), "holds no run")
    assert not missing.exists()
    _, folder = tiny.trained(tiny.settings())
    (folder / "checkpoint.pt").unlink()
    assert_refused(tiny.cli("--resume", folder), str(folder), "no checkpoint.pt", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stages.0.steps", "9"], ["stages.0.steps = 4", "9"]),
        (["--student.depth", "3"], ["student.depth = 2", "3"]),
        (["--distill.balance", "uncertainty"], ["distill.balance = 'fixed'", "'uncertainty'"]),
        (["--student.patch-size", "32"], ["student.patch_size = None", "32"]),
        (["--teachers.hog.layer", "stride8"], ["teachers.hog.layer = None", "'stride8'"]),
        (["--seed", "4"], ["seed = 3", "4"]),
    ],
)
def test_a_checkpoint_of_another_configuration(tiny, interrupt, arguments, parts):
    folder = tiny.folder / "run"
    folder.mkdir()
    interrupt(1)
    assert not tiny.trainer(tiny.settings()).run(folder)
    before = contents(folder)
    outcome = tiny.cli("--resume", folder, *arguments)
    assert_refused(outcome, "checkpoint", str(folder), *parts, "start a new run")
    assert contents(folder) == before


def test_settings_of_speed_and_talk_may_change_on_resume(tiny, interrupt, monkeypatch):
    folder = tiny.folder / "run"
    folder.mkdir()
    interrupt(1)
    assert not tiny.trainer(tiny.settings()).run(folder)
    monkeypatch.undo()
    outcome = tiny.cli("--resume", folder, "--log.interval", "2", "--threads", "2")
    assert (outcome.status, outcome.err) == (0, "")
    torch.set_num_threads(1)
    assert [row["step"] for row in rows(folder, "train")] == [0, 1, 3]


def test_in_a_process_of_its_own_the_error_is_all_there_is(tiny):
    empty = tiny.folder / "empty"
    empty.mkdir()
    recipe = tiny.recipe(tiny.settings({"data": {"images": [str(empty)]}}))
    process = tiny.process("--recipe", recipe, "--out", tiny.folder / "run")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: no images in the folder")
    assert not (tiny.folder / "run").exists()


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
"""


def test_a_disk_that_is_full_from_the_start(tiny):
    folder = tiny.folder / "run"
    recipe = tiny.recipe(tiny.settings())
    process = tiny.process("--recipe", recipe, "--out", folder, before=FULL_DISK)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: configuration {folder / 'config.toml'}: cannot be written")
    assert "File too large" in line
    assert "--out" in line
    assert contents(folder) == {}


def test_an_export_that_fails_can_be_made_up_for(tiny):
    settings = tiny.settings()
    _, reference = tiny.trained(settings, "reference")
    folder = tiny.folder / "run"
    folder.mkdir()
    (folder / "student").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot save the student to .*student"):
        tiny.trainer(settings).run(folder)
    assert not (folder / "report.html").exists()
    (folder / "student").unlink()
    outcome = tiny.cli("--resume", folder)
    assert outcome.status == 0
    assert "finished: see" in outcome.out
    ours, theirs = (load_student(f / "student").state_dict() for f in (folder, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_metrics_that_cannot_be_written_stop_the_run(tiny, monkeypatch):
    write = Telemetry._write

    def full(telemetry, row):
        if row["kind"] == "train" and row["step"] == 2:
            telemetry._file.close()
            telemetry._file = io.FileIO("/dev/full", "a")
        write(telemetry, row)

    monkeypatch.setattr(Telemetry, "_write", full)
    recipe = tiny.recipe(tiny.settings({"log": {"checkpoint_every": 1}}))
    folder = tiny.folder / "run"
    outcome = tiny.cli("--recipe", recipe, "--out", folder)
    assert_refused(outcome, "metrics.jsonl", "No space left", f"--resume {folder}")
    monkeypatch.undo()
    assert tiny.cli("--resume", folder).status == 0
    assert [row["step"] for row in rows(folder, "train")] == [0, 1, 2, 3]
