"""Write the gallery page of a folder of generated images: label maps and images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imaginaire_spade.files import write_bytes
from imaginaire_spade.inference.output import Output
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pages import render

OUTPUTS_PER_PAGE = 240


def write_gallery(directory: Path, outputs: Sequence[Output], title: str, labels: LabelSpec) -> Path:
    """Write ``index.html``, and ``index-2.html`` ... if there are many label maps.

    The pages need nothing but the images beside them: no script, no request elsewhere. A click enlarges an entry.

    Args:
        directory: the output folder.
        outputs: what to show, in this order.
        title: heading, plain text.
        labels: names and colours of the legend.
    Returns:
        The path of ``index.html``.
    Raises:
        UserError: a page cannot be written.
    """
    chunks = [outputs[i : i + OUTPUTS_PER_PAGE] for i in range(0, len(outputs), OUTPUTS_PER_PAGE)] or [()]
    names = ["index.html", *(f"index-{number}.html" for number in range(2, len(chunks) + 1))]
    for name, chunk in zip(names, chunks, strict=True):
        page = render(
            "gallery.html", title=title, count=len(outputs), labels=labels, outputs=chunk, pages=names, here=name
        )
        write_bytes(directory / name, page.encode())
    return directory / "index.html"
