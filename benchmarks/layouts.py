"""Label maps to measure with: real ones where there are some, else drawn scenes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.data.image_files import decode_instances, decode_label
from imaginaire_spade.labels import edges_from_ids
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.scenes import draw_scene

SPEC = LayoutSpec(182, has_dont_care=True, has_edges=True)
"""COCO-Stuff's 184 channels."""


def default_folder() -> Path | None:
    """Label maps of COCO-Stuff beside the repository (``IMAGINAIRE_SPADE_SHARED``), if they are there."""
    shared = Path(os.environ.get("IMAGINAIRE_SPADE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    folder = shared / "data" / "cocostuff" / "train" / "seg_maps"
    return folder if folder.is_dir() else None


def make_layout(
    folder: Path | None, count: int, height: int, width: int, with_distances: bool = False
) -> SemanticLayout:
    """``count`` label maps [height, width]: from ``folder`` (8-bit ids, 255 = don't care), or drawn.

    Edges are those of the instance maps beside ``folder`` where there are some, else those of the label maps.
    """
    files = sorted(folder.glob("*.png")) if folder is not None else []
    labels, edges = [], []
    for index in range(count):
        if files:
            file = files[index % len(files)]
            ids = decode_label(file.read_bytes(), file.name).astype(np.uint8)
            instances = file.parents[1] / "inst_maps" / file.name
            objects = decode_instances(instances.read_bytes(), instances.name) if instances.is_file() else ids
        else:
            scene = draw_scene(index, 0, height, width)
            ids, objects = scene.labels, scene.instances.astype(np.int32)
        labels.append(np.minimum(resized(ids, height, width), SPEC.num_classes))
        edges.append(edges_from_ids(resized(objects, height, width)))
    distances = torch.from_numpy(np.stack([class_distances(ids) for ids in labels])) if with_distances else None
    return SemanticLayout(
        replace(SPEC, has_distances=with_distances),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(edges)),
        distances,
    )


def resized(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an id map to [height, width]: nearest."""
    rows = (2 * np.arange(height) + 1) * ids.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * ids.shape[1] // (2 * width)
    return ids[rows][:, columns]


def fresh(layout: SemanticLayout) -> SemanticLayout:
    """The same label maps, nothing cached: what a layer derives from them is part of what is measured."""
    return layout[:]


def dense(layout: SemanticLayout) -> SemanticLayout:
    """The same label maps as a one-hot tensor, which takes the plain dense path everywhere."""
    return SemanticLayout.from_dense(layout.spec, fresh(layout).one_hot(), layout.distances)
