"""The eager twin of ``fastagglo.ops.multi_teacher_loss``: its specification in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.ops.loss import LossTerm, MultiTeacherLoss

__all__ = ["multi_teacher_loss"]

_SOME = 1e-12  # more than what rounding makes of no share at all of an invalid cell, in fp64


def multi_teacher_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    terms: Sequence[LossTerm],
    valid: Sequence[Tensor | None] | None = None,
) -> MultiTeacherLoss:
    """The balanced multi-teacher loss with gradients from autograd.

    Arguments, result and meaning are those of :func:`fastagglo.ops.multi_teacher_loss`, which
    checks its arguments; this function does not.
    """
    losses, per_image, image_weights = [], [], []
    for i, (prediction, target, term) in enumerate(zip(predictions, targets, terms, strict=True)):
        x = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        t = target.detach().to(x.dtype)
        if prediction.ndim == 2:
            x, t = x[:, None, None], t[:, None, None]
        mask = _mask(None if valid is None else valid[i], t)

        t = torch.where(mask[..., None], t, 0)
        if term.normaliser is not None:
            t = _normalise(t, term.normaliser)
        grid = _grid(x.shape[1:3], t.shape[1:3], term.resize)
        t, mask = _sample_target(t, mask, x, grid, term.shift)
        x = _resize(x, grid)

        # Where nothing is compared both sides are 1: no NaN gets into a gradient, which is 0 there.
        x, t = torch.where(mask[..., None], x, 1), torch.where(mask[..., None], t, 1)
        tokens = torch.where(mask, _token_losses(x, t, term), 0)
        count = mask.sum((1, 2))
        image = tokens.sum((1, 2)) / count.clamp(min=1)

        weights = count.to(x.dtype).sqrt()
        denominator = weights.sum() if term.denominator is None else _constant(term.denominator, x)
        denominator = torch.where(denominator == 0, 1, denominator)
        losses.append((image * weights).sum() / denominator)
        per_image.append(image)
        image_weights.append(weights)

    wide = torch.float64 if any(x.dtype == torch.float64 for x in losses) else torch.float32
    per_term = torch.stack([loss.to(wide) for loss in losses])
    weighted = [loss * term.weight for loss, term in zip(per_term.unbind(), terms, strict=True)]
    total = torch.stack([loss.reshape(()) for loss in weighted]).sum()
    return MultiTeacherLoss(total, per_term, per_image, image_weights)


def _constant(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().reshape(())


def _mask(valid: Tensor | None, target: Tensor) -> Tensor:
    """Bool (N, h, w), on the target's grid."""
    if valid is None:
        return torch.ones(target.shape[:3], dtype=torch.bool, device=target.device)
    valid = valid if valid.dtype == torch.bool else valid > 0.5
    return valid if valid.ndim == 3 else valid[:, None, None].expand(target.shape[:3])


def _normalise(target: Tensor, normaliser: object) -> Tensor:
    target = target - normaliser.mean.to(target.dtype)
    rotation = getattr(normaliser, "rotation", None)
    if rotation is not None:
        target = target @ rotation.to(target.dtype).T
    return target / normaliser.scale.to(target.dtype)


def _grid(prediction: Sequence[int], target: Sequence[int], resize: str) -> tuple[int, int]:
    if resize == "larger":
        return max(prediction[0], target[0]), max(prediction[1], target[1])
    return tuple(prediction if resize == "student" else target)


def _resize(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, h, w, C) -> (N, *grid, C), over the same view."""
    if features.shape[1:3] == grid:
        return features
    features = features.permute(0, 3, 1, 2)
    features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
    return features.permute(0, 2, 3, 1)


def _sample_target(
    target: Tensor,
    mask: Tensor,
    prediction: Tensor,
    grid: tuple[int, int],
    shift: tuple[float, float] | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The target and its mask at the comparison cells, which lie over the prediction's view."""
    invalid = (~mask).double()[..., None]
    if shift is None:
        return _resize(target, grid), _resize(invalid, grid)[..., 0] < _SOME
    shift = torch.as_tensor(shift, dtype=torch.float64, device=target.device).reshape(-1, 2)
    inside, places = [], []
    for axis in (0, 1):
        centres = torch.arange(grid[axis], dtype=torch.float64, device=target.device) + 0.5
        # Fractions of the target's view: 0 is its start and 1 its end.
        place = centres / grid[axis] - shift[:, axis, None] / prediction.shape[1 + axis]
        slack = 1e-6 / target.shape[1 + axis]
        inside.append((place >= -slack) & (place <= 1 + slack))
        places.append(2 * place - 1)
    shape = (len(target), *grid)
    coordinates = torch.stack(
        (places[1][:, None, :].expand(shape), places[0][:, :, None].expand(shape)), dim=-1
    )

    def sample(features: Tensor) -> Tensor:
        features = F.grid_sample(
            features.permute(0, 3, 1, 2),
            coordinates.to(features.dtype),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return features.permute(0, 2, 3, 1)

    inside = inside[0][:, :, None] & inside[1][:, None, :]
    return sample(target), (sample(invalid)[..., 0] < _SOME) & inside


def _token_losses(x: Tensor, t: Tensor, term: LossTerm) -> Tensor:
    """(N, h, w, C) twice -> (N, h, w)."""
    if term.kind == "mse":
        return (x - t).square().mean(-1)
    if term.kind == "smooth_l1":
        return F.smooth_l1_loss(x, t, beta=term.beta, reduction="none").mean(-1)
    cosine = _cosine(x, t)
    if term.kind == "cosine":
        return 1 - cosine
    if term.kind == "cosine_smooth_l1":
        smooth = F.smooth_l1_loss(x, t, beta=term.beta, reduction="none").mean(-1)
        return 0.9 * (1 - cosine) + 0.1 * smooth
    return cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos().square() / _constant(term.dispersion, x)


def _cosine(x: Tensor, t: Tensor) -> Tensor:
    """Cosine similarity over the last axis; 0, with gradient 0, where a side has no direction."""
    some = (x.detach().norm(dim=-1) > 1e-8) & (t.norm(dim=-1) > 1e-8)
    some |= x.detach().isnan().any(-1) | t.isnan().any(-1)  # NaN is not to be hidden
    cosine = F.cosine_similarity(torch.where(some[..., None], x, 1), t, dim=-1)
    return torch.where(some, cosine, 0)
