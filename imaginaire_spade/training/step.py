"""Compute one training iteration, from the learning rates to the counter: see ``train_step``.

Responsible for activation checkpointing too, which saves memory by recomputing blocks in the backward pass (Chen et al.
2016).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imaginaire_spade.config_trainer import TrainerConfig
from imaginaire_spade.data.batch import Batch, normalise
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.losses import AdversarialLoss, ClassPlan, GeneratorOutputs
from imaginaire_spade.models.discriminator import Discriminator, Scores, split_scores
from imaginaire_spade.models.generator import Generator, ResidualBlock, SPADEResidualBlock, StyleBlock, sample_style
from imaginaire_spade.noise import style_codes
from imaginaire_spade.optimizer import Adam
from imaginaire_spade.training.augmentation import AugmentedView, View, augmentation_draws
from imaginaire_spade.training.state import TrainState, update_average

SATURATED = 0.99
"""A value of [-1, 1] beyond it is the first or the last of the 256 steps of an image file."""

STYLES = ("style", "style of the discriminator's step")
"""What style codes are drawn for: those of an iteration's images, and of images that ``reference`` makes anew."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``precision`` -> the dtype of autocast."""


@dataclass(frozen=True)
class StepSettings:
    """Everything that an iteration needs besides the training state and the batch."""

    terms: nn.ModuleDict
    """Terms of the generator's objective; the ``AdversarialLoss`` among them states the discriminator's too."""
    weights: dict[str, float]
    trainer: TrainerConfig
    style_dims: int
    seed: int
    global_batch: int
    """Images of one iteration, of all processes."""
    rates: Callable[[int], tuple[float, float, float]]
    """images_seen -> learning rates of the generator (and the style encoder) and of the discriminator, and the weight
    of the old EMA in this update."""

    @property
    def adversarial(self) -> AdversarialLoss:
        """The term that states the discriminator's loss."""
        (term,) = (term for term in self.terms.values() if isinstance(term, AdversarialLoss))
        return term


@dataclass(frozen=True)
class Networks:
    """The networks as training calls them: wrapped in DistributedDataParallel if there are several processes."""

    generator: nn.Module
    discriminator: nn.Module
    encoder: nn.Module | None


Generated = tuple[Tensor, Tensor | None, Tensor | None]
"""Generated images, float32 [N, 3, H, W] in [-1, 1]; mean and log-variance of their style codes, if any."""


Update = Callable[[TrainState, Networks, Batch, StepSettings, ClassPlan | None], dict[str, Tensor]]
"""``update_networks``, or what does the same."""


def train_step(
    state: TrainState, networks: Networks, batch: Batch, settings: StepSettings, update: Update | None = None
) -> dict[str, Tensor]:
    """Train for one iteration: learning rates, ``update_networks`` (or ``update``), EMA, counter.

    Args:
        batch: this process's, already on the device.
    Returns:
        Unweighted losses by name, and the ``health/...`` measures of ``health.py``; detached, on the device.
    """
    gen_lr, dis_lr, ema_beta = settings.rates(state.images_seen)
    for optimizer, rate in ((state.gen_optimizer, gen_lr), (state.dis_optimizer, dis_lr)):
        for group in optimizer.param_groups:
            # A tensor is one that a CUDA graph reads.
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
    adversarial = settings.adversarial
    layout = seen_by_discriminator(batch, state, settings).layout if adversarial.scores_classes else batch.layout
    plan = adversarial.plan(layout, settings.seed, state.images_seen)
    losses = (update or update_networks)(state, networks, batch, settings, plan)
    for average, network in state.averages():
        update_average(average, network, ema_beta)
    state.images_seen += settings.global_batch
    if state.augmentation is not None:
        state.augmentation.follow(state.images_seen // settings.global_batch, settings.global_batch)
    return losses


def update_networks(
    state: TrainState, networks: Networks, batch: Batch, settings: StepSettings, plan: ClassPlan | None
) -> dict[str, Tensor]:
    """Update D once and G once, at the optimizers' present learning rates.

    ``shared``: D first, on images whose graph then trains G against the updated D. ``reference``: G first, then D on
    images that the updated G makes anew. With accumulation, ``shared`` makes the images once for each update, since the
    graphs of all pieces would have to be kept. Losses: see ``train_step``.

    Args:
        plan: of the ``AdversarialLoss``, for this iteration.
    """
    for optimizer in (state.gen_optimizer, state.dis_optimizer):  # before the images, whose graph needs the memory
        optimizer.zero_grad(set_to_none=True)
    # Images that serve both updates.
    shared, pieces = settings.trainer.iteration == "shared", settings.trainer.gradient_accumulation
    made = generate(networks, batch, settings) if shared and pieces == 1 else None
    losses: dict[str, Tensor] = {}
    adversarial, seen = settings.adversarial, seen_by_discriminator(batch, state, settings)
    with_real = any(getattr(term, "needs_real_scores", True) for term in settings.terms.values())

    def view_of(piece: Batch) -> View:
        return seen if pieces == 1 else seen_by_discriminator(piece, state, settings)

    def update_discriminator() -> None:
        state.discriminator.requires_grad_(True)
        for number, piece in enumerate(batch.split(pieces), 1):
            with torch.no_grad():
                fake = (made or generate(networks, piece, settings, again=not shared))[0].detach()
                real = real_images(piece)
            with _synced(networks.discriminator, number == pieces):
                view = view_of(piece)
                layout, groups = view.layout, [view(fake), view(real)]
                if plan is not None and (mask := plan.mask(layout)) is not None:
                    groups.append(torch.where(mask, groups[1], groups[0]))
                with autocast(real.device, settings):
                    # All groups in one call: one power iteration (or as many as D wants), and one DDP forward per
                    # backward.
                    scores = split_scores(networks.discriminator(layout, torch.cat(groups)), len(groups))
                    terms = adversarial.discriminator(scores, layout, plan)
                total = torch.stack(list(terms.values())).sum()
                state.dis_scaler.scale(total / pieces).backward()
            overfitting = adversarial.overfitting(scores[0], scores[1], layout)
            health = {"health/d_accuracy": adversarial.accuracy(*scores[:2]), "health/d_overfitting": overfitting}
            if state.augmentation is not None:
                state.augmentation.observe(overfitting)
                health["health/augmentation_probability"] = state.augmentation.value
            _add(losses, terms | {"d_total": total} | health, pieces)
        state.dis_scaler.step(state.dis_optimizer)
        state.dis_scaler.update()

    def update_generator() -> None:
        state.discriminator.requires_grad_(False)
        for number, piece in enumerate(batch.split(pieces), 1):
            real, view, last = real_images(piece), view_of(piece), number == pieces
            with _synced(networks.generator, last), _synced(networks.encoder, last):
                fake, mu, logvar = made or generate(networks, piece, settings)
                with autocast(real.device, settings):
                    # D has no gradients here, so the raw module serves: its wrapper would wait for some.
                    scored = _judge(state.discriminator, view.layout, view(fake), view(real), with_real)
                    outputs = GeneratorOutputs(fake, real, *scored, mu, logvar, view.layout, plan)
                    terms = {name: term(outputs) for name, term in settings.terms.items()}
                total = torch.stack([settings.weights[name] * term for name, term in terms.items()]).sum()
                del scored, outputs  # features that the backward pass frees once it is through D
                with _updating(state, networks, fake.device) if pieces == 1 else nullcontext():
                    state.gen_scaler.scale(total / pieces).backward()
            health = {"health/fake_saturation": saturation(fake), "health/real_saturation": saturation(real)}
            _add(losses, terms | {"g_total": total} | health, pieces)
        state.gen_scaler.step(state.gen_optimizer)
        state.gen_scaler.update()

    # Both updates.
    for update in (update_discriminator, update_generator) if shared else (update_generator, update_discriminator):
        update()
    return losses


def _judge(
    discriminator: Discriminator, layout: SemanticLayout, fake: Tensor, real: Tensor, with_real: bool
) -> tuple[list[Scores], list[Scores]]:
    """Score fake and, if wanted, real images; these without a graph if their scores do not depend on the fake ones."""
    if not discriminator.batch_independent:
        of_fake, of_real = split_scores(discriminator(layout, torch.cat([fake, real])))
        return of_fake, of_real
    of_fake = discriminator(layout, fake)
    if not with_real:
        return of_fake, []
    discriminator.eval()  # spectral norm iterates once, as it would for both together
    with torch.no_grad():
        of_real = discriminator(layout, real)
    discriminator.train()
    return of_fake, of_real


def seen_by_discriminator(piece: Batch, state: TrainState, settings: StepSettings) -> View:
    """Return what D sees of a batch on the device: the same in both updates."""
    config = settings.trainer.discriminator_augmentation
    if config is None:
        return View(piece.layout)
    draws = piece.augmentation
    if draws is None:
        draws = augmentation_draws(settings.seed, piece.positions, config.policies, piece.layout.device)
    probability = config.probability if state.augmentation is None else state.augmentation.value
    assert not isinstance(probability, str), "what is adaptive is part of the training state"
    return AugmentedView(piece.layout, draws, probability, config.policies)


def generate(networks: Networks, piece: Batch, settings: StepSettings, *, again: bool = False) -> Generated:
    """Generate images for a batch on the device, with the style codes of its samples; ``again``: with other ones."""
    device = piece.layout.device
    with autocast(device, settings):
        if piece.style_codes is not None:
            z: Tensor | None = piece.style_codes[:, int(again)]
        else:
            z = style_codes(settings.seed, piece.positions, settings.style_dims, device, STYLES[again])
        mu = logvar = None
        if networks.encoder is not None:
            assert z is not None
            mu, logvar = networks.encoder(real_images(piece))
            z = sample_style(mu, logvar, z)
        return networks.generator(piece.layout, z), mu, logvar


def real_images(piece: Batch) -> Tensor:
    """Return the photos of a batch as float32 [N, 3, H, W] in [-1, 1]."""
    assert piece.images is not None
    return normalise(piece.images)


def autocast(device: torch.device, settings: StepSettings) -> torch.autocast:
    """Compute at the run's precision inside this context."""
    dtype = AUTOCAST[settings.trainer.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def saturation(images: Tensor) -> Tensor:
    """Compute the share of black and white values in images in [-1, 1]."""
    return (images.abs() > SATURATED).float().mean()


def _synced(network: nn.Module | None, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients between processes with the last piece only."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        return network.no_sync()
    return nullcontext()


def _updating(state: TrainState, networks: Networks, device: torch.device) -> AbstractContextManager[None]:
    """Update the generator within its backward pass, where gradients are used as they are, and are the largest part of
    an iteration's memory: on a GPU, with its larger batches, activations are."""
    optimizer, as_they_are = state.gen_optimizer, networks.generator is state.generator
    if device.type == "cpu" and as_they_are and isinstance(optimizer, Adam) and not state.gen_scaler.is_enabled():
        return optimizer.in_backward()
    return nullcontext()


def _add(losses: dict[str, Tensor], terms: dict[str, Tensor], pieces: int) -> None:
    for name, term in terms.items():
        value = term.detach() / pieces
        losses[name] = losses[name] + value if name in losses else value


BLOCKS = (SPADEResidualBlock, StyleBlock, ResidualBlock)


def checkpoint_activations(generator: Generator) -> None:
    """Change ``generator`` so that each block keeps only its inputs for the backward pass.

    Raises:
        ConfigError: it has no block of a supported kind.
    """
    blocks: list[nn.Module] = [module for module in generator.modules() if isinstance(module, BLOCKS)]
    if not blocks:
        raise ConfigError(
            "trainer.activation_checkpointing: this generator has no block of a supported kind; write false"
        )
    for block in blocks:
        again = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=again)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward and of its repetition, which starts from the same buffers and changes none.

    So running statistics are updated once, and a repeated power iteration of spectral norm gives the same weights.
    """
    return nullcontext(), _in_place(block, {name: buffer.clone() for name, buffer in block.named_buffers()})


@contextmanager
def _in_place(block: nn.Module, buffers: dict[str, Tensor]) -> Iterator[None]:
    present = dict(block.named_buffers())
    _set(block, buffers)
    try:
        yield
    finally:
        _set(block, present)


def _set(block: nn.Module, buffers: dict[str, Tensor]) -> None:
    for path, buffer in buffers.items():
        module, _, name = path.rpartition(".")
        setattr(block.get_submodule(module), name, buffer)
