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

from imaginaire_spade.data.lmdb_source import MANIFEST, store_key
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import flush_folder, read_json, write_json
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.lock import finishing, owning, writing
from imaginaire_spade.lmdb_builder.output import (
    check_free_space,
    check_output,
    disk_errors,
    is_finished,
    kept_shards,
    move_into_place,
    temporary,
)
from imaginaire_spade.lmdb_builder.sample import LoadedSample, Plan, load_sample
from imaginaire_spade.lmdb_builder.selection import select_samples
from imaginaire_spade.lmdb_builder.shard import Manifest, join_manifests, write_shard
from imaginaire_spade.lmdb_builder.tally import MAX_PROBLEMS, Tally, shown
from imaginaire_spade.lmdb_builder.workers import count_workers, map_in_processes


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
        edges: ``data.edges`` of the config; "file" and "instances" make edge_maps/ and inst_maps/ obligatory.
        data_types: what to build; None: images, seg_maps, what ``edges`` needs, and the other folders that exist.
        num_shards: with 1 the root itself is the shard. None: one per process.
        num_workers: processes that read, check and write; None: min(8, cores); 0: this process. With at least as many
            shards each writes shards of its own; with fewer they read and check for one writer.
        overwrite: replace an existing data set, once the new one is complete.
        resume: keep verified shards of an earlier, interrupted build of the same data.
        drop_unpaired: build from the samples that have all data types.
        input_list: file with one key per line (an extension is ignored): build from these samples only.
        check: decode every file and compare sizes and label values with the table.
        resize_smallest_side, quality: shrink what is larger; JPEGs are then written with this quality.
        recode_maps: write label, edge and instance maps anew, with the same integers, so that they decode faster.
        rank, world_size: build every ``world_size``-th shard, from number ``rank`` on.
    Returns:
        The root's manifest; None where another process completes (or completed) the data set.
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
    selection = select_samples(
        raw,
        edges=edges,
        data_types=data_types,
        drop_unpaired=drop_unpaired,
        input_list=None if input_list is None else Path(input_list),
        shrinks=resize_smallest_side is not None,
        silent=rank > 0,
    )
    source, types = selection.source, selection.data_types
    if num_shards > len(source.keys):
        raise DataError(f"--num_shards {num_shards}: more shards than samples ({len(source.keys)})")
    # In the order of the keys, so that the shards one after the other are the folder's order.
    cuts = [len(source.keys) * i // num_shards for i in range(num_shards + 1)]
    names = ["."] if num_shards == 1 else [f"shard_{i:05d}" for i in range(num_shards)]
    parts = {
        name: sorted(source.keys[a:b], key=store_key)
        for name, (a, b) in zip(names, itertools.pairwise(cuts), strict=True)
    }
    plan = Plan(source, labels, types, check, resize_smallest_side, quality, recode_maps)
    own = range(num_shards)[rank::world_size]
    with owning(output, own) as lock_file:
        build = _Build(plan, parts, _choose_root(output, num_shards, overwrite), lock_file, Tally())
        # Existing output may be deleted if ``overwrite`` is set or it is our own temporary folder.
        may_clear = world_size == 1 and (overwrite or build.root != output)
        try:
            kept = build.kept([names[i] for i in own], resume, may_clear, rank)
        except DataError as error:
            if not overwrite:
                raise
            raise DataError(
                f"{error}. Of several processes none may clear it away from under the others: remove {build.root}"
                " yourself, then start them again"
            ) from None
        todo = [names[i] for i in own if names[i] not in kept]
        num_bytes = {name: {t: source.total_size(parts[name], t) for t in types} for name in todo}
        total_bytes = sum(sum(by_type.values()) for by_type in num_bytes.values())
        check_free_space(output, total_bytes)
        with disk_errors(output, total_bytes):
            build.run(num_bytes, count_workers(num_workers, world_size), silent=rank > 0)
            return build.join(output, selection.left_out)


def _choose_root(output: Path, num_shards: int, overwrite: bool) -> Path:
    """Where to build. (A temporary folder whose output is gone was about to take its place.)"""
    if is_finished(output):
        return temporary(output) if overwrite else output
    return temporary(output) if num_shards == 1 or temporary(output).exists() else output


class _Rejected(Exception):
    """Carries the problems of a shard's samples."""


@dataclass(frozen=True)
class _Build:
    plan: Plan
    parts: Mapping[str, Sequence[str]]
    root: Path
    lock_file: Path
    tally: Tally

    def kept(self, names: Sequence[str], resume: bool, may_clear: bool, rank: int) -> dict[str, Manifest]:
        """Return the finished shards among ``names``; remove other existing output if that is requested."""
        kept: dict[str, Manifest] = {}
        try:
            if resume:
                kept = kept_shards(self.root, self.parts, names, self.plan)
            elif may_clear:
                shutil.rmtree(self.root, ignore_errors=True)
        except DataError:
            if not may_clear:
                raise
            shutil.rmtree(self.root, ignore_errors=True)
        if kept:
            print(
                f"rank {rank}: " * (rank > 0)
                + f"resuming: {len(kept)} of {len(names)} shard(s) are complete and verified"
            )
        return kept

    def run(self, num_bytes: Mapping[str, Mapping[str, int]], workers: int, silent: bool) -> None:
        """Build the shards that are the keys of ``num_bytes`` (which gives the size of their files by data type)."""
        todo = list(num_bytes)
        total = sum(len(self.parts[name]) for name in todo)
        problems: list[str] = []
        try:
            with shown(self.tally, total, silent or not todo):
                if workers > len(todo):
                    load = partial(load_sample, self.plan)
                    for name in todo:
                        samples = map_in_processes(load, self.parts[name], workers, chunk=4)
                        problems += self._build_shard(name, num_bytes[name], samples)
                else:
                    whole = list(num_bytes.items())
                    for found in map_in_processes(self._build_whole_shard, whole, workers, chunk=1, least=1):
                        problems += found
        finally:
            self.tally.stop.get_obj().value = 1  # workers that still write leave off
            if self.root.is_dir() and not any(self.root.iterdir()):
                self.root.rmdir()
        if problems:
            seen = self.tally.seen()
            rest = f" (checking stopped after sample {seen} of {total})" if seen < total else ""
            finished = sum((self.root / name / MANIFEST).is_file() for name in self.parts)
            state = f"{finished} finished shard(s) are kept" if finished else "nothing was built"
            listed = "\n  ".join(problems[:MAX_PROBLEMS])
            raise DataError(f"{self.plan.source.root}: {len(problems)} problem(s), {state}{rest}:\n  {listed}")

    def _build_whole_shard(self, item: tuple[str, Mapping[str, int]]) -> list[str]:
        name, num_bytes = item
        return self._build_shard(name, num_bytes, map(partial(load_sample, self.plan), self.parts[name]))

    def _build_shard(self, name: str, num_bytes: Mapping[str, int], samples: Iterable[LoadedSample]) -> list[str]:
        """Build one shard in its temporary folder and rename it, or return its samples' problems."""
        if not self.tally.go_on():
            return []
        folder = self.root if name == "." else self.root / f"{name}.tmp"
        with writing(self.lock_file, list(self.parts).index(name)):
            shutil.rmtree(folder, ignore_errors=True)
            # A killed builder's worker may have finished it meanwhile.
            if name != "." and (self.root / name).exists() and kept_shards(self.root, self.parts, [name], self.plan):
                return []
            try:
                write_shard(self.plan, self.parts[name], self._sound(samples), folder, num_bytes)
                if name != ".":
                    folder.replace(self.root / name)
                    flush_folder(self.root)
            except _Rejected as rejected:
                shutil.rmtree(folder, ignore_errors=True)
                return list(rejected.args[0])
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return []

    def _sound(self, samples: Iterable[LoadedSample]) -> Iterator[LoadedSample]:
        """The samples up to the first with a problem; the problems of all are raised at the end."""
        problems: list[str] = []
        for sample in samples:
            problems += sample.problems
            if not self.tally.add(len(sample.problems)):
                raise _Rejected(problems)
            if not problems:
                yield sample
        if problems:
            raise _Rejected(problems)

    def join(self, output: Path, left_out: Sequence[str]) -> Manifest | None:
        """Write the root's manifest and give the data set its name, where all shards are there."""
        with finishing(self.lock_file):
            manifests = {}
            for name in self.parts:
                if not (self.root / name / MANIFEST).is_file():
                    return None
                manifests[name] = read_json(self.root / name / MANIFEST)
            manifest = join_manifests(manifests, left_out)
            if not (self.root / MANIFEST).is_file() or read_json(self.root / MANIFEST) != manifest:
                write_json(self.root / MANIFEST, manifest)
                flush_folder(self.root)
            if self.root != output:
                move_into_place(self.root, output)
            return manifest
