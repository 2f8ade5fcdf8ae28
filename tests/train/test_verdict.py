"""What is finite in a step: collected without waiting for the device, named, read once."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastagglo.train.verdict import Verdict

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("features", "loss", "norm", "problem"),
    [
        ((True, True), GOOD, GOOD, ""),
        ((False, True), BAD, BAD, "features of a are not finite"),
        ((False, False), GOOD, GOOD, "features of a, b are not finite"),
        ((True, True), BAD, BAD, "the loss is not finite"),
        ((True, True), GOOD, BAD, "the gradient is not finite"),
    ],
)
def test_the_first_cause_in_any_micro_step_is_named(features, loss, norm, problem):
    verdict = Verdict(["a", "b"], torch.device("cpu"))
    with NoWaiting():
        for fine, micro_loss in ((features, loss), ((True, True), GOOD)):
            verdict.features(dict(zip("ab", map(torch.tensor, fine), strict=True)))
            verdict.loss(micro_loss)
        verdict.gradient(norm)
    assert verdict.read(stop=False) == (problem, False)
    assert verdict.read(stop=True) == (problem, True)


def test_the_guard_notices_waiting():
    with pytest.raises(AssertionError), NoWaiting():
        bool(GOOD)
