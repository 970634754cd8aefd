"""Raw folders -> a verified LMDB data set (``scripts/build_lmdb.py``).

Owns the order of a build: refuse what cannot work, check every file, write shard by shard, read back, rename, and
``manifest.json``. A shard appears under its final name only when it is complete and verified; what a killed build
leaves behind lies under temporary names, which the next build removes.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from imaginaire_spade.data.check import Plan, check_all
from imaginaire_spade.data.decode import IMAGE_EXTENSIONS
from imaginaire_spade.data.folders import DISTANCES, EDGE_FILES, FolderSource, make_key
from imaginaire_spade.data.shard import Manifest, file_sha256, flush_folder, join_manifests, write_shard
from imaginaire_spade.data.store import FILENAMES, MANIFEST, METADATA, read_json, write_json
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec

OPTIONAL_TYPES = ("edge_maps", "inst_maps", DISTANCES)


def build_dataset(
    data_root: str | Path,
    output_root: str | Path,
    labels: LabelSpec,
    *,
    edges: str = "none",
    num_shards: int = 1,
    num_workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    drop_unpaired: bool = False,
    input_list: str | Path | None = None,
) -> Manifest:
    """Build the data set and return its manifest.

    Args:
        edges: ``data.edges`` of the config; "file" and "instances" make edge_maps/ and inst_maps/ obligatory. Where
            these folders exist, they are built in any case.
        num_shards: with 1 the root itself is the shard.
        num_workers: processes that check files; None: min(8, cores); 0: this process.
        overwrite: replace an existing data set, once the new one is complete.
        resume: keep verified shards of an earlier, interrupted build of the same data.
        drop_unpaired: build from the samples that have all data types.
        input_list: file with one key per line (an extension is ignored): build from these samples only.
    Raises:
        DataError: with every problem found, up to ``MAX_PROBLEMS``. Nothing is left under the final name.
    """
    raw, output = Path(data_root), Path(output_root).absolute()
    if num_shards < 1 or (num_workers is not None and num_workers < 0):
        raise DataError(f"--num_shards {num_shards} --num_workers {num_workers}: write at least 1 shard and 0 workers")
    _check_output(raw, output, overwrite, resume)
    optional = [t for t in OPTIONAL_TYPES if EDGE_FILES.get(edges) == t or (raw / t).is_dir()]
    data_types = ("images", "seg_maps", *optional)
    source = FolderSource(raw, data_types, drop_unpaired=drop_unpaired or input_list is not None)
    _report_left_out(source, input_list is None)
    if input_list is not None:
        source = source.restricted_to(_read_list(Path(input_list), source))
    if DISTANCES in data_types and not source.has(DISTANCES):
        print(f"{raw / DISTANCES} lacks some samples: left out (scripts/make_distance_maps.py makes the missing ones)")
        data_types = tuple(t for t in data_types if t != DISTANCES)
    if num_shards > len(source.keys):
        raise DataError(f"--num_shards {num_shards}: more shards than samples ({len(source.keys)})")
    plan = Plan(source, labels, data_types)
    # In the order of the keys, so that the shards one after the other are the folder's order.
    cuts = [len(source.keys) * i // num_shards for i in range(num_shards + 1)]
    names = ["."] if num_shards == 1 else [f"shard_{i:05d}" for i in range(num_shards)]
    parts = {name: source.keys[a:b] for name, (a, b) in zip(names, itertools.pairwise(cuts), strict=True)}

    kept = _kept_shards(output, parts, plan) if resume else {}
    todo = {name: part for name, part in parts.items() if name not in kept}
    num_bytes = sum(source.size(key, t) for part in todo.values() for key in part for t in data_types)
    _check_free_space(output, num_bytes)
    with _disk_errors(output, num_bytes):
        return _build(plan, parts, kept, output, overwrite, num_workers)


def _build(
    plan: Plan,
    parts: Mapping[str, Sequence[str]],
    kept: Mapping[str, Manifest],
    output: Path,
    overwrite: bool,
    num_workers: int | None,
) -> Manifest:
    """Check and write the shards that are not ``kept``, move them into place, and return the root's manifest."""
    todo = {name: part for name, part in parts.items() if name not in kept}
    checked = check_all(plan, [key for part in todo.values() for key in part], num_workers)
    manifests = dict(kept)
    # A single shard is renamed as a whole, and so is a data set that replaces another.
    in_place = len(parts) > 1 and not (overwrite and output.exists())
    root = output if in_place else _temporary(output)
    _remove_stale(output)
    try:
        for number, (name, part) in enumerate(todo.items()):
            folder = root if name == "." else root / f"{name}.tmp"
            shutil.rmtree(folder, ignore_errors=True)
            manifests[name] = write_shard(plan, part, checked, folder, f"writing shard {number + 1}/{len(todo)}")
            if name != ".":
                folder.replace(root / name)
                flush_folder(root)
        manifest = join_manifests({name: manifests[name] for name in parts})
        if len(parts) > 1:
            write_json(root / MANIFEST, manifest)
            flush_folder(root)
        if todo and not in_place:
            _move_into_place(root, output)
        return manifest
    finally:
        _clean_up(root, output)


# ------------------------------------------------------------------------------------------------ before any work


def _check_output(raw: Path, output: Path, overwrite: bool, resume: bool) -> None:
    """Raises DataError where the output cannot or must not be written."""
    if not raw.is_dir():
        raise DataError(f"--data_root {raw}: {'not a folder' if raw.exists() else 'no such folder'}")
    if overwrite and resume:
        raise DataError("--overwrite and --resume exclude each other: keep one")
    here, there = output.resolve(), raw.resolve()
    if here == there or here in there.parents:
        raise DataError(f"--output_root {output} contains --data_root {raw}: choose a folder of its own")
    for data_type in ("images", "seg_maps", *OPTIONAL_TYPES):
        inside = (raw / data_type).resolve()
        if here == inside or inside in here.parents:
            raise DataError(f"--output_root {output} lies among the raw files in {raw / data_type}: choose another")
    parent = next(p for p in (here, *here.parents) if p.exists())
    if not parent.is_dir():
        raise DataError(f"--output_root {output}: {parent} is a file: choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"--output_root {output}: {parent} is not writable: choose another folder or change its rights")
    content = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
    if not content or resume:
        return
    is_ours = {FILENAMES, MANIFEST} & set(content) or all(name.startswith("shard_") for name in content)
    if overwrite and not is_ours:
        raise DataError(
            f"--output_root {output} holds {', '.join(content[:5])}, which is no data set of this script: it is not"
            " overwritten. Remove it yourself or choose another folder"
        )
    if not overwrite:
        state = "a data set" if {FILENAMES, MANIFEST} & set(content) else "an unfinished build or other files"
        raise DataError(
            f"--output_root {output} exists and holds {state}: add --resume to finish an interrupted build, or"
            " --overwrite to replace it"
        )


def _report_left_out(source: FolderSource, tell_unpaired: bool) -> None:
    if source.skipped:
        shown = ", ".join(str(path.relative_to(source.root)) for path in source.skipped[:10])
        more = " ..." if len(source.skipped) > 10 else ""
        print(f"skipped {len(source.skipped)} file(s) that are no images by their extension: {shown}{more}")
    for data_type, keys in source.unpaired.items():
        if keys and tell_unpaired:
            shown = ", ".join(keys[:10]) + (" ..." if len(keys) > 10 else "")
            print(f"dropped {len(keys)} sample(s) without a file in {data_type}: {shown}")


def _read_list(path: Path, source: FolderSource) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--input_list {path}: cannot be read: {error}") from None
    known, wanted, unknown = set(source.keys), set(), []
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


def _check_free_space(output: Path, num_bytes: int) -> None:
    existing = next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    needed = int(num_bytes * 1.2) + (1 << 20)
    if free < needed:
        raise DataError(f"--output_root {output}: {free:,} bytes are free there, about {needed:,} are needed")


@contextmanager
def _disk_errors(output: Path, num_bytes: int) -> Iterator[None]:
    """A full or failing disk as a DataError."""
    try:
        yield
    except (OSError, lmdb.Error) as error:
        existing = next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        raise DataError(
            f"--output_root {output}: writing failed: {error}. {free:,} bytes are free there, about"
            f" {int(num_bytes * 1.2):,} are needed. The temporary folder was removed; free some space (or raise the"
            " quota) and run again (with several shards, --resume keeps the finished ones)"
        ) from error


# ------------------------------------------------------------------------------------------------ resuming, clean-up


def _kept_shards(output: Path, parts: Mapping[str, Sequence[str]], plan: Plan) -> dict[str, Manifest]:
    """Path -> manifest of the shards that are there, whole, and of this very build. Damaged ones are removed.

    Raises:
        DataError: what is there belongs to another build.
    """
    present = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
    if "." in parts:
        planned = {FILENAMES, METADATA, MANIFEST, *plan.data_types} if present else set()
    else:
        planned = {*parts, *(f"{name}.tmp" for name in parts), MANIFEST}
    if foreign := [name for name in present if name not in planned]:
        raise DataError(
            f"--resume: {output} holds {', '.join(foreign[:5])}, which is no part of this build (another"
            " --num_shards?): use the same command as before, or --overwrite"
        )
    kept: dict[str, Manifest] = {}
    for name, keys in parts.items():
        shard = output / name
        if not (shard / MANIFEST).is_file():
            if name == "." and present:
                raise DataError(f"--resume: {output} has no {MANIFEST}: not built by this script; use --overwrite")
            continue
        manifest = read_json(shard / MANIFEST)
        num_bytes = {t: sum(plan.source.size(key, t) for key in keys) for t in plan.data_types}
        try:
            same_labels = manifest["labels"] == plan.labels.model_dump(mode="json")
            stems = read_json(shard / FILENAMES)
            stored = sorted(make_key(sequence, stem, str(shard)) for sequence in stems for stem in stems[sequence])
            stored_bytes = {t: entry["bytes"] for t, entry in manifest["data_types"].items()}
            same_files = stored == sorted(keys) and stored_bytes == num_bytes
            files = manifest["shards"][0]["files"]
            whole = all(file_sha256(shard / t / "data.mdb") == files[f"{t}/data.mdb"]["sha256"] for t in num_bytes)
        except (KeyError, IndexError, TypeError, AttributeError, OSError, DataError):
            same_labels, same_files, whole = True, True, False
        if not (same_labels and same_files):
            what = "label table" if not same_labels else "samples or files"
            raise DataError(f"--resume: {shard} was built with another {what}: use --overwrite to build anew")
        if whole:
            kept[name] = manifest
        elif name == ".":
            raise DataError(f"--resume: {shard} is damaged (its checksum differs): use --overwrite to build anew")
        else:
            print(f"{shard} is damaged (its checksum differs): building it again")
            shutil.rmtree(shard)
    print(f"resuming: {len(kept)} of {len(parts)} shard(s) are complete and verified")
    return kept


def _temporary(output: Path) -> Path:
    return output.with_name(f"{output.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def _remove_stale(output: Path) -> None:
    """Remove what killed builds of this machine left beside ``output``."""
    prefix = f"{output.name}.tmp-{socket.gethostname()}-"
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in output.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move_into_place(root: Path, output: Path) -> None:
    old = output.with_name(f"{root.name}-old")
    if output.exists():
        output.replace(old)
    root.replace(output)
    flush_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up(root: Path, output: Path) -> None:
    """Remove temporary folders; after a success there are none."""
    if root != output:
        shutil.rmtree(root, ignore_errors=True)
    elif output.is_dir():
        for leftover in output.glob("shard_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not any(output.iterdir()):
            output.rmdir()
