"""Convert other systems' checkpoints to ours.

``import_generator(source, state_dict, hyper)`` and its siblings build one of our networks from the hyper-parameters
that fix the architecture and load the other system's state dict into it. Every tensor must find its place.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from imaginaire_spade.build import build_component
from imaginaire_spade.config_files import parse_component
from imaginaire_spade.errors import CheckpointError, UserError
from imaginaire_spade.interop.systems import SYSTEMS
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import Discriminator
from imaginaire_spade.models.generator import ConvEncoder, Generator, SPADEGenerator
from imaginaire_spade.models.spectral_norm import SpectralNorm
from imaginaire_spade.registry import DISCRIMINATORS, ENCODERS, GENERATORS, Registry

Names = Mapping[type[nn.Module], tuple[str, Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]]]
"""A network of ours -> the prefix of its tensors there, and substitutions that turn a module's path into theirs, one
after the other."""

N = TypeVar("N", bound=nn.Module)


def import_generator(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Build our generator with the weights of another system's checkpoint.

    Args:
        source: ``nvlabs_spade``, ``clade``, ``imaginaire`` or ``oasis``.
        state_dict: the other system's, under its own key names; prefixes of wrappers (``module.``) are removed.
        hyper: the hyper-parameters that fix the architecture, as in ``hyper`` of a parity fixture's config.json.
    Raises:
        CheckpointError: listing tensors that are missing, left over or of another shape.
    """
    return _import(source, "gen", GENERATORS, state_dict, hyper, "layout_spec", "image_size")


def import_discriminator(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Build our discriminator likewise (see ``import_generator``)."""
    return _import(source, "dis", DISCRIMINATORS, state_dict, hyper, "layout_spec")


def import_encoder(source: str, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> nn.Module:
    """Build our style encoder likewise (see ``import_generator``)."""
    return _import(source, "encoder", ENCODERS, state_dict, hyper, "style_dims")


def _import(
    source: str, key: str, registry: Registry, state_dict: Mapping[str, Tensor], hyper: Mapping[str, Any], *known: str
) -> nn.Module:
    """Build the component ``key`` of a config, and load its weights; ``known``: what the pipeline tells it."""
    component = parse_component(describe(source, registry.kind, hyper), registry, key)
    told = {name: describe(source, name, hyper) for name in known}
    network = build_component(registry, component, *told.values())
    return load_foreign(network, source, state_dict, told.get("layout_spec"))


def describe(source: str, part: str, hyper: Mapping[str, Any]) -> Any:
    """Translate another system's hyper-parameters for one part of our networks.

    Args:
        part: ``generator``, ``discriminator``, ``encoder`` (trees as YAML has them), ``layout_spec``, ``image_size``
            or ``style_dims``.
    Raises:
        CheckpointError: a hyper-parameter is missing, or has a value that our networks do not know.
    """
    system = _system(source)
    try:
        described = getattr(system, part)(system.defaults | dict(hyper))
        if isinstance(described, LayoutSpec):
            operator.index(described.num_classes)
        return described
    except KeyError as error:
        raise CheckpointError(
            f"the architecture lacks {error.args[0]!r}, which a {part.replace('_', ' ')} of {source} needs. Given:"
            f" {', '.join(sorted(hyper)) or 'nothing'}"
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise CheckpointError(f"the architecture has a value of a wrong type for {source}: {error}") from None


def describe_networks(source: str, hyper: Mapping[str, Any], dis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Translate another system's hyper-parameters into ``gen``, ``dis`` and ``encoder`` of a config of ours.

    Args:
        source: as for ``import_generator``.
        hyper: likewise; those of the discriminator may stand under ``dis``, imaginaire's must.
        dis: our discriminator, if ``hyper`` states nothing of it; None: that of the source's defaults.
    """
    if hyper.get("add_dist"):  # CLADE gives no position to 0 in its files, which is channel 0 in every data set
        hyper = {"skip_ids": [0], **hyper}
    own = hyper.get("dis")
    own = own if isinstance(own, Mapping) else {}
    if own or {"ndf", "num_D", "n_layers_D", "norm_D", "D_channels"} & hyper.keys():
        dis = describe(source, "discriminator", {**hyper, **own})
    has_encoder = hyper.get("use_vae") or "style_enc_num_filters" in hyper
    return {
        "gen": describe(source, "generator", hyper),
        "dis": dis or {"type": _system(source).discriminator_type},
        "encoder": describe(source, "encoder", hyper) if has_encoder else None,
    }


def _system(source: str) -> Any:
    if source not in SYSTEMS:
        raise CheckpointError(f"unknown source {source!r}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[source]


def foreign_names(source: str, network: nn.Module) -> dict[str, str]:
    """Map our state-dict keys to the other system's, for every tensor of ``network``."""
    prefix, rows = _names(source, network)
    names = {}
    for key in network.state_dict():
        path, leaf = split_key(network, key)
        for ours, theirs in rows:
            path = re.sub(ours, theirs, path)
        names[key] = f"{prefix}{path}.{leaf}"
    return names


def _names(source: str, network: nn.Module) -> Any:
    names: Names = _system(source).names
    for cls, found in names.items():
        if isinstance(network, cls):
            return found
    raise CheckpointError(f"a {type(network).__name__} has no counterpart in {source}")


def split_key(network: nn.Module, key: str) -> tuple[str, str]:
    """Split a state-dict key into the module's path and the tensor's name, as all these systems count and call them.

    The last convolution of a patch discriminator is one more layer; a weight before its spectral norm is
    ``weight_orig``, as in torch.
    """
    path, _, leaf = key.rpartition(".")
    is_spectral = leaf == "weight" and isinstance(network.get_submodule(path), SpectralNorm)
    owner, _, name = path.rpartition(".")
    if owner and name == "to_logits":
        path = f"{owner}.layers.{len(network.get_submodule(owner).layers)}"  # type: ignore[arg-type]
    return path, "weight_orig" if is_spectral else leaf


def load_foreign(network: N, source: str, state_dict: Mapping[str, Tensor], spec: LayoutSpec | None = None) -> N:
    """Load another system's state dict into ``network``.

    Args:
        spec: the channels of its layouts; None: it sees none.
    Raises:
        CheckpointError: as ``import_generator``.
    """
    prefix, _ = _names(source, network)
    theirs = {key.removeprefix("module."): value for key, value in state_dict.items()}
    theirs = {key: value for key, value in theirs.items() if key.startswith(prefix)}
    names = foreign_names(source, network)
    ours = {names[key]: value for key, value in network.state_dict().items()}
    missing = [f"{name} {list(value.shape)}" for name, value in ours.items() if name not in theirs]
    left_over = [f"{name} {list(value.shape)}" for name, value in theirs.items() if name not in ours]
    reshaped = [
        f"{name} is {list(theirs[name].shape)}, these hyper-parameters make it {list(value.shape)}"
        for name, value in ours.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
    if missing or left_over or reshaped:
        if reason := _plain_reason(network, theirs):
            raise CheckpointError(reason)
        kinds = (("missing: ", missing), ("left over: ", left_over), ("", reshaped))
        shown = "; ".join(kind + _first(found) for kind, found in kinds if found)
        raise CheckpointError(f"not the weights of a {type(network).__name__} of these hyper-parameters: {shown}")
    retyped = [
        f"{name} is {theirs[name].dtype}, not {value.dtype}"
        for name, value in ours.items()
        if theirs[name].is_floating_point() != value.is_floating_point()
    ]
    if retyped:
        raise CheckpointError(f"not the weights of a {type(network).__name__}: {_first(retyped)}")
    if spec is not None:
        theirs = {name: _system(source).arrange(name, value, spec) for name, value in theirs.items()}
    network.load_state_dict({key: theirs[name] for key, name in names.items()})
    return network


_KINDS = (
    ("discriminator", Discriminator, ("discriminator_", "discriminators.", "fpse_discriminator.", "body_down.")),
    ("generator", Generator, ("head_0.", "spade_generator.", "body.")),
    ("style encoder", ConvEncoder, ("layer1.", "style_encoder.")),
)
"""Networks, and prefixes of their tensors in any of the other systems."""


def _plain_reason(network: nn.Module, theirs: Mapping[str, Tensor]) -> str | None:
    """Name a usual mistake: another kind of network, label count or up-sampling depth. None: it is another one."""
    if reason := other_kind(next(kind for kind, cls, _ in _KINDS if isinstance(network, cls)), theirs):
        return reason
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


def other_kind(own: str, theirs: Mapping[str, Tensor]) -> str | None:
    """Say that tensors are those of another kind of network than ``own``; None: they may be its."""
    found = [kind for kind, _, marks in _KINDS if any(key.startswith(marks) for key in theirs)]
    if not found or own in found:
        return None
    return f"these are the weights of a {' and a '.join(found)}, not of a {own}: give the file of the {own}"


def _first(items: list[str], count: int = 5) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
