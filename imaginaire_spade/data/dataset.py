"""Read the samples of one or several data set folders: label maps with photos, as small integers on the CPU.

Owns how several roots join. A sample is a function of (seed, index, draw) alone. Nothing here is ever one-hot.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.data.decode import decode_label
from imaginaire_spade.data.environments import usable_memory
from imaginaire_spade.data.folders import DISTANCES, EDGE_FILES, Source
from imaginaire_spade.data.sample import Root, Sample
from imaginaire_spade.data.store import open_source
from imaginaire_spade.data.transforms import Geometry, draw_geometry
from imaginaire_spade.errors import DataError, LabelError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.noise import four_numbers

T = TypeVar("T")
R = TypeVar("R")


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
        size_of: (height, width) of a label map as stored -> that to which it is resized, in place of ``augmentations``.
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
        size_of: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
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
        assert augmentations is None or size_of is None, "one rule says how label maps are resized"
        self.augmentations = augmentations or AugmentationConfig()
        self._size_of = size_of
        self.seed = seed
        self.with_images = with_images
        self.spec = LayoutSpec.of(labels, edges, distances)
        edge_files = [EDGE_FILES[edges]] if edges in EDGE_FILES else []
        required = ["images", "seg_maps", *edge_files] if with_images else ["seg_maps"]
        self._roots: list[Root] = []
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
            stored = distances and source.has(DISTANCES) and not replace
            if distances and not stored and not replace and Path(root, DISTANCES).is_dir():
                warnings.warn(
                    f"{root}: {DISTANCES}/ does not have every sample, so all are computed from the label maps"
                    " (scripts/make_distance_maps.py makes the missing ones)",
                    stacklevel=2,
                )
            where_from = "none" if not distances else "file" if stored else "labels"
            self._roots.append(Root(source, edges if found else "labels", where_from))
        sources = [root.source for root in self._roots]
        self._starts = np.cumsum([0, *(len(source.keys) for source in sources)])
        self.keys = _unique_keys(sources)
        self.shard_sizes = [size for source in sources for size in source.shard_sizes]
        """Numbers of samples, in the order of ``keys``, whose files lie together."""

    def __len__(self) -> int:
        return len(self.keys)

    def without_images(self) -> LabelMapDataset:
        """Return the same samples without photos: only label maps (and the source of edges) are read."""
        dataset = copy.copy(self)
        dataset.with_images = False
        return dataset

    @property
    def edges_follow_labels(self) -> bool:
        """Whether every sample's edges are the borders of its labels, so that they can be drawn at any time."""
        return all(root.edges == "labels" for root in self._roots)

    @property
    def sample_bytes(self) -> int | None:
        """Count the bytes of a sample's tensors if all samples have one size; without computed edges."""
        if (size := self.augmentations.output_h_w) is None:
            return None
        has_edges = self.spec.has_edges and not self.edges_follow_labels
        numbers = 3 * self.with_images + np.dtype(self.labels.dtype).itemsize + has_edges
        return size[0] * size[1] * (numbers + 2 * 4 * self.spec.has_distances)

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        """The sample ``index``, or (index, draw); without a draw, it is the index.

        Raises:
            DataError, LabelError: naming the file and what is wrong with it.
        """
        index, draw = item if isinstance(item, tuple) else (item, item)
        return self.read([(index, draw)])[0]

    def read(
        self,
        items: Sequence[tuple[int, int]],
        *,
        draw_edges: bool = True,
        images_out: NDArray[np.uint8] | None = None,
    ) -> list[Sample]:
        """Read the samples of these (index, draw) pairs.

        Stage by stage, not sample by sample, which is a tenth faster: what a stage uses stays in the processor's cache.

        Args:
            draw_edges: False: edges that follow the labels are left to others.
            images_out: uint8 [len(items), H, W, 3] to lay the photos in.
        Raises:
            DataError, LabelError: naming the file and what is wrong with it.
        """
        places = [self._place(index) for index, _ in items]
        maps = [
            root.read_maps(key, self._train_ids, partial(self._geometry, draw=draw), draw_edges=draw_edges)
            for (root, key), (_, draw) in zip(places, items, strict=True)
        ]
        images: Sequence[Tensor | None] = [None] * len(items)
        if self.with_images:
            outs: Iterable[NDArray[np.uint8] | None] = [None] * len(items) if images_out is None else images_out
            images = [
                root.read_photo(key, geometry, sample.original_size, out)
                for (root, key), (sample, geometry), out in zip(places, maps, outs, strict=True)
            ]
        return [
            sample._replace(image=image, key=self.keys[index], draw=draw)
            for (index, draw), (sample, _), image in zip(items, maps, images, strict=True)
        ]

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
        """Return (height, width) of a label map as stored, and as ``read`` gives it (without a draw).

        Raises:
            DataError, LabelError: it cannot be used.
        """
        root, key = self._place(index)
        where = root.source.where(key, "seg_maps")
        raw = decode_label(root.source.read(key, "seg_maps"), where)
        if self._on_unknown is None:
            self.labels.count_pixels(raw, where)
        stored = raw.shape[0], raw.shape[1]
        geometry = self._geometry(stored, where, index)
        return stored, (geometry.height, geometry.width)

    def _geometry(self, stored: tuple[int, int], where: str, draw: int) -> Geometry:
        augmentations = self.augmentations if self._size_of is None else _resizing_to(self._size_of(stored))
        return draw_geometry(*stored, augmentations, four_numbers(self.seed, draw, "augmentation"), where)

    def _place(self, index: int) -> tuple[Root, str]:
        """The root that has a sample, and the sample's key there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._roots[number], self._roots[number].source.keys[index - self._starts[number]]

    def _train_ids(self, raw: NDArray[np.generic], where: str) -> NDArray[np.generic]:
        try:
            labels = self.labels.to_train_ids(raw, where)
        except LabelError as error:
            if self._on_unknown is None:
                raise
            labels = self.labels.to_train_ids(raw, where, unknown="dont_care")
            self._on_unknown(error)
        return labels if self._replaced is None else self._replaced[labels]


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


def read_ahead(function: Callable[[T], R], items: Iterable[T], ahead: int, *, num_threads: int = 1) -> Iterator[R]:
    """Yield what ``map`` does, in order; threads compute up to ``ahead`` items before they are asked for."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, "read") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
