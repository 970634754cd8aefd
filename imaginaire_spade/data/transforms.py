"""Joint geometry of a picture and its maps: resize, scale, crop, flip.

One ``Geometry`` is drawn per sample and applied to the photo (area or linear) and to every map (nearest, by pixel
centres), so that all stay aligned. A function of the source size, the configuration and a random generator; owns no
state and reads no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.errors import DataError


@dataclass(frozen=True)
class Geometry:
    """Resize to (resized_h, resized_w), cut [top: top + height, left: left + width], then mirror if ``flip``."""

    resized_h: int
    resized_w: int
    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_geometry(
    height: int, width: int, augmentations: AugmentationConfig, rng: np.random.Generator, where: str
) -> Geometry:
    """The geometry of one sample of (height, width) pixels.

    Always takes the same four numbers from ``rng``, so that switching one augmentation on leaves the others as they
    were. ``where`` names the sample in the message.

    Raises:
        DataError: the crop is larger than the resized picture.
    """
    scale_draw, top_draw, left_draw, flip_draw = rng.random(4).tolist()
    crop = augmentations.crop_h_w
    resized_h, resized_w = _resized(height, width, augmentations)
    factor = 1 + scale_draw * augmentations.random_scale_limit
    resized_h, resized_w = round(resized_h * factor), round(resized_w * factor)
    crop_h, crop_w = crop or (resized_h, resized_w)
    if crop_h > resized_h or crop_w > resized_w:
        name = "random_crop_h_w" if augmentations.random_crop_h_w else "center_crop_h_w"
        raise DataError(
            f"{where}: {name}: [{crop_h}, {crop_w}] is larger than the picture ({height} x {width}, height x width,"
            f" {resized_h} x {resized_w} once resized). In that split's augmentations make {name} smaller,"
            f" or enlarge first: resize_smallest_side: {max(crop_h, crop_w)} (or resize_h_w: [{crop_h}, {crop_w}])"
        )
    room_h, room_w = resized_h - crop_h, resized_w - crop_w
    if augmentations.center_crop_h_w:
        top, left = room_h // 2, room_w // 2
    else:
        top, left = int(top_draw * (room_h + 1)), int(left_draw * (room_w + 1))  # draws are < 1: at most the room
    flip = augmentations.horizontal_flip and flip_draw < 0.5
    return Geometry(resized_h, resized_w, top, left, crop_h, crop_w, flip)


def _resized(height: int, width: int, augmentations: AugmentationConfig) -> tuple[int, int]:
    if augmentations.resize_h_w:
        return augmentations.resize_h_w
    if not augmentations.resize_smallest_side:
        return height, width
    factor = augmentations.resize_smallest_side / min(height, width)
    crop_h, crop_w = augmentations.crop_h_w or (1, 1)
    return _round_side(height * factor, crop_h), _round_side(width * factor, crop_w)


def _round_side(exact: float, crop: int) -> int:
    """``exact`` rounded; up instead where rounding down alone would make it smaller than the crop. At least 1."""
    rounded = max(1, round(exact))
    return crop if rounded < crop <= math.ceil(exact) else rounded


def choose_reduction(height: int, width: int, geometry: Geometry) -> int:
    """The factor (1, 2, 4 or 8) by which a JPEG of (height, width) may shrink in its decoder: what is left is at least
    as large as the resized picture."""
    room = min(height / geometry.resized_h, width / geometry.resized_w)
    return next(factor for factor in (8, 4, 2, 1) if room >= factor or factor == 1)


def apply_to_image(
    image: NDArray[np.uint8],
    geometry: Geometry,
    *,
    reduced_from: tuple[int, int, int] | None = None,
    any_area: bool = False,
) -> NDArray[np.uint8]:
    """uint8 [H, W, C] -> uint8 [geometry.height, geometry.width, C], contiguous.

    Shrinking to half the size or less averages areas; less, and enlarging, interpolates linearly.

    Args:
        reduced_from: (height, width, factor) of a picture that was decoded at 1 / factor of its size, rounded up.
        any_area: average areas for any shrinking: smoother, and five times slower.
    """
    g = geometry
    height, width, factor = reduced_from or (*image.shape[:2], 1)
    # Exact, though a picture of 427 rows has 214 at half its size.
    scale_h, scale_w = g.resized_h * factor / height, g.resized_w * factor / width
    resized: NDArray[Any] = image
    if (scale_h, scale_w) != (1, 1):
        shrinks = max(scale_h, scale_w) <= (1 if any_area else 0.5)
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        if factor == 1:
            resized = cv2.resize(image, (g.resized_w, g.resized_h), interpolation=method)
        else:
            resized = cv2.resize(image, None, fx=scale_w, fy=scale_h, interpolation=method)
    cut = resized[g.top : g.top + g.height, g.left : g.left + g.width]
    return np.ascontiguousarray(cv2.flip(cut, 1).reshape(cut.shape) if g.flip else cut)


def apply_to_map(ids: NDArray[np.generic], geometry: Geometry) -> NDArray[np.generic]:
    """Numbers [H, W] or [H, W, C] -> the same dtype [geometry.height, geometry.width, ...], contiguous.

    Nearest by pixel centres: target i takes source floor((i + 0.5) * in / out). Only the crop is computed.
    """
    g = geometry
    if ids.shape[:2] == (g.resized_h, g.resized_w):
        cut = ids[g.top : g.top + g.height, g.left : g.left + g.width]
        return np.ascontiguousarray(cut[:, ::-1] if g.flip else cut)
    rows = _source_indices(ids.shape[0], g.resized_h, g.top, g.height)
    columns = _source_indices(ids.shape[1], g.resized_w, g.left, g.width)
    if g.flip:
        columns = columns[::-1]
    if ids.ndim == 2 and ids.dtype == np.uint8:
        # Twice as fast: both steps then copy whole rows.
        return np.asarray(cv2.transpose(cv2.transpose(ids[rows])[columns]))  # type: ignore[arg-type]
    return ids[rows].take(columns, axis=1)


def apply_to_distances(distances: NDArray[np.floating], geometry: Geometry) -> NDArray[np.float32]:
    """Row and column offsets [2, H, W] -> float32 [2, geometry.height, geometry.width]; a mirror turns their sign."""
    cut = np.stack([apply_to_map(offsets, geometry) for offsets in distances]).astype(np.float32, copy=False)
    if geometry.flip:
        np.negative(cut[1], out=cut[1])
    return cut


def _source_indices(size: int, resized: int, start: int, count: int) -> NDArray[np.int64]:
    # In integers: (i + 0.5) * size / resized without the rounding of floats.
    return (2 * np.arange(start, start + count, dtype=np.int64) + 1) * size // (2 * resized)


def edges_from_ids(ids: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Borders of an id map [H, W]: uint8 [H, W], 1 where the left, right, upper or lower neighbour has another id.

    Both pixels of a differing pair are marked; the picture does not wrap around.
    """
    edges = np.zeros(ids.shape, np.bool_)
    across = ids[:, 1:] != ids[:, :-1]
    down = ids[1:] != ids[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges.view(np.uint8)
