"""The stream: a pure function of the step, fair to every image, and honest about bad ones."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastagglo.data import (
    CropStream,
    Filters,
    FolderSource,
    GroupPlan,
    GroupViews,
    Mixture,
    SkipCounter,
    Source,
    StepPlan,
    TrainBatch,
    build_source,
    make_loader,
    split,
)
from fastagglo.data.order import MixtureOrder, ShardOrder, make_order
from fastagglo.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


class Files(Source):
    """Bytes in memory, in shards."""

    def __init__(self, files: list[bytes], shards: list[int] | None = None) -> None:
        self.files = files
        self._shards = shards or [len(files)]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return f"file{index}"

    def read(self, index: int) -> bytes:
        return self.files[index]

    @property
    def shards(self) -> list[int]:
        return self._shards


def png(array: np.ndarray = NOISE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


GOOD = png()


def fixed(*groups: GroupPlan) -> Callable[[int], StepPlan]:
    return lambda step: StepPlan(groups)


MIXED = fixed(GroupPlan(16, 3, {"a": 16, "b": 24}), GroupPlan(32, 2, {"a": 32}, 0.5, 8))


def same(one: TrainBatch, two: TrainBatch) -> bool:
    def tensors(group: GroupViews) -> list[torch.Tensor]:
        return [group.student, *group.teachers.values(), *group.shifts.values()]

    return (
        one.keys == two.keys
        and one.skipped == two.skipped
        and one.bad == two.bad
        and one.step == two.step
        and one.plan == two.plan
        and len(one.groups) == len(two.groups)
        and all(
            a.keys == b.keys
            and a.teachers.keys() == b.teachers.keys()
            and all(map(torch.equal, tensors(a), tensors(b)))
            for a, b in zip(one.groups, two.groups, strict=True)
        )
    )


# A pure function of the step


def test_batches_do_not_depend_on_workers_or_on_the_past() -> None:
    def stream() -> CropStream:
        data = split(build_source("builtin"))
        return CropStream(data.train, MIXED, seed=7, region=data.region)

    here = list(make_loader(stream(), 0, 5))
    assert [batch.step for batch in here] == [0, 1, 2, 3, 4]
    for batch, other in zip(here, make_loader(stream(), 0, 5, workers=2), strict=True):
        assert same(batch, other)
    resumed = list(make_loader(stream(), 3, 5, workers=1, prefetch=1))
    assert len(resumed) == 2
    assert all(map(same, here[3:], resumed))
    again = stream()
    for step in (4, 0, 2, 2):
        assert same(again[step], here[step])


def test_seeds_steps_and_slots_differ() -> None:
    source = Files([GOOD] * 50)
    plan = fixed(GroupPlan(16, 4))
    stream = CropStream(source, plan, seed=0)
    other = CropStream(source, plan, seed=1)
    assert stream[0].keys != other[0].keys
    crops = torch.cat([s[step].groups[0].student for s in (stream, other) for step in (0, 1)])
    assert len(torch.unique(crops.flatten(1), dim=0)) == 16  # no two crops are alike


def test_batch_carries_step_plan_and_keys() -> None:
    plan = StepPlan((GroupPlan(16, 2), GroupPlan(8, 0, {"a": 4}, 0.5, 8)), window=4)
    batch = CropStream(Files([GOOD] * 9), lambda step: plan, seed=0)[11]
    assert batch.step == 11
    assert batch.plan is plan
    assert batch.keys == list(batch.groups[0].keys)
    assert batch.groups[1].student.shape == (0, 3, 8, 8)
    assert batch.groups[1].teachers["a"].shape == (0, 3, 4, 4)
    assert batch.groups[1].shifts["a"].shape == (0, 2)
    assert batch.skipped == {}
    assert batch.bad == []


def test_shared_views_stay_shared_through_a_worker_and_a_move() -> None:
    (batch,) = make_loader(CropStream(Files([GOOD] * 9), MIXED, seed=0), 0, 1, workers=1)
    group = batch.groups[0]
    assert group.teachers["a"] is group.student
    assert group.teachers["b"] is not group.student
    moved = batch.to("meta")
    assert moved.groups[0].student.device.type == "meta"
    assert moved.groups[0].teachers["a"] is moved.groups[0].student
    assert moved.groups[1].shifts["a"].device.type == "meta"
    assert moved.keys == batch.keys


def test_stream_can_be_sent_to_a_spawned_worker() -> None:
    stream = CropStream(build_source("builtin"), _plan, seed=3)
    batch = stream[2]
    assert same(pickle.loads(pickle.dumps(stream))[2], batch)


def _plan(step: int) -> StepPlan:
    return StepPlan((GroupPlan(16, 1 + step % 3),))


# Each image once per epoch


@pytest.mark.parametrize("shards", [None, [5, 1, 30, 2, 8, 7, 3, 9, 4, 10, 6, 11]])
def test_an_epoch_holds_each_image_once_over_all_ranks(shards: list[int] | None) -> None:
    source = Files([GOOD] * 96, shards)
    plan = fixed(GroupPlan(8, 5), GroupPlan(8, 3))
    ranks = [CropStream(source, plan, seed=2, rank=rank, world=3) for rank in range(3)]
    epochs = [
        [
            key
            for step in range(4 * epoch, 4 * epoch + 4)
            for rank in ranks
            for key in rank[step].keys
        ]
        for epoch in range(3)
    ]
    for keys in epochs:
        assert sorted(keys) == sorted(source.key(i) for i in range(96))
    assert epochs[0] != epochs[1] != epochs[2]


def test_plans_of_changing_size_leave_nothing_out() -> None:
    source = Files([GOOD] * 60)

    def planner(step: int) -> StepPlan:
        return StepPlan((GroupPlan(8, step % 5),))  # 0, 1, 2, 3, 4: ten images in five steps

    ranks = [CropStream(source, planner, seed=0, rank=rank, world=2) for rank in range(2)]
    keys = [key for step in range(15) for rank in ranks for key in rank[step].keys]
    assert sorted(keys) == sorted(source.key(i) for i in range(60))
    # A stream that starts late counts the steps before.
    assert same(CropStream(source, planner, seed=0, rank=1, world=2)[14], ranks[1][14])


def test_world_size_changes_who_sees_what_but_not_what_is_seen() -> None:
    source = Files([GOOD] * 40)
    one = CropStream(source, fixed(GroupPlan(8, 8)), seed=5)
    two = [
        CropStream(source, fixed(GroupPlan(8, 4)), seed=5, rank=rank, world=2) for rank in (0, 1)
    ]
    for step in range(3):
        halves = [stream[step] for stream in two]
        assert one[step].keys == halves[0].keys + halves[1].keys
        views = torch.cat([half.groups[0].student for half in halves])
        assert torch.equal(one[step].groups[0].student, views)


def test_shards_are_read_a_few_at_a_time() -> None:
    order = ShardOrder([10] * 40, seed=0)
    first = [order.index(position) for position in range(400)]
    assert sorted(first) == list(range(400))
    for window in range(5):
        shards = {index // 10 for index in first[window * 80 : (window + 1) * 80]}
        assert len(shards) == 8
    assert first != sorted(first)
    second = [order.index(position) for position in range(400, 800)]
    assert {index // 10 for index in second[:80]} != {index // 10 for index in first[:80]}
    # Neighbours come from several shards: a shard of one class makes no batch of one class.
    assert len({index // 10 for index in first[:16]}) > 4


def test_mixture_proportions_are_exact_and_parts_have_epochs_of_their_own() -> None:
    small, large = Files([GOOD] * 7), Files([GOOD] * 5000)
    mixture = Mixture([(small, 1.0), (large, 3.0)])
    order = make_order(mixture, 9)
    assert isinstance(order, MixtureOrder)
    indices = np.array([order.index(position) for position in range(20_000)])
    assert (indices[:10_000] < 7).sum() == 2500
    assert (indices[10_000:] < 7).sum() == 2500
    of_small = indices[indices < 7]
    for epoch in range(0, 700, 7):
        assert sorted(of_small[epoch : epoch + 7]) == list(range(7))
    of_large = indices[indices >= 7] - 7
    for epoch in range(0, 15_000, 5000):
        assert len(set(of_large[epoch : epoch + 5000])) == 5000
    # Mixed finely: 100 neighbours hold 25 of the small one, standard deviation 4.3; 5 of them.
    assert abs((indices[:100] < 7).sum() - 25) < 22
    batch = CropStream(mixture, fixed(GroupPlan(8, 40)), seed=9)[0]
    assert len(batch.keys) == 40


def test_mixture_with_tiny_weights_and_a_mixture_inside() -> None:
    a, b, c = (Files([GOOD] * 10) for _ in range(3))
    order = make_order(Mixture([(Mixture([(a, 1), (b, 1)]), 1.0), (c, 1e-9)]), 0)
    counts = Counter(order.index(position) // 10 for position in range(10_000))
    assert counts[2] == 1  # rounded up to once in 10,000
    assert abs(counts[0] - counts[1]) <= 1


# Bad images


def test_bad_files_are_replaced_counted_and_named() -> None:
    files = [GOOD] * 12
    files[3] = b""
    files[5] = GOOD[:60]
    files[8] = b"<html>"
    source = Files(files)
    stream = CropStream(source, fixed(GroupPlan(8, 12)), seed=0)
    batch = stream[0]
    assert len(batch.keys) == 12
    assert not {"file3", "file5", "file8"} & set(batch.keys)
    assert batch.skipped["corrupt"] >= 3
    assert set(batch.skipped) == {"corrupt"}
    assert len(batch.bad) == min(8, batch.skipped["corrupt"])
    assert {key for key, _ in batch.bad} == {"file3", "file5", "file8"}
    assert {reason for _, reason in batch.bad} == {"corrupt"}
    assert same(CropStream(source, fixed(GroupPlan(8, 12)), seed=0)[0], batch)
    # The good ones are where they would be without the bad ones.
    clean = CropStream(Files([GOOD] * 12), fixed(GroupPlan(8, 12)), seed=0)[0]
    for key, clean_key, view, clean_view in zip(
        batch.keys, clean.keys, batch.groups[0].student, clean.groups[0].student, strict=True
    ):
        if clean_key not in {"file3", "file5", "file8"}:
            assert key == clean_key
            assert torch.equal(view, clean_view)


def test_examples_of_bad_files_are_few() -> None:
    stream = CropStream(Files([b""] * 30 + [GOOD] * 30), fixed(GroupPlan(8, 60)), seed=0)
    batch = stream[0]
    assert batch.skipped["corrupt"] > 8
    assert len(batch.bad) == 8


def test_replacement_in_a_mixture_comes_from_the_same_source() -> None:
    broken_and_one = Files([b""] * 3 + [GOOD])
    other = Files([GOOD] * 50)
    stream = CropStream(
        Mixture([(broken_and_one, 1.0), (other, 1.0)]),
        fixed(GroupPlan(8, 50)),
        seed=1,
        max_attempts=64,
    )
    order = make_order(stream.source, 1)
    from_first = sum(order.index(position) < 4 for position in range(50))
    # Of the first source only file3 can be used, so each of its places holds file3.
    batch = stream[0]
    assert batch.keys.count("file3") - from_first in (0, 1)  # the other source has a file3 as well
    assert batch.skipped["corrupt"] > 0


def test_all_bad_ends_with_names_and_counts() -> None:
    stream = CropStream(Files([b""] * 5), fixed(GroupPlan(8, 1)), seed=0, max_attempts=4)
    with pytest.raises(UserError, match=r"4 images in a row .* \(4 corrupt\).*'file\d'") as caught:
        stream[0]
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_counted(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(GOOD)
    source = FolderSource(tmp_path)
    (tmp_path / "b.png").unlink()
    batch = CropStream(source, fixed(GroupPlan(8, 4)), seed=0)[0]
    assert set(batch.skipped) == {"unreadable"}
    assert "b.png" not in batch.keys


def test_filter_of_small_images_is_exact() -> None:
    files = [png(NOISE[:h, :w]) for h, w in ((16, 16), (15, 30), (24, 15), (16, 32))]
    stream = CropStream(Files(files), fixed(GroupPlan(8, 16)), seed=0, filters=Filters(min_size=16))
    batch = stream[0]
    assert set(batch.keys) == {"file0", "file3"}
    assert set(batch.skipped) == {"too_small"}


def test_filter_of_uniform_images() -> None:
    flat = np.full((40, 40, 3), 200, dtype=np.uint8)
    nearly = flat + np.random.default_rng(0).integers(0, 3, flat.shape, dtype=np.uint8)  # std 0.8
    one_channel = flat.copy()
    one_channel[..., 2] = NOISE[0, 0, 0] + np.arange(40)
    stripe = np.full((40, 40, 3), 10, dtype=np.uint8)
    stripe[:, 30:] = 250  # uniform once the held-out strip is cut off
    source = Files([png(a) for a in (flat, nearly, one_channel, stripe, NOISE)])
    plan = fixed(GroupPlan(8, 20))
    batch = CropStream(source, plan, seed=0, filters=Filters(uniform_std=2.0))[0]
    assert set(batch.keys) == {"file2", "file3", "file4"}
    assert set(batch.skipped) == {"uniform"}
    cut = CropStream(source, plan, seed=0, filters=Filters(uniform_std=2.0), region=0.25)[0]
    assert set(cut.keys) == {"file2", "file4"}
    assert CropStream(source, plan, seed=0)[0].skipped == {}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decoded_photos_do_not_wait(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops are drawn ahead, of photos that are still files: decoded ones are large."""
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, kind)
    source = Files([file.getvalue()] * 40)
    drawn, shown, ahead = CropStream._drawn, CropStream._shown, [0]

    def count(function: Callable, by: int) -> Callable:
        def called(*arguments: object) -> object:
            ahead.append(ahead[-1] + by)
            return function(*arguments)

        return called

    monkeypatch.setattr(CropStream, "_drawn", count(drawn, 1))
    monkeypatch.setattr(CropStream, "_shown", count(shown, -1))
    batch = CropStream(source, fixed(GroupPlan(8, 40)), seed=0)[0]
    assert len(set(batch.keys)) == 40
    assert max(ahead) == (1 if kind == "PNG" else 16)


def test_filter_of_duplicates() -> None:
    other = png(NOISE[:20])
    source = Files([GOOD, other, GOOD, GOOD])
    plan = fixed(GroupPlan(8, 8))
    batch = CropStream(source, plan, seed=0, filters=Filters(duplicates=True), max_attempts=64)[0]
    assert set(batch.keys) == {"file0", "file1"}
    assert set(batch.skipped) == {"duplicate"}
    assert len(set(CropStream(source, plan, seed=0)[0].keys)) == 4


def test_pixel_limit() -> None:
    source = Files([GOOD, png(NOISE[:8])])
    batch = CropStream(source, fixed(GroupPlan(8, 6)), seed=0, max_pixels=32 * 8)[0]
    assert set(batch.keys) == {"file1"}
    assert set(batch.skipped) == {"too_large"}


def test_skip_counter() -> None:
    counter = SkipCounter(limit_fraction=0.1, min_count=5)
    counter.update({"corrupt": 4}, 1)  # far above the share, but few
    counter.update({}, 95)
    counter.update({"too_small": 6}, 0)
    assert counter.counts == {"corrupt": 4, "too_small": 6}
    assert counter.images == 96
    assert counter.skipped == 10  # 10 of 106: below 10 %
    with pytest.raises(UserError) as caught:
        counter.update({"corrupt": 1}, 1, [("shard/7", "corrupt")])
    assert str(caught.value).startswith(
        "11 of 108 images cannot be used (5 corrupt, 6 too_small), more than the limit of 10.0%; "
        "for example 'shard/7' (corrupt)"
    )


def test_skip_counter_limits() -> None:
    SkipCounter(limit_fraction=1.0, min_count=1).update({"corrupt": 1000}, 0)
    with pytest.raises(UserError, match=r"1 of 1000 images .*limit of 0\.0%"):
        SkipCounter(limit_fraction=0.0, min_count=1).update({"corrupt": 1}, 999)
    with pytest.raises(ValueError, match="limit_fraction must be between"):
        SkipCounter(limit_fraction=1.5)
    with pytest.raises(ValueError, match="min_count must be at least 1"):
        SkipCounter(min_count=0)


# Errors and the loader


def test_stream_errors() -> None:
    source = Files([GOOD])
    plan = fixed(GroupPlan(8, 1))
    with pytest.raises(UserError, match="no images"):
        CropStream(Files([]), plan, seed=0)
    with pytest.raises(TypeError, match="source must be a Source, got str"):
        CropStream("builtin", plan, seed=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="planner must be callable"):
        CropStream(source, StepPlan(()), seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be below world 2, got 2"):
        CropStream(source, plan, seed=0, rank=2, world=2)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        CropStream(source, plan, seed=-1)
    with pytest.raises(ValueError, match="region must be below 1"):
        CropStream(source, plan, seed=0, region=1.0)
    with pytest.raises(ValueError, match="max_attempts"):
        CropStream(source, plan, seed=0, max_attempts=0)
    with pytest.raises(ValueError, match="step must be at least 0"):
        CropStream(source, plan, seed=0)[-1]
    with pytest.raises(TypeError, match="planner must return a StepPlan, got list"):
        CropStream(source, lambda step: [], seed=0)[0]  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="uniform_std must be between"):
        Filters(uniform_std=300)
    with pytest.raises(TypeError, match="duplicates must be a bool"):
        Filters(duplicates=1)  # type: ignore[arg-type]


def test_loader_errors() -> None:
    stream = CropStream(Files([GOOD]), fixed(GroupPlan(8, 1)), seed=0)
    assert list(make_loader(stream, 3, 3, workers=2)) == []
    assert list(make_loader(stream, 5, 3)) == []
    with pytest.raises(ValueError, match="workers must be at least 0"):
        make_loader(stream, 0, 1, workers=-1)
    with pytest.raises(ValueError, match="prefetch must be at least 1"):
        make_loader(stream, 0, 1, prefetch=0)
    with pytest.raises(TypeError, match="stop must be an int"):
        make_loader(stream, 0, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_user_errors_of_workers_keep_their_message(workers: int) -> None:
    stream = CropStream(Files([b""] * 5), fixed(GroupPlan(8, 1)), seed=0, max_attempts=2)
    with pytest.raises(UserError, match="2 images in a row") as caught:
        list(make_loader(stream, 0, 2, workers=workers))
    assert str(caught.value).startswith("2 images in a row")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_workers_keep_their_type(workers: int) -> None:
    def planner(step: int) -> StepPlan:
        if step == 1:
            raise ZeroDivisionError("the planner's own mistake")
        return StepPlan((GroupPlan(8, 1),))

    loader = make_loader(CropStream(Files([GOOD]), planner, seed=0), 0, 3, workers=workers)
    assert next(loader).step == 0
    with pytest.raises(ZeroDivisionError, match="the planner's own mistake"):
        next(loader)


def test_unfinished_loader_can_be_closed() -> None:
    stream = CropStream(Files([GOOD] * 4), fixed(GroupPlan(8, 2)), seed=0)
    loader = make_loader(stream, 0, 100, workers=1)
    assert next(loader).step == 0
    loader.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(loader)
