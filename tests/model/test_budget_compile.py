"""One compiled graph for every mix of images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastagglo.model import HeadSpec, PackedBatch, Student, create_student, run_budget
from fastagglo.model.budget import slots

HEADS = {
    "a": HeadSpec(summary=5, spatial=6, upsample=2),
    "b": HeadSpec(spatial=8, spatial_blocks=1),
}
ROWS, IMAGES = 90, 11


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def student() -> Student:
    torch.manual_seed(0)
    return create_student(
        "tiny",
        heads=HEADS,
        depth=2,
        global_layers=1,
        registers=2,
        max_resolution=128,
        drop_path=0.1,
    )


def mix(random: np.random.Generator) -> PackedBatch:
    """One to eleven images of 32, 64 and 96 pixels, in this order or another, at most 90 tokens."""
    groups, left = [], ROWS
    for size in random.permutation([32, 64, 96]):
        most = left // ((size // 16) ** 2 + 4)
        count = int(random.integers(0, most + 1))
        left -= count * ((size // 16) ** 2 + 4)
        groups.append(torch.from_numpy(random.integers(0, 256, (count, 3, size, size), np.uint8)))
    if all(len(group) == 0 for group in groups):
        groups.append(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    return PackedBatch.from_images(groups, ROWS, IMAGES)


def loss_of(model: Student, batch: PackedBatch, **options: object) -> Tensor:
    output = model(batch, **options)
    values = [x for f in output.values() for x in (f.summary, *(f.spatial or ())) if x is not None]
    return sum(x.square().sum() for x in (*values, *output.backbone.spatial))


def test_one_graph_for_200_mixes() -> None:
    model, random = student(), np.random.default_rng(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(run_budget, backend=counter, fullgraph=True, dynamic=False)
    rotation, seen = torch.eye(6), set()
    for step in range(200):
        batch = mix(random)
        seen.add(tuple(g.shape for g in batch.groups if len(g)))
        torch.manual_seed(step)
        loss = loss_of(model, batch, rotations={"a": rotation}, run=run)
        loss.backward()
        if step % 50 == 49:
            found = {n: p.grad.clone() for n, p in model.named_parameters()}
            optimiser.zero_grad()
            torch.manual_seed(step)
            eager = loss_of(model, batch, rotations={"a": rotation})
            eager.backward()
            # The same operators in the same order, but for what the compiler rewrites.
            torch.testing.assert_close(loss, eager)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
        optimiser.step()
        optimiser.zero_grad()
        if step == 100:
            rotation.copy_(torch.linalg.qr(torch.randn(6, 6))[0])  # PHI-S has settled
    assert len(seen) > 30  # mixes
    assert counter.frame_count == 1


def test_windows_are_a_second_graph() -> None:
    """Steps with windows, of whatever size, and steps without."""
    model, random = student(), np.random.default_rng(0)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(run_budget, backend=counter, fullgraph=True, dynamic=False)
    for window in (2, None, 2, None, 2):
        loss_of(model, mix(random), window=window, run=run).backward()
    assert counter.frame_count == 2
    shapes = set()
    for window in (8, 16, 32):
        grids = ((1, 32, 32),)
        place = slots(grids, 4, 2, window, 1100, 4, torch.device("cpu"))
        shapes.add((place.windows.layout.cu_seqlens.shape, place.windows.layout.tiles.shape))
    assert len(shapes) == 1
