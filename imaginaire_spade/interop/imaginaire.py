"""Architecture and tensor names of imaginaire's SPADE checkpoints, which hold several networks in a file."""

from collections.abc import Mapping
from typing import Any

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import FPSEDiscriminator
from imaginaire_spade.models.generator import ConvEncoder, StyleSPADEGenerator


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
