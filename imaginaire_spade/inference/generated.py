"""Generate a checkpoint's images for evaluation: the pixels that inference.py writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import read_ahead
from imaginaire_spade.errors import DataError
from imaginaire_spade.evaluation.sources import NOT_STORED, EvaluatedPicture, PictureSource, Unreadable
from imaginaire_spade.inference.style import drawn_styles
from imaginaire_spade.inference.synthesis import BATCHES_HELD, Request, synthesise
from imaginaire_spade.inference.weights import LoadedModel


class GeneratedPictures(PictureSource):
    """Pictures made when they are asked for.

    Args:
        dataset: label maps; its augmentations decide the size of the pictures.
        num_samples: pictures per label map, each with a style code of its own.
        seed: of the style codes.
    """

    def __init__(
        self,
        model: LoadedModel,
        dataset: LabelMapDataset,
        name: str,
        *,
        num_samples: int = 1,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.name = name
        self.keys = dataset.keys
        self.num_samples = num_samples
        self._model, self._dataset, self._seed, self._batch_size = model, dataset, seed, batch_size

    def read(self, indices: Sequence[int]) -> Iterator[EvaluatedPicture | Unreadable]:
        made: dict[str, tuple[int, int]] = {}
        style_of = drawn_styles(self._seed, self._model.style_dims, self.num_samples)
        unreadable: list[Unreadable] = []

        def requests() -> Iterator[Request]:
            for index, found in read_ahead(self._read, indices, BATCHES_HELD):
                if isinstance(found, Unreadable):
                    unreadable.extend([found] * self.num_samples)
                    continue
                for j in range(self.num_samples):
                    name = f"{found.key}#{j}"
                    made[name] = (index, j)
                    yield Request(name, found.labels, found.edges, style_of(found.key, j), found.distances)

        for name, picture in synthesise(self._model, requests(), self._batch_size):
            index, j = made.pop(name)
            pixels = torch.from_numpy(picture).permute(2, 0, 1)
            yield EvaluatedPicture(index, pixels, j, NOT_STORED)
        yield from unreadable

    def _read(self, index: int) -> tuple[int, Sample | Unreadable]:
        try:
            return index, self._dataset[index]
        except DataError as error:
            return index, Unreadable(index, str(error))
