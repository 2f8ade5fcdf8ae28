"""Reading a run's configuration from recipe files and the command line, and saving it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from fastagglo.errors import UserError, require, suggestion
from fastagglo.train.config import (
    GroupSettings,
    RunConfig,
    StageSettings,
    TeacherSettings,
    check_config,
)

CONFIG_FILE = "config.toml"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with fastagglo."""
    folder = resources.files("fastagglo.train.recipes")
    return sorted(
        p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
    )


def load_recipe(name_or_path: str) -> RunConfig:
    """Read a recipe by name or from a TOML file.

    Raises:
        UserError: there is no such recipe or file, it is not TOML, or one of its settings is
            unknown or of the wrong type; the message names the setting and suggests the nearest.
    """
    if name_or_path in recipe_names():
        text = (
            resources.files("fastagglo.train.recipes").joinpath(f"{name_or_path}.toml").read_text()
        )
    else:
        path = Path(name_or_path)
        if not path.is_file():
            near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"recipe {name_or_path!r}: neither a file nor one of "
                f"{', '.join(recipe_names())}{meant}"
            )
        text = path.read_text()
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name_or_path}: not valid TOML: {error}") from error
    return config_from_dict({"recipe": name_or_path, **data}, f"recipe {name_or_path}")


def config_from_dict(data: dict[str, Any], where: str) -> RunConfig:
    """Build a checked configuration from nested plain values.

    Args:
        data: as read from TOML or JSON.
        where: what error messages call the origin of the values.

    Raises:
        UserError: a setting is unknown, of the wrong type, or makes no sense.
    """
    pydantic = require("pydantic", extra="train", purpose="reading a recipe")
    try:
        # Strict JSON rather than Python values: arrays fill tuples, "3" is not the number 3.
        config = pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # Where a setting has alternatives, pydantic appends the one that it tried.
        setting = ".".join(str(p) for p in first["loc"] if p not in ("int", "tuple[int, ...]"))
        if first["type"] == "unexpected_keyword_argument":
            known = _fields_at(first["loc"][:-1])
            near = suggestion(str(first["loc"][-1]), known)
            raise UserError(f"{where}: unknown setting {setting!r}{near}") from None
        expected = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"{where}: setting {setting!r}: {expected}, but it is {first['input']!r}"
        ) from None
    check_config(config)
    return config


def parse_arguments(arguments: list[str]) -> RunConfig:
    """Configuration of a command line: a recipe, then the settings that override it.

    Raises:
        UserError: a setting makes no sense.
        SystemExit: ``--help``, or an argument that is unknown or ill typed (tyro prints which one
            and the nearest known).
    """
    tyro = require("tyro", extra="train", purpose="the command line")
    recipe = _value_of("--recipe", arguments)
    if recipe is None and (run := _value_of("--resume", arguments)):
        recipe = saved_recipe(Path(run))
    recipe = recipe or RunConfig.recipe
    default = load_recipe(recipe)
    config = tyro.cli(
        RunConfig,
        default=default,
        args=arguments,
        prog="train.py",
        description=(
            "Train one vision transformer from several frozen teachers at many resolutions at "
            "once.\n\nRecipes: " + ", ".join(recipe_names()) + ". Options below are shown with the "
            f"values of the recipe {recipe!r}; give --recipe NAME --help to see another's."
        ),
    )
    check_config(config)
    return config


def saved_recipe(folder: Path) -> str:
    """Path of the recipe saved with a run.

    Raises:
        UserError: there is no run in this folder.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"setting resume: {folder} holds no run (no {CONFIG_FILE} in it)")
    return str(path)


def save_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved configuration into a run's folder, as a recipe.

    Raises:
        UserError: it cannot be written; the one before it, of a run that goes on, is intact.
    """
    tomli_w = require("tomli_w", extra="train", purpose="saving the configuration")
    values = config.to_dict()
    for place in ("out", "resume", "overwrite"):  # where a run lies is not part of what it is
        values.pop(place, None)
    path = folder / CONFIG_FILE
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(tomli_w.dumps(values))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"configuration {path}: cannot be written ({error.strerror}); make room, or choose "
            "another folder with --out"
        ) from error


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The value of an option on the command line, the last one as for every other option."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(option + "="):
            found = argument.removeprefix(option + "=")
    return found


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """Names of the settings at a place such as ``("teachers", "clip")``."""
    here: Any = RunConfig()
    samples = {"teachers": TeacherSettings(), "stages": StageSettings(), "groups": GroupSettings()}
    steps = iter(location)
    for step in steps:
        if step in samples:
            here = samples[str(step)]
            next(steps, None)  # the teacher's name or the number in the list
        else:
            here = getattr(here, str(step))
    return [f.name for f in dataclasses.fields(here)]
