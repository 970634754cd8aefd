"""Render the HTML pages of this folder: templates, and the style sheet that they share."""

import math
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: object) -> str:
    """Render ``template``, such as ``gallery.html``: one self-contained page. Texts among ``values`` are escaped."""
    pages = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"url": _quote_url, "number": _format_number, "columns": _count_columns}
    return environment.get_template(template).render(values)


def _quote_url(path: str) -> str:
    """Quote a relative path. "./" keeps a first folder with a colon ("a:b/c.png") from being read as a scheme."""
    return "./" + quote(path)


def _format_number(value: float, digits: int | None = None) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def _count_columns(cells: int) -> int:
    """Return in how many columns cells are laid out: in one row, or so that rows are full or lack one cell."""
    return cells if cells <= 6 else min((6, 5, 4, 3), key=lambda columns: (max(0, -cells % columns - 1), -columns))
