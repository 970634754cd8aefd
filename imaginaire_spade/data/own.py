"""The interface of data sets of a user's own, registered in ``DATASETS`` and chosen by ``data.type``.

A class says which samples there are and loads the raw arrays of one. Everything after that is the pipeline's: label
table, augmentations, edges, distances, batches, workers, order and resuming. docs/own_data.md has examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imaginaire_spade.config import AugmentationConfig, DataConfig
from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.conditions import as_condition, cut_condition
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.data.transforms import apply_to_image, apply_to_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import EdgeSource
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.noise import generator_for


@dataclass(frozen=True)
class RawSample:
    """The arrays of one sample as its files hold them, all of one height and width. Absent ones are None."""

    labels: NDArray[np.generic] | None = None
    """Raw ids, uint8 or uint16 [H, W], or colours of the table's palette, uint8 [H, W, 3]. Needed unless
    ``data.labels`` is null."""
    image: NDArray[np.uint8] | None = None
    """The photo, RGB uint8 [H, W, 3]. Needed if ``with_images``."""
    edges: NDArray[np.generic] | None = None
    """[H, W], not 0 where there is an edge. Needed with ``data.edges: file``."""
    instances: NDArray[np.generic] | None = None
    """Object ids, integers [H, W]. Needed with ``data.edges: instances``."""
    conditions: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Name -> uint8, uint16 or float [H, W] or [H, W, C], of every one of ``data.conditions``."""


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
        self,
        roots: Sequence[str],
        data: DataConfig,
        spec: LayoutSpec,
        augmentations: AugmentationConfig,
        seed: int,
        with_images: bool,
    ) -> None:
        self.roots, self.labels, self.spec, self.seed = tuple(roots), data.labels, spec, seed
        self.augmentations, self.with_images, self.conditions = augmentations, with_images, data.conditions
        self._edge_source = data.edges
        self._size_of = self._replaced = self._on_unknown = None
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
    def load(self, index: int, rng: np.random.Generator) -> RawSample:
        """Load the sample of ``keys[index]``.

        Called in loader workers, in any order. Whatever is drawn must come from ``rng``, which is a function of the
        run's seed and the sample's position in the run; so a run is the same for any number of workers and processes,
        and after it was interrupted. In validation a sample's position is its index: it is the same every time.

        Raises:
            DataError: naming the file and what is wrong with it. It ends the run with that message alone.
        """

    @property
    def edges_follow_labels(self) -> bool:
        return self._edge_source is EdgeSource.LABELS

    def expect_random_reads(self, shards_at_a_time: int | None = None) -> None:
        """Do nothing: how files are read is the subclass's."""

    def check_label_map(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        sample = self[index]
        return sample.original_size, (sample.labels.shape[0], sample.labels.shape[1])

    def read(
        self, items: Sequence[tuple[int, int]], *, images_out: Sequence[NDArray[np.uint8]] | None = None
    ) -> list[Sample]:
        outs: Sequence[NDArray[np.uint8] | None] = images_out or [None] * len(items)
        return [self._make(*item, out) for item, out in zip(items, outs, strict=True)]

    def _make(self, index: int, position: int, out: NDArray[np.uint8] | None) -> Sample:
        where = f"data.type: {type(self).__name__}, sample {self.keys[index]!r}"
        raw = self.load(index, generator_for(self.seed, position, "load"))
        maps = self._needed(raw, where)
        size = next(iter(maps.values())).shape[:2]
        if wrong := [name for name, array in maps.items() if array.shape[:2] != size or array.ndim not in (2, 3)]:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in maps.items())
            raise DataError(f"{where}: arrays of one height and width are needed, not {shapes} ({wrong[0]})")
        geometry = self._geometry((size[0], size[1]), where, position)
        if "labels" in maps:
            labels = self._train_ids(apply_to_map(maps["labels"], geometry), where)
        else:
            labels = np.zeros((geometry.height, geometry.width), self.labels.dtype)
        edges, distances, conditions = None, None, None
        if self.spec.has_edges and not self.edges_follow_labels:
            stored = apply_to_map(maps["edges"] != 0 if "edges" in maps else maps["instances"], geometry)
            edges = torch.from_numpy(self._edge_source.draw(labels, stored))
        if self.spec.has_distances:
            distances = torch.from_numpy(class_distances(labels))
        if self.conditions:
            parts = []
            for c in self.conditions:
                stored, name = as_condition(maps[c.name], f"{where}, {c.name}", c.channels), f"{where}, {c.name}"
                parts.append(cut_condition(stored, c, geometry, name))
            conditions = torch.from_numpy(np.concatenate(parts))
        image = None
        if "image" in maps:
            image = torch.from_numpy(apply_to_image(maps["image"], geometry, out=out)).permute(2, 0, 1)
        key, stored_size = self.keys[index], (size[0], size[1])
        return Sample(image, torch.from_numpy(labels), edges, distances, key, stored_size, position, conditions)

    def _needed(self, raw: RawSample, where: str) -> dict[str, NDArray[Any]]:
        """List the arrays that this configuration needs, by name.

        Raises:
            DataError: one is missing, or no array of its kind.
        """
        source = self._edge_source
        found = {
            "labels": (self.labels.num_classes > 0, raw.labels, "iu"),
            "edges": (source is EdgeSource.FILE, raw.edges, "biuf"),
            "instances": (source is EdgeSource.INSTANCES, raw.instances, "iu"),
            **{c.name: (True, raw.conditions.get(c.name), "uf") for c in self.conditions},
            "image": (self.with_images, raw.image, "u"),
        }
        for name, (needed, array, kinds) in found.items():
            if needed and (not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or not array.size):
                given = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else repr(array)[:60]
                raise DataError(f"{where}: load() must give {name} as RawSample describes it, not {given}")
        if self.with_images and (raw.image.dtype != np.uint8 or raw.image.shape[2:] != (3,)):  # type: ignore[union-attr]
            raise DataError(f"{where}: image must be uint8 [H, W, 3], not {raw.image.dtype} {list(raw.image.shape)}")  # type: ignore[union-attr]
        return {name: array for name, (needed, array, _) in found.items() if needed and array is not None}
