"""Turn configuration into objects; no other module does."""

import importlib
import sys
from collections.abc import Iterable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imaginaire_spade.config import RunConfig, SplitConfig
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.lmdb_source import usable_memory
from imaginaire_spade.data.loader import leave_out_bad
from imaginaire_spade.data.photos import measured
from imaginaire_spade.errors import ConfigError, first_line
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.models.discriminator import Discriminator
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.norms import SPADE
from imaginaire_spade.optimizer import apex_adam, bytes_per_weight
from imaginaire_spade.registry import DATASETS, DISCRIMINATORS, ENCODERS, GENERATORS, LOSSES, Component, Registry


def import_modules(names: Iterable[str]) -> None:
    """Import the user's modules, which register their components (``--import``).

    Raises:
        ConfigError: one of them cannot be imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--import {name}: {error}. It must be importable from here or installed") from error


def layout_spec(config: RunConfig) -> LayoutSpec:
    """Describe the label maps of a run: by ``data``, and by the needs of the generator's norm."""
    data = config.data
    channels = sum(condition.channels for condition in data.conditions)
    return LayoutSpec.of(data.labels, data.edges, _needs_distances(GENERATORS, config.gen), channels)


def _needs_distances(registry: Registry, component: Component) -> bool:
    """Whether a component, or one nested in it, says that it needs distances."""
    return getattr(registry[component.type], "needs_distances", False) or any(
        _needs_distances(part, component.args[key]) for key, part in registry.parts(component.type).items()
    )


def image_size(config: RunConfig) -> tuple[int, int]:
    """Return the (height, width) of training, in pixels.

    Raises:
        ConfigError: samples keep their own sizes.
    """
    size = config.data.train.augmentations.output_h_w
    if size is None:
        raise ConfigError(
            "data.train.augmentations leaves every image its own size; networks are trained at one. Write"
            " data.train.augmentations.random_crop_h_w: [height, width] or resize_h_w: [height, width]"
        )
    return size


def build_generator(config: RunConfig) -> Generator:
    """Build the generator, initialised according to ``trainer.init``."""
    return _build_network(config, GENERATORS, config.gen, "gen", layout_spec(config), image_size(config))


def build_discriminator(config: RunConfig) -> Discriminator:
    """Build the discriminator, initialised like the generator."""
    return _build_network(config, DISCRIMINATORS, config.dis, "dis", layout_spec(config))


def build_encoder(config: RunConfig) -> nn.Module | None:
    """Build the style encoder, initialised like the generator; None if the config has none.

    Raises:
        ConfigError: the generator takes no style code.
    """
    if config.encoder is None:
        return None
    style_dims = config.gen.args.get("style_dims", 0)
    if not style_dims:
        raise ConfigError("encoder is given, but gen.style_dims is 0: write gen.style_dims: 256, or encoder: null")
    return _build_network(config, ENCODERS, config.encoder, "encoder", style_dims)


def _build_network(config: RunConfig, registry: Registry, component: Component, part: str, *known: Any) -> Any:
    channels = config.data.images.channels
    if channels != 3:  # (of a user's own class only this asks for the parameter)
        if "image_channels" not in signature(registry[component.type]).parameters:
            raise ConfigError(
                f"data.images.channels: {channels}, but {part} ({component.type}) makes or takes 3: give its class a"
                " parameter image_channels before the *, or write data.images.channels: 3"
            )
        known = (*known, channels)
    try:
        network = build_component(registry, component, *known)
    except (RuntimeError, MemoryError, OverflowError) as error:  # torch's, of sizes that no tensor has
        raise ConfigError(f"{part} ({component.type}): cannot be built: {first_line(error)}") from None
    if empty := [name for name, parameter in network.named_parameters() if not parameter.numel()]:
        raise ConfigError(f"{part} ({component.type}): {empty[0]} has no numbers: raise {part}.num_filters")
    if not any(parameter.is_meta for parameter in network.parameters()):
        initialise(network, config.trainer.init.type, config.trainer.init.gain)
    return network


def build_losses(config: RunConfig) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Build the terms of the generator's objective, and list their weights by name.

    A term of weight 0 is not built, except the one that the discriminator needs.
    """
    needed = config.adversarial_loss
    wanted = {name: loss for name, loss in config.losses.items() if loss.weight > 0 or name == needed}
    terms = nn.ModuleDict({name: build_component(LOSSES, loss.component) for name, loss in wanted.items()})
    return terms, {name: loss.weight for name, loss in wanted.items()}


def build_split(config: RunConfig, split: SplitConfig, *, with_images: bool = True) -> LabelMapDataset:
    """Open one split, ``config.data.train`` or ``config.data.val``, with or without photos."""
    if config.data.skip_bad and not with_images:  # the same samples as with photos
        return build_split(config, split).without_images()
    if config.data.type is not None:
        known = split.roots, config.data, layout_spec(config), split.augmentations, config.seed, with_images
        own: LabelMapDataset = build_component(DATASETS, config.data.type, *known)
        return own
    data = with_measured_range(config).data if with_images else config.data
    dataset = LabelMapDataset(
        split.roots, data.labels, edges=data.edges, images=data.images, distances=layout_spec(config).has_distances,
        augmentations=split.augmentations, seed=config.seed, with_images=with_images, suffixes=data.suffixes,
        conditions=data.conditions,
    )  # fmt: skip
    if data.skip_bad:
        leave_out_bad(dataset, data.num_workers)
    return dataset


def with_measured_range(config: RunConfig) -> RunConfig:
    """Replace ``data.images.range: auto`` by the numbers that the builder measured over ``data.train``.

    Raises:
        DataError: they are not known.
    """
    images = measured(config.data.images, config.data.train.roots)
    return config.model_copy(update={"data": config.data.model_copy(update={"images": images})})


def _hindrances(config: RunConfig, generator: Generator, world_size: int, device: torch.device | None) -> list[str]:
    """List what keeps a run from being recorded as a CUDA graph, which repeats the same kernels on the same memory."""
    trainer, fused = config.trainer, {"gen_opt": config.gen_opt.fused, "dis_opt": config.dis_opt.fused}
    adam = ", ".join(f"{name}.fused: {form}" for name, form in fused.items() if form not in ("auto", "torch"))
    by_tables = any(isinstance(module, SPADE) and module.path == "table" for module in generator.modules())
    told = {
        "it needs a GPU (--device cuda)": device is not None and device.type != "cuda",
        "it takes one process, since gradients are exchanged outside of a graph": world_size > 1,
        "tables change in size from batch to batch: write gen.norm.path: auto": by_tables,
        "fp16 asks the GPU which updates to skip: write trainer.precision: bf16": trainer.precision == "fp16",
        "write trainer.gradient_accumulation: 1": trainer.gradient_accumulation > 1,
        "write trainer.activation_checkpointing: false, which restores buffers": trainer.activation_checkpointing,
        f"learning rates must stay on the GPU: in place of {adam} write auto": adam != "",
    }
    return [text for text, hinders in told.items() if hinders]


def check_run(config: RunConfig, world_size: int, device: torch.device | None = None) -> None:
    """Reject what would fail later. The networks are made without storage.

    Args:
        device: that of training, if it is known.
    Raises:
        ConfigError: with what to write instead.
    """
    trainer, train = config.trainer, config.data.train
    # Batch and optimizer.
    if train.batch_size % trainer.gradient_accumulation:
        raise ConfigError(
            f"data.train.batch_size: {train.batch_size} cannot be split into trainer.gradient_accumulation:"
            f" {trainer.gradient_accumulation} equal pieces; make the one a multiple of the other"
        )
    if "apex" in (config.gen_opt.fused, config.dis_opt.fused):
        apex_adam()
    # Networks, and the sizes they take.
    size = image_size(config)
    with torch.device("meta"):
        generator = build_generator(config)
        discriminator = build_discriminator(config)
        encoder = build_encoder(config)
    if trainer.cuda_graphs and (hindrances := _hindrances(config, generator, world_size, device)):
        raise ConfigError(f"trainer.cuda_graphs: {'; '.join(hindrances)}; or write trainer.cuda_graphs: false")
    # Of a batch, the photos alone are counted.
    trained = [(generator, config.gen_opt), (encoder, config.gen_opt), (discriminator, config.dis_opt)]
    weights = sum(
        parameter.numel() * bytes_per_weight(optimizer)
        for network, optimizer in trained
        if network is not None
        for parameter in network.parameters()
    )
    photos = train.batch_size * size[0] * size[1] * config.data.images.channels
    if max(weights, photos) > (usable := usable_memory()):
        raise ConfigError(
            f"training needs {weights / 2**30:,.1f} GiB for the weights and {photos / 2**30:,.1f} GiB for the photos of"
            f" a batch, at least; this machine has {usable / 2**30:,.1f}: lower num_filters of gen, dis or encoder, or"
            " data.train.batch_size, or the sizes in data.train.augmentations"
        )
    multiple = generator.size_multiple
    given = f"data.train.augmentations gives images of {size[0]}x{size[1]}, but"
    if size[0] % multiple or size[1] % multiple:
        near = [max(multiple, round(length / multiple) * multiple) for length in size]
        raise ConfigError(f"{given} gen ({config.gen.type}) needs multiples of {multiple}: such as {near}")
    step = discriminator.size_multiple
    if min(size) < discriminator.min_size or any(length % step for length in size):
        least = max(step, -(-discriminator.min_size // step) * step)
        near = [max(least, round(length / step) * step) for length in size]
        keys = "dis.encoder.num_blocks" if discriminator.scores_classes else "dis.num_layers or dis.num_discriminators"
        raise ConfigError(
            f"{given} dis ({config.dis.type}) needs at least {discriminator.min_size}, and multiples of {step}: such as"
            f" {near}; or lower {keys}"
        )
    # Validation.
    val = config.data.val
    val_size = None if val is None else val.augmentations.output_h_w
    if val is not None and (val_size is None or val_size[0] % multiple or val_size[1] % multiple):
        images = "images of different sizes" if val_size is None else f"images of {val_size[0]}x{val_size[1]}"
        raise ConfigError(
            f"data.val.augmentations gives {images}, but previews need one size, a multiple of {multiple}. Write"
            f" data.val.augmentations.resize_h_w: {list(size)}"
        )
    if trainer.evaluation is not None and val is None:
        raise ConfigError(
            "trainer.evaluation measures on validation samples, and there is no data.val: write data.val.roots: [...],"
            " or trainer.evaluation: null"
        )
    # What knows RGB alone.
    perceptual = config.losses.get("perceptual")
    through_networks = (perceptual and perceptual.weight > 0) or trainer.evaluation
    if (channels := config.data.images.channels) not in (1, 3) and through_networks:
        raise ConfigError(
            "losses.perceptual and trainer.evaluation look at images through networks that take RGB (or grey), and"
            f" data.images.channels is {channels}: write losses.perceptual.weight: 0 and trainer.evaluation: null"
        )
    # Discriminator and losses.
    gives, name = discriminator.scores_classes, config.adversarial_loss
    if LOSSES[name].scores_classes != gives:  # type: ignore[attr-defined]
        scored = "each pixel's class" if gives else "whether patches are real, and no classes"
        needed = {True: "losses.segmentation_gan: 1 (and losses.gan: 0)", False: "dis.type: oasis_unet"}[gives]
        raise ConfigError(f"losses.{name} does not fit dis ({config.dis.type}), which scores {scored}: write {needed}")
    features = config.losses.get("feature_matching")
    if gives and features is not None and features.weight > 0:
        raise ConfigError(
            f"losses.feature_matching compares features, and dis ({config.dis.type}) gives none: write"
            " losses.feature_matching: 0"
        )
    if trainer.freeze_discriminator_layers > discriminator.num_freezable_layers:
        raise ConfigError(
            f"trainer.freeze_discriminator_layers: {trainer.freeze_discriminator_layers}, and dis ({config.dis.type})"
            f" has {discriminator.num_freezable_layers} layers that it can freeze: write that number or less"
        )
    # Batch statistics and losses.
    if size[0] * size[1] == multiple**2 and train.batch_size * world_size // trainer.gradient_accumulation < 2:
        raise ConfigError(
            f"one image of {size[0]}x{size[1]} is a single pixel at the generator's start, where batch statistics"
            " need two: raise data.train.batch_size or the image size"
        )
    kl = config.losses.get("kl")
    if kl is not None and kl.weight > 0 and config.encoder is None:
        raise ConfigError("losses.kl needs a style encoder: write encoder: {type: conv}, or losses.kl.weight: 0")


def build_component(registry: Registry, component: Component, *known: Any) -> Any:
    """Make a component.

    Args:
        known: what the pipeline knows, the positional parameters of the registered class. A component nested in this
            one becomes a factory, to which this one gives what it knows.
    """
    parts = registry.parts(component.type)
    args = {
        key: partial(build_component, parts[key], value) if key in parts else value
        for key, value in component.args.items()
    }
    return registry[component.type](*known, **args)
