"""Student, statistics and losses of one distillation step.

The road of a step: the student's heads predict each teacher's *normalised* features
``R (y - mean) / scale`` (PHI-S, arXiv 2410.01680). Where the loss does not see rotations (mse,
cosine, angular) the rotation is folded into the head's last weight, so no target is ever multiplied
by a C x C matrix; smooth L1, and what contains it, sees them and pays for that product. Statistics
are fitted while training goes on; whenever they are refreshed, each head's last layer is rewritten
so that what it says about the teacher's own features stays exactly the same: the targets of the
loss move, the student does not jump.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastagglo.distill.balance import make_balancer, teacher_dropping
from fastagglo.distill.dispersion import Dispersion, update_together
from fastagglo.distill.ema import mesa_loss, mesa_weight
from fastagglo.distill.phi_s import PhiS
from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.model import AdaptorMLP, PackedBatch, Student, StudentOutput, run_budget
from fastagglo.model.budget import BudgetRun
from fastagglo.ops import Affine, LossTerm, multi_teacher_loss, term_image_weights

# Losses that give the same number when prediction and target are rotated together.
ROTATION_FREE = ("mse", "cosine", "angular")


@dataclass(frozen=True)
class Matching:
    """How one teacher is matched; the names are those of the recipe's teacher settings."""

    summary: int | None
    spatial: int | None
    summary_loss: str = "cosine"
    spatial_loss: str = "mse"
    summary_weight: float = 1.0
    spatial_weight: float = 1.0
    normaliser: str = "phi-s"
    resize: str = "larger"


class DistillOutput(NamedTuple):
    """Losses of a step. (A tuple, in which DDP and FSDP find the tensors.)

    Attributes:
        total: what to differentiate, 0-d.
        teachers: weighted loss of each teacher before balancing, 0-d, detached; ``"mesa"`` beside
            them where it is used.
    """

    total: Tensor
    teachers: dict[str, Tensor]


class Basis(nn.Module):
    """The normalisation in use for one teacher's spatial features.

    Attributes:
        mean: ``(C,)``. scale: 0-d or ``(C,)``. rotation: ``(C, C)``, the identity until the
            statistics are settled.
        ready: whether any statistics are in use yet.
        settled: whether they are final, with their rotation where the kind has one. Both are kept
            on the host, where asking each step costs nothing, and ride in the state dict.
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor

    def __init__(self, channels: int, per_channel: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels if per_channel else ()))
        self.register_buffer("rotation", torch.eye(channels))
        self.ready = False
        self.settled = False

    def get_extra_state(self) -> dict[str, bool]:
        return {"ready": self.ready, "settled": self.settled}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.ready, self.settled = state["ready"], state["settled"]

    def denormalise(self, features: Tensor) -> Tensor:
        """From the unrotated normalised space back to the teacher's own."""
        return features * self.scale + self.mean


class Distiller(nn.Module):
    """Computes the loss of a step from images and teacher features.

    Args:
        student: its heads must bear the teachers' names.
        matching: how each teacher is matched, by name.
        balance: see `fastagglo.distill.make_balancer`.
        teacher_drop: per image, the probability of dropping each teacher but the one with the
            largest loss (UNIC, arXiv 2408.05088).
        mesa_weight: weight of the match to the average student (C-RADIOv4).

    Attributes:
        run: what computes the student's part of constant shapes, where a batch has a capacity;
            see `fastagglo.model.run_budget`. Set it at will.
    """

    def __init__(
        self,
        student: Student,
        matching: Mapping[str, Matching],
        *,
        balance: str = "fixed",
        teacher_drop: float = 0.0,
        mesa_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.matching = dict(matching)
        self.teacher_drop = teacher_drop
        self.mesa_weight = mesa_weight
        self.balancer = make_balancer(balance, list(matching))
        self.run: BudgetRun = run_budget
        self.bases = nn.ModuleDict()
        self.fitting = nn.ModuleDict()
        self.dispersions = nn.ModuleDict()
        for name, match in self.matching.items():
            if match.spatial and match.normaliser != "none":
                self.bases[name] = Basis(match.spatial, match.normaliser == "standardize")
                self.fitting[name] = PhiS(match.spatial, kind=match.normaliser)
            elif match.spatial:
                # Raw targets: the statistics only say what the mean predictor of the figures is.
                self.fitting[name] = PhiS(match.spatial, kind="global")
            if match.summary and match.summary_loss == "angular":
                self.dispersions[name] = Dispersion(match.summary)
                self.register_buffer(f"dispersion_{name}", torch.ones(()))

    # Statistics.

    def start_fitting(self) -> None:
        """Begin the statistics anew (a stage with other resolutions); those in use stay in use."""
        for statistics in (*self.fitting.values(), *self.dispersions.values()):
            statistics.reset()

    def observe(self, targets: Sequence[Mapping[str, Features]]) -> None:
        """Take one batch of teacher features (per image group) into the statistics.

        A collective call: every rank takes part, also with nothing to take in.
        """
        summaries: dict[str, list[Tensor]] = {name: [] for name in self.dispersions}
        for group in targets:
            for name, features in group.items():
                if name in self.fitting and features.spatial is not None:
                    self.fitting[name].update(features.spatial)
                if name in self.dispersions and features.summary is not None:
                    summaries[name].append(features.summary)
        update_together(self.dispersions, summaries)

    @torch.no_grad()
    def gather_statistics(self) -> None:
        """Give rank 0 the statistics of all ranks, for its checkpoint, and leave the others none.

        Their sum over ranks, which `refresh` puts into use, stays the same. A collective call.
        """
        if not dist.is_initialized():
            return
        for phi in self.fitting.values():
            phi.all_reduce()
        for dispersion in self.dispersions.values():
            total = dispersion.merged()
            dispersion.reset()
            dispersion.load_state_dict(total.state_dict())
        if dist.get_rank() > 0:
            self.disown_statistics()

    def disown_statistics(self) -> None:
        """Leave the statistics, the same on all ranks, to another rank that goes on with them."""
        for phi in self.fitting.values():
            phi.reset()
        for dispersion in self.dispersions.values():
            dispersion.disown()

    @torch.no_grad()
    def refresh(self, *, settle: bool, average: Student | None = None) -> list[nn.Module]:
        """Put the statistics seen so far, over all ranks, into use.

        Args:
            settle: the last refresh of a fit: the rotation is computed too.
            average: the average student, whose heads are rewritten alike.

        Returns:
            Layers whose basis was rotated, whose optimiser state has lost its meaning.

        Raises:
            UserError: nothing to settle on: a teacher had no finite features at all.
        """
        rotated: list[nn.Module] = []
        for name, basis in self.bases.items():
            phi = self.fitting[name]
            merged = deepcopy(phi)
            if dist.is_initialized():
                merged.all_reduce()
            if merged.count < 2:
                if settle:
                    raise UserError(
                        f"teacher {name!r}: none of its features were finite in the steps that "
                        "fit its statistics (setting stages.N.phi_s_steps); check it and its dtype"
                    )
                continue
            affine = merged.affine
            rotation = None
            if settle:
                merged.finish(src=0)
                if merged.rotation is not None:
                    # In the precision of the basis, fp64 in a distiller that is.
                    rotation = merged.final_rotation.to(basis.rotation.dtype)
            for student in (self.student, average) if average is not None else (self.student,):
                head = student.heads.spatial[name]
                if basis.ready:
                    _rebase(head, basis, affine, rotation)
                elif rotation is not None:
                    head.rotate_output_(rotation)
            if settle or basis.settled:
                rotated.append(self.student.heads.spatial[name])
            basis.mean.copy_(affine.mean)
            basis.scale.copy_(affine.scale)
            basis.rotation.copy_(torch.eye(len(basis.mean)) if rotation is None else rotation)
            basis.ready, basis.settled = True, rotation is not None
        for name, dispersion in self.dispersions.items():
            getattr(self, f"dispersion_{name}").copy_(dispersion.merged().value)
        return rotated

    def means(self) -> dict[str, Tensor]:
        """Mean of each teacher's spatial features, ``(C,)``, of those that have been seen."""
        found = {name: basis.mean for name, basis in self.bases.items() if basis.ready}
        raw = {name: phi for name, phi in self.fitting.items() if name not in self.bases}
        return found | {name: phi.mean for name, phi in raw.items() if phi.count > 0}

    def heads_are_in_teacher_space(self, copied: Collection[str]) -> None:
        """Say that heads already predict their teachers' own features (a warm start).

        Args:
            copied: names of the student's parameters that came from an exported student. A head
                whose output layer is not among them starts from the mean of its teacher.
        """
        for name, basis in self.bases.items():
            basis.ready = f"heads.spatial.{name}.final.2.bias" in copied

    # The step.

    def forward(
        self,
        batch: PackedBatch,
        targets: Sequence[Mapping[str, Features]],
        shifts: Sequence[Mapping[str, Tensor]],
        *,
        window: int | None = None,
        average: StudentOutput | None = None,
        average_shifts: Sequence[Tensor | None] | None = None,
    ) -> DistillOutput:
        """Loss of one micro-batch.

        Args:
            batch: the student's images, one group per resolution.
            targets: for each group, each teacher's features. A teacher may be missing from a
                group; its head gets gradients of zero for those images.
            shifts: for each group, ``(N, 2)`` offsets of each teacher's view from the student's
                in student patches; a missing name means none.
            window: side of the attention windows in tokens, or None for global attention.
            average: output of the average student, for MESA.
            average_shifts: for each group, the offsets of its views from the student's.
        """
        rotations = self._folded_rotations(always=batch.capacity is not None)
        output = self.student(batch, rotations=rotations, window=window, run=self.run)
        mesa = None
        if average is not None:
            mesa = (output.backbone.spatial, average.backbone.spatial, average_shifts)
        pairs = list(self._pairs(output, batch, targets, shifts))
        pairs, denominator = self._with_denominators(pairs, mesa)
        result = multi_teacher_loss(
            [pair.prediction for pair in pairs],
            [pair.target for pair in pairs],
            [pair.term for pair in pairs],
        )
        if self.teacher_drop > 0 and self.training:
            kept = self._kept_shares(pairs, result.per_image, batch.num_images)
        losses = self._nothing(output, pairs)
        for index, pair in enumerate(pairs):
            loss = result.per_term[index]
            if self.teacher_drop > 0 and self.training:
                share = kept[list(self.matching).index(pair.teacher), pair.images]
                weighted = result.image_weights[index] * share * result.per_image[index]
                loss = weighted.sum() / pair.term.denominator
            losses[pair.teacher] = losses.get(pair.teacher, 0.0) + pair.weight * loss
        total, _ = self.balancer(losses)
        if mesa is not None:
            losses["mesa"] = self.mesa_weight * mesa_loss(*mesa, denominator)
            total = total + losses["mesa"]
        return DistillOutput(total, {name: loss.detach() for name, loss in losses.items()})

    def predict(self, batch: PackedBatch, window: int | None = None) -> StudentOutput:
        """The student's output with spatial features in each teacher's own space."""
        rotations = {name: basis.rotation for name, basis in self.bases.items() if basis.settled}
        output = self.student(batch, rotations=rotations, window=window)
        for name, basis in self.bases.items():
            spatial = [basis.denormalise(s) for s in output[name].spatial]
            output[name] = Features(output[name].summary, spatial)
        return output

    @torch.no_grad()
    def export(self, average: Student | None = None) -> Student:
        """A copy of the student whose heads predict the teachers' own features by themselves.

        Args:
            average: copy the average student instead.
        """
        student = deepcopy(self.student if average is None else average).requires_grad_(True)
        for name, basis in self.bases.items():
            rotation = basis.rotation if basis.settled else None
            student.heads.spatial[name].fold_affine_(basis.mean, basis.scale, rotation)
        return student

    def _folded_rotations(self, always: bool) -> dict[str, Tensor]:
        """Rotations that the heads' last weights take in; ``always``: identities before there are
        any, so that a compiled student need not be compiled again when there are."""
        return {
            name: basis.rotation
            for name, basis in self.bases.items()
            if (basis.settled or (always and self.matching[name].normaliser == "phi-s"))
            and self.matching[name].spatial_loss in ROTATION_FREE
        }

    def _normaliser(self, name: str) -> Affine | None:
        if name not in self.bases:
            return None
        basis = self.bases[name]
        folded = self.matching[name].spatial_loss in ROTATION_FREE
        rotation = basis.rotation if basis.settled and not folded else None
        return Affine(basis.mean, basis.scale, rotation)

    def _pairs(
        self,
        output: StudentOutput,
        batch: PackedBatch,
        targets: Sequence[Mapping[str, Features]],
        shifts: Sequence[Mapping[str, Tensor]],
    ) -> Iterator[_Pair]:
        """What is compared with what: one pair per teacher, kind of feature and image group."""
        counts = [len(group) for group in batch.groups]
        for name, match in self.matching.items():
            # The kernels put a term's weight into its gradient at once: nothing is left to scale.
            spatial = LossTerm(
                match.spatial_loss,
                weight=match.spatial_weight,
                normaliser=self._normaliser(name),
                resize=match.resize,
            )
            summary = LossTerm(
                match.summary_loss,
                weight=match.summary_weight,
                dispersion=getattr(self, f"dispersion_{name}", 1.0),
            )
            if match.summary and match.summary_weight > 0:
                summaries = output[name].summary.split(counts)
            first = 0
            for index, (group, count) in enumerate(zip(targets, counts, strict=True)):
                images = slice(first, first + count)
                first += count
                if (goal := group.get(name)) is None:
                    continue
                if match.spatial and match.spatial_weight > 0 and goal.spatial is not None:
                    term = replace(spatial, shift=shifts[index].get(name))
                    prediction = output[name].spatial[index]
                    weight = match.spatial_weight
                    yield _Pair(name, "spatial", images, weight, term, prediction, goal.spatial)
                if match.summary and match.summary_weight > 0 and goal.summary is not None:
                    weight, prediction = match.summary_weight, summaries[index]
                    yield _Pair(name, "summary", images, weight, summary, prediction, goal.summary)

    def _kinds(self) -> list[tuple[str, str]]:
        """Each teacher and kind of feature that the student learns, in one order on all ranks."""
        found = []
        for name, match in self.matching.items():
            if match.spatial and match.spatial_weight > 0:
                found.append((name, "spatial"))
            if match.summary and match.summary_weight > 0:
                found.append((name, "summary"))
        return found

    def _nothing(self, output: StudentOutput, pairs: Sequence[_Pair]) -> dict[str, Tensor]:
        """A loss of zero, which its head takes part in, for what has no target in this batch.

        Other ranks may have targets for it, and gradients are averaged over all.
        """
        losses: dict[str, Tensor] = {}
        for name, kind in self._kinds():
            if not any((pair.teacher, pair.kind) == (name, kind) for pair in pairs):
                features = output[name]
                rows = features.summary if kind == "summary" else features.spatial[0]
                nothing = rows[:0].sum(dtype=torch.float32)  # zero whatever the rows hold
                losses[name] = losses[name] + nothing if name in losses else nothing
        return losses

    def _with_denominators(
        self, pairs: list[_Pair], mesa: tuple[Any, ...] | None
    ) -> tuple[list[_Pair], Tensor]:
        """Give the terms of one teacher and kind a common denominator over groups and ranks.

        Beside them MESA's, of the arguments ``mesa`` of its loss.
        """
        # The same places on every rank, whatever a rank has to compare.
        places = {kind: place for place, kind in enumerate(self._kinds())}
        prediction = pairs[0].prediction
        dtype = torch.promote_types(torch.float32, prediction.dtype)
        sums = torch.zeros(len(places) + 1, device=prediction.device, dtype=dtype)
        for pair in pairs:
            weights = term_image_weights(pair.prediction.shape, pair.target.shape, pair.term)
            sums[places[pair.teacher, pair.kind]] += weights.sum(dtype=dtype)
        if mesa is not None:
            sums[-1] = mesa_weight(*mesa)
        if dist.is_initialized():
            # Gradients are averaged over ranks, so each rank divides by its share of the sum.
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        sums.clamp_(min=1e-12)
        found = []
        for pair in pairs:
            denominator = sums[places[pair.teacher, pair.kind]]
            found.append(replace(pair, term=replace(pair.term, denominator=denominator)))
        return found, sums[-1]

    def _kept_shares(self, pairs: list[_Pair], per_image: Sequence[Tensor], images: int) -> Tensor:
        """``(teachers, images)`` coefficients of teacher dropping, with a mean of 1."""
        names = list(self.matching)
        losses = torch.zeros(len(names), images, device=per_image[0].device)
        present = torch.zeros(len(names), images, dtype=torch.bool, device=losses.device)
        for pair, loss in zip(pairs, per_image, strict=True):
            losses[names.index(pair.teacher), pair.images] += pair.weight * loss.detach()
            present[names.index(pair.teacher), pair.images] = True
        # The coefficients of an image sum to one; the plain loss counts each of its teachers once.
        return teacher_dropping(losses, p=self.teacher_drop, mask=present) * present.sum(0)


@dataclass(frozen=True)
class _Pair:
    """A prediction beside its target; ``images`` are their places in the batch."""

    teacher: str
    kind: str
    images: slice
    weight: float
    term: LossTerm
    prediction: Tensor
    target: Tensor


def _rebase(head: AdaptorMLP, old: Basis, new: Affine, rotation: Tensor | None) -> None:
    """Rewrite a head's last layer from one normalisation to another, the function unchanged."""
    head.fold_affine_(old.mean, old.scale, old.rotation if old.settled else None)
    head.fold_affine_(-new.mean / new.scale, 1 / new.scale, None)
    if rotation is not None:
        head.rotate_output_(rotation)
