"""What a parity fixture holds, and what every check of one needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imaginaire_spade.errors import UserError
from imaginaire_spade.interop import foreign_names
from imaginaire_spade.layout import LayoutSpec, SemanticLayout

MODES = ("eval", "train")


@dataclass(frozen=True)
class Row:
    """One compared tensor. ``error`` is NaN where ours is missing."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class Fixture:
    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Fixture:
        """Raises UserError where the folder is no fixture."""
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            weights, inputs = path / "weights.safetensors", path / "inputs.safetensors"
            return cls(
                path,
                config,
                load_file(weights) if weights.exists() else {},
                load_file(inputs) if inputs.exists() or "lmdb_folder" not in config else {},
                load_file(path / "outputs.safetensors"),
            )
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise UserError(
                f"{path}: not a parity fixture, which has config.json, inputs.safetensors, outputs.safetensors and"
                f" (for networks) weights.safetensors: {error}"
            ) from None

    @property
    def source(self) -> str:
        known = {"NVlabs/SPADE": "nvlabs_spade", "tzt101/CLADE": "clade", "NVlabs/imaginaire": "imaginaire",
                 "boschresearch/OASIS": "oasis"}  # fmt: skip
        for name, source in known.items():
            if self.config["reference"].startswith(name):
                return source
        raise UserError(f"{self.path}: reference {self.config['reference']!r}; known: {', '.join(known)}")

    def bound(self, name: str, wanted: Tensor) -> float:
        """Largest absolute difference allowed for the output ``name``."""
        group, scale = name.split("/")[0], float(wanted.abs().max())
        if group.endswith("_grad") and "tolerance_gradients" in self.config:
            return 1e-4 * scale  # as its text says: times the largest absolute value of the gradient
        if "tolerance_relative_float32" in self.config:
            return float(self.config["tolerance_relative_float32"]) * max(scale, 1.0)
        tolerance = self.config["tolerance_max_abs_float32"]
        if isinstance(tolerance, dict):
            if name.startswith("label_"):  # distance maps; what a loader makes of one is normalised
                return float(tolerance["unnormalised" if name.endswith("/unnormalised") else "normalised"])
            if group == "decoded" and name.startswith("decoded/images/"):
                return 2.0  # grey levels: JPEG decoders differ by that much
            if name.startswith("iter"):
                group = "iter*/generated" if name.endswith("/generated") else "losses"
            tolerance = tolerance[group if group in tolerance else group.partition("_")[0]]
        if group.endswith("_loss"):  # a sum over outputs times R: their bound carries over
            weights = [tensor for key, tensor in self.inputs.items() if key.split("/")[0] == "R"]
            return float(tolerance) * sum(float(weight.abs().sum()) for weight in weights)
        return float(tolerance) * max(scale, 1.0)


def matching_layout(fixture: Fixture, spec: LayoutSpec, dense: str = "semantics") -> SemanticLayout:
    """The integer layout of the fixture's ids; it must give the reference's one-hot exactly."""
    semantics = fixture.inputs[dense].float()
    ids = fixture.inputs["label"][:, 0] if dense == "semantics" else fixture.inputs["seg_png"][:, 0]
    labels = ids.to(torch.int16).clamp(max=spec.num_classes)
    edges = semantics[:, -1].to(torch.uint8) if spec.has_edges else None
    layout = SemanticLayout(spec, labels, edges, fixture.inputs["dist"] if spec.has_distances else None)
    if not torch.equal(layout.one_hot(), semantics):
        raise UserError(f"{fixture.path}: label and semantics of the inputs do not belong together")
    return layout


def gradients(
    fixture: Fixture, mode: str, loss: Tensor, network: nn.Module, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients of ``loss`` for every ``<mode>_grad/...`` of the fixture: of parameters and of ``input.*``."""
    parameters: dict[str, Tensor] = dict(network.named_parameters())
    ours = {foreign_names(fixture.source, network)[key]: tensor for key, tensor in parameters.items()}
    ours |= {f"input.{name}": tensor for name, tensor in inputs.items()}
    wanted = [n.removeprefix(f"{mode}_grad/") for n in fixture.outputs if n.startswith(f"{mode}_grad/")]
    present = [name for name in wanted if name in ours]
    gradients = torch.autograd.grad(loss, [ours[name] for name in present], allow_unused=True)
    for name, gradient in zip(present, gradients, strict=True):
        if gradient is not None:
            yield f"{mode}_grad/{name}", gradient


def buffers(fixture: Fixture, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = foreign_names(fixture.source, network)
    for key, buffer in network.named_buffers():
        yield f"train_state/{names[key]}", buffer


Check = Callable[[Fixture], Iterator[tuple[str, Tensor]]]
"""Computes our counterpart of a fixture's outputs, by name."""
