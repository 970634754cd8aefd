"""The output folder of a build: which existing contents are accepted, locks, resuming, and the final rename.

A data set of one shard, and one that replaces another, grow beside the output and are renamed; the shards of another
grow inside it, under temporary names. Locks are files beside the output (``OUTPUT.0.lock`` for shard 0).
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lmdb

from imaginaire_spade.data.folders import DATA_TYPES
from imaginaire_spade.data.lmdb_source import FILENAMES, MANIFEST, METADATA
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import flush_folder, read_json, write_json
from imaginaire_spade.lmdb_builder.sample import Plan
from imaginaire_spade.lmdb_builder.shard import Manifest, find_problem, join_manifests, remove_if_empty
from imaginaire_spade.processes import hold_lock


def check_output(
    raw: Path, output: Path, overwrite: bool, resume: bool, data_types: Sequence[str] = DATA_TYPES
) -> None:
    """Check that the output can be written without harm to what is there.

    Args:
        data_types: folders of the raw data.
    Raises:
        DataError: it cannot.
    """
    if not raw.is_dir():
        raise DataError(f"--data_root {raw}: {'not a folder' if raw.exists() else 'no such folder'}")
    here, there = output.resolve(), raw.resolve()
    if here == there or here in there.parents:
        raise DataError(f"--output_root {output} contains --data_root {raw}: choose a folder of its own")
    for data_type in data_types:
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
    """Return whether a complete data set is there."""
    return (output / MANIFEST).is_file() or (output / FILENAMES).is_file()


def prepare_root(
    plan: Plan, output: Path, own: Sequence[str], overwrite: bool, resume: bool, world_size: int
) -> tuple[Path, list[str]]:
    """Choose where to build, in the output itself or in a temporary folder beside it, and clear it if that is allowed.

    Args:
        own: the shards that this process builds.
    Returns:
        That folder, and those of ``own`` that are finished there.
    Raises:
        DataError: what is there belongs to another build.
    """
    root, temporary = output, output.with_name(f"{output.name}.tmp")
    # (A temporary folder without an output was about to take its place.)
    if overwrite if is_finished(output) else ("." in plan.shards or temporary.exists()):
        root = temporary
    may_clear = world_size == 1 and (overwrite or root != output)
    kept = []
    try:
        if resume:
            kept = _kept_shards(plan, root, own)
    except DataError as error:
        if overwrite and world_size > 1:
            raise DataError(
                f"{error}. Of several processes none may clear it away from under the others: remove {root} yourself,"
                " then start them again"
            ) from None
        if not may_clear:
            raise
    if may_clear and not kept:
        shutil.rmtree(root, ignore_errors=True)
    return root, kept


@contextmanager
def hold_shards(output: Path, shards: Sequence[int]) -> Iterator[None]:
    """Lock ``shards`` of ``output`` while the block runs.

    Raises:
        UserError: another living process holds one of them, or there can be no locks.
    """
    with ExitStack() as held:
        if not output.parent.exists():
            held.callback(remove_if_empty, output.parent)
        for shard in shards:
            held.enter_context(hold_lock(_lock(output, f"{shard}."), output, "--output_root", quiet=shard != shards[0]))
        yield


def _lock(output: Path, name: str = "") -> Path:
    return output.with_name(f"{output.name}.{name}lock")


@contextmanager
def expect_room(output: Path, num_bytes: int) -> Iterator[None]:
    """Check that ``num_bytes`` of files fit, and explain what a full or failing disk does to the block.

    Raises:
        DataError: they do not fit, or writing failed.
    """
    existing = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    needed = int(num_bytes * 1.2) + (1 << 20)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(f"--output_root {output}: {free:,} bytes are free there, about {needed:,} are needed")
    try:
        yield
    except (OSError, lmdb.Error) as error:
        free = shutil.disk_usage(existing).free
        raise DataError(
            f"--output_root {output}: writing failed: {error}. {free:,} bytes are free there, about {needed:,} are"
            " needed. What was half written was removed; free some space (or raise the quota) and run the same command"
            " again: finished shards are kept"
        ) from error


def _kept_shards(plan: Plan, root: Path, names: Sequence[str]) -> list[str]:
    """List those of ``names`` that are there, complete, and of this very build. Damaged ones are removed.

    Raises:
        DataError: what is there belongs to another build.
    """
    present = _content(root)
    if "." in plan.shards:
        if not (root / MANIFEST).is_file():
            if (root / FILENAMES).is_file():
                raise DataError(f"{root} has no {MANIFEST}: not built by this script; use --overwrite to replace it")
            return []
        planned = {FILENAMES, METADATA, MANIFEST, *plan.data_types}
    else:
        planned = {*plan.shards, *(f"{name}.tmp" for name in plan.shards), MANIFEST}
    foreign = [name for name in present if name not in planned and not name.startswith(MANIFEST)]
    if foreign:
        raise DataError(
            f"{root} holds {', '.join(foreign[:5])}, which is no part of this build (another --num_shards?): use the"
            " same command as before, or --overwrite"
        )
    kept = []
    for name in names:
        shard = root / name
        if not (shard / MANIFEST).is_file():
            continue
        if not (problem := find_problem(shard, plan, name)):
            kept.append(name)
        elif name == ".":
            raise DataError(f"{shard} {problem}: use --overwrite to build anew")
        else:
            print(f"{shard} {problem}: building it again")
            shutil.rmtree(shard)
    return kept


def join_shards(plan: Plan, root: Path, output: Path, left_out: Sequence[str]) -> Manifest | None:
    """If all shards are there, write the root's manifest and give the data set its name; remove what had it before.

    Raises:
        DataError: the data set is useless.
    """
    with hold_lock(_lock(output), output, "--output_root", timeout=-1, quiet=True):
        if not all((root / name / MANIFEST).is_file() for name in plan.shards):
            return None
        manifest = join_manifests({name: read_json(root / name / MANIFEST) for name in plan.shards}, left_out, plan)
        if not (root / MANIFEST).is_file() or read_json(root / MANIFEST) != manifest:
            write_json(root / MANIFEST, manifest)
            flush_folder(root)
        if root != output:
            old = root.with_name(f"{root.name}-old")
            if output.exists():
                shutil.rmtree(old, ignore_errors=True)
                output.replace(old)
            root.replace(output)
            flush_folder(output.parent)
            shutil.rmtree(old, ignore_errors=True)
    return manifest
