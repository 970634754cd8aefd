"""Read one sample: decode its files, apply one geometry to all of them, and make tensors on the CPU.

Owns where edges and distances of a root's samples come from. A sample is a function of its files, the label table and
the random generator alone. Nothing here is ever one-hot, and pictures stay uint8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.data.decode import decode_edges, decode_image, decode_instances, decode_label, image_size, is_jpeg
from imaginaire_spade.data.distances import NOT_FINITE, class_distances, decode_distances
from imaginaire_spade.data.folders import DISTANCES, EDGE_FILES, Source
from imaginaire_spade.data.transforms import (
    Geometry,
    apply_to_distances,
    apply_to_image,
    apply_to_map,
    edges_from_ids,
)
from imaginaire_spade.errors import DataError


class Sample(NamedTuple):
    """One sample, on the CPU."""

    image: Tensor | None
    """uint8 [3, H, W], in memory channels last."""
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


@dataclass
class Root:
    """The samples of one root of a data set."""

    source: Source
    edges: str
    """"none", "file", "instances" or "labels": what they are read or drawn from."""
    distances: str
    """"none", "file" or "labels"."""
    _told_of_sizes: bool = field(default=False, init=False)

    def read_maps(
        self,
        key: str,
        to_train_ids: Callable[[NDArray[np.generic], str], NDArray[np.generic]],
        geometry_of: Callable[[tuple[int, int], str], Geometry],
        *,
        draw_edges: bool = True,
    ) -> tuple[Sample, Geometry]:
        """The sample ``key``, of draw 0, as yet without its photo, and the geometry that it has been given.

        Args:
            to_train_ids: a raw label map, and what to call it -> ids.
            geometry_of: (height, width) of the label map as stored, and what to call it -> how it is cut and resized.
            draw_edges: False: edges that follow the labels are left to others.
        Raises:
            DataError, LabelError: naming the file and what is wrong with it.
        """
        where = self.source.where(key, "seg_maps")
        raw = decode_label(self.source.read(key, "seg_maps"), where)
        size = raw.shape[0], raw.shape[1]
        geometry = geometry_of(size, where)
        # Only values that reach the network are looked at; the builder has looked at all.
        ids = to_train_ids(apply_to_map(raw, geometry), where)
        has_edges = self.edges != "none" and (draw_edges or self.edges != "labels")
        edges = torch.from_numpy(self._read_edges(key, geometry, size, ids)) if has_edges else None
        distances = self._read_distances(key, geometry, size) if self.distances == "file" else None
        if self.distances != "none" and distances is None:
            distances = class_distances(ids)
        offsets = None if distances is None else torch.from_numpy(distances)
        return Sample(None, torch.from_numpy(ids), edges, offsets, key, size, 0), geometry

    def read_photo(
        self, key: str, geometry: Geometry, size: tuple[int, int], out: NDArray[np.uint8] | None = None
    ) -> Tensor:
        """The photo of ``key``: uint8 [3, geometry.height, geometry.width] RGB, in memory channels last.

        Args:
            size: (height, width) of its label map as stored.
            out: uint8 [geometry.height, geometry.width, 3] to lay it in.
        Raises:
            DataError: naming the file and what is wrong with it.
        """
        where = self.source.where(key, "images")
        data = self.source.read(key, "images")
        reduction = geometry.reduction if is_jpeg(data) else 1  # a JPEG is decoded no larger than need be
        if reduction > 1:  # then its size is known from the header alone
            self._check_size(image_size(data, where), where, size, key)
        photo = decode_image(data, where, reduction=reduction)
        if reduction == 1:
            self._check_size(photo.shape, where, size, key)
        return torch.from_numpy(apply_to_image(photo, geometry, reduction=reduction, out=out)).permute(2, 0, 1)

    def _read_edges(
        self, key: str, geometry: Geometry, size: tuple[int, int], ids: NDArray[np.generic]
    ) -> NDArray[np.generic]:
        # Drawn after the geometry, so that a border is one pixel wide (two with its other side) at any scale.
        if self.edges == "labels":
            return edges_from_ids(ids)
        data_type = EDGE_FILES[self.edges]
        decode = decode_edges if self.edges == "file" else decode_instances
        where = self.source.where(key, data_type)
        stored: NDArray[np.generic] = decode(self.source.read(key, data_type), where)
        self._check_size(stored.shape, where, size, key)
        cut = apply_to_map(stored, geometry)
        return cut if self.edges == "file" else edges_from_ids(cut)

    def _read_distances(self, key: str, geometry: Geometry, size: tuple[int, int]) -> NDArray[np.float32] | None:
        """The stored distance map, or None where it is of another size than the label map."""
        where = self.source.where(key, DISTANCES)
        stored = decode_distances(self.source.read(key, DISTANCES), where)
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

    def _check_size(self, shape: tuple[int, ...], where: str, label_size: tuple[int, int], key: str) -> None:
        if shape[:2] != label_size:
            raise DataError(
                f"{where} is {shape[0]} x {shape[1]} (height x width), but {self.source.where(key, 'seg_maps')} is"
                f" {label_size[0]} x {label_size[1]}: they must be of one size. Resize the label map with nearest"
                " neighbour, or export both from the original"
            )
