"""Share progress between build processes: samples done, and whether to go on."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

MAX_PROBLEMS = 20
"""A build gives up after this many."""


class Tally:
    """Counters in shared memory."""

    def __init__(self) -> None:
        self.samples = multiprocessing.Value("q", 0)
        self.problems = multiprocessing.Value("q", 0)
        self.stop = multiprocessing.Value("b", 0)

    def add(self, num_problems: int) -> bool:
        """Count a sample; whether to go on."""
        with self.samples:
            self.samples.value += 1
        with self.problems:
            self.problems.value += num_problems
        return self.go_on()

    def go_on(self) -> bool:
        return not self.stop.get_obj().value and self.problems.get_obj().value < MAX_PROBLEMS

    def seen(self) -> int:
        """Samples so far. (Read without the lock, which a process that was killed may hold for ever.)"""
        return int(self.samples.get_obj().value)


@contextmanager
def shown(tally: Tally, total: int, disable: bool) -> Iterator[None]:
    """A progress bar that follows ``tally``."""
    finished = threading.Event()
    tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed may hold it
    with tqdm(total=total, desc="building", unit="images", disable=disable, smoothing=0.05) as bar:

        def follow() -> None:
            while not finished.wait(0.5):
                bar.update(tally.seen() - bar.n)

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            finished.set()
            follower.join()
            bar.update(tally.seen() - bar.n)
