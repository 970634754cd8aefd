"""Read and validate one sample for a shard: files against each other and against the label table.

Owns what a sound sample is, for the builder and for ``scripts/inspect_lmdb.py`` alike, and what the builder makes of it
on its way into a shard (``--resize_smallest_side``, ``--recode_maps``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.distances import NOT_FINITE, decode_distances
from imaginaire_spade.data.folders import DISTANCES, FolderSource, Source
from imaginaire_spade.data.image_files import (
    check_photo,
    decode_edges,
    decode_image,
    decode_instances,
    decode_label,
    encode_map,
)
from imaginaire_spade.data.lmdb_source import MAX_KEY_BYTES, store_key
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pictures import encode_picture


@dataclass(frozen=True)
class Plan:
    """What is to be built: the same for every shard."""

    source: FolderSource
    labels: LabelSpec
    data_types: tuple[str, ...]
    check: bool = True
    """Whether files are decoded. Without, they are stored as they are."""
    smallest_side: int | None = None
    """Photos and maps whose smaller side is longer are shrunk to it; None: every value is the original file."""
    quality: int = 95
    """Of JPEGs that are shrunk."""
    recode_maps: bool = False
    """Whether maps are written anew, with the same integers, so that they decode faster."""

    def treatment(self) -> dict[str, Any]:
        """What is done to the files, as a manifest states it."""
        shrunk = {"smallest_side": self.smallest_side, "quality": self.quality} if self.smallest_side else None
        return {"checked": self.check, "shrunk": shrunk, "recoded_maps": self.recode_maps}


@dataclass(frozen=True)
class LoadedSample:
    """The files of one sample, and what the check found."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    extensions: dict[str, str] = field(default_factory=dict)
    source_bytes: dict[str, int] = field(default_factory=dict)
    """Size of the files as they were read."""
    size: tuple[int, int] | None = None
    """(height, width) as stored; None: not looked at."""
    class_pixels: dict[int, int] = field(default_factory=dict)
    """Train id -> number of pixels, of those that occur."""
    problems: tuple[str, ...] = ()


DECODERS: dict[str, Callable[[bytes, str], NDArray[Any]]] = {
    "images": decode_image,
    "seg_maps": decode_label,
    "edge_maps": decode_edges,
    "inst_maps": decode_instances,
    DISTANCES: lambda data, where: decode_distances(data, where).transpose(1, 2, 0),
}


@dataclass
class CheckedFiles:
    """The files of one sample as they were read, and what their content says."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Data type -> content, of those that could be read."""
    pixels: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Data type -> what was decoded whole."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Data type -> (height, width)."""
    class_pixels: dict[int, int] = field(default_factory=dict)
    """Train id -> number of pixels, of those that occur."""
    problems: list[str] = field(default_factory=list)
    """Each names its file."""

    @property
    def first(self) -> str:
        """The data type whose size the others must have; "" where nothing was decoded."""
        return "seg_maps" if "seg_maps" in self.sizes else next(iter(self.sizes), "")

    @property
    def size(self) -> tuple[int, int] | None:
        return self.sizes.get(self.first)


def check_files(
    source: Source,
    key: str,
    data_types: Sequence[str],
    labels: LabelSpec | None,
    *,
    decode: bool = True,
    whole_photo: bool = False,
) -> CheckedFiles:
    """Read all files of one sample, decode them, compare their sizes and count the classes.

    It is the one check of a sample: what it lets into a data set, it finds sound in one. Problems are collected, not
    raised.

    Args:
        labels: the label table; None: label values are not looked at.
        decode: False: the files are only read, and must not be empty.
        whole_photo: decode the photo at full size and keep it.
    """
    checked = CheckedFiles()
    for data_type in data_types:
        where = source.describe(key, data_type)
        try:
            data = source.read(key, data_type)
            if not data:
                raise DataError(f"{where}: the file is empty (0 bytes)")
            checked.files[data_type] = data
            if not decode:
                continue
            if data_type == "images" and not whole_photo:
                checked.sizes[data_type] = check_photo(data, where)
                continue
            checked.pixels[data_type] = array = DECODERS[data_type](data, where)
            checked.sizes[data_type] = array.shape[0], array.shape[1]
            if data_type == "seg_maps" and labels is not None:
                checked.class_pixels = labels.count_pixels(array, where)
            elif data_type == DISTANCES and not np.isfinite(array).all():
                raise DataError(f"{where}: {NOT_FINITE}")
        except DataError as error:
            checked.problems.append(str(error))
    for data_type, (height, width) in checked.sizes.items():
        if (height, width) != checked.size:
            expected = checked.sizes[checked.first]
            checked.problems.append(
                f"{source.describe(key, data_type)} is {height} x {width} (height x width), but"
                f" {source.describe(key, checked.first)} is {expected[0]} x {expected[1]}: they must be of one size"
            )
    return checked


def load_sample(plan: Plan, key: str) -> LoadedSample:
    """Read, check and (where the plan says so) shrink all files of one sample. Problems are collected, not raised."""
    shrinks = plan.smallest_side is not None
    checked = check_files(plan.source, key, plan.data_types, plan.labels, decode=plan.check, whole_photo=shrinks)
    problems = checked.problems
    if len(store_key(key)) > MAX_KEY_BYTES:
        problems.append(f"{key}: the name is longer than {MAX_KEY_BYTES} bytes, the most that LMDB takes: shorten it")
    if problems:
        return LoadedSample(key, problems=tuple(problems))
    size = checked.size
    sample = LoadedSample(
        key,
        checked.files,
        {data_type: plan.source.extension(key, data_type) for data_type in checked.files},
        {data_type: len(data) for data_type, data in checked.files.items()},
        size,
        checked.class_pixels,
    )
    if size and plan.smallest_side and min(size) > plan.smallest_side:
        height, width = (max(1, round(side * plan.smallest_side / min(size))) for side in size)
        return _rewritten(plan, sample, checked.pixels, size, (height, width))
    if size and plan.recode_maps:
        return _rewritten(plan, sample, checked.pixels, size, size)
    return sample


def _rewritten(
    plan: Plan,
    sample: LoadedSample,
    pixels: dict[str, NDArray[Any]],
    stored: tuple[int, int],
    size: tuple[int, int],
) -> LoadedSample:
    """The sample of (height, width) ``stored`` at ``size``; if they are the same, only its maps are written anew."""
    class_pixels = sample.class_pixels
    geometry, shrinks = Geometry.whole(stored, size), stored != size
    for data_type, array in pixels.items():
        if data_type == "images":
            if shrinks:
                suffix = f".{sample.extensions[data_type]}"
                shrunk = apply_to_image(array, geometry, any_area=True)
                sample.files[data_type] = encode_picture(shrunk, suffix, quality=plan.quality)
        elif data_type != DISTANCES:
            moved = apply_to_map(array * np.uint8(255) if data_type == "edge_maps" else array, geometry)
            sample.files[data_type] = encode_map(moved)
            sample.extensions[data_type] = "png"
            if data_type == "seg_maps" and shrinks:
                class_pixels = plan.labels.count_pixels(moved, plan.source.describe(sample.key, data_type))
    return replace(sample, size=size, class_pixels=class_pixels)
