"""Read LMDB shards in imaginaire's format; tell whether a folder holds LMDBs or plain folders.

A shard is a folder: one LMDB environment per data type (``images/data.mdb`` ...), key ``SEQUENCE/STEM`` in UTF-8
(``./STEM`` for files directly in the folder), value the original file's bytes; ``all_filenames.json``: sequence ->
sorted stems; ``metadata.json``: data type -> extension. The builder adds ``manifest.json``. Decodes nothing.
"""

import contextlib
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.folders import (
    DATA_TYPES,
    LAYOUT,
    FolderSource,
    Source,
    holds_images,
    instead_of,
    make_key,
    split_key,
    stays_inside,
)
from imaginaire_spade.data.image_files import PHOTO_EXTENSIONS
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import read_json

FILENAMES, METADATA, MANIFEST = "all_filenames.json", "metadata.json", "manifest.json"


def store_key(key: str) -> bytes:
    """Format a sample's key as imaginaire writes it."""
    return "/".join(split_key(key)).encode()


def stated_files(root: Path) -> dict[Path, tuple[int, str]]:
    """Map each LMDB of a data set, or of one shard, to its size and sha256 by the manifest; {}: there is no manifest.

    Raises:
        DataError: the manifest does not list them.
    """
    if not (root / MANIFEST).is_file():
        return {}
    stated = dict[str, tuple[int, str]]()
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        stated = {
            (shard["path"] + "/" + name).removeprefix("./"): (entry["bytes"], entry["sha256"])
            for shard in read_json(root / MANIFEST)["shards"]
            for name, entry in shard["files"].items()
        }
    if not stated or not all(map(stays_inside, stated)):
        raise DataError(f"{root / MANIFEST}: lists no files: build the data set again")
    return {root / name: fact for name, fact in stated.items()}


class LmdbSource(Source):
    """Samples in one or several shards. The first read of a process opens an LMDB.

    Raises:
        DataError: not in imaginaire's format, without one of ``data_types``, or not of the size that a manifest states.
    """

    def __init__(self, root: Path, shards: Sequence[Path], data_types: Sequence[str]) -> None:
        self.root = root
        self._shards = [str(shard) for shard in shards]
        self.keys = []
        self.shard_sizes = []
        self._shard_of: dict[str, int] = {}
        self._stamps: dict[str, list[int]] = {}
        for number, shard in enumerate(shards):
            stated = stated_files(shard)
            for key in _read_filenames(shard / FILENAMES):
                if key in self._shard_of:
                    raise DataError(f"{shard / FILENAMES}: {key!r} stands there twice, or in another shard as well")
                self._shard_of[key] = number
                self.keys.append(key)
            self.shard_sizes.append(len(self.keys) - sum(self.shard_sizes))
            for data_type in {*DATA_TYPES, *data_types}:
                _forget_replaced(_data_file(shard, data_type))
            for data_type in data_types:
                if not _is_there(shard, data_type):
                    raise DataError(
                        f"{shard}: no LMDB {data_type}/ there. Build it with that data type"
                        f" (a folder {data_type}/ in --data_root of scripts/build_lmdb.py){instead_of(data_type)}"
                    )
                status = (path := Path(_data_file(shard, data_type))).stat()
                num_bytes, fact = stated.get(path, (status.st_size, f"{status.st_size} {status.st_mtime_ns}"))
                if (found := status.st_size) != num_bytes:  # mapped, it might end the process
                    raise DataError(f"{path}: cut off or replaced ({found} bytes, not {num_bytes}): copy it again")
                self.num_bytes += num_bytes
                self._stamps[str(path)] = [zlib.crc32(fact.encode()), 0]
        if not self.keys:
            raise DataError(f"{root}: {FILENAMES} lists no samples: build it again with scripts/build_lmdb.py")

    def has(self, data_type: str) -> bool:
        return all(_is_there(shard, data_type) for shard in self._shards)

    def read(self, key: str, data_type: str) -> bytes:
        if key not in self._shard_of:
            raise DataError(f"{self.root}: no sample {key!r}")
        data_file = _data_file(self._shards[self._shard_of[key]], data_type)
        # (A copy: views into the map would save 6 us of a value's 1000, and be deadly where the file is replaced.)
        try:
            with _environment(data_file, self.readahead).begin() as transaction:
                value: bytes | None = transaction.get(store_key(key))
        except lmdb.Error as error:
            raise DataError(f"{self.describe(key, data_type)}: the LMDB is damaged ({error}): copy it again") from None
        if value is None:
            raise DataError(f"{self.describe(key, data_type)}: the LMDB lacks this key, though {FILENAMES} lists it")
        return value

    def stamps(self) -> tuple[list[str], NDArray[np.int64]]:
        return list(self._stamps), np.array([*self._stamps.values()])

    def describe(self, key: str, data_type: str) -> str:
        return f"{self._shards[self._shard_of.get(key, 0)]}{os.sep}{data_type} key {store_key(key).decode()}"


def open_source(
    root: str | Path,
    data_types: Sequence[str],
    *,
    optional: Sequence[str] = (),
    bare: bool = False,
    suffixes: Mapping[str, str] | None = None,
) -> Source:
    """Open the samples under ``root``: detect whether it holds LMDB shards or plain folders.

    Args:
        data_types: what every sample must have.
        optional: data types of which ``has`` will be asked; in folders they are joined where they exist.
        bare: accept a plain folder of files as well, where ``data_types`` is one, such as ``["seg_maps"]``.
        suffixes: of the names in folders, as of ``FolderSource``.
    Raises:
        DataError: nothing usable, with what was looked for.
    """
    root = Path(root)
    if not root.is_dir():
        state = "not a folder" if root.exists() else "no such folder"
        wanted = f"a folder of {data_types[0]}, or ROOT/{data_types[0]}/" if bare and len(data_types) == 1 else LAYOUT
        raise DataError(f"{root}: {state}; expected {wanted}, or an LMDB root")
    if (root / FILENAMES).is_file():
        return LmdbSource(root, [root], data_types)
    known = dict.fromkeys((*DATA_TYPES, *data_types))
    if (root / MANIFEST).is_file() and not any((root / t).is_dir() for t in known):
        return LmdbSource(root, _shards(root), data_types)
    if unfinished := sorted(p.name for p in root.iterdir() if p.is_dir() and p.name.startswith("shard_")):
        raise DataError(
            f"{root}: an unfinished build ({', '.join(unfinished[:5])} but no {MANIFEST}): run the same"
            " scripts/build_lmdb.py command again"
        )
    if present := [t for t in known if _is_there(root, t)]:
        raise DataError(f"{root}: LMDBs {', '.join(present)} but no {FILENAMES}: copy that file too, or build again")
    if not any((root / t).is_dir() for t in known):
        if bare and len(data_types) == 1 and holds_images(root):
            return FolderSource(root, data_types, bare=True)
        raise DataError(
            f"{root}: no data set there. Looked for {MANIFEST} or {FILENAMES} (an LMDB built by"
            f" scripts/build_lmdb.py or imaginaire) and for {LAYOUT}{_and_folders(data_types)}{_unread(root)}"
        )
    return FolderSource(root, data_types, optional=optional, suffixes=suffixes)


def _and_folders(data_types: Sequence[str]) -> str:
    """Name the folders of conditions that are needed."""
    folders = [f"{t}/" for t in data_types if t not in DATA_TYPES]
    return f", with folders {', '.join(folders)} of the conditions" if folders else ""


def _unread(root: Path) -> str:
    """Name the endings of the files in a folder that has none of an image."""
    if endings := sorted({path.suffix.lower() for path in root.iterdir() if path.is_file() and path.suffix})[:5]:
        return f". Images end in {' '.join(PHOTO_EXTENSIONS)}, the files there in {' '.join(endings)}: convert them"
    return ""


def _data_file(shard: Path | str, data_type: str) -> str:
    # (Text, not a Path: a loader asks for it with every value.)
    return f"{shard}{os.sep}{data_type}{os.sep}data.mdb"


def _is_there(shard: Path | str, data_type: str) -> bool:
    return Path(_data_file(shard, data_type)).is_file()


def _shards(root: Path) -> list[Path]:
    """List the shard folders of a manifest.

    Raises:
        DataError: it lists none, or one that is not there or lies outside ``root``.
    """
    manifest = read_json(root / MANIFEST)
    entries = manifest.get("shards") if isinstance(manifest, dict) else None
    paths = [entry.get("path") if isinstance(entry, dict) else None for entry in entries or []]
    names = [path for path in paths if isinstance(path, str) and path]
    if not names or len(names) != len(paths):
        raise DataError(f"{root / MANIFEST}: lists no shards: build the data set again")
    for name in names:
        if name != "." and not stays_inside(name):
            raise DataError(f"{root / MANIFEST}: the shard path {name[:99]!r} leads out of the folder")
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


# ------------------------------------------------------------------------------------------------ environments

# One environment per file and process: LMDB forbids two, and training and validation may read the same file.
# Path of data.mdb -> ((inode, size), environment).
_environments: dict[str, tuple[tuple[int, int], lmdb.Environment]] = {}
_opening = threading.Lock()


def _forget_inherited() -> None:
    """Close what this process got from the one that forked it: processes must not share handles."""
    global _opening
    _opening = threading.Lock()  # another thread may have held it
    while _environments:
        _environments.popitem()[1][1].close()


os.register_at_fork(after_in_child=_forget_inherited)


def usable_memory(cgroups: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that this process may use: the machine's memory, or less in a container or a scheduler's job.

    Args:
        cgroups, of: where Linux keeps the limits, and of which groups this process is one.
    """
    is_known = hasattr(os, "sysconf")  # (not on Windows)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if is_known else 2**63]
    with contextlib.suppress(OSError):  # not on Linux
        for line in of.read_text().splitlines():
            _, controllers, group = line.split(":", 2)  # "0::/job" (version 2) or "4:memory:/job"
            folder, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
            if controllers in ("", "memory"):
                # A container may see its own group as the topmost one, whatever the file says.
                for file in (folder / group.lstrip("/") / name, folder / name):
                    with contextlib.suppress(OSError, ValueError):  # none there, or "max"
                        limits.append(int(file.read_text()))
    return min(limits)


def _environment(data_file: str, readahead: bool) -> lmdb.Environment:
    """Return the environment of a file; open it at the first call of a process, which decides on ``readahead``.

    Raises:
        DataError: the file cannot be opened as an LMDB, or is cut off.
    """
    with _opening:
        if data_file in _environments:
            return _environments[data_file][1]
        try:
            identity = _identify(data_file)
            folder = str(Path(data_file).parent)
            environment = lmdb.open(folder, readonly=True, lock=False, readahead=readahead, create=False)
        except (OSError, lmdb.Error) as error:
            raise DataError(f"{data_file}: cannot be opened as an LMDB: {error}") from None
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if identity[1] < needed:
            # Reading beyond the end of a mapped file kills the process (SIGBUS): refuse before.
            environment.close()
            raise DataError(f"{data_file}: cut off ({identity[1]} bytes of {needed}): copy it again")
        _environments[data_file] = identity, environment
    return environment


def _identify(data_file: str) -> tuple[int, int]:
    status = Path(data_file).stat()
    return status.st_ino, status.st_size


def _forget_replaced(data_file: str) -> None:
    """Close the environment of a file that was removed or built anew since it was opened."""
    with _opening:
        known = _environments.get(data_file)
        if known and (not Path(data_file).exists() or _identify(data_file) != known[0]):
            _environments.pop(data_file)[1].close()
