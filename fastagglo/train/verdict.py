"""Whether a step was finite, on all ranks: found out with one transfer, at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Verdict:
    """Collects what is finite in a step on the device, where asking would wait for it.

    Args:
        teachers: names of the run's teachers, the same on all ranks.
        device: of the step.
    """

    def __init__(self, teachers: Sequence[str], device: torch.device) -> None:
        self._teachers = list(teachers)
        # Features of each teacher, loss, gradient; and whether no rank wants to stop.
        self._fine = torch.ones(len(self._teachers) + 3, device=device)

    def features(self, finite: Mapping[str, Tensor]) -> None:
        """Take in 0-d bool tensors by teacher (`fastagglo.train.targets.finite_teachers`)."""
        for name, fine in finite.items():
            self._fine[self._teachers.index(name)].mul_(fine)

    def loss(self, loss: Tensor) -> None:
        """Take in a 0-d loss of a micro-step."""
        self._fine[-3].mul_(loss.detach().isfinite())

    def gradient(self, norm: Tensor) -> None:
        """Take in the 0-d norm of the gradient."""
        self._fine[-2].mul_(norm.isfinite())

    def read(self, *, stop: bool) -> tuple[str, bool]:
        """Wait for the step. Collective.

        Args:
            stop: this rank wants to stop.

        Returns:
            What was not finite first on any rank ("" if nothing), and whether any rank wants to
            stop.
        """
        if stop:
            self._fine[-1].zero_()
        if dist.is_initialized():
            dist.all_reduce(self._fine, op=dist.ReduceOp.MIN)
        *features, loss, gradient, go_on = self._fine.tolist()
        problem = ""
        if bad := [n for n, fine in zip(self._teachers, features, strict=True) if not fine]:
            problem = f"features of {', '.join(bad)} are not finite"
        elif not loss:
            problem = "the loss is not finite"
        elif not gradient:
            problem = "the gradient is not finite"
        return problem, not go_on
