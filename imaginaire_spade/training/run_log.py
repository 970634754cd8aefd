"""Write a run's log: ``metrics.jsonl``, curves, previews and lines of text; ``trackers.py`` has copies."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from imaginaire_spade.data.batch import Batch
from imaginaire_spade.data.conditions import draw_condition
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.data.photos import photo_preview, to_preview
from imaginaire_spade.errors import UserError
from imaginaire_spade.files import write_bytes, write_image
from imaginaire_spade.noise import style_codes
from imaginaire_spade.processes import forget_output
from imaginaire_spade.sheets import draw_contact_sheet, legend_of
from imaginaire_spade.training.setup import Calendar, Run
from imaginaire_spade.training.trackers import Following, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RunLog:
    """Write ``metrics.jsonl``, ``curves.png``, preview images and lines of text of one log dir.

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
        self.trackers: list[Following] = []
        """They get what is logged; on rank 0."""
        self._metrics = logdir / "metrics.jsonl"
        self._records = [r for r in _read_records(self._metrics) if r["images_seen"] <= images_seen] if enabled else []
        if enabled:
            with self.report_write_errors():
                write_bytes(self._metrics, b"".join(map(_line, self._records)))

    def say(self, text: str) -> None:
        """Add a line to ``train.log``, and print it, above the progress bar if there is one."""
        if self.enabled:
            with suppress(OSError), (self.logdir / "train.log").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # who read it is gone, such as tee
                forget_output(sys.stdout.fileno())

    def warn(self, images_seen: int, text: str) -> None:
        """Print a warning, for the trackers too."""
        self.say(f"warning: iteration {self.calendar.iteration(images_seen)}: {text}")
        self._track("log_text", images_seen, text)

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
        epoch, speed = f"epoch {self.calendar.epoch(images_seen):.2f}", describe_speed(images, elapsed)
        if self._bar.disable:
            iteration, stop = self.calendar.iteration(images_seen), self.calendar.stop_iteration
            left_s = (stop - iteration) * self.calendar.global_batch * elapsed / images
            self.say(
                f"iteration {iteration}/{stop} ({images_seen} images, {epoch}) {text} | {speed},"
                f" {waited_s / elapsed:.0%} waiting for data, {tqdm.format_interval(left_s)} left"
            )
        else:
            self._bar.set_postfix_str(f"{epoch}, {speed} | {text}")

    def add_scores(self, images_seen: int, scores: dict[str, float], seconds: float) -> None:
        """Write the record of an evaluation; the time it took does not count as training time."""
        self._ticked_at += seconds
        if self.enabled:
            finite = {f"evaluation/{name}": value for name, value in scores.items() if math.isfinite(value)}
            self._write(images_seen, finite)

    def start_clock(self) -> None:
        """Begin to measure speed: what was prepared until now is not training."""
        self._ticked_at = time.perf_counter()

    def advance(self) -> None:
        """Count one finished iteration."""
        self._bar.update()

    def add_preview(self, images_seen: int, sheet: NDArray[np.uint8]) -> None:
        """Write a preview sheet, uint8 RGB [H, W, 3], under ``images/``. For rank 0 only."""
        self._track("log_image", images_seen, sheet)
        with self.report_write_errors():
            write_image(self.logdir / "images" / f"preview_{images_seen:012d}.jpg", sheet)
        with self.report_write_errors():
            self._draw_curves()

    def close(self, status: Status) -> None:
        """Draw the curves a last time, unless the run failed, and close the trackers."""
        self._bar.close()
        for tracker in self.trackers:
            tracker.close(status)
        with self.report_write_errors():
            if status != "failed":  # whose reason may be on its way to the screen
                self._draw_curves()

    def _track(self, method: str, *arguments: Any) -> None:
        for tracker in self.trackers:
            tracker.send(method, *arguments)

    def _write(self, images_seen: int, values: dict[str, float]) -> None:
        """Write one record to ``metrics.jsonl`` and the trackers."""
        iteration, epoch = self.calendar.iteration(images_seen), round(self.calendar.epoch(images_seen), 4)
        values = {"epoch": epoch, **values}
        self._records.append({"iteration": iteration, "images_seen": images_seen, **values})
        self._track("log", images_seen, values)
        with self.report_write_errors():
            line = _line(self._records[-1])
            with self._metrics.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):  # all of it, or nothing
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _draw_curves(self) -> None:
        if self._records:
            write_curves(self._records, self.logdir / "curves.png")

    @contextmanager
    def report_write_errors(self) -> Iterator[None]:
        """Report that a file of the log cannot be written, and go on."""
        try:
            yield
        except (OSError, UserError) as error:
            self.say(f"warning: the log in {self.logdir} has a gap here: {error}")


def describe_speed(images: int, seconds: float) -> str:
    """Return "3.5 images/s", or "20.0 s per image" for slow ones."""
    return f"{images / seconds:.1f} images/s" if images > seconds / 10 else f"{seconds / images:.1f} s per image"


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return 0.0  # it does not say
    import resource

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
    """Draw a sheet, uint8 RGB [H, W, 3], with one row per sample. The generators run in evaluation mode.

    Where there is an EMA of the weights, its images stand last, beside those of the weights as trained ("raw").
    """
    state = run.state
    columns: dict[str, Any] = {}
    table, labels = run.config.data.labels, batch.layout.labels.numpy()
    if table.num_classes:
        columns["label map"] = table.colourise(labels)
    if batch.layout.edges is not None:
        columns["edges"] = (255 - batch.layout.edges.numpy() * 255).astype(np.uint8)[..., None].repeat(3, -1)
    if batch.layout.conditions is not None:
        sizes = [condition.channels for condition in run.config.data.conditions]
        parts = batch.layout.conditions.split(sizes, 1)
        for condition, channels in zip(run.config.data.conditions, parts, strict=True):
            columns[condition.name] = [draw_condition(one) for one in channels.numpy()]
    assert batch.images is not None
    spec = run.config.data.images
    images = {"real": photo_preview(batch.images, spec)}
    z = style_codes(run.config.seed, batch.keys, run.settings.style_dims, run.device)
    layout = batch.layout.to(run.device)
    state.generator.eval()
    averaged = state.generator_ema is not None
    images["generated (raw)" if averaged else "generated"] = to_preview(state.generator(layout, z), spec)
    state.generator.train()
    if state.generator_ema is not None:
        images["generated (EMA)"] = to_preview(state.generator_ema(layout, z), spec)
    columns |= {name: made.permute(0, 2, 3, 1).cpu().numpy() for name, made in images.items()}
    rows = [[column[i] for column in columns.values()] for i in range(len(batch))]
    return draw_contact_sheet(rows, list(columns), [[key] for key in batch.keys], legend_of(table, labels))


MAX_POINTS = 2000
PANELS_IN_A_ROW = 4
FROM_ZERO = ("data", "health", "lr", "memory", "speed")
"""Groups whose axis begins at 0, so that a small change looks small."""
SERIES_COLOURS = ("#3b6fb6", "#d9662b", "#3a9a5b", "#b8478f", "#7a5cc2", "#a98613", "#2b9fb0", "#7d7d7d")

Series = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Name -> (images seen, values)."""


def write_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's metrics over images seen as PNG: a panel for each loss and each score, and one for each other group
    (the part of a key before the ``/``). Every row is filled.

    Args:
        metrics: at least one record of metrics.jsonl, oldest first: ``images_seen`` and numbers.
    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    groups = list(_group(metrics).items())
    lines = max(math.ceil(len(groups) / PANELS_IN_A_ROW), 1)
    widest = math.ceil(len(groups) / lines)
    figure = Figure(figsize=(4.2 * max(widest, 1), 2.9 * lines), dpi=110, facecolor="#fafaf9")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    for line, part in enumerate(figure.subfigures(lines, squeeze=False).flat):
        row = groups[line * len(groups) // lines : (line + 1) * len(groups) // lines]
        part.set_facecolor("none")
        panels = part.subplots(1, max(len(row), 1), squeeze=False).flat
        for panel, (title, series) in zip(panels, row, strict=False):
            _draw_panel(panel, title, series)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())


def _group(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Collect the points of each number, by panel."""
    groups: dict[str, Series] = {}
    for key in dict.fromkeys(key for record in metrics for key in record):
        if key in ("images_seen", "iteration", "epoch"):
            continue
        group, _, name = key.rpartition("/")
        if group in ("loss", "evaluation"):  # each has a scale of its own; a score stands beside what belongs to it
            group = f"{group}: {name.removesuffix('_real').removesuffix('_std') if group == 'evaluation' else name}"
        x, y = np.array([(record["images_seen"], record[key]) for record in metrics if key in record], np.float64).T
        groups.setdefault(group or key, {})[name] = (x, y)
    return groups


def _draw_panel(panel: Axes, title: str, series: Series) -> None:
    """Draw one group: each number as it is, pale, and smoothed."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    # Curves.
    panel.set_title(title.replace("_", " "), loc="left", fontsize=11, fontweight="bold", color="#26282b")
    panel.set_facecolor("white")
    for number, (name, (x, y)) in enumerate(series.items()):
        colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
        smooth, finite = _smooth(y), y[np.isfinite(y)]
        step = max(1, len(x) // MAX_POINTS)
        if smooth is not y:
            panel.plot(x[::step], y[::step], color=colour, alpha=0.22, linewidth=0.9)
        last = f"{finite[-1]:.4g}" if len(finite) else "not finite"
        label = last if title.endswith(f": {name}") and len(series) == 1 else f"{name}  {last}"
        line = "o-" if len(x) == 1 else "-"
        panel.plot(x[::step], smooth[::step], line, color=colour, markersize=4, linewidth=1.8, label=label)

    # Axes and legend.
    if title in FROM_ZERO:
        panel.axhline(0, color="none")
        panel.set_ylim(bottom=0)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panel.tick_params(which="both", labelsize=8.5, colors="#5c6066", length=0)
    panel.grid(True, color="#e8e9eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["left", "top", "right"]].set_visible(False)
    panel.spines["bottom"].set_color("#c9ccd1")
    panel.set_xlabel("images seen", fontsize=8.5, color="#5c6066")
    panel.margins(x=0.02)
    if len(series) == 1:
        panel.set_title(label, loc="right", fontsize=8, color="#5c6066")
    else:
        panel.legend(fontsize=8, framealpha=0.85, edgecolor="none", labelcolor="#26282b")


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over a moving window of about 1/40 of the points, without values that are not finite; a few points stay
    as they are."""
    reach = min(len(y) // 80, 250)
    if reach == 0:
        return y
    finite, window = np.isfinite(y), np.ones(2 * reach + 1)
    sums, counts = (np.convolve(values, window, "same") for values in (np.where(finite, y, 0.0), finite))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
