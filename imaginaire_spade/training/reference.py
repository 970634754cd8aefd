"""What a run's evaluations measure against: a fixed share of the validation samples, and their photos' statistics in a
file of the log dir."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imaginaire_spade.data.batch import Batch
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.evaluation.collection import Collection, Description
from imaginaire_spade.evaluation.scores import NEIGHBOURS
from imaginaire_spade.evaluation.segmentation import Confusion
from imaginaire_spade.evaluation.sources import EvaluatedPicture, PictureSource
from imaginaire_spade.evaluation.statistics import FeatureStats
from imaginaire_spade.files import write_bytes
from imaginaire_spade.training.signals import StopRequested


def spread(count: int, wanted: int | None) -> list[int]:
    """Return ``wanted`` evenly spread positions out of ``count``. Raises ConfigError if ``count`` is too small."""
    if count <= NEIGHBOURS:
        raise ConfigError(
            f"trainer.evaluation: data.val has {count} samples, and scores need {NEIGHBOURS + 1} at least"
        )
    if wanted is None:
        return list(range(count))
    if wanted > count:
        raise ConfigError(
            f"trainer.evaluation.num_images: {wanted}, but data.val has {count} samples: write a smaller number, or"
            " null for all of them"
        )
    return [i * count // wanted for i in range(wanted)]


class ValidationPictures(PictureSource):
    """Samples of a data set, each as ``picture`` makes it; their label maps are at hand while a picture is looked at.

    Args:
        indices: places in ``dataset``; their keys, in this order, are the source's.
        picture: batch -> uint8 [N, 3, H, W].
        leave: asked before each batch, equally often on every process; True ends the reading with StopRequested.
    """

    def __init__(
        self,
        name: str,
        dataset: LabelMapDataset,
        indices: Sequence[int],
        picture: Callable[[Batch], Tensor],
        *,
        batch_size: int,
        num_workers: int,
        world_size: int,
        format: str,
        leave: Callable[[], bool],
    ) -> None:
        self.name, self.keys = name, [dataset.keys[index] for index in indices]
        self.labels: dict[int, Tensor] = {}
        """Of the pictures that are being looked at: index -> train ids [H, W]."""
        self._dataset, self._indices, self._picture = dataset, indices, picture
        self._batch_size, self._num_workers, self._format, self._leave = batch_size, num_workers, format, leave
        self._rounds = math.ceil(math.ceil(len(indices) / world_size) / batch_size)

    def read(self, indices: Sequence[int]) -> Iterator[EvaluatedPicture]:
        wanted = [self._indices[index] for index in indices]
        batches = sequential_batches(self._dataset, wanted, self._batch_size, num_workers=self._num_workers)
        places = iter(indices)
        with closing(batches):  # type: ignore[type-var]
            for _ in range(self._rounds):
                if self._leave():
                    raise StopRequested
                batch = next(batches, None)
                if batch is None:
                    continue
                made = self._picture(batch)
                here = [next(places) for _ in range(len(batch))]
                self.labels = dict(zip(here, batch.layout.labels, strict=True))
                for index, pixels in zip(here, made, strict=True):
                    yield EvaluatedPicture(index, pixels, format=self._format)


def write_reference(path: Path, identity: Mapping[str, Any], real: Collection, confusion: Confusion | None) -> None:
    """Write the photos' statistics, with everything that they depend on. Raises UserError where that fails."""
    arrays: dict[str, Any] = {
        "identity": np.array(json.dumps(identity)),
        "description": np.array(json.dumps(asdict(real.description))),
        "warnings": np.array(json.dumps(real.warnings)),
    }
    if real.stats is not None:
        arrays |= {"count": real.stats.count, "sum": real.stats.sum.cpu(), "outer": real.stats.outer.cpu()}
    if real.features is not None:
        arrays["features"] = real.features.cpu()
    if confusion is not None:
        arrays |= {"confusion": confusion.counts, "ignored": confusion.ignored, "pictures": confusion.pictures}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_reference(path: Path, identity: Mapping[str, Any]) -> tuple[Collection, Confusion | None] | None:
    """What ``write_reference`` wrote; None where there is nothing of this identity, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if json.loads(str(arrays["identity"])) != identity:
            return None
        stats = features = confusion = None
        if "count" in arrays:
            stats = FeatureStats(int(arrays["count"]), *(torch.from_numpy(arrays[n]) for n in ("sum", "outer")))
        if "features" in arrays:
            features = torch.from_numpy(arrays["features"])
        if "confusion" in arrays:
            confusion = Confusion(arrays["confusion"], int(arrays["ignored"]), int(arrays["pictures"]))
        description = Description(**json.loads(str(arrays["description"])))
        warnings = tuple(json.loads(str(arrays["warnings"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    gaussian = None if stats is None else stats.gaussian()
    return Collection("photos", description, gaussian, stats, features, None, warnings), confusion
