"""Write the report page: one HTML file with scores, protocol, classes and images. It loads nothing."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.files import write_bytes
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pictures import Picture, encode_picture

MAX_WIDTH = 384
"""Pixels of a picture's width on the page; larger ones are shrunk."""
OUTLINE = (217, 102, 43)
SHOWN_WORST = 8
"""Classes in the list of the worst."""

TITLES = {
    "fid": "FID", "kid": "KID", "miou": "Mean IoU", "pixel_accuracy": "Pixel accuracy", "precision": "Precision",
    "recall": "Recall", "diversity": "LPIPS diversity",
}  # fmt: skip
"""Score -> what people call it."""


@dataclass(frozen=True)
class Example:
    """One sample on the page: RGB uint8 [H, W, 3] each, of sizes of their own."""

    key: str
    generated: Picture
    real: Picture | None = None
    truth: NDArray[np.generic] | None = None
    """Train ids [H, W]."""


def worst_classes(details: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The classes of a report that fall furthest behind the real photos in IoU, worst first."""
    classes = [c for c in details["classes"] if c["iou_real"] - c["iou"] > 0]
    return sorted(classes, key=lambda c: c["iou"] - c["iou_real"])[:SHOWN_WORST]


def write_report_page(
    path: Path,
    report: Report,
    examples: Sequence[Example] = (),
    worst: Mapping[int, Example] | None = None,
    labels: LabelSpec | None = None,
) -> None:
    """Write the page of a report.

    Args:
        examples: samples for the grid.
        worst: class -> a sample that shows it, for the list of the worst.
        labels: the label table, where there are label maps.
    Raises:
        UserError: the file cannot be written.
    """
    segmentation = report.details.get("segmentation")
    sections = [_header(report), _warnings(report), _scores(report)]
    if segmentation:
        sections += [_worst(segmentation, worst or {}, labels), _classes(segmentation, labels)]
    sections += [_grid(examples, labels), _table("How it was measured", _stamp(report))]
    page = _PAGE.format(title=html.escape(_title(report)), style=_STYLE, body="\n".join(filter(None, sections)))
    write_bytes(path, page.encode())


# ------------------------------------------------------------------------------------------------ sections


def _title(report: Report) -> str:
    return f"Evaluation of {report.subject.get('fake', 'generated pictures')}"


def _header(report: Report) -> str:
    count = report.protocol.num_fake
    facts = "".join(
        f"<div><dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in report.subject.items()
    )
    return f"<header><h1>Evaluation of {count} generated pictures</h1><dl>{facts}</dl></header>"


def _warnings(report: Report) -> str:
    items = [*report.warnings, *(f"left out: {problem}" for problem in report.problems)]
    return f"<ul class=warnings>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>" if items else ""


def _scores(report: Report) -> str:
    cards = []
    for name, value in report.scores.items():
        if name.endswith(("_real", "_std")):
            continue
        note = ""
        if f"{name}_real" in report.scores:
            note = f"real photos: {_number(report.scores[f'{name}_real'])}"
        elif f"{name}_std" in report.scores:
            note = f"&plusmn; {_number(report.scores[f'{name}_std'])}"
        title = TITLES.get(name, name.replace("_", " "))
        cards.append(f"<div class=card><h3>{html.escape(title)}</h3><b>{_number(value)}</b><p>{note}</p></div>")
    return f"<section class=cards>{''.join(cards)}</section>"


def _classes(segmentation: Mapping[str, Any], labels: LabelSpec | None) -> str:
    classes = sorted(segmentation["classes"], key=lambda c: -c["share"])
    rows = "".join(
        f"<li>{_swatch(c['id'], labels)}<span class=name>{html.escape(c['name'])}</span>"
        f"<span class=share>{100 * c['share']:.2f}&thinsp;%</span>{_bar(c)}"
        f"<span class=value>{_number(c['iou'], 2)} <i>/ {_number(c['iou_real'], 2)}</i></span></li>"
        for c in classes
    )
    notes = [
        f"{name}: {', '.join(segmentation[key])}"
        for name, key in (("Never in the label maps", "absent_classes"), ("Not scored", "unscored_classes"))
        if segmentation[key]
    ]
    left_out = "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)
    return (
        "<section><h2>Intersection over union of every class</h2><p class=note>Commonest class first, with its share of"
        " the scored pixels. <span class=key><i class=bar></i> generated</span> <span class=key><i class=tick></i>"
        f" real photos, by the same segmenter</span></p><ul class=classes>{rows}</ul>{left_out}</section>"
    )


def _bar(c: Mapping[str, Any]) -> str:
    """A bar for the generated pictures' IoU and a mark at that of the real photos, on a scale from 0 to 1."""
    label = f"{c['name']}: IoU {_number(c['iou'], 3)} generated, {_number(c['iou_real'], 3)} real"
    real = "" if math.isnan(c["iou_real"]) else f'<rect class=tick x="{100 * c["iou_real"]:.2f}%" width=2 height=18 />'
    return (
        f'<svg role=img aria-label="{html.escape(label)}" width="100%" height=18><title>{html.escape(label)}</title>'
        f'<rect class=track y=4 width="100%" height=10 rx=2 />'
        f'<rect class=bar y=4 width="{100 * c["iou"]:.2f}%" height=10 rx=2 />{real}</svg>'
    )


def _worst(segmentation: Mapping[str, Any], samples: Mapping[int, Example], labels: LabelSpec | None) -> str:
    items = []
    for c in worst_classes(segmentation):
        taken = f", most often taken for <b>{html.escape(c['mistaken_for'])}</b>" if c["mistaken_for"] else ""
        pictures = ""
        if sample := samples.get(c["id"]):
            shown = [("real", sample.real), ("generated", sample.generated)]
            pictures = "".join(
                _image(_lit(picture, sample.truth, c["id"]), f"{c['name']} in {sample.key}, {kind}")
                for kind, picture in shown
                if picture is not None
            )
            pictures = f"<div class=pair>{pictures}</div><p class=note>{html.escape(sample.key)}: real, generated</p>"
        items.append(
            f"<div class=card><h3>{_swatch(c['id'], labels)}{html.escape(c['name'])}</h3><p>IoU"
            f" <b>{_number(c['iou'], 3)}</b>, real photos {_number(c['iou_real'], 3)}{taken}</p>{pictures}</div>"
        )
    return (
        "<section><h2>Worst classes</h2><p class=note>Furthest behind the real photos. Each with the sample that has"
        f" most of it, the rest of the picture pale.</p><div class=worst>{''.join(items)}</div></section>"
        if items
        else ""
    )


def _grid(examples: Sequence[Example], labels: LabelSpec | None) -> str:
    figures = []
    for example in examples:
        coloured = None if example.truth is None or labels is None else labels.colourise(example.truth)
        shown = [("label map", coloured), ("real", example.real), ("generated", example.generated)]
        images = "".join(_image(p, f"{kind}: {example.key}") for kind, p in shown if p is not None)
        figures.append(f"<figure><div>{images}</div><figcaption>{html.escape(example.key)}</figcaption></figure>")
    columns = "label map, real photo, generated" if labels is not None else "real photo, generated"
    return (
        f"<section><h2>Pictures</h2><p class=note>{columns}; spread evenly over the data.</p>"
        f"<div class=grid>{''.join(figures)}</div></section>"
        if figures
        else ""
    )


def _stamp(report: Report) -> dict[str, Any]:
    return {name: value for name, value in report.protocol.to_json().items() if value is not None}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return (
        f"<section><h2>{title}</h2><p class=note>Scores may be compared only where all of this is the same"
        f" (evaluate.py --compare sees to that).</p><table>{lines}</table></section>"
    )


# ------------------------------------------------------------------------------------------------ parts


def _number(value: float, digits: int | None = None) -> str:
    if math.isnan(value):
        return "&ndash;"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def _swatch(index: int, labels: LabelSpec | None) -> str:
    if labels is None:
        return ""
    red, green, blue = labels.colours[index].tolist()
    return f'<i class=swatch style="background:rgb({red},{green},{blue})"></i>'


def _image(picture: Picture, name: str) -> str:
    scale = min(1.0, MAX_WIDTH / picture.shape[1])
    if scale < 1:
        size = (MAX_WIDTH, max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    jpeg = encode_picture(picture, ".jpg", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return f'<img alt="{html.escape(name)}" title="{html.escape(name)}" src="{source}">'


def _lit(picture: Picture, truth: NDArray[np.generic] | None, index: int) -> Picture:
    """The picture, pale and grey where the label map has another class, with a line around the class."""
    if truth is None:
        return picture
    size = (picture.shape[1], picture.shape[0])
    inside = cv2.resize((truth == index).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outline = cv2.dilate(inside, np.ones((3, 3), np.uint8)) != inside
    grey = picture.mean(2, keepdims=True) * 0.3 + 165
    lit = np.where(inside[..., None], picture, grey.astype(np.uint8))
    lit[outline] = OUTLINE
    return lit


_STYLE = """
:root { color-scheme: light dark; --bg: #fafaf9; --card: #fff; --ink: #26282b; --faint: #6b7078; --line: #e4e5e8;
  --bar: #3b6fb6; --track: #eceef1; --warn: #fff6df; --warn-line: #ecd9a0 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #17181a; --card: #202225; --ink: #e8e9eb; --faint: #9aa0a8; --line: #33363b; --bar: #6f9fe0;
    --track: #2c2f34; --warn: #35301f; --warn-line: #5e5330 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 28px 28px 60px; background: var(--bg); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 22px; margin: 0 0 10px } h2 { font-size: 17px; margin: 0 0 4px } h3 { font-size: 14px; margin: 0 }
section { margin-top: 36px } .note { margin: 0 0 12px; color: var(--faint); font-size: 13.5px }
dl { margin: 0; display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 14px } dl div { display: flex; gap: 7px }
dt { color: var(--faint) } dd { margin: 0; overflow-wrap: anywhere }
.warnings { margin: 20px 0 0; padding: 12px 14px 12px 32px; background: var(--warn); border: 1px solid var(--warn-line);
  border-radius: 10px; overflow-wrap: anywhere }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); margin-top: 22px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; min-width: 0 }
.cards h3 { color: var(--faint); font-weight: 500; overflow-wrap: anywhere } .cards b { font-size: 26px }
.card p { margin: 0; font-size: 13.5px; overflow-wrap: anywhere } .cards p { color: var(--faint); min-height: 1.45em }
.classes { list-style: none; margin: 0; padding: 0 }
.classes li { display: grid; grid-template-columns: 16px minmax(90px, 180px) 66px minmax(80px, 1fr) 92px; gap: 10px;
  align-items: center; padding: 2px 0; font-size: 14px }
.classes .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.share, .value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.share, .value i { color: var(--faint); font-style: normal; font-size: 13px }
svg { display: block; overflow: visible } rect.track { fill: var(--track) } rect.bar { fill: var(--bar) }
rect.tick { fill: var(--ink) }
.key { white-space: nowrap; margin-left: 10px }
.key i { display: inline-block; vertical-align: -1px; margin-right: 3px }
i.bar { width: 22px; height: 10px; border-radius: 2px; background: var(--bar) }
i.tick { width: 2px; height: 14px; background: var(--ink) }
.swatch { display: inline-block; width: 14px; height: 14px; border-radius: 3px; border: 1px solid var(--line);
  vertical-align: -2px } h3 .swatch { margin-right: 7px }
.worst { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)) }
.worst .note { margin: 5px 0 0; font-size: 12.5px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; margin-top: 9px }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)) }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
figure div { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 2px }
figcaption { padding: 6px 12px; font-size: 13px; color: var(--faint); overflow-wrap: anywhere }
img { display: block; width: 100%; height: auto; background: var(--line) } .pair img { border-radius: 4px }
table { border-collapse: collapse; font-size: 14px; width: 100% }
th { text-align: left; font-weight: 500; color: var(--faint); white-space: nowrap; width: 1%; vertical-align: top }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line) } td { overflow-wrap: anywhere }
@media (max-width: 620px) {
  body { padding: 18px 14px 40px } .key { margin-left: 0 }
  .classes li { grid-template-columns: 16px 1fr auto; gap: 0 10px; padding: 4px 0 }
  .classes .share { display: none } .classes svg { grid-column: 1 / -1; grid-row: 2 }
  tr, th, td { display: block; width: auto; white-space: normal } th { border: 0; padding-bottom: 0 }
}
"""

_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
{body}
</html>
"""
