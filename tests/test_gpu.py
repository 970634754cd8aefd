"""What a GPU does with an iteration, where there is one; else on a stand-in of one, which counts and computes nothing.

The stand-in lies in the folder that IMAGINAIRE_SPADE_SHARED names: libraries in place of CUDA's, and ``nullgpu.py``,
which lends torch convolutions without cuDNN.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STAND_IN = Path(os.environ.get("IMAGINAIRE_SPADE_SHARED", Path(__file__).parents[2] / "shared"), "nullgpu")
LIBRARY = STAND_IN / "null/libnullcudart.so"

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() and not (LIBRARY.is_file() and torch.version.cuda),
    reason=f"no GPU, and no stand-in at {STAND_IN} (set IMAGINAIRE_SPADE_SHARED)",
)

SCRIPT = """
import collections, json, sys, traceback, warnings
import torch
if sys.argv[1] == "stand-in":
    import nullgpu
    nullgpu.L.SemanticLayout.neighbourhoods = nullgpu._orig
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from imaginaire_spade.config_trainer import DiscriminatorAugmentationConfig, OptimizerConfig, TrainerConfig
from imaginaire_spade.data.batch import Batch, Sample
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.losses import FeatureMatchingLoss, GANLoss, SegmentationGANLoss
from imaginaire_spade import losses
from imaginaire_spade.models import kernels, modulation
from imaginaire_spade.models.discriminator import MultiscaleDiscriminator
from imaginaire_spade.models.generator import SPADEGenerator
from imaginaire_spade.models.norms import CLADE, CLADEICPE, SPADE, synchronize_batch_norm, table_kernel_sizes
from imaginaire_spade.models.oasis import OASISGenerator
from imaginaire_spade.models.unet import OASISDiscriminator
from imaginaire_spade.training.cuda_graph import GraphedUpdate
from imaginaire_spade.training.health import LossMeter
from imaginaire_spade.training.augmentation import INTERVAL, AdaptiveProbability
from imaginaire_spade.optimizer import build_optimizer
from imaginaire_spade.training.state import TrainState, new_average
from imaginaire_spade.training.step import Networks, StepSettings, train_step

SIZE, device = 128, torch.device("cuda")
exchanges = collections.Counter()

def gather(values):  # two processes with the same images; on an own stream, as NCCL, nothing waits
    exchanges["gather"] += 1
    return torch.stack([values, values])

def add_up(values):
    exchanges["sum"] += 1
    return values + values

start = kernels._start

def start_and_compare(kernel, grid, arguments, constants):
    start(kernel, grid, arguments, constants)
    key = kernel, arguments[0].device, constants, *map(kernels._kind, arguments)
    assert kernel[grid](*arguments, *constants) is kernels._compiled[key], key  # what Triton itself would have started

kernels._start = start_and_compare

class Operations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += 1
        return function(*arguments, **options or {})

def waits_of(name):
    kind, _, form = name.partition(" ")
    norm = {"dense": partial(SPADE, path="auto"), "table": partial(SPADE, path="table"), "clade": CLADE,
            "icpe": partial(CLADEICPE, skip_ids=(1,)), "oasis": partial(SPADE, path="table")}[kind]
    spec = LayoutSpec(20, has_dont_care=True, has_edges=True, has_distances=kind == "icpe")
    labels = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    labels[:, :50], labels[:, 70:, 30:] = 3, 7
    samples = [Sample(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), one, None,
                      torch.zeros(2, SIZE, SIZE) if spec.has_distances else None, str(index), (SIZE, SIZE), index)
               for index, one in enumerate(labels)]
    on_host = Batch.collate(spec, samples)
    generator = SPADEGenerator(spec, (SIZE, SIZE), num_filters=16, norm=norm, noise_injection=form == "augmented")
    generator = generator.to(device)
    discriminator = MultiscaleDiscriminator(spec, num_filters=4).to(device)
    terms = nn.ModuleDict({"gan": GANLoss(), "feature_matching": FeatureMatchingLoss()})
    if kind == "oasis":
        path = "dense" if form == "graphed" else "table"
        generator = OASISGenerator(spec, (SIZE, SIZE), num_filters=16, norm=partial(SPADE, path=path)).to(device)
        discriminator = OASISDiscriminator(spec, num_filters=4, middle_num_filters=4, max_num_filters=4).to(device)
        terms = nn.ModuleDict({"segmentation_gan": SegmentationGANLoss()})
    if form == "synchronized":
        modulation.gather_statistics, modulation.sum_statistics, losses.sum_statistics = gather, add_up, add_up
        synchronize_batch_norm(generator)
    optimizers = [build_optimizer(n.parameters(), OptimizerConfig(lr=1e-4)) for n in (generator, discriminator)]
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    state = TrainState(generator, discriminator, None, new_average(generator), None, *optimizers, scaler, scaler)
    augmentation = None
    if form in ("augmented", "graphed"):
        augmentation, state.augmentation = DiscriminatorAugmentationConfig(), AdaptiveProbability(9, 0.6).to(device)
    weights = dict.fromkeys(terms, 1.0)
    trainer = TrainerConfig(max_iterations=1, precision="bf16", discriminator_augmentation=augmentation)
    settings = StepSettings(terms, weights, trainer, style_dims=generator.style_dims, seed=0, global_batch=2,
                            rates=lambda seen: (1e-4, 1e-4, 0.999))
    meter = LossMeter((scaler, scaler), device)
    update = GraphedUpdate(state, device) if form == "graphed" else None

    def iterate(number, counter=nullcontext()):
        batch = replace(on_host, ahead=on_host.look_ahead(table_kernel_sizes(generator), 1, kind == "oasis"))
        batch = batch.map(lambda t: t.pin_memory()).to(device, non_blocking=True)
        networks = Networks(generator, discriminator, None)
        with counter:
            found = train_step(state, networks, batch, settings, update)
        meter.add(number, batch.keys, found)

    state.images_seen = 2 * (INTERVAL - 2)  # so that the probability is adapted in the second one
    iterate(1)
    places = collections.Counter()
    def note(message, *_, **__):
        if "called a synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack() if "imaginaire_spade" in f.filename]
            places[f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "elsewhere"] += 1
    exchanges.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        kept = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        iterate(2)
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - kept
    found = {"waits": dict(places), "exchanges": sum(exchanges.values()), "peak": peak}
    counter = Operations()
    iterate(3, counter)
    return found | {"operations": counter.number}

print(json.dumps({name: waits_of(name) for name in sys.argv[2].split(",")}))
"""

NORMS = (
    "dense",
    "table",
    "clade",
    "icpe",
    "oasis",
    "oasis graphed",
    "dense synchronized",
    "table synchronized",
    "icpe synchronized",
    "clade augmented",
    "dense graphed",
    "clade graphed",
    "oasis synchronized",
)
"""``graphed``: before the recording, in which a wait would be an error. ``augmented``: with noise injection too."""


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, *command)
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


REPOSITORY = Path(__file__).parents[1]


@needs_gpu
def test_an_iteration_does_not_wait_for_the_gpu():
    if torch.cuda.is_available():
        kind, environment = "gpu", {"PYTHONPATH": str(REPOSITORY)}
    else:
        kind = "stand-in"
        environment = {
            "LD_PRELOAD": str(LIBRARY), "LD_LIBRARY_PATH": str(LIBRARY.parent), "OMP_NUM_THREADS": "1",
            "TRITON_LIBCUDA_PATH": str(LIBRARY.parent), "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{STAND_IN}",
        }  # fmt: skip
    result = run(environment, "-W", "error:no Triton kernels", "-c", SCRIPT, kind, ",".join(NORMS))
    found = json.loads(result.stdout.splitlines()[-1])
    for name in NORMS:
        assert found[name]["waits"] == {}, name
        exchanges = 29 if name.startswith("oasis") else 32  # of OASIS one is of the classes' counts
        assert found[name]["exchanges"] == exchanges * name.endswith("synchronized"), name
    assert found["table"]["peak"] < 0.62 * found["dense"]["peak"], found
    assert found["table"]["operations"] < 1.13 * found["dense"]["operations"], found


@pytest.mark.parametrize("where", ["interpreter", "gpu"])
def test_the_kernels_are_their_plain_twins(where):
    pytest.importorskip("triton")
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = {"PYTHONPATH": str(REPOSITORY)} | ({"TRITON_INTERPRET": "1"} if where == "interpreter" else {})
    worst = json.loads(run(environment, str(REPOSITORY / "tests/kernels_and_twins.py")).stdout)
    bounds = {"float64": 1e-13, "float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}  # the last place
    assert worst.keys() == bounds.keys()
    assert all(worst[name] <= bound for name, bound in bounds.items()), worst
