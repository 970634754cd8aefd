"""Generate a folder of images from a data set's label maps.

Responsible for the order of a run: which label maps are this process's, reading ahead, label maps that cannot be used,
writing, progress, and what the gallery page shows.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import read_ahead
from imaginaire_spade.data.photos import read_header
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import PROBLEMS_SHOWN, DataError
from imaginaire_spade.files import write_image
from imaginaire_spade.inference.local_noise import LocalNoise, check_inside
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.output import Output, check_empty, make_folder, plan_outputs, plan_writes, write_gallery
from imaginaire_spade.inference.sizes import MAX_PIXELS, Size, SizeRule, format_size
from imaginaire_spade.inference.synthesis import Request, StyleOf, drawn_styles, synthesise

THREADS = 3
"""That read, and as many that write."""
READ_AHEAD, WRITES_HELD = 8, 24
"""Label maps that are read before they are asked for; files that may wait to be written."""

R = TypeVar("R")


class Progress:
    """Report progress on stderr: a bar on a terminal, else a line now and then; nothing if ``shown`` is False."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._bar = tqdm(unit="image", dynamic_ncols=True, disable=not (shown and sys.stderr.isatty()))
        self._started_at = self._line_at = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._bar.disable and self._shown and time.perf_counter() - self._line_at >= self.SECONDS_BETWEEN_LINES:
            self._line_at = time.perf_counter()
            rate = done / (self._line_at - self._started_at)
            print(f"{done} of {total} images, {rate:.2f} images/s", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


class PassProgress:
    """Progress on stderr of one pass over images after the other."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._progress = Progress(shown=False)

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self.close()
            self._progress = Progress(shown=self._shown)
        self._progress(done, total)

    def close(self) -> None:
        self._progress.close()


@dataclass(frozen=True)
class FolderOptions:
    """Which files a run writes, and which label maps it takes."""

    batch_size: int = 1
    num_samples: int = 1
    """Images per label map."""
    suffix: str | None = None
    """Of image files: ".png", ".jpg", ".tif" or ".npy"; None: the first but JPEG that holds the model's images."""
    animation: str | None = None
    """".gif", ".webp" or ".mp4": also write a file per label map that shows its samples one after the other."""
    sample_names: Sequence[str] = ()
    """What the gallery writes under each image of a label map, such as its seed."""
    existing: Literal["refuse", "skip", "overwrite"] = "refuse"
    """What to do about images that are in the folder already."""
    on_bad_label: Literal["fail", "skip"] = "fail"
    """"fail": check every label map before the first image; "skip": leave out those that cannot be used."""
    max_pixels: int = MAX_PIXELS
    """A label map that would be generated (or resized back) at more cannot be used."""
    tile: int | None = None
    """Side of the tiles in which larger label maps are generated; ``max_pixels`` does not apply then."""
    resize_back: bool = False
    """Resize images to the size of the stored label map; else they have the size at which they are generated."""
    named_pixels: Sequence[tuple[int, int]] = ()
    """(x, y) that every label map must have."""
    gallery: bool = True
    """Write ``index.html`` (rank 0; it shows the images of all processes), coloured label maps and photos for it."""


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
    info, options, sizes = info or ProcessInfo(), options or FolderOptions(), sizes or SizeRule()
    style_of = style_of or drawn_styles(0, model.generator.style_dims, options.num_samples)

    def tell(note: str | None) -> None:
        if note is not None and info.is_main:
            on_note(note if info.world_size == 1 else f"process {info.rank} of {info.world_size}: {note}")

    # Plan this process's files.
    spec = model.config.data.images
    photos = dataset.find_photos() if options.gallery else ()
    everything = plan_outputs(
        dataset.keys, options.num_samples, options.suffix, options.animation, spec, options.gallery, photos
    )
    own = everything[info.rank :: info.world_size]
    if options.existing == "refuse":
        check_empty(directory, own, everything)
    make_folder(directory)
    jobs = {output: samples for output in own if (samples := _find_missing(output, directory, options)) is not None}
    share = _Share(dataset, directory, options)

    # Check all label maps before the first image, unless unusable ones are left out as they come.
    if options.existing == "skip":
        tell(share.describe_kept(own))
    if options.on_bad_label == "fail":
        share.sizes.update(size for _, size in share.attempt(share.check, jobs))
        tell(sizes.note(share.sizes, resize_back=options.resize_back))

    # Read ahead, generate in batches of one size, write.
    started_at = time.perf_counter()
    images = synthesise(model, share.requests(jobs, style_of), options.batch_size, tile=options.tile)
    writes = plan_writes(images, jobs, directory, on_written, spec)
    for _ in read_ahead(lambda write: write(), writes, WRITES_HELD, num_threads=THREADS):
        pass
    seconds = time.perf_counter() - started_at
    done = sum(len(samples) for output, samples in jobs.items() if output.key not in share.problems)
    left_out = tuple(map(str, share.problems.values()))
    if options.on_bad_label == "skip":
        tell(sizes.note(share.sizes, resize_back=options.resize_back))

    # Write the gallery. What other processes leave out is found again, rather than agreed on between them.
    page = None
    if options.gallery and info.is_main:
        if options.on_bad_label == "skip":
            mine = set(own)
            list(share.attempt(share.check, [output for output in everything if output not in mine]))
        title = f"{directory.resolve().name}: generator after {model.images_seen:,} images ({model.weights} weights)"
        shown = [output for output in everything if output.key not in share.problems]
        page = write_gallery(directory, shown, title, dataset.labels, options.sample_names)
    return RunReport(done, sum(len(output.images) for output in everything), seconds, page, left_out)


class _Share:
    """The label maps of one process: which cannot be used, how large they are, what is to be made of them."""

    def __init__(self, dataset: LabelMapDataset, directory: Path, options: FolderOptions) -> None:
        self.dataset, self.directory, self.options = dataset, directory, options
        self.problems: dict[str, DataError] = {}
        """Key -> why its label map cannot be used."""
        self.sizes: Counter[Size] = Counter()
        """(height, width) as stored -> how many label maps have it."""

    def attempt(
        self, read: Callable[[Output], R], outputs: Collection[Output], most: int = PROBLEMS_SHOWN
    ) -> Iterator[tuple[Output, R]]:
        """Yield what ``read`` returns for each label map that can be used; note the problems of the others.

        Args:
            most: problems after which it ends, unless they are left out.
        Raises:
            DataError: (in the end, unless they are left out) what is wrong with the first one, and how many more there
                are.
        """

        def read_or_fail(output: Output) -> R | DataError:
            try:
                return read(output)
            except DataError as error:
                return error

        fail = self.options.on_bad_label == "fail"
        ahead, threads = (READ_AHEAD, THREADS) if self.options.tile is None else (1, 1)  # large ones fill the memory
        results = read_ahead(read_or_fail, outputs, ahead, num_threads=threads)
        checked = 0
        for output, result in zip(outputs, results, strict=True):
            checked += 1
            if not isinstance(result, DataError):
                yield output, result
                continue
            self.problems[output.key] = result
            if fail and len(self.problems) == most:
                break
        if fail and self.problems:
            kind = type(next(iter(self.problems.values())))
            first, *others = self.dataset.labels.join_complaints([*self.problems.values()], checked)
            more = "".join(f"\n  {other.split('. ')[0]}" for other in others)
            raise kind(
                f"{first}"
                + (
                    f"\n{len(others)} more{' or more' * (len(self.problems) == PROBLEMS_SHOWN)}:{more}"
                    if others
                    else ""
                )
                + "\n(--on_bad_label skip leaves such label maps out; ignore takes unknown ids as don't care)"
            )

    def check(self, output: Output) -> Size:
        """Check a label map; return its (height, width) as stored."""
        stored, read = self.dataset.check_label_map(output.index)
        self._check_pixels(output.key, stored, read)
        return stored

    def requests(self, jobs: Mapping[Output, Sequence[int]], style_of: StyleOf) -> Iterator[Request]:
        """Yield the images to make."""
        for output, sample in self.attempt(self._read, jobs, most=1):
            self.sizes[sample.original_size] += 1
            back = sample.original_size if self.options.resize_back else None
            for j in jobs[output]:
                z = style_of(output.key, j)
                if isinstance(z, LocalNoise):
                    height, width = sample.labels.shape
                    z = z.at(sample.original_size, (height, width), output.key)
                yield Request(
                    output.images[j], sample.labels, sample.edges, z, sample.distances, back, sample.conditions
                )

    def _read(self, output: Output) -> Sample:
        """Read a label map, and write the coloured one and the photo that the gallery shows."""
        sample = self.dataset[output.index]
        self._check_pixels(sample.key, sample.original_size, (sample.labels.shape[0], sample.labels.shape[1]))
        if self.options.gallery:
            write_image(self.directory / output.label_map, self.dataset.picture(sample))
            with suppress(DataError):  # (the page leaves out a photo that is not there)
                if output.photo is not None:
                    write_image(self.directory / output.photo, self.dataset.photo(output.index, sample.original_size))
        return sample

    def _check_pixels(self, key: str, stored: Size, read: Size) -> None:
        for pixel in self.options.named_pixels:
            check_inside(pixel, stored, key)
        if self.options.tile is not None:
            return
        if (pixels := read[0] * read[1]) > self.options.max_pixels:
            raise DataError(
                f"{key}: a label map that would be generated at {format_size(read)}, {pixels:,} pixels in one piece."
                f" Write{' --size trained or' if read == stored else ''} a smaller --size HEIGHTxWIDTH, or write"
                f" --max_pixels {pixels} if the memory is there, or --tile to generate it in pieces"
            )
        if self.options.resize_back and (pixels := stored[0] * stored[1]) > self.options.max_pixels:
            raise DataError(
                f"{key}: a label map of {format_size(stored)}, {pixels:,} pixels, to which its image would be resized"
                f" back. Leave --resize_back out, or write --max_pixels {pixels} if the memory is there"
            )

    def describe_kept(self, outputs: Sequence[Output]) -> str | None:
        """Warn if the first of the images that stay has another size than this run would write."""
        first = next((output for output in outputs if (self.directory / output.images[0]).is_file()), None)
        if first is None:
            return None
        path = self.directory / first.images[0]
        try:
            stored, read = self.dataset.check_label_map(first.index)
            kept = read_header(path.read_bytes(), str(path)).size
        except DataError:
            return None
        if kept == (size := stored if self.options.resize_back else read):
            return None
        return (
            f"{path} is kept at {format_size(kept)}, but this run would write {format_size(size)}: the folder will hold"
            " images of several sizes (--overwrite generates all again)"
        )


def _find_missing(output: Output, directory: Path, options: FolderOptions) -> Sequence[int] | None:
    """Return the numbers of the samples to make; None if not even the gallery lacks anything."""
    keep = options.existing == "skip"
    files = zip(output.images, output.previews or output.images, strict=True)
    missing = [j for j, paths in enumerate(files) if not (keep and all((directory / p).is_file() for p in paths))]
    if output.animation is not None and (missing or not (directory / output.animation).is_file()):
        missing = list(range(len(output.images)))  # an animation is made of all its frames
    return missing if missing or (options.gallery and not (directory / output.label_map).is_file()) else None
