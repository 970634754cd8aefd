"""TrainState: everything that a training run would lose if it stopped now. Its fields are the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from imaginaire_spade.build import build_discriminator, build_encoder, build_generator, build_optimizer
from imaginaire_spade.config import RunConfig
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.models.discriminator import Discriminator
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.training.checkpoint import check_counter, check_tensors
from imaginaire_spade.training.ema import new_average, update_average


@dataclass
class TrainState:
    """Raw modules (never wrapped), optimizers, scalers and the one integer of progress."""

    generator: Generator
    discriminator: Discriminator
    encoder: nn.Module | None
    generator_ema: Generator | None
    """Moving average of the generator; always in evaluation mode, without gradients, spectral norms folded."""
    encoder_ema: nn.Module | None
    """Likewise of the encoder."""
    gen_optimizer: torch.optim.Optimizer
    dis_optimizer: torch.optim.Optimizer
    gen_scaler: torch.amp.GradScaler
    dis_scaler: torch.amp.GradScaler
    images_seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Field -> its state (tensors and plain types only)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value if value is None or isinstance(value, int) else value.state_dict()
            for name, value in values.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Load every field, or none: raises CheckpointError where one is missing, new, or does not fit."""
        names = {field.name for field in fields(self)}
        if missing := names - set(state):
            raise CheckpointError(f"{where}: not a training checkpoint, it lacks {', '.join(sorted(missing))}")
        for field in fields(self):
            own, stored = getattr(self, field.name), state[field.name]
            if (own is None) != (stored is None):
                has, lacks = ("this config", where) if stored is None else (where, "this config")
                raise CheckpointError(f"{has} has {field.name}, {lacks} has none")
            _check(own, stored, field.name, where)
        for field in fields(self):
            own, stored = getattr(self, field.name), state[field.name]
            if isinstance(own, int):
                setattr(self, field.name, stored)
            elif own is not None:
                _load(own, stored, field.name, where)

    def start_from(self, content: Mapping[str, Any], where: str) -> list[str]:
        """Take over the networks of a checkpoint that holds no optimizers, such as an imported one; at image 0.

        The average starts as a copy where the checkpoint has none. Returns the networks that start afresh.
        """
        fresh = []
        for name in ("generator", "discriminator", "encoder"):
            network, stored = getattr(self, name), content.get(name)
            if network is not None and stored is None:
                fresh.append(name)
            elif network is not None:
                _check(network, stored, name, where)
                _load(network, stored, name, where)
            average = getattr(self, f"{name}_ema", None)
            if average is not None:
                update_average(average, network, 0.0)
                if content.get(f"{name}_ema") is not None:
                    _check(average, content[f"{name}_ema"], f"{name}_ema", where)
                    _load(average, content[f"{name}_ema"], f"{name}_ema", where)
        return fresh


def _check(owner: Any, stored: Any, name: str, where: str) -> None:
    """Raises CheckpointError where a tensor in ``stored`` is not what ``owner`` would load into its place."""
    where = f"{where}: {name} does not fit this config"
    whole = isinstance(stored, Mapping) and (isinstance(owner, nn.Module) or isinstance(stored.get("state"), Mapping))
    if isinstance(owner, nn.Module | torch.optim.Optimizer) and not whole:
        raise CheckpointError(f"{where}: it is no state of one, but a {type(stored).__name__}")
    if isinstance(owner, nn.Module):
        check_tensors(stored, owner.state_dict(), where)
    elif isinstance(owner, torch.optim.Optimizer):
        parameters = _parameters(owner)
        for index, moments in stored["state"].items():
            if index not in range(len(parameters)):
                raise CheckpointError(f"{where}: it has a parameter {index}, and this config {len(parameters)} of them")
            check_tensors(moments, dict.fromkeys(moments.keys() - {"step"}, parameters[index]), where)
            step = moments.get("step", 0)
            if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
                raise CheckpointError(f"{where}: step of parameter {index} is {step!r}, not one number")
    elif isinstance(owner, int):
        check_counter(stored, where)


def _load(owner: Any, stored: Any, name: str, where: str) -> None:
    if isinstance(owner, torch.optim.Optimizer):
        stored = {**stored, "state": _in_the_parameters_order(stored["state"], _parameters(owner))}
    try:
        owner.load_state_dict(stored)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: {name} does not fit this config: {error}") from None


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _in_the_parameters_order(state: Mapping[int, Any], parameters: Sequence[nn.Parameter]) -> dict[int, Any]:
    """Adam's moments in the memory format of their parameters, whatever it was when they were saved: torch keeps the
    saved one, and fused Adam then pairs weights with other weights' moments."""

    def ordered(value: Any, parameter: nn.Parameter) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:  # "step"
            return value
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)

    return {
        index: {name: ordered(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state.items()
    }


def new_train_state(config: RunConfig, device: torch.device, seed: int) -> TrainState:
    """A run's state at image 0: the same on every process for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(config)
        discriminator = build_discriminator(config)
        encoder = build_encoder(config)
    layout = torch.channels_last if config.trainer.channels_last else torch.contiguous_format
    networks = [network for network in (generator, discriminator, encoder) if network is not None]
    for network in networks:
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
        network.train()
    averaged = config.trainer.model_average is not None
    generator_parameters = [p for network in (generator, encoder) if network is not None for p in network.parameters()]
    scaled = config.trainer.precision == "fp16"
    return TrainState(
        generator=generator,
        discriminator=discriminator,
        encoder=encoder,
        generator_ema=new_average(generator) if averaged else None,
        encoder_ema=new_average(encoder) if averaged and encoder is not None else None,
        gen_optimizer=build_optimizer(generator_parameters, config.gen_opt),
        dis_optimizer=build_optimizer(discriminator.parameters(), config.dis_opt),
        gen_scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        dis_scaler=torch.amp.GradScaler(device.type, enabled=scaled),
    )
