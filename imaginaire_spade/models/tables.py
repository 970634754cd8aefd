"""Convolve label maps by tables: compute once per distinct neighbourhood, then look up one row per pixel.

With h hidden channels, C channels of x and L label channels, the dense path costs k k h (L + 2 C) multiply-adds per
pixel. Here the first convolution sums k k weight rows per distinct inner window. The second is one matrix product,
k k h 2 C per distinct inner window; its pieces are then summed per distinct outer window. A pixel then costs one row of
the table and one multiply-add per channel. These are the same sums in another order, padding included.

Everything runs on rows [pixels, channels], which is what memory format channels_last is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.layout import LayoutNeighbourhoods, Lookup, SemanticLayout
from imaginaire_spade.models.layers import effective_weight


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup = lookup
        return F.embedding_bag(lookup.index, table, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_users(gradient.contiguous(), ctx.lookup), None


def sum_rows(table: Tensor, lookup: Lookup) -> Tensor:
    """Compute ``out[i] = sum_j table[index[i, j]]``: [R, C] -> [P, C]. The gradient inverts the lookup."""
    if torch.compiler.is_exporting():
        return F.embedding(lookup.index, table).sum(1)
    return _SumRows.apply(table, lookup)


def sum_users(values: Tensor, lookup: Lookup | None) -> Tensor:
    """Sum ``values`` [P, C] over the places that use each row of the table: [R, C]. None: the table has one row."""
    if lookup is None:
        return values.sum(0, keepdim=True)
    return F.embedding_bag(lookup.users, values, lookup.starts, mode="sum")


def label_rows(weight: Tensor, num_label_channels: int) -> Tensor:
    """Turn a weight [out, channels, k, k] into the table of label lookups: [k k (num_label_channels + 1), out]."""
    rows = weight[:, :num_label_channels].flatten(2).permute(2, 1, 0)  # [k k, channels, out]
    return F.pad(rows, (0, 0, 0, 1)).flatten(0, 1)


def convolve_layout(
    layout: SemanticLayout | Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """Compute ``F.conv2d`` of the layout's one-hot view, with square windows, by looking up the label channels.

    Args:
        layout: label maps, or a dense view of some: float [N, channels, H, W].
        weight: float [out, channels of the layout, k, k].
        bias: float [out].
    Returns:
        [N, out, h, w], channels_last.
    """
    if isinstance(layout, Tensor) or layout.is_dense:
        dense = layout if isinstance(layout, Tensor) else layout.one_hot(weight.dtype)
        return F.conv2d(dense, weight, bias, stride, padding)
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
    """Apply ``conv`` to semantics and images, concatenated along the channels; compute the semantics' share only once.

    Args:
        conv: convolution of C + 3 channels.
        semantics: N label maps, or float [N, C, H, W].
        images: float [k * N, 3, H, W]; image i belongs to label map i % N.
    """
    assert isinstance(conv, nn.Conv2d)
    weight = effective_weight(conv)
    stride, padding = conv.stride[0], int(conv.padding[0])
    channels = weight.shape[1] - images.shape[1]
    y = F.conv2d(images, weight[:, channels:], conv.bias, stride, padding)
    shared = convolve_layout(semantics, weight[:, :channels], None, stride, padding)
    return (y.unflatten(0, (-1, len(shared))) + shared.to(y.dtype)).flatten(0, 1)


def first_convolution(weight: Tensor, bias: Tensor | None, around: LayoutNeighbourhoods) -> Tensor:
    """Convolve the one-hot layout at every distinct inner window: [U, h].

    Args:
        weight: float [h, label channels (+ 1 for edges), k, k].
        bias: float [h].
    """
    num_label_channels = weight.shape[1] - (around.edges is not None)
    hidden = sum_rows(label_rows(weight, num_label_channels), around.labels)
    if around.edges is not None:
        hidden = hidden + around.edges.to(weight.dtype) @ weight[:, -1].flatten(1).T
    return hidden if bias is None else hidden + bias


def second_convolution(hidden: Tensor, places: Tensor, bias: Tensor, around: LayoutNeighbourhoods) -> Tensor:
    """Convolve ``hidden`` [U, h] at every distinct outer window: [V, out].

    Args:
        places: its weight, float [out, h, k, k] in the order [k k, out, h].
        bias: float [out].
    """
    hidden = hidden.masked_fill(around.outside, 0)  # zero padding
    sums = []
    for lookup, part in zip(around.outer, places.split(9), strict=True):
        pieces = F.linear(hidden, part.flatten(0, 1))  # [U, p out]
        sums.append(sum_rows(pieces.view(-1, len(bias)), lookup))
    return sum(sums, start=bias)
