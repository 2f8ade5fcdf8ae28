"""What it costs to share a model over GPUs, by arithmetic: bytes held and bytes sent."""

from __future__ import annotations

from fastagglo.model import Student
from fastagglo.train.config import RunConfig


def model_bytes(config: RunConfig, student: Student, gpus: int) -> dict[str, int]:
    """Bytes of weights and what belongs to them on each of ``gpus`` GPUs, by part.

    Args:
        config: the run.
        student: its student, on any device.
        gpus: ranks of the run.
    """
    count, blocks = _counts(student)
    bf16 = config.optimiser.precision == "bf16"
    share = _shard(config, gpus)
    if config.distributed.strategy == "ddp":
        parameters = 4 * count + (2 * count if bf16 else 0)  # and autocast's copies
        gradients = 4 * count * (2 if gpus > 1 else 1)  # DDP's buckets are a copy
    else:
        # A block and the next at a time; what is no block stays for a whole pass.
        rest = count - sum(blocks)
        gathered = 2 * max(blocks) * (2 if bf16 else 4) + rest * (6 if bf16 else 4)
        parameters = 4 * count // share + gathered
        gradients = 4 * count // share + 4 * max(2 * max(blocks), rest)
        if config.optimiser.accumulate > 1:
            gradients += _wire(config) * count  # whole until the last micro-step
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimiser": 8 * count // share,
        "average student": 4 * count // share if config.distill.ema_decay else 0,
    }


def sent_bytes(config: RunConfig, student: Student, gpus: int) -> tuple[int, int]:
    """Bytes that a GPU sends over the network in a step, in rings: of weights and of gradients.

    With ``distributed.shard`` shards are taken to lie in one node, and only what passes between
    nodes counts.
    """
    count, blocks = _counts(student)
    wire = _wire(config)
    if config.distributed.strategy == "ddp":
        return 0, 2 * wire * count * (gpus - 1) // gpus
    share = _shard(config, gpus)
    if share < gpus:
        copies = gpus // share
        return 0, 2 * wire * count // share * (copies - 1) // copies
    whole = sum(blocks) * (2 if config.optimiser.precision == "bf16" else 4)
    whole += 4 * (count - sum(blocks))
    # The forward and the backward pass gather, and the average student's forward pass.
    passes = config.optimiser.accumulate * (3 if config.distill.mesa_weight > 0 else 2)
    return passes * whole * (gpus - 1) // gpus, wire * count * (gpus - 1) // gpus


def _counts(student: Student) -> tuple[int, list[int]]:
    """Parameters of all, and of each block that is gathered by itself."""
    blocks = [*student.blocks, *(b for bs in student.head_blocks.values() for b in bs)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return sum(p.numel() for p in student.parameters()), sizes


def _shard(config: RunConfig, gpus: int) -> int:
    """GPUs that hold one copy of the model together."""
    settings = config.distributed
    return 1 if settings.strategy == "ddp" else settings.shard or gpus


def _wire(config: RunConfig) -> int:
    """Bytes of an element of a gradient on its way."""
    return 2 if config.distributed.reduce == "bfloat16" else 4
