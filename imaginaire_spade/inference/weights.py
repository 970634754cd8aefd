"""Load a generator from a checkpoint, ready for use.

Owns which checkpoint file is meant (and its download), loading it into evaluation mode, and whether a config fits it.
"""

from __future__ import annotations

import sys
import tempfile
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from torch import nn

from imaginaire_spade.build import build_encoder, build_generator
from imaginaire_spade.compatibility import explain_mismatch, explain_old_import
from imaginaire_spade.config import RunConfig, WeightSource, dump_yaml, load_config, parse_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.files import file_sha256
from imaginaire_spade.inference.published import PUBLISHED, read_published
from imaginaire_spade.models.for_inference import optimise_for_inference
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.layers import fold_spectral_norm
from imaginaire_spade.training.checkpoint import check_counter, check_tensors, load_checkpoint, newest_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A trained generator, ready for use."""

    generator: Generator
    """In evaluation mode, without gradients, on ``device``."""
    encoder: nn.Module | None
    config: RunConfig
    """The checkpoint's own, with overrides."""
    images_seen: int
    weights: str
    """"ema" or "raw": what was loaded."""
    device: torch.device
    notes: tuple[str, ...] = ()
    """What the user should know."""
    precision: str = "fp32"
    """Arithmetic of the convolutions: "fp32", "bf16" or "fp16"; weights and statistics are float32 in any case."""

    @property
    def one_by_one(self) -> bool:
        """Whether pictures of a batch are made singly: on a CPU batching saves nothing, and some convolutions and all
        matrix products round differently by batch size."""
        return self.device.type == "cpu"

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """(height, width) of the images it was trained on; None where they were of many sizes."""
        return self.config.data.train.augmentations.output_h_w

    @property
    def size_multiple(self) -> int:
        return self.generator.size_multiple

    @property
    def style_dims(self) -> int:
        return self.generator.style_dims


def load_generator(
    path: Path,
    *,
    weights: str = "ema",
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    compiled: bool = False,
    frozen: bool = False,
) -> LoadedModel:
    """Load a checkpoint's generator, and its style encoder if it has one.

    Args:
        path: a checkpoint file of this package, or a generator that ``publish_generator`` wrote (``.safetensors``).
        weights: "ema" (moving average; "raw" where the checkpoint has none, with a note) or "raw".
        overrides: ``KEY=VALUE`` for the checkpoint's config: of whatever its weights do not depend on.
        precision: see ``LoadedModel``.
        compiled: compile the generator (``torch.compile``) at its first use, which takes minutes.
        frozen: bring the weights into the form that is fastest here (``models/for_inference.py``); layers and the names
            of weights change.
    Raises:
        CheckpointError: absent, damaged, foreign, or not of the architecture that its own config (or ``overrides``)
            describes.
        ConfigError: a component of the user's own is not registered, or ``overrides`` are wrong.
    """
    content = read_published(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    if missing := {"config", "generator"} - set(content):
        raise CheckpointError(f"{path}: a checkpoint without {' and '.join(sorted(missing))}: not one to generate with")
    if not _has_label_table(content["config"]):
        raise CheckpointError(
            f"{path}: a checkpoint without a label table (data.labels of its config), so label maps mean nothing to it."
            " What train.py and scripts/import_checkpoint.py write has one: take that file as it is"
        )
    trained = parse_config(content["config"], source=str(path))
    config = with_overrides(trained, overrides, path.name)
    check_fits(trained, config, f"--set {' '.join(overrides)}", parts=("gen", "encoder"))
    notes = []
    if wrong := explain_old_import(content, trained.data.labels):
        notes.append(f"{path}: {wrong}")
    if weights == "ema" and content.get("generator_ema") is None:
        weights = "raw"
        notes.append(f"{path} has no EMA of the weights: the raw (non-averaged) weights are used")
    if weights == "raw" and content["generator"] is None:
        raise CheckpointError(f"{path} holds only the EMA of the weights: leave --weights raw out")
    generator = build_generator(config)
    _load(generator, content, "generator", weights, path)
    has_encoder = any(content.get(name) is not None for name in ("encoder", "encoder_ema"))
    encoder = build_encoder(config) if has_encoder else None
    if encoder is not None:
        _load(encoder, content, "encoder", weights, path)
    device = torch.device(device)
    winograd = device.type == "cpu" and precision == "fp32"
    for network in filter(None, (generator, encoder)):
        (optimise_for_inference(network, winograd=winograd) if frozen else network.eval().requires_grad_(False)).to(
            device
        )
    if compiled:
        generator.compile(dynamic=True)
    seen = content.get("images_seen")
    images_seen = 0 if seen is None else check_counter(seen, f"{path}: images_seen does not fit")
    return LoadedModel(generator, encoder, config, images_seen, weights, device, tuple(notes), precision)


def _has_label_table(tree: Any) -> bool:
    return isinstance(tree, Mapping) and isinstance(data := tree.get("data"), Mapping) and "labels" in data


def _load(network: nn.Module, content: Mapping[str, Any], name: str, weights: str, path: Path) -> None:
    """Weights into ``network``, whose spectral norms are folded: the average was stored so, raw weights become so."""
    average = content.get(f"{name}_ema") if weights == "ema" else None
    stored = content[name] if average is None else average
    try:
        if average is not None or content["format"] == PUBLISHED:
            fold_spectral_norm(network)
        check_tensors(stored, network.state_dict(), f"{path}: its {name} does not fit its own config")
        network.load_state_dict(stored)
        fold_spectral_norm(network)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the weights of its {name} do not fit the architecture of its own config; it is damaged, or its"
            f" components were changed since ({error})"
        ) from None


def find_checkpoint(checkpoint: Path | None, logdir: Path | None, config: RunConfig | None) -> Path:
    """Find the checkpoint file of the command line: --checkpoint, else --logdir, else pretrained_weight.

    Raises:
        CheckpointError: nothing is given, or nothing is there.
    """
    for flag, place in (("--checkpoint", checkpoint), ("--logdir", logdir)):
        if place is None:
            continue
        if flag == "--checkpoint" and place.is_file():
            return place
        if not place.is_dir():
            wanted = "file or folder" if flag == "--checkpoint" else "log dir"
            raise CheckpointError(f"{flag} {place}: no such {wanted}")
        newest = newest_checkpoint(place)
        if newest is None:
            raise CheckpointError(f"{flag} {place}: no checkpoint_*.pt there or in its checkpoints/ folder")
        return newest
    if config is not None and config.pretrained_weight is not None:
        return fetch_weights(config.pretrained_weight)
    raise CheckpointError(
        "no checkpoint: give --checkpoint FILE, or --logdir DIR of a training run, or a --config with"
        " pretrained_weight: {path: FILE}"
    )


def fetch_weights(source: WeightSource) -> Path:
    """Return the file of a config's ``pretrained_weight``; download it into torch's hub cache on first use.

    Raises:
        CheckpointError: no such file, no connection, or other bytes than its sha256 says.
    """
    if source.path is not None:
        if not Path(source.path).is_file():
            raise CheckpointError(f"pretrained_weight.path: {source.path}: no such file")
        return Path(source.path)
    assert source.url is not None and source.sha256 is not None
    name = PurePosixPath(urlparse(source.url).path).name or "checkpoint.pt"
    target = Path(torch.hub.get_dir(), "checkpoints", f"{source.sha256[:16]}-{name}")
    if target.is_file() and file_sha256(target) == source.sha256:
        return target
    print(f"downloading {source.url} to {target}", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source.url, str(target), hash_prefix=source.sha256, progress=sys.stderr.isatty())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CheckpointError(
            f"pretrained_weight.url: {source.url} cannot be downloaded ({error}). Without a connection: fetch the file"
            f" elsewhere and give it as --checkpoint FILE, or put it at {target}"
        ) from None
    except RuntimeError as error:
        raise CheckpointError(
            f"pretrained_weight.url: {source.url} is not the file with sha256 {source.sha256} ({error}). Nothing was"
            " kept; correct the url or the sha256"
        ) from None
    return target


def check_fits(trained: RunConfig, given: RunConfig, where: str, *, parts: Sequence[str] = ("gen",)) -> None:
    """Raise CheckpointError with an explanation if ``given`` describes other networks than the checkpoint."""
    if differences := explain_mismatch(trained, given, parts=parts):
        raise CheckpointError(
            f"{where} does not fit the checkpoint:\n  " + "\n  ".join(differences) + "\nThe checkpoint carries its own"
            " config: leave that out, or give the checkpoint of this config"
        )


def with_overrides(config: RunConfig, overrides: Sequence[str], name: str) -> RunConfig:
    """Apply ``--set`` values to ``config``. Raises ConfigError."""
    if not overrides:
        return config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"config of {name}")
        path.write_text(dump_yaml(config), encoding="utf-8")
        return load_config(path, overrides)
