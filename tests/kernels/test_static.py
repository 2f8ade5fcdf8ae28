"""The kernels compile to what bench/static.json says, or to something better.

A row that fails names itself and both values. Where the change is meant, renew the table:
``python -m bench.static --write``. What kernels must hold anyway: test_*_compiled.py beside this.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from fastagglo.kernels.sweep import Job, Row, run_job
from fastagglo.model.config import PRESETS
from fastagglo.ops.backend import INTERPRETED

BENCH = Path(__file__).parents[2] / "bench"
if "bench" not in sys.modules:  # no installed package; the repository stays out of sys.path
    spec = importlib.util.spec_from_file_location(
        "bench", BENCH / "__init__.py", submodule_search_locations=[str(BENCH)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])

from bench import static, static_cases  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

# One launch of the merge's match kernel, as the table has it.
NAME = "sm_90 merge 1280 match_kernel"


@pytest.fixture(scope="module")
def table() -> dict[str, static.Entry]:
    return static.read()[1]


@pytest.mark.parametrize("arch", static_cases.ARCHS)
@pytest.mark.parametrize("family", list(static_cases.FAMILIES))
def test_kernels_compile_to_what_the_table_says(family: str, arch: str) -> None:
    found, changes, other_compiler = static.check([family], [arch])
    for name, entry in found.items():
        print(name, entry)
    worse = [str(change) for change in changes if change.worse]
    assert not worse, "\n".join(worse)
    if better := [str(change) for change in changes]:
        warnings.warn("\n".join(better), stacklevel=1)
    if other_compiler:
        pytest.skip(other_compiler)


# --- the table


def test_the_table_has_every_cell_and_is_small(table: dict[str, static.Entry]) -> None:
    for family, arch in static_cases.cells():
        assert len(static.part(table, [family], [arch])) >= 7
    labels = {
        f"{job.arch} {job.label}" for f in static_cases.FAMILIES for job in static_cases.jobs(f)
    }
    assert all(any(name.startswith(label + " ") for name in table) for label in labels)
    assert all(any(name.startswith(label + " ") for label in labels) for name in table)
    assert static.TABLE.stat().st_size < 200_000


def test_the_presets_are_in_it() -> None:
    heads = {config.width // config.num_heads for config in PRESETS.values()}
    assert heads <= set(static_cases.HEAD_DIMS)


def test_products_are_on_tensor_cores_and_spill_nothing(table: dict[str, static.Entry]) -> None:
    """Of the table itself, whatever compiler runs here."""
    kinds = {"sm_80": {"HMMA bf16"}, "sm_90": {"HGMMA bf16"}, "sm_100": {"UTCHMMA bf16"}}
    products = 0
    for name, entry in table.items():
        assert (entry.stack, entry.spills) == (0, 0), name
        arch, family, *_, kernel = name.split()
        if family == "attention" or "linear" in kernel or kernel in ("match_kernel", "weight_grad"):
            assert set(entry.tensor) == kinds[arch], name
            products += 1
    assert products >= 3 * (15 + 1 + 8)


# --- the comparison


def changed(table: dict[str, static.Entry], **values: object) -> list[static.Change]:
    return static.compare(table, table | {NAME: replace(table[NAME], **values)})


def test_nothing_changed(table: dict[str, static.Entry]) -> None:
    assert static.compare(table, table) == []
    assert static.sane(table, table) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"spills": 8}, "spills, bytes a thread 0 -> 8"),
        ({"stack": 16}, "stack, bytes a thread 0 -> 16"),
        ({"tensor": {"HGMMA bf16": 3}}, "trip 4 HGMMA bf16 -> 3 HGMMA bf16"),
        ({"tensor": {"HMMA bf16": 64}}, "trip 4 HGMMA bf16 -> 64 HMMA bf16"),
        ({"tensor": {}}, "trip 4 HGMMA bf16 -> none"),
        ({"loop": 94}, "trip of the inner loop 89 -> 94 (+5.6%)"),
        ({"loop": None}, "inner loop 89 -> None"),
    ],
)
def test_worse(table: dict[str, static.Entry], values: dict[str, object], text: str) -> None:
    assert (table[NAME].tensor, table[NAME].loop) == ({"HGMMA bf16": 4}, 89)
    (change,) = changed(table, **values)
    assert change.worse
    assert str(change).startswith(f"WORSE: {NAME}: ")
    assert str(change).endswith(text)


def test_small_growth_and_registers_pass(table: dict[str, static.Entry]) -> None:
    assert changed(table, loop=93, registers=255, shared=100) == []
    # Twice as much in a trip that does twice the work.
    assert changed(table, loop=2 * 89, unroll=2, tensor={"HGMMA bf16": 8}) == []


def test_better_is_reported_and_passes(table: dict[str, static.Entry]) -> None:
    (change,) = changed(table, loop=80)
    assert not change.worse
    assert str(change).startswith(f"better, renew the table: {NAME}: ")
    (change,) = static.compare(table | {NAME: replace(table[NAME], spills=8)}, table)
    assert not change.worse


def test_a_kernel_without_a_loop_is_held_to_its_length(table: dict[str, static.Entry]) -> None:
    name = "sm_90 mlp pointwise 1520 gelu_kernel"
    longer = replace(table[name], code=int(table[name].code * 1.06))
    (change,) = static.compare(table, table | {name: longer})
    assert table[name].loop is None
    assert change.worse
    assert f"instructions {table[name].code} -> {longer.code} (+" in change.text


def test_rows_that_only_one_side_has(table: dict[str, static.Entry]) -> None:
    less = {name: entry for name, entry in table.items() if name != NAME}
    for changes in (static.compare(table, less), static.sane(table, less)):
        assert [(c.row, c.worse) for c in changes] == [(NAME, True)]
    assert [(c.row, c.worse) for c in static.compare(less, table)] == [(NAME, True)]


def test_a_failure_is_a_change_for_the_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arch: str) -> list[Job]:
        return [Job("merge 1280", arch, lambda: 1 / 0)]

    monkeypatch.setitem(static_cases.FAMILIES, "merge", broken)
    found, changes, _ = static.check(["merge"], ["sm_90"])
    assert found == {}
    assert changes[0].worse
    assert changes[0].text == "ZeroDivisionError: division by zero"
    assert NAME in {change.row for change in changes}


def test_another_compiler(table: dict[str, static.Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures may differ; tensor cores may not be lost, nor registers spill in floods."""
    row = table[NAME]
    cases = {
        "other": (replace(row, spills=40, loop=200, tensor={"HMMA bf16": 64}), 0),
        "scalar": (replace(row, tensor={}), 1),
        "spills": (replace(row, spills=1000), 1),
    }
    for entry, wrong in cases.values():
        assert len(static.sane(table, table | {NAME: entry})) == wrong
    monkeypatch.setattr(triton, "__version__", "0.1")
    monkeypatch.setitem(static_cases.FAMILIES, "merge", lambda arch: [])
    _, changes, reason = static.check(["merge"], ["sm_90"])
    assert "and this is 0.1: code of another compiler" in reason
    assert len(changes) == 7


# --- names and files


def test_names_of_rows() -> None:
    (job,) = static_cases.jobs("merge", ["sm_90"])
    rows = run_job(job)
    found, failed = static.entries([*rows, Row("other", "sm_90", error="no")])
    assert failed == {"sm_90 other": "no"}
    assert [name.partition(" 1280 ")[2] for name in found] == [
        "norm_kernel", "match_kernel", "select_kernel", "segment_kernel", "gather_kernel",
        "gather_kernel 2", "segment_kernel 2",
    ]  # fmt: skip
    too_much = replace(rows[0], report=replace(rows[0].report, fits=False))
    assert list(static.entries([too_much])[1]) == ["sm_90 merge 1280 norm_kernel"]


def test_a_table_is_read_as_it_was_written(table: dict[str, static.Entry], tmp_path: Path) -> None:
    path = tmp_path / "static.json"
    static.write(table, path)
    assert static.read(path) == (triton.__version__, table)
    assert json.loads(path.read_text())["triton"] == triton.__version__
    lines = path.read_text().splitlines()
    assert len(lines) == len(table) + 5  # a row a line
