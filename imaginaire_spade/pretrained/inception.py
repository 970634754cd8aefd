"""Turn images into the features of FID and KID, with the resizing that belongs to them.

The Inception network itself is torch-fidelity's, converted from the one that FID is defined with (TensorFlow's of
2015-12-05).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError, how_to_install
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained.weights import RANDOM, UNTRAINED, PublishedWeights, network_sha256, random_seed

INCEPTION = PublishedWeights(
    "Inception v3 (2015-12-05)",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    UNTRAINED,
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid's name
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SIZE = 299
FEATURE_DIMS = (64, 192, 768, 2048)
RESIZES = ("legacy", "clean")

_LAYERS = {
    64: ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    192: ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    768: ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    2048: ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}
"""Feature dimension -> torch-fidelity's layers up to it, after those of the dimension before."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network with everything that its features depend on."""

    name: str
    """``inception-v3 2015-12-05``, ``inception-v3 with other weights`` or ``random:SEED``."""
    sha256: str
    """Of the file of weights; of the weights themselves where they are random."""
    dim: int
    resize: str
    size: int
    """Images are resized to size x size pixels."""
    layers: nn.Module
    """float [N, 3, size, size] of 0..255 -> float [N, dim]."""

    @property
    def is_random(self) -> bool:
        return self.name.startswith(RANDOM)

    @property
    def is_published(self) -> bool:
        """Tell whether it is the network that FID and KID are defined with."""
        return self.sha256 == INCEPTION_SHA256

    @property
    def identity(self) -> dict[str, Any]:
        """Return what its features depend on beside ``dim``, for a file of them: plain types."""
        return {"name": self.name, "sha256": self.sha256, "resize": self.resize, "resized_to": self.size}

    @property
    def device(self) -> torch.device:
        return next(self.layers.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return features, float32 [N, dim], of N images, uint8 [3, H, W] of any sizes (each is resized by itself)."""
        device = self.device
        # Whatever precision a training run around this has chosen: scores are of float32.
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            resized = [resize_for_network(image.to(device), self.size, self.resize) for image in images]
            return self.layers(torch.stack(resized))


def resize_for_network(image: Tensor, size: int, method: str) -> Tensor:
    """Resize uint8 [3, H, W] to float32 [3, size, size] in 0..255, not rounded; the aspect ratio is not kept.

    Args:
        method: "legacy": bilinear between the nearest four pixels, whatever the scale, as pytorch-fid does (shrinking
            aliases); "clean": bicubic with antialiasing as PIL does (Parmar et al. 2022, "On aliased resizing").
    """
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3, image.shape
    batch = image[None].float()
    if method == "legacy":
        return F.interpolate(batch, (size, size), mode="bilinear", align_corners=False)[0]
    assert method == "clean", method
    return F.interpolate(batch, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)[0]


def feature_network(
    weights: str | None = None,
    *,
    dim: int = 2048,
    resize: str = "legacy",
    device: torch.device | str = "cpu",
    setting: str = "--inception_weights",
) -> FeatureNetwork:
    """Build the network of FID and KID.

    Args:
        weights: file of Inception weights; None: torch's cache; ``random:SEED``: an untrained network, for tests and
            dry runs.
        dim: 64, 192, 768 or 2048 (FID proper).
        setting: flag or config key that gave ``weights``, for messages.
    Raises:
        ConfigError: no weights there, saying where to put which file; damaged; or an unknown dim or resize.
    """
    if dim not in FEATURE_DIMS:
        raise ConfigError(f"feature dimension {dim}: choose one of {', '.join(map(str, FEATURE_DIMS))}")
    if resize not in RESIZES:
        raise ConfigError(f"resize method {resize!r}: choose one of {', '.join(RESIZES)}")
    layers: nn.Module
    if weights is not None and weights.startswith(RANDOM):
        name, size = weights, RandomFeatures.SIZE
        layers = RandomFeatures(dim, random_seed(weights, setting))
        sha256 = network_sha256(layers)
    else:
        path, size = INCEPTION.find(weights, setting), INCEPTION_SIZE
        layers, sha256 = InceptionFeatures(dim, path, legacy=resize == "legacy"), file_sha256(path)
        name = "inception-v3 2015-12-05" if sha256 == INCEPTION_SHA256 else "inception-v3 with other weights"
    layers.eval().requires_grad_(False).to(device)
    return FeatureNetwork(name, sha256, dim, resize, size, layers)


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception up to one of its feature layers, averaged over the image.

    Args:
        legacy: images are scaled as in pytorch-fid, to x / 127.5 - 1; else as in the original, to (x - 128) / 128.
    Raises:
        ConfigError: torch-fidelity is not installed, or the file holds other weights.
    """

    def __init__(self, dim: int, path: Path, *, legacy: bool) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ConfigError(f"the Inception network comes with torch-fidelity: {how_to_install('eval')}") from None
        INCEPTION.read(path)  # torch-fidelity would run what is in the file
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        except RuntimeError as error:
            raise INCEPTION.unfit(path, error) from None
        self.centre = 127.5 if legacy else 128.0
        needed = [name for at, names in _LAYERS.items() if at <= dim for name in names]
        self.layers = nn.Sequential(*(getattr(network, name) for name in needed))

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, 299, 299] in 0..255 -> [N, dim]."""
        return F.adaptive_avg_pool2d(self.layers((images - self.centre) / self.centre), 1).flatten(1)


class RandomFeatures(nn.Module):
    """A small untrained network: the same weights for the same seed on every machine. Its distances mean nothing."""

    SIZE = 64

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        channels = [3, 16, 32, dim]
        self.layers = nn.Sequential()
        for before, after in itertools.pairwise(channels):
            layer = nn.Conv2d(before, after, 4, stride=4, bias=False)
            layer.weight.data = torch.randn(after, before, 4, 4, generator=generator) / (8 * before) ** 0.5
            self.layers.extend([layer, nn.LeakyReLU(0.2)])

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, 64, 64] in 0..255 -> [N, dim]."""
        return self.layers(images / 127.5 - 1).flatten(1)
