"""Augment what the discriminator sees (``trainer.discriminator_augmentation``), so that it cannot learn few images by
heart.

Every change can be differentiated, so the generator learns through it (Zhao et al. 2020, DiffAugment), and is applied
with a probability, fixed or adapted to the discriminator's overfitting (Karras et al. 2020, ADA). Generated and real
images of a label map, and the label map, are changed alike. The generator, and the losses that compare images, see the
images as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imaginaire_spade.config_trainer import AugmentationPolicy
from imaginaire_spade.distributed import total_over_processes
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.noise import uniform_draws

SHIFT = 1 / 8
"""Largest translation, as a share of the side (DiffAugment)."""
CUTOUT = 1 / 2
"""Side of the hidden rectangle, as a share of the image's (DiffAugment, ADA)."""
ZOOM = 1.25
"""Largest factor of a zoom, in or out: about the spread of ADA's."""

INTERVAL = 4
"""Iterations from one adaptation of the probability to the next (ADA)."""
AT_MOST = 0.8
"""Largest adapted probability: from about there on, augmentations leak into the generated images (ADA, section 2.2)."""


class AdaptiveProbability(nn.Module):
    """A probability that follows how much the discriminator overfits; its state is what a checkpoint holds.

    Nothing here waits for the device.

    Args:
        images: the number of images over which it can rise from 0 to 1.
        target: overfitting above which it rises, and below which it falls.
    """

    value: Tensor
    """float32 scalar, the same on all processes."""
    observed: Tensor
    """float32 [2], of all processes: sum and number of the measures since the last adaptation."""
    latest: Tensor
    """Likewise of this process, in this iteration; not saved."""

    def __init__(self, images: int, target: float) -> None:
        super().__init__()
        self.images, self.target = images, target
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("observed", torch.zeros(2))
        self.register_buffer("latest", torch.zeros(2), persistent=False)

    def observe(self, overfitting: Tensor) -> None:
        """Take the discriminator's overfitting (``AdversarialLoss.overfitting``) on a part of this process's batch."""
        self.latest += torch.stack([overfitting.float(), torch.ones_like(self.value)])

    def follow(self, iteration: int, global_batch: int) -> None:
        """Take what all processes observed in an iteration that is over; adapt once per ``INTERVAL`` (a collective)."""
        self.observed += total_over_processes(self.latest)
        self.latest.zero_()
        if iteration % INTERVAL == 0:
            mean = self.observed[0] / self.observed[1].clamp(min=1)
            self.value += (mean - self.target).sign() * (INTERVAL * global_batch / self.images)
            self.value.clamp_(0, AT_MOST)
            self.observed.zero_()


def augmentation_draws(
    seed: int, positions: Sequence[int], policies: Sequence[AugmentationPolicy], device: torch.device
) -> Tensor:
    """Draw what ``AugmentedView`` needs for samples: float32 [samples, policies, 4], uniform in [0, 1).

    A policy's draws depend on the seed and the sample's position in the run alone, not on the other policies.
    """
    rows = [[uniform_draws(seed, position, f"D {policy}") for policy in policies] for position in positions]
    draws = torch.tensor(rows)
    return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)


class View:
    """What the discriminator sees of N samples: ``layout``, and what a call makes of their images."""

    def __init__(self, layout: SemanticLayout) -> None:
        self.layout = layout

    def __call__(self, images: Tensor) -> Tensor:
        """Change images, float [k * N, C, H, W] in [-1, 1], of which image i belongs to sample i % N."""
        return images


class AugmentedView(View):
    """What the discriminator sees of N samples, each changed as its draws say.

    Translation and zoom go on beyond the border with the image and label map mirrored at it, so that whatever the
    discriminator sees there is an image with its labels (as in ADA). Behind a cutout there is neither: grey, and
    don't care in the label map, which no objective counts as a class.

    Args:
        layout: the N label maps.
        draws: from ``augmentation_draws``.
        probability: that of each policy for each sample.
        policies: names of the draws.
    """

    def __init__(
        self, layout: SemanticLayout, draws: Tensor, probability: Tensor | float, policies: Sequence[AugmentationPolicy]
    ) -> None:
        drawn, nothing = dict(zip(policies, draws.unbind(1), strict=True)), draws.new_ones(len(layout), 4)
        use = {policy: drawn[policy][:, 0] < probability for policy in policies}
        never = torch.zeros_like(nothing[:, 0], dtype=torch.bool)

        def numbers(policy: AugmentationPolicy) -> tuple[Tensor, Tensor]:
            """Return whether each sample is changed: bool [N]; three numbers for each: [N, 3]."""
            return use.get(policy, never), drawn.get(policy, nothing)[:, 1:]

        # Colours.
        self._colored, self._colors = numbers("color")
        # Rows and columns that the moved image shows.
        (shifted, shift), (zoomed, zoom) = numbers("translation"), numbers("zoom")
        factor = torch.where(zoomed, ZOOM ** (2 * zoom[:, 0] - 1), 1.0)
        self._moved = shifted | zoomed
        sides = layout.height, layout.width
        places = [_places(side, factor, torch.where(shifted, shift[:, i], 0.5)) for i, side in enumerate(sides)]
        rows, columns = places
        self._weights = _weights(rows), _weights(columns)
        # What is hidden.
        cut, centre = numbers("cutout")
        inside = [_inside(side, centre[:, i]) for i, side in enumerate(sides)]
        self._hidden = cut[:, None, None] & inside[0][:, :, None] & inside[1][:, None, :]  # [N, H, W]
        super().__init__(self._change(layout, (rows + 0.5).floor().long(), (columns + 0.5).floor().long()))

    def _change(self, layout: SemanticLayout, rows: Tensor, columns: Tensor) -> SemanticLayout:
        _ = layout.edges  # drawn now, if from the labels: they move with them, and a cutout gets none

        def change(maps: Tensor) -> Tensor:
            between = (slice(None), *[None] * (maps.dim() - 3))
            maps = maps.gather(-2, rows[*between, :, None].expand_as(maps))
            maps = maps.gather(-1, columns[*between, None, :].expand_as(maps))
            return maps.masked_fill(self._hidden[between], 0)

        changed = layout.map(change)
        changed.labels.masked_fill_(self._hidden, layout.spec.num_classes)
        return changed

    def __call__(self, images: Tensor) -> Tensor:
        """Change images; see ``View``. What is not changed stays the same to the bit, and so does what is made of it:
        images and gradients keep their memory format, by which convolutions choose how they round."""
        channels_last = images.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if channels_last else torch.contiguous_format
        dtype = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(dtype).view_as(images)
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient.contiguous(memory_format=form))
            x = x.unflatten(0, (-1, len(self._moved)))  # [k, N, C, H, W]
            x = torch.where(_of_image(self._colored), self._color(x), x)
            rows, columns = (weights.to(dtype) for weights in self._weights)
            moved = torch.einsum("nij,kncjl,nml->kncim", rows, x, columns)
            x = torch.where(_of_image(self._moved), moved, x)
            return x.masked_fill(self._hidden[:, None], 0).flatten(0, 1).contiguous(memory_format=form)

    def _color(self, x: Tensor) -> Tensor:
        brightness, saturation, contrast = map(_of_image, self._colors.to(x.dtype).unbind(1))
        x = x + (brightness - 0.5)
        grey = x.mean(-3, keepdim=True)
        x = grey + (x - grey) * (2 * saturation)
        mean = x.mean((-3, -2, -1), keepdim=True)
        return mean + (x - mean) * (0.5 + contrast)


def _of_image(values: Tensor) -> Tensor:
    """Give values [N] the shape [N, 1, 1, 1]."""
    return values[:, None, None, None]


def _places(side: int, factor: Tensor, shift: Tensor) -> Tensor:
    """Compute which place of an image's side is shown at each place of it: float32 [N, side], in pixels.

    Args:
        factor: [N], zoom about the middle.
        shift: [N] in [0, 1), of which 1/2 is no shift; by whole pixels.
    """
    most, middle = round(side * SHIFT), (side - 1) / 2
    pixels = (shift * (2 * most + 1)).floor() - most
    shown = (torch.arange(side, device=factor.device) - middle) / factor[:, None] + middle - pixels[:, None]
    return (side - 1) - ((side - 1) - shown.abs()).abs()  # mirrored at both ends


def _weights(places: Tensor) -> Tensor:
    """Return the weights of linear interpolation [N, side, side]: those of each place's neighbours, in its row.

    A matrix product with them has a deterministic gradient on a GPU, unlike ``grid_sample``.
    """
    pixels = torch.arange(places.shape[1], device=places.device)
    return (1 - (places[:, :, None] - pixels).abs()).clamp_(min=0)


def _inside(side: int, centre: Tensor) -> Tensor:
    """Return which places of a side lie in a cutout around ``centre`` [N], a share of the side: bool [N, side]."""
    middles = torch.arange(side, device=centre.device) + 0.5
    return (middles - centre[:, None] * side).abs() < side * CUTOUT / 2
