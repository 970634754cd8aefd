"""The discriminator of OASIS (Schoenfeld et al. 2021): a U-Net that sorts each pixel into a class or "generated"."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.discriminator import Discriminator, Scores
from imaginaire_spade.models.layers import conv2d, effective_weight, enlarge
from imaginaire_spade.models.recomputation import forgotten
from imaginaire_spade.registry import DISCRIMINATORS, UNET_ENCODERS, Width

FUSED_FROM = 64 * 64
"""Pixels, before halving or after doubling, from which one convolution that also resizes is faster, by up to 1.7 times,
and needs less memory; below, summing up its weights takes longer (measured on a CPU)."""


def convolve_and_halve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 3x3 convolution, then 2x2 average pooling: [N, in, h, w] -> [N, out, h/2, w/2].

    The two are one 4x4 convolution of stride 2: 16 multiply-adds instead of 36 (as in Karras et al. 2018).
    """
    if x.shape[2] * x.shape[3] < FUSED_FROM:
        return F.avg_pool2d(conv(x), 2)
    return F.conv2d(x, _spread(effective_weight(conv)) / 4, conv.bias, stride=2, padding=1)


def enlarge_and_convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Double the resolution (nearest), then apply a 3x3 convolution: [N, in, h, w] -> [N, out, 2h, 2w].

    The two are one transposed 4x4 convolution of stride 2, and the enlarged x need not be kept.
    """
    if 4 * x.shape[2] * x.shape[3] < FUSED_FROM:
        y: Tensor = conv(enlarge(x, 2))
        return y
    weight = _spread(effective_weight(conv)).flip(2, 3).transpose(0, 1)
    return F.conv_transpose2d(x, weight, conv.bias, stride=2, padding=1)


def _spread(weight: Tensor) -> Tensor:
    """Sum a weight [out, in, 3, 3] over its four places in a 4x4 window: [out, in, 4, 4]."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[:, :, 1:] + padded[:, :, :-1]
    return rows[..., 1:] + rows[..., :-1]


def _activate_and(convolve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a leaky ReLU, then ``convolve``. The graph keeps x, which the shortcut needs too; what is convolved is made
    again."""
    y, kept = F.leaky_relu(x, 0.2), x.detach()
    with forgotten(y, lambda: F.leaky_relu(kept, 0.2)):
        return convolve(y)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which has a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, spectral_norm: bool) -> None:
        super().__init__()
        conv = partial(conv2d, spectral=spectral_norm)
        self.conv_1 = conv(in_channels, out_channels, 3, padding=1)
        self.conv_2 = conv(out_channels, out_channels, 3, padding=1)
        self.conv_s = conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()


class DownBlock(_Block):
    """Halve the resolution by average pooling; ``first``: of the image, so that no activation comes first."""

    def __init__(self, in_channels: int, out_channels: int, spectral_norm: bool, first: bool = False) -> None:
        super().__init__(in_channels, out_channels, spectral_norm)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, in, h, w] -> [N, out, h/2, w/2]."""
        y = self.conv_1(x) if self.first else _activate_and(self.conv_1, x)
        y = convolve_and_halve(self.conv_2, F.leaky_relu(y, 0.2, inplace=True))
        # A 1x1 convolution and pooling commute: it has a quarter of the work behind it.
        return self.conv_s(F.avg_pool2d(x, 2)) + y


class UpBlock(_Block):
    """Double the resolution (nearest)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, in, h, w] -> [N, out, 2h, 2w]."""
        y = _activate_and(partial(enlarge_and_convolve, self.conv_1), x)
        y = self.conv_2(F.leaky_relu(y, 0.2, inplace=True))
        return enlarge(self.conv_s(x), 2) + y  # (enlarging and a 1x1 convolution commute)


@UNET_ENCODERS.register("oasis")
class UNetEncoder(nn.Module):
    """OASIS's own encoder, trained with the rest: blocks that halve the resolution.

    Another encoder can take its place: it returns one tensor per halving, and tells their widths.

    Args:
        channels: of the image, then of each block's output.
        num_blocks: number of them. Sizes must be multiples of 2 to its power: 64, as in OASIS; 32 with 5.
    """

    def __init__(self, channels: Sequence[int], spectral_norm: bool, *, num_blocks: Literal[2, 3, 4, 5, 6] = 6) -> None:
        super().__init__()
        channels = channels[: 1 + num_blocks]
        self.widths = tuple(channels[1:])
        """Channels of each output, fine to coarse."""
        pairs = enumerate(itertools.pairwise(channels))
        self.blocks = nn.ModuleList(DownBlock(a, b, spectral_norm, first=not number) for number, (a, b) in pairs)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode images [N, C, H, W] -> [N, width, H/2, W/2], [N, width, H/4, W/4] and so on."""
        outputs, x = [], images
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class UNetDecoder(nn.Module):
    """Blocks that double the resolution; each but the first sees an encoder's output of its resolution too.

    Args:
        encoded: channels of the encoder's outputs, fine to coarse.
        widths: channels of each block's output, coarse to fine: as many.
    """

    def __init__(self, encoded: Sequence[int], widths: Sequence[int], spectral_norm: bool) -> None:
        super().__init__()
        skipped = [0, *reversed(encoded[:-1])]
        inputs = [skip + width for skip, width in zip(skipped, [encoded[-1], *widths[:-1]], strict=True)]
        self.blocks = nn.ModuleList(UpBlock(a, b, spectral_norm) for a, b in zip(inputs, widths, strict=True))

    def forward(self, encoded: Sequence[Tensor]) -> Tensor:
        """Decode outputs of an encoder, fine to coarse -> [N, width, H, W] at twice the finest resolution."""
        first, *others = self.blocks
        x = first(encoded[-1])
        for block, skip in zip(others, reversed(encoded[:-1]), strict=True):
            x = block(torch.cat([skip, x], 1))
        return x


@DISCRIMINATORS.register("oasis_unet")
class OASISDiscriminator(Discriminator):
    """The discriminator of OASIS (Schoenfeld et al. 2021): the classes of a segmentation, and one more for "generated".

    It sees images alone. Each group of images that one call scores for the same label maps has a forward of its own.

    Args:
        spec: channels of the layouts; it scores each label channel.
        image_channels: C of the images, RGB or others.
        num_filters: width of the first two blocks of the encoder (and of the last but one of the decoder).
        middle_num_filters: width of the two after them.
        max_num_filters: width of the last two.
        last_num_filters: width before the scores.
        spectral_norm: spectral norm on the convolutions of the blocks.
        encoder: the encoder; a pretrained one is frozen, and D has the blocks of its decoder for each of its maps.
    """

    batch_independent = True
    scores_classes = True

    def __init__(
        self,
        spec: LayoutSpec,
        image_channels: int = 3,
        *,
        num_filters: Width = 128,
        middle_num_filters: Width = 256,
        max_num_filters: Width = 512,
        last_num_filters: Width = 64,
        spectral_norm: bool = True,
        encoder: Annotated[Any, UNET_ENCODERS] = UNetEncoder,
    ) -> None:
        super().__init__()
        if not spec.num_label_channels:
            raise ConfigError(
                "dis.type: oasis_unet scores classes, and data.labels is null: write dis.type: multiscale_patch"
            )
        a, b, c = num_filters, middle_num_filters, max_num_filters
        self.encoder = encoder([image_channels, a, a, b, b, c, c], spectral_norm)
        encoded = self.encoder.widths
        widths = [c, b, b, a, a, last_num_filters][-len(encoded) :]
        self.decoder = UNetDecoder(encoded, widths, spectral_norm)
        self.size_multiple = self.min_size = 2 ** len(encoded)
        self.to_logits = nn.Conv2d(last_num_filters, 1 + spec.num_label_channels, 1)

    @property
    def num_freezable_layers(self) -> int:
        """The encoder's blocks: none of a pretrained one, which is frozen as it is."""
        return len(self.encoder.blocks)

    def requires_grad_(self, requires_grad: bool = True) -> OASISDiscriminator:
        """Switch the gradients of all layers on, except those of the encoder's frozen blocks, or off."""
        super().requires_grad_(requires_grad)
        self.encoder.blocks[: self.frozen_layers].requires_grad_(False)
        return self

    def forward(self, layout: SemanticLayout, images: Tensor) -> list[Scores]:
        """Score each pixel's classes: one ``Scores`` of logits [k * N, 1 + num_label_channels, H, W], without features.

        Channel 0 means "generated", channel c + 1 label channel c.

        Args:
            layout: N label maps [H, W]; only their number matters.
            images: float [k * N, C, H, W] in [-1, 1], H and W multiples of ``size_multiple`` (OASIS: 64). The k groups
                of N run one after the other, so that spectral norm iterates before each, as in OASIS's release.
        """
        height, width = images.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"images of {height}x{width}: both must be multiples of {self.size_multiple}")
        groups = [self.to_logits(self.decoder(self.encoder(group))).float() for group in images.split(len(layout))]
        return [Scores(torch.cat(groups) if len(groups) > 1 else groups[0], [])]
