"""Read the images to evaluate: from folders, LMDBs, the photos of a data set, or a generator.

Owns the one form in which pictures reach the scores, and what a picture file may look like. Sources may hold several
samples per label map: sample 0 is the picture that counts, the others show diversity.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.folders import Source
from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS, decode_image
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.data.loader import read_ahead
from imaginaire_spade.errors import DataError
from imaginaire_spade.pictures import LABELS_FOLDER

READ_THREADS = 4
PIPELINE, NOT_STORED = "photo through the data pipeline", "generated, not stored"
"""The format of pictures that come from no file of their own."""
_GREY, _ALPHA = ("1", "L", "LA", "I", "I;16", "I;16B", "F"), ("RGBA", "LA", "PA", "RGBa", "La")


@dataclass(frozen=True)
class EvaluatedPicture:
    """One picture on its way into the scores."""

    index: int
    """Place of its key in the source."""
    pixels: Tensor
    """uint8 [3, H, W] RGB."""
    sample: int = 0
    """Which of the samples of its label map."""
    format: str = ""
    """File format (png, jpeg), or what the pixels went through."""
    remark: str = ""
    """What was done to make it RGB, if anything."""


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be used."""

    index: int
    message: str


class PictureSource(ABC):
    """Pictures under keys."""

    name: str
    """What to call it in messages and reports."""
    keys: Sequence[str]
    """One per label map (or photo), sorted."""
    num_samples: int = 1
    """Pictures of each key."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[EvaluatedPicture | Unreadable]:
        """The pictures of ``keys[i]`` for each i of ``indices``, in any order of keys."""


class FolderPictures(PictureSource):
    """Picture files: a folder of them (with sub-folders), ``ROOT/images/``, or an LMDB root of ours or imaginaire's.

    The coloured label maps of inference.py's gallery are left out. Grey pictures become RGB, alpha is dropped.

    Args:
        num_samples: more than 1: the folder holds ``KEY_00.png`` .. of each label map (inference.py --num_samples k).
    Raises:
        DataError: no pictures there, or not num_samples of each key.
    """

    def __init__(self, root: str | Path, num_samples: int = 1) -> None:
        self.name = str(root)
        self.num_samples = num_samples
        self._source = _open(Path(root))
        files = sorted(key for key in self._source.keys if not key.startswith(f"{LABELS_FOLDER}/"))
        if not files:
            raise DataError(f"{root}: no images there")
        self._files = [[key] for key in files] if num_samples == 1 else _grouped(files, num_samples, self.name)
        self.keys = files if num_samples == 1 else [group[0].rpartition("_")[0] for group in self._files]

    def read(self, indices: Sequence[int]) -> Iterator[EvaluatedPicture | Unreadable]:
        wanted = [(index, sample, key) for index in indices for sample, key in enumerate(self._files[index])]
        yield from read_ahead(self._read, wanted, 4 * READ_THREADS, num_threads=READ_THREADS)

    def _read(self, item: tuple[int, int, str]) -> EvaluatedPicture | Unreadable:
        index, sample, key = item
        where = self._source.describe(key, "images")
        try:
            data = self._source.read(key, "images")
            pixels = torch.from_numpy(decode_image(data, where)).permute(2, 0, 1)
        except DataError as error:
            return Unreadable(index, str(error))
        kind, remark = _kind(data)
        return EvaluatedPicture(index, pixels, sample, kind, remark)


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
    """Files ``KEY_00`` .. ``KEY_<num_samples - 1>`` by key."""
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
    """(file format, what decoding to RGB did to it)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, kind = image.mode, (image.format or "unknown").lower()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):  # OpenCV could read it all the same
        return "unknown", ""
    remarks = ["alpha dropped"] if mode in _ALPHA else []
    remarks += ["grey made RGB"] if mode in _GREY else []
    return kind, " and ".join(remarks)


class DatasetPhotos(PictureSource):
    """The photos of a data set as its augmentations leave them, at the size that a generator makes pictures."""

    def __init__(self, dataset: LabelMapDataset, name: str) -> None:
        self.dataset = dataset
        self.name = name
        self.keys = dataset.keys

    def read(self, indices: Sequence[int]) -> Iterator[EvaluatedPicture | Unreadable]:
        yield from read_ahead(self._read, indices, 4 * READ_THREADS, num_threads=READ_THREADS)

    def _read(self, index: int) -> EvaluatedPicture | Unreadable:
        try:
            image = self.dataset[index].image
        except DataError as error:
            return Unreadable(index, str(error))
        assert image is not None, "a data set without its photos"
        return EvaluatedPicture(index, image, format=PIPELINE)
