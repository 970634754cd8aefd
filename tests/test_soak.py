# ruff: noqa: F811 (the fixture tiny_run is imported)
"""Long runs under many faults: ``pytest -m slow tests/test_soak.py``; SOAK_FAULTS=100 (default 10) for more of them."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_faults import ENVIRONMENT, LAUNCHER, TWO, Job
from test_training import REPOSITORY, assert_same, tiny_run  # noqa: F401

from imaginaire_spade.training.checkpoint import checkpoints_in, load_checkpoint, newest_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]


def test_two_processes_under_many_faults_end_where_undisturbed_ones_do(tiny_run, tmp_path):
    faults = int(os.environ.get("SOAK_FAULTS", "10"))
    settings = (f"trainer.max_iterations={8 * faults}", "trainer.checkpoint_every=2", "trainer.keep_last=4")
    path, _ = tiny_run
    straight = Job(path, tmp_path / "straight", settings=settings)
    printed = straight.output()
    assert straight.process.returncode == 0, printed

    rng = random.Random(0)
    logdir, done, job = tmp_path / "log", [], None
    while True:
        if job is None:
            job = Job(path, logdir, "--max_restarts=3", settings=settings)
        if len(done) >= faults:
            printed = job.output()
            assert job.process.returncode == 0, printed
            break
        try:
            job.reaches_next(rng.randint(1, 6))
        except AssertionError:
            if job.process.returncode == 0:
                break
            raise
        fault = rng.choice(["rank", "job", "terminate", "truncate", "delete", "full disk"])
        done.append(fault)
        ranks = job.ranks()
        if fault == "rank" and ranks:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            time.sleep(1)
            continue
        if fault == "full disk" and ranks:  # a checkpoint is larger, a line of the log is not
            resource.prlimit(ranks[0], resource.RLIMIT_FSIZE, (60_000, 60_000))
        elif fault == "terminate":
            job.process.send_signal(signal.SIGTERM)
        else:
            for pid in (*ranks, job.process.pid):
                os.kill(pid, signal.SIGKILL)
        printed, job = job.output(), None
        found = checkpoints_in(logdir / "checkpoints")
        if fault == "truncate" and found:
            found[-1].write_bytes(found[-1].read_bytes()[: rng.randint(0, 2000)])
        if fault == "delete" and found:
            found[-1].unlink()
    assert len(done) == faults, f"the run was over after {done}"
    assert_same(*(load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("straight", "log")))


@pytest.fixture
def two_hosts():
    """Commands that run what follows them on one of two hosts: network namespaces joined by a virtual cable."""
    names = [f"spade{os.getpid()}{letter}" for letter in "ab"]
    setup = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add v0 netns {names[0]} type veth peer name v0 netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{number}/24 dev v0" for number, name in enumerate(names, start=1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("v0", "lo")),
    ]
    try:
        for line in setup:
            made = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {line}: {made.stderr.strip()}")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_of_which_one_is_lost_and_comes_back(tiny_run, tmp_path, two_hosts):
    path, _ = tiny_run
    straight = Job(path, tmp_path / "straight")
    assert not straight.process.wait(300), straight.output()

    def start(number: int) -> subprocess.Popen:
        launcher = [*two_hosts[number], *LAUNCHER[:-2], "--nproc_per_node=1", "--monitor_interval=0.1", "--nnodes=2",
                    "--max_restarts=3", "--rdzv_id=7", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29400",
                    f"--rdzv_conf=is_host={1 - number}", f"--local_addr=10.77.0.{number + 1}"]  # fmt: skip
        arguments = ["--config", str(path), "--logdir", str(tmp_path / "log"), *(f"--set={item}" for item in TWO)]
        return subprocess.Popen(
            [*launcher, "train.py", *arguments],
            cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "v0"},
            text=True, stdout=(tmp_path / f"host{number}.txt").open("a"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    hosts = [start(0), start(1)]
    metrics = tmp_path / "log/metrics.jsonl"

    def reaches(iteration: int) -> None:
        while not (metrics.exists() and f'"iteration": {iteration},' in metrics.read_text()):
            assert hosts[0].poll() is None, (tmp_path / "host0.txt").read_text()
            time.sleep(0.05)

    try:
        reaches(4)
        children = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text().split()
        for pid in (*children, hosts[1].pid):
            os.kill(int(pid), signal.SIGKILL)
        hosts[1].wait()
        time.sleep(25)  # torchrun needs 15 s to give a host up; one that comes back sooner finds its place still taken
        hosts[1] = start(1)
        assert [host.wait(300) for host in hosts] == [0, 0], (tmp_path / "host0.txt").read_text()
    finally:
        for host in hosts:
            host.kill()
    assert "continuing from" in (tmp_path / "host0.txt").read_text()
    assert_same(*(load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("straight", "log")))
