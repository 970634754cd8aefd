"""RawSample: one sample of a download or an export, and where to put it. Finds the files of samples.

Responsible for what the readers of ``prepare`` (data sets) and ``annotations`` (tools) have in common. Writes nothing.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS, encode_map
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import refuse_special


@dataclass(frozen=True)
class RawSample:
    """One sample of a download, and where to put it."""

    split: str
    key: str
    files: dict[str, Path]
    """Data type -> file."""
    resize_h_w: tuple[int, int] | None = None
    replace_ids: dict[int, int] = field(default_factory=dict)
    """Label id in the file -> id to write."""
    draw: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    """Data type -> makes its file, where that is no copy. Picklable."""


@dataclass(frozen=True)
class Options:
    """The options of scripts/prepare_dataset.py that concern the download."""

    resize_h_w: tuple[int, int] | None = None
    scene_list: Path | None = None
    num_val: int = 0
    images: Path | None = None
    labels: Path | None = None
    instances: Path | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """What an annotation tool wrote: samples, and the label table that it implies."""

    samples: list[RawSample]
    names: list[str]
    """Of the classes 0, 1, ...; pixels without a class are ``no_class(names)``."""
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should know: what was left out."""
    ignore: int = 0
    """The id of pixels without a class, where it is another."""


def no_class(num_classes: int) -> int:
    """Return the id of pixels without a class: the largest of 8 bits, or of 16 where these do not suffice."""
    return 255 if num_classes < 256 else 65535


def encode_ids(ids: NDArray[Any]) -> bytes:
    """Encode ids [H, W] as a PNG of 8 bits, or 16 where one is larger."""
    return encode_map(ids.astype(np.int32) if ids.max() > 255 else ids.astype(np.uint8))


def find_path(source: Path, *candidates: str) -> Path | None:
    """Return the first of ``candidates`` that is there."""
    return next((source / candidate for candidate in candidates if (source / candidate).exists()), None)


def find_folder(source: Path, *candidates: str, chosen: Path | None = None) -> Path:
    """Return the folder that the user chose, or the first of ``candidates`` that is there.

    Raises:
        DataError: none is.
    """
    candidates = (str(chosen),) if chosen else candidates
    found = find_path(source, *candidates)
    if found is None:
        raise DataError(f"--source {source}: none of {', '.join(c + '/' for c in candidates)} is there")
    return found


def find_files(folder: Path, pattern: str) -> list[Path]:
    """List what a folder holds by a pattern, sorted.

    Raises:
        DataError: something there is no file.
        PermissionError: a folder may not be read, which ``glob`` passes over.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise error

    for _ in os.walk(folder, onerror=refuse):
        pass
    found = sorted(folder.glob(pattern))
    for path in found:
        refuse_special(path)
    return found


def find_images(images: Path, suffix: str = "", extensions: Sequence[str] = IMAGE_EXTENSIONS) -> dict[str, Path]:
    """Map the key (without ``suffix``) of every image below a folder to its file, sorted by path."""
    return {
        path.relative_to(images).with_suffix("").as_posix().removesuffix(suffix): path
        for path in find_files(images, "**/*")
        if path.suffix[1:].lower() in extensions and path.stem.endswith(suffix) and not path.name.startswith(".")
    }


def split_samples(found: dict[str, dict[str, Path]], num_val: int) -> Iterator[RawSample]:
    """Yield the sample of every image; ``num_val`` of them, evenly spread, are for validation.

    Args:
        found: data type -> key -> file.
    """
    yield from spread([RawSample("", key, {t: found[t][key] for t in found}) for key in found["images"]], num_val)


def spread(samples: Sequence[RawSample], num_val: int) -> list[RawSample]:
    """Give every sample a split: ``num_val`` of them, evenly spread, are for validation.

    Raises:
        DataError: there are not more samples than that.
    """
    if num_val >= len(samples) > 0:
        raise DataError(f"--num_val {num_val}: there are {len(samples)} images")
    val = {len(samples) * i // num_val for i in range(num_val)}
    return [replace(sample, split="val" if i in val else "train") for i, sample in enumerate(samples)]


def number_classes(found: Collection[str], options: Options, where: object) -> dict[str, int]:
    """Map the name of every class to its id: those of ``--classes``, in that order, or all that were found.

    Raises:
        DataError: none were found; or one of ``--classes`` was not, or stands there twice.
    """
    names = options.classes or tuple(found)
    if not found:
        raise DataError(f"{where}: no classes there")
    for name in names:
        if name not in found or names.count(name) > 1:
            known = ", ".join(list(found)[:50])
            problem = "stands there twice" if name in found else f"is no class of {where}, which has: {known}"
            raise DataError(f"--classes: {name!r} {problem}")
    return {name: i for i, name in enumerate(names)}
