"""Decode a label map as its label table says: what an image's own colours, and lossy formats, mean for it."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.image_files import colour_table, decode_label
from imaginaire_spade.errors import LabelError
from imaginaire_spade.labels import LabelSpec


def read_labels(data: bytes, where: str, labels: LabelSpec | None) -> NDArray[np.generic]:
    """Decode a label map as ``decode_label`` does; with ``labels.nearest_color`` lossy formats too.

    Args:
        labels: the label table; None: nothing is known of it.
    Returns:
        Raw ids or colours, for ``labels.to_train_ids``.
    Raises:
        DataError: as ``decode_label``.
        LabelError: a colour table in the file contradicts the palette of ``labels``.
    """
    raw = decode_label(data, where, lossy=labels is not None and labels.nearest_color is not None)
    if labels is not None and labels.palette and raw.dtype == np.uint8 and raw.ndim == 2:
        _check_colours(raw, colour_table(data, where), labels, where)
    return raw


def _check_colours(ids: NDArray[np.generic], colours: bytes, labels: LabelSpec, where: str) -> None:
    """Refuse indexed colour that calls the ids [H, W] other classes than the label table does."""
    contrary = _contrary_indices(colours, labels.palette, tuple(labels.table[:256].tolist())) if colours else {}
    if contrary and (present := sorted(contrary.keys() & {*np.unique(ids).tolist()})):
        first = present[0]
        read = "no id of it" if labels.table[first] == labels.error_id else labels.name(int(labels.table[first]))
        raise LabelError(
            f"{where}: its own colours and data.labels.palette disagree: id {first} has the colour"
            f" {(*colours[3 * first : 3 * first + 3],)} of {labels.name(contrary[first])}, but is {read} by the table."
            f" If the colours are right, write data.labels.remap: {contrary} (or save the maps as RGB); if the ids are,"
            " write the file's colours into data.labels.palette"
        )


@lru_cache(maxsize=64)
def _contrary_indices(
    colours: bytes, palette: tuple[tuple[int, int, int], ...], table: tuple[int, ...]
) -> dict[int, int]:
    """Map each index whose colour is that of a class, and that ``table`` reads as another, to that class."""
    entries = [tuple(colours[i : i + 3]) for i in range(0, len(colours) - 2, 3)]
    if len(entries) > 1 and all(entry == (i, i, i) for i, entry in enumerate(entries)):
        return {}  # a ramp of greys, which says nothing
    classes: dict[tuple[int, ...], int] = {colour: i for i, colour in reversed([*enumerate(palette)])}
    own = [palette[read] if 0 <= read < len(palette) else (0, 0, 0) for read in table]  # black: "no class"
    return {i: classes[entry] for i, entry in enumerate(entries) if entry in classes and entry != own[i]}
