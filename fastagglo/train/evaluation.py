"""Held-out figures while a run goes on, and its pictures and report at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.data import GroupViews, PhotoSource, Source, Split, eval_views
from fastagglo.distill import Distiller
from fastagglo.errors import require
from fastagglo.eval import backbone_figure, evaluate, feature_figure, read_metrics, write_report
from fastagglo.model import PackedBatch, StudentOutput
from fastagglo.teachers import Teacher
from fastagglo.train import run_folder
from fastagglo.train.cache import FeatureCache
from fastagglo.train.config import RunConfig
from fastagglo.train.schedule import Planner
from fastagglo.train.targets import teacher_features

# Teacher features of held-out crops never change, so they are kept between evaluations up to here.
_KEPT_BYTES = 256 * 2**20


class HeldOut:
    """The held-out crops of a run, at every resolution of its figures.

    Args:
        config: the run.
        data: photos for training, whose right-hand strip is held out, and photos held out whole.
        planner: knows at which size each teacher sees a crop.
        cache: stored features of these crops.
    """

    def __init__(
        self, config: RunConfig, data: Split, planner: Planner, cache: FeatureCache | None = None
    ) -> None:
        self.config, self.data, self.planner, self.cache = config, data, planner, cache
        self._kept: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._kept_bytes = 0

    def groups(self) -> Iterator[GroupViews]:
        """All that the teachers are shown, figures and pictures."""
        for size in self.planner.eval_sizes():
            for kind in ("regions", "photos"):
                if self.config.eval.points:
                    yield from self._views(kind, size)
            yield from self._pictured(size)

    def rows(
        self, distiller: Distiller, teachers: Mapping[str, Teacher]
    ) -> list[dict[str, object]]:
        """Figures of every teacher, resolution and kind of held-out data; see `eval.evaluate`."""
        views = {
            (kind, size): self._views(kind, size)
            for kind in ("regions", "photos")
            for size in self.planner.eval_sizes()
        }
        return evaluate(
            lambda batch: {
                name: features.spatial[0]
                for name, features in self._predict(distiller, batch).items()
                if features.spatial is not None
            },
            lambda batch: self._teach(teachers, batch),
            views,
            distiller.means(),
        )

    def pictures(
        self, distiller: Distiller, teachers: Mapping[str, Teacher], folder: Path
    ) -> list[tuple[str, str, Path]]:
        """PCA pictures of student and teacher features of held-out photos, over resolutions."""
        student: dict[str, dict[int, list[Tensor]]] = {}
        teacher: dict[str, dict[int, list[Tensor]]] = {}
        backbone: dict[int, list[Tensor]] = {}
        photos: list[Tensor] = []
        for size in self.planner.eval_sizes():
            photos = []
            for batch in self._pictured(size):
                photos += list(batch.student)
                output = self._predict(distiller, batch)
                backbone.setdefault(size, []).extend(output.backbone.spatial[0])
                for name, goal in self._teach(teachers, batch).items():
                    if output.get(name) is None or output[name].spatial is None:
                        continue
                    teacher.setdefault(name, {}).setdefault(size, []).extend(goal)
                    student.setdefault(name, {}).setdefault(size, []).extend(
                        output[name].spatial[0]
                    )
        if not photos:
            return []
        return [
            backbone_figure(photos, backbone, folder / "backbone.png"),
            *feature_figure(photos, student, teacher, folder),
        ]

    def _pictured(self, size: int) -> Iterable[GroupViews]:
        kind = "photos" if len(self.data.held_out) else "regions"
        count = self.config.eval.pictures
        return self._views(kind, size, crops=1, limit=count) if count else ()

    def _views(
        self, kind: str, size: int, crops: int = 2, limit: int | None = None
    ) -> Iterable[GroupViews]:
        region = self.config.data.holdout_region
        source = self.data.train if kind == "regions" else self.data.held_out
        if len(source) == 0 or (kind == "regions" and region == 0):
            return ()
        return eval_views(
            source,
            self.planner.eval_group(size),
            kind,
            region=region,
            crops=crops,
            limit=min(limit or self.config.eval.photos, len(source)),
            addressed=self.cache is not None,
        )

    @torch.no_grad()
    def _predict(self, distiller: Distiller, batch: GroupViews) -> StudentOutput:
        device = distiller.student.patch_embed.weight.device
        precision = self.config.optimiser.precision
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return distiller.predict(PackedBatch.from_images([batch.student]).to(device))

    def _teach(self, teachers: Mapping[str, Teacher], batch: GroupViews) -> dict[str, Tensor]:
        key = (str(tuple(batch.student.shape)), *batch.keys)
        if key in self._kept:
            return self._kept[key]
        device = next(iter(teachers.values())).device
        views = {name: view.to(device) for name, view in batch.teachers.items()}
        moved = dataclasses.replace(batch, teachers=views)
        if self.cache is not None:
            features = self.cache.features([moved])[0]
        else:
            features = teacher_features(teachers, [moved], self.config.teachers)[0]
        found = {n: f.spatial for n, f in features.items() if f.spatial is not None}
        size = sum(value.nbytes for value in found.values())
        if self._kept_bytes + size <= _KEPT_BYTES:
            self._kept[key] = found
            self._kept_bytes += size
        return found


def write_outcome(
    folder: Path,
    config: RunConfig,
    distiller: Distiller,
    teachers: Mapping[str, Teacher],
    held_out: HeldOut,
) -> None:
    """Pictures and the report of a finished run, and its held-out figures on the screen."""
    distiller.eval()
    pictures = []
    if config.eval.pictures:
        pictures = held_out.pictures(distiller, teachers, folder / run_folder.PICTURES)
    metrics = read_metrics(folder / run_folder.METRICS)
    write_report(
        folder,
        config=config.to_dict(),
        metrics=metrics,
        pictures=pictures,
        credits=_credits(held_out.data.held_out) if "builtin" in config.data.images else (),
        device=distiller.student.patch_embed.weight.device,
        parameters=sum(p.numel() for p in distiller.student.parameters()),
    )
    if config.log.progress:
        print_figures([row for row in metrics if row["kind"] == "held_out"])


def print_figures(rows: list[dict[str, Any]]) -> None:
    """A table of the explained variance over the run, beside the mean predictor's."""
    if not rows:
        return
    table_module = require("rich.table", extra="train", purpose="the table of figures")
    console = require("rich.console", extra="train", purpose="the table of figures").Console()
    steps = sorted({row["step"] for row in rows})
    table = table_module.Table(title="Held-out feature variance explained", title_justify="left")
    for column in ("held out", "teacher", "pixels", *(f"step {s}" for s in steps), "mean alone"):
        table.add_column(column, justify="left" if column in ("held out", "teacher") else "right")
    by_line: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        line = (row["data"], row["teacher"], row["resolution"])
        by_line.setdefault(line, {})[row["step"]] = row
    for (kind, teacher, pixels), found in by_line.items():
        figures = [_figure(found.get(step, {}).get("explained")) for step in steps]
        baseline = _figure(found[max(found)]["mean_predictor"])
        table.add_row(kind, teacher, str(pixels), *figures, baseline)
    console.print(table)


def _credits(photos: Source) -> list[str]:
    """Who made the built-in ones of these photos."""
    credits = PhotoSource().credits
    keys = [photos.key(index) for index in range(len(photos))]
    return [f"{key}: {credits[key]}" for key in keys if key in credits]


def _figure(value: float | None) -> str:
    """A figure as printed; blank where it was not taken or is not finite (null in JSON)."""
    return "" if value is None else f"{value:+.3f}"
