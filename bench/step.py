"""The whole training step: ``Trainer`` against the same step written plainly.

Student, heads, losses, backward, clipping and optimiser, from images and teachers' features in
memory to changed weights. Ours is the trainer that ``train.py`` runs, its own step with its
telemetry; theirs is ``bench.plain_trainer``. Everyone has the same weights, photographs, features,
statistics and random crops of positions, and before anything is timed each term of the loss, the
gradient's norm and the gradients of all parameters must agree.

    python -m bench step
    pytest bench/step.py --quick
    python -m bench.step          # where the time of a step goes: bench.step_profile
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

# As train.py does, before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from bench import plain_trainer as plain
from bench.engine import (  # noqa: F401
    Goal,
    Results,
    Suite,
    Unavailable,
    close,
    pytest_generate_tests,
    test_duel,
)
from bench.measure import finish
from bench.step_cases import FIRST, Case, Remembered, cases, stand_ins
from bench.step_profile import main
from fastagglo.data import TrainBatch
from fastagglo.distill import distiller as distill
from fastagglo.errors import require
from fastagglo.features import Features
from fastagglo.model import StudentConfig
from fastagglo.train import Trainer, loop
from fastagglo.train.config import OptimiserSettings
from fastagglo.train.schedule import learning_rate
from fastagglo.train.telemetry import Telemetry

# fp32 sums over some thousand rows in another order; bf16 rounds each activation.
LIMITS = {False: 1e-3, True: 1e-1}


@dataclass(frozen=True)
class Batch:
    """Inputs of a case.

    Attributes:
        case: what they are for.
        trainer: a run between two steps, its statistics settled.
        data: photographs of a step.
        targets: features of each resolution, by teacher.
        weights: of the student before the step.
    """

    case: Case
    trainer: Trainer
    data: TrainBatch
    targets: list[dict[str, Features]]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """Always the same for a case."""
        config = case.config()
        if case.stand_ins:
            with patch.object(loop, "load_teachers", stand_ins):
                trainer = Trainer(config, torch.device(device))
        else:
            trainer = Trainer(config, torch.device(device))
        if case.cached:
            trainer.teachers = {n: Remembered(t) for n, t in trainer.teachers.items()}
        data = trainer.stream[0].to(device)
        targets = loop.teacher_features(trainer.teachers, data.groups, config.teachers)
        trainer.distiller.observe(targets)
        trainer.distiller.refresh(settle=True)
        _enliven(trainer.distiller.student)
        weights = {k: v.clone() for k, v in trainer.distiller.student.state_dict().items()}
        return cls(case, trainer, data, targets, weights)

    @property
    def given(self) -> list[Tensor]:
        """What a step reads beside what its side keeps."""
        views = [v for g in self.data.groups for v in (g.student, *g.teachers.values())]
        if not self.case.cached:
            return [*views, *(p for t in self.trainer.teachers.values() for p in t.parameters())]
        return views + [
            x
            for group in self.targets
            for features in group.values()
            for x in (features.summary, features.spatial)
            if x is not None
        ]


@torch.no_grad()
def _enliven(student: nn.Module) -> None:
    """Weights as after some training: at the start LayerScale all but hides the blocks."""
    for name, parameter in student.named_parameters():
        if name.endswith(("ls1.gamma", "ls2.gamma")):
            parameter.fill_(0.1)
        elif parameter.dim() == 2:
            parameter.mul_(2)


@dataclass
class Ours:
    """The trainer at its next steps, all with the same photographs."""

    batch: Batch
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trainer = self.batch.trainer
        trainer.distiller.student.load_state_dict(self.batch.weights)
        trainer.optimiser.state.clear()
        trainer.step = FIRST
        self.folder = tempfile.TemporaryDirectory()
        trainer.telemetry = Telemetry(
            Path(self.folder.name),
            trainer.config.total_steps,
            list(trainer.config.teachers),
            interval=trainer.config.log.interval,
            start_step=FIRST,
            quiet=True,
            tensorboard=False,
        )
        trainer.telemetry.__enter__()

    @property
    def input_bytes(self) -> int:
        trainer = self.batch.trainer
        return _bytes(
            *(self.batch.given, trainer.distiller.parameters(), trainer.distiller.buffers()),
            _state(trainer.optimiser),
        )

    def _step(self) -> None:
        trainer = self.batch.trainer
        trainer._one_step(itertools.repeat(self.batch.data))
        trainer.step += 1

    def __call__(self) -> None:
        self._step()
        self.batch.trainer.optimiser.zero_grad(set_to_none=True)

    def results(self) -> Results:
        trainer = self.batch.trainer
        terms: list[tuple[Tensor, Tensor]] = []
        loss_of = distill.multi_teacher_loss

        def recording(predictions: Any, targets: Any, given: Any) -> Any:
            result = loss_of(predictions, targets, given)
            terms.extend(zip(result.per_term, (t.weight for t in given), strict=True))
            return result

        with (
            patch.object(distill, "multi_teacher_loss", recording),
            patch.object(trainer.telemetry, "step") as told,
        ):
            self._step()
        assert told.called, "the trainer has skipped the step"
        names = [
            f"{name}.{kind}.{index}"
            for name, match in trainer.distiller.matching.items()
            for index in range(len(self.batch.data.groups))
            for kind in ("spatial", "summary")
            if getattr(match, kind) and getattr(self.batch.targets[index][name], kind) is not None
        ]
        found = {n: (x * w).detach() for n, (x, w) in zip(names, terms, strict=True)}
        found["total"] = sum(told.call_args.args[1].values())
        found["norm"] = told.call_args.kwargs["grad_norm"]
        student = trainer.distiller.student
        return found | {f"grad {n}": p.grad.clone() for n, p in student.named_parameters()}


@dataclass
class Plain:
    """The plain trainer, with our weights."""

    batch: Batch
    trainer: plain.PlainTrainer
    student: plain.PlainStudent
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        modules = (self.student, *self.trainer.normalisers.values())
        kept = (x for m in modules for x in (*m.parameters(), *m.buffers()))
        return _bytes(self.batch.given, kept, _state(self.trainer.optimiser))

    def _step(self) -> tuple[dict[str, Tensor], Tensor]:
        batch, config = self.batch, self.batch.trainer.config
        images = [group.student for group in batch.data.groups]
        if batch.case.cached:
            features = batch.targets
        else:
            features = [
                {n: teacher(g.teachers[n]) for n, teacher in batch.trainer.teachers.items()}
                for g in batch.data.groups
            ]
        targets = [{n: (f.summary, f.spatial) for n, f in group.items()} for group in features]
        loop._seed(config.seed, self.trainer.number, 0)
        uniform = torch.rand(sum(len(x) for x in images), 4, device=images[0].device)
        return self.trainer.step(images, targets, uniform)

    def __call__(self) -> None:
        self._step()
        self.trainer.optimiser.zero_grad(set_to_none=True)

    def results(self) -> Results:
        losses, norm = self._step()
        found = losses | {"total": sum(losses.values()), "norm": norm}
        return found | {f"grad {n}": p.grad.clone() for n, p in self.student.named_parameters()}


def _bytes(*parts: Iterable[Tensor]) -> int:
    """Each block of memory once: views share photographs."""
    blocks = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for p in parts for x in p
    }
    return sum(blocks.values())


def _state(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    values = (x for state in optimiser.state.values() for x in state.values())
    return [x for x in values if isinstance(x, Tensor)]


def _plain(batch: Batch, form: str = "plain", compiled: bool = False) -> Plain:
    trainer = batch.trainer
    config, student = trainer.config, trainer.distiller.student
    shape = plain_shape(student.config)
    module = plain.PlainStudent(shape).to(batch.data.groups[0].student.device)
    module.to(student.patch_embed.weight.dtype)
    module.load_state_dict(plain_names(student.config, batch.weights, _turns(batch, form)))
    normalisers: dict[str, nn.Module] = {}
    for name, basis in trainer.distiller.bases.items():
        if form == "plain-affine":
            normalisers[name] = plain.AffineNormaliser(basis.mean, basis.scale)
        else:
            dtype = torch.float64 if form == "plain" else torch.float32
            normalisers[name] = plain.MatrixNormaliser(
                basis.mean, basis.scale, basis.rotation, dtype
            )
    run = Plain(
        batch,
        plain.PlainTrainer(
            torch.compile(module, dynamic=False) if compiled else module,
            shape,
            normalisers,
            _optimiser(module, config.optimiser),
            lambda step: learning_rate(config, step),
            clip=config.optimiser.clip,
            bf16=config.optimiser.precision == "bf16",
            number=FIRST,
        ),
        module,
    )
    if compiled:
        weights = {k: v.clone() for k, v in module.state_dict().items()}
        start = time.perf_counter()
        run()
        finish(batch.weights["registers"].device.type)
        run.info["compile_seconds"] = time.perf_counter() - start
        module.load_state_dict(weights)
        run.trainer.optimiser.state.clear()
        run.trainer.number = FIRST
    return run


def _optimiser(module: nn.Module, settings: OptimiserSettings) -> torch.optim.Optimizer:
    """Over matrices, which decay, and all else: norms, biases, tokens and positions."""
    plain_kinds = ("cls_tokens", "registers", "positions")
    named = list(module.named_parameters())
    decayed = [p for n, p in named if p.dim() > 1 and n not in plain_kinds]
    rest = [p for n, p in named if p.dim() < 2 or n in plain_kinds]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if settings.name == "lamb":
        timm_optim = require("timm.optim", extra="train", purpose="the LAMB optimiser")
        return timm_optim.Lamb(groups, lr=1.0, betas=settings.betas, max_grad_norm=None)
    return torch.optim.AdamW(groups, lr=1.0, betas=settings.betas, foreach=True)


def plain_shape(config: StudentConfig) -> plain.PlainConfig:
    """The plain student's shape.

    Raises:
        Unavailable: it has no such student: gated MLPs, residual or transformer blocks in heads.
    """
    for name, spec in config.heads.items():
        odd = (spec.blocks, spec.spatial_blocks, spec.pre_norm, spec.summary_hidden)
        if any(odd) or spec.spatial is None or spec.version != "v2":
            raise Unavailable(f"the plain trainer has no such head as that of {name!r}")
    if config.mlp != "gelu" or config.drop_path:
        raise Unavailable("the plain student has no gated MLP and no stochastic depth")
    return plain.PlainConfig(
        width=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        patch=config.patch_size,
        grid=config.grid,
        registers=config.registers,
        layer_scale=config.layer_scale,
        norm_eps=config.norm_eps,
        heads={
            name: (spec.summary, spec.spatial, spec.hidden or config.width, spec.upsample)
            for name, spec in config.heads.items()
        },
    )


def _turns(batch: Batch, form: str) -> dict[str, Tensor]:
    """By teacher, what turns the last layer of a spatial head of ours into a peer's basis.

    Ours and the matrix forms predict ``R (y - mean) / scale``; without the matrix a head predicts
    ``(y - mean) / scale``, so its last weights, and their gradients, are ours times the transpose
    of R.
    """
    if form != "plain-affine":
        return {}
    return {name: basis.rotation.mT for name, basis in batch.trainer.distiller.bases.items()}


def plain_names(
    config: StudentConfig, values: Mapping[str, Tensor], turns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights (or gradients) of our student, by name, as the plain student has them."""
    p, found = config.patch_size, {}
    for name, value in values.items():
        if name == "patch_embed.weight":
            value = value.unflatten(1, (3, p, p))
        elif name == "positions.table":
            name, value = "positions", value.transpose(1, 2).unflatten(2, (config.grid, -1))
        elif name.startswith("heads."):
            _, kind, teacher, *layer = name.split(".")
            if kind == "spatial" and layer[0] == "final" and layer[1] == "2" and teacher in turns:
                turn = turns[teacher].double()
                cells = value.double().unflatten(0, (-1, len(turn)))
                cells = torch.einsum("ij,nj...->ni...", turn, cells)
                value = cells.flatten(0, 1).to(value.dtype)
            place = "0" if layer[0] == "fc1" else str(int(layer[1]) + 1)
            name = f"{kind}_heads.{teacher}.{place}.{layer[-1]}"
        found[name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")] = value
    tokens = [found.pop(f"cls_tokens.{teacher}") for teacher in config.cls_names]
    return found | {"cls_tokens": torch.stack(tokens)}


def compare(peer: str, found: Results, right: Results, batch: Batch) -> None:
    """Each term, the total, the norm, then the gradient of each of a peer's parameters."""
    trainer = batch.trainer
    limit = LIMITS[trainer.config.optimiser.precision == "bf16"]
    config = trainer.distiller.student.config
    gradients = {n.removeprefix("grad "): x for n, x in right.items() if n.startswith("grad ")}
    ours = {n: x for n, x in right.items() if not n.startswith("grad ")}
    gradients = plain_names(config, gradients, _turns(batch, peer))
    expected = ours | {f"grad {n}": x for n, x in gradients.items()}
    assert set(found) == set(expected), f"{peer}: {sorted(set(found) ^ set(expected))}"
    for name, value in expected.items():
        # A position's gradient is a channel's column; all others have channels last.
        a, b = (x.transpose(1, -1) if name == "grad positions" else x for x in (found[name], value))
        close(peer, name, a, b, limit)


SUITE = Suite(
    name="step",
    cases=cases,
    batch=Batch.of,
    peers={
        "fastagglo": ("fastagglo.train.Trainer", Ours),
        "plain": ("plain trainer, PHI-S matrix in float64", _plain),
        "plain-fp32": (
            "plain trainer, PHI-S matrix in float32",
            partial(_plain, form="plain-fp32"),
        ),
        "plain-affine": (
            "plain trainer, no PHI-S matrix",
            partial(_plain, form="plain-affine"),
        ),
        "plain-compile": (
            "plain trainer, no PHI-S matrix, student by torch.compile",
            partial(_plain, form="plain-affine", compiled=True),
        ),
    },
    compare=compare,
    rows="recipe and images",
    goals={(name, "plain"): Goal(time=0.667, memory=0.5) for name in ("demo", "demo-wide")},
    notes={
        "images": "of a step; over the seconds of a step they are images/s",
        "tokens": "rows of the student's packed matrix, CLS and registers too",
        "memory": "gradients are made and dropped within the step and count; the optimiser's state "
        "is there before it",
    },
    seconds={"cpu": 8.0, "cuda": 2.0},
)


if __name__ == "__main__":
    sys.exit(main())
