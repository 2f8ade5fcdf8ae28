"""Fixed crops: the same in every epoch and run, with an address that follows what is seen."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from fastagglo.data import (
    BadImage,
    CropStream,
    Filters,
    GroupPlan,
    GroupViews,
    Source,
    StepPlan,
    Subset,
    eval_views,
    make_loader,
)
from fastagglo.data import fixed as fixed_module
from fastagglo.data.crops import Box
from fastagglo.data.fixed import rendering, view_address
from fastagglo.features import Features


def photo(seed: int, kind: str = "PNG", size: tuple[int, int] = (48, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


class Files(Source):
    def __init__(self, count: int = 6) -> None:
        self.files = [photo(seed) for seed in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return f"file{index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


PLAN = GroupPlan(32, 6, {"a": 32, "b": 16})
SHIFTED = GroupPlan(32, 6, {"a": 32, "b": 16}, 1.0, 8)


def stream(
    plan: GroupPlan = PLAN, source: Source | None = None, crops: int = 2, **options: object
) -> CropStream:
    def planner(step: int) -> StepPlan:
        return StepPlan((plan,))

    options = {"seed": 0} | options
    return CropStream(source or Files(), planner, fixed_crops=crops, **options)


def by_address(groups: list[GroupViews], name: str) -> dict[bytes, torch.Tensor]:
    """Each view by its address; two views of one address must be equal."""
    found: dict[bytes, torch.Tensor] = {}
    for group in groups:
        for address, view in zip(group.addresses[name], group.teachers[name], strict=True):
            assert torch.equal(found.setdefault(address, view), view)
    return found


@pytest.mark.parametrize("plan", [PLAN, SHIFTED], ids=["plain", "shifted"])
def test_each_photo_shows_all_its_crops_in_turn(plan: GroupPlan) -> None:
    epochs = [stream(plan)[step].groups[0] for step in range(4)]  # 6 photos a step
    for name in ("a", "b"):
        assert len(by_address(epochs[:1], name)) == 6
        assert len(by_address(epochs[:2], name)) == 12
        assert len(by_address(epochs, name)) == 12  # from here on none is new
    if plan.shift_std:
        pairs = [pair for g in epochs for pair in zip(g.addresses["a"], g.shifts["a"], strict=True)]
        first = dict(reversed(pairs))
        assert all(torch.equal(first[address], shift) for address, shift in pairs)


def test_crops_do_not_depend_on_run_rank_workers_or_other_photos() -> None:
    def addresses(*groups: GroupViews) -> set[bytes]:
        return {address for group in groups for address in group.addresses["b"]}

    crops = addresses(*(stream()[step].groups[0] for step in (0, 1)))
    assert addresses(*(stream(seed=9)[step].groups[0] for step in (0, 1))) == crops
    ranks = [stream(seed=5, rank=rank, world=2)[0].groups[0] for rank in (0, 1)]
    assert addresses(*ranks) == crops
    here = [stream()[step].groups[0].addresses for step in range(3)]
    workers = make_loader(stream(), 0, 3, workers=2)
    assert [batch.groups[0].addresses for batch in workers] == here
    fewer = stream(source=Subset(Files(), [1, 2, 4]))
    assert addresses(fewer[0].groups[0]) <= crops
    assert addresses(*(stream(crop_seed=1)[s].groups[0] for s in (0, 1))).isdisjoint(crops)


def test_a_crop_is_the_same_at_every_resolution() -> None:
    other = GroupPlan(48, 6, {"a": 48, "b": 16})
    small, large = stream()[0].groups[0], stream(other)[0].groups[0]
    assert small.addresses["b"] == large.addresses["b"]
    assert torch.equal(small.teachers["b"], large.teachers["b"])
    assert set(small.addresses["a"]).isdisjoint(large.addresses["a"])


@pytest.mark.parametrize("plan", [PLAN, SHIFTED], ids=["plain", "shifted"])
def test_fixed_views_are_those_of_training(plan: GroupPlan) -> None:
    training = [stream(plan)[step].groups[0] for step in (0, 1)]
    alone = [stream(plan).fixed_views(index, [plan])[0] for index in range(6)]
    for name in ("a", "b"):
        ours, theirs = by_address(alone, name), by_address(training, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[address], theirs[address]) for address in ours)


def test_shifted_views_of_one_size_have_addresses_of_their_own() -> None:
    plan = GroupPlan(32, 6, {"a": 32, "b": 32}, 2.0, 8)
    group = stream(plan)[0].groups[0]
    different = 0
    for row in range(6):
        same = torch.equal(group.teachers["a"][row], group.teachers["b"][row])
        assert same == (group.addresses["a"][row] == group.addresses["b"][row])
        different += not same
    assert different > 0


def test_fixed_views_say_which_photos_are_bad() -> None:
    source = Files()
    source.files[2] = b"no picture"
    with pytest.raises(BadImage):
        stream(source=source).fixed_views(2, [PLAN])
    small = stream(filters=Filters(min_size=100))
    with pytest.raises(BadImage):
        small.fixed_views(0, [PLAN])


def test_other_bytes_have_another_address() -> None:
    source, changed = Files(), Files()
    changed.files[3] = photo(99)
    before = [stream(source=source).fixed_views(i, [PLAN])[0].addresses["a"] for i in range(6)]
    after = [stream(source=changed).fixed_views(i, [PLAN])[0].addresses["a"] for i in range(6)]
    assert [b == a for b, a in zip(before, after, strict=True)] == [i != 3 for i in range(6)]
    assert set(before[3]).isdisjoint(after[3])


def test_a_held_out_strip_changes_the_address() -> None:
    whole, part = stream().fixed_views(0, [PLAN])[0], stream(region=0.3).fixed_views(0, [PLAN])[0]
    assert set(whole.addresses["a"]).isdisjoint(part.addresses["a"])


def test_every_part_of_an_address_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses() -> list[bytes]:
        box = Box(1.0, 2.0, 3.0, 4.0)
        return [
            view_address(b"f", (9, 1), box, False, 32),
            view_address(b"g", (9, 1), box, False, 32),
            view_address(b"f", (8, 1), box, False, 32),
            view_address(b"f", (9, 2), box, False, 32),
            view_address(b"f", (9, 1), box._replace(top=2.0000001), False, 32),
            view_address(b"f", (9, 1), box, True, 32),
            view_address(b"f", (9, 1), box, False, 48),
        ]

    found = addresses()
    assert len(set(found)) == 7
    assert {len(address) for address in found} == {16}
    assert view_address(b"f", (9, 1), Box(*np.float64([1, 2, 3, 4])), False, 32) == found[0]
    monkeypatch.setattr(fixed_module, "rendering", lambda: b"another decoder")
    assert set(addresses()).isdisjoint(found)


@pytest.mark.parametrize("part", ["render", "resize", "cut"])
def test_another_rendering_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastagglo.data import stream as stream_module

    before, real = rendering(), getattr(stream_module, part)

    def off_by_one(*arguments: object, **named: object) -> object:
        return real(*arguments, **named) ^ 1

    monkeypatch.setattr(stream_module, part, off_by_one)
    assert rendering.__wrapped__() != before
    monkeypatch.undo()
    assert rendering.__wrapped__() == before


class Reader:
    """Has the features of some addresses: the first byte of each."""

    def __init__(self, has: Callable[[bytes], bool]) -> None:
        self.has = has

    def read(self, teacher: str, address: bytes) -> Features | None:
        value = torch.tensor([float(address[0])])
        return Features(value, value.view(1, 1, 1)) if self.has(address) else None


def test_views_with_stored_features_are_not_made() -> None:
    known = set(stream()[0].groups[0].addresses["b"])
    group = stream(reader=Reader(known.__contains__))[0].groups[0]
    assert group.student.shape == (6, 3, 32, 32)
    assert group.teachers["b"].shape == (0, 3, 16, 16)
    assert group.missing == {"a": tuple(range(6)), "b": ()}
    assert group.teachers["a"] is group.student
    assert torch.equal(
        group.features["b"].summary, torch.tensor([[float(a[0])] for a in group.addresses["b"]])
    )
    assert group.features["b"].spatial.shape == (6, 1, 1, 1)


def test_of_a_part_only_the_missing_views_are_made() -> None:
    plain = stream()[0].groups[0]
    known = set(plain.addresses["b"][1:3])
    group = stream(reader=Reader(known.__contains__))[0].groups[0]
    assert group.missing["b"] == (0, 3, 4, 5)
    for row in group.missing["b"]:
        assert torch.equal(group.teachers["b"][row], plain.teachers["b"][row])
    assert not group.features["b"].summary[[0, 3, 4, 5]].any()


def test_held_out_views_have_addresses_when_asked() -> None:
    (plain,) = eval_views(Files(2), PLAN, "photos")
    assert plain.addresses == {}
    (group,) = eval_views(Files(2), PLAN, "photos", addressed=True)
    assert torch.equal(group.student, plain.student)
    assert len(set(group.addresses["a"]) | set(group.addresses["b"])) == 8
    assert group.missing == {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}
    (strip,) = eval_views(Files(2), PLAN, "regions", addressed=True)
    assert set(strip.addresses["a"]).isdisjoint(group.addresses["a"])


def test_a_reader_needs_fixed_crops() -> None:
    with pytest.raises(ValueError, match="fixed_crops of at least 1"):
        stream(crops=0, reader=Reader(lambda address: True))
    with pytest.raises(ValueError, match="fixed_crops must be at least 0"):
        stream(crops=-1)
    assert stream(crops=0)[0].groups[0].addresses == {}
