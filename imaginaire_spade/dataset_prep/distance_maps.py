"""Write a distance map ``ROOT/distances/NAME.npy`` for every label map (``scripts/make_distance_maps.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from imaginaire_spade.data.distances import class_distances, encode_distances, read_header
from imaginaire_spade.data.folders import DISTANCES, FolderSource
from imaginaire_spade.data.image_files import decode_label, image_size
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import write_bytes
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.workers import map_in_processes


def make_distance_maps(
    root: Path,
    labels: LabelSpec,
    *,
    num_workers: int | None = None,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[int, int]:
    """Write the distance map of every label map in ``root/seg_maps``, at the label map's size.

    A file that is whole, of that size and not older than its label map is kept; so an interrupted run is continued by
    running it again. Files appear under their final names only when they are whole.

    Args:
        root: a data set of plain folders.
        num_workers: processes (None: min(8, cores); 0: this one).
        overwrite: make all anew.
        rank, world_size: make every ``world_size``-th map, from number ``rank`` on.
    Returns:
        The number of maps made and kept.
    Raises:
        DataError, LabelError: naming the file. Maps made by then stay.
    """
    if num_workers is not None and num_workers < 0:
        raise DataError(f"--num_workers {num_workers}: write at least 0")
    source = FolderSource(root, ["seg_maps"])
    keys: Sequence[str] = source.keys[rank::world_size]
    results = map_in_processes(_MakeMap(source, labels, overwrite), keys, num_workers)
    made = sum(tqdm(results, "distance maps", len(keys), unit="maps", mininterval=0.5, disable=rank > 0))
    return made, len(keys) - made


@dataclass(frozen=True)
class _MakeMap:
    source: FolderSource
    labels: LabelSpec
    overwrite: bool

    def __call__(self, key: str) -> bool:
        """Whether the map of ``key`` was made."""
        path = self.source.path(key, "seg_maps")
        data = self.source.read(key, "seg_maps")
        target = self.source.root / DISTANCES / f"{key}.npy"
        if not self.overwrite and _is_kept(target, path, image_size(data, str(path))):
            return False
        ids = self.labels.to_train_ids(decode_label(data, str(path)), str(path))
        write_bytes(target, encode_distances(class_distances(ids)))
        return True


def _is_kept(target: Path, label_map: Path, size: tuple[int, int]) -> bool:
    try:
        with target.open("rb") as file:
            shape, _ = read_header(file, target.stat().st_size, str(target))
        return shape[1:] == size and target.stat().st_mtime >= label_map.stat().st_mtime
    except (OSError, DataError):
        return False
