"""The bench on real compiles: the stub driver, the analysis of launches, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from fastagglo.kernels.inspect import (
    Job,
    Launch,
    Report,
    analyse,
    main,
    rank,
    run_job,
    stub_device,
    table,
)

FOLDER = Path(__file__).parent
CONFIG = triton.runtime.driver


def launches_of(arch: str, run, *arguments, **options) -> list[Launch]:
    with stub_device(arch) as launches:
        run(*arguments, **options)
    return launches


def report_of(arch: str, run, *arguments, **options) -> Report:
    (launch,) = launches_of(arch, run, *arguments, **options)
    return analyse(launch)


# --- the stub driver ------------------------------------------------------------------------------


class _Driver:
    """Stands for the driver of a real GPU."""


@pytest.fixture
def other_driver() -> Iterator[_Driver]:
    former, driver = CONFIG._active, _Driver()
    CONFIG.set_active(driver)
    yield driver
    CONFIG.set_active(former)


def test_the_former_driver_is_back_after_the_context(other_driver: _Driver) -> None:
    with stub_device("sm_80") as outer:
        assert CONFIG.active.get_current_target().arch == 80
        with stub_device("sm_90") as inner:
            assert CONFIG.active.get_current_target().arch == 90
        assert CONFIG.active.get_current_target().arch == 80
        assert inner is not outer
    assert CONFIG.active is other_driver


def test_the_former_driver_is_back_after_an_exception(other_driver: _Driver) -> None:
    with pytest.raises(KeyError), stub_device("sm_80"):
        raise KeyError
    assert CONFIG.active is other_driver
    with pytest.raises(ValueError, match="'sm_9' is not known"), stub_device("sm_9"):
        pass
    assert CONFIG.active is other_driver


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_gpu_launches_fail_before_and_after(kernels: ModuleType) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="0 active drivers"):
            kernels.run_matmul()
        launches_of("sm_80", kernels.run_matmul)


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"), stub_device("sm_80"):
        pass


def test_records_each_launch_and_writes_nothing(kernels: ModuleType) -> None:
    x = torch.ones(1000)
    with stub_device("sm_90") as launches:
        kernels.double.fn[(4, 2)](x, 1000, SIZE=256, num_warps=2)
        kernels.double.fn[(8,)](x, 1000, SIZE=128)
        kernels.double.fn[(4, 2)](x, 1000, SIZE=256, num_warps=2)
    assert [(i.kernel, i.grid, i.warps) for i in launches] == [
        ("double", (4, 2, 1), 2),
        ("double", (8, 1, 1), 4),
        ("double", (4, 2, 1), 2),
    ]
    assert launches[0].constants["SIZE"] == 256
    assert launches[0].signature["x"] == "*fp32"
    assert launches[0].cubin == launches[2].cubin != launches[1].cubin
    assert torch.equal(x, torch.ones(1000))


def test_autotuned_kernels_launch_every_configuration(kernels: ModuleType) -> None:
    x = torch.ones(1000)
    launches = launches_of("sm_90", lambda: kernels.double[(4,)](x, 1000))
    assert [i.constants["SIZE"] for i in launches[:2]] == [128, 256]
    assert len(launches) == 3


def test_the_launcher_specialises_as_on_a_device(kernels: ModuleType) -> None:
    # Only what begins at a multiple of 16 bytes may be read 16 bytes at a time.
    x = torch.empty(5000)
    for offset, load in ((0, "ld.global.v4.b32"), (1, "ld.global.b32")):
        with stub_device("sm_80"):
            compiled = kernels.double.fn[(8,)](x[offset:], 4096, SIZE=512)
        assert load in compiled.asm["ptx"]


# --- analysis -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "opcode", "count"),
    [
        ("sm_80", "HMMA.16816.F32.BF16", 128 * 64 * 64 * 2 // 4096 // 4),
        ("sm_90", "HGMMA.64x64x16.F32.BF16", 128 // 64 * (64 // 16)),
        ("sm_100", "UTCHMMA", 64 // 16),
    ],
)
def test_tensor_core_work_of_a_matmul_is_exact(
    kernels: ModuleType, arch: str, opcode: str, count: int
) -> None:
    report = report_of(arch, kernels.run_matmul, num_warps=4)
    (loop,) = report.loops
    assert loop is report.main
    assert loop.tensor_instructions == {opcode: count}
    assert loop.counts["tensor"] == count
    assert loop.unroll == 1
    assert loop.dot_flops == loop.tensor_flops == 2 * 128 * 64 * 64
    assert loop.operand_type == "bf16"
    assert loop.counts["total"] == sum(n for name, n in loop.counts.items() if name != "total")
    assert loop.non_tensor == 4 * (loop.counts["total"] - count)
    # All of a and b goes through shared memory once in each trip, into it; out of it, to Hopper's
    # and Blackwell's tensor cores, by each instruction: 64 or 128 rows and 64 columns of 32 bytes.
    into = (128 + 64) * 64 * 2 / 128
    out = {"sm_90": 2 * 4 * (64 + 64) * 32 / 128, "sm_100": 4 * (128 + 64) * 32 / 128}
    if arch in out:
        assert loop.cycles["l1"] == into + out[arch]
    assert loop.non_tensor_per_mflop == pytest.approx(loop.non_tensor * 1e6 / (2 * 128 * 64 * 64))
    assert report.fits
    assert not report.spills
    assert report.notes == ()
    json.dumps(asdict(report))


@pytest.mark.parametrize(
    ("arch", "rate"), [("sm_80", 2048), ("sm_90", 4096), ("sm_100", 8192), ("sm_120", 1024)]
)
def test_flash_attention_on_every_generation(kernels: ModuleType, arch: str, rate: int) -> None:
    (launch,) = launches_of(arch, kernels.run_flash, num_warps=4, num_stages=2)
    useful = 4 * 128 * 64 * 60  # as if four of the 64 columns of a head were padding
    report = analyse(launch, useful_flops=useful)
    assert launch.grid == (1 << 19, 1, 1)
    assert report.constants["C"] == 64
    whole, masked = report.loops
    assert whole.label == "main"
    assert whole.start > masked.start  # the masked loop is written first, and costs more
    assert whole.counts["total"] < masked.counts["total"]
    for loop in report.loops:
        assert loop.unroll == 1
        assert loop.dot_flops == loop.tensor_flops == 4 * 128 * 64 * 64
        # One exponential for each of 128 x 64 logits and, in up to four threads, of 128 rows.
        assert 64 <= loop.counts["mufu"] <= 68
        assert loop.useful_flops == useful
        assert loop.non_tensor_per_useful_mflop == pytest.approx(loop.non_tensor * 1e6 / useful)
        assert loop.cycles["tensor"] == 4 * 128 * 64 * 64 / rate
        assert loop.cycles["mufu"] == pytest.approx(8 * loop.counts["mufu"], rel=0.02)
        assert loop.cycles["issue"] == loop.counts["total"]
        slowest = max(loop.cycles.values())
        assert loop.bound == loop.cycles["tensor"] / slowest <= 1
        assert loop.cycles[loop.limiter] == slowest


def test_unrolled_loops_are_told_by_the_shapes_of_the_ir(kernels: ModuleType) -> None:
    (long,) = launches_of("sm_80", kernels.run_matmul, k=64, num_warps=4)
    (short,) = launches_of("sm_80", kernels.run_matmul, k=32, num_warps=4)
    report = analyse(replace(long, ttgir=short.ttgir))  # as if two trips had become one
    assert report.main is not None
    assert report.main.unroll == 2
    assert report.main.dot_flops == report.main.tensor_flops == 2 * 128 * 64 * 64
    # The other way round nothing fits, and the machine code speaks for itself.
    report = analyse(replace(short, ttgir=long.ttgir))
    assert report.main is not None
    assert (report.main.unroll, report.main.dot_flops) == (None, None)
    assert report.main.tensor_flops == 2 * 128 * 64 * 32
    assert "matches none" in report.notes[0]


def test_work_that_warps_do_twice_shows(kernels: ModuleType) -> None:
    # 16 rows and 8 columns are one instruction; four warps execute it all the same.
    report = report_of("sm_80", kernels.run_matmul, 16, 8, 64, num_warps=4)
    assert report.main is not None
    assert report.main.unroll == 1
    assert report.main.dot_flops == 2 * 16 * 8 * 64
    assert report.main.tensor_flops == 4 * report.main.dot_flops


def test_full_fp32_has_loops_and_no_tensor_cores(kernels: ModuleType) -> None:
    for precision, kind in (("ieee", None), ("tf32", "tf32")):
        run = partial(kernels.run_matmul, 64, 64, 32, dtype=torch.float32, precision=precision)
        report = report_of("sm_80", run, num_warps=4, num_stages=2)
        (loop,) = report.loops
        assert loop.operand_type == kind
        assert loop.dot_flops == 2 * 64 * 64 * 32
        if kind is None:
            # One FFMA is 2 x 32 operations of a warp.
            assert loop.counts["float"] == loop.dot_flops // 64 // 4
            assert (loop.tensor_flops, loop.bound, loop.non_tensor_per_mflop) == (0, None, None)
        else:
            assert loop.cycles["tensor"] == loop.dot_flops / 1024


def test_spills_are_seen(kernels: ModuleType) -> None:
    report = report_of("sm_90", kernels.run_flash, num_warps=4, num_stages=2, maxnreg=64)
    assert report.spills
    assert report.registers <= 64
    assert min(report.stack, report.spill_stores, report.spill_loads) > 0
    assert report.main is not None
    assert report.main.counts["local"] > 0


def test_too_much_shared_memory_is_seen(kernels: ModuleType) -> None:
    run = partial(kernels.run_matmul, 128, 128, 128, num_warps=4)
    # Hopper's products are asynchronous: a stage more is in flight.
    fits, too_much = report_of("sm_90", run, num_stages=3), report_of("sm_80", run, num_stages=4)
    assert fits.fits
    assert fits.shared == too_much.shared == 3 * 2 * 128 * 128 * 2  # 192 KiB
    assert not too_much.fits
    assert too_much.occupancy.ctas == 0
    assert too_much.notes == ("does not fit: 196608 bytes of shared memory, sm_80 has 166912",)


def test_kernels_from_the_cache_give_the_same_report(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hits = []
    listener = lambda **facts: hits.append(facts["cache_hit"])  # noqa: E731
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    reports = []
    for _ in range(2):
        kernels.matmul.device_caches.clear()  # as in a new process
        reports.append(report_of("sm_90", kernels.run_matmul, 64, num_warps=4))
    assert hits == [False, True]
    assert reports[0] == reports[1]


# --- jobs and the command line --------------------------------------------------------------------


def test_a_job_reports_what_it_is_asked_for(kernels: ModuleType) -> None:
    flash, matmul = run_job(Job("both", "sm_80", kernels.run_both))
    assert flash.report is not None
    assert flash.report.kernel == "flash"
    assert (flash.launches, matmul.launches) == (1, 2)
    job = Job(
        "one", "sm_80", kernels.run_both, ("matmul",), lambda launch: 1e3 * launch.constants["K"]
    )
    (row,) = run_job(job)
    assert row.report is not None
    assert row.report.main is not None
    assert row.report.main.useful_flops == 64e3


def test_failing_jobs_keep_their_launches_and_their_reason(kernels: ModuleType) -> None:
    matmul, failure = run_job(Job("job", "sm_80", kernels.run_and_fail))
    assert matmul.report is not None
    assert failure.report is None
    assert failure.error == "ValueError: is the last line"
    assert "in run_and_fail" in failure.trace
    (row,) = run_job(Job("job", "sm_80", kernels.run_both, ("other",)))
    assert row.error == "launched no other"
    (row,) = run_job(Job("job", "sm_80", kernels.run_nothing))
    assert row.error == "launched no Triton kernel"


def test_ranking_prefers_what_runs_and_then_few_instructions(kernels: ModuleType) -> None:
    def rows(label: str, **options) -> list:
        return run_job(Job(label, "sm_80", partial(kernels.run_matmul, **options)))

    listed = [
        *rows("failed", m=24),
        *rows("fp32", m=64, k=32, dtype=torch.float32, precision="ieee", num_warps=4),
        *rows("too big", n=128, k=128, num_warps=4, num_stages=4),
        *rows("many", m=16, n=64, num_warps=4),
        *rows("few", num_warps=4),
    ]
    assert [row.label for row in rank(listed)] == ["few", "many", "too big", "fp32", "failed"]
    text = table(listed)
    assert max(map(len, text.splitlines())) <= 120
    assert "no fit" in text
    assert "CompilationError: arange's range must be a power of 2" in text


def inspect(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastagglo.kernels.inspect", *arguments],
        cwd=FOLDER,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_command_line_compiles_a_users_function(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = inspect(
        *("launch", "example_kernels:run_both", "--arch", "sm_80,sm_90", "--json", str(file))
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines if " w4 " in line] == 2 * ["flash", "matmul"]
    assert "it predicts no time" in done.stdout.replace("\n", " ")
    content = json.loads(file.read_text())
    assert content["versions"]["triton"] == triton.__version__
    assert [row["arch"] for row in content["rows"]] == ["sm_80", "sm_80", "sm_90", "sm_90"]
    (matmul,) = content["rows"][3]["report"]["loops"]
    assert matmul["tensor_instructions"] == {"HGMMA.64x64x16.F32.BF16": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sm_70"), "'sm_70' is not known; choose from sm_80, sm_86"),
        (("--arch", ","), "',' is not known"),
        (("--jobs", "0"), "'0' is not a positive whole number"),
        (("example_kernels",), "not of the form module:function"),
        (("example_kernels:other",), "module 'example_kernels' has no 'other'"),
        (("example_kernels:NUMBER",), "cannot be called as 'NUMBER'"),
        (("no_such_module:run",), "cannot import 'no_such_module'"),
    ],
)
def test_bad_arguments_end_in_one_line(
    kernels: ModuleType,
    capsys: pytest.CaptureFixture,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    function = () if ":" in arguments[0] or "_" in arguments[0] else ("example_kernels:run_both",)
    with pytest.raises(SystemExit) as stop:
        main(["launch", *function, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_failing_function_shows_its_traceback(
    kernels: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    assert main(["launch", "example_kernels:run_and_fail", "--arch", "sm_80"]) == 1
    shown = capsys.readouterr()
    assert "in run_and_fail" in shown.err
    assert "ValueError: is the last line" in shown.out
    assert "matmul w4 s3" in shown.out
