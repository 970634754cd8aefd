"""Start a run from the weights of another one (``train.py --init_from``), also with other classes or without edges.

Responsible for which channel of the new label map takes which of the old one, and for the tensors that see label maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imaginaire_spade.build import build_discriminator, build_encoder, build_generator, layout_spec
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_diff import explain_mismatch
from imaginaire_spade.config_files import parse_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.oasis import OASISGenerator
from imaginaire_spade.models.spectral_norm import SpectralNorm
from imaginaire_spade.training.checkpoint import BEST, check_tensors, load_checkpoint, newest_checkpoint, read_published
from imaginaire_spade.training.setup import PARTS, Run
from imaginaire_spade.training.state import update_average

BUILD: dict[str, Callable[[RunConfig], nn.Module | None]] = {
    "generator": build_generator, "discriminator": build_discriminator, "encoder": build_encoder,
}  # fmt: skip

POWER_ITERATIONS = 20
"""For a weight whose spectral norm has to be estimated anew."""


def initialise_from(run: Run, path: Path) -> str:
    """Give the networks of a fresh run the weights of a checkpoint; EMA, optimizers and counters stay fresh.

    Classes are matched by name, or by id where one of the two label tables has no names; a class without a match keeps
    its random weights.

    Args:
        path: a checkpoint, a published generator (``.safetensors``), or a log dir (its newest checkpoint).
    Returns:
        What was taken from where, as lines of text.
    Raises:
        CheckpointError: it cannot be read, or its networks are others.
    """
    chosen = _find(path)
    content = read_published(chosen) if chosen.suffix == ".safetensors" else load_checkpoint(chosen)
    trained = parse_config(content.get("config"), source=str(chosen))
    is_raw = {name: content.get(name) is not None for name in PARTS.values()}
    stored: dict[str, Any] = {name: content.get(name if raw else f"{name}_ema") for name, raw in is_raw.items()}
    present = [p for p, name in PARTS.items() if stored[name] is not None and getattr(run.config, p) is not None]
    for name in (PARTS[part] for part in present):
        with torch.device("meta"):
            planned = BUILD[name](trained)
        places = {} if planned is None else planned.state_dict()
        check_tensors(stored[name], places, f"--init_from {chosen}: its {name} does not fit its own config")
    ours = {"labels": run.config.data.labels, "edges": run.config.data.edges}
    same_data = trained.model_copy(update={"data": trained.data.model_copy(update=ours)})
    if differences := explain_mismatch(same_data, run.config, parts=present):
        raise CheckpointError(f"--init_from {chosen} does not fit this config: {'; '.join(differences)}")
    sources = _match_channels(trained, run.config)
    lines = [f"starting from the weights of {chosen}; optimizers, schedule, counters and EMA are fresh"]
    for part, name in PARTS.items():
        network = getattr(run.state, name)
        if network is not None and part in present:
            count = _transfer(network, stored[name], _label_axes(name, run.config), trained, run.config, sources)
            lines.append(f"  {name}: {count} tensors" + ("" if is_raw[name] else " (of the EMA)"))
        elif network is not None:
            lines.append(f"  {name}: fresh, {chosen.name} has none")
    for average, network in run.state.averages():
        update_average(average, network, 0.0)
    return "\n".join(lines + _describe(trained, run.config, sources))


def _find(path: Path) -> Path:
    """Return the checkpoint file that ``path`` means.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        return path
    best = path / "checkpoints" / BEST
    if (found := newest_checkpoint(path) or (best if best.is_file() else None)) is None:
        raise CheckpointError(f"--init_from {path}: no checkpoint is there")
    return found


def _match_channels(old: RunConfig, new: RunConfig) -> list[int | None]:
    """Return, for each channel of the new layout, the channel of the old one that it continues."""
    before, now = old.data.labels, new.data.labels
    known: Mapping[Any, int] = {i: i for i in range(before.num_classes)}
    wanted: Sequence[Any] = range(now.num_classes)
    if before.names and now.names:
        known = {name.strip().casefold(): i for i, name in enumerate(before.names)}
        wanted = [name.strip().casefold() for name in now.names]
    sources = [known.get(name) for name in wanted]
    if now.dont_care:
        sources.append(before.dont_care_id if before.dont_care else None)
    spec = layout_spec(old)
    if layout_spec(new).has_edges:
        sources.append(spec.num_label_channels if spec.has_edges else None)
    return sources + list(range(spec.num_channels - spec.num_conditions, spec.num_channels))  # equal in both


def _label_axes(name: str, config: RunConfig) -> dict[str, int]:
    """Map each tensor that sees label maps to the axis that counts their channels: the one that grows with them."""

    def shapes(num_classes: int) -> dict[str, torch.Size]:
        labels = config.data.labels.model_copy(update={"num_classes": num_classes, "names": (), "palette": ()})
        grown = config.model_copy(update={"data": config.data.model_copy(update={"labels": labels})})
        with torch.device("meta"):
            network = BUILD[name](grown)
        assert network is not None
        return {key: tensor.shape for key, tensor in network.state_dict().items()}

    small, large = shapes(num_classes := config.data.labels.num_classes), shapes(num_classes + 1)
    return {
        key: next(axis for axis, (a, b) in enumerate(zip(shape, large[key], strict=True)) if a != b)
        for key, shape in small.items()
        if shape != large[key]
    }


@torch.no_grad()
def _transfer(
    network: nn.Module,
    stored: Mapping[str, Tensor],
    axes: Mapping[str, int],
    old: RunConfig,
    new: RunConfig,
    sources: Sequence[int | None],
) -> int:
    """Copy tensors into a network. Return their number.

    Args:
        stored: the other network's, spectral norms folded or not.
        axes: see ``_label_axes``.
        sources: see ``_match_channels``.
    """
    count, own = 0, network.state_dict()
    # The norm "concat" appends the layout to activations, for the next convolution to see. In OASIS noise comes before
    # the labels, and the score "generated" before the classes.
    appended = isinstance(network, OASISGenerator) or getattr(network, "scores_classes", False)
    appended |= isinstance(network, Generator) and getattr(new.gen.args.get("norm"), "type", "") == "concat"
    for key, place in own.items():
        value = stored.get(key)
        if value is None or (key.endswith(".weight_v") and key in axes):  # (estimated below)
            continue
        if key not in axes:
            if value.shape != place.shape:
                raise CheckpointError(f"{key} has shape {list(value.shape)}, not {list(place.shape)}")
            place.copy_(value)
        else:
            _copy_channels(place, value.to(place), axes[key], old, new, sources, appended)
        count += 1
    for name, layer in network.named_modules():
        if isinstance(layer, SpectralNorm) and (f"{name}.weight_u" not in stored or f"{name}.weight" in axes):
            for _ in range(POWER_ITERATIONS):
                layer.iterate()
    return count


def _copy_channels(
    place: Tensor,
    value: Tensor,
    axis: int,
    old: RunConfig,
    new: RunConfig,
    sources: Sequence[int | None],
    comes_last: bool,
) -> None:
    """Copy the channels of the layout by ``sources``, and those beside them as they are."""
    # Rows are per class (CLADE). Columns are the layout's channels, then others, such as images.
    counts = [spec.num_channels if axis else spec.num_label_channels for spec in (layout_spec(new), layout_spec(old))]
    beside = place.shape[axis] - counts[0]
    first = beside if comes_last and beside else 0
    for channel, source in enumerate(sources[: counts[0]]):
        if source is not None:
            place.select(axis, first + channel).copy_(value.select(axis, first + source))
    start, was = (0, 0) if first else counts
    place.narrow(axis, start, beside).copy_(value.narrow(axis, was, beside))


def _describe(old: RunConfig, new: RunConfig, sources: Sequence[int | None]) -> list[str]:
    """List the classes and where their weights come from; one line if all come from themselves."""
    before, now, spec = old.data.labels, new.data.labels, layout_spec(new)
    if list(sources) == list(range(layout_spec(old).num_channels)):
        return [f"  all {now.num_classes} classes continue" if now.num_classes else "  all inputs continue"]
    width = max(len(now.name(i)) for i in range(now.num_classes + 1))
    lines = [f"  {'class':>5}  {'':{width}}  takes the weights of"]
    for channel, source in enumerate(sources[: spec.num_channels - spec.num_conditions]):
        is_edge = channel == spec.num_label_channels
        taken = "new" if source is None else "the edges" if is_edge else f"{source} {before.name(source)}"
        lines.append(f"  {channel:>5}  {'edges' if is_edge else now.name(channel):{width}}  {taken}")
    left = [before.name(i) for i in range(before.num_classes) if i not in sources[: spec.num_label_channels]]
    lines += [f"  no longer there: {', '.join(left)}"] if left else []
    return lines + (["  the conditions continue"] if spec.num_conditions else [])
