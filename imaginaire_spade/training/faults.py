"""Explain why a run stops: numbers that are not finite, and lack of memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imaginaire_spade import distributed
from imaginaire_spade.config import RunConfig
from imaginaire_spade.data.batch import Batch, normalise
from imaginaire_spade.errors import UserError
from imaginaire_spade.files import write_bytes
from imaginaire_spade.noise import style_noise
from imaginaire_spade.training.meters import non_finite
from imaginaire_spade.training.state import TrainState
from imaginaire_spade.training.step import StepSettings


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite, or too many consecutive updates were skipped for non-finite gradients."""


class OutOfMemory(UserError):
    """An iteration needs more memory than there is."""


@dataclass(frozen=True)
class SkippedUpdates:
    """Updates that the loss scaling of fp16 left out since the last look, of each network."""

    gen: int
    dis: int
    in_a_row: int
    """Longest run of skipped updates of either network since launch."""


class FiniteWatch:
    """Watches, on the device, for losses that are not finite and for updates that fp16's loss scaling skips.

    Args:
        state: whose scalers are watched; already loaded.
    """

    def __init__(self, state: TrainState, settings: StepSettings, device: torch.device) -> None:
        self.state, self.settings = state, settings
        self._scalers = (state.gen_scaler, state.dis_scaler)
        self._one = torch.ones((), device=device)
        self._scales = self._present_scales()
        self._skipped = torch.zeros(2, dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros_like(self._skipped)
        self._longest = torch.zeros_like(self._skipped)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_losses: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._keys: list[tuple[int, tuple[str, ...]]] = []
        self._last_batch: Batch | None = None

    def _present_scales(self) -> Tensor:
        # scale() is the one way to the scale that does not wait for the device. 1, where scaling is off.
        return torch.stack([scaler.scale(self._one) for scaler in self._scalers])

    def add(self, iteration: int, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Note an iteration that is over. Nothing waits for the device."""
        scales = self._present_scales()
        skipped = (scales < self._scales).long()  # a skipped update, and nothing else, lowers the scale
        self._scales = scales
        self._skipped += skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)
        values = torch.stack([value.float() for value in losses.values()])
        first = ~values.isfinite().all() & (self._first_bad < 0)
        self._first_bad = torch.where(first, len(self._keys), self._first_bad)
        self._bad_losses = values if self._bad_losses is None else torch.where(first, values, self._bad_losses)
        self._names = tuple(losses)
        self._keys.append((iteration, batch.keys))
        self._last_batch = batch

    def fetch(self) -> SkippedUpdates:
        """What was skipped since the last ``forget``, on the process that skipped most (a collective)."""
        gen, dis, *longest = distributed.maximum_over_processes(torch.cat([self._skipped, self._longest])).tolist()
        return SkippedUpdates(gen, dis, max(longest))

    def check(self, losses: dict[str, float], skipped: SkippedUpdates, max_skipped: int, dump: Path) -> None:
        """Raises NonFiniteLoss where a loss is not finite or too many updates in a row were skipped.

        All processes raise together, and each writes what it knows.

        Args:
            losses: means since the last ``forget``, over all processes.
            max_skipped: number of consecutive skipped updates that is too many.
            dump: JSON file to write for people.
        """
        if bad := non_finite(losses):
            what = f"{', '.join(bad)} became NaN or infinite"
        elif skipped.in_a_row >= max_skipped:
            what = f"{skipped.in_a_row} updates in a row were skipped (trainer.max_skipped_updates: {max_skipped})"
        else:
            return
        first = self._first()
        at = f", first in {first['iteration']}" if first else ""
        assert self._last_batch is not None
        report = {"first_iteration": first, **describe_non_finite(self.state, self._last_batch, self.settings)}
        write_bytes(dump, (json.dumps(report, indent=2) + "\n").encode())
        raise NonFiniteLoss(
            f"{what} between iterations {self._keys[0][0]} and {self._keys[-1][0]}{at}; the newest checkpoint is older"
            f" and valid. {dump} names the batch and the first weight, gradient and layer. Lower the learning rates, or"
            " write trainer.precision: bf16 or fp32"
        )

    def _first(self) -> dict[str, Any]:
        """The first iteration with a loss that was not finite on this process: its number, the keys of its batch, its
        losses. Empty where there is none."""
        index = int(self._first_bad)
        if index < 0 or self._bad_losses is None:
            return {}
        iteration, keys = self._keys[index]
        losses = {name: repr(value) for name, value in zip(self._names, self._bad_losses.tolist(), strict=True)}
        return {"iteration": iteration, "batch_keys": list(keys), "losses": losses}

    def forget(self) -> None:
        """Start the next interval."""
        self._skipped.zero_()
        self._longest.copy_(self._in_a_row)
        self._first_bad.fill_(-1)
        self._keys.clear()


def describe_non_finite(state: TrainState, batch: Batch, settings: StepSettings) -> dict[str, Any]:
    """Names of the first weight, gradient and layer whose numbers are not finite.

    Args:
        batch: on the device; the networks run on it once more, in evaluation mode.
    """
    return {
        "images_seen": state.images_seen,
        "first_non_finite": {
            "weight": _first(_weights(state)),
            "gradient": _first(_gradients(state)),
            "output on the last batch": _first_output(state, batch, settings),
        },
        "last_batch_keys": list(batch.keys),
    }


def _networks(state: TrainState) -> dict[str, nn.Module]:
    networks = {"encoder": state.encoder, "generator": state.generator, "discriminator": state.discriminator}
    return {name: network for name, network in networks.items() if network is not None}


def _weights(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    for network, module in _networks(state).items():
        for name, tensor in module.state_dict().items():
            yield f"{network}.{name}", tensor


def _gradients(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    for network, module in _networks(state).items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                yield f"{network}.{name}", parameter.grad


def _first(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


@torch.no_grad()
def _first_output(state: TrainState, batch: Batch, settings: StepSettings) -> str | None:
    """The first layer, in the order of computation, whose output is not finite."""
    found: list[str] = []
    hooks, modes = [], {}
    for network, module in _networks(state).items():
        modes[module] = module.training
        module.eval()
        for name, layer in module.named_modules():
            if not any(layer.children()):

                def look(_: nn.Module, __: Any, output: Any, name: str = f"{network}.{name}") -> None:
                    if isinstance(output, Tensor) and not output.isfinite().all():
                        found.append(name)

                hooks.append(layer.register_forward_hook(look))
    try:
        assert batch.images is not None
        real = normalise(batch.images)
        enabled = settings.autocast_dtype is not None
        with torch.autocast(real.device.type, dtype=settings.autocast_dtype, enabled=enabled):
            dims = settings.style_dims
            z = style_noise(settings.seed, batch.positions, dims).to(real.device) if dims else None
            if state.encoder is not None:
                z, _ = state.encoder(real)
            state.discriminator(batch.layout, torch.cat([state.generator(batch.layout, z), real]))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.train(training)
    return found[0] if found else None


@contextmanager
def explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Turns the failure of an allocation into ``OutOfMemory``, which names what can be set."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        train, trainer = config.data.train, config.trainer
        size = train.augmentations.output_h_w
        filters = [f"{part}.num_filters" for part, component in (("gen", config.gen), ("dis", config.dis))
                   if "num_filters" in component.args]  # fmt: skip
        knobs = {
            "trainer.activation_checkpointing: true: the same result, the generator's backward pass takes longer":
                not trainer.activation_checkpointing,
            f"trainer.gradient_accumulation: {_next_divisor(train.batch_size, trainer.gradient_accumulation)}"
            f" (now {trainer.gradient_accumulation}): the same batch in smaller pieces, the same result but for batch"
            " statistics": trainer.gradient_accumulation < train.batch_size,
            f"data.train.batch_size (now {train.batch_size} per process)": train.batch_size > 1,
            "trainer.precision: bf16 (now fp32)": trainer.precision == "fp32",
            f"data.train.augmentations, smaller images (now {'x'.join(map(str, size)) if size else 'of any size'})":
                True,
            f"{' and '.join(filters)}, narrower networks": bool(filters),
        }  # fmt: skip
        raise OutOfMemory(
            f"out of memory ({str(error).splitlines()[0][:300]}). What needs less, the mildest first:\n  "
            + "\n  ".join(knob for knob, helps in knobs.items() if helps)
            + "\ntrain.py --dry_run measures the peak of one iteration. Other programs on the same GPU take theirs too:"
            f" see nvidia-smi (process {os.getpid()} is this one)"
        ) from None


def _next_divisor(batch_size: int, pieces: int) -> int:
    """The next larger number of equal pieces."""
    return next((n for n in range(pieces + 1, batch_size + 1) if batch_size % n == 0), batch_size)
