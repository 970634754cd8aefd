"""Build a verified LMDB data set from raw folders (``scripts/build_lmdb.py``), in one process or many; verify that a
built one is unchanged (``scripts/inspect_lmdb.py``).

Responsible for the order of a build: refuse what cannot work; write shard after shard, while workers read and check the
samples; join the shards' manifests. A shard appears under its final name only when it is complete and verified.
Processes do not talk to each other: each builds the shards of its rank, and the last to finish finds all of them there
and joins them.
"""

import itertools
import json
import unicodedata
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imaginaire_spade.command_names import as_called
from imaginaire_spade.config import Condition, ImageSpec, LabelledData
from imaginaire_spade.data.folders import DATA_TYPES, DISTANCES, FolderSource, Source
from imaginaire_spade.data.image_files import PHOTO_EXTENSIONS
from imaginaire_spade.data.lmdb_source import MANIFEST, open_source, store_key
from imaginaire_spade.data.loader import count_workers, generate_in_workers, map_in_order
from imaginaire_spade.data.photos import built_spec
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import read_json, read_text, write_bytes
from imaginaire_spade.labels import EdgeSource, LabelSpec
from imaginaire_spade.lmdb_builder.output import check_output, expect_room, hold_shards, join_shards, prepare_root
from imaginaire_spade.lmdb_builder.sample import Contents, LoadedSample, Plan, check_sample, load_sample
from imaginaire_spade.lmdb_builder.shard import Manifest, bad_files, remove_unfinished, write_shard, wrong_checksums

OPTIONAL_TYPES = ("edge_maps", "inst_maps", DISTANCES)
MAX_PROBLEMS = 20
"""A build stops after this many."""
MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"BM", "bmp"), (b"RIFF", "webp"), (b"\x93NUMPY", "npy"),
         (b"PK", "npz"), (b"II", "tif"), (b"MM", "tif"), (b"GIF8", "gif"))  # fmt: skip


def build_dataset(
    data_root: str | Path,
    output_root: str | Path,
    labels: LabelSpec,
    *,
    edges: str = "none",
    images: ImageSpec | None = None,
    data_types: Sequence[str] | None = None,
    num_shards: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    drop_unpaired: bool = False,
    skip_bad: bool = False,
    suffixes: Mapping[str, str] | None = None,
    input_list: str | Path | None = None,
    check: bool = True,
    resize_smallest_side: int | None = None,
    quality: int = 95,
    recode_maps: bool = False,
    conditions: Sequence[Condition] = (),
    rank: int = 0,
    world_size: int = 1,
) -> Manifest | None:
    """Build the data set, or this process's shards of it.

    Args:
        edges: ``data.edges`` of the config; "file" requires edge_maps/, "instances" requires inst_maps/.
        images: what photos mean, ``data.images`` of the config; None: 8-bit RGB.
        data_types: what to build; None: images, seg_maps (if there are classes), what ``edges`` needs, and the other
            folders that exist.
        num_shards: with 1 the root itself is the shard. None: one per process.
        num_workers: processes that read and check what this one writes; None: min(8, cores); 0: this process alone.
        overwrite: replace an existing data set, once the new one is complete.
        resume: keep verified shards of an earlier, interrupted build of the same data.
        drop_unpaired: build from the samples that have all data types.
        skip_bad: build from the samples without a problem; ``OUTPUT.bad_files.txt`` names the others.
        suffixes: ``data.suffixes`` of the config.
        input_list: file with one key per line (an extension is ignored): build from these samples only.
        check: decode every file and compare sizes and label values with the table.
        resize_smallest_side, quality: shrink what is larger; JPEGs are then written with this quality.
        conditions: ``data.conditions`` of the config; their folders are data types too.
        recode_maps: re-encode label, edge and instance maps, with the same integers, so that they decode faster.
        rank, world_size: build every ``world_size``-th shard, from number ``rank`` on.
    Returns:
        The root's manifest; None if another process completes (or completed) the data set.
    Raises:
        DataError: with every problem found, up to ``MAX_PROBLEMS``. Nothing incomplete is left under a final name.
    """
    # Refuse what cannot work.
    raw, output = Path(data_root), Path(output_root).absolute()
    num_shards = world_size if num_shards is None else num_shards
    num_workers = count_workers(num_workers, world_size)
    if num_shards < world_size:
        raise DataError(f"--num_shards {num_shards}: write at least {world_size} shard(s), one per process")
    if resize_smallest_side is not None and (resize_smallest_side < 1 or not check or not 1 <= quality <= 100):
        raise DataError("--resize_smallest_side takes at least 1, with --quality 1..100, and excludes --no_check")
    if recode_maps and not check:
        raise DataError("--recode_maps decodes every map, which --no_check excludes: write one of the two")
    names = [condition.name for condition in conditions]
    check_output(raw, output, overwrite, resume, (*DATA_TYPES, *names))
    # Select the samples.
    types = tuple(dict.fromkeys(data_types or ()))
    if data_types is None:
        optional = [t for t in OPTIONAL_TYPES if t in EdgeSource(edges).files_needed or (raw / t).is_dir()]
        types = ("images", *(["seg_maps"] if labels.num_classes else []), *optional)
    types = (*types, *names)
    drops = drop_unpaired or input_list is not None
    source = FolderSource(raw, types, drop_unpaired=drops, suffixes=suffixes)
    named = " or data.suffixes" if suffixes else ""
    left_out = [f"{path.relative_to(raw)}: not read, by its ending{named}" for path in source.skipped]
    if input_list is None:
        left_out += [f"{key}: dropped, no file in {t}" for t, keys in source.unpaired.items() for key in keys]
    if left_out and rank == 0:
        print(f"left out {len(left_out)} file(s) or sample(s)" + f" (all in {MANIFEST})" * (len(left_out) > 20) + ":")
        print("\n".join(f"  {line}" for line in left_out[:20]))
    if input_list is not None:
        source = source.restricted_to(_read_list(Path(input_list), source))
    if DISTANCES in types and (resize_smallest_side or not source.has(DISTANCES)):
        reason = "does not shrink" if resize_smallest_side else "lacks some samples"
        print(f"{raw / DISTANCES} {reason}: left out ({as_called('scripts/make_distance_maps.py')} makes missing ones)")
        types = tuple(t for t in types if t != DISTANCES)
    # Plan the shards.
    if num_shards > len(source.keys):
        raise DataError(f"--num_shards {num_shards}: more shards than samples ({len(source.keys)})")
    shards = _divide(source.keys, num_shards)
    treatment = check, resize_smallest_side, quality, recode_maps, skip_bad, tuple(conditions)
    plan = Plan(source, labels, images or ImageSpec(), types, shards, *treatment)
    own = list(shards)[rank::world_size]
    with hold_shards(output, range(num_shards)[rank::world_size]):
        root, kept = prepare_root(plan, output, own, overwrite, resume, world_size)
        if kept:
            prefix = f"rank {rank}: " * (rank > 0)
            print(f"{prefix}resuming: {len(kept)} of {len(own)} shard(s) are complete and verified")
        # Write the others, and join all of them.
        todo = {name: keys for name, keys in shards.items() if name in own and name not in kept}
        num_bytes = sum(int(source.file_stamps(keys, t)[:, 0].sum()) for keys in todo.values() for t in types)
        with expect_room(output, num_bytes):
            _write_shards(plan, root, todo, num_workers, silent=rank > 0)
            manifest = join_shards(plan, root, output, left_out)
    if manifest and manifest["bad"]:
        write_bytes(bad_files(output), "".join(f"{k}\t{v}\n" for k, v in manifest["bad"].items()).encode())
    return manifest


def _read_list(path: Path, source: FolderSource) -> list[str]:
    """Read the keys of ``--input_list``.

    Raises:
        DataError: the file cannot be read, or names a sample that ``source`` lacks.
    """
    text = read_text(path, DataError, f"--input_list {path}: cannot be read")
    known = {unicodedata.normalize("NFC", key): key for key in source.keys}
    known = {unicodedata.normalize("NFC", name): key for name, key in source.aliases().items()} | known
    wanted, unknown = set[str](), []
    for line in filter(None, map(str.strip, text.splitlines())):
        key = unicodedata.normalize("NFC", line)
        if key not in known:
            key = key.strip("\"'").replace("\\", "/").removeprefix(f"{source.root.as_posix()}/").removeprefix("./")
        stem, _, extension = key.rpartition(".")
        if key not in known and extension.lower() in PHOTO_EXTENSIONS:
            key = stem
        folder, _, below = key.partition("/")
        if key not in known and folder in DATA_TYPES:
            key = below
        if key in known:
            wanted.add(known[key])
        elif not line.startswith("#"):
            unknown.append(line)
    if unknown or not wanted:
        shown = ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        what = f"{len(unknown)} name(s) without a file in every data type: {shown}" if unknown else "no names"
        raise DataError(f"--input_list {path}: {what}. Write one SEQUENCE/NAME or NAME per line")
    return list(wanted)


def _divide(keys: Sequence[str], num_shards: int) -> dict[str, list[str]]:
    """Map the path of each shard to its keys. One shard after the other, they are in the folder's order."""
    cuts = [len(keys) * i // num_shards for i in range(num_shards + 1)]
    names = ["."] if num_shards == 1 else [f"shard_{i:05d}" for i in range(num_shards)]
    pairs = zip(names, itertools.pairwise(cuts), strict=True)
    return {name: sorted(keys[start:end], key=store_key) for name, (start, end) in pairs}


def _write_shards(plan: Plan, root: Path, shards: Mapping[str, Sequence[str]], num_workers: int, silent: bool) -> None:
    """Write shards.

    Args:
        shards: path of each shard to write -> its keys.
    Raises:
        DataError: with the problems of all samples, up to ``MAX_PROBLEMS``. Shards without one are finished.
    """
    num_samples = sum(map(len, shards.values()))
    seen, problems = 0, list[DataError]()
    with closing(_written(plan, root, shards, num_workers)) as samples:
        hidden = silent or not shards
        for found in tqdm(samples, "building", num_samples, unit="images", mininterval=0.5, disable=hidden):
            seen += 1
            problems += found
            if len(problems) >= MAX_PROBLEMS and not plan.skip_bad:
                break
    if problems and not plan.skip_bad:
        rest = f" (checking stopped after sample {seen} of {num_samples})" if seen < num_samples else ""
        finished = sum((root / name / MANIFEST).is_file() for name in plan.shards)
        state = f"{finished} finished shard(s) are kept" if finished else "nothing was built"
        listed = "\n  ".join(plan.labels.join_complaints(problems[:MAX_PROBLEMS], seen))
        state += f"{rest}; --skip_bad builds without them, and lists all in a file"
        raise DataError(f"{plan.source.root}: {len(problems)} problem(s), {state}:\n  {listed}")


def _written(
    plan: Plan, root: Path, shards: Mapping[str, Sequence[str]], num_workers: int
) -> Generator[list[DataError], None, None]:
    """Yield the problems of each sample of shards that are being written.

    Each worker writes shards of its own if there are enough of them; else this process writes one shard after the
    other, while the workers read and check the samples ahead.
    """
    if 0 < num_workers <= len(shards):
        try:
            with generate_in_workers(partial(_write_alone, plan, root), list(shards), num_workers) as problems:
                yield from problems
        except BaseException:  # a worker that was killed has not removed what it wrote
            for name in shards:
                if not (root / name / MANIFEST).is_file():
                    remove_unfinished(root, name)
            raise
        return
    all_keys = [key for keys in shards.values() for key in keys]
    with map_in_order(partial(load_sample, plan), all_keys, num_workers) as samples:
        for name, keys in shards.items():
            yield from write_shard(plan, root, name, itertools.islice(samples, len(keys)))


def _write_alone(plan: Plan, root: Path, name: str) -> Iterator[list[DataError]]:
    return write_shard(plan, root, name, map(partial(load_sample, plan), plan.shards[name]))


# ------------------------------------------------------------------------------------------------ inspection


def open_data(root: Path, data: LabelledData | None = None) -> Source:
    """Open what lies under ``root``: LMDB shards, or plain folders.

    Args:
        data: of a config; what it says of files counts where no manifest does.
    Raises:
        DataError: no data set is there.
    """
    there = [t for t in _types(root, data) if (root / t).is_dir()]
    return open_source(root, there, suffixes=data.suffixes if data else None)


def stored_types(source: Source, data: LabelledData | None = None) -> list[str]:
    """List the data types that every sample has."""
    return [t for t in _types(source.root, data) if source.has(t)]


def stored_conditions(root: Path, data: LabelledData | None = None) -> list[Condition]:
    """Return the dense conditions that the data set was built with, or those of ``data`` where no manifest says."""
    if not (root / MANIFEST).is_file():
        return list(data.conditions) if data else []
    return [Condition.model_validate(entry) for entry in read_json(root / MANIFEST).get("conditions", [])]


def _types(root: Path, data: LabelledData | None) -> list[str]:
    has_no_table = data is not None and not data.labels.num_classes
    files = [t for t in DATA_TYPES if t != "seg_maps" or not has_no_table]
    return [*files, *(condition.name for condition in stored_conditions(root, data))]


def stored_labels(root: Path) -> LabelSpec | None:
    """Return the label table that the data set was built with; None if another builder made it.

    Raises:
        DataError: its manifest holds no usable table.
    """
    if not (root / MANIFEST).is_file():
        return None
    try:
        return LabelSpec.model_validate_json(json.dumps(read_json(root / MANIFEST)["labels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / MANIFEST}: no usable label table: {error}") from None


def look_through(
    root: Path, labels: LabelSpec | None, num_workers: int | None, data: LabelledData | None = None
) -> Contents:
    """Read and check every sample as the builder does, and compare every file's checksum with the manifest's.

    Problems are collected, not raised. If a checksum differs, no sample is read: a damaged LMDB may end the process.
    """
    contents = Contents(problems=list(map(DataError, wrong_checksums(root))))
    if contents.problems:
        return contents
    source = open_data(root, data)
    images = data.images if data and not (root / MANIFEST).is_file() else built_spec(root)
    check = partial(_check, source, stored_types(source, data), labels, images, stored_conditions(root, data))
    with map_in_order(check, source.keys, num_workers) as samples:
        for sample in tqdm(samples, "reading", len(source.keys), unit="images", mininterval=0.5):
            contents.add(sample)
    return contents


def _check(
    source: Source, types: list[str], labels: LabelSpec | None, images: ImageSpec, conditions: list[Condition], key: str
) -> LoadedSample:
    sample, _ = check_sample(source, key, types, labels, images, conditions=conditions)
    sample.files = {}  # only counts travel between processes
    return sample


def extract(root: Path, key: str, folder: Path) -> list[Path]:
    """Write the files of one sample as ``folder/TYPE/KEY.ext``; return their paths.

    Raises:
        DataError: there is no such sample.
    """
    source = open_data(root)
    if key not in source.keys:
        near = ", ".join(source.keys[:3])
        raise DataError(f"{root}: no sample {key!r}; keys look like: {near}")
    written = []
    for t in stored_types(source):
        data = source.read(key, t)
        extension = next((name for magic, name in MAGIC if data.startswith(magic)), "bin")
        path = folder / t / f"{key}.{extension}"
        write_bytes(path, data)
        written.append(path)
    return written
