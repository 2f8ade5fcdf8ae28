"""Batches on a fixed number of rows: the same numbers and gradients, whatever the dummies hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastagglo.model import (
    HeadSpec,
    PackedBatch,
    Student,
    StudentOutput,
    create_student,
    run_budget,
)
from fastagglo.model.budget import BudgetInputs, BudgetOutput
from fastagglo.model.positions import CroppedPositions

HEADS = {
    "a": HeadSpec(summary=5, spatial=6, upsample=2),
    "b": HeadSpec(spatial=8, spatial_blocks=1),
    "c": HeadSpec(summary=7),
}
RADIO = {
    "patch_bias": False,
    "final_norm": False,
    "feature_normaliser": True,
    "cls": ("all", "other", "c", "a"),
    "summary": ("a", "all"),
    "pixel_mean": (0.1, 0.2, 0.3),
    "registers": 1,
}
# fp64 throughout: sums over at most some hundred rows in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def student(**overrides: Any) -> Student:
    torch.manual_seed(0)
    model = create_student(
        "tiny",
        heads=HEADS,
        **{"depth": 3, "registers": 2, "max_resolution": 128, "layer_scale": 0.5} | overrides,
    )
    if model.feature_normaliser is not None:
        for buffer in model.feature_normaliser.buffers():
            buffer.normal_()
    return model.double()


def images(*groups: tuple[int, int, int], dtype: torch.dtype = torch.uint8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = [
        torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator)
        for n, h, w in groups
    ]
    return found if dtype == torch.uint8 else [x.to(dtype) / 255 for x in found]


MIX = ((2, 64, 32), (0, 32, 32), (1, 96, 96), (3, 32, 32))
PREFIX = 5
USED = 2 * 8 + 36 + 3 * 4 + 6 * PREFIX  # 94
ROWS, IMAGES = 103, 9


def loss_of(output: StudentOutput, weigh: bool = True) -> Tensor:
    values = [output.backbone.summary, *output.backbone.spatial]
    for features in output.values():
        values += [x for x in (features.summary, *(features.spatial or ())) if x is not None]
    return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in values)


def gradients(model: Student) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters()}


def equal(a: StudentOutput, b: StudentOutput) -> None:
    torch.testing.assert_close(a.backbone, b.backbone, **CLOSE)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].summary, b[name].summary, **CLOSE)
        torch.testing.assert_close(a[name].spatial, b[name].spatial, **CLOSE)


def both(
    model: Student, groups: Sequence[Tensor], rows: int = ROWS, count: int = IMAGES, **options: Any
) -> tuple[StudentOutput, StudentOutput]:
    """Outputs of the batch as it is and on fixed rows, with the same random numbers."""
    torch.manual_seed(5)
    plain = model(PackedBatch.from_images(groups), **options)
    torch.manual_seed(5)
    return plain, model(PackedBatch.from_images(groups, rows, count), **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("window", "changes"),
    [
        (None, {}),
        (2, {"global_layers": (1,)}),
        (2, {"global_layers": (2,), "mlp": "swiglu"}),
        (None, {"registers": 0, "checkpoint": True}),
        (2, RADIO),
    ],
    ids=["global", "windows", "windows first", "recompute", "radio"],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64], ids=str)
def test_equals_the_batch_as_it_is(
    training: bool, window: int | None, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    recompute = changes.pop("checkpoint", False) if (changes := dict(changes)) else False
    model = student(**changes).train(training)
    model.checkpoint_blocks = recompute
    groups = images(*MIX, dtype=dtype)
    rotations = {"a": torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]}
    plain, fixed = both(model, groups, window=window, rotations=rotations)
    equal(fixed, plain)
    loss_of(plain).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    loss_of(fixed).backward()
    torch.testing.assert_close(gradients(model), expected, **CLOSE)


def test_stochastic_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(drop_path=0.5)
    # More images are drawn for than there are; the first ones get the same numbers.
    drawn = torch.rand(3, 2, IMAGES, generator=torch.Generator().manual_seed(4))
    crops = torch.rand(IMAGES, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    monkeypatch.setattr(
        Student, "_draw_keep", lambda self, images, like, _: 2.0 * (drawn[..., :images] > 0.5)
    )
    monkeypatch.setattr(CroppedPositions, "draw", lambda self, images, _: crops[:images])
    for window in (None, 2):
        plain, fixed = both(model, images(*MIX), window=window)
        equal(fixed, plain)


def test_only_and_no_heads() -> None:
    model = student()
    plain, fixed = both(model, images(*MIX), only=("c", "a"))
    assert list(fixed) == ["a", "c"]
    equal(fixed, plain)
    plain, fixed = both(model, images(*MIX), only=())
    equal(fixed, plain)
    torch.manual_seed(0)
    bare = create_student("tiny", depth=1, max_resolution=128).double().eval()
    equal(*both(bare, images((1, 32, 32)), rows=20, count=1))


def test_full_to_the_last_row() -> None:
    model = student()
    plain, fixed = both(model, images(*MIX), rows=USED, count=6)
    equal(fixed, plain)


@pytest.mark.parametrize("window", [None, 2])
def test_dummies_may_hold_anything(window: int | None) -> None:
    """NaN pixels in all rows that are no patches change no number and no gradient."""
    model = student()
    batch = PackedBatch.from_images(images(*MIX, dtype=torch.float64), ROWS, IMAGES)
    patches = 2 * 8 + 36 + 3 * 4

    def spoilt(
        model: Student, inputs: BudgetInputs, rotations: Mapping[str, Tensor], names: Sequence[str]
    ) -> BudgetOutput:
        assert len(inputs.patches) == ROWS
        inputs.patches[patches:] = torch.nan
        summary, rows, outputs = run_budget(model, inputs, rotations, names)
        # Nor does what comes out of them, which is cut off.
        dead = torch.arange(ROWS)[:, None] >= patches
        spoil = lambda x: None if x is None else torch.where(dead, torch.nan, x)  # noqa: E731
        missing = torch.arange(IMAGES) >= 6
        for name, (vector, tokens) in outputs.items():
            if vector is not None:
                vector = torch.where(missing[:, None], torch.nan, vector)
            outputs[name] = vector, spoil(tokens)
        return torch.where(missing[:, None, None], torch.nan, summary), spoil(rows), outputs

    found = []
    for run in (run_budget, spoilt):
        torch.manual_seed(5)
        model.zero_grad(set_to_none=True)
        output = model(batch, window=window, run=run)
        loss = loss_of(output)
        loss.backward()
        found.append((loss, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name


def test_shapes_are_constant() -> None:
    model = student()
    shapes = []

    def spy(
        model: Student, inputs: BudgetInputs, rotations: Mapping[str, Tensor], names: Sequence[str]
    ) -> BudgetOutput:
        summary, rows, outputs = run_budget(model, inputs, rotations, names)
        slots = inputs.slots
        tensors = [inputs.patches, inputs.uniform, summary, rows]
        tensors += [x for pair in outputs.values() for x in pair if x is not None]
        tensors += [x for x in vars(slots).values() if isinstance(x, Tensor)]
        for layout in (slots.layout, slots.patch_layout, slots.windows.layout):
            tensors += [layout.cu_seqlens, layout.cu_seqlens_cpu, layout.tiles]
        shapes.append([(x.shape, x.dtype, x.stride()) for x in tensors])
        return summary, rows, outputs

    mixes = [((1, 64, 64),), MIX[:1], ((1, 32, 32), (1, 64, 32)), ((9, 32, 32),)]
    for mix in mixes:
        batch = PackedBatch.from_images(images(*mix), ROWS, IMAGES)
        loss_of(model(batch, window=2, run=spy)).backward()
    assert all(found == shapes[0] for found in shapes)


def test_refuses() -> None:
    model = student()
    with pytest.raises(ValueError, match=r"94 tokens \(5 of each image.*its capacity is 93"):
        model(PackedBatch.from_images(images(*MIX), 93, IMAGES))
    with pytest.raises(ValueError, match="has 6 images, but max_images is 5"):
        model(PackedBatch.from_images(images(*MIX), ROWS, 5))
    with pytest.raises(ValueError, match="capacity and max_images go together, got 8 and None"):
        PackedBatch.from_images(images(*MIX), 8)
    with pytest.raises(TypeError, match=r"capacity must be an int, got 8\.0"):
        PackedBatch.from_images(images(*MIX), 8.0, 2)
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        PackedBatch.from_images(images(*MIX), 8, 0)


def test_moves_keep_the_capacity() -> None:
    batch = PackedBatch.from_images(images(*MIX), ROWS, IMAGES)
    for moved in (batch.to("meta"), batch.pin_memory()):
        assert (moved.capacity, moved.max_images) == (ROWS, IMAGES)
