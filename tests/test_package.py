"""The wheel and the editable install: what is in them, and that both import and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHEEL_VERSION = "0.0.7"  # of no other install, so that it can only come from the wheel's metadata

PROBE = """
import json
from importlib import resources
import torch
import fastagglo
import fastagglo.kernels
from fastagglo.ops import PackedLayout, packed_attention, reference
from fastagglo.train import load_recipe, recipe_names

q, k, v = torch.randn(3, 9, 2, 8)
layout = PackedLayout.from_lengths([4, 5])
torch.testing.assert_close(
    packed_attention(q, k, v, layout), reference.packed_attention(q, k, v, layout)
)
print(json.dumps({
    "version": fastagglo.__version__,
    "package": fastagglo.__file__,
    "kernels": fastagglo.kernels.__file__,
    "recipes": recipe_names(),
    "demo": sorted(load_recipe("demo").teachers),
    "template": len(resources.files("fastagglo.eval").joinpath("report.html").read_text()),
}))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, away from the repository."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(folder: Path, **environment: str) -> dict:
    return json.loads(run(sys.executable, "-c", PROBE, cwd=folder, **environment).splitlines()[-1])


def recipes() -> list[str]:
    return sorted(path.stem for path in (ROOT / "fastagglo/train/recipes").glob("*.toml"))


def modules(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, with the tools of this environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fastagglo", "kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    project = (ROOT / "pyproject.toml").read_text()
    project, changed = re.subn(
        r'^version = ".*"$', f'version = "{WHEEL_VERSION}"', project, flags=re.MULTILINE
    )
    assert changed == 1
    (source / "pyproject.toml").write_text(project)
    options = ("--wheel", "--no-isolation", "--outdir", folder / "dist")
    run(sys.executable, "-m", "build", *options, source, cwd=folder)
    (path,) = (folder / "dist").iterdir()
    return path


def test_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"fastagglo-{WHEEL_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"fastagglo-{WHEEL_VERSION}.dist-info/"
    expected = {f"fastagglo/{name}" for name in modules(ROOT / "fastagglo")}
    expected |= {f"fastagglo/kernels/{name}" for name in modules(ROOT / "kernels")}
    expected |= {f"fastagglo/train/recipes/{name}.toml" for name in recipes()}
    expected |= {"fastagglo/eval/report.html", "fastagglo/kernels/tiles.json"}
    assert "fastagglo/kernels/__init__.py" in names
    assert {name for name in names if not name.startswith(info)} == expected
    assert info + "licenses/LICENSE" in names


def test_installed_wheel_imports_and_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ("--no-deps", "--no-index", "--no-compile", "--target", target)
    run(sys.executable, "-m", "pip", "install", "-q", *options, wheel, cwd=elsewhere)
    # An entry of PYTHONPATH comes before the finder of the editable install.
    found = probe(elsewhere, PYTHONPATH=str(target))
    assert Path(found["package"]) == target / "fastagglo" / "__init__.py"
    assert Path(found["kernels"]) == target / "fastagglo" / "kernels" / "__init__.py"
    assert found["version"] == WHEEL_VERSION
    assert found["recipes"] == recipes()
    assert found["demo"] == ["hog", "lite0", "lite2"]
    assert found["template"] > 1000


def test_editable_install_imports_and_runs_from_this_tree(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert Path(found["package"]) == ROOT / "fastagglo" / "__init__.py"
    assert Path(found["kernels"]) == ROOT / "kernels" / "__init__.py"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["version"] == project["version"]
    assert found["recipes"] == recipes()
