"""Write the report page: one HTML file with scores, protocol, classes and images. It loads nothing."""

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from imaginaire_spade.evaluation.images import Ids, ImageSource, SourceImage
from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.files import RgbImage, encode_image, write_bytes
from imaginaire_spade.pages import render

MAX_WIDTH = 384
"""Pixels of an image's width on the page; larger ones are shrunk."""
OUTLINE = (217, 102, 43)
SHOWN = 12
"""Images in the grid."""
SHOWN_WORST = 8
"""Classes in the list of the worst."""

TITLES = {
    "fid": "FID", "kid": "KID", "miou": "Mean IoU", "pixel_accuracy": "Pixel accuracy", "precision": "Precision",
    "recall": "Recall", "diversity": "LPIPS diversity",
}  # fmt: skip
"""Score -> its usual name."""


def write_report_page(path: Path, report: Report, fake: ImageSource, photos: ImageSource | None = None) -> None:
    """Write the page of a report. Images are read again: some, spread over the data, and one for each class that falls
    far behind the real photos in IoU.

    Args:
        fake: the images that were scored.
        photos: of their label maps, where they are known.
    Raises:
        UserError: the file cannot be written.
    """
    segmentation = report.details.get("segmentation")
    behind = [c for c in segmentation["classes"] if c["iou_real"] - c["iou"] > 0] if segmentation else []
    worst_classes = sorted(behind, key=lambda c: c["iou"] - c["iou_real"])[:SHOWN_WORST]
    count = min(SHOWN, len(fake.keys))
    grid = [fake.keys[i * len(fake.keys) // count] for i in range(count)]
    wanted = list(dict.fromkeys([*grid, *(report.examples[c["id"]] for c in worst_classes)]))
    page = render(
        "report.html",
        report=report, titles=TITLES, labels=fake.label_table, segmentation=segmentation, worst_classes=worst_classes,
        grid=grid, generated=_read(fake, wanted), real=_read(photos, wanted) if photos else {},
        data_url=_data_url, highlight=_highlight,
    )  # fmt: skip
    write_bytes(path, page.encode())


def _read(source: ImageSource, keys: Sequence[str]) -> dict[str, SourceImage]:
    """Read those of ``keys`` that the source has and can read."""
    places = {key: index for index, key in enumerate(source.keys)}
    images = source.read([places[key] for key in keys if key in places])
    return {source.keys[index]: image for index, image in images if isinstance(image, SourceImage)}


def _data_url(image: RgbImage) -> str:
    """Encode an image as the ``src`` of an <img>, shrunk to the width of the page's images."""
    if (scale := MAX_WIDTH / image.shape[1]) < 1:
        size = (MAX_WIDTH, max(1, round(image.shape[0] * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return f"data:image/jpeg;base64,{base64.b64encode(encode_image(image, '.jpg', quality=88)).decode()}"


def _highlight(image: RgbImage, truth: Ids | None, train_id: int) -> RgbImage:
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
