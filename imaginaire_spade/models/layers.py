"""Layers that several networks share: spectrally normalised ones, the initialisation of weights, and convolutions of
label maps by tables: compute once per distinct neighbourhood, then look up one row per pixel.

With h hidden channels, C channels of x and L label channels, the dense path costs k k h (L + 2 C) multiply-adds per
pixel. With tables the first convolution sums k k weight rows per distinct inner window. The second is one matrix
product, k k h 2 C per distinct inner window; its pieces are then summed per distinct outer window. A pixel then costs
one row of the table and one multiply-add per channel. These are the same sums in another order, padding included.

Tables run on rows [pixels, channels], which is what memory format channels_last is.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.recomputation import again_of, forgotten, saved
from imaginaire_spade.neighbourhoods import LayoutNeighbourhoods, Lookup


class SpectralNorm(nn.Module):
    """Mixin that divides a layer's weight by its largest singular value (Miyato et al. 2018, algorithm 1).

    The weight counts as a matrix W [out, rest]. A forward in training mode does one power iteration, v first, then u;
    one in evaluation mode none. For the gradient u and v are constants, W inside sigma = u . W v is not. Everything is
    in float32, under autocast too.
    """

    weight: Tensor
    weight_u: Tensor
    weight_v: Tensor
    plain: type[nn.Module]
    """The same layer without spectral norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, size in zip(("weight_u", "weight_v"), self._matrix().shape, strict=True):
            self.register_buffer(name, F.normalize(torch.randn(size), dim=0, eps=1e-12))
        # A random v may be nearly orthogonal to W^T u, and evaluation mode would divide by nearly nothing. (Training
        # starts with this too, so it changes nothing there.)
        F.normalize(self._matrix().detach().T @ self.weight_u, dim=0, eps=1e-12, out=self.weight_v)

    def normalised_weight(self) -> Tensor:
        """Return W / sigma, of the weight's shape; in training mode after one power iteration."""
        with torch.autocast(self.weight.device.type, enabled=False):
            sigma = self.iterate() if self.training else self.sigma()
            return _Normalised.apply(self.weight, sigma, self.weight_u, self.weight_v, self._columns_first())

    def effective_weight(self) -> Tensor:
        """Return W / sigma, without gradient and without an iteration, as evaluation mode uses it."""
        return self.weight.detach() / self.sigma()

    @torch.no_grad()
    def sigma(self) -> Tensor:
        """Return u . W v, the estimate of the largest singular value: a scalar."""
        return torch.dot(self.weight_u, self._matrix() @ self.weight_v)

    @torch.no_grad()
    def iterate(self) -> Tensor:
        """Do one power iteration, in place, and return sigma after it."""
        matrix = self._matrix()
        F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12, out=self.weight_v)
        product = matrix @ self.weight_v
        F.normalize(product, dim=0, eps=1e-12, out=self.weight_u)
        return torch.dot(self.weight_u, product)

    def iterated_sigmas(self, count: int) -> Tensor:
        """Do ``count`` power iterations, in place, and return sigma after each: [count], with the gradient of W."""
        u, v = [], []
        with torch.autocast(self.weight.device.type, enabled=False):
            for _ in range(count):
                self.iterate()
                u.append(self.weight_u.clone())
                v.append(self.weight_v.clone())
            return (torch.stack(u) * (torch.stack(v) @ self._matrix().T)).sum(1)

    def _matrix(self) -> Tensor:
        return (self.weight.transpose(0, 1) if self._columns_first() else self.weight).flatten(1)

    def _columns_first(self) -> bool:
        """Whether the weight is stored [rest, out, ...]."""
        return False


class _Normalised(torch.autograd.Function):
    """W / sigma. If g is its gradient, W's is (g - (g . W / sigma) u v^T) / sigma: here two passes over W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor, columns_first: bool) -> Tensor:
        if ctx.needs_input_grad[0]:  # copies: another forward before the backward pass changes u and v
            ctx.save_for_backward(weight, sigma, u.clone(), v.clone())
        ctx.columns_first = columns_first
        return weight / sigma

    @staticmethod
    def make_again(ctx: Any) -> Tensor:
        weight, sigma, *_ = saved(ctx)
        return weight / sigma

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, sigma, u, v = saved(ctx)
        ctx.unpacked = None
        along = torch.dot(g.flatten(), weight.flatten()) / (sigma * sigma)
        gradient = g / sigma
        if ctx.columns_first:
            gradient = gradient.transpose(0, 1)
        rows = gradient.reshape(len(u), -1).addr_(u * -along, v)
        gradient = rows.view(gradient.shape)
        return gradient.transpose(0, 1) if ctx.columns_first else gradient, None, None, None, None


class SpectralConv2d(SpectralNorm, nn.Conv2d):
    """Spectrally normalised convolution."""

    plain = nn.Conv2d

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        return convolve_with(self, x, lambda x, weight: self._conv_forward(x, weight, self.bias), groups=groups)


class SpectralConvTranspose2d(SpectralNorm, nn.ConvTranspose2d):
    """Spectrally normalised transposed convolution; its weight is stored [in, out, h, w]."""

    plain = nn.ConvTranspose2d

    def _columns_first(self) -> bool:
        return True

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        options = (self.stride, self.padding, self.output_padding)
        return F.conv_transpose2d(x, self.normalised_weight(), self.bias, *options)  # type: ignore[arg-type]


class SpectralLinear(SpectralNorm, nn.Linear):
    """Spectrally normalised linear layer."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight(), self.bias)


N = TypeVar("N", bound=nn.Module)


@torch.no_grad()
def fold_spectral_norm(network: N) -> N:
    """Turn, in place, every spectrally normalised layer into a plain one that holds W / sigma.

    Outputs in evaluation mode do not change. Training would continue without spectral norm.
    """
    for layer in network.modules():
        if isinstance(layer, SpectralNorm):
            layer.weight = nn.Parameter(layer.effective_weight(), layer.weight.requires_grad)
            del layer.weight_u, layer.weight_v
            layer.__class__ = layer.plain  # type: ignore[assignment]
    return network


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


def computing_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that a convolution with ``weight`` computes in: that of autocast, where it is enabled."""
    kind = weight.device.type
    is_cast = torch.is_autocast_enabled(kind) and weight.dtype == torch.float32
    return torch.get_autocast_dtype(kind) if is_cast else weight.dtype


def conv2d(*args: Any, spectral: bool, **kwargs: Any) -> nn.Conv2d:
    """Build an nn.Conv2d, spectrally normalised or not."""
    return SpectralConv2d(*args, **kwargs) if spectral else nn.Conv2d(*args, **kwargs)


def effective_weight(layer: nn.Conv2d) -> Tensor:
    """Return the weight that a convolution applies, for callers that convolve in another way: once per forward."""
    return layer.normalised_weight() if isinstance(layer, SpectralConv2d) else layer.weight


def convolve_with(
    layer: nn.Conv2d, x: Tensor, convolve: Callable[[Tensor, Tensor], Tensor],
    prepare: Callable[[Tensor], Tensor] = lambda weight: weight, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Compute ``convolve(x, weight)`` with the effective weight, prepared; on CPUs the graph keeps no copy of it.

    Args:
        groups: of images in x, for each of which spectral norm iterates: x / sigma is convolved, all groups at once.
    """
    if groups > 1 and isinstance(layer, SpectralConv2d) and layer.training:
        scale = 1 / layer.iterated_sigmas(groups).repeat_interleave(len(x) // groups)
        return convolve(x * scale[:, None, None, None], prepare(layer.weight))
    weight = effective_weight(layer)
    if weight.is_cuda or (again := again_of(weight)) is None:  # a GPU's activations need more, its host has no time
        return convolve(x, prepare(weight))
    dtype = computing_dtype(layer.weight)
    with forgotten(cast := prepare(weight).to(dtype), lambda: prepare(again()).to(dtype)):
        return convolve(x, cast)


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


Linear = Callable[[Tensor, Tensor], Tensor]
"""``F.linear`` without bias: x [rows, in], weight [out, in] -> [rows, out]."""


def second_convolution(
    hidden: Tensor, places: Tensor, bias: Tensor, around: LayoutNeighbourhoods, linear: Linear = F.linear
) -> Tensor:
    """Convolve ``hidden`` [U, h] at every distinct outer window: [V, out].

    Args:
        places: its weight, float [out, h, k, k] in the order [k k, out, h].
        bias: float [out].
        linear: what multiplies matrices.
    """
    hidden = hidden.masked_fill(around.outside, 0)  # zero padding
    sums = []
    for lookup, part in zip(around.outer, places.split([each.index.shape[1] for each in around.outer]), strict=True):
        pieces = linear(hidden, part.flatten(0, 1))  # [U, p out]
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
