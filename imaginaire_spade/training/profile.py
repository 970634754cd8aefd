"""Measure a run: ``train.py --dry_run`` measures one iteration, ``--profile`` shows where its time goes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from imaginaire_spade.data.batch import Batch
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.training.health import explain_out_of_memory
from imaginaire_spade.training.run_log import peak_memory_gib
from imaginaire_spade.training.setup import Run, describe
from imaginaire_spade.training.step import train_step

WARM_UP, MEASURED = 5, 5


def _train(run: Run, batch: Batch) -> None:
    with explain_out_of_memory(run.config):
        train_step(run.state, run.networks, batch, run.settings)


def dry_run(run: Run) -> str:
    """Run one measured iteration and say what a run would be. Nothing is written."""
    batches = run.batches(num_workers=0)
    batch = next(batches)
    _train(run, batch)  # warms caches and allocators up
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    started_at = time.perf_counter()
    _train(run, batch)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started_at
    hours = seconds * run.calendar.total_iterations / 3600
    memory_gib = peak_memory_gib()
    layout = batch.layout[:1]
    billions = multiply_adds(run.state.generator.eval(), layout) / 1e9
    return (
        f"{describe(run)}\n"
        f"generator: {billions:.3g} G multiply-adds for an image of {layout.height}x{layout.width}\n"
        f"one iteration: {seconds:.3f} s ({len(batch) / seconds:.1f} images/s per process), peak memory"
        f" {memory_gib:.2f} GiB; the whole run about {hours:.1f} h at that rate\n"
        "dry run: nothing was written"
    )


@torch.no_grad()
def multiply_adds(generator: Generator, layout: SemanticLayout) -> int:
    """Multiply-adds of all convolutions and matrix products for ``layout``, counted in one forward.

    Other arithmetic (normalisation, activations, look-ups) is left out: so counted are the figures that papers print.
    The layout is given as soft labels, whose convolutions no short cut for repeated labels can skip.

    Args:
        generator: in evaluation mode.
        layout: on the generator's device.
    """
    dense = SemanticLayout.from_dense(layout.spec, layout.one_hot(), layout.distances)
    dims = generator.style_dims
    z = torch.zeros(len(layout), dims, device=layout.device) if dims else None
    with FlopCounterMode(display=False) as counter:
        generator(dense, z)
    return counter.get_total_flops() // 2


def profile(run: Run, logdir: Path) -> Path:
    """Trace ``MEASURED`` iterations after ``WARM_UP``; print the top operations and write ``profile/trace.json``."""
    batches = run.batches()
    for _ in range(WARM_UP):
        _train(run, next(batches))
    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(MEASURED):
            _train(run, next(batches))
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    path = logdir / "profile" / f"trace_rank{run.info.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if run.info.is_main:
        key = "self_cuda_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=20))
        print(f"trace: {path} (open it at chrome://tracing or ui.perfetto.dev)")
    return path
