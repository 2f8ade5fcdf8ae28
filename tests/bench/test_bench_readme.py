"""Are the commands, files and suites that bench/README.md names there?"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import readme_table, report

ROOT = Path(__file__).parents[2]
README = (ROOT / "bench" / "README.md").read_text()


def commands(start: str) -> list[list[str]]:
    """The arguments of every line of the shell blocks that starts so."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    first = start.split()
    return [words[len(first) :] for words in split if words[: len(first)] == first]


@pytest.mark.parametrize("arguments", commands("python -m bench"), ids=" ".join)
def test_commands_of_the_suites(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("run", "compare"):
        monkeypatch.setattr(
            command, name, lambda *given, name=name: asked.append((name, given)) or 0
        )
    assert command.main(arguments) == 0
    ((name, _),) = asked
    assert name == ("compare" if "--compare" in arguments else "run")


@pytest.mark.parametrize(
    "module", ["static", "peers_attention", "merge_quality", "ranks", "tome", "step"]
)
def test_commands_of_the_others(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(f"python -m bench.{module}")
    assert found
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{module}").main(["--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for arguments in found:
        assert {word for word in arguments if word.startswith("--")} <= known


def test_every_command_is_looked_at() -> None:
    others = ("static", "peers_attention", "merge_quality", "ranks", "tome", "step")
    looked = [*commands("python -m bench"), *commands("pytest")]
    looked += [words for name in others for words in commands(f"python -m bench.{name}")]
    lines = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(looked) == sum(len(block.splitlines()) for block in lines) >= 12


def test_files_that_pytest_runs_alone() -> None:
    found = commands("pytest")
    assert found
    for file, *_ in found:
        assert (ROOT / file).is_file()
        assert Path(file).stem in command.SUITES


def test_all_suites_are_listed() -> None:
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == list(command.SUITES)


def test_keys_of_the_results_are_described() -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    words = set(re.findall(r"\w+", block))
    assert {key for key in report.NOTES if key != "suites"} <= words
    assert f"at most {report.LARGEST // 1000} kB" in README


def test_files_and_names_that_it_names_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    files = re.findall(r"`(\w+\.py)`", README)
    assert links
    assert files
    for name in (*links, *files):
        assert (ROOT / "bench" / name).exists(), name
    for module, names in {
        "engine": ("Run", "Suite", "Unavailable", "pytest_generate_tests", "test_duel"),
        "machine": ("PACKAGES",),
        "__main__": ("SUITES",),
    }.items():
        for name in names:
            assert name in README
            assert hasattr(importlib.import_module(f"bench.{module}"), name)


def test_the_table_of_readme_is_that_of_the_results() -> None:
    pattern = (
        r"<!-- bench table: python -m bench.readme_table (\S+) -->\n(.*?)\n<!-- end of table -->"
    )
    ((file, table),) = re.findall(pattern, (ROOT / "README.md").read_text(), re.DOTALL)
    assert table == readme_table.table(json.loads((ROOT / file).read_text()))


def test_results_without_what_readme_shows_are_refused() -> None:
    results = {"machine": {"cpu": "x", "threads": 2}, "suites": {"attention": {"duels": []}}}
    with pytest.raises(ValueError, match="'padded' in case 'B-mix-forward' of suite 'attention'"):
        readme_table.table(results)
