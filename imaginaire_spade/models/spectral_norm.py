"""Spectrally normalised layers (Miyato et al. 2018)."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.models.convolution import (
    convolve_pixels,
    is_by_products,
    is_by_winograd,
    on_cpu_without_autocast,
    products_of_windows,
    winograd,
    winograd_gradients,
)
from imaginaire_spade.models.products import BY_RULE, Choices
from imaginaire_spade.models.recomputation import again_of, forgotten, saved


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

    @torch.no_grad()
    def iterations(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Do ``count`` power iterations, in place; return sigma, u and v after each: [count], [count, out or rest]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            each = [(self.iterate(), self.weight_u.clone(), self.weight_v.clone()) for _ in range(count)]
        sigmas, u, v = (torch.stack(values) for values in zip(*each, strict=True))
        return sigmas, u, v

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
    choices = BY_RULE
    """How training on a CPU computes it: ``set_choices``."""

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        smaller = groups > 1 or x.numel() < self.weight.numel()
        if smaller and self.training and self.padding_mode == "zeros" and on_cpu_without_autocast(x):
            options = self.stride, self.padding, self.choices
            return _Quotient.apply(x, self.weight, self.bias, *self.iterations(groups), *options)
        if self.padding_mode != "zeros" or self.dilation != (1, 1) or self.groups > 1:
            return convolve_with(self, x, lambda x, weight: self._conv_forward(x, weight, self.bias), groups=groups)
        convolve = partial(
            convolve_pixels, bias=self.bias, stride=self.stride, padding=self.padding, choices=self.choices
        )
        return convolve_with(self, x, convolve, groups=groups)


class _Quotient(torch.autograd.Function):
    """Convolve x / sigma instead of dividing the weight W, where that is larger: passes over W take a CPU's time.

    Each group of images has its own sigma = u . W v. With g the gradient of what is convolved, that of sigma is
    - (g . x / sigma) / sigma, and W gets u v^T times as much.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        *of_norm, ctx.stride, ctx.padding, ctx.choices = others
        ctx.save_for_backward(x, weight, *of_norm)
        ctx.by_winograd = is_by_winograd(x, weight, ctx.stride, ctx.padding, ctx.choices)
        if ctx.by_winograd:
            return winograd(_divided(x, of_norm[0]), weight, bias, ctx.choices)
        return F.conv2d(_divided(x.contiguous(), of_norm[0]), weight, bias, ctx.stride, ctx.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sigmas, u, v = ctx.saved_tensors
        if not ctx.by_winograd:
            x, gradient = x.contiguous(), gradient.contiguous()  # (the weight's gradient is slow in channels_last)
        x, trains = _divided(x, sigmas), ctx.needs_input_grad[1]
        few = len(x) * x[0, 0].numel() <= 256 and len(weight) * x.shape[1] >= 1024 * 1024
        if ctx.by_winograd:
            of_x, of_weight = winograd_gradients(x, weight, gradient, ctx.choices, of_weight=trains)
            assert of_x is not None
        elif few and weight.shape[2:] == (3, 3) and ctx.stride == ctx.padding == (1, 1):  # oneDNN is slower there
            rows = gradient.transpose(0, 1).flatten(1)  # [out, N h w]
            columns = ctx.choices.multiply(weight.flatten(1).T, rows).unflatten(1, (len(x), -1)).transpose(0, 1)
            of_x = F.fold(columns, x.shape[2:], 3, padding=1)
            windows = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)
            of_weight = ctx.choices.multiply(rows, windows.T).view_as(weight) if trains else None
        else:
            by_products = trains and is_by_products(x, weight, ctx.stride, ctx.padding, ctx.choices)
            options = ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, trains and not by_products, False)
            of_x, of_weight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)
            if by_products:
                of_weight = products_of_windows(
                    x, gradient, weight.shape[2], ctx.stride[0], ctx.padding[0], ctx.choices
                )
        if of_weight is not None:
            along = (of_x * x).unflatten(0, (len(sigmas), -1)).flatten(1).sum(1)
            (of_weight := of_weight.contiguous()).flatten(1).addmm_(u.T * (-along / sigmas), v)
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return _divided(of_x, sigmas), of_weight, of_bias, *[None] * 6


def _divided(x: Tensor, sigmas: Tensor) -> Tensor:
    """Divide each group's images by its sigma: [groups * N, C, H, W]."""
    return (x.unflatten(0, (len(sigmas), -1)) / sigmas.view(-1, 1, 1, 1, 1)).flatten(0, 1)


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


def set_choices(network: nn.Module, choices: Choices) -> None:
    """Let convolutions and tables of ``network`` be trained on a CPU by ``choices``."""
    for module in network.modules():
        if hasattr(module, "choices"):
            module.choices = choices  # type: ignore[assignment]


def choices_of(network: nn.Module) -> Choices | None:
    """Return the choices that convolutions of ``network`` are trained by; None: none is wide enough to have any."""
    wide = (m for m in network.modules() if isinstance(m, SpectralConv2d) and m.kernel_size == (3, 3))
    return next((m.choices for m in wide if min(m.weight.shape[:2]) >= 128), None)


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


class _Sigmas(torch.autograd.Function):
    """sigma = u . W v of several iterations [k], with the gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigmas: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.size = weight.shape
        return sigmas

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, v = ctx.saved_tensors
        return ((u.T * gradient) @ v).view(ctx.size), None, None, None


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
        sigmas = _Sigmas.apply(layer.weight, *layer.iterations(groups)).repeat_interleave(len(x) // groups)
        return convolve(x / sigmas[:, None, None, None], prepare(layer.weight))
    weight = effective_weight(layer)
    if weight.is_cuda or (again := again_of(weight)) is None:  # a GPU's activations need more, its host has no time
        return convolve(x, prepare(weight))
    dtype = computing_dtype(layer.weight)
    with forgotten(cast := prepare(weight).to(dtype), lambda: prepare(again()).to(dtype)):
        return convolve(x, cast)
