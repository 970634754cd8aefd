"""Architecture and tensor names of CLADE's checkpoints: the 2019 SPADE release's, with class-adaptive norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop import nvlabs_spade
from imaginaire_spade.interop.nvlabs_spade import discriminator, layout_spec, scope
from imaginaire_spade.models.generator import SPADEGenerator
from imaginaire_spade.models.norms import CLADE

__all__ = ["discriminator", "encoder", "generator", "layout_spec", "reference_key", "scope"]


def generator(hyper: Mapping[str, Any]) -> SPADEGenerator:
    if hyper["norm_mode"] != "clade" or hyper["add_dist"]:
        raise CheckpointError(
            f"norm_mode {hyper['norm_mode']!r}, add_dist {hyper['add_dist']}: clade without distances is known here"
        )
    # Options that matter for a style code only may be left out.
    return nvlabs_spade.generator({"z_dim": 256, "aspect_ratio": 1.0, **hyper}, norm=CLADE)


def encoder(hyper: Mapping[str, Any]) -> nn.Module:
    raise CheckpointError("CLADE has no style encoder")


def reference_key(network: nn.Module, key: str) -> str:
    """CLADE's name of one of our tensors."""
    name = nvlabs_spade.reference_key(network, key)
    name = re.sub(r"\.(norm_[01s])\.(weight|bias)$", r".\1.class_specified_affine.\2", name)
    return re.sub(r"\.(norm_[01s])\.edge\.", r".\1.inst_conv.", name)
