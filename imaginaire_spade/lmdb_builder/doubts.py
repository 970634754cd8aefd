"""Find what may be a mistake in label maps that can be used one by one: a table that does not mean them, copies."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec


def find_doubts(labels: LabelSpec, raw: NDArray[Any], class_pixels: Mapping[int, int]) -> dict[str, int]:
    """Look at a label map.

    Returns:
        "one class": 1 if it has at most one class; "binary": 1 if it holds 0 and an ignored value (255) alone;
        "blended": number of pixels of a colour that the palette lacks. What does not apply may be absent.
    """
    found = {"blended": blended} if (blended := labels.count_blended(raw)) else {}
    if len(class_pixels.keys() - {labels.dont_care_id}) <= 1:
        top = raw.max()
        is_binary = raw.ndim == 2 and top in (0, *labels.ignore) and np.isin(raw, (0, top)).all()
        found |= {"one class": 1, "binary": int(is_binary)}
    return found


def describe_doubts(manifest: Mapping[str, Any], labels: LabelSpec) -> Iterator[str]:
    """Yield a line for each thing about the label maps of a checked data set that may be a mistake."""
    number, doubts = manifest["num_samples"], Counter[str](manifest.get("doubts", {}))
    pixels = manifest["class_pixels"]
    rare = [labels.name(i) for i, count in enumerate(pixels[:-1]) if 0 < count < 1e-4 * sum(pixels)]
    if rare:
        yield f"rarer than 0.01 % of the pixels: {', '.join(rare[:10])}{' ...' if len(rare) > 10 else ''}"
    if seen := [f"{i} ({name})" for i, name in enumerate(labels.names) if name in labels.absent and pixels[i]]:
        yield (
            f"note: {', '.join(seen)} occur, which label maps of this data set never show: are their ids numbered"
            " otherwise? docs/formats.md"
        )
    if labels.num_classes > 1 and 2 * doubts["one class"] > number:
        yield (
            f"note: {doubts['one class']} of {number} label maps hold one class only: are they the maps of these"
            " photos, and do their values mean what data.labels says?"
        )
    _, same = manifest.get("same_label_map") or (0, 0)
    if number > 1 and 2 * same > number:
        yield f"note: {same} of {number} label maps are copies of one file: is each that of its photo?"
    if count := doubts["blended"]:
        share = 100 * count / sum(pixels)
        yield f"data.labels.nearest_color: {count} pixels ({share:.3g} %) had a colour between those of classes"


def refuse_useless(manifest: Mapping[str, Any], labels: LabelSpec, where: Path) -> None:
    """Refuse a data set without a usable sample, or whose label maps hold no class, or one by a wrong table.

    Raises:
        DataError: with what to write.
    """
    counts, ignored = manifest["class_pixels"], f"data.labels.ignore: {list(labels.ignore)}"
    if not manifest["num_samples"]:
        raise DataError(f"{where}: no sample can be used: {next(iter(manifest['bad'].values()))}")
    if counts and counts[-1] and not any(counts[:-1]):
        raise DataError(f"{where}: no pixel of any label map has a class: {ignored}. Then build with --overwrite")
    is_binary = manifest.get("doubts", {}).get("binary") == manifest["num_samples"]
    if is_binary and counts[-1] and labels.num_classes > 1:
        top = 255 if 255 in labels.ignore else labels.ignore[0]
        raise DataError(
            f"{where}: every label map holds 0 and {top} alone, and {ignored} takes {top} for no class, which leaves"
            f" one class. For binary masks write data.labels.ignore: [] and data.labels.remap: {{{top}: 1}}; for one"
            " class and no class, data.labels.num_classes: 1. Then build with --overwrite"
        )
