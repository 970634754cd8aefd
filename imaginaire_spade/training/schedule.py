"""Compute the length of a run, its learning rates and EMA weights as functions of ``images_seen``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from imaginaire_spade.config import ModelAverageConfig, OptimizerConfig, TrainerConfig


@dataclass(frozen=True)
class Calendar:
    """The length and schedule of a run. Times are iterations; progress is images."""

    global_batch: int
    dataset_size: int
    total_iterations: int
    stop_iteration: int
    """Where this launch ends (``--max_iterations``); the schedule stays that of the whole run."""

    @classmethod
    def of(cls, trainer: TrainerConfig, global_batch: int, dataset_size: int, stop_after: int | None) -> Calendar:
        """Make the calendar of a config, for a launch that ends after iteration ``stop_after`` at the latest."""
        if trainer.max_iterations is not None:
            total = trainer.max_iterations
        else:
            assert trainer.max_epochs is not None, "checked by TrainerConfig"
            total = math.ceil(trainer.max_epochs * dataset_size / global_batch)
        return cls(global_batch, dataset_size, total, min(total, total if stop_after is None else stop_after))

    def iteration(self, images_seen: int) -> int:
        """Return the number of completed iterations."""
        return images_seen // self.global_batch

    def epoch(self, images_seen: int) -> float:
        """Return the number of passes over the training set."""
        return images_seen / self.dataset_size

    def progress(self, images_seen: int) -> float:
        """Return the share of the whole run that is done, 0 .. 1."""
        return min(1.0, images_seen / (self.total_iterations * self.global_batch))

    def learning_rate(self, optimizer: OptimizerConfig, images_seen: int) -> float:
        """Return the learning rate; under ``linear`` it falls to 0 from ``decay_start`` to the end of the run."""
        progress, policy = self.progress(images_seen), optimizer.lr_policy
        if policy.type == "constant" or progress <= policy.decay_start:
            return optimizer.lr
        return optimizer.lr * ((1.0 - progress) / (1.0 - policy.decay_start))

    def ema_beta(self, average: ModelAverageConfig | None, images_seen: int) -> float:
        """Return the weight of the old EMA in the next update; 0, which copies the weights, until it starts."""
        warm = average is not None and self.iteration(images_seen) >= average.start_iteration
        return average.beta if average is not None and warm else 0.0
