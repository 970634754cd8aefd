"""Normalise and modulate pixels in one pass: enlarge, normalise, look up scale and shift, apply, activate.

SPADE by tables, CLADE and synchronized batch norm share this code. A pixel costs one row of a table and one
multiply-add per channel. Everything runs on rows [pixels, channels], the order of memory format channels_last. On a CPU
each pass takes the pixels chunk by chunk, so that intermediate results stay in cache. On a GPU a forward is one kernel
of ``kernels.py``, a backward one that sums and one for the gradient of x; each has its plain twin here.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.distributed import gather_statistics, sum_statistics, to_double
from imaginaire_spade.models.layers import enlarge, sum_rows, sum_users, triton_kernels
from imaginaire_spade.models.recomputation import again_of, forgotten, saved
from imaginaire_spade.neighbourhoods import Lookup

T = TypeVar("T")


@dataclass(frozen=True)
class Modulation:
    """Scale and shift of normalised pixels: x^ gamma[i] + beta[i], i the pixel's neighbourhood."""

    gamma: Tensor
    """float [V, C]; includes the "1 +" of SPADE."""
    beta: Tensor
    """float [V, C]."""
    pixels: Lookup | None
    """Each pixel's row; None: all pixels use the only row (V = 1)."""


@dataclass(frozen=True)
class Statistics:
    """How to normalise: x^ = (x - mean) rstd, per channel."""

    mean: Tensor
    """float32 (float64 for such x) [C]."""
    rstd: Tensor
    """1 / standard deviation, [C]."""
    count: Tensor | int | None = None
    """Number of values per channel behind x's own statistics (of all processes); None: mean and rstd are constants."""
    synchronized: bool = False
    """Whether the statistics include other processes' values."""


def modulate(
    x: Tensor, modulation: Modulation, statistics: Statistics, *, upsample: int = 1, slope: float = 1.0
) -> Tensor:
    """Enlarge (nearest), normalise, modulate and activate x [N, C, h, w] in one pass.

    If ``statistics`` have a ``count``, they depend on x, and gradients flow through them.

    Args:
        modulation: scale and shift of the enlarged pixels.
        statistics: mean and rstd of x.
        upsample: factor of height and width.
        slope: slope of the leaky ReLU that comes last, > 0; 1: none.
    Returns:
        [N, C, upsample h, upsample w] in memory format channels_last.
    """
    gamma, beta = modulation.gamma, modulation.beta
    if not x.is_cuda:  # a kernel reads any dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = gamma.to(wide), beta.to(wide)
    if torch.compiler.is_exporting():
        return _modulate_for_export(x, gamma, beta, modulation.pixels, statistics, upsample, slope)
    return _Modulate.apply(x, gamma, beta, modulation.pixels, statistics, upsample, slope)


def _modulate_for_export(
    x: Tensor, gamma: Tensor, beta: Tensor, pixels: Lookup | None, statistics: Statistics, upsample: int, slope: float
) -> Tensor:
    """Compute what ``_Modulate`` does, in operations that other runtimes support."""
    assert pixels is not None and statistics.count is None  # evaluation mode
    x = enlarge(x, upsample)
    scale = gamma * statistics.rstd
    rows = sum_rows(torch.cat([scale, beta - statistics.mean * scale], 1), pixels)
    scale, shift = rows.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2).chunk(2, 1)
    y = x * scale + shift
    return y if slope == 1 else F.leaky_relu(y, slope)


class _Modulate(torch.autograd.Function):
    """y = leaky((x - mean) rstd gamma[i] + beta[i]), computed as y = leaky(x scale[i] + shift[i]).

    Backward: let dy be the gradient before the activation, S and A the sums of dy and of dy x over each row's pixels.
    Then d beta = S and d gamma = rstd (A - mean S). dx is dy scale[i]. If mean and rstd are x's own, batch norm also
    subtracts from dx^ its mean p / n, and x^ times its mean product with x^, q / n. Both are sums over the table:
    p = sum_i gamma S, q = sum_i gamma d gamma.
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
        few, mean, rstd = _grid(x, 1), statistics.mean, statistics.rstd
        if len(mean) != x.shape[1]:
            mean, rstd = (t.expand(x.shape[1]).contiguous() for t in (mean, rstd))
        ctx.constants = _index(pixels, x, upsample), mean, rstd, upsample, slope, len(x)
        ctx.save_for_backward(few, gamma, beta)
        ctx.pixels, ctx.statistics, ctx.slope, ctx.made = pixels, statistics, slope, None
        return _modulated(few, gamma, beta, *ctx.constants)

    @staticmethod
    def make_again(ctx: Any) -> Tensor:
        """Return y, computed once more; keep it if the backward pass below needs it too."""
        if (y := ctx.made) is None:
            few, gamma, beta = saved(ctx)
            y = _modulated(few, gamma, beta, *ctx.constants)
            ctx.made = None if ctx.slope == 1 else y
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        few, gamma, _ = saved(ctx)
        activated = None if ctx.slope == 1 else _Modulate.make_again(ctx)
        ctx.made = ctx.unpacked = None
        pixels, statistics, channels = ctx.pixels, ctx.statistics, few.shape[4]
        index, mean, rstd, upsample, _, images = ctx.constants
        count, grid = statistics.count, _grid(dy, upsample)
        y = None if activated is None else _grid(activated, upsample)
        if not _in_chunks(few):
            d_table = (_pass(few, "gradients") or gradients_of_table)(grid, few, y, ctx.slope, pixels, mean, rstd)
            dx = None
            if ctx.needs_input_grad[0]:
                if count is None:
                    means = d_table.new_zeros(2, channels)
                else:
                    means = (d_table.unflatten(1, (2, channels)) * gamma.unsqueeze(1)).sum(0) / count
                means = sum_statistics(means) if statistics.synchronized else means
                run = _pass(few, "backward") or backward_pixels
                dx = _images(run(grid, few, y, gamma, index, mean, rstd, means, ctx.slope), images)
            d_beta, d_gamma = d_table.to(gamma.dtype).chunk(2, 1)
            return dx, d_gamma, d_beta, None, None, None, None
        before, products = _before_activation(grid, few, y, ctx.slope, gamma.dtype)
        d_beta = sum_users(before.view(-1, channels), pixels)
        d_gamma = rstd * (sum_users(products.view(-1, channels), pixels) - mean * d_beta)
        if not ctx.needs_input_grad[0]:
            return None, d_gamma, d_beta, None, None, None, None
        factor = offset = torch.zeros_like(rstd)
        if count is not None:
            means = torch.stack([(gamma * d_beta).sum(0), (gamma * d_gamma).sum(0)]) / count
            if statistics.synchronized:
                means = sum_statistics(means)
            factor = -rstd * rstd * means[1] * upsample**2
            offset = -rstd * means[0] * upsample**2 - mean * factor
        dx = _before_upsampling(before, products, few, gamma * rstd, index, factor, offset)
        return _images(dx, images).to(few.dtype), d_gamma, d_beta, None, None, None, None


def look_up_and_apply(
    x: Tensor, table: Tensor, pixels: Lookup | None, *, upsample: int = 1, slope: float = 1.0
) -> Tensor:
    """Enlarge (nearest) x [N, C, h, w], take leaky(x scale[i] + shift[i]) -> [N, C, upsample h, upsample w]: on a CPU,
    without gradients. ``table`` [V, 2 C] holds scale, then shift."""
    return _images(_forward(_grid(x, 1), table, _index(pixels, x, upsample), upsample, slope), len(x))


def convolve_modulated(conv: nn.Module, y: Tensor) -> Tensor:
    """Apply ``conv`` to y. If ``modulate`` made y, the backward pass does not keep it, but makes it again."""
    with forgotten(y, again_of(y)):
        convolved: Tensor = conv(y)
    return convolved


def _modulated(
    few: Tensor, gamma: Tensor, beta: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor, upsample: int,
    slope: float, images: int,
) -> Tensor:  # fmt: skip
    """Compute ``modulate`` of a grid: ``images`` images."""
    if _in_chunks(few):
        scale = gamma * rstd
        y = _forward(few, torch.cat([scale, beta - mean * scale], 1), index, upsample, slope)
    else:
        y = (_pass(few, "forward") or forward_pixels)(few, gamma, beta, index, mean, rstd, upsample, slope)
    return _images(y, images)


def _in_chunks(x: Tensor) -> bool:
    """Return whether to take pixels chunk by chunk, or all at once by a kernel."""
    return not x.is_cuda


def _pass(x: Tensor, name: str) -> Callable[..., Any] | None:
    """Return the kernel of a pass over pixels; None: its plain twin has to do."""
    kernels = triton_kernels(x.device)
    return None if kernels is None else getattr(kernels, name)


# The three passes over the pixels. A grid has shape [N h, upsample, w, upsample, C]: upsample^2 pixels for each of x's.


def _forward(few: Tensor, table: Tensor, index: Tensor | None, upsample: int, slope: float) -> Tensor:
    """Compute leaky(x scale[i] + shift[i]). ``table`` [V, 2 C] holds scale, then shift."""
    y = few.new_empty(len(few), upsample, few.shape[2], upsample, few.shape[4])
    for (scale, shift), part, x in _row_chunks(table, index, y, few.expand_as(y)):
        torch.addcmul(shift, x, scale, out=part)
        if slope != 1:
            F.leaky_relu_(part, slope)
    return y


def forward_pixels(
    few: Tensor, gamma: Tensor, beta: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor, up: int, slope: float
) -> Tensor:
    """Compute leaky((x - mean) rstd gamma[i] + beta[i]) of a grid: [N h, up, w, up, C], of x's dtype."""
    scale, shift = (t if index is None else t[index] for t in (gamma, beta))
    x = (few.to(mean.dtype).expand(-1, up, -1, up, -1) - mean) * rstd
    y = x * scale.to(mean.dtype) + shift.to(mean.dtype)
    return torch.where(y > 0, y, y * slope).to(few.dtype)


def _before_activation(
    dy: Tensor, few: Tensor, y: Tensor | None, slope: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradient before the activation, and its products with x. y has the sign of the activation's input, and
    may be overwritten."""
    fitting = dy if y is None else y
    before = fitting if fitting.dtype == dtype else torch.empty_like(dy, dtype=dtype)
    products = torch.empty_like(before)
    for part, given, x, product, active in _chunks(before, dy, few, products, fitting):
        if y is not None:
            given, active = given.to(dtype), active.to(dtype)
            torch.ops.aten.leaky_relu_backward.grad_input(given, active, slope, True, grad_input=part)
        elif before is not dy:
            part.copy_(given)
        torch.mul(part, x, out=product)
    return before, products


def gradients_of_table(
    dy: Tensor, few: Tensor, y: Tensor | None, slope: float, pixels: Lookup | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Compute d beta and d gamma from sums over each row's pixels: [V, 2 C], float32 or float64. y has the sign of the
    activation's input."""
    before = dy.to(torch.promote_types(dy.dtype, torch.float32))
    if y is not None:
        before = torch.where(y > 0, before, before * slope)
    rows = (before, before * few.to(before.dtype))
    d_beta, products = (sum_users(each.reshape(-1, each.shape[4]), pixels) for each in rows)
    return torch.cat([d_beta, rstd * (products - mean * d_beta)], 1)


def backward_pixels(
    dy: Tensor, few: Tensor, y: Tensor | None, gamma: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor,
    means: Tensor, slope: float,
) -> Tensor:  # fmt: skip
    """Compute dx [N h, 1, w, 1, C], of x's dtype. ``means`` [2, C]: of x^'s gradient, and of its product with x^."""
    before = dy.to(mean.dtype)
    if y is not None:
        before = torch.where(y > 0, before, before * slope)
    terms = before * (gamma if index is None else gamma[index]).to(mean.dtype)
    own = means[0] + (few.to(mean.dtype) - mean) * rstd * means[1]
    return ((terms.sum((1, 3), keepdim=True) - own * dy.shape[1] ** 2) * rstd).to(few.dtype)


def _before_upsampling(
    before: Tensor, buffer: Tensor, few: Tensor, scale: Tensor, index: Tensor | None, factor: Tensor, offset: Tensor
) -> Tensor:
    """Compute dx [N h, 1, w, 1, C]: the sum of before scale[i] over the pixels of each of x's; then x factor + offset.

    Overwrite ``buffer``, which has the shape of ``before``.
    """
    enlarged = before.shape != few.shape
    dx = torch.empty_like(few, dtype=before.dtype) if enlarged else buffer
    for (found,), dy, terms, total, x in _row_chunks(scale, index, before, buffer, dx, few):
        torch.mul(dy, found, out=terms)
        if enlarged:  # on a CPU torch.sum over these two dimensions takes five times as long
            first, second, *others = (part for line in terms.unbind(1) for part in line.unbind(2))
            torch.add(first, second, out=total[:, 0, :, 0])
            for part in others:
                total[:, 0, :, 0] += part
        total.addcmul_(x, factor).add_(offset)
    return dx


@torch.no_grad()
def batch_statistics(
    x: Tensor, running: tuple[Tensor, Tensor], momentum: float, eps: float, synchronized: bool, times: int
) -> Statistics:
    """Take the statistics of x [N, C, H, W] per channel, and move running mean and (unbiased) variance [C] to them.

    Args:
        momentum: share of x's statistics in the new running ones.
        synchronized: whether to include the values of all processes.
        times: how often each value counts: as often as in x's enlargement, which has the same mean and variance.
    """
    if x.is_cuda:
        means, rstds, counts = _once(_moments_on_gpu, x, synchronized, times, eps)
        gather = torch.batch_norm_gather_stats_with_counts
        mean, rstd = gather(x, means, rstds, *running, momentum, eps, counts.flatten())
        return Statistics(mean, rstd, counts.sum() if synchronized else times * x.numel() // x.shape[1], synchronized)
    mean, variance, count = _moments(x, synchronized, times)
    running[0].lerp_(mean, momentum)
    running[1].lerp_(variance * (count / (count - 1)), momentum)
    return Statistics(mean, torch.rsqrt(variance + eps), count, synchronized)


def _once(function: Callable[..., T], x: Tensor, *options: Any) -> T:
    """Call ``function(x, *options)``, or return what the call before gave if it was the same: the norms of a block's
    two branches ask for the statistics of one x, and they are exchanged once."""
    if torch.compiler.is_compiling() or x.is_inference():
        return function(x, *options)
    key = function, x._version, options
    if _newest.x() is not x or _newest.key != key:
        _newest.result = function(x, *options)
        _newest.x, _newest.key = ref(x), key
    return _newest.result


class _Newest(threading.local):
    x: Callable[[], Tensor | None] = staticmethod(lambda: None)
    key: Any = None
    result: Any = None


_newest = _Newest()
"""The last call of ``_once`` in this thread."""


def _moments_on_gpu(x: Tensor, synchronized: bool, times: int, eps: float) -> tuple[Tensor, ...]:
    """Compute mean, 1 / sqrt(variance + eps) and count of each process's x: [processes, C] twice, [processes, 1]."""
    mean, rstd = torch.batch_norm_stats(x, eps)
    count = mean.new_full((1,), times * x.numel() // x.shape[1])
    if not synchronized:
        return mean.unsqueeze(0), rstd.unsqueeze(0), count.unsqueeze(0)
    return gather_statistics(torch.cat([mean, rstd, count])).split([x.shape[1], x.shape[1], 1], 1)


def _moments(x: Tensor, synchronized: bool, times: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and biased variance of x per channel, and the count of values, with one exchange.

    Take means and squares about them chunk by chunk, in one pass over x, and combine them in double precision.
    """
    rows = _grid(x, 1).view(-1, x.shape[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    counts, means, squares = [], [], []
    for (values,) in _chunks(rows):
        part = values.to(wide)
        counts.append(times * len(part))
        means.append(part.mean(0))
        squares.append((part - means[-1]).square_().sum(0))
    size = torch.tensor(counts, dtype=torch.float64).unsqueeze(1)  # [chunks, 1]
    moments = _combine(size, to_double(torch.stack(means)), times * to_double(torch.stack(squares)))
    if synchronized:
        moments = _combine(*gather_statistics(torch.cat(moments)).split([1, x.shape[1], x.shape[1]], 1))
    count, mean, squared = moments
    mean, variance, count = (value.to(wide).to(x.device) for value in (mean, squared / count, count.squeeze()))
    return mean, variance, count


def _combine(sizes: Tensor, means: Tensor, about_means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine parts of a sample (Chan et al. 1979): sizes [parts, 1], means and sums of squares about them [parts, C],
    in double precision -> the same of the whole: [1], [C], [C]."""
    size = sizes.sum(0)
    mean = (means * sizes).sum(0) / size
    return size, mean, (about_means + sizes * (means - mean).square()).sum(0)


def _grid(x: Tensor, upsample: int) -> Tensor:
    """Reshape [N, C, upsample h, upsample w] -> [N h, upsample, w, upsample, C]: no copy if x is channels_last."""
    n, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).contiguous()
    return rows.view(n * height // upsample, upsample, width // upsample, upsample, channels)


def _images(grid: Tensor, count: int) -> Tensor:
    """Inverse of ``_grid``: ``count`` images [N, C, H, W] in memory format channels_last."""
    width, channels = grid.shape[2] * grid.shape[3], grid.shape[4]
    return grid.reshape(count, -1, width, channels).permute(0, 3, 1, 2)


def _index(pixels: Lookup | None, x: Tensor, upsample: int) -> Tensor | None:
    """Return each pixel's row of the table in the shape of a grid, [N h, upsample, w, upsample]."""
    if pixels is None:
        return None
    n, _, height, width = x.shape
    return pixels.index.view(n * height, upsample, width, upsample)


def _chunks(*grids: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split grids of one length into so many rows that the first one's fit the processor's cache."""
    size = max(1, 2**17 * torch.get_num_threads() // grids[0].shape[1:].numel())
    return zip(*(grid.split(size) for grid in grids), strict=True)


def _row_chunks(table: Tensor, index: Tensor | None, *grids: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield ``_chunks`` of grids, before them their rows of the table: in the first one's shape, by as many columns.

    All share one buffer: fresh memory costs more than the sums. It is divided once: a division costs time too.
    """
    shape = grids[0].shape
    if index is None:
        yield from ((table.split(shape[4], 1), *parts) for parts in _chunks(*grids))
        return
    buffer, columns = table.new_empty(0), ()
    for *parts, rows in _chunks(*grids, index):
        wanted = rows.flatten()
        if len(buffer) != len(wanted):
            buffer = buffer[: len(wanted)] if len(buffer) else table.new_empty(len(wanted), table.shape[1])
            columns = buffer.view(-1, *shape[1:4], table.shape[1]).split(shape[4], 4)
        torch.index_select(table, 0, wanted, out=buffer)
        yield columns, *parts
