"""imaginaire's SPADE generator: a style code enters through adaptive norms, the layout through SPADE norms."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import Generator, NormFactory, SPADEResidualBlock
from imaginaire_spade.models.layers import SpectralConv2d, SpectralLinear
from imaginaire_spade.models.norms import SPADE, AdaptiveBatchNorm
from imaginaire_spade.registry import GENERATORS, NORMS


class StyleBlock(nn.Module):
    """Adaptive norm, leaky ReLU, 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, style_channels: int) -> None:
        super().__init__()
        self.norm = AdaptiveBatchNorm(in_channels, style_channels)
        self.conv = SpectralConv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.conv(F.leaky_relu(self.norm(x, style), 0.2))


@GENERATORS.register("style_spade")
class StyleSPADEGenerator(Generator):
    """The SPADE generator of imaginaire at 256x256: residual SPADE blocks with style blocks between them.

    It starts from the label map at 1/16 of the resolution and always takes a style code. All its layers carry
    spectral norm.

    Args:
        spec: what the layouts hold.
        image_size: unused; this generator is fully convolutional.
        num_filters: widths are 8, 16, 8, 4, 2 times this.
        style_dims: length of the style code z.
        output_multiplier: factor before the final tanh.
        norm: conditional normalisation layer; imaginaire's has 5x5 convolutions, ``affine`` and ``spectral_norm``.
    """

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        *,
        num_filters: int = 128,
        style_dims: int = 256,
        output_multiplier: float = 1.0,
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        if style_dims < 1:
            raise ConfigError("gen.style_dims: this generator needs a style code; write 256, or gen.type: spade")
        self.size_multiple = 16
        self.style_dims = style_dims
        self.output_multiplier = output_multiplier
        width, style_channels = num_filters, 2 * style_dims

        def block(in_channels: int, out_channels: int) -> SPADEResidualBlock:
            return SPADEResidualBlock(in_channels, out_channels, spec, norm, spectral_norm=True)

        self.fc_0 = SpectralLinear(style_dims, style_channels)
        self.fc_1 = SpectralLinear(style_channels, style_channels)
        self.head_0 = SpectralConv2d(spec.num_channels, 8 * width, 3, padding=1)
        self.cbn_head_0 = StyleBlock(8 * width, 16 * width, style_channels)
        self.head_1 = block(16 * width, 16 * width)
        self.head_2 = block(16 * width, 16 * width)
        self.up_0a = block(16 * width, 8 * width)
        self.cbn_up_0a = StyleBlock(8 * width, 8 * width, style_channels)
        self.up_0b = block(8 * width, 8 * width)
        self.up_1a = block(8 * width, 4 * width)
        self.cbn_up_1a = StyleBlock(4 * width, 4 * width, style_channels)
        self.up_1b = block(4 * width, 4 * width)
        self.up_2a = block(4 * width, 4 * width)
        self.cbn_up_2a = StyleBlock(4 * width, 4 * width, style_channels)
        self.up_2b = block(4 * width, 2 * width)
        self.to_image = SpectralConv2d(2 * width, 3, 5, padding=2)

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Pictures float32 [N, 3, H, W] in [-1, 1] at the layout's size (a multiple of 16).

        Args:
            layout: N label maps [H, W].
            z: style codes float [N, style_dims].
        """
        if layout.height % 16 or layout.width % 16:
            raise ValueError(f"layout of {layout.height}x{layout.width}: both must be multiples of 16")
        if z is None:
            raise ValueError(f"style code missing, but style_dims is {self.style_dims}")
        style = F.relu(self.fc_1(F.relu(self.fc_0(z))))  # [N, 2 style_dims]
        start = layout.resized(layout.height // 16, layout.width // 16)
        x = F.leaky_relu(self.head_0(start.one_hot(self.head_0.weight.dtype)), 0.2)  # [N, 8 F, H/16, W/16]
        x = self.cbn_head_0(x, style)  # [N, 16 F, H/16, W/16]
        x = self.head_2(self.head_1(x, layout), layout)
        x = self.up_0a(_twice(x), layout)  # [N, 8 F, H/8, W/8]
        x = self.up_0b(self.cbn_up_0a(x, style), layout)
        x = self.up_1a(_twice(x), layout)  # [N, 4 F, H/4, W/4]
        x = self.up_1b(self.cbn_up_1a(x, style), layout)
        x = self.up_2a(_twice(x), layout)  # [N, 4 F, H/2, W/2]
        x = self.up_2b(self.cbn_up_2a(x, style), layout)  # [N, 2 F, H/2, W/2]
        x = self.to_image(F.leaky_relu(_twice(x), 0.2))  # [N, 3, H, W]
        return torch.tanh(self.output_multiplier * x.float())


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
