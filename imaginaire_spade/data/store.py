"""Write and read LMDB shards in imaginaire's format; detect whether a folder holds LMDBs or plain folders.

A shard is a folder: one LMDB environment per data type (``images/data.mdb`` ...), key ``SEQUENCE/STEM`` in UTF-8
(``./STEM`` for files directly in the folder), value the original file's bytes; ``all_filenames.json``: sequence ->
sorted stems; ``metadata.json``: data type -> extension. ``build.py`` adds ``manifest.json``. Decodes nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from imaginaire_spade.data.environments import forget_replaced, read_value
from imaginaire_spade.data.folders import DATA_TYPES, LAYOUT, FolderSource, Source, holds_images, make_key, split_key
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import read_json, write_json

FILENAMES, METADATA, MANIFEST = "all_filenames.json", "metadata.json", "manifest.json"
MAX_KEY_BYTES = 511
"""LMDB's limit."""


def store_key(key: str) -> bytes:
    """Format a sample's key as imaginaire writes it."""
    return "/".join(split_key(key)).encode()


# ------------------------------------------------------------------------------------------------ writing


def write_index(shard: Path, keys: Sequence[str], extensions: Mapping[str, Mapping[str, str]]) -> None:
    """Write ``all_filenames.json`` and ``metadata.json``.

    Args:
        extensions: data type -> key -> extension. imaginaire knows one per type: the most common one is written.
    """
    stems: dict[str, list[str]] = {}
    for key in sorted(keys, key=split_key):
        sequence, stem = split_key(key)
        stems.setdefault(sequence, []).append(stem)
    write_json(shard / FILENAMES, stems)
    write_json(shard / METADATA, {t: most_common(by_key.values()) for t, by_key in extensions.items()})


def most_common(words: Iterable[str]) -> str:
    """Return the most frequent word; of equally frequent ones the first in the alphabet."""
    counts = Counter(words)
    return min(counts, key=lambda word: (-counts[word], word))


# ------------------------------------------------------------------------------------------------ reading


class LmdbSource(Source):
    """One or several shards. Opens each LMDB when it is first read, once per process.

    Raises:
        DataError: not in imaginaire's format, or without one of ``data_types``.
    """

    def __init__(self, root: Path, shards: Sequence[Path], data_types: Sequence[str]) -> None:
        self.root = root
        self._shards = [str(shard) for shard in shards]
        self.keys = []
        self._shard_of: dict[str, int] = {}
        self._data_types = tuple(data_types)
        for number, shard in enumerate(shards):
            for key in _read_filenames(shard / FILENAMES):
                if key in self._shard_of:
                    raise DataError(f"{shard / FILENAMES}: {key!r} stands there twice, or in another shard as well")
                self._shard_of[key] = number
                self.keys.append(key)
            for data_type in DATA_TYPES:
                forget_replaced(_data_file(shard, data_type))
            for data_type in data_types:
                if not _is_there(shard, data_type):
                    raise DataError(
                        f"{shard}: no LMDB {data_type}/ there. Build it with that data type"
                        f" (a folder {data_type}/ in --data_root of scripts/build_lmdb.py){_instead(data_type)}"
                    )
        if not self.keys:
            raise DataError(f"{root}: {FILENAMES} lists no samples: build it again with scripts/build_lmdb.py")

    @property
    def shard_sizes(self) -> list[int]:
        return list(Counter(self._shard_of.values()).values())

    @property
    def num_bytes(self) -> int:
        return sum(Path(_data_file(shard, t)).stat().st_size for shard in self._shards for t in self._data_types)

    def has(self, data_type: str) -> bool:
        return all(_is_there(shard, data_type) for shard in self._shards)

    def read(self, key: str, data_type: str) -> bytes:
        if key not in self._shard_of:
            raise DataError(f"{self.root}: no sample {key!r}")
        data_file = _data_file(self._shards[self._shard_of[key]], data_type)
        value = read_value(data_file, store_key(key), readahead=self.readahead)
        if value is None:
            raise DataError(f"{self.where(key, data_type)}: the LMDB lacks this key, though {FILENAMES} lists it")
        return value

    def where(self, key: str, data_type: str) -> str:
        return f"{self._shards[self._shard_of.get(key, 0)]}{os.sep}{data_type} key {store_key(key).decode()}"


def open_source(
    root: str | Path, data_types: Sequence[str], *, optional: Sequence[str] = (), bare: bool = False
) -> Source:
    """Open the samples under ``root``: detect whether it holds LMDB shards or plain folders.

    Args:
        data_types: what every sample must have.
        optional: data types of which ``has`` will be asked; in folders they are joined where they exist.
        bare: accept a plain folder of label maps as well (then ``data_types`` is ``["seg_maps"]``).
    Raises:
        DataError: nothing usable, with what was looked for.
    """
    root = Path(root)
    if not root.is_dir():
        state = "not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {state}; expected {LAYOUT}, or an LMDB root")
    if (root / FILENAMES).is_file():
        return LmdbSource(root, [root], data_types)
    if (root / MANIFEST).is_file() and not any((root / t).is_dir() for t in DATA_TYPES):
        return LmdbSource(root, _shards(root), data_types)
    if unfinished := sorted(p.name for p in root.iterdir() if p.is_dir() and p.name.startswith("shard_")):
        raise DataError(
            f"{root}: an unfinished build ({', '.join(unfinished[:5])} but no {MANIFEST}): run the same"
            " scripts/build_lmdb.py command again"
        )
    if present := [t for t in DATA_TYPES if _is_there(root, t)]:
        raise DataError(f"{root}: LMDBs {', '.join(present)} but no {FILENAMES}: copy that file too, or build again")
    if not any((root / t).is_dir() for t in DATA_TYPES):
        if bare and holds_images(root):
            return FolderSource(root, data_types, bare=True)
        raise DataError(
            f"{root}: no data set there. Looked for {MANIFEST} or {FILENAMES} (an LMDB built by"
            f" scripts/build_lmdb.py or imaginaire) and for {LAYOUT}"
        )
    for data_type in data_types:
        if not (root / data_type).is_dir():
            raise DataError(f"{root}: no folder {data_type}/ there; expected {LAYOUT}{_instead(data_type)}")
    return FolderSource(root, data_types, optional=optional)


def _instead(data_type: str) -> str:
    if data_type in ("edge_maps", "inst_maps"):
        return "; or write data.edges: labels (borders of the label map) or data.edges: none"
    return ""


def _data_file(shard: Path | str, data_type: str) -> str:
    # (Text, not a Path: a loader asks for it with every value.)
    return f"{shard}{os.sep}{data_type}{os.sep}data.mdb"


def _is_there(shard: Path | str, data_type: str) -> bool:
    return Path(_data_file(shard, data_type)).is_file()


def _shards(root: Path) -> list[Path]:
    """The shard folders that a manifest lists. Paths that lead out of ``root`` are refused."""
    manifest = read_json(root / MANIFEST)
    entries = manifest.get("shards") if isinstance(manifest, dict) else None
    paths = [entry.get("path") if isinstance(entry, dict) else None for entry in entries or []]
    names = [path for path in paths if isinstance(path, str) and path]
    if not names or len(names) != len(paths):
        raise DataError(f"{root / MANIFEST}: lists no shards: build the data set again")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise DataError(f"{root / MANIFEST}: the shard path {name!r} leads out of the folder")
        if not (root / name / FILENAMES).is_file():
            raise DataError(f"{root / name}: this shard is listed in {MANIFEST}, but has no {FILENAMES}: copy it again")
    return [root / name for name in names]


def _read_filenames(path: Path) -> list[str]:
    tree = read_json(path)
    if isinstance(tree, dict) and tree and all(isinstance(stems, dict) for stems in tree.values()):
        raise DataError(
            f"{path}: an unpaired data set (one list per data type), which has no label map to each photo. Build it"
            " again with scripts/build_lmdb.py (imaginaire: with --paired)"
        )
    if not isinstance(tree, dict) or not all(
        isinstance(stems, list) and all(isinstance(stem, str) for stem in stems) for stems in tree.values()
    ):
        raise DataError(f"{path}: expected an object of sequence -> list of file names without extension")
    return [make_key(sequence, stem, str(path)) for sequence, stems in tree.items() for stem in stems]
