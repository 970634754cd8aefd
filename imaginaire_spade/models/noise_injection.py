"""Noise that differs from pixel to pixel, added inside a generator (Karras et al. 2019, StyleGAN, sec. 3.2)."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from imaginaire_spade.layout import Noise, NoiseRegions

BlockNoise = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Two maps of noise, float [N, 1, h, w], and their strengths, [C, 1, 1], of a residual block."""


class PixelNoise(nn.Module):
    """Noise that differs from pixel to pixel: windows of one fixed map of standard normal numbers.

    Where a window lies depends on the image's style code, so that an image is repeatable, and on the place in the
    generator. Strengths are learned, from 0 on.

    Args:
        channels: of the first block's input and of each block's output.
    """

    PERIOD = 512
    values: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        widths = [width for a, b in pairwise(channels) for width in (a, min(a, b))]
        self.strengths = nn.ParameterList(torch.zeros(width, 1, 1) for width in widths)
        values = np.random.default_rng(0).standard_normal((self.PERIOD, self.PERIOD), dtype=np.float32)
        self.register_buffer("values", torch.from_numpy(values), persistent=False)

    def forward(self, z: Noise, height: int, width: int, block: int) -> BlockNoise:
        """Give block number ``block`` noise of [height, width].

        Args:
            z: style codes float [N, style_dims]; or by pixel or region of label maps [height, width], each of which
                then has a window of its own.
        """
        z = z.spread(1, 1) if isinstance(z, NoiseRegions) else z
        z = z[..., None, None] if z.dim() == 2 else z
        places = slice(2 * block, 2 * block + 2)
        # Standard normal numbers become uniform ones; each map is far from the others.
        ends = torch.stack([z[:, :1], z[:, -1:]])  # [2, N, 1, h, w]; a list as an index would make a GPU's host wait
        first = (torch.special.ndtr(ends.float()) * self.PERIOD).long()
        first = first + 71 * torch.arange(places.start, places.stop, device=z.device)[:, None, None]
        y = first[0] + torch.arange(height, device=z.device)[:, None]
        x = first[1] + torch.arange(width, device=z.device)
        maps = self.values[y % self.PERIOD, x % self.PERIOD]  # [N, 2, height, width]
        return maps.split(1, 1), list(self.strengths)[places]
