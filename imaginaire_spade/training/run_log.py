"""Write a run's log: TensorBoard, ``metrics.jsonl``, curves, previews and lines of text."""

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from imaginaire_spade.data.batch import Batch, denormalise
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.errors import UserError
from imaginaire_spade.files import write_bytes, write_image
from imaginaire_spade.noise import style_codes
from imaginaire_spade.sheets import draw_contact_sheet
from imaginaire_spade.training import curves
from imaginaire_spade.training.setup import Calendar, Run


class RunLog:
    """Write the TensorBoard events, ``metrics.jsonl``, ``curves.png``, preview images and lines of text of one log dir.

    On a terminal progress is a bar; in a log file it is one line per tick. Ranks other than 0 write nothing. A failed
    write (disk full) is reported and skipped: the log has a gap, the run continues.

    Args:
        images_seen: where this launch begins. Later records, of a launch that died after its last checkpoint, are
            dropped.
    """

    def __init__(self, logdir: Path, calendar: Calendar, images_seen: int, enabled: bool) -> None:
        self.logdir, self.calendar, self.enabled = logdir, calendar, enabled
        self._ticked_at = time.perf_counter()
        self._ticked_images = images_seen
        self._waited_s = 0.0
        done, total = calendar.iteration(images_seen), calendar.stop_iteration
        hidden = None if enabled else True  # None: unless on a terminal
        self._bar = tqdm(total=total, initial=done, unit="it", disable=hidden, dynamic_ncols=True)
        self._events: SummaryWriter | None = None
        self._next_step = done + 1
        self._metrics = logdir / "metrics.jsonl"
        self._records = [r for r in _read_records(self._metrics) if r["images_seen"] <= images_seen] if enabled else []
        if enabled:
            with self.report_write_errors():
                write_bytes(self._metrics, b"".join(map(_line, self._records)))

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, images_seen: int, text: str) -> None:
        """Print a warning and write it to TensorBoard's text."""
        iteration = self.calendar.iteration(images_seen)
        self.say(f"warning: iteration {iteration}: {text}")
        if self.enabled:
            with self.report_write_errors():
                self._tensorboard().add_text("warnings", text, iteration)

    def tick(self, images_seen: int, losses: dict[str, float], rates: dict[str, float], wait_s: float) -> None:
        """Write one record.

        Args:
            losses: mean losses since the last tick.
            rates: learning rates, health and the like by name.
            wait_s: seconds spent waiting for data since launch.
        """
        now = time.perf_counter()
        elapsed, images, waited_s = now - self._ticked_at, images_seen - self._ticked_images, wait_s - self._waited_s
        self._ticked_at, self._ticked_images, self._waited_s = now, images_seen, wait_s
        if not self.enabled or not images:
            return
        values = {
            **{f"loss/{name}": value for name, value in losses.items()},
            **rates,
            "speed/images_per_s": images / elapsed,
            "data/share_waiting": waited_s / elapsed,
            "memory/peak_gib": peak_memory_gib(),
        }
        self._write(images_seen, values)
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if self._bar.disable:
            iteration, stop = self.calendar.iteration(images_seen), self.calendar.stop_iteration
            left_s = (stop - iteration) * self.calendar.global_batch * elapsed / images
            self.say(
                f"iteration {iteration}/{stop} (epoch {self.calendar.epoch(images_seen):.2f})"
                f" {text} | {images / elapsed:.1f} images/s, {waited_s / elapsed:.0%} waiting for data,"
                f" {tqdm.format_interval(left_s)} left"
            )
        else:
            self._bar.set_postfix_str(text)

    def add_scores(self, images_seen: int, scores: dict[str, float], seconds: float) -> None:
        """Write the record of an evaluation; the time it took does not count as training time."""
        self._ticked_at += seconds
        if self.enabled:
            finite = {f"evaluation/{name}": value for name, value in scores.items() if math.isfinite(value)}
            self._write(images_seen, finite)

    def advance(self) -> None:
        """Count one finished iteration."""
        self._bar.update()

    def add_preview(self, images_seen: int, sheet: NDArray[np.uint8]) -> None:
        """Write a preview sheet, uint8 RGB [H, W, 3], in TensorBoard and under ``images/``. For rank 0 only."""
        iteration = self.calendar.iteration(images_seen)
        with self.report_write_errors():
            self._tensorboard().add_image("preview", sheet, iteration, dataformats="HWC")
            write_image(self.logdir / "images" / f"iteration_{iteration:09d}.jpg", sheet)
            self._draw_curves()

    def close(self) -> None:
        """Draw the curves a last time and close the files."""
        self._bar.close()
        with self.report_write_errors():
            self._draw_curves()
            if self._events is not None:
                self._events.close()

    def _write(self, images_seen: int, values: dict[str, float]) -> None:
        """Write one record to ``metrics.jsonl`` and TensorBoard."""
        iteration, epoch = self.calendar.iteration(images_seen), round(self.calendar.epoch(images_seen), 4)
        values = {"epoch": epoch, **values}
        self._records.append({"iteration": iteration, "images_seen": images_seen, **values})
        with self.report_write_errors():
            line = _line(self._records[-1])
            with self._metrics.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):  # all of it, or nothing
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            events = self._tensorboard()
            for name, value in values.items():
                events.add_scalar(name, value, iteration)
            events.flush()
            self._next_step = iteration + 1

    def _draw_curves(self) -> None:
        if self._records:
            curves.write_curves(self._records, self.logdir / "curves.png")

    def _tensorboard(self) -> SummaryWriter:
        """Return the writer of events; after one that failed, a new one with a new file."""
        if self._events is None:
            self._events = SummaryWriter(str(self.logdir), purge_step=self._next_step)
        return self._events

    @contextmanager
    def report_write_errors(self) -> Iterator[None]:
        """Report that a file of the log cannot be written, and go on."""
        try:
            yield
        except (OSError, UserError) as error:
            self._events = None
            self.say(f"warning: the log in {self.logdir} has a gap here: {error}")


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # the last line of a run that was killed while writing it
            yield json.loads(line)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def preview_batch(run: Run) -> Batch | None:
    """Read validation samples spread evenly over the data set, the same at every launch; None for no rows."""
    last = len(run.val_dataset) - 1
    count = min(run.config.trainer.image_rows, last + 1)
    if not count:
        return None
    indices = [round(i * last / max(1, count - 1)) for i in range(count)]
    return next(iter(sequential_batches(run.val_dataset, indices, count)))


@torch.no_grad()
def preview_sheet(run: Run, batch: Batch) -> NDArray[np.uint8]:
    """Draw a sheet, uint8 RGB [H, W, 3], with one row per sample. The generators run in evaluation mode."""
    state = run.state
    columns = {"label map": run.config.data.labels.colourise(batch.layout.labels.numpy())}
    if batch.layout.edges is not None:
        columns["edges"] = (255 - batch.layout.edges.numpy() * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert batch.images is not None
    images = {"real": batch.images}
    z = style_codes(run.config.seed, batch.keys, run.settings.style_dims, run.device)
    layout = batch.layout.to(run.device)
    state.generator.eval()
    images["generated"] = denormalise(state.generator(layout, z))
    state.generator.train()
    if state.generator_ema is not None:
        images["average"] = denormalise(state.generator_ema(layout, z))
    columns |= {name: made.permute(0, 2, 3, 1).cpu().numpy() for name, made in images.items()}
    rows = [[column[i] for column in columns.values()] for i in range(len(batch))]
    return draw_contact_sheet(rows, list(columns))
