"""Stored teacher features: what is served, what is not, and files that are complete or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.model import load_student
from fastagglo.teachers import load_teacher
from fastagglo.train import cache as cache_module
from fastagglo.train import feature_store
from fastagglo.train.cache import FeatureCache, LazyTeacher, teacher_identity
from fastagglo.train.cache_command import CacheWork, main
from fastagglo.train.feature_store import FeatureStore, relative_error
from fastagglo.train.targets import load_teachers, teacher_features

CPU = torch.device("cpu")
PHOTOS, CROPS = 10, 2


# The cache of a run.


@pytest.fixture
def settings(tiny):
    """Settings of a run with two teachers and a cache, with nested changes."""

    def make(*changes: dict[str, Any], folder: str | None = "features") -> dict[str, Any]:
        return tiny.settings(
            {
                "teachers": {"lite0": {"model": "efficientnet-lite0", "sizes": [32]}},
                "data": {"crops_per_photo": CROPS},
                "cache": {"folder": folder and str(tiny.folder / folder)},
            },
            *changes,
        )

    return make


def build(tiny, settings: dict[str, Any]) -> CacheWork:
    work = CacheWork(tiny.config(settings), CPU)
    work.build()
    return work


def losses(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in lines if row["kind"] == "train"]


def counted(folder: Path) -> dict[str, int]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (row,) = (row for row in rows if row["kind"] == "cache")
    return {name: row[name] for name in ("read", "computed", "damaged")}


def test_a_build_stores_every_view_once_and_then_finds_it(tiny, settings, capsys):
    first = build(tiny, settings())
    # hog sees each crop at both resolutions, lite0 at its one size.
    sizes = {name: len(store) for name, store in first.cache.stores.items()}
    assert sizes == {"hog": PHOTOS * CROPS * 2, "lite0": PHOTOS * CROPS}
    assert first.cache.computed == PHOTOS * CROPS * 3
    out = capsys.readouterr().out
    assert f"{PHOTOS} photos x {CROPS} crops, 2 teachers" in out
    assert f"hog: {sizes['hog']} views, " in out
    second = build(tiny, settings())
    assert second.cache.computed == 0
    assert all(isinstance(teacher, LazyTeacher) for teacher in second.cache.teachers.values())
    assert all(teacher.teacher is None for teacher in second.cache.teachers.values())


def test_served_features_are_the_teachers_own(tiny, settings):
    build(tiny, settings())
    config = tiny.config(settings())
    trainer = tiny.trainer(settings())
    teachers = load_teachers(config, CPU)
    plain = tiny.trainer(settings(folder=None))
    for step in range(4):
        served = trainer.cache.features(trainer.stream[step].groups)
        computed = teacher_features(teachers, plain.stream[step].groups, config.teachers)
        for ours, theirs in zip(served, computed, strict=True):
            assert list(ours) == list(theirs) == ["hog", "lite0"]
            assert torch.equal(ours["hog"].spatial, theirs["hog"].spatial)
            assert ours["hog"].summary is None
            # A convolution of another batch may round otherwise: 20 layers, about 1e-6 each.
            for part in ("summary", "spatial"):
                mine, other = getattr(ours["lite0"], part), getattr(theirs["lite0"], part)
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert trainer.cache.counts() == {"read": 4 * 8, "computed": 0, "damaged": 0}
    assert trainer.teachers["lite0"].teacher is None


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_run_is_the_same_with_and_without(tiny, settings, shift, differences):
    change = {"distill": {"shift_std": shift}, "eval": {"points": 2, "photos": 4, "pictures": 1}}
    change |= {"data": {"holdout_region": 0.3}}
    _, without = tiny.trained(settings(change, folder=None), "without")
    _, cold = tiny.trained(settings(change), "cold")
    assert counted(cold)["computed"] > 0
    work = build(tiny, settings(change))
    assert work.cache.computed > 0  # the run had not come to every crop
    _, warm = tiny.trained(settings(change), "warm")
    assert counted(warm)["computed"] == 0
    trainer, workers = tiny.trained(settings(change, {"data": {"workers": 2}}), "workers")
    assert counted(workers) == counted(warm)
    assert trainer.teachers["lite0"].teacher is None
    for folder in (cold, warm, workers):
        for ours, theirs in zip(losses(folder), losses(without), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    student, other = (load_student(f / "student").state_dict() for f in (warm, workers))
    assert differences(student, other) == []


def test_of_a_half_filled_cache_only_the_rest_is_computed(tiny, settings):
    config, full = tiny.config(settings()), build(tiny, settings())
    group = tiny.trainer(settings()).stream[0].groups[1]
    expected = full.cache.features([group])[0]
    half = settings(folder="half")
    first = FeatureCache(tiny.config(half), CPU)
    views = tiny.trainer(half).stream[0].groups[1]
    for name in config.teachers:  # the first of two images
        whole = expected[name]
        summary = None if whole.summary is None else whole.summary[:1]
        features = Features(summary, whole.spatial[:1])
        store = first.stores[name]
        store.put(views.addresses[name][:1], store.encode(features))
    first.flush()
    trainer = tiny.trainer(half)
    for groups in (trainer.stream[0].groups[1:], [views]):  # known to the worker, and not yet
        cache = FeatureCache(tiny.config(half), CPU)
        found = cache.features(groups)[0]
        assert cache.counts() == {"read": 2, "computed": 2, "damaged": 0}
        for name, features in found.items():
            torch.testing.assert_close(
                features.spatial, expected[name].spatial, rtol=1e-4, atol=1e-4
            )
    assert trainer.stream[0].groups[1].missing == {"hog": (1,), "lite0": (1,)}


def test_mosaics_are_stored_as_they_were_computed(tiny, settings, tmp_path):
    import transformers

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "window_size": 2}
    shape |= {"hidden_size": 16, "mlp_dim": 16, "image_size": 128, "patch_size": 16}
    config = transformers.SamVisionConfig(**shape, output_channels=8, global_attn_indexes=[0])
    transformers.SamVisionModel(config).save_pretrained(tmp_path / "sam")
    sam = {"source": "transformers", "model": "sam", "checkpoint": str(tmp_path / "sam")}
    change = {"teachers": {"sam": {**sam, "mosaic": True, "summary_weight": 0.0}, "lite0": None}}
    built = command(settings(change), tiny)
    assert (built.status, built.err) == (0, "")
    # 32 and 64 px reach it as tiles of their own size.
    assert f"sam: {2 * PHOTOS * CROPS} views" in built.out
    verified = command(settings(change), tiny, "--verify")
    assert "sam: checksums only" in verified.out
    _, folder = tiny.trained(settings(change))
    assert counted(folder)["computed"] == 0


def test_a_second_student_finds_what_the_first_computed(tiny, settings):
    long = {
        "stages": [
            {
                "steps": 12,
                "lr": 1e-3,
                "phi_s_steps": 2,
                "groups": tiny.settings()["stages"][0]["groups"],
            }
        ]
    }
    _, first = tiny.trained(settings(long), "first")
    again = counted(first)
    assert again["read"] > 0  # later epochs of the run itself
    _, same = tiny.trained(settings(long, {"student": {"depth": 1}}), "second")
    assert counted(same) == {"read": again["read"] + again["computed"], "computed": 0, "damaged": 0}


def test_with_int8_a_miss_gives_what_a_hit_gives(tiny, settings, differences):
    change = {"cache": {"storage": "int8"}}
    _, cold = tiny.trained(settings(change), "cold")
    _, warm = tiny.trained(settings(change), "warm")
    assert counted(warm)["computed"] == 0
    for ours, theirs in zip(losses(cold), losses(warm), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    _, exact = tiny.trained(settings(folder=None), "exact")
    assert losses(exact) != losses(warm)
    for ours, theirs in zip(losses(exact), losses(warm), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)


def test_without_store_nothing_is_written(tiny, settings):
    build(tiny, settings())
    before = sorted((p, p.stat().st_mtime_ns) for p in (tiny.folder / "features").rglob("*"))
    _, folder = tiny.trained(settings({"cache": {"store": False}, "data": {"crop_seed": 5}}))
    assert counted(folder)["computed"] == 32
    after = sorted((p, p.stat().st_mtime_ns) for p in (tiny.folder / "features").rglob("*"))
    assert after == before


# What makes an entry stale.


STALE = {
    "image bytes": ({}, "photo"),
    "crop seed": ({"data": {"crop_seed": 1}}, ""),
    "crop range": ({"data": {"crop_scale": [0.5, 0.9]}}, ""),
    "strip": ({"data": {"holdout_region": 0.2}}, ""),
    "size": ({"teachers": {"lite0": {"sizes": [64]}}}, ""),
    "weights": ({}, "weights"),
    "layer": ({"teachers": {"lite0": {"layer": "stride8"}}}, ""),
    "dtype": ({"teachers": {"lite0": {"dtype": "bfloat16"}}}, ""),
    "summary": ({"teachers": {"lite0": {"summary_weight": 0.0}}}, ""),
    "storage": ({"cache": {"storage": "bfloat16"}}, ""),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    from fastagglo.teachers.builtin import efficientnet_file

    state = torch.load(efficientnet_file("efficientnet-lite0", "lite0"), weights_only=True)
    return {name: value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("what", STALE)
def test_whatever_changes_nothing_stale_is_served(tiny, settings, weights, what, tmp_path):
    change, files = STALE[what]
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        shutil.copy(tiny.photos / f"photo{number}.png", photos)
    checkpoint = tmp_path / "lite0.safetensors"
    save_file(weights, checkpoint)
    base = {
        "teachers": {"lite0": {"checkpoint": str(checkpoint)}},
        "data": {"images": [str(photos)]},
    }
    build(tiny, settings(base))
    if files == "weights":
        save_file(
            {n: v * 1.01 if v.is_floating_point() else v for n, v in weights.items()}, checkpoint
        )
    elif files == "photo":
        from PIL import Image

        for path in photos.iterdir():
            Image.effect_noise((96, 80), 90).convert("RGB").save(path)
    work = CacheWork(tiny.config(settings(base, change)), CPU)
    reader, config = work.cache.reader, work.config
    stream = work._stream(reader)
    for index in range(2):
        for group in stream.fixed_views(index, work.plans):
            assert "lite0" not in group.features
            assert group.missing["lite0"] == (0, 1)
    # And what is made anew is right.
    work.build()
    group = work._stream(None).fixed_views(0, work.plans)[0]
    teacher = load_teachers(config, CPU)["lite0"]
    stored = [reader.read("lite0", address) for address in group.addresses["lite0"]]
    errors = relative_error(teacher(group.teachers["lite0"]), stored)
    assert max(errors) < (1e-4 if what not in ("dtype", "storage") else 2e-2)


def test_an_identity_follows_all_that_features_depend_on(tiny, settings, monkeypatch):
    config = tiny.config(settings())
    own = config.teachers["lite0"]
    teacher = load_teacher("builtin", "efficientnet-lite0", name="lite0")
    identity = teacher_identity(teacher, own)
    assert (
        teacher_identity(load_teacher("builtin", "efficientnet-lite0", name="x"), own) == identity
    )
    for change in ({"mosaic": True}, {"layer": "stride8"}, {"model": "m"}, {"summary_weight": 0.0}):
        assert teacher_identity(teacher, dataclasses.replace(own, **change)) != identity
    unchanged = {"spatial_weight": 0.5, "normaliser": "none", "sizes": (64,), "scale": 2.0}
    assert teacher_identity(teacher, dataclasses.replace(own, **unchanged)) == identity
    with torch.no_grad():
        next(teacher.parameters()).add_(1e-3)
    assert teacher_identity(teacher, own) != identity
    teacher = load_teacher("builtin", "efficientnet-lite0", name="lite0")
    teacher.spec = dataclasses.replace(teacher.spec, mean=(0.1, 0.2, 0.3))
    assert teacher_identity(teacher, own) != identity
    teacher = load_teacher("builtin", "efficientnet-lite0", name="lite0")
    for part, value in (("version", lambda package: "99"), ("_code", lambda source: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, part, value)
            assert teacher_identity(teacher, own) != identity
    assert teacher_identity(teacher, own) == identity


# The command.


def command(settings: dict[str, Any], tiny, *arguments: object):
    return tiny.cli("cache", "--recipe", tiny.recipe(settings), *arguments)


def test_the_command_builds_finds_and_verifies(tiny, settings):
    recipe = settings({"data": {"workers": 2}})
    built = command(recipe, tiny)
    assert (built.status, built.err) == (0, "")
    assert f"{3 * PHOTOS * CROPS} computed and {PHOTOS * CROPS} found" in built.out
    again = command(recipe, tiny)
    assert f"0 computed and {4 * PHOTOS * CROPS} found" in again.out
    verified = command(recipe, tiny, "--verify", "--sample", 3)
    assert (verified.status, verified.err) == (0, "")
    assert "hog: off by at most 0 (allowed 0.001)" in verified.out
    assert "not stored" not in verified.out


@pytest.mark.parametrize("storage", ["int8", "float16", "bfloat16"])
def test_the_command_states_the_error_of_storage(tiny, settings, storage):
    recipe = settings({"cache": {"storage": storage}})
    built = command(recipe, tiny)
    (line,) = (s for s in built.out.splitlines() if s.startswith("lite0:") and "off by" in s)
    stated = float(line.split("off by ")[1].split()[0])
    most = {"int8": 2e-2, "float16": 2e-3, "bfloat16": 2e-2}[storage]
    assert 0 < stated < most
    assert command(recipe, tiny, "--verify").status == 0


def test_verify_says_what_is_missing(tiny, settings):
    command(settings({"data": {"crops_per_photo": 1}}), tiny)
    verified = command(settings(), tiny, "--verify", "--sample", 100)
    assert verified.status == 0
    assert f"{3 * PHOTOS} views of {PHOTOS} photos are not stored" in verified.out


@pytest.mark.parametrize("kind", ["bits", "values"])
def test_verify_catches_a_corrupted_entry(tiny, settings, kind):
    work = build(tiny, settings())
    (shard,) = sorted(work.cache.stores["lite0"].folder.glob("*.safetensors"))
    tensors = load_file(shard)
    if kind == "bits":
        tensors["spatial"][7, 0, 0, 3] += 1e-3
    else:  # a wrong value with a right checksum
        tensors["summary"][7] *= 1.05
        row = {name: tensors[name][7] for name in ("summary", "spatial")}
        tensors["checksums"][7] = feature_store.checksum(row)
    save_file(tensors, shard)
    verified = command(settings(), tiny, "--verify", "--sample", 100)
    assert verified.status == 2
    assert "setting cache.folder" in verified.err
    assert ("damaged: row 7" if kind == "bits" else "1 of lite0") in verified.err
    assert verified.err.count("\n") == 1


def test_bad_photos_are_counted_and_too_many_are_an_error(tiny, settings, tmp_path):
    photos = tmp_path / "some"
    shutil.copytree(tiny.photos, photos)
    (photos / "photo3.png").write_bytes(b"no picture")
    recipe = settings({"data": {"images": [str(photos)]}})
    built = command(recipe, tiny)
    assert built.status == 0
    assert "photos that cannot be used: 1 corrupt" in built.out
    for number in range(40):
        (photos / f"bad{number}.png").write_bytes(b"no picture")
    built = command(recipe, tiny)
    assert built.status == 2
    assert "setting data.max_bad_share" in built.err


def test_features_that_are_not_finite_end_a_build(tiny, settings, weights, tmp_path):
    checkpoint = tmp_path / "lite0.safetensors"
    first = next(name for name, v in weights.items() if v.is_floating_point())
    save_file({**weights, first: weights[first] * torch.nan}, checkpoint)
    built = command(settings({"teachers": {"lite0": {"checkpoint": str(checkpoint)}}}), tiny)
    assert built.status == 2
    assert "features of teachers.lite0 for 'photo" in built.err


BAD = {
    "no folder": ({"cache": {"folder": None}}, "setting cache.folder: say where"),
    "no crops": ({"data": {"crops_per_photo": 0}}, "setting data.crops_per_photo is 0"),
    "crops below 0": ({"data": {"crops_per_photo": -1}}, "setting data.crops_per_photo is -1"),
    "seed below 0": ({"data": {"crop_seed": -1}}, "setting data.crop_seed is -1"),
    "empty folder": ({"cache": {"folder": ""}}, "setting cache.folder is ''"),
    "storage": ({"cache": {"storage": "int4"}}, "setting 'cache.storage'"),
    "only reads": ({"cache": {"store": False}}, "cache.folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_settings_name_the_setting(tiny, settings, what):
    change, expected = BAD[what]
    outcome = command(settings(change), tiny)
    assert outcome.status == 2
    assert expected in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_an_error_before_the_run(tiny, settings):
    (tiny.folder / "file").write_text("in the way")
    recipe = tiny.recipe(settings(folder="file/features"))
    for arguments in (("cache", "--recipe", recipe), ("--recipe", recipe, "--out", "never")):
        outcome = tiny.cli(*arguments)
        assert outcome.status == 2
        assert outcome.err.startswith("error: setting cache.folder: cannot make ")
    assert not Path("never").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tiny, settings):
    (tiny.folder / "features").mkdir(mode=0o555)
    assert "cannot be written to" in command(settings(), tiny).err


def test_build_without_store_and_bad_sample(tiny, settings):
    build(tiny, settings())
    only_reads = command(settings({"cache": {"store": False}}), tiny)
    assert "setting cache.store is false" in only_reads.err
    assert "--sample must be at least 1" in command(settings(), tiny, "--sample", 0).err


# Kills, full disks, several processes.


HOLD = """
from pathlib import Path
from fastagglo.train import feature_store
feature_store.SHARD_SECONDS = 0.0
real = feature_store.os.replace
count = 0
def replace(partial, path):
    global count
    count += str(path).endswith(".safetensors")
    if count == {shards}:
        Path({reached!r}).touch()
        import time
        time.sleep(100)
    real(partial, path)
feature_store.os.replace = replace
"""


def test_a_build_that_is_killed_goes_on_where_it_was(tiny, settings, monkeypatch):
    # One photo at a time, and a shard of each: the kill comes with the fifth half written.
    recipe, reached = settings(), tiny.folder / "reached"
    before = HOLD.format(shards=5, reached=str(reached))
    before += "from fastagglo.train import cache_command\ncache_command._VIEWS_AT_ONCE = 1\n"
    process = tiny.process("cache", "--recipe", tiny.recipe(recipe), before=before)
    deadline = time.monotonic() + 60
    while not reached.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = tiny.folder / "features"
    assert len(list(folder.rglob("*.partial"))) == 1
    whole = len(list(folder.rglob("*.safetensors")))
    assert whole == 4
    work = build(tiny, recipe)
    assert 0 < work.cache.computed < 3 * PHOTOS * CROPS
    sizes = {name: len(store) for name, store in work.cache.stores.items()}
    assert sizes == {"hog": PHOTOS * CROPS * 2, "lite0": PHOTOS * CROPS}
    work.verify(PHOTOS)


def test_ctrl_c_keeps_what_was_computed(tiny, settings, monkeypatch):
    real = CacheWork._compute

    def interrupted(work, photos):
        real(work, photos)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastagglo.train.cache_command._VIEWS_AT_ONCE", 1)
        patch.setattr(CacheWork, "_compute", interrupted)
        stopped = command(settings(), tiny)
    assert (stopped.status, stopped.err) == (
        2,
        "error: stopped; the same command goes on from here\n",
    )
    assert build(tiny, settings()).cache.computed == 3 * CROPS * (PHOTOS - 1)


def test_a_run_may_go_on_with_another_cache(tiny, settings, interrupt):
    _, whole = tiny.trained(settings(folder=None), "whole")
    folder = tiny.folder / "run"
    folder.mkdir()
    interrupt(1)
    assert not tiny.trainer(settings()).run(folder)
    shutil.rmtree(tiny.folder / "features")
    resumed = tiny.trainer(settings(folder="other"), resume=folder)
    assert resumed.run(folder)
    for ours, theirs in zip(losses(folder), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_builders_at_once(tiny, settings):
    recipe = tiny.recipe(settings())
    processes = [tiny.process("cache", "--recipe", recipe) for _ in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    work = CacheWork(tiny.config(settings()), CPU)
    assert len(work.cache.stores["hog"]) == PHOTOS * CROPS * 2
    work.verify(PHOTOS)


def test_ranks_share_the_photos(tiny, settings):
    recipe = tiny.recipe(settings())
    train = Path(__file__).parents[2] / "train.py"
    with_torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*with_torchrun, "--standalone", str(train), "cache", "--recipe", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hog:") == 1  # one rank speaks
    work = build(tiny, settings())
    assert work.cache.computed == 0
    assert len(work.cache.stores["lite0"]) == PHOTOS * CROPS
    # Each rank wrote half of the photos.
    sizes = [len(load_file(p)["addresses"]) for p in work.cache.stores["lite0"].folder.iterdir()]
    assert sizes == [PHOTOS * CROPS // 2] * 2


def test_a_full_disk_ends_a_build_and_not_a_run(tiny, settings, monkeypatch):
    def full(store, *arguments):
        raise UserError(f"setting cache.folder: {store.folder} cannot be written (full)")

    monkeypatch.setattr(FeatureStore, "_write", full)
    built = command(settings(), tiny)
    assert built.status == 2
    assert "cannot be written (full)" in built.err
    with pytest.warns(UserWarning, match="no more features are stored.*full"):
        _, folder = tiny.trained(settings())
    assert len(losses(folder)) == 4


def test_the_command_needs_no_more_than_its_recipe(tiny, settings, capsys):
    main(["--recipe", str(tiny.recipe(settings())), "--data.crops-per-photo", "1"])
    assert f"{PHOTOS} photos x 1 crops" in capsys.readouterr().out


def test_groups_without_addresses_go_through_the_teachers(tiny, settings):
    cache = FeatureCache(tiny.config(settings()), CPU)
    plain = tiny.trainer(settings({"data": {"crops_per_photo": 0}}, folder=None))
    groups = plain.stream[0].groups
    found = cache.features(groups)
    expected = teacher_features(plain.teachers, groups, plain.config.teachers)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ours:
            assert torch.equal(ours[name].spatial, theirs[name].spatial)
    assert cache.counts() == {"read": 0, "computed": 0, "damaged": 0}
