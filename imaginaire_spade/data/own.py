"""The interface of data sets of a user's own, registered in ``DATASETS`` and chosen by ``data.type``.

A class says which samples there are and loads the raw arrays of one. Everything after that is the pipeline's: label
table, augmentations, edges, distances, batches, workers, order and resuming. docs/own_data.md has examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imaginaire_spade.config import AugmentationConfig, DataConfig
from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.photos import measured, to_training
from imaginaire_spade.data.root import Root, map_types
from imaginaire_spade.data.transforms import apply_to_image
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import AnyImage
from imaginaire_spade.labels import EdgeSource, LabelSpec
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.noise import generator_for

KINDS = {"images": "uif", "seg_maps": "u", "edge_maps": "biuf", "inst_maps": "iu"}
"""Data type -> numpy's kinds of its arrays; conditions are unsigned integers or floats."""


class OwnDataset(LabelMapDataset, ABC):
    """Base of a registered data set. A subclass writes ``list_keys`` and ``load``.

    Args:
        roots: of the split, as the config states them; what they mean is the subclass's.
        data: the ``data`` section of the config.
        spec: what layouts consist of.
        augmentations: of the split.
        seed: the run's.
        with_images: whether photos are needed.
    Raises:
        DataError: there are no samples, or two of one key.
    """

    def __init__(
        self, roots: Sequence[str], data: DataConfig, spec: LayoutSpec, augmentations: AugmentationConfig, seed: int,
        with_images: bool,
    ) -> None:  # fmt: skip
        self.roots, self.labels, self.spec, self.seed = tuple(roots), data.labels, spec, seed
        self.augmentations, self.with_images, self.conditions = augmentations, with_images, data.conditions
        self._edge_source, self._size_of, self._replaced, self._on_unknown = data.edges, None, None, None
        self._roots = []  # none of files that are known here
        self.images = measured(data.images, roots) if with_images else data.images
        self.bad: list[str] = []
        self.keys = list(self.list_keys())
        self.shard_sizes = [len(self.keys)]
        if not self.keys or len(set(self.keys)) < len(self.keys):
            repeated = next((key for key in self.keys if self.keys.count(key) > 1), None)
            what = f"the key {repeated!r} stands for several samples" if repeated else "there are no samples"
            raise DataError(f"data.type: {type(self).__name__}, roots {', '.join(self.roots)}: {what}")

    @abstractmethod
    def list_keys(self) -> Sequence[str]:
        """Name the samples: unique, and the same list in every process and after a restart.

        Raises:
            DataError: ``roots`` cannot be used.
        """

    @abstractmethod
    def load(self, index: int, rng: np.random.Generator) -> Mapping[str, NDArray[Any]]:
        """Load the sample of ``keys[index]``: the arrays that the files of a data set folder would hold.

        Called in loader workers, in any order. Whatever is drawn must come from ``rng``, which is a function of the
        run's seed and the sample's position in the run; so a run is the same for any number of workers and processes,
        and after it was interrupted. In validation a sample's position is its index: it is the same every time.

        Returns:
            Arrays of one height and width, by data type. Those that the config does not ask for are left alone.
            ``images``: the photo, RGB uint8 [H, W, 3], or as ``data.images`` says: [H, W, channels] of values in its
            ``range``; not needed if ``with_images`` is False.
            ``seg_maps``: raw ids, uint8 or uint16 [H, W], or colours of the palette, uint8 [H, W, 3]; not needed if
            ``data.labels`` is null.
            ``edge_maps``: [H, W], not 0 where there is an edge; with ``data.edges: file``.
            ``inst_maps``: object ids, integers [H, W]; with ``data.edges: instances``.
            The name of each of ``data.conditions``: uint8, uint16 or floats [H, W] or [H, W, C].
        Raises:
            DataError, OSError: naming the file and what is wrong with it. It ends the run with that message alone.
        """

    @property
    def edges_follow_labels(self) -> bool:
        return self._edge_source is EdgeSource.LABELS

    def expect_random_reads(self, shards_at_a_time: int | None = None) -> None:
        """Do nothing: how files are read is the subclass's."""

    def check_label_map(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        sample = self[index]
        return sample.original_size, (sample.labels.shape[0], sample.labels.shape[1])

    def read(self, items: Sequence[tuple[int, int]], *, images_out: Sequence[AnyImage] | None = None) -> list[Sample]:
        outs: Sequence[AnyImage | None] = images_out or [None] * len(items)
        return [self._make(*item, out) for item, out in zip(items, outs, strict=True)]

    def _make(self, index: int, position: int, out: AnyImage | None) -> Sample:
        key = self.keys[index]
        where = f"data.type: {type(self).__name__}, sample {key!r}"
        try:
            arrays = self.load(index, generator_for(self.seed, position, "load"))
        except OSError as error:
            raise DataError(f"{where}: {error}") from None
        guide = map_types(self.labels, self._edge_source, self.conditions)[0]
        loaded = _Loaded(arrays, where, self._edge_source, guide)
        sample, geometry = self._read_maps(loaded, key, key, position)
        if not self.with_images:
            return sample
        photo, where = loaded.decode(key, "images"), loaded.describe(key, "images")
        if photo.shape[2:] != (self.images.channels,) or (photo.dtype != np.uint8 and self.images.range is None):
            raise DataError(
                f"{where}: {photo.dtype} {list(photo.shape)}; data.images asks for {self.images.channels} channels"
                + (" of uint8" if self.images.range is None else "")
            )
        loaded.check_size(photo.shape, key, "images", sample.original_size)
        image = apply_to_image(to_training(photo, self.images), geometry, out=out)
        return sample._replace(image=torch.from_numpy(image).permute(2, 0, 1))


class _Loaded(Root):
    """The arrays of one sample, as if they came from files."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], where: str, edges: EdgeSource, guide: str) -> None:
        self.arrays, self.where, self.edges, self.guide, self.has_distances = arrays, where, edges, guide, False

    def read_guide(self, key: str, labels: LabelSpec) -> tuple[str, NDArray[np.generic]]:
        return self.describe(key, self.guide), self.decode(key, self.guide)

    def describe(self, key: str, data_type: str) -> str:
        return f"{self.where}: {data_type}"

    def decode(self, key: str, data_type: str) -> NDArray[Any]:
        array = self.arrays.get(data_type)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in KINDS.get(data_type, "uf") or not array.size:
            given = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else repr(array)[:60]
            raise DataError(f"{self.describe(key, data_type)}: load() must give it as it describes, not {given}")
        return (array != 0).astype(np.uint8) if data_type == "edge_maps" else array
