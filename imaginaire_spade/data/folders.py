"""Read raw folders: files of several data types, joined by name.

Responsible for the layout ``ROOT/{images,seg_maps,edge_maps,inst_maps,distances}/[SEQUENCE/...]NAME.ext``, the rule for
keys, and what ``Source`` means: keys in a fixed order, and bytes by key and data type. Decodes nothing.

**Keys.** A sample's key is ``SEQUENCE/STEM``, where the sequence is the path of its sub-folder with forward slashes;
files that lie directly in the folder have the key ``STEM``. (imaginaire calls their sequence ``.``; only inside its
LMDBs is such a key spelled ``./STEM``.) Names are taken as they are: nothing is normalised.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS, PHOTO_EXTENSIONS
from imaginaire_spade.errors import DataError

DISTANCES = "distances"
"""The data type that can be computed from the label maps: files that lack are no mistake."""
DATA_TYPES = ("images", "seg_maps", "edge_maps", "inst_maps", DISTANCES)
EXTENSIONS = {"images": PHOTO_EXTENSIONS, DISTANCES: ("npy",)}
"""Data type -> those of its files; others have ``IMAGE_EXTENSIONS``."""
ROOT_SEQUENCE = "."
LAYOUT = "ROOT/images/NAME.jpg and ROOT/seg_maps/NAME.png (edge_maps/, inst_maps/ likewise; sub-folders are sequences)"


class Source(ABC):
    """The files of samples, by key and data type. Picklable; holds no open handle of another process."""

    root: Path
    keys: list[str]
    """In the order of (sequence, stem)."""
    readahead = True
    """Whether a page that is read from a large file brings those after it."""

    num_bytes = 0
    """The size of the large files that samples are read from."""
    shard_sizes: list[int]
    """Numbers of samples, in the order of ``keys``, whose files lie together."""

    @abstractmethod
    def has(self, data_type: str) -> bool:
        """Return whether every key has this data type."""

    @abstractmethod
    def read(self, key: str, data_type: str) -> bytes:
        """Read a file's bytes.

        Raises:
            DataError: there is none, or it cannot be read.
        """

    @abstractmethod
    def describe(self, key: str, data_type: str) -> str:
        """Name a file in a message."""


def stays_inside(path: str) -> bool:
    """Return whether text is a plain relative path, with forward slashes: it cannot lead out of a folder."""
    return not {"", ".", ".."} & set(path.split("/")) and "\\" not in path and "\0" not in path


def make_key(sequence: str, stem: str, where: str) -> str:
    """Join sequence and stem to a key.

    Raises:
        DataError: the key is no plain relative path, so it could lead out of an output folder.
    """
    key = stem if sequence == ROOT_SEQUENCE else f"{sequence}/{stem}"
    if not stays_inside(key):
        raise DataError(f"{where}: the name {key!r} is no plain relative path: rename the file or folder")
    return key


def split_key(key: str) -> tuple[str, str]:
    """Split a key into (sequence, stem)."""
    sequence, _, stem = key.rpartition("/")
    return sequence or ROOT_SEQUENCE, stem


def instead_of(data_type: str) -> str:
    """Say how to do without a data type that is not there."""
    if data_type in ("edge_maps", "inst_maps"):
        return "; or write data.edges: labels (borders of the label map) or data.edges: none"
    return ""


class FolderSource(Source):
    """Samples as plain files.

    Args:
        root: the folder that holds one sub-folder per data type.
        data_types: those that every sample must have.
        optional: those that are joined too where ``root`` has such a folder.
        drop_unpaired: keep the samples that have all data types, instead of raising.
        bare: ``root`` itself is the folder of the (then only) data type.
    Raises:
        DataError: a folder is missing or empty, files do not pair up, or one stem stands for two files.
    """

    def __init__(
        self,
        root: Path,
        data_types: Sequence[str],
        *,
        optional: Sequence[str] = (),
        drop_unpaired: bool = False,
        bare: bool = False,
    ) -> None:
        self.root = root
        assert not bare or len(data_types) == 1
        wanted = [*data_types, *(t for t in optional if t not in data_types and (root / t).is_dir() and not bare)]
        self._folders = {t: root if bare else root / t for t in wanted}
        for data_type, folder in self._folders.items():
            if not folder.is_dir():
                raise DataError(f"{root}: no folder {data_type}/ there; expected {LAYOUT}{instead_of(data_type)}")
        self.skipped: list[Path] = []
        """Files whose extension is none of their data type."""
        self._extensions = {
            t: _scan(folder, EXTENSIONS.get(t, IMAGE_EXTENSIONS), self.skipped) for t, folder in self._folders.items()
        }
        paired = {t: files for t, files in self._extensions.items() if t != DISTANCES}
        union = set().union(*paired.values())
        self.unpaired = {t: sorted(union - files.keys(), key=split_key) for t, files in paired.items()}
        """Data type -> keys that other data types have and it lacks."""
        if any(self.unpaired.values()) and not drop_unpaired:
            raise DataError(_explain_unpaired(root, self.unpaired))
        common = set.intersection(*(set(files) for files in paired.values()))
        if not common:
            counts = ", ".join(f"{len(files)} in {self._folders[t]}" for t, files in paired.items())
            extensions = " ".join(IMAGE_EXTENSIONS)
            raise DataError(f"{root}: no samples ({counts}; extensions {extensions}); expected {LAYOUT}")
        self.keys = sorted(common, key=split_key)
        self.shard_sizes = [len(self.keys)]

    def has(self, data_type: str) -> bool:
        return data_type in self._folders and all(key in self._extensions[data_type] for key in self.keys)

    def describe(self, key: str, data_type: str) -> str:
        if key not in self._extensions.get(data_type, {}):
            raise DataError(f"{self.root}: no file for {key!r} among the {data_type}")
        return f"{self._folders[data_type]}{os.sep}{key}.{self._extensions[data_type][key]}"

    def path(self, key: str, data_type: str) -> Path:
        """Return the file of ``key``.

        Raises:
            DataError: there is none.
        """
        return Path(self.describe(key, data_type))

    def extension(self, key: str, data_type: str) -> str:
        """Return the extension of a file, in lower case."""
        return self._extensions[data_type][key].lower()

    def read(self, key: str, data_type: str) -> bytes:
        path = self.describe(key, data_type)
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    def file_size(self, key: str, data_type: str) -> int:
        """Return a file's number of bytes.

        Raises:
            DataError: it is gone.
        """
        path = self.describe(key, data_type)
        try:
            return os.path.getsize(path)  # noqa: PTH202 (a Path takes ten times as long to make)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    def restricted_to(self, keys: Sequence[str]) -> FolderSource:
        """Return the same source with a part of its keys, in its own order."""
        part = copy.copy(self)
        part.keys = sorted(keys, key=split_key)
        part.shard_sizes = [len(keys)]
        return part


def holds_images(folder: Path) -> bool:
    """Return whether there is any image file (by extension) in ``folder`` or below."""
    return any(_extension(name, IMAGE_EXTENSIONS) for _, name in _walk(folder))


def _scan(folder: Path, extensions: Sequence[str], skipped: list[Path]) -> dict[str, str]:
    """Map the keys of the files below ``folder`` that have one of ``extensions`` to the extension as spelled."""
    found: dict[str, str] = {}
    place = str(folder)
    for sequence, name in _walk(folder):
        extension = _extension(name, extensions)
        if not extension:
            skipped.append(folder / sequence / name)
            continue
        path = f"{place}{os.sep}{sequence}{os.sep}{name}"
        key = make_key(sequence, name[: -len(extension) - 1], path)
        if key in found:
            raise DataError(
                f"{folder / sequence}: {key}.{found[key]} and {key}.{extension} have one name: files are joined by it."
                " Remove or rename one"
            )
        try:
            key.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path!r}: the name is not UTF-8: rename it (e.g. with convmv)") from None
        found[key] = extension
    return found


def _extension(name: str, extensions: Sequence[str]) -> str:
    """Return the extension as spelled, or "" where it is none of ``extensions``."""
    stem, _, extension = name.rpartition(".")
    return extension if stem and extension.lower() in extensions else ""


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (sequence, file name) of every visible file, sorted; links to folders are followed once each."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # (Hidden: .DS_Store, ._name.jpg, .ipynb_checkpoints.)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        sequence = Path(place).relative_to(folder).as_posix()
        for name in sorted(names):
            if not name.startswith("."):
                yield sequence, name


def _explain_unpaired(root: Path, unpaired: Mapping[str, Sequence[str]]) -> str:
    lines = [f"{root}: files do not pair up (they are joined by sequence and name without extension)."]
    for data_type, keys in unpaired.items():
        if keys:
            shown = ", ".join(keys[:10]) + (" ..." if len(keys) > 10 else "")
            lines.append(f"  {data_type}: {len(keys)} missing that other folders have: {shown}")
    photos, masks = set(unpaired.get("seg_maps", ())), unpaired.get("images", ())
    cuts = ((key[:i], key[i + 1 :]) for key in masks for i, character in enumerate(key) if character in "-_./")
    if len(masks) > len(photos) and not all(photos.isdisjoint(cut) for cut in cuts):
        lines.append(f"One mask per class and photo? scripts/prepare_dataset.py parts --source {root} merges them.")
    lines.append(
        "Add the missing files or remove the extra ones; scripts/build_lmdb.py --drop_unpaired builds from those that"
        " have all"
    )
    return "\n".join(lines)
