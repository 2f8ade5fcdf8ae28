"""PHI-S folded into the head: the same training run as with rotated targets, at no C x C product.

A real teacher (oriented gradients) on real photographs, a real student, the run's own optimisers.
"""

from __future__ import annotations

import pytest
import torch
from skimage import data
from torch import Tensor

import fastagglo.distill.distiller as module
from fastagglo.distill import Distiller, Matching
from fastagglo.features import Features
from fastagglo.model import HeadSpec, PackedBatch, create_student
from fastagglo.ops.loss import KINDS
from fastagglo.teachers import load_teacher
from fastagglo.train.config import OptimiserSettings
from fastagglo.train.optim import build_optimiser, set_learning_rate

SIZE, BATCH = 32, 8
RATES = {"sgd": 0.05, "adamw": 1e-3, "lamb": 1e-2}


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """``(75, 3, 32, 32)`` uint8 crops of three photographs."""
    crops = []
    for photo in (data.astronaut(), data.coffee(), data.chelsea()):
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[:, 60 : 60 + 5 * SIZE]
        tiles = image[..., 60 : 60 + 5 * SIZE].unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
        crops.append(tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE))
    return torch.cat(crops)


@pytest.fixture(scope="module")
def features(photos: Tensor) -> Tensor:
    return load_teacher("builtin", "hog")(photos).spatial.double()


def distiller(features: Tensor, normaliser: str = "phi-s", loss: str = "mse") -> Distiller:
    torch.manual_seed(1)
    student = create_student(
        "tiny", heads={"hog": HeadSpec(spatial=36)}, depth=1, max_resolution=SIZE, registers=1
    )
    matching = Matching(None, 36, spatial_loss=loss, normaliser=normaliser)
    result = Distiller(student, {"hog": matching}).double().eval()
    result.observe([{"hog": Features(None, features)}])
    result.refresh(settle=True)
    return result


def loss_of(model: Distiller, photos: Tensor, features: Tensor, step: int) -> Tensor:
    images = torch.arange(BATCH) + BATCH * step % (len(photos) - BATCH)
    batch = PackedBatch.from_images([photos[images].double() / 255])
    return model(batch, [{"hog": Features(None, features[images])}], [{}]).total


def losses(model: Distiller, optimiser: str, photos: Tensor, features: Tensor) -> Tensor:
    """Of 100 steps."""
    rate = RATES[optimiser]
    if optimiser == "sgd":
        steps = torch.optim.SGD(model.student.parameters(), rate, momentum=0.9)
    else:
        steps = build_optimiser(
            model.student, model.balancer, OptimiserSettings(name=optimiser, weight_decay=0.02)
        )
        set_learning_rate(steps, rate)
    found = []
    for step in range(100):
        steps.zero_grad()
        loss = loss_of(model, photos, features, step)
        loss.backward()
        steps.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("optimiser", RATES)
def test_a_folded_run_is_the_run_with_rotated_targets(
    optimiser: str, photos: Tensor, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = distiller(features)
    assert model._folded_rotations(always=False)
    assert model._normaliser("hog").rotation is None
    folded = losses(model, optimiser, photos, features)
    # Every target is rotated instead, as the paper's formula has it.
    monkeypatch.setattr(module, "ROTATION_FREE", ())
    model = distiller(features)
    assert not model._folded_rotations(always=False)
    assert model._normaliser("hog").rotation is not None
    unfolded = losses(model, optimiser, photos, features)
    # Rounding, grown over 100 steps: 1e-13 at most was seen. (A rotation in fp32 would give 1e-7.)
    torch.testing.assert_close(folded, unfolded, rtol=1e-11, atol=0)
    assert folded[90:].mean() != folded[:10].mean()  # it did move

    # An optimiser that sees R^T W, the head in the teacher's own axes, starts from the same
    # function, and stays with it only if its steps turn with the axes: SGD's do, Adam's do not.
    monkeypatch.undo()
    own_axes = losses(distiller(features, "global"), optimiser, photos, features)
    torch.testing.assert_close(own_axes[0], folded[0], rtol=1e-12, atol=0)
    if optimiser == "sgd":
        torch.testing.assert_close(own_axes, folded, rtol=1e-11, atol=0)
    else:
        assert ((own_axes - folded) / folded).abs()[50:].max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_rotation_is_applied_where_the_loss_sees_it(
    kind: str, photos: Tensor, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kind, the loss is that of rotated targets; folding is for those alone that allow
    it, and would give another loss for the rest."""
    model = distiller(features, loss=kind)
    sees_it = kind in ("smooth_l1", "cosine_smooth_l1")
    assert (model._normaliser("hog").rotation is not None) == sees_it
    assert bool(model._folded_rotations(always=False)) != sees_it
    found = loss_of(model, photos, features, 0)
    monkeypatch.setattr(module, "ROTATION_FREE", ())
    rotated = loss_of(distiller(features, loss=kind), photos, features, 0)
    torch.testing.assert_close(found, rotated, rtol=1e-12, atol=0)
    monkeypatch.setattr(module, "ROTATION_FREE", KINDS)
    folded = loss_of(distiller(features, loss=kind), photos, features, 0)
    error = ((folded - rotated) / rotated).abs().item()
    assert error > 1e-4 if sees_it else error < 1e-12
