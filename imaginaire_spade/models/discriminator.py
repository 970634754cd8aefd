"""Discriminators: (layout, pictures) -> one (logits, features) per scale."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.layers import InstanceNorm2d, conv2d
from imaginaire_spade.models.tables import convolve_with_images
from imaginaire_spade.registry import DISCRIMINATORS


class Scores(NamedTuple):
    """What one discriminator says of a batch."""

    logits: Tensor
    """[N, 1, h, w], no activation."""
    features: list[Tensor]
    """Outputs of the layers before the last, each [N, C, h, w]."""


def split_scores(scores: list[Scores]) -> tuple[list[Scores], list[Scores]]:
    """Scores of a batch of fake then real pictures -> (fake, real)."""

    def half(index: int) -> list[Scores]:
        return [Scores(s.logits.chunk(2)[index], [f.chunk(2)[index] for f in s.features]) for s in scores]

    return half(0), half(1)


class Discriminator(nn.Module):
    """What the pipeline asks of every discriminator: ``discriminator(layout, images)`` and which sizes it takes."""

    min_size = 1
    """Smallest height and width of a picture."""
    size_multiple = 1
    """Height and width must be multiples of this."""
    batch_independent = False
    """Whether a picture's scores depend on that picture alone: no batch statistics. The training step uses it."""


class PatchDiscriminator(nn.Module):
    """4x4 convolutions down to a map of scores, each of which judges a patch (Isola et al. 2017)."""

    def __init__(
        self,
        in_channels: int,
        num_filters: int,
        max_num_filters: int,
        num_layers: int,
        normalization: str,
        spectral_norm: bool,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(in_channels, num_filters, 4, 2, 2), nn.LeakyReLU(0.2))]
        channels = num_filters
        for index in range(1, num_layers):
            width = min(channels * 2, max_num_filters)
            stride = 1 if index == num_layers - 1 else 2
            with_norm = normalization == "instance"
            # A bias would be removed by the norm.
            conv = conv2d(channels, width, 4, stride, 2, bias=not with_norm, spectral=spectral_norm)
            norm: nn.Module = InstanceNorm2d(width) if with_norm else nn.Identity()
            layers.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
            channels = width
        self.layers = nn.ModuleList(layers)
        self.to_logits = nn.Conv2d(channels, 1, 4, 1, 2)

    def forward(self, semantics: SemanticLayout | Tensor, images: Tensor) -> Scores:
        """N label maps, as integers or float [N, C, H, W], and k * N pictures; picture i belongs to label map i % N."""
        first = self.layers[0]
        assert isinstance(first, nn.Sequential)
        x = first[1](convolve_with_images(first[0], semantics, images))
        features = [x]
        for layer in self.layers[1:]:
            x = layer(x)
            features.append(x)
        return Scores(self.to_logits(x).float(), features)


@DISCRIMINATORS.register("multiscale_patch")
class MultiscaleDiscriminator(Discriminator):
    """Patch discriminators on the picture at full, half, quarter ... resolution (Wang et al. 2018; Park et al. 2019).

    Args:
        spec: what the layouts hold.
        num_discriminators: number of resolutions.
        num_layers: convolutions of each before the last; the last of them has stride 1.
        num_filters: width of the first; doubles per layer.
        max_num_filters: widest that a layer gets.
        normalization: instance norm after all but the first and the last convolution, or none.
        spectral_norm: spectral norm on the same convolutions.
    """

    batch_independent = True

    def __init__(
        self,
        spec: LayoutSpec,
        *,
        num_discriminators: int = 2,
        num_layers: int = 4,
        num_filters: int = 64,
        max_num_filters: int = 512,
        normalization: Literal["instance", "none"] = "instance",
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            PatchDiscriminator(
                spec.num_channels + 3, num_filters, max_num_filters, num_layers, normalization, spectral_norm
            )
            for _ in range(num_discriminators)
        )

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Scores]:
        """Scores per scale, full resolution first.

        Args:
            layout: N label maps [H, W].
            images: float [k * N, 3, H, W] in [-1, 1]; picture i belongs to label map i % N, so that fake and real
                pictures of the same label maps go through together.
        """
        semantics: SemanticLayout | Tensor = layout
        scores = []
        for index, discriminator in enumerate(self.discriminators):
            if index:
                images = _half(images)
                semantics = _half(semantics) if isinstance(semantics, Tensor) else _half_one_hot(semantics, images)
            scores.append(discriminator(semantics, images))
        return scores


def _half(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)


def _half_one_hot(layout: SemanticLayout, like: Tensor) -> Tensor:
    """``_half`` of the one-hot view [N, C, h, w], counted from the labels: the view itself is never made."""
    if layout.is_dense:
        return _half(layout.one_hot(like.dtype))
    none, (height, width) = layout.spec.num_label_channels, like.shape[2:]
    channels = layout.windows(3, 2, 1).index % (none + 1)  # [N h w, 9]
    channels = channels.view(len(layout), height, width, 9).permute(0, 3, 1, 2)
    counts = like.new_zeros(len(layout), none + 1, height, width)
    counts.scatter_add_(1, channels, torch.ones_like(channels, dtype=like.dtype))
    inside = 9 * F.avg_pool2d(like.new_ones(1, 1, layout.height, layout.width), 3, stride=2, padding=1)
    counts = counts[:, :none] / inside
    if layout.edges is None:
        return counts
    return torch.cat([counts, _half(layout.edges.to(like.dtype).unsqueeze(1))], 1)
