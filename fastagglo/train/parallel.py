"""How the ranks of a run share one model: a replica on each (DDP), or shards of it (FSDP2).

Checkpoints know nothing of it: rank 0 writes whole tensors under the names of one process, so that
a run goes on under another strategy and with another number of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastagglo.errors import UserError
from fastagglo.model import Student
from fastagglo.model.vit import Block
from fastagglo.ops.sharded import as_shard, is_sharded
from fastagglo.train.config import DistributedSettings
from fastagglo.train.distributed import is_main, rank_and_world

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Statistics differ between ranks, so buffers are never sent; before torch 2.13 by another name.
_OWN_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def check_ranks(settings: DistributedSettings, world: int) -> None:
    """Refuse what these settings cannot do on this number of ranks.

    Raises:
        UserError: names the setting, its value and what would do.
    """
    start = "start several with torchrun, or leave the setting out"
    if world == 1 and settings.strategy == "fsdp2":
        raise UserError(
            "setting distributed.strategy is 'fsdp2': one process has no others to share the "
            f"model with; {start}"
        )
    if world == 1 and settings.reduce == "bfloat16":
        raise UserError(
            "setting distributed.reduce is 'bfloat16': one process has no gradients to average; "
            f"{start}"
        )
    if settings.shard and world % settings.shard:
        fitting = [str(n) for n in range(2, world + 1) if world % n == 0]
        raise UserError(
            f"setting distributed.shard is {settings.shard}: it must divide the {world} ranks; "
            f"{', '.join(fitting)} would do, or 0 for all of them"
        )


class Parallel:
    """The ranks of a run and how they share its model.

    Args:
        settings: of the run.
        device: of this process.

    Attributes:
        sharded: whether each rank holds a part of the weights only.

    Raises:
        UserError: settings that this number of ranks does not allow.
    """

    def __init__(self, settings: DistributedSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.world = rank_and_world()[1]
        check_ranks(settings, self.world)
        self.sharded = settings.strategy == "fsdp2"

    # Before the first step.

    def start_alike(self, module: nn.Module) -> None:
        """Give every rank the parameters of rank 0."""
        if self.world > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), src=0)

    def shard(self, root: nn.Module, student: Student, *, half: bool = False) -> None:
        """Leave this rank its part of a module's parameters, where the strategy is to.

        Blocks are gathered one by one as they run, all heads together, and what is left with the
        root. Each time they are given up after the forward pass: so whoever reads parameters
        between steps (folding, the average, the optimiser) always finds the shards.

        Args:
            root: the module that is called.
            student: in it, or itself.
            half: it runs under bfloat16 autocast. Blocks are then gathered in bfloat16, in half
                the traffic: autocast's own copies of their weights would be kept for the backward
                pass, whole, on every rank. (Their norms and LayerScales are rounded too.)
        """
        if not self.sharded:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Of the heads' outputs, which nothing here changes in place.
        warnings.filterwarnings("ignore", message=".*returned a view tensor", module="torch")
        mesh = self._mesh
        own = next(student.parameters()).dtype
        reduce = torch.bfloat16 if self.settings.reduce == "bfloat16" else own
        policy = MixedPrecisionPolicy(reduce_dtype=reduce)
        of_blocks = dataclasses.replace(
            policy, param_dtype=torch.bfloat16 if half else None, cast_forward_inputs=False
        )
        for module in student.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=of_blocks)
        for module in (student.heads, root):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        """All ranks in a row, or in rows that shard among themselves and replicate each other."""
        from torch.distributed.device_mesh import init_device_mesh

        size = self.settings.shard or self.world
        if size == self.world:
            return init_device_mesh(self.device.type, (size,), mesh_dim_names=("shard",))
        # The ranks of a node have consecutive numbers, so that neighbours share a row.
        shape, names = (self.world // size, size), ("replicate", "shard")
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    # In a step.

    def wrap(self, module: nn.Module) -> nn.Module:
        """What to call in the place of ``module``, until other parameters are to learn."""
        if self.world == 1 or self.sharded:
            return module
        wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=False,
            init_sync=False,  # of parameters, too: they are alike
            **{_OWN_BUFFERS: False},
        )
        if self.settings.reduce == "bfloat16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    @contextmanager
    def micro_step(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-step; gradients are averaged over ranks in the last."""
        if self.sharded:
            module.set_requires_gradient_sync(last)
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
        else:
            yield

    def mean(self, losses: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Means over ranks of 0-d losses that the ranks may have under other names each.

        A collective call. A loss that a rank lacks counts as 0 there, as it does in the gradients;
        one that all ranks lack is NaN. Nothing waits for the device.

        Args:
            losses: of this rank.
            names: what they may be called, the same on all ranks.
        """
        if self.world == 1:
            return dict(losses)
        both = torch.zeros(2, len(names), device=self.device)
        for place, name in enumerate(names):
            if name in losses:
                both[0, place], both[1, place] = losses[name], 1
        dist.all_reduce(both)
        means = torch.where(both[1] > 0, both[0] / self.world, torch.nan)
        return dict(zip(names, means.unbind(), strict=True))

    # Whole weights.

    def whole_state(self, value: Any) -> Any:
        """A nested state with whole tensors on the CPU of rank 0 in the place of shards.

        A collective call; on other ranks None stands for each sharded tensor. Without shards it is
        the state as it came.
        """
        if not self.sharded:
            return value
        if is_sharded(value):
            # One after the other, so that the device never holds more than one of them.
            full = value.full_tensor()
            return full.cpu() if is_main() else None
        if isinstance(value, Mapping):
            return {key: self.whole_state(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.whole_state(entry) for entry in value)
        return value

    def whole(self, module: AnyModule, make: Callable[[], AnyModule]) -> AnyModule | None:
        """On rank 0 a module with whole weights: this one if it has them, else a copy.

        A collective call; None on other ranks.

        Args:
            module: with or without shards.
            make: makes a module of the same structure.
        """
        if not self.sharded:
            return module if is_main() else None
        state = self.whole_state(module.state_dict())
        if not is_main():
            return None
        with torch.device(self.device):
            copy = make()
        copy.load_state_dict(state)
        return copy

    def load(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """``module.load_state_dict`` of a whole state."""
        if self.sharded:
            own = module.state_dict()
            state = {name: as_shard(value, own.get(name)) for name, value in state.items()}
        module.load_state_dict(state)

    def load_optimiser(self, optimiser: Optimizer, state: Mapping[str, Any]) -> None:
        """``optimiser.load_state_dict`` of a whole state.

        torch's own helpers for sharded optimisers want a state of every parameter, which frozen
        ones and heads that have just been rotated do not have.
        """
        if self.sharded:
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            shards = {
                index: {
                    name: as_shard(value, parameters[index]) if _is_averaged(value) else value
                    for name, value in values.items()
                }
                for index, values in state["state"].items()
            }
            state = {**state, "state": shards}
        optimiser.load_state_dict(state)


def _is_averaged(value: object) -> bool:
    """Whether an optimiser keeps one such number for each of a parameter; a step count is 0-d."""
    return isinstance(value, torch.Tensor) and value.dim() > 0
