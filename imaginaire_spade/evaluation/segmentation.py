"""Segmentation scores: does a segmentation network find in the generated pictures what the label maps asked for?

Owns the confusion matrix, the meaning of a segmenter's classes in the label table, and where predictions come from: a
network, or folders of predicted id maps. The score on the real photos of the same label maps always stands beside that
on the generated ones: it is what the segmenter can reach, and shows whether it was fed and mapped as it should be.

**Policy.** Pixels without a class (don't-care) do not count, neither do those of classes that the segmenter does not
know. A prediction outside the table counts as wrong. Classes that never occur in the label maps are left out of the
mean IoU. Predictions are compared at the size of the label map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_label
from imaginaire_spade.distributed import total_over_processes
from imaginaire_spade.errors import DataError
from imaginaire_spade.evaluation.label_names import LabelMapping, match_labels, read_mapping
from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import nearest_indices
from imaginaire_spade.pretrained.segmenters import Segmenter, hugging_face_segmenter

IGNORE_POLICY = "pixels without a class, or of a class that the segmenter lacks, are left out"

Ids = NDArray[np.generic]
"""Train ids [H, W]; the number of classes stands for "none of them"."""


@dataclass(frozen=True)
class Confusion:
    """How often a pixel of one class was taken for another. Sums of these over pictures and processes are exact."""

    counts: NDArray[np.int64]
    """[classes, classes + 1]: pixels of true class (row) by predicted class (column; the last: outside the table)."""
    ignored: int = 0
    """Pixels that were left out."""
    pictures: int = 0

    @classmethod
    def zero(cls, num_classes: int) -> Confusion:
        return cls(np.zeros((num_classes, num_classes + 1), np.int64))

    @classmethod
    def of(cls, truth: Ids, predicted: Ids, num_classes: int, unscored: Sequence[int] = ()) -> Confusion:
        """Of one label map and its prediction, train ids [H, W] 0..num_classes each.

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
        return Confusion(self.counts + other.counts, self.ignored + other.ignored, self.pictures + other.pictures)

    def summed_over_processes(self, device: torch.device) -> Confusion:
        """The sum of every process's matrix (a collective)."""
        flat = torch.from_numpy(np.append(self.counts.ravel(), [self.ignored, self.pictures])).to(device)
        total = total_over_processes(flat).cpu().numpy()
        return Confusion(total[:-2].reshape(self.counts.shape), int(total[-2]), int(total[-1]))

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
        """Intersection over union of every class [classes]; NaN for those that never occur in the label maps."""
        hits = np.diag(self.counts)
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        iou = np.full(len(hits), np.nan)
        np.divide(hits, union, out=iou, where=self.present)
        return iou

    @property
    def mean_iou(self) -> float:
        """Over the classes that occur; NaN where none does."""
        return float(self.iou[self.present].mean()) if self.present.any() else float("nan")


class Predictor(Protocol):
    """Where predictions come from."""

    unscored: tuple[int, ...]
    """Classes of the table that it cannot predict."""
    name: str
    """What the user called it."""
    stamp: str
    """What its predictions depend on; empty where nobody knows."""

    def __call__(self, key: str, picture: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        """Predicted train ids of ``size`` (height, width) of a sample's picture, RGB uint8 [H, W, 3]."""


class NetworkPredictions:
    """Predictions of a segmentation network."""

    def __init__(self, segmenter: Segmenter, mapping: LabelMapping) -> None:
        self.segmenter, self.mapping = segmenter, mapping
        self.unscored = mapping.unscored
        self.name = segmenter.model
        meaning = hashlib.sha256(mapping.train_ids.astype(np.int64).tobytes()).hexdigest()
        self.stamp = f"sha256 {segmenter.sha256}, input {segmenter.preprocessing}, labels {meaning[:16]}"

    def __call__(self, key: str, picture: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        return self.mapping.train_ids[self.segmenter.label(picture, size)]


def network_predictions(
    model: str, mapping_file: str | Path | None, labels: LabelSpec, device: torch.device, flag: str
) -> NetworkPredictions:
    """Predictions of a Hugging Face model in the classes of a label table.

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
    stamp = ""

    def __init__(self, folder: Path, labels: LabelSpec) -> None:
        self.folder, self.labels, self.name = folder, labels, str(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of predicted id maps")
        self._source = FolderSource(folder, ["seg_maps"], bare=True)
        self._keys = set(self._source.keys)

    def check(self, keys: Sequence[str]) -> None:
        """Raises DataError where a sample has no prediction."""
        if missing := [key for key in keys if key not in self._keys]:
            raise DataError(
                f"{self.folder}: no predicted id map for {len(missing)} of {len(keys)} samples, such as {missing[0]}."
                f" Expected {self.folder / missing[0]}.png"
            )

    def __call__(self, key: str, picture: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        where = self._source.describe(key, "seg_maps")
        ids = self.labels.to_train_ids(decode_label(self._source.read(key, "seg_maps"), where), where)
        rows, columns = (nearest_indices(a, b).numpy() for a, b in zip(ids.shape, size, strict=True))
        return ids[rows][:, columns]


class SegmentationMetric:
    """Adds up the confusion matrices of the generated pictures and of the real photos of the same label maps.

    Args:
        generated, real: what predicts the classes of the one and the other.
    """

    def __init__(self, labels: LabelSpec, generated: Predictor, real: Predictor) -> None:
        assert (generated.unscored, generated.stamp) == (real.unscored, real.stamp), "one segmenter judges both"
        self.labels, self.unscored = labels, generated.unscored
        self._predictors = {"generated": generated, "real": real}
        self.confusions = {kind: Confusion.zero(labels.num_classes) for kind in self._predictors}

    def check(self, keys: Sequence[str]) -> None:
        """Raises DataError where a prediction is to come from a file that is not there."""
        for predictor in self._predictors.values():
            if isinstance(predictor, StoredPredictions):
                predictor.check(keys)

    def add(self, kind: str, key: str, picture: NDArray[np.uint8], truth: Ids) -> float:
        """Count one picture in.

        Args:
            kind: "generated" or "real".
            picture: RGB uint8 [H, W, 3].
            truth: train ids of the label map, of a size of its own.
        Returns:
            The picture's own mean IoU (NaN where no pixel counts).
        """
        predicted = self._predictors[kind](key, picture, (truth.shape[0], truth.shape[1]))
        one = Confusion.of(truth, predicted, self.labels.num_classes, self.unscored)
        self.confusions[kind] += one
        return one.mean_iou

    def sum_over_processes(self, device: torch.device) -> None:
        """Replace each matrix by the sum of every process's (a collective)."""
        for kind, confusion in self.confusions.items():
            self.confusions[kind] = confusion.summed_over_processes(device)

    def stamp(self) -> str:
        """What the scores depend on beside the pictures. Of stored id maps that is known only by what they say of the
        real photos."""
        predictor = self._predictors["real"]
        return predictor.stamp or f"id maps, {hashlib.sha256(self.confusions['real'].counts.tobytes()).hexdigest()}"

    def scores(self) -> dict[str, float]:
        """Pixel accuracy and mean IoU of both, by name."""
        scores: dict[str, float] = {}
        for kind, ending in (("generated", ""), ("real", "_real")):
            confusion = self.confusions[kind]
            scores |= {f"pixel_accuracy{ending}": confusion.pixel_accuracy, f"miou{ending}": confusion.mean_iou}
        return scores

    def added_to(self, report: Report) -> Report:
        """A report with these scores, their stamp and their details."""
        fakes, photos = (self.confusions[kind].pictures for kind in ("generated", "real"))
        warning = f"segmentation: {fakes} generated images, but {photos} of their photos could be read"
        return replace(
            report,
            warnings=report.warnings if fakes == photos else (*report.warnings, warning),
            scores={**report.scores, **self.scores()},
            protocol=replace(report.protocol, segmentation=self.stamp(), ignore=IGNORE_POLICY),
            details={**report.details, "segmentation": self.details()},
        )

    def details(self) -> dict[str, Any]:
        """What is behind the scores, for a report: plain types only."""
        generated, real = self.confusions["generated"], self.confusions["real"]
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
            "pictures": generated.pictures,
            "pixels": generated.pixels,
            "ignored_pixels": generated.ignored,
            "classes": classes,
            "absent_classes": [names[index] for index in absent],
            "unscored_classes": [names[index] for index in self.unscored],
        }


def _mistaken_for(confusion: Confusion, index: int, names: Sequence[str]) -> str | None:
    """The class that most of a class's missed pixels were taken for."""
    wrong = confusion.counts[index].copy()
    wrong[index] = 0
    return names[int(wrong.argmax())] if wrong.any() else None
