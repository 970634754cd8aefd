# ruff: noqa: F811 (the fixture tiny_run is imported)
"""Training under faults, in few and in many: ``SOAK_FAULTS=30 SOAK_SEED=1 pytest -m slow tests/test_soak.py``.

Without them, ten faults of seed 0.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fork_server import TORCHRUN
from test_faults import ENVIRONMENT, TWO, Job, fill
from test_training import REPOSITORY, assert_same, tiny_run  # noqa: F401

from imaginaire_spade.training.checkpoint import checkpoints_in, load_checkpoint, newest_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

FAULTS = (
    "rank", "loader worker", "pause", "job", "terminate", "interrupt", "hang up", "truncate", "delete", "full disk",
    "replace photos",
)  # fmt: skip
SIGNALS = {"terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "hang up": signal.SIGHUP}


def children(pid: int) -> list[int]:
    """List the processes that a process started, also those of its threads."""
    return [int(c) for thread in Path(f"/proc/{pid}/task").glob("*/children") for c in thread.read_text().split()]


def kill(job: Job) -> None:
    """Kill a launcher and its ranks, and wait until they are gone."""
    for pid in (job.process.pid, *job.ranks()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.process.wait()


def train_on_other_photos(start: Callable[[], Job], photos: list[Path], folder: Path) -> None:
    """Replace photos under their names; a run must notice. Kill it, and remove what it trained on them."""
    known, sound = checkpoints_in(folder), {path: path.with_suffix(".sound") for path in photos[1:]}
    for path, kept in sound.items():
        path.rename(kept)
        path.write_bytes(photos[0].read_bytes())
    job = start()
    job.prints(f"{len(sound)} of 10 samples (or LMDB files) have changed under their names")
    kill(job)
    for path, kept in sound.items():
        kept.rename(path)
    for path in set(checkpoints_in(folder)) - set(known):
        path.unlink()


@pytest.mark.parametrize(
    "faults",
    [
        ["rank", "full disk", "truncate"],
        pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(0)], id="many"),
    ],
)
def test_two_processes_under_faults_end_where_undisturbed_ones_do(commands, tiny_run, tmp_path, small_disk, faults):
    path, _ = tiny_run
    rng = random.Random(int(os.environ.get("SOAK_SEED", "0")))
    faults = faults or [rng.choice(FAULTS) for _ in range(int(os.environ.get("SOAK_FAULTS", "10")))]
    settings = (
        f"trainer.max_iterations={4 * len(faults)}", "trainer.checkpoint_every=2", "trainer.keep_last=4",
        "dis.num_discriminators=1", "dis.num_layers=1",
    )  # fmt: skip
    straight = Job(commands, path, tmp_path / "straight", settings=settings).process
    assert straight.wait(3600) == 0, straight.output()

    logdir, job, recoveries = small_disk / "log", None, []

    def start(mode: str = "stop") -> Job:
        goes_on = f"trainer.on_failed_save={mode}"
        return Job(commands, path, logdir, "--max_restarts=1000", settings=(*settings, goes_on))

    for number, fault in enumerate(faults):
        if job is None:
            job = start(mode := rng.choice(["stop", "continue"]))
        job.reaches_next(rng.randint(1, 3))
        print(f"fault {number + 1}: {fault}", flush=True)
        if fault in ("rank", "loader worker"):
            killed_at, rank = time.monotonic(), rng.choice(job.ranks())
            os.kill(rank if fault == "rank" else rng.choice(children(rank)), signal.SIGKILL)
            job.recovers()
            recoveries.append(time.monotonic() - killed_at)
            continue
        if fault == "pause":
            os.kill(rank := rng.choice(job.ranks()), signal.SIGSTOP)
            time.sleep(3)
            os.kill(rank, signal.SIGCONT)
            continue
        if fault == "full disk":
            filler = fill(small_disk, leave=rng.randint(0, 50_000))  # a checkpoint is larger, a line of the log is not
            job.prints("could not be written" if mode == "stop" else "going on (trainer.on_failed_save)")
            filler.unlink()
            if mode == "continue":
                continue
        elif fault in SIGNALS:
            job.process.send_signal(SIGNALS[fault])
        else:
            kill(job)
        job.process.wait()
        job, found = None, checkpoints_in(logdir / "checkpoints")
        if fault == "replace photos" and found:
            photos = sorted((tmp_path / "raw/images").iterdir())
            train_on_other_photos(start, rng.sample(photos, 4), logdir / "checkpoints")
        if fault == "truncate" and found:
            found[-1].write_bytes(found[-1].read_bytes()[: rng.randint(0, 2000)])
        if fault == "delete" and found:
            found[-1].unlink()
    last = (job or Job(commands, path, logdir, settings=settings)).process
    assert last.wait(3600) == 0, last.output()
    if recoveries:
        print(f"{len(recoveries)} killed ranks; trained on after {min(recoveries):.1f} to {max(recoveries):.1f} s")
    assert_same(*(load_checkpoint(newest_checkpoint(folder)) for folder in (tmp_path / "straight", logdir)))


@pytest.fixture(params=[2, 3])
def hosts(request):
    """Commands that run what follows them on one of several hosts: network namespaces joined by a switch."""
    switch, *names = (f"spade{os.getpid()}{letter}" for letter in "sabc"[: request.param + 1])
    setup = [
        *(f"ip netns add {name}" for name in (switch, *names)),
        f"ip -n {switch} link add br0 type bridge",
        f"ip -n {switch} link set br0 up",
    ]
    for number, name in enumerate(names, start=1):
        setup += [
            f"ip link add v0 netns {name} type veth peer name port{number} netns {switch}",
            f"ip -n {switch} link set port{number} master br0 up",
            f"ip -n {name} addr add 10.77.0.{number}/24 dev v0",
            *(f"ip -n {name} link set {device} up" for device in ("v0", "lo")),
        ]
    try:
        for line in setup:
            made = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {line}: {made.stderr.strip()}")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_hosts_of_which_one_is_lost_and_comes_back(commands, tiny_run, tmp_path, hosts):
    path, _ = tiny_run
    straight = Job(commands, path, tmp_path / "straight", f"--nproc_per_node={len(hosts)}").process
    assert straight.wait() == 0, straight.output()

    def start(number: int) -> subprocess.Popen:
        launcher = [*hosts[number], sys.executable, *TORCHRUN, "--nproc_per_node=1", f"--nnodes={len(hosts)}",
                    "--max_restarts=3", "--rdzv_id=7", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29400",
                    f"--rdzv_conf=is_host={int(number == 0)}", f"--local_addr=10.77.0.{number + 1}"]  # fmt: skip
        arguments = ["--config", str(path), "--logdir", str(tmp_path / "log"), *(f"--set={item}" for item in TWO)]
        return subprocess.Popen(
            [*launcher, "train.py", *arguments],
            # The threads that torchrun gives several processes of one host; other threads, other rounding.
            cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "v0", "OMP_NUM_THREADS": "1"},
            text=True, stdout=(tmp_path / f"host{number}.txt").open("a"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    launched = [start(number) for number in range(len(hosts))]
    metrics = tmp_path / "log/metrics.jsonl"

    def reaches(iteration: int) -> None:
        while not (metrics.exists() and f'"iteration": {iteration},' in metrics.read_text()):
            assert launched[0].poll() is None, (tmp_path / "host0.txt").read_text()
            time.sleep(0.05)

    try:
        reaches(4)
        for pid in (*children(launched[-1].pid), launched[-1].pid):
            os.kill(pid, signal.SIGKILL)
        launched[-1].wait()
        time.sleep(25)  # torchrun needs 15 s to give a host up; one that comes back sooner finds its place still taken
        launched[-1] = start(len(hosts) - 1)
        assert [host.wait(300) for host in launched] == [0] * len(hosts), (tmp_path / "host0.txt").read_text()
    finally:
        for host in launched:
            host.kill()
    assert "continuing from" in (tmp_path / "host0.txt").read_text()
    assert_same(*(load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("straight", "log")))
