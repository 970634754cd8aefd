"""One sample on its way into a shard: its files read once, decoded, compared with each other and with the label table.

Owns what a checked sample is, and how a picture shrinks on the way (``--resize_smallest_side``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.decode import decode_bgr, decode_edges, decode_image, decode_instances, decode_label
from imaginaire_spade.data.distances import NOT_FINITE, decode_distances
from imaginaire_spade.data.folders import DISTANCES, FolderSource
from imaginaire_spade.data.store import MAX_KEY_BYTES, store_key
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec


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


def load_sample(plan: Plan, key: str) -> LoadedSample:
    """Read, check and (where the plan says so) shrink all files of one sample. Problems are collected, not raised."""
    sample = LoadedSample(key)
    problems: list[str] = []
    if len(store_key(key)) > MAX_KEY_BYTES:
        problems.append(f"{key}: the name is longer than {MAX_KEY_BYTES} bytes, the most that LMDB takes: shorten it")
    pixels: dict[str, NDArray[Any]] = {}
    for data_type in plan.data_types:
        where = plan.source.where(key, data_type)
        try:
            data = plan.source.read(key, data_type)
            if not data:
                raise DataError(f"{where}: the file is empty (0 bytes)")
            sample.files[data_type] = data
            sample.source_bytes[data_type] = len(data)
            sample.extensions[data_type] = plan.source.extension(key, data_type)
            if plan.check:
                decode = decode_bgr if data_type == "images" else DECODERS[data_type]
                pixels[data_type] = decode(data, where)
                if data_type == "seg_maps":
                    sample.class_pixels.update(plan.labels.count_pixels(pixels[data_type], where))
                elif data_type == DISTANCES and not np.isfinite(pixels[data_type]).all():
                    raise DataError(f"{where}: {NOT_FINITE}")
        except DataError as error:
            problems.append(str(error))
    sizes = {data_type: (array.shape[0], array.shape[1]) for data_type, array in pixels.items()}
    first = "seg_maps" if "seg_maps" in sizes else next(iter(sizes), "")
    for data_type, other in sizes.items():
        if other != sizes[first]:
            problems.append(
                f"{plan.source.where(key, data_type)} is {other[0]} x {other[1]} (height x width), but"
                f" {plan.source.where(key, first)} is {sizes[first][0]} x {sizes[first][1]}: they must be of one size"
            )
    if problems:
        return LoadedSample(key, problems=tuple(problems))
    size = sizes[first] if sizes else None
    if size and plan.smallest_side and min(size) > plan.smallest_side:
        return _shrunk(plan, sample, pixels, size)
    return replace(sample, size=size)


def _shrunk(plan: Plan, sample: LoadedSample, pixels: dict[str, NDArray[Any]], size: tuple[int, int]) -> LoadedSample:
    assert plan.smallest_side
    height, width = (max(1, round(side * plan.smallest_side / min(size))) for side in size)
    geometry = Geometry(height, width, 0, 0, height, width, False)
    class_pixels = {}
    for data_type, array in pixels.items():
        if data_type == "images":
            extension = sample.extensions[data_type]
            rgb = apply_to_image(array, geometry, any_area=True)[..., ::-1]
            sample.files[data_type] = _encode(rgb, f".{extension}", plan.quality)
        else:
            stored = apply_to_map(array * np.uint8(255) if data_type == "edge_maps" else array, geometry)
            sample.files[data_type] = _encode(_integers_of_a_png(stored), ".png", 0)
            sample.extensions[data_type] = "png"
            if data_type == "seg_maps":
                class_pixels = plan.labels.count_pixels(stored, plan.source.where(sample.key, data_type))
    return replace(sample, size=(height, width), class_pixels=class_pixels)


def _integers_of_a_png(ids: NDArray[Any]) -> NDArray[np.generic]:
    """uint8 or uint16 [H, W], or, for instance ids beyond 65535, R + 256 G + 65536 B as uint8 [H, W, 3]."""
    if ids.dtype != np.int32:
        return ids
    if ids.max() <= 65535:
        return ids.astype(np.uint16)
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], 2).astype(np.uint8)


def _encode(stored: NDArray[np.generic], suffix: str, quality: int) -> bytes:
    bgr = stored[..., ::-1] if stored.ndim == 3 else stored
    options = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".jpeg": cv2.IMWRITE_JPEG_QUALITY, ".webp": cv2.IMWRITE_WEBP_QUALITY}
    written, data = cv2.imencode(
        suffix, np.ascontiguousarray(bgr), [options[suffix], quality] if suffix in options else []
    )
    assert written
    return data.tobytes()
