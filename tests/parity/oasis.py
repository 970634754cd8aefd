"""Checks of OASIS's networks, losses and whole training iterations.

Its don't care is label 0 and the first label channel, where ours is the last: tensors are put into our order, and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imaginaire_spade.config_trainer import TrainerConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.interop import describe, foreign_names, import_discriminator, import_generator
from imaginaire_spade.interop.systems import SYSTEMS
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.losses import ClassPlan, GeneratorOutputs, SegmentationGANLoss
from imaginaire_spade.models.discriminator import Discriminator, Scores
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.training.state import TrainState, move_statistics, new_average, update_average
from imaginaire_spade.training.step import Networks, StepSettings, train_step
from parity.fixture import MODES, Check, Fixture, buffers


def to_ours(ids: Tensor, spec: LayoutSpec) -> Tensor:
    """Labels int16 [N, H, W] of theirs [N, 1, H, W]."""
    labels = ids[:, 0].to(torch.int16)
    return (labels - 1) % (spec.num_classes + 1) if spec.has_dont_care else labels


def permuted(channels: Tensor, spec: LayoutSpec, axis: int, first: int) -> Tensor:
    """Move don't care behind the other label channels, which begin at ``first``."""
    if not spec.has_dont_care:
        return channels
    count = spec.num_label_channels
    before, labels, after = channels.tensor_split([first, first + count], axis)
    return torch.cat([before, labels.roll(-1, axis), after], axis)


def _spec(fixture: Fixture) -> LayoutSpec:
    spec: LayoutSpec = describe("oasis", "layout_spec", fixture.config["hyper"])
    return spec


# -------------------------------------------------------------------------------------------------------- networks


def weights_of(fixture: Fixture, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in fixture.weights.items() if key.startswith(prefix)}


def generator_of(fixture: Fixture, prefix: str = "") -> Generator:
    network = import_generator("oasis", weights_of(fixture, prefix), fixture.config["hyper"])
    assert isinstance(network, Generator)
    return network


def discriminator_of(fixture: Fixture, prefix: str = "") -> Discriminator:
    network = import_discriminator("oasis", weights_of(fixture, prefix), fixture.config["hyper"])
    assert isinstance(network, Discriminator)
    return network


def _theirs(network: nn.Module, tensors: Mapping[str, Tensor], spec: LayoutSpec) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a network under their names, label channels in their order."""
    names = foreign_names("oasis", network)
    for key, tensor in tensors.items():
        yield names[key], SYSTEMS["oasis"].arrange(names[key], tensor, spec, back=True)


def _gradients(
    fixture: Fixture, mode: str, loss: Tensor, network: nn.Module, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(network.named_parameters())
    found = torch.autograd.grad(loss, [*inputs.values(), *parameters.values()])
    of_inputs, of_parameters = found[: len(inputs)], found[len(inputs) :]
    yield from ((f"{mode}_grad/input.{name}", value) for name, value in zip(inputs, of_inputs, strict=True))
    gradients = dict(zip(parameters, of_parameters, strict=True))
    yield from ((f"{mode}_grad/{name}", value) for name, value in _theirs(network, gradients, _spec(fixture)))


def _generator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    inputs, spec = fixture.inputs, _spec(fixture)
    layout, z = SemanticLayout(spec, to_ours(inputs["label"], spec)), inputs.get("z")
    semantics = permuted(inputs["semantics"].double(), spec, 1, 0)
    assert torch.equal(layout.one_hot(torch.float64), semantics)
    for mode in MODES:
        network = generator_of(fixture).train(mode == "train")
        with torch.no_grad():
            yield f"{mode}/fake_image", network(layout, z)
        if mode == "train":
            yield from buffers(fixture, network)
        network = generator_of(fixture).train(mode == "train").double()
        leaves = {"semantics": inputs["semantics"].double().requires_grad_()}
        if z is not None:
            leaves["z"] = z.double().requires_grad_()
        dense = SemanticLayout.from_dense(spec, permuted(leaves["semantics"], spec, 1, 0))
        loss = (network(dense, leaves.get("z")) * inputs["R"]).sum()
        yield f"{mode}_loss/sum_output_times_R", loss
        yield from _gradients(fixture, mode, loss, network, leaves)


def _discriminator(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    inputs = fixture.inputs
    layout = SemanticLayout(_spec(fixture), torch.zeros(2, 64, 64, dtype=torch.int16))
    for mode in MODES:
        network = discriminator_of(fixture).train(mode == "train")
        with torch.no_grad():  # one call: the two groups' forwards come one after the other
            (both,) = network(layout, torch.cat([inputs["fake_image"], inputs["real_image"]]))
        for name, logits in zip(("fake", "real"), both.logits.chunk(2), strict=True):
            yield f"{mode}/{name}/scores", logits
        if mode == "train":
            yield from buffers(fixture, network)
        network = discriminator_of(fixture).train(mode == "train").double()
        fake, real = (inputs[f"{half}_image"].double().requires_grad_() for half in ("fake", "real"))
        (both,) = network(layout, torch.cat([fake, real]))
        weights = torch.cat([inputs["R/fake"], inputs["R/real"]])
        loss = (both.logits.double() * weights).sum()
        yield f"{mode}_loss/sum_output_times_R", loss
        yield from _gradients(fixture, mode, loss, network, {"fake_image": fake, "real_image": real})


# ---------------------------------------------------------------------------------------------------------- losses


def _losses(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    hyper, inputs = fixture.config["hyper"], fixture.inputs
    for case, flags in hyper["cases"].items():
        dont_care = flags["contain_dontcare_label"]
        spec = LayoutSpec(hyper["semantic_nc"] - dont_care, has_dont_care=dont_care)
        layout = SemanticLayout(spec, to_ours(inputs[flags["label"]], spec))
        term = SegmentationGANLoss(class_balancing=not flags["no_balancing_inloss"], labelmix=hyper["lambda_labelmix"])
        leaves = {name: inputs[f"output_{name}"].clone().requires_grad_() for name in ("fake", "real", "mixed")}
        scores = {name: [Scores(permuted(x, spec, 1, 1), [])] for name, x in leaves.items()}
        plan = _drawn(fixture, term.plan(layout, 0, 0), spec)
        if flags["label"] != "label":  # the mask is the other map's in this case too
            plan = GivenMask(plan.weights, plan.from_photo, inputs["labelmix_mask"].bool())
        yield f"{case}/weight_map", plan.weights[layout.labels.long()].unsqueeze(1)
        of_g = term(GeneratorOutputs(inputs["fake_image"], inputs["real_image"], scores["fake"], [], layout=layout,
                                     plan=plan))  # fmt: skip
        of_d = term.discriminator([*scores.values()], layout, plan)
        total = sum(of_d.values())
        yield f"{case}/G/loss", of_g
        yield from ((f"{case}/D/{name.removeprefix('d_')}", value) for name, value in of_d.items())
        yield f"{case}/D/total", total
        gradient = torch.autograd.grad(of_g, leaves["fake"], retain_graph=True)
        yield f"{case}/G_grad/output_fake", gradient[0]
        for name, gradient in zip(leaves, torch.autograd.grad(total, [*leaves.values()]), strict=True):
            yield f"{case}/D_grad/output_{name}", gradient
        if case == "dontcare":
            mask = plan.mask(layout)
            yield "labelmix/mask", mask
            yield "labelmix/mixed_image", torch.where(mask, inputs["real_image"], inputs["fake_image"])
            # Their loop gave label 0 label 1's draw: the mask itself is given.
            collision = inputs["labelmix_mask_collision"].bool()
            mixed = torch.where(collision, inputs["real_image"], inputs["fake_image"])
            yield "labelmix_collision/mixed_image", mixed


def _drawn(fixture: Fixture, plan: ClassPlan, spec: LayoutSpec) -> ClassPlan:
    """The plan with the fixture's draws, one for each of the ids that are present."""
    draws = torch.zeros(spec.num_classes + 1, dtype=torch.bool)
    ids = torch.tensor(fixture.config["classes_present"]).view(1, 1, 1, -1)
    draws[to_ours(ids, spec).flatten().long()] = fixture.inputs["labelmix_draws"].bool()
    return ClassPlan(plan.weights, draws)


@dataclass(frozen=True)
class GivenMask(ClassPlan):
    """A plan whose mask is given, whatever the labels."""

    given: Tensor

    def mask(self, layout: SemanticLayout) -> Tensor:
        return self.given


# ------------------------------------------------------------------------------------------------- whole iterations


class GivenDraws(SegmentationGANLoss):
    """The loss with the fixture's LabelMix masks."""

    def __init__(self, fixture: Fixture) -> None:
        hyper = fixture.config["hyper"]
        super().__init__(class_balancing=not hyper["no_balancing_inloss"], labelmix=hyper["lambda_labelmix"])
        self.masks = [fixture.inputs[f"iter{t}/labelmix_mask"].bool() for t in (1, 2, 3)]

    def plan(self, layout: SemanticLayout, seed: int, images_seen: int) -> ClassPlan:
        plan = super().plan(layout, seed, images_seen)
        return GivenMask(plan.weights, plan.from_photo, self.masks[images_seen // len(layout)])


def _training(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Whole iterations of our own training step in its ``reference`` form, with the EMA of ``form: state``."""
    hyper, adam, inputs, spec = fixture.config["hyper"], fixture.config["adam"], fixture.inputs, _spec(fixture)
    generator, discriminator = generator_of(fixture, "netG.").train(), discriminator_of(fixture, "netD.").train()
    average = new_average(generator, "state")

    def optimizer(network: nn.Module, side: str) -> torch.optim.Optimizer:
        settings = adam[side] | {"betas": tuple(adam[side]["betas"])}
        return torch.optim.Adam(network.parameters(), **settings)

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(
        generator, discriminator, None, average, None, optimizer(generator, "G"), optimizer(discriminator, "D"), scaler,
        scaler,
    )  # fmt: skip
    rates = adam["G"]["lr"], adam["D"]["lr"], hyper["EMA_decay"]
    settings = StepSettings(
        nn.ModuleDict({"segmentation_gan": GivenDraws(fixture)}), {"segmentation_gan": 1.0},
        TrainerConfig(max_iterations=1, iteration="reference"), style_dims=hyper["z_dim"], seed=0,
        global_batch=fixture.config["batch"], rates=lambda _: rates,
    )  # fmt: skip
    layouts = []
    for number in range(1, fixture.config["iterations"] + 1):
        label, image, *noise = (inputs[f"iter{number}/{name}"] for name in ("label", "image", "z_G", "z_D"))
        layout = SemanticLayout(spec, to_ours(label, spec))
        layouts.append(layout)
        size = (layout.height, layout.width)
        # The step maps 0..255 to [-1, 1]: the float pictures are mapped back first.
        batch = Batch(layout, (image + 1) * 127.5, ("a", "b"), (size, size), (0, 1), style_codes=torch.stack(noise, 1))
        made: list[Tensor] = []
        hook = generator.register_forward_hook(lambda _m, _i, output, made=made: made.append(output.detach()))
        found = train_step(state, Networks(generator, discriminator, None), batch, settings)
        hook.remove()
        yield f"iter{number}/generated", made[0]
        yield f"iter{number}/d_step/generated", made[1]
        yield f"iter{number}/G_adv", found["segmentation_gan"]
        yield from ((f"iter{number}/D_{name}", found[f"d_{name}"]) for name in ("fake", "real", "labelmix"))

    def tensors(stage: str, prefix: str, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _theirs(network, network.state_dict(), spec):
            yield f"{stage}/{prefix}{name}", tensor.clone()

    yield from tensors("final", "netG.", generator)
    yield from tensors("final", "netD.", discriminator)
    yield from tensors("final", "netEMA.", average)
    with torch.no_grad():
        yield "ema_eval/before_stats", average(layouts[0], inputs["ema_eval/z"])
        # Theirs mixes once more at the end of the run.
        update_average(average, generator, hyper["EMA_decay"])
        move_statistics(average, [(layout, inputs[f"stats/z{t}"]) for t, layout in enumerate(layouts, 1)])
        yield from tensors("final_stats", "netEMA.", average)
        yield "ema_eval/after_stats", average(layouts[0], inputs["ema_eval/z"])


CHECKS: dict[str | None, Check] = {
    "OASIS_Generator": _generator,
    "OASIS_Discriminator": _discriminator,
    None: _losses,
    "whole training step: OASIS generator + discriminator": _training,
}
