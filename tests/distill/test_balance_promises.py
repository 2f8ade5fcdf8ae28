"""What each way of balancing is for: a trunk that two real teachers pull equally, at any scale."""

from __future__ import annotations

import pytest
import torch
from skimage import data
from torch import Tensor, nn

import fastagglo.distill.distiller as module
from fastagglo.distill import (
    AdaLoss,
    Dispersion,
    Distiller,
    FixedWeights,
    LossRatioWeights,
    Matching,
    PhiS,
    UncertaintyWeights,
    make_balancer,
    teacher_dropping,
)
from fastagglo.features import Features
from fastagglo.model import HeadSpec, PackedBatch, create_student
from fastagglo.ops.loss import LossTerm, multi_teacher_loss
from fastagglo.teachers import load_teacher

PAIR = ("hog", "lite0")


@pytest.fixture(scope="module")
def photos() -> Tensor:
    crops = []
    for photo in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket()):
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        crops += [image[:, :160, :160], image[:, -160:, -160:]]
    return torch.stack(crops)


@pytest.fixture(scope="module")
def features(photos: Tensor) -> dict[str, Tensor]:
    """As the teachers give them: standard deviations of 0.11 and 5.9."""
    with torch.no_grad():
        return {
            "hog": load_teacher("builtin", "hog")(photos).spatial,
            "lite0": load_teacher("builtin", "efficientnet-lite0")(photos).spatial,
        }


def pulls(
    photos: Tensor, features: dict[str, Tensor], balance: str, phi_s: bool, scale: float
) -> Tensor:
    """``(200 steps, 2)``: norms of the two teachers' weighted gradients of a shared trunk.

    Where targets are raw, heads start and move on the scale of their teacher, as ones that have
    learned it do; otherwise a loss would only tell how far off the scale still is.
    """
    torch.manual_seed(0)
    targets = {"hog": features["hog"], "lite0": scale * features["lite0"]}
    patches = nn.functional.pixel_unshuffle(photos.float() / 255 - 0.5, 16).permute(0, 2, 3, 1)
    trunk = nn.Sequential(nn.Linear(patches.shape[-1], 32), nn.GELU())
    terms, heads, groups = [], [], [{"params": list(trunk.parameters()), "lr": 1e-3}]
    for target in targets.values():
        unit = 1.0 if phi_s else target.std().item()
        head = nn.Linear(32, target.shape[-1])
        for parameter in head.parameters():
            parameter.data *= unit
        heads.append(head)
        groups.append({"params": list(head.parameters()), "lr": 1e-3 * unit})
        normaliser = PhiS.fit(target).affine if phi_s else None
        terms.append(LossTerm("mse", normaliser=normaliser))
    balancer = make_balancer(balance, PAIR)
    if learned := list(balancer.parameters()):
        groups.append({"params": learned, "lr": 0.3})
    optimiser = torch.optim.Adam(groups, eps=1e-20)
    found = []
    for _ in range(200):
        shared = trunk(patches)
        predictions = [head(shared) for head in heads]
        result = multi_teacher_loss(predictions, list(targets.values()), terms)
        total, weights = balancer(dict(zip(PAIR, result.per_term, strict=True)))
        gradients = [
            torch.autograd.grad(weights[n] * loss, trunk[0].weight, retain_graph=True)[0].norm()
            for n, loss in zip(PAIR, result.per_term, strict=True)
        ]
        found.append(torch.stack(gradients))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    return torch.stack(found)


def ratio(norms: Tensor) -> float:
    """Second teacher's pull over the first's: the geometric mean of the last 50 steps."""
    return (norms[-50:, 1] / norms[-50:, 0]).log().mean().exp().item()


@pytest.mark.parametrize(
    ("balance", "phi_s"),
    [
        ("fixed", True),
        ("ratio", True),
        ("adaloss", False),
        ("adaloss", True),
        ("uncertainty", False),
    ],
)
def test_gradient_norms_are_equalised_whatever_a_teachers_scale(
    balance: str, phi_s: bool, photos: Tensor, features: dict[str, Tensor]
) -> None:
    # Uncertainty has to learn where the scale is, and slowly: Adam does not soon forget how large
    # the gradients of its weight were at first. So a smaller factor for it.
    factor = 8.0 if balance == "uncertainty" else 1024.0
    one, scaled = (pulls(photos, features, balance, phi_s, scale) for scale in (1.0, factor))
    for norms in (one, scaled):
        assert 1 / 3 < ratio(norms) < 3
    if balance != "uncertainty":
        torch.testing.assert_close(scaled[:20], one[:20], rtol=1e-3, atol=0)


def test_without_balancing_one_teacher_rules(photos: Tensor, features: dict[str, Tensor]) -> None:
    assert ratio(pulls(photos, features, "fixed", False, 1.0)) > 100
    assert ratio(pulls(photos, features, "ratio", False, 1.0)) > 100  # it needs normalised targets


@pytest.mark.parametrize("kind", ["adaloss", "ratio"])
def test_weights_follow_a_teachers_scale_exactly(kind: str) -> None:
    one, scaled = make_balancer(kind, PAIR), make_balancer(kind, PAIR)
    for step in range(1, 30):
        losses = {"hog": torch.tensor(3.0 / step), "lite0": torch.tensor(2.0 + 1 / step)}
        _, weights = one(losses)
        _, other = scaled(losses | {"lite0": 2**20 * losses["lite0"]})
        assert torch.equal(other["hog"], weights["hog"])
        factor = 2**20 if kind == "adaloss" else 1
        assert torch.equal(factor * other["lite0"], weights["lite0"])


def test_angles_over_their_dispersion_are_one_for_a_student_that_knows_only_the_mean() -> None:
    """Narrow cone or wide, long vectors or short: the summaries of all teachers weigh the same."""
    raw = []
    for spread, length in ((0.05, 1.0), (0.5, 1.0), (2.0, 1.0), (0.5, 300.0)):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(4000, 32, generator=generator, dtype=torch.float64)
        y = length * (1 + spread * noise)
        dispersion = Dispersion(32)
        dispersion.update(y)
        unit = nn.functional.normalize(y, dim=1)
        mean = unit.mean(0).expand_as(y).clone()
        terms = [LossTerm("angular"), LossTerm("angular", dispersion=dispersion.value)]
        plain, balanced = multi_teacher_loss([mean] * 2, [y] * 2, terms).per_term
        assert balanced.item() == pytest.approx(1, rel=1e-4)
        raw.append(plain.item())
    assert max(raw) > 300 * min(raw)
    assert raw[1] == pytest.approx(raw[3], rel=1e-9)


# UNIC's dropping, through the distiller


def distiller(scale: float, drop: float) -> tuple[Distiller, tuple]:
    """And one batch of 40 images for it, teacher "a" being scaled."""
    torch.manual_seed(1)
    heads = {"a": HeadSpec(spatial=12), "b": HeadSpec(spatial=8), "c": HeadSpec(spatial=4)}
    student = create_student("tiny", heads=heads, depth=1, max_resolution=32, registers=1)
    matching = {n: Matching(None, spec.spatial) for n, spec in heads.items()}
    model = Distiller(student, matching, teacher_drop=drop)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(40, 3, 32, 32, generator=generator)
    targets = {
        n: Features(None, torch.randn(40, 2, 2, spec.spatial, generator=generator) + 1)
        for n, spec in heads.items()
    }
    targets["a"] = Features(None, scale * targets["a"].spatial)
    model.observe([targets])
    model.refresh(settle=True)
    return model.train(), (PackedBatch.from_images([images]), [targets], [{}])


@pytest.mark.parametrize("drop", [0.5, 1.0])
def test_dropping_counts_each_image_by_the_teachers_it_keeps(
    drop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(per_image: Tensor, **options: object) -> Tensor:
        result = teacher_dropping(per_image, **options)
        seen.append((per_image, result))
        return result

    monkeypatch.setattr(module, "teacher_dropping", spy)
    for scale in (1.0, 1024.0):
        model, step = distiller(scale, drop)
        torch.manual_seed(5)
        total = model(*step).total
        losses, shares = seen[-1]
        assert losses.shape == (3, 40)
        # The mean over images of the mean over kept teachers, on the scale of the plain sum.
        torch.testing.assert_close(total, 3 * (shares * losses).sum(0).mean())
        assert (shares.gather(0, losses.argmax(0, keepdim=True)) > 0).all()
        kept = (shares > 0).sum(0)
        assert kept.float().mean() == pytest.approx(1 + 2 * (1 - drop), abs=0.3)
        total.backward()
        # A head moves only by images that keep its teacher; each teacher is some image's worst.
        assert all(p.grad.abs().sum() > 0 for p in model.student.parameters())
    (_, first), (_, second) = seen
    assert torch.equal(first, second)  # PHI-S: a scaled teacher is dropped as before


def test_each_cites_its_paper() -> None:
    cited = {
        FixedWeights: "2412.07679",
        PhiS: "2410.01680",
        Dispersion: "2601.17237",
        UncertaintyWeights: "1705.07115",
        AdaLoss: "1708.06832",
        LossRatioWeights: "1803.10704",
        teacher_dropping: "2408.05088",
    }
    for what, paper in cited.items():
        assert f"arXiv {paper}" in what.__doc__, what.__name__
