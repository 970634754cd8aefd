"""Summarise a built data set and verify that it is unchanged (``scripts/inspect_lmdb.py``)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imaginaire_spade.data.folders import DATA_TYPES, Source
from imaginaire_spade.data.lmdb_source import MANIFEST, open_source
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import file_sha256, read_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.sample import check_files
from imaginaire_spade.lmdb_builder.workers import map_in_processes

MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"BM", "bmp"), (b"RIFF", "webp"), (b"\x93NUMPY", "npy"))


@dataclass(frozen=True)
class Contents:
    """Counts over all samples."""

    num_samples: int
    num_bytes: dict[str, int]
    """Data type -> bytes of its values."""
    sizes: Counter[str]
    """"HxW" of the label maps (or of the first data type) -> samples."""
    class_pixels: Counter[int]
    class_samples: Counter[int]
    problems: tuple[str, ...]


def open_data(root: Path) -> Source:
    """All that lies under ``root``: LMDB shards, or plain folders. Raises DataError."""
    return open_source(root, [t for t in DATA_TYPES if (root / t).is_dir()])


def stored_types(source: Source) -> list[str]:
    return [t for t in DATA_TYPES if source.has(t)]


def stored_labels(root: Path) -> LabelSpec | None:
    """The label table that the data set was built with; None for another builder's. Raises DataError."""
    if not (root / MANIFEST).is_file():
        return None
    try:
        return LabelSpec.model_validate_json(json.dumps(read_json(root / MANIFEST)["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / MANIFEST}: no usable label table: {error}") from None


def look_through(root: Path, labels: LabelSpec | None, num_workers: int | None) -> Contents:
    """Read and decode everything, and compare every file's checksum with the manifest's. Problems are collected."""
    problems = list(_wrong_checksums(root))
    source = open_data(root)
    types = stored_types(source)
    num_bytes: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    pixels: Counter[int] = Counter()
    holding: Counter[int] = Counter()
    results = map_in_processes(partial(_look_at, source, types, labels), source.keys, num_workers)
    for result in tqdm(results, "reading", len(source.keys), unit="images", mininterval=0.5):
        num_bytes.update(result.num_bytes)
        sizes.update(result.sizes)
        pixels.update(result.class_pixels)
        holding.update(result.class_samples)
        problems += result.problems
    return Contents(len(source.keys), dict(num_bytes), sizes, pixels, holding, tuple(problems))


def _wrong_checksums(root: Path) -> Iterator[str]:
    if not (root / MANIFEST).is_file():
        return
    manifest = read_json(root / MANIFEST)
    try:
        expected = {
            root / shard["path"] / name: entry["sha256"]
            for shard in manifest["shards"]
            for name, entry in shard["files"].items()
        }
    except (KeyError, TypeError):
        raise DataError(f"{root / MANIFEST}: lists no files: build the data set again") from None
    for path, sha256 in expected.items():
        if not path.is_file():
            yield f"{path}: missing"
        elif file_sha256(path) != sha256:
            yield f"{path}: its checksum differs from the manifest's: copy it again, or build again (--resume mends it)"


def _look_at(source: Source, types: list[str], labels: LabelSpec | None, key: str) -> Contents:
    checked = check_files(source, key, types, labels)
    return Contents(
        1,
        {data_type: len(data) for data_type, data in checked.files.items()},
        Counter({f"{checked.size[0]}x{checked.size[1]}": 1} if checked.size else {}),
        Counter(checked.class_pixels),
        Counter(checked.class_pixels.keys()),
        tuple(checked.problems),
    )


def extract(root: Path, key: str, folder: Path) -> list[Path]:
    """Write the files of one sample as ``folder/TYPE/KEY.ext``. Raises DataError for an unknown key."""
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
