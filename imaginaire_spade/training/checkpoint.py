"""Checkpoints on disk: written whole or not at all, self-describing, read without running code.

A checkpoint is a dict of tensors and plain types: ``format``, ``version``, ``config`` (the fully resolved tree, label
table included) and the fields of ``TrainState``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

import imaginaire_spade
from imaginaire_spade.config import RunConfig, dump_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.training.state import TrainState

FORMAT = "imaginaire_spade.checkpoint.1"
_NAME = re.compile(r"^checkpoint_(\d{12})\.pt$")


def checkpoint_path(directory: Path, images_seen: int) -> Path:
    return directory / f"checkpoint_{images_seen:012d}.pt"


def checkpoints_in(directory: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(p for p in directory.glob("checkpoint_*.pt") if _NAME.match(p.name)) if directory.is_dir() else []


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint of a log dir or of its ``checkpoints`` folder; None where there is none."""
    found = checkpoints_in(directory / "checkpoints") or checkpoints_in(directory)
    return found[-1] if found else None


def save_checkpoint(directory: Path, state: TrainState, config: RunConfig, keep_last: int) -> Path:
    """Write ``checkpoint_<images_seen>.pt`` atomically, then delete all but the newest ``keep_last``.

    Raises:
        CheckpointError: nothing was written; older checkpoints are untouched.
    """
    path = checkpoint_path(directory, state.images_seen)
    write_checkpoint(path, {"config": dump_config(config), **state.state_dict()})
    for old in checkpoints_in(directory)[:-keep_last]:
        old.unlink(missing_ok=True)
    return path


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = {"format": FORMAT, "version": imaginaire_spade.__version__, **content}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: could not be written ({error}). Free some space or correct the permissions; earlier checkpoints"
            " are untouched and the same command continues from the newest"
        ) from None


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ours. Raises CheckpointError where it is absent, damaged or foreign."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint, it is damaged or foreign ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this package. One of another system is converted by"
            " scripts/import_checkpoint.py"
        )
    return content


def load_newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a folder that can be read; damaged ones are named and passed over."""
    for path in reversed(checkpoints_in(directory)):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            print(f"warning: {error}; taking the one before", flush=True)
    return None
