"""Measure a run: ``train.py --dry_run`` measures one iteration, ``--profile`` shows where its time goes."""

import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from imaginaire_spade.data.batch import Batch
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.generator import Generator
from imaginaire_spade.training.health import explain_out_of_memory
from imaginaire_spade.training.run_log import peak_memory_gib
from imaginaire_spade.training.setup import Run, describe

WARM_UP, MEASURED = 5, 5


def _train(run: Run, batches: Iterable[Batch]) -> None:
    """Train for one iteration per batch, then wait for the device."""
    with explain_out_of_memory(run.config):
        for batch in batches:
            losses = run.step(batch)
        losses["g_total"].item()


def dry_run(run: Run) -> str:
    """Run one measured iteration and describe the run. Nothing is written."""
    batch = next(run.batches(num_workers=0))
    _train(run, [batch] * (WARM_UP if run.graphed else 1))  # warms caches and allocators up
    started_at = time.perf_counter()
    _train(run, [batch])
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
    """Count the multiply-adds of all convolutions and matrix products in one forward of ``layout``.

    As in the figures of publications, other arithmetic (normalisation, activations, look-ups) does not count. The label
    maps are given as soft labels, so that no short cut for repeated labels skips a convolution.

    Args:
        generator: in evaluation mode.
        layout: label maps on the generator's device.
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
    _train(run, islice(batches, WARM_UP))
    with torch.profiler.profile() as profiler:
        _train(run, islice(batches, MEASURED))
    path = logdir / "profile" / f"trace_rank{run.info.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    if run.info.is_main:
        key = f"self_{run.device.type}_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=20))
        print(f"trace: {path} (open it at chrome://tracing or ui.perfetto.dev)")
    return path
