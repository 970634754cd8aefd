"""Architecture and tensor names of CLADE's checkpoints: the 2019 SPADE release's, with class-adaptive norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop import nvlabs_spade
from imaginaire_spade.interop.nvlabs_spade import discriminator, image_size, scope, style_dims
from imaginaire_spade.layout import LayoutSpec

__all__ = [
    "DEFAULTS", "discriminator", "encoder", "foreign_key", "generator", "image_size", "layout_spec", "scope",
    "style_dims",
]  # fmt: skip

DEFAULTS: dict[str, Any] = nvlabs_spade.DEFAULTS | {"norm_mode": "clade", "add_dist": False, "skip_ids": []}
"""``skip_ids`` is our addition: train ids that had no position in training (see ``CLADEICPE``)."""


def layout_spec(hyper: Mapping[str, Any]) -> LayoutSpec:
    return replace(nvlabs_spade.layout_spec(hyper), has_distances=hyper["add_dist"])


def generator(hyper: Mapping[str, Any]) -> dict[str, Any]:
    if hyper["norm_mode"] != "clade":
        raise CheckpointError(f"norm_mode {hyper['norm_mode']!r}: only clade is supported")
    tree = nvlabs_spade.generator(hyper)
    norm = {"type": "clade", "normalization": tree["norm"]["normalization"]}
    if hyper["add_dist"]:
        norm |= {"type": "clade_icpe", "skip_ids": hyper["skip_ids"]}
    return tree | {"norm": norm}


def encoder(hyper: Mapping[str, Any]) -> dict[str, Any]:
    raise CheckpointError("CLADE has no style encoder")


def foreign_key(network: nn.Module, key: str) -> str:
    """Return CLADE's name of one of our tensors."""
    name = nvlabs_spade.foreign_key(network, key)
    name = re.sub(r"\.(norm_[01s])\.(weight|bias)$", r".\1.class_specified_affine.\2", name)
    name = re.sub(r"\.(norm_[01s])\.scale_position\.", r".\1.class_specified_affine.dist_conv_w.", name)
    name = re.sub(r"\.(norm_[01s])\.shift_position\.", r".\1.class_specified_affine.dist_conv_b.", name)
    return re.sub(r"\.(norm_[01s])\.edge\.", r".\1.inst_conv.", name)
