"""Write the LMDBs and the index of a shard, in imaginaire's format (``data/lmdb_source.py`` describes it)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lmdb

from imaginaire_spade.data.folders import split_key
from imaginaire_spade.data.lmdb_source import FILENAMES, METADATA
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import write_json

MAX_KEY_BYTES = 511
"""LMDB's limit."""
_CHUNK_BYTES = 16 << 20


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


class EnvironmentWriter:
    """A new LMDB environment, ``folder/data.mdb``; the same items give the same file, byte for byte.

    Every commit reads its values back and compares them with the originals.

    Args:
        folder: made if missing.
        expected_bytes, expected_items: the size of all values and their number, for the first size of LMDB's map,
            which grows where they were too low.
    """

    def __init__(self, folder: Path, expected_bytes: int, expected_items: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.num_items = 0
        self.num_bytes = 0
        self._folder = folder
        self._chunk: list[tuple[bytes, bytes]] = []
        self._pending = 0
        # A value takes whole pages.
        self._map_size = _whole_megabytes(expected_bytes + expected_items * 8192 + (1 << 20))
        self._env = self._open()

    def _open(self) -> lmdb.Environment:
        # 0o777 less what the umask takes away; LMDB leaves out the right to execute.
        return lmdb.open(str(self._folder), map_size=self._map_size, lock=False, sync=False, mode=0o777)

    def put(self, key: bytes, value: bytes) -> None:
        """Add an item; keys must come in ascending order.

        Raises:
            OSError, lmdb.Error: the disk is full, or the like.
            DataError: a value reads back differently.
        """
        self._chunk.append((key, value))
        self._pending += len(value)
        if self._pending >= _CHUNK_BYTES:
            self._commit()

    def close(self) -> None:
        """Flush to disk.

        Raises:
            OSError, lmdb.Error, DataError: as ``put``; or the file holds other items than were put.
        """
        try:
            self._commit()
            self._env.sync(True)
            if self._env.stat()["entries"] != self.num_items:
                raise DataError(f"{self._folder}: {self._env.stat()['entries']} entries of {self.num_items} written")
        finally:
            self._env.close()

    def abort(self) -> None:
        """Leave the file as it is."""
        self._env.close()

    def _commit(self) -> None:
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in self._chunk:
                        transaction.put(key, value, append=True)
                break
            except lmdb.MapFullError:
                self._map_size = _whole_megabytes(2 * self._map_size)
                self._env.set_mapsize(self._map_size)
        with self._env.begin() as transaction:
            for key, value in self._chunk:
                if transaction.get(key) != value:
                    raise DataError(f"{self._folder}: {key.decode()} reads back differently: is the disk failing?")
        self.num_items += len(self._chunk)
        self.num_bytes += self._pending
        if self._pending >= _CHUNK_BYTES:
            # What was read back counts as this process's memory as long as it is mapped.
            self._env.close()
            self._env = self._open()
        self._chunk, self._pending = [], 0


def _whole_megabytes(size: int) -> int:
    return -(-size // (1 << 20)) << 20
