"""Compute segmentation scores: does a segmentation network find in the generated images what the label maps asked for?

Owns the confusion matrix and where predictions come from: a network, or folders of predicted id maps. The score of the
real photos of the same label maps always stands beside that of the generated images: it is what the segmenter can
reach, and shows whether it was fed and mapped as it should be.

**Policy.** Pixels without a class (don't-care) do not count, neither do those of classes that the segmenter does not
know. A prediction outside the table counts as wrong. Classes that never occur in the label maps are left out of the
mean IoU. Predictions are compared at the size of the label map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_label
from imaginaire_spade.errors import DataError
from imaginaire_spade.evaluation.images import Ids, SourceImage
from imaginaire_spade.evaluation.label_names import LabelMapping, match_labels, read_mapping
from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.files import resize_image
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import nearest_indices
from imaginaire_spade.pretrained.segmenters import Segmenter, hugging_face_segmenter

IGNORE_POLICY = "pixels without a class, or of a class that the segmenter lacks, are left out"


@dataclass(frozen=True)
class Confusion:
    """How often a pixel of one class was taken for another. Sums of these over images and processes are exact."""

    counts: NDArray[np.int64]
    """[classes, classes + 1]: pixels of true class (row) by predicted class (column; the last: outside the table)."""
    ignored: int = 0
    """Pixels that were left out."""
    images: int = 0

    @classmethod
    def zero(cls, num_classes: int) -> Confusion:
        return cls(np.zeros((num_classes, num_classes + 1), np.int64))

    @classmethod
    def of(cls, truth: Ids, predicted: Ids, num_classes: int, unscored: Sequence[int] = ()) -> Confusion:
        """Compare one label map and its prediction, train ids [H, W] 0..num_classes each.

        Args:
            unscored: true classes that are left out, as don't-care is.
        """
        assert truth.shape == predicted.shape, (truth.shape, predicted.shape)
        true, guess = truth.astype(np.int64).ravel(), predicted.astype(np.int64).ravel()
        left_out = np.zeros(num_classes + 1, bool)
        left_out[[*unscored, num_classes]] = True
        counted = ~left_out[true]
        pairs = true[counted] * (num_classes + 1) + guess[counted]
        counts = np.bincount(pairs, minlength=num_classes * (num_classes + 1))
        return cls(counts.reshape(num_classes, num_classes + 1), int(true.size - counted.sum()), 1)

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts, self.ignored + other.ignored, self.images + other.images)

    @property
    def pixels(self) -> int:
        """Pixels that count."""
        return int(self.counts.sum())

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which classes occur in the label maps: [classes]."""
        return self.counts.sum(1) > 0

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels whose class was found; NaN where no pixel counts."""
        return float(np.trace(self.counts) / self.pixels) if self.pixels else float("nan")

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of every class, [classes]; NaN for those that never occur in the label maps."""
        hits = np.diag(self.counts)
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        iou = np.full(len(hits), np.nan)
        np.divide(hits, union, out=iou, where=self.present)
        return iou

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur; NaN where none does."""
        return float(self.iou[self.present].mean()) if self.present.any() else float("nan")


class NetworkPredictions:
    """Predictions of a segmentation network."""

    def __init__(self, segmenter: Segmenter, mapping: LabelMapping) -> None:
        self.segmenter, self.mapping = segmenter, mapping
        self.unscored = mapping.unscored
        """Classes of the table that the network does not know."""
        self.name = segmenter.model
        meaning = hashlib.sha256(mapping.train_ids.astype(np.int64).tobytes()).hexdigest()
        self.stamp = f"sha256 {segmenter.sha256}, input {segmenter.preprocessing}, labels {meaning[:16]}"
        """What the predictions depend on."""

    def __call__(self, key: str, image: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        """Predict train ids of ``size`` (height, width) for an image, RGB uint8 [H, W, 3]."""
        return self.mapping.train_ids[self.segmenter.label(image, size)]


def network_predictions(
    model: str, mapping_file: str | Path | None, labels: LabelSpec, device: torch.device, flag: str
) -> NetworkPredictions:
    """Load a Hugging Face model that predicts the classes of a label table.

    Args:
        mapping_file: what ``label_names.read_mapping`` reads; None: labels are matched by name.
        flag: what to call the model's setting in messages.
    Raises:
        ConfigError: the model cannot be used, or its labels do not match the table.
    """
    segmenter = hugging_face_segmenter(model, device, flag)
    stated = None if mapping_file is None else read_mapping(Path(mapping_file))
    return NetworkPredictions(segmenter, match_labels(segmenter.names, labels, stated, model))


class StoredPredictions:
    """Predicted id maps of a folder: ``FOLDER/KEY.png`` with the ids that the label maps have too.

    Raises:
        DataError: no such folder, or nothing in it.
    """

    unscored: tuple[int, ...] = ()
    stamp = ""  # nobody knows

    def __init__(self, folder: Path, labels: LabelSpec) -> None:
        self.folder, self.labels, self.name = folder, labels, str(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of predicted id maps")
        self._source = FolderSource(folder, ["seg_maps"], bare=True)
        self._keys = set(self._source.keys)

    def check(self, keys: Sequence[str]) -> None:
        """Check that every sample has a prediction.

        Raises:
            DataError: one has none.
        """
        if missing := [key for key in keys if key not in self._keys]:
            raise DataError(
                f"{self.folder}: no predicted id map for {len(missing)} of {len(keys)} samples, such as {missing[0]}."
                f" Expected {self.folder / missing[0]}.png"
            )

    def __call__(self, key: str, image: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        """Read the train ids predicted for ``key``, at ``size`` (height, width)."""
        where = self._source.describe(key, "seg_maps")
        ids = self.labels.to_train_ids(decode_label(self._source.read(key, "seg_maps"), where), where)
        rows, columns = (nearest_indices(a, b).numpy() for a, b in zip(ids.shape, size, strict=True))
        return ids[rows][:, columns]


Predictor = NetworkPredictions | StoredPredictions


class Segmentation:
    """Judge generated images, and the real photos of the same label maps, by one segmenter.

    Args:
        generated, real: what predicts the classes of the one and the other.
    """

    def __init__(self, labels: LabelSpec, generated: Predictor, real: Predictor) -> None:
        assert (generated.unscored, generated.stamp) == (real.unscored, real.stamp), "one segmenter judges both"
        self.labels, self.unscored = labels, generated.unscored
        self._predictors: dict[str, Predictor] = {"generated": generated, "real": real}

    def check(self, keys: Sequence[str]) -> None:
        """Check that predictions that come from files are there.

        Raises:
            DataError: a sample has none.
        """
        for predictor in self._predictors.values():
            if isinstance(predictor, StoredPredictions):
                predictor.check(keys)

    def judge(self, kind: str, key: str, image: SourceImage, size: tuple[int, int] | None = None) -> Confusion:
        """Compare the prediction for an image with its label map, at the size of the label map.

        Args:
            kind: "generated" or "real".
            size: (height, width) to which the image is resized before; None: as it is.
        """
        rgb, truth = image.rgb(), image.labels()
        if size is not None:
            rgb = resize_image(rgb, *size)
        predicted = self._predictors[kind](key, rgb, (truth.shape[0], truth.shape[1]))
        return Confusion.of(truth, predicted, self.labels.num_classes, self.unscored)

    @property
    def stamp(self) -> str:
        """Everything that the scores depend on beside the images; empty where nobody knows."""
        return self._predictors["real"].stamp

    def add_to(self, report: Report, generated: Confusion | None, real: Confusion | None) -> Report:
        """Return a report with pixel accuracy and mean IoU of both, their stamp and their details.

        Args:
            generated, real: sums over the images; None: there was none to judge.
        """
        nothing = Confusion.zero(self.labels.num_classes)
        generated, real = generated or nothing, real or nothing
        scores = dict(report.scores)
        for confusion, ending in ((generated, ""), (real, "_real")):
            scores |= {f"pixel_accuracy{ending}": confusion.pixel_accuracy, f"miou{ending}": confusion.mean_iou}
        warnings = [*report.warnings]
        if generated.images != real.images:
            warnings.append(
                f"segmentation: {generated.images} generated images, but {real.images} of their photos could be read"
            )
        # Of stored id maps only what they say of the real photos is known.
        stamp = self.stamp or f"id maps, {hashlib.sha256(real.counts.tobytes()).hexdigest()}"
        return replace(
            report,
            scores=scores,
            warnings=tuple(warnings),
            protocol=replace(report.protocol, segmentation=stamp, ignore=IGNORE_POLICY),
            details={**report.details, "segmentation": self.details(generated, real)},
        )

    def details(self, generated: Confusion, real: Confusion) -> dict[str, Any]:
        """Say what is behind the scores, for a report: plain types only."""
        names = [self.labels.name(index) for index in range(self.labels.num_classes)]
        share = generated.counts.sum(1) / max(1, generated.pixels)
        classes = [
            {
                "id": index,
                "name": names[index],
                "share": float(share[index]),
                "iou": float(generated.iou[index]),
                "iou_real": float(real.iou[index]),
                "mistaken_for": _mistaken_for(generated, index, [*names, "what the table lacks"]),
            }
            for index in np.flatnonzero(generated.present).tolist()
        ]
        absent = [i for i in np.flatnonzero(~generated.present).tolist() if i not in self.unscored]
        return {
            "segmenter": self._predictors["generated"].name,
            "pictures": generated.images,
            "pixels": generated.pixels,
            "ignored_pixels": generated.ignored,
            "classes": classes,
            "absent_classes": [names[index] for index in absent],
            "unscored_classes": [names[index] for index in self.unscored],
        }


def _mistaken_for(confusion: Confusion, index: int, names: Sequence[str]) -> str | None:
    """Name the class that most of a class's missed pixels were taken for."""
    wrong = confusion.counts[index].copy()
    wrong[index] = 0
    return names[int(wrong.argmax())] if wrong.any() else None
