"""Read COCO's JSON: polygons, run length codes, and panoptic maps.

Responsible for the regions of each image in the file's order; ``annotations`` and ``prepare`` say what becomes of them.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.image_files import check_size, decode_instances
from imaginaire_spade.errors import DataError, how_to_install

Area = Callable[[], NDArray[np.bool_]]
"""Draws a region: bool [H, W]. Picklable."""
CocoRegion = tuple[float, Any, str, Area]
"""Size in pixels, id of the category, place in the file, and what draws it."""


def coco_regions(path: Path, tree: Any, empty: list[str], otherwise: str = "") -> dict[Any, list[CocoRegion]]:
    """Map the id of every image to its regions, in the file's order.

    Args:
        empty: gets the annotations without a mask.
        otherwise: says what can be done without pycocotools.
    Raises:
        ConfigError: pycocotools is not installed.
        DataError: an annotation belongs to no image, or a panoptic map is missing.
        KeyError, TypeError, AttributeError: this is no instances or panoptic JSON of COCO.
    """
    with how_to_install("pycocotools", f"{path}: reading it needs the package pycocotools", otherwise):
        import pycocotools.mask  # noqa: F401
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    regions: dict[Any, list[CocoRegion]] = {image_id: [] for image_id in sizes}
    for note in tree["annotations"]:
        where, shape = f"{path}: annotation {note.get('id', note.get('file_name'))}", note.get("segmentation")
        if note["image_id"] not in sizes:
            raise DataError(f"{where}: its image_id {note['image_id']} is not in the list of images")
        if "segments_info" in note:
            regions[note["image_id"]] += _panoptic(
                path.with_suffix("") / note["file_name"], note["segments_info"], where
            )
            continue
        if isinstance(shape, list):  # pycocotools refuses all polygons if the first one has no area
            shape = [polygon for polygon in shape if len(polygon) >= 6]
        if shape:
            area = partial(_coco_mask, shape, *sizes[note["image_id"]])
            regions[note["image_id"]].append((float(note.get("area", 0)), note.get("category_id"), where, area))
        else:
            empty.append(where)
    return regions


def _panoptic(file: Path, segments: Any, where: str) -> Iterator[CocoRegion]:
    """Yield the regions of a panoptic map, whose pixels are the segments' ids: R + 256 G + 65536 B."""
    if not file.is_file():
        raise DataError(f"{where}: its panoptic map is not there: {file}")
    for segment in segments:
        number = segment["id"]
        area = partial(_segment, file, number)
        yield float(segment.get("area", 0)), segment["category_id"], f"{where}: segment {number}", area


def _segment(file: Path, number: int) -> NDArray[np.bool_]:
    return _panoptic_ids(file) == number


@lru_cache(maxsize=2)
def _panoptic_ids(file: Path) -> NDArray[np.int32]:
    return decode_instances(file.read_bytes(), str(file))


def _coco_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Draw polygons or a run length code of COCO: bool [H, W].

    Raises:
        ValueError: points far outside, at which pycocotools ends the process; lengths that do not fill the code's size.
    """
    if isinstance(segmentation, dict):
        (rows, columns), lengths = segmentation["size"], segmentation["counts"]
        check_size(rows, columns, "a run length code")
        lengths = _run_lengths(lengths) if isinstance(lengths, str) else lengths
        if sum(lengths) != rows * columns:
            raise ValueError(f"run lengths of {sum(lengths)} pixels for {rows} x {columns}")
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(columns, rows).T
    from pycocotools import mask

    if not all((np.abs(np.array(polygon, float)) <= 2 * max(height, width)).all() for polygon in segmentation):
        raise ValueError(f"points far outside of {width} x {height} pixels (width x height)")
    return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width))) != 0


def _run_lengths(code: str) -> list[int]:
    """Read COCO's compressed run lengths: five bits per character, the lowest first, then whether more follow. From the
    fourth length on they are differences to the length before the last."""
    lengths, number, shift = list[int](), 0, 0
    for bits in (ord(character) - 48 for character in code):
        number, shift = number | (bits & 31) << shift, shift + 5
        if shift > 40:
            raise ValueError("a run length of more than 40 bits")
        if not bits & 32:
            number -= (bits & 16) << shift - 4  # the sign
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number, shift = 0, 0
    return lengths
