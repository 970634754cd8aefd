"""A whole training iteration: our step in its ``shared`` form against the plain dense path in its ``reference`` form.

The dense path sees soft labels, so nothing is looked up; the ``reference`` form makes the pictures anew for D. Both
sides have the same precision and memory format: on a GPU bf16 and channels_last. SPADE takes tables there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks.generator import make_generator, with_path
from benchmarks.layouts import dense, fresh, make_layout
from benchmarks.measure import Row, largest_difference, peak_memory_gib, rows_of, take_turns
from imaginaire_spade.config_trainer import OptimizerConfig, TrainerConfig
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.inference.choices import remembered
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.losses import FeatureMatchingLoss, GANLoss, PerceptualLoss
from imaginaire_spade.models.convolution import measure_choices
from imaginaire_spade.models.discriminator import MultiscaleDiscriminator
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.norms import choose_paths, measure_pixel_cost, pixel_cost
from imaginaire_spade.models.products import BY_RULE
from imaginaire_spade.models.spectral_norm import set_choices
from imaginaire_spade.optimizer import build_optimizer
from imaginaire_spade.training.state import TrainState, new_average
from imaginaire_spade.training.step import Networks, StepSettings, train_step

VARIANTS = {"SPADE dense, reference": "SPADE", "SPADE": "SPADE", "CLADE": "CLADE", "CLADE-ICPE": "CLADE-ICPE"}
"""Name -> norm."""


@dataclass(frozen=True)
class Case:
    folder: Path | None
    device: torch.device
    num_filters: int
    size: int
    batch: int
    bf16: bool
    vgg: bool

    def __str__(self) -> str:
        options = f"{', bf16' if self.bf16 else ''}{', VGG19' if self.vgg else ''}"
        return f"batch {self.batch}, {self.size}x{self.size}{options}"


def measure(case: Case, repeats: int, memory_of: Collection[str] = VARIANTS) -> list[Row]:
    """``memory_of``: variants whose memory is measured too, on a CPU in a new process each."""
    runs = {name: _iteration(name, case) for name in VARIANTS}
    times = take_turns(runs, repeats, case.device)
    notes = {}
    for name, run in runs.items():
        if name in memory_of or case.device.type == "cuda":
            notes[name] = f"{peak_gib(case.device, run, _iteration, name, case):.2f} GiB"
        if case.device.type == "cuda":
            from torch.utils.flop_counter import FlopCounterMode  # here: it loads Triton, 0.06 GiB

            with FlopCounterMode(display=False) as counter:
                run()
            tflops = counter.get_total_flops() / statistics.median(times[name]) / 1e9
            notes[name] += f", {tflops:.1f} TFLOP/s needed"
    return rows_of("iteration", str(case), times, {"SPADE": gradient_difference(case)}, notes)


def peak_gib(
    device: torch.device, run: Callable[[], object], make: Callable[..., Callable[[], object]], *arguments: object
) -> float:
    """Largest memory of a GPU's allocator in ``run``, on a CPU of a new process that runs ``make(*arguments)``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory_gib(_run_twice, make, *arguments)


def _run_twice(make: Callable[..., Callable[[], object]], *arguments: object) -> None:
    run = make(*arguments)
    run()
    run()


def _iteration(name: str, case: Case) -> Callable[[], object]:
    layout = make_layout(case.folder, case.batch, case.size, case.size, with_distances=True).to(case.device)
    generator = make_generator(VARIANTS[name], layout, case.num_filters)
    if name.endswith("reference"):
        return train(generator, layout, case, "reference", dense)
    return train(with_path("table", generator) if case.device.type == "cuda" else generator, layout, case)


def train(
    generator: Generator,
    layout: SemanticLayout,
    case: Case,
    form: Literal["reference", "shared"] = "shared",
    seen: Callable[[SemanticLayout], SemanticLayout] = fresh,
) -> Callable[[], object]:
    """Make a function that trains for one iteration on ``seen(layout)``."""
    device, size, batch = case.device, case.size, case.batch
    measured = device.type == "cpu" and not case.bf16
    discriminator = MultiscaleDiscriminator(layout.spec, num_filters=case.num_filters).to(device).train()
    choices = measure_choices(remembered) if measured else BY_RULE
    for network in (generator.train(), discriminator):
        set_choices(network, choices)
    if measured and pixel_cost(generator) is not None:
        choose_paths(generator, measure_pixel_cost(generator, remembered))
    if device.type == "cuda":
        generator, discriminator = (n.to(memory_format=torch.channels_last) for n in (generator, discriminator))  # type: ignore[call-overload]
    optimizers = [build_optimizer(n.parameters(), OptimizerConfig(lr=1e-4)) for n in (generator, discriminator)]
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = TrainState(generator, discriminator, None, new_average(generator), None, *optimizers, scaler, scaler)
    terms = nn.ModuleDict({"gan": GANLoss(), "feature_matching": FeatureMatchingLoss()})
    if case.vgg:
        terms["perceptual"] = _random_vgg().to(device)
    weights = {"gan": 1.0, "feature_matching": 10.0, "perceptual": 10.0}
    trainer = TrainerConfig(max_iterations=1, iteration=form, precision="bf16" if case.bf16 else "fp32")
    settings = StepSettings(
        terms, weights, trainer, style_dims=0, seed=0, global_batch=batch, rates=lambda _: (1e-4, 1e-4, 0.999)
    )
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    networks, names = Networks(generator, discriminator, None), tuple(map(str, range(batch)))

    def run() -> object:
        sample = Batch(seen(layout), images, names, ((size, size),) * batch, tuple(range(batch)))
        return train_step(state, networks, sample, settings)

    return run


def gradient_difference(case: Case) -> float:
    """Largest difference of the generator's gradients from the dense path's, relative to each tensor's largest.

    In double precision and at 128x128 or less: in single precision some leaky ReLU's argument lies on the other side of
    zero in one of the two, which says nothing about either.
    """
    size, batch = min(case.size, 128), min(case.batch, 2)
    layout = make_layout(case.folder, batch, size, size).to(case.device)
    generator = make_generator("SPADE", layout, case.num_filters).train().double()
    direction = torch.randn(batch, 3, size, size, device=case.device)
    state = {name: value.clone() for name, value in generator.state_dict().items()}
    found = []
    for seen in (fresh(layout), dense(layout)):
        generator.load_state_dict(state)
        generator.zero_grad()
        (generator(seen) * direction).sum().backward()
        found.append([p.grad.clone() for p in generator.parameters() if p.grad is not None])
    return largest_difference(found[0], found[1], relative=True)


def _random_vgg() -> PerceptualLoss:
    """The perceptual loss with random weights: as slow as the real one."""
    with tempfile.TemporaryDirectory() as place:
        write_random_vgg(file := Path(place, "vgg19.pth"))
        return PerceptualLoss(weights_path=str(file))


def write_random_vgg(file: Path) -> None:
    """Write random weights in the form of torchvision's file of VGG19."""
    import torchvision  # here: it takes 0.15 GiB, which an iteration without VGG19 does not need

    torch.manual_seed(0)
    features = torchvision.models.vgg19(weights=None).features
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, file)
