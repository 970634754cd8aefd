"""Noise that differs from place to place, for generators that take it (OASIS): by class, region or pixel; and new noise
for a part of an image.

Every vector is drawn from a seed, the key of the image and what it belongs to, so that it depends neither on the order
of the images nor on what else their label maps hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.data.distances import connected_regions
from imaginaire_spade.errors import ConfigError, DataError, LabelError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.sizes import Size, format_size
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import Noise, NoiseRegions
from imaginaire_spade.noise import generator_for, style_noise

NoiseKind = Literal["image", "class", "region", "pixel"]
KINDS: tuple[NoiseKind, ...] = ("image", "class", "region", "pixel")
"""What has a noise vector of its own: an image, each class, each connected region of one class, each pixel."""

Place = int | tuple[int, int]
"""A class, by its train id; or a pixel, (x, y), for its region (with noise by class: for its class)."""


@dataclass(frozen=True)
class LocalNoise:
    """The noise of one image, drawn once there is a label map (``place``)."""

    kind: NoiseKind
    dims: int
    seed: int
    key: str
    """Of the image: with the seed it fixes every draw."""
    base: Tensor | None = None
    """float [dims]: the vector of noise by image, None for other kinds."""
    anew: tuple[tuple[Place, int], ...] = ()
    """Parts of the image whose noise is drawn from another seed; where they overlap, the last counts."""

    def at(self, own: Size, generated: Size, name: str) -> LocalNoise:
        """Convert the pixels of ``anew`` from a label map's own size to that at which it is generated.

        Raises:
            DataError: a pixel outside of the label map ``name``.
        """

        def convert(place: Place) -> Place:
            if isinstance(place, int):
                return place
            (x, y), (height, width) = place, own
            check_inside(place, own, name)
            return (2 * x + 1) * generated[1] // (2 * width), (2 * y + 1) * generated[0] // (2 * height)

        return replace(self, anew=tuple((convert(place), seed) for place, seed in self.anew))

    def place(self, labels: Tensor) -> PlacedNoise:
        """Find which parts of a label map [H, W] of train ids have noise of their own, and draw their vectors."""
        ids = labels.numpy().astype(np.int64)
        by_region = self.kind == "region" or any(isinstance(place, tuple) for place, _ in self.anew)
        regions = connected_regions(ids) if by_region else np.zeros_like(ids)
        seeds, which = [self.seed, *(seed for _, seed in self.anew)], np.zeros_like(ids)
        for number, (place, _) in enumerate(self.anew, 1):
            if isinstance(place, int):
                which[ids == place] = number
            else:
                parts = ids if self.kind == "class" else regions
                which[parts == parts[place[1], place[0]]] = number
        if self.kind == "pixel":
            return PlacedNoise(self, tuple(seeds), None, torch.from_numpy(which))
        parts = {"image": np.zeros_like(ids), "class": ids, "region": regions}[self.kind]
        pairs, index = np.unique(parts * len(seeds) + which, return_inverse=True)
        purposes = self._purposes(ids, parts)
        vectors = []
        for part, number in zip(*divmod(pairs, len(seeds)), strict=True):
            if self.base is not None and number == 0:
                vectors.append(self.base)
            else:
                vectors.append(style_noise(seeds[number], [self.key], self.dims, purposes[int(part)])[0])
        return PlacedNoise(self, tuple(seeds), torch.stack(vectors), torch.from_numpy(index.reshape(ids.shape)))

    def _purposes(self, ids: NDArray[np.int64], parts: NDArray[np.int64]) -> dict[int, str]:
        """Name what the vector of each part is drawn for: a region by its class, and by its place among these."""
        numbers, first = np.unique(parts, return_index=True)
        if self.kind == "image":
            return {0: "style"}
        purposes, seen = dict[int, str](), dict[int, int]()
        for number, c in zip(numbers.tolist(), ids.ravel()[first].tolist(), strict=True):
            purposes[number] = f"style of class {c}" + (f", region {seen.get(c, 0)}" if self.kind == "region" else "")
            seen[c] = seen.get(c, 0) + 1
        return purposes


@dataclass(frozen=True)
class PlacedNoise:
    """The noise of one image, or of a window of it."""

    source: LocalNoise
    seeds: tuple[int, ...]
    vectors: Tensor | None
    """float [K, dims]; None: by pixel."""
    index: Tensor
    """int64 [H, W]: each pixel's vector; by pixel: the seed that it is drawn from."""
    corner: tuple[int, int] = (0, 0)
    """Row and column of the window's first pixel in the image."""

    def window(self, rows: slice, columns: slice) -> PlacedNoise:
        """Cut a window out of the noise of a whole image."""
        return replace(self, index=self.index[rows, columns], corner=(rows.start, columns.start))

    def per_pixel(self) -> Tensor:
        """Draw noise by pixel: float32 [dims, H, W]. (Row by row, so that a window costs no more than its rows.)"""
        (top, left), (height, width) = self.corner, self.index.shape
        drawn = np.empty((height, width, self.source.dims), np.float32)
        for number, row in enumerate(self.index.numpy()):
            for which in np.unique(row):
                random = generator_for(self.seeds[which], self.source.key, f"style of row {top + number}")
                values = random.standard_normal((left + width, self.source.dims), np.float32)[left:]
                drawn[number][row == which] = values[row == which]
        return torch.from_numpy(drawn).permute(2, 0, 1)


def check_inside(pixel: tuple[int, int], size: Size, name: str) -> None:
    """Check that a label map has a pixel (x, y) that gets new noise.

    Raises:
        DataError: it does not.
    """
    if not (0 <= pixel[0] < size[1] and 0 <= pixel[1] < size[0]):
        raise DataError(
            f"{name}: new noise at {pixel[0]},{pixel[1]}: outside of this label map of {format_size(size)} (height x"
            " width)"
        )


def stack_noise(placed: Sequence[PlacedNoise], height: int, width: int) -> Noise:
    """Stack the noise of images, filled up at the bottom and on the right to one size, for a generator."""
    sides = [(0, width - noise.index.shape[1], 0, height - noise.index.shape[0]) for noise in placed]
    vectors = [noise.vectors for noise in placed if noise.vectors is not None]
    if not vectors:
        maps = [F.pad(noise.per_pixel(), side, "replicate") for noise, side in zip(placed, sides, strict=True)]
        return torch.stack(maps)
    most = max(map(len, vectors))
    rows = torch.stack([F.pad(rows, (0, 0, 0, most - len(rows))) for rows in vectors])
    return NoiseRegions(rows, torch.stack([F.pad(n.index, side) for n, side in zip(placed, sides, strict=True)]))


def check_takes_local_noise(model: Model, what: str) -> None:
    """Check that the generator takes noise that differs from place to place.

    Args:
        what: the user's wish, as they wrote it.
    Raises:
        ConfigError: it does not.
    """
    if not model.generator.takes_local_noise:
        raise ConfigError(
            f"{what}: this generator (gen.type: {model.config.gen.type}) takes no noise in parts of an image: leave it"
            " out. Generators of gen.type: oasis with style_dims above 0 take it"
        )


def read_place(labels: LabelSpec, text: str, flag: str) -> Place:
    """Parse what gets new noise: the name or train id of a class, or a pixel X,Y.

    Raises:
        ConfigError: neither.
    """
    if found := re.fullmatch(r"([0-9]{1,9}) *, *([0-9]{1,9})", text.strip()):
        return int(found[1]), int(found[2])
    try:
        return labels.id_of(text)
    except LabelError as error:
        raise ConfigError(f"{flag} {text}: {error}; or a pixel X,Y of the label map, such as 120,40") from None


def read_parts(labels: LabelSpec, parts: Mapping[str | Place, int] | None) -> tuple[tuple[Place, int], ...]:
    """Convert the parts that get new noise, as Python states them, with their seeds: ``{"sky": 7, (120, 40): 8}``.

    Raises:
        ConfigError: no mapping, no class, no pixel of two whole numbers, or no whole number as seed.
    """
    if not isinstance(parts, Mapping):
        raise ConfigError(f"anew: {parts!r}: write the parts and the seed of each, such as {{'sky': 7, (120, 40): 8}}")
    read: list[tuple[Place, int]] = []
    for place, seed in parts.items():
        if not isinstance(seed, int | np.integer):
            raise ConfigError(f"anew {place}: its seed is {seed!r}: give a whole number")
        if not isinstance(place, tuple):
            place = read_place(labels, str(place), "anew")
        elif len(place) != 2 or not all(isinstance(value, int | np.integer) for value in place):
            raise ConfigError(f"anew {place}: a pixel is (x, y), two whole numbers")
        read.append((place, int(seed)))
    return tuple(read)
