"""Convolutions of pixels on a CPU in float32: 3x3 ones by Winograd's form, gradients of weights as matrix products.

Winograd's form (Lavin and Gray 2016, F(2x2, 3x3)) takes 16 multiplications per four pixels instead of 36:
Y = A^T [(G g G^T) * (B^T d B)] A for each 4x4 tile d of the image, that is sums of pixels, 16 matrix products over the
channels, sums of products. In float32 it rounds less than the direct sum over 9 C products. Gradients go the same way.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.models.products import BY_RULE, Choices, measure_onednn
from imaginaire_spade.models.timing import CLEARLY, Ask, gain

NUMBERS = 2**22
"""That a step works on, about as many as fit a processor's cache (measured on a CPU)."""
FEWEST = 256
"""Pixels of all images below which weights take longer to transform than is gained; four times as many where oneDNN
multiplies matrices, which then is as fast at the direct form (both measured on a CPU)."""


def convolve_pixels(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] | str = (0, 0), choices: Choices = BY_RULE,
) -> Tensor:  # fmt: skip
    """Compute ``F.conv2d``; training in channels_last on a CPU by Winograd's form, or the gradient of a weight by
    ``products_of_windows``, as ``choices`` say."""
    in_rows = x.is_contiguous(memory_format=torch.channels_last) and on_cpu_without_autocast(x)
    if in_rows and weight.requires_grad:
        by_winograd = is_by_winograd(x, weight, stride, padding, choices)
        if by_winograd or is_by_products(x, weight, stride, padding, choices):
            # Its gradient of the weight pays from half as many channels on (measured on a CPU without AVX-512).
            weight_by = is_by_winograd(x, weight, stride, padding, choices, fewer=1 if choices.onednn else 2)
            return _Convolved.apply(x, weight, bias, (by_winograd, weight_by), choices, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


def measure_choices(ask: Ask) -> Choices:
    """Return how to train on this CPU, as ``ask`` tells, each choice by those before it.

    What is measured is a convolution of 64x64 pixels with 256 channels, or of as many values with 128.
    """
    onednn = measure_onednn(ask)
    by = " by oneDNN" * onednn
    ratio = ask(f"gradients of weights as products{by}", partial(_gain_in_training, 256, Choices(onednn, True, 0)))
    if ratio is None:
        return BY_RULE
    choices = Choices(onednn, ratio > 1, 0)
    for channels in (128, 256):
        form = choices._replace(winograd_from=channels)
        question = f"Winograd in training, {channels} channels{by}{'' if choices.windows else ', no windows'}"
        if (ask(question, partial(_gain_in_training, channels, form)) or 0) > CLEARLY:
            return form
    return choices


def _gain_in_training(channels: int, way: Choices) -> float:
    """Measure how many times faster a convolution is trained by ``way`` than by what comes before it."""
    usual = way._replace(winograd_from=0) if way.winograd_from else way._replace(windows=False)
    x, weight = torch.ones(1, channels, 64, 2**14 // channels), torch.ones(channels, channels, 3, 3)
    x, weight = x.to(memory_format=torch.channels_last).requires_grad_(), weight.requires_grad_()

    def run(choices: Choices) -> None:
        convolve_pixels(x, weight, padding=(1, 1), choices=choices).sum().backward()

    return gain(partial(run, way), partial(run, usual))


def is_by_winograd(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: object, choices: Choices, fewer: int = 1
) -> bool:
    """Whether a convolution is of this kind and has the channels from which it is faster, or a ``fewer``-th of them."""
    square = weight.shape[2:] == (3, 3) and stride == (1, 1) and padding == (1, 1)
    enough = 0 < choices.winograd_from // fewer <= min(weight.shape[:2])
    return square and enough and len(x) * x[0, 0].numel() >= FEWEST * (4 if choices.onednn else 1)


def is_by_products(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...] | str, choices: Choices
) -> bool:
    """Whether ``products_of_windows`` takes such a convolution, and is faster than oneDNN's own gradient."""
    pixels, width, (height, size) = x[0, 0].numel() // stride[0] ** 2, min(weight.shape[:2]), weight.shape[2:]
    is_square = height == size and stride[0] == stride[1] and padding[0] == padding[1]
    return choices.windows and is_square and size > 1 and width >= 32 and pixels * width >= 2**18


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by_winograd: tuple[bool, bool], choices: Choices,
        *options: Any,
    ) -> Tensor:  # fmt: skip
        """``by_winograd``: the pixels and their gradient; the weight's gradient."""
        ctx.save_for_backward(x, weight)
        ctx.by_winograd, ctx.choices, ctx.options = by_winograd, choices, options
        return winograd(x, weight, bias, choices) if by_winograd[0] else F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.options
        once = not torch.is_grad_enabled()  # Winograd's gradients have no derivatives
        parts = [once and need and by for need, by in zip(ctx.needs_input_grad, ctx.by_winograd, strict=False)]
        of_x, of_weight = winograd_gradients(x, weight, gradient, ctx.choices, *parts)
        if of_x is None and ctx.needs_input_grad[0]:
            options = stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)
            of_x, *_ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)
        if of_weight is None and ctx.needs_input_grad[1]:
            if ctx.choices.windows:
                of_weight = products_of_windows(x, gradient, weight.shape[2], stride[0], padding[0], ctx.choices)
            else:
                options = stride, padding, (1, 1), False, (0, 0), 1, (False, True, False)
                of_weight = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[1]
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, *[None] * 4


def products_of_windows(x: Tensor, gradient: Tensor, size: int, stride: int, padding: int, choices: Choices) -> Tensor:
    """Compute the gradient of a convolution's weight, [out, in, size, size], as size^2 matrix products over the pixels.

    In memory format channels_last, padded pixels that a place of the window sees are one piece of memory for each
    image: no window is copied. oneDNN's own is slow in this format.

    Args:
        x, gradient: [N, in, H, W] and [N, out, h, w].
    """
    (height, width), (rows, columns) = x.shape[2:], gradient.shape[2:]
    tall, wide = (-(-(length + 2 * padding) // stride) for length in (height, width))
    sides = padding, stride * wide - width - padding, padding, stride * tall - height - padding
    found = x.new_empty(size, size, gradient.shape[1], x.shape[1])
    for number, (image, of_image) in enumerate(zip(x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1), strict=True)):
        padded = F.pad(image, (0, 0, *sides)).view(tall, stride, wide, stride, -1)
        phases = padded.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [stride, stride, tall wide, in]
        lines = F.pad(of_image, (0, 0, 0, wide - columns)).flatten(0, 1)[: (rows - 1) * wide + columns].T
        lines = lines.contiguous() if choices.onednn else lines  # which would copy them for each place
        for i, j in itertools.product(range(size), range(size)):
            start = i // stride * wide + j // stride
            seen = phases[i % stride, j % stride, start : start + lines.shape[1]]
            if choices.onednn:
                product = choices.linear(lines, seen.mT)
                found[i, j] = found[i, j] + product if number else product
            else:
                found[i, j].addmm_(lines, seen, beta=min(number, 1))
    return found.permute(2, 3, 0, 1).contiguous()


def on_cpu_without_autocast(x: Tensor) -> bool:
    """Whether functions of autograd that are written for a CPU, in x's own dtype, serve here."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def winograd_weights(weight: Tensor) -> Tensor:
    """Compute G g G^T of weights [out, in, 3, 3]: [16, out, in]."""
    return (_both_sides(weight) @ weight.reshape(-1, 9).T).view(16, *weight.shape[:2])


def winograd_by(
    products: Callable[[Tensor], Tensor | list[Tensor]], x: Tensor, out: int, bias: Tensor | None = None
) -> Tensor:
    """Convolve x [N, in, H, W], padded by one pixel of zeros: [N, out, H, W] in memory format channels_last.

    Args:
        products: multiplies tiles [16, t, in] with transformed weights: [16, t, out], or 16 tensors.
    """
    n, channels, height, width = x.shape
    padded = _padded(x)
    size = n, out, *(side - 2 for side in padded.shape[1:3])
    result = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    y = result.permute(0, 2, 3, 1)
    for images, rows in _pieces(y, max(channels, out)):
        tiles = _tiles(padded[images, rows.start : rows.stop + 2])
        piece = y[images, rows]
        sums = products(tiles.flatten(0, 1).flatten(1, 3))
        for a, line in enumerate(_sums_of_columns(sums)):
            for b, part in enumerate(_sums(line)):
                torch.add(part.view(*tiles.shape[2:-1], out), 0 if bias is None else bias, out=piece[:, a::2, b::2])
    if size[2:] == (height, width):
        return result  # (itself, not a view of it: an activation in place may follow)
    return result[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, choices: Choices) -> Tensor:
    """Compute ``F.conv2d(x, weight, bias, padding=1)``, in memory format channels_last."""
    parts = []
    for some in _of_output(weight):
        products = winograd_weights(weight[some]).mT
        of_bias = None if bias is None else bias[some]
        parts.append(winograd_by(partial(choices.multiply_each, b=products), x, products.shape[2], of_bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def winograd_gradients(
    x: Tensor, weight: Tensor, gradient: Tensor, choices: Choices, of_x: bool = True, of_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of x and of the weight, where asked for, from that of ``winograd``."""
    if not (of_x or of_weight):
        return None, None
    height, width = x.shape[2:]
    padded, y = _padded(x), gradient.permute(0, 2, 3, 1)
    if height % 2 or width % 2:
        y = F.pad(y, (0, 0, 0, width % 2, 0, height % 2))
    d_padded = torch.zeros_like(padded) if of_x else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else None
    for some in _of_output(weight):
        products, d_products = winograd_weights(weight[some]) if of_x else None, None
        for images, rows in _pieces(y, max(weight.shape[:2])):
            d_sums, seen = _spread(y[images, rows, :, some]), slice(rows.start, rows.stop + 2)
            flat = d_sums.flatten(0, 1).flatten(1, 3)
            if d_padded is not None and products is not None:
                _spread_tiles(choices.multiply_each(flat, products), d_padded[images, seen])
            if of_weight:
                tiles = _tiles(padded[images, seen]).flatten(0, 1).flatten(1, 3)
                d_products = choices.add_each(d_products, flat.mT, tiles)
        if d_weight is not None and d_products is not None:
            # (By output channel: a transposition of [9, out in] takes longer.)
            d_places = _both_sides(weight).T @ d_products.transpose(0, 1)  # [out, 9, in]
            d_weight[some].copy_(d_places.unflatten(1, (3, 3)).permute(0, 3, 1, 2))
    if d_padded is not None:
        d_padded = d_padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)
    return d_padded, d_weight


def _both_sides(weight: Tensor) -> Tensor:
    """Return G g G^T as one matrix [16, 9]."""
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.kron(g, g)


def _padded(x: Tensor) -> Tensor:
    """Pad x [N, C, H, W] for whole tiles: [N, H + 2 (3 if odd), W + 2 (3), C]."""
    height, width = x.shape[2:]
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))


def _of_output(weight: Tensor) -> Iterator[slice]:
    """Yield pieces of the output channels: transformed weights are large."""
    out, each = len(weight), max(1, 2 * NUMBERS // (16 * weight.shape[1]))
    return (slice(first, min(first + each, out)) for first in range(0, out, each))


def _pieces(y: Tensor, channels: int) -> Iterator[tuple[slice, slice]]:
    """Yield some rows of one image [N, H, W, C], or some images, at a time: slices of images and of their rows."""
    n, height, width, _ = y.shape
    lines = max(1, NUMBERS // (8 * width * channels))  # of tiles
    at_once, rows = max(1, 2 * lines // height), min(2 * lines, height)
    for image, row in itertools.product(range(0, n, at_once), range(0, height, rows)):
        yield slice(image, image + at_once), slice(row, min(row + rows, height))


def _tiles(x: Tensor) -> Tensor:
    """Compute B^T d B of x [n, 2 r + 2, 2 c + 2, C]: [4, 4, n, r, c, C]."""
    n, height, width, channels = x.shape
    rows, columns = height - 2, width - 2
    down = x.new_empty(4, n, rows // 2, width, channels)
    _combine([x[:, i : i + rows : 2] for i in range(4)], down)
    tiles = x.new_empty(4, 4, n, rows // 2, columns // 2, channels)
    _combine([down[:, :, :, j : j + columns : 2] for j in range(4)], tiles.transpose(0, 1))
    return tiles


def _combine(d: list[Tensor], out: Tensor) -> None:
    """Compute B^T d into ``out``."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _sums_of_columns(m: Tensor | list[Tensor]) -> Sequence[Any]:
    """Return A^T m of m [16, ...], or of 16 tensors: two times four."""
    if isinstance(m, Tensor):
        return _sums(m.unflatten(0, (4, 4)))
    return tuple(zip(*(_sums(m[j::4]) for j in range(4)), strict=True))


def _sums(m: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A^T m."""
    return (m[0] + m[1]).add_(m[2]), (m[1] - m[2]).sub_(m[3])


def _spread(y: Tensor) -> Tensor:
    """Compute A y A^T of y [n, 2 r, 2 c, C]: [4, 4, n, r, c, C]."""
    n, height, width, channels = y.shape
    down = y.new_empty(4, n, height // 2, width, channels)
    _spread_pair(y[:, ::2], y[:, 1::2], down)
    sums = y.new_empty(4, 4, n, height // 2, width // 2, channels)
    _spread_pair(down[:, :, :, ::2], down[:, :, :, 1::2], sums.transpose(0, 1))
    return sums


def _spread_pair(even: Tensor, odd: Tensor, out: Tensor) -> None:
    """Compute A (even, odd) into ``out``."""
    out[0] = even
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.neg(odd, out=out[3])


def _spread_tiles(d: Tensor | list[Tensor], x: Tensor) -> None:
    """Add B d B^T of d [16, n r c, C] to x [n, 2 r + 2, 2 c + 2, C]."""
    n, height, width, channels = x.shape
    size = n, height // 2 - 1, width // 2 - 1, channels
    down = x.new_zeros(4, *size[:2], width, channels)
    if isinstance(d, Tensor):
        _add_lines(d.view(4, 4, *size).permute(1, 4, 0, 2, 3, 5), down.movedim(3, 0))
    else:
        for i, line in enumerate(down):
            _add_lines([part.view(size).movedim(2, 0) for part in d[4 * i : 4 * i + 4]], line.movedim(2, 0))
    _add_lines(down.movedim(2, 1), x.movedim(1, 0))


def _add_lines(d: Tensor | list[Tensor], lines: Tensor) -> None:
    """Add B d of d [4, r, ...] to ``lines`` [2 r + 2, ...]."""
    even, odd = lines[::2], lines[1::2]
    even[:-1] += d[0]
    even[1:] += (d[1] + d[2]).sub_(d[0])
    odd[:-1] += (d[1] - d[2]).add_(d[3])
    odd[1:] -= d[3]
