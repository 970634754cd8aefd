"""Resize, scale, crop and flip an image together with its maps.

One ``Geometry`` is drawn per sample and applied to the photo (area or linear) and to every map (nearest, by pixel
centres), so that all stay aligned. A function of the source size, the configuration and random numbers; owns no state
and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import AnyImage, by_channels


@dataclass(frozen=True)
class Geometry:
    """Cut [top: top + rows, left: left + columns], resize that to (height, width), then mirror if ``flip``.

    Whole pixels of the stored image are cut, so that nothing else of it is resized.
    """

    top: int
    left: int
    rows: int
    columns: int
    height: int
    width: int
    flip: bool = False
    reduction: int = 1
    """A JPEG may be decoded at 1 / reduction (1, 2, 4 or 8) of its size: the cut is still at least as large as its
    resized copy, and begins and ends at multiples of ``reduction``, or with the image."""

    @classmethod
    def whole(cls, stored: tuple[int, ...], size: tuple[int, int]) -> Geometry:
        """Resize all of an image of ``stored`` (height, width, ...) to (height, width) ``size``."""
        return cls(0, 0, stored[0], stored[1], *size)


def draw_geometry(
    height: int, width: int, augmentations: AugmentationConfig, numbers: Sequence[float], where: str
) -> Geometry:
    """Draw the geometry of one sample of (height, width) pixels.

    Args:
        numbers: four in [0, 1), each for one augmentation: switching one on leaves the others as they were.
        where: names the sample in the message.
    Raises:
        DataError: the crop is larger than the resized image.
    """
    for_scale, for_top, for_left, for_flip = numbers
    crop = augmentations.crop_h_w
    resized_h, resized_w = _resized(height, width, augmentations)
    factor = 1 + for_scale * augmentations.random_scale_limit
    resized_h, resized_w = round(resized_h * factor), round(resized_w * factor)
    crop_h, crop_w = crop or (resized_h, resized_w)
    if crop_h > resized_h or crop_w > resized_w:
        name = "random_crop_h_w" if augmentations.random_crop_h_w else "center_crop_h_w"
        raise DataError(
            f"{where}: {name}: [{crop_h}, {crop_w}] is larger than the image ({height} x {width}, height x width,"
            f" {resized_h} x {resized_w} once resized). In that split's augmentations make {name} smaller,"
            f" or enlarge first: resize_smallest_side: {max(crop_h, crop_w)} (or resize_h_w: [{crop_h}, {crop_w}])"
        )
    room = min(height / resized_h, width / resized_w)
    reduction = next(factor for factor in (8, 4, 2, 1) if room >= factor or factor == 1)
    centre = augmentations.center_crop_h_w is not None
    top, rows = _cut(height, resized_h, crop_h, None if centre else for_top, reduction)
    left, columns = _cut(width, resized_w, crop_w, None if centre else for_left, reduction)
    flip = augmentations.horizontal_flip and for_flip < 0.5
    return Geometry(top, left, rows, columns, crop_h, crop_w, flip, reduction)


def _cut(size: int, resized: int, crop: int, number: float | None, step: int) -> tuple[int, int]:
    """Return start and length, multiples of ``step``, of the part that becomes ``crop`` of ``resized`` pixels.

    If the crop is the whole image, return it whole; without a random number, crop the centre.
    """
    if crop == resized:
        return 0, size
    steps = size // step
    length = min(steps, max(1, round(crop * size / (resized * step))))
    start = (steps - length) // 2 if number is None else int(number * (steps - length + 1))
    return start * step, length * step


def _resized(height: int, width: int, augmentations: AugmentationConfig) -> tuple[int, int]:
    if augmentations.resize_h_w:
        return augmentations.resize_h_w
    if not augmentations.resize_smallest_side:
        return height, width
    factor = augmentations.resize_smallest_side / min(height, width)
    crop_h, crop_w = augmentations.crop_h_w or (1, 1)
    return _round_side(height * factor, crop_h), _round_side(width * factor, crop_w)


def _round_side(exact: float, crop: int) -> int:
    """Round a length, to at least 1; up where rounding down alone would make it smaller than the crop."""
    rounded = max(1, round(exact))
    return crop if rounded < crop <= math.ceil(exact) else rounded


def apply_to_image(
    image: AnyImage, geometry: Geometry, *, reduction: int = 1, any_area: bool = False, out: AnyImage | None = None
) -> AnyImage:
    """Cut, resize and mirror an image: [H, W, C] -> [geometry.height, geometry.width, C] of its dtype, contiguous.

    Shrinking to half the size or less averages areas; less, and enlarging, interpolates linearly.

    Args:
        reduction: the image was decoded at 1 / reduction (1 or ``geometry.reduction``) of its size, rounded up.
        any_area: average areas for any shrinking: smoother, and five times slower.
        out: where to lay the result, which is then ``out`` itself.
    """
    g = geometry
    top, left, bottom, right = g.top, g.left, g.top + g.rows, g.left + g.columns
    cut: NDArray[Any] = image[top // reduction : -(-bottom // reduction), left // reduction : -(-right // reduction)]
    is_rgb = cut.shape[2] == 3
    # Exact, though an image of 427 rows has 214 at half its size.
    scale_h, scale_w = g.height * reduction / g.rows, g.width * reduction / g.columns
    if (scale_h, scale_w) != (1, 1):
        shrinks = max(scale_h, scale_w) <= (1 if any_area else 0.5)
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        # Where OpenCV comes with Intel's library, linear is twice as fast and within one of 255 steps of OpenCV's own.
        cv2.ipp.setUseIPP_NotExact(cut.dtype == np.uint8)  # (of this thread)
        place = out if is_rgb else None
        cut = by_channels(cut, lambda part: cv2.resize(part, None, place, scale_w, scale_h, method))
        cut = cut[: g.height, : g.width]
        cv2.ipp.setUseIPP_NotExact(False)
    if g.flip:
        cut = cv2.flip(cut, 1, out) if is_rgb else cut[:, ::-1]
    if out is None:
        return np.ascontiguousarray(cut)
    if not np.shares_memory(cut, out):
        np.copyto(out, cut)
    return out


def apply_to_map(ids: NDArray[np.generic], geometry: Geometry) -> NDArray[np.generic]:
    """Cut, resize and mirror a map: [H, W] or [H, W, C] -> the same dtype [geometry.height, geometry.width, ...].

    The result is contiguous. Nearest by pixel centres: target i takes number floor((i + 0.5) * rows / height) of the
    rows that are cut.
    """
    g = geometry
    cut = ids[g.top : g.top + g.rows, g.left : g.left + g.columns]
    if cut.shape[:2] == (g.height, g.width):
        return np.ascontiguousarray(cut[:, ::-1] if g.flip else cut)
    rows, columns = _nearest(g.rows, g.height), _nearest(g.columns, g.width)
    if g.flip:
        columns = columns[::-1]
    if ids.ndim == 2 and ids.dtype == np.uint8:
        # Twice as fast: both steps then copy whole rows.
        return np.asarray(cv2.transpose(cv2.transpose(cut[rows])[columns]))  # type: ignore[arg-type]
    return cut[rows].take(columns, axis=1)


@lru_cache(maxsize=1024)
def _nearest(size: int, count: int) -> NDArray[np.int64]:
    """Return which of ``size`` pixels each of ``count`` takes. (In integers: no rounding of floats.)"""
    return (2 * np.arange(count, dtype=np.int64) + 1) * size // (2 * count)


def apply_to_distances(distances: NDArray[np.floating], geometry: Geometry) -> NDArray[np.float32]:
    """Cut, resize and mirror row and column offsets: [2, H, W] -> float32 [2, geometry.height, geometry.width].

    A mirror turns the sign of the column offsets.
    """
    cut = np.stack([apply_to_map(offsets, geometry) for offsets in distances]).astype(np.float32, copy=False)
    if geometry.flip:
        np.negative(cut[1], out=cut[1])
    return cut
