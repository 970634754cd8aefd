"""The global generator of pix2pixHD: the baseline without conditional norms."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.layers import SpectralConvTranspose2d, conv2d, instance_norm
from imaginaire_spade.registry import GENERATORS


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm, ReLU between them, reflection padding; added to the input."""

    def __init__(self, channels: int, spectral_norm: bool) -> None:
        super().__init__()
        self.conv_0 = conv2d(channels, channels, 3, padding=1, padding_mode="reflect", spectral=spectral_norm)
        self.conv_1 = conv2d(channels, channels, 3, padding=1, padding_mode="reflect", spectral=spectral_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [N, channels, h, w], h and w at least 2; the shape stays."""
        y = F.relu(instance_norm(self.conv_0(x)))
        return x + instance_norm(self.conv_1(y))


@GENERATORS.register("pix2pixhd")
class Pix2pixHDGenerator(Generator):
    """The global generator of Wang et al. 2018 (pix2pixHD, section 3.1 and appendix), "pix2pixHD" in SPADE's tables.

    The layout enters once, at full resolution; convolutions down-sample it, then come residual blocks, then transposed
    convolutions up-sample it again. Instance norm without scale and shift follows each convolution but the last. The
    generator takes no style code. With ``spectral_norm`` it is that of the SPADE paper's stronger "pix2pixHD++".

    Args:
        spec: channels of the layouts.
        image_size: (height, width) of training: multiples of 2^num_downsamplings, twice that or more.
        num_filters: width of the first and last layers; doubled by each down-sampling.
        num_downsamplings: x2 steps down and up again.
        num_blocks: residual blocks between them.
        spectral_norm: spectral norm on all convolutions but the last.
    """

    style_dims = 0

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        *,
        num_filters: int = 64,
        num_downsamplings: int = 4,
        num_blocks: int = 9,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_downsamplings < 0:
            raise ConfigError(f"gen.num_downsamplings: {num_downsamplings} must be 0 or more, such as 4")
        self.size_multiple = 2**num_downsamplings
        self.min_size = 2 * self.size_multiple  # reflection at the blocks' resolution needs two pixels
        if min(image_size) < self.min_size:
            raise ConfigError(
                f"gen.num_downsamplings: {num_downsamplings} needs images of {self.min_size} or more, not"
                f" {image_size[0]}x{image_size[1]}"
            )
        channels = [num_filters * 2**i for i in range(num_downsamplings + 1)]
        transposed = SpectralConvTranspose2d if spectral_norm else nn.ConvTranspose2d
        self.first = conv2d(
            spec.num_channels, num_filters, 7, padding=3, padding_mode="reflect", spectral=spectral_norm
        )
        self.down = nn.ModuleList(
            conv2d(a, b, 3, stride=2, padding=1, spectral=spectral_norm) for a, b in itertools.pairwise(channels)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(channels[-1], spectral_norm) for _ in range(num_blocks)))
        self.up = nn.ModuleList(
            transposed(a, b, 3, stride=2, padding=1, output_padding=1) for a, b in itertools.pairwise(channels[::-1])
        )
        self.to_image = nn.Conv2d(num_filters, 3, 7, padding=3, padding_mode="reflect")

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Generate images float32 [N, 3, H, W] in [-1, 1] at the layout's size (a multiple of ``size_multiple``).

        Args:
            layout: N label maps [H, W].
            z: None; this generator takes no style code.
        """
        self.check_input(layout, z)
        if min(layout.height, layout.width) < self.min_size:
            raise ValueError(f"layout of {layout.height}x{layout.width}: both must be {self.min_size} or more")
        x = layout.one_hot(self.to_image.weight.dtype)  # [N, num_channels, H, W]
        for layer in (self.first, *self.down):
            x = F.relu(instance_norm(layer(x)))
        x = self.blocks(x)  # [N, 16 F, H/16, W/16] with 4 down-samplings
        for layer in self.up:
            x = F.relu(instance_norm(layer(x)))
        return torch.tanh(self.to_image(x).float())  # [N, 3, H, W]
