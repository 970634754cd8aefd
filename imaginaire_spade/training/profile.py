"""``train.py --profile``: where the time of an iteration goes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from imaginaire_spade.training.loop import Run

WARM_UP, MEASURED = 5, 5


def profile(run: Run, logdir: Path) -> Path:
    """Trace ``MEASURED`` iterations after ``WARM_UP``; print the top operations and write ``profile/trace.json``."""
    batches = run.batches()
    for _ in range(WARM_UP):
        run.step(next(batches))
    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(MEASURED):
            run.step(next(batches))
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
