"""Compare configurations: list what changed, and explain in words, not tensor shapes, whether a checkpoint fits."""

from collections.abc import Mapping, Sequence
from typing import Any

from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_files import dump_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.registry import Component

RUNTIME_KEYS = {"path"}
"""Keys of components that change how numbers are computed, not which: weights fit either way."""


def explain_mismatch(
    trained: RunConfig, given: RunConfig, *, parts: Sequence[str] = ("gen", "dis", "encoder")
) -> list[str]:
    """List every difference that keeps weights trained with one config from another's networks; empty if they fit.

    Compares what networks are made of: the layout's channels and the components ``parts`` with each of their keys.
    How raw label maps are read (``ignore``, ``remap``), names, colours and everything about the run may differ.
    """
    old, new = trained.data, given.data
    differences = _label_differences(old.labels, new.labels)
    if (old.edges == "none") != (new.edges == "none"):
        differences.append(
            f"trained with{'out' if old.edges == 'none' else ''} an edge channel, this config has"
            f" {'none' if new.edges == 'none' else 'one'} (data.edges: {old.edges}, now {new.edges})"
        )
    if old.images.channels != new.images.channels:
        differences.append(
            f"trained on images of {old.images.channels} channels, this config has {new.images.channels}"
            " (data.images.channels)"
        )
    inputs = ["; ".join(f"{c.name} ({c.channels})" for c in data.conditions) or "none" for data in (old, new)]
    if inputs[0] != inputs[1]:
        differences.append(f"trained with data.conditions (channels): {inputs[0]}; this config has {inputs[1]}")
    for part in parts:
        differences += _component_differences(part, getattr(trained, part), getattr(given, part))
    # A style code is turned into a start image of fixed size (gen.style_dims > 0 only; OASIS's is noise).
    sizes = [config.data.train.augmentations.output_h_w for config in (trained, given)]
    fixes_size = given.gen.args.get("style_dims") and given.gen.type != "oasis"
    if not differences and fixes_size and sizes[0] != sizes[1]:
        before, now = ("x".join(map(str, size)) if size else "their own sizes" for size in sizes)
        differences.append(
            f"trained on images of {before}, this config has {now} (data.train.augmentations), and with"
            " gen.style_dims > 0 the generator starts from a code of that size"
        )
    return differences


def check_fits(trained: RunConfig, given: RunConfig, where: str, *, parts: Sequence[str] = ("gen",)) -> None:
    """Check that a config describes the networks of a checkpoint.

    Args:
        where: what describes them, for the message.
        parts: of the config, to compare.
    Raises:
        CheckpointError: it describes others; with an explanation.
    """
    if differences := explain_mismatch(trained, given, parts=parts):
        raise CheckpointError(
            f"{where} does not fit the checkpoint:\n  " + "\n  ".join(differences) + "\nThe checkpoint carries its own"
            " config: leave that out, or give the checkpoint of this config"
        )


def _label_differences(old: LabelSpec, new: LabelSpec) -> list[str]:
    if has_ade20ks_raw_ids(old) and counts_ade20k_from_0(new):
        return [
            "trained on ADE20K's raw ids, as the 2019 SPADE release and CLADE read them (151 classes, other first); in"
            " this config class k is k - 1 (data.labels): write configs/labels/ade20k_release.yaml last in its base"
        ]
    differences = []
    if old.num_classes != new.num_classes:
        differences.append(
            f"trained with {old.num_classes} classes, this config has {new.num_classes} (data.labels.num_classes)"
        )
    if old.dont_care != new.dont_care:
        differences.append(
            f"trained with{'' if old.dont_care else 'out'} a don't-care channel, this config has"
            f" {'one' if new.dont_care else 'none'} (data.labels.dont_care)"
        )
    return differences


def counts_ade20k_from_0(labels: LabelSpec) -> bool:
    """Whether a table is that of configs/labels/ade20k.yaml: of 150 classes, k is k - 1, and raw id 0 don't care."""
    return (labels.num_classes, labels.dont_care) == (150, True) and labels.channel_order == [150, *range(150)]


def has_ade20ks_raw_ids(labels: LabelSpec) -> bool:
    """Whether a table is that of configs/labels/ade20k_release.yaml: raw id r is class r, of 151."""
    return (labels.num_classes, labels.dont_care) == (151, False) and labels.channel_order == list(range(151))


def explain_import(content: Mapping[str, Any], given: LabelSpec) -> list[str]:
    """Explain why an imported checkpoint cannot be fine-tuned on a label table though the networks fit.

    Returns an empty list if it can be.
    """
    if content.get("imported_from") not in ("nvlabs_spade", "clade") or not counts_ade20k_from_0(given):
        return []
    return [
        "its weights saw ADE20K's raw ids, in this config class k is k - 1 (data.labels): write"
        " configs/labels/ade20k_release.yaml last in its base, and import the weights again, with a recipe of ADE20K as"
        " --config"
    ]


def explain_old_import(content: Mapping[str, Any], labels: LabelSpec) -> str | None:
    """Explain what is wrong with a checkpoint of ADE20K that an older import_checkpoint.py wrote; None: nothing.

    Args:
        content: the checkpoint.
        labels: its label table.
    """
    untrained = not content.get("images_seen") and content.get("gen_optimizer") is None
    if not untrained or content.get("imported_from") is not None or not counts_ade20k_from_0(labels):
        return None
    return (
        "the weights seem imported from the 2019 SPADE release or from CLADE under a label table in which ADE20K's"
        " class k is k - 1, but they were trained on raw ids: every class is taken for its neighbour. Import them again"
        " with scripts/import_checkpoint.py"
    )


def list_changes(trained: RunConfig, given: RunConfig) -> dict[str, str]:
    """Map every dotted key whose value differs to "old -> new"."""
    return _changes(dump_config(trained), dump_config(given), "")


def _changes(old: Any, new: Any, key: str) -> dict[str, str]:
    if key == "data.labels.remap" or not all(value is None or isinstance(value, dict) for value in (old, new)):
        return {} if old == new else {key: f"{old} -> {new}"}
    old, new = old or {}, new or {}
    names = [*old, *(name for name in new if name not in old)]
    below = [_changes(old.get(name), new.get(name), f"{key}.{name}" if key else name) for name in names]
    return {name: change for changes in below for name, change in changes.items()}


def _component_differences(key: str, trained: Any, given: Any) -> list[str]:
    if trained == given:
        return []
    if isinstance(trained, Component) and isinstance(given, Component):
        if trained.type == given.type:
            return [
                line
                for name, value in trained.args.items()
                if name not in RUNTIME_KEYS
                for line in _component_differences(f"{key}.{name}", value, given.args[name])
            ]
        key = f"{key}.type"
    return [f"trained with {key}: {_in_words(trained)}, this config has {_in_words(given)}"]


def _in_words(value: Any) -> str:
    if isinstance(value, Component):
        return value.type
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)
