"""OASIS by tables against its own dense path: the generator at inference, and a whole training iteration.

The label maps have ADE20K's 151 channels (150 classes and don't care): those of COCO-Stuff, with higher ids as don't
care. Both sides of the iteration have one noise vector per label map and the same U-Net. Published recipes train with
the form ``reference``, small ones with ``shared``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.generator import with_path
from benchmarks.layouts import fresh, make_layout
from benchmarks.measure import Row, largest_difference, rows_of, take_turns
from imaginaire_spade.config_trainer import OptimizerConfig, TrainerConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.inference.choices import remembered
from imaginaire_spade.layout import LayoutSpec, NoiseRegions, SemanticLayout
from imaginaire_spade.losses import SegmentationGANLoss
from imaginaire_spade.models.for_inference import optimise_for_inference
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.oasis import OASISGenerator
from imaginaire_spade.models.spectral_norm import fold_spectral_norm
from imaginaire_spade.models.unet import OASISDiscriminator
from imaginaire_spade.noise import style_noise
from imaginaire_spade.optimizer import build_optimizer
from imaginaire_spade.training.state import TrainState, new_average
from imaginaire_spade.training.step import Networks, StepSettings, train_step

SPEC = LayoutSpec(150, has_dont_care=True)


def _layout(folder: Path | None, count: int, size: int, device: torch.device) -> SemanticLayout:
    labels = make_layout(folder, count, size, size).labels.clamp(max=SPEC.num_classes)
    return SemanticLayout(SPEC, labels).to(device)


def _generator(size: int, num_filters: int, device: torch.device) -> OASISGenerator:
    torch.manual_seed(0)
    generator = OASISGenerator(SPEC, (size, size), num_filters=num_filters, style_dims=num_filters)
    initialise(generator, "xavier", 1.0)
    return generator.to(device)


@torch.inference_mode()
def inference(folder: Path | None, device: torch.device, repeats: int, num_filters: int, size: int) -> list[Row]:
    layout = _layout(folder, 1, size, device)
    generator = _generator(size, num_filters, device).eval()
    z = style_noise(0, ["a"], num_filters).to(device)
    by_class = NoiseRegions(torch.randn(1, SPEC.num_classes + 1, num_filters, device=device), layout.labels.long())
    path = "table" if device.type == "cuda" else "auto"
    fast = with_path(path, copy.deepcopy(generator))
    fast = optimise_for_inference(fast, winograd=device.type == "cpu", ask=remembered)
    plain = with_path("dense", fold_spectral_norm(copy.deepcopy(generator)))

    def run(network: OASISGenerator, noise: Tensor | NoiseRegions) -> Tensor:
        return network(fresh(layout), noise)

    rows = []
    for kind, noise in (("image", z), ("class", by_class)):
        runs = {"OASIS dense": partial(run, plain, noise), "OASIS": partial(run, fast, noise)}
        difference = largest_difference([runs["OASIS"]()], [runs["OASIS dense"]()])
        case = f"{size}x{size}, noise by {kind}"
        rows += rows_of("oasis inference", case, take_turns(runs, repeats, device), {"OASIS": difference})
    return rows


def iteration(folder: Path | None, device: torch.device, repeats: int, num_filters: int, size: int) -> list[Row]:
    layout = _layout(folder, 1, size, device)
    generator = _generator(size, num_filters, device).train()
    widths = {"num_filters": 2 * num_filters, "middle_num_filters": 4 * num_filters,
              "max_num_filters": 8 * num_filters, "last_num_filters": num_filters}  # fmt: skip
    discriminator = OASISDiscriminator(SPEC, **widths).to(device).train()
    optimizers = [build_optimizer(n.parameters(), OptimizerConfig(lr=1e-4)) for n in (generator, discriminator)]
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = TrainState(generator, discriminator, None, new_average(generator), None, *optimizers, scaler, scaler)
    settings = StepSettings(
        nn.ModuleDict({"segmentation_gan": SegmentationGANLoss()}), {"segmentation_gan": 1.0},
        TrainerConfig(max_iterations=1), style_dims=num_filters, seed=0, global_batch=1,
        rates=lambda _: (1e-4, 1e-4, 0.999),
    )  # fmt: skip
    fast = "table" if device.type == "cuda" else "auto"
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, device=device)

    def run(form: Literal["shared", "reference"], path: str) -> object:
        with_path(path, generator)
        batch = Batch(fresh(layout), images, ("a",), ((size, size),), (0,))
        trainer = TrainerConfig(max_iterations=1, iteration=form)
        networks = Networks(generator, discriminator, None)
        return train_step(state, networks, batch, replace(settings, trainer=trainer))

    difference = _gradient_difference(folder, device, min(num_filters, 16), min(size, 128))
    rows = []
    for form in ("reference", "shared"):
        runs = {"OASIS dense": partial(run, form, "dense"), "OASIS": partial(run, form, fast)}
        times = take_turns(runs, repeats, device)
        rows += rows_of("oasis iteration", f"batch 1, {size}x{size}, {form}", times, {"OASIS": difference})
    return rows


def _gradient_difference(folder: Path | None, device: torch.device, num_filters: int, size: int) -> float:
    """Largest difference of the generator's gradients, z's among them, relative to each tensor's largest, in double
    precision."""
    layout = _layout(folder, 2, size, device)
    generator = _generator(size, num_filters, device).train().double()
    direction = torch.randn(2, 3, size, size, device=device)
    state = {name: value.clone() for name, value in generator.state_dict().items()}
    found = []
    for path in ("table", "dense"):
        generator.load_state_dict(state)
        z = style_noise(0, ["a", "b"], num_filters).to(device).double().requires_grad_()
        (with_path(path, generator)(fresh(layout), z) * direction).sum().backward()
        found.append([z.grad, *(p.grad for p in generator.parameters())])
        generator.zero_grad()
    return largest_difference(found[0], found[1], relative=True)
