"""Explained variance and cosine against their formulas, and the table of held-out figures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastagglo.eval import ExplainedVariance, evaluate, to_grid

# Sums of up to 10^4 fp64 terms: a few hundred roundings of 2e-16.
TIGHT = {"rel": 1e-11, "abs": 1e-11}


def formulas(prediction, target, mean):
    """The figures in NumPy, in two passes over everything at once."""
    p, y = (t.double().reshape(-1, t.shape[-1]).numpy() for t in (prediction, target))
    mu = mean.double().numpy()
    spread = ((y - y.mean(0)) ** 2).sum()

    def cosine(a, b):
        return np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))

    return {
        "explained": 1 - ((y - p) ** 2).sum() / spread,
        "explained_mean_predictor": 1 - ((y - mu) ** 2).sum() / spread,
        "cosine": cosine(p, y),
        "cosine_mean_predictor": cosine(np.broadcast_to(mu, y.shape), y),
        "tokens": len(y),
    }


def figures(prediction, target, mean, cuts=()):
    accumulated = ExplainedVariance()
    for p, y in zip(
        torch.tensor_split(prediction, cuts), torch.tensor_split(target, cuts), strict=True
    ):
        accumulated.update(p, y, mean)
    return accumulated.result()


@pytest.fixture
def sample():
    target = torch.randn(7, 3, 5, 6) * torch.tensor([1.0, 0.1, 3.0, 1.0, 0.5, 2.0]) + 0.7
    return target + 0.4 * torch.randn_like(target), target, torch.randn(6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_figures_match_the_formulas(sample, dtype):
    sample = [tensor.to(dtype) for tensor in sample]
    assert figures(*sample) == pytest.approx(formulas(*sample), **TIGHT)


@pytest.mark.parametrize("cuts", [(1,), (3, 4), (0, 0, 6), tuple(range(1, 7))], ids=str)
def test_streaming_equals_one_batch(sample, cuts):
    assert figures(*sample, cuts=cuts) == pytest.approx(figures(*sample), **TIGHT)


def test_a_batch_larger_than_a_chunk_equals_the_formulas(monkeypatch, sample):
    monkeypatch.setattr("fastagglo.eval.heldout._CHUNK", 50)  # 8 of the 105 rows at a time
    assert figures(*sample) == pytest.approx(formulas(*sample), **TIGHT)


def test_a_perfect_prediction_explains_everything(sample):
    _, target, mean = sample
    found = figures(target, target, mean)
    assert found["explained"] == 1
    assert found["cosine"] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("offset", [0.0, 1e-9, 0.3, 1e4])
def test_the_mean_predictor_never_explains_anything(sample, offset):
    _, target, _ = sample
    mean = target.double().mean((0, 1, 2)) + offset
    found = figures(mean.expand(target.shape), target, mean)
    assert found["explained_mean_predictor"] <= 0
    assert found["explained"] == pytest.approx(found["explained_mean_predictor"], abs=1e-8)
    assert found["cosine"] == pytest.approx(found["cosine_mean_predictor"], **TIGHT)


def test_scale_and_shift_are_errors_though_the_cosine_forgives_scale(sample):
    _, target, mean = sample
    target = target - target.mean((0, 1, 2))
    scaled = figures(3 * target, target, mean)
    assert scaled["cosine"] == pytest.approx(1, abs=1e-12)
    assert scaled["explained"] == pytest.approx(1 - 4, abs=1e-5)
    spread = target.double().square().sum()
    shifted = figures(target + 2, target, mean)
    assert shifted["explained"] == pytest.approx(1 - 4 * target.numel() / float(spread), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_figures_do_not_depend_on_the_unit(sample, scale):
    scaled = [tensor.double() * scale for tensor in sample]
    expected = formulas(*(tensor.double() for tensor in sample))
    assert figures(*scaled) == pytest.approx(expected, **TIGHT)


def test_a_large_mean_costs_no_accuracy():
    # Around zero, fp64 sums of squares of 1e8 would keep no digit of a variance of 1.
    base, noise = torch.randn(4, 50, 3, dtype=torch.float64), 0.5 * torch.randn(4, 50, 3)
    far = base + 1e8
    # The offset rounds the features themselves to 1.5e-8.
    found = figures(far + noise, far, torch.ones(3), cuts=(1, 2, 3))
    near = formulas(base + noise, base, torch.ones(3))
    assert found["explained"] == pytest.approx(near["explained"], abs=1e-6)


def test_all_channels_share_one_denominator():
    """Not the mean of the channels' ratios: a channel that hardly varies hardly counts."""
    target = torch.tensor([[0.0, 0.0], [2.0, 0.02]])
    prediction = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    found = figures(prediction, target, torch.zeros(2))
    assert found["explained"] == pytest.approx(1 - (25 + 4.98**2) / 2.0002, rel=1e-6)


def test_without_tokens_or_variation_figures_are_nan():
    empty = ExplainedVariance().result()
    assert empty.pop("tokens") == 0
    assert all(math.isnan(value) for value in empty.values())
    assert figures(torch.ones(0, 3), torch.ones(0, 3), torch.ones(3))["tokens"] == 0

    constant = torch.full((9, 3), 0.1, dtype=torch.float64)
    found = figures(constant + 1, constant, torch.zeros(3))
    assert math.isnan(found["explained"])
    assert math.isnan(found["explained_mean_predictor"])
    assert found["cosine"] == pytest.approx(1)
    assert found["cosine_mean_predictor"] == 0  # a zero vector has no direction


def test_small_features_have_a_cosine():
    y = torch.tensor([[1e-20, 0.0]])
    assert figures(y * 2, y, y[0])["cosine"] == pytest.approx(1)


def test_a_feature_that_is_not_finite_shows():
    y = torch.randn(4, 2)
    bad = y.clone()
    bad[1, 0] = torch.nan
    assert math.isnan(figures(y, bad, torch.zeros(2))["explained"])
    assert math.isnan(figures(bad, y, torch.zeros(2))["explained"])


def test_inputs_need_no_gradient_and_are_left_alone(sample):
    prediction, target, mean = (tensor.requires_grad_() for tensor in sample)
    before = prediction.detach().clone()
    figures(prediction.transpose(1, 2), target.transpose(1, 2), mean)
    assert torch.equal(prediction, before)


def test_wrong_inputs_are_named():
    good, accumulated = torch.zeros(2, 3), ExplainedVariance()
    with pytest.raises(TypeError, match=r"prediction must be a tensor, got list"):
        accumulated.update([1.0], good, torch.zeros(3))
    with pytest.raises(TypeError, match=r"target must have a floating-point dtype, got torch.int"):
        accumulated.update(good, good.long(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\).*to_grid"):
        accumulated.update(torch.zeros(2, 4), good, torch.zeros(3))
    with pytest.raises(ValueError, match=r"mean must have shape \(3,\), got \(4,\)"):
        accumulated.update(good, good, torch.zeros(4))
    accumulated.update(good, good, torch.zeros(3))
    with pytest.raises(ValueError, match="mean differs"):
        accumulated.update(good, good, torch.ones(3))


def test_to_grid_is_bilinear_between_cell_centres():
    row = torch.tensor([0.0, 4.0]).view(1, 1, 2, 1)
    # Centres of four cells lie at 1/8, 3/8, 5/8 and 7/8; those of the two at 1/4 and 3/4.
    assert to_grid(row, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert to_grid(row, (1, 1)).flatten().tolist() == [2.0]
    assert to_grid(row, (1, 2)) is row
    half = to_grid(row.bfloat16(), (1, 4))
    assert half.dtype == torch.float32
    assert to_grid(torch.zeros(0, 2, 2, 5), (3, 4)).shape == (0, 3, 4, 5)
    with pytest.raises(ValueError, match=r"\(N, h, w, C\)"):
        to_grid(torch.zeros(2, 2, 5), (3, 4))


# The table.

MEANS = {"a": torch.zeros(3), "b": torch.ones(2)}


def batches(*counts):
    """Stand-ins for GroupViews, each with features of its own."""
    return [
        SimpleNamespace(
            teacher={"a": torch.randn(n, 4, 4, 3), "b": torch.randn(n, 6, 6, 2) + 1}, count=n
        )
        for n in counts
    ]


def teach(batch):
    return batch.teacher


def test_evaluate_gives_a_row_for_each_kind_resolution_and_teacher():
    views = {
        ("regions", 96): batches(2, 1),
        ("regions", 128): iter(batches(3)),
        ("photos", 96): batches(1),
        ("photos", 128): [],
    }

    def predict(batch):
        return {"a": batch.teacher["a"], "b": torch.zeros(batch.count, 2, 2, 2), "more": None}

    rows = evaluate(predict, teach, views, MEANS)
    assert [(r["kind"], r["resolution"], r["teacher"]) for r in rows] == [
        (kind, size, name)
        for kind, size in (("regions", 96), ("regions", 128), ("photos", 96))
        for name in ("a", "b")
    ]
    assert [row["tokens"] for row in rows[:2]] == [3 * 16, 3 * 36]
    assert rows[0]["explained"] == 1
    assert rows[1]["explained"] < rows[1]["mean_predictor"] <= 0
    assert all(isinstance(row["cosine"], float) for row in rows)
    assert "cosine_mean_predictor" in rows[0]


def test_evaluate_compares_on_the_teachers_grid():
    (batch,) = batches(2)

    def predict(batch):
        return {"a": to_grid(batch.teacher["a"], (8, 8)), "b": batch.teacher["b"][:, ::2, ::2]}

    rows = evaluate(predict, teach, {("photos", 64): [batch]}, MEANS)
    expected = figures(
        to_grid(to_grid(batch.teacher["a"], (8, 8)), (4, 4)), batch.teacher["a"], MEANS["a"]
    )
    assert rows[0]["explained"] == pytest.approx(expected["explained"])
    assert rows[1]["tokens"] == 2 * 36


def test_evaluate_measures_the_teachers_that_have_a_mean():
    rows = evaluate(teach, teach, {("photos", 64): batches(1)}, {"b": MEANS["b"]})
    assert [row["teacher"] for row in rows] == ["b"]
    assert evaluate(teach, teach, {}, MEANS) == []


def test_evaluate_names_a_missing_teacher():
    with pytest.raises(ValueError, match=r"predict gave no features of teacher 'b', only of 'a'"):
        evaluate(
            lambda batch: {"a": batch.teacher["a"]}, teach, {("photos", 64): batches(1)}, MEANS
        )


def test_evaluate_builds_no_graph():
    weight = torch.ones(3, requires_grad=True)
    seen = []

    def predict(batch):
        seen.append(batch.teacher["a"] * weight)
        return {"a": seen[-1]}

    evaluate(predict, teach, {("photos", 64): batches(1)}, {"a": MEANS["a"]})
    assert not seen[0].requires_grad
