"""Write one shard, read it back, flush it to the disk and describe it in its ``manifest.json``.

Owns the manifest: its content, the sum over several shards, and its summary for people.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from imaginaire_spade.data.lmdb_source import MANIFEST, store_key
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import file_sha256, flush_folder, read_json, write_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.lmdb_writer import EnvironmentWriter, most_common, write_index
from imaginaire_spade.lmdb_builder.sample import Contents, LoadedSample, Plan
from imaginaire_spade.version import __version__

Manifest = dict[str, Any]


def write_shard(
    plan: Plan, name: str, samples: Iterable[LoadedSample], folder: Path, expected_bytes: Mapping[str, int]
) -> bool:
    """Write one shard, read it back and flush it.

    Args:
        samples: of its keys, in their order.
        folder: to make.
        expected_bytes: data type -> size of all its files, about.
    Returns:
        Whether the shard is finished: none of its samples is missing or has a problem.
    Raises:
        DataError, OSError, lmdb.Error: it cannot be written.
    """
    keys = plan.shards[name]
    digest = source_sha256(plan, name)  # before they are read: a file that changes meanwhile is noticed when resuming
    extensions: dict[str, dict[str, str]] = {t: {} for t in plan.data_types}
    contents = Contents()
    folder.mkdir(parents=True)
    writers: dict[str, EnvironmentWriter] = {}
    try:
        # Write the samples.
        for t in plan.data_types:
            writers[t] = EnvironmentWriter(folder / t, expected_bytes[t], len(keys))
        for sample in samples:
            if sample.problems:
                continue
            for t, data in sample.files.items():
                writers[t].put(store_key(sample.key), data)
                extensions[t][sample.key] = sample.recoded.get(t) or plan.source.extension(sample.key, t)
            contents.add(sample)
        if contents.num_samples < len(keys):
            return False
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abort()
    assert all(writer.num_items == len(keys) for writer in writers.values()), "a sample was lost"
    # Describe them.
    write_index(folder, keys, extensions)
    write_json(folder / MANIFEST, _manifest(plan, contents, extensions, digest, folder))
    for written in (*(folder / t for t in plan.data_types), folder):
        flush_folder(written)
    return True


def _manifest(
    plan: Plan, contents: Contents, extensions: Mapping[str, Mapping[str, str]], source_sha256: str, folder: Path
) -> Manifest:
    """Describe a shard whose files are complete."""
    files = {}
    for name in (f"{t}/data.mdb" for t in plan.data_types):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    classes = range(plan.labels.num_classes + 1)  # don't-care last
    pixels = [contents.class_pixels[i] for i in classes]
    counted = plan.check and "seg_maps" in plan.data_types
    return {
        "format": 1,
        "builder": f"imaginaire_spade {__version__}",
        "lmdb": ".".join(map(str, lmdb.version())),
        "num_samples": contents.num_samples,
        "data_types": {
            t: {
                "bytes": contents.num_bytes[t],
                "extension": (usual := most_common(extensions[t].values())),
                "other_extensions": {key: e for key, e in sorted(extensions[t].items()) if e != usual},
            }
            for t in plan.data_types
        },
        **plan.treatment(),
        "sizes_h_w": dict(sorted(contents.sizes.items())),
        "class_pixels": pixels if counted else None,
        "class_samples": [contents.class_samples[i] for i in classes] if counted else None,
        "class_shares": _shares(pixels) if counted else None,
        "labels": plan.labels.model_dump(mode="json"),
        "label_table": _label_table(plan.labels),
        "source_sha256": source_sha256,
        "shards": [{"path": ".", "num_samples": contents.num_samples, "files": files}],
    }


def source_sha256(plan: Plan, name: str) -> str:
    """Compute the digest by which a finished shard is recognised: of the names and sizes of all its source files."""
    digest = hashlib.sha256()
    for key in plan.shards[name]:
        num_bytes = {t: plan.source.total_size([key], t) for t in plan.data_types}
        digest.update(f"{key}\0{num_bytes}\n".encode())
    return digest.hexdigest()


def _shares(class_pixels: Sequence[int]) -> list[float]:
    """Return the share of all pixels: 0..1, rounded to a millionth."""
    total = max(1, sum(class_pixels))
    return [round(count / total, 6) for count in class_pixels]


def _label_table(labels: LabelSpec) -> dict[str, int | str]:
    """Map every raw id that may occur to its train id, or to "ignored"."""
    allowed = np.flatnonzero(labels.table != labels.error_id).tolist()
    ignored = labels.dont_care_id
    return {str(raw): "ignored" if labels.table[raw] == ignored else int(labels.table[raw]) for raw in allowed}


def join_manifests(manifests: Mapping[str, Manifest], left_out: Sequence[str]) -> Manifest:
    """Return the root's manifest: sums over the shards' (by path), and the files that the build ``left_out``."""
    parts = list(manifests.values())
    if list(manifests) == ["."]:
        return parts[0] | {"left_out": list(left_out)}
    sizes: Counter[str] = Counter()
    for part in parts:
        sizes.update(part["sizes_h_w"])
    counted = parts[0]["class_pixels"] is not None
    pixels = np.sum([part["class_pixels"] for part in parts], axis=0).tolist() if counted else []
    return parts[0] | {
        "num_samples": sum(part["num_samples"] for part in parts),
        "data_types": {
            t: {
                "bytes": sum(part["data_types"][t]["bytes"] for part in parts),
                "extension": most_common(part["data_types"][t]["extension"] for part in parts),
            }
            for t in parts[0]["data_types"]
        },
        "sizes_h_w": dict(sorted(sizes.items())),
        "class_pixels": pixels if counted else None,
        "class_samples": np.sum([part["class_samples"] for part in parts], axis=0).tolist() if counted else None,
        "class_shares": _shares(pixels) if counted else None,
        "source_sha256": hashlib.sha256("".join(part["source_sha256"] for part in parts).encode()).hexdigest(),
        "shards": [{**part["shards"][0], "path": name} for name, part in manifests.items()],
        "left_out": list(left_out),
    }


def wrong_checksums(root: Path) -> Iterator[str]:
    """Compare the files of a data set, or of one shard, with its manifest, if it has one.

    Yields:
        What differs, one line per file.
    Raises:
        DataError: the manifest does not list them.
    """
    if not (root / MANIFEST).is_file():
        return
    try:
        expected = {
            root / shard["path"] / name: entry["sha256"]
            for shard in read_json(root / MANIFEST)["shards"]
            for name, entry in shard["files"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{root / MANIFEST}: lists no files: build the data set again") from None
    for path, sha256 in expected.items():
        if not path.is_file():
            yield f"{path}: missing"
        elif file_sha256(path) != sha256:
            yield f"{path}: its checksum differs from the manifest's: copy it again, or build again (--resume mends it)"


def summary(manifest: Manifest, labels: LabelSpec, output: Path) -> str:
    """Describe in a few lines what a data set holds."""
    num_bytes = sum(entry["bytes"] for shard in manifest["shards"] for entry in shard["files"].values())
    lines = [
        f"{manifest['num_samples']} samples of {', '.join(manifest['data_types'])} in"
        f" {len(manifest['shards'])} shard(s), {num_bytes / 1e6:.1f} MB: {output}",
    ]
    if sizes := manifest["sizes_h_w"]:
        shown = ", ".join(f"{size} ({sizes[size]})" for size in sorted(sizes, key=lambda s: (-sizes[s], s))[:5])
        lines.append(f"sizes (height x width): {shown}{f' and {len(sizes) - 5} more' if len(sizes) > 5 else ''}")
    if not manifest["checked"]:
        lines.append("nothing was decoded or checked (--no_check)")
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
    return "\n".join(lines)
