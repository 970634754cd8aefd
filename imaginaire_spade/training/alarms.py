"""Detect collapsing runs: measure on the device in every iteration, judge at each log tick.

It happens to small batches above all: the generator's outputs saturate (white or black pictures), or the discriminator
has won and the generator has nothing left to learn from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SATURATED = 0.99
"""A value of [-1, 1] beyond it is the first or the last of the 256 steps of a picture file."""
EXCESS_SATURATION = 0.5
"""Alarm where more than this share of what real pictures leave unsaturated is saturated in generated ones."""
DISCRIMINATOR_WON = 0.98
"""Alarm where D is right about more than this share of the patches (hinge losses of some 0.05 each; the patches at the
border are mostly padding, so that 1 is out of reach)."""
PATIENCE = 5
"""Log ticks in a row that a sign must last."""

_MORE_PICTURES = (
    "train on more images at a time (more processes, or a larger data.train.batch_size; if memory is short, raise"
    " trainer.gradient_accumulation with it)"
)


@torch.no_grad()
def saturation(images: Tensor) -> Tensor:
    """Share of black and white values in pictures in [-1, 1]."""
    return (images.abs() > SATURATED).float().mean()


class Alarms:
    """Tells, once per episode, of a sign that has lasted for ``PATIENCE`` log ticks."""

    def __init__(self) -> None:
        self._d_won_ticks = 0
        self._saturated_ticks = 0

    def check(self, health: Mapping[str, float]) -> list[str]:
        """The warnings that are due at a log tick.

        Args:
            health: means since the last tick of ``GANLoss.accuracy`` and of ``saturation``, by the step's names.
        """
        accuracy = health["health/d_accuracy"]
        fake, real = health["health/fake_saturation"], health["health/real_saturation"]
        self._d_won_ticks = self._d_won_ticks + 1 if accuracy > DISCRIMINATOR_WON else 0
        self._saturated_ticks = self._saturated_ticks + 1 if fake - real > EXCESS_SATURATION * (1 - real) else 0
        warnings = []
        if self._d_won_ticks == PATIENCE:
            warnings.append(
                f"the discriminator has won: it classifies {accuracy:.1%} of the patches correctly, and the generator"
                f" learns little from it. What to do: {_MORE_PICTURES}, lower dis_opt.lr to gen_opt.lr or"
                " less, or dis.num_filters; few training images need horizontal_flip and random crops"
            )
        if self._saturated_ticks == PATIENCE:
            warnings.append(
                f"the outputs saturate: {fake:.0%} of the generated values are black or white (real images:"
                f" {real:.0%}). What to do: restart from an earlier checkpoint, {_MORE_PICTURES}, lower"
                " gen_opt.lr, or gen.output_multiplier if the generator has one"
            )
        return warnings
