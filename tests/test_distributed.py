"""Several processes: one decision for all of them, collectives in one order, the gradients of one process."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from imaginaire_spade import distributed
from imaginaire_spade.distributed import ProcessInfo, choose_device
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.norms import SPADE, synchronize_batch_norm
from imaginaire_spade.registry import GENERATORS, NORMS
from imaginaire_spade.training.step import checkpoint_activations

MOST = 4
SIDE = 32
NORM_OPTIONS: dict[str, dict[str, Any]] = {
    "spade": {"hidden_channels": 8},
    "spade of 5x5": {"hidden_channels": 8, "kernel_size": 5, "affine": True, "spectral_norm": True},
    "spade of instances": {"hidden_channels": 8, "normalization": "instance"},
    "concat": {},
    "clade": {},
    "clade_icpe": {},
}


@dataclass(frozen=True)
class Case:
    """What the processes compute; ``blocks`` and ``paths`` hold a value for each of them."""

    blocks: tuple[int, ...]
    """Side of the squares of one class that a process's label maps consist of: 1 is a busy map, 16 a calm one."""
    generator: str = "spade"
    norm: str = "spade"
    bucket_cap_mb: float = 0.001
    pieces: int = 1
    checkpointed: bool = False
    paths: tuple[str, ...] = field(default=())
    """The norms' ``path`` on each process; empty: auto on all."""
    seed: int = 0


def make_generator(case: Case) -> tuple[Generator, LayoutSpec]:
    """In double precision, so that no difference can hide behind rounding."""
    norm = NORMS[case.norm.split()[0]]
    spec = LayoutSpec(20, has_edges=True, has_distances=norm.needs_distances)
    torch.manual_seed(case.seed)
    options = {} if case.generator == "spade" else {"style_dims": 3}
    factory = partial(norm, **NORM_OPTIONS[case.norm])
    generator = GENERATORS[case.generator](spec, (SIDE, SIDE), num_filters=2, norm=factory, **options)
    initialise(generator, "xavier", 1.0)
    return generator.double().train(), spec


def inputs_of(case: Case, spec: LayoutSpec, rank: int, piece: int) -> tuple[SemanticLayout, Tensor, Tensor]:
    """A process's layout of two label maps, style codes, and weights that make a loss of the images."""
    draw = torch.Generator().manual_seed(1000 * case.seed + 10 * rank + piece)
    block = case.blocks[rank]
    labels = torch.randint(0, spec.num_classes + 1, (2, SIDE // block, SIDE // block), generator=draw)
    labels = labels.repeat_interleave(block, 1).repeat_interleave(block, 2).to(torch.uint8)
    distances = torch.randn(2, 2, SIDE, SIDE, generator=draw) if spec.has_distances else None
    z = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    target = torch.randn(2, 3, SIDE, SIDE, generator=draw)
    return SemanticLayout(spec, labels, "labels", distances), z, target


def iterate(case: Case, network: torch.nn.Module, generator: Generator, inputs: list[Any]) -> dict[str, np.ndarray]:
    """Two iterations without an update: DDP makes its buckets anew after the first. The state after the last."""
    for _ in range(2):
        generator.zero_grad()
        for piece, (layout, z, target) in enumerate(inputs):
            wrapped = isinstance(network, torch.nn.parallel.DistributedDataParallel)
            if wrapped:
                network.require_backward_grad_sync = piece == len(inputs) - 1
            images = network(layout[:], z if generator.style_dims else None)
            ((images * target).mean() / len(inputs)).backward()
    gradients = torch.cat([p.grad.flatten() for p in generator.parameters()])
    buffers = [b.flatten().double() for name, b in generator.named_buffers() if "running" in name]
    return {"gradients": gradients.numpy(), "buffers": torch.cat([torch.zeros(1), *buffers]).numpy()}


def compute_on_rank(case: Case, rank: int, store: str) -> tuple[dict[str, np.ndarray], list[Any]]:
    """What one of several processes computes; its collectives and its norms' decisions, in their order."""
    world_size, order = len(case.blocks), []
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    distributed.open_own_groups(timeout)
    real, decide, average = dist.all_reduce, SPADE._takes_tables, distributed.add_in_order_of_ranks

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        order.append((tuple(tensor.shape), str(tensor.dtype)))
        return real(tensor, *args, **kwargs)

    def noted_decision(norm: SPADE, view: SemanticLayout) -> bool:
        order.append(("tables", view.height, norm.out_channels, decide(norm, view)))
        return order[-1][-1]

    def bucket_hook(state, bucket):
        order.append(("bucket", bucket.index(), bucket.buffer().numel()))
        return average(state, bucket)

    dist.all_reduce, SPADE._takes_tables = noted, noted_decision  # type: ignore[method-assign]
    distributed.add_in_order_of_ranks = bucket_hook
    try:
        generator, spec = make_generator(case)
        for module in generator.modules():
            if isinstance(module, SPADE) and case.paths:
                module.path = case.paths[rank]
        synchronize_batch_norm(generator)
        if case.checkpointed:
            checkpoint_activations(generator)
        network = distributed.wrap(generator, torch.device("cpu"), case.bucket_cap_mb)
        inputs = [inputs_of(case, spec, rank, piece) for piece in range(case.pieces)]
        return iterate(case, network, generator, inputs), order
    finally:
        dist.all_reduce, SPADE._takes_tables = real, decide  # type: ignore[method-assign]
        distributed.add_in_order_of_ranks = average
        distributed.leave_process_group()


def compute_in_one(case: Case) -> dict[str, np.ndarray]:
    """The same on the joined batch, by dense norms in one process."""
    generator, spec = make_generator(case)
    for module in generator.modules():
        if isinstance(module, SPADE):
            module.path = "dense"
    joined = []
    for piece in range(case.pieces):
        layouts, *tensors = zip(*(inputs_of(case, spec, r, piece) for r in range(len(case.blocks))), strict=True)
        labels, *distances = map(torch.cat, zip(*(part.tensors() for part in layouts), strict=True))
        joined.append((SemanticLayout(spec, labels, "labels", *distances), *(torch.cat(parts) for parts in tensors)))
    return iterate(case, generator, generator, joined)


def serve_rank(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while (asked := pipe.recv()) is not None:
        try:
            pipe.send(compute_on_rank(*asked))
        except Exception as error:
            pipe.send(error)


class Ranks:
    """Processes that stay, so that an example costs no start."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")  # whose server only imports, and that once
        # DistributedDataParallel and checkpointing import the others when they are first used: in each process.
        context.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.tensor"])
        self.folder, self.pipes, self.processes = folder, [], []
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=serve_rank, args=(rank, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def compute(self, case: Case) -> list[tuple[dict[str, np.ndarray], list[Any]]]:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            pipes = self.pipes[: len(case.blocks)]
            for rank, pipe in enumerate(pipes):
                pipe.send((case, rank, str(Path(folder, "store"))))
            results = []
            for pipe in pipes:
                assert pipe.poll(60), "no answer: the processes wait for each other"
                results.append(pipe.recv())
        if failed := next((r for r in results if isinstance(r, Exception)), None):
            raise failed
        return results

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(5)
            process.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    blocks = draw(st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=MOST))
    return Case(
        tuple(blocks),
        draw(st.sampled_from(["spade", "style_spade"])),
        draw(st.sampled_from(sorted(NORM_OPTIONS))),
        draw(st.sampled_from([0.0001, 0.001, 0.01, 25.0])),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def assert_equal_to_one_process(case: Case, results: list[tuple[dict[str, np.ndarray], list[Any]]]) -> None:
    one = compute_in_one(case)
    for name, expected in one.items():
        # The images are float32, and so is their gradient.
        bound = (1e-6 if name == "gradients" else 1e-12) * np.linalg.norm(expected)
        for found, _ in results:
            assert np.linalg.norm(found[name] - expected) <= bound, name
            assert np.array_equal(found[name], results[0][0][name]), name


@settings(max_examples=15)
@given(case=cases())
@example(case=Case((16, 1)))
@example(case=Case((16, 1, 1, 8), norm="spade of 5x5", pieces=2, checkpointed=True))
def test_all_processes_take_one_order_and_the_gradients_are_those_of_one(ranks, case):
    results = ranks.compute(case)
    for _, order in results:
        assert order == results[0][1]
    assert_equal_to_one_process(case, results)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("paths", [("table", "dense"), ("dense", "table", "dense")])
def test_not_even_different_paths_on_different_processes_matter(ranks, paths, checkpointed):
    case = replace(Case((2,) * len(paths)), paths=paths, checkpointed=checkpointed)
    assert_equal_to_one_process(case, ranks.compute(case))


@pytest.mark.parametrize(
    ("blocks", "tables"), [((16, 16, 16, 1), True), ((16, 1, 1, 1), False), ((16,), True), ((1,), False)]
)
def test_a_norm_decides_by_the_label_maps_of_all_processes(ranks, blocks, tables):
    """At full resolution tables pay for a calm process alone and not for a busy one; the mean of both decides."""
    for _, order in ranks.compute(Case(blocks)):
        assert {answer for kind, *where, answer in order if kind == "tables" and where == [SIDE, 4]} == {tables}


def test_an_apple_gpu_is_refused_by_name_where_there_is_none(monkeypatch):
    """None has run this: where torch has one, it is taken, for one process."""
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="--device mps: torch cannot use an Apple GPU here"):
            choose_device("mps", ProcessInfo())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps", ProcessInfo()) == torch.device("mps")
    with pytest.raises(ConfigError, match="--device mps: it serves one process alone"):
        choose_device("mps", ProcessInfo(world_size=2))
    with pytest.raises(ConfigError, match="--device toaster: write auto, cpu, cuda or mps"):
        choose_device("toaster", ProcessInfo())
    assert choose_device("auto", ProcessInfo()).type in ("cpu", "cuda")
