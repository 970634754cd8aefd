"""Map over the samples of a data set in several processes."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from imaginaire_spade.data.loader import default_num_workers, start_worker
from imaginaire_spade.errors import DataError, UserError

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 4
"""Items that travel together; two chunks per worker wait for their turn."""


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
    loader = DataLoader(
        _Results(task, items),
        batch_size=CHUNK,
        collate_fn=list,  # a chunk as it is
        num_workers=min(count_workers(num_workers), num_chunks),
        worker_init_fn=start_worker,
    )
    try:
        with closing(_take(loader)) as results:
            yield results
    except RuntimeError as error:  # in the midst of the block too: torch raises it when a worker's end is signalled
        if "DataLoader worker" not in str(error):
            raise
        raise DataError("a worker process was killed (out of memory?): write a smaller --num_workers") from None


class _Results(Dataset[R | UserError]):
    """The results of ``task``. What it raises is a value too: a worker's exceptions arrive changed."""

    def __init__(self, task: Callable[[T], R], items: Sequence[T]) -> None:
        self.task = task
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> R | UserError:
        try:
            return self.task(self.items[index])
        except UserError as error:
            return error


def _take(loader: DataLoader[R | UserError]) -> Generator[R, None, None]:
    for result in itertools.chain.from_iterable(loader):
        if isinstance(result, UserError):
            raise result
        yield result
