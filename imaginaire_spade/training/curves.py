"""Draw the curves of a run's metrics: ``curves.png``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 2000
SERIES_COLOURS = ("#3b6fb6", "#d9662b", "#3a9a5b", "#b8478f", "#7a5cc2", "#a98613", "#2b9fb0", "#7d7d7d")

Series = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Name -> (images seen, values)."""


def write_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's metrics over images seen, one panel per group (the part of a key before the ``/``), as PNG.

    Args:
        metrics: at least one record of metrics.jsonl, oldest first: ``images_seen`` and numbers.
    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    groups = _group(metrics)
    columns = max(min(len(groups), 3), 1)
    lines = max(math.ceil(len(groups) / columns), 1)
    figure = Figure(figsize=(5.0 * columns, 3.5 * lines), dpi=110, facecolor="#fafaf9")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, series) in zip(panels, groups.items(), strict=False):
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
        if name.startswith("d_") and group:  # the discriminator's terms have a scale of their own
            group = f"{group}: discriminator"
        if group == "evaluation":  # each score too, beside what belongs to it
            group = f"evaluation: {name.removesuffix('_real').removesuffix('_std')}"
        x, y = np.array([(record["images_seen"], record[key]) for record in metrics if key in record], np.float64).T
        groups.setdefault(group or key, {})[name] = (x, y)
    return groups


def _draw_panel(panel: Axes, title: str, series: Series) -> None:
    """Draw one group: each number as it is, pale, and smoothed."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    # Curves.
    panel.set_title(title.replace("_", " "), loc="left", fontsize=11, fontweight="bold", color="#26282b")
    panel.set_facecolor("white")
    levels, lowest = [], math.inf
    for number, (name, (x, y)) in enumerate(series.items()):
        colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
        smooth, finite = _smooth(y), y[np.isfinite(y)]
        step = max(1, len(x) // MAX_POINTS)
        if smooth is not y:
            panel.plot(x[::step], y[::step], color=colour, alpha=0.22, linewidth=0.9)
        last = f"{finite[-1]:.4g}" if len(finite) else "not finite"
        label = last if name == title else f"{name}  {last}"
        dashes, marker = "-" if number < len(SERIES_COLOURS) else "--", "o" if len(x) == 1 else ""
        panel.plot(x[::step], smooth[::step], dashes + marker, color=colour, markersize=4, linewidth=1.8, label=label)
        if len(finite):
            levels.append(np.median(finite))
            lowest = min(lowest, finite.min())

    # A logarithmic scale if the curves lie far apart.
    if len(levels) > 1 and lowest > 0 and max(levels) > 30 * min(levels):
        panel.set_yscale("log")

    # Axes and legend.
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    panel.tick_params(which="both", labelsize=8.5, colors="#5c6066", length=0)
    panel.grid(True, color="#e8e9eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["left", "top", "right"]].set_visible(False)
    panel.spines["bottom"].set_color("#c9ccd1")
    panel.set_xlabel("images seen", fontsize=8.5, color="#5c6066")
    panel.margins(x=0.02)
    columns = 1 + (len(series) > 5)
    panel.legend(fontsize=8, framealpha=0.85, edgecolor="none", labelcolor="#26282b", ncols=columns)


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over a moving window of about 1/40 of the points, without values that are not finite; a few points stay
    as they are."""
    reach = min(len(y) // 80, 250)
    if reach == 0:
        return y
    finite, window = np.isfinite(y), np.ones(2 * reach + 1)
    sums, counts = (np.convolve(values, window, "same") for values in (np.where(finite, y, 0.0), finite))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
