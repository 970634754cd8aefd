"""Load a trained generator to make images with it, and publish one.

Responsible for which checkpoint file is meant (and its download), and the format of published generators: one file of
weights for inference in safetensors, which runs no code when read. Its tensors are ``generator.*`` and, where there is
a style encoder, ``encoder.*``, spectral norms folded. The metadata holds ``format``, ``version`` (of this package),
``config`` (JSON, fully resolved, label table included), ``weights`` (``ema`` or ``raw``), ``images_seen`` and
``sha256``. Folders of the machine it was trained on are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from safetensors.torch import save
from torch import nn

from imaginaire_spade.build import build_encoder, build_generator, layout_spec
from imaginaire_spade.config import RunConfig, WeightSource
from imaginaire_spade.config_diff import check_fits, explain_old_import
from imaginaire_spade.config_files import dump_config, load_config, parse_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.files import download, from_hub, write_bytes
from imaginaire_spade.inference.choices import remembered
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.for_inference import optimise_for_inference
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.products import slow_precision
from imaginaire_spade.models.spectral_norm import fold_spectral_norm
from imaginaire_spade.training.checkpoint import (
    PUBLISHED,
    check_tensors,
    checksum_path,
    load_checkpoint,
    newest_checkpoint,
    published_sha256,
    read_published,
)
from imaginaire_spade.training.step import AUTOCAST
from imaginaire_spade.version import __version__


@dataclass(frozen=True)
class Model:
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
    """Arithmetic of the convolutions: "fp32", "bf16" or "fp16"; statistics and tables are float32 in any case."""
    for_inference: bool = False
    """Whether layers and names of weights are those that are fastest here, not those that were trained."""

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        weights: str = "ema",
        overrides: Sequence[str] = (),
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        compiled: bool = False,
        for_inference: bool = True,
    ) -> Model:
        """Load a checkpoint's generator, and its style encoder if it has one.

        Args:
            path: a checkpoint file of this package, or a generator that ``publish`` wrote (``.safetensors``).
            weights: "ema" (moving average; "raw" if the checkpoint has none, with a note) or "raw".
            overrides: ``KEY=VALUE`` for keys of the checkpoint's config that its weights do not depend on.
            precision: see the field.
            compiled: compile the generator (``torch.compile``) at its first use, which takes minutes.
            for_inference: bring the weights into the form that is fastest here (``models/for_inference.py``). Export
                and ``publish`` need them as they were trained.
        Raises:
            CheckpointError: absent, damaged, foreign, or not of the architecture that its own config (or
                ``overrides``) describes.
            ConfigError: a component of the user's own is not registered, or ``overrides`` are wrong.
        """
        content = read_published(path) if path.suffix == ".safetensors" else load_checkpoint(path)
        if missing := {"config", "generator"} - set(content):
            names = " and ".join(sorted(missing))
            raise CheckpointError(f"{path}: a checkpoint without {names}: not one to generate with")
        # Read its config and apply the overrides.
        if not _has_label_table(content["config"]):
            raise CheckpointError(
                f"{path}: a checkpoint without a label table (data.labels of its config), so label maps mean nothing to"
                " it. What train.py and scripts/import_checkpoint.py write has one: take that file as it is"
            )
        trained = parse_config(content["config"], str(path))
        config = parse_config(content["config"], f"config of {path.name}", overrides) if overrides else trained
        check_fits(trained, config, f"--set {' '.join(overrides)}", parts=("gen", "encoder"))
        # Choose the weights.
        notes = []
        if wrong := explain_old_import(content, trained.data.labels):
            notes.append(f"{path}: {wrong}")
        if weights == "ema" and content.get("generator_ema") is None:
            weights = "raw"
            notes.append(f"{path} has no EMA of the weights: the raw (non-averaged) weights are used")
        if weights == "raw" and content["generator"] is None:
            raise CheckpointError(f"{path} holds only the EMA of the weights: leave --weights raw out")
        if content.get("sha256") is None and not checksum_path(path).is_file():
            notes.append(f"{path} comes without its sha256, which would tell that it is the file that was written")
        # Build the networks, fill them, prepare them.
        generator = _filled(build_generator, config, content, "generator", weights, path)
        has_encoder = any(content.get(name) is not None for name in ("encoder", "encoder_ema"))
        encoder = _filled(build_encoder, config, content, "encoder", weights, path) if has_encoder else None
        device = torch.device(device)
        if slow := slow_precision(precision, device):
            notes.append(f"precision {slow}")
        winograd = device.type == "cpu" and precision == "fp32"
        for network, dtype in ((generator, AUTOCAST[precision]), (encoder, None)):  # styles are computed in float32
            if network is None:
                continue
            if for_inference:
                optimise_for_inference(network, winograd=winograd, dtype=dtype, ask=remembered)
            network.eval().requires_grad_(False).to(device)
        if compiled:
            generator.compile(dynamic=True)
        images_seen = content.get("images_seen") or 0
        return cls(generator, encoder, config, images_seen, weights, device, tuple(notes), precision, for_inference)

    def publish(self, path: Path) -> None:
        """Write the model to ``path`` as a published generator, whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        assert not self.for_inference, "load it with for_inference=False"
        tensors = {
            f"{name}.{key}": tensor.cpu().contiguous()
            for name, network in (("generator", self.generator), ("encoder", self.encoder))
            if network is not None
            for key, tensor in network.state_dict().items()
        }
        config = dump_config(self.config) | {"test_data": None, "pretrained_weight": None}
        config["data"]["type"] = None  # of whoever trained it
        for split in filter(None, (config["data"]["train"], config["data"]["val"])):
            split["roots"] = [Path(root).name for root in split["roots"]]
        metadata = {
            "format": PUBLISHED,
            "version": __version__,
            "config": json.dumps(config),
            "weights": self.weights,
            "images_seen": str(self.images_seen),
        }
        metadata["sha256"] = published_sha256(tensors, metadata)
        write_bytes(path, save(tensors, metadata))

    @cached_property
    def layout_spec(self) -> LayoutSpec:
        """What the generator takes."""
        return layout_spec(self.config)

    @property
    def one_by_one(self) -> bool:
        """Whether images of a batch are made singly: on a CPU batching saves nothing, and some convolutions and all
        matrix products round differently by batch size."""
        return self.device.type == "cpu"

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """(height, width) of the images it was trained on; None if they were of many sizes."""
        return self.config.data.train.augmentations.output_h_w


def _has_label_table(tree: Any) -> bool:
    return isinstance(tree, Mapping) and isinstance(data := tree.get("data"), Mapping) and "labels" in data


def _filled(build: Callable[..., Any], config: RunConfig, content: Any, name: str, weights: str, path: Path) -> Any:
    """Build a network, load its weights and fold its spectral norms: most EMAs are stored folded, raw weights not."""
    average = content.get(f"{name}_ema") if weights == "ema" else None
    stored = content.get(name) if average is None else average
    try:
        with torch.device("meta"):  # its config may describe more than memory holds
            planned = build(config)
        if planned is None:
            return None
        folded = content["format"] == PUBLISHED or average is not None
        folded = folded and not any(key.endswith("weight_u") for key in stored)  # trainer.model_average.form: state
        places = (fold_spectral_norm(planned) if folded else planned).state_dict()
        check_tensors(stored, places, f"{path}: its {name} does not fit its own config")
        if missing := places.keys() - stored.keys():
            raise CheckpointError(f"{path}: its {name} lacks {min(missing)}")
        network = fold_spectral_norm(build(config)) if folded else build(config)
        network.load_state_dict(stored)
        return fold_spectral_norm(network)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the weights of its {name} do not fit the architecture of its own config; it is damaged, or its"
            f" components were changed since ({error})"
        ) from None


def load_named(
    checkpoint: Path | None, logdir: Path | None, config_file: Path | None, overrides: Sequence[str], **loading: Any
) -> tuple[Path, Model, RunConfig | None]:
    """Load the generator that a command line names, and its --config.

    Args:
        checkpoint, logdir, config_file: as ``find_checkpoint`` reads them.
        overrides: ``KEY=VALUE`` for both configs.
        loading: of ``Model.load``.
    Returns:
        The checkpoint's file, the model, and the config, if one is given.
    Raises:
        CheckpointError, ConfigError: what is named is not there, or does not fit.
    """
    given = load_config(config_file, overrides) if config_file else None
    path = find_checkpoint(checkpoint, logdir, given)
    model = Model.load(path, overrides=overrides, **loading)
    if given is not None:
        check_fits(model.config, given, str(config_file))
        if given.data.labels != model.config.data.labels:
            note = f"data.labels of {config_file} differs from the checkpoint's, which is used (change it with --set)"
            model = replace(model, notes=(*model.notes, note))
    return path, model, given


def find_checkpoint(checkpoint: Path | None, logdir: Path | None, config: RunConfig | None) -> Path:
    """Find the checkpoint file of the command line: --checkpoint, else --logdir, else pretrained_weight.

    Raises:
        CheckpointError: nothing is given, or nothing is there.
    """
    checkpoint = None if checkpoint is None else from_hub(checkpoint, "--checkpoint")
    if checkpoint is not None and checkpoint.is_file():
        return checkpoint
    flag, place, wanted = (
        ("--checkpoint", checkpoint, "file or folder") if checkpoint else ("--logdir", logdir, "log dir")
    )
    if place is not None:
        if not place.is_dir():
            raise CheckpointError(f"{flag} {place}: no such {wanted}")
        if (newest := newest_checkpoint(place)) is None:
            raise CheckpointError(f"{flag} {place}: no checkpoint_*.pt there or in its checkpoints/ folder")
        return newest
    if config is not None and config.pretrained_weight is not None:
        return _fetch(config.pretrained_weight)
    raise CheckpointError(
        "no checkpoint: give --checkpoint FILE, or --logdir DIR of a training run, or a --config with"
        " pretrained_weight: {path: FILE}"
    )


def _fetch(source: WeightSource) -> Path:
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
    advice = (
        "Without a connection: fetch the file elsewhere and give it as --checkpoint FILE, or put it at"
        f" {target}; else correct pretrained_weight.url or its sha256"
    )
    download(source.url, target, source.sha256, CheckpointError, advice)
    write_bytes(checksum_path(target), f"{source.sha256}  {target.name}\n".encode())
    return target
