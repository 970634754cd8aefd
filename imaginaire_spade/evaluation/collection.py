"""Collect from images what scores need: sums of features, features themselves if needed, and a description.

Owns the streaming and the split over processes: every process takes every ``world_size``-th key, nothing is padded or
dropped, and the number of pictures is asserted. The result is the same for any number of processes and, but for the
rounding of float32 features, for any batch size.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaginaire_spade.distributed import ProcessInfo, gather_objects
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.evaluation.sources import EvaluatedPicture, PictureSource, Unreadable
from imaginaire_spade.evaluation.statistics import FeatureStats, Gaussian, load_statistics, save_statistics
from imaginaire_spade.files import file_sha256
from imaginaire_spade.pretrained.inception import FeatureNetwork
from imaginaire_spade.pretrained.lpips import PerceptualNetwork


@dataclass(frozen=True)
class Description:
    """What stands in the protocol about a set of pictures."""

    count: int | None
    """Pictures used; None: a file of statistics that does not say."""
    size: str | None
    format: str | None
    digest: str
    """sha256 of the keys used (one a line, sorted), or of the file of statistics."""


@dataclass(frozen=True)
class Collection:
    """What was collected of a set of pictures; the same on every process."""

    name: str
    description: Description
    gaussian: Gaussian | None
    """None where no features were asked for."""
    stats: FeatureStats | None
    features: Tensor | None
    """float32 [N, D] in the order of keys, on the CPU (4 N D bytes on every process); only where asked for."""
    diversity: float | None
    """Mean LPIPS between samples of one label map."""
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass
class _Share:
    """What one process found."""

    indices: list[int]
    features: list[Tensor]
    sizes: Counter[tuple[int, int]]
    formats: Counter[str]
    remarks: dict[str, list[int]]
    diversity: dict[int, float]
    unreadable: dict[int, str]


def collect(
    source: PictureSource,
    network: FeatureNetwork | None,
    *,
    batch_size: int = 32,
    keep_features: bool = False,
    perceptual: PerceptualNetwork | None = None,
    skip_bad: bool = False,
    info: ProcessInfo | None = None,
    on_picture: Callable[[EvaluatedPicture], None] = lambda picture: None,
) -> Collection:
    """Go once through this process's share of the pictures, and add up with the other processes.

    Args:
        network: None: no features.
        keep_features: KID, precision and recall need them all in memory.
        perceptual: measures the diversity of the samples of each key.
        skip_bad: leave out pictures that cannot be read, and say so, instead of raising.
        on_picture: called with each picture of this process that counts (sample 0), for scores of other kinds.
    Raises:
        DataError: a picture cannot be read; nothing is left.
        UserError: a network's output is not finite, naming the picture.
    """
    info = info or ProcessInfo()
    share = _Share([], [], Counter(), Counter(), {}, {}, {})
    stats = FeatureStats.zeros(network.dim, network.device) if network else None
    pictures = _usable(source, range(len(source.keys))[info.rank :: info.world_size], skip_bad, share)
    for batch in _batches(_described(pictures, source, perceptual, share, on_picture), batch_size):
        share.indices += [picture.index for picture in batch]
        if network is not None and stats is not None:
            features = _features(network, batch, source)
            stats += FeatureStats.of(features)
            if keep_features:
                share.features.append(features.cpu())
    stats = stats.over_processes() if stats else None
    return _joined(source, gather_objects(share), stats, keep_features, perceptual is not None)


def _usable(
    source: PictureSource, indices: Sequence[int], skip_bad: bool, share: _Share
) -> Iterator[list[EvaluatedPicture]]:
    """The samples of one key after the other; keys with a picture that cannot be read are left out whole."""
    samples: dict[int, list[EvaluatedPicture | Unreadable]] = {}
    for item in source.read(indices):
        samples.setdefault(item.index, []).append(item)
        if len(samples[item.index]) < source.num_samples:
            continue
        group = samples.pop(item.index)
        bad = [sample.message for sample in group if isinstance(sample, Unreadable)]
        if bad and not skip_bad:
            raise DataError(f"{bad[0].rstrip('.')}. Repair or remove it; --skip_bad leaves such images out")
        if bad:
            share.unreadable[item.index] = bad[0]
        else:
            good = [sample for sample in group if isinstance(sample, EvaluatedPicture)]
            yield sorted(good, key=lambda picture: picture.sample)
    assert not samples, f"{source.name}: incomplete samples of {[source.keys[i] for i in samples]}"


def _described(
    groups: Iterable[list[EvaluatedPicture]],
    source: PictureSource,
    perceptual: PerceptualNetwork | None,
    share: _Share,
    on_picture: Callable[[EvaluatedPicture], None],
) -> Iterator[EvaluatedPicture]:
    """Sample 0 of each group, once everything but its features has been taken down."""
    for group in groups:
        first = group[0]
        share.sizes[(first.pixels.shape[1], first.pixels.shape[2])] += 1
        share.formats[first.format] += 1
        if first.remark:
            share.remarks.setdefault(first.remark, []).append(first.index)
        if perceptual is not None:
            where = f"{source.name}: {source.keys[first.index]}"
            share.diversity[first.index] = perceptual.diversity([picture.pixels for picture in group], where)
        on_picture(first)
        yield first


def _batches(pictures: Iterable[EvaluatedPicture], size: int) -> Iterator[list[EvaluatedPicture]]:
    batch: list[EvaluatedPicture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _features(network: FeatureNetwork, batch: Sequence[EvaluatedPicture], source: PictureSource) -> Tensor:
    try:
        features = network([picture.pixels for picture in batch])
    except torch.OutOfMemoryError:
        raise UserError(
            f"{source.name}: not enough memory on {network.device} for the features of {len(batch)} images at once:"
            " write a smaller --batch_size"
        ) from None
    finite = features.isfinite().all(1).tolist()
    if bad := [source.keys[picture.index] for picture, fine in zip(batch, finite, strict=True) if not fine]:
        raise UserError(
            f"{source.name}: the features of {bad[0]} are not finite: the feature network's weights are damaged"
            " (compare their sha256 with the published one), or the device computes wrongly (try --device cpu)"
        )
    return features


def _joined(
    source: PictureSource, shares: Sequence[_Share], stats: FeatureStats | None, keep: bool, with_diversity: bool
) -> Collection:
    used = sorted(index for share in shares for index in share.indices)
    unreadable = {index: message for share in shares for index, message in share.unreadable.items()}
    total = len(source.keys)
    assert sorted([*used, *unreadable]) == list(range(total)), f"{source.name}: not each of {total} images once"
    assert stats is None or stats.count == len(used), f"{source.name}: {stats} of {len(used)} images"
    if not used:
        raise DataError(
            f"{source.name}: none of its {total} images can be read; the first: {unreadable[min(unreadable)]}"
        )

    features = None
    if keep:
        order = torch.tensor([index for share in shares for index in share.indices]).argsort()
        features = torch.cat([batch for share in shares for batch in share.features])[order]
    diversity = None
    if with_diversity:
        by_index = {index: value for share in shares for index, value in share.diversity.items()}
        diversity = sum(by_index[index] for index in used) / len(used)
    sizes = sum((share.sizes for share in shares), Counter[tuple[int, int]]())
    formats = sum((share.formats for share in shares), Counter[str]())
    digest = hashlib.sha256("\n".join(sorted(source.keys[i] for i in used)).encode()).hexdigest()
    description = Description(len(used), _sizes(sizes), ", ".join(sorted(formats)), digest)
    warnings = [*_remarks(source, shares)]
    if unreadable:
        warnings.append(f"{source.name}: {len(unreadable)} of {total} images cannot be read and are left out")
    problems = tuple(unreadable[index] for index in sorted(unreadable))
    gaussian = stats.gaussian(source.name) if stats else None
    return Collection(source.name, description, gaussian, stats, features, diversity, tuple(warnings), problems)


def _sizes(sizes: Mapping[tuple[int, int], int]) -> str:
    """HEIGHTxWIDTH, or the number of sizes and the smallest and largest."""
    if len(sizes) == 1:
        return "{}x{}".format(*next(iter(sizes)))
    low, high = (key(sizes, key=lambda size: size[0] * size[1]) for key in (min, max))
    return f"{len(sizes)} sizes from {low[0]}x{low[1]} to {high[0]}x{high[1]}"


def _remarks(source: PictureSource, shares: Sequence[_Share]) -> Iterator[str]:
    joined: dict[str, list[int]] = {}
    for share in shares:
        for remark, indices in share.remarks.items():
            joined.setdefault(remark, []).extend(indices)
    for remark, indices in sorted(joined.items()):
        yield f"{source.name}: {remark} in {len(indices)} image(s), such as {source.keys[min(indices)]}"


# ------------------------------------------------------------------------------------------------ kept in files


def save_collection(path: Path, collection: Collection, network: FeatureNetwork, reference_split: str) -> None:
    """Write the statistics with what they were obtained from. Raises UserError where the file cannot be written."""
    assert collection.stats is not None
    origin = {"network": _identity(network), "reference_split": reference_split}
    save_statistics(path, collection.stats, origin | {"description": asdict(collection.description)})


def load_collection(path: Path, network: FeatureNetwork, reference_split: str) -> Collection:
    """Statistics from a file, in place of pictures.

    Raises:
        DataError: they are damaged, or of another network, dimension, resize method or split.
    """
    stored = load_statistics(path)
    gaussian = stored.gaussian
    if gaussian.dim != network.dim:
        raise DataError(
            f"{path}: statistics of {gaussian.dim} dimensions, but the features have {network.dim}: write --feature_dim"
            f" {gaussian.dim}, or compute them again (scripts/compute_fid_stats.py)"
        )
    if stored.origin is None:
        digest = _digest_of(path)
        warning = (
            f"{path}: these statistics do not say what network, resizing or images they are of. The distance is right"
            " only if all that is as in this protocol (pytorch-fid's: --resize legacy)"
        )
        return Collection(str(path), Description(None, None, None, digest), gaussian, None, None, None, (warning,))
    try:
        known: Mapping[str, Any] = stored.origin["network"] | {"split": stored.origin["reference_split"]}
        description = Description(**stored.origin["description"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: its origin is incomplete ({error}): compute the statistics again") from None
    wanted = _identity(network) | {"split": reference_split}
    if different := [
        f"{name}: {known.get(name)} there, {wanted[name]} here" for name in wanted if known.get(name) != wanted[name]
    ]:
        raise DataError(
            f"{path}: statistics of another protocol ({'; '.join(different)}). Compute them again with"
            " scripts/compute_fid_stats.py, or evaluate with what they were computed with"
        )
    return Collection(str(path), description, gaussian, stored.stats, None, None)


def _identity(network: FeatureNetwork) -> dict[str, Any]:
    return {"name": network.name, "sha256": network.sha256, "resize": network.resize, "resized_to": network.size}


def _digest_of(path: Path) -> str:
    if path.is_file():
        return file_sha256(path)
    return hashlib.sha256("".join(file_sha256(path / name) for name in ("m.npy", "s.npy")).encode()).hexdigest()
