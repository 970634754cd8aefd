"""``map`` in several processes, for work over the files of a data set."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from imaginaire_spade.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_task: Callable[[Any], Any] | None = None


def map_in_processes(task: Callable[[T], R], items: Sequence[T], num_workers: int | None) -> Iterator[R]:
    """The results in order, as they come.

    Args:
        task: picklable; sent to each process once.
        num_workers: processes (None: min(8, cores); 0: this one). Few items get fewer.
    Raises:
        DataError: a process was killed. What ``task`` raises ends the work.
    """
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
    workers = min(workers, -(-len(items) // 16))  # a process for less than 16 items does not pay
    if workers < 1:
        yield from map(task, items)
        return
    # (Not multiprocessing.Pool, which waits for ever when a worker is killed for want of memory.)
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(task,)) as pool:
        try:
            yield from pool.map(_run, items, chunksize=8)
        except BrokenProcessPool:
            raise DataError("a worker process was killed (out of memory?): write a smaller --num_workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    # A pool's workers do not notice that their parent was killed, and would stay for ever.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(item: Any) -> Any:
    assert _task is not None
    return _task(item)
