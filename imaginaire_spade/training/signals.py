"""Record the signals that ask a run to stop; the loop obeys them between two iterations."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM: preemption, a launcher that stops its processes, ``kill``. SIGUSR1: a batch system's warning before the time
limit (SLURM's ``--signal``). SIGINT: Ctrl-C."""

INSIST_AFTER_S = 2.0
"""A Ctrl-C arrives twice within moments, from the terminal and from the launcher; a later one means "at once"."""


def exit_code(number: int) -> int:
    """Return the code by which shells know the signal: 143 for SIGTERM, 138 for SIGUSR1, 130 for SIGINT."""
    return 128 + number


class StopRequested(Exception):
    """A process was asked to stop while an evaluation ran; raised on all processes at the same point."""


class StopRequest:
    """Hold back the signals of ``STOP_SIGNALS`` while entered; ``number`` is the first one that arrived.

    Raises:
        KeyboardInterrupt: another Ctrl-C arrived more than ``INSIST_AFTER_S`` later.
    """

    def __init__(self) -> None:
        self.number = 0
        """The number of the first signal; 0: none yet."""
        self._noted_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._noted_at > INSIST_AFTER_S:
            raise KeyboardInterrupt
