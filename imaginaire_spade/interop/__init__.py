"""Convert other systems' checkpoints to ours.

``import_generator(source, state_dict, hyper)`` and its siblings build one of our networks from the hyper-parameters
that fix the architecture and load the other system's state dict into it. Every tensor must find its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from imaginaire_spade.build import build_component
from imaginaire_spade.config_files import parse_component
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop import clade, imaginaire, nvlabs_spade
from imaginaire_spade.models.discriminator import Discriminator
from imaginaire_spade.models.encoder import ConvEncoder
from imaginaire_spade.models.generator import Generator, SPADEGenerator
from imaginaire_spade.registry import DISCRIMINATORS, ENCODERS, GENERATORS

SYSTEMS = {"nvlabs_spade": nvlabs_spade, "clade": clade, "imaginaire": imaginaire}
SOURCES = tuple(SYSTEMS)

N = TypeVar("N", bound=nn.Module)


def import_generator(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Build our generator with the weights of another system's checkpoint.

    Args:
        source: ``nvlabs_spade``, ``clade`` or ``imaginaire``.
        state_dict: the other system's, under its own key names; prefixes of wrappers (``module.``) are removed.
        hyper: the hyper-parameters that fix the architecture, as in ``hyper`` of a parity fixture's config.json.
    Raises:
        CheckpointError: listing tensors that are missing, left over or of another shape.
    """
    return _import(source, "gen", state_dict, hyper)


def import_discriminator(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Build our discriminator likewise (see ``import_generator``)."""
    return _import(source, "dis", state_dict, hyper)


def import_encoder(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Build our style encoder likewise (see ``import_generator``)."""
    return _import(source, "encoder", state_dict, hyper)


_PARTS = {
    "gen": ("generator", GENERATORS, ("layout_spec", "image_size")),
    "dis": ("discriminator", DISCRIMINATORS, ("layout_spec",)),
    "encoder": ("encoder", ENCODERS, ("style_dims",)),
}
"""Key of a config -> its part, registry, and what the pipeline tells such a component."""


def _import(source: str, key: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    part, registry, known = _PARTS[key]
    component = parse_component(describe(source, part, hyper), registry, key)
    network = build_component(registry, component, *(describe(source, name, hyper) for name in known))
    return load_foreign(network, source, state_dict)


def describe(source: str, part: str, hyper: Mapping[str, Any]) -> Any:
    """Translate another system's hyper-parameters for one part of our networks.

    Args:
        part: ``generator``, ``discriminator``, ``encoder`` (trees as YAML has them), ``layout_spec``, ``image_size``
            or ``style_dims``.
    Raises:
        CheckpointError: a hyper-parameter is missing, or has a value that our networks do not know.
    """
    module = _source(source)
    try:
        return getattr(module, part)(module.DEFAULTS | dict(hyper))
    except KeyError as error:
        raise CheckpointError(
            f"the architecture lacks {error.args[0]!r}, which a {part.replace('_', ' ')} of {source} needs. Given:"
            f" {', '.join(sorted(hyper)) or 'nothing'}"
        ) from None


def describe_networks(source: str, hyper: Mapping[str, Any], dis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Translate another system's hyper-parameters into ``gen``, ``dis`` and ``encoder`` of a config of ours.

    Args:
        source: as for ``import_generator``.
        hyper: likewise; those of the discriminator may stand under ``dis``, imaginaire's must.
        dis: our discriminator, if ``hyper`` states nothing of it; None: that of the source's defaults.
    """
    if hyper.get("add_dist"):  # CLADE gives no position to 0 in its files, which is channel 0 in every data set
        hyper = {"skip_ids": [0], **hyper}
    own = hyper.get("dis") or {}
    if own or {"ndf", "num_D", "n_layers_D", "norm_D"} & hyper.keys():
        dis = describe(source, "discriminator", {**hyper, **own})
    has_encoder = hyper.get("use_vae") or "style_enc_num_filters" in hyper
    return {
        "gen": describe(source, "generator", hyper),
        "dis": dis or {"type": "fpse" if source == "imaginaire" else "multiscale_patch"},
        "encoder": describe(source, "encoder", hyper) if has_encoder else None,
    }


def foreign_names(source: str, network: nn.Module) -> dict[str, str]:
    """Map our state-dict keys to the other system's, for every tensor of ``network``."""
    return {key: _source(source).foreign_key(network, key) for key in network.state_dict()}


def _source(name: str) -> Any:
    if name not in SYSTEMS:
        raise CheckpointError(f"unknown source {name!r}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def load_foreign(network: N, source: str, state_dict: Mapping[str, Tensor]) -> N:
    """Load another system's state dict into ``network``.

    Raises:
        CheckpointError: as ``import_generator``.
    """
    scope = _source(source).scope(network)
    theirs = {key.removeprefix("module."): value for key, value in state_dict.items()}
    theirs = {key: value for key, value in theirs.items() if key.startswith(scope)}
    names = foreign_names(source, network)
    missing = [f"{name} {list(network.state_dict()[key].shape)}" for key, name in names.items() if name not in theirs]
    left_over = [f"{name} {list(theirs[name].shape)}" for name in theirs if name not in names.values()]
    reshaped = [
        f"{names[key]} is {list(theirs[names[key]].shape)}, these hyper-parameters make it {list(value.shape)}"
        for key, value in network.state_dict().items()
        if names[key] in theirs and theirs[names[key]].shape != value.shape
    ]
    if missing or left_over or reshaped:
        if reason := _plain_reason(network, theirs):
            raise CheckpointError(reason)
        kinds = (("missing: ", missing), ("left over: ", left_over), ("", reshaped))
        shown = "; ".join(kind + _first(found) for kind, found in kinds if found)
        raise CheckpointError(f"not the weights of a {type(network).__name__} of these hyper-parameters: {shown}")
    network.load_state_dict({key: theirs[name] for key, name in names.items()})
    return network


_MARKS = {
    "discriminator": ("discriminator_", "discriminators.", "fpse_discriminator."),
    "generator": ("head_0.", "spade_generator."),
    "style encoder": ("layer1.", "style_encoder."),
}
"""Prefixes of the tensors of each kind of network, in any of the other systems."""


def _plain_reason(network: nn.Module, theirs: Mapping[str, Tensor]) -> str | None:
    """Name a usual mistake: another kind of network, label count or up-sampling depth. None: it is another one."""
    wanted = {Discriminator: "discriminator", Generator: "generator", ConvEncoder: "style encoder"}
    own = next((name for cls, name in wanted.items() if isinstance(network, cls)), None)
    found = [kind for kind, marks in _MARKS.items() if any(key.startswith(marks) for key in theirs)]
    if own is not None and found and own not in found:
        return f"these are the weights of a {' and a '.join(found)}, not of a {own}: give the file of the {own}"
    if not isinstance(network, SPADEGenerator):
        return None
    blocks = 8 if any(key.startswith("up_4.") for key in theirs) else 7
    if blocks != len(network.blocks):
        depth = "most" if blocks == 8 else "normal or more"
        return f"the generator has {blocks} residual blocks: write num_upsampling_layers: {depth} (gen.upsampling here)"
    first, own_first = theirs.get("fc.weight"), network.state_dict()["fc.weight"]
    if first is not None and first.dim() != own_first.dim():
        return f"the generator starts from a {'style code: use_vae' if first.dim() == 2 else 'label map: no use_vae'}"
    if first is not None and first.dim() == 4 and first.shape[1] != own_first.shape[1]:
        return (
            f"the generator takes {first.shape[1]} label channels, this architecture has {own_first.shape[1]}:"
            " label_nc, and one more each for contain_dontcare_label and for instance edges (no_instance: false)"
        )
    return None


def _first(items: list[str], count: int = 5) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
