"""Compute VGG19's activations, for the perceptual loss."""

import torch
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.pretrained.weights import PublishedWeights

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
        path = VGG19.find(weights_path, "losses.perceptual.weights_path:")
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
