"""Answer the painting page's requests: images of label maps, label maps of files, styles of photos.

Responsible for the meaning and the limits of a request. Knows nothing of HTTP: bytes and plain values in and out. A
label map holds train ids on the page and between page and server, raw ids in files, as in the data set's files.
"""

import base64
import binascii
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.file_structure import TIFF
from imaginaire_spade.data.image_files import open_image
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.data.photos import decode_photo, read_header, show
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.files import encode_image
from imaginaire_spade.inference.synthesizer import Synthesizer
from imaginaire_spade.labels import MAX_RAW_ID, LabelSpec

MAX_SIDE, MAX_CANVAS_PIXELS = 2048, 2048 * 1024
"""Of the largest canvas: its longer side, and all of it."""
MAX_UPLOAD_PIXELS = 50_000_000
"""Of an uploaded image or label map."""
MAX_JOBS = 8
"""Requests that the service works on, or that wait for the generator, at once; it refuses more."""
MAX_JOB_BYTES = 2**30
"""Memory that their contents may take together: bodies, decoded files, and what is computed from these."""
DECODED_COPIES, STYLE_COPIES = 7, 16
"""Memory of an upload as a multiple of its pixels: in a decoder (WebP 6.1, RGB 3.4, progressive JPEG 3.2 measured); and
as floats, of a photo that reaches the encoder unshrunk."""
FORMATS = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM", *TIFF)
"""What the files begin with that the page takes. Others have decoders that nobody should point at a stranger's file."""
MAX_SEED = 2**32 - 1
MAX_PARTS = 100
"""Of a label map, with new noise."""
DEFAULT_SIZE = (256, 256)
"""Canvas for a checkpoint that was trained on images of many sizes."""

T = TypeVar("T")


class BusyError(UserError):
    """Too many requests at once, or they take too much memory together."""


class Budget:
    """The requests that are worked on, and the memory that they may take together. Whoever finds none left is refused;
    nobody waits."""

    def __init__(self, jobs: int = MAX_JOBS, num_bytes: int = MAX_JOB_BYTES) -> None:
        self._jobs, self.num_bytes, self._bytes_left, self._lock = jobs, num_bytes, num_bytes, threading.Lock()

    @contextmanager
    def take(self, num_bytes: int, jobs: int = 0) -> Iterator[None]:
        """Hold memory and a number of jobs. Raises BusyError if others hold them."""
        with self._lock:
            if jobs > self._jobs or num_bytes > self._bytes_left:
                raise BusyError("too many requests at once: try again in a moment")
            self._jobs, self._bytes_left = self._jobs - jobs, self._bytes_left - num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._jobs, self._bytes_left = self._jobs + jobs, self._bytes_left + num_bytes


class PaintingService:
    """Answers requests of the page one at a time, in a separate thread; others wait in order.

    Args:
        synthesizer: the generator.
        name: of the model, shown on the page.
        samples: label maps to start from, made with ``with_images=False``; None: there are none.
    """

    def __init__(self, synthesizer: Synthesizer, name: str, samples: LabelMapDataset | None = None) -> None:
        self._synthesizer = synthesizer
        self._name = name
        self._samples = samples
        self._labels = synthesizer.labels
        self._raw_ids = _raw_ids(self._labels)
        self._dtype = np.dtype(np.uint8) if self._labels.num_classes < 256 else np.dtype("<u2")
        # One thread for all: torch keeps a team of threads for each thread that calls it.
        self._worker = ThreadPoolExecutor(1, "generate")
        self.budget = Budget()

    # -------------------------------------------------------------------------------------------- requests

    def describe(self) -> dict[str, Any]:
        """Describe the model to the page."""
        model, (height, width) = self._synthesizer.model, self._synthesizer.size or DEFAULT_SIZE
        sizes = [(height * k, width * k) for k in (1, 2, 4, 8) if k == 1 or max(height, width) * k <= 512]
        return {
            "name": self._name,
            "trained_size": self._synthesizer.size,
            "sizes": sizes,
            "images_seen": model.images_seen,
            "device": model.device.type,
            "bytes_per_id": self._dtype.itemsize,
            "style_dims": self._synthesizer.style_dims,
            "has_style_encoder": self._synthesizer.has_style_encoder,
            "takes_local_noise": model.generator.takes_local_noise,
            "dont_care": self._labels.dont_care_id if self._raw_ids[-1] >= 0 else None,
            "num_samples": 0 if self._samples is None else len(self._samples),
            "classes": [
                {"id": i, "name": self._labels.name(i), "colour": self._labels.colours[i].tolist()}
                for i in np.flatnonzero(self._raw_ids >= 0).tolist()
            ],
        }

    def generate(self, fields: Mapping[str, Any]) -> bytes:
        """Generate the image of a label map, an 8-bit PNG of the label map's size.

        Args:
            fields: ``height``, ``width``, ``labels`` (base64 of the ids, row by row, ``bytes_per_id`` each, low byte
                first) and, if the model takes a style code, ``seed`` or ``style`` (``style_dims`` numbers); if it takes
                noise in parts of an image, ``anew``: [x, y, seed] of each region that gets new noise.
        Raises:
            DataError: fields are missing, unknown or out of range.
        """
        takes_local_noise = self._synthesizer.model.generator.takes_local_noise
        style_fields = {"seed", "style"} if self._synthesizer.style_dims else set()
        raw = self._raw_label_map(fields, optional=frozenset(style_fields | ({"anew"} if takes_local_noise else set())))
        seed = _whole_number("seed", fields["seed"], 0, MAX_SEED) if "seed" in fields else 0
        style = self._style_code(fields["style"]) if "style" in fields else None
        anew = _parts(fields["anew"], *raw.shape) if "anew" in fields else {}
        image = self._run(lambda: self._synthesizer(raw, seed=seed, style=style, anew=anew, resize_back=True))
        return encode_image(show(image, self._synthesizer.model.config.data.images), ".png")

    def generated_size(self, fields: Mapping[str, Any]) -> tuple[int, int]:
        """Return the (height, width) at which ``generate`` generates these fields before it resizes the image."""
        return self._synthesizer.sizes((fields["height"], fields["width"]))

    def encode_label_map(self, fields: Mapping[str, Any]) -> bytes:
        """Encode a label map as a PNG of raw ids: with a palette of the table's colours; 16-bit if ids exceed 255."""
        raw, is_8_bit = self._raw_label_map(fields), self._raw_ids.max() <= 255
        image = Image.fromarray(raw.astype(np.uint8) if is_8_bit else raw)
        if is_8_bit:
            palette, paintable = np.zeros((256, 3), np.uint8), self._raw_ids >= 0
            palette[self._raw_ids[paintable]] = self._labels.colours[paintable]
            image.putpalette(palette.tobytes())
        stream = io.BytesIO()
        image.save(stream, "png")
        return stream.getvalue()

    def read_label_map(self, content: bytes) -> dict[str, Any]:
        """Read a label map file (ids, palette, or RGB if the table has a palette), shrunk if no canvas is as large.

        Raises:
            DataError: it is no such file, or has too many pixels.
            LabelError: ids or colours are outside the table.
            BusyError: other requests hold the memory that it takes.
        """
        where = "the uploaded label map"
        with self.budget.take(self._memory(content, where, DECODED_COPIES)):
            raw = read_labels(content, where, self._labels)
            return self._to_page(self._labels.to_train_ids(shrink(raw), where), raw.shape[:2])

    def read_sample(self, number: int) -> dict[str, Any]:
        """Read the ``number``-th of the label maps to start from (modulo their number), shrunk likewise."""
        if not self._samples:
            raise DataError("there are no label maps to start from: start the page with --samples FOLDER")
        samples = self._samples
        with self.budget.take(0, jobs=1):
            labels = self._run(lambda: samples[number % len(samples)].labels.numpy())
        return self._to_page(shrink(labels), labels.shape)

    def encode_style(self, photo: bytes) -> dict[str, Any]:
        """Compute the style code of an image file.

        Raises:
            DataError: it is no image, or has too many pixels.
            CheckpointError: the model has no encoder.
            BusyError: other requests hold the memory that it takes.
        """
        where, spec = "the uploaded photo", self._synthesizer.model.config.data.images
        is_shrunk = spec.range is None and self._synthesizer.size is not None
        with self.budget.take(self._memory(photo, where, DECODED_COPIES if is_shrunk else STYLE_COPIES)):
            array = decode_photo(photo, where, spec)
            return {"style": self._run(lambda: self._synthesizer.encode(array)).tolist()}

    def warm_up(self) -> None:
        """Generate one image, so that the first stroke need not wait. Raises UserError if these weights cannot."""
        height, width = self._synthesizer.size or DEFAULT_SIZE
        raw = np.full((height, width), self._raw_ids[self._raw_ids >= 0][0], np.uint16)
        self._run(lambda: self._synthesizer(raw, seed=0))

    # -------------------------------------------------------------------------------------------- parts

    def _run(self, function: Callable[[], T]) -> T:
        return self._worker.submit(function).result()

    def _raw_label_map(self, fields: Mapping[str, Any], optional: frozenset[str] = frozenset()) -> NDArray[np.uint16]:
        wanted = {"height", "width", "labels"}
        if missing := wanted - set(fields):
            raise DataError(f"the request lacks {', '.join(sorted(missing))}")
        if unknown := set(fields) - wanted - optional:
            raise DataError(f"the request has {', '.join(sorted(map(str, unknown)))}, which this model does not take")
        height, width = _check_canvas(fields["height"], fields["width"])
        try:
            content = base64.b64decode(fields["labels"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise DataError("labels: not base64") from None
        if len(content) != height * width * self._dtype.itemsize:
            raise DataError(
                f"labels: {len(content)} bytes; {height} x {width} ids take {height * width * self._dtype.itemsize}"
            )
        train_ids = np.frombuffer(content, self._dtype).reshape(height, width)
        known = np.isin(train_ids, np.flatnonzero(self._raw_ids >= 0))
        if not known.all():
            wrong = np.unique(train_ids[~known])[:10].tolist()
            raise DataError(f"labels: ids {', '.join(map(str, wrong))}, which are no class of this model")
        return self._raw_ids[train_ids].astype(np.uint16)

    def _style_code(self, values: Any) -> NDArray[np.float32]:
        dims = self._synthesizer.style_dims
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != dims or not all(abs(value) <= 1e3 for value in values):
            raise DataError(f"style: {dims} numbers between -1000 and 1000 are wanted")
        return np.array(values, np.float32)

    def _to_page(self, train_ids: NDArray[np.generic], original_size: tuple[int, ...]) -> dict[str, Any]:
        labels = base64.b64encode(train_ids.astype(self._dtype).tobytes()).decode()
        height, width = train_ids.shape
        return {"height": height, "width": width, "labels": labels, "original_size": original_size}

    def _memory(self, content: bytes, where: str, copies: int) -> int:
        """Compute from a file's header the memory that it takes. Raises DataError if that is more than there is."""
        if content and not content.startswith(FORMATS):
            raise DataError(f"{where}: not readable as an image: the page takes PNG, JPEG, WebP, TIFF and BMP files")
        header = read_header(content, where)
        height, width = header.size
        if height * width > MAX_UPLOAD_PIXELS:
            most = f"at most {MAX_UPLOAD_PIXELS // 10**6} million are taken"
            raise DataError(f"{where}: {width} x {height} pixels; {most}")
        if not content.startswith(TIFF) and open_image(content, where).size != (width, height):  # what is decoded
            raise DataError(f"{where}: its headers contradict each other")
        bytes_of_pixel = max(1, header.channels * int(header.dtype.lstrip("floatuin")) // 8)
        num_bytes = height * width * bytes_of_pixel * copies
        if num_bytes > self.budget.num_bytes:
            most = f"at most {self.budget.num_bytes // (bytes_of_pixel * copies) / 1e6:.0f} million such are taken"
            raise DataError(f"{where}: {width} x {height} pixels of {bytes_of_pixel} bytes; {most}")
        return num_bytes


def _parts(anew: Any, height: int, width: int) -> dict[str | int | tuple[int, int], int]:
    """Check the parts with new noise: pixel (x, y) -> seed."""
    if not isinstance(anew, list) or len(anew) > MAX_PARTS:
        raise DataError(f"anew: a list of at most {MAX_PARTS} parts is wanted")
    found: dict[str | int | tuple[int, int], int] = {}
    for part in anew:
        if not isinstance(part, list) or len(part) != 3:
            raise DataError("anew: each part is [x, y, seed]")
        x, y, seed = (
            _whole_number(f"anew: {name}", value, 0, most)
            for name, value, most in zip(("x", "y", "seed"), part, (width - 1, height - 1, MAX_SEED), strict=True)
        )
        found.pop((x, y), None)  # so that it stands last
        found[x, y] = seed
    return found


def shrink(ids: NDArray[np.generic]) -> NDArray[np.generic]:
    """Scale a label map [h, w, ...] (nearest, aspect ratio kept) to the largest canvas, if it is larger."""
    height, width = ids.shape[:2]
    step = max(1.0, max(height, width) / MAX_SIDE, (height * width / MAX_CANVAS_PIXELS) ** 0.5)
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (length / wanted)).astype(int)
        for length in (height, width)
        for wanted in [max(1, int(length / step))]
    )
    return ids[rows[:, None], columns] if step > 1 else ids


def _raw_ids(labels: LabelSpec) -> NDArray[np.int64]:
    """Return the smallest raw id of each train id, don't care included, or -1: int64 [num_classes + 1]."""
    smallest = dict(zip(labels.table[MAX_RAW_ID::-1].tolist(), range(MAX_RAW_ID, -1, -1), strict=True))
    return np.array([smallest.get(train_id, -1) for train_id in range(labels.num_classes + 1)])


def _whole_number(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise DataError(f"{name}: a whole number from {least} to {most} is wanted")
    return value


def _check_canvas(height: Any, width: Any) -> tuple[int, int]:
    size = _whole_number("height", height, 1, MAX_SIDE), _whole_number("width", width, 1, MAX_SIDE)
    if size[0] * size[1] > MAX_CANVAS_PIXELS:
        raise DataError(f"height, width: {height} x {width} pixels; at most {MAX_CANVAS_PIXELS} are taken")
    return size
