"""Read the samples of one or several data set folders: label maps with photos, as small integers on the CPU.

Responsible for how several roots join, and where edges and distances come from. A sample is a function of (seed, index,
position) alone. No array here is one-hot, and images stay uint8.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from imaginaire_spade.command_names import as_called
from imaginaire_spade.config import AugmentationConfig, Condition, ImageSpec
from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.conditions import cut_conditions, draw_condition
from imaginaire_spade.data.distances import MAKER, NOT_FINITE, class_distances
from imaginaire_spade.data.file_structure import is_jpeg
from imaginaire_spade.data.folders import DISTANCES, Source
from imaginaire_spade.data.lmdb_source import open_source, usable_memory
from imaginaire_spade.data.photos import decode_photo, is_upright, measured, photo_preview, read_header, to_training
from imaginaire_spade.data.root import Root, map_types
from imaginaire_spade.data.transforms import Geometry, apply_to_distances, apply_to_image, apply_to_map, draw_geometry
from imaginaire_spade.errors import DataError, LabelError
from imaginaire_spade.files import AnyImage, RgbImage
from imaginaire_spade.labels import EdgeSource, LabelSpec, edges_from_ids
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.noise import uniform_draws


class LabelMapDataset(Dataset[Sample]):
    """Label maps, with their photos or without.

    Args:
        roots: LMDB roots or folders, one after the other. Where a key occurs in several of them, every key is
            prefixed with its root's folder name (``train_a/0001``), so that keys stay unique.
        labels: the label table.
        edges: where the edge channel comes from.
        images: what photos mean; None: 8-bit RGB.
        distances: whether samples have distances: read from distances/ where a root has one for every sample, else
            computed from the label map as it comes out of the augmentation.
        augmentations: joint geometry; None leaves images as they are.
        size_of: (height, width) of a label map as stored -> that to which it is resized, in place of ``augmentations``.
        seed: of the augmentation.
        with_images: False for inference: only label maps (and what edges need) are read, ``root`` may be a bare
            folder of label maps, and edges come from the labels, with a warning, where their files are missing.
        replace: train id -> train id that stands for it, in every label map; stored edges stay as they are.
        on_unknown: called with what is wrong with a label map that holds values outside the table, which then count
            as don't care; None: that is raised.
        conditions: ``data.conditions``: files in folders of their names, which every sample must have.
        suffixes: of the names in folders, as of ``FolderSource``.
    Raises:
        DataError: a root that cannot be used.
    """

    def __init__(
        self,
        roots: str | Path | Sequence[str | Path],
        labels: LabelSpec,
        *,
        edges: EdgeSource | str = EdgeSource.NONE,
        images: ImageSpec | None = None,
        distances: bool = False,
        augmentations: AugmentationConfig | None = None,
        size_of: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
        seed: int = 0,
        with_images: bool = True,
        replace: Mapping[int, int] | None = None,
        on_unknown: Callable[[LabelError], None] | None = None,
        conditions: Sequence[Condition] = (),
        suffixes: Mapping[str, str] | None = None,
    ) -> None:
        self.labels = labels
        self._replaced = np.arange(labels.num_classes + 1).astype(labels.dtype) if replace else None
        for train_id, other in (replace or {}).items():
            self._replaced[train_id] = other  # type: ignore[index]
        self._on_unknown = on_unknown
        assert augmentations is None or size_of is None, "one rule says how label maps are resized"
        self.augmentations = augmentations or AugmentationConfig()
        self._size_of = size_of
        self.seed = seed
        self.with_images = with_images
        roots = [roots] if isinstance(roots, str | Path) else roots
        self.images = images or ImageSpec()
        if with_images:
            self.images = measured(self.images, roots)
        edges = EdgeSource(edges)
        self.conditions = tuple(conditions)
        self._suffixes = suffixes
        self.spec = LayoutSpec.of(labels, edges, distances, sum(condition.channels for condition in conditions))
        edge_files = edges.files_needed
        maps = map_types(labels, edges, conditions)
        required = ["images", *dict.fromkeys([*maps, *edge_files])] if with_images else maps
        self._roots: list[Root] = []
        for root in roots:
            optional = [*edge_files, DISTANCES] if distances else edge_files
            source = open_source(root, required, optional=optional, bare=not with_images, suffixes=suffixes)
            found = all(source.has(data_type) for data_type in edge_files)
            if not found:
                warnings.warn(
                    f"{root}: no {edge_files[0]}, so edges are drawn from the borders of the label maps (the model"
                    f" learned them from {edge_files[0]})",
                    stacklevel=2,
                )
            stored = distances and source.has(DISTANCES) and not replace
            if distances and not stored and not replace and Path(root, DISTANCES).is_dir():
                warnings.warn(
                    f"{root}: {DISTANCES}/ does not have every sample, so all are computed from the label maps"
                    f" ({as_called(MAKER)} makes the missing ones)",
                    stacklevel=2,
                )
            self._roots.append(Root(source, edges if found else EdgeSource.LABELS, stored, maps[0]))
            if doubt := self._roots[-1].find_doubt(labels):
                warnings.warn(doubt, stacklevel=2)
        sources = [root.source for root in self._roots]
        self._places = [(root, key) for root in self._roots for key in root.source.keys]
        """The root that has a sample, and the sample's key there."""
        self.keys = _unique_keys(sources)
        self.shard_sizes = [size for source in sources for size in source.shard_sizes]
        """Numbers of samples, in the order of ``keys``, whose files lie together."""
        self.bad: list[str] = []
        """What is wrong with each sample that was left out (``leave_out``)."""

    def __len__(self) -> int:
        return len(self.keys)

    def stamps(self) -> dict[str, tuple[list[str], NDArray[np.int64]]]:
        """Return the ``Source.stamps`` of each root."""
        return {str(root.source.root): root.source.stamps() for root in self._roots}

    def without_images(self) -> LabelMapDataset:
        """Return the same samples without photos: only label maps (and the source of edges) are read."""
        dataset = copy.copy(self)
        dataset.with_images = False
        return dataset

    def find_problem(self, index: int) -> str:
        """Read a sample whole; say what is wrong with it, or return ""."""
        try:
            self.check_label_map(index)
            self.read([(index, index)])
        except DataError as error:
            return str(error)
        return ""

    def leave_out(self, problems: Mapping[int, str]) -> None:
        """Drop these samples: index -> what is wrong with it.

        Raises:
            DataError: none is left.
        """
        self.bad += problems.values()
        ends = np.cumsum([0, *self.shard_sizes])
        kept = [[i for i in range(start, end) if i not in problems] for start, end in itertools.pairwise(ends.tolist())]
        self.shard_sizes = [len(shard) for shard in kept if shard]
        if not self.shard_sizes:
            raise DataError(f"data.skip_bad: no sample can be used: {self.bad[0]}")
        self._places = [self._places[i] for shard in kept for i in shard]
        self.keys = [self.keys[i] for shard in kept for i in shard]

    @property
    def edges_follow_labels(self) -> bool:
        """Return whether every sample's edges are the borders of its labels, so that they can be drawn at any time."""
        return all(root.edges is EdgeSource.LABELS for root in self._roots)

    def blank(self) -> Sample | None:
        """Make a sample of zeros, without edges that follow the labels; None if samples differ in size."""
        if (size := self.augmentations.output_h_w) is None:
            return None
        return Sample(
            torch.from_numpy(to_training(np.zeros((self.images.channels, *size), np.uint8), self.images))
            if self.with_images
            else None,
            torch.from_numpy(np.zeros(size, self.labels.dtype)),
            torch.zeros(size, dtype=torch.uint8) if self.spec.has_edges and not self.edges_follow_labels else None,
            torch.zeros(2, *size) if self.spec.has_distances else None, "", size, 0,
            torch.zeros(self.spec.num_conditions, *size) if self.conditions else None,
        )  # fmt: skip

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        """Read the sample ``index``, or (index, position); without a position, it is the index.

        Raises:
            DataError, LabelError: naming the file and what is wrong with it.
        """
        [sample] = self.read([item if isinstance(item, tuple) else (item, item)])
        if self.edges_follow_labels:
            sample = sample._replace(edges=torch.from_numpy(edges_from_ids(sample.labels.numpy())))
        return sample

    def read(self, items: Sequence[tuple[int, int]], *, images_out: Sequence[AnyImage] | None = None) -> list[Sample]:
        """Read the samples of these (index, position) pairs, and leave edges that follow the labels to the layout.

        All maps, then all photos: an eighth faster, since what a stage uses stays in the processor's cache.

        Args:
            images_out: [H, W, C] for each sample, to lay its photo in.
        Raises:
            DataError, LabelError: naming the file and what is wrong with it.
        """
        read = [self._read_maps(*self._places[index], self.keys[index], position) for index, position in items]
        if not self.with_images:
            return [sample for sample, _ in read]
        outs: Sequence[AnyImage | None] = images_out or [None] * len(items)
        return [
            sample._replace(image=self._read_image(index, sample.original_size, geometry, out))
            for (index, _), (sample, geometry), out in zip(items, read, outs, strict=True)
        ]

    def _read_maps(self, root: Root, key: str, name: str, position: int) -> tuple[Sample, Geometry]:
        """Read a sample without its photo.

        Args:
            key: the sample's in its root.
            name: its key in the data set.
        """
        where, raw = root.read_guide(key, self.labels)
        size = raw.shape[0], raw.shape[1]
        geometry = self._geometry(size, where, position)
        if self.labels.num_classes:
            # Only values that reach the network are looked at; the builder has looked at all.
            labels = self._train_ids(apply_to_map(raw, geometry), where)
        else:
            labels = np.zeros((geometry.height, geometry.width), self.labels.dtype)
        if geometry.flip and self.labels.mirrored is not None:
            labels = self.labels.mirrored[labels]
        edges, distances = None, None
        if not self.edges_follow_labels and (drawn := _read_edges(root, key, geometry, size, labels)) is not None:
            edges = torch.from_numpy(drawn)
        if self.spec.has_distances:
            distances = torch.from_numpy(_read_distances(root, key, geometry, size, labels))
        conditions = _read_conditions(root, key, geometry, size, self.conditions)
        maps = torch.from_numpy(labels), edges, distances
        return Sample(None, *maps, name, size, position, conditions), geometry

    def picture(self, sample: Sample) -> RgbImage:
        """Draw what an image is made of: the label map in its colours; without one, the edges or the condition."""
        if self.labels.num_classes:
            return self.labels.colourise(sample.labels.numpy())
        if sample.edges is not None:
            return 255 - 255 * sample.edges.numpy()[..., None].repeat(3, -1)
        assert sample.conditions is not None
        return draw_condition(sample.conditions[: self.conditions[0].channels].numpy())

    def find_photos(self) -> set[str]:
        """Look for photos beside label maps that are read without them; return the keys that have one."""
        found: set[str] = set()
        for root in self._roots:
            with suppress(DataError):
                root.photos = open_source(root.source.root, ["images"], suffixes=self._suffixes)
                root.photos.spell_as(root.source.keys)
                keys = set(root.photos.keys)
                found |= {k for k, (r, key) in zip(self.keys, self._places, strict=True) if r is root and key in keys}
        return found

    def photo(self, index: int, stored: tuple[int, int]) -> RgbImage:
        """Read the photo of a key that ``find_photos`` named, resized as its label map, of ``stored`` size, is.

        Raises:
            DataError: it cannot be read, is of another size, or is not as ``images`` says.
        """
        image = self._read_image(index, stored, self._geometry(stored, self.keys[index], index), None)
        return np.ascontiguousarray(photo_preview(image, self.images).permute(1, 2, 0).numpy())

    def _read_image(self, index: int, size: tuple[int, int], geometry: Geometry, out: AnyImage | None) -> Tensor:
        """Read a photo: [C, H, W], in memory channels last. A JPEG is decoded no larger than need be."""
        root, key = self._places[index]
        source = root.photos or root.source
        where, data = source.describe(key, "images"), source.read(key, "images")
        # (Once a JPEG is decoded at a part of its size, only the header tells that.)
        header = read_header(data, where)
        upright = is_upright(header, self.images, size, where)
        root.check_size(header.shown_size(upright), key, "images", size)
        reduction = geometry.reduction if is_jpeg(data) and not upright else 1
        stored = decode_photo(data, where, self.images, upright=upright, header=header, reduction=reduction)
        image = to_training(stored, self.images)
        return torch.from_numpy(apply_to_image(image, geometry, reduction=reduction, out=out)).permute(2, 0, 1)

    def expect_random_reads(self, shards_at_a_time: int | None = None) -> None:
        """Enable readahead only if the working set fits in memory; otherwise pages are evicted before use.

        Args:
            shards_at_a_time: number of shards in the working set; None: all.
        """
        share = 1 if shards_at_a_time is None else min(1, shards_at_a_time / len(self.shard_sizes))
        fits = share * sum(root.source.num_bytes for root in self._roots) < usable_memory() / 2
        for root in self._roots:
            root.source.readahead = fits

    def check_label_map(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of a label map as stored, and as ``dataset[index]`` gives it.

        Raises:
            DataError, LabelError: it cannot be used.
        """
        root, key = self._places[index]
        where, raw = root.read_guide(key, self.labels)
        if self._on_unknown is None and self.labels.num_classes:
            self.labels.count_pixels(raw, where)
        stored = raw.shape[0], raw.shape[1]
        geometry = self._geometry(stored, where, index)
        if self.conditions:  # each is looked at
            _read_conditions(root, key, geometry, stored, self.conditions)
        return stored, (geometry.height, geometry.width)

    def _geometry(self, stored: tuple[int, int], where: str, position: int) -> Geometry:
        augmentations = self.augmentations if self._size_of is None else _resizing_to(self._size_of(stored))
        return draw_geometry(*stored, augmentations, uniform_draws(self.seed, position, "augmentation"), where)

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
    root: Root, key: str, geometry: Geometry, size: tuple[int, int], labels: NDArray[np.generic]
) -> NDArray[np.uint8] | None:
    """Read or draw the edges of a sample: after the geometry, so that a border is one pixel wide at any scale."""
    stored: NDArray[np.generic] | None = None
    for data_type in root.edges.files_needed:
        stored = root.decode(key, data_type)
        root.check_size(stored.shape, key, data_type, size)
        stored = apply_to_map(stored, geometry)
    return root.edges.draw(labels, stored)


def _read_conditions(
    root: Root, key: str, geometry: Geometry, size: tuple[int, int], conditions: Sequence[Condition]
) -> Tensor | None:
    """Read the conditions of a sample: float32 [C, H, W]; None if there are none."""

    def read(name: str) -> tuple[NDArray[Any], str]:
        stored = root.decode(key, name)
        root.check_size(stored.shape, key, name, size)
        return stored, root.describe(key, name)

    return cut_conditions(conditions, read, geometry)


def _read_distances(
    root: Root, key: str, geometry: Geometry, size: tuple[int, int], labels: NDArray[np.generic]
) -> NDArray[np.float32]:
    """Read the distances of a sample; compute them where there is no file, or one of another size."""
    if root.has_distances:
        where, stored = root.source.describe(key, DISTANCES), root.decode(key, DISTANCES)
        if stored.shape[1:] == size:
            cut = apply_to_distances(stored, geometry)
            if not np.isfinite(cut).all():
                raise DataError(f"{where}: {NOT_FINITE}")
            return cut
        if not root.has_warned:
            root.has_warned = True
            warnings.warn(
                f"{where} is {stored.shape[1]} x {stored.shape[2]} (height x width), its label map {size[0]} x"
                f" {size[1]}: such distances are computed instead ({as_called(MAKER)} makes them anew)",
                stacklevel=2,
            )
    return class_distances(labels)


@lru_cache(maxsize=1024)
def _resizing_to(size: tuple[int, int]) -> AugmentationConfig:
    return AugmentationConfig(resize_h_w=size)


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
