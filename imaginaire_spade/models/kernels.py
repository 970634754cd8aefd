"""Triton kernels of the passes over pixels on a GPU. Their plain twins stand in ``modulation.py`` and ``layers.py``.

Rows are pixels, in memory [pixels, channels]. A program takes some rows and some channels. Sums are in float32 (float64
for such inputs). Import it where a GPU is: CPU builds of torch have no Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from imaginaire_spade.neighbourhoods import LayoutNeighbourhoods, Lookup

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
    up: tl.constexpr, activated: tl.constexpr, with_products: tl.constexpr, terms: tl.constexpr, wide: tl.constexpr,
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
        pixel = (tl.load(users + user, mask=user < stop, other=0) // terms if terms else user).to(tl.int64)
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
def _sum_parts(parts, first, mean, rstd, out, table_rows, chunks, channels, rows: tl.constexpr, columns: tl.constexpr):
    row, c = tl.program_id(0), tl.program_id(1) * columns + tl.arange(0, columns)
    start = tl.load(first + row)
    stop = tl.load(first + row + 1, mask=row + 1 < table_rows, other=0)
    stop = tl.where(row + 1 < table_rows, stop, chunks)
    sums, products = tl.zeros((columns,), parts.dtype.element_ty), tl.zeros((columns,), parts.dtype.element_ty)
    for place in range(start, stop, rows):
        part = (place + tl.arange(0, rows)).to(tl.int64)
        inside = (part < stop)[:, None] & (c < channels)[None, :]
        offset = part[:, None] * (2 * channels) + c[None, :]
        sums += tl.sum(tl.load(parts + offset, mask=inside, other=0), 0)
        products += tl.sum(tl.load(parts + offset + channels, mask=inside, other=0), 0)
    known, at = c < channels, out + row.to(tl.int64) * (2 * channels) + c
    scaled = tl.load(rstd + c, mask=known) * (products - tl.load(mean + c, mask=known) * sums)
    tl.store(at, sums, mask=known)
    tl.store(at + channels, scaled, mask=known)


@triton.jit
def _add_rows(
    table, index, start, edges, outside, out, places, channels, start_row, labels,
    terms: tl.constexpr, of_labels: tl.constexpr, edged: tl.constexpr, wide: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    here, known = place < places, c < channels
    inside = here[:, None] & known[None, :]
    total = tl.load(start + place[:, None] * start_row + c[None, :], mask=inside, other=0).to(wide)
    for j in tl.static_range(terms):
        i, wanted = tl.load(index + place * terms + j, mask=here, other=0).to(tl.int64), inside
        if of_labels:  # the last row of a place stands for "none": in the table it is that of edges, or missing
            last = (labels + 1) * j + labels
            wanted = inside & (i != last)[:, None]
            if edged:
                row = tl.load(table + last * channels + c, mask=known, other=0).to(wide)
                total += tl.load(edges + place * terms + j, mask=here, other=0).to(wide)[:, None] * row[None, :]
            else:
                i -= j
        total += tl.load(table + i[:, None] * channels + c[None, :], mask=wanted, other=0).to(wide)
    if of_labels:
        padding = tl.load(outside + place, mask=here, other=0).to(tl.int1)
        total = tl.where((total > 0) & ~padding[:, None], total, 0)
    tl.store(out + place[:, None] * channels + c[None, :], total, mask=inside)


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


def _tiles(count: int, channels: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the grid of programs for ``count`` rows, and the rows and channels of each."""
    columns = min(1 << (channels - 1).bit_length(), 128)  # a power of two
    rows = TILE // columns
    return (-(-count // rows), -(-channels // columns)), (rows, columns)


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


_compiled: dict[Any, Any] = {}
"""A kernel, device, constants and kinds of arguments -> what Triton compiled for them."""


def _start(kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
    """Start a kernel. Triton's own search for what it has compiled takes the host longer than the start itself."""
    key = kernel, arguments[0].device, constants, *map(_kind, arguments)
    if (compiled := _compiled.get(key)) is None or torch.version.hip:
        _compiled[key] = kernel[grid](*arguments, *constants)  # (the interpreter returns None)
    else:
        compiled[*grid, 1](*arguments, *constants)


def _kind(argument: Any) -> Any:
    """Tell apart what Triton compiles a kernel anew for (on NVIDIA's GPUs)."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, float):
        return "float"
    return 1 if argument == 1 else 16 if argument % 16 == 0 else argument >= 2**31


def forward(
    few: Tensor, gamma: Tensor, beta: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor, up: int, slope: float
) -> Tensor:
    """See ``modulation.forward_pixels``."""
    (lines, _, width, _, channels), some = few.shape, few
    assert gamma.shape[1] == beta.shape[1] == len(mean) == len(rstd) == channels  # a kernel does not broadcast
    out = few.new_empty(lines, up, width, up, channels)
    grid, tile = _tiles(out.numel() // channels, channels)
    arguments = (
        few, gamma, beta, some if index is None else index, mean, rstd, out, out.numel() // channels, channels,
        width * up, gamma.stride(0), beta.stride(0), float(slope),
    )  # fmt: skip
    _start(_forward, grid, arguments, (up, index is not None, _wide(few.dtype), *tile))
    return out


def backward(
    dy: Tensor, few: Tensor, y: Tensor | None, gamma: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor,
    means: Tensor, slope: float,
) -> Tensor:  # fmt: skip
    """See ``modulation.backward_pixels``."""
    out, channels = torch.empty_like(few), few.shape[4]
    assert gamma.shape[1] == len(mean) == len(rstd) == channels
    grid, tile = _tiles(few.numel() // channels, channels)
    arguments = (
        dy, dy if y is None else y, few, gamma, few if index is None else index, mean, rstd, means, out,
        few.numel() // channels, channels, few.shape[2], gamma.stride(0), float(slope),
    )  # fmt: skip
    constants = dy.shape[1], y is not None, index is not None, _wide(few.dtype), *tile
    _start(_backward, grid, arguments, constants)
    return out


def gradients(
    dy: Tensor, few: Tensor, y: Tensor | None, slope: float, lookup: Lookup | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """See ``modulation.gradients_of_table``."""
    channels = dy.shape[4]
    parts, first = _sum_in_chunks(dy, dy.numel() // channels, channels, lookup, few, y, slope)
    out, ((_, blocks), tile) = parts.new_empty(len(first), 2 * channels), _tiles(1, channels)
    arguments = parts, first, mean, rstd, out, len(first), len(parts), channels
    _start(_sum_parts, (len(first), blocks), arguments, tile)
    return out


def sum_users(values: Tensor, lookup: Lookup, dtype: torch.dtype) -> Tensor:
    """See ``layers.sum_users``; sums are in float32 or float64, the result in ``dtype``."""
    channels = values.shape[1]
    parts, first = _sum_in_chunks(values, len(values), channels, lookup)
    out, ((_, blocks), tile) = parts.new_empty(len(first), channels, dtype=dtype), _tiles(1, channels)
    arguments = parts, parts, parts, parts, first, out, len(first), len(parts), channels, 1, 1.0
    _start(_sum_chunks, (len(first), blocks), arguments, (1, False, False, 0, _wide(parts.dtype), *tile))
    return out


def _sum_in_chunks(
    values: Tensor, count: int, channels: int, lookup: Lookup | None, few: Tensor | None = None,
    y: Tensor | None = None, slope: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum rows (and their products with x) within chunks of the users of each row of a table.

    Returns:
        The sums [T, C or 2 C], in float32 or float64; each row's first chunk.
    """
    if lookup is None:
        users, total, terms = values, count, 0
        begin, first = torch.arange(0, count, TILE, device=values.device), values.new_zeros(1, dtype=torch.int64)
    else:
        users, (total, terms), (begin, first) = lookup.order, lookup.index.shape, lookup.chunks
    wide = torch.promote_types(values.dtype, torch.float32)
    parts = values.new_empty(len(begin), channels if few is None else 2 * channels, dtype=wide)
    (_, blocks), tile = _tiles(1, channels)
    some = values if few is None else few
    width, up = (values.shape[2] * values.shape[3], values.shape[1]) if few is not None else (1, 1)
    arguments = (
        values, values if y is None else y, some, users, begin, parts, len(begin), total * max(terms, 1), channels,
        width, float(slope),
    )  # fmt: skip
    constants = up, y is not None, few is not None, terms, _wide(wide), *tile
    _start(_sum_chunks, (len(begin), blocks), arguments, constants)
    return parts, first


def add_rows(table: Tensor, lookup: Lookup, start: Tensor) -> Tensor:
    """Compute ``start + sum_j table[index[i, j]]``: [P, C], of the table's dtype. ``start``: [C], or [P, C]."""
    return _add(table, lookup, start, table.dtype)


def hidden_rows(rows: Tensor, start: Tensor, around: LayoutNeighbourhoods, dtype: torch.dtype) -> Tensor:
    """Compute the first of two convolutions at every inner window, its ReLU, and the second's zero padding: [U, h].

    Args:
        rows: the weight [h, L (+ 1 for edges), k, k] in the order [k, k, L (+ 1), h].
        start: [h], or [U, h]; what is added: the bias.
        dtype: of the result.
    """
    return _add(rows, around.labels, start, dtype, around)


def _add(
    table: Tensor, lookup: Lookup, start: Tensor, dtype: torch.dtype, around: LayoutNeighbourhoods | None = None
) -> Tensor:
    (places, terms), channels = lookup.index.shape, table.shape[-1]
    out, (grid, tile) = table.new_empty(places, channels, dtype=dtype), _tiles(places, channels)
    edges = None if around is None else around.edges
    arguments = (
        table, lookup.index, start, table if edges is None else edges, table if around is None else around.outside, out,
        places, channels, channels if start.dim() == 2 else 0, lookup.num_rows // terms - 1,
    )  # fmt: skip
    _start(_add_rows, grid, arguments, (terms, around is not None, edges is not None, _wide(dtype), *tile))
    return out


def probe(device: torch.device) -> None:
    """Compile and start a kernel on one value, so that what is missing shows."""
    one = torch.ones(1, 1, 1, 1, 1, device=device)
    forward(one, one.view(1, 1), one.view(1, 1), None, one.view(1), one.view(1), 1, 1.0)
