"""A config file of another system whose keys are translated one by one, and those that nothing read."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imaginaire_spade.errors import ConfigError

REQUIRED = object()
"""Default of a key that a file must state."""


class Row(NamedTuple):
    """A key of theirs and its key here. If the file does not state it, our default holds, which equals theirs."""

    theirs: str
    ours: str
    convert: Callable[[Any], Any] | None = None


class Keys:
    """A foreign config that remembers which of its keys were read."""

    def __init__(self, tree: Mapping[str, Any], path: Path) -> None:
        self.nodes = dict(_dotted(tree))
        """What the file states, by dotted keys: values, and sections too."""
        self._path = path
        self._read: set[str] = set()
        self.notes: list[str] = []

    def take(self, dotted: str, default: Any = REQUIRED) -> Any:
        """Return a key's value, or ``default`` if the file does not state one. Raises ConfigError if it is required."""
        self._read.add(dotted)
        value = self.nodes.get(dotted)
        if value is None and default is REQUIRED:
            raise ConfigError(f"{self._path}: {dotted} is not stated; add it to the file")
        return default if value is None else value

    def take_all(self, section: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a section's keys, by their names without it."""
        return {name: self.take(f"{section}.{name}", default) for name, default in defaults.items()}

    def translate(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Return our dotted keys, with values, of those rows that the file states.

        Raises:
            ConfigError: a value cannot be converted.
        """
        ours = {}
        for row in rows:
            value = self.take(row.theirs, None)
            try:
                if value is not None:
                    ours[row.ours] = value if row.convert is None else row.convert(value)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ConfigError(f"{self._path}: {row.theirs}: {value!r} is not supported") from None
        return ours

    def check(self, dotted: str, supported: str | int) -> None:
        """Raise ConfigError unless the key has the only supported value or is not stated."""
        if (value := self.take(dotted, supported)) != supported:
            raise ConfigError(f"{dotted}: {value}: only {supported} is supported")

    def unread(self) -> Iterator[str]:
        """List the dotted keys (with values) that nothing read."""
        for dotted, value in self.nodes.items():
            with_parents = itertools.accumulate(dotted.split("."), "{}.{}".format)
            if not (isinstance(value, Mapping) and value) and self._read.isdisjoint(with_parents):
                yield f"{dotted}: {value}"


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every node of a tree, mappings and what they hold, under its dotted key."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
