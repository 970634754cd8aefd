"""Write docs/config.md: every key of a configuration, from the schema itself."""

import argparse
import inspect
import re
import types
import typing
from enum import Enum
from pathlib import Path

from pydantic import BaseModel

from imaginaire_spade.config import RunConfig
from imaginaire_spade.registry import (
    DISCRIMINATORS,
    ENCODERS,
    GENERATORS,
    LOSSES,
    NORMS,
    TRACKERS,
    UNET_ENCODERS,
    Component,
    Registry,
)

COMPONENT_KEYS = {"gen": GENERATORS, "dis": DISCRIMINATORS, "encoder": ENCODERS}
TARGET = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """# Configuration reference

Written by `python scripts/write_config_reference.py` from the schema; a test keeps it true.

A configuration is YAML. `base: FILE` (or a list of files) starts from others: mappings merge key by key, everything
else is replaced. Any key can be overridden on the command line: `--set trainer.log_every=10`. An unknown key, a wrong
type or an impossible combination is an error that names file and line. The resolved configuration lies in the log dir
and in every checkpoint.
"""


def type_name(annotation: object) -> str:
    """``int``, ``float or null``, ``one of a, b`` ..."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:  # with its bounds, which the messages state
        return type_name(arguments[0])
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join("null" if argument is type(None) else type_name(argument) for argument in arguments)
    if typing.get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {type_name(arguments[0])}"
        return f"[{', '.join(type_name(argument) for argument in arguments)}]"
    if typing.get_origin(annotation) is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    for registry in getattr(annotation, "__metadata__", ()):
        return f"{registry.kind}s"
    names = {int: "int", float: "float", str: "text", bool: "true or false"}
    return names.get(annotation, "section")  # type: ignore[call-overload]


def shown(default: object) -> str:
    if isinstance(default, BaseModel):
        return "see below"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{list(default)}`" if isinstance(default, tuple) else f"`{default}`"


def row(key: str, annotation: object, required: bool, default: object, meaning: str) -> str:
    value = "required" if required else shown(default)
    return f"| `{key}` | {type_name(annotation)} | {value} | {' '.join(meaning.split())} |".replace("|  |", "| |")


def section_model(annotation: object) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
            return candidate
    return None


def sections(model: type[BaseModel], path: str, written: dict[type[BaseModel], str]) -> list[str]:
    """Tables of ``model`` and of the sections in it; one that stands in two places is written once."""
    if model in written:
        return [f"\n## `{path}`\n", f"As [`{written[model]}`](#{written[model].replace('.', '')})."]
    written[model] = path
    lines = [f"\n## {f'`{path}`' if path else 'Top level'}\n", inspect.getdoc(model) or "", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    below = []
    for key, field in model.model_fields.items():
        nested = section_model(field.annotation)
        meaning = field.description or (nested and inspect.getdoc(nested)) or ""
        if not path and key in COMPONENT_KEYS:
            meaning, nested = f"The {COMPONENT_KEYS[key].kind}, see [components](#components).", None
        elif not path and key == "losses":
            nested = None
            meaning += " `name: weight` or `name: {weight: W, ...}`."
        elif nested is Component:
            nested = None
        default = field.get_default(call_default_factory=True)
        lines.append(row(key, field.annotation, field.is_required(), default, meaning.split("\n\n")[0]))
        if nested is not None:
            below += sections(nested, f"{path}.{key}" if path else key, written)
    return lines + below


def component(registry: Registry, name: str) -> list[str]:
    """Heading, docstring and keys of one registered class."""
    text = inspect.getdoc(registry[name]) or ""
    meanings = dict(re.findall(r"^    (\w+): (.+(?:\n        .+)*)", text.partition("Args:")[2], re.MULTILINE))
    described = text.partition("\nArgs:")[0].strip()
    lines = [f"\n### {registry.kind} `{name}`\n", described, ""]
    fields = registry.schema(name).model_fields
    parts = registry.parts(name)
    if fields:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        line = row(key, field.annotation, field.is_required(), field.default, meanings.get(key, ""))
        lines.append(line.replace("| section |", f"| a {parts[key].kind} |") if key in parts else line)
    return lines


def reference() -> str:
    lines = [HEAD, *sections(RunConfig, "", {})]
    lines += ["\n## Components\n", "Chosen by `type:`. Your own are registered by a module named with `--import`.", ""]
    for registry in (*COMPONENT_KEYS.values(), UNET_ENCODERS, NORMS, LOSSES, TRACKERS):
        for name in registry.names():
            lines += component(registry, name)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
