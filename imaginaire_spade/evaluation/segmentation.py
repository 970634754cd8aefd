"""Compute segmentation scores: does a segmentation network find in the generated images what the label maps asked for?

Responsible for the confusion matrix, where predictions come from (a network, or folders of predicted id maps), and how
the classes of a network are matched to the label table: by name, and by a file that states what names do not. The score
of the real photos of the same label maps always stands beside that of the generated images: it is what the segmenter
can reach, and shows whether it was fed and mapped as it should be.

**Policy.** Pixels without a class (don't-care) do not count, neither do those of classes that the segmenter does not
know. A prediction outside the table counts as wrong. Classes that never occur in the label maps are left out of the
mean IoU. Predictions are compared at the size of the label map.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imaginaire_spade.config_files import read_yaml
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.evaluation.images import Ids, SourceImage
from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.files import read_text, resize_image
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import nearest_indices
from imaginaire_spade.pretrained.segmenters import Segmenter, hugging_face_segmenter
from imaginaire_spade.registry import did_you_mean

IGNORE_POLICY = "pixels without a class, or of a class that the segmenter lacks, are left out"
FLAG = "--segmenter_labels"
"""Gives the file of a mapping; for messages."""


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


# ------------------------------------------------------------------------------------ the classes of a network


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    content = read_yaml(read_text(path, ConfigError, f"{FLAG} {path}: cannot be read"), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{FLAG} {path}: must be a mapping, class of the label table: label of the segmenter")
    return content


def match_labels(
    names: Sequence[str], labels: LabelSpec, stated: Mapping[Any, Any] | None = None, model: str = "the segmenter"
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Find the segmenter's labels for every class of the table: as ``stated``, else by name (upper or lower case,
    spaces, hyphens and underscores do not matter; of "door, double door" the first). Where neither side has names, by
    id.

    Args:
        names: the segmenter's labels.
        stated: class of the table (name or id) -> label of the segmenter (name or id), or several of them, or None for
            a class that is not to be scored.
    Returns:
        Id of the segmenter -> train id (the table's number of classes where it has no such class); the classes of the
        table that the segmenter does not know.
    Raises:
        ConfigError: a class without a counterpart, or anything unknown, with the line to write.
    """
    table = [labels.name(index) for index in range(labels.num_classes)]
    found: dict[int, list[int]] = {}
    for name, counterparts in (stated or {}).items():
        classes = _ids(table, name)
        if not classes:
            raise ConfigError(f"{FLAG}: {name!r} is no class of the label table{_nearest(table, name)}")
        several = counterparts if isinstance(counterparts, list) else [] if counterparts is None else [counterparts]
        if unknown := [item for item in several if not _ids(names, item)]:
            raise ConfigError(f"{FLAG}: {name}: {model} has no label {unknown[0]!r}{_nearest(names, unknown[0])}")
        for index in classes:
            found[index] = [i for item in several for i in _ids(names, item)]
    rest = [index for index in range(labels.num_classes) if index not in found]
    nameless = not labels.names or all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if rest and nameless and not stated:
        if len(names) != labels.num_classes:
            raise ConfigError(
                f"{model} has {len(names)} labels and the label table {labels.num_classes} classes, and"
                f" {'the table' if not labels.names else 'the segmenter'} has no names to match them by. Write"
                f" {FLAG} FILE, a YAML file with lines such as 0: 3 (class 0 of the table is label 3)"
            )
        return np.arange(len(names)), ()
    found |= {index: _ids(names, table[index]) for index in rest}
    if missing := [table[index] for index in rest if not found[index]]:
        listed = ", ".join(f"{name}{_nearest(names, name)}" for name in missing[:8])
        raise ConfigError(
            f"{model} has no label called as {len(missing)} of the {labels.num_classes} classes of the table:"
            f" {listed}{' ...' if len(missing) > 8 else ''}. Write {FLAG} FILE, a YAML file with a line for each:"
            f" {missing[0]}: LABEL OF THE SEGMENTER, or {missing[0]}: null to leave the class out. The segmenter's"
            f" labels: {', '.join(names[:40])}{' ...' if len(names) > 40 else ''}"
        )
    train_ids = np.full(len(names), labels.num_classes)
    for index, ids in found.items():
        for i in ids:
            if train_ids[i] != labels.num_classes:
                raise ConfigError(
                    f"the label {names[i]!r} of {model} would be both {table[train_ids[i]]} and {table[index]}: say"
                    f" in {FLAG} FILE which, and write null for the other"
                )
            train_ids[i] = index
    return train_ids, tuple(index for index, ids in sorted(found.items()) if not ids)


def _ids(names: Sequence[str], name: Any) -> list[int]:
    """Return the ids of a class given by id or by name; a whole name goes before the first of several synonyms."""
    if isinstance(name, int) and not isinstance(name, bool):
        return [name] if 0 <= name < len(names) else []
    text = str(name)
    for form, wanted in ((_plain, _plain(text)), (_first, _plain(text)), (_first, _first(text))):
        if found := [i for i, other in enumerate(names) if form(other) == wanted]:
            return found
    return []


def _nearest(names: Sequence[str], name: Any) -> str:
    hint = did_you_mean(str(name), names)
    return f" ({hint.removeprefix('; ')})" if hint else ""


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _first(name: str) -> str:
    return _plain(re.split("[,;]", name)[0])


# ------------------------------------------------------------------------------------ judging


class Segmentation(ABC):
    """Judge generated images, and the real photos of the same label maps, by one segmenter."""

    labels: LabelSpec
    name: str
    """What the user called the segmenter."""
    unscored: tuple[int, ...] = ()
    """Classes of the table that it does not know."""
    stamp: str = ""
    """Everything that the scores depend on beside the images; empty where nobody knows."""

    @abstractmethod
    def predict(self, kind: str, key: str, image: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        """Return the train ids of ``size`` (height, width) that are predicted for an image, RGB uint8 [H, W, 3].

        Args:
            kind: "generated" or "real".
        """

    def check(self, keys: Sequence[str]) -> None:  # noqa: B027 (optional)
        """Check that there is a prediction for every key.

        Raises:
            DataError: one has none.
        """

    def judge(self, kind: str, key: str, image: SourceImage, size: tuple[int, int] | None = None) -> Confusion:
        """Compare the prediction for an image with its label map, at the size of the label map.

        Args:
            kind: "generated" or "real".
            size: (height, width) to which the image is resized before; None: as it is.
        """
        rgb, truth = image.rgb(), image.label_map
        assert truth is not None, f"{key}: an image without a label map"
        if size is not None:
            rgb = resize_image(rgb, *size)
        predicted = self.predict(kind, key, rgb, (truth.shape[0], truth.shape[1]))
        return Confusion.of(truth, predicted, self.labels.num_classes, self.unscored)

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
            "segmenter": self.name,
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


class NetworkSegmentation(Segmentation):
    """Judge by a segmentation network, whose labels ``match_labels`` finds in the label table."""

    def __init__(self, segmenter: Segmenter, labels: LabelSpec, stated: Mapping[Any, Any] | None = None) -> None:
        self.segmenter, self.labels, self.name = segmenter, labels, segmenter.model
        self.train_ids, self.unscored = match_labels(segmenter.names, labels, stated, segmenter.model)
        meaning = hashlib.sha256(self.train_ids.astype(np.int64).tobytes()).hexdigest()
        self.stamp = f"sha256 {segmenter.sha256}, input {segmenter.preprocessing}, labels {meaning[:16]}"

    def predict(self, kind: str, key: str, image: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        return self.train_ids[self.segmenter.label(image, size)]


def load_segmentation(
    model: str, mapping_file: str | Path | None, labels: LabelSpec, device: torch.device, flag: str
) -> NetworkSegmentation:
    """Load a Hugging Face model that predicts the classes of a label table.

    Args:
        mapping_file: what ``read_mapping`` reads; None: labels are matched by name.
        flag: what to call the model's setting in messages.
    Raises:
        ConfigError: the model cannot be used, or its labels do not match the table.
    """
    segmenter = hugging_face_segmenter(model, device, flag)
    stated = None if mapping_file is None else read_mapping(Path(mapping_file))
    return NetworkSegmentation(segmenter, labels, stated)


class StoredSegmentation(Segmentation):
    """Judge by predicted id maps: ``FOLDER/KEY.png`` with the ids that the label maps have too.

    Args:
        generated, real: folder of the id maps of the one and the other.
    Raises:
        DataError: no such folder, or nothing in it.
    """

    def __init__(self, generated: Path, real: Path, labels: LabelSpec) -> None:
        self.labels, self.name = labels, str(generated)
        self._sources: dict[str, FolderSource] = {}
        for kind, folder in (("generated", generated), ("real", real)):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder of predicted id maps")
            self._sources[kind] = FolderSource(folder, ["seg_maps"], bare=True)

    def check(self, keys: Sequence[str]) -> None:
        for source in self._sources.values():
            source.spell_as(keys)
            if missing := sorted(set(keys) - set(source.keys)):
                raise DataError(
                    f"{source.root}: no predicted id map for {len(missing)} of {len(keys)} samples, such as"
                    f" {missing[0]}. Expected {source.root / missing[0]}.png"
                )

    def predict(self, kind: str, key: str, image: NDArray[np.uint8], size: tuple[int, int]) -> Ids:
        source = self._sources[kind]
        where = source.describe(key, "seg_maps")
        ids = self.labels.to_train_ids(read_labels(source.read(key, "seg_maps"), where, self.labels), where)
        rows, columns = (nearest_indices(a, b).numpy() for a, b in zip(ids.shape, size, strict=True))
        return ids[rows][:, columns]
