"""Join images with their label maps and photos, for segmentation scores and the report page.

Owns the joining by key and the rule that a photo is judged at the size of the generated picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.distributed import gather_objects
from imaginaire_spade.errors import DataError
from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.evaluation.report_page import Example, worst_classes
from imaginaire_spade.evaluation.segmentation import SegmentationMetric
from imaginaire_spade.evaluation.sources import EvaluatedPicture, PictureSource
from imaginaire_spade.files import resize_image

SHOWN = 12
"""Samples in the grid of a report page."""


class LabelMaps:
    """Label maps by key.

    Args:
        dataset: of label maps, with or without their photos.
    """

    def __init__(self, dataset: LabelMapDataset, name: str) -> None:
        self.labels, self.name = dataset.labels, name
        self._dataset = dataset
        self._places = {key: index for index, key in enumerate(dataset.keys)}

    def __getitem__(self, key: str) -> NDArray[np.generic]:
        """Train ids [H, W]."""
        return self._dataset[self._places[key]].labels.numpy()

    def check(self, keys: Sequence[str], where: str) -> None:
        """Raises DataError where a picture has no label map."""
        if missing := [key for key in keys if key not in self._places]:
            raise DataError(
                f"{self.name}: no label map for {len(missing)} of the {len(keys)} images of {where}, such as"
                f" {missing[0]}: files are joined by name"
            )


class SegmentationPass:
    """Goes through generated pictures, then through the photos of the same label maps.

    Args:
        metric: where the predictions are counted.
    Raises:
        DataError: a generated picture has no label map or no photo.
    """

    def __init__(self, metric: SegmentationMetric, maps: LabelMaps, fake: PictureSource, photos: PictureSource) -> None:
        maps.check(fake.keys, fake.name)
        if missing := sorted(set(fake.keys) - set(photos.keys)):
            raise DataError(
                f"{photos.name}: no photo for {len(missing)} of the {len(fake.keys)} images of {fake.name}, such as"
                f" {missing[0]}. A segmentation score means little without that of the photos of the same label maps"
            )
        metric.check(fake.keys)
        self.metric, self.maps, self.fake, self.photos = metric, maps, fake, photos
        self.most: dict[int, tuple[int, str]] = {}
        """Class -> the most pixels of it in a sample, and that sample's key."""
        self._sizes: dict[str, tuple[int, int]] = {}

    def add_fake(self, picture: EvaluatedPicture) -> None:
        """Count a generated picture in."""
        key, truth = self.fake.keys[picture.index], self.maps[self.fake.keys[picture.index]]
        self._sizes[key] = (picture.pixels.shape[1], picture.pixels.shape[2])
        self.metric.add("generated", key, _rgb(picture.pixels), truth)
        ids, counts = np.unique(truth, return_counts=True)
        for index, count in zip(ids.tolist(), counts.tolist(), strict=True):
            self.most[index] = max(self.most.get(index, (0, "")), (count, key))

    def fakes_done(self) -> None:
        """Learn what the other processes have seen (a collective)."""
        for sizes, most in gather_objects((self._sizes, self.most)):
            self._sizes |= sizes
            for index, found in most.items():
                self.most[index] = max(self.most.get(index, (0, "")), found)

    def add_photo(self, picture: EvaluatedPicture) -> None:
        """Count a photo in, at the size of the generated picture; one without a generated picture is left out."""
        key = self.photos.keys[picture.index]
        if key not in self._sizes:
            return
        photo, size = _rgb(picture.pixels), self._sizes[key]
        self.metric.add("real", key, resize_image(photo, *size), self.maps[key])


def page_samples(
    report: Report,
    fake: PictureSource,
    photos: PictureSource | None,
    maps: LabelMaps | None,
    segmentation: SegmentationPass | None,
) -> tuple[list[Example], dict[int, Example]]:
    """(samples for the grid, class -> sample for the worst classes): ``write_report_page``'s; read again."""
    count = min(SHOWN, len(fake.keys))
    shown = [fake.keys[i * len(fake.keys) // count] for i in range(count)]
    worst: dict[int, str] = {}
    if segmentation is not None:
        worst = {c["id"]: segmentation.most[c["id"]][1] for c in worst_classes(report.details["segmentation"])}
    wanted = list(dict.fromkeys([*shown, *worst.values()]))
    made = dict(_pictures(fake, wanted))
    real = {} if photos is None else dict(_pictures(photos, wanted))
    examples = {
        key: Example(key, picture, real.get(key), None if maps is None else maps[key]) for key, picture in made.items()
    }
    grid = [examples[key] for key in shown if key in examples]
    return grid, {index: examples[key] for index, key in worst.items() if key in examples}


def _pictures(source: PictureSource, keys: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(key, RGB) of those of ``keys`` that the source has and can read."""
    places = {key: index for index, key in enumerate(source.keys)}
    for picture in source.read([places[key] for key in keys if key in places]):
        if isinstance(picture, EvaluatedPicture) and picture.sample == 0:
            yield source.keys[picture.index], _rgb(picture.pixels)


def _rgb(pixels: Tensor) -> NDArray[np.uint8]:
    """uint8 [3, H, W] -> [H, W, 3]."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
