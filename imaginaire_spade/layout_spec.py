"""LayoutSpec: which channels the layouts of a data set have. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import dataclass

from imaginaire_spade.labels import EdgeSource, LabelSpec


@dataclass(frozen=True)
class LayoutSpec:
    """What a layout consists of, and so what a network takes."""

    num_classes: int
    """Classes, don't-care not counted."""
    has_dont_care: bool = False
    """Whether id ``num_classes`` has a channel of its own."""
    has_edges: bool = False
    """Whether an edge channel follows."""
    has_distances: bool = False
    """Whether offsets from the centres of the classes' regions are there (CLADE-ICPE)."""
    num_conditions: int = 0
    """Channels of dense conditions (depth, normals), which come last."""
    num_noise_channels: int = 0
    """Channels of noise, which come first. A generator that takes noise adds them; data have none."""

    @classmethod
    def of(cls, labels: LabelSpec, edges: EdgeSource, distances: bool, num_conditions: int = 0) -> LayoutSpec:
        """Describe the layouts of a data set.

        Args:
            labels, edges: as in ``data`` of a config.
            distances: whether its samples have distances.
            num_conditions: channels of all its ``data.conditions``.
        """
        return cls(labels.num_classes, labels.dont_care, edges != EdgeSource.NONE, distances, num_conditions)

    @property
    def num_label_channels(self) -> int:
        """Count the channels of classes and don't-care."""
        return self.num_classes + self.has_dont_care

    @property
    def num_channels(self) -> int:
        """Count the channels of the one-hot view: noise, classes, don't-care, edges, conditions."""
        return self.num_label_channels + self.num_dense_channels

    @property
    def num_dense_channels(self) -> int:
        """Count the channels that are no labels: noise, edges, conditions."""
        return self.num_noise_channels + self.has_edges + self.num_conditions
