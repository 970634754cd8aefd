"""Whether a checkpoint fits a configuration, said in words instead of tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from imaginaire_spade.config import Component, RunConfig

RUNTIME_KEYS = {"path"}
"""Keys of components that change how numbers are computed, not which: weights fit either way."""


def explain_mismatch(
    trained: RunConfig, given: RunConfig, *, parts: Sequence[str] = ("gen", "dis", "encoder")
) -> list[str]:
    """Every difference that keeps weights trained with one config from another's networks; empty where they fit.

    Compares what networks are made of: the layout's channels and the components ``parts`` with each of their keys.
    How raw label maps are read (``ignore``, ``remap``), names, colours and everything about the run may differ.
    """
    differences = []
    old, new = trained.data, given.data
    if old.labels.num_classes != new.labels.num_classes:
        differences.append(
            f"trained with {old.labels.num_classes} classes, this config has {new.labels.num_classes}"
            " (data.labels.num_classes)"
        )
    if old.labels.dont_care != new.labels.dont_care:
        differences.append(
            f"trained with{'' if old.labels.dont_care else 'out'} a don't-care channel, this config has"
            f" {'one' if new.labels.dont_care else 'none'} (data.labels.dont_care)"
        )
    if (old.edges == "none") != (new.edges == "none"):
        differences.append(
            f"trained with{'out' if old.edges == 'none' else ''} an edge channel, this config has"
            f" {'none' if new.edges == 'none' else 'one'} (data.edges: {old.edges}, now {new.edges})"
        )
    for part in parts:
        differences += _component_differences(part, _tree(getattr(trained, part)), _tree(getattr(given, part)))
    # A style code is turned into a start picture of fixed size (gen.style_dims > 0 only).
    sizes = [config.data.train.augmentations.output_h_w for config in (trained, given)]
    if not differences and given.gen.args.get("style_dims") and sizes[0] != sizes[1]:
        before, now = ("x".join(map(str, size)) if size else "their own sizes" for size in sizes)
        differences.append(
            f"trained on pictures of {before}, this config has {now} (data.train.augmentations), and with"
            " gen.style_dims > 0 the generator starts from a code of that size"
        )
    return differences


def _tree(component: Component | None) -> Mapping[str, Any] | None:
    return None if component is None else component.model_dump(mode="json")


def _component_differences(key: str, trained: Any, given: Any) -> list[str]:
    if trained == given:
        return []
    if _is_component(trained) and _is_component(given) and trained["type"] == given["type"]:
        old, new = trained["args"], given["args"]
        return [
            line
            for name in [*old, *(name for name in new if name not in old)]
            if name not in RUNTIME_KEYS
            for line in _component_differences(f"{key}.{name}", old.get(name), new.get(name))
        ]
    if _is_component(trained) and _is_component(given):
        key = f"{key}.type"
    return [f"trained with {key}: {_shown(trained)}, this config has {_shown(given)}"]


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"type", "args"}


def _shown(value: Any) -> str:
    if _is_component(value):
        return str(value["type"])
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
