"""The training loop, from the first batch to the exported student."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastagglo.data import GroupViews, SkipCounter, TrainBatch, make_loader
from fastagglo.distill import Distiller, DistillOutput, Matching, make_ema
from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.interop.radio import radio_parameters
from fastagglo.model import PackedBatch, WarmStart, save_student, warm_start
from fastagglo.ops.sharded import whole
from fastagglo.teachers import Teacher
from fastagglo.train import run_folder
from fastagglo.train.ahead import Ahead, Targets
from fastagglo.train.budget import compiled_run
from fastagglo.train.cache import FeatureCache
from fastagglo.train.checkpoint import FORMAT, damaged, load_checkpoint, save_checkpoint
from fastagglo.train.config import EMA_VIEW, RunConfig, TeacherSettings
from fastagglo.train.distributed import all_agree, is_main, rank_and_world
from fastagglo.train.evaluation import HeldOut, write_outcome
from fastagglo.train.gpu_meter import GpuMeter
from fastagglo.train.graphs import GraphedRun, check_graphs, own_gradients
from fastagglo.train.inputs import check_decoder, crop_stream, load_split
from fastagglo.train.optim import build_optimiser, forget, set_learning_rate
from fastagglo.train.parallel import Parallel
from fastagglo.train.recipe import save_config
from fastagglo.train.schedule import Planner, eval_steps, learning_rate
from fastagglo.train.student import build_student
from fastagglo.train.targets import finite_teachers, load_teachers, teacher_features
from fastagglo.train.teacher_speed import sample_of
from fastagglo.train.telemetry import Telemetry
from fastagglo.train.verdict import Verdict
from fastagglo.train.work import StudentWork, measured_peak, teacher_flops


class Trainer:
    """One run: builds all its parts, trains, evaluates, exports.

    Everything that can be wrong with the settings, the data or the teachers shows up here, before
    the run's folder is made.

    Args:
        config: the run.
        device: where student and teachers live.
        resume: folder of the run to go on with, or None for a new run.
    """

    def __init__(self, config: RunConfig, device: torch.device, resume: Path | None = None) -> None:
        self.config, self.device = config, device
        check_decoder(config, device)
        self.rank, self.world = rank_and_world()
        self.parallel = Parallel(config.distributed, device)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        data = cache(lambda: load_split(config))
        sample = sample_of(config, lambda: data().train)
        if config.cache.folder:
            self.cache: FeatureCache | None = FeatureCache(config, device, sample=sample)
            self.teachers = self.cache.teachers
        else:
            self.cache, self.teachers = None, load_teachers(config, device, sample)
        # On a CPU nothing overlaps.
        self.ahead = device.type == "cuda" and config.teacher_stream
        self._check_widths()
        _seed(config.seed, 0, 0)  # the student is the same whether teachers were built or not
        self.distiller = self._make_distiller().to(device)
        student = self.distiller.student
        self.planner = Planner(
            config,
            {n: t.spec for n, t in self.teachers.items()},
            student.config.patch_size,
            self.world,
            self.rank,
        )
        if config.student.compile:
            self.distiller.run = compiled_run()
        if config.student.graphs:
            check_graphs(device, self.world)
            self.distiller.run = GraphedRun(self.distiller.run)
        if not is_main() and self.cache is None:  # rank 0 shows all teachers the held-out photos
            for name in self.teachers.keys() - self.planner.teachers_of_rank():
                self.teachers[name].tower = nn.Identity()  # its weights are of no use here
        self.warm_start: WarmStart | None = None
        if config.student.init and resume is None:
            source = Path(config.student.init)
            try:
                found = radio_parameters(source, student.config.num_heads)
                self.warm_start = warm_start(student, source if found is None else found)
            except UserError as error:
                raise UserError(f"setting student.init: {error}") from error
            self.distiller.heads_are_in_teacher_space(self.warm_start.copied)
        self.parallel.start_alike(self.distiller)
        self.ema = make_ema(student, config.distill.ema_decay) if config.distill.ema_decay else None
        half = config.optimiser.precision == "bf16"
        self.parallel.shard(self.distiller, student, half=half)
        if self.ema is not None:
            self.parallel.shard(self.ema.module, self.ema.module, half=half)
        self.optimiser = build_optimiser(student, self.distiller.balancer, config.optimiser)
        self.data = data()
        self.stream = crop_stream(
            config,
            self.data,
            self.planner,
            reader=None if self.cache is None else self.cache.reader,
        )
        self.held_out = HeldOut(config, self.data, self.planner, self.cache)
        self.work = StudentWork(student.config, average=config.distill.mesa_weight > 0)
        self.skips = SkipCounter(limit_fraction=config.data.max_bad_share)
        self._loss_names = [*config.teachers, *["mesa"] * (config.distill.mesa_weight > 0)]
        self.step, self.bad_steps = 0, 0
        self.stop_requested = False  # on this rank
        self._stopping = False  # on all ranks
        self._frozen: bool | None = None
        self._module: nn.Module = self.distiller
        if resume is not None:
            self._restore(resume)

    # The run.

    def run(self, folder: Path) -> bool:
        """Train to the end, writing into ``folder``.

        Returns:
            Whether the end was reached; False after an interruption, with a checkpoint written.
        """
        config, total = self.config, self.config.total_steps
        if is_main():
            save_config(config, folder)
        with (
            Telemetry(
                folder,
                total,
                list(config.teachers),
                interval=config.log.interval,
                start_step=self.step,
                quiet=not config.log.progress,
                tensorboard=config.log.tensorboard,
                enabled=is_main(),
                ranks=self.world,
                peak_flops=self._peak() if is_main() else None,
                meter=GpuMeter(self.device) if is_main() else None,
            ) as self.telemetry,
            self._stop_on_signal(),
        ):
            batches = iter(
                make_loader(
                    self.stream,
                    self.step * config.optimiser.accumulate,
                    total * config.optimiser.accumulate,
                    workers=config.data.workers,
                    device=self.device,
                )
            )
            if self.ahead:
                batches = Ahead(batches, self._counted_targets, self.telemetry.phase, self.device)
            if (warm := self.warm_start) is not None:
                parts = ("copied", "resized", "skipped", "untouched")
                counts = {part: len(getattr(warm, part)) for part in parts}
                self.telemetry.event("warm_start", step=0, **counts)
            if self.step == 0:
                for name, teacher in self.teachers.items():
                    if teacher.feature_errors:
                        self.telemetry.event(
                            "teacher_error", step=0, teacher=name, **teacher.feature_errors
                        )
            saved = -1
            while self.step < total and not self._stops():
                self._one_step(batches)
                self.step += 1
                if self.step % config.log.checkpoint_every == 0:
                    saved = self._save(folder)
            if saved != self.step:
                self._save(folder)
            if self.cache is not None:
                self.telemetry.event("cache", step=self.step, **self.cache.counts())
            finished = self.step == total
            if finished and total in eval_steps(config):
                self._evaluate()
        if finished:
            self._export(folder)
        return finished

    def _one_step(self, batches: Iterator[TrainBatch]) -> None:
        config, step, telemetry = self.config, self.step, self.telemetry
        micro_steps = config.optimiser.accumulate
        self._enter(step)
        rate = learning_rate(config, step)
        set_learning_rate(self.optimiser, rate)
        if config.student.graphs and micro_steps > 1:
            own_gradients(self.distiller.parameters())
        else:
            self.optimiser.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        flops = {"student": 0, "teachers": 0}
        verdict = Verdict(list(self.teachers), self.device)
        together = self.planner.whole(step)
        for micro in range(micro_steps):
            with telemetry.phase("data"):
                batch = next(batches)
                try:
                    self.skips.update(batch.skipped, len(batch.keys), batch.bad)
                except UserError as error:
                    raise UserError(f"setting data.max_bad_share: {error}") from error
            with telemetry.phase("teachers"):
                ahead = batches if isinstance(batches, Ahead) else None
                given = ahead.targets() if ahead else self._counted_targets(batch.groups)
                targets = given.features
                finite = finite_teachers(targets)
                verdict.features(finite)
            flops["teachers"] += given.flops
            self._statistics(targets, finite, first=micro == 0)
            with (
                telemetry.phase("student"),
                self.parallel.micro_step(self._module, last=micro + 1 == micro_steps),
            ):
                _seed(config.seed, step * micro_steps + micro, self.rank)
                output = self._forward(batch, targets)
                verdict.loss(output.total)
                (output.total / micro_steps).backward()  # all are alike
            if ahead is not None:
                ahead.prepare()
            for name, loss in output.teachers.items():
                losses[name] = losses.get(name, 0.0) + loss / micro_steps
            shapes = [(len(g.student), *g.student.shape[-2:]) for g in batch.groups]
            flops["student"] += self.work.step(
                shapes, window=batch.plan.window, frozen=bool(self._frozen)
            )
        with telemetry.phase("optimiser"):
            parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
            norm = whole(nn.utils.clip_grad_norm_(parameters, config.optimiser.clip or math.inf))
            verdict.gradient(norm)
            problem, self._stopping = verdict.read(stop=self.stop_requested)
            if not problem:
                self.optimiser.step()
                if self.ema is not None:
                    self.ema.update_parameters(self.distiller.student)
        if problem:
            self._count_bad_step(problem)
            return
        self.bad_steps = 0
        telemetry.step(
            step,
            self.parallel.mean(losses, self._loss_names),
            images=together.images,
            tokens=together.tokens(self.distiller.student.config.prefix_tokens),
            lr=rate,
            grad_norm=norm,
            skipped=dict(self.skips.counts),
            extra={"expected_idle_share": together.idle} if self.world > 1 else None,
            flops=flops,
        )

    def _peak(self) -> float:
        """FLOP/s that MFU is a share of, in the fastest type in use."""
        if self.config.log.peak_tflops:
            return self.config.log.peak_tflops * 1e12
        half = {t.dtype for t in self.config.teachers.values()} - {"float32"}
        if self.config.optimiser.precision == "bf16" or half:
            return measured_peak(self.device, torch.bfloat16)
        return measured_peak(self.device, torch.float32)

    def _stops(self) -> bool:
        """Whether to stop now; of several ranks, all must know."""
        return self.stop_requested if self.world == 1 else self._stopping

    def _targets(self, groups: Sequence[GroupViews]) -> list[dict[str, Features]]:
        if self.cache is not None:
            return self.cache.features(groups)
        return teacher_features(self.teachers, groups, self.config.teachers)

    def _counted_targets(self, groups: Sequence[GroupViews]) -> Targets:
        before = teacher_flops(self.teachers)
        features = self._targets(groups)
        return Targets(features, teacher_flops(self.teachers) - before)

    def _forward(self, batch: TrainBatch, targets: list[dict[str, Features]]) -> DistillOutput:
        config, window = self.config, batch.plan.window
        limits = batch.plan.capacity, batch.plan.max_images
        packed = PackedBatch.from_images([group.student for group in batch.groups], *limits)
        average = average_shifts = None
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=config.optimiser.precision == "bf16"
        ):
            if config.distill.mesa_weight > 0:
                views = [g.teachers.get(EMA_VIEW, g.student) for g in batch.groups]
                average_shifts = [g.shifts.get(EMA_VIEW) for g in batch.groups]
                with torch.no_grad():
                    views = PackedBatch.from_images(views, *limits)
                    # No heads.
                    run = self.distiller.run
                    average = self.ema.module(views, window=window, only=(), run=run)
            return self._module(
                packed,
                targets,
                [group.shifts for group in batch.groups],
                window=window,
                average=average,
                average_shifts=average_shifts,
            )

    def _export(self, folder: Path) -> None:
        """The student, its average and the report, written by rank 0."""
        distiller = self.parallel.whole(self.distiller, self._make_distiller)
        average = None
        if self.ema is not None:
            average = self.parallel.whole(self.ema.module, lambda: self._make_distiller().student)
        if distiller is None:
            return
        save_student(distiller.export(), folder / run_folder.STUDENT)
        if average is not None:
            save_student(distiller.export(average), folder / run_folder.AVERAGE)
        write_outcome(folder, self.config, distiller, self.teachers, self.held_out)

    # What changes between steps.

    def _enter(self, step: int) -> None:
        """Stage changes and the thawing of the trunk, before a step."""
        index, stage_step = self.config.stage_at(step)
        stage = self.config.stages[index]
        if stage_step == 0:
            if index > 0 and stage.phi_s_steps:
                self.distiller.start_fitting()
            self.telemetry.event("stage", step=step, name=stage.name, index=index)
        frozen = stage_step < stage.freeze_trunk_steps
        if frozen != self._frozen:
            self._frozen = frozen
            for parameter in self.distiller.student.trunk_parameters():
                parameter.requires_grad_(not frozen)
            # DDP fixes which parameters it reduces when it is built.
            self._module = self.parallel.wrap(self.distiller)
        self.distiller.train()

    def _statistics(
        self, targets: list[dict[str, Features]], finite: dict[str, Tensor], *, first: bool
    ) -> None:
        """Fit the teachers' statistics in the first steps of a stage; figures at the start."""
        index, stage_step = self.config.stage_at(self.step)
        fit_steps = self.config.stages[index].phi_s_steps
        if stage_step < fit_steps:
            # Not observed if not finite; yet this may be the step that ends a fit.
            fine = all(bool(ok) for ok in finite.values())
            self.distiller.observe(targets if all_agree(fine, self.device) else [])
            seen = stage_step + 1
            settle = seen == fit_steps
            # In the first stage nothing better is in use, so the early estimates are; they are
            # refreshed at doubling intervals.
            if first and (settle or (index == 0 and seen & (seen - 1) == 0)):
                average = None if self.ema is None else self.ema.module
                for layer in self.distiller.refresh(settle=settle, average=average):
                    forget(self.optimiser, layer)
        if first and self.step in eval_steps(self.config):
            self._evaluate()

    def _count_bad_step(self, problem: str) -> None:
        self.bad_steps += 1
        self.telemetry.event("skipped_step", step=self.step, reason=problem)
        if self.bad_steps >= self.config.log.max_bad_steps:
            raise UserError(
                f"training stopped at step {self.step}: {problem}, {self.bad_steps} steps in a row "
                "(setting log.max_bad_steps); lower stages.N.lr, or check the teacher and its dtype"
            )

    def _evaluate(self) -> None:
        with self.telemetry.phase("evaluation"):
            distiller = self.parallel.whole(self.distiller, self._make_distiller)
            rows = []
            if distiller is not None:
                rows = self.held_out.rows(distiller.eval(), self.teachers)
        for row in rows:
            self.telemetry.event("held_out", step=self.step, **row)
        self.distiller.train()

    # Checkpoints.

    def _save(self, folder: Path) -> int:
        self.distiller.gather_statistics()
        if self.cache is not None:
            self.cache.flush()
        state = self._state()
        if is_main():
            save_checkpoint(state, folder)
        return self.step

    def _state(self) -> dict:
        """All that a checkpoint holds, on rank 0. A collective call where weights are sharded."""
        whole_state = self.parallel.whole_state
        return {
            "format": FORMAT,
            "step": self.step,
            "bad_steps": self.bad_steps,
            "skipped": dict(self.skips.counts),
            "images": self.skips.images,
            "config": self.config.to_dict(),
            "distiller": whole_state(self.distiller.state_dict()),
            "optimiser": whole_state(self.optimiser.state_dict()),
            "ema": None if self.ema is None else whole_state(self.ema.state_dict()),
        }

    def _restore(self, folder: Path) -> None:
        # Of a sharded model the device never holds all.
        where = torch.device("cpu") if self.parallel.sharded else self.device
        state = load_checkpoint(folder, where)
        run_folder.check_same_run(self.config, state["config"], folder)
        try:
            self.parallel.load(self.distiller, state["distiller"])
            if self.rank > 0:
                self.distiller.disown_statistics()  # rank 0 goes on with those of all ranks
            self.parallel.load_optimiser(self.optimiser, state["optimiser"])
            if self.ema is not None:
                self.parallel.load(self.ema, state["ema"])
            self.skips.update(state["skipped"], state["images"])
            self.step, self.bad_steps = state["step"], state["bad_steps"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged(folder, error) from error

    def _make_distiller(self) -> Distiller:
        """With fresh weights and no statistics."""
        config = self.config
        widths = {n: (t.spec.summary, t.spec.spatial) for n, t in self.teachers.items()}
        try:
            student = build_student(config, widths)
        except ValueError as error:  # settings that contradict each other
            raise UserError(f"setting student: {error}") from error
        return Distiller(
            student,
            {name: _matching(t, self.teachers[name]) for name, t in config.teachers.items()},
            balance=config.distill.balance,
            teacher_drop=config.distill.teacher_drop,
            mesa_weight=config.distill.mesa_weight,
        )

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint."""

        def request(number: int, frame: object) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True

        old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _check_widths(self) -> None:
        for name, settings in self.config.teachers.items():
            spec = self.teachers[name].spec
            for setting, stated, found, weight in (
                ("summary", settings.summary_width, spec.summary, settings.summary_weight),
                ("spatial", settings.spatial_width, spec.spatial, settings.spatial_weight),
            ):
                if stated is not None and found is not None and stated != found:
                    raise UserError(
                        f"setting teachers.{name}.{setting}_width is {stated}, but "
                        f"{settings.model} has {found}"
                    )
                if found is None and weight > 0:
                    raise UserError(
                        f"setting teachers.{name}.{setting}_weight is {weight:g}, but "
                        f"{settings.model} has no {setting} features; set it to 0"
                    )


def _matching(settings: TeacherSettings, teacher: Teacher) -> Matching:
    return Matching(
        summary=teacher.spec.summary if settings.summary_weight > 0 else None,
        spatial=teacher.spec.spatial if settings.spatial_weight > 0 else None,
        summary_loss=settings.summary_loss,
        spatial_loss=settings.spatial_loss,
        summary_weight=settings.summary_weight,
        spatial_weight=settings.spatial_weight,
        normaliser=settings.normaliser,
        resize=settings.resize,
    )


def _seed(seed: int, micro_step: int, rank: int) -> None:
    """Seed every generator for one micro-step, so that no generator state need be saved."""
    number = int(np.random.SeedSequence((seed, micro_step, rank)).generate_state(1, np.uint64)[0])
    torch.manual_seed(number & (2**63 - 1))
    random.seed(number)
    np.random.seed(number & (2**32 - 1))
