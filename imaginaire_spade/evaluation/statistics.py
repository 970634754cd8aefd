"""Accumulate statistics of features as exact sums, and compute the distance of two Gaussians.

Knows nothing of images, networks or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaginaire_spade.distributed import total_over_processes
from imaginaire_spade.errors import DataError


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features."""

    mean: Tensor
    """float64 [D]."""
    covariance: Tensor
    """float64 [D, D], unbiased (divided by count - 1)."""
    count: int | None
    """Images they were computed from; None: the file does not say."""

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
        return cls(
            0,
            torch.zeros(dim, dtype=torch.float64, device=device),
            torch.zeros(dim, dim, dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, features: Tensor) -> FeatureStats:
        """Sum up a batch of features, float [N, D]."""
        exact = features.double()
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
        return Gaussian(mean, scatter / (self.count - 1), self.count)


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
