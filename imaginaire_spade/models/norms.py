"""Normalisation layers, conditional on a layout or not. Each conditional one has the signature ``norm(x, layout)``."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.distributed import sum_over_processes
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.layers import SpectralLinear, conv2d
from imaginaire_spade.registry import NORMS


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose training statistics can span all processes, on any device and backend.

    Statistics are float32 and flow through autograd, so K processes with batch B/K equal one process with batch B.
    ``torch.nn.SyncBatchNorm`` refuses CPU tensors; state dicts are the same as ``torch.nn.BatchNorm2d``'s.
    """

    synchronized = False
    """Set from outside (``synchronize_batch_norm``) once there is a process group."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.synchronized):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            count = wide.new_tensor([wide.numel() // wide.shape[1]])
            sums = sum_over_processes(torch.cat([wide.sum((0, 2, 3)), count]))
            total = sums[-1].detach()
            mean = sums[:-1] / total
            centred = wide - mean[:, None, None]
            variance = sum_over_processes(centred.square().sum((0, 2, 3))) / total
            self._track(mean.detach(), variance.detach(), total)
            scale = torch.rsqrt(variance + self.eps)
            if self.affine:
                scale = scale * self.weight
            y = centred * scale[:, None, None]
            return (y if not self.affine else y + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics (with the unbiased variance), as torch does."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), momentum)


def synchronize_batch_norm(network: nn.Module) -> None:
    """Make every batch norm of ``network`` take its statistics over all processes."""
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.synchronized = True


class ConditionalNorm(nn.Module):
    """What generators ask of every norm: ``norm(x, layout)``, and how many channels come out."""

    out_channels: int


@NORMS.register("spade")
class SPADE(ConditionalNorm):
    """Spatially-adaptive denormalisation (Park et al. 2019, eq. 1): normalize(x) * (1 + gamma) + beta.

    gamma and beta are convolutions of the label map at x's resolution.

    Args:
        channels: of x.
        spec: what the layouts hold.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
        hidden_channels: width between the two convolutions.
        kernel_size: of both convolutions, odd.
        affine: whether the norm has a learned scale and shift per channel (as in imaginaire; the paper has none).
        spectral_norm: spectral norm on the convolutions (as in imaginaire; the paper has none).
    """

    def __init__(
        self,
        channels: int,
        spec: LayoutSpec,
        *,
        normalization: Literal["batch", "instance"] = "batch",
        hidden_channels: int = 128,
        kernel_size: int = 3,
        affine: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ConfigError(f"norm.kernel_size: {kernel_size} must be odd, such as 3 or 5")
        self.out_channels = channels
        padding = kernel_size // 2
        self.normalize = (
            BatchNorm2d(channels, affine=affine)
            if normalization == "batch"
            else nn.InstanceNorm2d(channels, affine=affine)
        )
        conv = partial(conv2d, kernel_size=kernel_size, padding=padding, spectral=spectral_norm)
        self.shared = conv(spec.num_channels, hidden_channels)
        self.gamma = conv(hidden_channels, channels)
        self.beta = conv(hidden_channels, channels)

    def forward(self, x: Tensor, layout: SemanticLayout) -> Tensor:
        """x [N, channels, H, W], layout of any resolution -> [N, channels, H, W]."""
        height, width = x.shape[-2:]
        hidden = F.relu(self.shared(layout.resized(height, width).one_hot(self.shared.weight.dtype)))
        return self.normalize(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


@NORMS.register("concat")
class Concat(ConditionalNorm):
    """Normalises x and appends the one-hot layout, so that the next convolution sees it: no modulation.

    In the generator ``spade`` this is the "decoder w/ Concat" of Park et al. 2019 (table 3, "Effectiveness of SPADE").

    Args:
        channels: of x.
        spec: what the layouts hold.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
    """

    def __init__(
        self, channels: int, spec: LayoutSpec, *, normalization: Literal["batch", "instance"] = "batch"
    ) -> None:
        super().__init__()
        self.out_channels = channels + spec.num_channels
        self.normalize = (
            BatchNorm2d(channels, affine=False) if normalization == "batch" else nn.InstanceNorm2d(channels)
        )

    def forward(self, x: Tensor, layout: SemanticLayout) -> Tensor:
        """x [N, channels, H, W], layout of any resolution -> [N, channels + num_channels, H, W]."""
        y = self.normalize(x)
        return torch.cat([y, layout.resized(*x.shape[-2:]).one_hot(y.dtype)], 1)


@NORMS.register("clade")
class CLADE(ConditionalNorm):
    """Class-adaptive normalisation (Tan et al. 2021, eq. 5): normalize(x) * weight[c] + bias[c], c the pixel's class.

    Unlike SPADE's there is no "1 +" on the scale. Where the layouts have edges, a 1x1 convolution of the edge map comes
    out as one more channel. A pixel without a class, in layouts without a don't-care channel, counts as class 0.

    Args:
        channels: of x.
        spec: what the layouts hold.
        normalization: parameter-free ``batch`` or ``instance`` norm of x.
    """

    def __init__(
        self, channels: int, spec: LayoutSpec, *, normalization: Literal["batch", "instance"] = "batch"
    ) -> None:
        super().__init__()
        self.out_channels = channels + spec.has_edges
        self.normalize = (
            BatchNorm2d(channels, affine=False) if normalization == "batch" else nn.InstanceNorm2d(channels)
        )
        self.weight = nn.Parameter(torch.rand(spec.num_label_channels, channels))
        self.bias = nn.Parameter(torch.zeros(spec.num_label_channels, channels))
        self.edge = nn.Conv2d(1, 1, 1) if spec.has_edges else None

    def forward(self, x: Tensor, layout: SemanticLayout) -> Tensor:
        """x [N, channels, H, W], layout of any resolution -> [N, out_channels, H, W]."""
        height, width = x.shape[-2:]
        view = layout.resized(height, width)
        classes = view.labels.long()
        if not view.spec.has_dont_care:
            classes = classes.masked_fill(classes == view.spec.num_classes, 0)
        weight = F.embedding(classes, self.weight).permute(0, 3, 1, 2)  # [N, channels, H, W]
        y = self.normalize(x) * weight + F.embedding(classes, self.bias).permute(0, 3, 1, 2)
        if self.edge is None:
            return y
        assert view.edges is not None
        edges = self.edge(view.edges.to(self.edge.weight.dtype).unsqueeze(1))  # [N, 1, H, W]
        return torch.cat([y, edges.to(y.dtype)], 1)


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
        """x [N, channels, H, W], style [N, style_channels] -> [N, channels, H, W]."""
        gamma, beta = self.gamma(style)[:, :, None, None], self.beta(style)[:, :, None, None]
        return self.normalize(x) * (1 + gamma) + beta
