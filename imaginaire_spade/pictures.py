"""Make images for people from arrays: files, contact sheets, legends, curves and a gallery page.

Owns how a picture file is written (whole or not at all) and how everything is drawn. Knows nothing of networks.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imaginaire_spade.files import write_bytes
from imaginaire_spade.labels import LabelSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Picture = NDArray[np.uint8]
"""RGB, uint8 [H, W, 3]."""

SUFFIXES = (".jpg", ".jpeg", ".png")
BACKGROUND = (250, 250, 249)
INK = (38, 40, 43)
FAINT = (120, 124, 130)
NARROW_CELL = 120
"""Pixels below which a cell of a sheet is too narrow for its title and for the eye."""


# ------------------------------------------------------------------------------------------------ files


def write_image(path: Path, rgb: Picture, *, quality: int = 95) -> None:
    """Write an image as JPEG or PNG, by suffix; a file with the final name is complete.

    Missing folders are made. Raises UserError naming the path where it cannot be written.
    """
    write_bytes(path, encode_picture(rgb, path.suffix, quality=quality))


def encode_picture(rgb: Picture, suffix: str, *, quality: int = 95) -> bytes:
    """Encode an image in the format of ``suffix`` (".jpg"); ``quality`` of JPEG and WebP: 1..100."""
    flags = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".jpeg": cv2.IMWRITE_JPEG_QUALITY, ".webp": cv2.IMWRITE_WEBP_QUALITY}
    options = [flags[suffix.lower()], quality] if suffix.lower() in flags else []
    return cv2.imencode(suffix, rgb[..., ::-1], options)[1].tobytes()


def resized(rgb: Picture, height: int, width: int) -> Picture:
    """Resize an image: area averaging when shrinking, bicubic when enlarging."""
    if rgb.shape[:2] == (height, width):
        return rgb
    method = cv2.INTER_AREA if height * width < rgb.shape[0] * rgb.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(rgb, (width, height), interpolation=method)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ sheets


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    import matplotlib  # brings DejaVu Sans along: Latin, Greek, Cyrillic, the same on every machine

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: float, font: Any) -> str:
    """``text``, its middle replaced by an ellipsis where it is wider than ``width`` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    kept = len(text)
    while kept > 1 and draw.textlength(short := f"{text[: kept // 2]}…{text[-(kept // 2) :]}", font) > width:
        kept -= 1
    return short if kept > 1 else "…"


def contact_sheet(
    rows: Sequence[Sequence[Picture]],
    column_titles: Sequence[str],
    *,
    row_titles: Sequence[str] = (),
    cell_h_w: tuple[int, int] | None = None,
) -> Picture:
    """Lay images out in rows of equal cells under column titles, on a light ground: uint8 [H, W, 3].

    Args:
        rows: the pictures; a short row leaves its last cells empty.
        column_titles: one per column.
        row_titles: one per row, written above the row; none: no space is taken.
        cell_h_w: size of a cell; default: the largest height and width, times a whole number where that is narrower
            than ``NARROW_CELL``. Pictures fit in, aspect ratio kept.
    """
    cells = [cell for row in rows for cell in row]
    if cell_h_w is None:
        widest = max((c.shape[1] for c in cells), default=64)
        factor = math.ceil(NARROW_CELL / widest)
        cell_h_w = (factor * max((c.shape[0] for c in cells), default=64), factor * widest)
    height, width = cell_h_w
    size = round(min(max(width / 18, 12), 24))
    title_font, row_font = _font(size, bold=True), _font(max(round(size * 0.8), 11))
    gap, margin = max(size // 2, 6), max(size, 12)
    title_h, row_title_h = round(size * 1.9), round(size * 1.7) if row_titles else 0
    row_h = row_title_h + height + gap

    sheet_w = 2 * margin + len(column_titles) * (width + gap) - gap
    sheet = Image.new("RGB", (sheet_w, 2 * margin + title_h + len(rows) * row_h - gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        middle = margin + column * (width + gap) + width / 2
        text = _shortened(draw, title, width, title_font)
        draw.text((middle, margin + title_h * 0.4), text, INK, title_font, anchor="mm")
    for number, row in enumerate(rows):
        top = margin + title_h + number * row_h
        if number < len(row_titles):
            text = _shortened(draw, row_titles[number], sheet_w - 2 * margin, row_font)
            draw.text((margin, top + row_title_h * 0.5), text, FAINT, row_font, anchor="lm")
        for column, cell in enumerate(row):
            fitted = _fit(cell, height, width)
            left = margin + column * (width + gap) + (width - fitted.shape[1]) // 2
            sheet.paste(Image.fromarray(fitted), (left, top + row_title_h + (height - fitted.shape[0]) // 2))
    return np.asarray(sheet)


def _fit(picture: Picture, height: int, width: int) -> Picture:
    scale = min(height / picture.shape[0], width / picture.shape[1])
    if scale == 1:
        return np.ascontiguousarray(picture)
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    # Whole-number enlargement shows the pixels as they are.
    enlarging = cv2.INTER_NEAREST if scale == int(scale) else cv2.INTER_LINEAR
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else enlarging)  # type: ignore[return-value]


def label_legend(spec: LabelSpec, present_ids: Iterable[int], *, width: int = 960) -> Picture:
    """Draw colour swatches and names of the classes ``present_ids``, in lines of ``width`` pixels: uint8 [H, W, 3]."""
    size = 14
    font, line_h, swatch, gap = _font(size), round(size * 1.9), size, size
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places: list[tuple[int, int, int, str]] = []
    x, line = gap, 0
    for train_id in sorted(set(present_ids)):
        text = _shortened(draw, spec.name(train_id), width - 3 * gap - swatch, font)
        taken = swatch + gap // 2 + math.ceil(draw.textlength(text, font)) + round(1.5 * gap)
        if x > gap and x + taken - gap // 2 > width:
            x, line = gap, line + 1
        places.append((x, line, train_id, text))
        x += taken
    legend = Image.new("RGB", (width, (line + 1) * line_h + gap), BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for x, line, train_id, text in places:
        middle = gap // 2 + line * line_h + line_h / 2
        box = (x, middle - swatch / 2, x + swatch, middle + swatch / 2)
        draw.rounded_rectangle(box, 3, tuple(spec.colours[train_id].tolist()), outline=(190, 192, 196))
        draw.text((x + swatch + gap // 2, middle), text, INK, font, anchor="lm")
    return np.asarray(legend)


def class_chart(spec: LabelSpec, shares: Sequence[float], *, width: int = 720) -> Picture:
    """Draw id, colour, name and share of pixels of every class, as rows with bars: uint8 [H, width, 3].

    Args:
        shares: of all pixels, 0..1, of each train id (don't-care last, if it is there).
    """
    font = _font(13)
    line_h, gap, left, bar_left = 20, 12, 80, 330
    chart = Image.new("RGB", (width, 2 * gap + line_h * len(shares)), BACKGROUND)
    draw = ImageDraw.Draw(chart)
    longest = max(max(shares, default=0.0), 1e-9)
    for train_id, share in enumerate(shares):
        middle = gap + line_h * (train_id + 0.5)
        colour = tuple(spec.colours[train_id].tolist())
        draw.text((36, middle), str(train_id), FAINT, font, anchor="rm")
        draw.rounded_rectangle((48, middle - 7, 68, middle + 7), 3, colour, outline=(190, 192, 196))
        name = _shortened(draw, spec.name(train_id), bar_left - left - gap, font)
        draw.text((left, middle), name, INK if share else FAINT, font, anchor="lm")
        end = bar_left + share / longest * (width - bar_left - 90)
        draw.rectangle((bar_left, middle - 6, end, middle + 6), colour, outline=(190, 192, 196))
        draw.text((end + 8, middle), f"{100 * share:.2f} %" if share else "never", FAINT, font, anchor="lm")
    return np.asarray(chart)


# ------------------------------------------------------------------------------------------------ curves

MAX_POINTS = 2000
SERIES_COLOURS = ("#3b6fb6", "#d9662b", "#3a9a5b", "#b8478f", "#7a5cc2", "#a98613", "#2b9fb0", "#7d7d7d")


def curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's metrics: one panel per group (what stands before the ``/`` of a key), over images seen.

    Args:
        metrics: the records of metrics.jsonl, oldest first: ``images_seen`` and numbers. Where a resumed run repeats
            a stretch, the later records stand.
        path: the picture to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _grouped(_last_course(metrics))
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


def _last_course(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records without those that a resumed run went through again."""
    course: list[Mapping[str, Any]] = []
    for record in metrics:
        seen = record.get("images_seen")
        if isinstance(seen, int | float):
            if course and seen < course[-1]["images_seen"]:
                course = [earlier for earlier in course if earlier["images_seen"] < seen]
            course.append(record)
    return course


def _grouped(course: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
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
    from matplotlib.ticker import EngFormatter, FuncFormatter

    panel.set_title(title.replace("_", " "), loc="left", fontsize=11, fontweight="bold", color="#26282b")
    panel.set_facecolor("white")
    levels = []
    for number, (name, (x, y)) in enumerate(series.items()):
        colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
        smooth = _smoothed(y)
        step = max(1, len(x) // MAX_POINTS)
        if not np.array_equal(smooth, y, equal_nan=True):
            panel.plot(x[::step], y[::step], color=colour, alpha=0.22, linewidth=0.9)
        last = f"{y[np.isfinite(y)][-1]:.4g}" if np.isfinite(y).any() else "not finite"
        style = {"marker": "o", "markersize": 4} if len(x) == 1 else {}
        dashes = "-" if number < len(SERIES_COLOURS) else "--"
        label = last if name == title else f"{name}  {last}"
        panel.plot(x[::step], smooth[::step], dashes, color=colour, linewidth=1.8, label=label, **style)  # type: ignore[arg-type]
        levels += [np.median(y[np.isfinite(y)])] if np.isfinite(y).any() else []
    everything = np.concatenate([y[np.isfinite(y)] for _, y in series.values()])
    if len(levels) > 1 and everything.min() > 0 and max(levels) > 30 * min(levels):
        panel.set_yscale("log")
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


def _smoothed(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over about 1/40 of the points, ends and non-finite values left out of the mean."""
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


# ------------------------------------------------------------------------------------------------ gallery


@dataclass(frozen=True)
class GalleryEntry:
    """One label map and the pictures made of it; paths are relative to the gallery's folder, with ``/``."""

    name: str
    label_map: str
    pictures: tuple[str, ...]


LABELS_FOLDER = "_labels"
"""Folder among generated pictures that holds the gallery's coloured label maps."""
ENTRIES_PER_PAGE = 240


def write_gallery(
    directory: Path,
    entries: Sequence[GalleryEntry],
    title: str,
    *,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> Path:
    """Write ``index.html`` (and ``index-2.html`` ... where there are many): label map and picture side by side.

    The pages need nothing but the pictures beside them: no script, no request elsewhere. A click enlarges a pair.

    Args:
        directory: where the pages go; entries' paths are relative to it.
        entries: in the order shown.
        title: heading, plain text.
        legend: (class name, RGB colour), shown on demand.
    Returns:
        The path of ``index.html``.
    """
    chunks = [entries[i : i + ENTRIES_PER_PAGE] for i in range(0, len(entries), ENTRIES_PER_PAGE)] or [()]
    names = ["index.html", *(f"index-{number}.html" for number in range(2, len(chunks) + 1))]
    swatches = "".join(
        f'<span><i style="background:rgb({r},{g},{b})"></i>{html.escape(name)}</span>' for name, (r, g, b) in legend
    )
    key = f"<details><summary>Classes</summary><div class=legend>{swatches}</div></details>" if swatches else ""
    for number, chunk in enumerate(chunks):
        links = "".join(
            f'<a href="{name}"{" class=here" if name == names[number] else ""}>{place}</a>'
            for place, name in enumerate(names, 1)
        )
        pages = f"<nav>{links}</nav>" if len(names) > 1 else ""
        figures = "\n".join(_figure(place, entry) for place, entry in enumerate(chunk))
        page = _PAGE.format(
            title=html.escape(title), style=_STYLE, count=f"{len(entries)} label map{'s' * (len(entries) != 1)}",
            legend=key, pages=pages, figures=figures,
        )  # fmt: skip
        write_bytes(directory / names[number], page.encode())
    return directory / "index.html"


def _figure(place: int, entry: GalleryEntry) -> str:
    name = html.escape(entry.name)
    number = 1 + len(entry.pictures)
    label_map = f'<img loading=lazy src="{_url(entry.label_map)}" alt="label map of {name}">'
    pictures = "".join(
        f'<img loading=lazy src="{_url(picture)}" alt="generated from {name}">' for picture in entry.pictures
    )
    return (
        f'<figure id="p{place}" style="--n:{number};--rows:{math.ceil(number / 4)}"><div>'
        f'<a class=open href="#p{place}">{label_map}{pictures}</a><a class=close href="#all" aria-label="Close"></a>'
        f'<figcaption><a href="{_url(entry.pictures[0])}">{name}</a></figcaption></div></figure>'
        if entry.pictures
        else f'<figure style="--n:1"><div><a>{label_map}</a><figcaption>{name}</figcaption></div></figure>'
    )


def _url(relative: str) -> str:
    # "./" keeps a first folder with a colon ("a:b/c.png") from being read as a scheme.
    return "./" + quote(relative)


_STYLE = """
:root { color-scheme: light dark; --bg: #fafaf9; --card: #fff; --ink: #26282b; --faint: #6b7078; --line: #e4e5e8 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #17181a; --card: #202225; --ink: #e8e9eb; --faint: #9aa0a8; --line: #33363b }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 2200px; padding: 28px 28px 60px; background: var(--bg); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
header { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: baseline; margin-bottom: 18px }
h1 { font-size: 21px; margin: 0; overflow-wrap: anywhere }
header p { margin: 0; color: var(--faint) }
a { color: inherit }
details { margin: 0 0 18px } summary { cursor: pointer; color: var(--faint) }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 10px 0; font-size: 13px }
.legend i { display: inline-block; width: 13px; height: 13px; margin-right: 6px; border-radius: 3px;
  vertical-align: -2px; border: 1px solid var(--line) }
nav { display: flex; flex-wrap: wrap; gap: 4px; margin: 14px 0 }
nav a { padding: 3px 10px; border: 1px solid var(--line); border-radius: 6px; text-decoration: none }
nav a.here { background: var(--ink); color: var(--bg) }
main { display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)) }
figure { margin: 0; min-width: 0 }
figure > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
.open { display: grid; gap: 2px; grid-template-columns: repeat(min(var(--n), 4), minmax(0, 1fr)); cursor: zoom-in }
img { display: block; width: 100%; height: auto; min-height: 40px; background: var(--line) }
figcaption { padding: 7px 12px; font-size: 13px; overflow-wrap: anywhere }
figcaption a { text-decoration: none; color: var(--faint) } figcaption a:hover { text-decoration: underline }
.close { display: none }
figure:target > div { position: fixed; inset: 0; z-index: 9; display: flex; flex-direction: column; gap: 12px;
  justify-content: center; padding: 24px; overflow: auto; border: 0; border-radius: 0; background: var(--bg) }
figure:target .open { cursor: auto; pointer-events: none; flex: 0 1 auto; min-height: 0; gap: 8px }
figure:target img { max-height: calc((100vh - 130px) / var(--rows)); object-fit: contain; background: none }
figure:target .close { display: block; position: fixed; inset: 0; cursor: zoom-out }
figure:target .close::after { content: "\\00d7"; position: absolute; top: 10px; right: 20px; font-size: 30px;
  text-decoration: none; color: var(--faint) }
figure:target figcaption { position: relative; align-self: center; font-size: 15px }
"""

_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<header><h1>{title}</h1><p>{count}: label map left, generated right</p></header>
{legend}{pages}
<main>
{figures}
</main>
{pages}
</html>
"""
