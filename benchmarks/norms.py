"""One norm at a time: SPADE dense and by tables, CLADE, CLADE-ICPE, per resolution, forward and with backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.layouts import dense, fresh, make_layout
from benchmarks.measure import Row, largest_difference, rows_of, take_turns
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.norms import CLADE, CLADEICPE, SPADE, ConditionalNorm

CASES = ((256, 64), (256, 128), (128, 256), (64, 512), (32, 1024), (16, 1024))
"""(height and width, channels): the norms of the 256x256 generator."""


def measure(folder: Path | None, device: torch.device, repeats: int, cases: int) -> list[Row]:
    rows = []
    for size, channels in CASES[:cases]:
        layout = make_layout(folder, 1, size, size, with_distances=True).to(device)
        torch.manual_seed(0)
        x = torch.randn(1, channels, size, size, device=device).to(memory_format=torch.channels_last)
        grad = torch.randn_like(x)
        norms: dict[str, ConditionalNorm] = {
            "SPADE dense": SPADE(channels, layout.spec, path="dense").to(device),
            "SPADE tables": SPADE(channels, layout.spec, path="table").to(device),
            "CLADE": CLADE(channels, layout.spec).to(device),
            "CLADE-ICPE": CLADEICPE(channels, layout.spec).to(device),
        }
        norms["SPADE tables"].load_state_dict(norms["SPADE dense"].state_dict())
        for training in (False, True):
            runs = {name: _runner(norm.train(training), x, grad, layout, training) for name, norm in norms.items()}
            wanted, found = runs["SPADE dense"](), runs["SPADE tables"]()
            differences = {"SPADE tables": largest_difference(found, wanted, relative=training)}
            case = f"{size}x{size}, {channels} channels{', train' if training else ''}"
            rows += rows_of("norms", case, take_turns(runs, repeats, device), differences)
    return rows


def _runner(
    norm: ConditionalNorm, x: Tensor, grad: Tensor, layout: SemanticLayout, training: bool
) -> Callable[[], list[Tensor]]:
    """Patterns, found once per layout and resolution for all norms there, are no part of one norm's time."""
    is_dense = isinstance(norm, SPADE) and norm.path == "dense"
    ours = dense(layout) if is_dense else fresh(layout)

    def run() -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [norm(x, ours)]
        leaf = x.detach().requires_grad_()
        y = norm(leaf, ours)
        if y.shape[1] != grad.shape[1]:  # CLADE's edge channel
            y = y[:, : grad.shape[1]]
        return list(torch.autograd.grad(y, [leaf, *norm.parameters()], grad, allow_unused=True, materialize_grads=True))

    return run
