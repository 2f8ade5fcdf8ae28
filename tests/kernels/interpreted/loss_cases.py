"""The multi-teacher loss on random features: the kernels' results and what they may differ by.

The truth is the eager twin in fp64. The kernels may be twice as wrong as the twin in fp32 is, on
the same values, plus what rounding the gradient to its dtype costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastagglo.ops import LossTerm, multi_teacher_loss, use_backend
from fastagglo.ops.backend import INTERPRETED
from fastagglo.ops.loss import Affine, MultiTeacherLoss
from fastagglo.ops.reference import loss as reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# No kernel here multiplies matrices, which is what the interpreter gets wrong in bfloat16. It cuts
# off where it should round to bfloat16: see `rounding`.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ("mse", "smooth_l1", "cosine", "cosine_smooth_l1", "angular")
NAN = math.nan

# Prediction's grid, target's grid, resize, shift: (dy, dx), one for each of two images, or None.
GEOMETRIES: dict[str, tuple[Any, ...]] = {
    "equal": ((3, 2), (3, 2), "larger", None),
    "target_up": ((3, 4), (2, 3), "student", None),
    "target_down": ((2, 2), (3, 5), "student", None),
    "prediction_up": ((1, 2), (2, 3), "larger", None),
    "prediction_down": ((3, 2), (2, 1), "teacher", None),
    "one_axis_each": ((1, 3), (2, 2), "larger", None),
    "shift_whole": ((3, 3), (3, 3), "larger", (1.0, -1.0)),
    "shift_part": ((3, 3), (3, 3), "larger", (0.75, -0.5)),
    "shift_each": ((3, 3), (2, 3), "student", ((1.0, 0.25), (-0.5, -0.75))),
    "shift_and_resize": ((2, 2), (3, 2), "larger", ((0.5, 0.0), (0.0, -0.25))),
    "shift_away": ((2, 2), (2, 2), "larger", (5.0, 0.0)),
    "one_overlaps": ((2, 3), (2, 3), "larger", ((0.0, 1.0), (9.0, 0.0))),
}
NORMALISERS = ("none", "one_scale", "each_scale", "rotation")
MASKS = ("none", "grid", "images", "strides")


@dataclass
class Case:
    """Arguments of a term, on the CPU."""

    x: Tensor
    t: Tensor
    term: LossTerm
    valid: Tensor | None = None
    learns: bool = True


@dataclass
class Results:
    """What came of cases, and gradients of a score in which no upstream gradient is 1."""

    total: Tensor
    per_term: Tensor
    per_image: list[Tensor]
    image_weights: list[Tensor]
    grads: list[Tensor | None]

    def tensors(self) -> dict[str, Tensor]:
        found = {"total": self.total, "per_term": self.per_term}
        for name in ("per_image", "image_weights", "grads"):
            for i, x in enumerate(getattr(self, name)):
                if x is not None:
                    found[f"{name}[{i}]"] = x
        return found


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def affine(name: str, channels: int, seed: int = 0) -> Affine | None:
    if name == "none":
        return None
    mean = randn(channels, seed=seed)
    if name == "each_scale":
        return Affine(mean, randn(channels, seed=seed + 1).abs() + 0.5)
    turn = torch.linalg.qr(randn(channels, channels, seed=seed + 2).double()).Q
    return Affine(mean, torch.tensor(1.3), turn if name == "rotation" else None)


def token_mask(images: int, grid: Sequence[int], seed: int = 0) -> Tensor:
    """Most tokens; the last image keeps one and, of three images, the second has none."""
    mask = torch.rand(images, *grid, generator=torch.Generator().manual_seed(seed)) < 0.8
    if images:
        mask[-1] = False
        mask[(-1, *(n // 2 for n in grid))] = True
    if images > 2:
        mask[1] = False
    return mask


def mask_of(name: str, images: int, grid: Sequence[int], seed: int = 0) -> Tensor | None:
    mask = token_mask(images, grid, seed)
    if name == "none":
        return None
    if name == "images" or not grid:
        return (torch.arange(images) % 2 == 0).float()
    if name == "strides":  # one row of cells for all rows and images
        return mask[:1, :1].logical_not().expand(mask.shape)
    return mask


def make_case(
    kind: str,
    geometry: str = "equal",
    channels: int = 12,
    *,
    images: int = 2,
    normaliser: str = "none",
    mask: str = "none",
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    ours, theirs, resize, shift = GEOMETRIES.get(geometry, ((), (), "larger", None))
    if shift is not None and isinstance(shift[0], tuple):
        shift = torch.tensor(shift, dtype=torch.float32).repeat(-(-images // 2), 1)[:images]
    term = LossTerm(
        kind,
        **{
            "normaliser": affine(normaliser, channels, seed),
            "beta": 0.8,
            "resize": resize,
            "shift": shift,
        }
        | options,
    )
    return Case(
        randn(images, *ours, channels, seed=seed + 3, dtype=dtype),
        randn(images, *theirs, channels, seed=seed + 4, dtype=target_dtype or dtype),
        term,
        mask_of(mask, images, theirs, seed + 5),
    )


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A tensor, a term or a normaliser on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Affine):
        turn = value.rotation
        parts = (value.mean, value.scale, *(() if turn is None else (turn,)))
        return Affine(*(x.to(device) for x in parts))
    if isinstance(value, LossTerm):
        fields = {
            name: moved(getattr(value, name), device)
            for name in ("normaliser", "shift", "weight", "denominator", "dispersion")
        }
        return replace(value, **fields)
    return value


def score(loss: MultiTeacherLoss) -> Tensor:
    images = torch.cat([x.flatten() * (0.5 + i) for i, x in enumerate(loss.per_image)])
    ramp = torch.linspace(0.3, 1.7, len(images), dtype=images.dtype, device=images.device)
    return 1.7 * loss.total + (ramp * images).sum() + (loss.per_term * 0.6).sum()


def total(loss: MultiTeacherLoss) -> Tensor:
    return loss.total


def evaluate(
    function: Callable[..., MultiTeacherLoss],
    cases: Sequence[Case],
    device: str,
    dtype: torch.dtype | None = None,
    what: Callable[[MultiTeacherLoss], Tensor] = score,
) -> Results:
    """Losses and gradients, of features in a dtype of their own or in this one."""
    x, t = [], []
    for case in cases:
        # As it lies in memory, which "to" keeps for what is already there.
        own = case.x.detach().to(device, dtype or case.x.dtype)
        x.append(own.requires_grad_(case.learns))
        t.append(case.t.detach().to(device, dtype or case.t.dtype))
    terms = [moved(case.term, device) for case in cases]
    loss = function(x, t, terms, [moved(case.valid, device) for case in cases])
    leaves = [leaf for leaf in x if leaf.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}
    found = iter(torch.autograd.grad(what(loss), leaves, **options) if leaves else ())
    grads = [next(found) if leaf.requires_grad else None for leaf in x]
    for leaf in leaves:
        leaf.requires_grad_(False)
    images = [[v.detach() for v in part] for part in loss[2:]]
    return Results(loss.total.detach(), loss.per_term.detach(), *images, grads)


def run(cases: Sequence[Case], **options: Any) -> Results:
    """The kernels."""
    with use_backend("triton"):
        return evaluate(multi_teacher_loss, cases, DEVICE, **options)


def twin(cases: Sequence[Case], dtype: torch.dtype, **options: Any) -> Results:
    return evaluate(reference.multi_teacher_loss, cases, "cpu", dtype, **options)


def rounding(dtype: torch.dtype) -> float:
    """Relative, of a gradient that is kept and scaled: two roundings (one of fp16, kept in fp32),
    each of which may go all the way in the interpreter's bf16."""
    each = torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16:
        return (4 if INTERPRETED else 2) * each
    return 2 * each


def assert_right(cases: Sequence[Case], actual: Results | None = None, **options: Any) -> Results:
    actual = actual or run(cases, **options)
    truth, rough = (twin(cases, dtype, **options) for dtype in (torch.float64, torch.float32))
    found, exact, wrong = (x.tensors() for x in (actual, truth, rough))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        right, other = exact[name].cpu(), wrong[name].cpu().double()
        got = value.cpu().double()
        assert value.shape == right.shape, name
        assert got.isfinite().all(), name
        allowed = 2 * (other - right).abs().max() if right.numel() else torch.zeros(())
        if name.startswith("grads"):
            i = int(name[6:-1])
            assert value.dtype == cases[i].x.dtype, name
            # fp16's smallest step, and a few ulp of fp32 where the twin is exact by luck.
            step = 2.0**-24 if value.dtype == torch.float16 else 0.0
            largest = right.abs().max() if right.numel() else 0.0
            allowed = allowed + rounding(value.dtype) * right.abs() + step + 5e-7 * largest
        elif name.startswith("image_weights"):
            allowed = torch.zeros(())
            right = right.float().double()
        else:
            allowed = allowed + 5e-7 * right.abs()
        used = ((got - right).abs() - allowed).max().item() if right.numel() else -1.0
        assert used <= 0, f"{name}: {used:.3g} beyond its budget, of {right.abs().max():.3g}"
    return actual


def assert_same(actual: Results, expected: Results) -> None:
    """Equal to the last bit."""
    found, wanted = actual.tensors(), expected.tensors()
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name
