"""Architecture and tensor names of the checkpoints of the 2019 SPADE / GauGAN release, and of CLADE, its fork.

The release keeps one network per file (``latest_net_{G,D,E}.pth``). Its options (``opt.txt``) are the hyper-parameters.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import MultiscaleDiscriminator
from imaginaire_spade.models.generator import ConvEncoder, SPADEGenerator

_BLOCKS = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]


class SPADERelease:
    """The release. Each method returns one part; parts that a config describes, as YAML would."""

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
