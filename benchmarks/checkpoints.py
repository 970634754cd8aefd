"""What a checkpoint costs a run: ``python -m benchmarks.checkpoints --config C.yaml [--set KEY=VALUE] [--every 100]``.

Processor time of this process, all threads together: on a CPU the writing in the background takes from the computing.
On a GPU training waits for the copy to the host alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from imaginaire_spade import distributed
from imaginaire_spade.build import build_losses, check_run
from imaginaire_spade.config_files import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import positive_integer, run_command_line
from imaginaire_spade.training.checkpoint import CheckpointWriter
from imaginaire_spade.training.loop import ESTIMATE_AT_MOST
from imaginaire_spade.training.setup import calibration_inputs, calibration_layouts, content_of, prepare
from imaginaire_spade.training.state import reestimate_batch_norm
from imaginaire_spade.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="C.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (repeat)")
    parser.add_argument(
        "--every", type=positive_integer, default=100, metavar="N", help="iterations between two checkpoints"
    )
    parser.add_argument("--repeats", type=positive_integer, default=5, help="medians of so many steps and checkpoints")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    info = ProcessInfo()
    device = distributed.choose_device("auto", info)
    check_run(config, world_size=1)
    run = prepare(config, build_losses(config), info, device)
    batches, calibration = run.batches(num_workers=0), calibration_layouts(run)

    def step() -> None:
        train_step(run.state, run.networks, next(batches), run.settings)

    def reestimate() -> None:
        if run.state.generator_ema is not None and calibration:
            reestimate_batch_norm(run.state.generator_ema, calibration_inputs(run, calibration))

    step()
    step_s = measured(step, 2 * arguments.repeats, device)
    reestimate_s = measured(reestimate, arguments.repeats, device)
    with tempfile.TemporaryDirectory(dir=".") as folder, CheckpointWriter(Path(folder), keep_last=1) as writer:

        def save() -> None:
            writer.save(run.state.images_seen, content_of(run))

        def save_and_wait() -> None:
            save()
            writer.wait()

        write_s = measured(save_and_wait, arguments.repeats, device)
        copies = []
        for _ in range(arguments.repeats):
            started_at = time.thread_time()
            save()
            copies.append(time.thread_time() - started_at)
            writer.wait()
        (path,) = Path(folder).glob("*.pt")
        size_mib = path.stat().st_size / 2**20
    images = sum(len(batch) for batch in calibration)
    estimates = max(arguments.every, ESTIMATE_AT_MOST * images / run.calendar.global_batch)
    print(f"a step {step_s:.3f} s, a checkpoint {size_mib:.1f} MiB")
    for name, seconds, every in (
        ("copy to the host, for which training waits", statistics.median(copies), arguments.every),
        ("the whole write, copy and background", write_s, arguments.every),
        ("statistics of the average (model_average.batch_norm_images)", reestimate_s, estimates),
    ):
        print(f"{name}: {seconds:.3f} s, once in {every:.0f} steps: {seconds / every / step_s:.2%} of their time")


def measured(action: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median processor seconds."""
    seconds = []
    for _ in range(repeats):
        started_at = time.process_time()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.process_time() - started_at)
    return statistics.median(seconds)


if __name__ == "__main__":
    run_command_line(main)
