"""Checks of imaginaire's networks and losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaginaire_spade import losses
from imaginaire_spade.interop import describe, import_discriminator, import_encoder, import_generator, split_key
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.discriminator import Scores
from imaginaire_spade.models.generator import sample_style
from imaginaire_spade.models.norms import BatchNorm2d
from imaginaire_spade.models.spectral_norm import SpectralConv2d, SpectralLinear
from imaginaire_spade.training.state import new_average, reestimate_batch_norm, update_average
from parity.fixture import MODES, Check, Fixture, buffers, gradients, matching_layout


def _style_generator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    spec = describe(fixture.source, "layout_spec", hyper)
    layout = matching_layout(fixture, spec, dense="label")
    for mode in MODES:
        training = mode == "train"
        network = import_generator(fixture.source, fixture.weights, hyper).train(training)
        with torch.no_grad():
            yield f"{mode}/from_z/fake_images", network(layout, inputs["z"])
        # Each training-mode run starts from the stored weights.
        network = import_generator(fixture.source, fixture.weights, hyper).train(training)
        encoder = import_encoder(fixture.source, fixture.weights, hyper).train(training)
        with torch.no_grad():
            mu, logvar = encoder(inputs["images"])
            z = sample_style(mu, logvar, inputs["eps"])
            style = {"fake_images": network(layout, z), "mu": mu, "logvar": logvar, "z": z}
        yield from ((f"{mode}/style/{name}", tensor) for name, tensor in style.items())
        if training:
            yield from buffers(fixture, network)
            yield from buffers(fixture, encoder)
        network = import_generator(fixture.source, fixture.weights, hyper).train(training).double()
        label = inputs["label"].double().requires_grad_()
        z = inputs["z"].double().requires_grad_()
        loss = (network(SemanticLayout.from_dense(spec, label), z) * inputs["R"]).sum()
        yield f"{mode}_loss/sum_output_times_R", loss
        yield from gradients(fixture, mode, loss, network, {"label": label, "z": z})


def _fpse_discriminator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    layout = matching_layout(fixture, describe(fixture.source, "layout_spec", hyper), dense="label")
    weights = {name.removeprefix("R/"): tensor for name, tensor in inputs.items() if name.startswith("R/")}

    def outputs(network: nn.Module, images: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for half in ("real", "fake"):  # two forwards, real first: spectral norm iterates before each
            scores = network(layout, images[half])
            yield from ((f"{half}_outputs/{i}", logits) for i, (logits, _) in enumerate(scores))
            for i, features in enumerate(f for _, f in scores if f):
                yield from ((f"{half}_features/disc{i}/layer{j}", feature) for j, feature in enumerate(features))

    for mode in MODES:
        network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train")
        with torch.no_grad():
            for name, tensor in outputs(network, {half: inputs[f"{half}_images"] for half in ("real", "fake")}):
                yield f"{mode}/{name}", tensor
        if mode == "train":
            yield from buffers(fixture, network)
        network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train").double()
        leaves = {half: inputs[f"{half}_images"].double().requires_grad_() for half in ("real", "fake")}
        named = dict(outputs(network, leaves))
        loss = torch.stack([(named[name] * weight).sum() for name, weight in weights.items()]).sum()
        yield f"{mode}_loss/sum_output_times_R", loss
        yield from gradients(fixture, mode, loss, network, {f"{half}_images": x for half, x in leaves.items()})


_GAN_MODES: dict[str, losses.GANMode] = {
    "hinge": "hinge", "least_square": "half_least_square", "non_saturated": "non_saturated",
    "wasserstein": "wasserstein",
}  # fmt: skip


def _losses(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    weight = fixture.config["hyper"]["loss_weight"]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in fixture.inputs.items()}

    def scores(half: str) -> list[Scores]:
        """Score maps; the last ones belong to the patch discriminators, whose features are there."""
        maps = [leaves[f"{half}_outputs/{i}"] for i in range(fixture.config["hyper"]["num_score_maps"])]
        patch = fixture.config["hyper"]["num_feature_lists"]
        features: list[list[Tensor]] = [[] for _ in range(len(maps) - patch)]
        for disc in range(patch):
            names = sorted(name for name in leaves if name.startswith(f"{half}_features/disc{disc}/"))
            features.append([leaves[name] for name in names])
        return [Scores(logits, layers) for logits, layers in zip(maps, features, strict=True)]

    fake, real = scores("fake"), scores("real")
    outputs = losses.GeneratorOutputs(torch.empty(0), torch.empty(0), fake, real, leaves["mu"], leaves["logvar"])
    for mode in sorted({name.split("/")[0] for name in fixture.outputs}):
        kind = mode.removesuffix("_relativistic")
        if kind not in _GAN_MODES:
            continue
        gan = losses.GANLoss(mode=_GAN_MODES[kind], relative=mode != kind)
        terms = {
            "gan": gan(outputs),
            "feature_matching": losses.FeatureMatchingLoss()(outputs),
            "kl": losses.KLLoss()(outputs) * len(leaves["mu"]),
        }
        names = {"gan": "GAN", "feature_matching": "FeatureMatching", "kl": "GaussianKL"}
        for name, term in terms.items():
            yield f"{mode}/gen/{names[name]}", term
        both = gan.discriminator([fake, real])
        yield f"{mode}/dis/GAN_fake", both["d_fake"]
        yield f"{mode}/dis/GAN_true", both["d_real"]
        yield f"{mode}/dis/GAN", both["d_fake"] + both["d_real"]
        totals = {
            "gen": torch.stack([weight[name] * term for name, term in terms.items()]).sum(),
            "dis": weight["gan"] * (both["d_fake"] + both["d_real"]),
        }
        for side, total in totals.items():
            yield f"{mode}/{side}/total", total
            gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                yield f"{mode}/{side}_grad/{name}", gradient


class _SmallModule(nn.Module):
    """What the fixture of the model average averages."""

    prefixes = {
        "plain": "plain.layers.conv",
        "norm": "sn.layers.norm",
        "conv": "sn.layers.conv",
        "fc": "fc.layers.conv",
    }

    def __init__(self, hyper: Mapping[str, int]) -> None:
        super().__init__()
        middle = hyper["mid_channels"]
        self.plain = nn.Conv2d(hyper["in_channels"], middle, 3, padding=1)
        self.norm = BatchNorm2d(middle)
        self.conv = SpectralConv2d(middle, middle, 3, padding=1)
        self.fc = SpectralLinear(middle, hyper["out_features"])

    def forward(self, x: Tensor, _: None = None) -> Tensor:
        x = F.leaky_relu(self.plain(x), 0.2)
        x = self.conv(F.leaky_relu(self.norm(x), 0.2))
        return self.fc(x.mean((2, 3)))

    @classmethod
    def foreign_names(cls, network: nn.Module) -> dict[str, str]:
        return {key: f"{cls.prefixes[split_key(network, key)[0]]}.{split_key(network, key)[1]}"
                for key in network.state_dict()}  # fmt: skip


def _model_average(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    network = _SmallModule(hyper).train()
    names = _SmallModule.foreign_names(network)

    def load(tensors: Mapping[str, Tensor], prefix: str) -> None:
        network.load_state_dict({key: tensors[f"{prefix}module.{name}"] for key, name in names.items()})

    def averaged() -> Iterator[tuple[str, Tensor]]:
        for key, name in _SmallModule.foreign_names(average).items():
            yield f"averaged_model.{name}", average.state_dict()[key].clone()

    load(fixture.weights, "")
    average = new_average(network)
    for step in range(1, hyper["steps"] + 1):
        with torch.no_grad():
            yield f"step{step}/module_output_before_parameter_change", network(inputs[f"step{step}/x"])
        load(inputs, f"step{step}/")
        update_average(average, network, hyper["beta"] if step > hyper["start_iteration"] else 0.0)
        yield from ((f"step{step}/{name}", tensor) for name, tensor in averaged())
        yield f"step{step}/num_updates_tracked", torch.tensor([step])
    with torch.no_grad():
        yield "averaged_eval_output_before_bn_reestimation", average(inputs["eval_x"])
        batches = [inputs[name] for name in sorted(inputs) if name.startswith("bn_batch")]
        reestimate_batch_norm(average, [(batch, None) for batch in batches])
        yield "averaged_eval_output_after_bn_reestimation", average(inputs["eval_x"])
    yield from ((f"bn_reestimated/{name}", tensor) for name, tensor in averaged())


CHECKS: dict[str | None, Check] = {
    "generator (SPADE) with style encoder": _style_generator,
    "discriminator (multi-resolution patch + FPSE)": _fpse_discriminator,
    "model average of a small module: plain conv block, spectral-norm conv block with batch norm, spectral-norm linear":
        _model_average,
    None: _losses,
}  # fmt: skip
