"""Train one vision student from several frozen teachers at many resolutions at once.

    python train.py                                # the demo: minutes on a CPU
    python train.py --help                         # every setting, with its value in the recipe
    python train.py --recipe radio-v2.5-b          # a recipe by name or a TOML file
    python train.py --data.images path/to/photos   # any setting of the recipe, from the shell
    python train.py --resume runs/demo             # go on with an interrupted run
    torchrun --nproc-per-node 8 train.py --recipe radio-v2.5-b    # one process per GPU
    python train.py plan --recipe radio-v2.5-h --gpus 256 --gpu h100    # what it will cost
    python train.py cache --cache.folder features --data.crops-per-photo 4   # teachers run once
    python train.py export runs/demo --onnx student.onnx    # the student for other runtimes

The road from here: `fastagglo.train.recipe` reads the configuration, `fastagglo.train.loop.Trainer`
builds student, teachers and data and runs the steps, `fastagglo.distill.Distiller` computes the
loss of a step, `fastagglo.train.evaluation` writes the held-out figures and the report.
"""

from __future__ import annotations

import os
import sys

# Before torch loads OpenMP: its threads would otherwise spin while they wait for one another, and
# where anything else wants a core (a browser, a second run) spinning makes a step 5 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fastagglo.errors import UserError
from fastagglo.train import (
    Trainer,
    choose_device,
    parse_arguments,
    process_group,
    run_folder,
)
from fastagglo.train.cache_command import main as cache
from fastagglo.train.distributed import is_main
from fastagglo.train.export_command import main as export
from fastagglo.train.plan_command import main as plan


def main(arguments: list[str]) -> int:
    """Run one training; the exit status is 0 unless the user has something to mend."""
    if arguments[:1] == ["plan"]:
        plan(arguments[1:])
        return 0
    if arguments[:1] == ["cache"]:
        cache(arguments[1:])
        return 0
    if arguments[:1] == ["export"]:
        export(arguments[1:])
        return 0
    config = parse_arguments(arguments)
    device = choose_device(config.device)
    with process_group(device):
        resume = run_folder.to_resume(config)
        trainer = Trainer(config, device, resume)
        claim = run_folder.claim if is_main() else run_folder.folder_of
        folder = resume or claim(config)
        # The report comes last: a run that was killed while it was written is not finished.
        report = folder / run_folder.REPORT
        if trainer.step == config.total_steps and report.is_file():
            say(f"run {folder} is finished ({trainer.step} steps): see {report}")
            return 0
        if trainer.run(folder):
            say(f"finished: see {report}; the student is in {folder / run_folder.STUDENT}")
        else:
            say(f"stopped at step {trainer.step}: go on with python train.py --resume {folder}")
    return 0


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if is_main():
        print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
