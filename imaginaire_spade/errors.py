"""Exceptions for mistakes of the user. Our own broken invariants are ``assert``s.

Every message says what is wrong, where (file, key, value), and what to write instead. Command lines print the message
alone and exit with ``EXIT_CODE``, which launchers can tell from a crash.
"""

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from imaginaire_spade.command_names import as_called

T = TypeVar("T")
R = TypeVar("R")

EXIT_CODE = 2


MAX_LINE, MAX_LINES = 1000, 60
"""Characters and lines that a message keeps, whatever values of the user's it quotes."""
PROBLEMS_SHOWN = 10
"""Of a list, where a command goes on, or reads no more."""


class UserError(ValueError):
    """Base: something the user can put right."""

    def __str__(self) -> str:
        lines = as_called(super().__str__()).splitlines()
        more = [f"... and {len(lines) - MAX_LINES} more lines"] if len(lines) > MAX_LINES else []
        half = MAX_LINE // 2
        short = [s if len(s) <= MAX_LINE else f"{s[:half]} ... {s[-half:]}" for s in lines[:MAX_LINES]]
        return "\n".join(short + more)


E = TypeVar("E", bound=UserError)


class ConfigError(UserError):
    """A mistake in a configuration or on the command line."""


class DataError(UserError):
    """A data set, file or folder that cannot be used as it is."""


class LabelError(DataError):
    """A label map holds what the table does not allow.

    ``where`` names it; ``wrong`` and ``present`` are its values (colours: ``is_colour``), if it is about values.
    """

    def __init__(
        self,
        message: str,
        where: str = "",
        wrong: Iterable[int] = (),
        present: Iterable[int] = (),
        is_colour: bool = False,
    ) -> None:
        super().__init__(message)
        self.where, self.wrong, self.present, self.is_colour = where, set(wrong), set(present), is_colour


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign or of another architecture."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU (which of torch and OpenCV only the message tells)."""
    import torch  # here, because this module is loaded without it

    words = ("can't allocate memory", "Insufficient memory", "Caught MemoryError")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its type, if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def positive_integer(text: str) -> int:
    """Parse a positive integer from the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def catch_error(kind: type[E], function: Callable[[T], R]) -> Callable[[T], R | E]:
    """Make a function return an error of ``kind`` that it raises, so that whoever reads ahead goes on."""

    def call(item: T) -> R | E:
        try:
            return function(item)
        except kind as error:
            return error

    return call


@contextmanager
def how_to_install(packages: str, what: str, otherwise: str = "") -> Iterator[None]:
    """Say how to install the optional ``packages`` (of pyproject.toml) if an import in the block fails.

    Args:
        packages: as pip takes them.
        what: says what needs which package.
        otherwise: says what can be done without it.
    Raises:
        ConfigError: a package is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:  # (-U: it may be there, but too old)
        raise ConfigError(f"{what} ({error}): pip install -U {packages}{otherwise}") from None


@contextmanager
def _paths_explained() -> Iterator[None]:
    """Name the file in one message if the block fails because this user may not read or write it, or it is a link that
    leads to itself."""
    try:
        yield
    except PermissionError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error).strip().splitlines()[-1]
        raise UserError(f"{named}. Correct the permissions (chmod, chown), or run as a user who has them") from None
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):
            raise
        raise UserError(f"{error}: a link that leads to itself. Remove it, or give another path") from None


def run_command_line(main: Callable[[], None]) -> None:
    """Run a command line's ``main``; print a user's mistake as one message, without a traceback, and exit.

    If several processes under one launcher meet the same mistake, only local rank 0 prints: the others wait a little,
    in which the launcher ends them. A process that met it alone prints in the end. What the output's encoding lacks is
    printed as its escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _paths_explained():
            main()
    except UserError as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank != "0":
            time.sleep(3)
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        # A restart mends no mistake, yet torchrun --max_restarts would try: ask its agent, our parent, to end.
        if rank == "0" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            os.kill(os.getppid(), signal.SIGTERM)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt as stopped:
        sys.exit(128 + (stopped.args[0] if stopped.args else signal.SIGINT))
