"""Jobs of the bench: what to launch for which chip, run in parallel processes."""

from __future__ import annotations

import multiprocessing
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass

from fastagglo.kernels.analysis import Report, analyse
from fastagglo.kernels.stub import Launch, stub_device


@dataclass(frozen=True)
class Job:
    """Something to launch.

    Attributes:
        label: what its rows are called in the table.
        arch: e.g. ``"sm_90"``.
        run: launches Triton kernels; picklable where several processes share the jobs.
        kernels: names of the kernels to report; all that ``run`` launches where empty.
        useful_flops: of one trip of a launch's loops, see `analysis.analyse`.
        group: what the table puts under one heading with it, and ranks.
    """

    label: str
    arch: str
    run: Callable[[], object]
    kernels: tuple[str, ...] = ()
    useful_flops: Callable[[Launch], float] | None = None
    group: str = ""


@dataclass(frozen=True)
class Row:
    """What came of one kernel of a job.

    Attributes:
        label, arch, group: the job's.
        report: None where it failed.
        launches: how often the job launched this binary.
        error: one line, and ``trace`` all of it, where the job failed.
    """

    label: str
    arch: str
    report: Report | None = None
    launches: int = 0
    error: str = ""
    trace: str = ""
    group: str = ""


def run_job(job: Job) -> list[Row]:
    """Compile what the job launches; one row per binary, in the order of their first launches.

    A job that raises, or launches nothing that it is asked to report, yields a row with an error
    after those of what it did launch.
    """
    rows: list[Row] = []
    error = trace = ""
    # What Triton says about a failure, all of its PTX, is no part of a table on standard output.
    with stub_device(job.arch) as launches, redirect_stdout(sys.stderr):
        try:
            job.run()
        except Exception as problem:  # whatever the user's code, Triton or ptxas raises
            error = _reason(problem)
            trace = traceback.format_exc()
    chosen = [launch for launch in launches if not job.kernels or launch.kernel in job.kernels]
    if not chosen and not error:
        error = f"launched no {' or '.join(job.kernels) or 'Triton kernel'}"
    binaries: dict[bytes, int] = {}
    for launch in chosen:
        binaries[launch.cubin] = binaries.get(launch.cubin, 0) + 1
    for launch in chosen:
        if times := binaries.pop(launch.cubin, 0):
            useful = job.useful_flops(launch) if job.useful_flops else None
            report = analyse(launch, useful_flops=useful)
            rows.append(Row(job.label, job.arch, report, times, group=job.group))
    if error:
        rows.append(Row(job.label, job.arch, error=error, trace=trace, group=job.group))
    return rows


def _reason(problem: BaseException) -> str:
    """One line: of a compiler's pages the line that names the error, else the last one."""
    name = type(problem).__name__
    while problem.__cause__ is not None:  # Triton wraps an error once for each function it is in
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [""]
    named = [line for line in lines if re.search(r"\b(error|fatal)\s*:", line)]
    return f"{name}: {(named or lines[-1:])[0]}"


def run_jobs(jobs: Sequence[Job], workers: int = 1) -> list[Row]:
    """The rows of all jobs, in their order.

    Args:
        jobs: what to launch.
        workers: processes; 1 stays in this one. Compiled kernels stay in Triton's cache, so that
            the next run takes them from there.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        return [row for job in jobs for row in run_job(job)]
    # Fresh processes: a fork of one that has run torch may hang in its thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [row for rows in pool.map(run_job, jobs) for row in rows]


def rank(rows: Sequence[Row]) -> list[Row]:
    """Best first: what fits and does not spill, by non-tensor instructions per useful FLOP.

    Where nobody said what is useful, per tensor-core FLOP. Ties go to the higher bound, then to
    more warps in an SM. Kernels without tensor cores follow, then failures.
    """

    def key(row: Row) -> tuple:
        if row.report is None:
            return (3,)
        report, main = row.report, row.report.main
        if main is None or main.non_tensor_per_mflop is None:
            return (2, not report.fits, report.spills, -report.occupancy.warps)
        cost = main.non_tensor_per_useful_mflop or main.non_tensor_per_mflop
        poor = not report.fits or report.spills
        return (int(poor), cost, -(main.bound or 0.0), -report.occupancy.warps)

    return sorted(rows, key=key)
