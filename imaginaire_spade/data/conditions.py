"""Decode dense conditions (depth, normals) and bring them into the range that networks see.

Responsible for what a file of a condition may look like, and for the way of its values through crop, resize and mirror.
A condition is resized by nearest pixel, as label maps are: a depth or a normal between two objects would be neither's.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.config import Condition
from imaginaire_spade.data.file_structure import is_jpeg
from imaginaire_spade.data.photos import decode_stored
from imaginaire_spade.data.transforms import Geometry, apply_to_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import RgbImage

TYPES = (np.uint8, np.uint16, np.float16, np.float32, np.float64)


def decode_condition(data: bytes, where: str, channels: int | None = None) -> NDArray[Any]:
    """Decode a file of a condition as stored: uint8, uint16, float16, float32 or float64 [H, W, C].

    Args:
        channels: how many it must have; None: any number.
    Raises:
        DataError: unreadable, lossy, of another kind of values or another number of channels.
    """
    if is_jpeg(data) or data[:4] == b"RIFF":
        raise DataError(f"{where}: JPEG and WebP change values: save a condition as PNG, TIFF or .npy")
    return as_condition(decode_stored(data, where), where, channels)


def as_condition(array: NDArray[Any], where: str, channels: int | None = None) -> NDArray[Any]:
    """Check an array [H, W] or [H, W, C] of a condition; return it as [H, W, C].

    Raises:
        DataError: another kind of array, or another number of ``channels``, if these are given.
    """
    if array.dtype not in TYPES or array.ndim not in (2, 3) or not array.size:
        raise DataError(
            f"{where}: {array.dtype} {list(array.shape)}; a condition is 8- or 16-bit unsigned integers or floats,"
            " [H, W] or [H, W, C]"
        )
    array = array.reshape(*array.shape[:2], -1)
    if channels is not None and array.shape[2] != channels:
        raise DataError(
            f"{where}: {array.shape[2]} channel(s), but this condition has {channels}: write channels:"
            f" {array.shape[2]} in data.conditions, or give {channels}"
        )
    return array


def cut_conditions(
    conditions: Sequence[Condition], read: Callable[[str], tuple[NDArray[Any], str]], geometry: Geometry
) -> Tensor | None:
    """Cut, resize (nearest) and mirror conditions, and scale their ranges to [-1, 1].

    Args:
        read: name -> the stored array [H, W] or [H, W, C], and what to call it in messages.
    Returns:
        float32 [C of all, geometry.height, geometry.width]: (value - low) / (high - low) * 2 - 1; None: no conditions.
    Raises:
        DataError: another kind of array, floats without a range, values outside it (unless they are to be clipped) or
            not finite.
    """
    parts = [_cut(*read(condition.name), condition, geometry) for condition in conditions]
    return torch.from_numpy(np.concatenate(parts)) if parts else None


def _cut(stored: NDArray[Any], where: str, condition: Condition, geometry: Geometry) -> NDArray[np.float32]:
    stored = as_condition(stored, where, condition.channels)
    cut = apply_to_map(stored, geometry).astype(np.float32)
    low, high = check_values(cut, stored.dtype, condition, where)
    if condition.clip:
        cut = cut.clip(low, high)
    scaled = (cut - np.float32(low)) * np.float32(2 / (high - low)) - 1
    if geometry.flip:
        scaled[..., list(condition.flip_sign or ())] *= -1
    return scaled.transpose(2, 0, 1)


def check_values(
    values: NDArray[np.generic], dtype: np.dtype[np.generic], condition: Condition, where: str
) -> tuple[float, float]:
    """Check that values lie in the range of a condition. Return that range.

    Args:
        dtype: of the file, whose integers have a range of their own.
    Raises:
        DataError: as ``cut_conditions``.
    """
    least, most = float(values.min()), float(values.max())
    write = f"data.conditions: [{{name: {condition.name}, range: [{least:g}, {most:g}]}}]"
    if not math.isfinite(least) or not math.isfinite(most):
        raise DataError(f"{where}: values that are not finite (NaN or infinity): fill them, e.g. with the range's end")
    if condition.range is None:
        if dtype.kind == "f":
            raise DataError(f"{where}: floats {least:g}..{most:g}, and no range is stated for {condition.name}: write"
                            f" the range of all files, such as {write}")  # fmt: skip
        return 0.0, float(np.iinfo(dtype).max)  # type: ignore[type-var]
    low, high = condition.range
    slack = (high - low) / 1000  # of a number that float16 or a resized file has rounded
    if not condition.clip and (least < low - slack or most > high + slack):
        raise DataError(
            f"{where}: values {least:g}..{most:g}, outside the range [{low:g}, {high:g}] of {condition.name}: write a"
            " range that all files keep, or clip: true to move such values to its ends"
        )
    return low, high


def encode_condition(values: NDArray[np.generic]) -> bytes:
    """Encode a condition [H, W, C] as the content of a .npy file, exactly."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def draw_condition(scaled: NDArray[np.float32]) -> RgbImage:
    """Draw a condition float [C, H, W] in [-1, 1], as RGB if it has three channels, else its first as grey."""
    shown = scaled if len(scaled) == 3 else scaled[:1].repeat(3, 0)
    return ((shown.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
