"""One shard of a data set: written, read back, flushed to disk and described by its ``manifest.json``.

Owns the manifest: its content, the sum over several shards, and its summary for people.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from tqdm import tqdm

from imaginaire_spade.data.check import Checked, Plan
from imaginaire_spade.data.store import MANIFEST, most_common, store_key, write_environment, write_index, write_json
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec

Manifest = dict[str, Any]


def write_shard(
    plan: Plan, keys: Sequence[str], checked: Mapping[str, Checked], folder: Path, progress: str
) -> Manifest:
    """Write, verify and flush one shard; return its manifest."""
    ordered = sorted(keys, key=store_key)
    source = plan.source
    extensions = {t: {key: source.path(key, t).suffix[1:].lower() for key in keys} for t in plan.data_types}
    num_bytes = {t: sum(source.size(key, t) for key in keys) for t in plan.data_types}
    folder.mkdir(parents=True)
    with tqdm(total=len(keys) * len(plan.data_types), desc=progress, unit="files", mininterval=0.5) as bar:
        for t in plan.data_types:
            items = ((store_key(key), partial(source.read, key, t)) for key in _counted(ordered, bar))
            write_environment(folder / t, items, len(keys), num_bytes[t])
            _verify(folder / t, [(store_key(key), checked[key].digests[t]) for key in ordered])
    write_index(folder, keys, extensions)
    files = {}
    for name in (f"{t}/data.mdb" for t in plan.data_types):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    pixels: Counter[int] = Counter()
    for key in keys:
        pixels.update(checked[key].class_pixels)
    sizes = Counter(f"{h}x{w}" for h, w in (checked[key].size for key in keys))
    manifest = {
        "format": 1,
        "builder": f"imaginaire_spade {_package_version()}",
        "lmdb": ".".join(map(str, lmdb.version())),
        "num_samples": len(keys),
        "data_types": {
            t: {
                "bytes": num_bytes[t],
                "extension": (usual := most_common(extensions[t].values())),
                "other_extensions": {key: e for key, e in sorted(extensions[t].items()) if e != usual},
            }
            for t in plan.data_types
        },
        "sizes_h_w": dict(sorted(sizes.items())),
        "class_pixels": [pixels[i] for i in range(plan.labels.num_classes + 1)],  # don't-care last
        "labels": plan.labels.model_dump(mode="json"),
        "label_table": _label_table(plan.labels),
        "shards": [{"path": ".", "num_samples": len(keys), "files": files}],
    }
    write_json(folder / MANIFEST, manifest)
    for written in (*(folder / t for t in plan.data_types), folder):
        flush_folder(written)
    return manifest


def _counted(keys: Sequence[str], bar: Any) -> Iterator[str]:
    for key in keys:
        yield key
        bar.update()


def _verify(folder: Path, expected: Sequence[tuple[bytes, bytes]]) -> None:
    """Read an LMDB back. Raises DataError unless it holds exactly ``expected`` (key, sha256)."""
    with (
        lmdb.open(str(folder), readonly=True, lock=False, create=False) as environment,
        environment.begin(buffers=True) as transaction,
    ):
        count = 0
        for (key, digest), (found, value) in zip(expected, transaction.cursor(), strict=False):
            if bytes(found) != key or hashlib.sha256(value).digest() != digest:
                raise DataError(f"{folder}: {key.decode()} reads back differently (did the file change meanwhile?)")
            count += 1
        if count != len(expected) or environment.stat()["entries"] != count:
            entries = environment.stat()["entries"]
            raise DataError(f"{folder}: {entries} entries read back, {len(expected)} were written")


def _label_table(labels: LabelSpec) -> dict[str, int | str]:
    """Raw id -> train id, of every raw id that may occur."""
    allowed = np.flatnonzero(labels.table != labels.error_id).tolist()
    ignored = labels.dont_care_id
    return {str(raw): "ignored" if labels.table[raw] == ignored else int(labels.table[raw]) for raw in allowed}


def join_manifests(manifests: Mapping[str, Manifest]) -> Manifest:
    """The root's manifest: sums over the shards' (by path). A shard that is the root itself keeps its own."""
    parts = list(manifests.values())
    if list(manifests) == ["."]:
        return parts[0]
    sizes: Counter[str] = Counter()
    for part in parts:
        sizes.update(part["sizes_h_w"])
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
        "class_pixels": np.sum([part["class_pixels"] for part in parts], axis=0).tolist(),
        "shards": [{**part["shards"][0], "path": name} for name, part in manifests.items()],
    }


def flush_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _package_version() -> str:
    try:
        return version("imaginaire_spade")
    except PackageNotFoundError:  # a checkout that is not installed
        return "(not installed)"


def summary(manifest: Manifest, labels: LabelSpec, output: Path, seconds: float) -> str:
    """What was built, for people."""
    sizes = manifest["sizes_h_w"]
    shown = ", ".join(f"{size} ({sizes[size]})" for size in sorted(sizes, key=lambda s: (-sizes[s], s))[:5])
    num_bytes = sum(entry["bytes"] for shard in manifest["shards"] for entry in shard["files"].values())
    pixels = np.array(manifest["class_pixels"], np.float64)
    shares = 100 * pixels / max(1.0, pixels.sum())
    order = sorted(np.flatnonzero(pixels).tolist(), key=lambda i: (-shares[i], i))
    lines = [
        f"{manifest['num_samples']} samples of {', '.join(manifest['data_types'])} in"
        f" {len(manifest['shards'])} shard(s), {num_bytes / 1e6:.1f} MB: {output}",
        f"sizes (height x width): {shown}{f' and {len(sizes) - 5} more' if len(sizes) > 5 else ''}",
        "share of pixels:",
        *(f"  {shares[i]:6.2f} %  {i:>5}  {labels.name(i)}" for i in order[:15]),
    ]
    if len(order) > 15:
        rest = sum(shares[i] for i in order[15:])
        lines.append(f"  {rest:6.2f} %         {len(order) - 15} more (all in {MANIFEST})")
    absent = [labels.name(i) for i in range(labels.num_classes) if not pixels[i]]
    if absent:
        more = f" ... ({len(absent)} classes)" if len(absent) > 10 else ""
        lines.append(f"never occur: {', '.join(absent[:10])}{more}")
    lines.append(f"{seconds:.1f} s, {manifest['num_samples'] / max(seconds, 1e-9):.0f} samples/s")
    return "\n".join(lines)
