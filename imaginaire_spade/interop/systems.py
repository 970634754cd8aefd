"""Architecture and tensor names of other systems' checkpoints: a class for each system.

The 2019 SPADE / GauGAN release, and CLADE, its fork, keep one network per file (``latest_net_{G,D,E}.pth``); their
options (``opt.txt``) are the hyper-parameters. Imaginaire's files hold several networks. OASIS keeps one network per
file (``best_{G,D,EMA}.pth``), and options that leave out what the data set decides.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from imaginaire_spade.cli import SOURCES
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import FPSEDiscriminator, MultiscaleDiscriminator
from imaginaire_spade.models.generator import ConvEncoder, SPADEGenerator, StyleSPADEGenerator
from imaginaire_spade.models.oasis import OASISGenerator
from imaginaire_spade.models.unet import OASISDiscriminator

_BLOCKS = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]


class System:
    """What is alike in all of them but one."""

    discriminator_type: str
    """Of ours, for weights without any of a discriminator."""
    losses: Mapping[str, Any] = {"gan": 1.0, "feature_matching": 10.0, "perceptual": 10.0}
    adam_beta2 = 0.9
    average_form: Literal["folded", "state"] = "folded"
    """What its average is an average of, as in ``trainer.model_average.form``."""

    def arrange(self, name: str, tensor: Tensor, spec: LayoutSpec, *, back: bool = False) -> Tensor:
        """Put the label channels of a tensor of theirs into our order, or ``back``."""
        return tensor


class SPADERelease(System):
    """The 2019 SPADE release. Each method returns one part; parts that a config describes, as YAML would."""

    discriminator_type = "multiscale_patch"
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


class Imaginaire(System):
    """Imaginaire. Each method returns one part; parts that a config describes, as YAML would."""

    discriminator_type = "fpse"
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


DATA_SETS: dict[str, dict[str, Any]] = {
    "ade20k": {"label_nc": 150, "crop_size": 256, "aspect_ratio": 1.0},
    "coco": {"label_nc": 182, "crop_size": 256, "aspect_ratio": 1.0},
    "cityscapes": {"label_nc": 34, "crop_size": 512, "aspect_ratio": 2.0},
}
"""``dataset_mode`` of OASIS -> the options that it sets, which its opt.txt lacks."""


class OASIS(System):
    """OASIS. Each method returns one part; parts that a config describes, as YAML would.

    Don't care is id 0 of its label maps and the first label channel of its networks; here it is the last.
    """

    discriminator_type = "oasis_unet"
    losses = {"segmentation_gan": 1.0}
    adam_beta2 = 0.999
    average_form = "state"
    defaults: dict[str, Any] = {
        "channels_G": 64, "spade_ks": 3, "spade_hidden": 128, "no_3dnoise": False,
        "z_dim": 64, "num_res_blocks": 6, "param_free_norm": "syncbatch", "no_spectral_norm": False,
        "D_channels": [3, 128, 128, 256, 256, 512, 512], "D_last_channels": 64,
    }  # fmt: skip
    """The release's defaults. ``spade_hidden``, ``D_channels`` and ``D_last_channels`` are constants there."""

    names = {
        OASISGenerator: ("", (
            (r"^blocks\.", "body."),
            (r"^to_image$", "conv_img"),
            (r"\.normalize$", ".first_norm"),
            (r"\.shared$", ".mlp_shared.0"),
            (r"\.(gamma|beta)$", r".mlp_\1"),
        )),
        OASISDiscriminator: ("", (
            # Activation and up-sampling are counted: the first block has neither before its convolution.
            (r"^encoder\.blocks\.0\.conv_1$", "body_down.0.conv1.0"),
            (r"^encoder\.blocks\.(\d)\.conv_1$", r"body_down.\1.conv1.1"),
            (r"^decoder\.blocks\.(\d)\.conv_1$", r"body_up.\1.conv1.2"),
            (r"^encoder\.blocks", "body_down"),
            (r"^decoder\.blocks", "body_up"),
            (r"\.conv_2$", ".conv2.1"),
            (r"^to_logits$", "layer_up_last"),
        )),
    }  # fmt: skip
    """See ``interop.Names``."""

    def layout_spec(self, hyper: Mapping[str, Any]) -> LayoutSpec:
        hyper = _of_data_set(hyper)
        has_classes = "label_nc" in hyper
        dont_care = hyper.get("contain_dontcare_label", has_classes)  # semantic_nc alone counts channels, in any order
        return LayoutSpec(hyper["label_nc"] if has_classes else hyper["semantic_nc"] - dont_care, dont_care)

    def image_size(self, hyper: Mapping[str, Any]) -> tuple[int, int]:
        """Return (height, width), as the release rounds them."""
        hyper = {"crop_size": 256, "aspect_ratio": 1.0} | _of_data_set(hyper)
        width = max(1, hyper["crop_size"] // 32)
        return max(1, round(width / hyper["aspect_ratio"])) * 32, width * 32

    def generator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        if hyper["num_res_blocks"] != 6:
            raise CheckpointError(f"num_res_blocks {hyper['num_res_blocks']}: only 6 is supported, there as here")
        if hyper["param_free_norm"] not in ("syncbatch", "batch", "instance"):
            raise CheckpointError(f"param_free_norm {hyper['param_free_norm']!r}: expected such as syncbatch")
        return {
            "type": "oasis", "num_filters": hyper["channels_G"], "spectral_norm": not hyper["no_spectral_norm"],
            "style_dims": 0 if hyper["no_3dnoise"] else hyper["z_dim"],
            "norm": {"type": "spade", "hidden_channels": hyper["spade_hidden"], "kernel_size": hyper["spade_ks"],
                     "normalization": "instance" if hyper["param_free_norm"] == "instance" else "batch"},
        }  # fmt: skip

    def discriminator(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        images, first, _, middle, _, last, _ = widths = list(hyper["D_channels"])
        if widths != [images, first, first, middle, middle, last, last]:
            raise CheckpointError(
                f"D_channels {widths}: expected pairs of equal widths, such as 3, 8, 8, 16, 16, 32, 32"
            )
        return {
            "type": "oasis_unet", "num_filters": first, "middle_num_filters": middle, "max_num_filters": last,
            "last_num_filters": hyper["D_last_channels"], "spectral_norm": not hyper["no_spectral_norm"],
        }  # fmt: skip

    def encoder(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        raise CheckpointError("OASIS has no style encoder")

    def arrange(self, name: str, tensor: Tensor, spec: LayoutSpec, *, back: bool = False) -> Tensor:
        """Move don't care from the first label channel, behind noise or "generated", to the last; or ``back``."""
        axis = 0 if name.startswith("layer_up_last.") else 1
        if not spec.has_dont_care or not (axis == 0 or name.endswith(("fc.weight", "mlp_shared.0.weight"))):
            return tensor
        before, labels = tensor.tensor_split([tensor.shape[axis] - spec.num_label_channels], axis)
        return torch.cat([before, labels.roll(1 if back else -1, axis)], axis)


_TYPES = {"label_nc": int, "semantic_nc": int, "contain_dontcare_label": bool, "z_dim": int, "no_3dnoise": bool}


def check_types(hyper: Mapping[str, Any]) -> None:
    """Raise CheckpointError if one of OASIS's options that channels are counted with has a value of a wrong type."""
    for name, kind in _TYPES.items():
        if type(value := hyper.get(name, kind())) is not kind:
            wanted = "true or false" if kind is bool else "a whole number"
            raise CheckpointError(
                f"the architecture has a value of a wrong type for oasis: {name}: {value!r}, not {wanted}"
            )


def _of_data_set(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Add what ``dataset_mode`` sets."""
    check_types(hyper)
    mode = hyper.get("dataset_mode")
    known = DATA_SETS.get(mode, {}) if isinstance(mode, str) else {}
    if not known and not {"label_nc", "semantic_nc"} & hyper.keys():
        raise CheckpointError(
            f"dataset_mode {mode!r}: {', '.join(DATA_SETS)} are known; for your own data set add"
            " label_nc, the number of classes without don't care"
        )
    return known | dict(hyper)


SYSTEMS: dict[str, Any] = dict(zip(SOURCES, (SPADERelease(), CLADE(), Imaginaire(), OASIS()), strict=True))
