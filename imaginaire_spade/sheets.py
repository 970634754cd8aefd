"""Draw contact sheets and class charts: rows of images, or bars, under titles."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imaginaire_spade.files import RgbImage
from imaginaire_spade.labels import LabelSpec

BACKGROUND = (250, 250, 249)
INK = (38, 40, 43)
FAINT = (120, 124, 130)
BORDER = (190, 192, 196)
Colour = tuple[int, ...]
"""RGB, 0..255."""
NARROW_CELL = 120
"""A narrower cell, in pixels, has no room for its title, and the eye sees little in it."""


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    import matplotlib  # brings DejaVu Sans along: Latin, Greek, Cyrillic, the same on every machine

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _shorten(text: str, width: float, font: Any) -> str:
    """Replace the middle of a text that is wider than ``width`` pixels by an ellipsis."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 1 and font.getlength(short := f"{text[: kept // 2]}…{text[-(kept // 2) :]}") > width:
        kept -= 1
    return short if kept > 1 else "…"


def legend_of(spec: LabelSpec, label_maps: Iterable[NDArray[np.generic]]) -> list[tuple[str, Colour]]:
    """List name and colour of the classes that occur in maps of train ids [...]; none where the table has no names."""
    if not spec.names:
        return []
    found = sum(np.bincount(labels.ravel(), minlength=spec.num_classes + 1) for labels in label_maps)
    return [(spec.name(i), tuple(spec.colours[i].tolist())) for i in np.flatnonzero(found).tolist()]


def draw_contact_sheet(
    rows: Sequence[Sequence[RgbImage]],
    column_titles: Sequence[str],
    names: Sequence[Sequence[str]] = (),
    legend: Sequence[tuple[str, Colour]] = (),
) -> RgbImage:
    """Lay images out in rows of equal cells under column titles, on a light ground: uint8 [H, W, 3].

    A cell has the largest height and width, times a whole number where that is narrower than ``NARROW_CELL``. Images
    are enlarged to fit in, aspect ratio kept. Text that is too long loses its middle.

    Args:
        rows: the images; a short row leaves its last cells empty.
        column_titles: one per column.
        names: per row, those of its samples; those of the first row share the columns equally. They stand under the
            images.
        legend: texts and their colours, at the bottom, in as many lines as they need.
    """
    # Measures, from the size of a cell.
    cells = [cell for row in rows for cell in row]
    widest = max((cell.shape[1] for cell in cells), default=64)
    factor = math.ceil(NARROW_CELL / widest)
    height, width = factor * max((cell.shape[0] for cell in cells), default=64), factor * widest
    size = round(min(max(width / 18, 12), 24))
    font, bold, gap, margin, title_h = (
        _font(size),
        _font(size, True),
        max(size // 2, 6),
        max(size, 12),
        round(size * 1.9),
    )
    pitch, name_h, line_h = height + gap, round(size * 1.5) if names else 0, round(size * 1.7)
    pitch += name_h
    inner_w = len(column_titles) * (width + gap) - gap
    entry_w = min(inner_w, math.ceil(max((font.getlength(text) for text, _ in legend), default=0)) + size + gap)
    per_line = max(1, (inner_w + 2 * gap) // (entry_w + 2 * gap))
    legend_top = margin + title_h + len(rows) * pitch
    sheet_h = legend_top - gap + margin + (gap + line_h * math.ceil(len(legend) / per_line) if legend else 0)
    sheet = Image.new("RGB", (2 * margin + inner_w, sheet_h), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    # Column titles.
    for column, title in enumerate(column_titles):
        middle = margin + column * (width + gap) + width / 2
        draw.text((middle, margin + title_h * 0.4), _shorten(title, width, bold), INK, bold, anchor="mm")

    # Rows, with cells in the middle of their places, and names below.
    for number, row in enumerate(rows):
        top = margin + title_h + number * pitch
        for column, cell in enumerate(row):
            image = _enlarge(cell, height, width)
            left = margin + column * (width + gap) + (width - image.shape[1]) // 2
            sheet.paste(Image.fromarray(image), (left, top + (height - image.shape[0]) // 2))
        for place, name in enumerate(names[number] if names else ()):
            share = (inner_w + gap) // len(names[0])
            at = (margin + place * share, top + height + name_h / 2)
            draw.text(at, _shorten(name, share - gap, font), INK, font, anchor="lm")

    # The legend, in columns of one width.
    for place, (text, colour) in enumerate(legend):
        left = margin + place % per_line * (entry_w + 2 * gap)
        top = legend_top + place // per_line * line_h + (line_h - size) // 2
        draw.rectangle((left, top, left + size - 1, top + size - 1), colour, outline=BORDER)
        draw.text(
            (left + size + gap, top + size / 2), _shorten(text, entry_w - size - gap, font), INK, font, anchor="lm"
        )
    return np.asarray(sheet)


def _enlarge(image: RgbImage, height: int, width: int) -> RgbImage:
    """Enlarge an image to fit into a cell, aspect ratio kept."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    # Whole-number enlargement shows the pixels as they are.
    method = cv2.INTER_NEAREST if scale == int(scale) else cv2.INTER_LINEAR
    return cv2.resize(image, size, interpolation=method)  # type: ignore[return-value]


def draw_class_chart(spec: LabelSpec, shares: Sequence[float], *, width: int = 720) -> RgbImage:
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
        draw.rounded_rectangle((48, middle - 7, 68, middle + 7), 3, colour, outline=BORDER)
        name = _shorten(spec.name(train_id), bar_left - left - gap, font)
        draw.text((left, middle), name, INK if share else FAINT, font, anchor="lm")
        end = bar_left + share / longest * (width - bar_left - 90)
        draw.rectangle((bar_left, middle - 6, end, middle + 6), colour, outline=BORDER)
        draw.text((end + 8, middle), f"{100 * share:.2f} %" if share else "never", FAINT, font, anchor="lm")
    return np.asarray(chart)
