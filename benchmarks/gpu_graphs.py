"""Try CUDA graphs, for ``python -m benchmarks.gpu``, which starts this in a process of its own.

    python -m benchmarks.gpu_graphs SEG_MAPS QUICK RECIPE:BATCH ...       # QUICK: 0 or 1

A capture that fails leaves CUDA in a state that others would suffer, so the first failure ends the process. Each case
prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import Check, place_in_package
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import first_line
from imaginaire_spade.training.setup import Run
from imaginaire_spade.training.step import generate, train_step


def try_graphs(check: Check, cases: list[str]) -> None:
    """Capture the generator's forward and backward, then a whole iteration, of each case; stop at the first failure."""
    for case in cases:
        recipe, _, batch = case.rpartition(":")
        answer: dict[str, Any] = {"graph": f"{recipe}, batch {batch}"}
        run = check.run(recipe, int(batch), "bf16")
        for group in (*run.state.gen_optimizer.param_groups, *run.state.dis_optimizer.param_groups):
            group["capturable"] = True
        batches = run.batches(num_workers=0)

        def images(sample: Batch, run: Run = run) -> None:
            run.state.gen_optimizer.zero_grad(set_to_none=True)
            generate(run.networks, sample, run.settings)[0].square().mean().backward()

        def whole(sample: Batch, run: Run = run) -> None:
            train_step(run.state, run.networks, sample, run.settings)

        try:
            for what, function in (("generator", images), ("iteration", whole)):
                answer[what] = _capture(function, batches, run.state.generator)
        except Exception as error:
            place = place_in_package(traceback.extract_tb(error.__traceback__))
            answer["fails"] = f"{type(error).__name__} at {place}: {first_line(error)[:200]}"
        print(json.dumps(answer), flush=True)
        if "fails" in answer:
            return


def _capture(function: Callable[[Batch], None], batches: Any, network: torch.nn.Module) -> str:
    """Capture ``function`` on a batch that it has not seen. Return times, and what a replay would not change."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(next(batches))
    torch.cuda.current_stream().wait_stream(side)
    sample = next(batches)
    before = {name: buffer.data_ptr() for name, buffer in network.named_buffers()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(sample)
    moved = sum(buffer.data_ptr() != before[name] for name, buffer in network.named_buffers())
    ms = {}
    for what, run in (("replay", graph.replay), ("eager", partial(function, sample))):
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            started_at = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started_at) * 1e3)
        ms[what] = statistics.median(times)
    frozen = f", but {moved} buffers are replaced by new ones, which a replay does not update" if moved else ""
    return f"captured, replay {ms['replay']:.1f} ms, eager {ms['eager']:.1f} ms{frozen}"


def main() -> None:
    maps, quick, *cases = sys.argv[1:]
    options = argparse.Namespace(label_maps=Path(maps), quick=quick == "1")
    with tempfile.TemporaryDirectory() as place:
        try_graphs(Check(options, torch.device("cuda"), ProcessInfo(), Path(place)), cases)


if __name__ == "__main__":
    main()
