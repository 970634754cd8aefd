"""Make instance maps from COCO's ``instances_*.json`` (pycocotools, extra ``data``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.errors import ConfigError, DataError, how_to_install
from imaginaire_spade.files import read_json

FIRST_OBJECT = 256
"""In an instance map, smaller numbers are label ids of pixels that belong to no object."""


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image."""

    height: int
    width: int
    annotations: Sequence[Mapping[str, Any]]
    """COCO's: ``segmentation`` (polygons, or RLE for crowds), ``area``, ``id``."""
    where: str


def read_objects(path: Path) -> dict[str, Objects]:
    """Map the file stem of every image in the JSON to its objects.

    Raises:
        ConfigError: pycocotools is not installed.
        DataError: the file is no instances JSON of COCO.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{path}: reading it needs the package pycocotools: {how_to_install('data')} (or unpack the panoptic maps,"
            " or move the file away to go without instance maps)"
        ) from None
    tree = read_json(path)
    try:
        of_image: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in tree["images"]}
        for annotation in tree["annotations"]:
            kept = {name: annotation[name] for name in ("id", "area", "segmentation")}
            of_image[annotation["image_id"]].append(kept)
        return {
            PurePosixPath(image["file_name"]).stem: Objects(
                image["height"], image["width"], of_image[image["id"]], str(path)
            )
            for image in tree["images"]
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no instances JSON of COCO: {error!r}") from None


def draw_instances(objects: Objects, label_map: NDArray[np.generic], where: str) -> NDArray[np.uint16]:
    """Number the objects in a label map: uint16 [H, W].

    Pixels of the k-th object become ``FIRST_OBJECT`` + k, large objects beneath small ones; all others keep their label
    id. So the borders are those of objects and of stuff alike (COCO-Stuff's combined boundary maps).

    Args:
        label_map: uint8 [H, W].
        where: name of the label map in messages.
    Raises:
        DataError: the sizes differ, or a segmentation is unreadable.
    """
    from pycocotools import mask

    height, width = objects.height, objects.width
    if label_map.shape != (height, width) or label_map.dtype != np.uint8:
        raise DataError(
            f"{where}: {label_map.dtype} {list(label_map.shape)}, but {objects.where} says 8 bit, {height} x {width}"
            " (height x width): they are of different images"
        )
    instances = label_map.astype(np.uint16)
    order = sorted(range(len(objects.annotations)), key=lambda k: (-objects.annotations[k]["area"], k))
    for k in order:
        annotation = objects.annotations[k]
        try:
            coded = mask.frPyObjects(annotation["segmentation"], height, width)
            inside = mask.decode(mask.merge(coded) if isinstance(coded, list) else coded) != 0
        except Exception as error:  # pycocotools raises whatever comes
            raise DataError(f"{objects.where}: annotation {annotation['id']}: unreadable: {error!r}") from None
        if inside.shape != instances.shape:
            raise DataError(f"{objects.where}: annotation {annotation['id']} is of another size than its image")
        instances[inside] = FIRST_OBJECT + k
    return instances
