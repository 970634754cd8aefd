# ruff: noqa: F811 (the fixture tiny_run is imported)
"""What a run does when something is taken away from it: signals, processes, disks, memory, finite numbers."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from fork_server import TORCHRUN, ForkServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import REPOSITORY, assert_same, tiny_run  # noqa: F401

from imaginaire_spade import processes
from imaginaire_spade.config_files import load_config
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.errors import EXIT_CODE, CheckpointError, UserError
from imaginaire_spade.processes import one_writer
from imaginaire_spade.training import checkpoint, setup, trackers
from imaginaire_spade.training.health import LossMeter, NonFiniteLoss, OutOfMemory, explain_out_of_memory
from imaginaire_spade.training.run_log import RunLog
from imaginaire_spade.training.setup import Calendar

SMALL = (
    "gen.num_filters=1", "trainer.image_rows=0", "trainer.model_average.batch_norm_images=4",
    "gen.norm.hidden_channels=2", "dis.num_filters=2",
)  # fmt: skip


@pytest.fixture
def before_step(monkeypatch):
    """Makes ``action(state)`` happen before every iteration."""

    def patch(action):
        step = setup.train_step

        def stepped(state, *arguments):
            action(state)
            return step(state, *arguments)

        monkeypatch.setattr(setup, "train_step", stepped)

    return patch


def test_signals_save_and_leave_and_nothing_is_lost(tiny_run, before_step, capsys):
    _, run = tiny_run
    before = signal.getsignal(signal.SIGTERM)
    straight = run("straight", *SMALL, "trainer.max_iterations=5")
    exits = [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
    due = {4 * iteration: number for iteration, (number, _) in enumerate(exits)}
    before_step(lambda state: os.kill(os.getpid(), due.pop(state.images_seen, 0)))
    for iteration, (number, code) in enumerate(exits, start=1):
        with pytest.raises(SystemExit) as leaving:
            run("broken", *SMALL, "trainer.max_iterations=5")
        assert leaving.value.code == code
        printed = capsys.readouterr().out
        assert f"leaving on {number.name}; the same command continues from iteration {iteration}" in printed
    assert signal.getsignal(signal.SIGTERM) == before
    assert_same(run("broken", *SMALL, "trainer.max_iterations=5"), straight)


def test_nohup_goes_on_when_the_terminal_is_closed(tiny_run, before_step):
    _, run = tiny_run
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        before_step(lambda _: os.kill(os.getpid(), signal.SIGHUP))
        assert run("log", *SMALL, "trainer.max_iterations=2")["images_seen"] == 8
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_goes_on_when_nobody_reads_what_it_prints(tiny_run, tmp_path, monkeypatch):
    _, run = tiny_run
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert run("log", *SMALL, "trainer.max_iterations=2")["images_seen"] == 8
    assert "iteration 2/2" in (tmp_path / "log/train.log").read_text()


def test_ranks_end_when_their_launcher_is_killed(commands, tiny_run, tmp_path):
    path, _ = tiny_run
    job = Job(commands, path, tmp_path / "log", settings=("trainer.max_iterations=100000",))
    job.reaches(2)
    ranks = job.ranks()
    assert len(ranks) == 2
    job.process.send_signal(signal.SIGKILL)
    give_up_at = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    assert [*(tmp_path / "log/checkpoints").glob("*.pt")]
    assert not (tmp_path / "log/.lock").exists()


def test_a_log_dir_has_one_writer(commands, tiny_run, tmp_path, monkeypatch, capsys):
    path, _ = tiny_run
    logdir = tmp_path / "log"
    marker = logdir / ".lock"
    with one_writer(logdir, "--logdir"):
        result = commands.run("train.py", "--config", path, "--logdir", logdir)
        mine = marker.read_text()
    assert result.returncode == EXIT_CODE, result.stderr
    assert f"--logdir {logdir}: process {os.getpid()} on " in result.stderr and "writes there" in result.stderr
    assert not logdir.exists()  # nothing was written
    # A writer that is gone.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    logdir.mkdir()
    marker.write_text(mine.replace(f"pid={os.getpid()}", f"pid={gone.pid}"))
    with one_writer(logdir, "--logdir"):
        assert f"process {gone.pid} on " in (printed := capsys.readouterr().out) and "taking over" in printed
    # A writer on another host: a silent one is gone, a living one is not.
    monkeypatch.setattr(processes, "LEASE_S", 0.5)
    elsewhere = re.sub("host=.*", "host=node7", re.sub("duration=.*", "duration=0.5", mine))
    logdir.mkdir(exist_ok=True)
    marker.write_text(elsewhere)
    with one_writer(logdir, "--logdir"):
        assert (
            "on node7 was writing there: waiting" in (printed := capsys.readouterr().out) and "taking over" in printed
        )
    logdir.mkdir(exist_ok=True)
    marker.write_text(elsewhere)
    ends = threading.Event()

    def live() -> None:
        while not ends.wait(0.05):
            os.utime(marker)

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(UserError, match="on node7 writes there"), one_writer(logdir, "--logdir"):
            pass
    finally:
        ends.set()
        living.join()
    marker.unlink()
    # A writer that was killed before it wrote its name.
    monkeypatch.setattr(processes, "NAMELESS_S", 0.1)
    logdir.mkdir(exist_ok=True)
    marker.touch()
    with one_writer(logdir, "--logdir"):
        assert f"pid={os.getpid()}" in marker.read_text()
    # A lock that was taken away.
    code = "import time; from pathlib import Path; from imaginaire_spade import processes; processes.LEASE_S = 0.3\n"
    code += f"with processes.one_writer(Path({str(logdir)!r}), '--logdir'):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    marker.unlink()
    assert holder.wait(20) == EXIT_CODE and "its lock was lost" in holder.stderr.read()


def test_another_number_of_processes_goes_on_in_the_same_order_and_says_what_changes(tiny_run, before_step, capsys):
    _, run = tiny_run
    run("log", *SMALL, stop_after=1)
    positions = []
    before_step(lambda state: positions.append(state.images_seen))
    run("log", *SMALL, "data.train.batch_size=2", "trainer.max_iterations=3", "gen_opt.lr=0.002")
    assert positions == [4]
    printed = capsys.readouterr().out
    assert (
        "then 1 process(es) and 4 images per iteration, now 1 and 2: samples continue in the same order from" in printed
    )
    assert "iterations count 2 images from now on: this is iteration 2 of 3, the whole run 6 images" in printed
    assert "changed since: gen_opt.lr: 0.001 -> 0.002" in printed


def test_changed_data_is_refused_in_words_unless_allowed(tiny_run, tiny_folder, tmp_path):
    _, run = tiny_run
    run("log", *SMALL, stop_after=1)
    other = f"data.train.roots=[{tiny_folder('other', size=(40, 80), keys=9)}]"
    for changed, words in (
        ((other,), r"data.train.roots: not the samples it was trained on \(10 samples then, 9 now\)"),
        (("data.labels.ignore=[255]",), r"data.labels.ignore: \[\] -> \[255\]"),
        (("data.edges=file",), "data.edges: labels -> file"),
    ):
        with pytest.raises(CheckpointError, match=f"trained on other data: {words}.*--allow_changed_data"):
            run("log", *SMALL, *changed)
    content = run("log", *SMALL, other, stop_after=2, allow_changed_data=True)
    assert content["images_seen"] == 8 and content["run"]["data_samples"] == 9


def test_checkpoints_are_verified_kept_and_swept(tiny_run, tmp_path):
    _, run = tiny_run
    every = ("trainer.checkpoint_every=1", "trainer.keep_last=1", "trainer.max_iterations=3")
    run("log", *SMALL, *every, "trainer.keep_every=2", stop_after=2)
    folder = tmp_path / "log/checkpoints"
    (folder / ".checkpoint_000000000008.pt.999.tmp").write_bytes(b"of a killed process")
    run("log", *SMALL, *every, "trainer.keep_every=2")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == [name + beside for name in ("checkpoint_000000000012.pt", "kept/checkpoint_000000000008.pt")
                     for beside in ("", ".sha256")]  # fmt: skip
    assert sound(folder) and sound(folder / "kept")
    newest = checkpoint.newest_checkpoint(tmp_path / "log")
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # torch.load would not notice
    newest.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="is damaged: its sha256 is not the one in checkpoint_000000000012"):
        checkpoint.load_checkpoint(newest)


def sound(folder: Path) -> bool:
    """Whether every checkpoint of a folder is the one that its sha256 says."""
    names = [path.name for path in folder.glob("*.sha256")]
    return not subprocess.run(["sha256sum", "--check", "--quiet", *names], cwd=folder, check=False).returncode


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_stays_under_a_name_of_its_own(tmp_path, monkeypatch, links):
    if not links:  # as on some network file systems

        def refused(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(checkpoint.os, "link", refused)
    (tmp_path / ".best.pt.999.tmp").write_bytes(b"of a killed process")
    best = tmp_path / "best.pt"
    with checkpoint.CheckpointWriter(tmp_path, keep_last=1) as writer:
        for images_seen, is_best in ((4, True), (8, False), (12, True), (16, False)):
            path = writer.save(images_seen, {"images_seen": images_seen}, best=is_best)
            writer.wait()
            assert checkpoint.load_checkpoint(best)["images_seen"] == (4 if images_seen < 12 else 12)
            assert sound(tmp_path)
    names = [name + beside for name in ("best.pt", "checkpoint_000000000016.pt") for beside in ("", ".sha256")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert checkpoint.newest_checkpoint(tmp_path) == path  # to continue from; the best one is older
    for _ in range(2):  # the second time it is that already
        checkpoint.keep_as(path, best)
        assert sound(tmp_path) and checkpoint.load_checkpoint(best)["images_seen"] == 16
    with pytest.raises(CheckpointError, match=r"best\.pt: could not be written .*lost\.pt is complete"):
        checkpoint.keep_as(tmp_path / "lost.pt", best)
    assert sound(tmp_path) and len(list(tmp_path.iterdir())) == 4

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)  # where network file systems and quotas tell of it
    with pytest.raises(CheckpointError, match=r"best\.pt: could not be written .*No space left"):
        checkpoint.keep_as(path, best)
    assert sound(tmp_path) and len(list(tmp_path.iterdir())) == 4


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that leaves so many bytes of a disk."""
    status = os.statvfs(disk)
    filler = disk / "filler"
    with suppress(OSError):  # a thread of the log took some of it meanwhile
        filler.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - leave)))
    return filler


def test_a_full_disk_ends_the_run_and_the_older_checkpoints_stay(tiny_run, small_disk, before_step):
    _, run = tiny_run
    settings = (*SMALL, "trainer.checkpoint_every=1", "trainer.max_iterations=3")
    run(small_disk / "log", *settings, stop_after=1)
    before_step(lambda state: state.images_seen == 4 and fill(small_disk, leave=20_000))
    with pytest.raises(CheckpointError, match=r"could not be written \(.*No space left on device.*earlier checkpoints"):
        run(small_disk / "log", *settings)
    folder = small_disk / "log/checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == [
        "checkpoint_000000000004.pt", "checkpoint_000000000004.pt.sha256",
    ]  # fmt: skip
    assert sound(folder)


def test_training_goes_on_after_a_failed_save_where_the_config_says_so(tiny_run, small_disk, before_step, capsys):
    _, run = tiny_run

    def full_for_a_while(state):
        if state.images_seen == 4:
            fill(small_disk)
        if state.images_seen == 12:  # the writing of the checkpoint of 8 images began before the last step
            while list(small_disk.glob("log/checkpoints/.*")):
                time.sleep(0.01)
            (small_disk / "filler").unlink()

    before_step(full_for_a_while)
    settings = (*SMALL, "trainer.checkpoint_every=2", "trainer.log_every=1", "trainer.max_iterations=4")
    assert run(small_disk / "log", *settings, "trainer.on_failed_save=continue")["images_seen"] == 16
    printed = capsys.readouterr().out
    assert "checkpoint_000000000008.pt: could not be written" in printed and "going on" in printed
    names = [path.name for path in (small_disk / "log/checkpoints").glob("*.pt")]
    assert names == ["checkpoint_000000000016.pt"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_log_on_a_full_disk_has_a_gap_and_goes_on(small_disk, capfd, monkeypatch):
    log = RunLog(small_disk, Calendar(1, 10, 99, 99), images_seen=0, enabled=True)
    monkeypatch.setattr(trackers, "texts", lambda run: {"config": "x"})
    monkeypatch.setattr(trackers, "hyperparameters", lambda run: {"x": 1})
    run = SimpleNamespace(state=SimpleNamespace(images_seen=0))
    log.trackers = [trackers.Following("tensorboard", trackers.TensorBoard(run, small_disk, None), log.say)]
    for iteration in range(1, 60):
        if iteration == 10:
            filler = fill(small_disk)
        if iteration == 50:
            filler.unlink()
        log.tick(iteration, {"gan": iteration / 8}, {"lr/gen": 1e-4}, wait_s=0.0)
    log.close("finished")
    assert f"the log in {small_disk} has a gap here: [Errno 28] No space left on device" in capfd.readouterr().out
    records = [json.loads(line) for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    iterations = {record["iteration"] for record in records}
    assert {*range(1, 10), *range(50, 60)} <= iterations < set(range(1, 60))
    last = max(small_disk.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    assert {event.step for event in EventAccumulator(str(last)).Reload().Scalars("loss/gan")} >= set(range(50, 60))


def test_a_log_goes_on_where_the_checkpoint_is(tmp_path):
    """Records beyond it are of a launch that died: they come again."""
    lines = [json.dumps({"iteration": i, "images_seen": i, "loss/a": float(i)}) for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 4, "ima']))
    log = RunLog(tmp_path, Calendar(1, 10, 99, 99), images_seen=2, enabled=True)
    log.tick(3, {"a": 7.0}, {}, 0.0)
    log.close("finished")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["images_seen"], record["loss/a"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 7.0)]


def test_a_checkpoint_is_a_copy_of_its_moment(tmp_path):
    weights, written = torch.zeros(3), threading.Event()

    class Slow(checkpoint.CheckpointWriter):
        def _finish(self, *arguments):
            written.wait(10)
            super()._finish(*arguments)

    with Slow(tmp_path, keep_last=3) as writer:
        path = writer.save(4, {"weights": weights, "deep": [{"weights": weights}]})
        weights += 1  # training goes on while the write waits
        assert not path.exists()
        written.set()
        writer.wait()
    content = checkpoint.load_checkpoint(path)
    assert content["weights"].sum() == content["deep"][0]["weights"].sum() == 0


def test_numbers_that_are_not_finite_end_the_run_with_a_dump(tiny_run, tmp_path, before_step):
    _, run = tiny_run

    def diverge(state):
        if state.images_seen:
            torch.nn.init.constant_(state.generator.to_image.weight, float("inf"))

    before_step(diverge)
    with pytest.raises(NonFiniteLoss, match=r"between iterations 1 and 2, first in 2; .*non_finite_rank0\.json"):
        run("log", *SMALL)
    dump = json.loads((tmp_path / "log/non_finite_rank0.json").read_text())
    assert dump["first_iteration"]["iteration"] == 2
    assert dump["first_iteration"]["batch_keys"] == dump["last_batch_keys"] and len(dump["last_batch_keys"]) == 4
    assert "nan" in dump["first_iteration"]["losses"].values()
    assert dump["first_non_finite"]["weight"].startswith("generator.")
    assert dump["first_non_finite"]["output on the last batch"].startswith("generator.")


def test_updates_that_fp16_skips_are_counted_and_too_many_in_a_row_end_the_run(tiny_run, tmp_path, before_step):
    _, run = tiny_run

    def overflow(state):
        hook = state.generator.to_image.weight.register_hook(
            lambda gradient: (hook.remove(), gradient * float("inf"))[1]
        )

    before_step(overflow)
    fp16 = (*SMALL, "trainer.precision=fp16", "trainer.max_skipped_updates=3")
    with pytest.raises(NonFiniteLoss, match=r"3 updates in a row were skipped .*: 3\) between iterations 3 and 3"):
        run("log", *fp16, "trainer.max_iterations=4")
    records = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [record["skipped/gen"] for record in records] == [2, 1]
    assert all(torch.isfinite(torch.tensor(value)) for record in records for value in record.values())


def test_a_tick_holds_means_the_first_bad_iteration_and_skipped_updates():
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    meter = LossMeter(scalers, torch.device("cpu"))

    def iterate(first: int, *losses_and_scales: tuple[float, float]) -> None:
        for iteration, (loss, scale) in enumerate(losses_and_scales, first):
            scalers[0].update(scale)
            losses = {"gan": torch.tensor(loss), "health/d_accuracy": torch.tensor(0.5)}
            meter.add(iteration, (f"sample {iteration}",), losses)

    iterate(1, (1.0, 8.0), (float("nan"), 4.0), (3.0, 4.0), (float("inf"), 2.0), (2.0, 1.0))
    tick = meter.read()
    assert (tick.first_iteration, tick.last_iteration) == (1, 5)
    assert tick.losses == {"gan": 2.0} and tick.health == {"health/d_accuracy": 0.5}
    losses = {"gan": "nan", "health/d_accuracy": "0.5"}
    assert tick.first_bad == {"iteration": 2, "batch_keys": ["sample 2"], "losses": losses}
    assert tick.scaling == {"scale/gen": 1.0, "scale/dis": 8.0, "skipped/gen": 3.0, "skipped/dis": 0.0}
    assert tick.skipped_in_a_row == 2
    iterate(6, (1.0, 0.5), (4.0, 0.5))
    tick = meter.read()
    assert tick.losses == {"gan": 2.5} and tick.first_bad == {} and tick.scaling["skipped/gen"] == 1.0
    assert tick.skipped_in_a_row == 3  # two of them before the last tick

    meter = LossMeter([torch.amp.GradScaler("cpu", enabled=False)] * 2, torch.device("cpu"))
    meter.add(1, ("sample",), {"gan": torch.tensor(1.0)})
    meter.add(2, ("sample",), {"gan": torch.tensor(float("inf"))})
    tick = meter.read()
    assert tick.losses == {"gan": float("inf")} and tick.first_bad["iteration"] == 2 and tick.scaling == {}


def too_large_for_opencv() -> None:
    """Ask for an image of 2**60 bytes."""
    cv2.copyMakeBorder(np.zeros((1, 1), np.uint8), 0, 2**30, 0, 2**30, cv2.BORDER_CONSTANT)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "allocate", [lambda: np.empty(2**50), lambda: torch.empty(2**60), too_large_for_opencv], ids=["np", "torch", "cv2"]
)
def test_memory_that_the_loader_lacks_names_the_knobs(tiny_run, monkeypatch, allocate, workers):
    _, run = tiny_run
    read = LabelMapDataset.read

    def lacking(dataset, items, **how):
        return allocate() if any(index == 7 for _, index in items) else read(dataset, items, **how)

    monkeypatch.setattr(LabelMapDataset, "read", lacking)
    with pytest.raises(OutOfMemory, match=r"batch_size \(now 4 per process\)") as told:
        run("log", *SMALL, f"data.num_workers={workers}")
    assert len(str(told.value)) < 2000


def test_out_of_memory_names_the_knobs(tiny_run, before_step):
    path, run = tiny_run
    before_step(lambda _: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(OutOfMemory) as told:
        run("log", *SMALL)
    for knob in (
        "allocate memory", "trainer.gradient_accumulation: 2 (now 1)", "trainer.activation_checkpointing: true",
        "batch_size (now 4 per process)",
        "trainer.precision: bf16", "smaller images (now 32x64)", "gen.num_filters and dis.num_filters",
    ):  # fmt: skip
        assert knob in str(told.value)
    with pytest.raises(RuntimeError, match="no memory of it"), explain_out_of_memory(load_config(path)):
        raise RuntimeError("no memory of it")


TWO = (
    *SMALL, "gen.norm={type: clade}", "trainer.precision=bf16", "data.train.batch_size=2", "data.num_workers=1",
    "trainer.checkpoint_every=3", "trainer.log_every=1", "trainer.image_every=1000", "trainer.max_iterations=12",
    "trainer.model_average.batch_norm_images=0", "trainer.process_group_timeout_s=60",
)  # fmt: skip


# Without the first, torch 2.15 gives restarted processes the store of those before, with the addresses of dead peers.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "NO_CURVES": "1"}


class Job:
    """Two processes under torchrun."""

    def __init__(
        self, commands: ForkServer, path: Path, logdir: Path, *options: str, settings: tuple[str, ...] = ()
    ) -> None:
        arguments = ["--config", path, "--logdir", logdir, *(f"--set={item}" for item in (*TWO, *settings))]
        self.metrics = logdir / "metrics.jsonl"
        launcher = (*TORCHRUN, "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *options)
        self.process = commands.start(*launcher, "train.py", *arguments, **ENVIRONMENT)

    def reaches(self, iteration: int) -> None:
        """Wait until the log has the line of ``iteration``."""
        while not (self.metrics.exists() and f'"iteration": {iteration},' in self.metrics.read_text()):
            assert self.process.poll() is None, self.process.output()
            time.sleep(0.02)

    def reaches_next(self, iterations: int) -> None:
        """Wait until the log has so many more lines, or fewer where it was cut back by a new launch."""
        lines = self._lines()
        while 0 <= self._lines() - lines < iterations:
            assert self.process.poll() is None, self.process.output()
            time.sleep(0.02)

    def recovers(self) -> None:
        """Wait until a new launch has taken over the log and trained."""
        before = self.metrics.stat().st_ino
        while self.metrics.stat().st_ino == before:
            assert self.process.poll() is None, self.process.output()
            time.sleep(0.02)
        self.reaches_next(1)

    def prints(self, text: str) -> None:
        """Wait until it has printed that."""
        files = self.process.stdout, self.process.stderr  # (made by the process)
        while not any(text in file.read_text() for file in files if file.exists()):
            assert self.process.poll() is None, self.process.output()
            time.sleep(0.02)

    def _lines(self) -> int:
        return self.metrics.read_text().count("\n") if self.metrics.exists() else 0

    def ranks(self) -> list[int]:
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for thread in threads for child in thread.read_text().split()]


def test_a_mistake_is_told_once_whatever_restarts_the_launcher_may_make(commands):
    # The processes are not forked here: one that fails at once would find its launcher still forking.
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max_restarts=5")
    result = commands.run(*launcher, "train.py", "--config", "nowhere.yaml")
    assert result.returncode != 0
    assert result.stderr.count("error: nowhere.yaml: no such config file") == 1, result.stderr
