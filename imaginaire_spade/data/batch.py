"""One sample, and batches of samples of one size.

Images stay uint8 until ``normalise`` on the device. No tensor here is one-hot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.errors import DataError
from imaginaire_spade.layout import FEWEST_PIXELS_ON_GPU, Edges, LayoutSpec, SemanticLayout
from imaginaire_spade.neighbourhoods import LayoutNeighbourhoods


class Sample(NamedTuple):
    """One sample, on the CPU."""

    image: Tensor | None
    """[C, H, W], in memory channels last: uint8, or float32 0..255 where ``data.images`` has a range."""
    labels: Tensor
    """uint8 or int16 [H, W], train ids 0..num_classes (num_classes = don't care)."""
    edges: Tensor | None
    """uint8 [H, W] of 0/1."""
    distances: Tensor | None
    """float32 [2, H, W], row and column offsets in (-1, 1)."""
    key: str
    original_size: tuple[int, int]
    """(height, width) of the stored label map."""
    position: int
    """Position in the run. Every random number of the sample is a function of it and the seed."""
    conditions: Tensor | None = None
    """float32 [C, H, W], the channels of all ``data.conditions``, their ranges scaled to [-1, 1]."""

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the sample."""
        tensors = (self.image, self.labels, self.edges, self.distances, self.conditions)
        return [tensor for tensor in tensors if tensor is not None]


ALIGNMENT = 16
"""Bytes: where each tensor begins in the memory of an ``Ahead``."""


@dataclass(frozen=True, eq=False)
class Ahead(Mapping[tuple[int, int, int], LayoutNeighbourhoods]):
    """Neighbourhoods of the views of a layout, found on the host before a GPU asks for them: a mapping like ``found``,
    whose tensors are made when the first one is asked for."""

    memory: Tensor
    """All tensors of ``found``: uint8 [bytes]."""
    found: dict[tuple[int, int, int], LayoutNeighbourhoods]
    """Kernel size, height, width of a view -> its neighbourhoods; tensors without memory."""

    @classmethod
    def of(cls, layout: SemanticLayout, kernel_sizes: Sequence[int], with_noise: bool = False) -> Ahead:
        """Find what the tables of a GPU need: at the resolutions of FEWEST_PIXELS_ON_GPU or more.

        Args:
            layout: on the host; nothing in it is changed.
            with_noise: whether a generator will give each label map a noise vector, so that no two share neighbourhoods
                (which depend on which map it is, not on the vector).
        """
        view, found, packed = layout[:], {}, [torch.empty(0, dtype=torch.uint8)]
        if with_noise:
            view = view.with_noise(torch.zeros(len(view), 1))

        def pack(tensor: Tensor) -> Tensor:
            tensor = tensor.int() if tensor.dtype == torch.int64 else tensor
            as_bytes = tensor.flatten().view(torch.uint8)
            packed.append(F.pad(as_bytes, (0, -len(as_bytes) % ALIGNMENT)))
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        height, width = view.height, view.width
        while height * width >= FEWEST_PIXELS_ON_GPU and view.is_discrete:
            for size in kernel_sizes:
                found[size, height, width] = view.resized(height, width).neighbourhoods(size).map(pack)
            height, width = (0, 0) if height % 2 or width % 2 else (height // 2, width // 2)
        return cls(torch.cat(packed), found)

    def map(self, function: Callable[[Tensor], Tensor]) -> Ahead:
        """Apply a function to the memory."""
        return Ahead(function(self.memory), self.found)

    def __getitem__(self, key: tuple[int, int, int]) -> LayoutNeighbourhoods:
        return self._unpacked[key]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @cached_property
    def _unpacked(self) -> dict[tuple[int, int, int], LayoutNeighbourhoods]:
        """``found``, its tensors views of the memory: each by one operation, since there are dozens."""
        whole, place = {dtype: self.memory.view(dtype) for dtype in (torch.int32, torch.bool)}, 0

        def view(tensor: Tensor) -> Tensor:
            nonlocal place
            of, start = whole[tensor.dtype], place
            size = tensor.numel() * of.element_size()
            place += size + -size % ALIGNMENT
            return of.as_strided(tensor.shape, tensor.stride(), of.storage_offset() + start // of.element_size())

        return {key: around.map(view) for key, around in self.found.items()}


@dataclass(frozen=True)
class Batch:
    """Samples of one size, on one device."""

    layout: SemanticLayout
    images: Tensor | None
    """[N, C, H, W], in memory channels last, as images are decoded: uint8, or float32 0..255."""
    keys: tuple[str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]
    ahead: tuple[Ahead, ...] = ()
    """Neighbourhoods of the layout that the loader found, of each of the parts that ``split`` will give."""
    style_codes: Tensor | None = None
    """float32 [N, 2, style_dims], where they are drawn before the step: for a CUDA graph (see ``step.generate``). A
    part has none."""
    augmentation: Tensor | None = None
    """Likewise the draws for what the discriminator sees: float32 [N, policies, 4]."""

    def __post_init__(self) -> None:
        if len(self.ahead) == 1:
            self.layout.ahead = self.ahead[0]

    @classmethod
    def collate(cls, spec: LayoutSpec, samples: Sequence[Sample]) -> Batch:
        """Stack samples. Edges that they lack are drawn from their labels when first asked for.

        Raises:
            DataError: the samples differ in size.
        """
        first = samples[0]
        for sample in samples:
            if sample.labels.shape != first.labels.shape:
                raise DataError(
                    f"{first.key} is {list(first.labels.shape)} and {sample.key} {list(sample.labels.shape)} (height,"
                    " width) after augmentation, but a batch holds one size. Write random_crop_h_w: [256, 256] or"
                    " resize_h_w: [256, 256] in that split's augmentations, or batch_size: 1"
                )
        images = _stack(None if sample.image is None else sample.image.permute(1, 2, 0) for sample in samples)
        edges: Edges = _stack(sample.edges for sample in samples)
        if spec.has_edges and edges is None:
            edges = "labels"
        labels = torch.stack([sample.labels for sample in samples])
        others = [[sample.distances for sample in samples], [sample.conditions for sample in samples]]
        return cls(
            SemanticLayout(spec, labels, edges, *(_stack(maps) for maps in others)),
            None if images is None else images.permute(0, 3, 1, 2),
            tuple(sample.key for sample in samples),
            tuple(sample.original_size for sample in samples),
            tuple(sample.position for sample in samples),
        )

    def fill(self, samples: Sequence[Sample]) -> None:
        """Overwrite the first tensors of the batch by those of samples, of the same kinds and size."""
        for place, sample in enumerate(samples):
            for tensor, part in zip(self.tensors(), sample.tensors(), strict=True):
                if tensor[place].data_ptr() != part.data_ptr():  # else it was made there
                    tensor[place].copy_(part)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, part: slice) -> Batch:
        images = None if self.images is None else self.images[part]
        return Batch(self.layout[part], images, self.keys[part], self.original_sizes[part], self.positions[part])

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        own = (self.images, self.style_codes, self.augmentation)
        images, z, draws = (None if tensor is None else function(tensor) for tensor in own)
        ahead = tuple(part.map(function) for part in self.ahead)
        layout = self.layout.map(function)
        return replace(self, layout=layout, images=images, ahead=ahead, style_codes=z, augmentation=draws)

    def look_ahead(self, kernel_sizes: Sequence[int], pieces: int, with_noise: bool = False) -> tuple[Ahead, ...]:
        """Find the neighbourhoods of a batch on the host, for ``ahead``: see ``Ahead.of``."""
        size = len(self) // pieces
        parts = (self.layout[start : start + size] for start in range(0, len(self), size))
        return tuple(Ahead.of(part, kernel_sizes, with_noise) for part in parts) if kernel_sizes else ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move the batch to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the batch."""
        others = [t for t in (self.images, self.style_codes, self.augmentation) if t is not None]
        return [*others, *self.layout.tensors(), *(part.memory for part in self.ahead)]

    def split(self, pieces: int) -> Iterator[Batch]:
        """Yield equal parts, in order, each made when its turn comes: its layout's cache lives no longer than it."""
        assert pieces > 0 and len(self) % pieces == 0, f"{len(self)} samples do not split into {pieces} equal parts"
        size = len(self) // pieces
        for number, start in enumerate(range(0, len(self), size)):
            piece = self if pieces == 1 else self[start : start + size]
            yield replace(piece, ahead=self.ahead[number : number + 1]) if pieces > 1 and self.ahead else piece


def _stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """Stack tensors, or return None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 or floats of 0..255 to float32 in [-1, 1], of any shape, contiguous: x / 127.5 - 1."""
    return images.contiguous().float() / 127.5 - 1


def denormalise(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8 0..255, rounded and clamped: the inverse of ``normalise``."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
