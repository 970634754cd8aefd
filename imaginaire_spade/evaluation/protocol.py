"""Describe the evaluation protocol: everything that two scores must share to be comparable.

One model was reported with an FID of 71.8, 63, 57.6, 51.98 and 50.38 on one data set, because nobody could see this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.errors import DataError

REFERENCE_SPLITS = ("train", "val")
DTYPE = "uint8 pictures, float32 features, float64 statistics"


@dataclass(frozen=True)
class Protocol:
    """How scores were obtained. None: does not apply to what was measured (or, for the reference, is not known)."""

    version: str
    """Of imaginaire_spade."""
    reference_split: str
    """train or val."""
    reference: str
    """sha256 of the real images' keys, or of the file of statistics."""
    num_real: int | None
    num_fake: int
    real_size: str | None
    """HEIGHTxWIDTH, or how many sizes."""
    fake_size: str
    real_format: str | None
    fake_format: str
    geometry: str | None = None
    """How label maps (and photos of the same data) were cut and resized; None for stored images."""
    feature_network: str | None = None
    weights_sha256: str | None = None
    feature_dim: int | None = None
    resize: str | None = None
    """legacy (pytorch-fid's bilinear) or clean (antialiased bicubic)."""
    resized_to: int | None = None
    dtype: str = DTYPE
    kid: str | None = None
    precision_recall: str | None = None
    diversity: str | None = None
    segmentation: str | None = None
    """Network or folder of id maps, with the sha256 of what it is."""
    ignore: str | None = None
    """What segmentation scores leave out."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: str) -> Protocol:
        """Read a stamp.

        Raises:
            DataError: it has other fields.
        """
        names = {field.name for field in fields(cls)}
        if set(tree) != names:
            different = ", ".join(sorted(names ^ set(tree)))
            raise DataError(
                f"{where}: its protocol differs in what it states ({different}): written by another version"
            )
        return cls(**tree)

    def lines(self) -> list[str]:
        """Return ``name: value`` of what applies, for the screen."""
        return [f"{name}: {value}" for name, value in asdict(self).items() if value is not None]


def geometry_stamp(augmentations: AugmentationConfig) -> str:
    """Write an augmentation in one line: its keys, as JSON, other than the defaults."""
    changed = augmentations.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(changed) if changed else "own sizes"


def differences(a: Protocol, b: Protocol) -> list[str]:
    """List what differs, one line each; what only one of the two measured is no difference."""
    optional = ("geometry", "kid", "precision_recall", "diversity", "segmentation", "ignore")
    features = ("feature_network", "weights_sha256", "feature_dim", "resize", "resized_to")
    ours, theirs = asdict(a), asdict(b)
    skipped = {name for name in optional if ours[name] is None or theirs[name] is None}
    if a.feature_network is None or b.feature_network is None:
        skipped |= set(features)
    return [f"{n}: {ours[n]} / {theirs[n]}" for n in ours if n not in skipped and ours[n] != theirs[n]]
