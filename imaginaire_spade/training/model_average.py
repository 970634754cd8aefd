"""Moving average of the generator's weights, and its batch statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.norms import BatchNorm2d


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, beta: float) -> None:
    """average = beta * average + (1 - beta) * source, for parameters and running statistics alike.

    Other buffers (spectral-norm vectors, counters) are copied.
    """
    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), 1.0 - beta)
    sources = dict(source.named_buffers())
    for name, buffer in average.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.lerp_(sources[name], 1.0 - beta)
        else:
            buffer.copy_(sources[name])


@torch.no_grad()
def reestimate_batch_norm(generator: nn.Module, inputs: Iterable[tuple[SemanticLayout, Tensor | None]]) -> None:
    """Set the running statistics to their plain average over ``inputs`` (layout, style code).

    An averaged generator's activations have statistics of their own: neither the average of the statistics nor those
    of the trained weights. Only the batch norms see training mode, so spectral-norm vectors stay.
    """
    norms = [module for module in generator.modules() if isinstance(module, BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for layout, z in inputs:
        generator(layout, z)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
