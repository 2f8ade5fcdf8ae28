"""Is the plain trainer's step ours, and do the cases of the suite ``step`` make sense?"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import plain_trainer as plain
from bench import step_cases
from bench.engine import OURS, Unavailable
from bench.step import LIMITS, SUITE, Batch, Ours, compare, plain_names, plain_shape
from bench.step_cases import DEMO_WIDTHS, Case, Remembered, cases
from fastagglo.model import HeadSpec, create_student
from fastagglo.train.config import RunConfig, check_config

ROOT = Path(__file__).parents[2]
PEERS = ("plain", "plain-fp32", "plain-affine")
TINY = cases("cpu", True)[0]
# Recipe's teachers in the demo's student: no summary, a mosaic, more channels than tokens.
STAND_INS = replace(
    TINY, name="stand-ins", teachers=(("clip", 42), ("sam", 0)), teachers_of="radio-v2.5-b"
)


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


def with_optimiser(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """All cases with other settings of the optimiser."""
    usual = Case.config

    def config(case: Case) -> RunConfig:
        found = usual(case)
        return replace(found, optimiser=replace(found.optimiser, **settings))

    monkeypatch.setattr(Case, "config", config)


@pytest.mark.parametrize("case", [TINY, STAND_INS], ids=lambda case: case.id)
def test_terms_and_gradients_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, False, 1e-4)  # measured: 5e-6
    batch = Batch.of(case, "cpu")
    expected = Ours(batch).results()
    kinds = sum(1 + (f.summary is not None) for f in batch.targets[0].values())
    parameters = list(batch.trainer.distiller.student.parameters())
    assert len(expected) == len(case.groups) * kinds + 2 + len(parameters)
    total = sum(x for name, x in expected.items() if name.count(".") == 2 and " " not in name)
    torch.testing.assert_close(total, expected["total"])
    for peer in PEERS:
        run = SUITE.peers[peer][1](batch)
        compare(peer, run.results(), expected, batch)
        assert run.input_bytes > 4 * sum(p.numel() for p in parameters)
        assert sum(p.numel() for p in run.student.parameters()) == sum(
            p.numel() for p in parameters
        )


def test_terms_and_gradients_agree_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with_optimiser(monkeypatch, precision="bf16")
    batch = Batch.of(TINY, "cpu")
    expected = Ours(batch).results()
    for peer in PEERS:
        compare(peer, SUITE.peers[peer][1](batch).results(), expected, batch)


@pytest.mark.parametrize("optimiser", ["adamw", "lamb"])
def test_some_steps_lead_to_the_same_weights(
    optimiser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64: Adam divides by the root of a gradient's square, and makes small errors large."""
    if optimiser == "lamb":
        pytest.importorskip("timm")
    with_optimiser(monkeypatch, name=optimiser, clip=0.5)
    batch = Batch.of(TINY, "cpu")
    distiller = batch.trainer.distiller.double()
    batch = replace(
        batch,
        targets=[
            {
                n: replace(f, summary=f.summary.double(), spatial=f.spatial.double())
                for n, f in group.items()
            }
            for group in batch.targets
        ],
        weights={k: v.double() for k, v in batch.weights.items()},
    )
    run = SUITE.peers["plain"][1](batch)
    ours = Ours(batch)
    for _ in range(3):
        ours()
        run()
    config = distiller.student.config
    right = plain_names(config, dict(distiller.student.named_parameters()), {})
    before = plain_names(config, batch.weights, {})
    for name, found in run.student.named_parameters():
        moved = (right[name] - before[name]).norm()
        assert moved > 0, name
        assert (found - right[name]).norm() < 1e-4 * moved, name  # pixels and crops are fp32


@pytest.mark.parametrize("peer", ["plain", "plain-affine"])
@pytest.mark.parametrize(
    "name",
    [
        "positions",
        "registers",
        "blocks.3.attn.qkv.weight",
        "spatial_heads.lite2.3.weight",
        "summary_heads.lite0.0.bias",
    ],
)
def test_another_weight_is_noticed(peer: str, name: str) -> None:
    batch, expected = ready()
    run = SUITE.peers[peer][1](batch)
    with torch.no_grad():
        weight = run.student.get_parameter(name)
        # Not one number for all: the LayerNorm behind would take it away.
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / 50)
    with pytest.raises(AssertionError, match="differs from ours"):
        compare(peer, run.results(), expected, batch)


def test_other_statistics_clipping_and_shares_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, expected = ready()
    run = SUITE.peers["plain"][1](batch)
    run.trainer.normalisers["lite0"].matrix.mul_(1.01)
    with pytest.raises(AssertionError, match=r"lite0\.spatial\.0 differs"):
        compare("plain", run.results(), expected, batch)
    run = SUITE.peers["plain"][1](batch)
    run.trainer.clip *= 1.01
    with pytest.raises(AssertionError, match=r"grad .* differs"):
        compare("plain", run.results(), expected, batch)
    monkeypatch.setattr(plain.PlainTrainer, "_side", lambda *_: 1)
    run = SUITE.peers["plain"][1](batch)
    with pytest.raises(AssertionError, match=r"spatial\.0 differs"):
        compare("plain", run.results(), expected, batch)


_kept: list = []


def ready() -> tuple[Batch, dict]:
    """The tiny case and our results, once for all tests: neither changes."""
    if not _kept:
        batch = Batch.of(TINY, "cpu")
        _kept.append((batch, Ours(batch).results()))
    return _kept[0]


def test_the_plain_trainer_has_no_other_students() -> None:
    for head in (HeadSpec(spatial=8, blocks=1), HeadSpec(summary=8)):
        odd = create_student("tiny", heads={"a": head}, max_resolution=64)
        with pytest.raises(Unavailable, match="no such head as that of 'a'"):
            plain_shape(odd.config)
    with pytest.raises(Unavailable, match="gated"):
        plain_shape(create_student("tiny", mlp="swiglu", max_resolution=64).config)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases(device: str, quick: bool) -> None:
    found = cases(device, quick)
    assert len({case.id for case in found}) == len(found)
    for case in found:
        check_config(case.config())
        assert set(case.peers) <= set(SUITE.peers) - {OURS}
        assert ("plain-compile" in case.peers) == (device == "cuda" and not quick)
        assert case.facts["label"]
        assert ("flops" in case.facts) == case.cached
        assert not (case.stand_ins and not case.cached)
    if not quick:
        names = {case.id for case in found}
        assert {name for name, _ in SUITE.goals} <= names
        assert {peer for _, peer in SUITE.goals} <= set(PEERS)


def test_cases_of_recipes_have_their_sizes() -> None:
    by_name = {case.id: case for case in cases("cuda", False)}
    demo = by_name["demo"]
    # 6 x 6, 8 x 8 and 12 x 12 patches; two CLS tokens and four registers an image.
    assert demo.tokens == 12 * 42 + 8 * 70 + 4 * 150
    huge = by_name["H-432+1024"]
    assert huge.tokens == 8 * (27**2 + 8) + 64**2 + 8
    assert huge.config().optimiser.precision == "bf16"
    shape = step_cases.student_shape(huge)
    assert (shape.width, shape.depth) == (1280, 32)
    assert shape.heads["sam"].summary is None
    linear = 12 * shape.width**2 * shape.depth * huge.tokens * 6
    assert linear < huge.flops < 1.4 * linear  # attention, heads and patches are the rest


def test_flops_are_those_of_the_plain_step() -> None:
    batch, _ = ready()
    run = SUITE.peers["plain-affine"][1](batch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run.results()
    assert counter.get_total_flops() == pytest.approx(TINY.flops, rel=1e-3)


def test_stated_widths_are_those_of_the_teachers() -> None:
    batch, _ = ready()
    specs = {name: teacher.spec for name, teacher in batch.trainer.teachers.items()}
    assert {name: (s.summary, s.spatial) for name, s in specs.items()} == DEMO_WIDTHS


def test_cached_teachers_answer_once_and_uncached_ones_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    kinds = {}
    for cached in (True, False):
        batch = Batch.of(replace(TINY, cached=cached), "cpu")
        kinds[cached] = {type(t) is Remembered for t in batch.trainer.teachers.values()}
        for teacher in batch.trainer.teachers.values():
            inner = teacher.teacher if cached else teacher
            inner.register_forward_hook(lambda *_: calls.append(1))
        run = SUITE.peers["plain"][1](batch)
        for step in (Ours(batch), run):
            step()
        # lite0 sees all at one size, once for us; both see two sizes otherwise.
        assert len(calls) == (0 if cached else 3 + 4)
    assert kinds == {True: {True}, False: {False}}


def test_the_suite_runs() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "bench/step.py",
            "--quick",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
