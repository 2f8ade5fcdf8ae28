"""Do the student's peers compute what it computes, and are cases and FLOPs right?"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from bench import student_cases, student_peers
from bench.engine import Unavailable
from bench.student import SUITE, compare
from bench.student_cases import DEMO, PREFIX_V4, PREFIX_V25, STUDENTS, V4, V25, Case, cases
from bench.student_peers import PEERS, Batch
from fastagglo.model import StudentConfig
from fastagglo.model.config import PRESETS
from fastagglo.train import load_recipe

ROOT = Path(__file__).parents[2]

SMALL = {
    "small": StudentConfig("small", 32, 2, 2, 96, patch_size=4, layer_scale=1e-5),
    "small-gated": StudentConfig("small-gated", 24, 2, 3, 44, mlp="swiglu", patch_size=2),
}
IMAGES = {12: 2, 20: 1, 8: 1}
OTHERS = ("per-image", "per-resolution", "padded")


@pytest.fixture(autouse=True)
def _small_students(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)
    for name, config in SMALL.items():
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(config, max_resolution=32))


def small(student: str = "small", backward: bool = True, images: dict[int, int] = IMAGES) -> Case:
    return Case.of("test", student, images, backward=backward, prefix=5)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("student", SMALL)
def test_peers_agree_with_us(student: str, backward: bool) -> None:
    case = small(student, backward)
    batch = Batch.of(case, "cpu")
    expected = PEERS["fastagglo"][1](batch).results()
    gradients = [name for name in expected if name.startswith("gradient")]
    assert len(expected) - len(gradients) == len(IMAGES)
    # One for CLS token and registers together.
    assert len(gradients) == backward * (len(list(batch.student.parameters())) - 1)
    assert case.peers == list(OTHERS)
    for peer in OTHERS:
        run = PEERS[peer][1](batch)
        compare(peer, run.results(), expected, batch)
        parameters = sum(p.numel() for p in batch.student.parameters())
        assert sum(p.numel() for p in run.module.parameters()) == parameters
        assert run.input_bytes > 4 * parameters


@pytest.mark.parametrize("peer", OTHERS)
@pytest.mark.parametrize(
    "name",
    ["cls_token", "reg_token", "pos_embed", "blocks.1.attn.qkv.bias", "blocks.0.ls1.gamma"],
)
def test_a_peer_with_one_other_weight_is_noticed(peer: str, name: str) -> None:
    batch = Batch.of(small(backward=False), "cpu")
    expected = PEERS["fastagglo"][1](batch).results()
    run = PEERS[peer][1](batch)
    with torch.no_grad():
        run.module.get_parameter(name).flatten()[-3:].mul_(-1)
    with pytest.raises(AssertionError, match=f"{peer}: features of .* differs from ours by"):
        compare(peer, run.results(), expected, batch)


def test_a_padded_key_that_is_attended_to_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of(small(backward=False), "cpu")
    expected = PEERS["fastagglo"][1](batch).results()
    right = student_peers.F.scaled_dot_product_attention

    def wrong(*tensors: torch.Tensor, attn_mask: torch.Tensor, **other: Any) -> torch.Tensor:
        mask = attn_mask.clone()
        mask[0, ..., -1] = True  # the last row of the padding of one image
        return right(*tensors, attn_mask=mask, **other)

    run = PEERS["padded"][1](batch)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    with pytest.raises(AssertionError, match=r"padded: features of .* differs"):
        compare("padded", run.results(), expected, batch)


def test_a_wrong_gradient_and_a_missing_one_are_noticed() -> None:
    batch = Batch.of(small(), "cpu")
    expected = PEERS["fastagglo"][1](batch).results()
    for name in expected:
        found = {key: value.clone() for key, value in expected.items()}
        found[name].flatten()[0] += found[name].abs().max()
        with pytest.raises(AssertionError, match="differs from ours"):
            compare("peer", found, expected, batch)
        del found[name]
        with pytest.raises(AssertionError, match="on one side only"):
            compare("peer", found, expected, batch)


def test_bfloat16_peers_stay_within_their_tolerance() -> None:
    """On CUDA all is bfloat16: the same casts here, through more layers than this width needs."""
    config = dataclasses.replace(PRESETS["small"], width=128, mlp_width=512, depth=24)
    PRESETS["small"] = config  # the fixture puts it back
    batch = Batch.of(small(), "cpu")
    batch.student.to(torch.bfloat16)
    batch = dataclasses.replace(batch, upstream=[x.to(torch.bfloat16) for x in batch.upstream])
    expected = PEERS["fastagglo"][1](batch).results()
    for peer in OTHERS:
        found = PEERS[peer][1](batch).results()
        assert {x.dtype for x in found.values()} == {torch.bfloat16}
        compare(peer, found, expected, batch)


def test_the_compiled_peer_compiles_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: done.append(self))
    batch = Batch.of(small(), "cpu")
    run = PEERS["compile"][1](batch)
    assert done == list(run.module.blocks)
    assert run.info["compile_seconds"] >= 0
    compare("compile", run.results(), PEERS["fastagglo"][1](batch).results(), batch)


def test_without_timm_the_peers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(Unavailable, match="timm is not installed: pip install timm"):
        PEERS["per-image"][1](Batch.of(small(), "cpu"))


def test_batches_are_the_same_for_all_peers_and_runs() -> None:
    one, two = Batch.of(small(), "cpu"), Batch.of(small(), "cpu")
    for a, b in zip([*one.images, *one.upstream], [*two.images, *two.upstream], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(x[:, 1:5].eq(0).all() and x[:, 0].ne(0).any() for x in one.upstream)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("student", SMALL)
def test_operations_are_what_pytorch_counts(student: str, backward: bool) -> None:
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(*shapes: Any, **_: Any) -> int:
        return sdpa_flop_count(*shapes[:3])

    def back(*shapes: Any, **_: Any) -> int:
        return sdpa_backward_flop_count(*shapes[:4])

    attention = {cpu: forward, cpu_backward: back}  # known for CUDA's alone
    case = small(student, backward)
    run = PEERS["per-resolution"][1](Batch.of(case, "cpu"))
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    assert counter.get_total_flops() == case.flops


def test_batches_are_the_recipes() -> None:
    v25 = load_recipe("radio-v2.5-h")
    assert len(v25.teachers) + v25.student.registers == PREFIX_V25
    wanted = {group.sizes[0]: group.images for group in v25.stages[-1].groups}
    assert {pixels: 128 * count for pixels, count in V25.items()} == wanted
    small = {round(pixels * 3 / 8 / 16) * 16: count for pixels, count in V25.items()}
    assert small == student_cases.V25_SMALL
    v4 = load_recipe("c-radio-v4-h")
    assert len(v4.teachers) + v4.student.registers == PREFIX_V4
    low, high = v4.stages[-1].groups
    assert sorted(low.sizes) == [pixels for pixels, count in V4.items() if count == 4]
    assert set(high.sizes) > {pixels for pixels, count in V4.items() if count == 1}
    assert low.images == 8 * high.images
    assert 4 * len(low.sizes) == 8 * 3
    demo = load_recipe("demo")
    assert len(demo.teachers) + demo.student.registers == student_cases.PREFIX_DEMO
    assert {g.sizes[0]: g.images // 2 for g in demo.stages[-1].groups} == DEMO
    config = Case.of("", "tiny", DEMO, backward=True, prefix=student_cases.PREFIX_DEMO).config
    assert config.max_resolution == demo.student.max_resolution
    assert config.prefix_tokens == student_cases.PREFIX_DEMO


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_cases_are_well_formed(device: str, quick: bool) -> None:
    found = cases(device, quick)
    ids = [case.id for case in found]
    assert len(set(ids)) == len(ids)
    for case in found:
        assert {"label", "pass", "flops"} <= case.facts.keys()
        assert set(case.peers) <= PEERS.keys() - {"fastagglo"}
        assert len(set(case.peers)) == len(case.peers) > 0
        assert ("padded" in case.peers) == case.mixed
        largest = max(grid for _, grid in case.grids)
        assert largest <= case.config.grid
        assert hash(case) == hash(dataclasses.replace(case))
    if quick:
        assert all(case.flops < 2e9 for case in found)
    elif device == "cpu":  # a laptop's: no call beyond about half a second at 50 GFLOP/s
        assert all(case.flops < 4e10 for case in found)
        assert {case for case, _ in SUITE.goals} <= set(ids)
        for case, peer in SUITE.goals:
            assert peer in found[ids.index(case)].peers
    else:
        for student in STUDENTS:
            mine = [case for case in found if case.student == student]
            sizes = {case.name for case in mine if not case.mixed}
            assert sizes == {f"{pixels}px" for pixels in student_cases.RESOLUTIONS}
            assert {case.backward for case in mine} == {False, True}
            assert any("compile" in case.peers for case in mine)
            assert "mix-v2.5" in {case.name for case in mine}
        curves = {case.facts["series"] for case in found if "series" in case.facts}
        assert len(curves) == 2 * len(STUDENTS)


def test_quick_suite_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/student.py",
        "--quick",
        "-q",
        "-k",
        "backward",
    ]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'out.json'}"]
    # pytest-benchmark measures nothing where it finds itself under xdist.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out.json").exists()
