"""Are the curves what they say, and do ranks make the step that one process would?"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import scaling_cases
from bench.engine import OURS
from bench.scaling import SUITE
from bench.scaling_cases import (
    SIZES,
    Attention,
    Case,
    Heads,
    Trunk,
    cases,
    mix,
    slope,
    worlds,
)
from bench.scaling_ranks import Ranks
from bench.scaling_runs import Distilled, attention, heads, inputs_of, prepare
from fastagglo.ops import AdaptorHeads, HeadSpec

ROOT = Path(__file__).parents[2]
STEP = SIZES["quick"].step


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs and two cores."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(scaling_cases.os, "sched_getaffinity", lambda _: {0, 1})


def curves(found: list[Case]) -> dict[str, list[Case]]:
    return {name: list(group) for name, group in itertools.groupby(found, lambda c: c.curve)}


# --- cases


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_well_formed(device: str, quick: bool) -> None:
    found = cases(device, quick)
    assert len({case.id for case in found}) == len(found) == len(set(found))
    for case in found:
        assert case.peers == ()
        assert {"label", "pass", "flops", "series", "axis", "x"} <= case.facts.keys()
        assert case.facts["flops"] > 0
    lines = curves(found)
    assert set(lines) == {
        "attention-tokens", "attention-images", "student-tokens", "student-images", "teachers",
        "resolutions", "ranks",
    }  # fmt: skip
    for name, points in lines.items():
        xs = [case.x for case in points]
        assert xs == sorted(set(xs))
        assert len({(case.series, case.axis, case.expected) for case in points}) == 1
        if not quick:
            assert 4 <= len(xs) <= 6 or (name, device) == ("ranks", "cpu")
            assert xs[-1] >= 4 * xs[0] or (name, device) == ("ranks", "cpu")


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_expected_exponents(device: str) -> None:
    expected = {name: points[0].expected for name, points in curves(cases(device, False)).items()}
    assert expected.pop("attention-tokens") == 2
    for name in ("attention-images", "student-images", "teachers"):
        assert expected.pop(name) == 1
    assert expected.pop("ranks") == 0
    assert 1 < expected.pop("student-tokens") < 1.7  # linear and quadratic
    assert abs(expected.pop("resolutions")) < 0.1  # as many tokens, however they are cut
    assert not expected


def test_ranks_are_left_out_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(scaling_cases.os, "sched_getaffinity", lambda _: {0})
    for device in ("cpu", "cuda"):
        assert worlds(device) == (1,)
        assert "ranks" not in curves(cases(device, False))
        assert "ranks" not in curves(cases(device, True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert worlds("cuda") == (1, 2, 4)


def test_mixes_have_as_many_tokens() -> None:
    for device in ("cpu", "cuda"):
        sizes = SIZES[device]
        for points in [p for n, p in curves(cases(device, False)).items() if n == "resolutions"]:
            assert [len(case.work.grids) for case in points] == list(sizes.resolutions)
            for case in points:
                assert abs(case.work.tokens / sizes.mix_tokens - 1) < 0.12
    assert mix("tiny", (2, 30), 100).grids == ((5, 2), (1, 30))


def test_slope() -> None:
    assert slope([(x, 3 * x**1.5) for x in (1, 2, 8)]) == pytest.approx(1.5)
    assert slope([(2, 5.0)]) == 0


def test_flops_of_heads_are_those_of_their_layers() -> None:
    work = Heads(3, 2, 4, 24, 40)
    module = AdaptorHeads(24, {f"t{n}": HeadSpec(spatial=40) for n in range(3)})
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    assert work.flops == 3 * 2 * work.rows * weights


def test_flops_of_a_step_do_not_depend_on_the_ranks() -> None:
    assert replace(STEP, ranks=8).flops == STEP.flops
    assert STEP.flops > Trunk(STEP.student, ((STEP.images, STEP.side),)).flops


# --- works


@pytest.mark.parametrize(
    "case", [c for c in cases("cpu", True) if c.curve != "ranks"], ids=lambda c: c.id
)
def test_works_run(case: Case) -> None:
    run = SUITE.peers[OURS][1](SUITE.batch(case, "cpu"))
    assert run.input_bytes > 0
    for result in run() if not isinstance(case.work, Attention) else [run()]:
        for tensor in [result] if isinstance(result, torch.Tensor) else result:
            assert tensor.isfinite().all()


def test_attention_is_attention() -> None:
    run = attention(Attention("tiny", 2, 5), "cpu")
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn((10, 3, 3, 64), generator=random)
    q, k, v = qkv.view(2, 5, 3, 3, 64).permute(2, 0, 3, 1, 4)
    right = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(10, 3, 64)
    torch.testing.assert_close(run(), right)
    assert run.input_bytes == qkv.nbytes


def test_heads_give_all_gradients() -> None:
    gradients = heads(Heads(3, 2, 3, 8, 12), "cpu")()
    assert gradients[0].shape == (18, 8)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    one = heads(Heads(1, 2, 3, 8, 12), "cpu")()
    assert len(gradients) - 1 == 3 * (len(one) - 1)


# --- ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(replace(STEP, ranks=2), "cpu")
    yield ranks
    ranks.close()
    assert all(process.returncode == 0 for process in ranks._processes)


def test_ranks_average_their_gradients(two: Ranks) -> None:
    torch.manual_seed(0)
    module = Distilled(STEP)
    losses = [module(*inputs_of(STEP, rank, "cpu")) for rank in range(2)]
    (sum(losses) / 2).backward()
    right = sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None)
    found = [float(answer) for answer in two.ask("gradient")]
    # Sums of a few thousand fp32 products in another order.
    assert found == pytest.approx([right, right], rel=1e-4)
    # Ranks that do not speak to each other, or see the same images, have others.
    module.zero_grad()
    module(*inputs_of(STEP, 0, "cpu")).backward()
    alone = sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None)
    assert alone != pytest.approx(right, rel=1e-2)


def test_a_call_is_a_step_of_all(two: Ranks) -> None:
    assert two() is None
    assert two.ask("step") == ["done\n", "done\n"]
    parameters = sum(p.nbytes for p in Distilled(STEP).parameters())
    assert two.input_bytes > parameters
    assert two.info["rank_memory_bytes"] > parameters  # the gradients


def test_a_rank_that_ends_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "rank"
    program.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setattr("bench.scaling_ranks.sys.executable", str(program))
    with pytest.raises(RuntimeError, match=r"^rank 0 ended: no room$"):
        Ranks(STEP, "cpu")


def test_a_point_of_ranks_is_made_ready(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (c for c in cases("cpu", True) if c.curve == "ranks")
    assert case.work == replace(STEP, ranks=2)
    made = []
    monkeypatch.setattr("bench.scaling_ranks.Ranks", lambda *given: made.append(given) or two)
    assert prepare(case, "cpu") is two
    assert made == [(case.work, "cpu")]


# --- the suite


def test_the_suite_runs_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/scaling.py", "--quick", "-q", "-k", "teachers",
         "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'raw.json'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
