"""``python -m bench.ranks``: its shares against a plain count, its table, its errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench import ranks
from fastagglo.train import load_recipe
from fastagglo.train.config import GroupSettings
from fastagglo.train.costs import ImageCosts
from fastagglo.train.schedule import Planner
from fastagglo.train.teacher_shapes import known_specs


def test_shares_are_those_of_a_plain_count() -> None:
    config = load_recipe("c-radio-v4-so400m")
    groups = (GroupSettings(images=7, sizes=(256,)), GroupSettings(images=1, sizes=(1152,)))
    last = dataclasses.replace(config.stages[-1], groups=groups)
    config = dataclasses.replace(config, stages=(last,))
    found = ranks.simulate(config, 2, steps=1)
    specs = known_specs(config)
    whole = Planner(config, specs, 16, 2).whole(0)
    small, large = (ImageCosts(config, specs)(group, whole.window) for group in whole.groups)
    assert large > 7 * small  # so the large one is alone on its rank
    assert found.images == 8
    assert found.by_cost == pytest.approx(1 - (7 * small + large) / (2 * large))
    # Four each: whoever has the large one is waited for.
    assert found.by_count == pytest.approx(1 - (7 * small + large) / (2 * (large + 3 * small)))


def test_all_resolutions_keep_the_images() -> None:
    config = ranks.all_at_once(load_recipe("c-radio-v4-so400m"))
    (stage,) = config.stages
    sizes = [group.sizes for group in stage.groups]
    assert sizes == [(s,) for s in (128, 192, 224, 256, 384, 432, 512, 768, 1024, 1152)]
    assert [group.images for group in stage.groups] == [171] * 4 + [170] * 2 + [32] * 4


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks.main(["--ranks", "64,2048", "--steps", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith((" 2,048", "    64"))]
    assert len(rows) == 4
    assert rows[1][2:] == ["fewer", "images", "than", "ranks"]
    for row in (rows[0], rows[2], rows[3]):
        cost, count, mixed_cost, mixed_count = (float(x.rstrip("%")) for x in row[2:])
        assert cost == 0  # the groups divide evenly
        assert 0 < mixed_cost < 1 < 40 < count < mixed_count
    assert np.isclose(float(rows[3][1].replace(",", "")), 1152 * 32)


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--ranks", "a"], "--ranks must be numbers"),
        (["--steps", "0"], "at least 1"),
        (["--recipe", "c-radio"], "c-radio"),
    ):
        with pytest.raises(SystemExit):
            ranks.main(options)
        assert words in capsys.readouterr().err
