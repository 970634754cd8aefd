"""Convert networks for inference only: bring weights into the form that a forward pass needs on this machine."""

from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from imaginaire_spade.models.convolution import winograd_by, winograd_weights
from imaginaire_spade.models.norms import SPADE, ConditionalNorm
from imaginaire_spade.models.products import BY_RULE, Choices, measure_onednn
from imaginaire_spade.models.spectral_norm import fold_spectral_norm
from imaginaire_spade.models.timing import CLEARLY, Ask, by_rule, gain

N = TypeVar("N", bound=nn.Module)


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
    choices = Choices(winograd and any(_is_wide(module, 128) for module in modules) and measure_onednn(ask))
    for module in modules:
        if isinstance(module, SPADE):
            module.lay_out_tables(dtype, choices, fold=winograd)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    for module in modules:
        if isinstance(module, ConditionalNorm):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                child.to(dtype=dtype)
                if winograd:
                    setattr(module, name, WinogradConv2d.if_faster(child, choices, ask))
    return network


_gain = torch.inference_mode()(gain)


def _is_wide(module: nn.Module, channels: int) -> bool:
    """Return whether a module is a convolution of Winograd's kind with at least so many channels on both sides."""
    if not isinstance(module, nn.Conv2d):
        return False
    kind = module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    plain = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return kind == plain and min(module.in_channels, module.out_channels) >= channels


class WinogradConv2d(nn.Module):
    """A 3x3 convolution by Winograd's form (models/convolution.py) with weights transformed once.

    Args:
        conv: 3x3, stride 1, one group, one pixel of zeros as padding.
        choices: what multiplies matrices.
    """

    def __init__(self, conv: nn.Conv2d, choices: Choices = BY_RULE) -> None:
        super().__init__()
        self.choices = choices
        products = winograd_weights(conv.weight.detach()).mT  # [16, in, out]
        self.register_buffer("products", products if choices.onednn else products.contiguous())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    products: Tensor
    bias: Tensor | None

    @classmethod
    def if_faster(cls, conv: nn.Conv2d, choices: Choices = BY_RULE, ask: Ask = by_rule) -> nn.Module:
        """Return the Winograd form of ``conv`` if it has one that is faster, else ``conv``: as ``ask`` tells, or from
        256 channels up.

        What is measured is 16 rows of an image as wide as those that have so many channels in the generators of
        256x256: the ratio hardly depends on the size.
        """
        channels = conv.in_channels, conv.out_channels
        if not _is_wide(conv, 128):
            return conv
        form = cache(lambda: cls(conv, choices))

        def measure() -> float:
            x = torch.ones(1, channels[0], 16, max(8, 2**15 // sum(channels)))
            x = x.to(memory_format=torch.channels_last)
            return _gain(partial(form(), x), partial(conv, x))

        gain = ask(f"Winograd, {channels[0]} to {channels[1]} channels", measure)
        by_width = min(channels) >= 256
        return form() if (by_width if gain is None or 1 / CLEARLY < gain < CLEARLY else gain > 1) else conv

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, in, H, W] -> [N, out, H, W] in memory format channels_last."""
        return winograd_by(partial(self.choices.multiply_each, b=self.products), x, self.products.shape[2], self.bias)
