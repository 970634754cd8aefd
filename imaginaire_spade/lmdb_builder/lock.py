"""Lock a shard; the lock ends with its owner.

Record locks (fcntl) on the bytes of one small file beside the output: the kernel drops them when their process ends,
however it ends, and they hold across machines on file systems that support them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imaginaire_spade.errors import DataError

# Byte i: the builder that owns shard i; _WRITING + i: the process that writes it; _FINISHING: who joins the shards.
_WRITING, _FINISHING = 1 << 20, 1 << 21

# One descriptor per file and process: closing any of several would drop all of the process's locks on the file.
_descriptors: dict[Path, int] = {}


@contextmanager
def owning(output: Path, shards: Sequence[int]) -> Iterator[Path]:
    """Hold ``shards`` of ``output`` while the block runs; gives the lock file.

    Raises:
        DataError: another living process holds one of them.
    """
    path = output.with_name(f"{output.name}.lock")
    made_parent = not path.parent.exists()
    try:
        _lock(path, output, shards)
        yield path
    finally:
        descriptor = _descriptors.pop(path, None)
        if descriptor is not None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the whole file: nobody else is at work
                path.unlink(missing_ok=True)
                if made_parent and not any(path.parent.iterdir()):
                    path.parent.rmdir()
            except OSError:
                pass  # others go on with it
            os.close(descriptor)


def _lock(path: Path, output: Path, shards: Sequence[int]) -> None:
    assert path not in _descriptors, "one build at a time in one process"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = _descriptors[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            for shard in shards:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return
            os.close(_descriptors.pop(path))  # its last owner removed it meanwhile
    except (BlockingIOError, PermissionError) as error:
        if isinstance(error, PermissionError) and path not in _descriptors:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from None
        raise DataError(
            f"--output_root {output}: another process is building there. Wait for it, end it, or choose another folder"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be locked: {error.strerror}; choose a folder on another file system") from None


@contextmanager
def writing(lock_file: Path, shard: int) -> Iterator[None]:
    """Wait until nobody else writes ``shard``: a killed builder's worker lives some tenths of a second longer."""
    with _held(lock_file, _WRITING + shard):
        yield


@contextmanager
def finishing(lock_file: Path) -> Iterator[None]:
    """Wait for the right to join the shards."""
    with _held(lock_file, _FINISHING):
        yield


@contextmanager
def _held(lock_file: Path, byte: int) -> Iterator[None]:
    if lock_file not in _descriptors:  # a worker that was not forked
        _descriptors[lock_file] = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    descriptor = _descriptors[lock_file]
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, byte)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, byte)
