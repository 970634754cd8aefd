"""imaginaire's discriminator: patch discriminators and a feature-pyramid branch with semantic embedding."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.discriminator import Discriminator, PatchDiscriminator, Scores
from imaginaire_spade.models.layers import SpectralConv2d
from imaginaire_spade.models.tables import convolve_layout
from imaginaire_spade.registry import DISCRIMINATORS


class FPSEBranch(nn.Module):
    """Feature-pyramid semantics-embedding discriminator (Liu et al. 2019, CC-FPSE).

    It judges whether each patch is real and matches its label, at 1/4, 1/8 and 1/16 of the resolution.
    """

    def __init__(self, num_labels: int, num_filters: int) -> None:
        super().__init__()
        widths = [3, *(num_filters * width for width in (1, 2, 4, 8, 8))]
        lateral, final = 4 * num_filters, 2 * num_filters
        self.enc = nn.ModuleList(SpectralConv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.lat = nn.ModuleList(SpectralConv2d(width, lateral, 1) for width in widths[2:])
        self.final = nn.ModuleList(SpectralConv2d(lateral, final, 3, padding=1) for _ in range(3))
        self.output = nn.Conv2d(final, 1, 1)
        self.seg = nn.Conv2d(final, final, 1)
        self.embedding = nn.Conv2d(num_labels, final, 1)

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Tensor]:
        """Score images [M, 3, H, W] with N label maps [H, W], N dividing M -> three [M, 1, h, w], fine to coarse."""
        encoded, x = [], images
        for enc in self.enc:
            x = F.leaky_relu(enc(x), 0.2)
            encoded.append(x)
        pyramid = [F.leaky_relu(lat(e), 0.2) for lat, e in zip(self.lat, encoded[1:], strict=True)]
        for finer, coarser in ((2, 3), (1, 2), (0, 1)):
            up = F.interpolate(pyramid[coarser], scale_factor=2, mode="bilinear", align_corners=False)
            pyramid[finer] = up + pyramid[finer]
        embedded = F.avg_pool2d(convolve_layout(layout, self.embedding.weight, self.embedding.bias), 2)
        scores = []
        for final, level in zip(self.final, pyramid, strict=False):
            embedded = F.avg_pool2d(embedded, 2)
            y = F.leaky_relu(final(level), 0.2)  # [M, 2 F, h, w]
            match = embedded.repeat(len(images) // len(layout), 1, 1, 1) * self.seg(y)
            scores.append((self.output(y) + match.sum(1, keepdim=True)).float())
        return scores


@DISCRIMINATORS.register("fpse")
class FPSEDiscriminator(Discriminator):
    """The discriminator of imaginaire's SPADE: an FPSE branch and patch discriminators at several resolutions.

    The losses weigh the branch's three score maps like those of the patch discriminators; the branch has no features.

    Args:
        spec: channels of the layouts.
        num_discriminators: number of resolutions of the patch discriminators.
        num_layers: strided convolutions of each; one of stride 1 and the score's follow.
        num_filters: width of the first; doubles per layer. Also the branch's.
        max_num_filters: widest that a layer gets.
    """

    batch_independent = True

    def __init__(
        self,
        spec: LayoutSpec,
        *,
        num_discriminators: int = 2,
        num_layers: int = 5,
        num_filters: int = 128,
        max_num_filters: int = 512,
    ) -> None:
        super().__init__()
        self.size_multiple = 32
        # The convolution of stride 1 needs 2 pixels at the coarsest resolution.
        self.min_size = max(32, 2 ** (num_layers + num_discriminators))
        widths = [min(num_filters * 2**index, max_num_filters) for index in range(num_layers + 1)]
        *strided, last = itertools.pairwise([spec.num_channels + 3, *widths])

        def patch_discriminator() -> PatchDiscriminator:
            layers = [*(SpectralConv2d(a, b, 4, 2, 1) for a, b in strided), SpectralConv2d(*last, 4, 1, 1)]
            return PatchDiscriminator(layers, SpectralConv2d(widths[-1], 1, 3, 1, 1))

        self.discriminators = nn.ModuleList(patch_discriminator() for _ in range(num_discriminators))
        self.fpse = FPSEBranch(spec.num_channels, num_filters)

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Scores]:
        """Return the branch's three scores, without features, then one per resolution, full first.

        Args:
            layout: N label maps [H, W], multiples of ``size_multiple`` and at least ``min_size``.
            images: float [k * N, 3, H, W] in [-1, 1]; image i belongs to label map i % N.
        """
        scores = [Scores(logits, []) for logits in self.fpse(layout, images)]
        semantics: SemanticLayout | Tensor = layout
        for index, discriminator in enumerate(self.discriminators):
            if index:
                dense = semantics if isinstance(semantics, Tensor) else semantics.one_hot(images.dtype)
                semantics, images = _half_bilinear(dense), _half_bilinear(images)
            scores.append(discriminator(semantics, images))
        return scores


def _half_bilinear(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True)
