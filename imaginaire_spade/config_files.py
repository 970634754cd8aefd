"""Read, merge, override, check and dump configurations.

A file may name others to start from (``base: ../sample/spade.yaml`` or a list of them): mappings merge key by key,
everything else is replaced; a component whose ``type`` changes starts afresh.

Responsible for the words of every complaint about a configuration: they name the file and line, the key, what is
allowed and the nearest valid spelling. What the keys are is ``config.py``'s.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, create_model

from imaginaire_spade.config import DataConfig, LabelledData, RunConfig
from imaginaire_spade.config_trainer import Section
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.registry import Component, InvalidKeysError, Registry, did_you_mean

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that reads 1e-4 as a number (YAML 1.1 reads it as a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

PACKAGE = Path(__file__).parent
CONFIGS = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
"""Our recipes and label tables: in an installed package, else in the repository."""

Origins = dict[str, str]
"""Dotted key -> "file.yaml:12", for messages."""

MAX_MISTAKES = 12
"""Of a configuration, that one message lists."""
MAX_VALUES = 1_000_000
"""Of a configuration. A few lines of YAML whose anchors name each other can state more values than memory holds."""
MAX_DEPTH = 50
"""Of files that each name the next as their base."""


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, extra: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read, merge, override and check a configuration.

    Args:
        path: the YAML file.
        overrides: ``a.b=value`` strings (``--set``); the value is read as YAML.
        extra: further values by dotted key, from command-line flags of their own.
    Raises:
        ConfigError: naming the file and line, the key, what is allowed and the nearest valid spelling.
    """
    tree, origins = _read_merged(find_config(path))
    _override(tree, overrides, origins)
    for key, value in (extra or {}).items():
        _assign(tree, key, value, f"--{key.rpartition('.')[2]}", origins)
    wanted = [key for key, field in RunConfig.model_fields.items() if field.is_required() and key != "data"]
    if "data" in tree and not set(wanted) & set(tree):
        raise ConfigError(
            f"{path}: not the config of a run: it has no {', '.join(wanted)}. Start one from a recipe and this file:"
            f" base: [configs/projects/spade/camvid/base256.yaml, {path}]"
        )
    return _check(RunConfig, tree, origins, str(path))


def load_data(path: str | Path, overrides: Iterable[str] = ()) -> LabelledData:
    """Load what a configuration says of its data set: the config of a run, or a label table alone (configs/labels/).

    Of the sections beside ``data`` only the names are checked.

    Args:
        path, overrides: as of ``load_config``.
    Raises:
        ConfigError: like ``load_config``; or there is no label table, with what to write.
    """
    tree, origins = _read_merged(find_config(path))
    _override(tree, overrides, origins)
    data = tree.get("data")
    if not isinstance(data, dict) or "labels" not in data:
        raise ConfigError(
            f"{path}: no label table, in it or in its base. Write data: {{labels: {{num_classes: N, ignore: [255],"
            " names: [...]}}, or take one: base: configs/labels/camvid.yaml"
        )
    tree["data"] = {key: value for key, value in data.items() if key != "type"}  # a class that is not needed here
    fields: dict[str, Any] = dict.fromkeys(RunConfig.model_fields, (Any, None))
    fields["data"] = (DataConfig if "train" in data else LabelledData, ...)
    content: Any = _check(create_model("file", __base__=Section, **fields), tree, origins, str(path))
    return content.data


def load_labels(path: str | Path) -> LabelSpec:
    """Load the label table of ``load_data``.

    Raises:
        ConfigError: like ``load_data``.
    """
    return load_data(path).labels


def parse_config(tree: Any, source: str = "config", overrides: Iterable[str] = ()) -> RunConfig:
    """Check a plain tree, as YAML or a checkpoint holds it, and fill in the defaults.

    Args:
        tree: a mapping; its first keys may be dotted (``trainer.init.gain``); a later one goes before an earlier.
        source: where the tree is from, for messages.
        overrides: as of ``load_config``.
    Raises:
        ConfigError: like ``load_config``.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source}: holds a {type(tree).__name__} in place of a configuration")
    nested, origins = dict[str, Any](), Origins()
    for key, value in tree.items():
        _assign(nested, str(key), value, source, origins)
    _override(nested, overrides, origins)
    return _check(RunConfig, nested, origins, source)


def parse_component(tree: Any, registry: Registry, name: str) -> Component:
    """Check one component's tree, such as ``{"type": "spade", "num_filters": 32}``, and fill in its defaults.

    Args:
        name: what the messages call the component.
    Raises:
        ConfigError: like ``load_config``.
    """
    fields: dict[str, Any] = {name: (Annotated[Component, registry], ...)}
    component: Component = getattr(_check(create_model("part", **fields), {name: tree}, {}, name), name)
    return component


def read_yaml(text: str, where: str, lines: Origins | None = None) -> Any:
    """Parse a YAML document into plain types; 1e-4 is a number.

    Args:
        where: the file's name, for messages.
        lines: takes the place of every key, if given; then no key may be stated twice.
    Raises:
        ConfigError: it is not YAML, a value is none of its type or endless, or a key is stated twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_values(node)
        if lines is not None:
            lines.update(_key_lines(node, "", where))
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except Exception as error:  # of a date, number or tag that is none PyYAML raises whatever comes
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def dump_config(config: RunConfig) -> dict[str, Any]:
    """Return the fully resolved configuration as a plain tree; ``parse_config`` reads it back."""
    tree = config.model_dump(mode="json")
    # JSON turned the integer keys of remap into strings; YAML keeps integers.
    tree["data"]["labels"]["remap"] = {int(k): v for k, v in tree["data"]["labels"]["remap"].items()}
    return tree


def dump_yaml(config: RunConfig) -> str:
    """Write the fully resolved configuration as YAML."""
    return yaml.safe_dump(dump_config(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


# ------------------------------------------------------------------------------------------------ the tree


def find_config(path: str | Path, folder: Path = Path()) -> Path:
    """Find a config: the file ``path``, seen from ``folder``, else for ``configs/...`` ours of that name."""
    path, found = Path(path), Path(os.path.normpath(folder / path))
    ours = CONFIGS.parent / path
    return ours if path.parts[:1] == ("configs",) and not found.exists() and ours.exists() else found


def _read_merged(
    path: Path, chain: tuple[Path, ...] = (), known: dict[Path, tuple[dict[str, Any], Origins]] | None = None
) -> tuple[dict[str, Any], Origins]:
    """Read a file over its bases: the tree, and where each key is stated.

    Args:
        chain: the files whose base this is.
        known: gets what was read, so that a base that many files name is read once.
    """
    known = {} if known is None else known
    try:
        resolved = path.resolve()
        if resolved in chain:
            raise ConfigError(f"{path}: base files form a circle: {' -> '.join(map(str, (*chain, resolved)))}")
        if resolved in known:
            return known[resolved]
        if len(chain) > MAX_DEPTH:
            raise ConfigError(f"{path}: the base of a base of a base ..., {len(chain)} deep: name fewer")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        at = f" (named as base by {chain[-1]})" if chain else ""
        hint = ""
        if "configs" in path.parts:  # ours lie in the package, where a user does not look
            ours = [file.relative_to(CONFIGS.parent).as_posix() for file in sorted(CONFIGS.rglob("[!_]*.yaml"))]
            hint = (
                did_you_mean("/".join(path.parts[path.parts.index("configs") :]), ours) + f" Recipes lie in {CONFIGS}"
            )
        raise ConfigError(f"{path}: no such config file{at}{hint}") from None
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # (links in a circle, or a zero byte in the name)
        raise ConfigError(f"{path}: cannot be read as a config file, text in UTF-8: {error}") from None
    own_origins = Origins()
    own = read_yaml(text, str(path), own_origins)
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys (gen, dis, data, ...), this is {type(own).__name__}")
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: {bases!r}: write the name of a file, or a list of names")
    tree, origins = dict[str, Any](), Origins()
    for base in bases:
        base_tree, base_origins = _read_merged(find_config(base, path.parent), (*chain, resolved), known)
        tree = _merge(tree, base_tree)
        origins |= base_origins
    known[resolved] = _merge(tree, own), origins | own_origins
    return known[resolved]


def _key_lines(node: yaml.Node | None, prefix: str, where: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, "file:line") of every key of a composed document."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        dotted, place = f"{prefix}{key.value}", f"{where}:{key.start_mark.line + 1}"
        if dotted in seen:
            raise ConfigError(f"{place}: {dotted} is stated twice: keep one")
        seen.add(dotted)
        yield dotted, place
        yield from _key_lines(value, f"{dotted}.", where)


def _merge(base: Any, own: Any, section: str = "") -> Any:
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    # Another component than the base's shares none of its keys; another class of the data set does.
    if section != "data" and own.get("type", base.get("type")) != base.get("type"):
        return own
    return base | {key: _merge(base[key], value, key) if key in base else value for key, value in own.items()}


def _override(tree: dict[str, Any], overrides: Iterable[str], origins: Origins) -> None:
    """Apply the values of ``--set`` to a tree."""
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {item}: write --set section.key=value, such as --set trainer.log_every=10")
        _assign(tree, key.strip(), read_yaml(text, f"--set {item}"), f"--set {item}", origins)


def _assign(tree: dict[str, Any], dotted: str, value: Any, origin: str, origins: Origins) -> None:
    *parents, last = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: {parent} is a value, not a section")
        node[parent] = dict(child)
        node = node[parent]
    node[last] = value
    for below in [key for key in origins if key.startswith(f"{dotted}.")]:
        del origins[below]
    origins[dotted] = origin


# ------------------------------------------------------------------------------------------------ checking


def _check_values(tree: Any) -> None:
    """Raise ValueError if a tree, or a document of YAML, states too many values, holds itself, or text that is none."""
    counts: dict[int, float] = {}

    def count(value: Any) -> float:
        value = value.value if isinstance(value, yaml.Node) else value
        if isinstance(value, str) and "\0" in value.encode().decode():  # (half a character cannot be encoded)
            raise ValueError(f"a zero byte in {value!r}")
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        if not isinstance(parts, list | tuple):
            return 1
        if id(value) not in counts:
            counts[id(value)] = math.inf  # until it is known: of what holds itself for ever
            counts[id(value)] = 1 + sum(map(count, parts))
        return counts[id(value)]

    if count(tree) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values (of anchors, & and *, that repeat or hold each other?)")


def _check(schema: type[S], tree: Mapping[str, Any], origins: Origins, source: str) -> S:
    """Validate a tree and fill in the defaults; every mistake is one line of the ConfigError."""
    data = tree.get("data")
    if isinstance(data, Mapping) and "labels" in data and data["labels"] is None:
        # (No validator of the field: behind one, JSON mode ends, and with it lists that are tuples.)
        tree = {**tree, "data": {**data, "labels": {"num_classes": 0, "dont_care": False}}}
    try:
        _check_values(tree)
        # JSON mode is strict about scalars ("4" is no int) and lets lists be tuples.
        return schema.model_validate_json(json.dumps(tree, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{source}: no configuration can hold this: {error}") from None
        lines = [*dict.fromkeys(_explain(error, (schema, schema), (), origins, source))]
        more = [f"... and {len(lines) - MAX_MISTAKES} more such mistakes"] * (len(lines) > MAX_MISTAKES)
        raise ConfigError("\n".join(lines[:MAX_MISTAKES] + more)) from None


def _explain(
    error: ValidationError, schemas: tuple[type[BaseModel], ...], prefix: tuple[str, ...], origins: Origins, source: str
) -> Iterator[str]:
    """Yield one line per mistake: file:line, key, what is wrong, what is allowed, where else there is such a key or the
    nearest spelling.

    Args:
        schemas: of the section at ``prefix``, and of the whole.
    """
    schema, whole = schemas
    told = set[tuple[str, ...]]()  # sections whose keys are listed
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        if parts[::2] == ["losses", "component"]:
            parts.pop()  # a field of ``Loss``, no key of YAML
        where = (*prefix, *parts)
        at, key = _origin(where, origins, source), ".".join(where)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, InvalidKeysError):
            yield from _explain(cause.error, (cause.schema, whole), where, origins, source)
        elif isinstance(cause, ConfigError):
            yield f"{_origin((*where, 'type'), origins, source)}: {key + ': ' if key else ''}{cause}"
        elif item["type"] == "extra_forbidden":
            allowed = _fields_at(schema, parts[:-1])
            places = list(_places(whole, parts[-1]))
            is_clear = 1 <= len(places) <= 3
            meant = f"; did you mean {' or '.join(places)}?" if is_clear else did_you_mean(parts[-1], allowed)
            hint, section = meant or ".", tuple(parts[:-1])
            listed = "" if section in told else f" Allowed here: {', '.join(sorted(allowed))}"
            told.add(section)
            yield f"{at}: {key}: unknown key{hint}{listed}"
        elif item["type"] == "missing":
            yield f"{at}: {key}: missing; write a value for it"
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            lead = "must be " if item["msg"].startswith("Input should be ") else ""
            given = item["input"]
            shown = "" if isinstance(given, dict) else f" (given: {given!r})"
            yield f"{at}: {key + ': ' if key else ''}{lead}{message}{shown}"


def _origin(where: tuple[str, ...], origins: Origins, source: str) -> str:
    """Return file and line of the nearest stated key at or above ``where``."""
    for length in range(len(where), 0, -1):
        if ".".join(where[:length]) in origins:
            return origins[".".join(where[:length])]
    return source


def _fields_at(schema: type[BaseModel], path: list[str]) -> set[str]:
    """Return the names of the keys allowed in the section that ``path`` leads to."""
    for part in (part for part in path if not part.isdigit()):  # the place in a list
        schema = _section(schema, part) or schema
    return set(schema.model_fields)


def _places(schema: type[BaseModel], name: str, path: str = "") -> Iterator[str]:
    """Yield the keys of sections that are called ``name``, each with its sections."""
    for field in schema.model_fields:
        if field == name:
            yield f"{path}{name}" if path else f"{name} at the top level"
        elif field != "losses" and (inner := _section(schema, field)):  # those are by name
            yield from _places(inner, name, f"{path}{field}.")


def _section(schema: type[BaseModel], field: str) -> type[BaseModel] | None:
    """Return the schema of the section that a key holds; None: it holds none."""
    annotation = schema.model_fields[field].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
