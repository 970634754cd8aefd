"""Write ``ROOT/edge_maps/NAME.png`` from instance or label maps (``scripts/make_edge_maps.py``).

(Edges can as well be drawn while training, after the augmentation: ``data.edges: instances`` or ``labels``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_instances, decode_label, encode_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import write_bytes
from imaginaire_spade.labels import edges_from_ids
from imaginaire_spade.lmdb_builder.workers import map_in_processes

SOURCES = {"instances": ("inst_maps",), "labels": ("seg_maps",), "both": ("seg_maps", "inst_maps")}


def make_edge_maps(
    root: Path, of: str, *, num_workers: int | None = None, overwrite: bool = False, rank: int = 0, world_size: int = 1
) -> tuple[int, int]:
    """Write the edge map of every sample that lacks one: PNG of 0 and 255.

    Args:
        of: a key of ``SOURCES``; "both" marks the borders of either (COCO-Stuff's boundary maps).
        rank, world_size: make every ``world_size``-th map, from number ``rank`` on.
    Returns:
        The number of maps made and kept.
    Raises:
        DataError: naming the file. Maps made by then stay.
    """
    source = FolderSource(root, SOURCES[of])
    keys: Sequence[str] = source.keys[rank::world_size]
    results = map_in_processes(_MakeMap(source, SOURCES[of], overwrite), keys, num_workers)
    made = sum(tqdm(results, "edge maps", len(keys), unit="maps", mininterval=0.5, disable=rank > 0))
    return made, len(keys) - made


@dataclass(frozen=True)
class _MakeMap:
    source: FolderSource
    data_types: Sequence[str]
    overwrite: bool

    def __call__(self, key: str) -> bool:
        target = self.source.root / "edge_maps" / f"{key}.png"
        if target.is_file() and not self.overwrite:
            return False
        maps = []
        for t in self.data_types:
            where = self.source.describe(key, t)
            data = self.source.read(key, t)
            if t == "inst_maps":
                maps.append(edges_from_ids(decode_instances(data, where)))
            else:
                label = decode_label(data, where)
                channels = [label] if label.ndim == 2 else list(label.transpose(2, 0, 1))
                maps.append(np.maximum.reduce([edges_from_ids(channel) for channel in channels]))
        if len({edges.shape for edges in maps}) > 1:
            raise DataError(f"{self.source.describe(key, 'seg_maps')}: its instance map has another size")
        edges = np.maximum.reduce(maps) * np.uint8(255)
        write_bytes(target, encode_map(edges))
        return True
