"""Carry batches from a loader's worker to the device, and manage the memory for them.

Nothing here is ever one-hot, and pictures stay uint8 until ``normalise`` on the device.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.data.sample import Sample
from imaginaire_spade.errors import DataError
from imaginaire_spade.layout import Edges, LayoutSpec, SemanticLayout


@dataclass(frozen=True)
class Batch:
    """Samples of one size, on one device."""

    layout: SemanticLayout
    images: Tensor | None
    """uint8 [N, 3, H, W], in memory channels last, as pictures are decoded."""
    keys: tuple[str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    draws: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        images = None if self.images is None else self.images.to(device, non_blocking=non_blocking)
        layout = self.layout.to(device, non_blocking=non_blocking)
        return Batch(layout, images, self.keys, self.original_sizes, self.draws)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch."""
        return self.layout.tensors() if self.images is None else [self.images, *self.layout.tensors()]

    def split(self, pieces: int) -> Iterator[Batch]:
        """Equal parts, in order, each made when its turn comes: what a part's layout caches lives no longer than it."""
        assert pieces > 0 and len(self) % pieces == 0, f"{len(self)} samples do not split into {pieces} equal parts"
        if pieces == 1:
            yield self
            return
        size = len(self) // pieces
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                self.layout[part],
                None if self.images is None else self.images[part],
                self.keys[part],
                self.original_sizes[part],
                self.draws[part],
            )


NO_SHARED_MEMORY = (
    "the loader's workers have too little shared memory: start the container with --shm-size=8g (docker), or write"
    " data.num_workers: 0"
)


class BufferPool:
    """Memory in which parcels pass from workers to the process that made the pool, used again and again.

    New shared memory for each would cost a tenth of a worker's time: its pages are zeroed one by one, and its
    descriptor is passed on.

    Args:
        num_buffers: as many parcels may be under way or in use; more take memory of their own.
        num_bytes: of each buffer.
    """

    def __init__(self, num_buffers: int, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // 64) * 64  # numbers of any width may begin where a buffer does
        self._memory = new_memory(num_buffers * num_bytes, shared=True).view(num_buffers, num_bytes)
        self._free = list(range(num_buffers))
        self._number = next(_numbers)
        _pools[self._number] = self

    def lend(self) -> Buffer | None:
        """A buffer for a worker to fill, if one is free."""
        return Buffer(self._number, self._free.pop()) if self._free else None

    def memory(self, buffer: Buffer) -> Tensor:
        """For a worker: uint8, at least ``num_bytes`` long."""
        return self._memory[buffer.place]

    def take_back(self, buffer: Buffer, num_bytes: int) -> Tensor:
        """What a worker has filled, uint8 [num_bytes]. The buffer is free again when no tensor looks at it."""
        array = self._memory[buffer.place].numpy()[:num_bytes]
        weakref.finalize(array, self._free.append, buffer.place)  # (a tensor's storage keeps its array)
        return torch.from_numpy(array)


class Buffer(NamedTuple):
    """A buffer of a pool, as processes name it to each other."""

    pool: int
    place: int


_numbers = itertools.count()
_pools: weakref.WeakValueDictionary[int, BufferPool] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Parcel:
    """A batch whose tensors lie in one piece of memory, and so pass between processes at the cost of one."""

    memory: Tensor
    """uint8 [bytes]."""
    places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """"images" (channels last), "labels", "edges", "distances", as far as there are: first byte, dtype, shape."""
    spec: LayoutSpec
    keys: tuple[str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    draws: tuple[int, ...]
    buffer: Buffer | None = None
    """Whose memory it is, if any's. Such a parcel passes to the pool's process without it."""

    @staticmethod
    def images_in(memory: Tensor, count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the place for the packed images of ``count`` samples of ``size``: uint8 [count, H, W, 3]."""
        return memory[memory.nbytes - count * size[0] * size[1] * 3 :].view(count, *size, 3).numpy()

    @classmethod
    def pack(
        cls,
        spec: LayoutSpec,
        samples: Sequence[Sample],
        *,
        memory: Tensor | None = None,
        buffer: Buffer | None = None,
        shared: bool = False,
    ) -> Parcel:
        """Samples of one size -> a parcel. Edges that the samples lack will be drawn from their labels.

        Args:
            memory: what to lay it in, uint8 of just its length; pictures that are where they belong stay there.
            buffer: whose memory that is, if any's.
            shared: if there is none: make it so that processes can share it.
        Raises:
            DataError: sizes differ.
        """
        first = samples[0]
        for sample in samples:
            if sample.labels.shape != first.labels.shape:
                raise DataError(
                    f"{first.key} is {list(first.labels.shape)} and {sample.key} {list(sample.labels.shape)} (height,"
                    " width) after augmentation, but a batch holds one size. Write random_crop_h_w: [256, 256] or"
                    " resize_h_w: [256, 256] in that split's augmentations, or batch_size: 1"
                )
        height, width = first.labels.shape
        kinds: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("labels", first.labels.dtype, (height, width))]
        if spec.has_distances:
            kinds.insert(0, ("distances", torch.float32, (2, height, width)))
        if first.edges is not None:
            kinds.append(("edges", torch.uint8, (height, width)))
        if first.image is not None:
            kinds.append(("images", torch.uint8, (height, width, 3)))
        places, end = {}, 0  # the widest numbers come first, so that all begin where their dtype may
        for name, dtype, shape in kinds:
            places[name] = end, dtype, (len(samples), *shape)
            end += len(samples) * torch.Size(shape).numel() * dtype.itemsize
        if memory is None:
            memory = new_memory(end, shared)
        assert memory.nbytes == end
        parcel = cls(
            memory,
            places,
            spec,
            tuple(sample.key for sample in samples),
            tuple(sample.original_size for sample in samples),
            tuple(sample.draw for sample in samples),
            buffer,
        )
        tensors = {
            "labels": [sample.labels for sample in samples],
            "edges": [sample.edges for sample in samples if sample.edges is not None],
            "distances": [sample.distances for sample in samples if sample.distances is not None],
            "images": [sample.image.permute(1, 2, 0) for sample in samples if sample.image is not None],
        }
        for name, parts in tensors.items():
            assert len(parts) == (len(samples) if name in places else 0)
            if parts and parts[0].data_ptr() != (whole := parcel._tensor(name)).data_ptr():
                torch.stack(parts, out=whole)
        return parcel

    def __getstate__(self) -> dict[str, Any]:
        lent = {"memory": self.memory.nbytes} if self.buffer else {}
        return self.__dict__ | lent

    def __setstate__(self, state: dict[str, Any]) -> None:
        if buffer := state["buffer"]:
            state |= {"memory": _pools[buffer.pool].take_back(buffer, state["memory"]), "buffer": None}
        self.__dict__.update(state)

    def pin_memory(self) -> Parcel:
        return replace(self, memory=self.memory.pin_memory())

    def open(self) -> Batch:
        """The batch; its tensors are views."""
        tensors = {name: self._tensor(name) for name in self.places}
        images = tensors["images"].permute(0, 3, 1, 2) if "images" in tensors else None
        edges: Edges = "labels" if self.spec.has_edges else None
        layout = SemanticLayout(self.spec, tensors["labels"], tensors.get("edges", edges), tensors.get("distances"))
        return Batch(layout, images, self.keys, self.original_sizes, self.draws)

    def _tensor(self, name: str) -> Tensor:
        start, dtype, shape = self.places[name]
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[start : start + num_bytes].view(dtype).view(shape)


def new_memory(num_bytes: int, shared: bool) -> Tensor:
    """uint8 [num_bytes]; ``shared``: such that processes can share it. Raises DataError where that has no room."""
    if not shared:
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(num_bytes)  # as torch's own collate does
    except RuntimeError as error:
        raise DataError(f"{NO_SHARED_MEMORY} ({error})") from None
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,), (1,))


def normalise(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], of any shape, contiguous: x / 127.5 - 1."""
    return images.contiguous().float() / 127.5 - 1


def denormalise(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 0..255, rounded and clamped: the inverse of ``normalise``."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
