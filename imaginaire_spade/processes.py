"""Live with the system and other processes: threads that wait asleep, freed memory that is kept, one writer per folder,
none that outlives its launcher.

Imports no torch, so that a command line can call ``spin_briefly`` and ``end_with_launcher`` early.
"""

import ctypes
import glob
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import LeaseCompromise, SoftFileLease, Timeout

from imaginaire_spade.errors import EXIT_CODE, UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies

LEASE_S = 60.0
"""Seconds of silence after which the writer of a folder counts as gone. One on the same host that ended is noticed at
once."""

NAMELESS_S = 3.0
"""Seconds that a process has to write its name into its lock."""

LAUNCHER_GONE_S = 120
"""Seconds that a process has to save and leave once its launcher is gone: nobody else would end it."""


def keep_large_buffers() -> None:
    """Have the C library keep freed memory for the next tensor, where it would return it to the system after each use.

    New pages for every large tensor took a quarter of a training iteration on a CPU (benchmarks/RESULTS.md). No effect
    where MALLOC_... or GLIBC_TUNABLES set these thresholds, or without glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys() or "_threshold" in tunables:
        return
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def spin_briefly() -> None:
    """Have torch's threads fall asleep after a few microseconds of waiting for each other, where they would spin for
    milliseconds, which stops them all once another process needs a core (benchmarks/RESULTS.md).

    For this process and those it starts, before torch is loaded. No effect where OMP_WAIT_POLICY or GOMP_SPINCOUNT is
    set, or where torch has another OpenMP than GNU's.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def end_with_parent(number: int) -> None:
    """Have the system send signal ``number`` to this process when its parent dies. (Linux; no effect elsewhere.)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end_with_launcher() -> None:
    """Have this process stopped by SIGTERM when torchrun or SLURM's step daemon, which started it, dies.

    A process without such a launcher may outlive its parent, as with ``nohup``.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    name, command = (Path(f"/proc/{parent}/{part}") for part in ("comm", "cmdline"))
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        if not elastic and name.read_text().strip() != "slurmstepd":
            return
        end_with_parent(signal.SIGTERM)
        adopted = elastic and parent == 1 and b"python" not in command.read_bytes()
        is_gone = adopted or os.getppid() != parent
    except OSError:  # it died while we looked
        is_gone = True
    if is_gone:
        sys.exit(128 + signal.SIGTERM)


def forget_terminal() -> None:
    """Drop what is printed to a terminal from now on: one that was closed makes every print an error."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            forget_output(stream)


def forget_output(stream: int) -> None:
    """Drop what is written to this file descriptor from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextmanager
def one_writer(folder: Path, flag: str, rank: int = 0) -> Iterator[None]:
    """Hold ``folder`` (made if missing) for this process while the block runs, by ``folder/.lock``.

    Args:
        flag: the command line's flag for the folder.
        rank: of this process, of those that write there together, each with a lock of its own.
    Raises:
        UserError: another living process writes there, or the folder is not writable.
    """
    try:
        with hold_lock(folder / f".lock{rank or ''}", folder, flag):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing was written


@contextmanager
def hold_lock(path: Path, folder: Path, flag: str, *, timeout: float = 0, quiet: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` of ``folder`` while the block runs. Missing folders around it are made.

    The file says who writes, and is touched regularly, so it works on network file systems without locks. The lock of a
    writer that is gone is taken over; one that has lost its launcher leaves soon, and is waited for. A process that
    lost its lock (stopped for longer than ``LEASE_S``) ends at once.

    Args:
        flag: the command line's flag for ``folder``.
        timeout: seconds to wait for another writer; -1: without end.
        quiet: take over without a word.
    Raises:
        UserError: another living process holds it, or it cannot be written.
    """

    def leave(lost: LeaseCompromise) -> None:
        print(f"error: {folder}: its lock was lost ({lost.reason}): ending, nothing more is written", file=sys.stderr)
        os._exit(EXIT_CODE)

    lease = SoftFileLease(path, lease_duration=LEASE_S, on_compromise=leave)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_nameless(path)
        owner = lease.owner
        who = "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"
        try:
            lease.acquire(timeout=timeout)
        except Timeout:
            if owner is None:
                raise
            if owner.hostname != _hostname():
                patience, state = LEASE_S + 10, "was writing there"
            elif _is_orphan(owner.pid):
                patience, state = LAUNCHER_GONE_S, "writes there, and its launcher is gone"
            else:
                raise
            print(f"{folder}: {who} {state}: waiting up to {patience:.0f} s for its end", flush=True)
            lease.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{flag} {folder}: {who} writes there. Wait for it, end it, or give another {flag}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}. Give another {flag}") from None
    try:
        if owner is not None and not quiet:
            print(f"{folder}: {who}, which wrote there, is gone: taking over", flush=True)
        yield
    finally:
        lease.release()
        for left in path.parent.glob(f"{glob.escape(path.name)}.break.*"):  # of one that was killed while it took over
            left.unlink(missing_ok=True)


def _remove_nameless(path: Path) -> None:
    """Remove a lock file that stays empty: its process was killed before it wrote its name. (One that only halted then
    notices that its lock is lost.)"""
    with suppress(FileNotFoundError):
        if (seen := path.stat()).st_size == 0:
            time.sleep(NAMELESS_S)
            if (now := path.stat()).st_size == 0 and now.st_ino == seen.st_ino:
                path.unlink()


def _is_orphan(pid: int) -> bool:
    """Whether a process of this machine has lost the one that started it. (Linux; False elsewhere.)"""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        return parent == 1 or Path(f"/proc/{parent}/comm").read_text(encoding="utf-8").strip() == "systemd"
    except OSError:
        return False


def _hostname() -> str:
    """Return how locks name this machine (with the container, where process numbers are its own)."""
    with TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "lock") as lease:
        owner = lease.owner
    return "" if owner is None else owner.hostname
