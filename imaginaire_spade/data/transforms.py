"""Joint geometry of a picture and its maps: resize, scale, crop, flip.

One ``Geometry`` is drawn per sample and applied to the photo (area or linear) and to every map (nearest, by pixel
centres), so that all stay aligned. A function of the source size, the configuration and a random generator; owns no
state and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.errors import DataError


@dataclass(frozen=True)
class Geometry:
    """Resize to (resized_h, resized_w), cut [top: top + height, left: left + width], then mirror if ``flip``.

    All in pixels of the resized picture. A crop may begin between two of them: where a picture shrinks, crops begin at
    whole pixels of the original, so that nothing else of it needs to be resized.
    """

    resized_h: int
    resized_w: int
    top: int | Fraction
    left: int | Fraction
    height: int
    width: int
    flip: bool


def draw_geometry(
    height: int, width: int, augmentations: AugmentationConfig, draws: Sequence[float], where: str
) -> Geometry:
    """The geometry of one sample of (height, width) pixels.

    Args:
        draws: four numbers in [0, 1), each for one augmentation: switching one on leaves the others as they were.
        where: names the sample in the message.
    Raises:
        DataError: the crop is larger than the resized picture.
    """
    scale_draw, top_draw, left_draw, flip_draw = draws
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
    top: int | Fraction
    left: int | Fraction
    if augmentations.center_crop_h_w:
        top, left = (resized_h - crop_h) // 2, (resized_w - crop_w) // 2
    else:
        step = choose_reduction(height, width, resized_h, resized_w)
        top = _random_start(top_draw, height, resized_h, crop_h, step)
        left = _random_start(left_draw, width, resized_w, crop_w, step)
    flip = augmentations.horizontal_flip and flip_draw < 0.5
    return Geometry(resized_h, resized_w, top, left, crop_h, crop_w, flip)


def _random_start(draw: float, size: int, resized: int, crop: int, step: int) -> int | Fraction:
    """Where the crop begins: at a whole pixel of the finer of the two grids, of the original's every ``step``-th."""
    if resized >= size:
        return int(draw * (resized - crop + 1))  # draws are < 1: at most the room
    room = (resized - crop) * size // (resized * step)
    return Fraction(int(draw * (room + 1)) * step * resized, size)


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


def choose_reduction(height: int, width: int, resized_h: int, resized_w: int) -> int:
    """The factor (1, 2, 4 or 8) by which a JPEG of (height, width) may shrink in its decoder: what is left is at least
    as large as the resized picture."""
    room = min(height / resized_h, width / resized_w)
    return next(factor for factor in (8, 4, 2, 1) if room >= factor or factor == 1)


def apply_to_image(
    image: NDArray[np.uint8],
    geometry: Geometry,
    *,
    reduced_from: tuple[int, int, int] | None = None,
    any_area: bool = False,
    swap: bool = False,
) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> uint8 [geometry.height, geometry.width, 3], contiguous.

    Shrinking to half the size or less averages areas; less, and enlarging, interpolates linearly.

    Args:
        reduced_from: (height, width, factor) of a picture that was decoded at 1 / factor of its size, rounded up.
        any_area: average areas for any shrinking: smoother, and five times slower.
        swap: BGR to RGB, or the other way round.
    """
    g = geometry
    height, width, factor = reduced_from or (*image.shape[:2], 1)
    # Exact, though a picture of 427 rows has 214 at half its size.
    scale_h, scale_w = g.resized_h * factor / height, g.resized_w * factor / width
    row, top = _whole_start(height, g.resized_h, g.top, factor)
    column, left = _whole_start(width, g.resized_w, g.left, factor)
    rows, columns = math.ceil((top + g.height) / scale_h) + 1, math.ceil((left + g.width) / scale_w) + 1
    resized: NDArray[Any] = image[row : row + rows, column : column + columns]
    if (scale_h, scale_w) != (1, 1):
        shrinks = max(scale_h, scale_w) <= (1 if any_area else 0.5)
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resized = cv2.resize(resized, None, fx=scale_w, fy=scale_h, interpolation=method)
    cut = resized[top : top + g.height, left : left + g.width]
    if g.flip:
        cut = np.asarray(cv2.flip(cut, 1), np.uint8)
    return np.asarray(cv2.cvtColor(cut, cv2.COLOR_BGR2RGB), np.uint8) if swap else np.ascontiguousarray(cut)


def _whole_start(size: int, resized: int, start: int | Fraction, factor: int) -> tuple[int, int]:
    """A pixel from which on a picture (1 / ``factor`` of ``size``) may be resized, and ``start`` counted from there."""
    first, rest = divmod(start.numerator * size, start.denominator * resized * factor)
    if rest == 0 and resized * factor <= size:  # (enlarging looks at the pixel before as well)
        return first, 0
    assert start.denominator == 1
    return 0, start.numerator


def apply_to_map(ids: NDArray[np.generic], geometry: Geometry) -> NDArray[np.generic]:
    """Numbers [H, W] or [H, W, C] -> the same dtype [geometry.height, geometry.width, ...], contiguous.

    Nearest by pixel centres: target i takes source floor((i + 0.5) * in / out). Only the crop is computed.
    """
    g = geometry
    if ids.shape[:2] == (g.resized_h, g.resized_w):
        top, left = int(g.top), int(g.left)
        cut = ids[top : top + g.height, left : left + g.width]
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


def _source_indices(size: int, resized: int, start: int | Fraction, count: int) -> NDArray[np.int64]:
    # In integers: (start + i + 0.5) * size / resized without the rounding of floats.
    p, q = start.numerator, start.denominator
    return ((2 * np.arange(count, dtype=np.int64) + 1) * q + 2 * p) * size // (2 * q * resized)


def edges_from_ids(ids: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Borders of an id map [H, W]: uint8 [H, W], 1 where the left, right, upper or lower neighbour has another id.

    Both pixels of a differing pair are marked; the picture does not wrap around.
    """
    # In one dimension, twice as fast; the last pixel of a row is no neighbour of the next row's first.
    width, flat = ids.shape[1], ids.ravel()
    edges = np.zeros(flat.size, np.bool_)
    across, down = flat[1:] != flat[:-1], flat[width:] != flat[:-width]
    across[width - 1 :: width] = False
    edges[1:] = across
    edges[:-1] |= across
    edges[width:] |= down
    edges[:-width] |= down
    return edges.reshape(ids.shape).view(np.uint8)
