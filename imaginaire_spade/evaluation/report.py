"""Write a report as one JSON file: scores, their evaluation protocol, and warnings for the reader. Compare two.

The protocol is everything that two scores must share to be comparable. One model was reported with an FID of 71.8, 63,
57.6, 51.98 and 50.38 on one data set, because nobody could see this. The report page is one HTML file with scores,
protocol, classes and images; it loads nothing.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.evaluation.images import Ids, ImageSource, SourceImage
from imaginaire_spade.files import RgbImage, encode_image, read_json, refuse_special, write_bytes
from imaginaire_spade.pages import render

DTYPE = "uint8 pictures, float32 features, float64 statistics"
HIGHER_IS_BETTER = ("precision", "recall", "diversity", "accuracy", "miou", "iou")
"""A score whose name contains one of these; all others are distances."""


@dataclass(frozen=True)
class Protocol:
    """How scores were obtained. None: does not apply to what was measured (or, for the reference, is not known)."""

    version: str
    """Of imaginaire_spade."""
    reference_split: str
    """train or val."""
    reference: str
    """sha256 of the real images' keys, or of the file of statistics."""
    num_real: int | None
    num_fake: int
    real_size: str | None
    """HEIGHTxWIDTH, or how many sizes."""
    fake_size: str
    real_format: str | None
    fake_format: str
    geometry: str | None = None
    """How label maps (and photos of the same data) were cut and resized; None for stored images."""
    feature_network: str | None = None
    weights_sha256: str | None = None
    feature_dim: int | None = None
    resize: str | None = None
    """legacy (pytorch-fid's bilinear), clean (antialiased bicubic, clamped), bicubic antialiased or bicubic."""
    resized_to: int | None = None
    normalisation: str | None = None
    """Of pixels in 0..255 after that; None: Inception's."""
    dtype: str = DTYPE
    kid: str | None = None
    precision_recall: str | None = None
    diversity: str | None = None
    segmentation: str | None = None
    """Network or folder of id maps, with the sha256 of what it is."""
    ignore: str | None = None
    """What segmentation scores leave out."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    def stated(self) -> dict[str, Any]:
        """Return name and value of what applies."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    scores: Mapping[str, float]
    protocol: Protocol
    subject: Mapping[str, str]
    """What was evaluated: folders, checkpoint, images seen. No part of the protocol."""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Images that were left out (--skip_bad), one message each."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More than single numbers (scores per class); plain JSON types."""
    examples: Mapping[int, str] = field(default_factory=dict)
    """Class -> key of the sample that has most of it, for the report page; not saved."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    def save(self, path: Path) -> None:
        """Write JSON.

        Raises:
            UserError: the file cannot be written.
        """
        tree = asdict(self)
        del tree["examples"]
        write_bytes(path, (json.dumps(tree, indent=2) + "\n").encode())

    def text(self) -> str:
        """Return lines for the screen: the stamp, then the scores, then the warnings."""
        lines = ["protocol", *(f"  {name}: {value}" for name, value in self.protocol.stated().items())]
        lines += ["evaluated", *(f"  {name}: {value}" for name, value in self.subject.items())]
        lines += ["scores", *(f"  {name}: {value:.6g}" for name, value in self.scores.items())]
        lines += [f"left out: {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def load_report(path: Path) -> Report:
    """Read what ``save`` wrote.

    Raises:
        DataError: the file is no report, or states other things than this version does.
    """
    refuse_special(path)
    try:
        return TypeAdapter(Report).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{path}: not a report of this version of evaluate.py: {where}: {first['msg']}") from None


def compare(paths: tuple[Path, Path]) -> str:
    """Set the scores of two reports side by side.

    Raises:
        UserError: they were not obtained under one protocol, saying what differs; or they share no score.
    """
    a, b = (load_report(path) for path in paths)
    if different := differences(a.protocol, b.protocol):
        raise UserError(
            f"{paths[0]} and {paths[1]} were not obtained under one protocol; their scores cannot be compared:\n  "
            + "\n  ".join(different)
        )
    common = [name for name in a.scores if name in b.scores]
    if not common:
        raise UserError(f"{paths[0]} and {paths[1]} have no score in common")
    rows = [("", str(paths[0]), str(paths[1]), "")]
    for name in common:
        first, second = a.scores[name], b.scores[name]
        rows.append((name, f"{first:.6g}", f"{second:.6g}", _verdict(name, first, second)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def geometry_stamp(augmentations: AugmentationConfig) -> str:
    """Write an augmentation in one line: its keys, as JSON, other than the defaults."""
    changed = augmentations.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(changed) if changed else "own sizes"


def differences(a: Protocol, b: Protocol) -> list[str]:
    """List what differs, one line each; what only one of the two measured is no difference."""
    optional = ("geometry", "kid", "precision_recall", "diversity", "segmentation", "ignore")
    features = ("feature_network", "weights_sha256", "feature_dim", "resize", "resized_to", "normalisation")
    ours, theirs = asdict(a), asdict(b)
    skipped = {name for name in optional if ours[name] is None or theirs[name] is None}
    if a.feature_network is None or b.feature_network is None:
        skipped |= set(features)
    return [f"{n}: {ours[n]} / {theirs[n]}" for n in ours if n not in skipped and ours[n] != theirs[n]]


def higher_is_better(name: str) -> bool:
    """Tell whether a larger value of a score is the better one."""
    return any(word in name for word in HIGHER_IS_BETTER)


def _verdict(name: str, first: float, second: float) -> str:
    if not (math.isfinite(first) and math.isfinite(second)):
        return "no verdict: not a number"
    if name.endswith("_std") or math.isclose(first, second, rel_tol=1e-9):
        return ""
    return f"the {'first' if (first > second) == higher_is_better(name) else 'second'} is better"


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
