"""Generators: layout (and style code) -> images in [-1, 1]."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.layers import conv2d, enlarge
from imaginaire_spade.models.norms import SPADE, ConditionalNorm
from imaginaire_spade.registry import GENERATORS, NORMS

NormFactory = Callable[[int, LayoutSpec], ConditionalNorm]
"""(channels, spec) -> a layer ``norm(x, layout)``."""


class Generator(nn.Module):
    """Interface of every generator: ``generator(layout, z=None)`` and two numbers."""

    size_multiple: int
    """Height and width of a layout must be multiples of this."""
    style_dims: int
    """Length of the style code z; 0: it takes none."""

    def check_input(self, layout: SemanticLayout, z: Tensor | None) -> None:
        """Raise ValueError if this generator does not take such a layout's size or style code."""
        if layout.height % self.size_multiple or layout.width % self.size_multiple:
            raise ValueError(
                f"layout of {layout.height}x{layout.width}: both must be multiples of {self.size_multiple}"
            )
        if (z is not None) != bool(self.style_dims):
            raise ValueError(f"style code {'missing' if z is None else 'given'}, but style_dims is {self.style_dims}")


class SPADEResidualBlock(nn.Module):
    """Residual block with conditional norms (Park et al. 2019, fig. 4 left): norm, leaky ReLU, convolution, twice.

    The shortcut is the identity; if the width changes, it is a norm and a 1x1 convolution without activation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, spec: LayoutSpec, norm: NormFactory, spectral_norm: bool
    ) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        self.norm_0 = norm(in_channels, spec)
        self.conv_0 = conv2d(self.norm_0.out_channels, middle, 3, padding=1, spectral=spectral_norm)
        self.norm_1 = norm(middle, spec)
        self.conv_1 = conv2d(self.norm_1.out_channels, out_channels, 3, padding=1, spectral=spectral_norm)
        self.learned_shortcut = in_channels != out_channels
        if self.learned_shortcut:
            self.norm_s = norm(in_channels, spec)
            self.conv_s = conv2d(self.norm_s.out_channels, out_channels, 1, bias=False, spectral=spectral_norm)

    def forward(self, x: Tensor, layout: SemanticLayout, upsample: int = 1) -> Tensor:
        """Enlarge x [N, in, h, w] by ``upsample`` (nearest), then apply the block: [N, out, upsample h, upsample w]."""
        if self.learned_shortcut:  # upsampling is fused into the norms, so x is read at low resolution
            shortcut = self.conv_s(self.norm_s(x, layout, upsample=upsample))
        else:
            x, upsample = enlarge(x, upsample), 1
            shortcut = x
        y = self.conv_0(self.norm_0(x, layout, upsample=upsample, slope=0.2))
        y = self.conv_1(self.norm_1(y, layout, slope=0.2))
        return shortcut + y


@GENERATORS.register("spade")
class SPADEGenerator(Generator):
    """The generator of Park et al. 2019 (fig. 4 right): residual blocks with x2 nearest up-sampling between them.

    It starts from the label map at 1/32 of the resolution (``normal``; 1/64 ``more``, 1/128 ``most``), or from a style
    code if ``style_dims`` > 0.

    Args:
        spec: channels of the layouts.
        image_size: (height, width) of training; fixes the start resolution of a style code.
        num_filters: width of the last block; the first has 16 times as many.
        style_dims: length of the style code z; 0: none is taken.
        upsampling: number of x2 steps: normal 5, more 6, most 7.
        spectral_norm: spectral norm on the convolutions of the blocks.
        norm: conditional normalisation layer.
    """

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        *,
        num_filters: int = 64,
        style_dims: int = 0,
        upsampling: Literal["normal", "more", "most"] = "normal",
        spectral_norm: bool = True,
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        more, most = upsampling in ("more", "most"), upsampling == "most"
        widths = [16, 16, 16, 16, 8, 4, 2, 1]
        channels = [num_filters * width for width in widths] + ([num_filters // 2] if most else [])
        self.upsample_before = (False, True, more, True, True, True, True, *((True,) if most else ()))
        self.size_multiple = 2 ** sum(self.upsample_before)
        self.style_dims = style_dims
        self.start_size = (image_size[0] // self.size_multiple, image_size[1] // self.size_multiple)
        if style_dims:
            self.fc: nn.Module = nn.Linear(style_dims, channels[0] * self.start_size[0] * self.start_size[1])
        else:
            self.fc = nn.Conv2d(spec.num_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            SPADEResidualBlock(a, b, spec, norm, spectral_norm) for a, b in itertools.pairwise(channels)
        )
        self.to_image = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, layout: SemanticLayout, z: Tensor | None = None) -> Tensor:
        """Generate images float32 [N, 3, H, W] in [-1, 1] at the layout's size (a multiple of ``size_multiple``).

        Args:
            layout: N label maps [H, W].
            z: style codes float [N, style_dims]; required if and only if style_dims > 0.
        """
        self.check_input(layout, z)
        start = (layout.height // self.size_multiple, layout.width // self.size_multiple)
        if z is not None:
            x = self.fc(z).unflatten(1, (-1, *self.start_size))  # [N, 16 F, h0, w0]
            x = F.interpolate(x, size=start, mode="bilinear", align_corners=False)  # exact if the size is the same
        else:
            x = self.fc(layout.resized(*start).one_hot(self.to_image.weight.dtype))  # [N, 16 F, h0, w0]
        for block, upsample in zip(self.blocks, self.upsample_before, strict=True):
            x = block(x, layout, upsample=2 if upsample else 1)
        return torch.tanh(self.to_image(F.leaky_relu(x, 0.2)).float())  # [N, 3, H, W]
