"""Generate a folder of images from a data set's label maps.

Owns the order of a run: which label maps are this process's, reading ahead, label maps that cannot be used, writing,
progress, and the gallery page.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.image_files import image_size
from imaginaire_spade.data.loader import read_ahead
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import DataError
from imaginaire_spade.inference.animation import write_animation
from imaginaire_spade.inference.output import Output, Writer, check_output_folder, make_folder, plan_outputs
from imaginaire_spade.inference.sizes import MAX_PIXELS, Size, SizeRule, shown
from imaginaire_spade.inference.style import StyleOf, drawn_styles
from imaginaire_spade.inference.synthesis import BATCHES_HELD, Request, synthesise
from imaginaire_spade.inference.weights import LoadedModel
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pictures import GalleryEntry, Picture, write_gallery, write_image

READ_THREADS = 3
PROBLEMS_SHOWN = 10


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
            print(f"{done} of {total} images, {rate:.2f} images/s", file=sys.stderr, flush=True)

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
    left_out: tuple[str, ...]
    """Why each label map of this process that was left out cannot be used."""


def generate_folder(
    model: LoadedModel,
    dataset: LabelMapDataset,
    directory: Path,
    *,
    batch_size: int = 1,
    num_samples: int = 1,
    style_of: StyleOf | None = None,
    suffix: str = ".png",
    animation: str | None = None,
    existing: Literal["refuse", "skip", "overwrite"] = "refuse",
    on_bad_label: Literal["fail", "skip"] = "fail",
    max_pixels: int = MAX_PIXELS,
    sizes: SizeRule | None = None,
    resize_back: bool = False,
    gallery: bool = True,
    info: ProcessInfo | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> RunReport:
    """Write the images of this process's share of a data set: every ``world_size``-th key, in sorted order.

    Args:
        dataset: label maps, made with ``with_images=False``.
        directory: output folder.
        num_samples: pictures per label map.
        style_of: the style code of each picture; default: one drawn for each, with seed 0.
        animation: ".gif" or ".mp4": also a file per label map that shows its samples one after the other.
        existing: what to do with pictures in ``directory``: "refuse", "skip" or "overwrite".
        on_bad_label: "fail": every label map is looked at before the first picture is made; "skip": those that cannot
            be used are left out.
        max_pixels: label maps that would be generated (or resized back) at more cannot be used.
        sizes: the rule by which ``dataset`` resizes label maps, to say what it does.
        resize_back: resize pictures to the size of the stored label map; else they are of that at which it is read.
        gallery: write ``index.html`` (rank 0; it names every process's pictures) and coloured label maps for it.
        on_written: called with (pictures done, pictures to do) of this process.
        on_note: called (rank 0) with what the user should know: before the first picture where all label maps are
            looked at by then, else at the end.
    Raises:
        UserError: before the first picture, for whatever can be known by then; DataError for a label map that cannot
            be used, naming the file. Pictures written by then stay, and are whole.
    """
    info = info or ProcessInfo()
    style_of = style_of or drawn_styles(0, model.style_dims, num_samples)
    everything = plan_outputs(dataset.keys, num_samples, suffix, animation)
    own = everything[info.rank :: info.world_size]
    if existing == "refuse":
        check_output_folder(directory, own, everything)
    make_folder(directory)
    wanted = {output.key: _wanted(output, directory, existing == "skip", gallery) for output in own}
    todo = [output for output in own if wanted[output.key] is not None]
    number = sum(len(samples or ()) for samples in wanted.values())

    def tell(note: str | None) -> None:
        if note is not None and info.is_main:
            on_note(note if info.world_size == 1 else f"process {info.rank} of {info.world_size}: {note}")

    own_sizes: Counter[Size] = Counter()
    if existing == "skip":
        tell(_note_of_kept(dataset, directory, own, resize_back))
    if on_bad_label == "fail":
        own_sizes = _check_label_maps(dataset, todo, max_pixels, resize_back)
        tell(sizes.note(own_sizes, resize_back=resize_back) if sizes else None)

    def read(output: Output) -> tuple[Output, Sample | DataError]:
        try:
            sample = dataset[output.index]
            size = (sample.labels.shape[0], sample.labels.shape[1])
            _check_pixels(sample.key, sample.original_size, size, max_pixels, resize_back)
        except DataError as error:
            if on_bad_label == "fail":
                raise
            return output, error
        return output, sample

    started_at, done = time.perf_counter(), 0
    left_out: dict[str, str] = {}
    places = {path: (output, j) for output in todo for j, path in enumerate(output.pictures)}
    films: dict[str, dict[int, Picture]] = {}
    with Writer() as writer:

        def requests() -> Iterator[Request]:
            for output, sample in read_ahead(read, todo, BATCHES_HELD, num_threads=READ_THREADS):
                if isinstance(sample, DataError):
                    left_out[output.key] = str(sample)
                    continue
                if on_bad_label == "skip":  # else they are known
                    own_sizes[sample.original_size] += 1
                if gallery:
                    coloured = dataset.labels.colourise(sample.labels.numpy())
                    writer.put(write_image, directory / output.label_map, coloured)
                for j in wanted[output.key] or ():
                    z = style_of(output.key, j)
                    back = sample.original_size if resize_back else None
                    yield Request(output.pictures[j], sample.labels, sample.edges, z, sample.distances, back)

        for path, picture in synthesise(model, requests(), batch_size):
            writer.put(write_image, directory / path, picture)
            output, j = places[path]
            if output.animation is not None:
                film = films.setdefault(output.key, {})
                film[j] = picture
                if len(film) == num_samples:
                    frames = [frame for _, frame in sorted(films.pop(output.key).items())]
                    writer.put(write_animation, directory / output.animation, frames)
            done += 1
            on_written(done, number)
    seconds = time.perf_counter() - started_at
    if on_bad_label == "skip":
        tell(sizes.note(own_sizes, resize_back=resize_back) if sizes else None)
    page = None
    if gallery and info.is_main:
        absent = set(left_out)
        if on_bad_label == "skip":
            # What other processes leave out is found again, rather than agreed on between them.
            others = [output for output in everything if output.key not in wanted]
            looked_at = _looked_at(dataset, others, max_pixels, resize_back)
            absent |= {o.key for o, found in zip(others, looked_at, strict=True) if isinstance(found, DataError)}
        page = _write_gallery(model, dataset.labels, directory, [o for o in everything if o.key not in absent])
    total = sum(len(output.pictures) for output in everything)
    return RunReport(done, total, seconds, page, tuple(left_out.values()))


def _wanted(output: Output, directory: Path, keep: bool, gallery: bool) -> Sequence[int] | None:
    """The samples of a label map that are to be made; None where not even the gallery lacks anything."""
    missing = [j for j, path in enumerate(output.pictures) if not (keep and (directory / path).is_file())]
    if output.animation is not None and (missing or not (directory / output.animation).is_file()):
        missing = list(range(len(output.pictures)))  # an animation is made of all its frames
    return missing if missing or (gallery and not (directory / output.label_map).is_file()) else None


def _note_of_kept(
    dataset: LabelMapDataset, directory: Path, outputs: Sequence[Output], resize_back: bool
) -> str | None:
    """Says so where the first of the pictures that stay is of another size than this run would write."""
    for output in outputs:
        path = directory / output.pictures[0]
        if not path.is_file():
            continue
        try:
            stored, read = dataset.check_label_map(output.index)
            kept = image_size(path.read_bytes(), str(path))
        except DataError:
            return None
        size = stored if resize_back else read
        if kept != size:
            return (
                f"{path} is kept at {shown(kept)}, but this run would write {shown(size)}: the folder will hold"
                " images of several sizes (--overwrite generates all again)"
            )
        return None
    return None


def _looked_at(
    dataset: LabelMapDataset, outputs: Sequence[Output], max_pixels: int, resize_back: bool
) -> Iterator[Size | DataError]:
    """(height, width) of each label map as stored, or what is wrong with it."""

    def look(output: Output) -> Size | DataError:
        try:
            stored, read = dataset.check_label_map(output.index)
            _check_pixels(output.key, stored, read, max_pixels, resize_back)
        except DataError as error:
            return error
        return stored

    return read_ahead(look, outputs, 8 * READ_THREADS, num_threads=READ_THREADS)


def _check_label_maps(
    dataset: LabelMapDataset, outputs: Sequence[Output], max_pixels: int, resize_back: bool
) -> Counter[Size]:
    """How many label maps are of each (height, width).

    Raises:
        DataError: what is wrong with the first label map that cannot be used, and how many more there are.
    """
    problems: list[DataError] = []
    sizes: Counter[Size] = Counter()
    for found in _looked_at(dataset, outputs, max_pixels, resize_back):
        if isinstance(found, DataError):
            problems.append(found)
        else:
            sizes[found] += 1
        if len(problems) == PROBLEMS_SHOWN:
            break
    if problems:
        first, *others = problems
        more = "".join(f"\n  {str(other).split('. ')[0]}" for other in others)
        raise type(first)(
            f"{first}"
            + (f"\n{len(others)} more{' or more' * (len(problems) == PROBLEMS_SHOWN)}:{more}" if others else "")
            + "\n(--on_bad_label skip leaves such label maps out; ignore takes unknown ids as don't care)"
        )
    return sizes


def _check_pixels(key: str, stored: Size, read: Size, most: int, resize_back: bool) -> None:
    if (pixels := read[0] * read[1]) > most:
        raise DataError(
            f"{key}: a label map that would be generated at {shown(read)}, {pixels:,} pixels in one piece. Write"
            f"{' --size trained or' if read == stored else ''} a smaller --size HEIGHTxWIDTH, or write --max_pixels"
            f" {pixels} if the memory is there"
        )
    if resize_back and (pixels := stored[0] * stored[1]) > most:
        raise DataError(
            f"{key}: a label map of {shown(stored)}, {pixels:,} pixels, to which its image would be resized back."
            f" Leave --resize_back out, or write --max_pixels {pixels} if the memory is there"
        )


def _write_gallery(model: LoadedModel, labels: LabelSpec, directory: Path, outputs: Sequence[Output]) -> Path:
    legend = [(labels.name(i), tuple(labels.colours[i].tolist())) for i in range(labels.num_classes + 1)]
    entries = [
        GalleryEntry(o.key, o.label_map, (o.animation,) if o.animation and o.animation.endswith(".gif") else o.pictures)
        for o in outputs
    ]
    title = f"{directory.resolve().name}: generator after {model.images_seen:,} images ({model.weights} weights)"
    return write_gallery(directory, entries, title, legend=legend)
