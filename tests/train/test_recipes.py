"""Every shipped recipe: parsed, checked, and its student and heads built on the meta device."""

from __future__ import annotations

import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.teachers import TeacherSpec
from fastagglo.train import build_student, load_recipe, recipe_names, stated_widths
from fastagglo.train.config import RunConfig
from fastagglo.train.recipe import config_from_dict, parse_arguments, save_config
from fastagglo.train.schedule import Planner, eval_steps, learning_rate

RADIO = [name for name in recipe_names() if "radio" in name]
# Input size (None: any multiple), multiple and patch of the published teachers.
SHAPES = {
    "clip": (378, 14, 14),
    "siglip": (378, 14, 14),
    "siglip2": (384, 16, 16),
    "dino": (None, 14, 14),
    "dinov3": (None, 16, 16),
    "sam": (1024, 16, 16),
    "sam3": (1008, 14, 14),
}


def specs(config: RunConfig) -> dict[str, TeacherSpec]:
    colour = (0.5, 0.5, 0.5)
    return {
        name: TeacherSpec(
            name,
            input_size=SHAPES[name][0],
            multiple=SHAPES[name][1],
            patch_size=SHAPES[name][2],
            mean=colour,
            std=colour,
            summary=teacher.summary_width,
            spatial=teacher.spatial_width,
        )
        for name, teacher in config.teachers.items()
    }


def test_the_recipes_that_the_readme_names_ship():
    assert set(recipe_names()) == {
        "demo",
        "demo-long",
        *(f"radio-v2.5-{size}" for size in "blhg"),
        "c-radio-v4-so400m",
        "c-radio-v4-h",
    }


@pytest.mark.parametrize("name", RADIO)
def test_student_and_heads_of_a_recipe_are_built(name: str):
    config = load_recipe(name)
    with torch.device("meta"):
        student = build_student(config, stated_widths(config))
    assert list(student.heads.specs) == list(config.teachers)
    for teacher, settings in config.teachers.items():
        assert student.heads.spatial[teacher].out_features == settings.spatial_width
        assert (teacher in student.heads.summary) == (settings.summary_weight > 0)
    preset = {"b": "B", "l": "L", "h": "H", "g": "g", "so400m": "SO400M"}[name.rsplit("-", 1)[1]]
    assert student.config.name == preset


@pytest.mark.parametrize("name", RADIO)
def test_every_step_of_a_recipe_can_be_planned(name: str):
    config = load_recipe(name)
    patch = 14 if name.endswith("-g") else 16
    world = 64
    planner = Planner(config, specs(config), patch, world)
    edges = [0, config.stages[0].steps, config.total_steps - 1]
    for step in {*edges, *range(0, config.total_steps, config.total_steps // 97)}:
        plan = planner(step)
        stage = config.stages[config.stage_at(step)[0]]
        assert [g.count * world for g in plan.groups] == [g.images for g in stage.groups]
        for group, settings in zip(plan.groups, stage.groups, strict=True):
            assert group.size in settings.sizes
            assert group.size % patch == 0
            if plan.window:
                assert group.size // patch % plan.window == 0
    assert planner(12345) == planner(12345)


def test_small_images_reach_a_mosaic_teacher_as_tiles_of_as_many_cells():
    config = load_recipe("c-radio-v4-h")
    planner = Planner(config, specs(config), 16)
    assert planner.eval_group(128).teachers["sam3"] == 128 // 16 * 14
    assert planner.eval_group(432).teachers["sam3"] == 27 * 14
    assert planner.eval_group(1024).teachers["sam3"] == 1008


def test_published_numbers_of_the_recipes():
    config = load_recipe("radio-v2.5-b")
    assert [s.steps for s in config.stages] == [300_000] * 3
    assert [(g.images, g.sizes) for g in config.stages[2].groups] == [
        (1024, (432,)),
        (128, (1024,)),
    ]
    assert config.optimiser.name == "lamb"
    assert config.optimiser.weight_decay == 0.02
    assert {s.lr for s in config.stages} == {1e-3}
    assert config.stages[0].freeze_trunk_steps == 5_000
    assert load_recipe("radio-v2.5-g").student.max_resolution == 1792  # 128 patches of 14
    v4 = load_recipe("c-radio-v4-h")
    assert v4.distill.ema_decay == 0.9996
    assert v4.distill.shift_std == 0.5
    for recipe, slots, registers in ((config, 4, 4), (v4, 3, 7)):
        assert (len(recipe.teachers), recipe.student.registers) == (slots, registers)
    assert v4.teachers["dinov3"].summary_loss == "angular"


def test_rate_warms_up_and_falls_in_each_stage():
    config = load_recipe("radio-v2.5-b")
    assert learning_rate(config, 0) == pytest.approx(1e-6)
    assert learning_rate(config, 999) == pytest.approx(1e-3)
    assert learning_rate(config, 299_999) < 1e-7
    assert learning_rate(config, 300_000) == pytest.approx(1e-6)
    assert eval_steps(config)[0] == 0
    assert eval_steps(config)[-1] == config.total_steps


@pytest.mark.parametrize("name", recipe_names())
def test_a_saved_configuration_is_a_recipe_that_says_the_same(name: str, tmp_path):
    config = load_recipe(name)
    save_config(config, tmp_path)
    assert load_recipe(str(tmp_path / "config.toml")).to_dict() == config.to_dict()


def test_the_command_line_overrides_the_recipe():
    config = parse_arguments(
        ["--recipe", "demo", "--stages.0.steps", "17", "--teachers.hog.spatial-weight", "0.5"]
    )
    assert config.stages[0].steps == 17
    assert config.teachers["hog"].spatial_weight == 0.5
    assert config.teachers["lite0"] == load_recipe("demo").teachers["lite0"]


def test_global_layers_are_a_number_or_a_list():
    for words, value, layers in ((["3"], 3, {1, 3, 5}), (["0", "3"], (0, 3), {0, 3, 5})):
        config = parse_arguments(["--student.global-layers", *words])
        assert config.student.global_layers == value
        with torch.device("meta"):
            student = build_student(config, dict.fromkeys(config.teachers, (8, 8)))
        assert student.config.global_layer_set == layers


GOOD = {"teachers": {"hog": {"model": "hog", "summary_weight": 0.0}}}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"studnet": {}}, ["'studnet'", "did you mean 'student'"]),
        ({"student": {"presett": "B"}}, ["student.presett", "did you mean 'preset'"]),
        ({"teachers": {"a": {"modle": "x"}}}, ["teachers.a.modle", "did you mean 'model'"]),
        (
            {"stages": [{"groups": [{"sises": [1]}]}]},
            ["stages.0.groups.0.sises", "did you mean 'sizes'"],
        ),
        ({"seed": "three"}, ["'seed'", "valid integer", "'three'"]),
        ({"stages": [{"lr": "1e-3"}]}, ["stages.0.lr", "valid number"]),
        ({"student": {"global_layers": "last"}}, ["'student.global_layers'", "'last'"]),
        ({"student": {"global_layers": [-1]}}, ["student.global_layers", "at least 0"]),
        ({"student": {"preset": "XL"}}, ["student.preset", "'SO400M'", "'XL'"]),
        ({"teachers": {}}, ["teachers", "at least one"]),
        ({"optimiser": {"accumulate": 0}}, ["optimiser.accumulate", "at least 1"]),
        ({"data": {"crop_scale": [0.9, 0.3]}}, ["data.crop_scale"]),
        ({"distill": {"mesa_weight": 1.0}}, ["distill.mesa_weight", "ema_decay"]),
        ({"stages": [{"steps": 5, "phi_s_steps": 9}]}, ["stages.0.phi_s_steps", "at most 5"]),
        ({"stages": [{"phi_s_steps": 0}]}, ["stages.0.phi_s_steps", "statistics"]),
    ],
)
def test_a_wrong_setting_is_named(change: dict, parts: list[str]):
    stages = [{"phi_s_steps": 2}]
    with pytest.raises(UserError) as caught:
        config_from_dict({**GOOD, "stages": stages, **change}, "recipe x")
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'demo-long'"):
        load_recipe("demo-lon")


def test_a_broken_recipe_file_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = = 3")
    with pytest.raises(UserError, match=r"mine\.toml: not valid TOML"):
        load_recipe(str(path))


def test_every_rank_needs_an_image():
    config = load_recipe("radio-v2.5-b")
    with pytest.raises(UserError, match=r"stages\.0\.groups has 1024 images.*at least 1025"):
        Planner(config, specs(config), 16, world=1025)


def test_a_resolution_that_the_patch_does_not_divide_is_refused():
    config = config_from_dict(
        {**GOOD, "stages": [{"phi_s_steps": 1, "groups": [{"images": 8, "sizes": [100]}]}]}, "x"
    )
    hog = TeacherSpec("hog", None, 16, 16, (0.0,) * 3, (1.0,) * 3, None, 36)
    with pytest.raises(UserError, match=r"sizes has 100.*96 and 112"):
        Planner(config, {"hog": hog}, 16)


def test_the_position_table_is_the_presets_own_unless_given():
    config = config_from_dict(
        {**GOOD, "student": {"preset": "g"}, "stages": [{"phi_s_steps": 1}]}, "x"
    )
    with torch.device("meta"):
        student = build_student(config, {"hog": (None, 36)})
    assert student.config.max_resolution == 1792
    hog = TeacherSpec("hog", None, 14, 14, (0.0,) * 3, (1.0,) * 3, None, 36)
    large = [{"phi_s_steps": 1, "groups": [{"images": 8, "sizes": [1806]}]}]
    config = config_from_dict({**GOOD, "student": {"preset": "g"}, "stages": large}, "x")
    with pytest.raises(UserError, match=r"1806.*ends at 1792 pixels"):
        Planner(config, {"hog": hog}, 14)


def test_a_mosaic_is_for_teachers_of_one_size():
    config = config_from_dict(
        {
            "teachers": {"hog": {"model": "hog", "summary_weight": 0.0, "mosaic": True}},
            "stages": [{"phi_s_steps": 1}],
        },
        "x",
    )
    hog = TeacherSpec("hog", None, 16, 16, (0.0,) * 3, (1.0,) * 3, None, 36)
    with pytest.raises(UserError, match=r"teachers\.hog\.mosaic is true, but hog takes small"):
        Planner(config, {"hog": hog}, 16)
