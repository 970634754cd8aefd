"""How an iteration grows: its time and memory against the size, the classes and the noise of the label map.

All variants train in the ``shared`` form. SPADE chooses tables or dense norms itself (``auto``; on a GPU it takes
tables), CLADE does not depend on noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.generator import make_generator, with_path
from benchmarks.iteration import Case, peak_gib, train
from benchmarks.layouts import SPEC, make_layout, resized
from benchmarks.measure import Row, rows_of, take_turns
from imaginaire_spade.labels import edges_from_ids
from imaginaire_spade.layout import SemanticLayout

SIZES = (128, 256, 512, 1024)
CLASSES = (8, 32, 100, 200, 400)
SHARES = (0.02, 0.05, 0.1, 0.3, 0.6, 1.0)
VARIANTS = {"SPADE dense": ("SPADE", "dense"), "SPADE": ("SPADE", "auto"), "CLADE": ("CLADE", "auto")}
"""Name -> norm, path."""


def measure(
    folder: Path | None, device: torch.device, repeats: int, num_filters: int, size: int, quick: bool
) -> Iterator[list[Row]]:
    """Measure point by point: the sizes with a quarter of the filters, so that 1024x1024 fits, the rest at ``size``.

    ``quick``: the first point of each, without memory, for which a process each would have to start.
    """
    wide = Case(folder, device, num_filters, size, batch=1, bf16=device.type == "cuda", vgg=False)
    first = slice(1 if quick else None)
    for each in (size,) if quick else SIZES:
        case = replace(wide, size=each, num_filters=num_filters // 4)
        yield _point(f"size {each}", VARIANTS, case, repeats, with_memory=not quick)
    for classes in CLASSES[first]:
        yield _point(f"classes {classes}", VARIANTS, wide, repeats, classes, with_memory=not quick)
    for share in SHARES[first]:
        variants = ("SPADE dense", "SPADE")
        yield _point(f"distinct {share:.0%}", variants, wide, repeats, share=share, with_memory=not quick)


def _point(
    point: str,
    variants: Iterable[str],
    case: Case,
    repeats: int,
    classes: int = SPEC.num_classes,
    share: float | None = None,
    *,
    with_memory: bool,
) -> list[Row]:
    runs = {name: _iteration(name, case, classes, share) for name in variants}
    times = take_turns(runs, repeats, case.device)
    notes = {}
    for name, run in runs.items() if with_memory else ():
        notes[name] = f"{peak_gib(case.device, run, _iteration, name, case, classes, share):.2f} GiB"
    return rows_of("growth", f"{point}, {case.num_filters} filters", times, {}, notes)


def _iteration(name: str, case: Case, classes: int, share: float | None) -> Callable[[], object]:
    norm, path = VARIANTS[name]
    layout = grown_layout(case, classes, share).to(case.device)
    generator = make_generator(norm, layout, case.num_filters)
    return train(with_path("table" if path == "auto" and case.device.type == "cuda" else path, generator), layout, case)


def grown_layout(case: Case, classes: int, share: float | None) -> SemanticLayout:
    """Make one label map of ``classes`` classes, with the regions of the file.

    With a share: one whose pixels have so many distinct neighbourhoods. It is the middle of that label map, enlarged
    four times, with random ids at random pixels.
    """
    layout = make_layout(case.folder, 1, case.size, case.size)
    ids, edges = layout.labels[0].numpy().astype(np.int16), layout.edges
    if share is not None:
        ids = _noisy(ids, share)
        edges = torch.from_numpy(edges_from_ids(ids)).unsqueeze(0)
    ids = np.where(ids == SPEC.num_classes, classes, ids.astype(int) * classes // SPEC.num_classes).astype(np.int16)
    return SemanticLayout(replace(SPEC, num_classes=classes), torch.from_numpy(ids).unsqueeze(0), edges)


def distinct_share(layout: SemanticLayout) -> float:
    """Share of a layout's pixels that have a neighbourhood of their own, as SPADE's tables number them."""
    return layout.count_neighbourhoods(3)[1] / layout.labels.numel()


def _noisy(ids: np.ndarray, share: float) -> np.ndarray:
    height, width = ids.shape
    middle = ids[3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8]
    plain, random = resized(middle, height, width), np.random.default_rng(0)
    order, others = random.random(ids.shape), random.integers(SPEC.num_classes + 1, size=ids.shape, dtype=ids.dtype)
    low, high = 0.0, 1.0
    for _ in range(12):
        part = (low + high) / 2
        noisy = np.where(order < part, others, plain)
        tensors = torch.from_numpy(noisy), torch.from_numpy(edges_from_ids(noisy))
        found = distinct_share(SemanticLayout(SPEC, *(tensor.unsqueeze(0) for tensor in tensors)))
        low, high = (part, high) if found < share else (low, part)
    return np.where(order < high, others, plain)
