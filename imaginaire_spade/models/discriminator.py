"""Discriminators: (layout, images) -> one (logits, features) per scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.layers import InstanceNorm2d, convolve_layout, convolve_with_images
from imaginaire_spade.models.spectral_norm import SpectralConv2d, conv2d
from imaginaire_spade.registry import DISCRIMINATORS, Depth, Width


class Scores(NamedTuple):
    """Logits and features of one discriminator for a batch."""

    logits: Tensor
    """[N, 1, h, w], no activation; [N, 1 + classes, H, W] of a discriminator with ``scores_classes``."""
    features: list[Tensor]
    """Outputs of the layers before the last, each [N, C, h, w]."""


def split_scores(scores: list[Scores], groups: int = 2) -> list[list[Scores]]:
    """Split the scores of equally many images of each group, such as fake, then real ones: a list for each group."""

    parts = [(s.logits.chunk(groups), *(f.chunk(groups) for f in s.features)) for s in scores]  # one split of each
    return [[Scores(logits[i], [f[i] for f in features]) for logits, *features in parts] for i in range(groups)]


class Discriminator(nn.Module):
    """Interface of every discriminator: ``discriminator(layout, images)``, and the sizes that it takes."""

    min_size = 1
    """Smallest height and width of an image."""
    size_multiple = 1
    """Height and width must be multiples of this."""
    batch_independent = False
    """Whether an image's scores depend on that image alone (no batch statistics). The training step relies on it."""
    scores_classes = False
    """Whether each pixel's logits are "generated", then the label channels, for a loss over classes."""
    frozen_layers = 0
    """Layers of each patch discriminator, or blocks of an encoder, from the input on, that never train (FreezeD, Mo et
    al. 2020)."""

    @property
    def num_freezable_layers(self) -> int:
        """The largest ``frozen_layers`` that there are layers for."""
        return max((len(m.layers) for m in self.modules() if isinstance(m, PatchDiscriminator)), default=0)

    def requires_grad_(self, requires_grad: bool = True) -> Discriminator:
        """Switch the gradients of all layers on, except those of frozen ones, or off."""
        super().requires_grad_(requires_grad)
        for module in self.modules():
            if isinstance(module, PatchDiscriminator):
                for layer in module.layers[: self.frozen_layers]:
                    layer.requires_grad_(False)
        return self


class PatchDiscriminator(nn.Module):
    """Convolutions down to a map of scores, each of which judges a patch (Isola et al. 2017).

    A leaky ReLU follows each but the last.

    Args:
        layers: the first convolves semantics and images and holds nothing but that convolution.
        to_logits: the last convolution, to one channel.
    """

    def __init__(self, layers: Iterable[nn.Module], to_logits: nn.Conv2d) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.to_logits = to_logits

    def forward(self, semantics: SemanticLayout | Tensor, images: Tensor) -> Scores:
        """Score k * N images with N label maps, given as integers or float [N, C, H, W]; image i belongs to i % N."""
        (first,) = (layer for layer in self.layers[0].modules() if isinstance(layer, nn.Conv2d))
        x = convolve_with_images(first, semantics, images, slope=0.2)
        features = [x]
        for layer in self.layers[1:]:
            x = F.leaky_relu(layer(x), 0.2, inplace=True)
            features.append(x)
        return Scores(self.to_logits(x).float(), features)


@DISCRIMINATORS.register("multiscale_patch")
class MultiscaleDiscriminator(Discriminator):
    """Patch discriminators on the image at full, half, quarter ... resolution (Wang et al. 2018; Park et al. 2019).

    Args:
        spec: channels of the layouts.
        image_channels: C of the images, RGB or others.
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
        image_channels: int = 3,
        *,
        num_discriminators: Depth = 2,
        num_layers: Depth = 4,
        num_filters: Width = 64,
        max_num_filters: Width = 512,
        normalization: Literal["instance", "none"] = "instance",
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        widths = [num_filters, *(min(num_filters * 2**index, max_num_filters) for index in range(1, num_layers))]
        with_norm = normalization == "instance"

        def patch_discriminator() -> PatchDiscriminator:
            layers = [nn.Sequential(nn.Conv2d(spec.num_channels + image_channels, num_filters, 4, 2, 2))]
            for index, (a, b) in enumerate(itertools.pairwise(widths), start=1):
                stride = 1 if index == num_layers - 1 else 2
                # A bias would be removed by the norm.
                conv = conv2d(a, b, 4, stride, 2, bias=not with_norm, spectral=spectral_norm)
                layers.append(nn.Sequential(conv, InstanceNorm2d(b) if with_norm else nn.Identity()))
            return PatchDiscriminator(layers, nn.Conv2d(widths[-1], 1, 4, 1, 2))

        self.discriminators = nn.ModuleList(patch_discriminator() for _ in range(num_discriminators))

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Scores]:
        """Return the scores of each scale, full resolution first.

        Args:
            layout: N label maps [H, W].
            images: float [k * N, C, H, W] in [-1, 1]; image i belongs to label map i % N, so one call can score fake
                and real images of the same label maps.
        """
        semantics: SemanticLayout | Tensor = layout
        scores = []
        for index, discriminator in enumerate(self.discriminators):
            if index:
                images = _half_by_average(images)
                semantics = _half_semantics(semantics, images)
            scores.append(discriminator(semantics, images))
        return scores


def _half_by_average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)


def _half_semantics(semantics: SemanticLayout | Tensor, like: Tensor) -> Tensor:
    """Return ``_half_by_average`` of semantics [N, C, h, w]; labels are counted, so no one-hot view of them is made."""
    if isinstance(semantics, Tensor):
        return _half_by_average(semantics)
    layout = semantics
    if layout.is_dense or not layout.spec.num_label_channels:
        return _half_by_average(layout.one_hot(like.dtype))
    none, (height, width) = layout.spec.num_label_channels, like.shape[2:]
    channels = layout.windows(3, 2, 1).index % (none + 1)  # [N h w, 9]
    channels = channels.view(len(layout), height, width, 9).permute(0, 3, 1, 2)
    counts = like.new_zeros(len(layout), none + 1, height, width)
    counts.scatter_add_(1, channels, torch.ones_like(channels, dtype=like.dtype))
    inside = 9 * F.avg_pool2d(like.new_ones(1, 1, layout.height, layout.width), 3, stride=2, padding=1)
    counts = counts[:, :none] / inside
    if not layout.spec.num_dense_channels:
        return counts
    return torch.cat([counts, _half_by_average(layout.dense_channels(like.dtype))], 1)


class FPSEBranch(nn.Module):
    """Feature-pyramid semantics-embedding discriminator (Liu et al. 2019, CC-FPSE).

    It judges whether each patch is real and matches its label, at 1/4, 1/8 and 1/16 of the resolution.
    """

    def __init__(self, num_labels: int, image_channels: int, num_filters: int) -> None:
        super().__init__()
        widths = [image_channels, *(num_filters * width for width in (1, 2, 4, 8, 8))]
        lateral, final = 4 * num_filters, 2 * num_filters
        self.enc = nn.ModuleList(SpectralConv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.lat = nn.ModuleList(SpectralConv2d(width, lateral, 1) for width in widths[2:])
        self.final = nn.ModuleList(SpectralConv2d(lateral, final, 3, padding=1) for _ in range(3))
        self.output = nn.Conv2d(final, 1, 1)
        self.seg = nn.Conv2d(final, final, 1)
        self.embedding = nn.Conv2d(num_labels, final, 1)

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Tensor]:
        """Score images [M, C, H, W] with N label maps [H, W], N dividing M -> three [M, 1, h, w], fine to coarse."""
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
        image_channels: C of the images, RGB or others.
        num_discriminators: number of resolutions of the patch discriminators.
        num_layers: strided convolutions of each; one of stride 1 and the score's follow.
        num_filters: width of the first; doubles per layer. Also the branch's.
        max_num_filters: widest that a layer gets.
    """

    batch_independent = True

    def __init__(
        self,
        spec: LayoutSpec,
        image_channels: int = 3,
        *,
        num_discriminators: Depth = 2,
        num_layers: Depth = 5,
        num_filters: Width = 128,
        max_num_filters: Width = 512,
    ) -> None:
        super().__init__()
        self.size_multiple = 32
        # The convolution of stride 1 needs 2 pixels at the coarsest resolution.
        self.min_size = max(32, 2 ** (num_layers + num_discriminators))
        widths = [min(num_filters * 2**index, max_num_filters) for index in range(num_layers + 1)]
        *strided, last = itertools.pairwise([spec.num_channels + image_channels, *widths])

        def patch_discriminator() -> PatchDiscriminator:
            layers = [*(SpectralConv2d(a, b, 4, 2, 1) for a, b in strided), SpectralConv2d(*last, 4, 1, 1)]
            return PatchDiscriminator(layers, SpectralConv2d(widths[-1], 1, 3, 1, 1))

        self.discriminators = nn.ModuleList(patch_discriminator() for _ in range(num_discriminators))
        self.fpse = FPSEBranch(spec.num_channels, image_channels, num_filters)

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Scores]:
        """Return the branch's three scores, without features, then one per resolution, full first.

        Args:
            layout: N label maps [H, W], multiples of ``size_multiple`` and at least ``min_size``.
            images: float [k * N, C, H, W] in [-1, 1]; image i belongs to label map i % N.
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
