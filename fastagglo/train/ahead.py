"""Teachers one batch ahead: on a CUDA stream of their own, while the student goes backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from fastagglo.data import GroupViews, TrainBatch
from fastagglo.features import Features

__all__ = ["Ahead", "Targets"]


@dataclass(frozen=True)
class Targets:
    """What the teachers say of a batch.

    Attributes:
        features: of each image group, by teacher.
        flops: that the teachers have computed for it.
    """

    features: list[dict[str, Features]]
    flops: int


@dataclass(frozen=True)
class _Prepared:
    batch: TrainBatch
    targets: Targets
    fetched: torch.cuda.Event | None
    done: torch.cuda.Event | None


class Ahead(Iterator[TrainBatch]):
    """Batches whose targets are already on their way.

    `prepare` fetches the next batch and sends it through the teachers. Called when the student's
    backward has been queued, it gives the device both to do at once, and it has queued the
    teachers before the optimiser waits for the gradient's norm. Frozen teachers depend on nothing
    that a step changes, so the features are the same as in turn.

    On a CUDA device data and teachers use a stream of their own, which the student's stream waits
    for where it reads their results. Elsewhere all is done in turn.

    Args:
        batches: on ``device``.
        compute: the teachers, for the groups of a batch.
        phase: `Telemetry.phase`, on the student's stream: "data" and "teachers" are then the time
            for which the student stands still.
        device: of the student and the teachers.
    """

    def __init__(
        self,
        batches: Iterator[TrainBatch],
        compute: Callable[[Sequence[GroupViews]], Targets],
        phase: Callable[[str], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        self._batches, self._compute, self._phase = batches, compute, phase
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # The teachers' weights were put there by the stream that is current now.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._next: _Prepared | Exception | None = None
        self._given: _Prepared | None = None

    def prepare(self) -> None:
        """Fetch the next batch and start the teachers on it, unless that has been done.

        An error, also that there are no more batches, waits for the batch's turn.
        """
        if self._next is not None:
            return
        try:
            with self._phase("data"), self._own_stream():
                batch = next(self._batches)
                fetched = self._event()
            with self._phase("teachers"), self._own_stream():
                targets = self._compute(batch.groups)
                self._next = _Prepared(batch, targets, fetched, self._event())
        except Exception as error:
            self._next = error

    def __next__(self) -> TrainBatch:
        self._given = None  # its memory may be used again
        self.prepare()
        prepared, self._next = self._next, None
        if isinstance(prepared, Exception):
            raise prepared
        self._given = prepared
        if prepared.fetched is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(prepared.fetched)
            # Made on another stream: its memory is not free before this one is done with it.
            prepared.batch.record_stream(current)
        return prepared.batch

    def targets(self) -> Targets:
        """Of the batch that was given out last; the current stream waits for them."""
        prepared = self._given
        if prepared is None:
            raise RuntimeError("targets() comes after next()")
        if prepared.done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(prepared.done)
            for group in prepared.targets.features:
                for features in group.values():
                    for value in (features.summary, features.spatial):
                        if value is not None:
                            value.record_stream(current)
        return prepared.targets

    def _own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _event(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()
