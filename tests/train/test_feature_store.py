"""Shards of teacher features: what comes back, what is not served, files complete or absent."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.train import feature_store
from fastagglo.train.feature_store import FeatureStore, relative_error


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
