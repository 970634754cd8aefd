"""Plan and write the output folder: file names, accepted existing contents, background writing."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from imaginaire_spade.data.folders import DATA_TYPES
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.files import PARTIAL
from imaginaire_spade.pictures import LABELS_FOLDER, SUFFIXES

LEFTOVER_AFTER_S = 60
"""A partial file of this age belongs to a process that was killed: writing a picture takes milliseconds."""


@dataclass(frozen=True)
class Output:
    """Files of one label map, relative to the output folder."""

    key: str
    index: int
    """Place in the data set."""
    pictures: tuple[str, ...]
    label_map: str
    animation: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.pictures, self.label_map, *([self.animation] if self.animation else []))


def plan_outputs(
    keys: Sequence[str], num_samples: int = 1, suffix: str = ".png", animation: str | None = None
) -> list[Output]:
    """The files of every key, sorted by key.

    Args:
        animation: suffix of a file that shows the samples of a key one after the other; None: there is none.
    Raises:
        DataError: keys that lead out of the folder or collide.
    """
    digits = max(2, len(str(num_samples - 1)))
    outputs = []
    for index, key in sorted(enumerate(keys), key=lambda item: item[1]):
        _check_key(key)
        stems = [key] if num_samples == 1 else [f"{key}_{j:0{digits}d}" for j in range(num_samples)]
        pictures = tuple(f"{stem}{suffix}" for stem in stems)
        film = None if animation is None else f"{key}{animation}"
        outputs.append(Output(key, index, pictures, f"{LABELS_FOLDER}/{key}.png", film))
    taken: dict[str, str] = {}
    for output in outputs:
        for path in output.files:
            if path in taken:
                raise DataError(
                    f"label maps {taken[path]!r} and {output.key!r} would both be written to {path}: rename one"
                )
            taken[path] = output.key
    for path, key in taken.items():
        for parent in itertools.takewhile(lambda p: p.name, PurePosixPath(path).parents):
            if str(parent) in taken:
                raise DataError(
                    f"label map {key!r} needs a folder {parent}, but that is an image of"
                    f" {taken[str(parent)]!r}: rename one"
                )
    return outputs


def _check_key(key: str) -> None:
    if (
        any(part in ("", ".", "..") for part in key.split("/"))
        or any(character in key for character in "\\\0")
        or re.match(r"[A-Za-z]:", key)
    ):
        raise DataError(
            f"{key!r}: a sample's key must be a plain relative path (SEQUENCE/NAME): no '..', no leading '/', drive"
            " letter or backslash. Rename it in the data set"
        )


def check_output_folder(directory: Path, own: Sequence[Output], everything: Sequence[Output]) -> None:
    """Raises UserError where the folder holds pictures already: an evaluation of it would mix two runs.

    Several processes check without waiting for each other: each looks for what no other process writes, which is its
    own share and what belongs to nobody.
    """
    planned = {path for output in everything for path in output.pictures}
    mine = {path for output in own for path in output.pictures}
    for folder, folders, files in os.walk(directory):
        at = Path(folder).relative_to(directory).as_posix()
        if at == ".":
            folders[:] = [name for name in folders if name != LABELS_FOLDER]
        for name in files:
            path = name if at == "." else f"{at}/{name}"
            is_picture = name.lower().endswith(SUFFIXES) and not name.startswith(".")
            if is_picture and (path in mine or path not in planned):
                raise UserError(
                    f"--output_dir {directory} already holds images, such as {path}. Write --skip_existing to keep"
                    " them and make the missing ones, --overwrite to replace those of the same name, or another folder"
                )


def check_apart(directory: Path, roots: Iterable[str | Path]) -> None:
    """Raises UserError where pictures would land among the label maps they are made of."""
    target = directory.resolve()
    for root in roots:
        source = Path(root).resolve()
        if not target.is_relative_to(source):
            continue
        below = target.relative_to(source).parts
        if not below or below[0] in DATA_TYPES or not any((source / name).is_dir() for name in DATA_TYPES):
            raise UserError(
                f"--output_dir {directory} lies among the label maps of {root}: images would replace them or be taken"
                " for label maps. Give a folder elsewhere"
            )


def make_folder(directory: Path) -> None:
    """Make the output folder where it is not there; partial files that a killed run left in it go away.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {directory}: no permission to write there")
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names if name.startswith(PARTIAL)):
            try:
                if time.time() - path.stat().st_mtime > LEFTOVER_AFTER_S:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                pass


class Writer:
    """Writes files in a few threads, with a bounded queue. Leaving it waits for all of them.

    Raises UserError (from ``put`` or on leaving) for a file that could not be written.
    """

    def __init__(self, num_threads: int = 3) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "write")
        self._pending: deque[Future[None]] = deque()
        self._bound = 8 * num_threads

    def put(self, write: Callable[..., None], path: Path, content: object) -> None:
        """Have ``write(path, content)`` called; waits where too many are due."""
        self._pending.append(self._pool.submit(write, path, content))
        while self._pending and (len(self._pending) > self._bound or self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
