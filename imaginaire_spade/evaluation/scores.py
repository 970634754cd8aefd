"""Compute the scores of features: Frechet distance (from exact sums), kernel distance, precision and recall.

Knows nothing of images or files. Scores of an untrained feature network are never called FID or KID: their names say
``random``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imaginaire_spade.distributed import to_double, total_over_processes
from imaginaire_spade.errors import DataError, how_to_install
from imaginaire_spade.pretrained.feature_networks import FeatureNetwork

KEEP_FEATURES = ("kid", "precision_recall", "cmmd")
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA = 10.0
NEIGHBOURS = 3
"""Of precision and recall, as published."""


def score_name(name: str, network: FeatureNetwork) -> str:
    """Name a feature score: plain only for the trained Inception network at 2048 dimensions."""
    if network.is_random:
        return {"fid": "random_feature_distance", "kid": "random_feature_mmd"}.get(name, f"random_feature_{name}")
    if network.ending:
        short = {"fid": "fd", "kid": "kd"}.get(name, name)
        return name if name == "cmmd" else f"{short}_{network.ending}"
    return name if network.dim == 2048 else f"{name}_{network.dim}"


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features."""

    mean: Tensor
    """float64 [D]."""
    covariance: Tensor
    """float64 [D, D], unbiased (divided by count - 1)."""

    @property
    def dim(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class FeatureStats:
    """(count, sum, sum of outer products) of features: ``+`` joins batches, processes and runs, in any order."""

    count: int
    sum: Tensor
    """float64 [D]."""
    outer: Tensor
    """float64 [D, D]: the sum of f f^T."""

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> FeatureStats:
        outer = to_double(torch.zeros(dim, dim, device=device))
        return cls(0, outer.sum(0), outer)

    @classmethod
    def of(cls, features: Tensor) -> FeatureStats:
        """Sum up a batch of features, float [N, D]."""
        exact = to_double(features)
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    def __add__(self, other: FeatureStats) -> FeatureStats:
        return FeatureStats(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def over_processes(self) -> FeatureStats:
        """Add up all processes' statistics, on every process."""
        count = total_over_processes(torch.tensor([self.count], device=self.sum.device))
        return FeatureStats(int(count), total_over_processes(self.sum), total_over_processes(self.outer))

    def gaussian(self, where: str = "features") -> Gaussian:
        """Compute mean and covariance.

        Raises:
            DataError: fewer than two images: they have no covariance. The message begins with ``where``.
        """
        if self.count < 2:
            raise DataError(f"{where}: {self.count} image(s); a covariance needs at least 2")
        mean = self.sum.cpu() / self.count
        scatter = self.outer.cpu() - self.count * torch.outer(mean, mean)
        return Gaussian(mean, scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the squared Frechet (Wasserstein-2) distance of two Gaussians, at least 0.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2) (Heusel et al. 2017, equation 6). The last trace is the sum of the
    singular values of A^(1/2) B^(1/2), which needs no root of an indefinite matrix: covariances of fewer images than
    dimensions do no harm.
    """
    assert a.dim == b.dim, f"features of {a.dim} and {b.dim} dimensions"
    cross = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())


def _root(covariance: Tensor) -> Tensor:
    """Compute R [D, rank] with R R^T = covariance; eigenvalues that are zero but for rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(real: Tensor, fake: Tensor, *, seed: int = 0) -> tuple[float, float | None, str]:
    """Compute KID (Binkowski et al. 2018): the unbiased MMD^2 under the kernel (x.y / D + 1)^3, in float64.

    Args:
        real, fake: float [N, D] and [M, D]; subsets of the smaller of 1000, N and M are drawn by ``seed``.
    Returns:
        Mean and spread over the subsets (None for a single one), and how they were computed.
    Raises:
        ConfigError: torchmetrics is not installed.
        DataError: fewer than two images.
    """
    with how_to_install("torchmetrics", "KID comes with torchmetrics"):
        from torchmetrics.image.kid import poly_mmd
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    if size < 2:
        raise DataError(f"KID needs at least 2 images on each side, not {len(real)} and {len(fake)}")
    subsets = 1 if size == len(real) == len(fake) else KID_SUBSETS
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = (side[rng.permutation(len(side))[:size]] for side in (real, fake))
        values.append(poly_mmd(to_double(a), to_double(b)).item())
    rule = f"{subsets} subset(s) of {size}, kernel (x.y/D + 1)^3, seed {seed}"
    return float(np.mean(values)), float(np.std(values)) if subsets > 1 else None, rule


def cmmd(real: Tensor, fake: Tensor) -> float:
    """Compute CMMD (Jayasumana et al. 2024): 1000 times the squared MMD under the kernel exp(-|x - y|^2 / 200), in its
    biased form, of CLIP's embeddings of length 1. In float64, a block of rows at a time."""
    a, b = to_double(real.cpu()), to_double(fake.cpu())

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        rows = [torch.exp(-torch.cdist(block, y).square() / (2 * CMMD_SIGMA**2)).sum() for block in x.split(1024)]
        return torch.stack(rows).sum() / (len(x) * len(y))

    return 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)).item()


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Compute precision and recall of generated images (Kynkaanniemi et al. 2019), with torch-fidelity.

    Args:
        real, fake: float32 [N, D] and [M, D], more than ``NEIGHBOURS`` each.
    Raises:
        ConfigError: torch-fidelity is not installed (torchmetrics itself has no such score), or too old.
        DataError: too few images.
    """
    with how_to_install("torch-fidelity", "precision and recall come with torch-fidelity 0.4 or later"):
        from torch_fidelity.metric_prc import calculate_precision_recall_part
    if min(len(real), len(fake)) <= NEIGHBOURS:
        raise DataError(
            f"precision and recall need more than {NEIGHBOURS} images on each side, not {len(real)} and {len(fake)}"
        )
    precision, recall = calculate_precision_recall_part(fake, real, NEIGHBOURS)
    return precision, recall
