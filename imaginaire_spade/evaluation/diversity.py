"""Measure the diversity of a label map's images: mean LPIPS distance between them (Zhu et al. 2017).

The network is torchmetrics' LPIPS (AlexNet; Zhang et al. 2018), whose heads come with that package; the weights of the
backbone are torchvision's, from a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError, DataError, UserError, how_to_install
from imaginaire_spade.evaluation.features import (
    RANDOM,
    find_weights,
    not_weights,
    random_seed,
    read_state,
)
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained.segmenters import network_sha256

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET_FILE}"
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
    def diversity(self, pictures: Sequence[Tensor], where: str) -> float:
        """Mean LPIPS over all pairs of pictures, uint8 [3, H, W] of one size.

        Raises:
            DataError: fewer than two, of several sizes, or smaller than ``MIN_SIDE``.
            UserError: the distance is not finite.
        """
        if len(pictures) < 2:
            raise DataError(f"{where}: diversity needs at least 2 samples per label map: write --num_samples 2 or more")
        if len({picture.shape for picture in pictures}) > 1:
            raise DataError(f"{where}: its samples are of different sizes")
        if min(pictures[0].shape[1:]) < MIN_SIDE:
            raise DataError(f"{where}: LPIPS needs images of at least {MIN_SIDE} x {MIN_SIDE} pixels")
        device = next(self.layers.parameters()).device
        scaled = torch.stack(list(pictures)).to(device).float() / 127.5 - 1
        pairs = list(itertools.combinations(range(len(pictures)), 2))
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
    """LPIPS ready for use.

    Args:
        weights: file of torchvision's AlexNet; None: torch's cache; ``random:SEED``: untrained, for tests.
    Raises:
        ConfigError: no weights there, saying where to put which file; damaged; torchmetrics is not installed.
    """
    is_random = weights is not None and weights.startswith(RANDOM)
    seed, path, state = 0, None, {}
    if weights is not None and is_random:
        seed = random_seed(weights, "--lpips_weights")
    else:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
        path = find_weights(weights, [cached], "--lpips_weights", ALEXNET_URL)
        state = read_state(path, "torchvision's AlexNet", ALEXNET_URL)
    layers = _untrained_lpips(seed)
    if path is not None:
        backbone: nn.Module = layers.get_submodule("net")
        try:  # torchvision's features.I.weight are LPIPS's sliceS.I.weight
            backbone.load_state_dict({k: state[f"features.{k.partition('.')[2]}"] for k in backbone.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise not_weights(path, "torchvision's AlexNet", ALEXNET_URL, error) from None
    layers.eval().requires_grad_(False).to(device)
    if path is None:
        return PerceptualNetwork(str(weights), network_sha256(layers), layers)
    return PerceptualNetwork("lpips alex", file_sha256(path), layers)


def _untrained_lpips(seed: int) -> nn.Module:
    """LPIPS with its trained heads on an untrained backbone."""
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError:
        raise ConfigError(f"LPIPS comes with torchmetrics: {how_to_install('eval')}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _LPIPS(pretrained=True, net="alex", pnet_rand=True)  # the public classes would download the backbone
