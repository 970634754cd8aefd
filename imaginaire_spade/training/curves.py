"""Draw the curves of a run's metrics: ``curves.png``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.files import write_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 2000
SERIES_COLOURS = ("#3b6fb6", "#d9662b", "#3a9a5b", "#b8478f", "#7a5cc2", "#a98613", "#2b9fb0", "#7d7d7d")


def write_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's metrics over images seen, one panel per group (the part of a key before the ``/``), as an image.

    Args:
        metrics: the records of metrics.jsonl, oldest first: ``images_seen`` and numbers. If a resumed run repeats a
            stretch, the later records count.
        path: the file to write, .png or .jpg.
    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _group(_drop_repeated(metrics))
    columns = min(max(len(groups), 1), 3)
    lines = max(math.ceil(len(groups) / columns), 1)
    background = "#fafaf9"
    figure = Figure(figsize=(5.0 * columns, 3.5 * lines), dpi=110, facecolor=background)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    canvas = FigureCanvasAgg(figure)
    if not groups:
        figure.text(0.5, 0.5, "no measurements yet", ha="center", va="center", color="#787c82", size=13)
    panels: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat) if groups else []
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, series) in zip(panels, groups.items(), strict=False):
        _draw_panel(panel, title, series)
    canvas.draw()
    write_image(path, np.asarray(canvas.buffer_rgba())[..., :3])


Series = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Name -> (images seen, values)."""


def _drop_repeated(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Drop the records that a resumed run repeated."""
    course: list[Mapping[str, Any]] = []
    for record in metrics:
        seen = record.get("images_seen")
        if isinstance(seen, int | float):
            if course and seen < course[-1]["images_seen"]:
                course = [earlier for earlier in course if earlier["images_seen"] < seen]
            course.append(record)
    return course


def _group(course: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Collect the points of each number, by panel."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in course:
        for key, value in record.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key in ("images_seen", "iteration", "epoch") or not is_number:
                continue
            points.setdefault(key, []).append((record["images_seen"], value))
    groups: dict[str, Series] = {}
    for key, pairs in points.items():
        group, _, name = key.rpartition("/")
        if name.startswith("d_") and group:  # the discriminator's terms have a scale of their own
            group = f"{group}: discriminator"
        if group == "evaluation":  # each score too, beside what belongs to it
            group = f"evaluation: {name.removesuffix('_real').removesuffix('_std')}"
        xy = np.array(pairs, np.float64)
        groups.setdefault(group or key, {})[name] = (xy[:, 0], xy[:, 1])
    return groups


def _draw_panel(panel: Axes, title: str, series: Series) -> None:
    """Draw one group: each number as it is, pale, and smoothed."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    # Curves.
    panel.set_title(title.replace("_", " "), loc="left", fontsize=11, fontweight="bold", color="#26282b")
    panel.set_facecolor("white")
    levels = []
    for number, (name, (x, y)) in enumerate(series.items()):
        colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
        smooth = _smooth(y)
        step = max(1, len(x) // MAX_POINTS)
        if not np.array_equal(smooth, y, equal_nan=True):
            panel.plot(x[::step], y[::step], color=colour, alpha=0.22, linewidth=0.9)
        last = f"{y[np.isfinite(y)][-1]:.4g}" if np.isfinite(y).any() else "not finite"
        style = {"marker": "o", "markersize": 4} if len(x) == 1 else {}
        dashes = "-" if number < len(SERIES_COLOURS) else "--"
        label = last if name == title else f"{name}  {last}"
        panel.plot(x[::step], smooth[::step], dashes, color=colour, linewidth=1.8, label=label, **style)  # type: ignore[arg-type]
        levels += [np.median(y[np.isfinite(y)])] if np.isfinite(y).any() else []

    # A logarithmic scale if the curves lie far apart.
    everything = np.concatenate([y[np.isfinite(y)] for _, y in series.values()])
    if len(levels) > 1 and everything.min() > 0 and max(levels) > 30 * min(levels):
        panel.set_yscale("log")

    # Axes and legend.
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panel.tick_params(which="both", labelsize=8.5, colors="#5c6066", length=0)
    panel.grid(True, color="#e8e9eb", linewidth=0.8)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9ccd1")
    panel.set_xlabel("images seen", fontsize=8.5, color="#5c6066")
    panel.margins(x=0.02)
    columns = 1 + (len(series) > 5)
    panel.legend(fontsize=8, framealpha=0.85, edgecolor="none", labelcolor="#26282b", ncols=columns)


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over a moving window of about 1/40 of the points, without values that are not finite."""
    reach = min(len(y) // 80, 250)
    if reach == 0:
        return y
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low = np.clip(np.arange(len(y)) - reach, 0, None)
    high = np.clip(np.arange(len(y)) + reach + 1, None, len(y))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
