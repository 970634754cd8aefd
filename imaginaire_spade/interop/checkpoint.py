"""Convert checkpoint files of other systems to ours, and back.

Responsible for how to read foreign files without running code in them, how to find the networks inside, and the content
of the files that ``scripts/import_checkpoint.py`` and ``scripts/export_checkpoint.py`` write.
"""

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imaginaire_spade.build import build_discriminator, build_encoder, build_generator, layout_spec
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_diff import explain_old_import
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.errors import CheckpointError, first_line
from imaginaire_spade.interop import describe, describe_networks, foreign_names, load_foreign
from imaginaire_spade.interop.label_tables import (
    LabelOrder,
    adapt_config,
    encoder_of_ours,
    exported_channels,
    label_table,
)
from imaginaire_spade.interop.systems import SYSTEMS
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.models.spectral_norm import SpectralNorm, fold_spectral_norm
from imaginaire_spade.training.checkpoint import FORMAT, check_tensors
from imaginaire_spade.training.state import new_average

State = dict[str, Tensor]


def read_weights(path: Path, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint file, on the CPU. Nothing in the file is executed unless ``trust``.

    Args:
        path: a file that torch.save wrote, or a .safetensors file.
        trust: unpickle everything if the file holds more than tensors and plain types.
    Raises:
        CheckpointError: the file is absent or damaged, or holds objects that only ``trust`` would load.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if trust and isinstance(error, pickle.UnpicklingError):
            content = _unpickle(path)
        elif isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            named = str(error).partition("GLOBAL ")[2].split()[0]
            raise CheckpointError(
                f"{path}: holds more than tensors and plain types ({named}); nothing of it was executed. If you know"
                " where it comes from, --trust unpickles it, which runs whatever code is in it"
            ) from None
        else:
            raise CheckpointError(f"{path}: damaged, or no checkpoint ({first_line(error)})") from None
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not named tensors")
    if content.get("format") == FORMAT:
        raise CheckpointError(f"{path}: is a checkpoint of this package already; use it as it is")
    return dict(content)


def _unpickle(path: Path) -> Any:
    print(f"warning: {path} is unpickled without restriction (--trust)", file=sys.stderr, flush=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code may raise anything
        raise CheckpointError(f"{path}: cannot be unpickled ({first_line(error)})") from None


def networks_in(content: Mapping[str, Any], path: Path) -> dict[str, State]:
    """Split another system's file into state dicts by part: ``generator``, ``generator_ema``, ``discriminator``.

    A file of imaginaire holds ``net_G`` (the network and its EMA, both with the style encoder) and ``net_D``. A file of
    the other systems is one network's state dict, returned as ``generator``.
    """
    if "net_G" not in content:
        return {"generator": _tensors(content, path)}
    parts: dict[str, State] = {"generator": {}}
    for key, value in _tensors(content["net_G"], path).items():
        name = key.removeprefix("module.")
        part = "generator_ema" if name.startswith("averaged_model.") else "generator"
        if name != "num_updates_tracked":
            parts.setdefault(part, {})[name.removeprefix("averaged_model.")] = value
    if "net_D" in content:
        parts["discriminator"] = _tensors(content["net_D"], path)
    return parts


def _tensors(content: Any, path: Path) -> State:
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: no state dict of a network, {', '.join(others[:5])} are no tensors. Expected latest_net_G.pth"
            " (2019 SPADE release), best_net_G.pth (CLADE), best_EMA.pth (OASIS), or a checkpoint of imaginaire with"
            " net_G"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def architecture_config(source: str, hyper: Mapping[str, Any], base: RunConfig | None) -> RunConfig:
    """Build the config of an imported checkpoint: networks and label channels from ``hyper``, the rest from ``base``.

    Args:
        source: as for ``import_generator``.
        hyper: likewise.
        base: a config of ours, such as the recipe of the same data set, that gives label table, schedule and paths
            (ADE20K's table as ``source`` reads it); None: a table of unnamed classes.
    Raises:
        CheckpointError: the hyper-parameters do not describe a network of ours, or ``base`` has other label channels.
    """
    spec = describe(source, "layout_spec", hyper)
    tree: dict[str, Any]
    if base is not None:
        base, _ = adapt_config(source, base, has_networks=False)
        tree = dump_config(base)
        own = base.data.labels.num_classes, base.data.labels.dont_care, base.data.edges != "none"
        wanted = spec.num_classes, spec.has_dont_care, spec.has_edges
        if source != "oasis" and spec.has_dont_care and own[:2] == (spec.num_label_channels, False):
            wanted = *own[:2], spec.has_edges  # a table that calls the last channel a class, as ADE20K's raw ids do
        for name, ours, theirs in zip(("classes", "don't-care channel", "edge channel"), own, wanted, strict=True):
            if ours != theirs:
                raise CheckpointError(
                    f"--config and --architecture disagree on the {name}: {ours} and {theirs}. Change data.labels or"
                    " data.edges of the config, or take the config of the data set that the checkpoint was trained on"
                )
    else:
        size = list(describe(source, "image_size", hyper))
        tree = {
            "losses": SYSTEMS[source].losses,
            "gen_opt": {"lr": 1e-4, "adam_beta2": SYSTEMS[source].adam_beta2},
            "dis_opt": {"lr": 4e-4, "adam_beta2": SYSTEMS[source].adam_beta2},
            "trainer": {"max_epochs": 50},
            "data": {
                "labels": label_table(source, spec, hyper.get("dataset_mode")),
                "edges": "instances" if spec.has_edges else "none",
                "train": {"roots": ["dataset/train"], "augmentations": {"resize_h_w": size}},
            },
        }
    tree |= describe_networks(source, hyper, tree.get("dis"))
    return parse_config(tree, source="the architecture")


def import_checkpoint(source: str, config: RunConfig, parts: Mapping[str, State]) -> tuple[dict[str, Any], list[str]]:
    """Build the content of our checkpoint, and notes for the user.

    Args:
        source: as for ``import_generator``.
        config: the networks that the weights are for.
        parts: as ``networks_in`` returns them; also ``encoder``, if the style encoder has a separate file.
    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    generator, own_encoder, notes = build_generator(config), build_encoder(config), []
    if own_encoder is None and "encoder" in parts:
        raise CheckpointError("--encoder_weights, but the architecture has no style encoder (use_vae: true)")
    encoder = parts.get("encoder", parts["generator"] if source == "imaginaire" else None)
    average, discriminator = parts.get("generator_ema"), parts.get("discriminator")
    settings, form = config.trainer.model_average, SYSTEMS[source].average_form
    if average is not None and settings is not None and settings.form != form:
        notes.append(
            f"{source} averages its weights in another form: the checkpoint says trainer.model_average.form: {form}."
            " A config to continue its training with (train.py --checkpoint) must say so too"
        )
        trainer = config.trainer.model_copy(update={"model_average": settings.model_copy(update={"form": form})})
        config = config.model_copy(update={"trainer": trainer})
    content: dict[str, Any] = {"config": dump_config(config), "images_seen": 0, "imported_from": source}
    for name, network, state in (
        ("generator", generator, parts["generator"]),
        ("generator_ema", generator, average),
        ("encoder", own_encoder, encoder),
        ("encoder_ema", own_encoder, average),
        ("discriminator", build_discriminator(config) if discriminator else None, discriminator),
    ):
        content[name] = None
        if network is not None and state is not None:
            own = new_average(network, form) if name.endswith("_ema") else network
            content[name] = load_foreign(own, source, state, layout_spec(config)).state_dict()
    if own_encoder is not None and encoder is None:
        notes.append("no --encoder_weights: images in the style of another (--style_image) are not possible")
    if content["discriminator"] is None:
        notes.append("no discriminator's weights: fine-tuning starts with a fresh one")
    if other := [key for key in parts["generator"] if own_encoder is None and key.startswith("style_encoder.")]:
        notes.append(f"{len(other)} tensors of a style encoder are left out: the architecture names none")
    return content, notes


def export_files(
    target: str, content: Mapping[str, Any], config: RunConfig, weights: str, label_order: LabelOrder = "raw"
) -> dict[str, Any]:
    """Build the files that ``target`` reads, by name, under its own tensor names.

    Args:
        target: a source that ``import_generator`` knows.
        content: a checkpoint of ours.
        weights: ``ema`` or ``raw``, of generator and encoder, if the target keeps only one of them.
        label_order: order of the label channels, see ``exported_channels``.
    Raises:
        CheckpointError: a network has no counterpart there, or the label table does not belong to the weights.
    """
    if wrong := explain_old_import(content, config.data.labels):
        raise CheckpointError(wrong)
    if config.data.conditions or not config.data.labels.num_classes:
        raise CheckpointError(f"data.conditions, or data.labels: null: {target} has generators of label maps alone")
    norm = config.gen.args.get("norm")
    if norm is not None and norm.type not in _NORMS[target]:
        raise CheckpointError(f"gen.norm: {norm.type}: {target} has {' and '.join(_NORMS[target])}")
    if config.gen.args.get("noise_injection"):
        raise CheckpointError(f"gen.noise_injection: true: {target}'s generators have none; train with false for it")
    if config.gen.args.get("upsampling") == "fewer":
        raise CheckpointError(f"gen.upsampling: fewer: {target}'s generators start smaller; train with normal for it")
    if (interpolation := config.gen.args.get("interpolation", "nearest")) != "nearest":
        raise CheckpointError(f"gen.interpolation: {interpolation}: {target}'s generators have nearest; train with it")
    order = exported_channels(target, config.data.labels, label_order)
    spec, system = layout_spec(config), SYSTEMS[target]
    if spec.has_edges and target == "oasis":
        raise CheckpointError(f"data.edges: {config.data.edges}: oasis has generators of label maps alone")
    parts: dict[str, State] = {}
    for part, build in _BUILDERS.items():
        for name in (part, f"{part}_ema"):
            if (state := content.get(name)) is None or (network := build(config)) is None:
                continue
            if part == "discriminator" and encoder_of_ours(config):
                continue  # (a note says so)
            with torch.device("meta"):
                planned = build(config)
            assert planned is not None
            is_folded = name != part and not any(key.endswith("weight_u") for key in state)
            places = (fold_spectral_norm(planned) if is_folded else planned).state_dict()
            check_tensors(state, places, f"the checkpoint's {name} does not fit its own config")
            if differ := sorted(state.keys() ^ places.keys()):
                raise CheckpointError(f"the checkpoint's {name} and its own config differ in {', '.join(differ[:3])}")
            if order is not None:
                state = _reordered(state, order, build, config)
            if is_folded and target != "imaginaire":  # which keeps averages folded, too
                _load_folded(network, state)
            else:
                (fold_spectral_norm(network) if is_folded else network).load_state_dict(state)
            if name != part and target == "imaginaire":
                fold_spectral_norm(network)
            names = foreign_names(target, network)
            parts[name] = {
                names[key]: system.arrange(names[key], value, spec, back=True).contiguous()
                for key, value in network.state_dict().items()
            }
    if target == "oasis":  # whose test.py reads the EMA alone
        parts.setdefault("generator_ema", parts["generator"])
        files = {"generator": "G", "generator_ema": "EMA", "discriminator": "D"}
        return {f"best_{files[part]}.pth": state for part, state in parts.items()}
    if target != "imaginaire":
        letters = {"generator": "G", "encoder": "E", "discriminator": "D"}
        kept = {part: f"{part}_ema" if weights == "ema" and f"{part}_ema" in parts else part for part in letters}
        return {f"latest_net_{letters[part]}.pth": parts[name] for part, name in kept.items() if name in parts}
    net_g: State = {}
    for name, state in parts.items():
        if name != "discriminator":
            prefix = "averaged_model" if name.endswith("_ema") else "module"
            net_g |= {f"{prefix}.{key}": value for key, value in state.items()}
    net_d = {"net_D": parts["discriminator"]} if "discriminator" in parts else {}
    return {"imaginaire.pt": {"net_G": net_g} | net_d}


_BUILDERS: dict[str, Callable[[RunConfig], nn.Module | None]] = {
    "generator": build_generator, "encoder": build_encoder, "discriminator": build_discriminator
}  # fmt: skip
_NORMS = {
    "nvlabs_spade": ("spade",), "clade": ("clade", "clade_icpe"), "imaginaire": ("spade",), "oasis": ("spade",)
}  # fmt: skip
"""The conditional norms that each system has."""


def _reordered(
    state: Mapping[str, Tensor], order: Sequence[int], build: Callable[[RunConfig], nn.Module | None], config: RunConfig
) -> State:
    """Return a network's tensors with label channel ``order[i]`` at place i.

    One more class makes the dimensions of label channels longer, and only those; label channels come first in them.
    """
    data = config.data
    wider = LabelSpec(num_classes=data.labels.num_classes + 1, dont_care=data.labels.dont_care)
    larger = config.model_copy(update={"data": data.model_copy(update={"labels": wider})})
    with torch.device("meta"):
        networks = build(config), build(larger)
    own, grown = ({} if network is None else network.state_dict() for network in networks)
    result = dict(state)
    for key in state.keys() & own.keys():  # an EMA's folded weights have no vectors of spectral norms
        for dim, size in enumerate(own[key].shape):
            # Values per class: 1, or one for each place of the kernel in a spectral norm's vector.
            step = grown[key].shape[dim] - size
            if step:
                moved = [channel * step + place for channel in order for place in range(step)]
                index = torch.tensor([*moved, *range(len(moved), size)])
                result[key] = result[key].index_select(dim, index)
    return result


@torch.no_grad()
def _load_folded(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights with folded spectral norms into a network that has spectral norms.

    Scale the norms' vectors so that u . W v = 1, by which evaluation mode divides.
    """
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith(("weight_u", "weight_v")) for key in missing)
    for layer in network.modules():
        if isinstance(layer, SpectralNorm):
            for _ in range(20):  # training can then continue from here
                layer.iterate()
            layer.weight_v = layer.weight_v / layer.sigma()
