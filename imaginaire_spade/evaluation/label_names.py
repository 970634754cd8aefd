"""Map the classes of a segmentation network to the label table.

Owns the matching by name, the file that states what names do not, and the wording of what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config_files import read_yaml
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.registry import did_you_mean

FLAG = "--segmenter_labels"


@dataclass(frozen=True)
class LabelMapping:
    """Ids of a segmenter -> train ids of a label table."""

    train_ids: NDArray[np.int64]
    """[classes of the segmenter]: train id; the table's number of classes where it has no such class."""
    unscored: tuple[int, ...]
    """Classes of the table that the segmenter does not know."""


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FLAG} {path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{FLAG} {path}: must be a mapping, class of the label table: label of the segmenter")
    return content


def match_labels(
    names: Sequence[str], labels: LabelSpec, stated: Mapping[Any, Any] | None = None, model: str = "the segmenter"
) -> LabelMapping:
    """Find the segmenter's labels for every class of the table: as ``stated``, else by name (upper or lower case,
    spaces, hyphens and underscores do not matter; of "door, double door" the first). Where neither side has names, by
    id.

    Args:
        names: the segmenter's labels.
        stated: class of the table (name or id) -> label of the segmenter (name or id), or several of them, or None for
            a class that is not to be scored.
    Raises:
        ConfigError: a class without a counterpart, or anything unknown, with the line to write.
    """
    segmenter, table = _Names(names), _Names([labels.name(index) for index in range(labels.num_classes)])
    found: dict[int, list[int]] = {}
    for name, counterparts in (stated or {}).items():
        classes = table.ids(name)
        if not classes:
            raise ConfigError(f"{FLAG}: {name!r} is no class of the label table{table.nearest(name)}")
        several = counterparts if isinstance(counterparts, list) else [] if counterparts is None else [counterparts]
        if unknown := [item for item in several if not segmenter.ids(item)]:
            raise ConfigError(f"{FLAG}: {name}: {model} has no label {unknown[0]!r}{segmenter.nearest(unknown[0])}")
        for index in classes:
            found[index] = [i for item in several for i in segmenter.ids(item)]
    rest = [index for index in range(labels.num_classes) if index not in found]
    nameless = not labels.names or all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if rest and nameless and not stated:
        if len(names) != labels.num_classes:
            raise ConfigError(
                f"{model} has {len(names)} labels and the label table {labels.num_classes} classes, and"
                f" {'the table' if not labels.names else 'the segmenter'} has no names to match them by. Write"
                f" {FLAG} FILE, a YAML file with lines such as 0: 3 (class 0 of the table is label 3)"
            )
        return LabelMapping(np.arange(len(names)), ())
    found |= {index: segmenter.ids(labels.name(index)) for index in rest}
    if missing := [labels.name(index) for index in rest if not found[index]]:
        listed = ", ".join(f"{name}{segmenter.nearest(name)}" for name in missing[:8])
        raise ConfigError(
            f"{model} has no label called as {len(missing)} of the {labels.num_classes} classes of the table:"
            f" {listed}{' ...' if len(missing) > 8 else ''}. Write {FLAG} FILE, a YAML file with a line for each:"
            f" {missing[0]}: LABEL OF THE SEGMENTER, or {missing[0]}: null to leave the class out. The segmenter's"
            f" labels: {', '.join(names[:40])}{' ...' if len(names) > 40 else ''}"
        )
    train_ids = np.full(len(names), labels.num_classes)
    for index, ids in found.items():
        for i in ids:
            if train_ids[i] != labels.num_classes:
                raise ConfigError(
                    f"the label {names[i]!r} of {model} would be both {labels.name(int(train_ids[i]))} and"
                    f" {labels.name(index)}: say in {FLAG} FILE which, and write null for the other"
                )
            train_ids[i] = index
    return LabelMapping(train_ids, tuple(index for index, ids in sorted(found.items()) if not ids))


class _Names:
    """Names by id, and ids by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._plain = [_plain(name) for name in names]
        self._first = [_first(name) for name in names]

    def ids(self, name: Any) -> list[int]:
        """Return the ids of a class given by id or by name; a whole name goes before the first of several synonyms."""
        if isinstance(name, int) and not isinstance(name, bool):
            return [name] if 0 <= name < len(self._names) else []
        text = str(name)
        for names, wanted in ((self._plain, _plain(text)), (self._first, _plain(text)), (self._first, _first(text))):
            if found := [i for i, other in enumerate(names) if other == wanted]:
                return found
        return []

    def nearest(self, name: Any) -> str:
        hint = did_you_mean(str(name), self._names)
        return f" ({hint.removeprefix('; ')})" if hint else ""


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _first(name: str) -> str:
    return _plain(re.split("[,;]", name)[0])
