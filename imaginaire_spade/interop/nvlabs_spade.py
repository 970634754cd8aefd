"""Architecture and tensor names of the 2019 SPADE / GauGAN release's checkpoints (``latest_net_{G,D,E}.pth``).

Its options (``opt.txt``) are the hyper-parameters. Each function of a part returns that part's tree as YAML would.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import MultiscaleDiscriminator
from imaginaire_spade.models.encoder import ConvEncoder
from imaginaire_spade.models.generator import SPADEGenerator
from imaginaire_spade.models.layers import SpectralNorm

DEFAULTS: dict[str, Any] = {
    "contain_dontcare_label": False, "no_instance": False, "crop_size": 256, "aspect_ratio": 1.0,
    "ngf": 64, "norm_G": "spectralspadesyncbatch3x3", "num_upsampling_layers": "normal", "use_vae": False, "z_dim": 256,
    "ndf": 64, "norm_D": "spectralinstance", "num_D": 2, "n_layers_D": 4, "norm_E": "spectralinstance",
}  # fmt: skip
"""The release's defaults, for options that an architecture leaves out."""


def layout_spec(hyper: Mapping[str, Any]) -> LayoutSpec:
    return LayoutSpec(
        hyper["label_nc"], has_dont_care=hyper["contain_dontcare_label"], has_edges=not hyper["no_instance"]
    )


def image_size(hyper: Mapping[str, Any]) -> tuple[int, int]:
    """Return (height, width): the width is ``crop_size``, both are rounded to the generator's multiple."""
    multiple = 2 ** {"normal": 5, "more": 6, "most": 7}[hyper["num_upsampling_layers"]]
    width = max(1, hyper["crop_size"] // multiple)
    return max(1, round(width / hyper["aspect_ratio"])) * multiple, width * multiple


def generator(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the generator of options such as ``norm_G: spectralspadesyncbatch3x3``."""
    matched = re.fullmatch(r"(spectral)?spade(syncbatch|batch|instance)(\d)x\3", hyper["norm_G"])
    if matched is None:
        raise CheckpointError(f"norm_G {hyper['norm_G']!r}: expected such as spectralspadesyncbatch3x3")
    return {
        "type": "spade",
        "num_filters": hyper["ngf"],
        "style_dims": hyper["z_dim"] if hyper["use_vae"] else 0,
        "upsampling": hyper["num_upsampling_layers"],
        "spectral_norm": matched[1] is not None,
        "norm": {
            "type": "spade",
            "normalization": "instance" if matched[2] == "instance" else "batch",
            "hidden_channels": 128,
            "kernel_size": int(matched[3]),
        },
    }


def discriminator(hyper: Mapping[str, Any]) -> dict[str, Any]:
    matched = re.fullmatch(r"(spectral)?(instance|none)?", hyper["norm_D"])
    if matched is None:
        raise CheckpointError(f"norm_D {hyper['norm_D']!r}: expected such as spectralinstance")
    return {
        "type": "multiscale_patch",
        "num_discriminators": hyper["num_D"],
        "num_layers": hyper["n_layers_D"],
        "num_filters": hyper["ndf"],
        "normalization": "instance" if matched[2] == "instance" else "none",
        "spectral_norm": matched[1] is not None,
    }


def encoder(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the encoder: its width is the generator's ``ngf``, its images are always 256x256."""
    if hyper["norm_E"] != "spectralinstance":
        raise CheckpointError(f"norm_E {hyper['norm_E']!r}: only spectralinstance is supported")
    return {"type": "conv", "num_filters": hyper["ngf"], "image_size": 256, "normalization": "instance"}


def style_dims(hyper: Mapping[str, Any]) -> int:
    return int(hyper["z_dim"])


def scope(network: nn.Module) -> str:
    """Return the prefix of a network's tensors: none, since the release keeps one network per file."""
    return ""


_BLOCKS = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]


def split_key(network: nn.Module, key: str) -> tuple[str, str]:
    """Split a state-dict key into module and tensor; a weight before its spectral norm gets torch's name for it."""
    owner, _, leaf = key.rpartition(".")
    is_spectral = leaf == "weight" and isinstance(network.get_submodule(owner), SpectralNorm)
    return owner, "weight_orig" if is_spectral else leaf


def foreign_key(network: nn.Module, key: str) -> str:
    """Return the release's name of one of our tensors."""
    owner, leaf = split_key(network, key)
    name = f"{owner}.{leaf}"
    if isinstance(network, SPADEGenerator):
        name = re.sub(r"^blocks\.(\d)\.", lambda m: f"{_BLOCKS[int(m[1])]}.", name)
        for ours, theirs in (
            ("to_image.", "conv_img."),
            (".normalize.", ".param_free_norm."),
            (".shared.", ".mlp_shared.0."),
            (".gamma.", ".mlp_gamma."),
            (".beta.", ".mlp_beta."),
        ):
            name = name.replace(ours, theirs)
        return name
    if isinstance(network, ConvEncoder):
        return re.sub(r"^layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.0.", name)
    if not isinstance(network, MultiscaleDiscriminator):
        raise CheckpointError(f"a {type(network).__name__} has no counterpart in the 2019 SPADE release")
    last = len(network.discriminators[0].layers)  # type: ignore[arg-type]
    name = re.sub(r"^discriminators\.(\d+)\.", r"discriminator_\1.", name)
    name = name.replace(".to_logits.", f".model{last}.0.")
    # The first layer is convolution and activation; the others have (convolution, norm) as their first member.
    name = re.sub(r"\.layers\.0\.0\.", ".model0.0.", name)
    return re.sub(r"\.layers\.(\d+)\.0\.", r".model\1.0.0.", name)
