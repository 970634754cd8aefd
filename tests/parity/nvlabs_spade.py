"""Checks of the 2019 SPADE release's networks and losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imaginaire_spade import losses
from imaginaire_spade.interop import describe, import_discriminator, import_encoder, import_generator
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.discriminator import Scores, split_scores
from imaginaire_spade.models.generator import sample_style
from parity.fixture import MODES, Check, Fixture, buffers, gradients, matching_layout


def check_generator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    spec: LayoutSpec = describe(fixture.source, "layout_spec", hyper)
    layout = matching_layout(fixture, spec)
    for mode in MODES:
        network = import_generator(fixture.source, fixture.weights, hyper).train(mode == "train")
        z = inputs.get("z")
        with torch.no_grad():
            yield f"{mode}/fake_image", network(layout, z)
        if mode == "train":
            yield from buffers(fixture, network)
        if "R" in inputs:
            network = import_generator(fixture.source, fixture.weights, hyper).train(mode == "train").double()
            names = [name for name in ("semantics", "dist", "z") if name in inputs]
            leaves: dict[str, Tensor] = {name: inputs[name].double().requires_grad_() for name in names}
            dense = SemanticLayout.from_dense(spec, leaves["semantics"], leaves.get("dist"))
            loss = (network(dense, leaves.get("z")) * inputs["R"]).sum()
            yield f"{mode}_loss/sum_output_times_R", loss
            yield from gradients(fixture, mode, loss, network, leaves)


def _discriminator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    layout = matching_layout(fixture, describe(fixture.source, "layout_spec", hyper))
    pictures = torch.cat([inputs["fake_image"], inputs["real_image"]])
    for mode in MODES:
        network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train")
        with torch.no_grad():
            yield from _named(mode, network(layout, pictures))
        if mode == "train":
            yield from buffers(fixture, network)
        weights = {name.removeprefix("R/"): tensor for name, tensor in inputs.items() if name.startswith("R/")}
        if weights:
            network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train").double()
            fake, real = (inputs[f"{half}_image"].double().requires_grad_() for half in ("fake", "real"))
            outputs = dict(_named(mode, network(layout, torch.cat([fake, real]))))
            loss = torch.stack([(outputs[f"{mode}/{name}"] * weight).sum() for name, weight in weights.items()]).sum()
            yield f"{mode}_loss/sum_output_times_R", loss
            yield from gradients(fixture, mode, loss, network, {"fake_image": fake, "real_image": real})


def _named(mode: str, scores: list[Scores]) -> Iterator[tuple[str, Tensor]]:
    """Scores of fake then real pictures under the fixtures' names; the last layer is the prediction."""
    for half, per_scale in zip(("fake", "real"), split_scores(scores), strict=True):
        for scale, (logits, features) in enumerate(per_scale):
            for layer, tensor in enumerate([*features, logits]):
                yield f"{mode}/{half}/scale{scale}/layer{layer}", tensor


def _encoder(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    images = {name: tensor for name, tensor in inputs.items() if name.startswith("image_")}
    for mode in MODES:
        for index, (name, image) in enumerate(images.items()):
            network = import_encoder(fixture.source, fixture.weights, hyper).train(mode == "train")
            with torch.no_grad():
                mu, logvar = network(image)
            yield f"{mode}/{name}/mu", mu
            yield f"{mode}/{name}/logvar", logvar
            yield f"{mode}/{name}/z", sample_style(mu, logvar, inputs["eps"])
            if mode == "train" and index == 0:
                yield from buffers(fixture, network)


GAN_MODES: dict[str, losses.GANMode] = {
    "hinge": "hinge", "ls": "least_square", "original": "non_saturated", "w": "wasserstein"
}  # fmt: skip


def _losses(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper = fixture.config["hyper"]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in fixture.inputs.items()}

    def scores(half: str) -> list[Scores]:
        last = hyper["n_layers_D"]
        return [
            Scores(leaves[f"{half}/scale{s}/layer{last}"], [leaves[f"{half}/scale{s}/layer{k}"] for k in range(last)])
            for s in range(hyper["num_D"])
        ]

    fake, real = scores("fake"), scores("real")
    outputs = losses.GeneratorOutputs(torch.empty(0), torch.empty(0), fake, real, leaves["mu"], leaves["logvar"])
    for mode in hyper["gan_modes"]:
        gan = losses.GANLoss(mode=GAN_MODES[mode])
        terms = {
            "GAN": gan(outputs),
            "GAN_Feat": hyper["lambda_feat"] * losses.FeatureMatchingLoss()(outputs),
            "KLD": hyper["lambda_kld"] * losses.KLLoss()(outputs) * len(leaves["mu"]),
        }
        of_fake, of_real = gan.discriminator([fake, real]).values()
        totals = {"G": torch.stack(list(terms.values())).sum(), "D": of_fake + of_real}
        for name, term in terms.items():
            yield f"{mode}/G/{name}", term
        yield f"{mode}/D/D_Fake", of_fake
        yield f"{mode}/D/D_real", of_real
        for side, total in totals.items():
            yield f"{mode}/{side}/total", total
            gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                yield f"{mode}/{side}_grad/{name}", gradient


CHECKS: dict[str | None, Check] = {
    "SPADEGenerator": check_generator,
    "MultiscaleDiscriminator": _discriminator,
    "ConvEncoder": _encoder,
    None: _losses,
}
"""Network of a fixture's config.json -> what computes its outputs."""
