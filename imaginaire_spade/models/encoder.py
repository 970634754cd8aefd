"""Style encoder: image -> mean and log-variance of its style code."""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.models.layers import SpectralConv2d, instance_norm
from imaginaire_spade.registry import ENCODERS


@ENCODERS.register("conv")
class ConvEncoder(nn.Module):
    """The image encoder of Park et al. 2019 (fig. 14): six strided convolutions, two linear heads.

    Args:
        style_dims: length of the style code, the generator's.
        num_filters: width of the first layer; the last has 8 times as many.
        image_size: the encoder resizes images of any other size to this square first (bilinear). A multiple of 64,
            128 or more: six x2 down-samplings, and an instance norm after the last.
        normalization: instance norm after each convolution, or none (as in imaginaire).
    """

    def __init__(
        self,
        style_dims: int,
        *,
        num_filters: int = 64,
        image_size: int = 256,
        normalization: Literal["instance", "none"] = "instance",
    ) -> None:
        super().__init__()
        if image_size % 64 or image_size < 128:
            raise ConfigError(f"encoder.image_size: {image_size} must be 128 or more and a multiple of 64")
        self.image_size = image_size
        channels = [3, *(num_filters * width for width in (1, 2, 4, 8, 8, 8))]
        self.with_norm = normalization == "instance"
        self.layers = nn.ModuleList(
            SpectralConv2d(a, b, 3, 2, 1, bias=not self.with_norm) for a, b in itertools.pairwise(channels)
        )
        size = channels[-1] * (image_size // 64) ** 2
        self.fc_mu = nn.Linear(size, style_dims)
        self.fc_var = nn.Linear(size, style_dims)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images float [N, 3, H, W] in [-1, 1] -> (mu, logvar), float32 [N, style_dims] each."""
        x = images
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        for layer in self.layers:
            x = layer(x)
            x = F.leaky_relu(instance_norm(x) if self.with_norm else x, 0.2)
        x = x.flatten(1)
        return self.fc_mu(x).float(), self.fc_var(x).float()


def sample_style(mu: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw z = mu + noise * sigma, the reparameterisation of Kingma and Welling 2014; all [N, style_dims]."""
    return mu + noise * torch.exp(0.5 * logvar)
