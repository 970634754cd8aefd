"""Checks of CLADE's generators and distance maps, and of whole training iterations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade import losses
from imaginaire_spade.config_trainer import TrainerConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.interop import describe, foreign_names, import_discriminator, import_generator
from imaginaire_spade.layout import SemanticLayout, borders
from imaginaire_spade.models.discriminator import Discriminator
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.training.state import TrainState
from imaginaire_spade.training.step import Networks, StepSettings, train_step
from parity.fixture import Check, Fixture
from parity.nvlabs_spade import GAN_MODES, check_generator


def _training(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Whole iterations of our own training step in its ``reference`` form."""
    hyper, adam = fixture.config["hyper"], fixture.config["adam"]
    prefixes = {"generator": "netG.", "discriminator": "netD."}
    weights = {
        part: {k.removeprefix(prefix): t for k, t in fixture.weights.items() if k.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    generator = import_generator(fixture.source, weights["generator"], hyper).train()
    discriminator = import_discriminator(fixture.source, weights["discriminator"], hyper).train()
    assert isinstance(generator, Generator) and isinstance(discriminator, Discriminator)

    def optimizer(network: nn.Module, side: str) -> torch.optim.Optimizer:
        settings = adam[side]
        return torch.optim.Adam(
            network.parameters(),
            lr=settings["lr"],
            betas=(float(settings["betas"][0]), float(settings["betas"][1])),
            eps=settings["eps"],
        )

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(
        generator,
        discriminator,
        None,
        None,
        None,
        optimizer(generator, "G"),
        optimizer(discriminator, "D"),
        scaler,
        scaler,
    )
    terms = nn.ModuleDict({"gan": losses.GANLoss(mode=GAN_MODES[hyper["gan_mode"]])})
    terms["feature_matching"] = losses.FeatureMatchingLoss()
    weights = {"gan": 1.0, "feature_matching": hyper["lambda_feat"]}
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (state.gen_optimizer, state.dis_optimizer)]
    trainer = TrainerConfig(max_iterations=1, iteration="reference")
    settings = StepSettings(
        terms, weights, trainer, style_dims=0, seed=0, global_batch=1, rates=lambda _: (rates[0], rates[1], 0.0)
    )
    spec = describe(fixture.source, "layout_spec", hyper)
    for iteration in range(1, fixture.config["iterations"] + 1):
        label, instance, image = (fixture.inputs[f"iter{iteration}/{n}"] for n in ("label", "instance", "image"))
        edges = borders(instance[:, 0]) if spec.has_edges else None
        layout = SemanticLayout(spec, label[:, 0].to(torch.int16), edges)
        names = tuple(map(str, range(len(label))))
        # The step maps 0..255 to [-1, 1]: the float pictures are mapped back first.
        batch = Batch(
            layout, (image + 1) * 127.5, names, ((layout.height, layout.width),) * len(label), tuple(range(len(label)))
        )
        made: list[Tensor] = []
        hook = generator.register_forward_hook(lambda _m, _i, output, made=made: made.append(output.detach()))
        found = train_step(state, Networks(generator, discriminator, None), batch, settings)
        hook.remove()
        yield f"iter{iteration}/generated", made[0]
        yield f"iter{iteration}/G_GAN", found["gan"]
        yield f"iter{iteration}/G_GAN_Feat", hyper["lambda_feat"] * found["feature_matching"]
        yield f"iter{iteration}/D_Fake", found["d_fake"]
        yield f"iter{iteration}/D_real", found["d_real"]
    for part, network in (("generator", generator), ("discriminator", discriminator)):
        keys = foreign_names(fixture.source, network)
        for key, tensor in network.state_dict().items():
            yield f"final/{prefixes[part]}{keys[key]}", tensor


def _distance_maps(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Distance maps, and what the reference's loader makes of them: it resizes by the floor rule and flips rows."""
    resize, fixed = (fixture.config["loader_variants"][variant] for variant in ("resize", "fixed"))
    left, top = resize["crop_pos_x_y"]
    rows, columns = slice(top, top + resize["crop_size"]), slice(left, left + resize["crop_size"])
    for name, label in fixture.inputs.items():
        normalised, unnormalised = (
            # The reference gives label 0 no position.
            torch.from_numpy(class_distances(label.numpy(), normalise=on)).masked_fill(label == 0, 0)
            for on in (True, False)
        )
        yield f"{name}/normalised", normalised
        yield f"{name}/unnormalised", unnormalised
        stored = normalised.unsqueeze(0)
        loaded = {
            "resize": F.interpolate(stored, size=(resize["load_size"],) * 2, mode="nearest")[0, :, rows, columns],
            "fixed": F.interpolate(stored, size=fixed["result_h_w"], mode="nearest")[0],
        }
        for variant, distances in loaded.items():
            yield f"{name}/loader_{variant}_flip0", distances
            yield f"{name}/loader_{variant}_flip1", distances.flip(1)


CHECKS: dict[str | None, Check] = {
    "SPADEGenerator (norm_mode clade)": check_generator,
    "whole training step: CLADE generator + multi-scale discriminator": _training,
    None: _distance_maps,
}
