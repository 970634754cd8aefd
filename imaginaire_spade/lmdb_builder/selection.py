"""Select the samples and data types of a raw folder to build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imaginaire_spade.data.folders import DISTANCES, FolderSource
from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS
from imaginaire_spade.data.lmdb_source import MANIFEST
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import EdgeSource

OPTIONAL_TYPES = ("edge_maps", "inst_maps", DISTANCES)


@dataclass(frozen=True)
class Selection:
    """What a build is made of."""

    source: FolderSource
    data_types: tuple[str, ...]
    left_out: list[str]
    """What is in the folders and not in the data set, one line per file."""


def select_samples(
    raw: Path,
    *,
    edges: str,
    data_types: Sequence[str] | None,
    drop_unpaired: bool,
    input_list: Path | None,
    shrinks: bool,
    silent: bool,
) -> Selection:
    """The samples and data types that the options of ``build_dataset`` name.

    Args:
        shrinks: pictures will be resized, which distance maps cannot be.
        silent: print nothing of what is left out.
    Raises:
        DataError: folders or files are missing, do not pair up, or are not what ``input_list`` says.
    """
    if data_types is None:
        optional = [t for t in OPTIONAL_TYPES if t in EdgeSource(edges).files_needed or (raw / t).is_dir()]
        types = ("images", "seg_maps", *optional)
    else:
        types = tuple(dict.fromkeys(data_types))
    source = FolderSource(raw, types, drop_unpaired=drop_unpaired or input_list is not None)
    left_out = _left_out(source, input_list is None)
    if left_out and not silent:
        print(f"left out {len(left_out)} file(s) or sample(s)" + f" (all in {MANIFEST})" * (len(left_out) > 20) + ":")
        print("\n".join(f"  {line}" for line in left_out[:20]))
    if input_list is not None:
        source = source.restricted_to(_read_list(input_list, source))
    if DISTANCES in types and (shrinks or not source.has(DISTANCES)):
        reason = "does not shrink" if shrinks else "lacks some samples"
        print(f"{raw / DISTANCES} {reason}: left out (scripts/make_distance_maps.py makes missing ones)")
        types = tuple(t for t in types if t != DISTANCES)
    return Selection(source, types, left_out)


def _left_out(source: FolderSource, tell_unpaired: bool) -> list[str]:
    lines = [f"{path.relative_to(source.root)}: no image by its extension" for path in source.skipped]
    for data_type, keys in source.unpaired.items():
        lines += [f"{key}: dropped, no file in {data_type}" for key in keys if tell_unpaired]
    return lines


def _read_list(path: Path, source: FolderSource) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--input_list {path}: cannot be read: {error}") from None
    known, wanted, unknown = set(source.keys), set[str](), []
    for line in filter(None, lines):
        key = line.removeprefix("./")
        stem, _, extension = key.rpartition(".")
        if key not in known and extension.lower() in IMAGE_EXTENSIONS:
            key = stem
        if key in known:
            wanted.add(key)
        else:
            unknown.append(line)
    if unknown or not wanted:
        shown = ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        what = f"{len(unknown)} name(s) without a file in every data type: {shown}" if unknown else "no names"
        raise DataError(f"--input_list {path}: {what}. Write one SEQUENCE/NAME or NAME per line")
    return list(wanted)
