"""SPADE's modulation by tables: gamma and beta once per distinct neighbourhood, then one row of them per pixel.

With h hidden channels, C channels of x and L label channels, the dense path costs k k h (L + 2 C) multiply-adds per
pixel. Here the first convolution is the sum of k k weight rows per distinct inner window; the second is one matrix
product, k k h 2 C per distinct inner window, whose pieces are added up per distinct outer window. A pixel then costs
one row of the table and one multiply-add per channel. These are the same sums in another order, padding included.

Everything runs on rows [pixels, channels], which is what memory format channels_last is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.distributed import sum_over_processes
from imaginaire_spade.layout import LayoutNeighbourhoods, SemanticLayout
from imaginaire_spade.models.layers import effective_weight
from imaginaire_spade.patterns import Lookup


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup = lookup
        return F.embedding_bag(lookup.index, table, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_users(gradient.contiguous(), ctx.lookup), None


def sum_rows(table: Tensor, lookup: Lookup) -> Tensor:
    """``out[i] = sum_j table[index[i, j]]``: [R, C] -> [P, C]. The gradient turns the lookup round."""
    if torch.compiler.is_exporting():
        return F.embedding(lookup.index, table).sum(1)
    return _SumRows.apply(table, lookup)


def _sum_users(values: Tensor, lookup: Lookup | None) -> Tensor:
    """Add up ``values`` [P, C] over the places that take each row of the table: [R, C]. None: there is one row."""
    if lookup is None:
        return values.sum(0, keepdim=True)
    return F.embedding_bag(lookup.users, values, lookup.starts, mode="sum")


def label_rows(weight: Tensor, num_label_channels: int) -> Tensor:
    """A weight [out, channels, k, k] as the table that label lookups take: [k k (num_label_channels + 1), out]."""
    rows = weight[:, :num_label_channels].flatten(2).permute(2, 1, 0)  # [k k, channels, out]
    return F.pad(rows, (0, 0, 0, 1)).flatten(0, 1)


def convolve_layout(
    layout: SemanticLayout, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """``F.conv2d`` of the layout's one-hot view with square windows; the label channels are looked up.

    Args:
        weight: float [out, channels of the layout, k, k].
        bias: float [out].
    Returns:
        [N, out, h, w], channels_last.
    """
    if layout.is_dense:
        return F.conv2d(layout.one_hot(weight.dtype), weight, bias, stride, padding)
    size = weight.shape[-1]
    height, width = ((length + 2 * padding - size) // stride + 1 for length in (layout.height, layout.width))
    table = label_rows(weight, layout.spec.num_label_channels)
    rows = sum_rows(table, layout.windows(size, stride, padding))
    if bias is not None:
        rows = rows + bias
    y = rows.view(len(layout), height, width, -1).permute(0, 3, 1, 2)
    if layout.edges is None:
        return y
    return y + F.conv2d(layout.edges.to(weight.dtype).unsqueeze(1), weight[:, -1:], None, stride, padding)


def convolve_with_images(conv: nn.Module, semantics: SemanticLayout | Tensor, images: Tensor) -> Tensor:
    """``conv`` of semantics and pictures, one after the other along the channels; the semantics' share only once.

    Args:
        conv: of C + 3 channels.
        semantics: N label maps, or float [N, C, H, W].
        images: float [k * N, 3, H, W]; picture i belongs to label map i % N.
    """
    assert isinstance(conv, nn.Conv2d)
    weight = effective_weight(conv)
    stride, padding = conv.stride[0], int(conv.padding[0])
    channels = weight.shape[1] - images.shape[1]
    y = F.conv2d(images, weight[:, channels:], conv.bias, stride, padding)
    if isinstance(semantics, SemanticLayout):
        shared = convolve_layout(semantics, weight[:, :channels], None, stride, padding)
    else:
        shared = F.conv2d(semantics, weight[:, :channels], None, stride, padding)
    return (y.unflatten(0, (-1, len(shared))) + shared.to(y.dtype)).flatten(0, 1)


def first_convolution(weight: Tensor, bias: Tensor | None, around: LayoutNeighbourhoods) -> Tensor:
    """The convolution of the one-hot layout at every distinct inner window: [U, h].

    Args:
        weight: float [h, label channels (+ 1 for edges), k, k].
        bias: float [h].
    """
    num_label_channels = weight.shape[1] - (around.edges is not None)
    hidden = sum_rows(label_rows(weight, num_label_channels), around.labels)
    if around.edges is not None:
        hidden = hidden + around.edges.to(weight.dtype) @ weight[:, -1].flatten(1).T
    return hidden if bias is None else hidden + bias


def second_convolution(hidden: Tensor, weights: Sequence[Tensor], bias: Tensor, around: LayoutNeighbourhoods) -> Tensor:
    """Convolutions of ``hidden`` [U, h] at every distinct outer window, side by side: [V, out].

    Args:
        weights: float [.., h, k, k], ``out`` output channels together.
        bias: float [out].
    """
    hidden = hidden.masked_fill(around.outside, 0)  # zero padding
    places = torch.cat([weight.flatten(2).permute(2, 0, 1) for weight in weights], 1)  # [k k, out, h]
    sums = []
    for lookup, part in zip(around.outer, places.split(9), strict=True):
        pieces = F.linear(hidden, part.flatten(0, 1))  # [U, p out]
        sums.append(sum_rows(pieces.view(-1, len(bias)), lookup))
    return sum(sums, start=bias)


@dataclass(frozen=True)
class Modulation:
    """What to do to normalised pixels: x^ gamma[i] + beta[i], i the pixel's neighbourhood."""

    gamma: Tensor
    """float [V, C]; the "1 +" of SPADE included."""
    beta: Tensor
    """float [V, C]."""
    pixels: Lookup | None
    """Each pixel's row; None: there is one row (V = 1), and all take it."""


@dataclass(frozen=True)
class Statistics:
    """How to normalise: x^ = (x - mean) rstd, per channel."""

    mean: Tensor
    """float32 (float64 for such x) [C]."""
    rstd: Tensor
    """1 / standard deviation, [C]."""
    count: Tensor | None = None
    """Values per channel over which x's own statistics were taken (of all processes); None: they are constants."""
    synchronized: bool = False
    """Whether other processes' values are among those."""


def modulate(x: Tensor, modulation: Modulation, statistics: Statistics) -> Tensor:
    """Normalise and modulate x [N, C, H, W] in one pass; [N, C, H, W] in memory format channels_last.

    Statistics are taken as functions of x where they have a count: their share is part of x's gradient.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gamma, beta = modulation.gamma.to(wide), modulation.beta.to(wide)
    if torch.compiler.is_exporting():
        assert modulation.pixels is not None and statistics.count is None  # evaluation mode
        return _modulate_for_export(x, gamma, beta, modulation.pixels, statistics)
    return _Modulate.apply(x, gamma, beta, modulation.pixels, statistics)


def _modulate_for_export(x: Tensor, gamma: Tensor, beta: Tensor, pixels: Lookup, statistics: Statistics) -> Tensor:
    """What ``_Modulate`` computes, in operations that other runtimes have: no loop over chunks, no buffer."""
    scale = gamma * statistics.rstd
    rows = sum_rows(torch.cat([scale, beta - statistics.mean * scale], 1), pixels)
    scale, shift = rows.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2).chunk(2, 1)
    return x * scale + shift


class _Modulate(torch.autograd.Function):
    """y = (x - mean) rstd gamma[i] + beta[i], computed as y = x scale[i] + shift[i].

    Backward: with S and A the sums of dy and of dy x over each row's pixels, d beta = S, d gamma = rstd (A - mean S).
    dx is dy scale[i]; if mean and rstd are x's own, batch norm takes from dx^ its mean p / n and x^ times its mean
    product with x^, q / n. These are sums over the table: p = sum_i gamma S, q = sum_i gamma d gamma.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, pixels: Lookup | None, statistics: Statistics
    ) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.pixels, ctx.statistics = pixels, statistics
        scale = gamma * statistics.rstd
        shift = beta - statistics.mean * scale
        x_rows = _rows(x)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        y_rows = y.permute(0, 2, 3, 1).view(x_rows.shape)
        for places, table in _row_chunks(torch.cat([scale, shift], 1), pixels, x_rows):
            scale, shift = table.chunk(2, 1)
            torch.addcmul(shift, x_rows[places], scale, out=y_rows[places])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        images, gamma = ctx.saved_tensors
        pixels, statistics = ctx.pixels, ctx.statistics
        mean, rstd = statistics.mean, statistics.rstd
        x, dy = _rows(images), _rows(dy).to(gamma.dtype)
        dx = dy * x  # this buffer becomes dx below
        d_beta = _sum_users(dy, pixels)
        d_gamma = rstd * (_sum_users(dx, pixels) - mean * d_beta)
        if ctx.needs_input_grad[0]:
            slope = offset = torch.zeros_like(rstd)
            if statistics.count is not None:
                means = torch.stack([(gamma * d_beta).sum(0), (gamma * d_gamma).sum(0)]) / statistics.count
                if statistics.synchronized:
                    means = sum_over_processes(means)
                slope = -rstd * rstd * means[1]
                offset = -rstd * means[0] - mean * slope
            for places, scale in _row_chunks(gamma * rstd, pixels, x):
                part = torch.mul(dy[places], scale, out=dx[places])
                if statistics.count is not None:
                    part.addcmul_(x[places], slope).add_(offset)
        n, channels, height, width = images.shape
        dx = dx.to(x.dtype).view(n, height, width, channels).permute(0, 3, 1, 2)
        return dx, d_gamma, d_beta, None, None


@torch.no_grad()
def batch_moments(x: Tensor, synchronized: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of x [N, C, H, W] per channel, and the count of values; of all processes if asked.

    Mean and squares about it are taken chunk by chunk, in one pass over x, and put together in double precision.
    """
    rows = _rows(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = sum_over_processes if synchronized else torch.clone
    counts, means, squares = [], [], []
    for places in _chunks(len(rows), rows.shape[1], x.device):
        part = rows[places].to(wide)
        counts.append(len(part))
        means.append(part.mean(0))
        squares.append((part - means[-1]).square_().sum(0))
    size = torch.tensor(counts, dtype=torch.float64, device=x.device).unsqueeze(1)  # [chunks, 1]
    each = torch.stack(means).double()  # [chunks, C]
    sums = total(torch.cat([(each * size).sum(0), size.sum().unsqueeze(0)]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    about_mean = torch.stack(squares).double() + size * (each - mean).square()
    return mean.to(wide), (total(about_mean.sum(0)) / count).to(wide), count.to(wide)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C], contiguous: a view if x is channels_last, else a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _chunks(count: int, channels: int, device: torch.device) -> Iterator[slice]:
    """All rows, as many at a time as fit the processor's cache; on a GPU all at once."""
    size = count if device.type == "cuda" else max(1, 2**17 * torch.get_num_threads() // channels)
    return (slice(start, start + size) for start in range(0, count, size))


def _row_chunks(table: Tensor, pixels: Lookup | None, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each pixel's row of the table, chunk by chunk. One buffer serves all: fresh memory costs more than the sums."""
    buffer = table.new_empty(0)
    for places in _chunks(len(x), table.shape[1], x.device):
        if pixels is None:
            yield places, table
            continue
        index = pixels.index[places].flatten()
        if not len(buffer):
            buffer = table.new_empty(len(index), table.shape[1])
        yield places, torch.index_select(table, 0, index, out=buffer[: len(index)])
