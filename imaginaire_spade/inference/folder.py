"""Generate a folder of images from a data set's label maps.

Owns the order of a run: which label maps are this process's, reading ahead, label maps that cannot be used, writing,
progress, and what the gallery page shows.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.image_files import image_size
from imaginaire_spade.data.loader import read_ahead
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import DataError, catch_data_error
from imaginaire_spade.files import RgbImage, write_image
from imaginaire_spade.inference.animation import write_animation
from imaginaire_spade.inference.gallery import write_gallery
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.output import Output, Writer, check_output_folder, make_folder, plan_outputs
from imaginaire_spade.inference.sizes import MAX_PIXELS, Size, SizeRule, format_size
from imaginaire_spade.inference.style import StyleOf, drawn_styles
from imaginaire_spade.inference.synthesis import BATCHES_HELD, Request, synthesise

READ_THREADS = 3
PROBLEMS_SHOWN = 10


class Progress:
    """Report progress on stderr: a bar on a terminal, else a line now and then; nothing if ``shown`` is False."""

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
class FolderOptions:
    """Which files a run writes, and which label maps it takes."""

    batch_size: int = 1
    num_samples: int = 1
    """Images per label map."""
    suffix: str = ".png"
    """Of image files: ".png" or ".jpg"."""
    animation: str | None = None
    """".gif" or ".mp4": also write a file per label map that shows its samples one after the other."""
    existing: Literal["refuse", "skip", "overwrite"] = "refuse"
    """What to do about images that are in the folder already."""
    on_bad_label: Literal["fail", "skip"] = "fail"
    """"fail": check every label map before the first image; "skip": leave out those that cannot be used."""
    max_pixels: int = MAX_PIXELS
    """A label map that would be generated (or resized back) at more cannot be used."""
    resize_back: bool = False
    """Resize images to the size of the stored label map; else they have the size at which they are generated."""
    gallery: bool = True
    """Write ``index.html`` (rank 0; it shows the images of all processes) and coloured label maps for it."""


@dataclass(frozen=True)
class RunReport:
    """What one process did."""

    images: int
    """Written by this process."""
    total: int
    """Of all processes, including those that were there before."""
    seconds: float
    gallery: Path | None
    left_out: tuple[str, ...]
    """Why each label map of this process that was left out cannot be used."""


def generate_folder(
    model: Model,
    dataset: LabelMapDataset,
    directory: Path,
    options: FolderOptions | None = None,
    *,
    style_of: StyleOf | None = None,
    sizes: SizeRule | None = None,
    info: ProcessInfo | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> RunReport:
    """Write the images of this process's share of a data set: every ``world_size``-th key, in sorted order.

    Args:
        dataset: label maps, made with ``with_images=False``.
        directory: output folder.
        style_of: the style code of each image; default: one drawn for each, with seed 0.
        sizes: the rule by which ``dataset`` resizes label maps; with it, a note describes what it does.
        on_written: called with (images done, images to do) of this process.
        on_note: called (rank 0) with what the user should know: before the first image if all label maps are checked
            by then, else at the end.
    Raises:
        UserError: a mistake, found before the first image if it can be known by then.
        DataError: a label map that cannot be used; the message names its file. Images written by then are complete.
    """
    info, options = info or ProcessInfo(), options or FolderOptions()
    tell = partial(_tell, on_note, info)

    # Plan this process's files.
    everything = plan_outputs(dataset.keys, options.num_samples, options.suffix, options.animation)
    own = everything[info.rank :: info.world_size]
    if options.existing == "refuse":
        check_output_folder(directory, own, everything)
    make_folder(directory)
    jobs = {output: samples for output in own if (samples := _find_missing(output, directory, options)) is not None}
    share = _Share(dataset, directory, options, style_of or drawn_styles(0, model.style_dims, options.num_samples))

    # Check all label maps before the first image, unless unusable ones are left out as they come.
    if options.existing == "skip":
        tell(_describe_kept(dataset, directory, own, options))
    if options.on_bad_label == "fail":
        share.check(jobs)
        tell(share.describe_sizes(sizes))

    # Read ahead, generate in batches of one size, write.
    started_at, done, number = time.perf_counter(), 0, sum(map(len, jobs.values()))
    with Writer() as writer:
        for path, image in synthesise(model, share.read(jobs, writer), options.batch_size):
            share.write(path, image, writer)
            done += 1
            on_written(done, number)
    seconds = time.perf_counter() - started_at
    if options.on_bad_label == "skip":
        tell(share.describe_sizes(sizes))

    # Write the gallery. What other processes leave out is found again, rather than agreed on between them.
    page = None
    if options.gallery and info.is_main:
        absent = set(share.left_out)
        if options.on_bad_label == "skip":
            mine = set(own)
            absent |= share.find_unusable([output for output in everything if output not in mine])
        title = f"{directory.resolve().name}: generator after {model.images_seen:,} images ({model.weights} weights)"
        page = write_gallery(directory, [o for o in everything if o.key not in absent], title, dataset.labels)
    total = sum(len(output.images) for output in everything)
    return RunReport(done, total, seconds, page, tuple(share.left_out.values()))


class _Share:
    """The label maps of one process on their way: checked, read, and their images written."""

    def __init__(self, dataset: LabelMapDataset, directory: Path, options: FolderOptions, style_of: StyleOf) -> None:
        self.dataset, self.directory, self.options, self.style_of = dataset, directory, options, style_of
        self.left_out: dict[str, str] = {}
        """Key -> why its label map cannot be used."""
        self._stored_sizes: dict[str, Size] = {}
        """Key -> (height, width)."""
        self._animated: dict[str, Output] = {}
        """Image path -> the files of its label map."""
        self._frames: dict[str, dict[str, RgbImage]] = {}
        """Animation path -> image path -> the images made so far."""

    def check(self, outputs: Iterable[Output]) -> None:
        """Read label maps, to find those that cannot be used.

        Raises:
            DataError: what is wrong with the first one, and how many more there are.
        """
        problems: list[DataError] = []
        for output, found in self._look_at(outputs):
            if isinstance(found, DataError):
                problems.append(found)
            else:
                self._stored_sizes[output.key] = found
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

    def find_unusable(self, outputs: Iterable[Output]) -> set[str]:
        """Return the keys of the label maps that cannot be used."""
        return {output.key for output, found in self._look_at(outputs) if isinstance(found, DataError)}

    def _look_at(self, outputs: Iterable[Output]) -> Iterator[tuple[Output, Size | DataError]]:
        """Yield (height, width) of each label map as stored, or what is wrong with it."""
        outputs = list(outputs)
        found = read_ahead(catch_data_error(self._stored_size), outputs, 8 * READ_THREADS, num_threads=READ_THREADS)
        return zip(outputs, found, strict=True)

    def _stored_size(self, output: Output) -> Size:
        stored, read = self.dataset.check_label_map(output.index)
        self._check_pixels(output.key, stored, read)
        return stored

    def read(self, jobs: Mapping[Output, Sequence[int]], writer: Writer) -> Iterator[Request]:
        """Read label maps ahead and yield the images to make; write the label maps that the gallery shows."""
        self._animated = {path: output for output in jobs if output.animation for path in output.images}
        samples = read_ahead(catch_data_error(self._read_sample), jobs, BATCHES_HELD, num_threads=READ_THREADS)
        for (output, numbers), sample in zip(jobs.items(), samples, strict=True):
            if isinstance(sample, DataError):
                if self.options.on_bad_label == "fail":
                    raise sample
                self.left_out[output.key] = str(sample)
                continue
            self._stored_sizes[output.key] = sample.original_size
            if self.options.gallery:
                coloured = self.dataset.labels.colourise(sample.labels.numpy())
                writer.put(write_image, self.directory / output.label_map, coloured)
            back = sample.original_size if self.options.resize_back else None
            for j in numbers:
                z = self.style_of(output.key, j)
                yield Request(output.images[j], sample.labels, sample.edges, z, sample.distances, back)

    def _read_sample(self, output: Output) -> Sample:
        sample = self.dataset[output.index]
        self._check_pixels(sample.key, sample.original_size, (sample.labels.shape[0], sample.labels.shape[1]))
        return sample

    def _check_pixels(self, key: str, stored: Size, read: Size) -> None:
        if (pixels := read[0] * read[1]) > self.options.max_pixels:
            raise DataError(
                f"{key}: a label map that would be generated at {format_size(read)}, {pixels:,} pixels in one piece."
                f" Write{' --size trained or' if read == stored else ''} a smaller --size HEIGHTxWIDTH, or write"
                f" --max_pixels {pixels} if the memory is there"
            )
        if self.options.resize_back and (pixels := stored[0] * stored[1]) > self.options.max_pixels:
            raise DataError(
                f"{key}: a label map of {format_size(stored)}, {pixels:,} pixels, to which its image would be resized"
                f" back. Leave --resize_back out, or write --max_pixels {pixels} if the memory is there"
            )

    def write(self, path: str, image: RgbImage, writer: Writer) -> None:
        """Write an image, and its label map's animation once all frames are made."""
        writer.put(write_image, self.directory / path, image)
        output = self._animated.get(path)
        if output is not None and output.animation is not None:
            frames = self._frames.setdefault(output.animation, {})
            frames[path] = image
            if len(frames) == len(output.images):
                del self._frames[output.animation]
                in_order = [frames[image_path] for image_path in output.images]
                writer.put(write_animation, self.directory / output.animation, in_order)

    def describe_sizes(self, rule: SizeRule | None) -> str | None:
        """Describe how label maps are resized; None if they are not."""
        sizes = Counter(self._stored_sizes.values())
        return rule.note(sizes, resize_back=self.options.resize_back) if rule else None


def _tell(on_note: Callable[[str], None], info: ProcessInfo, note: str | None) -> None:
    """Pass a note on, if there is one and this is rank 0."""
    if note is not None and info.is_main:
        on_note(note if info.world_size == 1 else f"process {info.rank} of {info.world_size}: {note}")


def _find_missing(output: Output, directory: Path, options: FolderOptions) -> Sequence[int] | None:
    """Return the numbers of the samples to make; None if not even the gallery lacks anything."""
    keep = options.existing == "skip"
    missing = [j for j, path in enumerate(output.images) if not (keep and (directory / path).is_file())]
    if output.animation is not None and (missing or not (directory / output.animation).is_file()):
        missing = list(range(len(output.images)))  # an animation is made of all its frames
    return missing if missing or (options.gallery and not (directory / output.label_map).is_file()) else None


def _describe_kept(
    dataset: LabelMapDataset, directory: Path, outputs: Sequence[Output], options: FolderOptions
) -> str | None:
    """Warn if the first of the images that stay has another size than this run would write."""
    first = next((output for output in outputs if (directory / output.images[0]).is_file()), None)
    if first is None:
        return None
    path = directory / first.images[0]
    try:
        stored, read = dataset.check_label_map(first.index)
        kept = image_size(path.read_bytes(), str(path))
    except DataError:
        return None
    if kept == (size := stored if options.resize_back else read):
        return None
    return (
        f"{path} is kept at {format_size(kept)}, but this run would write {format_size(size)}: the folder will hold"
        " images of several sizes (--overwrite generates all again)"
    )
