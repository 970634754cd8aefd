"""One LMDB environment: a folder with a ``data.mdb``, written in one go, or opened once per process for reading.

Knows nothing of samples: keys and values are bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import lmdb

from imaginaire_spade.errors import DataError

_CHUNK_BYTES = 16 << 20


class EnvironmentWriter:
    """Writes one LMDB environment, ``folder/data.mdb``; the same items give the same file, byte for byte.

    Every value is read back and compared when its chunk is committed, while the original is still at hand.

    Args:
        folder: made if missing.
        expected_bytes, expected_items: the size of all values and their number, from which the map's first size
            follows; it grows where they were too low.
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
        """Add an item; keys in ascending order. Raises OSError or lmdb.Error where the disk is full, or the like."""
        self._chunk.append((key, value))
        self._pending += len(value)
        if self._pending >= _CHUNK_BYTES:
            self._commit()

    def close(self) -> None:
        """Flush to disk. Raises as ``put`` does, and DataError where the file holds other items than were put."""
        try:
            self._commit()
            self._env.sync(True)
            if self._env.stat()["entries"] != self.num_items:
                raise DataError(f"{self._folder}: {self._env.stat()['entries']} entries of {self.num_items} written")
        finally:
            self._env.close()

    def abort(self) -> None:
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


# ------------------------------------------------------------------------------------------------ reading

# One environment per file and process: LMDB forbids two, and training and validation may read the same file.
# Path of data.mdb -> (process, (inode, size), environment).
_environments: dict[str, tuple[int, tuple[int, int], lmdb.Environment]] = {}
_opening = threading.Lock()


def _renew_lock() -> None:
    global _opening
    _opening = threading.Lock()  # another thread may have held it when this process was forked


os.register_at_fork(after_in_child=_renew_lock)


def usable_memory(cgroups: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may use: the machine's memory, or what a container or a scheduler leaves of it.

    Args:
        cgroups, of: where Linux keeps the limits, and of which groups this process is one.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
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


def read_value(data_file: str, key: bytes, *, readahead: bool = True) -> bytes | None:
    """The value of ``key``, or None. The environment is opened when it is first read, once per process.

    Args:
        readahead: whether a page that is read brings those after it (of the environment, once it is open).
    Raises:
        DataError: the file cannot be opened as an LMDB, or is cut off.
    """
    with _opening:
        known = _environments.get(data_file)
        environment = known[2] if known and known[0] == os.getpid() else _open(data_file, readahead)
    # (A copy: views into the map would save 6 us of a value's 1000, and be deadly where the file is replaced.)
    with environment.begin() as transaction:
        value: bytes | None = transaction.get(key)
    return value


def _open(data_file: str, readahead: bool) -> lmdb.Environment:
    if data_file in _environments:
        # Inherited through fork: LMDB counts it as open, but handles must not be shared between processes.
        _environments.pop(data_file)[2].close()
    path = Path(data_file)
    try:
        status = path.stat()
        environment = lmdb.open(str(path.parent), readonly=True, lock=False, readahead=readahead, create=False)
    except (OSError, lmdb.Error) as error:
        raise DataError(f"{path}: cannot be opened as an LMDB: {error}") from None
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if status.st_size < needed:
        # Reading beyond the end of a mapped file kills the process (SIGBUS): refuse before.
        environment.close()
        raise DataError(f"{path}: cut off ({status.st_size} bytes of {needed}): copy it again")
    _environments[data_file] = (os.getpid(), (status.st_ino, status.st_size), environment)
    return environment


def forget_replaced(data_file: str) -> None:
    """Close the environment of a file that was removed or built anew since it was opened."""
    with _opening:
        if data_file not in _environments:
            return
        try:
            status = os.stat(data_file)  # noqa: PTH116 (the key is text)
            unchanged = (status.st_ino, status.st_size) == _environments[data_file][1]
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            _environments.pop(data_file)[2].close()
