"""Set up a run from its configuration, before the first iteration, and resume one: choose the checkpoint, check that it
fits config and data, and list what has changed."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from imaginaire_spade import distributed
from imaginaire_spade.build import build_split
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_diff import explain_import, explain_mismatch, explain_old_import, list_changes
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.config_trainer import OptimizerConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import Prefetcher, default_num_workers, sequential_batches, training_loader
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models import norms
from imaginaire_spade.models.convolution import measure_choices
from imaginaire_spade.models.products import Choices, slow_precision
from imaginaire_spade.models.spectral_norm import choices_of, set_choices
from imaginaire_spade.models.timing import Ask, by_rule
from imaginaire_spade.noise import style_codes
from imaginaire_spade.training.checkpoint import checksum_path, load_checkpoint, load_newest, newest_checkpoint
from imaginaire_spade.training.cuda_graph import GraphedUpdate
from imaginaire_spade.training.evaluation import Evaluation
from imaginaire_spade.training.state import TrainState, new_train_state
from imaginaire_spade.training.step import Networks, StepSettings, checkpoint_activations, train_step


@dataclass(frozen=True)
class Calendar:
    """The length and schedule of a run. Times are iterations; progress is images."""

    global_batch: int
    dataset_size: int
    total_iterations: int
    stop_iteration: int
    """Where this launch ends (``--max_iterations``); the schedule stays that of the whole run."""

    def iteration(self, images_seen: int) -> int:
        """Return the number of completed iterations."""
        return images_seen // self.global_batch

    def epoch(self, images_seen: int) -> float:
        """Return the number of passes over the training set."""
        return images_seen / self.dataset_size

    def learning_rate(self, optimizer: OptimizerConfig, images_seen: int) -> float:
        """Return the learning rate; under ``linear`` it falls to 0 from ``decay_start`` to the end of the run."""
        progress = min(1.0, images_seen / (self.total_iterations * self.global_batch))
        policy = optimizer.lr_policy
        if policy.type == "constant" or progress <= policy.decay_start:
            return optimizer.lr
        return optimizer.lr * ((1.0 - progress) / (1.0 - policy.decay_start))

    def rates(self, config: RunConfig, images_seen: int) -> tuple[float, float, float]:
        """Return the learning rates of both optimizers, and the weight of the old EMA in the next update: 0, which
        copies the weights, until it starts."""
        gen_lr, dis_lr = (self.learning_rate(section, images_seen) for section in (config.gen_opt, config.dis_opt))
        average = config.trainer.model_average
        has_started = average is not None and self.iteration(images_seen) >= average.start_iteration
        return gen_lr, dis_lr, average.beta if average is not None and has_started else 0.0


@dataclass
class Run:
    """The parts of a run. ``prepare`` makes them, the loop calls them."""

    config: RunConfig
    info: ProcessInfo
    device: torch.device
    dataset: LabelMapDataset
    val_dataset: LabelMapDataset
    state: TrainState
    networks: Networks
    settings: StepSettings
    calendar: Calendar
    evaluation: Evaluation | None
    stamps: dict[str, tuple[list[str], NDArray[np.int64]]]
    """What tells later whether files of the training data have changed (``Source.stamps`` by root); rank 0 alone."""
    graphed: GraphedUpdate | None
    """The updates as a CUDA graph, with ``trainer.cuda_graphs``."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Train for one iteration: see ``train_step``."""
        return train_step(self.state, self.networks, batch, self.settings, self.graphed)

    @property
    def bad(self) -> list[str]:
        """List what is wrong with each sample that ``data.skip_bad`` left out."""
        return [*dict.fromkeys([*self.dataset.bad, *self.val_dataset.bad])]

    def batches(self, num_workers: int | None = None) -> Prefetcher:
        """Yield this process's batches on the device, from the current position on."""
        workers = self.config.data.num_workers if num_workers is None else num_workers
        on_gpu, generator = self.device.type == "cuda", self.state.generator
        sizes = norms.table_kernel_sizes(generator) if on_gpu else ()
        loader = training_loader(
            self.dataset, self.config.data.train.batch_size, seed=self.config.seed, images_seen=self.state.images_seen,
            rank=self.info.rank, world_size=self.info.world_size,
            num_workers=default_num_workers(self.info.local_world_size) if workers is None else workers,
            pin_memory=on_gpu, shuffle_shards=self.config.data.shuffle_shards,
            look_ahead=(sizes, self.config.trainer.gradient_accumulation, norms.takes_noise(generator)),
        )  # fmt: skip
        return Prefetcher(loader, self.device)


def prepare(
    config: RunConfig,
    objective: tuple[nn.ModuleDict, dict[str, float]],
    info: ProcessInfo,
    device: torch.device,
    stop_after: int | None = None,
    ask: Ask = by_rule,
) -> Run:
    """Open the data and build all parts of a run, at image 0. Call after joining the process group.

    Args:
        objective: terms and weights, from ``build_losses``.
        stop_after: stop this launch at this iteration, counted over the whole run (``--max_iterations``).
        ask: tells what is faster on this machine; rank 0 asks.
    """
    # Data and networks.
    trainer = config.trainer
    dataset = build_split(config, config.data.train)
    val_dataset = dataset if config.data.val is None else build_split(config, config.data.val)
    state = new_train_state(config, device, config.seed)
    if trainer.sync_batch_norm and info.world_size > 1:
        for network in filter(None, (state.generator, state.discriminator, state.generator_ema)):
            norms.synchronize_batch_norm(network)
    if device.type == "cpu" and trainer.precision == "fp32":
        if choices_of(trained := _trained(state)) is not None:
            set_choices(trained, distributed.broadcast_object(measure_choices(ask) if info.is_main else None))
        if norms.pixel_cost(state.generator) is not None:
            cost = norms.measure_pixel_cost(state.generator, ask) if info.is_main else None
            norms.choose_paths(state.generator, distributed.broadcast_object(cost))
    # Schedule and settings of an iteration.
    global_batch = config.data.train.batch_size * info.world_size
    if (total := trainer.max_iterations) is None:
        assert trainer.max_epochs is not None, "checked by TrainerConfig"
        total = math.ceil(trainer.max_epochs * len(dataset) / global_batch)
    calendar = Calendar(global_batch, len(dataset), total, min(total, stop_after or total))
    terms, weights = objective
    style_dims, rates = state.generator.style_dims, partial(calendar.rates, config)
    settings = StepSettings(terms.to(device), weights, trainer, style_dims, config.seed, global_batch, rates)
    # The networks as training calls them.
    if trainer.activation_checkpointing:
        checkpoint_activations(state.generator)
    wrap = partial(distributed.wrap, device=device, bucket_cap_mb=trainer.bucket_cap_mb)
    networks = Networks(
        wrap(state.generator), wrap(state.discriminator), None if state.encoder is None else wrap(state.encoder)
    )
    evaluation = None if trainer.evaluation is None else Evaluation(config, val_dataset, info, device)
    stamps = dataset.stamps() if info.is_main else {}
    graphed = GraphedUpdate(state, device) if trainer.cuda_graphs else None
    parts = state, networks, settings, calendar, evaluation, stamps, graphed
    return Run(config, info, device, dataset, val_dataset, *parts)


def _trained(state: TrainState) -> torch.nn.ModuleList:
    """Return the networks that are trained."""
    return torch.nn.ModuleList(filter(None, (state.generator, state.discriminator, state.encoder)))


def describe(run: Run) -> str:
    """Summarise parameters, batch and schedule in a few lines."""
    state, calendar, trainer = run.state, run.calendar, run.config.trainer

    def millions(network: torch.nn.Module | None) -> str:
        return "none" if network is None else f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"

    averaged, optimizers = trainer.model_average, (run.config.gen_opt, run.config.dis_opt)
    losses = ", ".join(f"{name} x {weight:g}" for name, weight in run.settings.weights.items())
    rates = ", ".join(f"{n} {o.lr:g} ({o.lr_policy.type})" for n, o in zip("GD", optimizers, strict=True))
    epochs = calendar.epoch(calendar.total_iterations * calendar.global_batch)
    lines = [
        f"parameters: generator {millions(state.generator)}, discriminator {millions(state.discriminator)},"
        f" encoder {millions(state.encoder)}",
        f"data: {len(run.dataset)} training and {len(run.val_dataset)} preview samples",
        f"losses: {losses}",
        *([] if (path := norms.describe_path(state.generator, run.device)) is None else [f"SPADE norms: {path}"]),
        *([] if (seen := trainer.discriminator_augmentation) is None else
          [f"the discriminator's images: {', '.join(seen.policies)} with probability {seen.probability}"]),
        f"batch: {run.config.data.train.batch_size} per process x {run.info.world_size} process(es) ="
        f" {calendar.global_batch} globally, on {run.device.type}, {trainer.precision}",
        f"schedule: {calendar.total_iterations} iterations = {epochs:.1f} epochs; learning rates {rates};"
        f" EMA {'off' if averaged is None else f'beta {averaged.beta:g}'}",
    ]  # fmt: skip
    sided = run.config.data.labels.sided_classes() if run.config.data.train.augmentations.horizontal_flip else {}
    if sided:
        pairs = yaml.safe_dump(sided, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
        lines.append(
            f"warning: horizontal_flip makes a mirrored {next(iter(sided))} look like a {next(iter(sided.values()))}."
            f" Write data.labels.mirror: {pairs} to swap the classes too (or horizontal_flip: false)"
        )
    if slow := slow_precision(trainer.precision, run.device):
        lines.append(f"warning: trainer.precision: {slow}")
    if run.bad:
        lines.append(f"data.skip_bad: {len(run.bad)} sample(s) left out, listed in bad_files.txt; first {run.bad[0]}")
    return "\n".join(lines)


def calibration_layouts(run: Run) -> list[Batch]:
    """Read this process's share of the label maps that estimate the EMA's batch statistics, one batch per forward.

    The label maps are spread evenly over the training set, in each forward too, since the first ones by name are often
    one sequence, city or kind of scene; the seed draws each from its part of the set. Together the processes have the
    same label maps, whatever their number.
    """
    average = run.config.trainer.model_average
    if average is None or not average.batch_norm_images:
        return []
    count = max(min(average.batch_norm_images, len(run.dataset)), run.info.world_size, 2)
    within = np.random.default_rng(run.config.seed).random(count)
    indices = ((np.arange(count) + within) * len(run.dataset) / count).astype(int).tolist()
    forwards = max(1, count // run.calendar.global_batch)
    dataset = run.dataset.without_images()
    batches: list[Batch] = []
    for first in range(forwards):
        mine = indices[first::forwards][run.info.rank :: run.info.world_size]
        batches += sequential_batches(dataset, mine, len(mine))
    return batches


def calibration_inputs(run: Run, batches: list[Batch]) -> Iterator[tuple[SemanticLayout, Tensor | None]]:
    """Yield (label maps, style codes) of ``calibration_layouts`` on the device."""
    for batch in batches:
        z = style_codes(run.config.seed, batch.keys, run.settings.style_dims, run.device)
        yield batch.layout.to(run.device), z


PARTS = {"gen": "generator", "dis": "discriminator", "encoder": "encoder"}
"""Section of the config -> its network's name in a checkpoint."""

MEANING = (
    "data.labels.ignore", "data.labels.remap", "data.edges", "data.conditions",
    "data.images.range", "data.images.drop_alpha", "data.images.orientation",
)  # fmt: skip
"""Keys that change what a label map or a photo means, but not the networks. (``explain_mismatch`` has the others.)"""


def content_of(run: Run) -> dict[str, Any]:
    """Collect the checkpoint of a run; tensors stay on their devices."""
    content = {"config": dump_config(run.config), "run": _facts(run), **run.state.state_dict()}
    return content if run.evaluation is None else {**content, "evaluation": run.evaluation.state_dict()}


def resume(run: Run, logdir: Path, start_from: Path | None, allow_changed_data: bool = False) -> str | None:
    """Load the newest valid checkpoint of the log dir, else ``start_from``. Return a summary; None: fresh start.

    Raises:
        CheckpointError: it belongs to another architecture, label table or, unless allowed, data set.
    """
    newest = load_newest(logdir / "checkpoints")
    if start_from is not None and start_from.is_dir():  # of which --init_from and inference.py take the newest, too
        start_from = newest_checkpoint(start_from) or start_from
    # Rank 0 decides, so that no two processes continue from different files.
    chosen = distributed.broadcast_object(newest[0] if newest else start_from)
    if chosen is None:
        return None
    content = newest[1] if newest is not None and newest[0] == chosen else load_checkpoint(chosen)
    present = [part for part, name in PARTS.items() if content.get(name) is not None]
    trained = parse_config(content.get("config"), source=str(chosen))
    differences = explain_mismatch(trained, run.config, parts=present) or explain_import(
        content, run.config.data.labels
    )
    averages = [config.trainer.model_average for config in (trained, run.config)]
    forms = [average.form for average in averages if average is not None]
    if content.get("generator_ema") is not None and len(set(forms)) > 1:
        differences = [*differences, f"its EMA has trainer.model_average.form: {forms[0]}, this config {forms[1]}"]
    if differences:
        raise CheckpointError(
            f"{chosen} does not fit this config: {'; '.join(differences)}. Use the config it was trained with, or"
            " another --logdir for a new run"
        )
    if content.get("gen_optimizer") is None:
        fresh = run.state.start_from(content, str(chosen))
        started = f"starting from the weights of {chosen}{''.join(f'; {name}: fresh' for name in fresh)}"
        old_import = explain_old_import(content, trained.data.labels)
        return started if old_import is None else f"{started}\nwarning: {old_import}"
    before = content.get("run") or {}
    norms.choose_paths(run.state.generator, before.get("spade_pixel_cost"))  # those of before, also on another machine
    set_choices(_trained(run.state), Choices.kept(before))
    now = _facts(run)
    if before and (missing := {"world_size", "global_batch", "data_sha256", "data_samples"} - before.keys()):
        raise CheckpointError(f"{chosen}: its run lacks {', '.join(sorted(missing))}")
    changed = list_changes(trained, run.config)
    other_data = [f"{key}: {changed[key]}" for key in MEANING if key in changed]
    if before and before["data_sha256"] != now["data_sha256"]:
        count = f"{before['data_samples']} samples then, {now['data_samples']} now"
        other_data.append(f"data.train.roots: not the samples it was trained on ({count})")
    if other_data and not allow_changed_data:
        raise CheckpointError(
            f"{chosen} was trained on other data: {'; '.join(other_data)}. Restore the data, or give another --logdir"
            " for a new run, or continue with the new data from here: --allow_changed_data"
        )
    run.state.load_state_dict(content, str(chosen))
    lines = [f"continuing from {chosen}: iteration {run.calendar.iteration(run.state.images_seen)}"]
    if not checksum_path(chosen).is_file():
        lines.append(f"warning: {chosen} comes without its sha256, which would tell that it is the file that was saved")
    if run.evaluation is not None and (told := run.evaluation.load_state_dict(content.get("evaluation"))):
        lines.append(told)
    lines += _other_processes(before, now, run)
    if (path := before.get("spade_norms", now["spade_norms"])) != now["spade_norms"]:
        lines.append(f"SPADE norms: {path} then, {now['spade_norms']} now")
    lines += [f"changed since: {key}: {change}" for key, change in changed.items()]
    return "\n".join([*lines, *_changed_files(before, run), *_jumping_rates(content, run)])


def _jumping_rates(content: Mapping[str, Any], run: Run) -> Iterator[str]:
    """Yield a line for each optimizer whose last learning rate is not on this launch's schedule, such as that of a run
    which was extended after its decay. (A loaded optimizer has this launch's rate: the last one is in the checkpoint.)
    """
    config, calendar, seen = run.config, run.calendar, run.state.images_seen
    last = seen - (content.get("run") or {"global_batch": calendar.global_batch})["global_batch"]
    for name, section in (("gen_opt", config.gen_opt), ("dis_opt", config.dis_opt)):
        was = content[f"{name}imizer"]["param_groups"][0].get("lr")
        now = calendar.learning_rate(section, seen)
        if isinstance(was, int | float) and not math.isclose(was, calendar.learning_rate(section, last), rel_tol=1e-6):
            falls = f"; it falls to 0 at iteration {calendar.total_iterations} (lr_policy: linear)"
            yield (
                f"{name}: the learning rate jumps from {was:.3g} in the last iteration to {now:.3g} in the next"
                f"{falls if section.lr_policy.type == 'linear' else ''}"
            )


def _facts(run: Run) -> dict[str, Any]:
    """Return the run facts stored in a checkpoint besides the config."""
    return {
        "world_size": run.info.world_size,
        "global_batch": run.calendar.global_batch,
        "data_samples": len(run.dataset),
        "data_sha256": hashlib.sha256("\n".join(run.dataset.keys).encode()).hexdigest(),
        "data_stamps": [torch.from_numpy(stamps) for _, stamps in run.stamps.values()],
        "spade_norms": norms.describe_path(run.state.generator, run.device),
        "spade_pixel_cost": norms.pixel_cost(run.state.generator),
        "cpu_choices": None if (choices := choices_of(_trained(run.state))) is None else choices._asdict(),
        "torch": str(torch.__version__),
    }


def _changed_files(before: Mapping[str, Any], run: Run) -> Iterator[str]:
    """Yield a warning for each root whose files are not those that were trained on, though their names are."""
    for (root, (names, now)), then in zip(run.stamps.items(), before.get("data_stamps") or (), strict=False):
        if not isinstance(then, Tensor) or then.shape != now.shape:
            continue
        differs = then.numpy() != now
        if changed := [name for name, is_other in zip(names, differs.any(1).tolist(), strict=True) if is_other]:
            resized, more = int(differs[:, 0].sum()), " ..." * (len(changed) > 5)
            yield (
                f"warning: {root}: {len(changed)} of {len(now)} samples (or LMDB files) have changed under their names"
                f" since: {', '.join(changed[:5])}{more} ({resized} in size or checksum, {len(changed) - resized} only"
                " by their time stamps): the run goes on with what they hold now, which a run without an interruption"
                " would not have seen"
            )


def _other_processes(before: Mapping[str, Any], now: Mapping[str, Any], run: Run) -> list[str]:
    """Describe what another number of processes, or another batch, changes."""
    if not before or (before["world_size"], before["global_batch"]) == (now["world_size"], now["global_batch"]):
        return []
    was, batch = before["global_batch"], now["global_batch"]
    lines = [
        f"then {before['world_size']} process(es) and {was} images per iteration, now {now['world_size']} and"
        f" {batch}: samples continue in the same order from number {run.state.images_seen}"
    ]
    if was != batch:
        total = run.calendar.total_iterations
        lines.append(
            f"iterations count {batch} images from now on: this is iteration"
            f" {run.calendar.iteration(run.state.images_seen)} of {total}, the whole run {total * batch} images, and"
            " the learning rates are those of the config, not scaled with the batch"
        )
    return lines
