"""Run ``map`` in several processes, for work on the files of a data set."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from imaginaire_spade.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_task: Callable[[Any], Any] | None = None


def count_workers(num_workers: int | None, num_processes: int = 1) -> int:
    """``num_workers`` as it was given, or min(8, this process's share of the cores)."""
    return num_workers if num_workers is not None else max(1, min(8, (os.cpu_count() or 1) // num_processes))


def map_in_processes(
    task: Callable[[T], R], items: Sequence[T], num_workers: int | None, *, chunk: int = 8, least: int = 16
) -> Iterator[R]:
    """The results in order, as they come. Few of them wait at any time, however slowly they are taken.

    Args:
        task: picklable; sent to each process once.
        num_workers: processes (None: min(8, cores); 0: this one).
        chunk: items that travel together.
        least: for fewer items than this a process does not pay.
    Raises:
        DataError: a process was killed. What ``task`` raises ends the work.
    """
    workers = min(count_workers(num_workers), -(-len(items) // least))
    if workers < 1:
        yield from map(task, items)
        return
    # (Not multiprocessing.Pool, which waits for ever when a worker is killed for want of memory.)
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(task,)) as pool:
        chunks = iter([items[start : start + chunk] for start in range(0, len(items), chunk)])
        try:
            running: deque[Future[list[Any]]] = deque(
                pool.submit(_run, part) for part in itertools.islice(chunks, 2 * workers)
            )
            while running:
                results = running.popleft().result()
                running.extend(pool.submit(_run, part) for part in itertools.islice(chunks, 1))
                yield from results
        except BrokenProcessPool:
            raise DataError("a worker process was killed (out of memory?): write a smaller --num_workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    # A pool's workers do not notice that their parent was killed, and would stay for ever.
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run(items: Sequence[Any]) -> list[Any]:
    assert _task is not None
    return [_task(item) for item in items]
