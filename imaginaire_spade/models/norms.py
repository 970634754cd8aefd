"""Normalisation layers, conditional on a layout or not. A conditional one is called as ``norm(x, layout)``."""

import warnings
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import FEWEST_PIXELS_ON_GPU, LayoutSpec, SemanticLayout
from imaginaire_spade.models.layers import (
    InstanceNorm2d,
    both_convolutions,
    convolve_layout,
    enlarge,
    first_convolution,
    second_convolution,
    sum_rows,
    table_kernels,
)
from imaginaire_spade.models.modulation import Modulation, Statistics, batch_statistics, look_up_and_apply, modulate
from imaginaire_spade.models.products import BY_RULE, Choices
from imaginaire_spade.models.recomputation import derive
from imaginaire_spade.models.spectral_norm import SpectralLinear, computing_dtype, conv2d, effective_weight
from imaginaire_spade.models.timing import Ask, gain
from imaginaire_spade.neighbourhoods import Lookup
from imaginaire_spade.registry import NORMS, Depth, Width


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with training statistics over all processes if wanted, on any device and backend.

    Statistics are float32, and gradients flow through them: K processes with batch B/K equal one process with batch B.
    (``torch.nn.SyncBatchNorm`` refuses CPU tensors.) State dicts are those of ``torch.nn.BatchNorm2d``.
    """

    synchronized = False
    """``synchronize_batch_norm`` sets it once there is a process group."""

    def forward(
        self, x: Tensor, modulation: Modulation | None = None, *, upsample: int = 1, slope: float = 1.0
    ) -> Tensor:
        """Enlarge and normalise x [N, C, H, W]; given a modulation, also modulate and activate x in the same pass."""
        if modulation is None:
            if not (self.training and self.synchronized):
                return super().forward(enlarge(x, upsample))
            modulation = Modulation(x.new_ones(1, x.shape[1]), x.new_zeros(1, x.shape[1]), None)
        if self.affine:  # Fold scale and shift into the modulation: (x^ w + b) gamma + beta.
            gamma, beta, pixels = modulation.gamma, modulation.beta, modulation.pixels
            modulation = Modulation(self.weight * gamma, self.bias * gamma + beta, pixels)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if not self.training:
            statistics = Statistics(self.running_mean, torch.rsqrt(self.running_var + self.eps))
            return modulate(x, modulation, statistics, upsample=upsample, slope=slope)
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        running = self.running_mean, self.running_var
        statistics = batch_statistics(x, running, momentum, self.eps, self.synchronized, upsample**2)
        return modulate(x, modulation, statistics, upsample=upsample, slope=slope)


def synchronize_batch_norm(network: nn.Module) -> None:
    """Let every batch norm of ``network`` take its statistics over all processes, and every SPADE norm take one path on
    all of them."""
    for module in network.modules():
        if isinstance(module, BatchNorm2d | SPADE):
            module.synchronized = True


def _normalisation(kind: str, channels: int, affine: bool = False) -> BatchNorm2d | InstanceNorm2d:
    """Build the ``batch`` or ``instance`` norm that a conditional norm modulates."""
    return (BatchNorm2d if kind == "batch" else InstanceNorm2d)(channels, affine=affine)


def _normalise_and_modulate(norm: nn.Module, x: Tensor, modulation: Modulation, upsample: int, slope: float) -> Tensor:
    """Normalise and modulate x: a batch norm in one pass, an instance norm in two."""
    if isinstance(norm, BatchNorm2d):
        return norm(x, modulation, upsample=upsample, slope=slope)
    statistics = Statistics(x.new_zeros(1), x.new_ones(1))
    return modulate(norm(x), modulation, statistics, upsample=upsample, slope=slope)


def _normalise(norm: nn.Module, x: Tensor, upsample: int) -> Tensor:
    """Enlarge and normalise x; on a GPU batch statistics are those of x itself, which several norms share."""
    in_one = x.is_cuda and isinstance(norm, BatchNorm2d)
    return norm(x, upsample=upsample) if in_one else norm(enlarge(x, upsample))


def activate(x: Tensor, slope: float) -> Tensor:
    """Apply a leaky ReLU in place, or nothing if ``slope`` is 1."""
    return x if slope == 1 else F.leaky_relu(x, slope, inplace=True)


LOOKED_UP = 32
"""Label channels from which looking them up is faster than convolving them (measured on a CPU)."""


class ConditionalNorm(nn.Module):
    """Interface of every norm: ``norm(x, layout, upsample=1, slope=1.0)``, and the number of channels that it returns.

    A norm first enlarges x by ``upsample`` (nearest) and last applies a leaky ReLU of ``slope``: all three in one pass
    over the pixels are faster than three layers. It returns a new tensor.
    """

    out_channels: int
    needs_distances: ClassVar[bool] = False
    """Whether the norm needs layouts with distances; the pipeline then computes them."""
    needs_classes: ClassVar[bool] = False
    """Whether the norm looks up one class per pixel: it then takes neither data without labels nor soft label maps."""


def _view(layout: SemanticLayout, x: Tensor, upsample: int) -> SemanticLayout:
    """Return the layout at the resolution of the enlarged x."""
    return layout.resized(upsample * x.shape[2], upsample * x.shape[3])


def table_kernel_sizes(network: nn.Module) -> tuple[int, ...]:
    """List the kernel sizes of the SPADE norms of ``network`` that take tables on a GPU."""
    norms = (module for module in network.modules() if isinstance(module, SPADE) and module.path == "table")
    return tuple(sorted({norm.kernel_size for norm in norms}))


def takes_noise(network: nn.Module) -> bool:
    """Return whether the SPADE norms of ``network`` see noise beside the labels."""
    return any(isinstance(module, SPADE) and module.num_noise_channels > 0 for module in network.modules())


def describe_path(network: nn.Module, device: torch.device) -> str | None:
    """Say how the SPADE norms of ``network`` convolve label maps on ``device``; None if it has none."""
    norm = next((module for module in network.modules() if isinstance(module, SPADE)), None)
    on_gpu = device.type == "cuda"
    if norm is None or norm.path == "dense":
        return None if norm is None else "dense"
    if norm.path == "table":
        return "tables" + f" from {FEWEST_PIXELS_ON_GPU} pixels up, dense below" * on_gpu
    measured = f" (a dense pixel costs {norm.pixel_cost:g} of their rows)" * (norm.pixel_cost != SPADE.pixel_cost)
    return "auto, dense on a GPU" if on_gpu else "auto, tables where label maps repeat enough" + measured


def pixel_cost(network: nn.Module) -> float | None:
    """Return the ``pixel_cost`` by which the SPADE norms of ``network`` choose a path; None: none chooses."""
    norms = (module for module in network.modules() if isinstance(module, SPADE) and module.path == "auto")
    return next((norm.pixel_cost for norm in norms), None)


@NORMS.register("spade")
class SPADE(ConditionalNorm):
    """Spatially-adaptive denormalisation (Park et al. 2019, eq. 1): normalize(x) * (1 + gamma) + beta.

    gamma and beta are convolutions of the label map at x's resolution.

    Args:
        channels: of x.
        spec: channels of the layouts.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
        hidden_channels: width between the two convolutions.
        kernel_size: of both convolutions, odd.
        path: ``dense`` convolves the one-hot map; ``table`` computes gamma and beta once per distinct neighbourhood of
            labels, which gives the same numbers; ``auto`` chooses the faster one, in training the same on all
            processes. On a GPU ``auto`` is ``dense``, and ``table``, which needs half the memory, is dense below 64x64
            pixels, where neighbourhoods seldom repeat.
        affine: whether the norm has a learned scale and shift per channel (as in imaginaire; the paper has none).
        spectral_norm: spectral norm on the convolutions (as in imaginaire; the paper has none).
    """

    def __init__(
        self,
        channels: int,
        spec: LayoutSpec,
        *,
        normalization: Literal["batch", "instance"] = "batch",
        hidden_channels: Width = 128,
        kernel_size: Depth = 3,
        path: Literal["auto", "dense", "table"] = "auto",
        affine: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ConfigError(f"norm.kernel_size: {kernel_size} must be odd, such as 3 or 5")
        self.out_channels = channels
        self.path = path
        self.kernel_size = kernel_size
        self.num_noise_channels = spec.num_noise_channels
        self.normalize = _normalisation(normalization, channels, affine)
        conv = partial(conv2d, kernel_size=kernel_size, padding=kernel_size // 2, spectral=spectral_norm)
        self.shared = conv(spec.num_channels, hidden_channels)
        self.gamma = conv(hidden_channels, channels)
        self.beta = conv(hidden_channels, channels)
        self.register_buffer("laid_out", None, persistent=False)
        self.register_buffer("folded", None, persistent=False)

    laid_out: Tensor | None
    folded: Tensor | None
    """Bias of the tables that hold scale and shift."""
    synchronized = False
    """``synchronize_batch_norm`` sets it."""
    choices = BY_RULE
    """What multiplies matrices on a CPU: ``set_choices``."""
    pixel_cost = 1.0
    """Of the dense path, in rows of a table: ``measure_pixel_cost``."""

    def forward(self, x: Tensor, layout: SemanticLayout, *, upsample: int = 1, slope: float = 1.0) -> Tensor:
        """Modulate x [N, channels, h, w] by a layout of any resolution -> [N, channels, upsample h, upsample w]."""
        view = _view(layout, x, upsample)
        if self._takes_tables(view):
            table, pixels = self._table(view)
            if self.folded is not None:
                return look_up_and_apply(x, table, pixels, upsample=upsample, slope=slope)
            gamma, beta = table.chunk(2, 1)  # [V, channels] each
            return _normalise_and_modulate(self.normalize, x, Modulation(gamma, beta, pixels), upsample, slope)
        hidden = F.relu(self._hidden(view))
        y = _normalise(self.normalize, x, upsample) * (1 + self.gamma(hidden)) + self.beta(hidden)
        return activate(y, slope)

    def _hidden(self, view: SemanticLayout) -> Tensor:
        """Convolve the layout: [N, hidden, H, W]. Beside conditions, labels are looked up where that is faster."""
        looks_up = view.conditions is not None and self.path != "dense" and view.spec.num_label_channels >= LOOKED_UP
        if not looks_up or torch.compiler.is_compiling():
            hidden: Tensor = self.shared(view.one_hot(computing_dtype(self.shared.weight)))
            return hidden
        weight = effective_weight(self.shared)
        return convolve_layout(view, weight, self.shared.bias, padding=self.kernel_size // 2)

    def _takes_tables(self, view: SemanticLayout) -> bool:
        """Return whether tables are possible and, for ``auto``, faster: few distinct neighbourhoods for so many pixels.

        On a GPU the answer depends on the config and the resolution alone: counts would have to be waited for. On a CPU
        it depends on the label maps.

        The unit of cost is one row of the second convolution's matrix product, the main work of both paths. Measured on
        a CPU: reordering the weights costs as much as 200 rows, summing the pieces of one outer window as much as
        32 / hidden rows, a dense pixel ``pixel_cost``. In training all processes decide alike, by the mean of their
        counts: the two paths exchange statistics and finish gradients at different points of the backward pass.
        """
        if self.path == "dense" or torch.compiler.is_compiling():
            return False  # a network that is compiled or exported as a whole cannot inspect its data
        if not view.is_discrete:
            if isinstance(view.noise, Tensor):
                text = "noise per pixel: SPADE norms are dense (tables take noise by image, class or region)"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return False
        if view.labels.is_cuda:
            return self.path == "table" and view.height * view.width >= FEWEST_PIXELS_ON_GPU
        if self.path == "table" or self._dense_rows(view) <= 200:
            return self.path == "table"
        return self._table_rows(view) < self._dense_rows(view)

    def _dense_rows(self, view: SemanticLayout) -> float:
        out, channels = len(self.gamma.weight), self.shared.weight.shape[1]
        return self.pixel_cost * view.labels.numel() * (1 + channels / (2 * out))

    def _table_rows(self, view: SemanticLayout) -> float:
        inner, outer = view.count_neighbourhoods(self.kernel_size, over_processes=self.training and self.synchronized)
        return inner + 32 / len(self.shared.weight) * outer + 200

    def _table(self, view: SemanticLayout) -> tuple[Tensor, Lookup]:
        """Compute gamma and beta, or scale and shift if they are folded, of each neighbourhood: [V, 2 channels]."""
        around = view.neighbourhoods(self.kernel_size)
        vectors = None if view.noise is None else view.noise_vectors
        shared, (gamma_bias, beta_bias) = effective_weight(self.shared), self._biases()
        assert self.shared.bias is not None
        if table_kernels(shared) is not None:
            gamma, beta = effective_weight(self.gamma), effective_weight(self.beta)
            given = self.laid_out, around, vectors
            table = both_convolutions(shared, self.shared.bias, gamma, beta, gamma_bias, beta_bias, *given)
        else:
            hidden = F.relu(first_convolution(shared, self.shared.bias, around, vectors))  # [U, hidden]
            places = self._table_weights() if self.laid_out is None else self.laid_out
            bias = torch.cat([1 + gamma_bias, beta_bias]) if self.folded is None else self.folded
            table = second_convolution(hidden, places, bias, around, self.choices)
        return table, around.pixels

    def _table_weights(self) -> Tensor:
        """Lay the weights of gamma and beta side by side for ``second_convolution``: [k k, 2 channels, hidden]."""
        return torch.cat([effective_weight(conv).flatten(2).permute(2, 0, 1) for conv in (self.gamma, self.beta)], 1)

    def _biases(self) -> tuple[Tensor, Tensor]:
        assert self.gamma.bias is not None and self.beta.bias is not None
        return self.gamma.bias, self.beta.bias

    @torch.no_grad()
    def lay_out_tables(self, dtype: torch.dtype | None, choices: Choices, *, fold: bool) -> None:
        """Store the weights in the order (and dtype) of tables, instead of making them so in every forward; multiply
        them by ``choices``. For inference only.

        Args:
            fold: whether the tables are to hold scale and shift of x itself, by a batch norm's running statistics: for
                CPUs.
        """
        self.choices = choices
        if self.path == "dense":
            return
        norm, places = self.normalize, self._table_weights()
        if fold and isinstance(norm, BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            factor = torch.rsqrt(norm.running_var.double() + norm.eps)
            offset = -norm.running_mean * factor
            if norm.affine:
                factor, offset = factor * norm.weight, offset * norm.weight + norm.bias
            gamma_bias, beta_bias = self._biases()
            self.folded = torch.cat([1 + gamma_bias, beta_bias])
            for pair in (places.mT, self.folded):  # (x factor + offset) gamma + beta
                gamma, beta = pair.chunk(2, -1)
                beta.copy_(beta + gamma * offset)
                gamma.copy_(gamma * factor)
        self.laid_out = places.to(dtype=dtype)


def measure_pixel_cost(network: nn.Module, ask: Ask) -> float | None:
    """Return the ``pixel_cost`` of this CPU for the SPADE norms of ``network``, as ``ask`` tells."""
    norm = next(module for module in network.modules() if isinstance(module, SPADE))
    question = "dense pixel of SPADE in training, in rows of a table"
    return ask(f"{question}{' by oneDNN' * norm.choices.onednn}", partial(_rows_per_pixel, norm.choices))


def _rows_per_pixel(choices: Choices) -> float:
    """Measure how many rows of a table one dense pixel costs, forward and backward, where all of 96x96 neighbourhoods
    are distinct. By the constants of SPADE's rule alone it is 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layout = SemanticLayout(LayoutSpec(8), torch.randint(8, (1, 96, 96), dtype=torch.uint8))
        norm, x = SPADE(128, layout.spec), torch.randn(1, 128, 96, 96).to(memory_format=torch.channels_last)
    norm.choices = choices

    def run(path: Literal["dense", "table"]) -> None:
        norm.path = path
        norm(x.requires_grad_(), layout).sum().backward()

    rows = norm._table_rows(layout) / norm._dense_rows(layout)
    return rows * gain(partial(run, "table"), partial(run, "dense"))


def choose_paths(network: nn.Module, cost: object) -> None:
    """Let the SPADE norms of ``network`` choose by this ``pixel_cost``; by the constant if it is no positive float."""
    for module in network.modules():
        if isinstance(module, SPADE):
            module.pixel_cost = cost if isinstance(cost, float) and cost > 0 else SPADE.pixel_cost


@NORMS.register("concat")
class Concat(ConditionalNorm):
    """Normalise x and append the one-hot layout for the next convolution to see; no modulation.

    In the generator ``spade`` this is the "decoder w/ Concat" of Park et al. 2019 (table 3, "Effectiveness of SPADE").

    Args:
        channels: of x.
        spec: channels of the layouts.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
    """

    def __init__(
        self, channels: int, spec: LayoutSpec, *, normalization: Literal["batch", "instance"] = "batch"
    ) -> None:
        super().__init__()
        self.out_channels = channels + spec.num_channels
        self.normalize = _normalisation(normalization, channels)

    def forward(self, x: Tensor, layout: SemanticLayout, *, upsample: int = 1, slope: float = 1.0) -> Tensor:
        """Normalise x [N, channels, h, w], append a layout of any resolution -> [N, channels + num_channels, H, W]."""
        y = F.leaky_relu(_normalise(self.normalize, x, upsample), slope)  # not in place: it may be a view
        return torch.cat([y, _view(layout, x, upsample).one_hot(y.dtype)], 1)  # (its 0 and 1 need no leaky ReLU)


@NORMS.register("clade")
class CLADE(ConditionalNorm):
    """Class-adaptive normalisation (Tan et al. 2021, eq. 5): normalize(x) * weight[c] + bias[c], c the pixel's class.

    Unlike SPADE, there is no "1 +" on the scale. If the layouts have edges or conditions, a 1x1 convolution of them
    gives as many more channels. In layouts without a don't-care channel, a pixel without a class counts as class 0.

    Args:
        channels: of x.
        spec: channels of the layouts.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
    """

    needs_classes = True

    def __init__(
        self, channels: int, spec: LayoutSpec, *, normalization: Literal["batch", "instance"] = "batch"
    ) -> None:
        super().__init__()
        if not spec.num_label_channels:
            raise ConfigError("gen.norm: clade looks up classes, and data.labels is null: write gen.norm.type: spade")
        dense = spec.num_dense_channels
        self.out_channels = channels + dense
        self.normalize = _normalisation(normalization, channels)
        self.weight = nn.Parameter(torch.rand(spec.num_label_channels, channels))
        self.bias = nn.Parameter(torch.zeros(spec.num_label_channels, channels))
        self.edge = nn.Conv2d(dense, dense, 1) if dense else None

    def forward(self, x: Tensor, layout: SemanticLayout, *, upsample: int = 1, slope: float = 1.0) -> Tensor:
        """Modulate x [N, channels, h, w] by a layout of any resolution -> [N, out_channels, H, W]."""
        view = _view(layout, x, upsample)
        y = self._modulate(x, view, upsample, slope)
        if self.edge is None:
            return y
        edges = activate(self.edge(view.dense_channels(self.edge.weight.dtype)), slope)  # [N, dense channels, H, W]
        return derive(_append, y, edges.to(y.dtype))

    def _modulate(self, x: Tensor, view: SemanticLayout, upsample: int, slope: float) -> Tensor:
        """Return x enlarged, normalised, modulated and activated: [N, channels, H, W]."""
        modulation = Modulation(self.weight, self.bias, view.classes)
        return _normalise_and_modulate(self.normalize, x, modulation, upsample, slope)


def _append(y: Tensor, channels: Tensor) -> Tensor:
    # y is channels_last; on a CPU torch.cat takes eight times as long along its channels as along a last dimension.
    return torch.cat([y.permute(0, 2, 3, 1), channels.permute(0, 2, 3, 1)], 3).permute(0, 3, 1, 2)


@NORMS.register("clade_icpe")
class CLADEICPE(CLADE):
    """CLADE with intra-class positional encoding (Tan et al. 2021, section 3.3).

    normalize(x) * weight[c] * (1 + a(d)) + bias[c] * (1 + b(d)): d is the pixel's offset from the centre of its
    connected region (``data/distances.py``), a and b are 1x1 convolutions to one channel. Both start at zero, as CLADE.

    Args:
        channels: of x.
        spec: channels of the layouts.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
        skip_ids: train ids whose pixels have no position (d = 0). None is right for training. CLADE's own checkpoints
            saw no position where the file's label is 0, which is their channel 0 in every data set, ADE20K included:
            ``[0]``.
    """

    needs_distances = True

    def __init__(
        self,
        channels: int,
        spec: LayoutSpec,
        *,
        normalization: Literal["batch", "instance"] = "batch",
        skip_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__(channels, spec, normalization=normalization)
        if wrong := [i for i in skip_ids if not 0 <= i <= spec.num_classes]:
            raise ConfigError(
                f"norm.skip_ids: {wrong} are no train ids: write ids of 0..{spec.num_classes} (the last is don't care)"
            )
        self.skip_ids = tuple(skip_ids)
        self.scale_position = _Position()
        self.shift_position = _Position()

    def _modulate(self, x: Tensor, view: SemanticLayout, upsample: int, slope: float) -> Tensor:
        assert view.distances is not None, "clade_icpe needs layouts with distances"
        distances = view.distances.to(self.weight.dtype)
        labels = view.labels.int().unsqueeze(1)
        for skipped in self.skip_ids:  # a tensor of them would have to be sent to a GPU each time
            distances = distances.masked_fill(labels == skipped, 0)
        modulation = Modulation(self.weight, torch.zeros_like(self.bias), view.classes)
        y = _normalise_and_modulate(self.normalize, x, modulation, upsample, 1.0)
        positions = (position(distances).to(y.dtype) for position in (self.scale_position, self.shift_position))

        def place(y: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            shift = sum_rows(bias, view.classes).view(len(y), *y.shape[2:], -1).permute(0, 3, 1, 2).to(y.dtype)
            return activate(torch.addcmul(y * scale, shift, weight), slope)

        return derive(place, y, *positions, self.bias)


class _Position(nn.Module):
    """1 + a 1x1 convolution of the distances. (No nn.Conv2d, whose weights ``initialise`` draws: these start at 0.)"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 2, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, distances: Tensor) -> Tensor:
        """Map distances [N, 2, H, W] -> [N, 1, H, W]."""
        return 1 + F.conv2d(distances, self.weight, self.bias)


class AdaptiveBatchNorm(nn.Module):
    """Affine batch norm modulated by a style: normalize(x) * (1 + gamma) + beta (Huang and Belongie 2017).

    gamma and beta are spectrally normalised linear functions of the style, one value per channel.
    """

    def __init__(self, channels: int, style_channels: int) -> None:
        super().__init__()
        self.normalize = BatchNorm2d(channels)
        self.gamma = SpectralLinear(style_channels, channels)
        self.beta = SpectralLinear(style_channels, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Modulate x [N, channels, H, W] by a style [N, style_channels]; the shape stays."""
        gamma, beta = self.gamma(style)[:, :, None, None], self.beta(style)[:, :, None, None]
        return self.normalize(x) * (1 + gamma) + beta
