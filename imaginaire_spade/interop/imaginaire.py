"""Architecture and tensor names of imaginaire's SPADE checkpoints.

Each function of a part returns that part's tree as YAML would.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop.nvlabs_spade import split_key
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import FPSEDiscriminator
from imaginaire_spade.models.encoder import ConvEncoder
from imaginaire_spade.models.generator import StyleSPADEGenerator

DEFAULTS: dict[str, Any] = {}
"""None: imaginaire's options have no single set of defaults."""


def layout_spec(hyper: Mapping[str, Any]) -> LayoutSpec:
    if hyper["edge_channels"] > 1:
        raise CheckpointError(f"edge_channels {hyper['edge_channels']}: only one edge channel is supported")
    return LayoutSpec(
        hyper["num_seg_classes"], has_dont_care=hyper["use_dont_care"], has_edges=hyper["edge_channels"] > 0
    )


def image_size(hyper: Mapping[str, Any]) -> tuple[int, int]:
    """Return (height, width) of training; the generator is fully convolutional."""
    return hyper["out_image_small_side_size"], hyper["out_image_small_side_size"]


def generator(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the generator of options such as ``spade_kernel_size: 5``, ``separate_projection: true``."""
    _check(hyper, "generator", {
        "separate_projection": True, "kernel_size": 3, "weight_norm_type": "spectral", "skip_activation_norm": True,
    })  # fmt: skip
    if (size := hyper["out_image_small_side_size"]) not in (256, 512, 1024):
        raise CheckpointError(f"out_image_small_side_size: {size} must be 256, 512 or 1024")
    return {
        "type": "style_spade",
        "num_filters": hyper["num_filters"],
        "style_dims": hyper["style_dims"],
        "output_size": size,
        "positional_encoding": hyper["use_posenc_in_input_layer"],
        "output_multiplier": float(hyper["output_multiplier"]),
        "norm": {
            "type": "spade",
            "normalization": "instance" if hyper["activation_norm_type"] == "instance" else "batch",
            "affine": hyper["activation_norm_affine"],
            "hidden_channels": hyper["spade_hidden_filters"],
            "kernel_size": hyper["spade_kernel_size"],
            "spectral_norm": True,
        },
    }


def discriminator(hyper: Mapping[str, Any]) -> dict[str, Any]:
    _check(hyper, "discriminator", {
        "kernel_size": 4, "activation_norm_type": "none", "weight_norm_type": "spectral", "use_fpse": True,
        "fpse_kernel_size": 3, "fpse_activation_norm_type": "none",
    })  # fmt: skip
    names = ("num_discriminators", "num_layers", "num_filters", "max_num_filters")
    return {"type": "fpse"} | {name: hyper[name] for name in names}


def encoder(hyper: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "conv", "num_filters": hyper["style_enc_num_filters"], "normalization": "none"}


def style_dims(hyper: Mapping[str, Any]) -> int:
    return int(hyper["style_dims"])


def _check(hyper: Mapping[str, Any], what: str, known: Mapping[str, Any]) -> None:
    if other := [f"{key}: {hyper[key]}" for key, value in known.items() if hyper[key] != value]:
        raise CheckpointError(f"an imaginaire {what} with {', '.join(other)} is not supported")


def scope(network: nn.Module) -> str:
    """Return the prefix of the tensors of ``network`` in a checkpoint that holds several networks."""
    if isinstance(network, FPSEDiscriminator):
        return ""
    return "style_encoder." if isinstance(network, ConvEncoder) else "spade_generator."


def foreign_key(network: nn.Module, key: str) -> str:
    """Return imaginaire's name of one of our tensors."""
    owner, leaf = split_key(network, key)
    if isinstance(network, ConvEncoder):
        owner = re.sub(r"^layers\.(\d)$", lambda m: f"layer{int(m[1]) + 1}", owner)
        return f"{scope(network)}{owner}.layers.conv.{leaf}"
    if isinstance(network, FPSEDiscriminator):
        if matched := re.fullmatch(r"fpse\.(\w+?)(?:\.(\d))?", owner):
            first = {"enc": 1, "lat": 2, "final": 2}.get(matched[1], 0)
            number = "" if matched[2] is None else str(int(matched[2]) + first)
            return f"fpse_discriminator.{matched[1]}{number}.layers.conv.{leaf}"
        _, index, *place = owner.split(".")
        layers = network.discriminators[int(index)].layers
        layer = place[1] if place[0] == "layers" else len(layers)  # type: ignore[arg-type]
        return f"discriminators.{index}.layer{layer}.0.layers.conv.{leaf}"
    if not isinstance(network, StyleSPADEGenerator):
        raise CheckpointError(f"a {type(network).__name__} has no counterpart in imaginaire's SPADE")
    owner = re.sub(r"^to_image(?:_(\d+))?$", lambda m: f"conv_img{m[1] or 256}", owner)
    if owner.startswith("cbn_"):
        block, _, inner = owner.partition(".")
        names = {"conv": "conv", "norm.normalize": "norm.norm", "norm.gamma": "norm.fc_gamma.layers.conv",
                 "norm.beta": "norm.fc_beta.layers.conv"}  # fmt: skip
        return f"{scope(network)}{block}.layers.{names[inner]}.{leaf}"
    if matched := re.fullmatch(r"(\w+)\.(conv|norm)_([01s])(?:\.(\w+))?", owner):
        parts = {"normalize": "norm.norm", "shared": "norm.mlps.0.0.layers.conv", "gamma": "norm.gammas.0.layers.conv",
                 "beta": "norm.betas.0.layers.conv", None: "conv"}  # fmt: skip
        return f"{scope(network)}{matched[1]}.conv_block_{matched[3]}.layers.{parts[matched[4]]}.{leaf}"
    return f"{scope(network)}{owner}.layers.conv.{leaf}"
