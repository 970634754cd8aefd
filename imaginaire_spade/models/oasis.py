"""The generator of OASIS (Schoenfeld et al. 2021): noise stands before the labels wherever it sees the label map."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.layout import LayoutSpec, Noise, SemanticLayout
from imaginaire_spade.models.generator import (
    Generator,
    Interpolation,
    NormFactory,
    SPADEResidualBlock,
    reach_of_blocks,
    smooth_steps,
)
from imaginaire_spade.models.noise_injection import PixelNoise
from imaginaire_spade.models.norms import SPADE
from imaginaire_spade.registry import GENERATORS, NORMS, Width, WidthOrNone


@GENERATORS.register("oasis")
class OASISGenerator(Generator):
    """The generator of Schoenfeld et al. 2021 (OASIS, sec. 3.3): six SPADE blocks with x2 up-sampling between.

    It starts from the label map at 1/32 of the resolution. Its style code is noise: ``style_dims`` channels before the
    labels in the start map and in every norm, one vector for an image, a region or each pixel.

    Args:
        spec: channels of the layouts, which have no noise.
        image_size: unused; this generator is fully convolutional.
        image_channels: C of the images, RGB or others.
        num_filters: width of the last block; the first has 16 times as many.
        style_dims: channels of noise; 0: none.
        interpolation: of the x2 steps, as in ``SPADEGenerator``; nearest is as published.
        spectral_norm: spectral norm on the convolutions of the blocks.
        noise_injection: pixelwise noise inside each block, as in ``SPADEGenerator``: texture without grids. Noise by
            class or region gives each its own. Where style_dims is 0 it becomes 2.
        norm: conditional normalisation layer.
    """

    size_multiple = 32

    def __init__(
        self,
        spec: LayoutSpec,
        image_size: tuple[int, int],
        image_channels: int = 3,
        *,
        num_filters: Width = 64,
        style_dims: WidthOrNone = 64,
        interpolation: Interpolation = "nearest",
        spectral_norm: bool = True,
        noise_injection: bool = False,
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        self.style_dims = style_dims or 2 * noise_injection
        self.takes_local_noise = self.style_dims > 0
        spec = replace(spec, num_noise_channels=self.style_dims)
        channels = [num_filters * width for width in (16, 16, 16, 8, 4, 2, 1)]
        self.noise = PixelNoise(channels) if noise_injection else None
        self.fc = nn.Conv2d(spec.num_channels, channels[0], 3, padding=1)
        self.upsample_before = [False] + 5 * [True]
        self.smooth_before = smooth_steps(interpolation, self.upsample_before)
        self.blocks = nn.ModuleList(
            SPADEResidualBlock(a, b, spec, norm, spectral_norm, is_smooth)
            for (a, b), is_smooth in zip(itertools.pairwise(channels), self.smooth_before, strict=True)
        )
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    @property
    def halo(self) -> int | None:  # type: ignore[override]
        return None if self.noise else reach_of_blocks(self, self.upsample_before, self.smooth_before)

    def forward(self, layout: SemanticLayout, z: Noise | None = None) -> Tensor:
        """Generate images float32 [N, C, H, W] in [-1, 1] at the layout's size (a multiple of 32).

        Args:
            layout: N label maps [H, W].
            z: noise, float [N, style_dims], or [N, style_dims, H, W], or by region; required if and only if the
                generator's style_dims > 0.
        """
        self.check_input(layout, z)
        if z is not None:
            layout = layout.with_noise(z)
        start = layout.resized(layout.height // 32, layout.width // 32)
        x = self.fc(start.one_hot(self.to_image.weight.dtype))  # [N, 16 F, H/32, W/32]
        for number, (block, doubles) in enumerate(zip(self.blocks, self.upsample_before, strict=True)):
            factor = 2 if doubles else 1
            size = factor * x.shape[2], factor * x.shape[3]
            noise = self.noise and self.noise(layout.resized(*size).noise, *size, number)
            x = block(x, layout, upsample=factor, noise=noise)
        return torch.tanh(self.to_image(F.leaky_relu(x, 0.2, inplace=True)).float())  # [N, C, H, W]
