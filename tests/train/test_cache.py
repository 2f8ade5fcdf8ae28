"""Stored teacher features: what is served, what is not, and files that are complete or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
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


def some_features(count: int, grid: int = 3, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(count)
    spatial = torch.randn(count, grid, grid, 8, generator=generator) * torch.arange(8) + 50
    summary = torch.randn(count, 5, generator=generator)
    # As a teacher gives them: float32 that holds values of its own dtype.
    return Features(summary.to(dtype).float(), spatial.to(dtype).float())


def addresses(count: int, start: int = 0) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(start, start + count)]


def filled(folder: Path, storage: str = "teacher", dtype: torch.dtype = torch.float32):
    store = FeatureStore(folder, dtype, storage)
    features = some_features(4, dtype=dtype)
    store.put(addresses(4), store.encode(features))
    store.flush()
    return FeatureStore(folder, dtype, storage), features


# The store.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_teachers_own_dtype_comes_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype):
    store, features = filled(tmp_path, dtype=dtype)
    assert len(store) == 4
    for row, address in enumerate(addresses(4)):
        found = store.read(address)
        assert found.summary.dtype == found.spatial.dtype == dtype
        assert torch.equal(found.summary.float(), features.summary[row])
        assert torch.equal(found.spatial.float(), features.spatial[row])
    assert store.read(b"\xff" * 16) is None
    # No larger than that dtype, but for addresses, checksums and the header.
    size = sum(v.numel() for v in (features.summary, features.spatial)) * dtype.itemsize
    assert store.nbytes() < size + 4 * 24 + 600


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_half_precision_rounds_once(tmp_path: Path, storage: str):
    store, features = filled(tmp_path, storage)
    kept = getattr(torch, storage)
    for row, address in enumerate(addresses(4)):
        assert torch.equal(store.read(address).spatial, features.spatial[row].to(kept))
        assert torch.equal(store.read(address).summary, features.summary[row].to(kept))


def test_int8_is_off_by_at_most_half_a_step(tmp_path: Path):
    store, features = filled(tmp_path, "int8")
    for row, address in enumerate(addresses(4)):
        found = store.read(address)
        assert torch.equal(found.summary, features.summary[row])
        spatial = features.spatial[row]
        step = (spatial.amax((0, 1)) - spatial.amin((0, 1))) / 254
        # Channel 0 is constant: exact. The rest of the bound is fp32 rounding of values near 50.
        assert torch.equal(found.spatial[..., 0], spatial[..., 0])
        assert ((found.spatial - spatial).abs() <= step / 2 + 50 * 2**-22).all()
        assert (found.spatial - spatial).abs().amax() > step.amax() / 8


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path):
    store = FeatureStore(tmp_path, torch.float32, "float16")
    features = Features(None, torch.full((1, 2, 2, 3), 7e4))
    with pytest.raises(UserError, match=r"setting cache\.storage is 'float16'.*reach 7e\+04"):
        store.encode(features)


def test_what_is_not_finite_is_not_stored(tmp_path: Path):
    store = FeatureStore(tmp_path, torch.float32, "teacher")
    features = some_features(3)
    features.spatial[1, 0, 0, 0] = torch.nan
    store.put(addresses(3), store.encode(features))
    assert [address in store for address in addresses(3)] == [True, False, True]


def test_what_waits_is_read_and_stored_once(tmp_path: Path):
    store = FeatureStore(tmp_path, torch.float32, "teacher")
    first, second = some_features(2), some_features(3)
    store.put(addresses(2), store.encode(first))
    store.put(addresses(3), store.encode(second))
    assert torch.equal(store.read(addresses(1)[0]).spatial, first.spatial[0])
    assert not list(tmp_path.iterdir())
    store.flush()
    again = FeatureStore(tmp_path, torch.float32, "teacher")
    assert len(again) == 3
    assert torch.equal(again.read(addresses(1)[0]).spatial, first.spatial[0])
    assert torch.equal(again.read(addresses(3)[2]).spatial, second.spatial[2])


def test_shards_are_written_when_enough_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FeatureStore(tmp_path, torch.float32, "teacher")
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 1000)
    store.put(addresses(4), store.encode(some_features(4)))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 1e9)
    monkeypatch.setattr(feature_store, "SHARD_SECONDS", 0.0)
    store.put(addresses(1, 9), store.encode(some_features(1, grid=2)))
    time.sleep(0.01)
    store.put(addresses(1, 10), store.encode(some_features(1, grid=4)))  # one shard a shape
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_reader_sees_what_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_store, "_LOOK_SECONDS", 0.0)
    reader = FeatureStore(tmp_path / "later", torch.float32, "teacher")
    assert reader.read(addresses(1)[0]) is None
    filled(tmp_path / "later")
    assert reader.read(addresses(1)[0]) is not None


def test_a_damaged_entry_is_not_served_and_can_be_made_again(tmp_path: Path):
    _, features = filled(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["spatial"][2, 1, 1, 1] += 1
    save_file(tensors, shard)
    store = FeatureStore(tmp_path, torch.float32, "teacher")
    with pytest.warns(UserWarning, match=r"row 2 of .* is damaged"):
        assert store.read(addresses(4)[2]) is None
    assert torch.equal(store.read(addresses(4)[1]).spatial, features.spatial[1])
    store.put(addresses(4), store.encode(features))
    store.flush()
    for reader in (store, FeatureStore(tmp_path, torch.float32, "teacher")):
        assert torch.equal(reader.read(addresses(4)[2]).spatial, features.spatial[2])


@pytest.mark.parametrize("left", [0, 5, 400])
def test_a_shard_that_is_cut_short_is_not_used(tmp_path: Path, left: int):
    _, features = filled(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.warns(UserWarning, match="is damaged"):
        store = FeatureStore(tmp_path, torch.float32, "teacher")
    assert len(store) == 0
    store.put(addresses(4), store.encode(features))
    store.flush()  # takes the place of the damaged one
    assert torch.equal(store.read(addresses(1)[0]).spatial, features.spatial[0])
    assert len(FeatureStore(tmp_path, torch.float32, "teacher")) == 4


def test_unfinished_files_are_no_shards_and_old_ones_go(tmp_path: Path):
    store, _ = filled(tmp_path)
    old, new = tmp_path / "a.1.partial", tmp_path / "b.2.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert len(FeatureStore(tmp_path, torch.float32, "teacher")) == 4
    store.sweep()
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path):
    store, features = filled(tmp_path)
    store.put(addresses(40, 100), store.encode(some_features(40)))
    limits, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(UserError, match=r"setting cache\.folder: .* cannot be written"):
            store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert not list(tmp_path.glob("*.partial"))
    again = FeatureStore(tmp_path, torch.float32, "teacher")
    assert len(again) == 4
    assert torch.equal(again.read(addresses(1)[0]).spatial, features.spatial[0])


def test_relative_error_is_of_the_deviation():
    features = some_features(4)
    rows = [Features(features.summary[i], features.spatial[i]) for i in range(4)]
    assert relative_error(features, [*rows[:3], None]) == [0.0, 0.0, 0.0, None]
    flat = features.spatial.flatten(0, 2)
    deviation = (flat - flat.mean(0)).square().mean().sqrt()
    rows[1] = Features(rows[1].summary, rows[1].spatial + 0.5)
    rows[2] = Features(rows[2].summary, rows[2].spatial[:2])
    found = relative_error(features, rows)
    assert found[0] == 0
    assert found[1] == pytest.approx(float(0.5 / deviation))
    assert found[2] == float("inf")


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
    shutil.copytree(tiny.photos, photos)
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


def test_two_builders_at_once_and_ranks(tiny, settings):
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
