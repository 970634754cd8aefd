"""Map names in YAML to classes in Python.

Owns the registries of generators, discriminators, encoders, norms and losses, and the typed schema that each
registered class brings along: its keyword-only parameters *are* the keys that YAML may set, with their types and
defaults. Knows nothing of files or of how a component is assembled (``build.py`` does that). Of the modules that fill
the registries it knows the names alone: they are imported at the first look-up, so that a config may name them.

A user registers a component from their own module and names that module on the command line (``--import``)::

    from imaginaire_spade.registry import GENERATORS

    @GENERATORS.register("my_generator")
    class MyGenerator(nn.Module):
        def __init__(self, spec, image_size, *, num_filters: int = 64): ...
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from imaginaire_spade.errors import ConfigError

T = TypeVar("T", bound=type)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known spelling of ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry:
    """A dict from names to classes, with an error that lists the names.

    Before the ``*`` of a registered class's ``__init__`` stands what the pipeline knows (label channels, sizes);
    after it, what YAML may set.

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
        """Register a class (decorator). Raises ValueError if another class has the name."""

        def add(cls: T) -> T:
            known = self._classes if cls.__module__ in self.modules else self._known()
            if name in known:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {known[name]} and {cls}")
            known[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        return sorted(self._known())

    def __contains__(self, name: str) -> bool:
        return name in self._known()

    def __getitem__(self, name: str) -> type:
        """The class registered as ``name``. Raises ConfigError that lists the known names."""
        known = self._known()
        if name not in known:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, known)} Known: {', '.join(self.names())}."
                " (A component of your own: name its module with --import.)"
            )
        return known[name]

    def name_of(self, cls: type) -> str:
        """Return the name that ``cls`` is registered under."""
        return next(name for name, registered in self._known().items() if registered is cls)

    def parts(self, name: str) -> dict[str, Registry]:
        """List the keyword-only parameters of ``name`` that are themselves components, with their registries."""
        return {
            key: registry
            for key, hint in _keyword_hints(self[name]).items()
            for registry in getattr(hint, "__metadata__", ())
            if isinstance(registry, Registry)
        }

    def schema(self, name: str) -> type[BaseModel]:
        """Build the typed model of the keys that YAML may set on ``name``, read off the signature."""
        cls = self[name]
        parts = self.parts(name)
        hints = _keyword_hints(cls)
        fields: dict[str, Any] = {}
        for key, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                default = ... if parameter.default is inspect.Parameter.empty else parameter.default
                if key in parts and default is not ...:
                    default = parts[key].name_of(default)
                fields[key] = (Any if key in parts else hints[key], default)
        return create_model(f"{self.kind}.{name}", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _keyword_hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    return {
        key: hints.get(key, Any)
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


GENERATORS = Registry(
    "generator",
    "imaginaire_spade.models.generator",
    "imaginaire_spade.models.style_generator",
    "imaginaire_spade.models.pix2pixhd",
)
DISCRIMINATORS = Registry("discriminator", "imaginaire_spade.models.discriminator", "imaginaire_spade.models.fpse")
ENCODERS = Registry("encoder", "imaginaire_spade.models.encoder")
NORMS = Registry("norm", "imaginaire_spade.models.norms")
LOSSES = Registry("loss", "imaginaire_spade.losses")
