"""The few places where a run knows of other ranks; one process alone needs none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fastagglo.errors import UserError


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def choose_device(setting: str) -> torch.device:
    """The device of this process: its own GPU under torchrun, else the first, else the CPU.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("setting device is 'cuda', but torch sees no CUDA device; use cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks when started by torchrun, and leave them at the end.

    Raises:
        UserError: the ranks cannot meet after torchrun has started them again.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun's store outlives its workers, and the addresses of the dead are still in it
    # (pytorch issue 135712). On one node all ranks agree on the count; on several they need not.
    if restarted() and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {count}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        try:
            dist.init_process_group(backend)
        except RuntimeError as error:
            if not restarted():
                raise
            raise UserError(
                f"the ranks cannot meet after restart {count} ({error}); set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node"
            ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_agree(flag: bool, device: torch.device) -> bool:
    """True if the flag is true on every rank."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)
