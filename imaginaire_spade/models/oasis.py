"""The generator of OASIS (Schoenfeld et al. 2021): noise stands before the labels wherever it sees the label map."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.layout import LayoutSpec, Noise, SemanticLayout
from imaginaire_spade.models.generator import Generator, Interpolation, NormFactory, SPADEResidualBlock, reach_of_blocks
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
        interpolation: of the x2 steps: nearest (as published) or bilinear (benchmarks/RESULTS.md).
        spectral_norm: spectral norm on the convolutions of the blocks.
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
        norm: Annotated[NormFactory, NORMS] = SPADE,
    ) -> None:
        super().__init__()
        self.style_dims = style_dims
        self.takes_local_noise = style_dims > 0
        spec = replace(spec, num_noise_channels=style_dims)
        channels = [num_filters * width for width in (16, 16, 16, 8, 4, 2, 1)]
        self.fc = nn.Conv2d(spec.num_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            SPADEResidualBlock(a, b, spec, norm, spectral_norm, interpolation) for a, b in itertools.pairwise(channels)
        )
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    @property
    def halo(self) -> int | None:  # type: ignore[override]
        return reach_of_blocks(self, [False] + 5 * [True])

    def forward(self, layout: SemanticLayout, z: Noise | None = None) -> Tensor:
        """Generate images float32 [N, C, H, W] in [-1, 1] at the layout's size (a multiple of 32).

        Args:
            layout: N label maps [H, W].
            z: noise, float [N, style_dims], or [N, style_dims, H, W], or by region; required if and only if
                style_dims > 0.
        """
        self.check_input(layout, z)
        if z is not None:
            layout = layout.with_noise(z)
        start = layout.resized(layout.height // 32, layout.width // 32)
        x = self.fc(start.one_hot(self.to_image.weight.dtype))  # [N, 16 F, H/32, W/32]
        for number, block in enumerate(self.blocks):
            x = block(x, layout, upsample=2 if number else 1)
        return torch.tanh(self.to_image(F.leaky_relu(x, 0.2, inplace=True)).float())  # [N, C, H, W]
