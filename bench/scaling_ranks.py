"""A training step on several ranks: real processes, whose gradients DDP averages.

`Ranks` starts them, each with one thread on a core of its own (gloo, localhost) or with one GPU
(NCCL), and a call lets all of them make one step. Started as ``python -m bench.scaling_ranks`` this
is a rank: it reads a word a line from standard input and answers each with a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from bench.scaling_cases import Step

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds for the others to come


class Ranks:
    """As many processes as the work has ranks; a call is one step of all. A ``Run``.

    Raises:
        RuntimeError: a rank ended; with the last line that it wrote.
    """

    def __init__(self, work: Step, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._processes = [self._start(work, device, rank) for rank in range(work.ranks)]
        self._stop = weakref.finalize(self, _stop, self._processes, self._folder)
        self.input_bytes = max(int(answer) for answer in self._answers())

    def _start(self, work: Step, device: str, rank: int) -> subprocess.Popen[str]:
        settings = asdict(work) | {"rank": rank, "device": device, "folder": self._folder.name}
        with (Path(self._folder.name) / f"{rank}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bench.scaling_ranks", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def _answers(self) -> list[str]:
        answers = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            answers.append(process.stdout.readline())
            if not answers[-1]:
                log = (Path(self._folder.name) / f"{rank}.log").read_text().strip()
                raise RuntimeError(f"rank {rank} ended: {log.rpartition(chr(10))[2]}")
        return answers

    def ask(self, word: str) -> list[str]:
        """The answer of each rank to "step", "memory" or "gradient"."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()
        return self._answers()

    def __call__(self) -> None:
        self.ask("step")

    @property
    def info(self) -> dict[str, int]:
        """Most bytes that a step of any rank holds beyond its inputs."""
        return {"rank_memory_bytes": max(int(answer) for answer in self.ask("memory"))}

    def results(self) -> dict[str, Tensor]:
        """Nothing is compared: there are no peers."""
        return {}

    def close(self) -> None:
        """End the processes; also done when nobody holds this any more."""
        self._stop()


def _stop(processes: Sequence[subprocess.Popen[str]], folder: Any) -> None:
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()  # a rank ends with its input
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    folder.cleanup()


# --- a rank ---------------------------------------------------------------------------------------


def serve(settings: dict[str, Any], asked: TextIO, answers: TextIO) -> None:
    """Join the others, then answer until the input ends.

    Answers the bytes of its inputs first; "step" by "done" when the step is done on the device,
    "memory" by the peak bytes of a step, "gradient" by the sum of all gradients' squares.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from bench.measure import finish, peak_memory
    from bench.scaling_runs import Distilled, dtype_of, inputs_of
    from fastagglo.train.config import DistributedSettings
    from fastagglo.train.parallel import Parallel

    rank, device, folder = (settings.pop(name) for name in ("rank", "device", "folder"))
    work = Step(**settings)
    place = device
    if device == "cpu":
        # Left alone, a rank that waits for another is woken on that one's core, and stays there.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    else:
        torch.cuda.set_device(rank)
        place = f"cuda:{rank}"
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=work.ranks,
        timeout=timedelta(seconds=PATIENCE),
    )
    torch.manual_seed(0)
    module = Distilled(work).to(place, dtype_of(device))
    images, targets = inputs_of(work, rank, device)
    model: torch.nn.Module = module
    if work.ranks > 1:
        model = Parallel(DistributedSettings(), torch.device(place)).wrap(module)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        model(images, targets).backward()

    held = [*module.parameters(), *images, *targets]
    print(sum(value.nbytes for value in held), file=answers, flush=True)
    for line in asked:
        answer = "done"
        if line.strip() == "memory":
            answer = str(peak_memory(step, device)[0])
        else:
            step()
            finish(device)
        if line.strip() == "gradient":
            found = [
                p.grad.square().sum().item() for p in module.parameters() if p.grad is not None
            ]
            answer = repr(sum(found))
        print(answer, file=answers, flush=True)
    dist.destroy_process_group()


def main() -> None:
    """A rank of its own standard output: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here
    serve(json.loads(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
