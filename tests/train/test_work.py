"""FLOPs of a step against counts by hand, and a peak that is one."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastagglo.model import create_student
from fastagglo.model.cost import VitShape, student_flops, vit_flops
from fastagglo.ops.heads import HeadSpec
from fastagglo.teachers import Teacher, TeacherSpec, load_teacher
from fastagglo.train.work import StudentWork, measured_peak, teacher_flops

GREY = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def student():
    return create_student(
        "tiny", heads={"a": HeadSpec(summary=8, spatial=8)}, depth=2, global_layers=1
    ).config


def test_attention_counts_by_squares(student):
    """Twice the tokens: linear layers twice, attention four times; by hand."""
    c, m = student.width, student.mlp_width
    flops = {}
    for height in (64, 128):
        patches = height // 16 * 4
        tokens = patches + student.prefix_tokens
        block = tokens * (8 * c * c + 4 * c * m) + 4 * c * tokens**2
        trunk = 2 * block + 6 * patches * 256 * c
        heads = 2 * c * (c + 8) + 2 * patches * c * (c + 8)
        flops[height] = 3 * (trunk + heads) - 6 * height * 64 * c
        assert StudentWork(student).step([(1, height, 64)]) == flops[height]
    assert StudentWork(student).step([(3, 64, 64), (2, 128, 64)]) == 3 * flops[64] + 2 * flops[128]


def test_what_does_not_run_does_not_count(student):
    trunk, heads = student_flops(student, 64, 64)
    work = StudentWork(student)
    assert work.step([(2, 64, 64)], frozen=True) == 2 * (trunk + 3 * heads)
    assert work.step([(2, 64, 64)], window=2) < work.step([(2, 64, 64)])
    both = StudentWork(student, average=True)
    assert both.step([(2, 64, 64)]) - work.step([(2, 64, 64)]) == 2 * trunk


def test_a_teacher_counts_what_went_through_it():
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    from fastagglo.teachers.timm_models import TokenTower

    spec = TeacherSpec("vit", None, 16, 16, GREY, GREY, 192, 192)
    teacher = Teacher(spec, TokenTower(network.eval()))
    shape = VitShape(192, 12, 768, 16)
    assert teacher_flops({"vit": teacher}) == 0
    teacher(torch.rand(2, 3, 64, 32))
    teacher(torch.rand(1, 3, 64, 32))
    teacher(torch.rand(1, 3, 32, 32))
    teacher(torch.rand(0, 3, 96, 96))
    want = 3 * vit_flops(shape, 64, 32) + vit_flops(shape, 32, 32)
    assert teacher_flops({"vit": teacher}) == want
    weights = [p.device.type for p in teacher.parameters()]
    assert set(weights) == {"cpu"}  # it was a copy without data that was counted


def test_a_convolutional_teacher_and_one_of_histograms():
    lite0 = load_teacher("builtin", "efficientnet-lite0", summary=False)
    assert lite0.flops(128, 128) > 4 * 0.9 * lite0.flops(64, 64) > 0
    assert load_teacher("builtin", "hog").flops(64, 64) == 0


def test_a_tower_that_cannot_be_counted_counts_nothing():
    class Reads(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * x.mean().item(), None

    teacher = Teacher(TeacherSpec("odd", None, 16, 16, GREY, GREY, 3, None), Reads())
    teacher(torch.rand(1, 3, 32, 32))
    assert teacher.flops(32, 32) is None
    assert teacher_flops({"odd": teacher}) == 0


def test_a_run_reports_them(tiny):
    """The rows' rates are those of the counts, by hand, and MFU their share of the peak."""
    trainer, folder = tiny.trained(
        tiny.settings(
            {
                "teachers": {"lite0": {"model": "efficientnet-lite0", "sizes": [64]}},
                "optimiser": {"accumulate": 2},
                "log": {"interval": 2, "peak_tflops": 0.5},
            }
        )
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    config = trainer.distiller.student.config
    own = sum(
        3 * sum(student_flops(config, size, size)) - 6 * size * size * config.width
        for size in (32, 64)
    )
    lite0 = trainer.teachers["lite0"].flops(64, 64)
    for row in rows:
        seconds = row["seconds"] * 1e12
        # 2 steps x 2 micro-steps x 1 image of each size; the teacher sees all at 64.
        assert row["tflops"]["student"] == pytest.approx(4 * own / seconds)
        assert row["tflops"]["teachers"] == pytest.approx(2 * 4 * lite0 / seconds)
        assert row["mfu"] == pytest.approx(sum(row["tflops"].values()) / 0.5)
        assert row["peak_tflops"] == 0.5
        assert 0 <= row["overhead"] < 1


def test_evaluations_do_not_count(tiny):
    """Teachers that look at held-out photos between steps are no part of a step's work."""
    changes = {"data": {"holdout_photos": 0.2}, "log": {"interval": 4, "peak_tflops": 1.0}}
    teacher = {"teachers": {"lite0": {"model": "efficientnet-lite0"}}}
    found = []
    for points in (0, 3):
        settings = tiny.settings(changes, teacher, {"eval": {"points": points, "photos": 2}})
        _, folder = tiny.trained(settings, f"run{points}")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        (row,) = (r for r in map(json.loads, lines) if r["kind"] == "train")
        found.append(row["tflops"]["teachers"] * row["seconds"])
    assert found[1] == pytest.approx(found[0])


def test_the_peak_leaves_the_generators_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_a_negative_peak_is_refused(tiny):
    done = tiny.cli("--recipe", tiny.recipe(tiny.settings()), "--log.peak-tflops", "-1")
    assert done.status == 2
    assert "log.peak_tflops" in done.err
