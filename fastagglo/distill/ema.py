"""The moving average of the student, and the loss that pulls the student's features towards its
own.

MESA (arXiv 2205.14083), as C-RADIOv4 (arXiv 2601.17237) uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastagglo.ops.loss import LossTerm, multi_teacher_loss, term_image_weights


def make_ema(student: nn.Module, decay: float = 0.9996) -> AveragedModel:
    """A copy of the student that follows it slowly: ``ema = decay * ema + (1 - decay) * student``.

    Call ``ema.update_parameters(student)`` after each optimiser step; the first call copies.
    Buffers are copied on each call, since the mean of a counter or of an index table means nothing.
    The copy is in eval mode without gradients; ``ema(batch)`` runs it and ``ema.state_dict()``
    holds it with its step count. Move the student to its device first: the step count then stays on
    the CPU, where reading it does not wait for the device.

    Args:
        student: the bare module (not wrapped for DDP or compiled), with float32 or float64
            parameters.
        decay: in [0, 1]; C-RADIOv4 uses 0.9996 for the whole run.

    Raises:
        ValueError: ``decay`` out of range, or parameters too coarse to be averaged: in bfloat16 a
            step of ``1 - decay`` rounds to nothing.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
    for name, parameter in student.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"student: parameter {name!r} is {parameter.dtype}, in which a moving average "
                "stands still; keep float32 parameters and use autocast"
            )
    ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return ema.requires_grad_(False).eval()


def mesa_loss(
    student_spatial: Sequence[Tensor],
    ema_spatial: Sequence[Tensor],
    shifts: Sequence[Tensor | tuple[float, float] | None] | None = None,
    denominator: Tensor | None = None,
) -> Tensor:
    """MSE between the layer-normalised backbone features of the student and of its moving average.

    Both are normalised over their channels without scale and bias, then compared where the two
    crops overlap, with the image weights of :func:`~fastagglo.ops.multi_teacher_loss` over all
    groups.

    Args:
        student_spatial: one ``(N_i, h_i, w_i, C)`` per image group.
        ema_spatial: the same from the moving average, on other crops of the same images; no
            gradient flows into it.
        shifts: per group None or ``(dy, dx)`` or ``(N_i, 2)``: where the average's crop starts
            relative to the student's, in cells of the student's grid. None: the same crops.
        denominator: 0-d, what the weighted sum over images is divided by, for a mean over several
            ranks (see :func:`mesa_weight`). None: the sum of the weights of these images.

    Returns:
        0-d loss; zero for no groups.

    Raises:
        ValueError: the sequences differ in length, or as for ``multi_teacher_loss``.
    """
    if shifts is None:
        shifts = [None] * len(student_spatial)
    if not len(student_spatial) == len(ema_spatial) == len(shifts):
        raise ValueError(
            "expected one entry per image group in each argument, got "
            f"{len(student_spatial)} student_spatial, {len(ema_spatial)} ema_spatial, "
            f"{len(shifts)} shifts"
        )
    if not student_spatial:
        return torch.zeros(())
    loss = multi_teacher_loss(
        [F.layer_norm(x, x.shape[-1:]) for x in student_spatial],
        [F.layer_norm(x, x.shape[-1:]) for x in ema_spatial],
        [LossTerm(kind="mse", shift=shift) for shift in shifts],
    )
    total = sum((w * x).sum() for w, x in zip(loss.image_weights, loss.per_image, strict=True))
    if denominator is None:
        denominator = sum(w.sum() for w in loss.image_weights)
    return total / torch.where(denominator > 0, denominator, 1)


def mesa_weight(
    student_spatial: Sequence[Tensor],
    ema_spatial: Sequence[Tensor],
    shifts: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Sum of the image weights of :func:`mesa_loss` of these arguments, 0-d.

    It is float32, or float64 if the features are.
    """
    device, dtype = student_spatial[0].device, student_spatial[0].dtype
    total = torch.zeros((), device=device, dtype=torch.promote_types(torch.float32, dtype))
    shifts = [None] * len(student_spatial) if shifts is None else shifts
    for ours, theirs, shift in zip(student_spatial, ema_spatial, shifts, strict=True):
        term = LossTerm("mse", shift=shift)
        total += (
            term_image_weights(ours.shape, theirs.shape, term).sum(dtype=total.dtype).to(device)
        )
    return total
