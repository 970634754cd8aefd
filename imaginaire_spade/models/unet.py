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
from imaginaire_spade.models.convolution import convolve_pixels, on_cpu_without_autocast
from imaginaire_spade.models.discriminator import Discriminator, Scores
from imaginaire_spade.models.layers import enlarge
from imaginaire_spade.models.products import BY_RULE, Choices
from imaginaire_spade.models.recomputation import forgotten
from imaginaire_spade.models.spectral_norm import SpectralConv2d, conv2d, convolve_with
from imaginaire_spade.registry import DISCRIMINATORS, UNET_ENCODERS, Width

LARGE = 64 * 64
"""Pixels from which groups of images run one after the other; with fewer all at once are faster (measured on a CPU)."""


class _Sum2x2(torch.autograd.Function):
    """Sum each 2x2 window of x with p pixels of zeros around it, and divide: its gradient is such a sum, without x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: int, divisor: int) -> Tensor:
        ctx.options = 1 - p, divisor
        return F.avg_pool2d(x, 2, 1, p, divisor_override=divisor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Sum2x2.apply(gradient, *ctx.options), None, None


def convolve_and_halve(conv: nn.Conv2d, x: Tensor, groups: int = 1) -> Tensor:
    """Apply a 3x3 convolution, then 2x2 average pooling: [N, in, h, w] -> [N, out, h/2, w/2].

    The means of all 2x2 windows and a convolution commute, and of its results every second is wanted: 9 multiply-adds
    instead of 36. The graph keeps x, not the means.
    """
    means, kept = _Sum2x2.apply(x, 1, 4), x.detach()
    with forgotten(means, lambda: F.avg_pool2d(kept, 2, 1, 1)):
        convolve = partial(convolve_pixels, bias=conv.bias, stride=(2, 2), choices=_choices(conv))
        return convolve_with(conv, means, convolve, groups=groups)


def enlarge_and_convolve(conv: nn.Conv2d, x: Tensor, groups: int = 1) -> Tensor:
    """Double the resolution (nearest), then apply a 3x3 convolution: [N, in, h, w] -> [N, out, 2h, 2w].

    To enlarge is to put zeros between the pixels and to sum each 2x2 window, and the sums commute with the convolution,
    which skips the zeros: 9 multiply-adds for four pixels instead of 36.
    """
    bias = None if conv.bias is None else conv.bias / 4

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        if on_cpu_without_autocast(x):
            return _Transposed.apply(x, weight, bias, _choices(conv))
        return F.conv_transpose2d(x, weight, bias, stride=2)

    return _Sum2x2.apply(convolve_with(conv, x, convolve, lambda w: w.flip(2, 3).transpose(0, 1), groups), 0, 1)


def _choices(conv: nn.Conv2d) -> Choices:
    return conv.choices if isinstance(conv, SpectralConv2d) else BY_RULE


class _Transposed(torch.autograd.Function):
    """A transposed 3x3 convolution of stride 2. Its weight's gradient is a matrix product: oneDNN's own is slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, choices: Choices) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.choices = choices
        return F.conv_transpose2d(x, weight, bias, stride=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), of_weight = ctx.saved_tensors, None
        of_x = F.conv2d(gradient, weight, stride=2) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            windows = gradient.permute(0, 2, 3, 1).contiguous().unfold(1, 3, 2).unfold(2, 3, 2)  # [N, h, w, out, 3, 3]
            rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
            products = ctx.choices.linear(x.transpose(0, 1).flatten(1), rows.mT)
            of_weight = products.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return of_x, of_weight, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


class _Doubled(torch.autograd.Function):
    """Nearest up-sampling by 2. Its gradient stays in channels_last, where torch's turns a part of a tensor around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return enlarge(x, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return F.avg_pool2d(gradient, 2, divisor_override=1)


def _convolve(conv: Callable[..., Tensor], x: Tensor, groups: int) -> Tensor:
    return conv(x, groups) if isinstance(conv, SpectralConv2d) else conv(x)


def _activate_and(convolve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a leaky ReLU, then ``convolve``. The graph keeps x, which the shortcut needs too; what is convolved is made
    again."""
    y, kept = F.leaky_relu(x, 0.2), x.detach()
    with forgotten(y, lambda: F.leaky_relu(kept, 0.2)):
        return convolve(y)


def _divide(parts: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """Divide the images of one part into ``count``, or join those of several, unless there are so many already."""
    if len(parts) == count:
        return parts
    return parts[0].chunk(count) if len(parts) == 1 else [torch.cat(tuple(parts))]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which has a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, spectral_norm: bool, first: bool = False) -> None:
        super().__init__()
        self.first = first
        conv = partial(conv2d, spectral=spectral_norm)
        self.conv_1 = conv(in_channels, out_channels, 3, padding=1)
        self.conv_2 = conv(out_channels, out_channels, 3, padding=1)
        self.conv_s = conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    enlarges = 1
    _map: Callable[[Tensor, int], Tensor]

    def forward(self, parts: Sequence[Tensor], groups: int = 1) -> list[Tensor]:
        """Map [in, h, w] -> [out, ...], of all groups * N images in one part or of N each; spectral norm iterates
        before each group."""
        height, width = parts[0].shape[2:]
        count = groups if self.enlarges**2 * height * width >= LARGE else 1
        parts = _divide(parts, count)
        if parts[0].device.type == "cpu":
            parts = [x.contiguous(memory_format=torch.channels_last) for x in parts]  # which is faster so
        return [self._map(x, groups // count) for x in parts]


class DownBlock(_Block):
    """Halve the resolution by average pooling; ``first``: of the image, so that no activation comes first."""

    def _map(self, x: Tensor, groups: int) -> Tensor:
        """Map x [N, in, h, w] -> [N, out, h/2, w/2]."""
        conv_1 = partial(_convolve, self.conv_1, groups=groups)
        y = conv_1(x) if self.first else _activate_and(conv_1, x)
        y = convolve_and_halve(self.conv_2, F.leaky_relu(y, 0.2, inplace=True), groups)
        # A 1x1 convolution and pooling commute: it has a quarter of the work behind it.
        return _convolve(self.conv_s, F.avg_pool2d(x, 2), groups) + y


class UpBlock(_Block):
    """Double the resolution (nearest)."""

    enlarges = 2

    def _map(self, x: Tensor, groups: int) -> Tensor:
        """Map x [N, in, h, w] -> [N, out, 2h, 2w]."""
        y = _activate_and(partial(enlarge_and_convolve, self.conv_1, groups=groups), x)
        y = _convolve(self.conv_2, F.leaky_relu(y, 0.2, inplace=True), groups)
        return _Doubled.apply(_convolve(self.conv_s, x, groups)) + y  # (enlarging and a 1x1 convolution commute)


@UNET_ENCODERS.register("oasis")
class UNetEncoder(nn.Module):
    """OASIS's own encoder, trained with the rest: blocks that halve the resolution.

    Another encoder can take its place: it returns one tensor per halving, each image's without regard to the others,
    and tells their widths.

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

    def forward(self, images: Tensor, groups: int = 1) -> list[list[Tensor]]:
        """Encode images [N, C, H, W] -> [N, width, H/2, W/2], [N, width, H/4, W/4] and so on, in parts (``_Block``)."""
        outputs, parts = [], [images]
        for block in self.blocks:
            parts = block(parts, groups)
            outputs.append(parts)
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

    def forward(self, encoded: Sequence[list[Tensor]], groups: int = 1) -> Tensor:
        """Decode outputs of an encoder, fine to coarse, in parts -> [N, width, H, W] at twice the finest resolution."""
        first, *others = self.blocks
        parts = first(encoded[-1], groups)
        for block, skips in zip(others, reversed(encoded[:-1]), strict=True):
            count = max(len(skips), len(parts))
            pairs = zip(_divide(skips, count), _divide(parts, count), strict=True)
            parts = block([torch.cat(pair, 1) for pair in pairs], groups)
        return _divide(parts, 1)[0]


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
            images: float [k * N, C, H, W] in [-1, 1], H and W multiples of ``size_multiple`` (OASIS: 64). Spectral norm
                iterates before each of the k groups of N, as in OASIS's release.
        """
        height, width = images.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"images of {height}x{width}: both must be multiples of {self.size_multiple}")
        groups = len(images) // len(layout)
        own = isinstance(self.encoder, UNetEncoder)
        encoded = self.encoder(images, groups) if own else [[maps] for maps in self.encoder(images)]
        return [Scores(self.to_logits(self.decoder(encoded, groups)).float(), [])]
