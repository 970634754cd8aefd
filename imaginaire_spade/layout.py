"""SemanticLayout: integer label maps and their views per resolution.

The heart of the package: label maps stay small integers from the disk to the layer that consumes them; each view that
a layer asks for is made once per resolution and cached. Knows nothing of files, classes' names or networks.

The last part finds the distinct neighbourhoods of an integer map. What two stacked convolutions make of a map of
integer codes depends, at each pixel, on the codes around it alone: the first convolution sees a window of k x k codes,
the second k x k of those windows. Label maps repeat few of them, so a layer can compute each distinct one once and look
the pixels up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.distributed import mean_of_host_numbers
from imaginaire_spade.labels import mark_borders
from imaginaire_spade.layout_spec import LayoutSpec as LayoutSpec

FEWEST_PIXELS_ON_GPU = 64 * 64
"""Of a label map, for tables: at 32x32 more than half of the 5x5 windows of real label maps are distinct."""

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
    def users(self) -> Tensor:
        """List the places that take row 0, then those that take row 1 and so on: int64 [P * J]."""
        order = torch.argsort(self.index.flatten(), stable=True)
        return order if self.index.shape[1] == 1 else order // self.index.shape[1]

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
    edges: Tensor | None
    """bool [U, k k]: the edge map in each inner window."""
    outside: Tensor
    """bool [U, 1]: the centre of the inner window lies in the second convolution's zero padding."""
    outer: tuple[Lookup, ...]
    """[V] from rows [U p]: what inner window u adds where it is place j of the outer window, in row u p + j. One lookup
    for each p = 9 places (the last may have fewer), so that the table of 5x5 windows need not be held whole."""
    pixels: Lookup
    """[N H W] from rows [V]."""

    def map(self, function: Callable[[Tensor], Tensor]) -> LayoutNeighbourhoods:
        """Apply a function to every tensor."""
        edges = None if self.edges is None else function(self.edges)
        lookups = [lookup.map(function) for lookup in (self.labels, self.pixels, *self.outer)]
        return LayoutNeighbourhoods(lookups[0], edges, function(self.outside), tuple(lookups[2:]), lookups[1])


Edges = Tensor | Literal["labels"] | None
"""A layout's edges: as they are, or to be drawn from its labels, or none."""


class SemanticLayout:
    """A batch of label maps.

    Args:
        spec: what the layout holds.
        labels: uint8 or int16 [N, H, W], values 0..num_classes (num_classes = don't care).
        edges: uint8 or bool [N, H, W] of 0/1, or float in [0, 1] (edge maps that were resized linearly), or None;
            "labels": the ``borders`` of the label maps, drawn when first asked for, on the device that they are on.
        distances: float [N, 2, H, W], row and column offsets, or None.
        conditions: float [N, spec.num_conditions, H, W], or None if there are none.
    """

    def __init__(
        self, spec: LayoutSpec, labels: Tensor, edges: Edges = None, distances: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> None:  # fmt: skip
        if labels.dim() != 3 or labels.dtype not in (torch.uint8, torch.int16):
            raise ValueError(f"labels must be uint8 or int16 [N, H, W], not {labels.dtype} {list(labels.shape)}")
        wants = spec.has_edges, spec.has_distances, spec.num_conditions > 0
        named = zip(("edges", "distances", "conditions"), (edges, distances, conditions), wants, strict=True)
        for name, given, wanted in named:
            if (given is not None) != wanted:
                state = "given" if given is not None else "missing"
                raise ValueError(f"{name} {state}, but the layout's spec has has_{name}={wanted}")
        if isinstance(edges, Tensor) and edges.shape != labels.shape:
            raise ValueError(f"edges {list(edges.shape)} and labels {list(labels.shape)} differ in shape")
        if distances is not None and distances.shape != (labels.shape[0], 2, *labels.shape[1:]):
            raise ValueError(f"distances {list(distances.shape)} do not belong to labels {list(labels.shape)}")
        if conditions is not None and conditions.shape != (labels.shape[0], spec.num_conditions, *labels.shape[1:]):
            raise ValueError(f"conditions {list(conditions.shape)} do not belong to labels {list(labels.shape)}")
        self.spec = spec
        self.labels = labels
        self._edges = edges
        self.distances = distances
        self.conditions = conditions
        self._dense: Tensor | None = None
        self._one_hot: dict[torch.dtype, Tensor] = {}
        self._windows: dict[tuple[int, int, int], Lookup] = {}
        self._neighbourhoods: dict[int, LayoutNeighbourhoods] = {}
        self._counts: dict[tuple[int, bool], tuple[float, float]] = {}
        self._resized: list[SemanticLayout] = []
        self.ahead: dict[tuple[int, int, int], LayoutNeighbourhoods] = {}
        """Neighbourhoods that are known already: kernel size, height, width of a view -> its own."""

    @classmethod
    def from_dense(cls, spec: LayoutSpec, semantics: Tensor, distances: Tensor | None = None) -> SemanticLayout:
        """Make a layout whose one-hot view is ``semantics`` itself: float [N, num_channels, H, W].

        For inputs that are not one-hot (soft labels, a gradient with respect to the semantics). Ids are the argmax:
        norms that look up one class per pixel (``needs_classes``) see those.
        """
        if semantics.shape[1] != spec.num_channels:
            raise ValueError(f"semantics has {semantics.shape[1]} channels, the spec {spec.num_channels}")
        classes, dense = semantics.tensor_split([spec.num_label_channels], 1)
        ids = classes.argmax(1) if spec.num_label_channels else torch.zeros_like(semantics[:, 0])
        conditions = dense[:, spec.has_edges :] if spec.num_conditions else None
        layout = cls(spec, ids.to(torch.int16), dense[:, 0] if spec.has_edges else None, distances, conditions)
        layout._dense = semantics
        return layout

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def edges(self) -> Tensor | None:
        """Return edges [N, H, W]: as given, or uint8 computed from the labels; None if the spec has none."""
        if isinstance(self._edges, str):
            self._edges = borders(self.labels)
        return self._edges

    def tensors(self) -> list[Tensor]:
        """Return every tensor it consists of; edges that have not been computed are omitted."""
        return [t for t in (self.labels, self._edges, self.distances, self.conditions) if isinstance(t, Tensor)]

    @property
    def height(self) -> int:
        """Return the number of rows."""
        return self.labels.shape[1]

    @property
    def width(self) -> int:
        """Return the number of columns."""
        return self.labels.shape[2]

    @property
    def device(self) -> torch.device:
        """Return the device of its tensors."""
        return self.labels.device

    def resized(self, height: int, width: int) -> SemanticLayout:
        """Resize to another resolution: nearest, by torch's floor rule (as one-hots would be resized)."""
        for view in (self, *self._resized):  # no dict: while a network is exported, sizes are symbols without a hash
            if (view.height, view.width) == (height, width):
                return view

        def nearest(maps: Tensor) -> Tensor:
            # interpolate knows uint8 and floats; indexing by its own rule, floor(i * in / out), knows every dtype.
            rows = nearest_indices(self.height, height, maps.device)
            columns = nearest_indices(self.width, width, maps.device)
            return maps.index_select(-2, rows).index_select(-1, columns)

        self._edges = self.edges  # drawn at this size, not at the other
        self._resized.append(self.map(nearest))
        self._resized[-1].ahead = self.ahead
        return self._resized[-1]

    def one_hot(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Build the dense view [N, num_channels, H, W] of 0/1 (edges and conditions as given).

        Channels are the classes, don't-care, edges, conditions.
        """
        if self._dense is not None:
            return self._dense.to(dtype)
        if dtype not in self._one_hot:
            spec = self.spec
            # One channel more than needed, cut off below, takes don't-care pixels that have no channel.
            shape = (self.labels.shape[0], spec.num_classes + 1, self.height, self.width)
            dense = torch.zeros(shape, dtype=dtype, device=self.device)
            dense.scatter_(1, self.labels.long().unsqueeze(1), 1)
            dense = dense[:, : spec.num_label_channels]
            if spec.num_dense_channels:
                dense = torch.cat([dense, self.dense_channels(dtype)], 1)
            self._one_hot[dtype] = dense
        return self._one_hot[dtype]

    def dense_channels(self, dtype: torch.dtype) -> Tensor:
        """Return the channels that are no labels [N, num_dense_channels, H, W]: edges, conditions."""
        parts = [None if self.edges is None else self.edges.unsqueeze(1), self.conditions]
        return torch.cat([part.to(dtype) for part in parts if part is not None], 1)

    @property
    def is_dense(self) -> bool:
        """Return whether ``from_dense`` made it, so that ``labels`` are incomplete."""
        return self._dense is not None

    @property
    def is_discrete(self) -> bool:
        """Return whether the one-hot view is made of zeros and ones, so that codes can distinguish neighbourhoods."""
        has_floats = self.conditions is not None or (self.edges is not None and self.edges.is_floating_point())
        return self._dense is None and not has_floats

    @cached_property
    def classes(self) -> Lookup:
        """Return each pixel's row [N H W] of a table of label channels; one without a channel counts as class 0."""
        classes = self.labels.long()
        if not self.spec.has_dont_care:
            classes = classes.masked_fill(classes == self.spec.num_classes, 0)
        return Lookup(classes.reshape(-1, 1), self.spec.num_label_channels)

    def windows(self, kernel_size: int, stride: int, padding: int) -> Lookup:
        """Return which weight rows each output place [N, h, w] of a convolution adds up for the label channels.

        The rows are those of ``LayoutNeighbourhoods.labels``. Not for a dense layout.
        """
        assert self._dense is None
        key = (kernel_size, stride, padding)
        if key not in self._windows:
            none = self.spec.num_label_channels
            channels = F.pad(self.labels.long().clamp_(max=none), (padding,) * 4, value=none)
            index = channels.unfold(1, kernel_size, stride).unfold(2, kernel_size, stride).flatten(3).flatten(0, 2)
            places = torch.arange(kernel_size**2, device=self.device) * (none + 1)
            self._windows[key] = Lookup(index + places, kernel_size**2 * (none + 1))
        return self._windows[key]

    def neighbourhoods(self, kernel_size: int) -> LayoutNeighbourhoods:
        """Find the distinct neighbourhoods of a layout under two stacked convolutions of odd ``kernel_size``."""
        assert self.is_discrete
        if known := self.ahead.get((kernel_size, self.height, self.width)):
            return known
        if kernel_size not in self._neighbourhoods:
            bits = 1 + self.spec.has_edges
            codes = self.labels.int() * bits
            if self.edges is not None:
                codes += self.edges
            inner, outer, pixels = find_neighbourhoods(codes, (self.spec.num_classes + 1) * bits, kernel_size)
            none = self.spec.num_label_channels
            places = torch.arange(kernel_size**2, device=self.device)
            channels = (inner // bits).clamp_(max=none)
            self._neighbourhoods[kernel_size] = LayoutNeighbourhoods(
                labels=Lookup(channels + places * (none + 1), len(places) * (none + 1)),
                edges=(inner % bits).bool() if self.spec.has_edges else None,
                outside=(inner[:, [len(places) // 2]] // bits) > self.spec.num_classes,
                outer=tuple(
                    Lookup(part * part.shape[1] + places[: part.shape[1]], len(inner) * part.shape[1])
                    for part in outer.split(9, 1)
                ),
                pixels=Lookup(pixels.view(-1, 1), len(outer)),
            )
        return self._neighbourhoods[kernel_size]

    def count_neighbourhoods(self, kernel_size: int, over_processes: bool = False) -> tuple[float, float]:
        """Count the distinct inner and outer windows that ``neighbourhoods`` finds.

        Args:
            over_processes: average the counts over the processes, which all call this together with layouts of one
                size: the same numbers on all of them.
        """
        key = (kernel_size, over_processes)
        if key not in self._counts:
            around = self.neighbourhoods(kernel_size)
            counts = (float(len(around.outside)), float(around.pixels.num_rows))
            self._counts[key] = mean_of_host_numbers(*counts) if over_processes else counts
        return self._counts[key]

    def map(self, function: Callable[[Tensor], Tensor]) -> SemanticLayout:
        """Apply a function to every tensor; the caches of the new layout are empty."""
        layout = SemanticLayout(
            self.spec,
            function(self.labels),
            function(self._edges) if isinstance(self._edges, Tensor) else self._edges,
            None if self.distances is None else function(self.distances),
            None if self.conditions is None else function(self.conditions),
        )
        if self._dense is not None:
            layout._dense = function(self._dense)
        return layout

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SemanticLayout:
        """Move the layout to a device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def __getitem__(self, index: slice) -> SemanticLayout:
        return self.map(lambda t: t[index])


def borders(ids: Tensor) -> Tensor:
    """Compute borders of id maps [..., H, W]: uint8, 1 where the left, right, upper or lower neighbour has another id.

    Both pixels of a differing pair are marked; the map does not wrap around.
    """
    marked = torch.zeros_like(ids, dtype=torch.bool)
    mark_borders(ids, marked)
    return marked.view(torch.uint8)


def nearest_indices(size: int, new_size: int, device: torch.device | None = None) -> Tensor:
    """Return the source index of each of ``new_size`` places under torch's ``nearest`` rule: int64 [new_size]."""
    source = torch.arange(size, dtype=torch.float32, device=device).view(1, 1, size)
    return F.interpolate(source, size=new_size, mode="nearest").view(new_size).long()


# ---------------------------------------------------------------------------------------- distinct neighbourhoods


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
