"""Convert networks for inference only: bring weights into the form that a forward pass needs on this machine."""

from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.models.layers import Linear
from imaginaire_spade.models.norms import SPADE, ConditionalNorm
from imaginaire_spade.models.spectral_norm import fold_spectral_norm
from imaginaire_spade.models.timing import gain

N = TypeVar("N", bound=nn.Module)

Ask = Callable[[str, Callable[[], float]], float | None]
"""(question, how to measure the answer) -> how many times faster one way is than the usual one, measured or remembered;
None: go by the rule."""

CLEARLY = 1.05
"""A measured way has to be so many times faster than the one of the rule."""


def by_rule(question: str, measure: Callable[[], float]) -> None:
    """Answer no question: the same choices on every machine."""


def optimise_for_inference(network: N, *, winograd: bool, dtype: torch.dtype | None = None, ask: Ask = by_rule) -> N:
    """Prepare a network, in place, for inference alone; its images change by rounding only.

    Fold spectral norms into the weights, lay out the weights of SPADE's tables and those of convolutions in the order
    of channels_last, and turn wide 3x3 convolutions into Winograd ones.

    Args:
        network: a generator or a style encoder.
        winograd: whether to use Winograd convolutions where they are faster, and the faster library for matrix
            products: for float32 on a CPU; on GPUs cuDNN chooses.
        dtype: of the autocast that the network will run in. Weights are stored in it, which autocast would otherwise
            compute anew in every forward: the same images. (Not those of norms, whose tables add them in float32.)
        ask: tells what is faster on this machine.
    Returns:
        The network, in evaluation mode and without gradients.
    """
    fold_spectral_norm(network).eval().requires_grad_(False)
    modules = list(network.modules())
    linear: Linear = F.linear
    if winograd and onednn_linear is not None and any(_is_wide(module, 128) for module in modules):
        gain = ask("matrix products by oneDNN", partial(_gain_of_products, onednn_linear))
        linear = onednn_linear if gain is not None and gain > CLEARLY else F.linear
    for module in modules:
        if isinstance(module, SPADE):
            module.lay_out_tables(dtype, linear, fold=winograd)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    for module in modules:
        if isinstance(module, ConditionalNorm):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                child.to(dtype=dtype)
                if winograd:
                    setattr(module, name, WinogradConv2d.if_faster(child, linear, ask))
    return network


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.linear``, x [rows, in] times weight [out, in] -> [rows, out], by oneDNN, which knows more processors
    than the library behind torch's own products does."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


onednn_linear = _onednn_linear if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


def _gain_of_products(linear: Linear) -> float:
    x, weight = torch.ones(256, 256), torch.ones(2048, 256)
    return _gain(partial(linear, x, weight), partial(F.linear, x, weight))


_gain = torch.inference_mode()(gain)


def _is_wide(module: nn.Module, channels: int) -> bool:
    """Return whether a module is a convolution of Winograd's kind with at least so many channels on both sides."""
    if not isinstance(module, nn.Conv2d):
        return False
    kind = module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    plain = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return kind == plain and min(module.in_channels, module.out_channels) >= channels


class WinogradConv2d(nn.Module):
    """A 3x3 convolution in 16 multiplications per four pixels instead of 36 (Lavin and Gray 2016, F(2x2, 3x3)).

    Y = A^T [(G g G^T) * (B^T d B)] A for each 4x4 tile d of the image: sums of pixels, 16 matrix products over the
    channels, sums of products. In float32 it rounds less than the direct sum over 9 C products.

    Args:
        conv: 3x3, stride 1, one group, one pixel of zeros as padding.
        linear: what multiplies matrices.
    """

    def __init__(self, conv: nn.Conv2d, linear: Linear = F.linear) -> None:
        super().__init__()
        self.linear = linear
        weight = conv.weight.detach()
        g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        products = torch.einsum("ia,ocab,jb->ijco", g, weight, g).flatten(0, 1)  # [16, in, out]
        in_columns = products.contiguous() if linear is F.linear else products.mT.contiguous().mT
        self.register_buffer("products", in_columns)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    products: Tensor
    bias: Tensor | None

    @classmethod
    def if_faster(cls, conv: nn.Conv2d, linear: Linear = F.linear, ask: Ask = by_rule) -> nn.Module:
        """Return the Winograd form of ``conv`` if it has one that is faster, else ``conv``: as ``ask`` tells, or from
        256 channels up.

        What is measured is 16 rows of an image as wide as those that have so many channels in the generators of
        256x256: the ratio hardly depends on the size.
        """
        channels = conv.in_channels, conv.out_channels
        if not _is_wide(conv, 128):
            return conv
        form = cache(lambda: cls(conv, linear))

        def measure() -> float:
            x = torch.ones(1, channels[0], 16, max(8, 2**15 // sum(channels)))
            x = x.to(memory_format=torch.channels_last)
            return _gain(partial(form(), x), partial(conv, x))

        gain = ask(f"Winograd, {channels[0]} to {channels[1]} channels", measure)
        by_width = min(channels) >= 256
        return form() if (by_width if gain is None or 1 / CLEARLY < gain < CLEARLY else gain > 1) else conv

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, in, H, W] -> [N, out, H, W] in memory format channels_last."""
        n, channels, height, width = x.shape
        rows, columns, out = (height + 1) // 2, (width + 1) // 2, self.products.shape[2]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
        y = x.new_empty(n, 2 * rows, 2 * columns, out)
        # As many tiles at a time as fit the processor's cache: some rows of one image or some images.
        many = max(1, 2**21 // (16 * columns * max(channels, out)))
        for first in range(0, n, max(1, many // rows)):
            images = slice(first, first + max(1, many // rows))
            for row in range(0, rows, many):
                tiles = padded[images, 2 * row : 2 * (row + many) + 2]
                self._tiles(tiles, y[images, 2 * row : 2 * (row + many)])
        return y[:, :height, :width].permute(0, 3, 1, 2)

    def _tiles(self, x: Tensor, y: Tensor) -> None:
        """Convolve x [n, 2 r + 2, 2 c + 2, in] into y [n, 2 r, 2 c, out]."""
        n, height, width, _ = y.shape
        rows, columns = height // 2, width // 2
        down = x.new_empty(4, n, rows, width + 2, x.shape[3])
        _combine([x[:, i : i + height : 2] for i in range(4)], down)
        tiles = x.new_empty(4, 4, n, rows, columns, x.shape[3])
        _combine([down[:, :, :, j : j + width : 2] for j in range(4)], tiles.transpose(0, 1))
        sums = self._products(tiles.view(16, -1, x.shape[3])).view(4, 4, n, rows, columns, -1)
        for a, line in enumerate(_sums(sums)):
            for b, part in enumerate(_sums(line)):
                y[:, a::2, b::2] = part if self.bias is None else part.add_(self.bias)

    def _products(self, tiles: Tensor) -> Tensor:
        """Multiply tiles [16, t, in] with the weights: [16, t, out]."""
        if self.linear is F.linear:
            return torch.bmm(tiles, self.products)
        return torch.stack([self.linear(t, p.T) for t, p in zip(tiles, self.products, strict=True)])


def _combine(d: list[Tensor], out: Tensor) -> None:
    """Compute B^T d into ``out``."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _sums(m: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^T m."""
    return (m[0] + m[1]).add_(m[2]), (m[1] - m[2]).sub_(m[3])
