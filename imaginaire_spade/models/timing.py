"""Compare two ways of computing the same on this machine."""

import time
from collections.abc import Callable

import torch

Ask = Callable[[str, Callable[[], float]], float | None]
"""(question, how to measure the answer) -> how many times faster one way is than the usual one, measured or remembered;
None: go by the rule."""

CLEARLY = 1.05
"""A measured way has to be so many times faster than the one of the rule."""


def by_rule(question: str, measure: Callable[[], float]) -> None:
    """Answer no question: the same choices on every machine."""


def gain(way: Callable[[], object], usual: Callable[[], object]) -> float:
    """Measure how many times faster ``way`` is than ``usual``: in turns, the least processor time of each, by one
    thread. Other processes hardly change it; they would change elapsed time, and the time that threads wait.

    Short ones run more often: a call that takes a millisecond may take five where its results get new pages.
    """
    least, threads = [float("inf")] * 2, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds, began_at = 0, time.process_time()
        while rounds < 3 or (rounds < 30 and time.process_time() - began_at < 0.3):
            for index, run in enumerate((usual, way)):
                started_at = time.process_time()
                run()
                least[index] = min(least[index], time.process_time() - started_at)
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    tick = time.get_clock_info("process_time").resolution
    return (least[0] + tick) / (least[1] + tick)
