"""Collect from images what scores need, and keep it in files.

Responsible for the streaming and the split over processes: every process takes every ``world_size``-th key, nothing is
padded or dropped, and the number of images is asserted. The result is the same for any number of processes and, but for
the rounding of float32 features, for any batch size.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor

from imaginaire_spade.data.lmdb_source import usable_memory
from imaginaire_spade.distributed import ProcessInfo, gather_objects
from imaginaire_spade.errors import DataError, UserError, first_line, is_out_of_memory
from imaginaire_spade.evaluation.images import ImageSource, SourceImage
from imaginaire_spade.evaluation.scores import FeatureStats, Gaussian
from imaginaire_spade.evaluation.segmentation import Confusion
from imaginaire_spade.files import file_sha256, write_bytes
from imaginaire_spade.pretrained.feature_networks import FeatureNetwork, PerceptualNetwork

CLADE_FILES = {"mu": "m.npy", "sigma": "s.npy"}
"""Of a folder of statistics."""


@dataclass(frozen=True)
class _Description:
    """What a file of statistics says of the images, beside numbers; see ``Collection``."""

    count: Annotated[int, Field(ge=0)] | None
    size: str | None
    format: str | None
    digest: str


@dataclass(frozen=True)
class Collection:
    """What was collected of a set of images; the same on every process."""

    name: str
    digest: str
    """sha256 of the keys used (one a line, sorted), or of another system's file of statistics."""
    count: int | None = None
    """Images used; None, as ``size`` and ``format``: another system's file, which does not say."""
    size: str | None = None
    """HEIGHTxWIDTH, or how many sizes."""
    format: str | None = None
    gaussian: Gaussian | None = None
    """None where no features were asked for."""
    stats: FeatureStats | None = None
    """The sums that ``gaussian`` is of, for the file; None in what was read from one."""
    features: Tensor | None = None
    """float32 [N, D] in the order of keys, on the CPU (4 N D bytes on every process); only where asked for."""
    diversity: float | None = None
    """Mean LPIPS between samples of one label map."""
    confusion: Confusion | None = None
    """Of a segmenter's predictions, where these were judged."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Key -> (height, width) of its image; not kept in files."""
    examples: Mapping[int, str] = field(default_factory=dict)
    """Class -> key of the judged image whose label map has most of it; not kept in files."""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Images that were left out, one message each; not kept in files."""
    origin: Mapping[str, Any] | None = None
    """What the file says that it was read from; None in other systems' files, and where there is no file."""

    def save(self, path: Path, origin: Mapping[str, Any]) -> None:
        """Write ``.npz``: count, sum and outer, mu and sigma (so that pytorch-fid reads it too), features and confusion
        matrix, as far as they are there.

        Args:
            origin: what they depend on, as JSON.
        Raises:
            UserError: the file cannot be written.
        """
        described = {"count": self.count, "size": self.size, "format": self.format, "digest": self.digest}
        told = {**origin, "description": described, "warnings": self.warnings}
        arrays: dict[str, Any] = {"origin": np.array(json.dumps(told))}
        if self.stats is not None and self.gaussian is not None:
            arrays |= {"count": self.stats.count, "sum": self.stats.sum.cpu(), "outer": self.stats.outer.cpu()}
            arrays |= {"mu": self.gaussian.mean, "sigma": self.gaussian.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        if self.confusion is not None:
            arrays |= {f"confusion_{name}": value for name, value in vars(self.confusion).items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Collection:
        """Read what ``save`` wrote, pytorch-fid's .npz (mu, sigma), or a folder with CLADE's m.npy and s.npy.

        Raises:
            DataError: nothing of the kind, damaged, or not finite.
        """
        arrays = _arrays(path)
        features = confusion = None
        gaussian = _gaussian(path, arrays["mu"], arrays["sigma"]) if {"mu", "sigma"} <= set(arrays) else None
        if "origin" not in arrays and gaussian is not None:
            warning = (
                f"{path}: these statistics do not say what network, resizing or images they are of. The distance is"
                " right only if all that is as in this protocol (pytorch-fid's: --resize legacy)"
            )
            return cls(str(path), _digest_of(path), gaussian=gaussian, warnings=(warning,))
        if "origin" not in arrays:
            raise DataError(
                f"{path}: no feature statistics ({', '.join(arrays) or 'nothing'} in it). Expected .npz with mu and"
                " sigma (pytorch-fid) or of scripts/compute_fid_stats.py, or a folder with m.npy and s.npy (CLADE)"
            )
        try:
            if "features" in arrays:
                features = torch.from_numpy(arrays["features"])
                if features.dtype != torch.float32 or features.ndim != 2 or not features.isfinite().all():
                    raise ValueError(f"features are {features.dtype} {list(features.shape)}, or not finite")
            if "confusion_counts" in arrays:
                counts, ignored, images = (arrays[f"confusion_{name}"] for name in ("counts", "ignored", "images"))
                if counts.dtype != np.int64 or counts.shape != (len(counts), len(counts) + 1) or counts.min() < 0:
                    raise ValueError(f"confusion_counts are {counts.dtype} {list(counts.shape)}, or below 0")
                confusion = Confusion(counts, int(ignored), int(images))
            origin = json.loads(str(arrays["origin"]))
            told = TypeAdapter(_Description).validate_python(origin["description"])
            warnings = TypeAdapter(tuple[str, ...]).validate_python(origin.get("warnings", ()))
            return cls(
                str(path), **vars(told), gaussian=gaussian, features=features, confusion=confusion,
                warnings=warnings, origin=origin,
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise DataError(f"{path}: damaged statistics ({first_line(error)}): compute them again") from None


def holds_statistics(path: Path) -> bool:
    """Tell whether ``path`` names statistics rather than images."""
    return path.suffix == ".npz" or all((path / file).is_file() for file in CLADE_FILES.values())


def load_statistics(path: Path, network: FeatureNetwork, reference_split: str) -> Collection:
    """Read statistics that take the place of real images.

    Raises:
        DataError: they are damaged, or of another network, dimension, resize method or split.
    """
    stored = Collection.load(path)
    if stored.gaussian is None:
        raise DataError(f"{path}: no feature statistics in it: compute them (scripts/compute_fid_stats.py)")
    if stored.gaussian.dim != network.dim:
        raise DataError(
            f"{path}: statistics of {stored.gaussian.dim} dimensions, but the features have {network.dim}: write"
            f" {'another network' if network.ending else f'--feature_dim {stored.gaussian.dim}'}, or compute them again"
            " (scripts/compute_fid_stats.py)"
        )
    if stored.origin is None:
        return stored
    stated = stored.origin.get("network")
    known = {**(stated if isinstance(stated, dict) else {}), "split": stored.origin.get("reference_split")}
    wanted = network.identity | {"split": reference_split}
    if different := [
        f"{name}: {known.get(name)} there, {wanted[name]} here" for name in wanted if known.get(name) != wanted[name]
    ]:
        raise DataError(
            f"{path}: statistics of another protocol ({'; '.join(different)}). Compute them again with"
            " scripts/compute_fid_stats.py, or evaluate with what they were computed with"
        )
    return stored


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if path.is_dir():
            return {name: np.load(path / file, allow_pickle=False) for name, file in CLADE_FILES.items()}
        with zipfile.ZipFile(path) as packed:
            if (size := sum(entry.file_size for entry in packed.infolist())) > (usable := usable_memory()):
                raise ValueError(f"it unpacks to {size:,} bytes, and this machine's memory has {usable:,}")
        return dict(np.load(path, allow_pickle=False))
    except Exception as error:  # of damaged files numpy and zipfile raise whatever comes
        if isinstance(error, PermissionError):
            raise
        raise DataError(f"{path}: not readable as feature statistics: {first_line(error)}") from None


def _gaussian(path: Path, mu: NDArray[Any], sigma: NDArray[Any]) -> Gaussian:
    if mu.shape != (mu.size,) or sigma.shape != (mu.size, mu.size) or not mu.size:
        raise DataError(f"{path}: mu is {list(mu.shape)} and sigma {list(sigma.shape)}; expected [D] and [D, D]")
    kinds = mu.dtype.kind + sigma.dtype.kind
    if set(kinds) - set("fiu") or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path}: mu or sigma holds numbers that are not finite: compute them again")
    return Gaussian(*(torch.from_numpy(array.astype(np.float64)) for array in (mu, sigma)))


def _digest_of(path: Path) -> str:
    if path.is_file():
        return file_sha256(path)
    return hashlib.sha256("".join(file_sha256(path / file) for file in CLADE_FILES.values()).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ collecting


@dataclass(frozen=True)
class _Found:
    """What was found in the samples of one key, beside features and classes."""

    size: tuple[int, int]
    format: str
    remark: str
    diversity: float | None
    classes: NDArray[np.int64] | None
    """Pixels of each class in the label map."""


@dataclass
class _Share:
    """What one process found."""

    found: dict[int, _Found] = field(default_factory=dict)
    """By place of the key, in the order of ``features``."""
    unreadable: dict[int, str] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    confusion: Confusion | None = None


def collect(
    source: ImageSource,
    network: FeatureNetwork | None,
    *,
    batch_size: int = 32,
    keep_features: bool = False,
    perceptual: PerceptualNetwork | None = None,
    judge: Callable[[str, SourceImage], Confusion | None] | None = None,
    skip_bad: bool = False,
    info: ProcessInfo | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Collection:
    """Go once through this process's share of the images, and add up with the other processes (a collective).

    Args:
        network: None: no features.
        keep_features: KID, precision and recall need them all in memory.
        perceptual: measures the diversity of the samples of each key.
        judge: (key, image) -> what a segmenter finds in it; None: the image is left out.
        skip_bad: leave out images that cannot be read, and say so, instead of raising.
        on_image: called with the numbers of images done and to do of this process.
    Raises:
        DataError: an image cannot be read; nothing is left.
        UserError: a network's output is not finite, naming the image.
    """
    info, share = info or ProcessInfo(), _Share()
    stats = FeatureStats.zeros(network.dim, network.device) if network else None
    wanted = range(len(source.keys))[info.rank :: info.world_size]

    def looked_at() -> Iterator[tuple[str, Tensor]]:
        """Take down everything but the features, and yield what these are computed of."""
        for index, image in source.read(wanted):
            if isinstance(image, DataError):
                if not skip_bad:
                    raise DataError(f"{str(image).rstrip('.')}. Repair or remove it; --skip_bad leaves such images out")
                share.unreadable[index] = str(image)
                continue
            key, diversity, classes = source.keys[index], None, None
            if perceptual is not None:
                diversity = perceptual.diversity([image.pixels, *image.others], f"{source.name}: {key}")
            if judge is not None and (confusion := judge(key, image)) is not None:
                share.confusion = confusion if share.confusion is None else share.confusion + confusion
                classes = confusion.counts.sum(1)
            size = image.pixels.shape[1], image.pixels.shape[2]
            share.found[index] = _Found(size, image.format, image.remark, diversity, classes)
            on_image(len(share.found), len(wanted))
            yield key, image.pixels

    images = looked_at()
    while batch := list(islice(images, batch_size)):
        if network is not None and stats is not None:
            features = _features(network, batch, source)
            stats += FeatureStats.of(features)
            if keep_features:
                share.features.append(features.cpu())
    return _join(source, gather_objects(share), stats.over_processes() if stats else None)


def _features(network: FeatureNetwork, batch: Sequence[tuple[str, Tensor]], source: ImageSource) -> Tensor:
    try:
        features = network([pixels for _, pixels in batch])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{source.name}: not enough memory on {network.device} for the features of {len(batch)} images at once:"
            " write a smaller --batch_size"
        ) from None
    finite = features.isfinite().all(1).tolist()
    if bad := [key for (key, _), fine in zip(batch, finite, strict=True) if not fine]:
        raise UserError(
            f"{source.name}: the features of {bad[0]} are not finite: the feature network's weights are damaged"
            " (compare their sha256 with the published one), or the device computes wrongly (try --device cpu)"
        )
    return features


def _join(source: ImageSource, shares: Sequence[_Share], stats: FeatureStats | None) -> Collection:
    """Join what the processes found, in the order of keys."""
    found = {index: one for share in shares for index, one in share.found.items()}
    unreadable = {index: message for share in shares for index, message in share.unreadable.items()}
    used, total = sorted(found), len(source.keys)
    assert sorted([*used, *unreadable]) == list(range(total)), f"{source.name}: not each of {total} images once"
    assert stats is None or stats.count == len(used), f"{source.name}: {stats} of {len(used)} images"
    if not used:
        raise DataError(
            f"{source.name}: none of its {total} images can be read; the first: {unreadable[min(unreadable)]}"
        )
    keys = {index: source.keys[index] for index in used}
    formats = ", ".join(sorted({one.format for one in found.values()}))
    digest = hashlib.sha256("\n".join(sorted(keys.values())).encode()).hexdigest()
    features = [batch for share in shares for batch in share.features]
    diversities = [found[index].diversity for index in used]
    confusions = [share.confusion for share in shares if share.confusion is not None]
    confusion = sum(confusions[1:], confusions[0]) if confusions else None
    classes = {keys[index]: one.classes for index, one in found.items() if one.classes is not None}
    present = np.flatnonzero(confusion.present).tolist() if confusion else []
    warnings = []
    for remark in sorted({one.remark for one in found.values()} - {""}):
        remarked = [keys[index] for index in used if found[index].remark == remark]
        warnings.append(f"{source.name}: {remark} in {len(remarked)} image(s), such as {remarked[0]}")
    if unreadable:
        warnings.append(f"{source.name}: {len(unreadable)} of {total} images cannot be read and are left out")
    return Collection(
        source.name, digest, len(used), _size_range([one.size for one in found.values()]), formats,
        stats.gaussian(source.name) if stats else None, stats,
        torch.cat(features)[torch.tensor(list(found)).argsort()] if features else None,
        None if None in diversities else sum(filter(None, diversities)) / len(used), confusion,
        {keys[index]: found[index].size for index in used},
        {index: max((counts[index], key) for key, counts in classes.items())[1] for index in present},
        tuple(warnings), tuple(unreadable[index] for index in sorted(unreadable)),
    )  # fmt: skip


def _size_range(sizes: Iterable[tuple[int, int]]) -> str:
    """Describe sizes: HEIGHTxWIDTH, or their number and the smallest and largest."""
    different = list(dict.fromkeys(sizes))
    if len(different) == 1:
        return "{}x{}".format(*different[0])
    low, high = (key(different, key=lambda size: size[0] * size[1]) for key in (min, max))
    return f"{len(different)} sizes from {low[0]}x{low[1]} to {high[0]}x{high[1]}"
