"""Read the images to evaluate: stored files, or what is made of the samples of a data set.

Responsible for the one form in which images reach the scores, and what an image file may look like. A label map may
have several samples: sample 0 is the image that counts, the others show diversity.
"""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.folders import Source
from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS, decode_image
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.data.loader import read_ahead
from imaginaire_spade.data.photos import decode_photo, measured, photo_preview, read_header, show
from imaginaire_spade.errors import DataError, catch_error
from imaginaire_spade.files import LABELS_FOLDER
from imaginaire_spade.labels import LabelSpec

READ_THREADS = 4
PIPELINE, NOT_STORED = "photo through the data pipeline", "generated, not stored"
"""The format of images that come from no file of their own."""
_GREY, _ALPHA = ("1", "L", "LA", "I", "I;16", "I;16B", "F"), ("RGBA", "LA", "PA", "RGBa", "La")

Ids = NDArray[np.generic]
"""Train ids [H, W]; the number of classes stands for "none of them"."""


@dataclass(frozen=True)
class SourceImage:
    """One image on its way into the scores, and the other samples of its label map."""

    pixels: Tensor
    """uint8 [3, H, W] RGB."""
    format: str = ""
    """File format (png, jpeg), or what the pixels went through."""
    remark: str = ""
    """What was done to make it RGB, if anything."""
    label_map: Ids | None = None
    """The label map that belongs to it; None: not known."""
    others: Sequence[Tensor] = ()
    """Its label map's samples 1, 2, ..., as ``pixels``."""

    def rgb(self) -> NDArray[np.uint8]:
        """Return uint8 [H, W, 3] on the CPU."""
        return np.ascontiguousarray(self.pixels.permute(1, 2, 0).cpu().numpy())


class ImageSource(ABC):
    """Images under keys."""

    name: str
    """What to call it in messages and reports."""
    keys: Sequence[str]
    """One per label map (or photo), sorted."""
    num_samples: int = 1
    """Images of each key."""
    label_table: LabelSpec | None = None
    """Of the label maps, where they are known."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, SourceImage | DataError]]:
        """Read the images of ``keys[i]`` for each i of ``indices``: (i, what is there, or why it cannot be used), in
        any order."""


class StoredImages(ImageSource):
    """Image files: a folder of them (with sub-folders), ``ROOT/images/``, or an LMDB root of ours or imaginaire's.

    The coloured label maps of inference.py's gallery are left out. Grey images become RGB, alpha is dropped.

    Args:
        num_samples: more than 1: the folder holds ``KEY_00.png`` .. of each label map (inference.py --num_samples k).
        label_maps: data set of the label maps, which join by key; not every image needs one.
        images: what the numbers in the files mean (``data.images``); None: 8-bit pictures.
    Raises:
        DataError: no images there, or not num_samples of each key.
    """

    def __init__(
        self,
        root: str | Path,
        num_samples: int = 1,
        label_maps: LabelMapDataset | None = None,
        images: ImageSpec | None = None,
    ) -> None:
        self.name = str(root)
        self._images = None if images is None or images == ImageSpec() else measured(images, [root])
        self.num_samples = num_samples
        self._source = _open(Path(root))
        self._source.spell_as(label_maps.keys if label_maps else ())
        files = sorted(key for key in self._source.keys if not key.startswith(f"{LABELS_FOLDER}/"))
        if not files:
            raise DataError(f"{root}: no images there")
        self._files = [[key] for key in files] if num_samples == 1 else _grouped(files, num_samples, self.name)
        self.keys = files if num_samples == 1 else [group[0].rpartition("_")[0] for group in self._files]
        self._label_maps = label_maps
        self.label_table = label_maps.labels if label_maps else None
        self._label_map_of = {key: index for index, key in enumerate(label_maps.keys)} if label_maps else {}

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, SourceImage | DataError]]:
        images = read_ahead(catch_error(DataError, self._read), indices, 4 * READ_THREADS, num_threads=READ_THREADS)
        return zip(indices, images, strict=True)

    def _read(self, index: int) -> SourceImage:
        files = [(self._source.describe(key, "images"), self._source.read(key, "images")) for key in self._files[index]]
        first, *others = (torch.from_numpy(self._decode(data, where)).permute(2, 0, 1) for where, data in files)
        place = self._label_map_of.get(self.keys[index])
        label_map = None if place is None or not self._label_maps else self._label_maps[place].labels.numpy()
        return SourceImage(first, *_kind(files[0][1]), label_map, others)

    def _decode(self, data: bytes, where: str) -> NDArray[np.uint8]:
        if self._images is not None:
            return show(decode_photo(data, where, self._images), self._images)
        header = read_header(data, where)
        if header.dtype != "uint8" or header.channels > 4:
            raise DataError(
                f"{where}: {header.channels} channel(s) of {header.dtype}, but scores are of 8-bit pictures: write"
                " --config C.yaml, whose data.images says what these numbers mean"
            )
        return decode_image(data, where)


def _open(root: Path) -> Source:
    if root.is_file():
        raise DataError(f"{root}: a file; expected a folder of images, an LMDB root, or statistics (.npz)")
    try:
        return open_source(root, ["images"], bare=True)
    except DataError as error:
        if not root.is_dir() or any(root.iterdir()):
            raise
        raise DataError(f"{root}: the folder is empty; expected images ({' '.join(IMAGE_EXTENSIONS)})") from error


def _grouped(files: Sequence[str], num_samples: int, where: str) -> list[list[str]]:
    """Group files ``KEY_00`` .. ``KEY_<num_samples - 1>`` by key."""
    groups: dict[str, dict[int, str]] = {}
    for file in files:
        found = re.fullmatch(r"(.+)_(\d{2,})", file)
        key, number = (found[1], int(found[2])) if found else (file, -1)
        groups.setdefault(key, {})[number] = file
    for key, group in groups.items():
        if sorted(group) != list(range(num_samples)):
            raise DataError(
                f"{where}: not {num_samples} samples of {key!r} (found {', '.join(sorted(group.values())[:6])}). Make"
                f" them with inference.py --num_samples {num_samples}, or give the --num_samples it was run with"
            )
    return [[group[number] for number in range(num_samples)] for _, group in sorted(groups.items())]


def _kind(data: bytes) -> tuple[str, str]:
    """Return (file format, what decoding to RGB did to it)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, kind = image.mode, (image.format or "unknown").lower()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # OpenCV could read it all the same
        return "unknown", ""
    remarks = ["alpha dropped"] if mode in _ALPHA else []
    remarks += ["grey made RGB"] if mode in _GREY else []
    return kind, " and ".join(remarks)


Samples = Iterable[tuple[int, Sample]]
"""(place of its key in the source, sample of the data set)."""

Made = Iterable[tuple[int, int, Tensor]]
"""(place of the key, number of the sample, uint8 [3, H, W])."""


def photos_of(images: ImageSpec, samples: Samples) -> Made:
    """Give the photo of each sample as 8-bit RGB, as the augmentations leave it."""
    for index, sample in samples:
        assert sample.image is not None, "a data set without its photos"
        yield index, 0, photo_preview(sample.image, images)


class DatasetImages(ImageSource):
    """Images of the samples of a data set: their photos, or what a generator makes of their label maps.

    Args:
        dataset: its augmentations decide the size of the images.
        make: samples -> their images, in any order; None: their photos.
        format: of what it makes.
        indices: the samples that are used; None: all.
        strict: raise the DataError of a sample that cannot be read, instead of yielding it.
    """

    def __init__(
        self,
        dataset: LabelMapDataset,
        name: str,
        make: Callable[[Samples], Made] | None = None,
        *,
        format: str = PIPELINE,
        indices: Sequence[int] | None = None,
        num_samples: int = 1,
        strict: bool = False,
    ) -> None:
        self._dataset, self._format, self._strict = dataset, format, strict
        self._make = make or partial(photos_of, dataset.images)
        plain = dataset.images.channels == 3 and dataset.images.range is None
        self._remark = "" if plain else f"{dataset.images.channels} channel(s) of {dataset.images.dtype} shown as RGB"
        self._indices = range(len(dataset)) if indices is None else indices
        self.name, self.num_samples, self.label_table = name, num_samples, dataset.labels
        self.keys = [dataset.keys[index] for index in self._indices]

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, SourceImage | DataError]]:
        unreadable: list[tuple[int, DataError]] = []
        labels: dict[int, Ids] = {}
        made: dict[int, dict[int, Tensor]] = {}  # of keys that still lack samples

        def samples() -> Iterator[tuple[int, Sample]]:
            read = self._dataset.__getitem__ if self._strict else catch_error(DataError, self._dataset.__getitem__)
            places = [self._indices[index] for index in indices]
            found = read_ahead(read, places, 4 * READ_THREADS, num_threads=READ_THREADS)
            for index, sample in zip(indices, found, strict=True):
                if isinstance(sample, DataError):
                    unreadable.append((index, sample))
                else:
                    labels[index] = sample.labels.numpy()
                    yield index, sample

        for index, number, pixels in self._make(samples()):
            while unreadable:  # at once, as it may end the evaluation
                yield unreadable.pop(0)
            made.setdefault(index, {})[number] = pixels
            if len(made[index]) == self.num_samples:
                first, *others = (image for _, image in sorted(made.pop(index).items()))
                yield index, SourceImage(first, self._format, self._remark, label_map=labels.pop(index), others=others)
        assert not made, f"{self.name}: incomplete samples"
        yield from unreadable
