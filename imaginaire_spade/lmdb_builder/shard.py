"""Write one shard, read it back, flush it to disk and describe it in its ``manifest.json``.

Owns the manifest: its content, the sum over several shards, and its summary for people.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from imaginaire_spade.data.lmdb_source import MANIFEST, EnvironmentWriter, most_common, store_key, write_index
from imaginaire_spade.files import file_sha256, flush_folder, write_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.sample import LoadedSample, Plan
from imaginaire_spade.version import __version__

Manifest = dict[str, Any]


def write_shard(
    plan: Plan,
    keys: Sequence[str],
    samples: Iterable[LoadedSample],
    folder: Path,
    expected_bytes: Mapping[str, int],
) -> Manifest:
    """Write one shard, read it back, flush it and return its manifest.

    Args:
        keys: in the order of their store keys.
        samples: of these keys, in this order, without problems.
        folder: to make.
        expected_bytes: data type -> size of all its files, about.
    Raises:
        DataError, OSError, lmdb.Error: it cannot be written.
    """
    source_digest = hashlib.sha256()
    extensions: dict[str, dict[str, str]] = {t: {} for t in plan.data_types}
    pixels: Counter[int] = Counter()
    holding: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    folder.mkdir(parents=True)
    writers: dict[str, EnvironmentWriter] = {}
    try:
        for t in plan.data_types:
            writers[t] = EnvironmentWriter(folder / t, expected_bytes[t], len(keys))
        for sample in samples:
            _add_source(source_digest, sample.key, sample.source_bytes)
            for t, data in sample.files.items():
                writers[t].put(store_key(sample.key), data)
                extensions[t][sample.key] = sample.extensions[t]
            pixels.update(sample.class_pixels)
            holding.update(sample.class_pixels.keys())
            if sample.size:
                sizes[f"{sample.size[0]}x{sample.size[1]}"] += 1
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    assert all(writer.num_items == len(keys) for writer in writers.values()), "a sample was lost"
    write_index(folder, keys, extensions)
    files = {}
    for name in (f"{t}/data.mdb" for t in plan.data_types):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    classes = range(plan.labels.num_classes + 1)  # don't-care last
    counted = plan.check and "seg_maps" in plan.data_types
    manifest = {
        "format": 1,
        "builder": f"imaginaire_spade {__version__}",
        "lmdb": ".".join(map(str, lmdb.version())),
        "num_samples": len(keys),
        "data_types": {
            t: {
                "bytes": writers[t].num_bytes,
                "extension": (usual := most_common(extensions[t].values())),
                "other_extensions": {key: e for key, e in sorted(extensions[t].items()) if e != usual},
            }
            for t in plan.data_types
        },
        **plan.treatment(),
        "sizes_h_w": dict(sorted(sizes.items())),
        "class_pixels": [pixels[i] for i in classes] if counted else None,
        "class_samples": [holding[i] for i in classes] if counted else None,
        "class_shares": _shares([pixels[i] for i in classes]) if counted else None,
        "labels": plan.labels.model_dump(mode="json"),
        "label_table": _label_table(plan.labels),
        "source_sha256": source_digest.hexdigest(),
        "shards": [{"path": ".", "num_samples": len(keys), "files": files}],
    }
    write_json(folder / MANIFEST, manifest)
    for written in (*(folder / t for t in plan.data_types), folder):
        flush_folder(written)
    return manifest


def source_sha256(plan: Plan, keys: Sequence[str]) -> str:
    """Of the names and sizes of all files that a shard is made of: by it a finished shard is known again."""
    digest = hashlib.sha256()
    for key in keys:
        _add_source(digest, key, {t: plan.source.total_size([key], t) for t in plan.data_types})
    return digest.hexdigest()


def _add_source(digest: Any, key: str, num_bytes: Mapping[str, int]) -> None:
    digest.update(f"{key}\0{num_bytes}\n".encode())


def _shares(class_pixels: Sequence[int]) -> list[float]:
    """Of all pixels: 0..1, rounded to a millionth."""
    total = max(1, sum(class_pixels))
    return [round(count / total, 6) for count in class_pixels]


def _label_table(labels: LabelSpec) -> dict[str, int | str]:
    """Raw id -> train id, of every raw id that may occur."""
    allowed = np.flatnonzero(labels.table != labels.error_id).tolist()
    ignored = labels.dont_care_id
    return {str(raw): "ignored" if labels.table[raw] == ignored else int(labels.table[raw]) for raw in allowed}


def join_manifests(manifests: Mapping[str, Manifest], left_out: Sequence[str]) -> Manifest:
    """The root's manifest: sums over the shards' (by path), and the files that were ``left_out`` of the build."""
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


def summary(manifest: Manifest, labels: LabelSpec, output: Path) -> str:
    """What a data set holds, for people."""
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
