"""Decode a label map as its label table says: what an image's own colours, and lossy formats, mean for it."""

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.image_files import colour_table, decode_label
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
        labels.check_colour_table(raw, colour_table(data, where), where)
    return raw
