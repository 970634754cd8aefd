"""Samples and batches: label maps with their photos, as small integers on the CPU.

Owns what a sample is, how several roots join, and the batch that travels to the device. A sample is a function of
(seed, index, draw) alone. Nothing here is ever one-hot, and pictures stay uint8 until ``normalise`` on the device.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.data.decode import (
    decode_edges,
    decode_image,
    decode_instances,
    decode_label,
    image_size,
    is_jpeg,
)
from imaginaire_spade.data.distances import NOT_FINITE, class_distances, decode_distances
from imaginaire_spade.data.folders import DISTANCES, EDGE_FILES, Source
from imaginaire_spade.data.store import open_source
from imaginaire_spade.data.transforms import (
    Geometry,
    apply_to_distances,
    apply_to_image,
    apply_to_map,
    choose_reduction,
    draw_geometry,
    edges_from_ids,
)
from imaginaire_spade.errors import DataError, LabelError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.noise import generator_for


class Sample(NamedTuple):
    """One sample, on the CPU."""

    image: Tensor | None
    """uint8 [3, H, W]."""
    labels: Tensor
    """uint8 or int16 [H, W], train ids 0..num_classes (num_classes = don't care)."""
    edges: Tensor | None
    """uint8 [H, W] of 0/1."""
    distances: Tensor | None
    """float32 [2, H, W], row and column offsets in (-1, 1)."""
    key: str
    original_size: tuple[int, int]
    """(height, width) of the stored label map."""
    draw: int
    """Position in the run, of which every random number of this sample is a function."""


class LabelMapDataset(Dataset[Sample]):
    """Label maps, with their photos or without.

    Args:
        roots: LMDB roots or folders, one after the other. Where a key occurs in several of them, every key is
            prefixed with its root's folder name (``train_a/0001``), so that keys stay unique.
        labels: the label table.
        edges: "none", "file" (edge_maps/), "instances" (drawn from inst_maps/) or "labels" (drawn from the label map).
        distances: whether samples have distances: read from distances/ where a root has one for every sample, else
            computed from the label map as it comes out of the augmentation.
        augmentations: joint geometry; None leaves pictures as they are.
        seed: of the augmentation.
        with_images: False for inference: only label maps (and what edges need) are read, ``root`` may be a bare
            folder of label maps, and edges come from the labels, with a warning, where their files are missing.
        replace: train id -> train id that stands for it, in every label map; stored edges stay as they are.
        on_unknown: called with what is wrong with a label map that holds values outside the table, which then count
            as don't care; None: that is raised.
    Raises:
        DataError: a root that cannot be used.
    """

    def __init__(
        self,
        roots: str | Path | Sequence[str | Path],
        labels: LabelSpec,
        *,
        edges: str = "none",
        distances: bool = False,
        augmentations: AugmentationConfig | None = None,
        seed: int = 0,
        with_images: bool = True,
        replace: Mapping[int, int] | None = None,
        on_unknown: Callable[[LabelError], None] | None = None,
    ) -> None:
        self.labels = labels
        self._replaced = np.arange(labels.num_classes + 1).astype(labels.dtype) if replace else None
        for train_id, other in (replace or {}).items():
            self._replaced[train_id] = other  # type: ignore[index]
        self._on_unknown = on_unknown
        self.augmentations = augmentations or AugmentationConfig()
        self.seed = seed
        self.with_images = with_images
        self.spec = LayoutSpec(
            labels.num_classes, has_dont_care=labels.dont_care, has_edges=edges != "none", has_distances=distances
        )
        edge_files = [EDGE_FILES[edges]] if edges in EDGE_FILES else []
        required = ["images", "seg_maps", *edge_files] if with_images else ["seg_maps"]
        self._sources: list[Source] = []
        self._edges: list[str] = []
        self._stored_distances: list[bool] = []
        self._told_of_sizes = False
        for root in [roots] if isinstance(roots, str | Path) else roots:
            optional = [*edge_files, DISTANCES] if distances else edge_files
            source = open_source(root, required, optional=optional, bare=not with_images)
            found = all(source.has(data_type) for data_type in edge_files)
            if not found:
                warnings.warn(
                    f"{root}: no {edge_files[0]}, so edges are drawn from the borders of the label maps (the model"
                    f" learned them from {edge_files[0]})",
                    stacklevel=2,
                )
            self._sources.append(source)
            self._edges.append(edges if found else "labels")
            stored = distances and source.has(DISTANCES) and not replace
            if distances and not stored and not replace and Path(root, DISTANCES).is_dir():
                warnings.warn(
                    f"{root}: {DISTANCES}/ does not have every sample, so all are computed from the label maps"
                    " (scripts/make_distance_maps.py makes the missing ones)",
                    stacklevel=2,
                )
            self._stored_distances.append(stored)
        self._starts = np.cumsum([0, *(len(source.keys) for source in self._sources)])
        self.keys = _unique_keys(self._sources)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        """The sample ``index``, or (index, draw); without a draw, it is the index.

        Raises:
            DataError, LabelError: naming the file and what is wrong with it.
        """
        index, draw = item if isinstance(item, tuple) else (item, item)
        number, key = self._place(index)
        source, edges_from = self._sources[number], self._edges[number]
        where = source.where(key, "seg_maps")
        raw = decode_label(source.read(key, "seg_maps"), where)
        size = raw.shape[:2]
        rng = generator_for(self.seed, draw, "augmentation")
        geometry = draw_geometry(size[0], size[1], self.augmentations, rng, where)
        # Only values that reach the network are looked at; the builder has looked at all.
        labels = self._train_ids(apply_to_map(raw, geometry), where)

        image = None
        if self.with_images:
            photo = _read_photo(source, key, geometry, (size[0], size[1]), where)
            image = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))
        edges = None
        if self.spec.has_edges:
            edges = torch.from_numpy(self._read_edges(source, edges_from, key, geometry, size, labels))
        distances = None
        if self.spec.has_distances:
            stored = self._read_distances(source, key, geometry, size) if self._stored_distances[number] else None
            distances = torch.from_numpy(class_distances(labels) if stored is None else stored)
        return Sample(image, torch.from_numpy(labels), edges, distances, self.keys[index], (size[0], size[1]), draw)

    def check_label_map(self, index: int) -> tuple[int, int]:
        """(height, width) of a stored label map. Raises DataError, LabelError where it cannot be used."""
        number, key = self._place(index)
        where = self._sources[number].where(key, "seg_maps")
        raw = decode_label(self._sources[number].read(key, "seg_maps"), where)
        if self._on_unknown is None:
            self.labels.count_pixels(raw, where)
        return raw.shape[0], raw.shape[1]

    def _place(self, index: int) -> tuple[int, str]:
        """The number of the source that has a sample, and its key there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, self._sources[number].keys[index - self._starts[number]]

    def _train_ids(self, raw: NDArray[np.generic], where: str) -> NDArray[np.generic]:
        try:
            labels = self.labels.to_train_ids(raw, where)
        except LabelError as error:
            if self._on_unknown is None:
                raise
            labels = self.labels.to_train_ids(raw, where, unknown="dont_care")
            self._on_unknown(error)
        return labels if self._replaced is None else self._replaced[labels]

    def _read_edges(
        self,
        source: Source,
        edges_from: str,
        key: str,
        geometry: Geometry,
        size: tuple[int, ...],
        labels: NDArray[np.generic],
    ) -> NDArray[np.generic]:
        # Drawn after the geometry, so that a border is one pixel wide (two with its other side) at any scale.
        if edges_from == "labels":
            return edges_from_ids(labels)
        data_type = EDGE_FILES[edges_from]
        decode = decode_edges if edges_from == "file" else decode_instances
        where = source.where(key, data_type)
        stored: NDArray[np.generic] = decode(source.read(key, data_type), where)
        _check_size(stored, where, size, source.where(key, "seg_maps"))
        cut = apply_to_map(stored, geometry)
        return cut if edges_from == "file" else edges_from_ids(cut)

    def _read_distances(
        self, source: Source, key: str, geometry: Geometry, size: tuple[int, ...]
    ) -> NDArray[np.float32] | None:
        """The stored distance map, or None where it is of another size than the label map."""
        where = source.where(key, DISTANCES)
        stored = decode_distances(source.read(key, DISTANCES), where)
        if stored.shape[1:] == size:
            cut = apply_to_distances(stored, geometry)
            if not np.isfinite(cut).all():
                raise DataError(f"{where}: {NOT_FINITE}")
            return cut
        if not self._told_of_sizes:
            self._told_of_sizes = True
            warnings.warn(
                f"{where} is {stored.shape[1]} x {stored.shape[2]} (height x width), its label map {size[0]} x"
                f" {size[1]}: such distances are computed instead (scripts/make_distance_maps.py makes them anew)",
                stacklevel=2,
            )
        return None


def _check_size(array: NDArray[np.generic], where: str, label_size: tuple[int, ...], label_where: str) -> None:
    if array.shape[:2] != label_size:
        raise DataError(
            f"{where} is {array.shape[0]} x {array.shape[1]} (height x width), but {label_where} is"
            f" {label_size[0]} x {label_size[1]}: they must be of one size. Resize the label map with nearest"
            " neighbour, or export both from the original"
        )


def _read_photo(
    source: Source, key: str, geometry: Geometry, size: tuple[int, int], label_where: str
) -> NDArray[np.uint8]:
    """uint8 [geometry.height, geometry.width, 3]; a JPEG is decoded no larger than need be."""
    where = source.where(key, "images")
    data = source.read(key, "images")
    factor = choose_reduction(*size, geometry) if is_jpeg(data) else 1
    if factor == 1:
        photo = decode_image(data, where)
        _check_size(photo, where, size, label_where)
        return apply_to_image(photo, geometry)
    if (stored := image_size(data, where)) != size:
        _check_size(np.empty(stored), where, size, label_where)
    photo = decode_image(data, where, reduction=factor)
    return apply_to_image(photo, geometry, reduced_from=(*size, factor))


def _unique_keys(sources: Sequence[Source]) -> list[str]:
    keys = [key for source in sources for key in source.keys]
    if len(sources) == 1 or len(set(keys)) == len(keys):
        return keys
    names = Counter(source.root.resolve().name for source in sources)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise DataError(
            f"roots {', '.join(str(s.root) for s in sources)} have samples of the same names, and several are called"
            f" {repeated[0]!r}: give the folders different names"
        )
    return [f"{source.root.resolve().name}/{key}" for source in sources for key in source.keys]


@dataclass(frozen=True)
class Batch:
    """Samples of one size, on one device."""

    layout: SemanticLayout
    images: Tensor | None
    """uint8 [N, 3, H, W]."""
    keys: tuple[str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    draws: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        images = None if self.images is None else self.images.to(device, non_blocking=non_blocking)
        layout = self.layout.to(device, non_blocking=non_blocking)
        return Batch(layout, images, self.keys, self.original_sizes, self.draws)

    def pin_memory(self) -> Batch:
        images = None if self.images is None else self.images.pin_memory()
        return Batch(self.layout.pin_memory(), images, self.keys, self.original_sizes, self.draws)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch."""
        layout = self.layout
        return [t for t in (self.images, layout.labels, layout.edges, layout.distances) if t is not None]

    def split(self, pieces: int) -> Iterator[Batch]:
        """Equal parts, in order, each made when its turn comes: what a part's layout caches lives no longer than it."""
        assert pieces > 0 and len(self) % pieces == 0, f"{len(self)} samples do not split into {pieces} equal parts"
        if pieces == 1:
            yield self
            return
        size = len(self) // pieces
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                self.layout[part],
                None if self.images is None else self.images[part],
                self.keys[part],
                self.original_sizes[part],
                self.draws[part],
            )


@dataclass(frozen=True)
class collate:
    """``collate(spec)`` turns a list of samples into a ``Batch``. Raises DataError where sizes differ."""

    spec: LayoutSpec

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        first = samples[0]
        for sample in samples:
            if sample.labels.shape != first.labels.shape:
                raise DataError(
                    f"{first.key} is {list(first.labels.shape)} and {sample.key} {list(sample.labels.shape)} (height,"
                    " width) after augmentation, but a batch holds one size. Write random_crop_h_w: [256, 256] or"
                    " resize_h_w: [256, 256] in that split's augmentations, or batch_size: 1"
                )
        edges = [sample.edges for sample in samples if sample.edges is not None]
        distances = [sample.distances for sample in samples if sample.distances is not None]
        images = [sample.image for sample in samples if sample.image is not None]
        return Batch(
            SemanticLayout(
                self.spec,
                torch.stack([sample.labels for sample in samples]),
                torch.stack(edges) if edges else None,
                torch.stack(distances) if distances else None,
            ),
            torch.stack(images) if images else None,
            tuple(sample.key for sample in samples),
            tuple(sample.original_size for sample in samples),
            tuple(sample.draw for sample in samples),
        )


def normalise(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], of any shape: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def denormalise(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 0..255, rounded and clamped: the inverse of ``normalise``."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
