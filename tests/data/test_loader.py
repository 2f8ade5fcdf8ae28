"""Batches on their way to the device: ahead of time, in order, and with errors in their turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastagglo.data import CropStream, GroupPlan, PhotoSource, StepPlan, TrainBatch, make_loader
from fastagglo.data import loader as loader_module
from fastagglo.errors import UserError

PLAN = StepPlan((GroupPlan(16, 3, {"a": 16, "b": 24}), GroupPlan(32, 2, {"a": 32}, 0.5, 8)))


def stream(**options: object) -> CropStream:
    return CropStream(PhotoSource(), lambda step: PLAN, seed=5, **options)  # type: ignore[arg-type]


def tensors(batch: TrainBatch) -> list[torch.Tensor]:
    return [
        tensor
        for group in batch.groups
        for tensor in (group.student, *group.teachers.values(), *group.shifts.values())
    ]


def equal(one: TrainBatch, two: TrainBatch) -> bool:
    return (
        one.step == two.step
        and one.keys == two.keys
        and all(map(torch.equal, tensors(one), tensors(two)))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(workers: int) -> None:
    """What StatefulDataLoader keeps in a state is here a function of the step alone."""
    whole = list(make_loader(stream(), 0, 9, workers=0))
    assert 9 * PLAN.images > 2 * len(PhotoSource())  # epochs end between and within steps
    for start in (1, 4, 8):
        loader = make_loader(stream(), start, 9, workers=workers)
        rest = [next(loader) for _ in range(9 - start)]
        assert [batch.step for batch in rest] == list(range(start, 9))
        assert all(map(equal, rest, whole[start:]))


def test_a_device_without_streams_is_copied_to_as_asked() -> None:
    for device in ("meta", torch.device("meta")):
        batches = list(make_loader(stream(), 0, 2, device=device))
        assert {tensor.device.type for batch in batches for tensor in tensors(batch)} == {"meta"}
        assert batches[0].groups[0].teachers["a"] is batches[0].groups[0].student
    assert all(map(equal, make_loader(stream(), 0, 2, device="cpu"), make_loader(stream(), 0, 2)))


class FakeCuda:
    """Streams that write down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
        self.log, self.active, self.copies, self.given = log, "main", 0, 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(TrainBatch, "to", self.to)
        monkeypatch.setattr(TrainBatch, "record_stream", self.record)
        monkeypatch.setattr(TrainBatch, "pin_memory", lambda batch: batch)

    @contextmanager
    def on(self, stream: FakeCuda) -> Iterator[None]:
        self.active = "copies"
        yield
        self.active = "main"

    def to(self, device: torch.device, non_blocking: bool = False) -> str:
        assert (device.type, non_blocking, self.active) == ("cuda", True, "copies")
        self.log.append(f"copy {self.copies}")
        self.copies += 1
        return FakeBatch(self)

    def record(self, stream: FakeCuda) -> None:
        raise AssertionError("of the batch on the host")

    def record_event(self) -> str:
        assert self.active == "copies"
        return f"{self.copies - 1}"

    def wait_event(self, event: str) -> None:
        assert self.active == "main"
        self.log.append(f"wait {event}")


class FakeBatch:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.number = cuda, cuda.copies - 1

    def record_stream(self, stream: FakeCuda) -> None:
        assert stream.active == "main"
        self.cuda.log.append(f"keep {self.number}")


def test_on_cuda_one_batch_is_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    FakeCuda(monkeypatch, log)
    for batch in make_loader(stream(), 0, 3, device="cuda"):
        log.append(f"use {batch.number}")
    assert log == [
        *("copy 0", "wait 0", "keep 0", "copy 1", "use 0"),
        *("wait 1", "keep 1", "copy 2", "use 1"),
        *("wait 2", "keep 2", "use 2"),
    ]


def test_an_error_ahead_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(CropStream):
        def __getitem__(self, step: int) -> TrainBatch:
            if step == 1:
                raise UserError("no more photos")
            return super().__getitem__(step)

    log: list[str] = []
    FakeCuda(monkeypatch, log)
    batches = make_loader(Broken(PhotoSource(), lambda step: PLAN, seed=0), 0, 3, device="cuda")
    assert next(batches).number == 0
    with pytest.raises(UserError, match="no more photos"):
        next(batches)


def test_no_more_batches_are_held_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow device must not fill the memory with batches that wait for it."""
    made: list[int] = []
    held = loader_module.DataLoader

    class Counted(held):  # type: ignore[misc, valid-type]
        def __init__(self, dataset: object, **options: object) -> None:
            made.append(options["prefetch_factor"])  # type: ignore[arg-type]
            super().__init__(dataset, **options)

    monkeypatch.setattr(loader_module, "DataLoader", Counted)
    loader = make_loader(stream(), 0, 50, workers=1, prefetch=3)
    next(loader)
    assert made == [3]
    loader.close()  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_the_batches_are_the_same(workers: int) -> None:
    right = list(make_loader(stream(), 0, 6))
    for found, batch in zip(
        make_loader(stream(), 0, 6, workers=workers, device="cuda"), right, strict=True
    ):
        assert found.groups[0].student.device.type == "cuda"
        assert found.groups[0].teachers["a"] is found.groups[0].student
        torch.cuda._sleep(1_000_000)  # the next copy overtakes, and must not touch this batch
        assert equal(found.to("cpu"), batch)
