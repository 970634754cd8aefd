"""Define losses: functions of tensors, and the registered terms that YAML weighs.

A term of the generator's objective is a module called with ``GeneratorOutputs``; an ``AdversarialLoss`` also gives the
discriminator's loss. Users register their own in ``LOSSES``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imaginaire_spade.distributed import sum_statistics
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.discriminator import Scores
from imaginaire_spade.noise import generator_for
from imaginaire_spade.pretrained.backbones import backbone
from imaginaire_spade.pretrained.feature_maps import FeatureMaps, VGG19Features
from imaginaire_spade.registry import LOSSES, Weight

GANMode = Literal["hinge", "least_square", "half_least_square", "non_saturated", "wasserstein"]


@dataclass(frozen=True)
class GeneratorOutputs:
    """The inputs of a term of the generator's objective."""

    fake: Tensor
    """float32 [N, C, H, W] in [-1, 1], with gradient."""
    real: Tensor
    """Like fake, without gradient."""
    fake_scores: list[Scores]
    real_scores: list[Scores]
    """Empty where no term ``needs_real_scores``."""
    mu: Tensor | None = None
    """float [N, style_dims], if there is an encoder: mean of the style code's distribution."""
    logvar: Tensor | None = None
    """Like mu: logarithm of the variance."""
    layout: SemanticLayout | None = None
    """The label maps of the scored images."""
    plan: "ClassPlan | None" = None
    """What the iteration's ``AdversarialLoss`` planned."""


@dataclass(frozen=True)
class ClassPlan:
    """What a loss over classes fixes for an iteration: the same for every process and every part of the batch."""

    weights: Tensor
    """float32 [num_classes + 1]: label -> factor of its pixels' cross-entropy."""
    from_photo: Tensor | None
    """bool [num_classes + 1]: label -> whether a mixed image shows the photo there; None: no image is mixed."""

    def mask(self, layout: SemanticLayout) -> Tensor | None:
        """Return where mixed images show the photo: bool [N, 1, H, W]."""
        return None if self.from_photo is None else self.from_photo[layout.labels.long()].unsqueeze(1)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the plan."""
        return [tensor for tensor in (self.weights, self.from_photo) if tensor is not None]


class _MeanDistance(torch.autograd.Function):
    """Compute the mean of |a - b| in float32, with a gradient for a.

    It keeps a and b themselves. ``F.l1_loss`` of bf16 values would keep float32 copies, of several times their memory.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _difference(a, b).abs_().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        a, b = ctx.saved_tensors
        return _difference(a, b).sgn_().mul_(gradient / a.numel()).to(a.dtype), None


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.float32, copy=True).sub_(b)


def _mean_over_scales(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


ADVERSARIAL: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (lambda x: F.relu(1 + x).mean(), lambda x: F.relu(1 - x).mean()),
    "least_square": (lambda x: x.square().mean(), lambda x: F.mse_loss(x, torch.ones_like(x))),
    "half_least_square": (lambda x: 0.5 * x.square().mean(), lambda x: 0.5 * F.mse_loss(x, torch.ones_like(x))),
    "non_saturated": (lambda x: F.softplus(x).mean(), lambda x: F.softplus(-x).mean()),
    "wasserstein": (lambda x: x.mean(), lambda x: -x.mean()),
}
"""Mode -> the discriminator's losses for the logits of generated and of real images, [N, 1, h, w] -> scalar.

hinge: Lim and Ye 2017; least_square: Mao et al. 2017 without the factor 1/2, half_least_square: with it;
non_saturated: Goodfellow et al. 2014; wasserstein: Arjovsky et al. 2017, without any constraint.
"""


class AdversarialLoss(nn.Module):
    """Interface of the one term of a run that also states the discriminator's loss."""

    is_adversarial = True
    scores_classes = False
    """Whether it takes discriminators with ``scores_classes``, or those without."""
    needs_real_scores = True

    def plan(self, layout: SemanticLayout, seed: int, images_seen: int) -> ClassPlan | None:
        """Fix what all parts of an iteration share; all processes call it together.

        Args:
            layout: this process's whole batch.
            images_seen: at the iteration's start, by all processes.
        """
        return None

    def discriminator(
        self, scores: Sequence[list[Scores]], layout: SemanticLayout | None = None, plan: ClassPlan | None = None
    ) -> dict[str, Tensor]:
        """Compute the discriminator's terms by name; it minimises their sum.

        Args:
            scores: of generated images, of photos, and of mixed images, which are photos where ``plan.mask(layout)``
                says so, if it mixes any.
            layout: label maps of these images.
        """
        raise NotImplementedError

    def accuracy(self, fake: list[Scores], real: list[Scores]) -> Tensor:
        """Compute the share of patches (or pixels) that D tells rightly as generated or real; 1/2 is chance."""
        raise NotImplementedError

    def overfitting(self, fake: list[Scores], real: list[Scores], layout: SemanticLayout) -> Tensor:
        """Compute r_t = E[sign(D(real))] (Karras et al. 2020, eq. 1), over patches (or pixels) of training images.

        It is 0 while D cannot tell photos, and 1 once it takes all that it is trained on for photos.
        """
        raise NotImplementedError


@LOSSES.register("gan")
class GANLoss(AdversarialLoss):
    """Adversarial loss; also states the discriminator's.

    Args:
        mode: form of the loss.
        relative: judge generated images relative to the real ones of the same label maps, and vice versa.
    """

    def __init__(self, *, mode: GANMode = "hinge", relative: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.relative = relative
        self.needs_real_scores = relative

    def forward(self, outputs: GeneratorOutputs) -> Tensor:
        fake, _ = self._logits(outputs.fake_scores, outputs.real_scores)
        # The generator wants its images taken for real ones. Hinge has no bound there.
        _, of_real = ADVERSARIAL["wasserstein" if self.mode == "hinge" else self.mode]
        return _mean_over_scales([of_real(x) for x in fake])

    def discriminator(
        self, scores: Sequence[list[Scores]], layout: SemanticLayout | None = None, plan: ClassPlan | None = None
    ) -> dict[str, Tensor]:
        """Compute the discriminator's terms ``d_fake`` and ``d_real``; it minimises their sum."""
        of_fake, of_real = ADVERSARIAL[self.mode]
        fakes, reals = self._logits(scores[0], scores[1])
        return {
            "d_fake": _mean_over_scales([of_fake(x) for x in fakes]),
            "d_real": _mean_over_scales([of_real(x) for x in reals]),
        }

    @torch.no_grad()
    def accuracy(self, fake: list[Scores], real: list[Scores]) -> Tensor:
        """Compute the share of patches that D classifies correctly; 1/2 is chance.

        If a single score means nothing (relative, wasserstein), D is right where the real image scores higher.
        """
        pairs = [(f.logits, r.logits) for f, r in zip(fake, real, strict=True)]
        if self._is_relative:
            return _mean_over_scales([(r > f).float().mean() for f, r in pairs])
        boundary = self._boundary
        return _mean_over_scales([((f < boundary).float() + (r > boundary).float()).mean() / 2 for f, r in pairs])

    @torch.no_grad()
    def overfitting(self, fake: list[Scores], real: list[Scores], layout: SemanticLayout | None = None) -> Tensor:
        """Compute r_t; if a single score means nothing, the sign is that of D(real) - D(fake)."""
        if self._is_relative:
            return _mean_over_scales([(r.logits - f.logits).sign().mean() for f, r in zip(fake, real, strict=True)])
        return _mean_over_scales([(r.logits - self._boundary).sign().mean() for r in real])

    @property
    def _is_relative(self) -> bool:
        """Whether a single score means nothing."""
        return self.relative or self.mode == "wasserstein"

    @property
    def _boundary(self) -> float:
        """The score between generated and real."""
        return 0.5 if self.mode in ("least_square", "half_least_square") else 0.0

    def _logits(self, fake: list[Scores], real: list[Scores]) -> tuple[list[Tensor], list[Tensor]]:
        fakes, reals = [s.logits for s in fake], [s.logits for s in real]
        if not self.relative:
            return fakes, reals
        differences = [f - r for f, r in zip(fakes, reals, strict=True)]  # Jolicoeur-Martineau 2018
        return differences, [-difference for difference in differences]


@LOSSES.register("segmentation_gan")
class SegmentationGANLoss(AdversarialLoss):
    """Adversarial loss of OASIS (Schoenfeld et al. 2021, sec. 3): cross-entropy over the classes and "generated".

    D is to call each pixel of a photo by its class, each pixel of a generated image "generated"; the generator wants
    its pixels called by their classes. There is no other loss. Takes discriminators like ``oasis_unet``.

    Args:
        class_balancing: weigh a class by the inverse of its share of the pixels, of all processes' batches together, so
            that each class that is present counts alike (OASIS's release counts per GPU); pixels without a class
            (don't care) then do not count. Without it all pixels count alike; "don't care" is then a class.
        labelmix: weight of D's consistency (LabelMix): its logits for an image put together from photo and generated
            image, class by class, are to be those that it has for the two. 0: there is none.
    """

    scores_classes = True
    needs_real_scores = False

    def __init__(self, *, class_balancing: bool = True, labelmix: Weight = 10.0) -> None:
        super().__init__()
        self.class_balancing = class_balancing
        self.labelmix = labelmix

    @torch.no_grad()
    def plan(self, layout: SemanticLayout, seed: int, images_seen: int) -> ClassPlan:
        """Weigh the classes by the pixels of all processes; draw for each whether LabelMix takes it from the photo.

        Nothing waits for a GPU. The draws belong to (seed, images_seen, class).
        """
        size, device = layout.spec.num_classes + 1, layout.device
        weights = torch.ones(size, device=device)
        if self.class_balancing:
            counts = sum_statistics(_count(layout.labels, size))
            total = counts.sum()
            counts[-1] = 0
            # They sum to the number of pixels: the mean over pixels is the mean over classes of each one's own mean.
            weights = (total / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))).float() * (counts > 0)
        if not self.labelmix:
            return ClassPlan(weights, None)
        bits = torch.from_numpy(generator_for(seed, images_seen, "labelmix").random(size) < 0.5)
        if device.type == "cuda":
            bits = bits.pin_memory()
        return ClassPlan(weights, bits.to(device, non_blocking=True))

    def forward(self, outputs: GeneratorOutputs) -> Tensor:
        assert outputs.layout is not None and outputs.plan is not None
        return self._of_classes(outputs.fake_scores, outputs.layout, outputs.plan)

    def discriminator(
        self, scores: Sequence[list[Scores]], layout: SemanticLayout | None = None, plan: ClassPlan | None = None
    ) -> dict[str, Tensor]:
        """Compute ``d_fake``, ``d_real`` and, with mixed images, ``d_labelmix`` (weighted); D minimises their sum."""
        assert layout is not None and plan is not None
        fake, real, *mixed = scores
        generated = torch.zeros_like(layout.labels, dtype=torch.int64)
        terms = {
            "d_fake": _mean_over_scales([_cross_entropy(s.logits, generated) for s in fake]),
            "d_real": self._of_classes(real, layout, plan),
        }
        if mixed and (mask := plan.mask(layout)) is not None:
            logits = zip(*([_pixels(s.logits) for s in group] for group in scores), strict=True)
            distances = [F.mse_loss(torch.where(mask.reshape(len(r), 1, *r.shape[2:]), r, f), m) for f, r, m in logits]
            terms["d_labelmix"] = self.labelmix * _mean_over_scales(distances)
        return terms

    @torch.no_grad()
    def accuracy(self, fake: list[Scores], real: list[Scores]) -> Tensor:
        """Compute the share of pixels that D tells rightly as generated or real, whatever class it gives a real one."""

        return _mean_over_scales(
            [(1 - _taken_for_real(f).mean() + _taken_for_real(r).mean()) / 2 for f, r in zip(fake, real, strict=True)]
        )

    @torch.no_grad()
    def overfitting(self, fake: list[Scores], real: list[Scores], layout: SemanticLayout) -> Tensor:
        """Compute r_t over the pixels that have a class; D takes one for a photo's by giving it any of the classes."""
        counted = (layout.labels < layout.spec.num_classes).float()
        total = counted.sum().clamp(min=1)
        return _mean_over_scales([((2 * _taken_for_real(r) - 1) * counted).sum() / total for r in real])

    def _of_classes(self, scores: list[Scores], layout: SemanticLayout, plan: ClassPlan) -> Tensor:
        """Compute the mean over all pixels of weight * cross-entropy with the pixel's class."""
        target = layout.labels.long() + 1
        if not layout.spec.has_dont_care:
            target = target.masked_fill(target > layout.spec.num_classes, -1)  # pixels that have no channel
        weights = F.pad(plan.weights[: layout.spec.num_label_channels], (1, 0))
        return _mean_over_scales(
            [_cross_entropy(s.logits, target, weight=weights, ignore_index=-1, reduction="sum") / target.numel()
             for s in scores]
        )  # fmt: skip


def _pixels(logits: Tensor) -> Tensor:
    """View logits [N, C, H, W] in channels_last as rows [N H W, C], with which torch is faster; leave others."""
    is_rows = logits.is_contiguous(memory_format=torch.channels_last)
    return logits.permute(0, 2, 3, 1).flatten(0, 2) if is_rows else logits


def _cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Compute the cross-entropy of logits [N, C, H, W] with the pixels' classes [N, H, W]."""
    logits = _pixels(logits)
    return F.cross_entropy(logits, target.reshape(len(logits), *logits.shape[2:]), **options)


def _taken_for_real(scores: Scores) -> Tensor:
    """Return where D gives a class rather than "generated": float [N, h, w] of 0 and 1."""
    return (scores.logits[:, 0] < scores.logits[:, 1:].amax(1)).float()


def _count(labels: Tensor, size: int) -> Tensor:
    """Count the pixels of each label: int64 [size]."""
    flat = labels.flatten().long()
    if not flat.is_cuda:
        return torch.bincount(flat, minlength=size)
    # On a GPU bincount waits; a row for each image makes the sums collide less.
    counts = torch.zeros(len(labels), size, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, labels.flatten(1).long(), torch.ones_like(flat).view(len(labels), -1)).sum(0)


@LOSSES.register("feature_matching")
class FeatureMatchingLoss(nn.Module):
    """Distance of the discriminator's features: summed over layers, averaged over scales (SPADE: weight 10).

    This is eq. 4 of Wang et al. 2018 without the division by the number of layers, as SPADE's published weights assume.
    No gradient flows into the real features. Scores without features do not count as a scale.
    """

    def forward(self, outputs: GeneratorOutputs) -> Tensor:
        total = torch.stack(
            [_MeanDistance.apply(f, r.detach())
             for fake, real in zip(outputs.fake_scores, outputs.real_scores, strict=True)
             for f, r in zip(fake.features, real.features, strict=True)]
        ).sum()  # fmt: skip
        return total / sum(bool(scores.features) for scores in outputs.fake_scores)


_VGG_LAYERS = ("relu_1_1", "relu_2_1", "relu_3_1", "relu_4_1", "relu_5_1")
_VGG_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


@LOSSES.register("perceptual")
class PerceptualLoss(nn.Module):
    """Distance of VGG19 activations (Johnson et al. 2016; SPADE: weight 10, layer weights as pix2pixHD), or of the
    feature maps of another network.

    Args:
        network: vgg19, efficientnet_lite0, efficientnet_lite2, torchvision:NAME or timm:NAME. Of all but VGG19 the loss
            is the mean over the maps of strides 2 to 32 that it has, the coarsest one at half weight, channels brought
            to one scale.
        layers: names of activations of VGG19.
        layer_weights: one weight per layer of VGG19.
        weights_path: file of weights; null: torch's model cache, or the package's of efficientnet_lite0 or 2.
        imagenet_statistics: whether the images are normalised as for VGG's training.
    """

    network: nn.Module

    def __init__(
        self,
        *,
        network: str = "vgg19",
        layers: tuple[str, ...] = _VGG_LAYERS,
        layer_weights: tuple[Weight, ...] = _VGG_WEIGHTS,
        weights_path: str | None = None,
        imagenet_statistics: bool = True,
    ) -> None:
        super().__init__()
        if network != "vgg19":
            if (layers, layer_weights, imagenet_statistics) != (_VGG_LAYERS, _VGG_WEIGHTS, True):
                raise ConfigError(
                    f"losses.perceptual: layers, layer_weights and imagenet_statistics are VGG19's, and network is"
                    f" {network}: leave them out"
                )
            setting, where = "losses.perceptual.weights_path: FILE", "losses.perceptual.network: "
            built = backbone(network, weights_path, setting, where=where)
            self.network, count = FeatureMaps(built), len(built.levels())
            # The coarsest map answers to blur more than to other things, and counts half.
            self.layer_weights = (*(2 / (2 * count - 1),) * (count - 1), 1 / (2 * count - 1))
            return
        if len(layers) != len(layer_weights):
            raise ConfigError(
                f"losses.perceptual: {len(layers)} layers, but {len(layer_weights)} layer_weights; write one per layer"
            )
        self.layer_weights = layer_weights
        self.network = VGG19Features(layers, weights_path, imagenet_statistics)

    def forward(self, outputs: GeneratorOutputs) -> Tensor:
        with torch.no_grad():
            real = self.network(outputs.real)
        fake = self.network(outputs.fake)
        layers = zip(self.layer_weights, fake, real, strict=True)
        return torch.stack([weight * _MeanDistance.apply(f, r) for weight, f, r in layers]).sum()


@LOSSES.register("kl")
class KLLoss(nn.Module):
    """KL divergence of the encoder's style codes, N(mu, exp(logvar)), from N(0, 1): mean over the batch.

    SPADE sums over the batch of each GPU instead: its weight 0.05 with 4 images per GPU is 0.2 here.
    """

    needs_real_scores = False

    def forward(self, outputs: GeneratorOutputs) -> Tensor:
        mu, logvar = outputs.mu, outputs.logvar
        assert mu is not None and logvar is not None, "build.py refuses kl without an encoder"
        return -0.5 * torch.sum(1 + logvar - mu.square() - logvar.exp()) / len(mu)


@LOSSES.register("l1")
class L1Loss(nn.Module):
    """Mean absolute difference of images (Isola et al. 2017): quick colours for small runs; blurry if used alone."""

    needs_real_scores = False

    def forward(self, outputs: GeneratorOutputs) -> Tensor:
        return _MeanDistance.apply(outputs.fake, outputs.real)
