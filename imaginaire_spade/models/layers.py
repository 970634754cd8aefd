"""Layers that several networks share, the initialisation of weights, and convolutions of label maps by tables: compute
once per distinct neighbourhood, then look up one row per pixel.

With h hidden channels, C channels of x and L label channels, the dense path costs k k h (L + 2 C) multiply-adds per
pixel. With tables the first convolution sums k k weight rows per distinct inner window. The second is one matrix
product, k k h 2 C per distinct inner window; its pieces are then summed per distinct outer window. A pixel then costs
one row of the table and one multiply-add per channel. These are the same sums in another order, padding included.

Tables run on rows [pixels, channels], which is what memory format channels_last is.
"""

import warnings
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.products import BY_RULE, Choices
from imaginaire_spade.models.spectral_norm import SpectralNorm, computing_dtype, effective_weight
from imaginaire_spade.neighbourhoods import LayoutNeighbourhoods, Lookup


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Apply instance norm (Ulyanov et al. 2016) to x [N, C, H, W], as a group norm with one channel per group.

    On a CPU this is faster than torch's own instance norm, and it keeps channels_last. Torch's own (2.15, CPU) also
    computes a wrong gradient for a single image if its output's gradient comes in memory format channels_last.
    """
    with torch.autocast(x.device.type, enabled=False):  # autocast would return float32
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        return F.group_norm(x, x.shape[1], weight, bias)


class InstanceNorm2d(nn.InstanceNorm2d):
    """See ``instance_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.weight, self.bias)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Up-sample x (nearest): [N, C, H, W] -> [N, C, factor H, factor W]."""
    if factor == 1:
        return x
    with torch.autocast("cuda", enabled=False):  # which would return float32
        return F.interpolate(x, scale_factor=factor, mode="nearest")


def enlarge_smoothly(x: Tensor) -> Tensor:
    """Double the resolution of x (bilinear): [N, C, H, W] -> [N, C, 2 H, 2 W], channels_last.

    The same as ``F.interpolate``, whose gradient is not deterministic on a GPU.
    """
    x = x.permute(0, 2, 3, 1)
    for dim in (1, 2):
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, -1, 1)
        before = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        after = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), last], dim)
        x = torch.stack([x.lerp(before, 0.25), x.lerp(after, 0.25)], dim + 1).flatten(dim, dim + 1)
    return x.permute(0, 3, 1, 2)


def initialise(network: nn.Module, kind: str, gain: float) -> None:
    """Draw new weights for all convolutions and linear layers; biases become zero.

    Args:
        kind: xavier, normal, kaiming or orthogonal.
        gain: gain of xavier and orthogonal, standard deviation of normal.
    """
    draw = {
        "xavier": partial(nn.init.xavier_normal_, gain=gain),
        "normal": partial(nn.init.normal_, std=gain),
        "kaiming": partial(nn.init.kaiming_normal_, a=0.2),
        "orthogonal": partial(nn.init.orthogonal_, gain=gain),
    }[kind]
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, SpectralNorm):
            for _ in range(3):  # u and v are still random: without this a new network's outputs explode
                module.iterate()


@cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the module of kernels for a GPU; None, with a warning, if they cannot be compiled here."""
    try:
        from imaginaire_spade.models import kernels

        kernels.probe(device)
    except Exception as error:  # each step from Triton to the driver has its own
        text = f"no Triton kernels for {device}, so that norms run slower: {' '.join(str(error).split())[:300]}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None
    return kernels


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
    if values.is_cuda:  # where a bag is summed by one warp: none may be long
        if (kernels := triton_kernels(values.device)) is not None:
            return kernels.sum_users(values, lookup, values.dtype)
        begin, first = (t.to(lookup.users.dtype) for t in lookup.chunks)
        parts = F.embedding_bag(lookup.users, values, begin, mode="sum")
        return F.embedding_bag(torch.arange(len(begin), device=values.device), parts, first, mode="sum")
    return F.embedding_bag(lookup.users, values, lookup.starts, mode="sum")


def label_rows(weight: Tensor) -> Tensor:
    """Turn a weight [out, label channels, k, k] into the table of label lookups: [k k (label channels + 1), out]."""
    rows = weight.flatten(2).permute(2, 1, 0)  # [k k, channels, out]
    return F.pad(rows, (0, 0, 0, 1)).flatten(0, 1)


def noise_rows(weight: Tensor, vectors: Tensor) -> Tensor:
    """Turn a weight [out, D, k, k] and M noise vectors [M, D] into the table of noise lookups: [k k (M + 1), out]."""
    products = vectors.to(weight.dtype) @ weight.permute(1, 2, 3, 0).flatten(1)  # [M, k k out]
    rows = products.view(len(vectors), -1, len(weight)).transpose(0, 1)  # [k k, M, out]
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
    if isinstance(layout, Tensor) or layout.is_dense or not layout.spec.num_label_channels:
        dense = layout if isinstance(layout, Tensor) else layout.one_hot(weight.dtype)
        return F.conv2d(dense, weight, bias, stride, padding)
    size, noise = weight.shape[-1], layout.spec.num_noise_channels
    height, width = ((length + 2 * padding - size) // stride + 1 for length in (layout.height, layout.width))
    before, of_labels, after = weight.tensor_split([noise, noise + layout.spec.num_label_channels], 1)
    table = label_rows(of_labels)
    if weight.is_cuda:
        table = table.to(computing_dtype(weight))
    rows = sum_rows(table, layout.windows(size, stride, padding))
    if bias is not None:
        rows = rows + bias
    y = rows.view(len(layout), height, width, -1).permute(0, 3, 1, 2)
    if not layout.spec.num_dense_channels:
        return y
    return y + F.conv2d(layout.dense_channels(weight.dtype), torch.cat([before, after], 1), None, stride, padding)


def convolve_with_images(conv: nn.Module, semantics: SemanticLayout | Tensor, images: Tensor, slope: float) -> Tensor:
    """Apply ``conv`` to semantics and images, concatenated along the channels; compute the semantics' share only once.

    Args:
        conv: convolution of C + 3 channels.
        semantics: N label maps, or float [N, C, H, W].
        images: float [k * N, 3, H, W]; image i belongs to label map i % N.
        slope: slope of the leaky ReLU that comes last.
    """
    assert isinstance(conv, nn.Conv2d)
    weight = effective_weight(conv)
    stride, padding = conv.stride[0], int(conv.padding[0])
    channels = weight.shape[1] - images.shape[1]
    y = F.conv2d(images, weight[:, channels:], conv.bias, stride, padding)
    shared = convolve_layout(semantics, weight[:, :channels], None, stride, padding)
    y = y.unflatten(0, (-1, len(shared))) + shared.to(y.dtype)
    return F.leaky_relu(y, slope, inplace=True).flatten(0, 1)


def first_convolution(
    weight: Tensor, bias: Tensor | None, around: LayoutNeighbourhoods, vectors: Tensor | None = None
) -> Tensor:
    """Convolve the one-hot layout at every distinct inner window: [U, h].

    Args:
        weight: float [h, (D for noise +) label channels (+ 1 for edges), k, k].
        bias: float [h].
        vectors: float [M, D], the layout's noise vectors.
    """
    noise, edges = 0 if vectors is None else vectors.shape[1], int(around.edges is not None)
    of_noise, of_labels, of_edges = weight.split([noise, weight.shape[1] - noise - edges, edges], 1)
    hidden = sum_rows(label_rows(of_labels), around.labels)
    if around.noise is not None and vectors is not None:
        hidden = hidden + sum_rows(noise_rows(of_noise, vectors).to(hidden.dtype), around.noise)
    if around.edges is not None:
        hidden = hidden + around.edges.to(weight.dtype) @ of_edges.flatten(1).T
    return hidden if bias is None else hidden + bias


def second_convolution(
    hidden: Tensor, places: Tensor, bias: Tensor, around: LayoutNeighbourhoods, choices: Choices = BY_RULE
) -> Tensor:
    """Convolve ``hidden`` [U, h] at every distinct outer window: [V, out].

    Args:
        places: its weight, float [out, h, k, k] in the order [k k, out, h].
        bias: float [out].
        choices: what multiplies matrices.
    """
    hidden = hidden.masked_fill(around.outside, 0)  # zero padding
    sums = []
    for lookup, part in zip(around.outer, places.split([each.index.shape[1] for each in around.outer]), strict=True):
        pieces = choices.linear(hidden, part.flatten(0, 1))  # [U, p out]
        sums.append(sum_rows(pieces.view(-1, len(bias)), lookup))
    return sum(sums, start=bias.to(sums[0].dtype) if bias.is_cuda else bias)


def both_convolutions(
    first: Tensor, first_bias: Tensor, gamma: Tensor, beta: Tensor, gamma_bias: Tensor, beta_bias: Tensor,
    laid_out: Tensor | None, around: LayoutNeighbourhoods, vectors: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute ``second_convolution`` of the ReLU of ``first_convolution`` by kernels: [V, 2 C].

    Args:
        first, first_bias: weight and bias of the first convolution.
        gamma, beta, gamma_bias, beta_bias: of the two that make up the second one.
        laid_out: weights of both as ``second_convolution`` takes them; None: they are laid out here.
        vectors: float [M, D], the layout's noise vectors.
    """
    start = first_bias
    if around.noise is not None and vectors is not None:
        of_noise, first = first.tensor_split([vectors.shape[1]], 1)
        start = start + sum_rows(noise_rows(of_noise, vectors).to(first.dtype), around.noise)
    dtype = computing_dtype(gamma)
    return _Convolutions.apply(first, start, gamma, beta, gamma_bias, beta_bias, laid_out, around, dtype)


class _Convolutions(torch.autograd.Function):
    """See ``both_convolutions``. In few operations, each of which costs a GPU's host time, however small it is.

    ``start`` [h], or [U, h], is what the first convolution adds to the sums over labels and edges.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, start: Tensor, gamma: Tensor, beta: Tensor, gamma_bias: Tensor,
        beta_bias: Tensor, laid_out: Tensor | None, around: LayoutNeighbourhoods, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        kernels = table_kernels(first)
        assert kernels is not None
        hidden = kernels.hidden_rows(first.permute(2, 3, 1, 0).contiguous(), start, around, dtype)
        out = 2 * len(gamma)
        if laid_out is None:
            places = torch.cat([gamma, beta]).permute(2, 3, 0, 1)
            places = places.new_empty(places.shape, dtype=dtype).copy_(places)
        else:
            places = laid_out.to(dtype)
        places = places.view(-1, hidden.shape[1])  # [k k 2C, h]
        table = torch.cat([gamma_bias + 1, beta_bias])
        rows = [out * lookup.index.shape[1] for lookup in around.outer]
        for lookup, part in zip(around.outer, places.split(rows), strict=True):
            table = kernels.add_rows((hidden @ part.T).view(-1, out), lookup, table)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, places)
        in_rows = gamma.is_contiguous(memory_format=torch.channels_last)
        ctx.by_window = start.dim() == 2
        ctx.constants = kernels, around, rows, first.shape, torch.channels_last if in_rows else torch.contiguous_format
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_table: Tensor) -> tuple[Tensor | None, ...]:
        hidden, places = ctx.saved_tensors
        kernels, around, rows, (inner, channels, *size), memory_format = ctx.constants
        d_table, wide = d_table.contiguous(), torch.promote_types(hidden.dtype, torch.float32)
        # The second convolution.
        d_places, d_hidden = torch.empty_like(places), None
        parts = (each.split(rows) for each in (places, d_places))
        for lookup, part, d_part in zip(around.outer, *parts, strict=True):
            pieces = kernels.sum_users(d_table, lookup, hidden.dtype).view(len(hidden), -1)  # [U, p 2C]
            torch.mm(pieces.T, hidden, out=d_part)
            d_hidden = pieces @ part if d_hidden is None else d_hidden.addmm_(pieces, part)
        shape, where = (d_table.shape[1], inner, *size), d_table.device
        weights = torch.empty(shape, dtype=wide, device=where, memory_format=memory_format)
        weights.copy_(d_places.view(*size, -1, inner).permute(2, 3, 0, 1))
        biases = d_table.sum(0, dtype=wide)
        # ReLU, zero padding and the first convolution.
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)
        labels = kernels.sum_users(d_hidden, around.labels, wide).view(*size, -1, inner)  # [k, k, L + 1, h]
        start = d_hidden if ctx.by_window else labels[0, 0].sum(0)  # every window has a first place
        if around.edges is not None:
            labels[:, :, -1] = (around.edges.to(hidden.dtype).T @ d_hidden).view(*size, inner)
        first = labels[:, :, :channels].permute(3, 2, 0, 1)
        return first, start, *weights.chunk(2), *biases.chunk(2), None, None, None


def table_kernels(weight: Tensor) -> ModuleType | None:
    """Return the module of kernels for a weight on a GPU, where they can be compiled."""
    return triton_kernels(weight.device) if weight.is_cuda else None
