"""The works of the scaling curves made ready: inputs once, then one call a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench import student_peers
from bench.scaling_cases import Attention, Case, Heads, Step, Trunk
from fastagglo.model import HeadSpec, PackedBatch, Student
from fastagglo.model.config import preset
from fastagglo.ops import (
    AdaptorHeads,
    LossTerm,
    PackedLayout,
    multi_teacher_loss,
    packed_attention_qkv,
)


@dataclass(frozen=True)
class Ready:
    """A work that can be called: a ``Run`` of `bench.engine`.

    Attributes:
        call: one step.
        input_bytes: of inputs and parameters.
        info: nothing more to say.
    """

    call: Callable[[], Any]
    input_bytes: int
    info: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.call()

    def results(self) -> dict[str, Tensor]:
        """Nothing is compared: there are no peers."""
        return {}


def prepare(case: Case, device: str) -> Any:
    """The ``Run`` of a point: bfloat16 on CUDA, float32 on a CPU."""
    return _READY[type(case.work)](case.work, device)


def dtype_of(device: str) -> torch.dtype:
    """Of inputs and parameters."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def attention(work: Attention, device: str) -> Ready:
    """Forward alone, on a fused projection."""
    layout = PackedLayout.from_lengths([work.tokens] * work.images, device=device)
    shape = (work.images * work.tokens, 3, *work.heads)
    random = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(shape, generator=random, device=device, dtype=dtype_of(device))
    return Ready(lambda: packed_attention_qkv(qkv, layout), qkv.nbytes)


def trunk(work: Trunk, device: str) -> student_peers.Run:
    """As the student's own benchmarks run it."""
    return student_peers.ours(student_peers.Batch.of(work.case, device))


def heads(work: Heads, device: str) -> Ready:
    """From the student's tokens to the gradients of all."""
    dtype = dtype_of(device)
    torch.manual_seed(0)
    names = [f"t{n}" for n in range(work.teachers)]
    with torch.device(device):
        module = AdaptorHeads(work.width, {n: HeadSpec(spatial=work.out) for n in names}).to(dtype)
        x = torch.randn(work.rows, work.width, dtype=dtype, requires_grad=True)
        shape = (work.images, work.side, work.side, work.out)
        targets = [torch.randn(shape, dtype=dtype) for _ in names]
    wanted = [x, *module.parameters()]

    def call() -> tuple[Tensor, ...]:
        found = module(None, x)
        predictions = [spatial.view(shape) for _, spatial in found.values()]
        loss = multi_teacher_loss(predictions, targets, [LossTerm("mse")] * len(names))
        return torch.autograd.grad(loss.total, wanted)

    return Ready(call, sum(value.nbytes for value in (*wanted, *targets)))


def step(work: Step, device: str) -> Any:
    """Processes of their own."""
    from bench.scaling_ranks import Ranks

    return Ranks(work, device)


_READY: dict[type, Callable[[Any, str], Any]] = {
    Attention: attention,
    Trunk: trunk,
    Heads: heads,
    Step: step,
}


# --- the step of a rank ---------------------------------------------------------------------------


class Distilled(nn.Module):
    """A student with heads and its loss against targets that lie ready; nothing is drawn."""

    def __init__(self, work: Step) -> None:
        super().__init__()
        specs = {f"t{n}": HeadSpec(spatial=work.out) for n in range(work.teachers)}
        self.student = Student(preset(work.student, specs)).eval()

    def forward(self, images: list[Tensor], targets: list[Tensor]) -> Tensor:
        """The loss of these images, 0-d."""
        out = self.student(PackedBatch.from_images(images))
        predictions = [out[name].spatial[0] for name in self.student.config.heads]
        return multi_teacher_loss(predictions, targets, [LossTerm("mse")] * len(targets)).total


def inputs_of(work: Step, rank: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Images and targets of a rank, others for each."""
    random = torch.Generator(device).manual_seed(rank)
    pixels = work.side * preset(work.student).patch_size
    size = (work.images, 3, pixels, pixels)
    images = torch.randint(256, size, generator=random, device=device, dtype=torch.uint8)
    shape = (work.images, work.side, work.side, work.out)
    dtype = dtype_of(device)
    targets = [
        torch.randn(shape, generator=random, device=device, dtype=dtype)
        for _ in range(work.teachers)
    ]
    return [images], targets
