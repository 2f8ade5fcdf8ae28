"""Weighing the losses of several teachers against each other.

PHI-S (:mod:`fastagglo.distill.phi_s`) balances the targets, after which fixed equal weights are
what RADIOv2.5 (arXiv 2412.07679) trains with. The adaptive schemes here balance the losses instead.
Nothing in this file waits for the device.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastagglo.distill.buffers import PreciseBuffers


class Balancer(PreciseBuffers):
    """What all balancers share: ``forward(losses) -> (total, weights)``.

    ``losses`` maps teacher names to 0-d losses; a step may leave teachers out. ``total`` is 0-d and
    differentiable, in the promoted dtype of the losses and float32 weights; ``weights`` maps the
    same names to detached 0-d float32 tensors, the factors by which each loss enters ``total``. A
    loss that is NaN or infinite makes ``total`` so (the trainer skips such a step), but never
    enters a running mean.

    State is kept in the order of the sorted names, so the order of ``names`` does not matter when a
    checkpoint is loaded.

    Args:
        names: the teachers, not empty, no name twice.

    Raises:
        TypeError, ValueError: from the constructor, when ``names`` is not that; from ``forward``,
            when ``losses`` is empty, names an unknown teacher, has a value that is not a 0-d
            floating-point tensor, or lies on another device than the balancer.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        if isinstance(names, str):
            raise TypeError(f"names: expected an iterable of names, got the single str {names!r}")
        listed = list(names)
        if not listed or len(set(listed)) != len(listed):
            raise ValueError(f"names: expected one or more different names, got {listed}")
        if not all(isinstance(name, str) for name in listed):
            raise TypeError(f"names: expected strings, got {listed}")
        self.names = tuple(sorted(listed))

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        raise TypeError(f"{type(self).__name__} is a base class: use make_balancer()")

    def _stack(self, losses: Mapping[str, Tensor], state: Tensor) -> tuple[list[int], Tensor]:
        """The checked losses in order, ``(K,)``, and the index of each among ``names``."""
        if not losses:
            raise ValueError("losses: expected at least one teacher's loss, got none")
        for name, loss in losses.items():
            if name not in self.names:
                raise ValueError(f"losses: unknown teacher {name!r}; known: {list(self.names)}")
            if not isinstance(loss, Tensor) or not loss.is_floating_point():
                kind = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"losses[{name!r}]: expected a floating-point tensor, got {kind}")
            if loss.dim():
                raise ValueError(
                    f"losses[{name!r}]: expected a 0-d tensor, got the shape {tuple(loss.shape)}"
                )
            if loss.device != state.device:
                raise ValueError(
                    f"losses[{name!r}] is on {loss.device} but the balancer on {state.device}; "
                    "move it: balancer.to(device)"
                )
        dtype = torch.float32
        for loss in losses.values():
            dtype = torch.promote_types(dtype, loss.dtype)
        present = [i for i, name in enumerate(self.names) if name in losses]
        return present, torch.stack([losses[self.names[i]].to(dtype) for i in present])

    def _named(self, present: list[int], weights: Tensor) -> dict[str, Tensor]:
        return {
            self.names[i]: w
            for i, w in zip(present, weights.detach().float().unbind(), strict=True)
        }


class FixedWeights(Balancer):
    """``total = sum_t w_t L_t`` with constant ``w_t``.

    On targets that PHI-S has normalised, equal weights are RADIOv2.5's choice (arXiv 2412.07679);
    on raw ones the teacher with the largest features rules.

    Args:
        names: the teachers.
        weights: finite, non-negative weights by name; teachers that it leaves out weigh 1.

    Raises:
        ValueError: an unknown name, or a weight that is negative or not finite.
    """

    weight: Tensor

    def __init__(self, names: Iterable[str], weights: Mapping[str, float] | None = None) -> None:
        super().__init__(names)
        weights = dict(weights or {})
        for name, weight in weights.items():
            if name not in self.names:
                raise ValueError(f"weights: unknown teacher {name!r}; known: {list(self.names)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights[{name!r}]: expected a number >= 0, got {weight}")
        # A setting, not state: a resumed run takes the weights of its configuration.
        values = torch.tensor([float(weights.get(name, 1.0)) for name in self.names])
        self.register_buffer("weight", values, persistent=False)

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present, values = self._stack(losses, self.weight)
        weights = self.weight[present]
        return (weights * values).sum(), self._named(present, weights)


class UncertaintyWeights(Balancer):
    """Learned weights from homoscedastic uncertainty (Kendall et al., arXiv 1705.07115).

    ``total = sum_t (exp(-s_t) L_t + s_t) / 2`` with a learned log-variance ``s_t`` per teacher, 0
    at first. Its gradient in ``s_t`` vanishes where ``exp(s_t) = L_t``: there every teacher
    contributes the same. The reported weights are ``exp(-s_t) / 2``. Give the parameter to the
    optimiser, without weight decay.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present, values = self._stack(losses, self.log_variance)
        s = self.log_variance[present]
        weights = 0.5 * torch.exp(-s)
        return (weights * values + 0.5 * s).sum(), self._named(present, weights)


class _RunningMeans(PreciseBuffers):
    """Bias-corrected exponential means of the losses, one per teacher, each with its own clock."""

    average: Tensor
    mass: Tensor

    def __init__(self, count: int, momentum: float, name: str = "momentum") -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"{name}: expected 0 <= {name} < 1, got {momentum}")
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(count))
        self.register_buffer("mass", torch.zeros(count))  # 1 - momentum^(observations)

    @torch.no_grad()
    def observe(self, total: Tensor, count: Tensor) -> None:
        """Takes in ``total / count`` where ``count`` is not zero."""
        seen = count > 0
        step = torch.where(seen, 1 - self.momentum, 0.0)
        self.average.add_(step * (total / count.clamp(min=1) - self.average))
        self.mass.add_(step * (1 - self.mass))

    def mean(self) -> Tensor:
        """``(T,)``; NaN for a teacher never observed."""
        return self.average / self.mass


@torch.no_grad()
def _sum_over_ranks(present: list[int], values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of the finite losses of each teacher, ``(count,)`` each, over all ranks.

    All ranks then use the same weights. It needs every rank to call the balancer once a step, with
    whatever teachers that rank has.
    """
    values = values.detach().float()
    finite = torch.isfinite(values)
    both = torch.zeros(2, count, device=values.device)
    both[0, present] = torch.where(finite, values, 0.0)
    both[1, present] = finite.float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(both)
    return both[0], both[1]


class AdaLoss(Balancer):
    """Weights inverse to the running mean of each loss (Hu et al., arXiv 1708.06832).

    ``total = sum_t L_t / mean(L_t)``: all teachers contribute the same on average, whatever the
    scale of their losses. The mean is exponential and bias-corrected and includes the present step,
    so the first step already has ``w_t L_t = 1``. In eval mode it stands still; a teacher never
    observed then weighs 1. The weights carry no gradient. With an initialised process group the
    losses are averaged over all ranks (one all-reduce of 2 T numbers; every rank must take part).

    Args:
        names: the teachers.
        momentum: of the running mean, in [0, 1).
        eps: the smallest mean that is divided by.

    Raises:
        ValueError: ``momentum`` or ``eps`` out of range.
    """

    def __init__(self, names: Iterable[str], momentum: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(names)
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        self.eps = eps
        self.running = _RunningMeans(len(self.names), momentum)

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present, values = self._stack(losses, self.running.average)
        if self.training:
            self.running.observe(*_sum_over_ranks(present, values, len(self.names)))
        mean = self.running.mean()[present]
        weights = torch.where(mean.isnan(), 1.0, 1 / mean.clamp(min=self.eps))
        return (weights * values).sum(), self._named(present, weights)


class LossRatioWeights(Balancer):
    """More weight for the teachers whose loss falls more slowly.

    Dynamic weight averaging (Liu et al., arXiv 1803.10704) with running means in place of epochs:
    ``r_t = fast mean / slow mean`` of the loss, below 1 while it falls, and
    ``w_t = K softmax(r / temperature)`` over the K teachers of the step. The weights sum to K and
    do not depend on the scale of the losses, so combine it with normalised targets. Means, eval
    mode and ranks as in :class:`AdaLoss`; a teacher never observed has ``r_t = 1``.

    Args:
        names: the teachers.
        momentum: of the fast mean, in [0, 1).
        slow_momentum: of the slow mean, in [momentum, 1).
        temperature: positive; larger means more even weights.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        names: Iterable[str],
        momentum: float = 0.9,
        slow_momentum: float = 0.99,
        temperature: float = 2.0,
    ) -> None:
        super().__init__(names)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.fast = _RunningMeans(len(self.names), momentum)
        self.slow = _RunningMeans(len(self.names), slow_momentum, "slow_momentum")
        if slow_momentum < momentum:
            raise ValueError(
                f"slow_momentum: expected at least momentum = {momentum}, got {slow_momentum}"
            )
        self.temperature = temperature

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        present, values = self._stack(losses, self.fast.average)
        if self.training:
            observed = _sum_over_ranks(present, values, len(self.names))
            self.fast.observe(*observed)
            self.slow.observe(*observed)
        # NaN: never observed, or a loss that is exactly zero.
        ratio = torch.nan_to_num(self.fast.mean() / self.slow.mean(), nan=1.0)[present]
        weights = len(present) * torch.softmax(ratio / self.temperature, dim=0)
        return (weights * values).sum(), self._named(present, weights)


_BALANCERS: dict[str, type[Balancer]] = {
    "fixed": FixedWeights,
    "uncertainty": UncertaintyWeights,
    "adaloss": AdaLoss,
    "ratio": LossRatioWeights,
}


def make_balancer(kind: str, names: Iterable[str], **options: object) -> Balancer:
    """A balancer by name.

    Args:
        kind: ``"fixed"`` (:class:`FixedWeights`), ``"uncertainty"`` (:class:`UncertaintyWeights`),
            ``"adaloss"`` (:class:`AdaLoss`) or ``"ratio"`` (:class:`LossRatioWeights`).
        names: the teachers.
        options: the other arguments of that class.

    Raises:
        ValueError: unknown ``kind`` or an option out of range. TypeError: an option that the class
            does not have.
    """
    if kind not in _BALANCERS:
        close = difflib.get_close_matches(str(kind), _BALANCERS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"balancer: expected one of {list(_BALANCERS)}, got {kind!r}{hint}")
    return _BALANCERS[kind](names, **options)


@torch.no_grad()
def teacher_dropping(
    per_image: Tensor,
    p: float = 0.5,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Coefficients of UNIC's teacher-dropping regularisation (arXiv 2408.05088).

    For each image the teacher with the largest loss is kept, each other one is dropped with
    probability ``p``, and an image's loss is the mean over its kept teachers,
    ``sum_t keep_t L_t / sum_t keep_t``. The coefficients returned are ``keep / sum_t keep``: those
    of an image sum to one, so the loss is ``sum_t c_t L_t``, on the scale of one teacher.

    Args:
        per_image: ``(T, N)`` floating point, the loss of each teacher on each image; no gradient.
        p: probability of dropping, in [0, 1].
        generator: on the device of ``per_image``.
        mask: ``(T, N)`` bool or float, above 0.5 where the image has that teacher; None:
            everywhere. Losses that are NaN or infinite count as absent too. An absent teacher's
            coefficient is zero: mask its loss with ``torch.where(c > 0, loss, 0)``, as 0 x NaN is
            NaN.

    Returns:
        ``(T, N)``, dtype of ``per_image`` or float32 if that is narrower. All zeros for an image
        without a teacher.

    Raises:
        TypeError: ``per_image`` is not a floating-point tensor.
        ValueError: its shape, ``mask``'s shape or ``p`` is not as above.
    """
    if not isinstance(per_image, Tensor) or not per_image.is_floating_point():
        kind = per_image.dtype if isinstance(per_image, Tensor) else type(per_image).__name__
        raise TypeError(f"per_image: expected a floating-point tensor, got {kind}")
    if per_image.dim() != 2 or not len(per_image):
        raise ValueError(f"per_image: expected the shape (T, N), got {tuple(per_image.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p}")
    present = torch.isfinite(per_image)
    if mask is not None:
        if mask.shape != per_image.shape:
            raise ValueError(
                f"mask: expected the shape {tuple(per_image.shape)}, got {tuple(mask.shape)}"
            )
        present = present & (mask > 0.5)
    dtype = torch.promote_types(per_image.dtype, torch.float32)
    draw = torch.rand(per_image.shape, generator=generator, device=per_image.device)
    keep = draw >= p
    hardest = torch.where(present, per_image, -math.inf).argmax(dim=0, keepdim=True)
    keep = keep.scatter(0, hardest, True) & present
    coefficients = keep.to(dtype)
    return coefficients / coefficients.sum(dim=0).clamp(min=1)
