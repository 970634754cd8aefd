"""Summarise a built data set and verify that it is unchanged (``scripts/inspect_lmdb.py``)."""

import json
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imaginaire_spade.data.folders import DATA_TYPES, Source
from imaginaire_spade.data.lmdb_source import MANIFEST, open_source
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import read_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.sample import Contents, LoadedSample, check_sample
from imaginaire_spade.lmdb_builder.shard import wrong_checksums
from imaginaire_spade.lmdb_builder.workers import map_in_order

MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"BM", "bmp"), (b"RIFF", "webp"), (b"\x93NUMPY", "npy"))


def open_data(root: Path) -> Source:
    """Open what lies under ``root``: LMDB shards, or plain folders.

    Raises:
        DataError: no data set is there.
    """
    return open_source(root, [t for t in DATA_TYPES if (root / t).is_dir()])


def stored_types(source: Source) -> list[str]:
    """List the data types that every sample has."""
    return [t for t in DATA_TYPES if source.has(t)]


def stored_labels(root: Path) -> LabelSpec | None:
    """Return the label table that the data set was built with; None if another builder made it.

    Raises:
        DataError: its manifest holds no usable table.
    """
    if not (root / MANIFEST).is_file():
        return None
    try:
        return LabelSpec.model_validate_json(json.dumps(read_json(root / MANIFEST)["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / MANIFEST}: no usable label table: {error}") from None


def look_through(root: Path, labels: LabelSpec | None, num_workers: int | None) -> Contents:
    """Read and check every sample as the builder does, and compare every file's checksum with the manifest's.

    Problems are collected, not raised.
    """
    source = open_data(root)
    contents = Contents(problems=list(wrong_checksums(root)))
    with map_in_order(partial(_check, source, stored_types(source), labels), source.keys, num_workers) as samples:
        for sample in tqdm(samples, "reading", len(source.keys), unit="images", mininterval=0.5):
            contents.add(sample)
    return contents


def _check(source: Source, types: list[str], labels: LabelSpec | None, key: str) -> LoadedSample:
    sample, _ = check_sample(source, key, types, labels)
    sample.files = {}  # only counts travel between processes
    return sample


def extract(root: Path, key: str, folder: Path) -> list[Path]:
    """Write the files of one sample as ``folder/TYPE/KEY.ext``; return their paths.

    Raises:
        DataError: there is no such sample.
    """
    source = open_data(root)
    if key not in source.keys:
        near = ", ".join(source.keys[:3])
        raise DataError(f"{root}: no sample {key!r}; keys look like: {near}")
    written = []
    for t in stored_types(source):
        data = source.read(key, t)
        extension = next((name for magic, name in MAGIC if data.startswith(magic)), "bin")
        path = folder / t / f"{key}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written.append(path)
    return written
