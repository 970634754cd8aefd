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
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import Check, place_in_package
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import first_line
from imaginaire_spade.training.cuda_graph import WARM_UP
from imaginaire_spade.training.setup import Run

MEASURED = 8


def try_graphs(check: Check, cases: list[str]) -> None:
    """Train each case without and with ``trainer.cuda_graphs``; stop at the first failure."""
    for case in cases:
        recipe, _, batch = case.rpartition(":")
        answer: dict[str, Any] = {"graph": f"{recipe}, batch {batch}"}
        try:
            losses = []
            for how, graphs in (("eager", "false"), ("replay", "true")):
                run = check.run(recipe, int(batch), "bf16", f"trainer.cuda_graphs={graphs}")
                answer[f"{how} [ms]"], last = _train(run)
                losses.append(last)
                del run
            answer["losses differ by"] = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(*losses, strict=True))
        except Exception as error:
            place = place_in_package(traceback.extract_tb(error.__traceback__))
            answer["fails"] = f"{type(error).__name__} at {place}: {first_line(error)[:200]}"
        print(json.dumps(answer), flush=True)
        if "fails" in answer:
            return


def _train(run: Run) -> tuple[float, list[float]]:
    """Train past the recording of a graph. Return the median time of an iteration [ms], the losses of the last one."""
    batches = run.batches(num_workers=0)
    times = []
    for _ in range(WARM_UP + 1 + MEASURED):
        batch = next(batches)
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        losses = run.step(batch)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started_at) * 1e3)
    return statistics.median(times[-MEASURED:]), [float(losses[name]) for name in sorted(losses)]


def main() -> None:
    maps, quick, *cases = sys.argv[1:]
    options = argparse.Namespace(label_maps=Path(maps), quick=quick == "1")
    with tempfile.TemporaryDirectory() as place:
        try_graphs(Check(options, torch.device("cuda"), ProcessInfo(), Path(place)), cases)


if __name__ == "__main__":
    main()
