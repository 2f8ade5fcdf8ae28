"""The ways to compute the multi-teacher loss: ours, and those that a trainer has today.

Everyone gets the same targets and gives the total and the gradients of the predictions. The peers
that multiply targets by PHI-S's matrix get predictions in its basis, as their heads would give
them; their gradients are turned back only to be compared. What a batch needs once and not in each
step (matrices, masks on the comparison grid, sampling positions) is made before the clock starts,
except for "twin", which is the op's specification and starts from the op's own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine import Unavailable
from bench.loss_cases import Case
from bench.measure import once
from fastagglo.ops import Affine, LossTerm, multi_teacher_loss, use_backend
from fastagglo.ops.loss_grids import comparison_grid, grid_of, valid_cells
from fastagglo.ops.reference import loss as reference

Loss = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Batch:
    """The inputs of a case, the same for all peers; each list has an entry for each term.

    Attributes:
        case: what they are for.
        predictions: leaves.
        targets: the teachers' features.
        terms: as the op takes them.
        valid: masks or None.
        rotations: (C, C) in fp64 of the terms that PHI-S normalises, else None.
    """

    case: Case
    predictions: list[Tensor]
    targets: list[Tensor]
    terms: list[LossTerm]
    valid: list[Tensor | None]
    rotations: list[Tensor | None]

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """Random inputs: bfloat16 on CUDA, float32 on a CPU. Always the same for a case."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        random = torch.Generator(device).manual_seed(0)
        batch = cls(case, [], [], [], [], [])
        for term in case.terms:
            shapes = (
                (case.images, *(g or ()), term.channels) for g in (term.prediction, term.target)
            )
            x, t = (torch.randn(s, generator=random, device=device, dtype=dtype) for s in shapes)
            affine = rotation = shift = mask = None
            if term.affine:
                mean, square = (
                    torch.randn(size, generator=random, device=device, dtype=torch.float64)
                    for size in ((term.channels,), (term.channels, term.channels))
                )
                affine = Affine(mean, mean.new_tensor(1.3))
                rotation = torch.linalg.qr(square).Q
            if term.shifted:  # a quarter of the grid at most
                most = max(1, min(term.prediction) // 4)
                shape = (case.images, 2)
                shift = torch.randint(-most, most + 1, shape, generator=random, device=device)
            if term.valid < 1:
                mask = torch.rand(t.shape[:-1], generator=random, device=device) < term.valid
            batch.predictions.append(x.requires_grad_())
            batch.targets.append(t)
            batch.terms.append(
                LossTerm(term.kind, 1.0, affine, dispersion=term.dispersion, shift=shift)
            )
            batch.valid.append(mask)
            batch.rotations.append(rotation)
        return batch


@dataclass(frozen=True)
class Run:
    """A peer made ready for a batch.

    Attributes:
        loss: from predictions to the total.
        leaves: the predictions, in the peer's own basis.
        constants: what else it reads: targets, matrices.
        rotations: from the basis of the batch to that of the leaves, or None where it is the same.
        info: ``compile_seconds`` of what is compiled.
    """

    loss: Loss
    leaves: list[Tensor]
    constants: list[Tensor]
    rotations: list[Tensor | None] = field(default_factory=list)
    info: Mapping[str, float] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        return sum(x.nbytes for x in (*self.leaves, *self.constants))

    def __call__(self) -> tuple[Tensor, ...]:
        """What is timed: the total, and the gradients of the leaves."""
        total = self.loss(self.leaves)
        return (total, *torch.autograd.grad(total, self.leaves))

    def results(self) -> dict[str, Tensor]:
        """The same in the basis of the batch."""
        total, *gradients = self()
        turns = self.rotations or [None] * len(gradients)
        back = (
            g if turn is None else (g.to(turn.dtype) @ turn).to(g.dtype)
            for g, turn in zip(gradients, turns, strict=True)
        )
        return {"total": total.detach()} | {f"gradient of term {i}": g for i, g in enumerate(back)}


def _fastagglo(batch: Batch) -> Run:
    backend = "triton" if batch.targets[0].is_cuda else "torch"

    def loss(predictions: Sequence[Tensor]) -> Tensor:
        with use_backend(backend):
            return multi_teacher_loss(predictions, batch.targets, batch.terms, batch.valid).total

    return Run(loss, batch.predictions, batch.targets)


def _twin(batch: Batch) -> Run:
    def loss(predictions: Sequence[Tensor]) -> Tensor:
        return reference.multi_teacher_loss(
            predictions, batch.targets, batch.terms, batch.valid
        ).total

    return Run(loss, batch.predictions, batch.targets)


def _cells(batch: Batch, i: int) -> tuple[tuple[int, int], Tensor | None, Tensor | None]:
    """A term's comparison grid, its mask there and where it samples the target, (N, h, w, 2)."""
    x, t, term = batch.predictions[i], batch.targets[i], batch.terms[i]
    grid, ours = comparison_grid(x.shape, t.shape, term.resize), grid_of(x.shape)
    if term.shift is None:
        return grid, valid_cells(batch.valid[i], None, ours, grid_of(t.shape), grid), None
    shift = term.shift.double()
    mask = valid_cells(batch.valid[i], shift, ours, grid_of(t.shape), grid)
    rows, columns = (
        2 * ((torch.arange(grid[a], device=x.device) + 0.5) / grid[a] - shift[:, a, None] / ours[a])
        - 1
        for a in (0, 1)
    )
    shape = (len(x), *grid)
    where = torch.stack((columns[:, None].expand(shape), rows[:, :, None].expand(shape)), dim=-1)
    return grid, mask, where.float()


def _interpolated(features: Tensor, grid: tuple[int, int]) -> Tensor:
    if features.ndim == 2 or features.shape[1:3] == grid:
        return features
    features = F.interpolate(features.permute(0, 3, 1, 2), size=grid, mode="bilinear")
    return features.permute(0, 2, 3, 1)


def _tokens(x: Tensor, t: Tensor, term: LossTerm) -> Tensor:
    """(..., C) twice -> (...), with PyTorch's own losses."""
    if term.kind == "mse":
        return F.mse_loss(x, t, reduction="none").mean(-1)
    cosine = F.cosine_similarity(x, t, dim=-1)
    if term.kind == "cosine":
        return 1 - cosine
    if term.kind == "cosine_smooth_l1":
        smooth = F.smooth_l1_loss(x, t, beta=term.beta, reduction="none").mean(-1)
        return 0.9 * (1 - cosine) + 0.1 * smooth
    if term.kind == "angular":
        return cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos().square() / term.dispersion
    raise Unavailable(f"no eager form of {term.kind}")


def _eager_loss(batch: Batch, matrices: Sequence[Tensor | None]) -> Loss:
    """As a trainer writes it, with no mask where there is none; some targets by a matrix."""
    places = [_cells(batch, i) for i in range(len(batch.terms))]
    # As tensors of one element: a Python number would be compiled in.
    affine = [
        None if term.normaliser is None else (n.mean.float(), n.scale.float())
        for term in batch.terms
        for n in (term.normaliser,)
    ]

    def one(i: int, x: Tensor) -> Tensor:
        t, term, (grid, mask, where) = batch.targets[i], batch.terms[i], places[i]
        x = x.float()  # a trainer's losses are in fp32, also under autocast
        if matrices[i] is not None:
            t = t.to(matrices[i].dtype) - term.normaliser.mean.to(matrices[i].dtype)
            t = (t @ matrices[i].T).float()
        elif affine[i] is not None:
            mean, scale = affine[i]
            t = (t.float() - mean) / scale
        else:
            t = t.float()
        x = _interpolated(x, grid)
        if where is None:
            t = _interpolated(t, grid)
        else:
            t = F.grid_sample(
                t.permute(0, 3, 1, 2), where, padding_mode="border", align_corners=False
            ).permute(0, 2, 3, 1)
        tokens = _tokens(x, t, term)
        if tokens.ndim == 1:
            return tokens.mean()
        if mask is None:
            return tokens.mean((1, 2)).mean()
        mask = mask.expand_as(tokens).to(tokens.dtype)
        count = mask.sum((1, 2))
        image = (tokens * mask).sum((1, 2)) / count.clamp(min=1)
        weight = count.sqrt()
        return (image * weight).sum() / weight.sum()

    def loss(predictions: Sequence[Tensor]) -> Tensor:
        return torch.stack([one(i, x) for i, x in enumerate(predictions)]).sum()

    return loss


def _eager(batch: Batch) -> Run:
    loss = _eager_loss(batch, [None] * len(batch.terms))
    return Run(loss, batch.predictions, batch.targets)


def _compile(batch: Batch) -> Run:
    run = Run(torch.compile(_eager(batch).loss, dynamic=False), batch.predictions, batch.targets)
    return replace(run, info={"compile_seconds": once(run, batch.targets[0].device.type)})


def _matrix(batch: Batch, dtype: torch.dtype) -> Run:
    matrices = [
        None if turn is None else (turn / term.normaliser.scale).to(dtype)
        for turn, term in zip(batch.rotations, batch.terms, strict=True)
    ]
    leaves = [
        x if turn is None else (x.detach().to(turn.dtype) @ turn.T).to(x.dtype).requires_grad_()
        for x, turn in zip(batch.predictions, batch.rotations, strict=True)
    ]
    constants = batch.targets + [matrix for matrix in matrices if matrix is not None]
    return Run(_eager_loss(batch, matrices), leaves, constants, batch.rotations)


def _matrix_fp64(batch: Batch) -> Run:
    return _matrix(batch, torch.float64)


def _matrix_fp32(batch: Batch) -> Run:
    return _matrix(batch, torch.float32)


PEERS: dict[str, tuple[str, Callable[[Batch], Run]]] = {
    "fastagglo": ("fastagglo", _fastagglo),
    "matrix": ("eager PHI-S, matrix in fp64", _matrix_fp64),
    "matrix-fp32": ("eager PHI-S, matrix in fp32", _matrix_fp32),
    "eager": ("eager without the matrix", _eager),
    "twin": ("eager twin (reference)", _twin),
    "compile": ("torch.compile without the matrix", _compile),
}
"""By name: what it is in words, and what makes it ready for a batch."""
