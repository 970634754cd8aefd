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


def weights_by_place(weights: Sequence[Tensor]) -> Tensor:
    """Weights [.., h, k, k] of convolutions side by side, for ``second_convolution``: [k k, out, h]."""
    return torch.cat([weight.flatten(2).permute(2, 0, 1) for weight in weights], 1)


def second_convolution(hidden: Tensor, places: Tensor, bias: Tensor, around: LayoutNeighbourhoods) -> Tensor:
    """A convolution of ``hidden`` [U, h] at every distinct outer window: [V, out].

    Args:
        places: its weight, float [k k, out, h] (``weights_by_place``).
        bias: float [out].
    """
    hidden = hidden.masked_fill(around.outside, 0)  # zero padding
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


def modulate(
    x: Tensor, modulation: Modulation, statistics: Statistics, *, upsample: int = 1, slope: float = 1.0
) -> Tensor:
    """Enlarge (nearest), normalise, modulate and activate x [N, C, h, w] in one pass.

    Statistics are taken as functions of x where they have a count: their share is part of x's gradient.

    Args:
        modulation: of the enlarged pixels.
        upsample: factor of height and width.
        slope: of the leaky ReLU that comes last, > 0; 1: none.
    Returns:
        [N, C, upsample h, upsample w] in memory format channels_last.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gamma, beta = modulation.gamma.to(wide), modulation.beta.to(wide)
    return _Modulate.apply(x, gamma, beta, modulation.pixels, statistics, upsample, slope)


class _Modulate(torch.autograd.Function):
    """y = leaky((x - mean) rstd gamma[i] + beta[i]), computed as y = leaky(x scale[i] + shift[i]).

    Backward, dy being the gradient before the activation: with S and A the sums of dy and of dy x over each row's
    pixels, d beta = S, d gamma = rstd (A - mean S). dx is dy scale[i]; if mean and rstd are x's own, batch norm takes
    from dx^ its mean p / n and x^ times its mean product with x^, q / n. These are sums over the table: p = sum_i gamma
    S, q = sum_i gamma d gamma.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        pixels: Lookup | None,
        statistics: Statistics,
        upsample: int,
        slope: float,
    ) -> Tensor:
        n, channels, height, width = x.shape
        scale = gamma * statistics.rstd
        shift = beta - statistics.mean * scale
        y = x.new_empty(n, upsample * height, upsample * width, channels)
        few, many = _grids(x, y, upsample)
        for rows, table in _row_chunks(torch.cat([scale, shift], 1), pixels, many):
            scale, shift = table.chunk(2, -1)
            part = torch.addcmul(shift, few[rows], scale, out=many[rows])
            if slope != 1:
                F.leaky_relu_(part, slope)
        y = y.permute(0, 3, 1, 2)
        ctx.save_for_backward(x, gamma, *([y] if slope != 1 else []))
        ctx.pixels, ctx.statistics, ctx.upsample, ctx.slope = pixels, statistics, upsample, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, *activated = ctx.saved_tensors
        pixels, statistics, upsample = ctx.pixels, ctx.statistics, ctx.upsample
        mean, rstd, count = statistics.mean, statistics.rstd, statistics.count
        n, channels, height, width = x.shape
        dy = dy.permute(0, 2, 3, 1).contiguous()
        before = torch.empty_like(dy, dtype=gamma.dtype) if activated or dy.dtype != gamma.dtype else dy
        products = torch.empty_like(before)
        few, given = _grids(x, dy, upsample)
        many, products_many = (t.view(given.shape) for t in (before, products))
        for rows in _chunks(len(given), given[0].numel(), x.device):
            if activated:  # y has the sign of what went into the leaky ReLU
                y = activated[0].permute(0, 2, 3, 1).view(given.shape)[rows]
                many[rows].copy_(given[rows])
                torch.ops.aten.leaky_relu_backward.grad_input(many[rows], y, ctx.slope, True, grad_input=many[rows])
            elif before is not dy:
                many[rows].copy_(given[rows])
            torch.mul(many[rows], few[rows], out=products_many[rows])
        d_beta = _sum_users(before.flatten(0, 2), pixels)
        d_gamma = rstd * (_sum_users(products.flatten(0, 2), pixels) - mean * d_beta)
        if not ctx.needs_input_grad[0]:
            return None, d_gamma, d_beta, None, None, None, None
        slope = offset = torch.zeros_like(rstd)
        if count is not None:
            means = torch.stack([(gamma * d_beta).sum(0), (gamma * d_gamma).sum(0)]) / count
            if statistics.synchronized:
                means = sum_over_processes(means)
            slope = -rstd * rstd * means[1] * upsample**2
            offset = -rstd * means[0] * upsample**2 - mean * slope
        # The buffer of the products is free now: dx itself where there is one pixel for each of x's, else its terms.
        dx = products if upsample == 1 else before.new_empty(n, height, width, channels)
        d_few = dx.view(few.shape)
        for rows, scale in _row_chunks(gamma * rstd, pixels, many):
            terms = torch.mul(many[rows], scale, out=products_many[rows])
            if upsample > 1:  # on a CPU torch.sum over these two dimensions takes five times as long
                first, second, *others = (part for line in terms.unbind(1) for part in line.unbind(2))
                total = torch.add(first, second, out=d_few[rows][:, 0, :, 0])
                for part in others:
                    total += part
            if count is not None:
                d_few[rows].addcmul_(few[rows], slope).add_(offset)
        return dx.to(x.dtype).permute(0, 3, 1, 2), d_gamma, d_beta, None, None, None, None


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


def _grids(x: Tensor, y: Tensor, upsample: int) -> tuple[Tensor, Tensor]:
    """x [N, C, h, w] as [N h, 1, w, 1, C], a view if it is channels_last; y, contiguous, as the pixels made of it:
    [N h, upsample, w, upsample, C]."""
    n, channels, height, width = x.shape
    few = x.permute(0, 2, 3, 1).contiguous().view(n * height, 1, width, 1, channels)
    return few, y.view(n * height, upsample, width, upsample, channels)


def _chunks(count: int, values: int, device: torch.device) -> Iterator[slice]:
    """``count`` rows of so many values each, as many at a time as fit the processor's cache; on a GPU all at once."""
    size = count if device.type == "cuda" else max(1, 2**17 * torch.get_num_threads() // values)
    return (slice(start, start + size) for start in range(0, count, size))


def _row_chunks(table: Tensor, pixels: Lookup | None, grid: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each pixel's row of the table in the shape of ``grid`` [rows, upsample, w, upsample, C], some rows at a time.

    One buffer serves all: fresh memory costs more than the sums.
    """
    size = grid.shape[1:4].numel()
    buffer = table.new_empty(0)
    for rows in _chunks(len(grid), grid[0].numel(), grid.device):
        if pixels is None:
            yield rows, table
            continue
        index = pixels.index.view(-1, size)[rows].flatten()
        if not len(buffer):
            buffer = table.new_empty(len(index), table.shape[1])
        found = torch.index_select(table, 0, index, out=buffer[: len(index)])
        yield rows, found.view(-1, *grid.shape[1:4], table.shape[1])
