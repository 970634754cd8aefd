"""Write one shard, read it back, flush it to the disk and describe it in its ``manifest.json``.

Responsible for how LMDBs and their index are written, in imaginaire's format (``data/lmdb_source.py`` describes it),
and the manifest: its content, the sum over several shards, and its summary for people.
"""

import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.folders import split_key
from imaginaire_spade.data.lmdb_source import FILENAMES, MANIFEST, METADATA, stated_files, store_key
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import file_sha256, flush_folder, read_json, write_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.doubts import describe_doubts, refuse_useless
from imaginaire_spade.lmdb_builder.sample import Contents, LoadedSample, PhotoFacts, Plan
from imaginaire_spade.version import __version__

Manifest = dict[str, Any]
_CHUNK_BYTES = 16 << 20
_DIGESTS = ("source_sha256", "source_stamps_sha256", "source_contents_sha256")


def write_shard(plan: Plan, root: Path, name: str, samples: Iterable[LoadedSample]) -> Iterator[list[DataError]]:
    """Write one shard, read it back, flush and name it, unless a sample of it is missing or has a problem (which
    ``plan.skip_bad`` leaves out).

    Args:
        samples: of its keys, in their order.
    Yields:
        The problems of each sample.
    Raises:
        DataError, OSError, lmdb.Error: it cannot be written. Nothing is left of it.
    """
    keys = plan.shards[name]
    source = _source_digests(plan, name)  # before they are read: a file that changes meanwhile is noticed when resuming
    checksums = hashlib.sha256()
    extensions: dict[str, dict[str, str]] = {t: {} for t in plan.data_types}
    contents, bad = Contents(), dict[str, str]()
    folder = root if name == "." else root / f"{name}.tmp"
    with ExitStack() as unfinished:
        unfinished.callback(remove_unfinished, root, name)
        shutil.rmtree(folder, ignore_errors=True)
        with ExitStack() as opened:
            # Write the samples.
            writers = {t: opened.enter_context(closing(EnvironmentWriter(folder / t))) for t in plan.data_types}
            for sample in samples:
                checksums.update(repr((sample.key, sorted(sample.checksums.items()))).encode())
                if not sample.problems:
                    for t, data in sample.files.items():
                        writers[t].put(store_key(sample.key), data)
                        extensions[t][sample.key] = sample.recoded.get(t) or plan.source.extension(sample.key, t)
                    contents.add(sample)
                elif plan.skip_bad:
                    bad[sample.key] = "; ".join(map(str, sample.problems))
                yield sample.problems
            if contents.num_samples + len(bad) < len(keys):
                return
            keys = [key for key in keys if key not in bad]
            for writer in writers.values():
                writer.finish(len(keys))
        # Describe them.
        write_index(folder, keys, extensions)
        source |= {"source_contents_sha256": checksums.hexdigest()}
        write_json(folder / MANIFEST, _manifest(plan, contents, extensions, folder) | source | {"bad": bad})
        for written in (*(folder / t for t in plan.data_types), folder):
            flush_folder(written)
        # Name the shard.
        if name != ".":
            shutil.rmtree(root / name, ignore_errors=True)  # (--no-resume)
            folder.replace(root / name)
            flush_folder(root)
        unfinished.pop_all()


def remove_unfinished(root: Path, name: str) -> None:
    """Remove what was written of a shard that has no final name yet, and ``root`` if it holds nothing else."""
    shutil.rmtree(root if name == "." else root / f"{name}.tmp", ignore_errors=True)
    remove_if_empty(root)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    with suppress(OSError):
        folder.rmdir()


class EnvironmentWriter:
    """A new LMDB environment, ``folder/data.mdb``; the same items give the same file, byte for byte.

    Every commit reads its values back and compares them with the originals.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._chunk: list[tuple[bytes, bytes]] = []
        self._pending = 0
        self._map_size = 1 << 20
        self._env = self._open()

    def _open(self) -> lmdb.Environment:
        # 0o777 less what the umask takes away; LMDB leaves out the right to execute.
        return lmdb.open(str(self._folder), map_size=self._map_size, lock=False, sync=False, mode=0o777)

    def put(self, key: bytes, value: bytes) -> None:
        """Add an item; keys must come in ascending order.

        Raises:
            OSError, lmdb.Error: the disk is full, or the like.
            DataError: a value reads back differently.
        """
        self._chunk.append((key, value))
        self._pending += len(value)
        if self._pending >= _CHUNK_BYTES:
            self._commit()
            # What was read back counts as this process's memory as long as it is mapped.
            self._env.close()
            self._env = self._open()

    def finish(self, num_items: int) -> None:
        """Write what is left, and flush to disk.

        Raises:
            OSError, lmdb.Error, DataError: as ``put``; or the file holds another number of items.
        """
        self._commit()
        self._env.sync(True)
        if (entries := self._env.stat()["entries"]) != num_items:
            raise DataError(f"{self._folder}: {entries} entries of {num_items} written")

    def close(self) -> None:
        """Leave the file as it is."""
        self._env.close()

    def _commit(self) -> None:
        self._map_size += self._pending + 8192 * len(self._chunk)  # beside its bytes, an item takes less than two pages
        self._env.set_mapsize(self._map_size)
        with self._env.begin(write=True) as transaction:
            for key, value in self._chunk:
                transaction.put(key, value, append=True)
        with self._env.begin() as transaction:
            for key, value in self._chunk:
                if transaction.get(key) != value:
                    raise DataError(f"{self._folder}: {key.decode()} reads back differently: is the disk failing?")
        self._chunk, self._pending = [], 0


def write_index(shard: Path, keys: Sequence[str], extensions: Mapping[str, Mapping[str, str]]) -> None:
    """Write ``all_filenames.json`` and ``metadata.json``.

    Args:
        extensions: data type -> key -> extension. imaginaire knows one per type: the most common one is written.
    """
    stems: dict[str, list[str]] = {}
    for key in sorted(keys, key=split_key):
        sequence, stem = split_key(key)
        stems.setdefault(sequence, []).append(stem)
    write_json(shard / FILENAMES, stems)
    write_json(shard / METADATA, {t: _most_common(by_key.values()) for t, by_key in extensions.items()})


def _most_common(words: Iterable[str]) -> str:
    """Return the most frequent word; of equally frequent ones the first in the alphabet."""
    counts = Counter(words)
    return min(counts, key=lambda word: (-counts[word], word), default="")


def _manifest(plan: Plan, contents: Contents, extensions: Mapping[str, Mapping[str, str]], folder: Path) -> Manifest:
    """Describe a shard whose files are complete."""
    files = {}
    for name in (f"{t}/data.mdb" for t in plan.data_types):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    is_counted = plan.check and "seg_maps" in plan.data_types

    def by_class(counts: Counter[int]) -> list[int] | None:
        return [counts[i] for i in range(plan.labels.num_classes + 1)] if is_counted else None  # don't-care last

    return {
        "format": 1,
        "builder": f"imaginaire_spade {__version__}",
        "lmdb": ".".join(map(str, lmdb.version())),
        "num_samples": contents.num_samples,
        "data_types": {
            t: {
                "bytes": contents.num_bytes[t],
                "extension": (usual := _most_common(extensions[t].values())),
                "other_extensions": {key: e for key, e in sorted(extensions[t].items()) if e != usual},
            }
            for t in plan.data_types
        },
        **plan.treatment(),
        "images": {"spec": plan.images.model_dump(mode="json"), **vars(contents.photos)},
        "sizes_h_w": dict(sorted(contents.sizes.items())),
        "class_pixels": (pixels := by_class(contents.class_pixels)),
        "class_samples": by_class(contents.class_samples),
        "class_shares": _shares(pixels),
        "doubts": dict(contents.doubts),
        "same_label_map": max(contents.label_checksums.items(), key=lambda entry: entry[1], default=None),
        "labels": plan.labels.model_dump(mode="json"),
        "label_table": _label_table(plan.labels),
        "shards": [{"path": ".", "num_samples": contents.num_samples, "files": files}],
    }


def _source_digests(plan: Plan, name: str) -> dict[str, str]:
    """Compute two digests by which a finished shard is recognised: of the names and sizes of all its source files, and
    of their time stamps as well. (The third, of their contents, comes from the build.)"""
    stamps = np.stack([plan.source.file_stamps(plan.shards[name], t) for t in plan.data_types], 1)
    form = "%s\0{" + ", ".join(f"{t!r}: %d" for t in plan.data_types) + "}\n"
    sizes = zip(plan.shards[name], *stamps[..., 0].T.tolist(), strict=True)
    return {
        "source_sha256": hashlib.sha256("".join([form % entry for entry in sizes]).encode()).hexdigest(),
        "source_stamps_sha256": hashlib.sha256(stamps[..., 1].tobytes()).hexdigest(),
    }


def find_problem(shard: Path, plan: Plan, name: str) -> str:
    """Say why a finished shard has to be built again: it is damaged, or its source has changed; else return "".

    Raises:
        DataError: it belongs to another build.
    """
    source, damaged = _source_digests(plan, name), "is damaged (its checksum differs)"
    try:
        manifest = read_json(shard / MANIFEST)
        differs = _difference(manifest, plan, source)
        is_damaged = any(wrong_checksums(shard))
    except (KeyError, TypeError, OSError, DataError):
        return damaged
    if differs:
        raise DataError(f"{shard} was built with {differs}: use --overwrite to build anew")
    return damaged if is_damaged else _find_changed(shard, manifest, plan, name, source)


def _find_changed(shard: Path, manifest: Manifest, plan: Plan, name: str, source: dict[str, str]) -> str:
    """Say which source files, of the same sizes, hold something else than a shard was built from, or return "".

    Files are read only if a time stamp differs; if they hold the same all the same, the manifest gets the new stamps.
    A manifest of an earlier version has neither stamps nor contents: files that are newer than it count as changed.
    """
    if manifest.get("source_stamps_sha256") == source["source_stamps_sha256"]:
        return ""
    keys, built_at = plan.shards[name], (shard / MANIFEST).stat().st_mtime_ns
    stamps = {t: plan.source.file_stamps(keys, t)[:, 1] for t in plan.data_types}
    newer = [
        plan.source.describe(keys[i], t) for t, at in stamps.items() for i in (at > built_at).nonzero()[0].tolist()
    ]
    if stated := manifest.get("source_contents_sha256"):
        contents = hashlib.sha256()
        for key in plan.shards[name]:
            found = {t: zlib.crc32(plan.source.read(key, t)) for t in plan.data_types}
            contents.update(repr((key, sorted(found.items()))).encode())
        if contents.hexdigest() == stated:
            with suppress(OSError):  # a data set that cannot be written is checked again the next time
                write_json(shard / MANIFEST, manifest | source)
            return ""
    elif not newer:
        return ""
    what = f"{len(newer)} newer file(s), such as {newer[0]}" if newer else "other contents under the same names"
    return f"was built before its source changed ({what})"


def _difference(manifest: Manifest, plan: Plan, source: Mapping[str, str]) -> str:
    """Name what a shard differs in from the plan, or return ""."""
    manifest = {"images": {"spec": ImageSpec().model_dump(mode="json")}} | manifest  # (older ones lack it)
    before, now = LabelSpec.model_validate_json(json.dumps(manifest["labels"])), plan.labels
    if before.model_copy(update={"absent": now.absent}) != now:
        return "another label table"
    if manifest.get("bad") and not plan.skip_bad:
        return "--skip_bad"
    if manifest["images"]["spec"] != plan.images.model_dump(mode="json"):
        return "another data.images"
    if list(manifest["data_types"]) != list(plan.data_types):
        return f"other data types ({', '.join(manifest['data_types'])})"
    treatment = {"conditions": [], **plan.treatment()}
    if any(manifest.get(key, []) != planned for key, planned in treatment.items()):
        return "another --resize_smallest_side, --quality, --recode_maps, --no_check or data.conditions"
    return "" if manifest["source_sha256"] == source["source_sha256"] else "another set of samples or files"


def _shares(class_pixels: Sequence[int] | None) -> list[float] | None:
    """Return the share of all pixels: 0..1, rounded to a millionth; None if they were not counted."""
    if class_pixels is None:
        return None
    total = max(1, sum(class_pixels))
    return [round(count / total, 6) for count in class_pixels]


def _label_table(labels: LabelSpec) -> dict[str, int | str]:
    """Map every raw id that may occur to its train id, or to "ignored"."""
    ignored = labels.dont_care_id
    return {str(raw): "ignored" if labels.table[raw] == ignored else int(labels.table[raw]) for raw in labels.known_ids}


def join_manifests(manifests: Mapping[str, Manifest], left_out: Sequence[str], plan: Plan) -> Manifest:
    """Return the root's manifest: sums over the shards' (by path), and the files that the build ``left_out``.

    Raises:
        DataError: the data set is useless.
    """
    parts = list(manifests.values())
    bad = {key: problem for part in parts for key, problem in part.get("bad", {}).items()}
    rest = {"bad": bad, "num_bad": len(bad), "left_out": list(left_out)}
    sizes = sum((Counter(part["sizes_h_w"]) for part in parts), Counter[str]())
    same = Counter[int]()
    for checksum, count in filter(None, (part.get("same_label_map") for part in parts)):
        same[checksum] += count

    photos = PhotoFacts()
    for images in (part.get("images", {}) for part in parts):  # (older ones lack it)
        photos.add(images.get("values", []), images.get("found", {}))

    def total(counts: str) -> Any:
        return None if parts[0][counts] is None else np.sum([part[counts] for part in parts], axis=0).tolist()

    joined = parts[0] | {
        "num_samples": sum(part["num_samples"] for part in parts),
        "data_types": {
            t: {
                "bytes": sum(part["data_types"][t]["bytes"] for part in parts),
                "extension": _most_common(part["data_types"][t]["extension"] for part in parts),
            }
            for t in parts[0]["data_types"]
        },
        "images": parts[0].get("images", {}) | vars(photos),
        "sizes_h_w": dict(sorted(sizes.items())),
        "class_pixels": total("class_pixels"),
        "class_samples": total("class_samples"),
        "class_shares": _shares(total("class_pixels")),
        "doubts": dict(sum((Counter(part.get("doubts", {})) for part in parts), Counter[str]())),
        "same_label_map": [*max(same.items(), key=lambda entry: entry[1], default=())],
        **{d: hashlib.sha256("".join(p.get(d, "") for p in parts).encode()).hexdigest() for d in _DIGESTS},
        "shards": [{**part["shards"][0], "path": name} for name, part in manifests.items()],
        **rest,
    }
    if list(manifests) == ["."]:
        joined = parts[0] | rest
    refuse_useless(joined, plan.labels, plan.source.root)
    return joined


def wrong_checksums(root: Path) -> Iterator[str]:
    """Compare the files of a data set, or of one shard, with its manifest, if it has one.

    Yields:
        What differs, one line per file.
    Raises:
        DataError: the manifest does not list them.
    """
    for path, (_, sha256) in stated_files(root).items():
        if not path.is_file():
            yield f"{path}: missing"
        elif file_sha256(path) != sha256:
            yield f"{path}: its checksum differs from the manifest's: copy it again, or build again (--resume mends it)"


def bad_files(output: Path) -> Path:
    """Return the file beside a data set that names the samples that were left out of it."""
    return output.with_name(f"{output.name}.bad_files.txt")


def summary(manifest: Manifest, labels: LabelSpec, output: Path) -> str:
    """Describe in a few lines what a data set holds."""
    num_bytes = sum(entry["bytes"] for shard in manifest["shards"] for entry in shard["files"].values())
    lines = [
        f"{manifest['num_samples']} samples of {', '.join(manifest['data_types'])} in"
        f" {len(manifest['shards'])} shard(s), {num_bytes / 1e6:.1f} MB: {output}"
    ]
    if sizes := manifest["sizes_h_w"]:
        shown = ", ".join(f"{size} ({sizes[size]})" for size in sorted(sizes, key=lambda s: (-sizes[s], s))[:5])
        lines.append(f"sizes (height x width): {shown}{f' and {len(sizes) - 5} more' if len(sizes) > 5 else ''}")
    images = manifest.get("images", {})
    if images.get("values"):
        meant = images["spec"]["range"] if images["spec"]["range"] != "auto" else images["values"]
        lines.append(f"photos: values {images['values']}; {meant} become -1 and 1 in training")
    for note, (number, keys) in images.get("found", {}).items():
        lines.append(f"photos: {number} {note}: {', '.join(keys)}{' ...' * (number > len(keys))}")
    if not manifest["checked"]:
        lines.append("nothing was decoded or checked (--no_check)")
    if number := manifest.get("num_bad"):
        lines.append(f"left out {number} sample(s) that cannot be used (--skip_bad): {bad_files(output)} lists them")
    if manifest["class_pixels"] is None:
        return "\n".join(lines)
    pixels = np.array(manifest["class_pixels"], np.float64)
    shares = 100 * pixels / max(1.0, pixels.sum())
    order = sorted(np.flatnonzero(pixels).tolist(), key=lambda i: (-shares[i], i))
    lines += ["share of pixels:", *(f"  {shares[i]:6.2f} %  {i:>5}  {labels.name(i)}" for i in order[:15])]
    if len(order) > 15:
        rest = sum(shares[i] for i in order[15:])
        lines.append(f"  {rest:6.2f} %         {len(order) - 15} more (all in {MANIFEST})")
    absent = [labels.name(i) for i in range(labels.num_classes) if not pixels[i]]
    if absent:
        more = f" ... ({len(absent)} classes)" if len(absent) > 10 else ""
        lines.append(f"never occur: {', '.join(absent[:10])}{more}")
    return "\n".join([*lines, *describe_doubts(manifest, labels)])
