"""Keep the exponential moving average (EMA) of the networks' weights, and its batch statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from imaginaire_spade.models.layers import SpectralNorm, fold_spectral_norm
from imaginaire_spade.models.norms import BatchNorm2d

N = TypeVar("N", bound=nn.Module)


def new_average(network: N) -> N:
    """Copy ``network`` as its EMA: in evaluation mode, without gradients, its spectral norms folded."""
    return fold_spectral_norm(copy.deepcopy(network)).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, beta: float) -> None:
    """Set average = beta * average + (1 - beta) * source, for parameters and running statistics alike.

    A layer with spectral norm gives its normalised weight, under the present u and v (as in imaginaire): an average of
    raw weights would have another norm than each of them.

    Args:
        average: from ``new_average``.
        source: the trained network.
    """
    values = {name: value for name, value in source.state_dict().items() if value.is_floating_point()}
    for name, layer in source.named_modules():
        if isinstance(layer, SpectralNorm):
            values[f"{name}.weight"] = layer.effective_weight()
    averages = {name: value for name, value in average.state_dict().items() if name in values}
    torch._foreach_lerp_(list(averages.values()), [values[name] for name in averages], 1.0 - beta)


@torch.no_grad()
def reestimate_batch_norm(generator: nn.Module, inputs: Iterable[tuple[object, Tensor | None]]) -> None:
    """Set the running statistics of an EMA to their plain average over ``inputs`` (label maps, style codes).

    The activations of averaged weights have other statistics than the average of the statistics. Only the batch norms
    are in training mode meanwhile, so spectral-norm vectors stay.
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
