"""Order samples, load them in workers, and move batches to the device; map over samples in workers.

Responsible for the one rule of a run's order: the sample at position p of the run is entry p mod n of the shuffle of
epoch p div n, whatever the number of processes or workers and wherever the run was interrupted.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from imaginaire_spade import distributed
from imaginaire_spade.command_names import as_called
from imaginaire_spade.data.batch import Ahead, Batch
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.errors import DataError, UserError, catch_error
from imaginaire_spade.noise import generator_for
from imaginaire_spade.processes import end_with_parent

PREFETCH = 2
"""Batches that each worker prepares ahead."""

CHUNK = 4
"""Items of ``map_in_order`` that travel together; two chunks per worker wait for their turn."""

NO_SHARED_MEMORY = (
    "the loader's workers have too little shared memory: start the container with --shm-size=8g (docker), or write"
    " data.num_workers: 0"
)

Item = tuple[int, int]
"""(index into the data set, position in the run)."""

Filled = tuple[int, int, list[tuple[str, tuple[int, int], int]], tuple[Ahead, ...]]
"""A batch in shared memory: numbers of worker and slot; key, original size and position of each sample; ``ahead``."""

LookAhead = tuple[tuple[int, ...], int, bool]
"""What neighbourhoods the workers find for a GPU: kernel sizes, pieces of a batch, whether each label map will have
noise. See ``Batch.look_ahead``."""

T = TypeVar("T")
R = TypeVar("R")


def training_order(
    shard_sizes: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    images_seen: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle_shards: int | None = None,
) -> Iterator[list[Item]]:
    """Yield the (index, position) of each sample of one process's batches, without end.

    Position p = 0, 1, 2, ... of the run has sample ``permutation(seed, p // n)[p % n]`` of n. In iteration t,
    process ``rank`` takes ``batch_size`` positions from ``images_seen + (t * world_size + rank) * batch_size`` on: the
    processes' batches in rank order are the batch of one process with ``batch_size * world_size``.

    Args:
        shard_sizes: numbers of samples, in the order of their indices, whose files lie together.
        shuffle_shards: the permutation takes shard after shard, in random order, and mixes the samples of that many at
            a time; None: of all.
    """
    num_samples = sum(shard_sizes)
    assert num_samples > 0 and batch_size > 0 and images_seen >= 0
    assert 0 <= rank < world_size
    epoch, order = -1, np.empty(0, np.int64)
    for start in itertools.count(images_seen + rank * batch_size, batch_size * world_size):
        batch = []
        for position in range(start, start + batch_size):
            if position // num_samples != epoch:
                epoch = position // num_samples
                order = _permutation(shard_sizes, shuffle_shards, seed, epoch)
            batch.append((int(order[position % num_samples]), position))
        yield batch


def _permutation(shard_sizes: Sequence[int], shuffle_shards: int | None, seed: int, epoch: int) -> NDArray[np.int64]:
    rng = generator_for(seed, epoch, "permutation")
    if shuffle_shards is None:
        return rng.permutation(sum(shard_sizes))
    shards = np.split(np.arange(sum(shard_sizes)), np.cumsum(shard_sizes)[:-1])
    order = [shards[i] for i in rng.permutation(len(shards))]
    mixed = (order[i : i + shuffle_shards] for i in range(0, len(order), shuffle_shards))
    return np.concatenate([rng.permutation(np.concatenate(together)) for together in mixed])


def training_loader(
    dataset: LabelMapDataset,
    batch_size: int,
    *,
    seed: int,
    images_seen: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int,
    pin_memory: bool = False,
    shuffle_shards: int | None = None,
    look_ahead: LookAhead = ((), 1, False),
) -> Iterator[Batch]:
    """Load the training batches of one process, without end, in the order of ``training_order``.

    Raises:
        DataError: (from the iterator) a sample cannot be used; the same message from any worker.
    """
    if shuffle_shards is not None and shuffle_shards >= len(dataset.shard_sizes):
        warnings.warn(
            f"data.shuffle_shards: {shuffle_shards} mixes all samples, since the training data has"
            f" {len(dataset.shard_sizes)} shard(s); {as_called('scripts/build_lmdb.py')} --num_shards makes more",
            stacklevel=2,
        )
        shuffle_shards = None
    dataset.expect_random_reads(shuffle_shards)
    items = training_order(
        dataset.shard_sizes, batch_size, seed=seed, images_seen=images_seen, rank=rank, world_size=world_size,
        shuffle_shards=shuffle_shards,
    )  # fmt: skip
    return _load(dataset, items, batch_size, num_workers, pin_memory, look_ahead)


def sequential_batches(
    dataset: LabelMapDataset, indices: Sequence[int], batch_size: int, *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Load exactly the samples ``indices``, in that order; the last batch may be smaller. Positions are the indices."""
    items: list[list[Item]] = [
        [(index, index) for index in indices[start : start + batch_size]]
        for start in range(0, len(indices), batch_size)
    ]
    return _load(dataset, items, batch_size, min(num_workers, len(items)), pin_memory)


class _Batches(Dataset["Batch | Filled | UserError"]):
    """A data set of batches: item = the (index, position) of each of its samples.

    A user's mistake travels back as a value: raised in a worker, it would arrive wrapped in a traceback.

    If all samples have one size, a worker lays its batches in slots of shared memory, in turns. (New shared memory for
    each batch, whose pages are zeroed and mapped one by one, cost a worker 15 % of its time.) A worker makes up to
    PREFETCH batches before the main process has copied the one before them, so PREFETCH + 1 slots are enough.
    """

    def __init__(self, dataset: LabelMapDataset, batch_size: int, num_workers: int, look_ahead: LookAhead) -> None:
        self.dataset = dataset
        self.look_ahead = look_ahead
        self.slots: list[list[Batch]] = []
        """By worker and number."""
        self._filled = 0
        if num_workers and (blank := dataset.blank()) is not None:
            blanks = Batch.collate(dataset.spec, [blank] * batch_size)
            self.slots = [[_share(blanks.map(Tensor.clone)) for _ in range(PREFETCH + 1)] for _ in range(num_workers)]

    def __getitem__(self, items: Sequence[Item]) -> Batch | Filled | UserError:
        worker = get_worker_info()
        try:
            if worker is None or not self.slots:
                batch = Batch.collate(self.dataset.spec, self.dataset.read(items))
                batch = replace(batch, ahead=batch.look_ahead(*self.look_ahead))
                return batch if worker is None else _share(batch)
            number = self._filled % (PREFETCH + 1)
            self._filled += 1
            slot = self.slots[worker.id][number]
            # Photos are resized straight into the slot, whose memory stays in the processor's cache.
            places = None if slot.images is None else [*slot.images[: len(items)].permute(0, 2, 3, 1).numpy()]
            samples = self.dataset.read(items, images_out=places)
        except UserError as error:
            return error
        slot.fill(samples)
        facts = [(sample.key, sample.original_size, sample.position) for sample in samples]
        return worker.id, number, facts, slot[: len(samples)].look_ahead(*self.look_ahead)

    def copy(self, filled: Filled, function: Callable[[Tensor], Tensor]) -> Batch:
        """Copy a batch out of its slot, which the worker fills again once another batch is asked for."""
        worker, number, samples, ahead = filled
        keys, original_sizes, positions = zip(*samples, strict=True)
        part = self.slots[worker][number][: len(samples)]
        part = replace(part, keys=keys, original_sizes=original_sizes, positions=positions, ahead=ahead)
        return part.map(function)


def _share(batch: Batch) -> Batch:
    """Move a batch to memory that processes share.

    Raises:
        DataError: there is too little of it.
    """
    try:
        return batch.map(Tensor.share_memory_)
    except RuntimeError as error:
        raise DataError(f"{NO_SHARED_MEMORY} ({error})") from None


def _load(
    dataset: LabelMapDataset,
    items: Iterable[list[Item]],
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    look_ahead: LookAhead = ((), 1, False),
) -> Iterator[Batch]:
    batches = _Batches(dataset, batch_size, num_workers, look_ahead)
    loader = DataLoader(
        batches,
        sampler=items,
        batch_size=None,  # an item is a whole batch already
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=start_worker,
        collate_fn=_unchanged,
    )
    try:
        for made in loader:
            if isinstance(made, UserError):
                raise made
            if isinstance(made, tuple):
                yield batches.copy(made, Tensor.pin_memory if pin_memory else Tensor.clone)
            else:
                yield made.map(Tensor.pin_memory) if pin_memory else made
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and "Bus error" in str(error):
            raise DataError(NO_SHARED_MEMORY) from error
        raise


def _unchanged(batch: Any) -> Any:
    return batch


def start_worker(worker: int) -> None:
    """Set what signals do to a worker process of a DataLoader, whose main process may have handlers of its own."""
    # Schedulers and launchers send their signals to every process of a job, and a terminal sends Ctrl-C. The main one
    # needs batches until it has saved, and closes its loader itself; should it fail to, the alarm ends this worker.
    if sys.platform != "win32":
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
        # A worker that outlives its killed process holds that one's connections open, and its peers wait for answers.
        end_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent.pid:
        # It was killed before the line above, and torch takes whoever adopted this worker for it: nobody else ends it.
        os._exit(1)


def default_num_workers(num_processes: int = 1) -> int:
    """Count the loader workers of each of ``num_processes`` on this machine: min(8, cores / processes)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(8, cores // num_processes)


def count_workers(num_workers: int | None, num_processes: int = 1) -> int:
    """Return ``num_workers`` if it is given, else min(8, this process's share of the cores), at least 1.

    Raises:
        DataError: it is negative.
    """
    if num_workers is not None and num_workers < 0:
        raise DataError(f"--num_workers {num_workers}: write at least 0")
    return max(1, default_num_workers(num_processes)) if num_workers is None else num_workers


@contextmanager
def map_in_order(task: Callable[[T], R], items: Sequence[T], num_workers: int | None) -> Iterator[Iterator[R]]:
    """Yield an iterator over the results of ``task``, in the order of ``items``.

    The workers end with the block. They run ahead by a few items only, however slowly the results are taken.

    Args:
        task, items: picklable.
        num_workers: processes (None: min(8, cores); 0: this process does the work).
    Raises:
        DataError: ``num_workers`` is negative, or a worker was killed.
        UserError: the first that ``task`` raised, when the results before it have been taken.
    """
    num_chunks = -(-len(items) // CHUNK)
    with _results(items, partial(_try_each, task), min(count_workers(num_workers), num_chunks), CHUNK) as results:
        yield results


@contextmanager
def generate_in_workers(
    task: Callable[[T], Iterable[R]], items: Sequence[T], num_workers: int
) -> Iterator[Iterator[R]]:
    """Yield an iterator over what ``task`` yields for each of ``items``; each of 1.. workers takes every n-th of them.

    Otherwise as ``map_in_order``.

    Raises:
        DataError: a worker was killed.
        Exception: what ``task`` raised, without its traceback.
    """
    with _results(_Generated(task, items), list, num_workers, 4 * CHUNK) as results:
        yield results


class _Generated(IterableDataset[Any]):
    def __init__(self, task: Callable[[T], Iterable[R]], items: Sequence[T]) -> None:
        self._task, self._items = task, items

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        try:
            for item in self._items[worker.id :: worker.num_workers]:
                yield from self._task(item)
        except Exception as error:  # raised in a worker, it would arrive wrapped in a traceback
            yield error


@contextmanager
def _results(
    data: Any, collate: Callable[[Any], list[R | Exception]], num_workers: int, chunk: int
) -> Iterator[Iterator[R]]:
    loader = DataLoader(
        data, batch_size=chunk, collate_fn=collate, num_workers=num_workers, worker_init_fn=start_worker
    )
    iterator: Any = iter(loader)
    try:
        with closing(_take(iterator)) as results:
            yield results
    except RuntimeError as error:  # in the midst of the block too: torch raises it when a worker's end is signalled
        if "DataLoader worker" not in str(error):
            raise
        raise DataError("a worker process was killed (out of memory?): write a smaller --num_workers") from None
    finally:
        if num_workers:  # An exception's traceback may hold the iterator, and the workers would go on for a while.
            with suppress(RuntimeError):  # torch's: the signal that ends this process may have ended a worker first
                iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.join()


def _try_each(task: Callable[[T], R], items: Sequence[T]) -> list[R | Exception]:
    """Return the results of ``task``. What it raises is a value too: a worker's exceptions arrive changed."""
    return [catch_error(UserError, task)(item) for item in items]


def _take(chunks: Iterable[list[R | Exception]]) -> Generator[R, None, None]:
    for result in itertools.chain.from_iterable(chunks):
        if isinstance(result, Exception):
            raise result
        yield result


def leave_out_bad(dataset: LabelMapDataset, num_workers: int | None) -> None:
    """Read every sample once, shared out over the processes, and drop those that cannot be used, on all of them.

    Raises:
        DataError: none is left, or ``num_workers`` is negative.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(dataset), world_size)
    with map_in_order(dataset.find_problem, mine, num_workers) as problems:
        shown = tqdm(problems, "checking (data.skip_bad)", len(mine), unit="images", mininterval=0.5, disable=rank > 0)
        found = {index: problem for index, problem in zip(mine, shown, strict=True) if problem}
    every = {index: problem for part in distributed.gather_objects(found) for index, problem in part.items()}
    dataset.leave_out(dict(sorted(every.items())))


class Prefetcher:
    """Batches on a device, one ahead.

    On a GPU the next batch is copied on a side stream (from pinned memory, if the loader pins) while the current one
    is computed on; on the CPU batches pass through. ``wait_s`` sums the time spent waiting for the loader.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device | str) -> None:
        self.wait_s = 0.0
        self._batches = batches
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ahead: Batch | None = None

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        ready = self._ahead or self._fetch()
        if ready is None:
            raise StopIteration
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in ready.tensors():
                tensor.record_stream(current)  # its memory is not reused before the work queued on it is done
            self._ahead = self._fetch()
        return ready

    def close(self) -> None:
        """Stop the loader's workers."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def _fetch(self) -> Batch | None:
        started_at = time.perf_counter()
        batch = next(self._batches, None)
        self.wait_s += time.perf_counter() - started_at
        if batch is None:
            return None
        with torch.cuda.stream(self._stream):
            return batch.to(self._device, non_blocking=True)


def read_ahead(function: Callable[[T], R], items: Iterable[T], ahead: int, *, num_threads: int = 1) -> Iterator[R]:
    """Yield as ``map`` does, in order; threads compute up to ``ahead`` items before they are asked for."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads, "read") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
