"""Triton kernels of the passes over pixels on a GPU. Their plain twins stand in ``modulation.py`` and ``layers.py``.

Rows are pixels, in memory [pixels, channels]. A program takes some rows and some channels. Sums are in float32 (float64
for such inputs). Import it where a GPU is: CPU builds of torch have no Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from imaginaire_spade.neighbourhoods import Lookup

TILE = 2048
"""Values that a program holds at a time."""


@triton.jit
def _few_row(pixel, width, up: tl.constexpr):
    """Return the row of x that a pixel of the enlarged image shows."""
    return (pixel // width // up) * (width // up) + (pixel % width) // up


@triton.jit
def _forward(
    few, gamma, beta, index, mean, rstd, out, pixels, channels, width, gamma_row, beta_row, slope,
    up: tl.constexpr, indexed: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    inside, known = (pixel < pixels)[:, None] & (c < channels)[None, :], c < channels
    i = (tl.load(index + pixel, mask=pixel < pixels, other=0) if indexed else pixel * 0).to(tl.int64)
    x = tl.load(few + _few_row(pixel, width, up)[:, None] * channels + c[None, :], mask=inside).to(wide)
    scale = tl.load(gamma + i[:, None] * gamma_row + c[None, :], mask=inside).to(wide)
    shift = tl.load(beta + i[:, None] * beta_row + c[None, :], mask=inside).to(wide)
    x = (x - tl.load(mean + c, mask=known)[None, :]) * tl.load(rstd + c, mask=known)[None, :]
    y = x * scale + shift
    tl.store(out + pixel[:, None] * channels + c[None, :], tl.where(y > 0, y, y * slope), mask=inside)


@triton.jit
def _sum_chunks(
    values, y, few, users, begin, out, chunks, total, channels, width, slope,
    up: tl.constexpr, activated: tl.constexpr, with_products: tl.constexpr, listed: tl.constexpr, wide: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    start = tl.load(begin + chunk)
    stop = tl.load(begin + chunk + 1, mask=chunk + 1 < chunks, other=0)
    stop = tl.where(chunk + 1 < chunks, stop, total)
    sums, products = tl.zeros((columns,), wide), tl.zeros((columns,), wide)
    for place in range(start, stop, rows):
        user = place + tl.arange(0, rows)
        inside = (user < stop)[:, None] & (c < channels)[None, :]
        pixel = (tl.load(users + user, mask=user < stop, other=0) if listed else user).to(tl.int64)
        offset = pixel[:, None] * channels + c[None, :]
        value = tl.load(values + offset, mask=inside, other=0).to(wide)
        if activated:
            value = tl.where(tl.load(y + offset, mask=inside, other=0).to(wide) > 0, value, value * slope)
        sums += tl.sum(value, 0)
        if with_products:
            x = tl.load(few + _few_row(pixel, width, up)[:, None] * channels + c[None, :], mask=inside, other=0)
            products += tl.sum(value * x.to(wide), 0)
    row = chunk.to(tl.int64) * channels * (2 if with_products else 1)
    tl.store(out + row + c, sums, mask=c < channels)
    if with_products:
        tl.store(out + row + channels + c, products, mask=c < channels)


@triton.jit
def _backward(
    dy, y, few, gamma, index, mean, rstd, means, out, pixels, channels, width, gamma_row, slope,
    up: tl.constexpr, activated: tl.constexpr, indexed: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    inside, known = (q < pixels)[:, None] & (c < channels)[None, :], c < channels
    total = tl.zeros((rows, columns), wide)
    for down in tl.static_range(up):
        for right in tl.static_range(up):
            pixel = (q // width * up + down) * (width * up) + q % width * up + right
            offset = pixel[:, None] * channels + c[None, :]
            value = tl.load(dy + offset, mask=inside, other=0).to(wide)
            if activated:
                value = tl.where(tl.load(y + offset, mask=inside, other=0).to(wide) > 0, value, value * slope)
            i = (tl.load(index + pixel, mask=q < pixels, other=0) if indexed else pixel * 0).to(tl.int64)
            total += value * tl.load(gamma + i[:, None] * gamma_row + c[None, :], mask=inside, other=0).to(wide)
    r = tl.load(rstd + c, mask=known)[None, :]
    x = tl.load(few + q[:, None] * channels + c[None, :], mask=inside, other=0).to(wide)
    x = (x - tl.load(mean + c, mask=known)[None, :]) * r
    own = tl.load(means + c, mask=known)[None, :] + x * tl.load(means + channels + c, mask=known)[None, :]
    dx = (total - own * (up * up)) * r
    tl.store(out + q[:, None] * channels + c[None, :], dx, mask=inside)


def _tiles(count: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of programs for ``count`` rows, and the rows and channels of each."""
    columns = min(1 << (channels - 1).bit_length(), 128)  # a power of two
    rows = TILE // columns
    return (-(-count // rows), -(-channels // columns)), {"rows": rows, "columns": columns}


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(
    few: Tensor, gamma: Tensor, beta: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor, up: int, slope: float
) -> Tensor:
    """See ``modulation.forward_pixels``."""
    (lines, _, width, _, channels), some = few.shape, few
    assert gamma.shape[1] == beta.shape[1] == len(mean) == len(rstd) == channels  # a kernel does not broadcast
    out = few.new_empty(lines, up, width, up, channels)
    grid, tile = _tiles(out.numel() // channels, channels)
    _forward[grid](
        few, gamma, beta, some if index is None else index, mean, rstd, out, out.numel() // channels, channels,
        width * up, gamma.stride(0), beta.stride(0), slope, up, index is not None, _wide(few.dtype), **tile,
    )  # fmt: skip
    return out


def backward(
    dy: Tensor, few: Tensor, y: Tensor | None, gamma: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor,
    means: Tensor, slope: float,
) -> Tensor:  # fmt: skip
    """See ``modulation.backward_pixels``."""
    out, channels = torch.empty_like(few), few.shape[4]
    assert gamma.shape[1] == len(mean) == len(rstd) == channels
    grid, tile = _tiles(few.numel() // channels, channels)
    _backward[grid](
        dy, dy if y is None else y, few, gamma, few if index is None else index, mean, rstd, means, out,
        few.numel() // channels, channels, few.shape[2], gamma.stride(0), slope, dy.shape[1], y is not None,
        index is not None, _wide(few.dtype), **tile,
    )  # fmt: skip
    return out


def sums(dy: Tensor, few: Tensor, y: Tensor | None, slope: float, lookup: Lookup | None) -> tuple[Tensor, Tensor]:
    """See ``modulation.sums_of_pixels``."""
    total = _sum(dy, dy.numel() // dy.shape[4], dy.shape[4], lookup, few, y, slope)
    return total[:, : dy.shape[4]], total[:, dy.shape[4] :]


def sum_users(values: Tensor, lookup: Lookup) -> Tensor:
    """See ``layers.sum_users``; in float32 or float64."""
    return _sum(values, values.shape[0], values.shape[1], lookup)


def _sum(
    values: Tensor, count: int, channels: int, lookup: Lookup | None, few: Tensor | None = None,
    y: Tensor | None = None, slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sum rows (and their products with x) over the users of each row of a table: first within chunks, then those."""
    if lookup is None:
        users, total, chunk = values, count, TILE
        begin, first = torch.arange(0, count, chunk, device=values.device), values.new_zeros(1, dtype=torch.int64)
    else:
        users, total, (begin, first) = lookup.users, lookup.index.numel(), lookup.chunks
    wide = torch.promote_types(values.dtype, torch.float32)
    parts = values.new_empty(len(begin), channels if few is None else 2 * channels, dtype=wide)
    (_, blocks), tile = _tiles(1, channels)
    some = values if few is None else few
    width, up = (values.shape[2] * values.shape[3], values.shape[1]) if few is not None else (1, 1)
    _sum_chunks[len(begin), blocks](
        values, values if y is None else y, some, users, begin, parts, len(begin), total, channels, width, slope, up,
        y is not None, few is not None, lookup is not None, _wide(wide), **tile,
    )  # fmt: skip
    out, columns = values.new_empty(len(first), parts.shape[1], dtype=wide), parts.shape[1]
    (_, blocks), tile = _tiles(1, columns)
    _sum_chunks[len(first), blocks](
        parts, parts, parts, parts, first, out, len(first), len(begin), columns, 1, 1.0, 1, False, False, False,
        _wide(wide), **tile,
    )  # fmt: skip
    return out


def probe(device: torch.device) -> None:
    """Compile and start a kernel on one value, so that what is missing shows."""
    one = torch.ones(1, 1, 1, 1, 1, device=device)
    forward(one, one.view(1, 1), one.view(1, 1), None, one.view(1), one.view(1), 1, 1.0)
