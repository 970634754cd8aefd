"""Other systems' checkpoints -> ours.

``import_generator(source, state_dict, hyper)`` and its siblings build one of our networks from the hyper-parameters
that fix the architecture and load the reference's state dict into it. Every tensor must find its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.interop import clade, imaginaire, nvlabs_spade

_SOURCES = {"nvlabs_spade": nvlabs_spade, "clade": clade, "imaginaire": imaginaire}


def _source(name: str) -> Any:
    if name not in _SOURCES:
        raise CheckpointError(f"unknown source {name!r}; known: {', '.join(_SOURCES)}")
    return _SOURCES[name]


def import_generator(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """A generator of ours with the weights of a reference checkpoint.

    Args:
        source: ``nvlabs_spade``, ``clade`` or ``imaginaire``.
        state_dict: the reference's, under its own key names; prefixes of wrappers (``module.``) are removed.
        hyper: the hyper-parameters that fix the architecture, as in ``hyper`` of a parity fixture's config.json.
    Raises:
        CheckpointError: listing tensors that are missing, left over or of another shape.
    """
    return _load(_source(source).generator(hyper), state_dict, _source(source))


def import_discriminator(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Like ``import_generator``, for the discriminator."""
    return _load(_source(source).discriminator(hyper), state_dict, _source(source))


def import_encoder(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Like ``import_generator``, for the style encoder."""
    return _load(_source(source).encoder(hyper), state_dict, _source(source))


def reference_names(source: str, network: nn.Module) -> dict[str, str]:
    """Our state-dict key -> the reference's, for every tensor of ``network``."""
    return {key: _source(source).reference_key(network, key) for key in network.state_dict()}


def _load(network: nn.Module, state_dict: Mapping[str, Tensor], source: Any) -> nn.Module:
    scope = source.scope(network)
    theirs = {key.removeprefix("module."): value for key, value in state_dict.items()}
    theirs = {key: value for key, value in theirs.items() if key.startswith(scope)}
    names = {key: source.reference_key(network, key) for key in network.state_dict()}
    missing = [f"{name} {list(network.state_dict()[key].shape)}" for key, name in names.items() if name not in theirs]
    left_over = [f"{name} {list(theirs[name].shape)}" for name in theirs if name not in names.values()]
    reshaped = [
        f"{names[key]} is {list(theirs[names[key]].shape)}, these hyper-parameters make it {list(value.shape)}"
        for key, value in network.state_dict().items()
        if names[key] in theirs and theirs[names[key]].shape != value.shape
    ]
    if missing or left_over or reshaped:
        kinds = (("missing: ", missing), ("left over: ", left_over), ("", reshaped))
        shown = "; ".join(kind + _first(found) for kind, found in kinds if found)
        raise CheckpointError(f"not the weights of a {type(network).__name__} of these hyper-parameters: {shown}")
    network.load_state_dict({key: theirs[name] for key, name in names.items()})
    return network


def _first(items: list[str], count: int = 5) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
