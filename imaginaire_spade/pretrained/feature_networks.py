"""Provide the networks that scores and the perceptual loss are computed with, and find their weights.

Inception gives the features of FID and KID, LPIPS the diversity, VGG19 the perceptual loss. Responsible for the
resizing that belongs to the features. The Inception network is torch-fidelity's, converted from the one that FID is
defined with (TensorFlow's of 2015-12-05). LPIPS is torchmetrics' (AlexNet; Zhang et al. 2018), whose heads come with
that package; the weights of the backbone are torchvision's. Weights come from a file, and nothing is downloaded; or a
network of scores is untrained.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.distributed import to_double
from imaginaire_spade.errors import ConfigError, DataError, UserError, how_to_install
from imaginaire_spade.files import file_sha256


@dataclass(frozen=True)
class PublishedWeights:
    """Which weights a network has, and where their file comes from."""

    network: str
    url: str
    """Of the file, whose name it ends with."""
    without: str
    """What to write to do without the file."""
    other_name: str = ""
    """Under which another package keeps the same file."""

    def find(self, given: str | None, setting: str) -> Path:
        """Return the file ``given``, or the one in torch's cache.

        Args:
            setting: what stands before a file's name on the command line or in a config, for the message.
        Raises:
            ConfigError: no such file; the message says where to put which file.
        """
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        cached = [cache / name for name in (self.url.rpartition("/")[2], self.other_name) if name]
        places = [Path(given).expanduser()] if given else cached
        if found := [place for place in places if place.is_file()]:
            return found[0]
        raise ConfigError(
            f"{setting.rstrip(':')}: no weights at {' or '.join(map(str, places))}. Nothing is downloaded by itself:"
            f" fetch {self.url} and put it at {cached[0]}, or write {setting} FILE. ({self.without})"
        )

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read the tensors in a file, without running what is in it.

        Raises:
            ConfigError: it holds anything else.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.unfit(path, error) from None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise self.unfit(path, "no state dict of tensors")
        return state

    def load(self, path: Path, network: nn.Module, name_of: Callable[[str], str]) -> None:
        """Give ``network`` the weights of a file.

        Args:
            network: may be on torch's meta device.
            name_of: name of a tensor of ``network`` -> its name in the file, which may hold more.
        Raises:
            ConfigError: the file holds other weights.
        """
        state = self.read(path)
        try:
            network.load_state_dict({key: state[name_of(key)].float() for key in network.state_dict()}, assign=True)
        except (KeyError, RuntimeError) as error:
            raise self.unfit(path, error) from None

    def unfit(self, path: Path, reason: object) -> ConfigError:
        """Return the error for a file of anything but these weights."""
        text = str(reason).strip().partition("\n")[0]
        return ConfigError(f"{path}: not the weights of {self.network} ({text}). Get them from {self.url}")


def network_sha256(network: nn.Module) -> str:
    """Compute the sha256 of a network's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


RANDOM = "random:"
"""Start of the name of an untrained network: ``random:SEED``."""
UNTRAINED = "random:0 in place of FILE tries everything out with an untrained network, whose scores mean nothing"

INCEPTION = PublishedWeights(
    "Inception v3 (2015-12-05)",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    UNTRAINED,
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid's name
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SIZE = 299
_LAST_LAYER = {64: "MaxPool_1", 192: "MaxPool_2", 768: "Mixed_6e", 2048: "Mixed_7c"}
"""Feature dimension -> torch-fidelity's layer that has it."""
FEATURE_DIMS = tuple(_LAST_LAYER)
RESIZES = ("legacy", "clean")

ALEXNET = PublishedWeights(
    "torchvision's AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", UNTRAINED
)
MIN_SIDE = 32
"""Pixels below which AlexNet's last layers have nothing left."""
PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class ScoreNetwork:
    """A frozen network, and what says which one it is."""

    name: str
    """``inception-v3 2015-12-05``, ``inception-v3 with other weights``, ``lpips alex`` or ``random:SEED``."""
    sha256: str
    """Of the file of weights; of the weights themselves where they are random."""
    layers: nn.Module

    @property
    def is_random(self) -> bool:
        return self.name.startswith(RANDOM)

    @property
    def device(self) -> torch.device:
        return next(self.layers.parameters()).device


def random_seed(weights: str | None, setting: str) -> int | None:
    """Return SEED of ``random:SEED``; None for any other ``weights``.

    Raises:
        ConfigError: SEED is no whole number.
    """
    if weights is None or not weights.startswith(RANDOM):
        return None
    seed = weights.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise ConfigError(f"{setting} {weights}: write random: and a seed, such as random:0")
    return int(seed)


@dataclass(frozen=True)
class FeatureNetwork(ScoreNetwork):
    """The network of FID and KID: ``layers`` take float [N, 3, size, size] of 0..255 and give float [N, dim]."""

    dim: int
    resize: str
    size: int
    """Images are resized to size x size pixels."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return what its features depend on beside ``dim``, for a file of them: plain types."""
        return {"name": self.name, "sha256": self.sha256, "resize": self.resize, "resized_to": self.size}

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
        dim: one of ``FEATURE_DIMS`` (2048: FID proper).
        resize: one of ``RESIZES``.
        setting: flag or config key that gave ``weights``, for messages.
    Raises:
        ConfigError: no weights there, saying where to put which file; damaged; torch-fidelity is not installed.
    """
    layers: nn.Module
    if (seed := random_seed(weights, setting)) is None:
        path, size = INCEPTION.find(weights, setting), INCEPTION_SIZE
        layers, sha256 = InceptionFeatures(dim, path, legacy=resize == "legacy"), file_sha256(path)
        name = "inception-v3 2015-12-05" if sha256 == INCEPTION_SHA256 else "inception-v3 with other weights"
    else:
        layers, size, name = RandomFeatures(dim, seed), RandomFeatures.SIZE, f"{RANDOM}{seed}"
        sha256 = network_sha256(layers)
    layers.eval().requires_grad_(False).to(device)
    return FeatureNetwork(name, sha256, layers, dim, resize, size)


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception up to one of its feature layers, averaged over the image.

    Args:
        legacy: images are scaled as in pytorch-fid, to x / 127.5 - 1; else as in the original, to (x - 128) / 128.
    Raises:
        ConfigError: torch-fidelity is not installed, or the file holds other weights.
    """

    def __init__(self, dim: int, path: Path, *, legacy: bool) -> None:
        super().__init__()
        with how_to_install("eval", "the Inception network comes with torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        INCEPTION.read(path)  # torch-fidelity would run what is in the file
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        except RuntimeError as error:
            raise INCEPTION.unfit(path, error) from None
        self.centre = 127.5 if legacy else 128.0
        names = [name for name, _ in network.named_children()]
        self.layers = nn.Sequential(*network.children())[: names.index(_LAST_LAYER[dim]) + 1]

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, 299, 299] in 0..255 -> [N, dim]."""
        return F.adaptive_avg_pool2d(self.layers((images - self.centre) / self.centre), 1).flatten(1)


class RandomFeatures(nn.Module):
    """A small untrained network: the same weights for the same seed on every machine. Its distances mean nothing."""

    SIZE = 64

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential()
        for before, after in ((3, 16), (16, 32), (32, dim)):
            layer = nn.Conv2d(before, after, 4, stride=4, bias=False)
            layer.weight.data = torch.randn(after, before, 4, 4, generator=generator) / (8 * before) ** 0.5
            self.layers.extend([layer, nn.LeakyReLU(0.2)])

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, 64, 64] in 0..255 -> [N, dim]."""
        return self.layers(images / 127.5 - 1).flatten(1)


# ------------------------------------------------------------------------------------------------ diversity


@dataclass(frozen=True)
class PerceptualNetwork(ScoreNetwork):
    """LPIPS. ``sha256`` is that of the backbone's file."""

    @torch.no_grad()
    def diversity(self, images: Sequence[Tensor], where: str) -> float:
        """Compute the mean LPIPS over all pairs of images, uint8 [3, H, W] of one size.

        Raises:
            DataError: they are of several sizes, or smaller than ``MIN_SIDE``.
            UserError: the distance is not finite.
        """
        assert len(images) > 1, "the command line asks for several samples"
        if len({image.shape for image in images}) > 1:
            raise DataError(f"{where}: its samples are of different sizes")
        if min(images[0].shape[1:]) < MIN_SIDE:
            raise DataError(f"{where}: LPIPS needs images of at least {MIN_SIDE} x {MIN_SIDE} pixels")
        device = self.device
        scaled = torch.stack(list(images)).to(device).float() / 127.5 - 1
        pairs = torch.combinations(torch.arange(len(images))).split(PAIRS_AT_ONCE)
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            distances = [self.layers(scaled[pair[:, 0]], scaled[pair[:, 1]]).flatten() for pair in pairs]
        mean = to_double(torch.cat(distances)).mean()
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
    if (seed := random_seed(weights, setting)) is None:
        path, layers = ALEXNET.find(weights, setting), _untrained_lpips(0)
        # torchvision's features.I.weight are LPIPS's sliceS.I.weight
        ALEXNET.load(path, layers.get_submodule("net"), lambda name: f"features.{name.partition('.')[2]}")
        name, sha256 = "lpips alex", file_sha256(path)
    else:
        layers, name = _untrained_lpips(seed), f"{RANDOM}{seed}"
        sha256 = network_sha256(layers)
    layers.eval().requires_grad_(False).to(device)
    return PerceptualNetwork(name, sha256, layers)


def _untrained_lpips(seed: int) -> nn.Module:
    """Build LPIPS with its trained heads on an untrained backbone."""
    with how_to_install("eval", "LPIPS comes with torchmetrics"):
        from torchmetrics.functional.image.lpips import _LPIPS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _LPIPS(pretrained=True, net="alex", pnet_rand=True)  # the public classes would download the backbone


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
