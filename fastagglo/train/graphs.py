"""The student's step as a CUDA graph: all its launches are one call of the driver.

`torch.cuda.make_graphed_callables` captures forward and backward; here is what it asks for: a
module whose arguments are tensors alone, at addresses of its own. Not yet run on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastagglo.errors import UserError
from fastagglo.model import Student
from fastagglo.model.budget import BudgetInputs, BudgetOutput, BudgetRun
from fastagglo.ops import PackedLayout


def check_graphs(device: torch.device, world: int) -> None:
    """Refuse graphs where there can be none.

    Raises:
        UserError: on another device than a GPU, or with several ranks.
    """
    if device.type != "cuda":
        raise UserError(
            f"setting student.graphs is true: a CUDA graph needs a GPU, and this run is on "
            f"{device}; set it to false"
        )
    if world > 1:
        raise UserError(
            f"setting student.graphs is true: gradients are averaged over the {world} ranks while "
            "the backward pass runs, which a graph does not hold; set it to false"
        )


class GraphedRun:
    """Computes what ``run`` does, from a CUDA graph.

    Each kind of step (which student, train or eval, with gradients or without, frozen trunk,
    windows, capacity, precision) is captured when it first comes, after three trial runs; all share
    one pool of memory, since no two of them are ever under way at once.

    Weights are read where they are, so they must be changed in place. Outputs and gradients are
    overwritten by the next call of the same kind: see `own_gradients`.

    Args:
        run: `run_budget`, or `torch.compile` of it.
    """

    def __init__(self, run: BudgetRun) -> None:
        self.run = run
        self._graphs: dict[tuple[Any, ...], Callable[..., tuple[Tensor, ...]]] = {}
        self._pool: Any = None

    def __call__(
        self,
        student: Student,
        inputs: BudgetInputs,
        rotations: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> BudgetOutput:
        given = [*tensors_of(inputs), *rotations.values()]
        device = inputs.patches.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        key = (
            *(id(student), student.training, torch.is_grad_enabled(), tuple(names), autocast),
            tuple(parameter.requires_grad for parameter in student.parameters()),
            tuple(rotations),
            # Windows are further tensors.
            tuple((x.shape, x.dtype) for x in given),
        )
        if key not in self._graphs:
            step = _Step(self.run, student, inputs, tuple(rotations), tuple(names), autocast)
            self._graphs[key] = self._capture(step, given)
        summary, rows, *rest = self._graphs[key](*given)
        found, kinds = iter(rest), (student.heads.summary, student.heads.spatial)
        outputs = {
            name: tuple(next(found) if name in kind else None for kind in kinds) for name in names
        }
        return summary, rows, outputs

    def _capture(self, step: _Step, given: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        options: dict[str, Any] = {"pool": self._pool, "allow_unused_input": True}
        capture = torch.cuda.make_graphed_callables
        if "capture_error_mode" in inspect.signature(capture).parameters:
            # Other threads pin the next batches meanwhile.
            options["capture_error_mode"] = "thread_local"
        # Copies, for the graph reads its arguments in place: the batch's own are kept elsewhere.
        own = tuple(x.clone() for x in given)
        # The step brings its own autocast, so that its backward is captured without, as it runs.
        with torch.autocast(own[0].device.type, enabled=False):
            return capture(step, own, **options)


class _Step(nn.Module):
    """A step as a function of tensors: what else it needs is the same for all steps of a kind."""

    def __init__(
        self,
        run: BudgetRun,
        student: Student,
        inputs: BudgetInputs,
        rotations: tuple[str, ...],
        names: tuple[str, ...],
        autocast: tuple[bool, torch.dtype],
    ) -> None:
        super().__init__()
        self.student = student
        self.step = run, inputs, rotations, names, autocast

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """CLS tokens, rows, and for each teacher what there is of summary and spatial tokens."""
        run, inputs, rotations, names, (enabled, dtype) = self.step
        device, rest = given[0].device.type, iter(given)
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            inputs = with_tensors(inputs, rest)
            turns = dict(zip(rotations, rest, strict=True))
            summary, rows, outputs = run(self.student, inputs, turns, names)
        pairs = (x for name in names for x in outputs[name])
        return summary, rows, *(x for x in pairs if x is not None)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, dataclasses and layouts, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedLayout):
        yield from _buffers(value).values()
    elif isinstance(value, tuple):
        for entry in value:
            yield from tensors_of(entry)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, those of `tensors_of` in its order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, PackedLayout):
        found = {name: next(tensors) for name in _buffers(value)}
        boundaries = found["cu_seqlens"], found["cu_seqlens_cpu"]
        layout = PackedLayout(*boundaries, value.capacity, value.tile_rows, value.max_segments)
        if "tiles" in found:
            vars(layout)["tiles"] = found["tiles"]
        return layout
    if isinstance(value, tuple):
        return tuple(with_tensors(entry, tensors) for entry in value)
    if is_dataclass(value):
        entries = {f.name: with_tensors(getattr(value, f.name), tensors) for f in fields(value)}
        return type(value)(**entries)
    return value


def _buffers(layout: PackedLayout) -> dict[str, Tensor]:
    names = ("cu_seqlens", "cu_seqlens_cpu", "tiles")  # the last where kernels read it
    return {name: vars(layout)[name] for name in names if name in vars(layout)}


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero gradients to which all micro-steps of a step are added.

    Without any, the first micro-step's gradient would be the graph's own memory, which the next
    one overwrites.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()
