"""Know where the samples of one root of a data set come from, which data types they have, and what may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config import Condition
from imaginaire_spade.data.conditions import decode_condition
from imaginaire_spade.data.folders import Source
from imaginaire_spade.data.image_files import DECODERS
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import EdgeSource, LabelSpec


@dataclass
class Root:
    """Where the samples of one root come from."""

    source: Source
    edges: EdgeSource
    has_distances: bool
    """Whether distances are read from files."""
    guide: str = "seg_maps"
    """The data type whose files say how large a sample is: label maps, or the first of what there is instead."""
    has_warned: bool = False
    """Of distances of another size than their label map."""
    photos: Source | None = None
    """Where ``find_photos`` found photos."""

    def describe(self, key: str, data_type: str) -> str:
        """Name a file in a message."""
        return self.source.describe(key, data_type)

    def decode(self, key: str, data_type: str) -> NDArray[Any]:
        """Read and decode a map or a condition."""
        decode = DECODERS.get(data_type, decode_condition)
        return decode(self.source.read(key, data_type), self.describe(key, data_type))

    def read_guide(self, key: str, labels: LabelSpec) -> tuple[str, NDArray[np.generic]]:
        """Read a label map (or its ``guide``) as it is stored: its name in messages, and raw ids or colours."""
        where = self.describe(key, self.guide)
        if self.guide != "seg_maps":
            return where, self.decode(key, self.guide)
        return where, read_labels(self.source.read(key, "seg_maps"), where, labels)

    def find_doubt(self, labels: LabelSpec) -> str | None:
        """Say what about the first sample's maps may be a mistake, though they can be used."""
        key = self.source.keys[0]
        with suppress(DataError):
            if "edge_maps" in self.edges.files_needed and self.decode(key, "edge_maps").mean() > 0.5:
                where = self.describe(key, "edge_maps")
                return f"{where}: most pixels are edges (not 0). Lines are white on black: invert black on white"
            if self.guide == "seg_maps" and labels.num_classes > 1 and 255 in labels.ignore:
                where, raw = self.read_guide(key, labels)
                if raw.ndim == 2 and np.array_equal(np.unique(raw), [0, 255]):
                    return f"{where}: holds 0 and 255 alone, and 255 means no class here: a binary mask has 0 and 1"
        return None

    def check_size(self, shape: tuple[int, ...], key: str, data_type: str, label_size: tuple[int, int]) -> None:
        """Refuse a file of another size than its label map."""
        if shape[:2] != label_size:
            raise DataError(
                f"{self.describe(key, data_type)} is {shape[0]} x {shape[1]} (height x width), but"
                f" {self.describe(key, self.guide)} is {label_size[0]} x {label_size[1]}: they must be of one"
                " size. Resize the label map with nearest neighbour, or export both from the original"
            )


def map_types(labels: LabelSpec, edges: EdgeSource, conditions: Sequence[Condition]) -> list[str]:
    """List the data types without which there is no sample, its guide first."""
    maps = ["seg_maps"] if labels.num_classes else [*edges.files_needed]
    return maps + [condition.name for condition in conditions]
