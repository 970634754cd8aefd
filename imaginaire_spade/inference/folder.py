"""A data set's label maps -> a folder of picture files.

Owns the plan of the output folder and its checks, the split over processes, style codes per key, reading ahead,
writing, progress, and the gallery page.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor
from tqdm import tqdm

from imaginaire_spade.data.dataset import LabelMapDataset, Sample
from imaginaire_spade.data.folders import DATA_TYPES
from imaginaire_spade.data.workers import read_ahead
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.inference.synthesis import BATCHES_HELD, Request, synthesise
from imaginaire_spade.inference.weights import LoadedModel
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.models.encoder import sample_style
from imaginaire_spade.noise import style_noise
from imaginaire_spade.pictures import LABELS_FOLDER, SUFFIXES, GalleryEntry, Picture, write_gallery, write_image

# ------------------------------------------------------------------------------------------------ the output folder


@dataclass(frozen=True)
class Output:
    """Files of one label map, relative to the output folder."""

    key: str
    index: int
    """Place in the data set."""
    pictures: tuple[str, ...]
    label_map: str


def plan_outputs(keys: Sequence[str], num_samples: int = 1, suffix: str = ".png") -> list[Output]:
    """The files of every key, sorted by key. Raises DataError for keys that lead out of the folder or collide."""
    digits = max(2, len(str(num_samples - 1)))
    outputs = []
    for index, key in sorted(enumerate(keys), key=lambda item: item[1]):
        _check_key(key)
        stems = [key] if num_samples == 1 else [f"{key}_{j:0{digits}d}" for j in range(num_samples)]
        pictures = tuple(f"{stem}{suffix}" for stem in stems)
        outputs.append(Output(key, index, pictures, f"{LABELS_FOLDER}/{key}.png"))
    taken: dict[str, str] = {}
    for output in outputs:
        for path in (*output.pictures, output.label_map):
            if path in taken:
                raise DataError(
                    f"label maps {taken[path]!r} and {output.key!r} would both be written to {path}: rename one"
                )
            taken[path] = output.key
    for path, key in taken.items():
        for parent in itertools.takewhile(lambda p: p.name, PurePosixPath(path).parents):
            if str(parent) in taken:
                raise DataError(
                    f"label map {key!r} needs a folder {parent}, but that is a picture of"
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
                    f"--output_dir {directory} already holds pictures, such as {path}. Write --skip_existing to keep"
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
                f"--output_dir {directory} lies among the label maps of {root}: pictures would replace them or be taken"
                " for label maps. Give a folder elsewhere"
            )


# ------------------------------------------------------------------------------------------------ the run


class Progress:
    """Progress on stderr: a bar on a terminal, else a line now and then; nothing where ``shown`` is False."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._bar = tqdm(unit="image", dynamic_ncols=True) if shown and sys.stderr.isatty() else None
        self._started_at = self._line_at = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif self._shown and time.perf_counter() - self._line_at >= self.SECONDS_BETWEEN_LINES:
            self._line_at = time.perf_counter()
            rate = done / (self._line_at - self._started_at)
            print(f"{done} of {total} pictures, {rate:.2f} images/s", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class RunReport:
    """What one process did."""

    pictures: int
    """Written by this process."""
    total: int
    """Of all processes, those that were there already included."""
    seconds: float
    gallery: Path | None


def generate_folder(
    model: LoadedModel,
    dataset: LabelMapDataset,
    directory: Path,
    *,
    batch_size: int = 1,
    num_samples: int = 1,
    seed: int = 0,
    style: tuple[Tensor, Tensor] | None = None,
    suffix: str = ".png",
    existing: str = "refuse",
    gallery: bool = True,
    info: ProcessInfo | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> RunReport:
    """Write the pictures of this process's share of a data set: every ``world_size``-th key, in sorted order.

    Args:
        dataset: label maps, made with ``with_images=False``.
        directory: output folder.
        num_samples: pictures per label map, each with a style code of its own.
        style: (mu, logvar) of ``encode_style``, instead of drawn codes: the mean itself for one picture per label map,
            draws around it for several.
        existing: what to do with pictures in ``directory``: "refuse", "skip" or "overwrite".
        gallery: write ``index.html`` (rank 0; it names every process's pictures) and coloured label maps for it.
        on_written: called with (pictures done, pictures to do) of this process.
    Raises:
        UserError: before the first picture, for whatever can be known by then; DataError for a label map that cannot
            be used, naming the file. Pictures written by then stay, and are whole.
    """
    info = info or ProcessInfo()
    everything = plan_outputs(dataset.keys, num_samples, suffix)
    own = everything[info.rank :: info.world_size]
    if existing == "refuse":
        check_output_folder(directory, own, everything)
    _make_folder(directory)

    wanted: dict[str, list[int]] = {}  # key -> numbers of the pictures to make
    for output in own:
        files = [j for j, path in enumerate(output.pictures) if existing != "skip" or not (directory / path).is_file()]
        if files or (gallery and not (directory / output.label_map).is_file()):
            wanted[output.key] = files
    todo = [output for output in own if output.key in wanted]
    number = sum(map(len, wanted.values()))

    started_at, done = time.perf_counter(), 0
    with Writer() as writer:

        def requests() -> Iterator[Request]:
            for output, sample in read_ahead(lambda o: (o, dataset[o.index]), todo, BATCHES_HELD):
                if gallery:
                    writer.put(directory / output.label_map, dataset.labels.colourise(sample.labels.numpy()))
                yield from _requests(model, output, sample, wanted[output.key], seed, style)

        for path, picture in synthesise(model, requests(), batch_size):
            writer.put(directory / path, picture)
            done += 1
            on_written(done, number)
    seconds = time.perf_counter() - started_at
    page = None
    if gallery and info.is_main:
        page = _write_gallery(model, dataset.labels, directory, everything)
    return RunReport(done, sum(len(output.pictures) for output in everything), seconds, page)


def _requests(
    model: LoadedModel,
    output: Output,
    sample: Sample,
    wanted: Sequence[int],
    seed: int,
    style: tuple[Tensor, Tensor] | None,
) -> Iterator[Request]:
    for j in wanted:
        z = None
        if model.style_dims:
            name = output.key if len(output.pictures) == 1 else f"{output.key}#{j}"
            z = style_noise(seed, [name], model.style_dims)[0]
            if style is not None:
                z = style[0] if len(output.pictures) == 1 else sample_style(*style, z)
        yield Request(output.pictures[j], sample.labels, sample.edges, z, sample.distances)


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {directory}: no permission to write there")


def _write_gallery(model: LoadedModel, labels: LabelSpec, directory: Path, outputs: Sequence[Output]) -> Path:
    legend = [(labels.name(i), tuple(labels.colours[i].tolist())) for i in range(labels.num_classes + 1)]
    entries = [GalleryEntry(output.key, output.label_map, output.pictures) for output in outputs]
    title = f"{directory.resolve().name}: generator after {model.images_seen:,} images ({model.weights} weights)"
    return write_gallery(directory, entries, title, legend=legend)


class Writer:
    """Encodes and writes pictures in a few threads, with a bounded queue. Leaving it waits for all of them.

    Raises UserError (from ``put`` or on leaving) for a picture that could not be written.
    """

    def __init__(self, num_threads: int = 3) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "write")
        self._pending: deque[Future[None]] = deque()
        self._bound = 8 * num_threads

    def put(self, path: Path, picture: Picture) -> None:
        self._pending.append(self._pool.submit(write_image, path, picture))
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
