"""Follow a run's losses and health, and explain why it stops: collapse, numbers that are not finite, lack of memory."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from imaginaire_spade.config import RunConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.distributed import maximum_over_processes, total_over_processes
from imaginaire_spade.errors import UserError, first_line, is_out_of_memory
from imaginaire_spade.files import write_bytes
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.training.setup import Run
from imaginaire_spade.training.step import Networks, autocast, generate, real_images

EXCESS_SATURATION = 0.5
"""Alarm where more than this share of what real images leave unsaturated is saturated in generated ones."""
DISCRIMINATOR_WON = 0.98
"""Alarm where D is right about more than this share of the patches (hinge losses of some 0.05 each; the patches at the
border are mostly padding, so that 1 is out of reach)."""
PATIENCE = 5
"""Log ticks in a row that a sign must last."""

_MORE_IMAGES = (
    "train on more images at a time (more processes, or a larger data.train.batch_size; if memory is short, raise"
    " trainer.gradient_accumulation with it)"
)


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite, or too many consecutive updates were skipped for non-finite gradients."""


class OutOfMemory(UserError):
    """An iteration needs more memory than there is."""


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
        sums, counts = total_over_processes(totals.to(self._one.device)).tolist()
        means = {name: total / count for name, total, count in zip(self._names, sums, counts, strict=True) if count}
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


class Alarms:
    """Warn of a collapsing run, once per episode, when a sign has lasted for ``PATIENCE`` log ticks.

    It happens to small batches above all: the generator's outputs saturate (white or black images), or the
    discriminator has won and the generator has nothing left to learn from it.
    """

    def __init__(self) -> None:
        self._ticks = [0, 0]
        """How long each sign has lasted."""

    def check(self, health: Mapping[str, float]) -> list[str]:
        """Return the warnings that are due at a log tick.

        Args:
            health: means since the last tick of ``GANLoss.accuracy`` and of ``saturation``, by the step's names.
        """
        accuracy = health["health/d_accuracy"]
        fake, real = health["health/fake_saturation"], health["health/real_saturation"]
        warnings = {
            f"the discriminator has won: it classifies {accuracy:.1%} of the patches correctly, and the generator"
            f" learns little from it. What to do: {_MORE_IMAGES}, lower dis_opt.lr to gen_opt.lr or"
            " less, or dis.num_filters; few training images need horizontal_flip, random crops and"
            " trainer.discriminator_augmentation: {probability: 0.5}":
                accuracy > DISCRIMINATOR_WON,
            f"the outputs saturate: {fake:.0%} of the generated values are black or white (real images:"
            f" {real:.0%}). What to do: restart from an earlier checkpoint, {_MORE_IMAGES}, lower"
            " gen_opt.lr, or gen.output_multiplier if the generator has one":
                fake - real > EXCESS_SATURATION * (1 - real),
        }  # fmt: skip
        self._ticks = [(before + 1) * shown for before, shown in zip(self._ticks, warnings.values(), strict=True)]
        return [warning for warning, ticks in zip(warnings, self._ticks, strict=True) if ticks == PATIENCE]


def check_finite(tick: Tick, run: Run, batch: Batch, logdir: Path) -> None:
    """Stop the run if a loss is not finite or too many updates in a row were skipped. All processes raise together.

    Args:
        batch: the last one, on the device.
        logdir: for a JSON file in which each process describes what it knows.
    Raises:
        NonFiniteLoss: the run must stop; the networks are left in evaluation mode.
    """
    max_skipped = run.config.trainer.max_skipped_updates
    if bad := [name for name, value in tick.losses.items() if not math.isfinite(value)]:
        what = f"{', '.join(bad)} became NaN or infinite"
    elif tick.skipped_in_a_row >= max_skipped:
        what = f"{tick.skipped_in_a_row} updates in a row were skipped (trainer.max_skipped_updates: {max_skipped})"
    else:
        return
    report = {"first_iteration": tick.first_bad, **_describe_non_finite(run, batch)}
    dump = logdir / f"non_finite_rank{run.info.rank}.json"
    write_bytes(dump, (json.dumps(report, indent=2) + "\n").encode())
    at = f", first in {tick.first_bad['iteration']}" if tick.first_bad else ""
    raise NonFiniteLoss(
        f"{what} between iterations {tick.first_iteration} and {tick.last_iteration}{at}; the newest checkpoint is"
        f" older and valid. {dump} names the batch and the first weight, gradient and layer. Lower the learning rates,"
        " or write trainer.precision: bf16 or fp32"
    )


@torch.no_grad()
def _describe_non_finite(run: Run, batch: Batch) -> dict[str, Any]:
    """Name the first weight, gradient and layer whose numbers are not finite. The networks run on ``batch`` once more,
    in evaluation mode."""
    state, settings = run.state, run.settings
    parts = {"encoder": state.encoder, "generator": state.generator, "discriminator": state.discriminator}
    networks = nn.ModuleDict({name: network for name, network in parts.items() if network is not None}).eval()
    gradients = ((name, p.grad) for name, p in networks.named_parameters() if p.grad is not None)
    names = {layer: name for name, layer in networks.named_modules() if not any(layer.children())}
    found: list[str] = []

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        if layer in names and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(names[layer])

    with register_module_forward_hook(look), autocast(batch.layout.device, settings):
        fake, _, _ = generate(Networks(state.generator, state.discriminator, state.encoder), batch, settings)
        state.discriminator(batch.layout, torch.cat([fake, real_images(batch)]))
    return {
        "images_seen": state.images_seen,
        "first_non_finite": {
            "weight": _first(networks.state_dict().items()),
            "gradient": _first(gradients),
            "output on the last batch": next(iter(found), None),
        },
        "last_batch_keys": list(batch.keys),
    }


def _first(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in tensors if not tensor.isfinite().all()), None)


@contextmanager
def explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Explain a failed allocation by the keys that need less.

    Raises:
        OutOfMemory: memory did not suffice.
    """
    try:
        yield
    except Exception as error:  # (of OpenCV, too)
        if not is_out_of_memory(error):
            raise
        train, trainer = config.data.train, config.trainer
        size, pieces = train.augmentations.output_h_w, range(trainer.gradient_accumulation + 1, train.batch_size)
        more_pieces = next((number for number in pieces if train.batch_size % number == 0), train.batch_size)
        filters = [f"{part}.num_filters" for part, component in (("gen", config.gen), ("dis", config.dis))
                   if "num_filters" in component.args]  # fmt: skip
        knobs = {
            "trainer.activation_checkpointing: true: the same result, the generator's backward pass takes longer":
                not trainer.activation_checkpointing,
            f"trainer.gradient_accumulation: {more_pieces}"
            f" (now {trainer.gradient_accumulation}): the same batch in smaller pieces, the same result but for batch"
            " statistics": trainer.gradient_accumulation < train.batch_size,
            f"data.train.batch_size (now {train.batch_size} per process)": train.batch_size > 1,
            "trainer.precision: bf16 (now fp32)": trainer.precision == "fp32",
            f"data.train.augmentations, smaller images (now {'x'.join(map(str, size)) if size else 'of any size'})":
                True,
            f"{' and '.join(filters)}, narrower networks": bool(filters),
        }  # fmt: skip
        raise OutOfMemory(
            f"out of memory ({first_line(error)[:300]}). What needs less, the mildest first:\n  "
            + "\n  ".join(knob for knob, helps in knobs.items() if helps)
            + "\ntrain.py --dry_run measures the peak of one iteration. Other programs on the same GPU take theirs too:"
            f" see nvidia-smi (process {os.getpid()} is this one)"
        ) from None


def doubt_labels(labels: LabelSpec, batches: Sequence[Batch]) -> str | None:
    """Return a warning if the label maps of some batches hold one class and no class, and nothing else."""
    present = {i for batch in batches for i in torch.unique(batch.layout.labels).tolist()}
    if labels.num_classes < 2 or labels.dont_care_id not in present or len(present) > 2:
        return None
    return (
        f"warning: the label maps that were looked at hold {' and '.join(map(labels.name, sorted(present)))} alone, for"
        f" data.labels.ignore: {list(labels.ignore)}. Binary masks of 0 and 255? Write data.labels.ignore: [] and"
        " data.labels.remap: {255: 1}"
    )
