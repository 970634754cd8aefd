"""Architecture and tensor names of other systems' checkpoints: a class for each system.

The 2019 SPADE / GauGAN release, and CLADE, its fork, keep one network per file (``latest_net_{G,D,E}.pth``); their
options (``opt.txt``) are the hyper-parameters. Imaginaire's files hold several networks.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from imaginaire_spade.cli import SOURCES
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import FPSEDiscriminator, MultiscaleDiscriminator
from imaginaire_spade.models.generator import ConvEncoder, SPADEGenerator, StyleSPADEGenerator

_BLOCKS = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]


class SPADERelease:
    """The 2019 SPADE release. Each method returns one part; parts that a config describes, as YAML would."""

    defaults: dict[str, Any] = {
        "contain_dontcare_label": False, "no_instance": False, "crop_size": 256, "aspect_ratio": 1.0, "ngf": 64,
        "norm_G": "spectralspadesyncbatch3x3", "num_upsampling_layers": "normal", "use_vae": False, "z_dim": 256,
        "ndf": 64, "norm_D": "spectralinstance", "num_D": 2, "n_layers_D": 4, "norm_E": "spectralinstance",
    }  # fmt: skip
    """The release's defaults, for options that an architecture leaves out."""

    names = {
        SPADEGenerator: ("", (
            (r"^blocks\.(\d)", lambda m: _BLOCKS[int(m[1])]),
            (r"^to_image$", "conv_img"),
            (r"\.normalize$", ".param_free_norm"),
            (r"\.shared$", ".mlp_shared.0"),
            (r"\.(gamma|beta)$", r".mlp_\1"),
        )),
        ConvEncoder: ("", ((r"^layers\.(\d)$", lambda m: f"layer{int(m[1]) + 1}.0"),)),
        MultiscaleDiscriminator: ("", (
            (r"^discriminators\.", "discriminator_"),
            # The first layer is convolution and activation; those between have (convolution, norm) as first member.
            (r"\.layers\.(0)\.0$", r".model\1.0"),
            (r"\.layers\.(\d+)\.0$", r".model\1.0.0"),
            (r"\.layers\.(\d+)$", r".model\1.0"),
        )),
    }  # fmt: skip
    """See ``interop.Names``."""

    def layout_spec(self, hyper: Mapping[str, Any]) -> LayoutSpec:
        return LayoutSpec(
            hyper["label_nc"], has_dont_care=hyper["contain_dontcare_label"], has_edges=not hyper["no_instance"]
        )

    def image_size(self, hyper: Mapping[str, Any]) -> tuple[int, int]:
        """Return (height, width): the width is ``crop_size``, both are rounded to the generator's multiple."""
        multiple = 2 ** {"normal": 5, "more": 6, "most": 7}[hyper["num_upsampling_layers"]]
        width = max(1, hyper["crop_size"] // multiple)
        return max(1, round(width / hyper["aspect_ratio"])) * multiple, width * multiple

    def generator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the generator of options such as ``norm_G: spectralspadesyncbatch3x3``."""
        matched = re.fullmatch(r"(spectral)?spade(syncbatch|batch|instance)(\d)x\3", hyper["norm_G"])
        if matched is None:
            raise CheckpointError(f"norm_G {hyper['norm_G']!r}: expected such as spectralspadesyncbatch3x3")
        return {
            "type": "spade", "num_filters": hyper["ngf"], "style_dims": hyper["z_dim"] if hyper["use_vae"] else 0,
            "upsampling": hyper["num_upsampling_layers"], "spectral_norm": matched[1] is not None,
            "norm": {"type": "spade", "normalization": "instance" if matched[2] == "instance" else "batch",
                     "hidden_channels": 128, "kernel_size": int(matched[3])},
        }  # fmt: skip

    def discriminator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
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

    def encoder(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the encoder: its width is the generator's ``ngf``, its images are always 256x256."""
        if hyper["norm_E"] != "spectralinstance":
            raise CheckpointError(f"norm_E {hyper['norm_E']!r}: only spectralinstance is supported")
        return {"type": "conv", "num_filters": hyper["ngf"], "image_size": 256, "normalization": "instance"}

    def style_dims(self, hyper: Mapping[str, Any]) -> int:
        return int(hyper["z_dim"])


class CLADE(SPADERelease):
    """CLADE: the release with class-adaptive norms and without style encoder."""

    defaults = SPADERelease.defaults | {"norm_mode": "clade", "add_dist": False, "skip_ids": []}
    """``skip_ids`` is our addition: train ids that had no position in training (see ``CLADEICPE``)."""

    names = SPADERelease.names | {SPADEGenerator: ("", (
        *SPADERelease.names[SPADEGenerator][1],
        (r"\.(norm_[01s])$", r".\1.class_specified_affine"),
        (r"\.scale_position$", ".class_specified_affine.dist_conv_w"),
        (r"\.shift_position$", ".class_specified_affine.dist_conv_b"),
        (r"\.edge$", ".inst_conv"),
    ))}  # fmt: skip

    def layout_spec(self, hyper: Mapping[str, Any]) -> LayoutSpec:
        return replace(super().layout_spec(hyper), has_distances=hyper["add_dist"])

    def generator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        if hyper["norm_mode"] != "clade":
            raise CheckpointError(f"norm_mode {hyper['norm_mode']!r}: only clade is supported")
        tree = super().generator(hyper)
        norm = {"type": "clade", "normalization": tree["norm"]["normalization"]}
        if hyper["add_dist"]:
            norm |= {"type": "clade_icpe", "skip_ids": hyper["skip_ids"]}
        return tree | {"norm": norm}

    def encoder(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        raise CheckpointError("CLADE has no style encoder")


class Imaginaire:
    """Imaginaire. Each method returns one part; parts that a config describes, as YAML would."""

    defaults: dict[str, Any] = {}
    """None: imaginaire's options have no single set of defaults."""

    names = {
        StyleSPADEGenerator: ("spade_generator.", (
            (r"^to_image$", "conv_img256"),
            (r"^to_image_", "conv_img"),
            (r"\.(conv|norm)_([01s])", r".conv_block_\2.layers.\1"),
            (r"^(cbn_\w+)\.", r"\1.layers."),
            (r"norm\.normalize$", "norm.norm"),
            (r"^(cbn_.*norm)\.(gamma|beta)$", r"\1.fc_\2.layers.conv"),
            (r"norm\.shared$", "norm.mlps.0.0.layers.conv"),
            (r"norm\.(gamma|beta)$", r"norm.\1s.0.layers.conv"),
            (r"^(\w+)$", r"\1.layers.conv"),
        )),
        ConvEncoder: ("style_encoder.", (
            (r"^layers\.(\d)$", lambda m: f"layer{int(m[1]) + 1}"),
            (r"$", ".layers.conv"),
        )),
        FPSEDiscriminator: ("", (
            (r"^fpse\.enc\.(\d)$", lambda m: f"fpse.enc{int(m[1]) + 1}"),
            (r"^fpse\.(lat|final)\.(\d)$", lambda m: f"fpse.{m[1]}{int(m[2]) + 2}"),
            (r"^fpse\.", "fpse_discriminator."),
            (r"\.layers\.(\d+)$", r".layer\1.0"),
            (r"$", ".layers.conv"),
        )),
    }  # fmt: skip
    """See ``interop.Names``."""

    def layout_spec(self, hyper: Mapping[str, Any]) -> LayoutSpec:
        if hyper["edge_channels"] > 1:
            raise CheckpointError(f"edge_channels {hyper['edge_channels']}: only one edge channel is supported")
        return LayoutSpec(
            hyper["num_seg_classes"], has_dont_care=hyper["use_dont_care"], has_edges=hyper["edge_channels"] > 0
        )

    def image_size(self, hyper: Mapping[str, Any]) -> tuple[int, int]:
        """Return (height, width) of training; the generator is fully convolutional."""
        return hyper["out_image_small_side_size"], hyper["out_image_small_side_size"]

    def generator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the generator of options such as ``spade_kernel_size: 5``, ``separate_projection: true``."""
        _check(hyper, "generator", {
            "separate_projection": True, "kernel_size": 3, "weight_norm_type": "spectral", "skip_activation_norm": True,
        })  # fmt: skip
        if (size := hyper["out_image_small_side_size"]) not in (256, 512, 1024):
            raise CheckpointError(f"out_image_small_side_size: {size} must be 256, 512 or 1024")
        return {
            "type": "style_spade", "num_filters": hyper["num_filters"], "style_dims": hyper["style_dims"],
            "output_size": size, "positional_encoding": hyper["use_posenc_in_input_layer"],
            "output_multiplier": float(hyper["output_multiplier"]), "norm": {
                "type": "spade", "affine": hyper["activation_norm_affine"], "spectral_norm": True,
                "normalization": "instance" if hyper["activation_norm_type"] == "instance" else "batch",
                "hidden_channels": hyper["spade_hidden_filters"], "kernel_size": hyper["spade_kernel_size"]},
        }  # fmt: skip

    def discriminator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        _check(hyper, "discriminator", {
            "kernel_size": 4, "activation_norm_type": "none", "weight_norm_type": "spectral", "use_fpse": True,
            "fpse_kernel_size": 3, "fpse_activation_norm_type": "none",
        })  # fmt: skip
        names = ("num_discriminators", "num_layers", "num_filters", "max_num_filters")
        return {"type": "fpse"} | {name: hyper[name] for name in names}

    def encoder(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "conv", "num_filters": hyper["style_enc_num_filters"], "normalization": "none"}

    def style_dims(self, hyper: Mapping[str, Any]) -> int:
        return int(hyper["style_dims"])


def _check(hyper: Mapping[str, Any], what: str, known: Mapping[str, Any]) -> None:
    if other := [f"{key}: {hyper[key]}" for key, value in known.items() if hyper[key] != value]:
        raise CheckpointError(f"an imaginaire {what} with {', '.join(other)} is not supported")


SYSTEMS: dict[str, Any] = dict(zip(SOURCES, (SPADERelease(), CLADE(), Imaginaire()), strict=True))
