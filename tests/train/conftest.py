"""Tiny real runs: real teachers and files, a student of two blocks, seconds on a CPU."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fastagglo.train import Trainer
from fastagglo.train.config import RunConfig
from fastagglo.train.recipe import config_from_dict
from fastagglo.train.telemetry import Telemetry

TRAIN = Path(__file__).parents[2] / "train.py"

Settings = dict[str, Any]


class Outcome(NamedTuple):
    """What a run of train.py left on the terminal."""

    status: int
    out: str
    err: str


class Tiny:
    """Makes tiny runs: their settings, trainers, recipe files, and train.py on top of them."""

    def __init__(self, photos: Path, folder: Path) -> None:
        self.photos, self.folder = photos, folder

    def settings(self, *changes: Settings) -> Settings:
        """Plain settings of a run of 4 steps, with nested changes; None removes a setting."""
        settings: Settings = {
            "seed": 3,
            "threads": 1,
            "device": "cpu",
            "student": {"preset": "tiny", "depth": 2, "registers": 2, "max_resolution": 64},
            "teachers": {"hog": {"model": "hog", "summary_weight": 0.0}},
            "data": {"images": [str(self.photos)], "holdout_photos": 0.0},
            "stages": [{"steps": 4, "lr": 1e-3, "phi_s_steps": 2, "groups": GROUPS}],
            "eval": {"points": 0, "pictures": 0},
            "log": {"interval": 1, "progress": False, "tensorboard": False},
        }
        for change in changes:
            settings = merged(settings, change)
        return settings

    def everything(self, *changes: Settings) -> Settings:
        """Settings with every source of state or chance switched on at once."""
        return self.settings(
            {
                "student": {
                    "drop_path": 0.5,
                    "windows": [2],
                    "window_probability": 0.5,
                    "global_layers": 1,
                },
                "teachers": {
                    "lite0": {
                        "model": "efficientnet-lite0",
                        "layer": "stride16",
                        "sizes": [48, 64],
                        "summary_loss": "angular",
                        "spatial_loss": "smooth_l1",
                    }
                },
                "data": {"holdout_photos": 0.2, "holdout_region": 0.3},
                "stages": [
                    {
                        "steps": 4,
                        "lr": 1e-3,
                        "warmup_steps": 2,
                        "phi_s_steps": 2,
                        "freeze_trunk_steps": 1,
                        "groups": [{"images": 4, "sizes": [32, 64]}, {"images": 2, "sizes": [32]}],
                    },
                    {
                        "name": "high",
                        "steps": 4,
                        "lr": 5e-4,
                        "phi_s_steps": 2,
                        "freeze_trunk_steps": 1,
                        "groups": [{"images": 2, "sizes": [64]}, {"images": 2, "sizes": [32, 48]}],
                    },
                ],
                "optimiser": {"accumulate": 2, "layer_decay": 0.8},
                "distill": {
                    "balance": "uncertainty",
                    "teacher_drop": 0.5,
                    "shift_std": 0.5,
                    "ema_decay": 0.9,
                    "mesa_weight": 0.1,
                },
                "eval": {"points": 3, "photos": 2},
                "log": {"checkpoint_every": 3},
            },
            *changes,
        )

    def config(self, settings: Settings) -> RunConfig:
        return config_from_dict(settings, "test")

    def trainer(self, settings: Settings, resume: Path | None = None) -> Trainer:
        return Trainer(self.config(settings), torch.device("cpu"), resume)

    def trained(self, settings: Settings, name: str = "run") -> tuple[Trainer, Path]:
        """A finished run and its folder."""
        folder = self.folder / name
        folder.mkdir()
        trainer = self.trainer(settings)
        assert trainer.run(folder)
        return trainer, folder

    def recipe(self, settings: Settings, name: str = "recipe.toml") -> Path:
        import tomli_w

        path = self.folder / name
        path.write_text(tomli_w.dumps(settings))
        return path

    def cli(self, *arguments: object) -> Outcome:
        """train.py as a program, in this process: torch takes seconds to import."""
        out, err, old = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = [str(TRAIN), *map(str, arguments)]
        try:
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
                runpy.run_path(str(TRAIN), run_name="__main__")
        finally:
            sys.argv = old
        return Outcome(int(caught.value.code or 0), out.getvalue(), err.getvalue())

    def process(self, *arguments: object, before: str = "") -> subprocess.Popen[str]:
        """train.py in a process of its own, after the statements ``before``."""
        code = f"import runpy, sys\n{before}\nsys.argv = sys.argv[1:]\n"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        return subprocess.Popen(
            [sys.executable, "-c", code, str(TRAIN), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


# Two resolutions, the smallest that the patch of 16 pixels allows with more than one token.
GROUPS = [{"images": 2, "sizes": [32]}, {"images": 2, "sizes": [64]}]


def merged(settings: Settings, change: Settings) -> Settings:
    settings = dict(settings)
    for key, value in change.items():
        if value is None:
            settings.pop(key, None)
        elif isinstance(value, dict):
            settings[key] = merged(settings.get(key, {}), value)
        else:
            settings[key] = value
    return settings


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """Photos of 96 x 80 pixels: smooth colours with edges, all different."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for number in range(count):
        coarse = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).copy()
        pixels[20:50, 30:70] = 255 - pixels[20:50, 30:70]
        Image.fromarray(pixels).save(folder / f"photo{number}.png")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 10)
    return folder


@pytest.fixture
def tiny(photos: Path, tmp_path: Path) -> Tiny:
    return Tiny(photos, tmp_path)


@pytest.fixture(scope="module")
def module_tiny(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(photos, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``interrupt(step)``: Ctrl-C at the end of that step."""
    report = Telemetry.step

    def at(wanted: int) -> None:
        def step(telemetry: Telemetry, step: int, *args: object, **named: object) -> None:
            report(telemetry, step, *args, **named)
            if step == wanted:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Telemetry, "step", step)

    return at


@pytest.fixture(scope="session")
def differences() -> Callable[..., list[str]]:
    """``differences(a, b)``: where two nested states differ in any bit."""
    return _differences


def _differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two nested states differ in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in _differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}"]
        both = zip(a, b, strict=True)
        return [d for i, (x, y) in enumerate(both) for d in _differences(x, y, f"{where}.{i}")]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]
