"""README's code runs, its recipe builds, its flags exist, its test command is what CI runs."""

from __future__ import annotations

import ast
import io
import re
import shlex
import subprocess
import tokenize
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastagglo.interop import to_radio
from fastagglo.model import HeadSpec, create_student, save_student
from fastagglo.teachers import TeacherSpec
from fastagglo.train import (
    RunConfig,
    build_student,
    cache_command,
    export_command,
    load_recipe,
    parse_arguments,
    plan_command,
    recipe_names,
)
from fastagglo.train.recipe import config_from_dict
from fastagglo.train.schedule import Planner
from fastagglo.train.targets import load_teachers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Of the teachers in README's recipe: input size (None: any), patch, summary and spatial width.
TEACHERS = {
    "clip": (224, 16, 512, 768),
    "dino": (None, 14, 768, 768),
    "sam": (1024, 16, None, 256),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def comments(code: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}


def run_block(code: str) -> int:
    """Run a block statement by statement; how many of the shapes in its comments were checked.

    A comment that starts with a shape, as ``# (2, 10)``, speaks of the value of its line: of an
    expression, or of the tensor that is assigned.
    """
    remarks, names, checked = comments(code), {"__name__": "__readme__"}, 0
    for node in ast.parse(code).body:
        shape = re.match(r"# (\(\d+(?:, \d+)+\))", remarks.get(node.lineno, ""))
        value = None
        if isinstance(node, ast.Expr):
            value = eval(compile(ast.Expression(node.value), "README.md", "eval"), names)
        else:
            exec(compile(ast.Module([node], []), "README.md", "exec"), names)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = names[node.targets[0].id]
        if shape is not None:
            found = value.shape if isinstance(value, torch.Tensor) else value
            assert tuple(found) == ast.literal_eval(shape.group(1)), ast.unparse(node)
            checked += 1
    return checked


@pytest.fixture(scope="module")
def demo_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has left its student, untrained but of the demo's shape."""
    folder = tmp_path_factory.mktemp("demo")
    config = load_recipe("demo")
    teachers = load_teachers(config, torch.device("cpu"))
    widths = {name: (t.spec.summary, t.spec.spatial) for name, t in teachers.items()}
    save_student(build_student(config, widths), folder / "runs" / "demo" / "student")
    save_file(radio(), folder / "c-radio_v3-b.safetensors")
    return folder


def radio() -> dict[str, torch.Tensor]:
    """C-RADIOv3-B's names and widths, one block deep and with a small table."""
    teachers = {"clip": (1024, 1280), "siglip2-g": (1536, 1536), "dino_v2": (1536, 1536)}
    heads = {name: HeadSpec(*widths, hidden=64) for name, widths in teachers.items()}
    heads["sam"] = HeadSpec(spatial=256, hidden=64)
    settings = {"depth": 1, "max_resolution": 512, "patch_bias": False, "final_norm": False}
    student = create_student("B", heads, cls=tuple(heads), **settings)
    return {name: value.contiguous() for name, value in to_radio(student).items()}


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[1])
def test_python_runs_as_it_stands(
    code: str,
    demo_student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo_student)
    checked = run_block(code)
    assert checked == sum(1 for text in comments(code).values() if re.match(r"# \(\d", text))
    if "of {len(right)} digits" in code:  # of ten kinds
        assert int(capsys.readouterr().out.partition("%")[0]) > 30


def test_there_are_blocks_of_each_kind() -> None:
    assert len(blocks("python")) >= 4
    assert len(blocks("sh")) >= 4
    assert len(blocks("toml")) == 2
    assert sum(block.count("# (") for block in blocks("python")) >= 5


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    (tmp_path / "my-recipe.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    return load_recipe("my-recipe.toml")


def test_the_recipe_builds_and_plans(recipe: RunConfig) -> None:
    assert set(recipe.teachers) == set(TEACHERS)
    widths = {name: (summary, spatial) for name, (_, _, summary, spatial) in TEACHERS.items()}
    with torch.device("meta"):
        student = build_student(recipe, widths)
    assert student.config.name == recipe.student.preset == "B"
    assert "sam" not in student.heads.summary
    colour = (0.5, 0.5, 0.5)
    specs = {
        name: TeacherSpec(name, size, patch, patch, colour, colour, summary, spatial)
        for name, (size, patch, summary, spatial) in TEACHERS.items()
    }
    planner = Planner(recipe, specs, student.config.patch_size)
    for step in range(20):
        for group in planner(step).groups:
            # As the comment says: patch 14 at 0.875 of the size has the student's grid.
            assert group.teachers["dino"] // 14 == group.size // 16
            assert group.teachers["clip"] == 224


def test_the_partitions_plan(recipe: RunConfig) -> None:
    groups = tomllib.loads(blocks("toml")[1])["groups"]
    changed = recipe.to_dict()
    changed["stages"] = [changed["stages"][0] | {"groups": groups}]
    changed["student"]["max_resolution"] = 1024
    config = config_from_dict(changed, "partitions")
    grey = (0.5, 0.5, 0.5)
    specs = {
        name: TeacherSpec(name, size, patch, patch, grey, grey, summary, spatial)
        for name, (size, patch, summary, spatial) in TEACHERS.items()
    }
    planner = Planner(config, specs, 16, world=128, rank=127)
    assert [group.size for group in planner(0).groups] == [1024]
    assert planner.teachers_of_rank() == {"sam"}


def commands() -> list[list[str]]:
    """The arguments of every train.py in the shell blocks."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    found = [part for line in lines for part in line.split("&&") if "train.py" in part]
    split = [shlex.split(part) for part in found]
    return [words[words.index("train.py") + 1 :] for words in split]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_is_accepted(recipe: RunConfig, arguments: list[str]) -> None:
    if arguments[:1] == ["plan"]:
        plan_command.main(arguments[1:])
        return
    if arguments[:1] == ["export"]:
        assert export_command.parse(arguments[1:]).run == Path("runs/demo")
        return
    if arguments[:1] == ["cache"]:
        config, _ = cache_command.parse(arguments[1:])
        assert config.cache.folder == "features"
    else:
        config = parse_arguments(arguments)
    assert len(commands()) >= 5
    if "--data.images" in arguments:
        first = arguments[arguments.index("--data.images") + 1]
        assert config.data.images[0] == first
    if "--recipe" in arguments:
        assert config.recipe == arguments[arguments.index("--recipe") + 1]


def test_every_flag_in_the_text_is_accepted() -> None:
    spans = re.findall(r"`(--[^`]+)`", README)
    assert spans
    for span in spans:
        parse_arguments(shlex.split(span))


def test_a_wrong_flag_would_not_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--data.image", "x"])
    assert "data.image" in capsys.readouterr().err


def test_ci_runs_the_test_command() -> None:
    (expected,) = re.findall(r"^<!-- command: test -->\n```sh\n(.*?)\n```$", README, re.M | re.S)
    assert "\n" not in expected
    script = (ROOT / ".ci" / "run").read_text()
    (extraction,) = re.findall(r"^command=\$\((awk .*?)\)$", script, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", extraction],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
    assert 'eval "$command"' in script


def test_extras_that_it_installs_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"-e \"\.\[([\w,]+)\]\"", README)
    assert len(named) >= 3
    for extras in named:
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert README.count("-c constraints.txt") >= len(named)


def test_files_and_recipes_that_it_names_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert links
    spans = re.findall(r"`((?:fastagglo|kernels|tests|docs|\.ci)/[^`\s]*)`", README)
    for name in (*links, *spans, "constraints.txt"):
        assert (ROOT / name.partition("#")[0]).exists(), name
    for base, sizes in re.findall(r"`((?:c-)?radio-v[\d.]+-)\{([\w,]+)\}`", README):
        assert {base + size for size in sizes.split(",")} <= set(recipe_names())
