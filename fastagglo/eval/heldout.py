"""Held-out figures: how much of a teacher's features the student explains, by resolution.

A student that explains a teacher well at one resolution and badly at another has learnt to switch
modes with the resolution (RADIOv2.5, arXiv 2412.07679, section 4.1), so every figure is taken at
several resolutions. Both figures stand beside those of the mean predictor, which answers every
token with the mean of the training targets: a student that does not beat it has learnt nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastagglo.data import GroupViews

# Rows per step of the fp64 sums, in elements: 32 MB a temporary, whatever the batch.
_CHUNK = 2**22
# Relative spread below which fp64 targets count as constant: a few roundings.
_NOISE = 64 * torch.finfo(torch.float64).eps


class ExplainedVariance:
    """Streaming explained variance and cosine of predictions, in fp64.

    With predictions ``p_i``, targets ``y_i`` (each ``(C,)``), the targets' own mean ``m`` and the
    mean ``mu`` of the training targets, over all tokens ``i`` seen:

    - ``explained = 1 - sum |y_i - p_i|^2 / sum |y_i - m|^2``, 1 for a perfect student;
    - ``explained_mean_predictor``: the same with ``p_i = mu``. It is at most 0, and 0 only where
      the held-out mean is the training mean;
    - ``cosine``: the mean over tokens of ``cos(p_i, y_i)`` (0 where either is zero), and
      ``cosine_mean_predictor`` with ``p_i = mu``. Features with a large mean have high cosines
      whatever the student does: read it beside the mean predictor's.

    Sums of squares are accumulated around running means (Chan, Golub, LeVeque 1979), so that a
    mean far larger than the spread costs no accuracy, and batches may come in any cut.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._mean: Tensor | None = None  # of the training targets, as given
        self._centre: Tensor  # running mean of the targets
        self._spread: Tensor  # sum of squares around it, per channel
        self._error: Tensor  # sum of squared errors
        self._cosines: Tensor  # sums of cosines: the student's, the mean predictor's

    def update(self, prediction: Tensor, target: Tensor, mean: Tensor) -> None:
        """Add tokens.

        Args:
            prediction: ``(..., C)``, any floating dtype.
            target: the teacher's features, of the same shape, on the same device.
            mean: ``(C,)``, the mean of the training targets; the same one in every update.

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: shapes do not agree, or ``mean`` has changed.
        """
        for name, value in (("prediction", prediction), ("target", target), ("mean", mean)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if not value.is_floating_point():
                raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
        if target.ndim == 0 or prediction.shape != target.shape:
            raise ValueError(
                f"prediction must have the shape of target (..., C): got {tuple(prediction.shape)} "
                f"and {tuple(target.shape)}; bring it to the teacher's grid with to_grid"
            )
        channels = target.shape[-1]
        if mean.shape != (channels,):
            raise ValueError(f"mean must have shape ({channels},), got {tuple(mean.shape)}")
        mean = mean.detach().to(target.device, torch.float64)
        if self._mean is None:
            self._mean = mean
            self._centre, self._spread = torch.zeros_like(mean), torch.zeros_like(mean)
            self._error = mean.new_zeros(())
            self._cosines = mean.new_zeros(2)
        elif self._mean.shape != mean.shape or not torch.equal(self._mean, mean):
            raise ValueError(
                "mean differs from the earlier updates' mean; use one ExplainedVariance per teacher"
            )
        rows = max(1, _CHUNK // max(1, channels))
        for p, y in zip(
            prediction.detach().reshape(-1, channels).split(rows),
            target.detach().reshape(-1, channels).split(rows),
            strict=True,
        ):
            if len(y):
                self._add(p.double(), y.double())

    def _add(self, prediction: Tensor, target: Tensor) -> None:
        count = len(target)
        centre = target.mean(0)
        away = centre - self._centre
        total = self._tokens + count
        self._spread += (target - centre).square().sum(0) + away.square() * (
            self._tokens * count / total
        )
        self._centre += away * (count / total)
        self._tokens = total
        self._error += (target - prediction).square().sum()
        self._cosines[0] += _cosine(prediction, target).sum()
        self._cosines[1] += _cosine(self._mean, target).sum()

    def result(self) -> dict[str, float]:
        """The figures of all tokens so far.

        Returns:
            ``explained``, ``explained_mean_predictor``, ``cosine``, ``cosine_mean_predictor``
            and the number of ``tokens``. Figures are NaN without tokens; explained variances are
            NaN as well where the targets do not vary.
        """
        nan = float("nan")
        explained, baseline, cosines = nan, nan, (nan, nan)
        if self._tokens:
            cosines = (self._cosines / self._tokens).tolist()
            spread = float(self._spread.sum())
            # Constant targets leave rounding noise: a share of it would mean nothing.
            if spread > self._tokens * float(self._centre.square().sum()) * _NOISE**2:
                explained = 1 - float(self._error) / spread
                offset = (self._centre - self._mean).square().sum()
                baseline = -self._tokens * float(offset) / spread
        return {
            "explained": explained,
            "explained_mean_predictor": baseline,
            "cosine": cosines[0],
            "cosine_mean_predictor": cosines[1],
            "tokens": self._tokens,
        }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # torch's own clamps norms at 1e-8, which takes small features for zero.
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, 0.0)


def to_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a feature map onto another grid: bilinear between cell centres, as in the loss.

    Args:
        features: ``(N, h, w, C)``; half precisions are resized in fp32.
        grid: ``(H, W)``.

    Returns:
        ``(N, H, W, C)``; ``features`` itself where the grid is theirs already.
    """
    if features.ndim != 4:
        raise ValueError(f"features must have shape (N, h, w, C), got {tuple(features.shape)}")
    if tuple(features.shape[1:3]) == tuple(grid):
        return features
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    if len(features) == 0:
        return features.new_empty(0, *grid, features.shape[-1])
    moved = features.movedim(-1, 1)
    return F.interpolate(moved, tuple(grid), mode="bilinear", align_corners=False).movedim(1, -1)


@torch.no_grad()
def evaluate(
    predict: Callable[[GroupViews], Mapping[str, Tensor]],
    teach: Callable[[GroupViews], Mapping[str, Tensor]],
    views: Mapping[tuple[str, int], Iterable[GroupViews]],
    means: Mapping[str, Tensor],
) -> list[dict[str, object]]:
    """Held-out figures of every teacher at every resolution.

    Args:
        predict: the student's prediction of each teacher's spatial features, ``(N, h, w, C)`` by
            teacher, in the teacher's own space.
        teach: the teachers' spatial features, ``(N, H, W, C)`` by teacher. Predictions on another
            grid are resized to the teacher's.
        views: batches of held-out crops by (kind, student resolution in pixels), the kind being
            "regions" or "photos"; see `fastagglo.data.eval_views`.
        means: mean of the training targets by teacher, ``(C,)``: what the mean predictor answers.
            Teachers without an entry are not measured.

    Returns:
        One row per (kind, resolution, teacher) that had tokens, in this order: ``teacher``,
        ``kind``, ``resolution``, ``explained``, ``mean_predictor`` (its explained variance),
        ``cosine``, ``cosine_mean_predictor``, ``tokens``. See `ExplainedVariance`.

    Raises:
        ValueError: a teacher of ``means`` is missing from the predictions or the features of a
            batch, or has other shapes there than its features.
    """
    rows: list[dict[str, object]] = []
    for (kind, resolution), batches in views.items():
        sums = {name: ExplainedVariance() for name in means}
        for batch in batches:
            predictions, targets = predict(batch), teach(batch)
            for name, mean in means.items():
                for what, found in (("predict", predictions), ("teach", targets)):
                    if name not in found:
                        raise ValueError(
                            f"{what} gave no features of teacher {name!r}, only of "
                            f"{', '.join(map(repr, found)) or 'none'}"
                        )
                target = targets[name]
                prediction = to_grid(predictions[name], tuple(target.shape[1:3]))
                sums[name].update(prediction.to(target.device), target, mean)
        for name, accumulated in sums.items():
            figures = accumulated.result()
            if figures["tokens"]:
                baseline = figures.pop("explained_mean_predictor")
                row = {"teacher": name, "kind": kind, "resolution": resolution}
                rows.append(row | figures | {"mean_predictor": baseline})
    return rows
