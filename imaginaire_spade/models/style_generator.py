"""imaginaire's SPADE generator: a style code enters through adaptive norms, the layout through SPADE norms."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import Generator, NormFactory, SPADEResidualBlock
from imaginaire_spade.models.layers import SpectralConv2d, SpectralLinear, enlarge
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
    """The SPADE generator of imaginaire: residual SPADE blocks with style blocks between them.

    It starts from the label map at 1/16, 1/32 or 1/64 of the resolution (``output_size`` 256, 512, 1024) and always
    takes a style code. All its layers carry spectral norm. Beyond 256, each further pair of blocks has its own image
    head, and the generator adds that image to the enlarged smaller one. Tested against imaginaire's numbers at 256
    without positional encoding; there are no numbers for 512, 1024 and the encoding, which follow its description.

    Args:
        spec: channels of the layouts.
        image_size: unused; this generator is fully convolutional.
        num_filters: widths are 8, 16, 8, 4, 2 times this, then once and half of it at 512 and 1024.
        style_dims: length of the style code z.
        output_size: shorter side of its images: 256, 512 or 1024 take 4, 5 or 6 x2 steps.
        positional_encoding: add two input channels, row and column of each pixel from -1 to 1.
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
        output_size: Literal[256, 512, 1024] = 256,
        positional_encoding: bool = False,
        output_multiplier: float = 1.0,
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        if style_dims < 1:
            raise ConfigError("gen.style_dims: this generator needs a style code; write 256, or gen.type: spade")
        self.size_multiple = output_size // 16
        self.style_dims = style_dims
        self.output_size = output_size
        self.positional_encoding = positional_encoding
        self.output_multiplier = output_multiplier
        width, style_channels = num_filters, 2 * style_dims

        def block(in_channels: int, out_channels: int) -> SPADEResidualBlock:
            return SPADEResidualBlock(in_channels, out_channels, spec, norm, spectral_norm=True)

        self.fc_0 = SpectralLinear(style_dims, style_channels)
        self.fc_1 = SpectralLinear(style_channels, style_channels)
        self.head_0 = SpectralConv2d(spec.num_channels + 2 * positional_encoding, 8 * width, 3, padding=1)
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
        if output_size >= 512:
            self.up_3a = block(2 * width, width)
            self.up_3b = block(width, width)
            self.to_image_512 = SpectralConv2d(width, 3, 5, padding=2)
        if output_size >= 1024:
            self.up_4a = block(width, width // 2)
            self.up_4b = block(width // 2, width // 2)
            self.to_image_1024 = SpectralConv2d(width // 2, 3, 5, padding=2)

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Generate images float32 [N, 3, H, W] in [-1, 1] at the layout's size (a multiple of ``size_multiple``).

        Args:
            layout: N label maps [H, W].
            z: style codes float [N, style_dims].
        """
        self.check_input(layout, z)
        style = F.relu(self.fc_1(F.relu(self.fc_0(z))))  # [N, 2 style_dims]
        x = self._start(layout.resized(layout.height // self.size_multiple, layout.width // self.size_multiple))
        x = F.leaky_relu(self.head_0(x), 0.2)  # [N, 8 F, h, w]
        x = self.cbn_head_0(x, style)  # [N, 16 F, h, w]
        x = self.head_2(self.head_1(x, layout), layout)
        x = self.up_0a(x, layout, upsample=2)  # [N, 8 F, 2 h, 2 w]
        x = self.up_0b(self.cbn_up_0a(x, style), layout)
        x = self.up_1a(x, layout, upsample=2)  # [N, 4 F, 4 h, 4 w]
        x = self.up_1b(self.cbn_up_1a(x, style), layout)
        x = self.up_2a(x, layout, upsample=2)  # [N, 4 F, 8 h, 8 w]
        x = enlarge(self.up_2b(self.cbn_up_2a(x, style), layout), 2)  # [N, 2 F, 16 h, 16 w]
        image = self.to_image(F.leaky_relu(x, 0.2)).float()  # [N, 3, 16 h, 16 w]
        if self.output_size >= 512:
            x = enlarge(self.up_3b(self.up_3a(x, layout), layout), 2)  # [N, F, 32 h, 32 w]
            image = enlarge(image, 2) + self.to_image_512(F.leaky_relu(x, 0.2))
        if self.output_size >= 1024:
            x = enlarge(self.up_4b(self.up_4a(x, layout), layout), 2)  # [N, F/2, 64 h, 64 w]
            image = enlarge(image, 2) + self.to_image_1024(F.leaky_relu(x, 0.2))
        return torch.tanh(self.output_multiplier * image)  # [N, 3, H, W]

    def _start(self, layout: SemanticLayout) -> Tensor:
        """Return the first layer's input: float [N, num_channels (+ 2 coordinates), h, w]."""
        x = layout.one_hot(self.head_0.weight.dtype)
        if not self.positional_encoding:
            return x
        line = torch.linspace(-1, 1, 16, device=x.device)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))  # [2, 16, 16]: row, column
        grid = F.interpolate(grid[None], size=x.shape[-2:], mode="bicubic", align_corners=False)
        return torch.cat([x, grid.to(x.dtype).expand(x.shape[0], -1, -1, -1)], 1)
