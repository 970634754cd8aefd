# ruff: noqa: F811 (the fixture tiny_run is imported)
"""CUDA graphs of the updates (``trainer.cuda_graphs``): what keeps a run from them, and the updates on fixed buffers.

No graph is recorded here, which takes a GPU: the function that is recorded runs on the buffers as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_oasis import OASIS
from test_training import assert_same, tensors_of, tiny_run  # noqa: F401

from imaginaire_spade.build import build_losses, check_run
from imaginaire_spade.config_files import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, UserError
from imaginaire_spade.training import cuda_graph
from imaginaire_spade.training.cuda_graph import WARM_UP
from imaginaire_spade.training.setup import Run, prepare

USUAL = (
    "gen.norm.path=dense", "trainer.max_iterations=4", "trainer.image_rows=0",
    # Learning rates that fall from the first iteration on, and that float32 holds.
    *(f"{part}_opt={{lr: 0.00390625, lr_policy: {{type: linear, decay_start: 0.0}}}}" for part in ("gen", "dis")),
)  # fmt: skip
GRAPHS = (*USUAL, "trainer.cuda_graphs=true")
FORMS = {
    "shared": (),
    "reference, style codes, bf16": (
        "trainer.iteration=reference", "trainer.precision=bf16", "trainer.channels_last=true", "gen.style_dims=6",
        "encoder={type: conv, num_filters: 2, image_size: 128}", "losses.kl=0.1",
    ),
    "CLADE, augmentation": (
        "gen.norm={type: clade}", "trainer.discriminator_augmentation={target: -1, adapt_images: 40}",
    ),
    "OASIS": (*OASIS, "gen.norm.path=dense", "trainer.iteration=reference"),
}  # fmt: skip


@pytest.fixture
def made(tiny_run):
    """Prepare the tiny run of the given overrides."""

    def make(*overrides: str) -> Run:
        config = load_config(tiny_run[0], overrides)
        return prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"))

    return make


def trained(run: Run, iterations: int = 3) -> dict:
    """Train; return the losses and the state, learning rates as numbers."""
    batches = run.batches(num_workers=0)
    losses = [{name: loss.clone() for name, loss in run.step(next(batches)).items()} for _ in range(iterations)]
    return {"losses": losses, **with_numbers(run.state.state_dict())}


def with_numbers(content: dict) -> dict:
    for name in ("gen_optimizer", "dis_optimizer"):
        for group in content[name]["param_groups"]:
            group["lr"] = float(group["lr"])
    return content


@pytest.mark.parametrize("form", FORMS)
def test_updates_on_fixed_buffers_are_those_of_a_usual_run(made, form):
    """Nothing of the first batch stays: label maps, photos, style codes and learning rates are each iteration's."""
    usual, graphed = trained(made(*USUAL, *FORMS[form])), trained(made(*GRAPHS, *FORMS[form]))
    assert_same(graphed, usual)
    assert graphed["gen_optimizer"]["param_groups"][0]["lr"] == 0.00390625 / 2


def test_a_run_goes_on_with_graphs_and_without(tiny_run, made):
    _, run = tiny_run
    for number, overrides in enumerate((USUAL, GRAPHS, USUAL), 1):
        content = with_numbers(run("log", *overrides, stop_after=number))
    straight = trained(made(*USUAL))
    assert all(group["lr"] == 0.00390625 / 2 for group in content["gen_optimizer"]["param_groups"])
    names = ("generator", "discriminator", "gen_optimizer", "dis_optimizer")
    assert_same(*({name: state[name] for name in names} for state in (content, straight)))


class Recorder:
    """Stand in for the CUDA graph: a recording computes nothing, a replay computes what was recorded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.is_recording = False
        self.update = cuda_graph.update_networks
        patch.setattr(cuda_graph, "update_networks", self.record)
        for name in ("CUDAGraph", "graph", "stream", "current_stream"):
            patch.setattr(torch.cuda, name, getattr(self, name))

    def record(self, *arguments) -> dict[str, torch.Tensor]:
        self.done.append("recorded" if self.is_recording else "computed")
        if not self.is_recording:
            return self.update(*arguments)
        self.arguments, self.losses = arguments, {name: torch.full((), torch.nan) for name in self.names}
        return self.losses

    def CUDAGraph(self) -> "Recorder":
        return self

    @contextmanager
    def graph(self, graph, capture_error_mode) -> Iterator[None]:
        self.is_recording = True
        yield
        self.is_recording = False

    def stream(self, side):
        return nullcontext()

    def current_stream(self, device) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda stream: None)

    def replay(self) -> None:
        self.done.append("replayed")
        state, networks, batch, settings, plan = self.arguments
        for name, loss in self.update(state, networks, batch.map(lambda tensor: tensor), settings, plan).items():
            self.losses[name].copy_(loss)


def test_every_batch_trains_once_and_later_ones_by_replay(made, monkeypatch):
    usual = trained(made(*USUAL, "gen.style_dims=6"), WARM_UP + 2)
    run, recorder = made(*GRAPHS, "gen.style_dims=6"), Recorder(monkeypatch)
    recorder.names = usual["losses"][0]
    run.graphed._side = recorder.current_stream(run.device)
    assert_same(trained(run, WARM_UP + 2), usual)
    assert recorder.done == ["computed"] * WARM_UP + ["recorded", "replayed", "replayed"]


def test_what_cuda_cannot_record_is_said(made, monkeypatch):
    run, recorder = made(*GRAPHS), Recorder(monkeypatch)
    run.graphed._side, run.graphed._to_warm_up = recorder.current_stream(run.device), 0

    def fail(*arguments):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "update_networks", fail)
    with pytest.raises(
        UserError, match=r"cannot record .*: CUDA error: .* capturing\. Write trainer.cuda_graphs: false"
    ):
        trained(run, 1)


def test_the_updates_read_and_write_the_same_memory_in_every_iteration(made):
    """Of what a replay uses, all but the gradients, which lie in the graph's own memory."""
    run = made(*GRAPHS)
    batches, places = run.batches(num_workers=0), []
    for _ in range(3):
        run.step(next(batches))
        content = tensors_of(run.state.state_dict()) | tensors_of(run.graphed._buffers.tensors())
        places.append({name: tensor.data_ptr() for name, tensor in content.items()})
    assert places[0] == places[1] == places[2] and len(places[0]) > 100
    assert any(name.endswith("/lr") for name in places[0])


def test_the_given_batch_is_left_alone_and_another_size_is_refused(made):
    run = made(*GRAPHS)
    batch = next(run.batches(num_workers=0))
    before = [tensor.clone() for tensor in batch.tensors()]
    run.step(batch)
    assert all(map(torch.equal, before, batch.tensors())) and not batch.layout._resized
    assert not {t.data_ptr() for t in batch.tensors()} & {t.data_ptr() for t in run.graphed._buffers.tensors()}
    with pytest.raises(UserError, match=r"trainer\.cuda_graphs: every batch must have the sizes of the first"):
        run.step(replace(batch, layout=batch.layout[:2], images=batch.images[:2]))


@pytest.mark.parametrize(
    ("overrides", "world_size", "device", "said"),
    [
        ((), 1, "cpu", "it needs a GPU"),
        ((), 2, "cuda", "it takes one process"),
        (("gen.norm.path=table",), 1, "cuda", "write gen.norm.path: auto"),
        (("trainer.precision=fp16",), 1, "cuda", "write trainer.precision: bf16"),
        (("trainer.gradient_accumulation=2",), 1, "cuda", "write trainer.gradient_accumulation: 1"),
        (("trainer.activation_checkpointing=true",), 1, "cuda", "write trainer.activation_checkpointing: false"),
        (("dis_opt.fused=off",), 1, "cuda", "in place of dis_opt.fused: off write auto"),
    ],
)
def test_runs_that_no_graph_can_hold_are_refused(tiny_run, overrides, world_size, device, said):
    path, _ = tiny_run
    with pytest.raises(ConfigError) as caught:
        check_run(load_config(path, [*GRAPHS, *overrides]), world_size, torch.device(device))
    assert str(caught.value).startswith("trainer.cuda_graphs: ") and said in str(caught.value)
    assert ";" not in str(caught.value).replace("; or write trainer.cuda_graphs: false", "")  # one reason


def test_a_run_that_a_graph_can_hold_is_taken(tiny_run):
    path, _ = tiny_run
    check_run(load_config(path, GRAPHS), 1, torch.device("cuda"))
    check_run(load_config(path, [*GRAPHS, "gen.norm.path=auto"]), 1, torch.device("cuda"))  # it is dense there
    with pytest.raises(ConfigError, match=r"needs a GPU .*; it takes one process, .*: write gen.norm.path: auto; or"):
        check_run(load_config(path, [*GRAPHS, "gen.norm.path=table"]), 2, torch.device("cpu"))
