"""Read and check one sample: files against each other and against the label table.

Responsible for what a valid sample is, for the builder and for ``scripts/inspect_lmdb.py`` alike, what the builder
makes of it on its way into a shard (``--resize_smallest_side``, ``--recode_maps``), and the counts over many samples.
"""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config import Condition, ImageSpec
from imaginaire_spade.data.conditions import check_values, decode_condition, encode_condition
from imaginaire_spade.data.distances import NOT_FINITE
from imaginaire_spade.data.file_structure import is_jpeg
from imaginaire_spade.data.folders import DISTANCES, FolderSource, Source
from imaginaire_spade.data.image_files import DECODERS, encode_map
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.data.lmdb_source import store_key
from imaginaire_spade.data.photos import decode_photo, is_upright, read_header
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import encode_image
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.doubts import find_doubts

RESIZABLE = (np.uint8, np.uint16, np.int16, np.float32)
"""Types that OpenCV resizes."""
MAX_KEY_BYTES = 511
"""LMDB's limit."""


@dataclass(frozen=True)
class Plan:
    """What to build."""

    source: FolderSource
    labels: LabelSpec
    images: ImageSpec
    data_types: tuple[str, ...]
    shards: Mapping[str, Sequence[str]]
    """Path of every shard below the root -> its keys, in the order of their store keys."""
    check: bool = True
    """Whether files are decoded. Without, they are stored as they are."""
    smallest_side: int | None = None
    """Photos and maps whose smaller side is longer are shrunk to it; None: every value is the original file."""
    quality: int = 95
    """Of JPEGs that are shrunk."""
    recode_maps: bool = False
    """Whether to re-encode maps, with the same integers, so that they decode faster."""
    skip_bad: bool = False
    """Whether to leave out the samples that have a problem."""
    conditions: tuple[Condition, ...] = ()
    """``data.conditions``, whose names are data types."""

    def treatment(self) -> dict[str, Any]:
        """Return what is done to the files, as a manifest states it."""
        shrunk = {"smallest_side": self.smallest_side, "quality": self.quality} if self.smallest_side else None
        treatment = {"checked": self.check, "shrunk": shrunk, "recoded_maps": self.recode_maps}
        conditions = [condition.model_dump(mode="json") for condition in self.conditions]
        return treatment | ({"conditions": conditions} if conditions else {})


@dataclass
class PhotoFacts:
    """What the builder found in photos that are not plain 8-bit RGB or grey."""

    values: list[int | float] = field(default_factory=list)
    """Minimum and maximum, where ``data.images`` has a range."""
    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """What a summary says -> number of photos, and the keys of some."""

    def add(self, values: Sequence[int | float], found: Mapping[str, tuple[int, list[str]]]) -> None:
        """Add what was found in others.

        Raises:
            DataError: 8-bit photos among deeper ones, which would all be taken for dark.
        """
        self.values = [f([*self.values, *values]) for f in (min, max)] if values else self.values
        for note, (number, keys) in found.items():
            before, named = self.found.get(note, (0, []))
            self.found[note] = before + number, [*named, *keys][:5]
        types = {note: keys for note, (_, keys) in self.found.items() if note.startswith("of ")}
        if "of uint8" in types and len(types) > 1:
            raise DataError(f"photos of 8 bits among deeper ones, under one data.images.range: convert them: {types}")


@dataclass
class LoadedSample:
    """The files of one sample, and what the check found."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Data type -> content, of those that could be read."""
    num_bytes: dict[str, int] = field(default_factory=dict)
    """Data type -> size of that content."""
    recoded: dict[str, str] = field(default_factory=dict)
    """Data type -> new extension, of the files that were re-encoded with another."""
    size: tuple[int, int] | None = None
    """(height, width) of the label map (or of the first data type); None: nothing was decoded."""
    photo: PhotoFacts = field(default_factory=PhotoFacts)
    class_pixels: dict[int, int] = field(default_factory=dict)
    """Train id -> number of pixels, of those that occur."""
    doubts: dict[str, int] = field(default_factory=dict)
    """What ``find_doubts`` found in the label map."""
    checksums: dict[str, int] = field(default_factory=dict)
    """Data type -> CRC-32 of its file in the source."""
    problems: list[DataError] = field(default_factory=list)
    """Each names its file."""


@dataclass
class Contents:
    """Counts over many samples."""

    num_samples: int = 0
    num_bytes: Counter[str] = field(default_factory=Counter)
    """Data type -> bytes of its values."""
    sizes: Counter[str] = field(default_factory=Counter)
    """"HxW" of the label maps (or of the first data type) -> samples."""
    class_pixels: Counter[int] = field(default_factory=Counter)
    class_samples: Counter[int] = field(default_factory=Counter)
    """Train id -> number of samples that hold it."""
    doubts: Counter[str] = field(default_factory=Counter)
    label_checksums: Counter[int] = field(default_factory=Counter)
    """Checksum of a label map's file -> samples that have it."""
    photos: PhotoFacts = field(default_factory=PhotoFacts)
    problems: list[DataError] = field(default_factory=list)

    def add(self, sample: LoadedSample) -> None:
        """Count one sample."""
        self.num_samples += 1
        for data_type, number in sample.num_bytes.items():  # (Counter.update takes ten times as long)
            self.num_bytes[data_type] += number
        if sample.size:
            self.sizes[f"{sample.size[0]}x{sample.size[1]}"] += 1
        if sample.photo.found:
            self.photos.add(sample.photo.values, sample.photo.found)
        for train_id, number in sample.class_pixels.items():
            self.class_pixels[train_id] += number
            self.class_samples[train_id] += 1
        for doubt, number in sample.doubts.items():
            self.doubts[doubt] += number
        if sample.size and "seg_maps" in sample.checksums:
            self.label_checksums[sample.checksums["seg_maps"]] += 1
        self.problems += sample.problems


def check_sample(
    source: Source,
    key: str,
    data_types: Sequence[str],
    labels: LabelSpec | None,
    images: ImageSpec,
    *,
    decode: bool = True,
    whole_photo: bool = False,
    conditions: Sequence[Condition] = (),
) -> tuple[LoadedSample, dict[str, NDArray[Any]]]:
    """Read all files of one sample, decode them, compare their sizes and count the classes.

    It is the one check of a sample: what it accepts for a data set, it accepts in one. Problems are collected, not
    raised.

    Args:
        labels: the label table; None: do not look at label values.
        images: what photos mean.
        decode: False: only read the files, which must not be empty.
        whole_photo: decode the photo at full size and return it.
        conditions: what the data types of their names hold.
    Returns:
        The sample, and data type -> pixels of the files that were decoded at full size.
    """
    sample = LoadedSample(key)
    pixels: dict[str, NDArray[Any]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    dense = {condition.name: condition for condition in conditions}
    for data_type in sorted(data_types, key="images".__eq__):  # the photo last: its label map tells how it is turned
        where = source.describe(key, data_type)
        try:
            data = source.read(key, data_type)
            sample.checksums[data_type] = zlib.crc32(data)
            if not data:
                raise DataError(f"{where}: the file is empty (0 bytes)")
            sample.files[data_type] = data
            sample.num_bytes[data_type] = len(data)
            if not decode:
                continue
            if data_type == "images":
                label_size = sizes.get("seg_maps") or next(iter(sizes.values()), None)
                photo, sizes[data_type], notes, values = check_photo(data, where, images, label_size, whole_photo)
                sample.photo.add(values, {note: (1, [key]) for note in notes})
                if whole_photo:
                    pixels[data_type] = photo
                continue
            is_labels, condition = data_type == "seg_maps", dense.get(data_type)
            if is_labels:
                array = read_labels(data, where, labels)
            elif condition is not None:
                array = decode_condition(data, where, condition.channels)
                check_values(array, array.dtype, condition, where)
            else:
                array = DECODERS[data_type](data, where)
            pixels[data_type] = array
            height, width = array.shape[1:] if data_type == DISTANCES else array.shape[:2]
            sizes[data_type] = height, width
            if is_labels and labels is not None:
                sample.class_pixels = labels.count_pixels(array, where)
                sample.doubts = find_doubts(labels, array, sample.class_pixels)
            elif data_type == DISTANCES and not np.isfinite(array).all():
                raise DataError(f"{where}: {NOT_FINITE}")
        except DataError as error:
            sample.problems.append(error)
    first = "seg_maps" if "seg_maps" in sizes else next(iter(sizes), "")
    sample.size = sizes.get(first)
    for data_type, (height, width) in sizes.items():
        if (height, width) != sizes[first]:
            sizes_differ = (
                f"{source.describe(key, data_type)} is {height} x {width} (height x width), but"
                f" {source.describe(key, first)} is {sizes[first][0]} x {sizes[first][1]}: they must be of one size"
            )
            sample.problems.append(DataError(sizes_differ))
    return sample, pixels


def check_photo(
    data: bytes, where: str, images: ImageSpec, label_size: tuple[int, int] | None, whole: bool
) -> tuple[NDArray[Any], tuple[int, int], list[str], list[int | float]]:
    """Decode a photo, a JPEG small unless ``whole``. Returns its pixels, its (height, width) and its ``PhotoFacts``.

    Raises:
        DataError: it is not as ``images`` says.
    """
    header = read_header(data, where)
    upright = is_upright(header, images, label_size, where)
    # A decoder reads a JPEG to its end at any scale: decoding at 1/8 detects the same corruption 40 % faster.
    reduction = 8 if is_jpeg(data) and not whole and images.range is None else 1  # (a range is measured whole)
    array = decode_photo(data, where, images, upright=upright and whole, header=header, reduction=reduction)
    notes, values = list[str](), list[int | float]()
    if images.range is not None:
        values = [array.min().item(), array.max().item()]
        notes.append(f"of {header.dtype}")
        if images.range != "auto" and not images.range[0] <= values[0] <= values[1] <= images.range[1]:
            notes.append("with values beyond data.images.range, which are clipped")
    if header.has_alpha:
        notes.append("whose alpha channel is left out" if images.drop_alpha else "with alpha as a channel")
    if header.orientation != 1:
        notes.append(f"with an EXIF orientation, taken {'upright' if upright else 'as stored'}")
    return array, header.shown_size(upright), notes, values


def load_sample(plan: Plan, key: str) -> LoadedSample:
    """Read, check and (if the plan says so) re-encode all files of one sample. Problems are collected, not raised."""
    shrinks = plan.smallest_side is not None
    sample, pixels = check_sample(
        plan.source, key, plan.data_types, plan.labels, plan.images, decode=plan.check, whole_photo=shrinks,
        conditions=plan.conditions,
    )  # fmt: skip
    if len(store_key(key)) > MAX_KEY_BYTES:
        too_long = f"{key}: the name is longer than {MAX_KEY_BYTES} bytes, the most that LMDB takes: shorten it"
        sample.problems.append(DataError(too_long))
    if sample.problems:
        sample.files = {}  # nobody will store them
    elif sample.size and plan.smallest_side and min(sample.size) > plan.smallest_side:
        height, width = (max(1, round(side * plan.smallest_side / min(sample.size))) for side in sample.size)
        _reencode(plan, sample, pixels, (height, width))
    elif sample.size and plan.recode_maps:
        _reencode(plan, sample, pixels, sample.size)
    return sample


def _reencode(plan: Plan, sample: LoadedSample, pixels: dict[str, NDArray[Any]], size: tuple[int, int]) -> None:
    """Bring the files to (height, width) ``size``; if they have it already, re-encode the maps alone."""
    assert sample.size
    geometry, shrinks = Geometry.whole(sample.size, size), sample.size != size
    sample.size = size
    for data_type, array in pixels.items():
        if data_type == "images":
            if shrinks:
                extension = plan.source.extension(sample.key, data_type)
                sample.recoded[data_type] = extension = {"jfif": "jpg", "gif": "png"}.get(extension, extension)
                if array.shape[2] not in (1, 3, 4):
                    sample.recoded[data_type] = extension = "npy"
                resizable = array if array.dtype in RESIZABLE else array.astype(np.float64)
                shrunk = apply_to_image(resizable, geometry, any_area=True).astype(array.dtype, copy=False)
                sample.files[data_type] = encode_image(shrunk, f".{extension}", quality=plan.quality)
        elif data_type not in DECODERS:  # a condition
            if shrinks:
                sample.files[data_type] = encode_condition(apply_to_map(array, geometry))
                sample.recoded[data_type] = "npy"
        elif data_type != DISTANCES:
            moved = apply_to_map(array * np.uint8(255) if data_type == "edge_maps" else array, geometry)
            sample.files[data_type] = encode_map(moved)
            sample.recoded[data_type] = "png" if sample.files[data_type].startswith(b"\x89PNG") else "npy"
            if data_type == "seg_maps" and shrinks:
                sample.class_pixels = plan.labels.count_pixels(moved, plan.source.describe(sample.key, data_type))
    sample.num_bytes = {data_type: len(data) for data_type, data in sample.files.items()}
