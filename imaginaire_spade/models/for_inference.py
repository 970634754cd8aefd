"""Convert networks for inference only: bring weights into the form that a forward pass needs."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.models.layers import fold_spectral_norm
from imaginaire_spade.models.norms import SPADE, ConditionalNorm

N = TypeVar("N", bound=nn.Module)


def optimise_for_inference(network: N, *, winograd: bool, dtype: torch.dtype | None = None) -> N:
    """Prepare a network, in place, for inference alone; its images change by rounding only.

    Fold spectral norms into the weights, lay out the weights of SPADE's tables and those of convolutions in the order
    of channels_last, and turn wide 3x3 convolutions into Winograd ones.

    Args:
        network: a generator or a style encoder.
        winograd: whether to use Winograd convolutions: for float32 on a CPU; on GPUs cuDNN chooses.
        dtype: of the autocast that the network will run in. Weights are stored in it, which autocast would otherwise
            compute anew in every forward: the same images. (Not those of norms, whose tables add them in float32.)
    Returns:
        The network, in evaluation mode and without gradients.
    """
    fold_spectral_norm(network).eval().requires_grad_(False)
    for module in list(network.modules()):
        if isinstance(module, SPADE):
            module.lay_out_tables(dtype)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        if isinstance(module, ConditionalNorm):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                child.to(dtype=dtype)
                if winograd and WinogradConv2d.pays_for(child):
                    setattr(module, name, WinogradConv2d(child))
    return network


class WinogradConv2d(nn.Module):
    """A 3x3 convolution in 16 multiplications per four pixels instead of 36 (Lavin and Gray 2016, F(2x2, 3x3)).

    Y = A^T [(G g G^T) * (B^T d B)] A for each 4x4 tile d of the image: sums of pixels, 16 matrix products over the
    channels, sums of products. In float32 it rounds less than the direct sum over 9 C products.

    Args:
        conv: 3x3, stride 1, one group, one pixel of zeros as padding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        products = torch.einsum("ia,ocab,jb->ijco", g, weight, g)
        self.register_buffer("products", products.flatten(0, 1).contiguous())  # [16, in, out]
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    products: Tensor
    bias: Tensor | None

    @staticmethod
    def pays_for(conv: nn.Conv2d) -> bool:
        """Return whether ``conv`` is such a convolution, and wide enough to be faster (measured on CPUs)."""
        shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        plain = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        return shape == plain and min(conv.in_channels, conv.out_channels) >= 256

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
        sums = torch.bmm(tiles.view(16, -1, x.shape[3]), self.products).view(4, 4, n, rows, columns, -1)
        for a, line in enumerate(_sums(sums)):
            for b, part in enumerate(_sums(line)):
                y[:, a::2, b::2] = part if self.bias is None else part.add_(self.bias)


def _combine(d: list[Tensor], out: Tensor) -> None:
    """Compute B^T d into ``out``."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _sums(m: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^T m."""
    return (m[0] + m[1]).add_(m[2]), (m[1] - m[2]).sub_(m[3])
