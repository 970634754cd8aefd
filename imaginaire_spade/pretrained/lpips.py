"""Measure the diversity of a label map's images: mean LPIPS distance between them (Zhu et al. 2017).

The network is torchmetrics' LPIPS (AlexNet; Zhang et al. 2018), whose heads come with that package; the weights of the
backbone are torchvision's, from a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError, DataError, UserError, how_to_install
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained.weights import RANDOM, UNTRAINED, PublishedWeights, network_sha256, random_seed

ALEXNET = PublishedWeights(
    "torchvision's AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", UNTRAINED
)
MIN_SIDE = 32
"""Pixels below which AlexNet's last layers have nothing left."""
PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class PerceptualNetwork:
    """LPIPS, frozen."""

    name: str
    sha256: str
    """Of the backbone's file, or of all weights where they are random."""
    layers: nn.Module

    @property
    def is_random(self) -> bool:
        return self.name.startswith(RANDOM)

    @torch.no_grad()
    def diversity(self, images: Sequence[Tensor], where: str) -> float:
        """Compute the mean LPIPS over all pairs of images, uint8 [3, H, W] of one size.

        Raises:
            DataError: fewer than two, of several sizes, or smaller than ``MIN_SIDE``.
            UserError: the distance is not finite.
        """
        if len(images) < 2:
            raise DataError(f"{where}: diversity needs at least 2 samples per label map: write --num_samples 2 or more")
        if len({image.shape for image in images}) > 1:
            raise DataError(f"{where}: its samples are of different sizes")
        if min(images[0].shape[1:]) < MIN_SIDE:
            raise DataError(f"{where}: LPIPS needs images of at least {MIN_SIDE} x {MIN_SIDE} pixels")
        device = next(self.layers.parameters()).device
        scaled = torch.stack(list(images)).to(device).float() / 127.5 - 1
        pairs = list(itertools.combinations(range(len(images)), 2))
        distances = []
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            first, second = zip(*pairs[start : start + PAIRS_AT_ONCE], strict=True)
            with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                distances.append(self.layers(scaled[list(first)], scaled[list(second)]).flatten())
        mean = torch.cat(distances).double().mean()
        if not mean.isfinite():
            raise UserError(f"{where}: LPIPS is not finite: the network's weights are damaged")
        return mean.item()


def perceptual_network(weights: str | None = None, *, device: torch.device | str = "cpu") -> PerceptualNetwork:
    """Build LPIPS.

    Args:
        weights: file of torchvision's AlexNet; None: torch's cache; ``random:SEED``: untrained, for tests.
    Raises:
        ConfigError: no weights there, saying where to put which file; damaged; torchmetrics is not installed.
    """
    setting = "--lpips_weights"
    if weights is not None and weights.startswith(RANDOM):
        layers = _untrained_lpips(random_seed(weights, setting))
        name, sha256 = weights, network_sha256(layers)
    else:
        path, layers = ALEXNET.find(weights, setting), _untrained_lpips(0)
        # torchvision's features.I.weight are LPIPS's sliceS.I.weight
        ALEXNET.load(path, layers.get_submodule("net"), lambda name: f"features.{name.partition('.')[2]}")
        name, sha256 = "lpips alex", file_sha256(path)
    layers.eval().requires_grad_(False).to(device)
    return PerceptualNetwork(name, sha256, layers)


def _untrained_lpips(seed: int) -> nn.Module:
    """Build LPIPS with its trained heads on an untrained backbone."""
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError:
        raise ConfigError(f"LPIPS comes with torchmetrics: {how_to_install('eval')}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _LPIPS(pretrained=True, net="alex", pnet_rand=True)  # the public classes would download the backbone
