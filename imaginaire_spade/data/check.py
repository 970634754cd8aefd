"""Check every file of a data set before it is built: decode it, hash it, compare sizes and label values.

Problems are collected, so that one run tells all (up to ``MAX_PROBLEMS``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from imaginaire_spade.data.decode import decode_edges, decode_image, decode_instances, decode_label
from imaginaire_spade.data.distances import NOT_FINITE, decode_distances
from imaginaire_spade.data.folders import DISTANCES, FolderSource
from imaginaire_spade.data.store import MAX_KEY_BYTES, store_key
from imaginaire_spade.data.workers import map_in_processes
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec

MAX_PROBLEMS = 20
"""Checking stops after this many."""

_DECODERS: dict[str, Callable[[bytes, str], NDArray[Any]]] = {
    "images": decode_image,
    "edge_maps": decode_edges,
    "inst_maps": decode_instances,
}


@dataclass(frozen=True)
class Checked:
    """What the check of one sample found."""

    key: str
    size: tuple[int, int]
    """(height, width)."""
    class_pixels: dict[int, int]
    """Train id -> number of pixels, of those that occur."""
    digests: dict[str, bytes]
    """Data type -> sha256 of the file."""
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be built: the same for every shard."""

    source: FolderSource
    labels: LabelSpec
    data_types: tuple[str, ...]


def _check_sample(plan: Plan, key: str) -> Checked:
    """Read, hash, decode and check all files of one sample. Problems are collected, not raised."""
    problems: list[str] = []
    digests: dict[str, bytes] = {}
    sizes: dict[str, tuple[int, int]] = {}
    class_pixels: dict[int, int] = {}
    if len(store_key(key)) > MAX_KEY_BYTES:
        problems.append(f"{key}: the name is longer than {MAX_KEY_BYTES} bytes, the most that LMDB takes: shorten it")
    for data_type in plan.data_types:
        where = plan.source.where(key, data_type)
        try:
            data = plan.source.read(key, data_type)
            digests[data_type] = hashlib.sha256(data).digest()
            if data_type == "seg_maps":
                raw = decode_label(data, where)
                sizes[data_type] = raw.shape[0], raw.shape[1]
                train_ids = plan.labels.to_train_ids(raw, where)
                counts = np.bincount(train_ids.ravel())
                class_pixels = {i: int(counts[i]) for i in np.flatnonzero(counts).tolist()}
            elif data_type == DISTANCES:
                distances = decode_distances(data, where)
                if not np.isfinite(distances).all():
                    raise DataError(f"{where}: {NOT_FINITE}")
                sizes[data_type] = distances.shape[1], distances.shape[2]
            else:
                height, width = _DECODERS[data_type](data, where).shape[:2]
                sizes[data_type] = height, width
        except DataError as error:
            problems.append(str(error))
    size = sizes.get("seg_maps", (0, 0))
    for data_type, other in sizes.items():
        if "seg_maps" in sizes and other != size:
            problems.append(
                f"{plan.source.where(key, data_type)} is {other[0]} x {other[1]} (height x width), but"
                f" {plan.source.where(key, 'seg_maps')} is {size[0]} x {size[1]}: they must be of one size"
            )
    return Checked(key, size, class_pixels, digests, tuple(problems))


def check_all(plan: Plan, keys: Sequence[str], num_workers: int | None) -> dict[str, Checked]:
    """Check the samples ``keys`` in ``num_workers`` processes (None: min(8, cores); 0: in this one).

    Raises:
        DataError: listing the problems found.
    """
    checked: dict[str, Checked] = {}
    problems: list[str] = []
    with tqdm(total=len(keys), desc="checking", unit="images", mininterval=0.5) as progress:
        for result in map_in_processes(partial(_check_sample, plan), keys, num_workers):
            checked[result.key] = result
            problems += result.problems
            progress.update()
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        rest = f" (checking stopped after sample {len(checked)} of {len(keys)})" if len(checked) < len(keys) else ""
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise DataError(f"{plan.source.root}: {len(problems)} problem(s), nothing was built{rest}:\n  {listed}")
    return checked
