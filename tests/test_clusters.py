"""The examples for clusters: SLURM's with stand-ins for its commands, Kubernetes' read as its operator would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser

import train

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def slurm(tmp_path):
    """Starts the batch script; its commands are stand-ins that write down how they were called."""
    calls = tmp_path / "calls"
    stand_ins = {
        "srun": 'exec "$@"',  # in one process, which gets srun's signals
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "scontrol $*" >> {calls}',
        # Saves and leaves on SIGTERM, as torchrun does; fails or is done otherwise.
        "torchrun": f'echo "torchrun $*" >> {calls}; trap "echo saved >> {calls}; exit 1" TERM; $STEP & wait $!',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def start(step: str) -> tuple[subprocess.Popen, Path]:
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "n",
               "STEP": step}  # fmt: skip
        script = REPOSITORY / "scripts/slurm/train.sbatch"
        environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", str(script), "--config", "mine.yaml"], env=environment), calls

    return start


def test_slurm_saves_before_the_time_limit_and_queues_again(slurm):
    job, calls = slurm("sleep 60")
    while not (calls.exists() and "torchrun" in calls.read_text()):
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 1
    started, *rest = calls.read_text().splitlines()
    assert rest == ["saved", "scontrol requeue 42"]
    assert started.endswith("--rdzv_id=42 --rdzv_backend=c10d --rdzv_endpoint=node7:29500 train.py --config mine.yaml")


@pytest.mark.parametrize(("step", "code"), [("true", 0), ("false", 1)])
def test_slurm_queues_nothing_that_is_over(slurm, step, code):
    job, calls = slurm(step)
    assert job.wait(30) == code
    assert "requeue" not in calls.read_text()


def test_kubernetes_starts_what_exists(monkeypatch):
    job = yaml.safe_load((REPOSITORY / "scripts/kubernetes/train.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["kind"], container["name"]) == ("PyTorchJob", "pytorch")  # the name that the operator looks for
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    name, *words = container["command"]
    assert name == "torchrun"
    launch, script, arguments = config_from_args(get_args_parser().parse_args(words))
    assert launch.max_nodes == worker["replicas"]
    assert launch.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert launch.rdzv_endpoint == f"{job['metadata']['name']}-worker-0:{container['ports'][0]['containerPort']}"
    assert script == sys.executable and arguments[:2] == ["-u", "train.py"]
    monkeypatch.setattr(sys, "argv", arguments[1:])
    assert str(train.parse_arguments().logdir).startswith("/shared/")
