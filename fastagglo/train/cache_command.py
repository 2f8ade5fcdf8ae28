"""``python train.py cache``: compute the teachers' features of all fixed crops, or check them."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from torch.utils.data import DataLoader, Dataset

from fastagglo.data import BadImage, CropStream, GroupPlan, GroupViews, SkipCounter
from fastagglo.errors import UserError, require
from fastagglo.features import Features
from fastagglo.model.config import preset
from fastagglo.train.cache import FeatureCache
from fastagglo.train.config import RunConfig
from fastagglo.train.distributed import choose_device, is_main, process_group, rank_and_world
from fastagglo.train.evaluation import HeldOut
from fastagglo.train.feature_store import FeatureStore, relative_error
from fastagglo.train.inputs import crop_stream, load_split
from fastagglo.train.recipe import parse_arguments
from fastagglo.train.schedule import Planner, on_all_ranks
from fastagglo.train.targets import teacher_features
from fastagglo.train.teacher_speed import report_of, sample_of

# How far features made again may be from the stored ones (see `relative_error`): other batches
# and other machines round otherwise, a little in float32, more in half precision and in int8.
_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ALLOWED_INT8 = 5e-2
_VIEWS_AT_ONCE = 32  # of one plan, through a teacher
_LINE_SECONDS = 5.0


def main(arguments: Sequence[str]) -> None:
    """Build or check the cache of a recipe; ``arguments`` are those after ``cache``."""
    config, chosen = parse(arguments)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = choose_device(config.device)
    with process_group(device):
        work = CacheWork(config, device)
        try:
            work.verify(chosen.sample) if chosen.verify else work.build()
        except KeyboardInterrupt:
            work.cache.flush()
            raise UserError("stopped; the same command goes on from here") from None


def parse(arguments: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """The run of a command line after ``cache``, and ``verify`` and ``sample``.

    Raises:
        UserError: a setting makes no sense, or there is no ``cache.folder``.
    """
    parser = argparse.ArgumentParser(
        prog="train.py cache",
        allow_abbrev=False,
        description="Store the teachers' features of all fixed crops of a recipe's photos, or go "
        "on where that stopped. Needs --cache.folder and --data.crops-per-photo, in the recipe or "
        "here; any other setting may follow, as for train.py.",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check what is stored instead of adding to it"
    )
    parser.add_argument(
        "--sample", type=int, default=8, help="photos that --verify makes again (default 8)"
    )
    chosen, rest = parser.parse_known_args(list(arguments))
    config = parse_arguments(rest)
    if config.cache.folder is None:
        raise UserError("setting cache.folder: say where features are stored (--cache.folder PATH)")
    if chosen.sample < 1:
        raise UserError(f"--sample must be at least 1, got {chosen.sample}")
    return config, chosen


class CacheWork:
    """The fixed crops of a run and their stored features.

    Args:
        config: the run; with ``cache.folder`` and ``data.crops_per_photo``.
        device: where the teachers compute.

    Raises:
        UserError: a setting, the data, a teacher or the folder cannot be used.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world = rank_and_world()
        data = cache(lambda: load_split(config))
        sample = sample_of(config, lambda: data().train)
        self.cache = FeatureCache(config, device, strict=True, sample=sample)
        planner = Planner(
            on_all_ranks(config),
            {name: teacher.spec for name, teacher in self.cache.teachers.items()},
            config.student.patch_size or preset(config.student.preset).patch_size,
        )
        self.plans = planner.crop_plans()
        self.data = data()
        self.photos = range(self.rank, len(self.data.train), self.world)
        self._planner = planner

    def build(self) -> None:
        """Compute and store what is missing, this rank's share of the photos."""
        config, cache = self.config, self.cache
        if not cache.store:
            raise UserError("setting cache.store is false: to build the cache it must be true")
        for line in report_of((n, t.feature_errors) for n, t in cache.teachers.items()):
            say(line)
        for store in cache.stores.values():
            store.sweep()
        say(
            f"{len(self.data.train)} photos x {config.data.crops_per_photo} crops, "
            f"{len(cache.teachers)} teachers, in {cache.folder}: up to {_size(self._most())} "
            f"({_size(shutil.disk_usage(cache.folder).free)} free)"
        )
        photos = _Photos(self._stream(_Present(cache.stores)), self.plans, self.photos)
        # As in training: the settings say how many bad photos are too many.
        skips = SkipCounter(limit_fraction=config.data.max_bad_share)
        loader = DataLoader(photos, batch_size=None, num_workers=config.data.workers)
        began = time.perf_counter()
        with _progress(len(photos), "photos") as advance:
            waiting: list[list[GroupViews]] = []
            for number, (groups, bad) in enumerate(loader, start=1):
                _count(skips, bad)
                if groups:
                    waiting.append(groups)
                views = len(waiting) * config.data.crops_per_photo
                if views >= _VIEWS_AT_ONCE or number == len(photos):
                    self._compute(waiting)
                    waiting.clear()
                advance(number, f"{cache.computed} views computed, {cache.read} found")
            if is_main():
                for group in HeldOut(config, self.data, self._planner, cache).groups():
                    cache.features([_on(group, self.device)])
            cache.flush()
        seconds = time.perf_counter() - began
        self._say_what_there_is()
        say(f"{cache.computed} computed and {cache.read} found in {seconds:.1f} s")
        for name, error in cache.errors.items():
            say(f"{name}: {config.cache.storage} is off by {error:.2g} of the features' deviation")
        if skips.skipped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skips.counts.items()))
            say(f"photos that cannot be used: {reasons}")

    def verify(self, sample: int) -> None:
        """Check every entry's checksum, and make the features of some photos again.

        Args:
            sample: how many photos, evenly over this rank's.

        Raises:
            UserError: entries are damaged or differ from what the teachers say.
        """
        cache = self.cache
        for store in cache.stores.values():
            self._check_sums(store)
        damaged = [what for store in cache.stores.values() for what in store.damaged]
        count = min(sample, len(self.photos))
        chosen = [self.photos[i * len(self.photos) // count] for i in range(count)]
        errors: dict[tuple[str, bytes], float | None] = {}
        stream = self._stream(None)
        with _progress(count, "photos made again") as advance:
            for number, index in enumerate(chosen, start=1):
                try:
                    groups = stream.fixed_views(index, self.plans)
                except BadImage:
                    continue
                for group in groups:
                    for name in cache.teachers:
                        names = [(name, address) for address in group.addresses[name]]
                        errors.update(zip(names, self._compare(name, group), strict=True))
                advance(number, "")
        self._say_what_there_is()
        wrong = Counter[str]()
        for name in cache.teachers:
            known = [e for (other, _), e in errors.items() if other == name and e is not None]
            wrong[name] = sum(not error <= self._allowed(name) for error in known)
            if self.config.teachers[name].mosaic:
                say(f"{name}: checksums only, since a mosaic's features depend on its neighbours")
            else:
                most = max(known, default=0.0)
                say(f"{name}: off by at most {most:.2g} (allowed {self._allowed(name):g})")
        if missing := sum(error is None for error in errors.values()):
            say(f"{missing} views of {count} photos are not stored: go on with train.py cache")
        if damaged or any(wrong.values()):
            differ = ", ".join(f"{n} of {name}" for name, n in wrong.items() if n)
            problems = [f"damaged: {'; '.join(damaged[:3])}"] if damaged else []
            problems += [f"views that differ from the teacher's: {differ}"] if differ else []
            raise UserError(
                f"setting cache.folder: {cache.folder} cannot be trusted ({'; '.join(problems)}); "
                "remove the damaged files, or the folder, and run train.py cache again"
            )

    def _stream(self, reader: _Present | None) -> CropStream:
        return crop_stream(self.config, self.data, self._planner, reader=reader)

    def _compute(self, photos: Sequence[list[GroupViews]]) -> None:
        # Plan by plan: a view that two resolutions share is found the second time.
        for number in range(len(self.plans)):
            groups = [_on(photo[number], self.device) for photo in photos]
            self.cache.features(groups)
            for group in groups:
                for name, store in self.cache.stores.items():
                    for key, address in zip(group.keys, group.addresses[name], strict=True):
                        if address not in store:
                            raise UserError(
                                f"features of teachers.{name} for {key!r} are not finite; check "
                                f"the teacher and its dtype ({self.config.teachers[name].dtype})"
                            )

    def _check_sums(self, store: FeatureStore) -> None:
        addresses = store.addresses()[self.rank :: self.world]
        with warnings.catch_warnings(), _progress(len(addresses), "entries read") as advance:
            warnings.simplefilter("ignore")  # they are listed in the end
            for number, address in enumerate(addresses, start=1):
                store.read(address)
                advance(number, "")

    def _compare(self, name: str, group: GroupViews) -> list[float | None]:
        """How far each stored view of a group is from the teacher's own; None if not stored."""
        store = self.cache.stores[name]
        found = [store.read(address) for address in group.addresses[name]]
        if self.config.teachers[name].mosaic:
            return [None if features is None else 0.0 for features in found]
        views = group.teachers[name].to(self.device)
        group = GroupViews(views, {name: views})
        teacher = {name: self.cache.teachers[name]}
        again = teacher_features(teacher, [group], self.config.teachers)[0][name]
        cpu = Features(*(None if v is None else v.cpu() for v in (again.summary, again.spatial)))
        return relative_error(cpu, found)

    def _allowed(self, name: str) -> float:
        storage, store = self.config.cache.storage, self.cache.stores[name]
        stored = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(storage, store.dtype)
        least = _ALLOWED_INT8 if storage == "int8" else 0.0
        return max(_ALLOWED[store.dtype], _ALLOWED[stored], least)

    def _most(self) -> int:
        """Bytes of all training crops, if no two plans share any but those of one size."""
        views: set[tuple[object, ...]] = set()
        for plan in self.plans:
            for name in self.cache.teachers:
                shared = () if plan.shift_std == 0 else (plan.size,)
                views.add((name, plan.teachers[name], *shared))
        storage, total = self.config.cache.storage, 0
        for name, size, *_ in views:
            spec, own = self.cache.teachers[name].spec, self.cache.stores[name].dtype.itemsize
            kept = 2 if storage in ("bfloat16", "float16") else own
            cells = (-(-size // spec.patch_size)) ** 2
            channel = cells + 8 if storage == "int8" else cells * kept  # with its scale
            total += (spec.spatial or 0) * channel + (spec.summary or 0) * kept
        return total * len(self.data.train) * self.config.data.crops_per_photo

    def _say_what_there_is(self) -> None:
        for store in self.cache.stores.values():
            store.refresh()
        for name, store in self.cache.stores.items():
            say(f"{name}: {len(store)} views, {_size(store.nbytes())} on disk")


class _Photos(Dataset[tuple[list[GroupViews], tuple[str, str] | None]]):
    """The fixed crops of each photo, for every plan; none and a reason where it is bad."""

    def __init__(self, stream: CropStream, plans: list[GroupPlan], photos: range) -> None:
        self.stream, self.plans, self.photos = stream, plans, photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> tuple[list[GroupViews], tuple[str, str] | None]:
        index = self.photos[number]
        try:
            return self.stream.fixed_views(index, self.plans), None
        except BadImage as error:
            return [], (self.stream.source.key(index), error.reason)


class _Present:
    """Tells the stream what is stored, so that its views are not made; reads nothing."""

    def __init__(self, stores: dict[str, FeatureStore]) -> None:
        self.stores = stores

    def read(self, teacher: str, address: bytes) -> Features | None:
        store = self.stores.get(teacher)
        return Features(None, None) if store is not None and address in store else None


def _count(skips: SkipCounter, bad: tuple[str, str] | None) -> None:
    try:
        skips.update({} if bad is None else {bad[1]: 1}, bad is None, [bad] if bad else ())
    except UserError as error:
        raise UserError(f"setting data.max_bad_share: {error}") from error


def _on(group: GroupViews, device: torch.device) -> GroupViews:
    return replace(group, teachers={n: view.to(device) for n, view in group.teachers.items()})


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if is_main():
        print(text, flush=True)


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; call it with what is done."""
    if not is_main() or not total:
        yield lambda done, text: None
        return
    if not sys.stdout.isatty():
        last = time.monotonic()

        def line(done: int, text: str) -> None:
            nonlocal last
            if time.monotonic() - last > _LINE_SECONDS:
                last = time.monotonic()
                print(f"{done}/{total} {what}  {text}".rstrip(), flush=True)

        yield line
        return
    rich = require("rich.progress", extra="train", purpose="the progress display")
    columns = (
        rich.TextColumn(f"{{task.completed}}/{{task.total}} {what}"),
        rich.BarColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)
