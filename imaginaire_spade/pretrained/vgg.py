"""Pretrained feature networks for losses. Their weights come from a file: nothing is downloaded implicitly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError

VGG19_FILE = "vgg19-dcbb9e9d.pth"
VGG19_URL = f"https://download.pytorch.org/models/{VGG19_FILE}"
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
        imagenet_statistics: whether pictures are shifted from [-1, 1] to the statistics VGG was trained with.

    Raises:
        ConfigError: unknown layer, or no weights there, saying where to put the file.
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
        self._load(vgg19_weights_file(weights_path))
        self.network.eval().requires_grad_(False)
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet_statistics else ([0.5] * 3, [0.5] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            own = self.network.state_dict()
            self.network.load_state_dict({key: state[f"features.{key}"] for key in own}, assign=True)
        except Exception as error:
            raise ConfigError(
                f"{path}: not the weights of torchvision's vgg19 ({error}). Get them from {VGG19_URL}"
            ) from None

    def forward(self, images: Tensor) -> list[Tensor]:
        """images float [N, 3, H, W] in [-1, 1] -> one [N, C, h, w] per layer, shallow to deep."""
        x = ((images + 1) / 2 - self.mean) / self.std
        activations = []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in self.indices:
                activations.append(x)
        return activations


def vgg19_weights_file(path: str | None) -> Path:
    """The file of VGG19 weights. Raises ConfigError saying what to do where there is none."""
    file = Path(path).expanduser() if path else Path(torch.hub.get_dir()) / "checkpoints" / VGG19_FILE
    if not file.is_file():
        raise ConfigError(
            f"{file}: no VGG19 weights for the perceptual loss. Download {VGG19_URL} to that place, or write"
            " losses.perceptual.weights_path: FILE; to train without, write losses.perceptual.weight: 0"
        )
    return file
