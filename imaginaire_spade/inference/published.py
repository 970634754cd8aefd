"""Publish a trained generator as one file: weights for inference in safetensors, which runs no code when read.

Tensors ``generator.*`` and, where there is a style encoder, ``encoder.*``, spectral norms folded. The metadata holds
``format``, ``version`` (of this package), ``config`` (JSON, fully resolved, label table included), ``weights`` (``ema``
or ``raw``) and ``images_seen``. Folders of the machine it was trained on are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_files import dump_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.files import atomic_write
from imaginaire_spade.version import __version__

PUBLISHED = "imaginaire_spade.generator.1"


def publish_generator(
    path: Path, generator: nn.Module, encoder: nn.Module | None, config: RunConfig, *, weights: str, images_seen: int
) -> None:
    """Write a trained generator to ``path``, whole or not at all.

    Args:
        generator, encoder: as ``load_generator`` gives them, not frozen.
        weights: "ema" or "raw": which they are.
    Raises:
        CheckpointError: the file cannot be written.
    """
    networks = {"generator": generator, "encoder": encoder}
    tensors = {
        f"{name}.{key}": tensor.cpu().contiguous()
        for name, network in networks.items()
        if network is not None
        for key, tensor in network.state_dict().items()
    }
    metadata = {
        "format": PUBLISHED,
        "version": __version__,
        "config": json.dumps(_without_places(config)),
        "weights": weights,
        "images_seen": str(images_seen),
    }
    try:
        with atomic_write(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask leaves; save_file makes a file for its owner alone
            save_file(tensors, temporary, metadata)
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be written ({error})") from None


def read_published(path: Path) -> dict[str, Any]:
    """The file as a checkpoint that holds ``generator`` (and ``encoder``) or their averages, whichever it was made of.

    Raises CheckpointError where it is absent, damaged or foreign.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.get("format") != PUBLISHED:
            raise CheckpointError(f"{path}: not written by scripts/export_generator.py, so it does not say what it is")
        config, images_seen = json.loads(metadata["config"]), int(metadata["images_seen"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as a published generator, it is damaged ({error})") from None
    content: dict[str, Any] = {"format": PUBLISHED, "config": config, "images_seen": images_seen}
    suffix = "_ema" if metadata.get("weights") == "ema" else ""
    for name in ("generator", "encoder"):
        state = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
        content |= {name: None, f"{name}_ema": None} | ({f"{name}{suffix}": state} if state else {})
    return content


def _without_places(config: RunConfig) -> dict[str, Any]:
    tree = dump_config(config)
    for split in filter(None, (tree["data"]["train"], tree["data"]["val"])):
        split["roots"] = [Path(root).name for root in split["roots"]]
    return tree | {"test_data": None, "pretrained_weight": None}
