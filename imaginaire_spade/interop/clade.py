"""Architecture and tensor names of CLADE's checkpoints: the 2019 SPADE release's, with class-adaptive norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop import nvlabs_spade
from imaginaire_spade.interop.nvlabs_spade import discriminator, image_size, layout_spec, scope, style_dims

__all__ = [
    "DEFAULTS", "discriminator", "encoder", "generator", "image_size", "layout_spec", "reference_key", "scope",
    "style_dims",
]  # fmt: skip

DEFAULTS: dict[str, Any] = nvlabs_spade.DEFAULTS | {"norm_mode": "clade", "add_dist": False}


def generator(hyper: Mapping[str, Any]) -> dict[str, Any]:
    if hyper["norm_mode"] != "clade" or hyper["add_dist"]:
        raise CheckpointError(
            f"norm_mode {hyper['norm_mode']!r}, add_dist {hyper['add_dist']}: clade without distances is known here"
        )
    tree = nvlabs_spade.generator(hyper)
    return tree | {"norm": {"type": "clade", "normalization": tree["norm"]["normalization"]}}


def encoder(hyper: Mapping[str, Any]) -> dict[str, Any]:
    raise CheckpointError("CLADE has no style encoder")


def reference_key(network: nn.Module, key: str) -> str:
    """CLADE's name of one of our tensors."""
    name = nvlabs_spade.reference_key(network, key)
    name = re.sub(r"\.(norm_[01s])\.(weight|bias)$", r".\1.class_specified_affine.\2", name)
    return re.sub(r"\.(norm_[01s])\.edge\.", r".\1.inst_conv.", name)
