"""Run the training loop: decide what is due when. ``step.py`` computes an iteration."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from imaginaire_spade import distributed
from imaginaire_spade.config_files import dump_yaml
from imaginaire_spade.data.loader import Prefetcher
from imaginaire_spade.errors import CheckpointError, UserError, first_line
from imaginaire_spade.files import write_bytes
from imaginaire_spade.processes import LAUNCHER_GONE_S, forget_terminal
from imaginaire_spade.training.checkpoint import CheckpointWriter, checkpoints_in
from imaginaire_spade.training.evaluation import CheckStop
from imaginaire_spade.training.fine_tuning import initialise_from
from imaginaire_spade.training.health import Alarms, LossMeter, check_finite, doubt_labels, explain_out_of_memory
from imaginaire_spade.training.run_log import RunLog, preview_batch, preview_sheet
from imaginaire_spade.training.setup import Run, calibration_inputs, calibration_layouts, content_of, describe, resume
from imaginaire_spade.training.state import move_statistics, reestimate_batch_norm
from imaginaire_spade.training.trackers import Status, open_trackers

STOP_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
"""SIGTERM: preemption, a launcher that stops its processes, ``kill``. SIGUSR1: a batch system's warning before the time
limit (SLURM's ``--signal``). SIGHUP: the terminal is closed, unless nohup has it ignored. SIGINT: Ctrl-C."""

INSIST_AFTER_S = 2.0
"""A Ctrl-C arrives twice within moments, from the terminal and from the launcher; a later one means "at once"."""

LOST_NODE_S = 20.0
"""Seconds that a failed process waits before it exits, with several nodes. torchrun counts a silent node as lost after
15 s; if it learned of the failure sooner, it would wait in vain for that node in the new group, and give up."""

ESTIMATE_AT_MOST = 20
"""Checkpoints re-estimate the EMA's batch statistics at most once every ``ESTIMATE_AT_MOST * batch_norm_images``
training images: one forward of the generator then costs less than 1.5 % of the iterations, however often a checkpoint
is due."""


class StopRequested(Exception):
    """A process was asked to stop while an evaluation ran; raised on all processes at the same point."""


class StopRequest:
    """Hold back the signals of ``STOP_SIGNALS`` while entered; ``number`` is the first one that arrived.

    Raises:
        KeyboardInterrupt: another Ctrl-C arrived more than ``INSIST_AFTER_S`` later.
    """

    def __init__(self) -> None:
        self.number = 0
        """The number of the first signal; 0: none yet."""
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}
        self._parent = os.getppid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
            if (hangup := getattr(signal, "SIGHUP", None)) and self._before[hangup] is signal.SIG_IGN:
                signal.signal(hangup, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
            if signal.Signals(number).name == "SIGHUP":
                forget_terminal()
            if os.getppid() != self._parent and sys.platform != "win32":
                signal.alarm(LAUNCHER_GONE_S)
        elif number == signal.SIGINT and time.monotonic() - self._noted_at > INSIST_AFTER_S:
            raise KeyboardInterrupt


def train(
    run: Run, logdir: Path, start_from: Path | None, allow_changed_data: bool = False, *, init_from: Path | None = None
) -> None:
    """Train to the end of the run, or to ``--max_iterations``; continue from the newest checkpoint of ``logdir``.

    Args:
        start_from: checkpoint to begin with if ``logdir`` has none yet.
        init_from: as ``start_from``, but take only weights, also those of networks for other classes.
        allow_changed_data: continue although the data set or its labels are not those of the checkpoint.
    Raises:
        SystemExit: a signal asked the run to stop; it has saved. The code is that by which shells know the signal: 143
            for SIGTERM, 138 for SIGUSR1, 130 for SIGINT.
    """
    begun = bool(checkpoints_in(logdir / "checkpoints"))
    resumed = resume(run, logdir, start_from, allow_changed_data)
    if resumed is None and init_from is not None:
        resumed = initialise_from(run, init_from)
    elif begun and (given := init_from or start_from) is not None:
        flag = "--checkpoint" if init_from is None else "--init_from"
        resumed = f"{resumed}\nnote: {flag} {given} is for a log dir without checkpoints: it changes nothing here"
    state, calendar = run.state, run.calendar
    if run.info.is_main:
        try:
            write_bytes(logdir / "config.yaml", dump_yaml(run.config).encode())
        except UserError as error:
            raise UserError(f"{error}. Give another --logdir") from None
    log = RunLog(logdir, calendar, state.images_seen, enabled=run.info.is_main)
    log.say(describe(run))
    if run.info.is_main and run.bad:
        write_bytes(logdir / "bad_files.txt", "".join(f"{problem}\n" for problem in run.bad).encode())
    if resumed is not None:
        log.say(resumed)
    unscored = run.evaluation is not None and run.evaluation.due(state.images_seen, finished=True)
    over = calendar.iteration(state.images_seen) >= calendar.stop_iteration
    stalled = "" if run.evaluation is None or over else run.evaluation.stalled
    if (over or stalled) and not unscored:
        how = "trainer.max_iterations (or max_epochs) in the config or --max_iterations on the command line"
        log.say(
            f"finished: iteration {calendar.iteration(state.images_seen)} of {calendar.stop_iteration}"
            f"{stalled and f': {stalled}'}. To go on, raise {'trainer.evaluation.patience' if stalled else how}"
        )
        log.close("finished")
        return
    if run.info.is_main:
        log.trackers = open_trackers(run, logdir, log.say)
    status: Status = "failed"
    try:
        with (
            StopRequest() as request,
            closing(run.batches()) as batches,
            CheckpointWriter(logdir / "checkpoints", run.config.trainer.keep_last) as writer,
            report_progress_on_failure(run, request),
        ):
            stop_signal = _iterate(run, log, batches, request, writer)
        status = "stopped" if stop_signal else "finished"
    finally:
        log.close(status)
    distributed.barrier()  # nobody leaves the group while rank 0 still writes
    if stop_signal:
        raise SystemExit(128 + stop_signal)


def _iterate(run: Run, log: RunLog, batches: Prefetcher, request: StopRequest, writer: CheckpointWriter) -> int:
    """Iterate to the end of this launch and return 0, or until a process gets a stop signal and return its number."""
    trainer, state, calendar = run.config.trainer, run.state, run.calendar
    meter, alarms = LossMeter((state.gen_scaler, state.dis_scaler), run.device), Alarms()
    batch, saved_at = None, state.images_seen  # the last batch since the log tick
    any_request = distributed.LaggedMaximum()

    def check_stop() -> None:
        if any_request(request.number):
            raise StopRequested

    if run.evaluation is not None:
        with suppress(StopRequested):
            log.say(run.evaluation.find_reference(log.logdir, check_stop))
    with explain_out_of_memory(run.config):
        preview = preview_batch(run) if run.info.is_main else None
        calibration = calibration_layouts(run)
    if doubt := doubt_labels(run.config.data.labels, calibration):
        log.say(doubt)
    log.start_clock()

    while True:
        # What is due?
        iteration = calendar.iteration(state.images_seen)
        finished = iteration >= calendar.stop_iteration
        stop_signal = any_request(request.number)
        done = finished or stop_signal > 0
        due_preview = finished or iteration % trainer.image_every == 0
        due_checkpoint = state.images_seen > saved_at and (done or iteration % trainer.checkpoint_every == 0)
        due_scores = run.evaluation is not None and run.evaluation.due(state.images_seen, finished)
        # Losses are checked before every checkpoint and evaluation.
        due_log = due_checkpoint or due_scores or iteration % trainer.log_every == 0

        # Log.
        if due_log and batch is not None:
            tick = meter.read()
            optimizers = {"gen": state.gen_optimizer, "dis": state.dis_optimizer}
            rates = {f"lr/{name}": float(o.param_groups[0]["lr"]) for name, o in optimizers.items()}
            log.tick(state.images_seen, tick.losses, rates | tick.scaling | tick.health, batches.wait_s)
            check_finite(tick, run, batch, log.logdir)
            for warning in alarms.check(tick.health):
                log.warn(state.images_seen, warning)
            batch = None

        # Batch statistics of the EMA.
        if state.generator_ema is not None and trainer.model_average is not None and calibration:
            if trainer.model_average.form == "state":
                if (state.images_seen > saved_at or not state.images_seen) and _scheduled(run):
                    move_statistics(state.generator_ema, calibration_inputs(run, calibration))
            elif due_preview or due_scores or (due_checkpoint and _statistics_due(run)):
                reestimate_batch_norm(state.generator_ema, calibration_inputs(run, calibration))

        # Evaluate.
        is_best = False
        if due_scores and not stop_signal:
            try:
                is_best = _evaluate(run, log, check_stop)
            except StopRequested:
                continue  # the next launch evaluates
            if run.evaluation is not None and run.evaluation.stalled and not finished:
                log.say(f"ending the run early: {run.evaluation.stalled}")
                finished = done = due_preview = True
        due_checkpoint |= is_best or (finished and due_scores)  # with what is remembered of the scores

        # Preview.
        if due_preview and preview is not None:
            log.add_preview(state.images_seen, preview_sheet(run, preview))

        # Checkpoint.
        try:
            writer.check(wait=due_checkpoint)
        except CheckpointError as error:
            if trainer.on_failed_save == "stop":
                raise
            log.say(f"warning: {error}; going on (trainer.on_failed_save)")
        if due_checkpoint and run.info.is_main:
            keep = trainer.keep_every is not None and iteration % trainer.keep_every == 0
            log.say(f"saving {writer.save(state.images_seen, content_of(run), keep, is_best)}")
        saved_at = state.images_seen if due_checkpoint else saved_at

        # Done?
        if done:
            writer.wait()
        if finished and not (stop_signal and due_scores):
            return 0
        if stop_signal:
            log.say(
                f"leaving on {signal.Signals(stop_signal).name}; the same command continues from iteration {iteration}"
            )
            return stop_signal

        # Step.
        with explain_out_of_memory(run.config):
            batch = next(batches)
            losses = run.step(batch)
        meter.add(iteration + 1, batch.keys, losses)
        log.advance()


def _evaluate(run: Run, log: RunLog, check_stop: CheckStop) -> bool:
    """Evaluate and log the scores. Return whether they are the best so far, the same on every process.

    Raises:
        StopRequested: a process is asked to stop.
    """
    assert run.evaluation is not None
    started_at = time.perf_counter()
    generator, seen = run.state.generator_ema or run.state.generator, run.state.images_seen
    name = f"scores_{seen:012d}"
    generator.eval()
    try:
        scores, is_best = run.evaluation(generator, seen, log.logdir, name, check_stop)
    finally:
        generator.train(generator is run.state.generator)
    seconds = time.perf_counter() - started_at
    log.add_scores(seen, scores, seconds)
    log.say(f"evaluation in {seconds:.1f} s: {run.evaluation.describe(scores, is_best)}")
    return is_best


def _statistics_due(run: Run) -> bool:
    """Return whether the checkpoint that is due gets new batch statistics of the EMA. If not, they are averaged like
    the weights, from the last estimate on."""
    trainer, images_seen = run.config.trainer, run.state.images_seen
    average, every = trainer.model_average, trainer.checkpoint_every * run.calendar.global_batch
    interval = ESTIMATE_AT_MOST * average.batch_norm_images if average is not None else 0
    return interval > 0 and images_seen % every == 0 and images_seen // interval > (images_seen - every) // interval


def _scheduled(run: Run) -> bool:
    """Return whether the run's own schedule shows, scores or saves the EMA now, however many launches it takes."""
    trainer, seen = run.config.trainer, run.state.images_seen
    iteration = run.calendar.iteration(seen)
    regular = not (iteration % trainer.image_every and iteration % trainer.checkpoint_every)
    scored = run.evaluation is not None and run.evaluation.due(seen, finished=False)
    return regular or scored or iteration >= run.calendar.total_iterations


@contextmanager
def report_progress_on_failure(run: Run, request: StopRequest) -> Iterator[None]:
    """Report the last completed iteration if this process fails, as the surviving ranks do when another one dies."""
    info = run.info
    try:
        yield
    except (RuntimeError, OSError) as error:
        if info.world_size > 1:
            done = run.calendar.iteration(run.state.images_seen)
            reason = first_line(error)[:300]
            where = f"rank {info.rank} of {info.world_size} ({socket.gethostname()})"
            print(f"{where}: {done} iterations done, stopped in the next: {reason}", file=sys.stderr, flush=True)
        if info.world_size > info.local_world_size:
            give_up_at = time.monotonic() + LOST_NODE_S
            while time.monotonic() < give_up_at and not request.number:
                time.sleep(0.1)
        raise
