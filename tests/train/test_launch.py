"""The launch files: the SLURM script really runs (with one node), the manifest is what it says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

from fastagglo.train import parse_arguments

ROOT = Path(__file__).parents[2]


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm(photos: Path, tmp_path: Path) -> None:
    """`srun` and `scontrol` stand in for a cluster of one node; torchrun and the run are real."""
    stage = {"steps": 2, "lr": 1e-3, "groups": [{"images": 2, "sizes": [32]}]}
    recipe = {
        "device": "cpu",
        "threads": 1,
        "student": {"preset": "tiny", "depth": 1, "max_resolution": 64},
        "teachers": {"hog": {"model": "hog", "summary_weight": 0.0, "normaliser": "none"}},
        "data": {"images": [str(photos)], "holdout_photos": 0.2},
        "stages": [stage],
        "eval": {"points": 0},
        "log": {"progress": False, "tensorboard": False},
    }
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(recipe))
    tools = tmp_path / "bin"
    tools.mkdir()
    script(tools, "srun", 'exec "$@"')
    script(tools, "scontrol", "echo 127.0.0.1")
    script(tools, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    shutil.copy(ROOT / "train.py", tmp_path)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "GPUS_PER_NODE": "1",
        "PORT": "0",
        "OMP_NUM_THREADS": "1",
        "OUT": "out",
    }
    said = []
    for _ in range(2):  # the second goes on from the first one's checkpoint: it is finished
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sh"), "--recipe", "tiny.toml"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "finished: see" in said[0]
    assert "is finished (2 steps)" in said[1]
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "launch" / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    policy = job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert container["command"] == ["bash", "-c"]
    (text,) = container["args"]
    subprocess.run(["bash", "-n", "-c", text], check=True)
    lines = text.replace("\\\n", "").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.strip().startswith("exec ")]
    assert [words[:2] for words in commands] == [["torchrun", "train.py"]] * 2
    config = parse_arguments(commands[1][2:])
    assert config.data.images == ("/data/{00000..01287}.tar",)
    ranks = worker["replicas"] * int(job["spec"]["nprocPerNode"])
    for stage in config.stages:
        assert all(group.images % ranks == 0 for group in stage.groups)
