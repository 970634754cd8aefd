"""Write a file for every sample that lacks one: edge maps, distance maps, label maps of photos.

Command lines: ``scripts/make_edge_maps.py``, ``make_distance_maps.py``, ``label_images.py``, ``prepare_dataset.py``.
(Edges can be drawn in training too, after the augmentation: ``data.edges: instances`` or ``labels``.)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import numpy as np
import yaml
from tqdm import tqdm

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.distances import class_distances, encode_distances, read_header
from imaginaire_spade.data.folders import DISTANCES, FolderSource
from imaginaire_spade.data.image_files import DECODERS, encode_map, image_size
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.data.loader import map_in_order
from imaginaire_spade.data.photos import decode_photo
from imaginaire_spade.dataset_prep import BORDERS
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import atomic_write, write_bytes
from imaginaire_spade.labels import LabelSpec, edges_from_ids
from imaginaire_spade.pretrained.segmenters import Segmenter

T = TypeVar("T")
Make = Callable[[T], bytes | Path]
"""Returns the content of a file, or the path that it is to be a symbolic link to. Picklable."""


class Writing(TypedDict, total=False):
    """How to write files: the options that all command lines for it share."""

    num_workers: int | None
    """Processes (None: min(8, cores); 0: this one)."""
    overwrite: bool
    """Whether to replace existing files."""
    rank: int
    world_size: int
    """Write every ``world_size``-th file, from number ``rank`` on."""


def write_maps(
    title: str,
    make: Make[T],
    targets: Sequence[tuple[Path, T]],
    *,
    is_stale: Callable[[Path, T], bool] | None = None,
    **writing: Unpack[Writing],
) -> tuple[int, int]:
    """Write the file of every target that is not there yet, so that an interrupted run continues when it runs again.

    Files appear under their final names only when they are complete. An existing file stays, whatever made it.

    Args:
        title: of the progress bar.
        targets: (file, argument of ``make``).
        is_stale: whether to replace an existing file nevertheless, for files that nobody makes by hand.
    Returns:
        The number of files made and kept.
    Raises:
        DataError: with the name of the file. Files made by then stay.
    """
    num_workers, rank = writing.get("num_workers"), writing.get("rank", 0)
    own = targets[rank :: writing.get("world_size", 1)]
    task = partial(_write, make, is_stale, writing.get("overwrite", False))
    with map_in_order(task, own, num_workers) as results:
        made = sum(tqdm(results, title, len(own), unit="files", mininterval=0.5, disable=rank > 0))
    return made, len(own) - made


def _write(make: Make[T], is_stale: Callable[[Path, T], bool] | None, overwrite: bool, target: tuple[Path, T]) -> bool:
    """Return whether the file was written."""
    path, argument = target
    if path.exists() and not overwrite and not (is_stale and is_stale(path, argument)):
        return False
    content = make(argument)
    if isinstance(content, bytes):
        write_bytes(path, content)
    else:
        with atomic_write(path) as temporary:
            temporary.symlink_to(content)
    return True


# ------------------------------------------------------------------------------------------------ edge maps


def make_edge_maps(root: Path, of: str, **writing: Unpack[Writing]) -> tuple[int, int]:
    """Write ``root/edge_maps/KEY.png`` (0 and 255) for every sample that lacks it.

    Args:
        of: a key of ``BORDERS``; "both" marks the borders of either (COCO-Stuff's boundary maps).
    Returns:
        The number of maps made and kept.
    Raises:
        DataError: a map cannot be used.
    """
    source = FolderSource(root, BORDERS[of])
    targets = [(root / "edge_maps" / f"{key}.png", key) for key in source.keys]
    return write_maps("edge maps", partial(_edge_map, source, BORDERS[of]), targets, **writing)


def _edge_map(source: FolderSource, data_types: Sequence[str], key: str) -> bytes:
    edges = []
    for data_type in data_types:
        ids = DECODERS[data_type](source.read(key, data_type), source.describe(key, data_type))
        channels = [ids] if ids.ndim == 2 else list(ids.transpose(2, 0, 1))
        edges += [edges_from_ids(channel) for channel in channels]
    if len({channel.shape for channel in edges}) > 1:
        raise DataError(f"{source.describe(key, 'seg_maps')}: its instance map has another size")
    return encode_map(np.maximum.reduce(edges) * np.uint8(255))


# ------------------------------------------------------------------------------------------------ distance maps


def make_distance_maps(
    root: Path, labels: LabelSpec, suffixes: Mapping[str, str] | None = None, **writing: Unpack[Writing]
) -> tuple[int, int]:
    """Write ``root/distances/KEY.npy`` for every label map that lacks it, at the label map's size.

    A distance map that is damaged, of another size or older than its label map is replaced.

    Returns:
        The number of maps made and kept.
    Raises:
        DataError, LabelError: a label map cannot be used.
    """
    source = FolderSource(root, ["seg_maps"], suffixes=suffixes)
    targets = [(root / DISTANCES / f"{key}.npy", key) for key in source.keys]
    make, is_stale = partial(_distance_map, source, labels), partial(_is_stale, source)
    return write_maps("distance maps", make, targets, is_stale=is_stale, **writing)


def _distance_map(source: FolderSource, labels: LabelSpec, key: str) -> bytes:
    where = source.describe(key, "seg_maps")
    return encode_distances(
        class_distances(labels.to_train_ids(read_labels(source.read(key, "seg_maps"), where, labels), where))
    )


def _is_stale(source: FolderSource, target: Path, key: str) -> bool:
    size = image_size(source.read(key, "seg_maps"), source.describe(key, "seg_maps"))
    try:
        with target.open("rb") as file:
            shape, _ = read_header(file, target.stat().st_size, str(target))
    except (OSError, DataError):
        return True
    return shape[1:] != size or target.stat().st_mtime < source.path(key, "seg_maps").stat().st_mtime


# ------------------------------------------------------------------------------------------------ label maps


def label_photos(segmenter: Segmenter, root: Path, **writing: Unpack[Writing]) -> tuple[int, int]:
    """Write ``root/seg_maps/KEY.png`` for every photo in ``root/images`` that lacks it, by a segmentation network.

    Rank 0 also writes ``root/labels.yaml``, the label table.

    Returns:
        The number of maps made and kept.
    Raises:
        DataError: a photo cannot be used.
    """
    source = FolderSource(root, ["images"])

    def label(key: str) -> bytes:
        data, where = source.read(key, "images"), source.describe(key, "images")
        return encode_map(segmenter.label(decode_photo(data, where, ImageSpec(drop_alpha=True))))

    targets = [(root / "seg_maps" / f"{key}.png", key) for key in source.keys]
    writing["num_workers"] = 0  # the network is in this process, perhaps on a GPU
    counts = write_maps("labelling", label, targets, **writing)
    if writing.get("rank", 0) == 0:
        ignore = [255] if len(segmenter.names) < 256 else []
        labels = {"num_classes": len(segmenter.names), "ignore": ignore, "names": list(segmenter.names)}
        write_bytes(root / "labels.yaml", yaml.safe_dump({"data": {"labels": labels}}, sort_keys=False).encode())
    return counts
