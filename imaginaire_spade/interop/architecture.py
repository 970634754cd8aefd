"""Find the architecture of OASIS's networks in their tensors: its options leave out what the data set decides.

Tensors tell all but how the generator's input channels are divided into noise and labels. The label channels are
counted by the discriminator's scores, by what the user states, or by a label table of ours.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from imaginaire_spade.config import RunConfig
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop import describe, other_kind
from imaginaire_spade.interop.systems import check_types


def find_architecture(
    parts: Mapping[str, Mapping[str, Tensor]], stated: Mapping[str, Any], base: RunConfig | None
) -> tuple[dict[str, Any], list[str]]:
    """Return all hyper-parameters of OASIS's networks, and notes for the user.

    Args:
        parts: state dicts ``generator`` and, if there is one, ``discriminator``.
        stated: hyper-parameters from the user.
        base: a config of ours, such as the recipe of the data set.
    Raises:
        CheckpointError: the tensors are others, or contradict ``stated`` or ``base``, or too little is known.
    """
    check_types(stated)
    generator, discriminator = parts["generator"], parts.get("discriminator")
    for kind, state in (("generator", generator), ("discriminator", discriminator)):
        if state is not None and (wrong := other_kind(kind, state)):
            raise CheckpointError(wrong)
    try:
        hidden = generator["body.0.norm_0.mlp_gamma.weight"]  # [channels, hidden, k, k]
        inputs = generator["fc.weight"].shape[1]
        found: dict[str, Any] = {
            "channels_G": generator["conv_img.weight"].shape[1],
            "spade_hidden": hidden.shape[1],
            "spade_ks": hidden.shape[2],
            "no_spectral_norm": "body.0.conv_0.weight" in generator,
        }
        counts = {}
        if discriminator is not None:
            head = discriminator["layer_up_last.weight"]  # [1 + label channels, width, 1, 1]
            found["D_channels"] = [3, *(discriminator[f"body_down.{i}.conv2.1.bias"].shape[0] for i in range(6))]
            found["D_last_channels"], counts["--discriminator_weights"] = head.shape[1], head.shape[0] - 1
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"not the weights of OASIS's networks: they have no {error}") from None
    found |= _divide(inputs, counts | _stated_counts(stated, base), stated)
    notes = []
    if not any(".first_norm." in name for name in generator):
        found["param_free_norm"] = "instance"
        notes.append("no batch statistics in the file: its norms are taken for instance norms")
    if wrong_values := [
        f"{key}: {stated[key]} there, {value} by the tensors"
        for key, value in found.items()
        if stated.get(key, value) != value
    ]:
        raise CheckpointError(f"--architecture does not fit the weights: {'; '.join(wrong_values)}")
    return {**stated, **found}, notes


def _stated_counts(stated: Mapping[str, Any], base: RunConfig | None) -> dict[str, int]:
    """Count the label channels, by who says so."""
    counts = {}
    if base is not None:
        labels = base.data.labels
        if not labels.dont_care and stated.get("contain_dontcare_label", True):
            raise CheckpointError(
                "weights of OASIS have a don't-care channel, for id 0 of their label maps, and data.labels of --config"
                " has none (dont_care: false). Give a recipe of configs/projects/oasis/, or write dont_care: true,"
                " ignore: [0] and num_classes without it. (Weights that were trained without it: --architecture with"
                ' "contain_dontcare_label": false)'
            )
        counts["data.labels of --config"] = labels.num_classes + labels.dont_care
    if {"label_nc", "semantic_nc", "dataset_mode"} & stated.keys():
        counts["--architecture"] = describe("oasis", "layout_spec", stated).num_label_channels
    return counts


def _divide(inputs: int, counts: Mapping[str, int], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Divide the generator's ``inputs`` channels into noise and labels.

    Args:
        counts: label channels, by who says so.
    """
    if not counts:
        raise CheckpointError(
            f"the generator takes {inputs} channels of noise and labels together: give --config, a recipe such as"
            " configs/projects/oasis/ade20k/base256.yaml, or --discriminator_weights, or --architecture with"
            ' "dataset_mode" (ade20k, coco, cityscapes) or "label_nc"'
        )
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} by {where}" for where, count in counts.items())
        raise CheckpointError(f"the label channels (classes and don't care) are counted differently: {told}")
    (where, channels), *_ = counts.items()
    noise, usual = inputs - channels, describe("oasis", "generator", stated)["style_dims"]
    # A wrong label table would make its noise of what is left; the discriminator's count is no guess.
    is_certain = "--discriminator_weights" in counts and not {"z_dim", "no_3dnoise"} & stated.keys()
    if noise < 0 or (noise not in (0, usual) and not is_certain):
        raise CheckpointError(
            f"the generator takes {inputs} channels of noise and labels together; {channels} label channels by {where}"
            f" and {usual} of noise (z_dim) make {channels + usual}. Give the config of the data set that it was"
            ' trained on, or --architecture with "z_dim"'
        )
    dont_care = stated.get("contain_dontcare_label", True)
    return {"label_nc": channels - dont_care, "no_3dnoise": not noise} | ({"z_dim": noise} if noise else {})
