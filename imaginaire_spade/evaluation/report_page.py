"""Write the report page: one HTML file with scores, protocol, classes and images. It loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.files import RgbImage, encode_image, write_bytes
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pages import render

MAX_WIDTH = 384
"""Pixels of an image's width on the page; larger ones are shrunk."""
OUTLINE = (217, 102, 43)
SHOWN_WORST = 8
"""Classes in the list of the worst."""

TITLES = {
    "fid": "FID", "kid": "KID", "miou": "Mean IoU", "pixel_accuracy": "Pixel accuracy", "precision": "Precision",
    "recall": "Recall", "diversity": "LPIPS diversity",
}  # fmt: skip
"""Score -> its usual name."""


@dataclass(frozen=True)
class Example:
    """One sample on the page: RGB uint8 [H, W, 3] each, of any sizes."""

    key: str
    generated: RgbImage
    real: RgbImage | None = None
    truth: NDArray[np.generic] | None = None
    """Train ids [H, W]."""


def worst_classes(details: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the classes of a report that fall furthest behind the real photos in IoU, worst first."""
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
        labels: the label table, if there are label maps.
    Raises:
        UserError: the file cannot be written.
    """
    segmentation = report.details.get("segmentation")
    page = render(
        "report.html",
        report=report, titles=TITLES, examples=examples, labels=labels,
        segmentation=segmentation, worst_classes=worst_classes(segmentation) if segmentation else [], worst=worst or {},
        data_url=_data_url, highlight=_highlight,
    )  # fmt: skip
    write_bytes(path, page.encode())


def _data_url(image: RgbImage) -> str:
    """Encode an image as the ``src`` of an <img>, shrunk to the width of the page's images."""
    if (scale := MAX_WIDTH / image.shape[1]) < 1:
        size = (MAX_WIDTH, max(1, round(image.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return f"data:image/jpeg;base64,{base64.b64encode(encode_image(image, '.jpg', quality=88)).decode()}"


def _highlight(image: RgbImage, truth: NDArray[np.generic] | None, train_id: int) -> RgbImage:
    """Outline a class, and make the image pale and grey where the label map has another one."""
    if truth is None:
        return image
    size = (image.shape[1], image.shape[0])
    inside = cv2.resize((truth == train_id).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    outline = cv2.dilate(inside, np.ones((3, 3), np.uint8)) != inside
    grey = image.mean(2, keepdims=True) * 0.3 + 165
    highlighted = np.where(inside[..., None], image, grey.astype(np.uint8))
    highlighted[outline] = OUTLINE
    return highlighted
