"""Provide the networks that scores are computed with.

Inception gives the features of FID and KID, LPIPS the diversity; DINOv2, CLIP and networks of classification give
Frechet and kernel distances of their own names. Responsible for the resizing that belongs to the features. The
Inception network is torch-fidelity's, converted from the one that FID is defined with (TensorFlow's of 2015-12-05).
LPIPS is torchmetrics' (AlexNet; Zhang et al. 2018), whose heads come with that package; the weights of the backbone are
torchvision's. Weights come from files, and nothing is downloaded; or a network is untrained.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade.distributed import to_double
from imaginaire_spade.errors import ConfigError, DataError, UserError, first_line, how_to_install
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained import FEATURE_DIMS, FEATURES
from imaginaire_spade.pretrained.backbones import Backbone, backbone
from imaginaire_spade.pretrained.weights import RANDOM, UNTRAINED, PublishedWeights, network_sha256, random_seed
from imaginaire_spade.registry import did_you_mean

INCEPTION = PublishedWeights(
    "Inception v3 (2015-12-05)",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    UNTRAINED,
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid's name
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SIZE = 299
_LAST_LAYER = dict(zip(FEATURE_DIMS, ("MaxPool_1", "MaxPool_2", "Mixed_6e", "Mixed_7c"), strict=True))
"""Feature dimension -> torch-fidelity's layer that has it."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and deviation of the training images, in 0..1."""

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
    """``inception-v3 2015-12-05``, ``inception-v3 with other weights``, ``lpips alex``, one of ``FEATURES``, or
    ``random:SEED`` (and more)."""
    sha256: str
    """Of the file of weights; of the weights themselves where they are random."""
    layers: nn.Module

    @property
    def is_random(self) -> bool:
        return self.name.startswith(RANDOM)

    @property
    def device(self) -> torch.device:
        return next(self.layers.parameters()).device


@dataclass(frozen=True)
class FeatureNetwork(ScoreNetwork):
    """A network of scores: ``layers`` take float [N, 3, size, size] of 0..255 and give float [N, dim]."""

    dim: int
    resize: str
    size: int
    """Images are resized to size x size pixels."""
    normalisation: str | None = None
    """Of the pixels after that, as a formula; None: what ``resize`` says, of Inception."""
    ending: str = ""
    """Of the names of its scores; empty: Inception, whose names they are."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return what its features depend on beside ``dim``, for a file of them: plain types."""
        stated = {} if self.normalisation is None else {"normalisation": self.normalisation}
        return {"name": self.name, "sha256": self.sha256, "resize": self.resize, "resized_to": self.size, **stated}

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
            aliases); "clean": bicubic with antialiasing as PIL does (Parmar et al. 2022, "On aliased resizing");
            "bicubic antialiased": that without clamping to 0..255; "bicubic": between sixteen pixels, not clamped.
    """
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3, image.shape
    batch = image[None].float()
    if method == "legacy":
        return F.interpolate(batch, (size, size), mode="bilinear", align_corners=False)[0]
    assert method in ("clean", "bicubic antialiased", "bicubic"), method
    resized = F.interpolate(batch, (size, size), mode="bicubic", align_corners=False, antialias=method != "bicubic")[0]
    return resized.clamp(0, 255) if method == "clean" else resized


def feature_network(
    weights: str | None = None,
    *,
    features: str = "inception",
    dim: int = 2048,
    resize: str = "legacy",
    device: torch.device | str = "cpu",
    setting: str = "--inception_weights FILE",
    features_setting: str = "--features",
) -> FeatureNetwork:
    """Build the network of FID and KID, or another one.

    Args:
        weights: file of Inception weights; None: torch's cache; ``random:SEED``: an untrained network, for tests and
            dry runs.
        features: one of ``FEATURES``, with or without ``:WEIGHTS`` (of DINOv2 and CLIP a folder).
        dim: one of ``FEATURE_DIMS`` (2048: FID proper), of Inception.
        resize: one of ``RESIZES``, of Inception.
        setting: what to write for ``weights``, ending with FILE, for messages.
        features_setting: flag or config key that gave ``features``, likewise.
    Raises:
        ConfigError: an unknown network; no weights there, saying where to put which file; damaged; a package is not
            installed; options of Inception for another network.
    """
    layers: nn.Module
    if features != "inception":
        kind, _, stated = features.partition(":")
        if kind != "inception":
            if weights is not None or dim != 2048 or resize != "legacy":
                raise ConfigError(
                    f"{features_setting} {features}: weights, dimension and resizing that were given beside it are"
                    f" Inception's: leave them out (weights of its own: {features_setting} {features}:FILE)"
                )
            return _other_network(features, torch.device(device), features_setting)
        weights, setting = stated, f"{features_setting} inception:FILE"
    if (seed := random_seed(weights, setting)) is None:
        path, size = INCEPTION.find(weights, setting), INCEPTION_SIZE
        layers, sha256 = InceptionFeatures(dim, path, legacy=resize == "legacy"), file_sha256(path)
        name = "inception-v3 2015-12-05" if sha256 == INCEPTION_SHA256 else "inception-v3 with other weights"
    else:
        layers, size, name = RandomFeatures(dim, seed), RandomFeatures.SIZE, f"{RANDOM}{seed}"
        sha256 = network_sha256(layers)
    layers.eval().requires_grad_(False).to(device)
    return FeatureNetwork(name, sha256, layers, dim, resize, size)


def _other_network(features: str, device: torch.device, setting: str) -> FeatureNetwork:
    kind, _, rest = features.partition(":")
    named = kind in ("torchvision", "timm")
    network, _, weights = rest.partition(":") if named else ("", "", rest)
    name = f"{kind}:{network}" if named else kind
    if kind not in {known.partition(":")[0] for known in FEATURES}:
        raise ConfigError(
            f"{setting} {features}: unknown network{did_you_mean(name, FEATURES)} Write {', '.join(FEATURES)}"
        )
    layers: _TransformerFeatures | Backbone
    if kind in ("dinov2", "clip"):
        layers = (Dinov2Features if kind == "dinov2" else ClipFeatures)(weights or None, setting)
        resize = layers.resize
    else:
        layers, resize = backbone(name, weights or None, f"{setting} {name}:FILE", where=f"{setting} "), "clean"
    layers.eval().requires_grad_(False).to(device)
    with torch.no_grad():
        dim = layers(torch.zeros(1, 3, layers.size, layers.size, device=device)).shape[1]
    ending = re.sub(r"\W+", "_", name)
    return FeatureNetwork(layers.name, layers.sha256, layers, dim, resize, layers.size, layers.normalisation, ending)


class _TransformerFeatures(nn.Module):
    """A network of transformers, from a local folder or the cache of the hub.

    Args:
        place: folder with config.json and weights, or an id in the cache; None: ``published``.
    Raises:
        ConfigError: transformers is not installed, or there is no such network.
    """

    name: str
    published: str
    model: str
    resize: str
    statistics = _IMAGENET
    size = 224
    mean: Tensor
    std: Tensor

    def __init__(self, place: str | None, setting: str) -> None:
        super().__init__()
        flag = f"{setting} {self.name}"
        with how_to_install("transformers", f"{flag} needs the package transformers"):
            import transformers
        transformers.utils.logging.disable_progress_bar()
        try:
            network = getattr(transformers, self.model).from_pretrained(place or self.published, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            where = place or "the cache of huggingface_hub"
            raise ConfigError(
                f"{flag}: no {self.model} at {where} ({first_line(error)}). Nothing is downloaded by itself:"
                f" hf download {self.published}, or write {flag}:FOLDER"
            ) from None
        self.network: Any = network.float()
        self.sha256 = network_sha256(network)
        mean, std = (tuple(round(255 * value, 3) for value in values) for values in self.statistics)
        self.normalisation = f"(x - {list(mean)}) / {list(std)}"
        for name, values in zip(("mean", "std"), self.statistics, strict=True):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)


class Dinov2Features(_TransformerFeatures):
    """DINOv2's class token after the last norm (Oquab et al. 2023; Stein et al. 2023, "Exposing flaws"; ViT-L/14).

    As edm2 (Karras et al. 2024) takes it for FD-DINOv2: the whole image, to 224 x 224 by antialiased bicubic
    interpolation. The network's own code resamples its position embeddings at (i + 0.5) * 37 / 16.1, transformers' at
    (i + 0.5) * 37 / 16; this is the former.
    """

    name, published, model = "dinov2", "facebook/dinov2-large", "Dinov2Model"
    resize = "bicubic antialiased"

    def __init__(self, place: str | None, setting: str) -> None:
        super().__init__(place, setting)
        embeddings = self.network.embeddings
        side, stored = self.size // self.network.config.patch_size, embeddings.position_embeddings.detach()
        at_training = int((stored.shape[1] - 1) ** 0.5)
        if side != at_training:
            grid = stored[:, 1:].reshape(1, at_training, at_training, -1).permute(0, 3, 1, 2)
            scale = (side + 0.1) / at_training
            grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
            resampled = torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
            embeddings.position_embeddings = nn.Parameter(resampled, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, 224, 224] in 0..255 -> [N, dim]."""
        return self.network((images - self.mean) / self.std).last_hidden_state[:, 0]


class ClipFeatures(_TransformerFeatures):
    """CLIP's image embedding, of length 1, for CMMD (Jayasumana et al. 2024; ViT-L/14 at 336 pixels).

    The whole image, to the network's size by bicubic interpolation.
    """

    name, published, model = "clip", "openai/clip-vit-large-patch14-336", "CLIPVisionModelWithProjection"
    resize, statistics = "bicubic", _CLIP

    def __init__(self, place: str | None, setting: str) -> None:
        super().__init__(place, setting)
        self.size = int(self.network.config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, size, size] in 0..255 -> [N, dim]."""
        return F.normalize(self.network((images - self.mean) / self.std).image_embeds, dim=1)


class InceptionFeatures(nn.Module):
    """torch-fidelity's Inception up to one of its feature layers, averaged over the image.

    Args:
        legacy: images are scaled as in pytorch-fid, to x / 127.5 - 1; else as in the original, to (x - 128) / 128.
    Raises:
        ConfigError: torch-fidelity is not installed, or the file holds other weights.
    """

    def __init__(self, dim: int, path: Path, *, legacy: bool) -> None:
        super().__init__()
        with how_to_install("torch-fidelity", "the Inception network comes with torch-fidelity"):
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
    setting = "--lpips_weights FILE"
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
    with how_to_install("torchmetrics", "LPIPS comes with torchmetrics"):
        from torchmetrics.functional.image.lpips import _LPIPS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _LPIPS(pretrained=True, net="alex", pnet_rand=True)  # the public classes would download the backbone
