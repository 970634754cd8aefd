"""Map names in YAML to classes in Python.

Responsible for the registries of generators, discriminators, encoders, norms, losses, data sets and trackers, and for
the typed schema that each registered class brings along: its keyword-only parameters *are* the keys that YAML may set,
with their types and defaults. Knows nothing of files or of how a component is assembled (``build.py`` does that). It
knows only the names of the modules that fill the registries: the first look-up imports them, so that a config may name
their classes.

A user registers a component from their own module and names that module on the command line (``--import``)::

    from imaginaire_spade.registry import GENERATORS

    @GENERATORS.register("my_generator")
    class MyGenerator(nn.Module):
        def __init__(self, spec, image_size, *, num_filters: int = 64): ...
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_serializer
from pydantic_core import CoreSchema, core_schema

from imaginaire_spade.errors import ConfigError

T = TypeVar("T", bound=type)

# Bounds of the numbers in the signatures of components.
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Channels of a layer, or pixels of an image."""
Depth = Annotated[int, Field(ge=1, le=16)]
"""Layers or scales, of which each may double or halve something; pixels of a convolution's window."""
WidthOrNone = Annotated[int, Field(ge=0, le=2**16)]
DepthOrNone = Annotated[int, Field(ge=0, le=100)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Factor of a term."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known spelling of ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class Component(BaseModel):
    """A registered component: its name, and the value of each of its keys; components nested in it are Components.

    ``Registry.read`` makes it from what YAML states, and it is written as YAML states it.
    """

    model_config = ConfigDict(frozen=True)
    type: str
    args: dict[str, Any]

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"type": self.type, **self.args}


class InvalidKeysError(ValueError):
    """Keys of a component that its ``schema`` does not allow; ``error`` lists them."""

    def __init__(self, schema: type[BaseModel], error: ValidationError) -> None:
        super().__init__(str(error))
        self.schema, self.error = schema, error


class Registry:
    """A dict from names to classes, with an error that lists the names.

    Before the ``*`` of a registered class's ``__init__`` stands what the pipeline knows (label channels, sizes);
    after it, what YAML may set. ``Annotated[Component, registry]`` is a field of a typed model that ``read`` fills.

    Args:
        modules: those of this package that register their classes here. The first look-up imports them.
    """

    def __init__(self, kind: str, *modules: str) -> None:
        self.kind, self.modules = kind, modules
        self._classes: dict[str, type] = {}

    def _known(self) -> dict[str, type]:
        for module in self.modules:
            importlib.import_module(module)
        return self._classes

    def register(self, name: str) -> Callable[[T], T]:
        """Register a class (decorator).

        Raises:
            ValueError: another class has the name.
        """

        def add(cls: T) -> T:
            known = self._classes if cls.__module__ in self.modules else self._known()
            if name in known:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known[name]} and {cls}")
            known[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """List the registered names in order."""
        return sorted(self._known())

    def __getitem__(self, name: str) -> type:
        """Return the class registered as ``name``.

        Raises:
            ConfigError: there is none; the message lists the known names.
        """
        known = self._known()
        if name not in known:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, known)} Known: {', '.join(self.names()) or 'none'}."
                " (A component of your own: name its module with --import.)"
            )
        return known[name]

    def name_of(self, cls: type) -> str:
        """Return the name that ``cls`` is registered under."""
        return next(name for name, registered in self._known().items() if registered is cls)

    def parts(self, name: str) -> dict[str, Registry]:
        """List the keyword-only parameters of ``name`` that are themselves components, with their registries."""
        fields = self.schema(name).model_fields.items()
        return {key: part for key, field in fields for part in field.metadata if isinstance(part, Registry)}

    def schema(self, name: str) -> type[BaseModel]:
        """Build the typed model of the keys that YAML may set on ``name``, read off the signature."""
        return _schema_of(self[name], f"{self.kind}.{name}")

    def read(self, entry: Any) -> Component:
        """Check a component as YAML states it, ``NAME`` or ``{"type": NAME, key: value, ...}``; fill in the defaults.

        ``type: NAME:REST`` is short for the key ``name: REST``, where the class has it.

        Raises:
            ConfigError: no type is stated, or one that is not registered.
            InvalidKeysError: its keys are not those of the registered class, or their values not of its types.
        """
        entry = {"type": entry} if isinstance(entry, str) else entry
        if isinstance(entry, dict) and isinstance(entry.get("type"), str):
            kind, _, name = entry["type"].partition(":")
            if name and kind in self._known() and "name" in self.schema(kind).model_fields:
                entry = {**entry, "type": kind, "name": name}
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise ConfigError(f"a {self.kind} is a mapping with a type: {', '.join(self.names())}")
        schema = self.schema(entry["type"])
        keys = {key: value for key, value in entry.items() if key != "type"}
        try:
            # JSON mode is strict about scalars ("4" is no int) and lets lists be tuples.
            values = schema.model_validate_json(json.dumps(keys, default=str))
        except ValidationError as error:
            raise InvalidKeysError(schema, error) from None
        return Component(type=entry["type"], args={key: getattr(values, key) for key in schema.model_fields})

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)


@functools.cache
def _schema_of(cls: type, title: str) -> type[BaseModel]:
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    fields: dict[str, Any] = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, default = hints.get(key, Any), ... if parameter.default is parameter.empty else parameter.default
        for registry in getattr(hint, "__metadata__", ()):
            if isinstance(registry, Registry):  # a component, whose default is a class
                hint = Annotated[Component, registry]
                default = ... if default is ... else Field(registry.name_of(default), validate_default=True)
        fields[key] = (hint, default)
    return create_model(title, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields)


GENERATORS = Registry("generator", "imaginaire_spade.models.generator", "imaginaire_spade.models.oasis")
DISCRIMINATORS = Registry("discriminator", "imaginaire_spade.models.discriminator", "imaginaire_spade.models.unet")
UNET_ENCODERS = Registry("U-Net encoder", "imaginaire_spade.models.unet", "imaginaire_spade.pretrained.feature_maps")
"""Of a discriminator that is a U-Net."""
ENCODERS = Registry("encoder", "imaginaire_spade.models.generator")
NORMS = Registry("norm", "imaginaire_spade.models.norms")
DATASETS = Registry("data set")
"""Of users' own alone: folders and LMDBs need no name."""
LOSSES = Registry("loss", "imaginaire_spade.losses")
TRACKERS = Registry("tracker", "imaginaire_spade.training.trackers")
