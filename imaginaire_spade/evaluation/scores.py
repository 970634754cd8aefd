"""Compute scores of two collections of images under a protocol.

Scores of an untrained feature network are never called FID or KID: their names say ``random``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.errors import ConfigError, DataError, how_to_install
from imaginaire_spade.evaluation.collection import Collection
from imaginaire_spade.evaluation.protocol import Protocol, geometry_stamp
from imaginaire_spade.evaluation.report import Report
from imaginaire_spade.evaluation.statistics import frechet_distance
from imaginaire_spade.pretrained.inception import INCEPTION_SHA256, FeatureNetwork
from imaginaire_spade.pretrained.lpips import PerceptualNetwork
from imaginaire_spade.version import __version__

METRICS = ("fid", "kid", "precision_recall", "diversity", "segmentation")
NEED_FEATURES = ("fid", "kid", "precision_recall")
KEEP_FEATURES = ("kid", "precision_recall")
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
"""Of precision and recall, as published."""
FEW_PICTURES = 2048


def score_name(name: str, network: FeatureNetwork) -> str:
    """Name a feature score: plain only for the trained network at 2048 dimensions."""
    if network.is_random:
        return {"fid": "random_feature_distance", "kid": "random_feature_mmd"}.get(name, f"random_feature_{name}")
    return name if network.dim == 2048 else f"{name}_{network.dim}"


@dataclass(frozen=True)
class Kid:
    """Kernel distance of features: mean and spread over subsets, and how it was computed."""

    mean: float
    std: float | None
    """None for a single subset."""
    rule: str


def kernel_distance(real: Tensor, fake: Tensor, *, seed: int = 0) -> Kid:
    """Compute KID (Binkowski et al. 2018): the unbiased MMD^2 under the kernel (x.y / D + 1)^3, in float64.

    Args:
        real, fake: float [N, D] and [M, D]; subsets of the smaller of 1000, N and M are drawn by ``seed``.
    Raises:
        ConfigError: torchmetrics is not installed.
        DataError: fewer than two pictures.
    """
    try:
        from torchmetrics.image.kid import poly_mmd
    except ImportError:
        raise ConfigError(f"KID comes with torchmetrics: {how_to_install('eval')}") from None
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    if size < 2:
        raise DataError(f"KID needs at least 2 images on each side, not {len(real)} and {len(fake)}")
    subsets = 1 if size == len(real) == len(fake) else KID_SUBSETS
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = (side[rng.permutation(len(side))[:size]].double() for side in (real, fake))
        values.append(poly_mmd(a, b).item())
    rule = f"{subsets} subset(s) of {size}, kernel (x.y/D + 1)^3, seed {seed}"
    return Kid(float(np.mean(values)), float(np.std(values)) if subsets > 1 else None, rule)


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Compute precision and recall of generated images (Kynkaanniemi et al. 2019), with torch-fidelity.

    Args:
        real, fake: float32 [N, D] and [M, D], more than ``NEIGHBOURS`` each.
    Raises:
        ConfigError: torch-fidelity is not installed (torchmetrics itself has no such score), or too old.
        DataError: too few pictures.
    """
    try:
        from torch_fidelity.metric_prc import calculate_precision_recall_part
    except ImportError:
        raise ConfigError(
            f"precision and recall come with torch-fidelity 0.4 or later: {how_to_install('eval')}"
        ) from None
    if min(len(real), len(fake)) <= NEIGHBOURS:
        raise DataError(
            f"precision and recall need more than {NEIGHBOURS} images on each side, not {len(real)} and {len(fake)}"
        )
    precision, recall = calculate_precision_recall_part(fake, real, NEIGHBOURS)
    return precision, recall


def evaluate_pictures(
    real: Collection,
    fake: Collection,
    network: FeatureNetwork | None,
    *,
    metrics: Sequence[str],
    reference_split: str,
    perceptual: PerceptualNetwork | None = None,
    num_samples: int = 1,
    subject: Mapping[str, str] | None = None,
    geometry: AugmentationConfig | None = None,
) -> Report:
    """Compute scores of two collections. Not a collective: one process suffices.

    Args:
        geometry: through which the label maps of generated pictures went, for the protocol; None for stored ones.
    Raises:
        ConfigError: a metric needs what statistics in a file do not have; a library is missing.
        DataError: too few pictures.
    """
    scores: dict[str, float] = {}
    warnings = [*real.warnings, *fake.warnings]
    kid_rule = None
    if network is not None:
        warnings += _warnings(real, fake, network, metrics)
        assert real.gaussian is not None and fake.gaussian is not None
        if "fid" in metrics:
            scores[score_name("fid", network)] = frechet_distance(real.gaussian, fake.gaussian)
        if "kid" in metrics:
            kid = kernel_distance(_features(real, "kid"), _features(fake, "kid"))
            kid_rule = kid.rule
            scores[score_name("kid", network)] = kid.mean
            if kid.std is not None:
                scores[score_name("kid", network) + "_std"] = kid.std
        if "precision_recall" in metrics:
            found = precision_recall(*(_features(side, "precision_recall") for side in (real, fake)))
            scores |= {score_name(n, network): v for n, v in zip(("precision", "recall"), found, strict=True)}
    diversity_rule = None
    if perceptual is not None and fake.diversity is not None:
        scores["random_feature_diversity" if perceptual.is_random else "lpips_diversity"] = fake.diversity
        diversity_rule = f"{perceptual.name} (sha256 {perceptual.sha256}), {num_samples} samples per label map"
    assert fake.description.count and fake.description.size and fake.description.format
    protocol = Protocol(
        version=__version__,
        reference_split=reference_split,
        reference=real.description.digest,
        num_real=real.description.count,
        num_fake=fake.description.count,
        real_size=real.description.size,
        fake_size=fake.description.size,
        real_format=real.description.format,
        fake_format=fake.description.format,
        geometry=None if geometry is None else geometry_stamp(geometry),
        feature_network=network.name if network else None,
        weights_sha256=network.sha256 if network else None,
        feature_dim=network.dim if network else None,
        resize=network.resize if network else None,
        resized_to=network.size if network else None,
        kid=kid_rule,
        precision_recall=f"{NEIGHBOURS} nearest neighbours" if "precision_recall" in metrics else None,
        diversity=diversity_rule,
    )
    problems = (*real.problems, *fake.problems)
    return Report(scores, protocol, subject or {}, tuple(warnings), problems)


def _features(side: Collection, metric: str) -> Tensor:
    if side.features is None:
        raise ConfigError(
            f"--metrics {metric} needs the images themselves; {side.name} holds statistics, which do for fid only"
        )
    return side.features


def _warnings(real: Collection, fake: Collection, network: FeatureNetwork, metrics: Sequence[str]) -> list[str]:
    found = []
    if network.is_random:
        found.append(
            f"{network.name} is an untrained network: its scores say nothing about the images, and are no FID or KID"
        )
    elif not network.is_published:
        found.append(
            f"these Inception weights (sha256 {network.sha256}) are not those that FID and KID are defined with"
            f" ({INCEPTION_SHA256}): no published score compares with these"
        )
    counts = [side.gaussian.count for side in (real, fake) if side.gaussian and side.gaussian.count is not None]
    if "fid" in metrics and min(counts) < FEW_PICTURES:
        few = f"only {min(counts)} images: a Frechet distance of fewer than {FEW_PICTURES} is too high, by how much"
        few += " depends on their number. Compare equal numbers only, and report KID (--metrics kid), which has no such"
        few += " bias"
        if min(counts) <= network.dim:
            few += f". With features of {network.dim} dimensions their covariance is also singular"
        found.append(few)
    if real.description.size and real.description.size != fake.description.size:
        found.append(
            f"real images are {real.description.size}, generated ones {fake.description.size} (height x width): part"
            " of the distance is that of the sizes"
        )
    return found
