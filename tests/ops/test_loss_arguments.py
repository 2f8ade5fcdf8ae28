"""What multi_teacher_loss and LossTerm reject, and what the message says."""

from __future__ import annotations

import math

import pytest
import torch

from fastagglo.ops.backend import use_backend
from fastagglo.ops.loss import Affine, LossTerm, multi_teacher_loss, term_image_weights


def call(prediction=None, target=None, term=None, valid=None):
    prediction = torch.randn(2, 3, 4, 5) if prediction is None else prediction
    target = torch.randn(2, 3, 4, 5) if target is None else target
    return multi_teacher_loss([prediction], [target], [term or LossTerm("mse")], [valid])


META = torch.randn(2, 3, 4, 5, device="meta")
WRONG = {
    "lengths": (ValueError, "got lengths 2, 1, 1 and 1", lambda: multi_teacher_loss(
        [torch.ones(1, 2)] * 2, [torch.ones(1, 2)], [LossTerm("mse")])),
    "no terms": (ValueError, "at least one", lambda: multi_teacher_loss([], [], [])),
    "no list": (TypeError, "predictions must be a list", lambda: multi_teacher_loss(
        torch.ones(1, 2), [torch.ones(1, 2)], [LossTerm("mse")])),
    "valid": (TypeError, "valid must be None or a list", lambda: multi_teacher_loss(
        [torch.ones(1, 2)], [torch.ones(1, 2)], [LossTerm("mse")], torch.ones(1))),
    "valid length": (ValueError, "1, 1, 1 and 2", lambda: multi_teacher_loss(
        [torch.ones(1, 2)], [torch.ones(1, 2)], [LossTerm("mse")], [None, None])),
    "channels": (ValueError, r"channels.*\(2, 3, 4, 5\) and \(2, 3, 4, 6\)",
                 lambda: call(target=torch.randn(2, 3, 4, 6))),
    "images": (ValueError, "same number of images", lambda: call(target=torch.ones(3, 3, 4, 5))),
    "dimensions": (ValueError, "grid or none", lambda: call(target=torch.randn(2, 5))),
    "tokens": (ValueError, r"predictions\[0\].*viewed as their grid",
               lambda: call(torch.randn(2, 12, 5), torch.randn(2, 12, 5))),
    "no cells": (ValueError, "at least", lambda: call(target=torch.ones(2, 0, 4, 5))),
    "integers": (TypeError, r"targets\[0\].*uint8",
                 lambda: call(target=torch.ones(2, 3, 4, 5, dtype=torch.uint8))),
    "no tensor": (TypeError, r"predictions\[0\].*list", lambda: call([1.0])),
    "device": (ValueError, r"targets\[0\] must be on.*cpu.*meta", lambda: call(target=META)),
    "mask device": (ValueError, r"valid\[0\] must be on", lambda: call(valid=META[..., 0])),
    "mask shape": (ValueError, r"valid\[0\].*\(2, 3, 4\) or \(2,\).*got \(2, 4, 3\)",
                   lambda: call(valid=torch.ones(2, 4, 3))),
    "mask type": (TypeError, r"valid\[0\]", lambda: call(valid=[True])),
    "mean": (ValueError, r"normaliser.mean.*\(5,\) or \(\).*got \(4,\)", lambda: call(
        term=LossTerm("mse", normaliser=Affine(torch.ones(4), torch.tensor(1.0))))),
    "rotation": (ValueError, r"rotation.*\(5, 5\)", lambda: call(
        term=LossTerm("mse", normaliser=Affine(torch.ones(5), torch.ones(5), torch.ones(5))))),
    "rotation type": (TypeError, r"normaliser.rotation must be .*got list", lambda: call(
        term=LossTerm("mse", normaliser=Affine(torch.ones(5), torch.ones(5), [1.0])))),
    "complex mean": (TypeError, r"normaliser.mean must be .*complex64", lambda: call(
        term=LossTerm("mse", normaliser=Affine(torch.ones(5) * 1j, torch.ones(5))))),
    "complex shift": (TypeError, r"shift must be real.*complex64", lambda: call(
        term=LossTerm("mse", shift=torch.ones(2) * 1j))),
    "weight device": (ValueError, r"terms\[0\].weight must be on", lambda: call(
        term=LossTerm("mse", META[0, 0, 0, 0]))),
    "negative weight": (ValueError, "weight must be finite and >= 0; got -1", lambda: LossTerm(
        "mse", torch.tensor(-1.0))),
    "zero dispersion": (ValueError, "dispersion must be finite and > 0; got 0", lambda: LossTerm(
        "angular", dispersion=torch.tensor(0.0))),
    "mean device": (ValueError, "normaliser.mean must be on", lambda: call(
        term=LossTerm("mse", normaliser=Affine(META[0, 0, 0], torch.ones(5))))),
    "shift shape": (ValueError, r"shift.*\(2,\) or \(2, 2\)", lambda: call(
        term=LossTerm("mse", shift=torch.ones(3, 2)))),
    "shift nan": (ValueError, "finite", lambda: call(
        term=LossTerm("mse", shift=torch.tensor([1, math.nan])))),
    "shift of vectors": (ValueError, "no grid", lambda: call(
        torch.ones(2, 5), torch.ones(2, 5), LossTerm("mse", shift=(1, 0)))),
    "term": (TypeError, r"terms\[0\] must be a LossTerm; got str", lambda: call(term="mse")),
    "kind": (ValueError, "'cosin'.*did you mean 'cosine'", lambda: LossTerm("cosin")),
    "kind type": (TypeError, "kind must be a string", lambda: LossTerm(None)),
    "resize": (ValueError, "did you mean 'teacher'", lambda: LossTerm("mse", resize="teachers")),
    "beta": (ValueError, "beta must be finite and >= 0; got -1", lambda: LossTerm("mse", beta=-1)),
    "dispersion": (ValueError, "dispersion.*> 0", lambda: LossTerm("angular", dispersion=0)),
    "weight": (TypeError, "weight must be a number", lambda: LossTerm("mse", "1")),
    "weight nan": (ValueError, "weight must be finite", lambda: LossTerm("mse", math.nan)),
    "weights": (ValueError, "one element", lambda: LossTerm("mse", torch.ones(2))),
    "denominator": (ValueError, "denominator", lambda: LossTerm("mse", denominator=-2.0)),
    "normaliser": (TypeError, "scale is missing", lambda: LossTerm(
        "mse", normaliser=type("N", (), {"mean": torch.ones(5)})())),
    "shift": (TypeError, r"shift must be None, \(dy, dx\)", lambda: LossTerm("mse", shift=1.0)),
    "weights' term": (TypeError, "term must be", lambda: term_image_weights((1, 2), (1, 2), "mse")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, message, function = WRONG[case]
    with pytest.raises(error, match=message):
        function()


def test_a_backend_it_lacks():
    with use_backend("torch"):
        call()
    with use_backend("xformers"), pytest.raises(ValueError, match="multi_teacher_loss has no"):
        call()
