"""Parameters that FSDP2 has cut into shards (DTensors), outside forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, of which a rank holds a part."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. A collective call where it is sharded, else nothing is done."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def as_shard(value: Tensor, like: object) -> Tensor:
    """This rank's part of a whole tensor, which is the same on all ranks; nothing is sent.

    Args:
        value: any device and dtype; they stay where ``like`` is not sharded.
        like: a DTensor, whose dtype, device and place among ranks the result has, or anything else.

    Returns:
        A DTensor, or ``value`` itself if ``like`` is none.

    Raises:
        ValueError: the shapes differ.
    """
    if not is_sharded(like):
        return value
    if value.shape != like.shape:
        raise ValueError(f"expected the shape {tuple(like.shape)}, got {tuple(value.shape)}")
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.to_local().device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """``tensor.copy_(value)`` of a whole value, the same on all ranks, also into shards."""
    tensor.copy_(as_shard(value, tensor))
