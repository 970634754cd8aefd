"""Define the state of training: all that a run would lose if it stopped now. Its fields are the checkpoint.

Responsible for the exponential moving average (EMA) of the networks' weights, and its batch statistics.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from imaginaire_spade.build import build_discriminator, build_encoder, build_generator
from imaginaire_spade.config import RunConfig
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.models.discriminator import Discriminator
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.norms import BatchNorm2d
from imaginaire_spade.models.spectral_norm import SpectralNorm, fold_spectral_norm
from imaginaire_spade.optimizer import Adam, build_optimizer
from imaginaire_spade.training.augmentation import AdaptiveProbability
from imaginaire_spade.training.checkpoint import check_counter, check_tensors

N = TypeVar("N", bound=nn.Module)


@dataclass
class TrainState:
    """Raw modules (never wrapped), optimizers, scalers and the one integer of progress."""

    generator: Generator
    discriminator: Discriminator
    encoder: nn.Module | None
    generator_ema: Generator | None
    """EMA of the generator; always in evaluation mode, without gradients; see ``new_average``."""
    encoder_ema: nn.Module | None
    """Likewise of the encoder."""
    gen_optimizer: torch.optim.Optimizer
    dis_optimizer: torch.optim.Optimizer
    gen_scaler: torch.amp.GradScaler
    dis_scaler: torch.amp.GradScaler
    images_seen: int = 0
    augmentation: AdaptiveProbability | None = None
    """How often what D sees is augmented, where that is adaptive. A checkpoint without it begins it anew."""

    def state_dict(self) -> dict[str, Any]:
        """Return field -> its state (tensors and plain types only)."""
        return {
            name: value if value is None or isinstance(value, int) else value.state_dict()
            for name, value in vars(self).items()
        }

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Load every field, or none.

        Raises:
            CheckpointError: a field is missing, new, or does not fit.
        """
        places = dict(vars(self))
        if state.get("augmentation") is None or self.augmentation is None:  # off in one of the two
            del places["augmentation"]
        if missing := places.keys() - state.keys():
            raise CheckpointError(f"{where}: not a training checkpoint, it lacks {', '.join(sorted(missing))}")
        for name, own in places.items():
            if (own is None) != (state[name] is None):
                has, lacks = ("this config", where) if own is not None else (where, "this config")
                raise CheckpointError(f"{has} has {name}, {lacks} has none")
            _check(own, state[name], name, where)
        for name, own in places.items():
            if isinstance(own, int):
                setattr(self, name, state[name])
            elif own is not None:
                _load(own, state[name], name, where)

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        """List each EMA with the network that it follows."""
        pairs = [(self.generator_ema, self.generator), (self.encoder_ema, self.encoder)]
        return [(average, network) for average, network in pairs if average is not None and network is not None]

    def start_from(self, content: Mapping[str, Any], where: str) -> list[str]:
        """Load the networks of a checkpoint without optimizers, such as an imported one; stay at image 0.

        The EMA starts as a copy if the checkpoint has none. Return the networks that the checkpoint lacks.

        Raises:
            CheckpointError: a network does not fit.
        """

        def load(*names: str) -> None:
            for name in names:
                owner, stored = getattr(self, name), content.get(name)
                if owner is not None and stored is not None:
                    _check(owner, stored, name, where)
                    _load(owner, stored, name, where)

        networks = ("generator", "discriminator", "encoder")
        load(*networks)
        for average, network in self.averages():
            update_average(average, network, 0.0)
        load("generator_ema", "encoder_ema")
        return [name for name in networks if getattr(self, name) is not None and content.get(name) is None]


def _check(owner: Any, stored: Any, name: str, where: str) -> None:
    """Check that every tensor in ``stored`` fits its place in ``owner``.

    Raises:
        CheckpointError: one does not.
    """
    where = f"{where}: {name} does not fit this config"
    whole = isinstance(stored, Mapping) and (isinstance(owner, nn.Module) or isinstance(stored.get("state"), Mapping))
    if isinstance(owner, nn.Module | torch.optim.Optimizer) and not whole:
        raise CheckpointError(f"{where}: it is no state of one, but a {type(stored).__name__}")
    if isinstance(owner, nn.Module):
        check_tensors(stored, owner.state_dict(), where)
    elif isinstance(owner, torch.optim.Optimizer):
        parameters = [parameter for group in owner.param_groups for parameter in group["params"]]
        for index, moments in stored["state"].items():
            if type(index) is not int or index not in range(len(parameters)):
                raise CheckpointError(f"{where}: it has a parameter {index}, and this config {len(parameters)} of them")
            if not isinstance(moments, Mapping) or "exp_avg_sq" not in moments:
                raise CheckpointError(f"{where}: parameter {index} has no second moment")
            check_tensors(moments, dict.fromkeys(moments.keys() - {"step"}, parameters[index]), where)
            step = moments.get("step", 0)
            is_number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
            if not is_number or not 0 <= float(step) < math.inf:
                raise CheckpointError(f"{where}: step of parameter {index} is {step!r}, not one number from 0 on")
        groups = stored.get("param_groups")
        betas = (
            [group.get("betas") for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
        )
        if [len(pair) for pair in betas if isinstance(pair, list | tuple)] != [2] * len(owner.param_groups):
            raise CheckpointError(f"{where}: its param_groups are those of another optimizer")
    elif isinstance(owner, torch.amp.GradScaler):
        numbers = stored.values() if isinstance(stored, Mapping) else [stored]
        if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
            raise CheckpointError(f"{where}: it is no state of one, but {stored!r}")
    elif isinstance(owner, int):
        check_counter(stored, where)


def _load(owner: Any, stored: Any, name: str, where: str) -> None:
    if isinstance(owner, torch.optim.Optimizer):  # whose rates and betas are the config's
        stored = {"state": stored["state"], "param_groups": owner.state_dict()["param_groups"]}
    try:
        owner.load_state_dict(stored)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: {name} does not fit this config: {error}") from None
    if isinstance(owner, torch.optim.Optimizer):
        # Adam's moments get the memory format of their parameters, whatever it was when they were saved: torch keeps
        # the saved one, and fused Adam then pairs weights with other weights' moments.
        for parameter, moments in owner.state.items():
            if not isinstance(owner, Adam):  # apex's, from a checkpoint of ours
                moments.setdefault("exp_avg", torch.zeros_like(parameter))
            for key in moments.keys() - {"step"}:
                moments[key] = torch.empty_like(parameter, dtype=moments[key].dtype).copy_(moments[key])


def new_average(network: N, form: Literal["folded", "state"] = "folded") -> N:
    """Copy ``network`` as its EMA: in evaluation mode, without gradients; ``folded``: without spectral norms."""
    average = copy.deepcopy(network)
    return (fold_spectral_norm(average) if form == "folded" else average).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, beta: float) -> None:
    """Set average = beta * average + (1 - beta) * source, for parameters and running statistics alike.

    Where the spectral norms of ``average`` are folded, a layer with one gives its normalised weight, under the present
    u and v (as in imaginaire): an average of raw weights would have another norm than each of them. Else raw weights, u
    and v are averaged as they are (as in OASIS's release).

    Args:
        average: from ``new_average``.
        source: the trained network.
    """
    values = {name: value for name, value in source.state_dict().items() if value.is_floating_point()}
    averages = average.state_dict()
    for name, layer in source.named_modules():
        if isinstance(layer, SpectralNorm) and f"{name}.weight_u" not in averages:
            # One by one: together they are as large as the network.
            averages.pop(f"{name}.weight").lerp_(layer.effective_weight(), 1.0 - beta)
    averages = {name: value for name, value in averages.items() if name in values}
    torch._foreach_lerp_(list(averages.values()), [values[name] for name in averages], 1.0 - beta)


@torch.no_grad()
def move_statistics(generator: nn.Module, inputs: Iterable[tuple[object, Tensor | None]]) -> None:
    """Do forwards of an EMA in training mode over ``inputs``: running statistics move with their momentum, and power
    iterations make u and v unit vectors again (as OASIS's release does before it shows or saves its EMA)."""
    generator.train()
    for layout, z in inputs:
        generator(layout, z)
    generator.eval()


@torch.no_grad()
def reestimate_batch_norm(generator: nn.Module, inputs: Iterable[tuple[object, Tensor | None]]) -> None:
    """Set the running statistics of an EMA to their plain average over ``inputs`` (label maps, style codes).

    The activations of averaged weights have other statistics than the average of the statistics. Only the batch norms
    are in training mode meanwhile, so spectral-norm vectors stay.
    """
    norms = [module for module in generator.modules() if isinstance(module, BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for layout, z in inputs:
        generator(layout, z)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def new_train_state(config: RunConfig, device: torch.device, seed: int) -> TrainState:
    """Build a run's state at image 0: the same on every process for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(config)
        discriminator = build_discriminator(config)
        discriminator.frozen_layers = config.trainer.freeze_discriminator_layers
        discriminator.requires_grad_()
        encoder = build_encoder(config)
    layout = torch.channels_last if config.trainer.channels_last else torch.contiguous_format
    networks = [network for network in (generator, discriminator, encoder) if network is not None]
    for network in networks:
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
        network.train()
    averaged = config.trainer.model_average
    generator_parameters = [p for network in (generator, encoder) if network is not None for p in network.parameters()]
    scaled = config.trainer.precision == "fp16"
    augmentation = config.trainer.discriminator_augmentation
    adaptive = None
    if augmentation is not None and augmentation.probability == "adaptive":
        adaptive = AdaptiveProbability(augmentation.adapt_images, augmentation.target).to(device)
    return TrainState(
        generator=generator, discriminator=discriminator, encoder=encoder,
        generator_ema=new_average(generator, averaged.form) if averaged else None,
        encoder_ema=new_average(encoder, averaged.form) if averaged and encoder is not None else None,
        gen_optimizer=build_optimizer(generator_parameters, config.gen_opt),
        dis_optimizer=build_optimizer(discriminator.parameters(), config.dis_opt),
        gen_scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        dis_scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        augmentation=adaptive,
    )  # fmt: skip
