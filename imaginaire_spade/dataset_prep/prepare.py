"""Turn official downloads of data sets into raw folders (``scripts/prepare_dataset.py``).

Ids stay as they are in the download wherever the table in ``configs/labels/NAME.yaml`` maps them; files are copied (or
linked), not decoded, wherever nothing has to change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np

from imaginaire_spade.data.image_files import DECODERS, decode_label, encode_map
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.dataset_prep.coco_instances import draw_instances
from imaginaire_spade.dataset_prep.downloads import DATASETS, Options, RawSample
from imaginaire_spade.dataset_prep.maps import Writing, write_maps
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import encode_image


def prepare(
    name: str, source: Path, output: Path, options: Options, *, link: bool = False, **writing: Unpack[Writing]
) -> dict[str, int]:
    """Write ``output/SPLIT/{images,seg_maps,inst_maps}/KEY.ext``; return the number of samples per split.

    Existing files are kept, so that an interrupted run continues when it runs again.

    Args:
        link: make symbolic links where nothing has to change, instead of copies.
    Raises:
        DataError: the source is not laid out as the official download, or files are missing.
    """
    if not source.is_dir():
        raise DataError(f"--source {source}: no such folder")
    samples = [
        replace(sample, resize_h_w=options.resize_h_w or sample.resize_h_w)
        for sample in DATASETS[name](source, options)
    ]
    if not samples:
        raise DataError(f"--source {source}: no images there")
    missing = [path for sample in samples for path in sample.files.values() if not path.is_file()]
    if missing:
        shown = "\n  ".join(str(path) for path in missing[:10])
        raise DataError(f"--source {source}: {len(missing)} of the files that belong together are missing:\n  {shown}")
    targets = [target for sample in samples for target in _targets(sample, output)]
    write_maps(name, partial(_content, link), targets, **writing)
    return dict(Counter(sample.split for sample in samples))


_RawFile = tuple[RawSample, str]
"""A sample, and the data type of one of its files."""


def _targets(sample: RawSample, output: Path) -> Iterator[tuple[Path, _RawFile]]:
    for data_type in [*sample.files, *(["inst_maps"] if sample.objects else [])]:
        path = sample.files.get(data_type)
        keeps_format = path and (data_type == "images" or not _changes(sample, data_type))
        extension = path.suffix[1:].lower() if path and keeps_format else "png"
        yield output / sample.split / data_type / f"{sample.key}.{extension}", (sample, data_type)


def _changes(sample: RawSample, data_type: str) -> bool:
    """Return whether the file that is written differs from the downloaded one."""
    return bool(sample.resize_h_w or (data_type == "seg_maps" and sample.replace_ids))


def _content(link: bool, file: _RawFile) -> bytes | Path:
    sample, data_type = file
    path = sample.files.get(data_type)
    if path and not _changes(sample, data_type):
        return path.resolve() if link else path.read_bytes()
    if path:
        array = DECODERS[data_type](path.read_bytes(), str(path))
    else:
        assert sample.objects
        path = sample.files["seg_maps"]
        array = draw_instances(sample.objects, decode_label(path.read_bytes(), str(path)), str(path))
    if data_type == "seg_maps":
        for old, new in sample.replace_ids.items():
            array = np.where(array == old, array.dtype.type(new), array)
    if sample.resize_h_w:
        geometry = Geometry.whole(array.shape, sample.resize_h_w)
        if data_type == "images":
            return encode_image(apply_to_image(array, geometry, any_area=True), path.suffix.lower())
        array = apply_to_map(array, geometry)
    return encode_map(array)
