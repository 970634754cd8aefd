"""Whole generators at inference: SPADE dense, SPADE as it runs, CLADE, CLADE-ICPE, and the convolutions alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.layouts import dense, fresh, make_layout
from benchmarks.measure import Row, largest_difference, rows_of, take_turns
from imaginaire_spade.inference.choices import remembered
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.for_inference import optimise_for_inference
from imaginaire_spade.models.generator import Generator, SPADEGenerator
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.norms import CLADE, CLADEICPE, SPADE, ConditionalNorm
from imaginaire_spade.models.spectral_norm import fold_spectral_norm

N = TypeVar("N", bound=nn.Module)


class NoNorm(ConditionalNorm):
    """Costs nothing: what remains of a generator is its convolutions."""

    def __init__(self, channels: int, spec: LayoutSpec, *, extra: int = 0) -> None:
        super().__init__()
        self.out_channels = channels + extra
        self._ready: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor, layout: SemanticLayout, *, upsample: int = 1, slope: float = 1.0) -> Tensor:
        shape = len(x), self.out_channels, upsample * x.shape[2], upsample * x.shape[3]
        if shape not in self._ready:
            self._ready[shape] = torch.rand(shape, device=x.device).contiguous(memory_format=torch.channels_last)
        return self._ready[shape]


NORMS: dict[str, Any] = {
    "SPADE": SPADE,
    "CLADE": CLADE,
    "CLADE-ICPE": CLADEICPE,
    "SPADE's convolutions": NoNorm,
    "CLADE's convolutions": partial(NoNorm, extra=1),  # the edge map is one more channel there
}
"""The convolutions are torch's own, as in training."""


def make_generator(name: str, layout: SemanticLayout, num_filters: int) -> Generator:
    torch.manual_seed(0)
    size = layout.height, layout.width
    generator = SPADEGenerator(layout.spec, size, num_filters=num_filters, norm=NORMS[name])
    initialise(generator, "xavier", 1.0)
    return generator.to(layout.device)


def with_path(path: str, network: N) -> N:
    """Make all SPADE norms of a network take one path."""
    for module in network.modules():
        if isinstance(module, SPADE):
            module.path = path  # type: ignore[assignment]
    return network


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
        generators = {name: make_generator(name, layout, num_filters).eval() for name in NORMS}
        plain = fold_spectral_norm(copy.deepcopy(generators["SPADE"]))
        for name, generator in generators.items():
            if name.endswith("convolutions"):
                fold_spectral_norm(generator).to(memory_format=torch.channels_last)
            else:
                optimise_for_inference(generator, winograd=device.type == "cpu", ask=remembered)
        runs: dict[str, Callable[[], Tensor]] = {"SPADE dense": partial(_generate, plain, dense, layout)}
        runs |= {name: partial(_generate, generator, fresh, layout) for name, generator in generators.items()}
        wanted, found = runs["SPADE dense"](), runs["SPADE"]()
        case = f"batch {batch}, {height}x{width}"
        times = take_turns(runs, repeats, device)
        rows += rows_of("generator", case, times, {"SPADE": largest_difference([found], [wanted])})
    return rows
