"""Plans: teachers' shapes against the libraries' models, totals, advice, the command."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastagglo.errors import UserError
from fastagglo.model.cost import vit_flops
from fastagglo.train import load_recipe, plan_command, recipe_names
from fastagglo.train.plan import GPUS, PUBLISHED, Assumptions, make_plan
from fastagglo.train.plan_command import advice
from fastagglo.train.teacher_shapes import SHAPES

ROOT = Path(__file__).parents[2]


def changed(recipe, part, **values):
    config = load_recipe(recipe)
    inner = dataclasses.replace(getattr(config, part), **values)
    return dataclasses.replace(config, **{part: inner})


def published_model(name):
    """Without weights, on the meta device."""
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    deep = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
    if name.startswith("hf-hub"):
        config = transformers.CLIPVisionConfig(
            **deep, intermediate_size=5120, patch_size=14, image_size=378, projection_dim=1024
        )
        return transformers.CLIPVisionModelWithProjection(config)
    if name == "facebook/sam-vit-huge":
        layers = [7, 15, 23, 31]
        config = transformers.SamVisionConfig(**deep, mlp_dim=5120, global_attn_indexes=layers)
        return transformers.SamVisionModel(config)
    if name == "facebook/sam3":
        return transformers.Sam3ViTModel(transformers.Sam3ViTConfig())
    return timm.create_model(name.partition(".")[0], num_classes=0, dynamic_img_size=True)


@pytest.mark.parametrize("name", SHAPES)
def test_teachers_are_as_published(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = published_model(name).eval().requires_grad_(False)
        found = sum(p.numel() for p in model.parameters())
        assert found == pytest.approx(shape.vit.parameters, rel=0.01)
        size = shape.input_size or 16 * shape.vit.patch
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    want = vit_flops(shape.vit, size, size)
    # Necks, pooling heads and relative positions are left out.
    assert counter.get_total_flops() == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("recipe", sorted(set(recipe_names()) - {"demo", "demo-long"}))
def test_recipes(recipe):
    plan = make_plan(load_recipe(recipe), 64, "h200", Assumptions())
    assert plan.fits
    assert not plan.unknown
    assert advice(plan)
    for stage in plan.stages:
        assert min(stage.seconds.values()) >= 0
        assert min(stage.memory.values()) >= 0
        assert {t.name for t in stage.teachers} == set(plan.config.teachers)
    with torch.device("meta"):
        whole = sum(plan.parameters.values())
    # arXiv 2412.07679 and the model cards: B 98 M, L 320 M, SO400M 431 M, H 653 M, g 1.1 G.
    trunks = {"B": 98e6, "L": 320e6, "SO400M": 431e6, "H": 653e6, "g": 1.16e9}
    trunk = plan.parameters["trunk"]
    assert trunk == pytest.approx(trunks[plan.config.student.preset], rel=0.05)
    assert whole > trunk


def test_published_hours_are_in_reach():
    """Stated A100-hours mean a utilisation that a machine can have."""
    for recipe, stated in PUBLISHED.items():
        stages = make_plan(load_recipe(recipe), 64, "a100", Assumptions()).stages
        for stage, hours in zip(stages, stated, strict=True):
            assert 0.2 < stage.gpu_hours * 0.5 / hours < 0.8


def test_gpus_share_the_work():
    config = load_recipe("radio-v2.5-h")
    few, many = (make_plan(config, n, "h100", Assumptions(link_gb_s=1e9)) for n in (32, 64))
    for a, b in zip(few.stages, many.stages, strict=True):
        assert a.seconds["student"] == pytest.approx(2 * b.seconds["student"])
        assert a.memory["activations"] == 2 * b.memory["activations"]
        assert a.memory["optimiser"] == b.memory["optimiser"]
    assert few.gpu_hours == pytest.approx(many.gpu_hours)


def test_settings_that_cost():
    plain = make_plan(load_recipe("radio-v2.5-h"), 64, "h100", Assumptions())
    again = make_plan(
        changed("radio-v2.5-h", "student", checkpoint_blocks=True), 64, "h100", Assumptions()
    )
    half = make_plan(changed("radio-v2.5-h", "optimiser", accumulate=2), 64, "h100", Assumptions())
    for a, b, c in zip(plain.stages, again.stages, half.stages, strict=True):
        # A forward of the trunk more; the heads' is not repeated.
        more = (b.seconds["student"] - a.seconds["student"]) * a.images_per_second
        assert more > 0
        assert b.memory["activations"] < 0.4 * a.memory["activations"]
        assert c.memory["activations"] * 2 == a.memory["activations"]
    fp32 = make_plan(
        changed("radio-v2.5-h", "optimiser", precision="fp32"), 64, "h100", Assumptions()
    )
    assert fp32.stages[0].memory["activations"] > 1.5 * plain.stages[0].memory["activations"]


def test_strategies():
    """What belongs to weights is shared; what is sent is counted against real ranks elsewhere."""
    recipe, gpus = "radio-v2.5-h", 64

    def plan(**distributed):
        config = changed(recipe, "distributed", **distributed)
        return make_plan(config, gpus, "h100", Assumptions()).stages[0]

    ddp, half, shards, hybrid = (
        plan(),
        plan(reduce="bfloat16"),
        plan(strategy="fsdp2"),
        plan(strategy="fsdp2", shard=8),
    )
    assert 2 * half.communicated == pytest.approx(ddp.communicated)
    assert half.memory == ddp.memory
    assert shards.memory["optimiser"] == pytest.approx(ddp.memory["optimiser"] / 64)
    assert hybrid.memory["optimiser"] == pytest.approx(ddp.memory["optimiser"] / 8)
    for part in ("parameters", "gradients"):
        assert shards.memory[part] < hybrid.memory[part] < 0.6 * ddp.memory[part]
    same = ("activations", "teachers", "predictions and targets")
    assert all(shards.memory[part] == ddp.memory[part] for part in same)
    # Between nodes a hybrid run sends gradients of shards only.
    assert hybrid.communicated == pytest.approx(ddp.communicated / 8, rel=0.15)
    # In bfloat16 two gatherings and one reduction are what one float32 all-reduce is.
    assert shards.communicated == pytest.approx(ddp.communicated, rel=0.15)
    with pytest.raises(UserError, match=r"distributed\.shard is 7: it must divide the 64 ranks"):
        plan(strategy="fsdp2", shard=7)


def test_advice():
    big = load_recipe("c-radio-v4-h")
    tight = make_plan(big, 32, "h100", Assumptions())
    assert not tight.fits
    assert "does not fit" in advice(tight)
    assert advice(tight).startswith(("--optimiser.accumulate 2", "--student.checkpoint-blocks"))
    giant = changed("radio-v2.5-g", "student", depth=120)
    giant = dataclasses.replace(giant, teachers=load_recipe("radio-v2.5-b").teachers)
    sharded = advice(make_plan(giant, 512, "h100", Assumptions()))
    assert sharded.startswith("--distributed.strategy fsdp2: it does not fit as it is")
    hopeless = make_plan(big, 8, "l40s", Assumptions())
    assert "even so" in advice(hopeless)
    starved = changed("radio-v2.5-b", "data", workers=1)
    plan = make_plan(starved, 8, "b200", Assumptions(images_per_core=5))
    assert plan.stages[0].bottleneck == "data"
    assert advice(plan).startswith("--data.workers 2")
    waiting = make_plan(load_recipe("radio-v2.5-h"), 256, "h100", Assumptions())
    assert advice(waiting).startswith("--gpus 128: gradients wait")
    busy = make_plan(load_recipe("radio-v2.5-b"), 64, "a100", Assumptions())
    assert busy.stages[-1].bottleneck == "teachers"
    assert advice(busy).startswith("teachers.dino")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h10"], "--gpu h10"),
        (["--gpus", "0"], "at least 1"),
        (["--utilisation", "1.5"], "--utilisation must be above 0 and at most 1"),
        (["--link-gb-s", "0"], "--link-gb-s must be above 0"),
        (["--recipe", "radio-v2.5-z"], "radio-v2.5"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(UserError, match=words):
        plan_command.main(["--recipe", "radio-v2.5-b", *arguments])


def test_command():
    command = [sys.executable, "train.py", "plan", "--recipe", "radio-v2.5-b", "--gpus", "64"]
    command += ["--gpu", "a100", "--data.workers", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in ("111.9 M parameters", "GPU-hours", "Change first", "3 cores a GPU", "PHI-S"):
        assert words in done.stdout
    assert GPUS["a100"].memory_gb == 80
    failed = subprocess.run([*command, "--gpu", "x"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "error: --gpu x" in failed.stderr


def test_batches_that_gpus_cannot_share_evenly(capsys):
    """128 images of 1024 px beside 1,024 small ones: some of 768 GPUs wait for others."""
    plan_command.main(["--recipe", "radio-v2.5-h", "--gpus", "768"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "of that uneven ranks" in printed
    even, uneven = (
        make_plan(load_recipe("radio-v2.5-h"), gpus, "h100", Assumptions()).stages[2].seconds
        for gpus in (128, 768)
    )
    assert even["uneven ranks"] == 0
    assert uneven["uneven ranks"] > 0.1 * (uneven["student"] + uneven["teachers"])


def test_more_gpus_than_images(capsys):
    plan_command.main(["--recipe", "radio-v2.5-h", "--gpus", "2048"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "too few for 2048 x 1 in stages.0.groups (1024)" in printed


def test_unknown_teachers_are_said(capsys):
    plan_command.main(["--recipe", "demo", "--gpus", "1"])
    assert "Left out, shape not known" in capsys.readouterr().out


def test_images_of_stages_with_tokens():
    """A budget of what the images take, and of half of it."""
    config = load_recipe("radio-v2.5-b")
    plain = make_plan(config, 8, "h100", Assumptions())
    patch, prefix = 16, len(config.teachers) + config.student.registers
    stages = []
    for stage in config.stages:
        lengths = [(max(group.sizes) // patch) ** 2 + prefix for group in stage.groups]
        assert all(len(group.sizes) == 1 for group in stage.groups)
        tokens = sum(n * g.images for n, g in zip(lengths, stage.groups, strict=True))
        stages.append(dataclasses.replace(stage, tokens=tokens))
    full = make_plan(dataclasses.replace(config, stages=tuple(stages)), 8, "h100", Assumptions())
    halves = tuple(dataclasses.replace(stage, tokens=stage.tokens // 2) for stage in stages)
    half = make_plan(dataclasses.replace(config, stages=halves), 8, "h100", Assumptions())
    for one, same, less in zip(plain.stages, full.stages, half.stages, strict=True):
        assert same.images == one.images
        assert same.memory == one.memory
        assert same.step_seconds == pytest.approx(one.step_seconds)
        assert less.images == pytest.approx(one.images / 2, abs=1)
        assert less.memory["activations"] == pytest.approx(one.memory["activations"] / 2)
        assert less.seconds["uneven ranks"] == 0
    small = tuple(dataclasses.replace(stage, tokens=1000) for stage in stages)
    with pytest.raises(UserError, match=r"stages\.0\.tokens is 1000: .*8 ranks x micro-steps"):
        make_plan(dataclasses.replace(config, stages=small), 8, "h100", Assumptions())
