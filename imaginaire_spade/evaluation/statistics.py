"""Accumulate statistics of features as exact sums, and compute the distance of two Gaussians.

Owns the arithmetic and the files it is kept in: ours, pytorch-fid's ``.npz`` and CLADE's ``m.npy``/``s.npy``. Knows
nothing of pictures or networks.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.distributed import total_over_processes
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import write_bytes


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features."""

    mean: Tensor
    """float64 [D]."""
    covariance: Tensor
    """float64 [D, D], unbiased (divided by count - 1)."""
    count: int | None
    """Pictures they were computed from; None: the file does not say."""

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
        """Of a batch of features, float [N, D]."""
        exact = features.double()
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    def __add__(self, other: FeatureStats) -> FeatureStats:
        return FeatureStats(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def over_processes(self) -> FeatureStats:
        """The sum of all processes' statistics, on every process."""
        count = total_over_processes(torch.tensor([self.count], device=self.sum.device))
        return FeatureStats(int(count), total_over_processes(self.sum), total_over_processes(self.outer))

    def gaussian(self, where: str = "features") -> Gaussian:
        """Raises DataError, beginning with ``where``, for fewer than two pictures: they have no covariance."""
        if self.count < 2:
            raise DataError(f"{where}: {self.count} image(s); a covariance needs at least 2")
        mean = self.sum.cpu() / self.count
        scatter = self.outer.cpu() - self.count * torch.outer(mean, mean)
        return Gaussian(mean, scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians, at least 0.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2) (Heusel et al. 2017, equation 6). The last trace is the sum of the
    singular values of A^(1/2) B^(1/2), which needs no root of an indefinite matrix: covariances of fewer pictures
    than dimensions do no harm.
    """
    assert a.dim == b.dim, f"features of {a.dim} and {b.dim} dimensions"
    cross = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())


def _root(covariance: Tensor) -> Tensor:
    """R [D, rank] with R R^T = covariance; eigenvalues that are zero but for rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class StoredStatistics:
    """What a file of statistics holds."""

    gaussian: Gaussian
    stats: FeatureStats | None
    """The sums; None in other systems' files."""
    origin: Mapping[str, Any] | None
    """What our file says of the network and the pictures; None in other systems' files."""


def save_statistics(path: Path, stats: FeatureStats, origin: Mapping[str, Any]) -> None:
    """Write ``.npz``: count, sum, outer, origin (JSON), and mu and sigma, so that pytorch-fid reads it too.

    Raises UserError where the file cannot be written.
    """
    gaussian = stats.gaussian()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        count=np.int64(stats.count),
        sum=stats.sum.cpu().numpy(),
        outer=stats.outer.cpu().numpy(),
        mu=gaussian.mean.numpy(),
        sigma=gaussian.covariance.numpy(),
        origin=np.array(json.dumps(dict(origin))),
    )
    write_bytes(path, buffer.getvalue())


def load_statistics(path: Path) -> StoredStatistics:
    """Read statistics: ours, pytorch-fid's (mu, sigma), or a folder with CLADE's m.npy and s.npy.

    Raises:
        DataError: nothing of the kind, damaged, or not finite.
    """
    arrays = _arrays(path)
    if {"count", "sum", "outer", "origin"} <= set(arrays):
        try:
            origin = json.loads(str(arrays["origin"]))
            count = int(arrays["count"])
            if not isinstance(origin, dict):
                raise TypeError("its origin is no object")
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: damaged statistics ({error}): compute them again") from None
        total, outer = _matrices(path, arrays, "sum", "outer")
        stats = FeatureStats(count, total, outer)
        return StoredStatistics(stats.gaussian(str(path)), stats, origin)
    if {"mu", "sigma"} <= set(arrays):
        return StoredStatistics(Gaussian(*_matrices(path, arrays, "mu", "sigma"), None), None, None)
    raise DataError(
        f"{path}: no feature statistics ({', '.join(arrays) or 'nothing'} in it). Expected .npz with mu and sigma"
        " (pytorch-fid) or of scripts/compute_fid_stats.py, or a folder with m.npy and s.npy (CLADE)"
    )


def holds_statistics(path: Path) -> bool:
    """Whether ``path`` names statistics rather than pictures."""
    return path.suffix == ".npz" or (path.is_dir() and (path / "m.npy").is_file() and (path / "s.npy").is_file())


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if path.is_dir():
            files = {"mu": "m.npy", "sigma": "s.npy"}
            return {name: np.load(path / file, allow_pickle=False) for name, file in files.items()}
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            return {}
        with stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not readable as feature statistics: {error}") from None


def _matrices(path: Path, arrays: Mapping[str, NDArray[Any]], vector: str, matrix: str) -> tuple[Tensor, Tensor]:
    first, second = arrays[vector], arrays[matrix]
    dim = first.size
    if first.shape != (dim,) or second.shape != (dim, dim) or not dim:
        raise DataError(
            f"{path}: {vector} is {list(first.shape)} and {matrix} {list(second.shape)}; expected [D] and [D, D]"
        )
    if first.dtype.kind not in "fiu" or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError(f"{path}: {vector} or {matrix} holds numbers that are not finite: compute them again")
    return torch.from_numpy(first.astype(np.float64)), torch.from_numpy(second.astype(np.float64))
