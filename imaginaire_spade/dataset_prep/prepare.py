"""Turn official downloads of data sets into raw folders (``scripts/prepare_dataset.py``).

Ids stay as they are in the download wherever the table in
``configs/labels/NAME.yaml`` maps them; files are copied (or linked), not decoded, wherever nothing has to change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from imaginaire_spade.data.image_files import decode_image, decode_instances, decode_label, encode_map
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.dataset_prep.coco_instances import draw_instances
from imaginaire_spade.dataset_prep.downloads import DATASETS, Options, RawSample
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import atomic_write, write_bytes
from imaginaire_spade.lmdb_builder.workers import map_in_processes
from imaginaire_spade.pictures import encode_picture


def prepare(
    name: str, source: Path, output: Path, options: Options, *, link: bool = False, num_workers: int | None = None
) -> dict[str, int]:
    """Write ``output/SPLIT/{images,seg_maps,inst_maps}/KEY.ext``; return the number of samples per split.

    Files that are there already are kept, so that an interrupted run is continued by running it again.

    Args:
        link: make symbolic links where nothing has to change, instead of copies.
    Raises:
        DataError: the source is not laid out as the official download, or files are missing.
    """
    if not source.is_dir():
        raise DataError(f"--source {source}: no such folder")
    samples = list(DATASETS[name](source, options))
    if not samples:
        raise DataError(f"--source {source}: no images there")
    missing = [path for sample in samples for path in sample.files.values() if not path.is_file()]
    if missing:
        shown = "\n  ".join(str(path) for path in missing[:10])
        raise DataError(f"--source {source}: {len(missing)} of the files that belong together are missing:\n  {shown}")
    task = partial(_write, output, options.resize_h_w, link)
    for _ in tqdm(map_in_processes(task, samples, num_workers), name, len(samples), unit="images", mininterval=0.5):
        pass
    return {split: sum(s.split == split for s in samples) for split in dict.fromkeys(s.split for s in samples)}


def _write(output: Path, resize_h_w: tuple[int, int] | None, link: bool, sample: RawSample) -> None:
    size = resize_h_w or sample.resize_h_w
    for data_type, path in sample.files.items():
        changes = size is not None or (data_type == "seg_maps" and sample.replace_ids)
        extension = path.suffix[1:].lower() if data_type == "images" or not changes else "png"
        target = output / sample.split / data_type / f"{sample.key}.{extension}"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if changes:
            array = _DECODERS[data_type](path.read_bytes(), str(path))
            if data_type == "seg_maps":
                for old, new in sample.replace_ids.items():
                    array = np.where(array == old, array.dtype.type(new), array)
            write_bytes(target, _encoded(array, data_type, size, extension))
        elif link:
            target.symlink_to(path.resolve())
        else:
            with atomic_write(target) as partial_copy:
                shutil.copyfile(path, partial_copy)
    target = output / sample.split / "inst_maps" / f"{sample.key}.png"
    if sample.objects and not target.exists():
        path = sample.files["seg_maps"]
        instances = draw_instances(sample.objects, decode_label(path.read_bytes(), str(path)), str(path))
        write_bytes(target, _encoded(instances, "inst_maps", size, "png"))


_DECODERS: dict[str, Callable[[bytes, str], NDArray[Any]]] = {
    "images": decode_image,
    "seg_maps": decode_label,
    "inst_maps": decode_instances,
}


def _encoded(array: NDArray[Any], data_type: str, size: tuple[int, int] | None, extension: str) -> bytes:
    """The file of a photo or map, resized to ``size``."""
    geometry = Geometry.whole(array.shape, size) if size else None
    if data_type == "images":
        return encode_picture(apply_to_image(array, geometry, any_area=True) if geometry else array, f".{extension}")
    return encode_map(apply_to_map(array, geometry) if geometry else array)
