"""Batches in the order of their steps, made ahead by worker processes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from fastagglo.data.nvjpeg import Decode, decode_crops, nvjpeg
from fastagglo.data.plan import TrainBatch, check_int
from fastagglo.data.stream import CropStream
from fastagglo.errors import UserError


@dataclass(frozen=True)
class _Failure:
    message: str


class _Steps(Dataset["TrainBatch | _Failure"]):
    """The stream, with the errors meant for the user sent as values: DataLoader would put the
    worker's traceback into the message, which must stay one line."""

    def __init__(self, stream: CropStream) -> None:
        self.stream = stream

    def __getitem__(self, step: int) -> TrainBatch | _Failure:
        try:
            return self.stream[step]
        except UserError as error:
            return _Failure(str(error))


def make_loader(
    stream: CropStream,
    start: int,
    stop: int,
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[TrainBatch]:
    """The batches of steps ``start`` to ``stop - 1``, in order, the same for any ``workers``.

    Args:
        stream: where they come from. With workers it must survive pickling where processes are
            spawned and not forked.
        start: the first step; a resumed run gives its step number.
        stop: one past the last step.
        workers: processes that make batches; 0 makes them here, when they are asked for.
        prefetch: batches made ahead by each worker, at least 1; no more are ever held.
        pin: put batches into page-locked memory, for a GPU that copies while it computes.
        device: where the batches go; None leaves them on the CPU. To a CUDA device they go by way
            of page-locked memory and on a stream of their own, each while the device computes on
            the one before it.

    Raises:
        UserError: what the stream raises, with its own message, also from a worker. Other errors
            of a worker keep their type; their message holds the worker's traceback.
        TypeError, ValueError: an argument of another kind or out of range; a stream of encoded
            crops and a device that is not CUDA.
    """
    start = check_int("start", start, 0)
    stop = check_int("stop", stop, 0)
    workers = check_int("workers", workers, 0)
    prefetch = check_int("prefetch", prefetch, 1)
    device = None if device is None else torch.device(device)
    cuda = device is not None and device.type == "cuda"
    batches = _batches(stream, range(start, stop), workers, prefetch, pin or cuda)
    if stream.encoded and not cuda:
        raise ValueError(f"a stream of encoded crops needs a CUDA device, got {device}")
    if cuda:
        return _copied_ahead(batches, device, nvjpeg(device) if stream.encoded else None)
    return batches if device is None else (batch.to(device) for batch in batches)


def _copied_ahead(
    batches: Generator[TrainBatch, None, None], device: torch.device, decoder: Decode | None
) -> Iterator[TrainBatch]:
    """Batches on a CUDA device, one ahead.

    The stream that is current when a batch is asked for waits for its copy; the host does not. An
    error that comes with the batch ahead is raised when that batch's turn comes.
    """
    copies = torch.cuda.Stream(device)

    def ahead() -> tuple[TrainBatch, torch.cuda.Event] | Exception | None:
        try:
            batch = next(batches, None)
            if batch is None:
                return None
            with torch.cuda.stream(copies):
                batch = batch.to(device, non_blocking=True)
                if decoder is not None:
                    batch = decode_crops(batch, decoder)
                return batch, copies.record_event()
        except Exception as error:
            return error

    try:
        following = ahead()
        while following is not None:
            if isinstance(following, Exception):
                raise following
            batch, copied = following
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            # Its memory belongs to the stream of the copies: not to be used again before this one.
            batch.record_stream(current)
            following = ahead()
            yield batch
            del batch
    finally:
        batches.close()


def _batches(
    stream: CropStream, steps: range, workers: int, prefetch: int, pin: bool
) -> Generator[TrainBatch, None, None]:
    if not steps:
        return
    if workers:
        stream.first_position(steps.start)  # counted once here, not in every worker
    loader = DataLoader(
        _Steps(stream),
        batch_size=None,
        sampler=steps,
        num_workers=min(workers, len(steps)),
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
    )
    batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch
    except Exception as error:
        if not workers:
            raise
        # The message holds the worker's traceback; this process's own would keep the dead loader
        # alive, which then ends its workers at any later moment, waiting seconds for them.
        raise error.with_traceback(None) from None
    finally:
        del batches
