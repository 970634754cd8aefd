"""Compute the scores of features: kernel distance, precision and recall.

Scores of an untrained feature network are never called FID or KID: their names say ``random``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from imaginaire_spade.errors import ConfigError, DataError, how_to_install
from imaginaire_spade.pretrained.inception import FeatureNetwork

METRICS = ("fid", "kid", "precision_recall", "diversity", "segmentation")
NEED_FEATURES = ("fid", "kid", "precision_recall")
KEEP_FEATURES = ("kid", "precision_recall")
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
"""Of precision and recall, as published."""


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
        DataError: fewer than two images.
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
        DataError: too few images.
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
