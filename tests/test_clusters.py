# ruff: noqa: F811 (the fixture tiny_run is imported)
"""The examples for clusters: SLURM's with stand-ins for its commands and (slow) with a real SLURM; Kubernetes' read as
its operator would, and by Kubernetes' schema."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import (
    IoK8sApiCoreV1PodTemplateSpec as PodTemplate,
)
from slurm_cluster import NODES, Cluster, NoCluster
from test_faults import TWO, Job
from test_training import assert_same, tiny_run  # noqa: F401
from torch.distributed.run import config_from_args, get_args_parser

from imaginaire_spade.commands import train
from imaginaire_spade.training.checkpoint import load_checkpoint, newest_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def slurm(tmp_path):
    """Starts the batch script; its commands are stand-ins that write down how they were called."""
    calls = tmp_path / "calls"
    stand_ins = {
        "srun": 'shift; exec "$@"',
        "scancel": f'echo "scancel $*" >> {calls}; kill -TERM $(cat {tmp_path}/pid)',
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "scontrol $*" >> {calls}',
        # Saves and leaves on SIGTERM, as torchrun does; fails or is done otherwise.
        "torchrun": f'echo $$ > {tmp_path}/pid; trap "echo saved >> {calls}; exit 1" TERM;'
        f' echo "torchrun $*" >> {calls}; $STEP & wait $!',
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
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 1
    started, *rest = calls.read_text().splitlines()
    assert rest == ["scancel --signal=TERM 42", "saved", "scontrol requeue 42"]
    assert started.endswith("--rdzv_id=42 --rdzv_backend=c10d --rdzv_endpoint=node7:20042 train.py --config mine.yaml")


@pytest.mark.parametrize(("step", "code"), [("true", 0), ("false", 1)])
def test_slurm_queues_nothing_that_is_over(slurm, step, code):
    job, calls = slurm(step)
    assert job.wait(30) == code
    assert "requeue" not in calls.read_text()


def lost(given, kept, where: str = "") -> list[str]:
    """What Kubernetes' schema does not know: fields that are not kept, or not as they are."""
    if isinstance(given, dict):
        known = {key: value for key, value in given.items() if key in kept}
        unknown = [f"{where}.{key}" for key in given.keys() - known.keys()]
        return unknown + [item for key, value in known.items() for item in lost(value, kept[key], f"{where}.{key}")]
    if isinstance(given, list):
        pairs = enumerate(zip(given, kept, strict=True))
        return [item for number, (a, b) in pairs for item in lost(a, b, f"{where}[{number}]")]
    return [] if given == kept else [where]


def test_kubernetes_starts_what_exists(monkeypatch):
    job = yaml.safe_load((REPOSITORY / "scripts/kubernetes/train.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert not lost(worker["template"], PodTemplate.from_dict(worker["template"]).to_dict())
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
    # The schema finds mistakes.
    container["volumeMount"] = container.pop("volumeMounts")
    assert lost(worker["template"], PodTemplate.from_dict(worker["template"]).to_dict()) == [
        ".spec.containers[0].volumeMount"
    ]
    container["ports"] = "29500"
    with pytest.raises(ValueError, match="ContainerPort"):
        PodTemplate.from_dict(worker["template"])


@pytest.fixture
def cluster(tmp_path):
    try:
        with Cluster(tmp_path / "cluster") as started:
            yield started
    except NoCluster as reason:
        pytest.skip(str(reason))


SLOW = (
    *TWO, "trainer.max_iterations=200", "trainer.checkpoint_every=20", "dis.num_discriminators=1", "dis.num_layers=1",
)  # fmt: skip
IN_NO_HURRY = """
import time
from pathlib import Path
from imaginaire_spade.training import setup

def wait_and_step(*arguments, step=setup.train_step):
    time.sleep(Path({hold!r}).exists() / 2)
    return step(*arguments)

setup.train_step = wait_and_step
"""


class BatchJob:
    """scripts/slurm/train.sbatch on both nodes, with one process each. It is in no hurry while ``hold`` exists."""

    def __init__(self, cluster: Cluster, config: Path, folder: Path, minutes: str = "UNLIMITED") -> None:
        self.cluster, self.logdir, self.log, self.hold = cluster, folder / "log", folder / "job.log", folder / "hold"
        self.hold.touch()
        (folder / "in_no_hurry.py").write_text(IN_NO_HURRY.format(hold=str(self.hold)))
        settings = [f"--set={item}" for item in SLOW]
        self.id = cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", f"--cpus-per-task={os.cpu_count()}",
            f"--time={minutes}", f"--output={self.log}", "scripts/slurm/train.sbatch",
            "--config", config, "--logdir", self.logdir, "--device=cpu", "--import=in_no_hurry", *settings,
            cwd=REPOSITORY, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1",
            PYTHONPATH=f"{REPOSITORY}:{folder}",
        ).strip()  # fmt: skip

    def prints(self, text: str, times: int = 1) -> None:
        self.cluster.wait_for(lambda: self.log.exists() and self.log.read_text().count(text) >= times, text)

    def reaches(self, iteration: int) -> None:
        self.prints(f"iteration {iteration}/")

    def ends(self) -> str:
        """Its last state, once nothing of it is left on a node."""

        def left() -> list[str]:
            return [line for node in NODES for line in self.cluster.processes(node).values() if "slurmd -D" not in line]

        self.cluster.wait_for(lambda: self.field("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), "over")
        self.cluster.wait_for(lambda: not left(), "left")
        return self.field("JobState")

    def field(self, name: str) -> str:
        shown = self.cluster.run("scontrol", "show", "job", self.id)
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)[name]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_slurm_job_saves_before_its_time_limit_and_ends_as_if_it_had_none(cluster, commands, tiny_run, tmp_path):
    path, _ = tiny_run
    job = BatchJob(cluster, path, tmp_path, minutes="5")
    job.reaches(2)
    (launcher,) = (pid for pid, line in cluster.processes(NODES[0]).items() if "bin/torchrun" in line)
    assert len(os.sched_getaffinity(launcher)) == os.cpu_count()
    job.prints("leaving on SIGTERM")
    cluster.wait_for(lambda: job.field("Restarts") == "1", "requeued")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")  # now it is another one's turn
    ends_as_if_undisturbed(job, commands, path, tmp_path)


def ends_as_if_undisturbed(job: BatchJob, commands, path: Path, folder: Path) -> None:
    job.hold.unlink()
    assert job.ends() == "COMPLETED", job.log.read_text()
    assert job.field("Restarts") == "1" and "continuing from" in job.log.read_text()
    straight = Job(commands, path, folder / "straight", settings=SLOW).process
    assert straight.wait(3600) == 0, straight.output()
    assert_same(*(load_checkpoint(newest_checkpoint(logdir)) for logdir in (folder / "straight", job.logdir)))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("node", NODES)
def test_a_slurm_job_whose_node_daemon_is_killed_starts_again_and_ends_the_same(
    cluster, commands, tiny_run, tmp_path, node
):
    path, _ = tiny_run
    job = BatchJob(cluster, path, tmp_path)
    job.reaches(21)
    cluster.kill(node, "slurmd -D")
    cluster.wait_for(lambda: job.field("JobState") == "PENDING", "requeued")
    cluster.start_daemon(node)
    ends_as_if_undisturbed(job, commands, path, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("how", ["scancel", "scancel --signal=KILL", "srun", "srun, all", "slurmstepd"])
def test_nothing_is_left_of_a_slurm_job_that_is_ended_in_any_way(cluster, tiny_run, tmp_path, how):
    path, _ = tiny_run
    job = BatchJob(cluster, path, tmp_path)
    job.reaches(2)
    if how.startswith("scancel"):
        cluster.run(*how.split(), job.id)
    elif how == "slurmstepd":
        cluster.kill(NODES[1], f"slurmstepd: [{job.id}.0]")
    else:
        cluster.kill(NODES[0], "srun", first=how == "srun")
    if how != "srun":  # srun's helper process then has SLURM kill the step by SIGKILL
        cluster.wait_for(lambda: "leaving on SIGTERM" in (job.logdir / "train.log").read_text(), "saved")
    if how == "slurmstepd":  # the other node waits ten minutes for this one
        cluster.run("scancel", job.id)
    assert job.ends() != "COMPLETED" and (how == "srun" or newest_checkpoint(job.logdir))
