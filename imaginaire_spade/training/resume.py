"""Resume a run: choose the checkpoint, check that it fits config and data, and list what has changed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from imaginaire_spade import distributed
from imaginaire_spade.config_diff import explain_import, explain_mismatch, explain_old_import, list_changes
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.training.checkpoint import load_checkpoint, load_newest
from imaginaire_spade.training.setup import Run

PARTS = {"gen": "generator", "dis": "discriminator", "encoder": "encoder"}
"""Section of the config -> its network's name in a checkpoint."""

MEANING = ("data.labels.ignore", "data.labels.remap", "data.edges")
"""Keys that change the meaning of a label map, but not the networks. (``explain_mismatch`` has the others.)"""


def content_of(run: Run) -> dict[str, Any]:
    """Collect the checkpoint of a run; tensors stay on their devices."""
    content = {"config": dump_config(run.config), "run": _facts(run), **run.state.state_dict()}
    return content if run.evaluation is None else {**content, "evaluation": run.evaluation.state_dict()}


def resume(run: Run, logdir: Path, start_from: Path | None, allow_changed_data: bool = False) -> str | None:
    """Load the newest valid checkpoint of the log dir, else ``start_from``. Return a summary; None: fresh start.

    Raises:
        CheckpointError: it belongs to another architecture, label table or, unless allowed, data set.
    """
    newest = load_newest(logdir / "checkpoints")
    # Rank 0 decides, so that no two processes continue from different files.
    chosen = distributed.broadcast_object(newest[0] if newest else start_from)
    if chosen is None:
        return None
    content = newest[1] if newest is not None and newest[0] == chosen else load_checkpoint(chosen)
    present = [part for part, name in PARTS.items() if content.get(name) is not None]
    trained = parse_config(content["config"], source=str(chosen))
    differences = explain_mismatch(trained, run.config, parts=present) or explain_import(
        content, run.config.data.labels
    )
    if differences:
        raise CheckpointError(
            f"{chosen} does not fit this config: {'; '.join(differences)}. Use the config it was trained with, or"
            " another --logdir for a new run"
        )
    if content.get("gen_optimizer") is None:
        fresh = run.state.start_from(content, str(chosen))
        started = f"starting from the weights of {chosen}{''.join(f'; {name}: fresh' for name in fresh)}"
        old_import = explain_old_import(content, trained.data.labels)
        return started if old_import is None else f"{started}\nwarning: {old_import}"
    before, now = content.get("run") or {}, _facts(run)
    changed = list_changes(trained, run.config)
    other_data = [f"{key}: {changed[key]}" for key in MEANING if key in changed]
    if before and before["data_sha256"] != now["data_sha256"]:
        count = f"{before['data_samples']} samples then, {now['data_samples']} now"
        other_data.append(f"data.train.roots: not the samples it was trained on ({count})")
    if other_data and not allow_changed_data:
        raise CheckpointError(
            f"{chosen} was trained on other data: {'; '.join(other_data)}. Restore the data, or give another --logdir"
            " for a new run, or continue with the new data from here: --allow_changed_data"
        )
    run.state.load_state_dict(content, str(chosen))
    lines = [f"continuing from {chosen}: iteration {run.calendar.iteration(run.state.images_seen)}"]
    if run.evaluation is not None and (told := run.evaluation.load_state_dict(content.get("evaluation"))):
        lines.append(told)
    lines += _other_processes(before, now, run)
    lines += [f"changed since: {key}: {change}" for key, change in changed.items()]
    return "\n".join(lines)


def _facts(run: Run) -> dict[str, Any]:
    """Return the run facts stored in a checkpoint besides the config."""
    return {
        "world_size": run.info.world_size,
        "global_batch": run.calendar.global_batch,
        "data_samples": len(run.dataset),
        "data_sha256": hashlib.sha256("\n".join(run.dataset.keys).encode()).hexdigest(),
        "torch": str(torch.__version__),
    }


def _other_processes(before: Mapping[str, Any], now: Mapping[str, Any], run: Run) -> list[str]:
    """Describe what another number of processes, or another batch, changes."""
    if not before or (before["world_size"], before["global_batch"]) == (now["world_size"], now["global_batch"]):
        return []
    was, batch = before["global_batch"], now["global_batch"]
    lines = [
        f"then {before['world_size']} process(es) and {was} images per iteration, now {now['world_size']} and"
        f" {batch}: samples continue in the same order from number {run.state.images_seen}"
    ]
    if was != batch:
        total = run.calendar.total_iterations
        lines.append(
            f"iterations count {batch} images from now on: this is iteration"
            f" {run.calendar.iteration(run.state.images_seen)} of {total}, the whole run {total * batch} images, and"
            " the learning rates are those of the config, not scaled with the batch"
        )
    return lines
