"""Layers that several networks share: spectrally normalised ones, and the initialisation of weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNorm(nn.Module):
    """Mixin for a layer whose weight is divided by its largest singular value (Miyato et al. 2018, algorithm 1).

    The weight is seen as a matrix W [out, rest]. One power iteration per training-mode forward, v first, then u; none
    in evaluation mode. u and v are constants for the gradient, W inside sigma = u . W v is not. Always in float32,
    under autocast too.
    """

    weight: Tensor
    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("weight_u", F.normalize(torch.randn(rows), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(columns), dim=0, eps=1e-12))

    def normalised_weight(self) -> Tensor:
        """W / sigma, of the weight's shape; in training mode after one power iteration."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            if self.training:
                with torch.no_grad():
                    # New tensors, not in place: a graph of an earlier forward may still hold the old ones.
                    self.weight_v = F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12)
                    self.weight_u = F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12)
            return self.weight / torch.dot(self.weight_u, matrix @ self.weight_v)


class SpectralConv2d(SpectralNorm, nn.Conv2d):
    """Spectrally normalised convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalised_weight(), self.bias)


class SpectralLinear(SpectralNorm, nn.Linear):
    """Spectrally normalised linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight(), self.bias)


def conv2d(*args: Any, spectral: bool, **kwargs: Any) -> nn.Conv2d:
    """nn.Conv2d, spectrally normalised or not."""
    return SpectralConv2d(*args, **kwargs) if spectral else nn.Conv2d(*args, **kwargs)


def effective_weight(layer: nn.Conv2d) -> Tensor:
    """The weight that a convolution applies, for those who compute it in another way. Once per forward."""
    return layer.normalised_weight() if isinstance(layer, SpectralConv2d) else layer.weight


def initialise(network: nn.Module, kind: str, gain: float) -> None:
    """Draw the weights of all convolutions and linear layers anew; biases become zero.

    Args:
        kind: xavier, normal, kaiming or orthogonal.
        gain: gain of xavier and orthogonal, standard deviation of normal.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if kind == "xavier":
                nn.init.xavier_normal_(module.weight, gain)
            elif kind == "normal":
                nn.init.normal_(module.weight, 0.0, gain)
            elif kind == "kaiming":
                nn.init.kaiming_normal_(module.weight, a=0.2)
            else:
                nn.init.orthogonal_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
