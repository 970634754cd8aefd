"""SemanticLayout: integer label maps and their views per resolution.

The heart of the package: label maps stay small integers from the disk to the layer that consumes them; each view that
a layer asks for is made once per resolution and cached. Knows nothing of files, classes' names or networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.distributed import mean_of_host_numbers
from imaginaire_spade.labels import mark_borders
from imaginaire_spade.layout_spec import LayoutSpec as LayoutSpec
from imaginaire_spade.neighbourhoods import PLACES, LayoutNeighbourhoods, Lookup, find_neighbourhoods

FEWEST_PIXELS_ON_GPU = 64 * 64
"""Of a label map, for tables: at 32x32 more than half of the 5x5 windows of real label maps are distinct."""


@dataclass(frozen=True)
class NoiseRegions:
    """Noise that is constant over each of a label map's regions: those of ``index``."""

    vectors: Tensor
    """float [N, K, D], the vectors of each label map."""
    index: Tensor | None
    """integers [N, H, W] of 0..K-1: which of its map's vectors a pixel has; None: K = 1, one for all pixels."""

    def map(self, function: Callable[[Tensor], Tensor], vectors: Callable[[Tensor], Tensor]) -> NoiseRegions:
        """Apply a function to the maps, another to the vectors."""
        return NoiseRegions(vectors(self.vectors), None if self.index is None else function(self.index))

    def to(self, device: torch.device) -> NoiseRegions:
        """Move it to a device."""
        return NoiseRegions(self.vectors.to(device), None if self.index is None else self.index.to(device))

    def rows(self) -> Tensor:
        """Return each pixel's row of all N K vectors: int64 [N, H, W], or [N, 1, 1] for all pixels."""
        count, size, _ = self.vectors.shape
        first = torch.arange(count, device=self.vectors.device).mul_(size).view(-1, 1, 1)
        return first if self.index is None else first + self.index

    def spread(self, height: int, width: int) -> Tensor:
        """Return each pixel's vector: float [N, D, H, W]."""
        if self.index is None:
            return self.vectors[:, 0, :, None, None].expand(-1, -1, height, width)
        return F.embedding(self.rows(), self.vectors.flatten(0, 1)).permute(0, 3, 1, 2)


Noise = Tensor | NoiseRegions
"""float [N, D], one vector per label map, or [N, D, H, W], one per pixel; or one per region."""


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
        self.noise: Tensor | NoiseRegions | None = None
        """float [N, D, H, W], or by region; ``with_noise`` sets it."""
        self._dense: Tensor | None = None
        self._one_hot: dict[torch.dtype, Tensor] = {}
        self._windows: dict[tuple[int, int, int], Lookup] = {}
        self._neighbourhoods: dict[int, LayoutNeighbourhoods] = {}
        self._counts: dict[tuple[int, bool], tuple[float, float]] = {}
        self._resized: list[SemanticLayout] = []
        self.ahead: Mapping[tuple[int, int, int], LayoutNeighbourhoods] = {}
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

    def with_noise(self, noise: Noise) -> SemanticLayout:
        """Make a layout of the same label maps with noise: D more channels, the first.

        Gradients flow to the noise. This layout stays as it is.
        """
        if isinstance(noise, Tensor) and noise.dim() == 2:
            noise = NoiseRegions(noise.unsqueeze(1), None)
        maps, vectors = (noise, noise) if isinstance(noise, Tensor) else (noise.index, noise.vectors)
        shape = self.labels.shape
        if vectors.shape[0] != shape[0] or (maps is not None and (maps.shape[0], *maps.shape[-2:]) != shape):
            sizes = [list(tensor.shape) for tensor in (vectors, maps) if tensor is not None]
            raise ValueError(f"noise {sizes} does not belong to labels {list(shape)}")
        layout = self.map(lambda tensor: tensor)
        layout.spec = replace(self.spec, num_noise_channels=vectors.shape[1 if vectors is maps else 2])
        layout.noise = noise
        if vectors is not maps and maps is None:  # else the neighbourhoods depend on more than which map it is
            layout.ahead = {view: found for view, found in self.ahead.items() if found.noise is not None}
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
        noise = [self.noise.vectors, self.noise.index] if isinstance(self.noise, NoiseRegions) else [self.noise]
        tensors = (self.labels, self._edges, self.distances, self.conditions, *noise)
        return [tensor for tensor in tensors if isinstance(tensor, Tensor)]

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
        self._resized.append(self.map(nearest, vectors=lambda same: same))
        self._resized[-1].ahead = self.ahead
        return self._resized[-1]

    def one_hot(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Build the dense view [N, num_channels, H, W] of 0/1 (noise, edges and conditions as given).

        Channels are noise, the classes, don't-care, edges, conditions.
        """
        if dtype not in self._one_hot:
            if self._dense is None:
                parts = [*self._noise_channels(), self._label_channels(dtype), *self._edges_and_conditions()]
            else:
                parts = [*self._noise_channels(), self._dense]
            parts = [part.to(dtype) for part in parts]
            self._one_hot[dtype] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return self._one_hot[dtype]

    def dense_channels(self, dtype: torch.dtype) -> Tensor:
        """Return the channels that are no labels [N, num_dense_channels, H, W]: noise, edges, conditions."""
        return torch.cat([part.to(dtype) for part in [*self._noise_channels(), *self._edges_and_conditions()]], 1)

    @property
    def noise_vectors(self) -> Tensor:
        """Return the vectors of noise by region: float [M, D], those of all label maps."""
        assert isinstance(self.noise, NoiseRegions)
        return self.noise.vectors.flatten(0, 1)

    def _label_channels(self, dtype: torch.dtype) -> Tensor:
        # One channel more than needed, cut off below, takes don't-care pixels that have no channel.
        shape = (self.labels.shape[0], self.spec.num_classes + 1, self.height, self.width)
        dense = torch.zeros(shape, dtype=dtype, device=self.device)
        dense.scatter_(1, self.labels.long().unsqueeze(1), 1)
        return dense[:, : self.spec.num_label_channels]

    def _noise_channels(self) -> list[Tensor]:
        noise = self.noise
        maps = noise.spread(self.height, self.width) if isinstance(noise, NoiseRegions) else noise
        return [] if maps is None else [maps]

    def _edges_and_conditions(self) -> list[Tensor]:
        parts = [None if self.edges is None else self.edges.unsqueeze(1), self.conditions]
        return [part for part in parts if part is not None]

    @property
    def is_dense(self) -> bool:
        """Return whether ``from_dense`` made it, so that ``labels`` are incomplete."""
        return self._dense is not None

    @property
    def is_discrete(self) -> bool:
        """Return whether one code per pixel says all of the one-hot view, so that codes can distinguish neighbourhoods.

        It does where the view is made of zeros, ones and noise by region.
        """
        floats = [self.edges, self.conditions, self.noise]
        is_float = any(isinstance(part, Tensor) and part.is_floating_point() for part in floats)
        return self._dense is None and not is_float

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
            each = (self.spec.num_classes + 1) * bits  # codes without noise
            num_vectors = 0 if self.noise is None else len(self.noise_vectors)
            num_codes = each * max(1, num_vectors)
            if isinstance(self.noise, NoiseRegions):
                codes = codes + (self.noise.rows() * each).int()
            inner, outer, pixels = find_neighbourhoods(codes, num_codes, kernel_size)
            none = self.spec.num_label_channels
            places = torch.arange(kernel_size**2, device=self.device)
            is_outside = inner == num_codes
            channels = (inner % each // bits).clamp_(max=none).masked_fill_(is_outside, none)
            # Beyond the map the code, and so the vector's number, is the one after the last: the row of "none".
            rows_of_noise = inner // each + places * (num_vectors + 1)
            self._neighbourhoods[kernel_size] = LayoutNeighbourhoods(
                labels=Lookup(channels + places * (none + 1), len(places) * (none + 1)),
                noise=Lookup(rows_of_noise, len(places) * (num_vectors + 1)) if num_vectors else None,
                edges=(inner % each % bits).bool() if self.spec.has_edges else None,
                outside=is_outside[:, [len(places) // 2]],
                outer=tuple(
                    Lookup(part * part.shape[1] + places[: part.shape[1]], len(inner) * part.shape[1])
                    for part in outer.split(PLACES, 1)
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

    def map(
        self, function: Callable[[Tensor], Tensor], vectors: Callable[[Tensor], Tensor] | None = None
    ) -> SemanticLayout:
        """Apply a function to every tensor; the caches of the new layout are empty.

        Args:
            vectors: what to apply to noise vectors, which are no maps; None: the function.
        """
        layout = SemanticLayout(
            self.spec,
            function(self.labels),
            function(self._edges) if isinstance(self._edges, Tensor) else self._edges,
            None if self.distances is None else function(self.distances),
            None if self.conditions is None else function(self.conditions),
        )
        if self._dense is not None:
            layout._dense = function(self._dense)
        if isinstance(self.noise, Tensor):
            layout.noise = function(self.noise)
        elif self.noise is not None:
            layout.noise = self.noise.map(function, vectors or function)
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
