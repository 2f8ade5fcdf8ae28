"""The walls of the code base: who imports whom, how light the core is, where things stand."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastagglo import ops
from fastagglo.ops import reference

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "fastagglo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULES = [path.relative_to(ROOT).as_posix() for path in FILES]

# What each part of fastagglo may import of the others.
ARROWS = {
    "errors": set(),
    "features": set(),
    "kernels": set(),
    "ops": {"kernels", "errors", "features"},
    "compress": {"ops", "errors", "features"},
    "model": {"ops", "errors", "features"},
    "interop": {"model", "ops", "errors", "features"},
    "data": {"ops", "errors", "features"},
    "teachers": {"ops", "errors", "features"},
    "distill": {"model", "ops", "errors", "features"},
    "eval": {"data", "distill", "model", "ops", "errors", "features"},
    "train": {
        *("data", "teachers", "distill", "eval", "interop", "model", "ops", "errors", "features"),
    },
    # The package itself: what `import fastagglo` brings.
    "": {"compress", "distill", "features", "interop", "kernels", "model", "ops"},
}

# Packages of the extras, none of which the core may need.
OPTIONAL = (
    *("timm", "transformers", "open_clip", "PIL", "torchvision", "matplotlib", "rich", "tyro"),
    *("pydantic", "safetensors", "skimage", "sklearn", "tensorboard", "jinja2", "webdataset"),
    *("scipy", "tomli_w", "huggingface_hub", "xformers", "efficientnet_lite_pytorch"),
    *("pynvml", "torchao"),
    *("onnx", "onnxscript", "onnxruntime"),
)

CORE = f"""
import socket
import sys

class Without:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            return None  # as if it were not installed
        found = (f.find_spec(name, path, target) for f in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, context):  # how a package learns its own version
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda context: ())(context)

def connect(*arguments):
    raise SystemExit(f"a connection was attempted: {{arguments[1:]}}")

sys.meta_path[:] = [Without(list(sys.meta_path))]
socket.socket.connect = socket.socket.connect_ex = connect
import fastagglo, fastagglo.ops, fastagglo.model, fastagglo.distill
import torch

assert not torch.cuda.is_initialized()
assert not {{name.partition(".")[0] for name in sys.modules}} & set({OPTIONAL!r})
student = fastagglo.model.create_student(
    "tiny", heads={{"a": fastagglo.model.HeadSpec(summary=8, spatial=8)}}, depth=1
)
assert student(torch.rand(1, 3, 32, 32))["a"].spatial[0].shape == (1, 2, 2, 8)
assert not torch.cuda.is_initialized()
"""


def part_of(module: str) -> str:
    """``fastagglo/ops/heads.py`` belongs to ``ops``, ``fastagglo/__init__.py`` to ``""``."""
    pieces = module.removesuffix(".py").split("/")
    part = pieces[0] if pieces[0] == "kernels" else pieces[1]
    return "" if part == "__init__" else part


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it: of ``from a import b``, ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_once(path: Path) -> Iterator[str]:
    """Top-level packages that importing the file imports."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    part = part_of(module)
    allowed = {part, *ARROWS[part]}
    ours = [name.split(".") for name in imported(ROOT / module) if name.startswith("fastagglo")]
    wrong = [".".join(name) for name in ours if len(name) < 2 or name[1] not in allowed]
    assert not wrong, f"{module} may import {sorted(allowed)} of fastagglo, not {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_other_packages_are_imported_where_they_are_used(module: str) -> None:
    known = {"fastagglo", "torch", "triton", "numpy", *sys.stdlib_module_names}
    wrong = set(imported_at_once(ROOT / module)) - known
    assert not wrong, f"{module} imports {sorted(wrong)} as soon as it is imported"
    if part_of(module) == "kernels":
        everything = {name.partition(".")[0] for name in imported(ROOT / module)}
        assert everything <= known - {"numpy"}, "a kernel needs torch and triton only"


def test_train_py_stands_on_the_trainer_alone() -> None:
    ours = {name for name in imported(ROOT / "train.py") if name.startswith("fastagglo")}
    assert ours
    for name in ours:
        assert name.startswith(("fastagglo.train", "fastagglo.errors")), name


def test_the_core_needs_no_optional_package_no_gpu_and_no_network() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CORE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_optional_package_is_in_the_extra_that_its_error_names() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    def packages(extra: str) -> set[str]:
        found = set()
        for line in extras[extra]:
            name, _, inner = re.split(r"[>=<;~\]]", line)[0].strip().lower().partition("[")
            if name == "fastagglo":
                found |= set().union(*(packages(e.strip()) for e in inner.split(",")))
            else:
                found.add(name.replace("_", "-"))
        return found

    installed_as = {
        "PIL": "pillow",
        "open_clip": "open-clip-torch",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "torch.utils.tensorboard": "tensorboard",
    }
    checked = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if not called or node.func.id != "require":
                continue
            module, (extra,) = node.args[0], [k.value for k in node.keywords if k.arg == "extra"]
            assert isinstance(extra, ast.Constant)
            if isinstance(module, ast.Constant):  # others are built from names known at run time
                name, top = module.value, module.value.partition(".")[0]
                name = installed_as.get(name, installed_as.get(top, top.replace("_", "-")))
                assert name in packages(extra.value), f"{path.name}: {name} in {extra.value}"
                checked += 1
    assert checked > 10


@pytest.mark.parametrize("op", ["attention", "heads", "loss", "merge", "mlp"])
def test_an_op_its_reference_and_its_test_have_one_name(op: str) -> None:
    for path in (f"fastagglo/ops/{op}.py", f"fastagglo/ops/reference/{op}.py"):
        assert (ROOT / path).is_file()
    assert (ROOT / f"tests/ops/test_{op}.py").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short_and_finished(module: str) -> None:
    text = (ROOT / module).read_text()
    assert len(text.splitlines()) <= 600
    unfinished = re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", text)
    assert not unfinished


def documented(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name in module.__all__:
        yield f"{module.__name__}.{name}", getattr(module, name)


PUBLIC = [
    pair
    for part in ("ops", "model", "distill", "data", "teachers", "eval", "interop")
    for pair in documented(importlib.import_module(f"fastagglo.{part}"))
]


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_public_names_are_documented_and_typed(name: str, thing: object) -> None:
    text = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    assert text, f"{name} has no docstring"
    assert text.strip()
    # A dataclass without a docstring gets its signature for one.
    assert not text.startswith(f"{name.rpartition('.')[2]}("), f"{name} has no docstring"
    if isinstance(thing, type):
        functions = {
            f"{name}.{key}": getattr(value, "__func__", value)
            for key, value in vars(thing).items()
            if (not key.startswith("_") or key == "__init__")
            and inspect.isfunction(getattr(value, "__func__", value))
        }
    else:
        functions = {name: thing} if inspect.isfunction(thing) else {}
    for where, function in functions.items():
        if inspect.unwrap(function).__code__.co_filename.startswith("<"):
            continue  # written by dataclass from the typed fields
        signature = inspect.signature(function)
        for argument in signature.parameters.values():
            if argument.name not in ("self", "cls"):
                assert argument.annotation is not argument.empty, f"{where}: {argument.name}"
        assert signature.return_annotation is not signature.empty, f"{where} has no return type"


class TestReference:
    """Every op has an eager twin of its name that gives the same result."""

    def test_each_op_has_a_twin(self) -> None:
        twins = {"packed_attention", "packed_attention_qkv", "adaptor_mlp", "multi_teacher_loss"}
        twins |= {"layer_norm_gelu", "linear_bias_gelu", "gelu_linear_residual"}
        assert set(reference.__all__) == twins | {"merge_tokens", "unmerge_tokens"}
        for name in reference.__all__:
            assert getattr(ops, name) is not getattr(reference, name)

    def test_attention(self) -> None:
        layout = ops.PackedLayout.from_lengths([5, 0, 9], capacity=16)
        q, k, v = torch.randn(3, 16, 2, 8)
        bias = torch.randn(16, 2)
        found = ops.packed_attention(q, k, v, layout, key_bias=bias)
        expected = reference.packed_attention(q, k, v, layout, key_bias=bias)
        torch.testing.assert_close(found, expected)
        assert expected[:14].abs().min() > 0

    def test_heads(self) -> None:
        head = ops.AdaptorMLP(12, 24, 6, blocks=1, upsample=2)
        rotation = torch.linalg.qr(torch.randn(6, 6)).Q
        x = torch.randn(2, 3, 4, 12)
        found = ops.adaptor_mlp(x, head, rotation=rotation)
        assert found.shape == (2, 6, 8, 6)
        torch.testing.assert_close(found, reference.adaptor_mlp(x, head, rotation=rotation))

    def test_mlp(self) -> None:
        x, norm = torch.randn(2, 3, 12), torch.randn(12)
        weight, bias, residual = torch.randn(5, 12), torch.randn(5), torch.randn(2, 3, 5)
        for name, arguments in (
            ("layer_norm_gelu", (x, norm, norm)),
            ("linear_bias_gelu", (x, weight, bias)),
            ("gelu_linear_residual", (x, weight, bias, residual)),
        ):
            found = getattr(ops, name)(*arguments, approximate="tanh")
            expected = getattr(reference, name)(*arguments, approximate="tanh")
            torch.testing.assert_close(found, expected)
            assert expected.abs().mean() > 0.1

    def test_merge(self) -> None:
        x = torch.randn(2, 20, 8)
        found, expected = ops.merge_tokens(x, 7), reference.merge_tokens(x, 7)
        assert found.x.shape == (2, 7, 8)
        torch.testing.assert_close(found.x, expected.x)
        torch.testing.assert_close(found.size, expected.size)
        y = torch.randn(2, 7, 3)
        torch.testing.assert_close(
            ops.unmerge_tokens(y, found), reference.unmerge_tokens(y, expected)
        )

    def test_loss(self) -> None:
        shapes = [(2, 4, 6, 8), (2, 5)]
        predictions = [torch.randn(shape) for shape in shapes]
        targets = [torch.randn(2, 3, 3, 8), torch.randn(2, 5)]
        terms = [
            ops.LossTerm("mse", weight=0.5, normaliser=ops.Affine(torch.randn(8), torch.rand(8))),
            ops.LossTerm("cosine"),
        ]
        found = ops.multi_teacher_loss(predictions, targets, terms)
        expected = reference.multi_teacher_loss(predictions, targets, terms)
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.per_term, expected.per_term)
        assert found.total > 0
