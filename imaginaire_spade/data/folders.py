"""Read raw folders: files of several data types, joined by name.

Responsible for the layout ``ROOT/{images,seg_maps,edge_maps,inst_maps,distances}/[SEQUENCE/...]NAME.ext``, the rule for
keys, and what ``Source`` means: keys in a fixed order, and bytes by key and data type. Decodes nothing.

**Keys.** A sample's key is ``SEQUENCE/STEM``, where the sequence is the path of its sub-folder with forward slashes;
files that lie directly in the folder have the key ``STEM``. (imaginaire calls their sequence ``.``; only inside its
LMDBs is such a key spelled ``./STEM``.) Names are taken as they are. Where they do not pair up so, two
that differ in their Unicode normal form alone are one, spelled as in the first data type, and files of a data type that
lie directly in its folder belong to those of another in sub-folders, by stem, if the stems are unique.
"""

from __future__ import annotations

import copy
import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.image_files import PHOTO_EXTENSIONS
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import refuse_special

DISTANCES = "distances"
"""The data type that can be computed from the label maps: files that lack are no mistake."""
DATA_TYPES = ("images", "seg_maps", "edge_maps", "inst_maps", DISTANCES)
EXTENSIONS = dict.fromkeys(DATA_TYPES[:-1], PHOTO_EXTENSIONS) | {DISTANCES: ("npy",)}
"""Data type -> those of its files; conditions have ``PHOTO_EXTENSIONS``."""
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

    def spell_as(self, keys: Iterable[str]) -> None:  # noqa: B027 (keys of LMDBs stay as they were stored)
        """Spell names as those of ``keys`` from which they differ in their Unicode normal form alone."""

    @abstractmethod
    def read(self, key: str, data_type: str) -> bytes:
        """Read a file's bytes.

        Raises:
            DataError: there is none, or it cannot be read.
        """

    @abstractmethod
    def describe(self, key: str, data_type: str) -> str:
        """Name a file in a message."""

    @abstractmethod
    def stamps(self) -> tuple[list[str], NDArray[np.int64]]:
        """Return what tells later which files have changed: n keys and [n, 2], the bytes of each sample and the time of
        its last change (ns); or n LMDBs, and a checksum of what is known of each, and 0."""


def stays_inside(path: str) -> bool:
    """Return whether text is a plain relative path, with forward slashes, of names that files can have: it cannot lead
    out of a folder."""
    names = set(path.split("/"))
    return not {"", ".", ".."} & names and "\\" not in path and "\0" not in path and max(map(len, names)) <= 255


def make_key(sequence: str, stem: str, where: str) -> str:
    """Join sequence and stem to a key.

    Raises:
        DataError: the key is no plain relative path, so it could lead out of an output folder; or no UTF-8.
    """
    key = stem if sequence == ROOT_SEQUENCE else f"{sequence}/{stem}"
    if not stays_inside(key):
        raise DataError(f"{where}: the name {key[:99]!r} is no plain relative path: rename the file or folder")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where!r}: the name {key!r} is not UTF-8: rename it (e.g. with convmv)") from None
    return key


def split_key(key: str) -> tuple[str, str]:
    """Split a key into (sequence, stem)."""
    sequence, _, stem = key.rpartition("/")
    return sequence or ROOT_SEQUENCE, stem


def instead_of(data_type: str) -> str:
    """Say how to do without a data type that is not there."""
    if data_type in ("edge_maps", "inst_maps"):
        return "; or write data.edges: labels (borders of the label map) or data.edges: none"
    if data_type == "seg_maps":
        return "; to train without label maps, from edges or conditions alone, write data.labels: null"
    return "" if data_type in DATA_TYPES else f"; or leave {data_type} out of data.conditions"


class FolderSource(Source):
    """Samples as plain files.

    Args:
        root: the folder that holds one sub-folder per data type.
        data_types: those that every sample must have.
        optional: those that are joined too where ``root`` has such a folder.
        drop_unpaired: keep the samples that have all data types, instead of raising.
        bare: ``root`` itself is the folder of the (then only) data type.
        suffixes: data type -> what its names have beside the key's stem: a suffix, or text with ``*`` for the stem.
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
        suffixes: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        assert not bare or len(data_types) == 1
        wanted = [*data_types, *(t for t in optional if t not in data_types and (root / t).is_dir() and not bare)]
        self._folders = {t: root if bare else root / t for t in wanted}
        for data_type, folder in self._folders.items():
            if not folder.is_dir():
                raise DataError(f"{root}: no folder {data_type}/ there; expected {LAYOUT}{instead_of(data_type)}")
        self.skipped: list[Path] = []
        """Files whose extension is none of their data type, or whose name lacks its suffix."""
        patterns = {} if bare or suffixes is None else suffixes
        self._extensions: dict[str, dict[str, str]] = {}
        self._names: dict[str, dict[str, str]] = {}
        """Data type -> key -> path below its folder, without extension, where that is not the key."""
        for t, folder in self._folders.items():
            # (A GIF among generated images is an animation, a WebP may be one.)
            endings = [e for e in EXTENSIONS.get(t, PHOTO_EXTENSIONS) if e != "gif" or not bare or t != "images"]
            found = _scan(folder, endings, self.skipped, patterns.get(t, ""))
            self._extensions[t], self._names[t] = found
        self._join_other_spellings()
        paired = {t: files for t, files in self._extensions.items() if t != DISTANCES}
        union = set().union(*paired.values())
        self.unpaired = {t: sorted(union - files.keys(), key=split_key) for t, files in paired.items()}
        """Data type -> keys that other data types have and it lacks."""
        if any(self.unpaired.values()) and not drop_unpaired:
            raise DataError(self._explain_unpaired())
        common = set.intersection(*(set(files) for files in paired.values()))
        if not common:
            counts = ", ".join(f"{len(files)} in {self._folders[t]}" for t, files in paired.items())
            others = f"; not read: {_some([str(p.relative_to(root)) for p in self.skipped])}" if self.skipped else ""
            named = f"; data.suffixes: {patterns}" if patterns else ""
            extensions = " ".join(endings)
            raise DataError(f"{root}: no samples ({counts}; extensions {extensions}{others}{named}); expected {LAYOUT}")
        self.keys = sorted(common, key=split_key)
        self.shard_sizes = [len(self.keys)]

    def has(self, data_type: str) -> bool:
        return data_type in self._folders and all(key in self._extensions[data_type] for key in self.keys)

    def describe(self, key: str, data_type: str) -> str:
        if key not in self._extensions.get(data_type, {}):
            raise DataError(f"{self.root}: no file for {key!r} among the {data_type}")
        name = self._names[data_type].get(key, key)
        return f"{self._folders[data_type]}{os.sep}{name}.{self._extensions[data_type][key]}"

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

    def file_stamps(self, keys: Sequence[str], data_type: str) -> NDArray[np.int64]:
        """Return the number of bytes of each key's file, and when it was changed (ns): [n, 2].

        Raises:
            DataError: one is gone.
        """
        stamps, path = list[tuple[int, int]](), ""
        folder, extensions, names = f"{self._folders[data_type]}{os.sep}", self._extensions[data_type], self._names
        name_of = names[data_type].get
        try:
            for key in keys:
                path = f"{folder}{name_of(key, key)}.{extensions[key]}"
                status = os.stat(path)  # noqa: PTH116 (a Path takes ten times as long to make)
                stamps.append((status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return np.array(stamps, np.int64).reshape(-1, 2)

    def stamps(self) -> tuple[list[str], NDArray[np.int64]]:
        types = [t for t in self._folders if self.has(t)]
        return self.keys, np.sum([self.file_stamps(self.keys, t) for t in types], 0)

    def aliases(self) -> dict[str, str]:
        """Map the names of files (without extension) that are not their keys to these."""
        return {name: key for names in self._names.values() for key, name in names.items()}

    def _join_other_spellings(self) -> None:
        """Join names that differ in their Unicode normal form alone, and files directly in their folder with those of
        other data types in sub-folders, where each can only mean one."""
        by_type = list(self._extensions.values())
        if all(files.keys() == by_type[0].keys() for files in by_type):
            return
        form = partial(unicodedata.normalize, "NFC")
        twice = {name for files in by_type for name, count in Counter(map(form, files)).items() if count > 1}
        spelling = {form(key): key for files in reversed(by_type) for key in files}
        for t, files in self._extensions.items():
            self._rename(t, {key: key if form(key) in twice else spelling[form(key)] for key in files})
        by_type = list(self._extensions.values())
        nested = {key for files in by_type for key in files if "/" in key}
        stems = {split_key(key)[1]: key for key in nested}
        flat = [t for t, files in self._extensions.items() if not nested & files.keys()]
        taken = {key for t, files in self._extensions.items() if t not in flat for key in files}
        if len(stems) == len(nested):
            for t in flat:
                self._rename(t, {key: key if key in taken else stems.get(key, key) for key in self._extensions[t]})

    def spell_as(self, keys: Iterable[str]) -> None:
        form = partial(unicodedata.normalize, "NFC")
        wanted = {form(key): key for key in keys}
        new_keys = {key: wanted.get(form(key), key) for key in self.keys}
        if len(set(new_keys.values())) == len(new_keys):
            for data_type, files in self._extensions.items():
                self._rename(data_type, {key: new_keys.get(key, key) for key in files})
            self.keys = sorted(new_keys.values(), key=split_key)

    def _rename(self, data_type: str, new_keys: Mapping[str, str]) -> None:
        """Give the files of a data type other keys: old -> new for each."""
        names = self._names[data_type]
        self._names[data_type] = {new: name for old, new in new_keys.items() if (name := names.get(old, old)) != new}
        self._extensions[data_type] = {new: self._extensions[data_type][old] for old, new in new_keys.items()}

    def _explain_unpaired(self) -> str:
        """Say which files lack a partner; if they have one under another name or ending, say that instead."""
        lines = [f"{self.root}: files do not pair up (they are joined by sequence and name without extension)."]
        for t, keys in self.unpaired.items():
            folder = self._folders[t]
            below = sorted(path.relative_to(folder).as_posix() for path in self.skipped if folder in path.parents)
            unread = {name.rpartition(".")[0] or name: name for name in below}
            if there := [unread[key] for key in keys if key in unread]:
                known = " ".join(EXTENSIONS.get(t, PHOTO_EXTENSIONS))
                lines.append(
                    f"  {t}: {len(there)} file(s) with an ending that is not read (those are {known}): {_some(there)}"
                )
            if missing := [key for key in keys if key not in unread]:
                lines.append(f"  {t}: {len(missing)} missing that other folders have: {_some(missing)}")
        photos, masks = set(self.unpaired.get("seg_maps", ())), self.unpaired.get("images", ())
        cuts = ((key[:i], key[i + 1 :]) for key in masks for i, character in enumerate(key) if character in "-_./")
        if len(masks) > len(photos) and not all(photos.isdisjoint(cut) for cut in cuts):
            source = f"scripts/prepare_dataset.py parts --source {self.root}"
            lines.append(f"One mask per class and photo? {source} merges them.")
        if suffixes := _find_suffixes({t: list(self._extensions[t]) for t in self.unpaired}):
            shown = ", ".join(f'{t}: "{suffix}"' for t, suffix in suffixes.items())
            lines.append(f"They pair up by their stems if you write data.suffixes: {{{shown}}}")
        lines.append(
            "Add the missing files or remove the extra ones (or, where names differ by a suffix or prefix, write"
            " data.suffixes); scripts/build_lmdb.py --drop_unpaired builds from those that have all"
        )
        return "\n".join(lines)

    def restricted_to(self, keys: Sequence[str]) -> FolderSource:
        """Return the same source with a part of its keys, in its own order."""
        part = copy.copy(self)
        part.keys = sorted(keys, key=split_key)
        part.shard_sizes = [len(keys)]
        return part


def holds_images(folder: Path) -> bool:
    """Return whether there is any image file (by extension) in ``folder`` or below."""
    return any(_extension(name, PHOTO_EXTENSIONS) for _, names in _walk(folder) for name in names)


def _scan(
    folder: Path, extensions: Sequence[str], skipped: list[Path], affix: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Find the files below ``folder`` that have one of ``extensions``, and ``affix`` in their names.

    Returns:
        Key -> extension as spelled; key -> path without extension, where that is not the key.
    """
    found: dict[str, str] = {}
    names: dict[str, str] = {}
    before, _, after = affix.rpartition("*")
    for sequence, name in ((sequence, name) for sequence, inside in _walk(folder) for name in inside):
        extension = _extension(name, extensions)
        written = name[: -len(extension) - 1]
        stem = written[len(before) : len(written) - len(after)]
        is_film = extension.lower() == "webp" and "gif" not in extensions
        if (
            not extension
            or (affix and not (stem and written.startswith(before) and written.endswith(after)))
            or (is_film and _is_animated_webp(f"{folder}{os.sep}{sequence}{os.sep}{name}"))
        ):
            skipped.append(folder / sequence / name)
            continue
        key = written = written if sequence == ROOT_SEQUENCE else f"{sequence}/{written}"
        if affix or not key.isascii() or "\\" in key:  # else it is as plain as names of files are
            where = f"{folder}{os.sep}{sequence}{os.sep}{name}"
            written, key = (make_key(sequence, text, where) for text in (name[: -len(extension) - 1], stem))
        if key in found:
            other = f"{names.get(key, key)}.{found[key]}"
            raise DataError(
                f"{folder / sequence}: {other} and {written}.{extension} have one name: files are joined by it."
                " Remove or rename one"
            )
        if written != key:
            names[key] = written
        found[key] = extension
    return found, names


def _extension(name: str, extensions: Sequence[str]) -> str:
    """Return the extension as spelled, or "" where it is none of ``extensions``."""
    stem, _, extension = name.rpartition(".")
    return extension if stem and extension.lower() in extensions else ""


def _is_animated_webp(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            header = file.read(21)
    except OSError:
        return False  # whoever reads it says why it cannot be read
    return header[12:16] == b"VP8X" and len(header) == 21 and bool(header[20] & 2)


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (sequence, names of its visible files), sorted; links to folders are followed once each.

    Raises:
        DataError: a folder that cannot be read, or something that is no file.
    """
    seen, places = set[str](), [(str(folder), ROOT_SEQUENCE)]
    while places:
        place, sequence = places.pop()
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        files, folders, special = list[str](), list[str](), list[str]()
        try:
            for entry in os.scandir(place):
                name = entry.name
                if name[0] == ".":  # .DS_Store, ._name.jpg, .ipynb_checkpoints
                    continue
                if entry.is_file(follow_symlinks=False):
                    files.append(name)
                elif os.path.isdir(entry.path):  # noqa: PTH112 (a Path takes ten times as long to make)
                    folders.append(name)
                else:
                    files.append(name)
                    special.append(entry.path)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
        for path in sorted(special):
            refuse_special(path)
        yield sequence, sorted(files)
        below = "" if sequence == ROOT_SEQUENCE else f"{sequence}/"
        places += [(f"{place}{os.sep}{name}", f"{below}{name}") for name in sorted(folders, reverse=True)]


def _some(names: Sequence[str]) -> str:
    """List the first ten of some names."""
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")


def _find_suffixes(keys: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Find what the names of each data type have after the stems by which most of them pair up with the first's."""
    (first, names), *others = ((t, sorted(split_key(key)[1] for key in of_type)) for t, of_type in keys.items())
    found: dict[str, str] = {}
    for t, other_names in others if names else ():
        starts = {name: os.path.commonprefix([names[0], name]) for name in other_names}  # noqa: RUF071
        stem = max(starts.values(), key=len, default="").rstrip("_-. ")
        ours = names[0][len(stem) :]
        mine = {name.removesuffix(ours) for name in names if name.endswith(ours)}
        for theirs in {name[len(stem) :] for name, start in starts.items() if stem and start.startswith(stem)}:
            paired = mine & {name.removesuffix(theirs) for name in other_names if name.endswith(theirs)}
            if 2 * len(paired) > len(names):
                found |= {k: suffix for k, suffix in ((first, ours), (t, theirs)) if suffix}
    return found
