"""The distinct neighbourhoods of an integer map, and sums of rows of a table that they index.

What two stacked convolutions make of a map of integer codes depends, at each pixel, on the codes around it alone: the
first convolution sees a window of k x k codes, the second k x k of those windows. Label maps repeat few of them, so a
layer can compute each distinct one once and look the pixels up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PLACES = 9
"""Of an outer window that one lookup covers."""

CHUNK = 256
"""Users of a row that a GPU adds up one after the other."""


@dataclass(frozen=True)
class Lookup:
    """Which rows of a table to add up for each place: ``out[i] = sum_j table[index[i, j]]``."""

    index: Tensor
    """int64, from a loader int32 [P, J]."""
    num_rows: int
    """Rows of the table."""

    @cached_property
    def order(self) -> Tensor:
        """List the entries, numbered i J + j, that take row 0, then those of row 1 and so on: int64 [P * J]."""
        return torch.argsort(self.index.flatten(), stable=True)

    @cached_property
    def users(self) -> Tensor:
        """List the places that take row 0, then those that take row 1 and so on: int64 [P * J]."""
        return self.order if self.index.shape[1] == 1 else self.order // self.index.shape[1]

    @cached_property
    def starts(self) -> Tensor:
        """Find where the users of each row begin: int64 [num_rows]."""
        counts = torch.bincount(self.index.flatten(), minlength=self.num_rows)
        return counts.cumsum(0) - counts

    @cached_property
    def chunks(self) -> tuple[Tensor, Tensor]:
        """Cut the users of each row into chunks of CHUNK: each chunk's begin [T], each row's first chunk [num_rows].

        On a GPU T = num_rows + P * J // CHUNK, which is always enough: the true count would have to be waited for.
        Those left over are empty and come last.
        """
        flat, most = self.index.flatten(), self.num_rows + self.index.numel() // CHUNK
        if flat.is_cuda:
            starts = torch.searchsorted(flat.sort().values, torch.arange(self.num_rows + 1, device=flat.device))
        else:
            starts = F.pad(torch.bincount(flat, minlength=self.num_rows).cumsum(0), (1, 0))
        ends = ((starts.diff() + CHUNK - 1) // CHUNK).cumsum(0)
        first = F.pad(ends, (1, 0))
        number = torch.arange(most if flat.is_cuda else int(first[-1]), device=flat.device)
        row = torch.searchsorted(ends, number, right=True)  # num_rows for those left over, whose start is the end
        return starts[row] + (number - first[row]) * CHUNK * (row < self.num_rows), first[:-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Lookup:
        """Apply a function to the index and the chunks."""
        lookup = Lookup(function(self.index), self.num_rows)
        vars(lookup)["chunks"] = tuple(map(function, self.chunks))
        return lookup


@dataclass(frozen=True)
class LayoutNeighbourhoods:
    """What two stacked k x k convolutions of a layout have to compute once: U inner windows, V outer windows of those.

    Each table is made from the one before it (see ``find_neighbourhoods``).
    """

    labels: Lookup
    """[U] from weight rows [k k (num_label_channels + 1)], place by place; each place's last row stands for "none"."""
    noise: Lookup | None
    """[U] from rows [k k (M + 1)], place by place, what the layout's M noise vectors add there, then "none"."""
    edges: Tensor | None
    """bool [U, k k]: the edge map in each inner window."""
    outside: Tensor
    """bool [U, 1]: the centre of the inner window lies in the second convolution's zero padding."""
    outer: tuple[Lookup, ...]
    """[V] from rows [U p]: what inner window u adds where it is place j of the outer window, in row u p + j. One lookup
    for each p = PLACES places (the last may have fewer), so that the table of 5x5 windows need not be held whole."""
    pixels: Lookup
    """[N H W] from rows [V]."""

    def map(self, function: Callable[[Tensor], Tensor]) -> LayoutNeighbourhoods:
        """Apply a function to every tensor."""
        edges = None if self.edges is None else function(self.edges)
        noise = None if self.noise is None else self.noise.map(function)
        labels, pixels, *outer = (lookup.map(function) for lookup in (self.labels, self.pixels, *self.outer))
        return LayoutNeighbourhoods(labels, noise, edges, function(self.outside), tuple(outer), pixels)


def find_neighbourhoods(codes: Tensor, num_codes: int, kernel_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the distinct neighbourhoods of pixels in a batch of code maps: U inner windows, V outer windows of those.

    With r = k // 2, a pixel's outer window reaches codes up to 2r away. Around each map come 2r places of the code
    ``num_codes``: windows at the border are windows like any other, and padding is exact.

    The numbering is exact: nothing is hashed, so nothing can collide. A window's id is made from the ids of smaller
    windows that cover it, packed into one integer below 2^63 (in several steps where they do not fit): equal ids, equal
    windows.

    Args:
        codes: integers [N, H, W], 0..num_codes-1.
        kernel_size: k, odd.
    Returns:
        Codes of each inner window, row by row: int64 [U, k * k]; ``num_codes`` for places outside the map.
        Rows of the former around a pixel, row by row: int64 [V, k * k]; some have their centre outside the map.
        Each pixel's row of these: int64 [N, H, W].
    """
    radius = kernel_size // 2
    count, height, width = codes.shape
    shape = (count, height + 4 * radius, width + 4 * radius)
    inside = (slice(None), slice(2 * radius, 2 * radius + height), slice(2 * radius, 2 * radius + width))
    padded = codes.new_full(shape, num_codes, dtype=torch.int32)
    padded[inside] = codes
    flat = padded.flatten()

    def square(offsets: Sequence[int]) -> list[int]:
        """List the distances in the flattened maps from a place to those at all pairs of ``offsets``."""
        return [down * shape[2] + right for down in offsets for right in offsets]

    present = torch.zeros(num_codes + 1, dtype=torch.int32, device=codes.device)
    present[flat] = 1
    known = present.nonzero().flatten()
    # At every radius, the ids below `uniform` are the windows of one code alone. Most are, and they need no search.
    uniform = len(known)
    ids, total, places = (present.cumsum(0, dtype=torch.int32) - 1)[flat], uniform, known[:0]

    # Two windows of radius q at offsets -s and s, s <= q, leave no gap: they make up the window of radius q + s. From
    # single codes it takes -1, 0 and 1. Windows that wrap round the end of a row see nothing but the outside there.
    reach = 0
    while reach < radius:
        step = min(max(reach, 1), radius - reach)
        ids, total, places = _combine(ids, total, uniform, square((-step, step) if reach else (-1, 0, 1)))
        reach += step
    window = torch.tensor(square(range(-radius, radius + 1)), device=codes.device)
    inner = torch.cat([known[:, None].expand(-1, len(window)), flat[places[:, None] + window]])
    inner_ids = ids
    if radius:
        wanted = torch.zeros(shape, dtype=torch.bool, device=codes.device)
        wanted[inside] = True
        ids, total, places = _combine(ids, total, uniform, square((-radius, radius)), wanted.flatten())
    alone = torch.arange(uniform, device=codes.device)
    outer = torch.cat([alone[:, None].expand(-1, len(window)), inner_ids[places[:, None] + window]])
    return inner, outer, ids.view(shape)[inside].long().contiguous()


def _combine(
    ids: Tensor, count: int, uniform: int, distances: Sequence[int], wanted: Tensor | None = None
) -> tuple[Tensor, int, Tensor]:
    """Number the combinations of the ids (0..count-1) at ``distances`` from each (wanted) place of a flat map.

    Returns:
        The new ids, of which the first ``uniform`` stay what they are; their count; a place of each of the others.
    """
    first, last = -min(distances), len(ids) - max(distances)
    parts = [ids[first + distance : last + distance] for distance in distances]
    mixed = parts[0] >= uniform
    for part in parts[1:]:
        mixed |= part != parts[0]
    if wanted is not None:
        mixed &= wanted[first:last]
    places = mixed.nonzero().flatten()
    numbers, distinct = _number([part[places].long() for part in parts], count)
    places += first
    combined = ids.clone()
    combined[places] = (uniform + numbers).int()
    return combined, uniform + distinct, places.new_empty(distinct).scatter_(0, numbers, places)


def _number(columns: Sequence[Tensor], count: int) -> tuple[Tensor, int]:
    """Number the distinct rows of a table of integers 0..count-1, given by columns: ids of the rows, their count."""
    key, span = columns[0], count
    for column in columns[1:]:
        if span * count >= 2**63:
            values, key = torch.unique(key, return_inverse=True)
            span = len(values)
        key, span = key * count + column, span * count
    values, ids = torch.unique(key, return_inverse=True)
    return ids, len(values)
