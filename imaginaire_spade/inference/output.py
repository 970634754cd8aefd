"""Plan and fill the output folder: file names, accepted existing contents, animations, the gallery page."""

import importlib
import io
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.folders import DATA_TYPES, stays_inside
from imaginaire_spade.data.photos import show
from imaginaire_spade.errors import ConfigError, DataError, UserError, how_to_install
from imaginaire_spade.files import IMAGE_SUFFIXES, LABELS_FOLDER, PARTIAL, AnyImage, RgbImage, write_bytes, write_image
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.pages import render

LEFTOVER_AFTER_S = 60
"""A partial file of this age belongs to a process that was killed: writing an image takes milliseconds."""
OUTPUTS_PER_PAGE = 240
FRAMES_PER_SECOND = 10


@dataclass(frozen=True)
class Output:
    """Files of one label map, relative to the output folder."""

    key: str
    index: int
    """Place in the data set."""
    images: tuple[str, ...]
    label_map: str
    animation: str | None = None
    previews: tuple[str, ...] = ()
    """8-bit copies of images that browsers do not show."""
    photo: str | None = None
    """Copy of the photo that belongs to the label map."""


def choose_suffix(images: ImageSpec, asked: str | None) -> str:
    """Return the suffix of image files: ``asked``, or PNG, TIFF or NPY, the first that holds such images.

    Raises:
        ConfigError: ``asked`` cannot hold them.
    """
    channels, dtype = images.channels, images.dtype
    fits = [".png"] * (channels in (1, 3, 4) and dtype in ("uint8", "uint16"))
    fits += [".tif"] * (channels in (1, 3, 4)) + [".npy"] + [".jpg"] * (channels in (1, 3) and dtype == "uint8")
    if asked is not None and asked not in fits:
        raise ConfigError(
            f"--format {asked[1:]} does not hold images of {channels} channel(s) of {dtype} (data.images): write"
            f" --format {' or '.join(suffix[1:] for suffix in fits)}, or leave it out"
        )
    return asked or (".tif" if channels == 4 else fits[0])  # (a PNG's fourth channel is transparency)


def plan_outputs(
    keys: Sequence[str],
    num_samples: int = 1,
    suffix: str | None = None,
    animation: str | None = None,
    spec: ImageSpec | None = None,
    gallery: bool = True,
    photos: Collection[str] = (),
) -> list[Output]:
    """Name the files of every key, sorted by key.

    Args:
        spec: what the images' numbers mean; None: 8-bit RGB.
        gallery: whether images that browsers do not show have 8-bit copies.
        animation: suffix of a file that shows the samples of a key one after the other; None: there is none.
        photos: keys that the gallery shows a photo of.
    Raises:
        DataError: keys that lead out of the folder or collide.
    """
    spec = spec or ImageSpec()
    suffix = choose_suffix(spec, suffix)
    hidden = gallery and (suffix not in (".png", ".jpg") or spec.range is not None or spec.channels == 4)
    digits = max(2, len(str(num_samples - 1)))
    outputs = []
    taken: dict[str, str] = {}
    for index, key in sorted(enumerate(keys), key=lambda item: item[1]):
        if not stays_inside(key) or re.match(r"[A-Za-z]:", key):  # or leads to a drive
            raise DataError(
                f"{key!r}: a sample's key must be a plain relative path (SEQUENCE/NAME): no '..', no leading '/', drive"
                " letter or backslash. Rename it in the data set"
            )
        stems = [key] if num_samples == 1 else [f"{key}_{j:0{digits}d}" for j in range(num_samples)]
        images = tuple(f"{stem}{suffix}" for stem in stems)
        label_map = f"{LABELS_FOLDER}/{key}.png"
        film = None if animation is None else f"{key}{animation}"
        shown = tuple(f"{LABELS_FOLDER}/{stem}.preview.png" for stem in stems if hidden)
        photo = f"{LABELS_FOLDER}/{key}.photo.jpg" if key in photos else None
        outputs.append(Output(key, index, images, label_map, film, shown, photo))
        for path in filter(None, (*images, *shown, label_map, film, photo)):
            if path in taken:
                raise DataError(f"label maps {taken[path]!r} and {key!r} would both be written to {path}: rename one")
            taken[path] = key
    for path, key in taken.items():
        for parent in map(str, PurePosixPath(path).parents):
            if parent in taken:
                raise DataError(
                    f"label map {key!r} needs a folder {parent}, but that is an image of {taken[parent]!r}: rename one"
                )
    return outputs


def check_empty(directory: Path, own: Sequence[Output], everything: Sequence[Output]) -> None:
    """Check that the folder holds no images yet: an evaluation of it would mix two runs.

    Several processes check without waiting for each other: each looks for what no other process writes, which is its
    own share and what belongs to nobody.

    Raises:
        UserError: it holds one.
    """
    planned = {path for output in everything for path in output.images}
    mine = {path for output in own for path in output.images}
    for file in directory.rglob("*"):
        path = file.relative_to(directory)
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and file.is_file()
        is_ours = path.parts[0] != LABELS_FOLDER and (path.as_posix() in mine or path.as_posix() not in planned)
        if is_image and is_ours:
            raise UserError(
                f"--output_dir {directory} already holds images, such as {path}. Write --skip_existing to keep them"
                " and make the missing ones, --overwrite to replace those of the same name, or another folder"
            )


def check_apart(directory: Path, roots: Iterable[str | Path], folders: Collection[str] = DATA_TYPES) -> None:
    """Check that images would not land among the label maps that they are made of.

    Args:
        folders: of a data set, which hold them.
    Raises:
        UserError: they would.
    """
    target = directory.resolve()
    for root in roots:
        source = Path(root).resolve()
        if not target.is_relative_to(source):
            continue
        below = target.relative_to(source).parts
        if not below or below[0] in folders or not any((source / name).is_dir() for name in folders):
            raise UserError(
                f"--output_dir {directory} lies among the label maps of {root}: images would replace them or be taken"
                " for label maps. Give a folder elsewhere"
            )


def make_folder(directory: Path) -> None:
    """Make the output folder if it is missing, and remove partial files that a killed run left in it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {directory}: no permission to write there")
    for path in directory.rglob(f"{PARTIAL}*"):
        with suppress(FileNotFoundError):  # another process was faster
            if path.is_file() and time.time() - path.stat().st_mtime > LEFTOVER_AFTER_S:
                path.unlink()


def write_gallery(
    directory: Path, outputs: Sequence[Output], title: str, labels: LabelSpec, sample_names: Sequence[str] = ()
) -> Path:
    """Write ``index.html``, and ``index-2.html`` ... if there are many label maps.

    The pages need nothing but the files beside them. A click enlarges a label map with its images.

    Args:
        directory: the output folder.
        outputs: what to show, in this order.
        title: heading, plain text.
        labels: names and colours of the legend.
        sample_names: what made each image of a label map differ, such as its seed; empty: nothing to say.
    Returns:
        The path of ``index.html``.
    Raises:
        UserError: a page cannot be written.
    """
    chunks = [outputs[i : i + OUTPUTS_PER_PAGE] for i in range(0, len(outputs), OUTPUTS_PER_PAGE)] or [()]
    names = ["index.html", *(f"index-{number}.html" for number in range(2, len(chunks) + 1))]
    for name, chunk in zip(names, chunks, strict=True):
        page = render(
            "gallery.html", title=title, count=len(outputs), labels=labels, outputs=chunk, pages=names, here=name,
            sample_names=sample_names,
        )  # fmt: skip
        write_bytes(directory / name, page.encode())
    return directory / "index.html"


def plan_writes(
    images: Iterable[tuple[str, AnyImage]],
    jobs: Mapping[Output, Sequence[int]],
    directory: Path,
    on_written: Callable[[int, int], None],
    spec: ImageSpec | None = None,
) -> Iterator[Callable[[], None]]:
    """Yield what writes each image, and each animation once all its frames are made.

    Args:
        images: (path below ``directory``, image).
        jobs: label maps of ``images`` and which of their samples are made.
        on_written: called after each image with (images done, images to do).
        spec: what the images' numbers mean; None: 8-bit RGB.
    """
    number = sum(map(len, jobs.values()))
    animated = {
        path: (output.animation, output.images) for output in jobs if output.animation for path in output.images
    }
    previews = dict(pair for output in jobs for pair in zip(output.images, output.previews, strict=False))
    frames: defaultdict[str, dict[str, RgbImage]] = defaultdict(dict)
    for done, (path, image) in enumerate(images, 1):
        yield partial(write_image, directory / path, image)
        shown = show(image, spec or ImageSpec()) if path in previews or path in animated else image
        if path in previews:
            yield partial(write_image, directory / previews[path], shown)
        if path in animated:
            animation, paths = animated[path]
            frames[animation][path] = shown
            if len(frames[animation]) == len(paths):
                made = frames.pop(animation)
                yield partial(_write_animation, directory / animation, [made[path] for path in paths])
        on_written(done, number)


def _write_animation(path: Path, frames: Sequence[RgbImage]) -> None:
    """Write ``frames`` and their way back as an animation, by suffix; complete or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_bytes(path, _encode_animation([*frames, *frames[-2:0:-1]], path.suffix))


def check_animation(suffix: str) -> None:
    """Check that files of this suffix can be made here.

    Raises:
        UserError: they cannot.
    """
    if suffix == ".mp4":
        with how_to_install("av", "--animation mp4 needs the package av", "; or write --animation webp"):
            importlib.import_module("av")
    try:
        _encode_animation([np.zeros((64, 64, 3), np.uint8)] * 2, suffix)
    except (ValueError, OSError, KeyError) as error:  # as PyAV and Pillow say that they were built without the codec
        raise UserError(f"--animation {suffix[1:]}: cannot be made here: {error}; write --animation gif") from None


def _encode_animation(frames: Sequence[RgbImage], suffix: str) -> bytes:
    """Encode GIF, WebP, or MP4 (H.264, yuv420p: a last odd row or column is repeated)."""
    file = io.BytesIO()
    if suffix == ".mp4":
        import av

        even = np.pad(frames, ((0, 0), (0, frames[0].shape[0] % 2), (0, frames[0].shape[1] % 2), (0, 0)), "edge")
        with av.open(file, "w", format="mp4") as film:
            colours = "colorprim=bt709:transfer=bt709:colormatrix=bt709"
            stream = film.add_stream("libx264", FRAMES_PER_SECOND, options={"crf": "16", "x264-params": colours})
            stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
            for frame in even:
                rgb = av.VideoFrame.from_ndarray(frame, "rgb24")
                film.mux(stream.encode(rgb.reformat(format="yuv420p", dst_colorspace="ITU709")))
            film.mux(stream.encode())
    else:
        images = [Image.fromarray(frame) for frame in frames]
        if suffix == ".gif":
            images = [image.quantize(256, dither=Image.Dither.NONE) for image in images]
        moving = {"save_all": True, "append_images": images[1:], "duration": 1000 // FRAMES_PER_SECOND, "loop": 0}
        images[0].save(file, suffix[1:], **moving, quality=90)
    return file.getvalue()
