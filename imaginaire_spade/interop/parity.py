"""Check our networks and losses against numbers that a reference system produced.

Outputs and buffers are computed in float32, as users get them. Gradients are computed in float64: the derivative of a
leaky ReLU jumps where its argument passes zero, and two float32 computations that agree to rounding may stand on either
side of it, which says nothing about the architecture.

A fixture is a folder with ``config.json`` (network, hyper-parameters, tolerances), ``weights.safetensors``,
``inputs.safetensors`` and ``outputs.safetensors``; every tensor of the outputs is compared or named as missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imaginaire_spade import losses
from imaginaire_spade.data.dataset import Batch
from imaginaire_spade.data.transforms import edges_from_ids
from imaginaire_spade.errors import UserError
from imaginaire_spade.interop import (
    imaginaire,
    import_discriminator,
    import_encoder,
    import_generator,
    reference_names,
)
from imaginaire_spade.interop.nvlabs_spade import layout_spec
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.discriminator import Scores, split_scores
from imaginaire_spade.models.encoder import sample_style
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.training.state import TrainState
from imaginaire_spade.training.step import Networks, StepSettings, train_step

MODES = ("eval", "train")


@dataclass(frozen=True)
class Row:
    """One compared tensor. ``error`` is NaN where ours is missing."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass(frozen=True)
class Fixture:
    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Fixture:
        """Raises UserError where the folder is no fixture."""
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            weights = path / "weights.safetensors"
            return cls(
                path,
                config,
                load_file(weights) if weights.exists() else {},
                load_file(path / "inputs.safetensors"),
                load_file(path / "outputs.safetensors"),
            )
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise UserError(
                f"{path}: not a parity fixture, which has config.json, inputs.safetensors, outputs.safetensors and"
                f" (for networks) weights.safetensors: {error}"
            ) from None

    @property
    def source(self) -> str:
        known = {"NVlabs/SPADE": "nvlabs_spade", "tzt101/CLADE": "clade", "NVlabs/imaginaire": "imaginaire"}
        for name, source in known.items():
            if self.config["reference"].startswith(name):
                return source
        raise UserError(f"{self.path}: reference {self.config['reference']!r}; known: {', '.join(known)}")

    def bound(self, name: str, wanted: Tensor) -> float:
        """Largest absolute difference allowed for the output ``name``."""
        group, scale = name.split("/")[0], float(wanted.abs().max())
        if group.endswith("_grad") and "tolerance_gradients" in self.config:
            return 1e-4 * scale  # as its text says: times the largest absolute value of the gradient
        if "tolerance_relative_float32" in self.config:
            return float(self.config["tolerance_relative_float32"]) * max(scale, 1.0)
        tolerance = self.config["tolerance_max_abs_float32"]
        if isinstance(tolerance, dict):
            if name.startswith("iter"):
                group = "iter*/generated" if name.endswith("/generated") else "losses"
            tolerance = tolerance[group if group in tolerance else group.partition("_")[0]]
        if group.endswith("_loss"):  # a sum over outputs times R: their bound carries over
            weights = [tensor for key, tensor in self.inputs.items() if key.split("/")[0] == "R"]
            return float(tolerance) * sum(float(weight.abs().sum()) for weight in weights)
        return float(tolerance) * max(scale, 1.0)


def verify(path: Path) -> list[Row]:
    """Compare every output tensor of a fixture. Raises UserError where the folder cannot be used."""
    fixture = Fixture.load(path)
    network = fixture.config["network"]
    checks: Mapping[str | None, Callable[[Fixture], Iterator[tuple[str, Tensor]]]] = {
        "SPADEGenerator": _generator,
        "SPADEGenerator (norm_mode clade)": _generator,
        "whole training step: CLADE generator + multi-scale discriminator": _training,
        "MultiscaleDiscriminator": _discriminator,
        "ConvEncoder": _encoder,
        "generator (SPADE) with style encoder": _style_generator,
        "discriminator (multi-resolution patch + FPSE)": _fpse_discriminator,
        None: _imaginaire_losses if "loss_weight" in fixture.config["hyper"] else _losses,
    }
    if network not in checks:
        raise UserError(f"{path}: network {network!r}; known: {', '.join(str(k) for k in checks if k)}")
    fixture.source  # noqa: B018  (an unknown reference is said before anything is computed)
    ours = dict(checks[network](fixture))
    rows = []
    for name, wanted in sorted(fixture.outputs.items()):
        if name.endswith("num_batches_tracked"):
            continue  # the reference's synchronized batch norm never counts
        bound = fixture.bound(name, wanted)
        if name not in ours:
            rows.append(Row(name, float("nan"), bound, "missing"))
        elif ours[name].numel() != wanted.numel():
            rows.append(Row(name, float("nan"), bound, f"shape {list(ours[name].shape)}, not {list(wanted.shape)}"))
        else:
            error = float((ours[name].detach().double().reshape(wanted.shape) - wanted.double()).abs().max())
            rows.append(Row(name, error, bound))
    if not rows:
        raise UserError(f"{path}: outputs.safetensors holds nothing to compare")
    return rows


def _layout(fixture: Fixture, spec: LayoutSpec, dense: str = "semantics") -> SemanticLayout:
    """The integer layout of the fixture's ids; it must give the reference's one-hot exactly."""
    semantics = fixture.inputs[dense].float()
    ids = fixture.inputs["label"][:, 0] if dense == "semantics" else fixture.inputs["seg_png"][:, 0]
    labels = ids.to(torch.int16).clamp(max=spec.num_classes)
    edges = semantics[:, -1].to(torch.uint8) if spec.has_edges else None
    layout = SemanticLayout(spec, labels, edges)
    if not torch.equal(layout.one_hot(), semantics):
        raise UserError(f"{fixture.path}: label and semantics of the inputs do not belong together")
    return layout


def _gradients(
    fixture: Fixture, mode: str, loss: Tensor, network: nn.Module, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients of ``loss`` for every ``<mode>_grad/...`` of the fixture: of parameters and of ``input.*``."""
    parameters: dict[str, Tensor] = dict(network.named_parameters())
    ours = {reference_names(fixture.source, network)[key]: tensor for key, tensor in parameters.items()}
    ours |= {f"input.{name}": tensor for name, tensor in inputs.items()}
    wanted = [n.removeprefix(f"{mode}_grad/") for n in fixture.outputs if n.startswith(f"{mode}_grad/")]
    present = [name for name in wanted if name in ours]
    gradients = torch.autograd.grad(loss, [ours[name] for name in present], allow_unused=True)
    for name, gradient in zip(present, gradients, strict=True):
        if gradient is not None:
            yield f"{mode}_grad/{name}", gradient


def _state(fixture: Fixture, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = reference_names(fixture.source, network)
    for key, buffer in network.named_buffers():
        yield f"train_state/{names[key]}", buffer


def _generator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    spec = layout_spec(hyper)
    layout = _layout(fixture, spec)
    for mode in MODES:
        network = import_generator(fixture.source, fixture.weights, hyper).train(mode == "train")
        z = inputs.get("z")
        with torch.no_grad():
            yield f"{mode}/fake_image", network(layout, z)
        if mode == "train":
            yield from _state(fixture, network)
        if "R" in inputs:
            network = import_generator(fixture.source, fixture.weights, hyper).train(mode == "train").double()
            semantics = inputs["semantics"].double().requires_grad_()
            z = None if z is None else z.detach().double().requires_grad_()
            image = network(SemanticLayout.from_dense(spec, semantics), z)
            loss = (image * inputs["R"]).sum()
            yield f"{mode}_loss/sum_output_times_R", loss
            named = {"semantics": semantics} | ({} if z is None else {"z": z})
            yield from _gradients(fixture, mode, loss, network, named)


def _style_generator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    spec = imaginaire.layout_spec(hyper)
    layout = _layout(fixture, spec, dense="label")
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
            yield from _state(fixture, network)
            yield from _state(fixture, encoder)
        network = import_generator(fixture.source, fixture.weights, hyper).train(training).double()
        label = inputs["label"].double().requires_grad_()
        z = inputs["z"].double().requires_grad_()
        loss = (network(SemanticLayout.from_dense(spec, label), z) * inputs["R"]).sum()
        yield f"{mode}_loss/sum_output_times_R", loss
        yield from _gradients(fixture, mode, loss, network, {"label": label, "z": z})


def _discriminator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    layout = _layout(fixture, layout_spec(hyper))
    pictures = torch.cat([inputs["fake_image"], inputs["real_image"]])
    for mode in MODES:
        network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train")
        with torch.no_grad():
            yield from _named(mode, network(layout, pictures))
        if mode == "train":
            yield from _state(fixture, network)
        weights = {name.removeprefix("R/"): tensor for name, tensor in inputs.items() if name.startswith("R/")}
        if weights:
            network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train").double()
            fake, real = (inputs[f"{half}_image"].double().requires_grad_() for half in ("fake", "real"))
            outputs = dict(_named(mode, network(layout, torch.cat([fake, real]))))
            loss = torch.stack([(outputs[f"{mode}/{name}"] * weight).sum() for name, weight in weights.items()]).sum()
            yield f"{mode}_loss/sum_output_times_R", loss
            yield from _gradients(fixture, mode, loss, network, {"fake_image": fake, "real_image": real})


def _named(mode: str, scores: list[Scores]) -> Iterator[tuple[str, Tensor]]:
    """Scores of fake then real pictures under the fixtures' names; the last layer is the prediction."""
    for half, per_scale in zip(("fake", "real"), split_scores(scores), strict=True):
        for scale, (logits, features) in enumerate(per_scale):
            for layer, tensor in enumerate([*features, logits]):
                yield f"{mode}/{half}/scale{scale}/layer{layer}", tensor


def _fpse_discriminator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    layout = _layout(fixture, imaginaire.layout_spec(hyper), dense="label")
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
            yield from _state(fixture, network)
        network = import_discriminator(fixture.source, fixture.weights, hyper).train(mode == "train").double()
        leaves = {half: inputs[f"{half}_images"].double().requires_grad_() for half in ("real", "fake")}
        named = dict(outputs(network, leaves))
        loss = torch.stack([(named[name] * weight).sum() for name, weight in weights.items()]).sum()
        yield f"{mode}_loss/sum_output_times_R", loss
        yield from _gradients(fixture, mode, loss, network, {f"{half}_images": x for half, x in leaves.items()})


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
                yield from _state(fixture, network)


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
    assert isinstance(generator, Generator)

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
    terms = nn.ModuleDict({"gan": losses.GANLoss(mode=_GAN_MODES[hyper["gan_mode"]])})
    terms["feature_matching"] = losses.FeatureMatchingLoss()
    settings = StepSettings(
        terms, {"gan": 1.0, "feature_matching": hyper["lambda_feat"]}, "reference", None, 1, style_dims=0, seed=0
    )
    spec = layout_spec(hyper)
    for iteration in range(1, fixture.config["iterations"] + 1):
        label, instance, image = (fixture.inputs[f"iter{iteration}/{n}"] for n in ("label", "instance", "image"))
        edges = torch.stack([torch.from_numpy(edges_from_ids(ids.numpy())) for ids in instance[:, 0]])
        layout = SemanticLayout(spec, label[:, 0].to(torch.int16), edges if spec.has_edges else None)
        names = tuple(map(str, range(len(label))))
        # The step maps 0..255 to [-1, 1]: the float pictures are mapped back first.
        batch = Batch(
            layout, (image + 1) * 127.5, names, ((layout.height, layout.width),) * len(label), tuple(range(len(label)))
        )
        made: list[Tensor] = []
        hook = generator.register_forward_hook(lambda _m, _i, output, made=made: made.append(output.detach()))
        found = train_step(state, Networks(generator, discriminator, None), batch, settings, 0.0)
        hook.remove()
        yield f"iter{iteration}/generated", made[0]
        yield f"iter{iteration}/G_GAN", found["gan"]
        yield f"iter{iteration}/G_GAN_Feat", hyper["lambda_feat"] * found["feature_matching"]
        yield f"iter{iteration}/D_Fake", found["d_fake"]
        yield f"iter{iteration}/D_real", found["d_real"]
    for part, network in (("generator", generator), ("discriminator", discriminator)):
        keys = reference_names(fixture.source, network)
        for key, tensor in network.state_dict().items():
            yield f"final/{prefixes[part]}{keys[key]}", tensor


_GAN_MODES: dict[str, losses.GANMode] = {
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
    for mode in hyper["gan_modes"]:
        ours = _GAN_MODES[mode]
        terms = {
            "GAN": losses.generator_gan_loss([s.logits for s in fake], ours),
            "GAN_Feat": hyper["lambda_feat"] * losses.feature_matching_loss(fake, real),
            "KLD": hyper["lambda_kld"] * losses.kl_loss(leaves["mu"], leaves["logvar"]),
        }
        of_fake, of_real = losses.discriminator_gan_loss([s.logits for s in fake], [s.logits for s in real], ours)
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


_IMAGINAIRE_MODES: dict[str, losses.GANMode] = {
    "hinge": "hinge", "least_square": "half_least_square", "non_saturated": "non_saturated",
    "wasserstein": "wasserstein",
}  # fmt: skip


def _imaginaire_losses(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
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
        if kind not in _IMAGINAIRE_MODES:
            continue
        gan = losses.GANLoss(mode=_IMAGINAIRE_MODES[kind], relative=mode != kind)
        terms = {
            "gan": gan(outputs),
            "feature_matching": losses.feature_matching_loss(fake, real),
            "kl": losses.kl_loss(leaves["mu"], leaves["logvar"]),
        }
        names = {"gan": "GAN", "feature_matching": "FeatureMatching", "kl": "GaussianKL"}
        for name, term in terms.items():
            yield f"{mode}/gen/{names[name]}", term
        both = gan.discriminator(fake, real)
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
