"""The output folder of a build: which existing contents are accepted, resuming, and the final rename.

A data set of one shard, and one that replaces another, grow beside the output and are renamed; the shards of another
grow inside it, under temporary names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from imaginaire_spade.data.folders import DATA_TYPES
from imaginaire_spade.data.lmdb_source import FILENAMES, MANIFEST, METADATA
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import file_sha256, flush_folder, read_json
from imaginaire_spade.lmdb_builder.sample import Plan
from imaginaire_spade.lmdb_builder.shard import Manifest, source_sha256


def check_output(raw: Path, output: Path, overwrite: bool, resume: bool) -> None:
    """Raises DataError where the output cannot or must not be written."""
    if not raw.is_dir():
        raise DataError(f"--data_root {raw}: {'not a folder' if raw.exists() else 'no such folder'}")
    here, there = output.resolve(), raw.resolve()
    if here == there or here in there.parents:
        raise DataError(f"--output_root {output} contains --data_root {raw}: choose a folder of its own")
    for data_type in DATA_TYPES:
        inside = (raw / data_type).resolve()
        if here == inside or inside in here.parents:
            raise DataError(f"--output_root {output} lies among the raw files in {raw / data_type}: choose another")
    parent = next(p for p in (here, *here.parents) if p.exists())
    if not parent.is_dir():
        raise DataError(f"--output_root {output}: {parent} is a file: choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"--output_root {output}: {parent} is not writable: choose another folder or change its rights")
    content = _content(output)
    is_ours = {FILENAMES, MANIFEST} & set(content) or all(name.startswith(("shard_", MANIFEST)) for name in content)
    if content and not is_ours:
        raise DataError(
            f"--output_root {output} holds {', '.join(content[:5])}, which is no data set of this script: it is not"
            " overwritten. Remove it yourself or choose another folder"
        )
    if content and not (overwrite or resume):
        state = "a data set" if is_finished(output) else "an unfinished build"
        raise DataError(
            f"--output_root {output} exists and holds {state}: leave out --no-resume to finish it, or add --overwrite"
            " to replace it"
        )


def _content(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def is_finished(output: Path) -> bool:
    """Whether a whole data set is there."""
    return (output / MANIFEST).is_file() or (output / FILENAMES).is_file()


def temporary(output: Path) -> Path:
    return output.with_name(f"{output.name}.tmp")


def check_free_space(output: Path, num_bytes: int) -> None:
    """Raises DataError where ``num_bytes`` of files do not fit."""
    free, needed = _free_bytes(output), _needed_bytes(num_bytes)
    if free < needed:
        raise DataError(f"--output_root {output}: {free:,} bytes are free there, about {needed:,} are needed")


def _free_bytes(output: Path) -> int:
    return shutil.disk_usage(next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())).free


def _needed_bytes(num_bytes: int) -> int:
    return int(num_bytes * 1.2) + (1 << 20)


@contextmanager
def disk_errors(output: Path, num_bytes: int) -> Iterator[None]:
    """A full or failing disk as a DataError."""
    try:
        yield
    except (OSError, lmdb.Error) as error:
        raise DataError(
            f"--output_root {output}: writing failed: {error}. {_free_bytes(output):,} bytes are free there, about"
            f" {_needed_bytes(num_bytes):,} are needed. What was half written was removed; free some space (or raise"
            " the quota) and run the same command again: finished shards are kept"
        ) from error


def kept_shards(
    root: Path, parts: Mapping[str, Sequence[str]], names: Sequence[str], plan: Plan
) -> dict[str, Manifest]:
    """Path -> manifest of those of ``names`` that are there, whole, and of this very build. Damaged ones are removed.

    Raises:
        DataError: what is there belongs to another build.
    """
    present = _content(root)
    if "." in parts:
        if not (root / MANIFEST).is_file():
            if (root / FILENAMES).is_file():
                raise DataError(f"{root} has no {MANIFEST}: not built by this script; use --overwrite to replace it")
            return {}
        planned = {FILENAMES, METADATA, MANIFEST, *plan.data_types}
    else:
        planned = {*parts, *(f"{name}.tmp" for name in parts), MANIFEST}
    foreign = [name for name in present if name not in planned and not name.startswith(MANIFEST)]
    if foreign:
        raise DataError(
            f"{root} holds {', '.join(foreign[:5])}, which is no part of this build (another --num_shards?): use the"
            " same command as before, or --overwrite"
        )
    kept: dict[str, Manifest] = {}
    for name in names:
        shard = root / name
        if not (shard / MANIFEST).is_file():
            continue
        try:
            manifest = read_json(shard / MANIFEST)
            differs = _difference(manifest, parts[name], plan)
            files = manifest["shards"][0]["files"]
            whole = all(
                file_sha256(shard / t / "data.mdb") == files[f"{t}/data.mdb"]["sha256"] for t in plan.data_types
            )
        except (KeyError, IndexError, TypeError, AttributeError, OSError, DataError):
            differs, whole = "", False
        if differs:
            raise DataError(f"{shard} was built with {differs}: use --overwrite to build anew")
        if whole:
            kept[name] = manifest
        elif name == ".":
            raise DataError(f"{shard} is damaged (its checksum differs): use --overwrite to build anew")
        else:
            print(f"{shard} is damaged (its checksum differs): building it again")
            shutil.rmtree(shard)
    return kept


def _difference(manifest: Manifest, keys: Sequence[str], plan: Plan) -> str:
    """In what a shard differs from the plan, or ""."""
    if manifest["labels"] != plan.labels.model_dump(mode="json"):
        return "another label table"
    if list(manifest["data_types"]) != list(plan.data_types):
        return f"other data types ({', '.join(manifest['data_types'])})"
    if any(manifest[name] != planned for name, planned in plan.treatment().items()):
        return "another --resize_smallest_side, --quality, --recode_maps or --no_check"
    return "" if manifest["source_sha256"] == source_sha256(plan, keys) else "another set of samples or files"


def move_into_place(root: Path, output: Path) -> None:
    """Give a finished data set its name; what had it before goes."""
    old = root.with_name(f"{root.name}-old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.replace(old)
    root.replace(output)
    flush_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
