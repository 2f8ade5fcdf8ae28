"""The loss of a step: statistics, folded rotations, denominators, dropping, MESA."""

from __future__ import annotations

import pytest
import torch

from fastagglo.distill import Distiller, Matching, make_ema
from fastagglo.features import Features
from fastagglo.model import HeadSpec, PackedBatch, create_student
from fastagglo.ops import reference

SIZES = (32, 48)


def make_student(heads: dict[str, HeadSpec]):
    torch.manual_seed(1)
    student = create_student("tiny", heads=heads, depth=2, max_resolution=64, registers=1)
    # Heads start at zero bias; give every parameter a say.
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return student.double()


def make(spatial_loss: str = "mse", normaliser: str = "phi-s", **options) -> Distiller:
    heads = {"a": HeadSpec(summary=6, spatial=12), "b": HeadSpec(summary=None, spatial=8)}
    matching = {
        "a": Matching(6, 12, spatial_loss=spatial_loss, normaliser=normaliser),
        "b": Matching(None, 8, spatial_loss=spatial_loss, normaliser=normaliser),
    }
    return Distiller(make_student(heads), matching, **options)


def batch(seed: int = 0, counts=(3, 2)) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return PackedBatch.from_images(
        [
            torch.rand(n, 3, s, s, generator=generator, dtype=torch.float64)
            for n, s in zip(counts, SIZES, strict=True)
        ]
    )


def targets(seed: int = 0, counts=(3, 2)) -> list[dict[str, Features]]:
    generator = torch.Generator().manual_seed(seed + 100)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        mixing = torch.randn(shape[-1], shape[-1], generator=generator, dtype=torch.float64)
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return scale * (noise @ mixing + 3)

    return [
        {
            "a": Features(draw(n, 6, scale=1), draw(n, s // 16, s // 16, 12, scale=40)),
            "b": Features(None, draw(n, s // 16, s // 16, 8, scale=0.01)),
        }
        for n, s in zip(counts, SIZES, strict=True)
    ]


NO_SHIFT = [{}, {}]


def own_space(distiller: Distiller) -> dict[str, torch.Tensor]:
    output = distiller.eval().predict(batch())
    return {name: torch.cat([s.flatten(0, 2) for s in output[name].spatial]) for name in output}


@pytest.mark.parametrize("normaliser", ["phi-s", "standardize", "global"])
@pytest.mark.parametrize("spatial_loss", ["mse", "smooth_l1"])
def test_new_statistics_leave_what_the_student_says_about_a_teacher_unchanged(
    spatial_loss: str, normaliser: str
):
    distiller = make(spatial_loss, normaliser)
    distiller.observe(targets(0))
    distiller.refresh(settle=False)
    before = own_space(distiller)
    distiller.observe(targets(1))
    distiller.refresh(settle=True)
    after = own_space(distiller)
    for name in before:
        # Means and scales are kept in fp32.
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4)
    # A second stage, with other statistics.
    distiller.start_fitting()
    distiller.observe(targets(2))
    assert len(distiller.refresh(settle=True)) == 2
    for name, value in own_space(distiller).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)


def test_the_exported_student_predicts_the_teachers_own_features_by_itself():
    distiller = make()
    distiller.observe(targets(0))
    distiller.refresh(settle=True)
    expected = own_space(distiller)
    student = distiller.export().eval()
    output = student(batch())
    for name, value in expected.items():
        found = torch.cat([s.flatten(0, 2) for s in output[name].spatial])
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_the_average_student_keeps_up_with_the_statistics_and_is_exported():
    distiller = make()
    ema = make_ema(distiller.student, 0.9)
    ema.update_parameters(distiller.student)
    for seed in (0, 1):  # two stages
        distiller.start_fitting()
        distiller.observe(targets(seed))
        distiller.refresh(settle=True, average=ema.module)
        ema.update_parameters(distiller.student)
    expected = own_space(distiller)
    exported = distiller.export(ema.module)
    assert all(p.requires_grad for p in exported.parameters())
    assert not any(p.requires_grad for p in ema.parameters())
    output = exported.eval()(batch())
    for name, value in expected.items():  # the student stood still, and so did its average
        found = torch.cat([s.flatten(0, 2) for s in output[name].spatial])
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def expected_total(distiller: Distiller, kind: str) -> torch.Tensor:
    """The loss written out: rotated targets, one mean over all images, weighted by sqrt(tokens)."""
    output = distiller.student(batch())
    total = 0.0
    for name, match in distiller.matching.items():
        basis = distiller.bases[name]
        numerator = weights = 0.0
        for index, group in enumerate(targets()):
            goal = (group[name].spatial - basis.mean) / basis.scale @ basis.rotation.double().T
            x = output[name].spatial[index]
            if kind == "mse":
                per_image = (x - goal).square().mean((1, 2, 3))
            else:
                loss = torch.nn.functional.smooth_l1_loss(x, goal, beta=2.0, reduction="none")
                per_image = loss.mean((1, 2, 3))
            weight = goal[0, ..., 0].numel() ** 0.5
            numerator = numerator + weight * per_image.sum()
            weights += weight * len(goal)
        total = total + numerator / weights
        if match.summary:
            goal = torch.cat([g[name].summary for g in targets()])
            cosine = torch.nn.functional.cosine_similarity(output[name].summary, goal)
            total = total + (1 - cosine).mean()
    return total


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_the_loss_is_that_of_rotated_targets_over_all_resolutions(kind: str):
    distiller = make(kind).eval()
    distiller.observe(targets(3))
    distiller.refresh(settle=True)
    found = distiller(batch(), targets(), NO_SHIFT)
    torch.testing.assert_close(found.total, expected_total(distiller, kind), rtol=1e-5, atol=1e-6)
    assert set(found.teachers) == {"a", "b"}
    torch.testing.assert_close(sum(found.teachers.values()), found.total.detach())


def test_the_optimiser_sees_the_gradient_of_the_rotated_head():
    distiller = make("mse").eval()
    distiller.observe(targets(3))
    distiller.refresh(settle=True)
    weight = distiller.student.heads.spatial["a"].final[2].weight
    (folded,) = torch.autograd.grad(distiller(batch(), targets(), NO_SHIFT).total, weight)
    (written_out,) = torch.autograd.grad(expected_total(distiller, "mse"), weight)
    torch.testing.assert_close(folded, written_out, rtol=1e-4, atol=1e-7)


def test_a_scaled_teacher_weighs_the_same():
    def losses(scale: float) -> torch.Tensor:
        scaled = [
            {n: Features(f.summary, f.spatial * (scale if n == "a" else 1)) for n, f in g.items()}
            for g in targets()
        ]
        distiller = make().eval()
        distiller.observe(scaled)
        distiller.refresh(settle=True)
        return distiller(batch(), scaled, NO_SHIFT).total

    torch.testing.assert_close(losses(1000.0), losses(1.0), rtol=1e-4, atol=1e-5)


def test_dropping_keeps_the_worst_teacher_and_the_mean():
    distiller = make(teacher_drop=1.0).train()
    distiller.observe(targets())
    distiller.refresh(settle=True)
    torch.manual_seed(0)
    total = distiller(batch(), targets(), NO_SHIFT).total
    torch.manual_seed(0)  # the same position crops
    distiller.teacher_drop = 0.0
    whole = distiller(batch(), targets(), NO_SHIFT)
    # With p = 1 only the worst teacher of each image counts, twice over: never below the mean.
    assert total > whole.total
    torch.manual_seed(0)
    distiller.teacher_drop = 1.0
    distiller.zero_grad()
    distiller(batch(), targets(), NO_SHIFT).total.backward()
    # Dropped teachers get zeros, not None: DDP counts on every gradient.
    for name, parameter in distiller.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_shifts_compare_the_overlap_only():
    distiller = make().eval()
    distiller.observe(targets())
    distiller.refresh(settle=True)
    goals = targets()
    shifts = [{n: torch.tensor([[0.0, 1.0]] * len(g[n].spatial)) for n in g} for g in goals]
    plain = distiller(batch(), goals, shifts).total
    # The teacher's view starts one cell to the right of the student's, so its last column lies
    # beyond the student's view, and its first is compared with the student's second.
    for group in goals:
        for features in group.values():
            features.spatial[:, :, -1] = float("nan")
    torch.testing.assert_close(distiller(batch(), goals, shifts).total, plain)
    goals[0]["b"].spatial[:, :, 0] = float("nan")
    assert distiller(batch(), goals, shifts).total.isnan()


def test_a_teacher_without_features_for_a_group_is_left_out_of_it():
    distiller = make().eval()
    distiller.observe(targets())
    distiller.refresh(settle=True)
    goals = targets()
    goals[1]["a"] = Features(None, None)
    found = distiller(batch(), goals, NO_SHIFT)
    assert found.total.isfinite()
    assert set(found.teachers) == {"a", "b"}


@pytest.mark.parametrize("balance", ["fixed", "uncertainty", "adaloss", "ratio"])
def test_a_head_without_a_target_gets_gradients_of_zero(balance: str):
    """Not None: under DDP other ranks would wait for them."""
    distiller = make(balance=balance)
    distiller.observe(targets())
    distiller.refresh(settle=True)
    ours = targets()
    output = distiller(
        batch(),
        [{"b": ours[0]["b"]}, {"a": Features(None, ours[1]["a"].spatial)}],
        [{}, {}],
    )
    assert set(output.teachers) == {"a", "b"}
    output.total.backward()
    heads = distiller.student.heads
    for part in (heads.spatial["a"], heads.spatial["b"]):
        assert all(parameter.grad.abs().max() > 0 for parameter in part.parameters())
    for parameter in heads.summary["a"].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()

    # A teacher that is not there at all has a loss of zero.
    lonely = make(balance=balance)(batch(), [{"b": group["b"]} for group in ours], [{}, {}])
    assert float(lonely.teachers["a"]) == 0
    assert float(lonely.teachers["b"]) > 0


def test_mesa_adds_the_distance_to_the_average_student():
    distiller = make(mesa_weight=0.5).eval()
    distiller.observe(targets())
    distiller.refresh(settle=True)
    ema = make_ema(distiller.student, 0.9)
    ema.update_parameters(distiller.student)
    same = distiller(
        batch(), targets(), NO_SHIFT, average=ema.module(batch()), average_shifts=[None, None]
    )
    # The average equals the student, and so do the crops.
    assert float(same.teachers["mesa"]) < 1e-12
    other = distiller(
        batch(), targets(), NO_SHIFT, average=ema.module(batch(5)), average_shifts=[None, None]
    )
    assert float(other.teachers["mesa"]) > 1e-3
    torch.testing.assert_close(
        other.total.detach(), same.total.detach() + other.teachers["mesa"], rtol=1e-6, atol=1e-8
    )


def test_angular_summaries_are_balanced_by_their_dispersion():
    heads = {"a": HeadSpec(summary=6, spatial=12)}
    distiller = Distiller(
        make_student(heads), {"a": Matching(6, 12, summary_loss="angular", spatial_weight=0.0)}
    ).eval()
    distiller.observe([{"a": g["a"]} for g in targets()])
    before = distiller(batch(), targets(), NO_SHIFT).total
    distiller.refresh(settle=True)
    dispersion = distiller.dispersions["a"].value
    assert 0 < float(dispersion) < 4
    after = distiller(batch(), targets(), NO_SHIFT).total
    torch.testing.assert_close(after * dispersion, before, rtol=1e-5, atol=1e-6)


def test_statistics_ride_in_the_checkpoint():
    distiller = make("mse")
    distiller.observe(targets())
    distiller.refresh(settle=True)
    fresh = make("mse")
    fresh.load_state_dict(distiller.state_dict())
    for name, value in own_space(distiller).items():
        assert torch.equal(own_space(fresh)[name], value)
    assert torch.equal(
        fresh.eval()(batch(), targets(), NO_SHIFT).total,
        distiller.eval()(batch(), targets(), NO_SHIFT).total,
    )


def test_the_eager_twin_gives_the_same_total(monkeypatch: pytest.MonkeyPatch):
    distiller = make("cosine_smooth_l1").eval()
    distiller.observe(targets())
    distiller.refresh(settle=True)
    found = distiller(batch(), targets(), NO_SHIFT).total
    monkeypatch.setattr(
        "fastagglo.distill.distiller.multi_teacher_loss", reference.multi_teacher_loss
    )
    torch.testing.assert_close(distiller(batch(), targets(), NO_SHIFT).total, found)


def test_raw_targets_are_compared_as_they_are_and_their_mean_is_known():
    distiller = make("cosine_smooth_l1", "none").eval()
    assert distiller.means() == {}
    distiller.observe(targets())
    assert distiller.refresh(settle=True) == []
    for name, mean in distiller.means().items():
        rows = torch.cat([g[name].spatial.flatten(0, 2) for g in targets()])
        torch.testing.assert_close(mean, rows.mean(0).float())
    raw = make("cosine_smooth_l1", "none").eval()(batch(), targets(), NO_SHIFT).total
    torch.testing.assert_close(distiller(batch(), targets(), NO_SHIFT).total, raw)
