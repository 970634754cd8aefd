"""Compute intra-class positions: where a pixel stands in its connected region of one class (CLADE-ICPE).

Responsible for their computation from a label map and their file format (``distances/NAME.npy``). Knows nothing of
label tables: every id counts as a class, don't-care too.
"""

import io
import math
import tokenize
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.errors import DataError

MAKER = "scripts/make_distance_maps.py"
NOT_FINITE = f"a distance map with values that are not finite: {MAKER} --overwrite makes it anew"


def class_distances(ids: NDArray[np.generic], *, normalise: bool = True) -> NDArray[np.float32]:
    """Compute every pixel's offsets from the centroid of its region (Tan et al. 2021, section 3.3): float32 [2, H, W].

    Channel 0 is the row offset (positive below the centroid), channel 1 the column offset (positive to the right). A
    region is an 8-connected component of pixels of one id. Normalised, rows and columns are each divided by the
    largest |offset| of the region + 1e-5, which gives values in (-1, 1); else they are pixels.

    Args:
        ids: integers [H, W].
    """
    height, width = ids.shape
    # Works on runs (maximal stretches of one id in a row), which are some twenty times fewer than pixels.
    starts = np.ones((height, width), np.bool_)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=starts[:, 1:])
    first = np.flatnonzero(starts)
    length = np.diff(first, append=height * width)
    row, left = np.divmod(first, width)
    right = left + length - 1
    region = _regions_of_runs(ids, starts)

    num_pixels = np.bincount(region, length)
    centre_row = np.bincount(region, row * length) / num_pixels
    centre_column = np.bincount(region, (left + right) * length / 2) / num_pixels
    reach_row: NDArray[np.floating] = np.ones(num_pixels.size)
    reach_column = reach_row
    if normalise:
        # The largest |offset| is that of a side of the bounding box.
        reach_row = _largest(region, np.abs(row - centre_row[region])) + 1e-5
        sides = np.maximum(centre_column[region] - left, right - centre_column[region])
        reach_column = _largest(region, sides) + 1e-5

    distances = np.empty((2, height, width), np.float32)
    in_row = (row - centre_row[region]) / reach_row[region]  # one value per run
    distances[0] = np.repeat(in_row.astype(np.float32), length).reshape(height, width)
    columns = np.repeat(centre_column[region], length).reshape(height, width)
    np.subtract(np.arange(width), columns, out=columns)
    columns /= np.repeat(reach_column[region], length).reshape(height, width)
    distances[1] = columns
    return distances


def connected_regions(ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Number the region of every pixel, in the order of their first pixels: int64 [H, W]. (Regions as above.)"""
    starts = np.ones(ids.shape, np.bool_)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=starts[:, 1:])
    runs = np.cumsum(starts).reshape(ids.shape) - 1
    return _regions_of_runs(ids, starts).astype(np.int64)[runs]


def _largest(region: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Find the largest of the (non-negative) values of each region."""
    largest = np.zeros(int(region.max()) + 1)
    np.maximum.at(largest, region, values)
    return largest


def _regions_of_runs(ids: NDArray[np.generic], starts: NDArray[np.bool_]) -> NDArray[np.integer]:
    """Number the region of every run, 0, 1, 2, ...: int64 [runs]."""
    run_at = np.cumsum(starts, dtype=np.int32).reshape(ids.shape) - 1
    above, below = ids[:-1], ids[1:]
    touches = above == below
    # Of two runs that touch along a stretch, where it begins is enough.
    straight = touches & (starts[:-1] | starts[1:])
    pairs = [(run_at[:-1][straight], run_at[1:][straight])]
    # A diagonal joins what neither side joins already.
    turn = starts[:-1, 1:] & ~touches[:, :-1]
    falling = turn & (above[:, :-1] == below[:, 1:])
    pairs.append((run_at[:-1, :-1][falling], run_at[1:, 1:][falling]))
    turn = starts[:-1, 1:] & ~touches[:, 1:]
    rising = turn & (above[:, 1:] == below[:, :-1])
    pairs.append((run_at[:-1, 1:][rising], run_at[1:, :-1][rising]))
    a, b = (np.concatenate(ends) for ends in zip(*pairs, strict=True))

    # Union by hooking every root to the smallest root beside it, then shortening all paths, until nothing changes.
    root = np.arange(np.count_nonzero(starts), dtype=np.int32)
    while a.size:
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(shorter := root[root], root):
            root = shorter
    is_root = root == np.arange(root.size)
    return (np.cumsum(is_root) - 1)[root]


def encode_distances(distances: NDArray[np.float32]) -> bytes:
    """Encode normalised distances [2, H, W] as the content of a .npy file, float16 (exact to 0.0005)."""
    file = io.BytesIO()
    np.save(file, distances.astype(np.float16), allow_pickle=False)
    return file.getvalue()


def decode_distances(data: bytes, where: str) -> NDArray[np.floating]:
    """Decode the content of a .npy file, ours or CLADE's: float16, 32 or 64 [2, H, W], read-only.

    Raises:
        DataError: another kind of file, or one that is cut off.
    """
    file = io.BytesIO(data)
    shape, dtype = read_header(file, len(data), where)
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def read_header(file: BinaryIO, num_bytes: int, where: str) -> tuple[tuple[int, ...], np.dtype[np.floating]]:
    """Read shape [2, H, W] and dtype of a distance map of ``num_bytes`` in all; ``file`` is then at its values.

    Raises:
        DataError: another kind of file, or one that is cut off.
    """
    try:
        # Not numpy.load, which allocates what the header promises.
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not of version 1.0")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{where}: not readable as a .npy file: {error}") from None
    if len(shape) != 3 or shape[0] != 2 or min(shape) < 1 or dtype.kind != "f" or is_fortran:
        raise DataError(f"{where}: no distance map, which is floats [2, height, width]: {dtype} {list(shape)}")
    if num_bytes - file.tell() != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{where}: a distance map that is cut off: {MAKER} makes it anew")
    return shape, dtype
