"""Whole generators at inference: SPADE dense, SPADE as it runs, CLADE, CLADE-ICPE, and the convolutions alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layouts import dense, fresh, make_layout
from benchmarks.measure import Row, largest_difference, rows_of, take_turns
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import Generator, SPADEGenerator
from imaginaire_spade.models.layers import fold_spectral_norm
from imaginaire_spade.models.norms import CLADE, CLADEICPE, SPADE, ConditionalNorm


class NoNorm(ConditionalNorm):
    """Leaves x as it is: what remains of a generator is its convolutions, activations and up-sampling."""

    def __init__(self, channels: int, spec: LayoutSpec) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, x: Tensor, layout: SemanticLayout) -> Tensor:
        return x.clone()  # the caller may change it in place


NORMS: dict[str, Any] = {"SPADE": SPADE, "CLADE": CLADE, "CLADE-ICPE": CLADEICPE, "convolutions alone": NoNorm}


def make_generator(name: str, layout: SemanticLayout, num_filters: int) -> Generator:
    torch.manual_seed(0)
    size = layout.height, layout.width
    return SPADEGenerator(layout.spec, size, num_filters=num_filters, norm=NORMS[name]).to(layout.device)


def _generate(generator: Generator, seen: Callable[[SemanticLayout], SemanticLayout], layout: SemanticLayout) -> Tensor:
    return generator(seen(layout))


@torch.inference_mode()
def measure(
    folder: Path | None, device: torch.device, repeats: int, num_filters: int, cases: tuple[tuple[int, int, int], ...]
) -> list[Row]:
    """``cases``: (batch, height, width)."""
    rows = []
    for batch, height, width in cases:
        layout = make_layout(folder, batch, height, width, with_distances=True).to(device)
        generators = {name: fold_spectral_norm(make_generator(name, layout, num_filters).eval()) for name in NORMS}
        runs: dict[str, Callable[[], Tensor]] = {"SPADE dense": partial(_generate, generators["SPADE"], dense, layout)}
        runs |= {name: partial(_generate, generator, fresh, layout) for name, generator in generators.items()}
        wanted, found = runs["SPADE dense"](), runs["SPADE"]()
        case = f"batch {batch}, {height}x{width}"
        times = take_turns(runs, repeats, device)
        rows += rows_of("generator", case, times, {"SPADE": largest_difference([found], [wanted])})
    return rows
