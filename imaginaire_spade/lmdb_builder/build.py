"""Build a verified LMDB data set from raw folders (``scripts/build_lmdb.py``), in one process or many.

Owns the order of a build: refuse what cannot work, build shard by shard (read, check, write, read back, rename), and
join the shards' manifests. A shard appears under its final name only when it is complete and verified. Nothing is
agreed on between processes: each builds the shards of its rank, and whoever finishes last finds all of them there.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from imaginaire_spade.data.store import MANIFEST, store_key
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import flush_folder, read_json, write_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.output import (
    check_free_space,
    check_output,
    choose_root,
    disk_errors,
    hold_shards,
    kept_shards,
    locked,
    move_into_place,
    remove_if_empty,
)
from imaginaire_spade.lmdb_builder.sample import LoadedSample, Plan, load_sample
from imaginaire_spade.lmdb_builder.selection import select_samples
from imaginaire_spade.lmdb_builder.shard import Manifest, join_manifests, write_shard
from imaginaire_spade.lmdb_builder.workers import count_workers, map_in_order

MAX_PROBLEMS = 20
"""A build stops after this many."""


def build_dataset(
    data_root: str | Path,
    output_root: str | Path,
    labels: LabelSpec,
    *,
    edges: str = "none",
    data_types: Sequence[str] | None = None,
    num_shards: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    drop_unpaired: bool = False,
    input_list: str | Path | None = None,
    check: bool = True,
    resize_smallest_side: int | None = None,
    quality: int = 95,
    recode_maps: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Manifest | None:
    """Build the data set, or this process's shards of it.

    Args:
        edges: ``data.edges`` of the config; "file" requires edge_maps/, "instances" requires inst_maps/.
        data_types: what to build; None: images, seg_maps, what ``edges`` needs, and the other folders that exist.
        num_shards: with 1 the root itself is the shard. None: one per process.
        num_workers: processes that read and check what this one writes; None: min(8, cores); 0: this process alone.
        overwrite: replace an existing data set, once the new one is complete.
        resume: keep verified shards of an earlier, interrupted build of the same data.
        drop_unpaired: build from the samples that have all data types.
        input_list: file with one key per line (an extension is ignored): build from these samples only.
        check: decode every file and compare sizes and label values with the table.
        resize_smallest_side, quality: shrink what is larger; JPEGs are then written with this quality.
        recode_maps: re-encode label, edge and instance maps, with the same integers, so that they decode faster.
        rank, world_size: build every ``world_size``-th shard, from number ``rank`` on.
    Returns:
        The root's manifest; None if another process completes (or completed) the data set.
    Raises:
        DataError: with every problem found, up to ``MAX_PROBLEMS``. Nothing incomplete is left under a final name.
    """
    raw, output = Path(data_root), Path(output_root).absolute()
    num_shards = world_size if num_shards is None else num_shards
    if num_shards < world_size or (num_workers is not None and num_workers < 0):
        raise DataError(
            f"--num_shards {num_shards} --num_workers {num_workers}: write at least {world_size} shard(s), one per"
            " process, and 0 workers"
        )
    if resize_smallest_side is not None and (resize_smallest_side < 1 or not check or not 1 <= quality <= 100):
        raise DataError("--resize_smallest_side takes at least 1, with --quality 1..100, and excludes --no_check")
    if recode_maps and not check:
        raise DataError("--recode_maps decodes every map, which --no_check excludes: write one of the two")
    check_output(raw, output, overwrite, resume)
    source, types, left_out = select_samples(
        raw,
        edges=edges,
        data_types=data_types,
        drop_unpaired=drop_unpaired,
        input_list=None if input_list is None else Path(input_list),
        shrinks=resize_smallest_side is not None,
        silent=rank > 0,
    )
    if num_shards > len(source.keys):
        raise DataError(f"--num_shards {num_shards}: more shards than samples ({len(source.keys)})")
    parts = _divide(source.keys, num_shards)
    plan = Plan(source, labels, types, check, resize_smallest_side, quality, recode_maps)
    own = list(parts)[rank::world_size]
    with hold_shards(output, range(num_shards)[rank::world_size]):
        build = _Build(plan, parts, choose_root(output, num_shards, overwrite))
        # Existing output may be deleted if ``overwrite`` is set or it is our own temporary folder.
        may_clear = world_size == 1 and (overwrite or build.root != output)
        try:
            kept = build.keep(own, resume, may_clear)
        except DataError as error:
            if not overwrite:
                raise
            raise DataError(
                f"{error}. Of several processes none may clear it away from under the others: remove {build.root}"
                " yourself, then start them again"
            ) from None
        if kept:
            prefix = f"rank {rank}: " * (rank > 0)
            print(f"{prefix}resuming: {len(kept)} of {len(own)} shard(s) are complete and verified")
        todo = [name for name in own if name not in kept]
        num_bytes = {name: {t: source.total_size(parts[name], t) for t in types} for name in todo}
        total_bytes = sum(sum(by_type.values()) for by_type in num_bytes.values())
        check_free_space(output, total_bytes)
        with disk_errors(output, total_bytes):
            build.write(num_bytes, count_workers(num_workers, world_size), silent=rank > 0)
            with locked(output):
                return build.join(output, left_out)


def _divide(keys: Sequence[str], num_shards: int) -> dict[str, list[str]]:
    """Map the path of each shard to its keys. One shard after the other, they are in the folder's order."""
    cuts = [len(keys) * i // num_shards for i in range(num_shards + 1)]
    names = ["."] if num_shards == 1 else [f"shard_{i:05d}" for i in range(num_shards)]
    pairs = zip(names, itertools.pairwise(cuts), strict=True)
    return {name: sorted(keys[start:end], key=store_key) for name, (start, end) in pairs}


@dataclass(frozen=True)
class _Build:
    plan: Plan
    parts: Mapping[str, Sequence[str]]
    """Path of every shard -> its keys."""
    root: Path

    def keep(self, names: Sequence[str], resume: bool, may_clear: bool) -> list[str]:
        """List the finished shards among ``names``; remove other existing output if that is allowed."""
        try:
            if resume:
                return kept_shards(self.root, self.parts, names, self.plan)
        except DataError:
            if not may_clear:
                raise
        if may_clear:
            shutil.rmtree(self.root, ignore_errors=True)
        return []

    def write(self, num_bytes: Mapping[str, Mapping[str, int]], workers: int, silent: bool) -> None:
        """Write shards one after the other, while workers read and check the samples ahead.

        Args:
            num_bytes: path of each shard to write -> data type -> size of its files.
        Raises:
            DataError: with the problems of all samples, up to ``MAX_PROBLEMS``. Shards without one are finished.
        """
        keys = [key for name in num_bytes for key in self.parts[name]]
        seen = 0
        problems: list[str] = []

        def count(samples: Iterable[LoadedSample]) -> Iterator[LoadedSample]:
            nonlocal seen
            for sample in tqdm(samples, "building", len(keys), unit="images", mininterval=0.5, disable=silent):
                seen += 1
                yield sample

        try:
            with map_in_order(partial(load_sample, self.plan), keys, workers) as results:
                samples = count(results)
                for name in num_bytes:
                    if len(problems) < MAX_PROBLEMS:
                        own = itertools.islice(samples, len(self.parts[name]))
                        problems += self._write_one(name, num_bytes[name], own, MAX_PROBLEMS - len(problems))
        finally:
            remove_if_empty(self.root)
        if problems:
            rest = f" (checking stopped after sample {seen} of {len(keys)})" if seen < len(keys) else ""
            finished = sum((self.root / name / MANIFEST).is_file() for name in self.parts)
            state = f"{finished} finished shard(s) are kept" if finished else "nothing was built"
            listed = "\n  ".join(problems[:MAX_PROBLEMS])
            raise DataError(f"{self.plan.source.root}: {len(problems)} problem(s), {state}{rest}:\n  {listed}")

    def _write_one(
        self, name: str, num_bytes: Mapping[str, int], samples: Iterable[LoadedSample], max_problems: int
    ) -> list[str]:
        """Write one shard in its temporary folder and rename it, or return its samples' problems."""
        folder = self.root if name == "." else self.root / f"{name}.tmp"
        is_finished = False
        shutil.rmtree(folder, ignore_errors=True)
        try:
            problems = write_shard(self.plan, self.parts[name], samples, folder, num_bytes, max_problems)
            is_finished = not problems
        finally:
            if not is_finished:
                shutil.rmtree(folder, ignore_errors=True)
        if is_finished and name != ".":
            shutil.rmtree(self.root / name, ignore_errors=True)  # (--no-resume)
            folder.replace(self.root / name)
            flush_folder(self.root)
        return problems

    def join(self, output: Path, left_out: Sequence[str]) -> Manifest | None:
        """Write the root's manifest and give the data set its name, if all shards are there."""
        if not all((self.root / name / MANIFEST).is_file() for name in self.parts):
            return None
        manifest = join_manifests({name: read_json(self.root / name / MANIFEST) for name in self.parts}, left_out)
        if not (self.root / MANIFEST).is_file() or read_json(self.root / MANIFEST) != manifest:
            write_json(self.root / MANIFEST, manifest)
            flush_folder(self.root)
        if self.root != output:
            move_into_place(self.root, output)
        return manifest
