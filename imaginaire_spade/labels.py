"""LabelSpec: what the integers of a label map mean. EdgeSource: where the edges beside it come from.

Responsible for the table raw id -> train id (with its "ignored" and "error" entries), names and palette of a data set,
and the wording of every complaint about label values. Knows nothing of files or tensors: arrays in, arrays out.
"""

from __future__ import annotations

import colorsys
import difflib
import re
from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from imaginaire_spade.errors import DataError, LabelError

MIN_RAW_ID, MAX_RAW_ID = -32768, 65535
"""Label maps are 8- or 16-bit, signed or not: the raw ids that a file can hold."""

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SIDE = re.compile(r"left|right|(?<![a-z])[lr](?![a-z])")


class EdgeSource(StrEnum):
    """Where the edge channel comes from (``data.edges``)."""

    NONE = "none"
    FILE = "file"
    INSTANCES = "instances"
    LABELS = "labels"

    @property
    def files_needed(self) -> tuple[str, ...]:
        """List the data types, beside label maps, that edges are read from."""
        return {EdgeSource.FILE: ("edge_maps",), EdgeSource.INSTANCES: ("inst_maps",)}.get(self, ())

    def draw(self, labels: NDArray[np.generic], stored: NDArray[np.generic] | None) -> NDArray[np.uint8] | None:
        """Make the edges of a sample: uint8 [H, W] of 0/1; None where there is no edge channel.

        Args:
            labels: integers [H, W].
            stored: the map [H, W] of ``files_needed``: 0/1 for an edge map, integers for an instance map.
        """
        if self is EdgeSource.NONE:
            return None
        if self is EdgeSource.LABELS:
            return edges_from_ids(labels)
        assert stored is not None
        return edges_from_ids(stored) if self is EdgeSource.INSTANCES else stored.astype(np.uint8, copy=False)


def edges_from_ids(ids: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Mark borders as ``layout.borders`` does, 1.4 (uint8) to 2.6 (int32) times as fast on CPUs.

    Args:
        ids: integers [H, W].
    Returns:
        uint8 [H, W], 1 where the left, right, upper or lower neighbour has another id.
    """
    edges = np.zeros(ids.shape, np.bool_)
    mark_borders(ids, edges)
    return edges.view(np.uint8)


def mark_borders(ids: Any, edges: Any) -> None:
    """Set ``edges`` [..., H, W], bool, where a neighbour in ``ids`` has another id; both are arrays or both tensors."""
    across, down = ids[..., 1:] != ids[..., :-1], ids[..., 1:, :] != ids[..., :-1, :]
    edges[..., 1:] |= across
    edges[..., :-1] |= across
    edges[..., 1:, :] |= down
    edges[..., :-1, :] |= down


class LabelSpec(BaseModel):
    """The label table of a data set, as YAML states it under ``data.labels``.

    Train ids are 0 .. num_classes-1; ``num_classes`` itself is the don't-care id. With ``dont_care`` the networks see
    it as one more channel; without, such a pixel has no channel set.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    num_classes: int = Field(ge=0, le=32000)
    """Number of classes, don't-care not counted. 0 is what ``data.labels: null`` means: there are no label maps."""
    dont_care: bool = True
    """Whether the networks get a channel for pixels without a class."""
    ignore: tuple[int, ...] = ()
    """Raw ids that mean "no class", such as 255; in signed files (TIFF, NPY) negative ones too, such as -1."""
    remap: dict[int, int] = {}
    """Raw id -> train id, for ids that are not their own train id."""
    names: tuple[str, ...] = ()
    """One name per class."""
    palette: tuple[tuple[int, int, int], ...] = ()
    """One RGB colour per class (0..255): for images of label maps and for reading RGB label maps (in which no colour
    that several classes share may occur)."""
    nearest_color: float | None = Field(None, gt=0, le=442)
    """RGB label maps with blended borders, and JPEGs: read a colour that the palette lacks as the nearest one of it, at
    most this far away (Euclidean distance, 1..442). null = such a colour is an error."""
    mirror: dict[str | int, str | int] = {}
    """Class -> its counterpart on the other side (names or ids; each pair once or both ways): a horizontal flip swaps
    them, so that a left eye stays a left eye."""
    absent: tuple[str, ...] = ()
    """Names of classes that the data set's label maps never show. The build says so if one occurs, since ids are then
    probably numbered in another way. Names that the table does not have count for nothing."""

    @model_validator(mode="after")
    def _check(self) -> LabelSpec:
        if not self.num_classes and self.dont_care:
            raise ValueError("num_classes: 0: to train without label maps write data.labels: null")
        for raw in (*self.ignore, *self.remap):
            if not MIN_RAW_ID <= raw <= MAX_RAW_ID:
                raise ValueError(f"raw id {raw} cannot occur in an 8- or 16-bit label map ({MIN_RAW_ID}..{MAX_RAW_ID})")
        for raw, train in self.remap.items():
            if not 0 <= train < self.num_classes:
                raise ValueError(
                    f"remap {{{raw}: {train}}}: train ids are 0..{self.num_classes - 1} (num_classes:"
                    f' {self.num_classes}); for "no class" write ignore: [{raw}]'
                )
        if both := set(self.ignore) & set(self.remap):
            raise ValueError(f"raw ids {sorted(both)} stand in both ignore and remap: keep one")
        for field in ("names", "palette"):
            if getattr(self, field) and len(getattr(self, field)) != self.num_classes:
                raise ValueError(f"{field} has {len(getattr(self, field))} entries for num_classes: {self.num_classes}")
        if any(not 0 <= value <= 255 for colour in self.palette for value in colour):
            raise ValueError("palette: colours are RGB triples of 0..255")
        if self.nearest_color and not self.palette:
            raise ValueError("nearest_color: needs the colours of the classes: write palette: [[r, g, b], ...]")
        for left, right in self._pairs:
            assert self.mirrored is not None
            if left == right or self.dont_care_id in (left, right) or [*self.mirrored[[left, right]]] != [right, left]:
                raise ValueError(
                    f"mirror: {self.name(left)}: {self.name(right)}: a class has one counterpart, another class"
                )
        return self

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """List the train ids of ``mirror``."""
        try:
            return [(self.id_of(str(left)), self.id_of(str(right))) for left, right in self.mirror.items()]
        except LabelError as error:
            raise ValueError(f"mirror: {error}") from None

    @cached_property
    def mirrored(self) -> NDArray[np.generic] | None:
        """Tabulate train id -> that in a mirrored image: ``dtype`` [num_classes + 1]; None: it stays."""
        if not self.mirror:
            return None
        table = np.arange(self.num_classes + 1).astype(self.dtype)
        for left, right in self._pairs:
            table[[left, right]] = right, left
        return table

    def sided_classes(self) -> dict[str, str]:
        """Find the classes whose names differ in their side alone (left eye, right eye) and that ``mirror`` lacks."""
        names = {name.lower(): i for i, name in enumerate(self.names)}
        known = {i for pair in self._pairs for i in pair}
        found: dict[str, str] = {}
        for name, i in names.items():
            other = names.get(_SIDE.sub(lambda side: _SIDES[side[0]], name), i)
            if other != i and i not in known:
                found[self.names[i]] = self.names[other]
                known |= {i, other}
        return found

    @property
    def dont_care_id(self) -> int:
        """Return the train id of pixels without a class."""
        return self.num_classes

    @property
    def dtype(self) -> type[np.generic]:
        """Return uint8 where all ids, don't-care and the error mark fit; else int16."""
        return np.uint8 if self.num_classes < 255 else np.int16

    @property
    def error_id(self) -> int:
        """Return the table's mark for raw ids that must not occur."""
        return 255 if self.dtype is np.uint8 else -1

    @cached_property
    def table(self) -> NDArray[np.generic]:
        """Tabulate raw id -> train id, ``dont_care_id`` or ``error_id``: ``dtype`` [98304], negative ids at the end."""
        table = np.full(MAX_RAW_ID + 1 - MIN_RAW_ID, self.error_id, self.dtype)
        table[: self.num_classes] = np.arange(self.num_classes)
        table[list(self.remap)] = list(self.remap.values())
        table[list(self.ignore)] = self.dont_care_id
        return table

    @property
    def known_ids(self) -> list[int]:
        """List the raw ids that the table has: classes and ignored ones."""
        places = np.flatnonzero(self.table != self.error_id)
        return np.where(places > MAX_RAW_ID, places - len(self.table), places).tolist()

    @property
    def channel_order(self) -> list[int] | None:
        """List the label channels of raw ids 0, 1, ...; None unless they fill every channel exactly once."""
        num_channels = self.num_classes + self.dont_care
        order = [int(i) for i in self.table[:num_channels]]
        return order if sorted(order) == list(range(num_channels)) else None

    @cached_property
    def colours(self) -> NDArray[np.uint8]:
        """Return the RGB colour of every train id, don't-care (black) last: uint8 [num_classes + 1, 3]."""
        own = np.array(self.palette, np.uint8) if self.palette else distinct_colours(self.num_classes)
        return np.concatenate([own, np.zeros((1, 3), np.uint8)])

    def name(self, train_id: int) -> str:
        """Return the name of a class."""
        if train_id == self.dont_care_id:
            return "don't care"
        return self.names[train_id] if self.names else f"class {train_id}"

    def id_of(self, name: str) -> int:
        """Find a class's train id by name, or by the id's digits.

        Raises:
            LabelError: no such class; the message has the nearest names.
        """
        ids = range(self.num_classes + 1)
        by_name = {self.name(i): i for i in reversed(ids)} | {str(i): i for i in ids}
        if name not in by_name:
            names = [self.name(i) for i in ids]
            near = difflib.get_close_matches(name, names, 3) or [names[0], "...", names[-1]]
            raise LabelError(
                f"{name!r} is no class of the table: write a name ({', '.join(near)}) or an id (0..{self.num_classes})"
            )
        return by_name[name]

    def to_train_ids(
        self, raw: NDArray[np.generic], where: str, *, unknown: Literal["error", "dont_care"] = "error"
    ) -> NDArray[np.generic]:
        """Convert a raw label map to train ids.

        Args:
            raw: integer [H, W], -32768..65535, or uint8 [H, W, 3] RGB where the spec has a palette.
            where: file or key, for the message.
            unknown: whether ids and colours outside the table raise, or count as don't care.
        Returns:
            ``dtype`` [H, W], values 0..num_classes (``num_classes`` = don't care).
        Raises:
            LabelError: naming the file, the values and the line to write.
        """
        if raw.ndim == 3:
            return self._from_rgb(raw, where, unknown)
        if raw.dtype == np.uint8:
            # Four times as fast as indexing.
            mapped: NDArray[np.generic] = cv2.LUT(np.ascontiguousarray(raw), self.table[:256])  # type: ignore[arg-type]
        else:
            mapped = self.table[raw.astype(np.intp, copy=False)]
        if not mapped.size or (mapped.min() if self.error_id < 0 else mapped.max()) != self.error_id:
            return mapped
        wrong = mapped == self.error_id
        if unknown == "error":
            values, present = ([*np.unique(a).tolist()] for a in (raw[wrong], raw))
            raise LabelError(self._complain(values, present, where), where, values, present)
        mapped[wrong] = self.dont_care_id
        return mapped

    def count_pixels(self, raw: NDArray[np.generic], where: str) -> dict[int, int]:
        """Count pixels per train id (``num_classes`` = don't care), for the ids that occur in a raw label map.

        Faster than ``to_train_ids`` and a count.

        Raises:
            LabelError: as ``to_train_ids``.
        """
        pixels = raw.reshape(-1, *raw.shape[2:])  # [H W] or [H W, 3]
        # By runs of one value, which are some twenty times fewer than pixels.
        is_start = np.zeros(len(pixels) // 8 * 8 + 8, np.bool_)
        is_start[[0, len(pixels)]] = True  # (the end, where no run starts, ends the last one)
        if raw.ndim == 3:
            (pixels[1:] != pixels[:-1]).any(1, out=is_start[1 : len(pixels)])
        else:
            np.not_equal(pixels[1:], pixels[:-1], out=is_start[1 : len(pixels)])
        eights = is_start.view(np.uint64)  # most hold no start
        some = (eights != 0).nonzero()[0]
        place = eights[some].view(np.bool_).nonzero()[0]
        bounds = some[place >> 3] * 8 + (place & 7)
        ids = self.to_train_ids(pixels[bounds[:-1]][None], where)[0]
        counts = np.bincount(ids, bounds[1:] - bounds[:-1])
        return {i: int(count) for i, count in enumerate(counts.tolist()) if count}

    def colourise(self, train_ids: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Convert train ids [...] to RGB uint8 [..., 3]."""
        return self.colours[train_ids]

    def _from_rgb(self, rgb: NDArray[np.generic], where: str, unknown: str) -> NDArray[np.generic]:
        if rgb.shape[2] != 3 or rgb.dtype != np.uint8:
            raise LabelError(
                f"{where}: a label map of {rgb.shape[2]} channels ({rgb.dtype}); it must be single-channel (8 or 16"
                " bit), palette or RGB without alpha. Save it as a grey PNG of class ids"
            )
        if not self.palette:
            raise LabelError(
                f"{where}: an RGB colour image, but label maps hold class ids. Give the colours in the config, one"
                " per class: data.labels.palette: [[r, g, b], ...]; or save a single-channel PNG of ids"
            )
        code = _codes(rgb)
        codes = _codes(np.array(self.palette, np.uint8))
        colours, classes, uses = np.unique(codes, return_index=True, return_counts=True)
        if self.nearest_color:
            code = self._nearest(code, colours)
        place = np.searchsorted(colours, code).clip(max=len(colours) - 1)
        known = colours[place] == code
        shared = known & (uses[place] > 1)
        ids = np.where(known & ~shared, classes[place], self.dont_care_id).astype(self.dtype)
        if unknown == "dont_care":
            return ids
        if shared.any():
            same = np.flatnonzero(codes == code[shared][0]).tolist()
            raise LabelError(
                f"{where}: the colour {self.palette[same[0]]} stands for several classes of data.labels.palette:"
                f" {', '.join(f'{i} ({self.name(i)})' for i in same)}. Save the map as a single-channel PNG of ids,"
                " or give these classes colours of their own, there and in the file"
            )
        # Black is "no class" in colour maps that colourise() wrote, unless a class of the palette is black.
        wrong = ~known & (code != 0)
        if wrong.any():
            values = np.unique(code[wrong]).tolist()
            share = f", {100 * wrong.mean():.3g} % of the pixels"
            raise LabelError(self._complain_of_colours(values, where, share), where, values, is_colour=True)
        if not known.all() and not self.ignore:
            raise LabelError(
                f'{where}: black pixels, which are no class of data.labels.palette. If they mean "no class", write'
                " data.labels.ignore: [255]; else add black to the palette"
            )
        return ids

    def _nearest(self, code: NDArray[np.uint32], colours: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Replace each colour by the nearest of ``colours`` (or black, if it may mean "no class") within reach."""
        seen, inverse = np.unique(code, return_inverse=True)
        nearest, best = seen.copy(), np.full(seen.shape, float(self.nearest_color or 0))
        for colour in [0, *colours.tolist()] if self.ignore else colours.tolist():
            shifts = np.array([[16], [8], [0]])
            distance = np.linalg.norm((seen >> shifts & 255).astype(np.float32) - (colour >> shifts & 255), axis=0)
            is_near = distance <= best
            nearest[is_near], best[is_near] = colour, distance[is_near]
        return nearest[inverse].reshape(code.shape)

    def count_blended(self, raw: NDArray[np.generic]) -> int:
        """Count the pixels whose colour is not in the palette, but taken for one that is (``nearest_color``)."""
        if self.nearest_color is None or raw.ndim != 3:
            return 0
        return int(np.isin(_codes(raw), [0, *_codes(np.array(self.palette, np.uint8))], invert=True).sum())

    def join_complaints(self, errors: Sequence[DataError], checked: int) -> list[str]:
        """Word errors of ``checked`` label maps; those about values outside the table are one, with all values."""
        messages = list[str]()
        for is_colour in (False, True):
            about = [e for e in errors if isinstance(e, LabelError) and e.wrong and e.is_colour == is_colour]
            if len(about) > 1:
                errors = [error for error in errors if error not in about]
                wrong, present = (
                    sorted(set().union(*sets)) for sets in zip(*((e.wrong, e.present) for e in about), strict=True)
                )
                named = ", ".join(e.where for e in about[:3]) + (", ..." if len(about) > 3 else "")
                where = f"{len(about)} of {checked} label maps checked ({named})"
                complain = self._complain_of_colours if is_colour else partial(self._complain, present=present)
                messages.append(complain(wrong, where=where))
        return [*messages, *map(str, errors)]

    def _complain_of_colours(self, wrong: list[int], where: str, share: str = "") -> str:
        listed = ", ".join(f"({v >> 16}, {v >> 8 & 255}, {v & 255})" for v in wrong[:5])
        return (
            f"{where}: {len(wrong)} colour(s) that data.labels.palette does not have: {listed}"
            f"{' and others' if len(wrong) > 5 else ''}{share}. Add them to the palette, or save the map without"
            " compression, antialiasing or resizing; or, if they are blends at borders, take the nearest colour:"
            " data.labels.nearest_color: 442 (or less: how far a colour may be)"
        )

    def _complain(self, wrong: list[int], present: list[int], where: str) -> str:
        values = ", ".join(map(str, wrong[:10])) + (f" ... {wrong[-1]}" if len(wrong) > 10 else "")
        text = f"{where}: label value(s) {values} outside the table (num_classes: {self.num_classes})."
        if present == [0, 255] and self.num_classes >= 2:
            return text + " A binary 0/255 mask? Write data.labels.remap: {255: 1}"
        if wrong[-1] < 0:
            listed = ", ".join(map(str, wrong[:10]))
            return text + f' If negative values mean "no class", write data.labels.ignore: [{listed}]'
        if {0, 255} <= {*present} and len(wrong) > 8:
            return text + " A mask of 0 and 255 with blended borders? Threshold it, and save it as PNG"
        if wrong == [255]:
            return text + ' If 255 means "no class", write data.labels.ignore: [255]'
        if wrong == [self.num_classes] and present[0] > 0 and not self.remap:
            return text + (
                f" Ids counted from 1? Write data.labels.remap: {{1: 0, 2: 1, ...}}, or num_classes:"
                f" {self.num_classes + 1}"
            )
        return text + (
            f' Write data.labels.ignore: [{", ".join(map(str, wrong[:10]))}] if they mean "no class",'
            " data.labels.remap: {raw id: class} to map them, or a larger num_classes"
        )


def _codes(rgb: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Return 65536 R + 256 G + B of colours [..., 3]."""
    return rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def distinct_colours(count: int) -> NDArray[np.uint8]:
    """Return ``count`` distinguishable RGB colours, the same on every machine: uint8 [count, 3]."""
    golden = 0.61803398875
    hsv = [((i * golden) % 1.0, 0.55 + 0.3 * (i % 2), 0.95 - 0.2 * (i % 3)) for i in range(count)]
    return (np.array([colorsys.hsv_to_rgb(*c) for c in hsv]).reshape(-1, 3) * 255).round().astype(np.uint8)
