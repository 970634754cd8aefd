"""Collect what the iterations between two log ticks gave, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from imaginaire_spade.distributed import maximum_over_processes, mean_over_processes


@dataclass(frozen=True)
class Tick:
    """What the iterations since the last log tick gave; the same on every process, except ``first_bad``."""

    first_iteration: int
    last_iteration: int
    losses: dict[str, float]
    """Mean of each loss over iterations and processes. fp16 leaves out what is not finite: it skips such updates."""
    health: dict[str, float]
    """Likewise the measures of ``health/...``."""
    scaling: dict[str, float]
    """fp16's loss scales and skipped updates, on the process that skipped most; empty without fp16."""
    skipped_in_a_row: int
    """Longest run of skipped updates of either network, begun in these iterations or before."""
    first_bad: dict[str, Any]
    """The first iteration with a loss that is not finite on this process: its number, the keys of its batch, its
    losses. Empty if there is none."""


class LossMeter:
    """Keep the losses of each iteration on the device until ``read``.

    Args:
        scalers: the loss scalers of the generator's and the discriminator's optimizer, already loaded.
    """

    def __init__(self, scalers: Sequence[torch.amp.GradScaler], device: torch.device) -> None:
        self._scalers = scalers
        self._one = torch.ones((), device=device)
        self._scales = [self._present_scales()]
        """Before the first iteration, and after each."""
        self._losses: list[Tensor] = []
        self._names: list[str] = []
        self._iterations: list[tuple[int, tuple[str, ...]]] = []
        self._in_a_row = [0, 0]

    def add(self, iteration: int, keys: tuple[str, ...], losses: Mapping[str, Tensor]) -> None:
        """Take the losses of an iteration that is over, and the keys of its batch. Nothing waits for the device."""
        self._names = sorted(losses)
        self._losses.append(torch.stack([losses[name].float() for name in self._names]))
        self._scales.append(self._present_scales())
        self._iterations.append((iteration, keys))

    def read(self) -> Tick:
        """Return what was added since the last call, at least one iteration (a collective)."""
        values, scales = torch.stack(self._losses).cpu(), torch.stack(self._scales).cpu()
        iterations, scaled = self._iterations, self._scalers[0].is_enabled()
        self._losses, self._scales, self._iterations = [], self._scales[-1:], []
        finite = values.isfinite()  # [iterations, losses]

        # Means, the sums in the order of iterations.
        counted = finite if scaled else torch.ones_like(finite)
        totals = torch.stack([reduce(torch.add, values.where(counted, 0.0)), counted.sum(0).float()])
        sums, counts = mean_over_processes(totals.to(self._one.device)).cpu()
        means = dict(zip(self._names, (sums / counts).tolist(), strict=True))
        means = {name: mean for (name, mean), count in zip(means.items(), counts.tolist(), strict=True) if count}
        health = {name: means.pop(name) for name in list(means) if name.startswith("health/")}

        # Skipped updates: nothing else lowers a scale.
        skipped, longest, scaling = scales[1:] < scales[:-1], 0, {}
        for now in skipped.tolist():
            self._in_a_row = [(before + 1) * is_skipped for before, is_skipped in zip(self._in_a_row, now, strict=True)]
            longest = max(longest, *self._in_a_row)
        if scaled:
            most = torch.tensor([*skipped.sum(0).tolist(), longest], device=self._one.device)
            gen, dis, longest = maximum_over_processes(most).tolist()
            scaling = {"scale/gen": float(scales[-1, 0]), "scale/dis": float(scales[-1, 1])}
            scaling |= {"skipped/gen": float(gen), "skipped/dis": float(dis)}

        # The first bad iteration.
        first_bad: dict[str, Any] = {}
        if not finite.all():
            index = finite.all(1).tolist().index(False)
            losses = {name: repr(value) for name, value in zip(self._names, values[index].tolist(), strict=True)}
            first_bad = {"iteration": iterations[index][0], "batch_keys": [*iterations[index][1]], "losses": losses}
        return Tick(iterations[0][0], iterations[-1][0], means, health, scaling, longest, first_bad)

    def _present_scales(self) -> Tensor:
        # scale() is the one way to the scale that does not wait for the device. 1, where scaling is off.
        return torch.stack([scaler.scale(self._one) for scaler in self._scalers])
