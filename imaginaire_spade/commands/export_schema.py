"""Write the JSON schema of configs: editors then complete keys, show what they mean and mark mistakes.

    imaginaire-spade export schema --output config.schema.json

In VS Code (extension YAML) or any editor with yaml-language-server, the first line of a config names it:

    # yaml-language-server: $schema=config.schema.json

No key is required in it, as a base may state it. What training refuses besides (combinations of keys), it cannot say.
"""

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from imaginaire_spade.cli import CommandParser, add_shared_flags, check_output_file
from imaginaire_spade.config import RunConfig
from imaginaire_spade.files import write_bytes
from imaginaire_spade.registry import LOSSES, Registry

Tree = dict[str, Any]


class _ComponentSchema(GenerateJsonSchema):
    """Says of a component: the name of a registered class, or a mapping of ``type`` and the keys of one."""

    def function_plain_schema(self, schema: Any) -> Tree:
        registry = schema["function"]["function"].__self__
        names = registry.names()
        return {"anyOf": [{"enum": names}, *(self.keys_of(registry, name) for name in names)]} if names else {}

    def keys_of(self, registry: Registry, name: str) -> Tree:
        tree = self.resolve_ref_schema(self.generate_inner(registry.schema(name).__pydantic_core_schema__))
        return tree | {"properties": {"type": {"const": name}, **tree.get("properties", {})}}


def config_schema() -> Tree:
    """Build the JSON schema of a configuration file, with the components that are registered now."""
    tree = _without_required(RunConfig.model_json_schema(schema_generator=_ComponentSchema))
    keys = tree["properties"]
    losses = {name: _without_required(LOSSES.schema(name).model_json_schema()) for name in LOSSES.names()}
    weight = {"type": "number", "minimum": 0}
    for loss in losses.values():
        loss["properties"] = {"weight": weight, **loss.get("properties", {})}
    keys["losses"] |= {
        "properties": {name: {"anyOf": [weight, loss]} for name, loss in losses.items()}, "additionalProperties": False
    }  # fmt: skip
    keys["base"] = {"type": ["string", "array"], "items": {"type": "string"}, "description": "Files to start from."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | tree


def _without_required(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_required(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {k: _without_required(v) for k, v in tree.items() if k != "required" or not isinstance(v, list)}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json")
    add_shared_flags(parser, "--import")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args()

    from imaginaire_spade.build import import_modules

    check_output_file(arguments.output, overwrite=arguments.overwrite, suffixes=(".json",))
    import_modules(arguments.imports)
    write_bytes(arguments.output, (json.dumps(config_schema(), indent=1) + "\n").encode())
    print(f"wrote {arguments.output}")
