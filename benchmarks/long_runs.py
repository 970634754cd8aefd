"""Long and large runs of the users' commands: time and memory against size, kills on the way, equal results after them.

    python -m benchmarks.long_runs build --counts 50000 150000 500000    # the largest again, killed halfway
    python -m benchmarks.long_runs train --iterations 20000 --kills 20   # and again without a kill
    python -m benchmarks.long_runs evaluate --counts 5000 15000 50000

The data are drawn scenes of 32x32 pixels, 1,000 different ones under as many names as wanted. Memory is that of a
command and its processes, a page that several share counted once (PSS); processor time is what its processes had used;
both are read every half second. All is written to --folder: 500,000 samples need about 7 GB there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from imaginaire_spade.errors import positive_integer, run_command_line
from imaginaire_spade.training.checkpoint import checkpoints_in

ROOT = Path(__file__).resolve().parents[1]
LABELS = ROOT / "configs/labels/sample.yaml"
KINDS = ("images", "seg_maps")
SCENES = 1000
CONFIG = """
base: {root}/configs/projects/spade/sample/small64.yaml
gen: {{num_filters: 4, norm: {{type: spade, hidden_channels: 8}}}}
dis: {{num_filters: 8, num_layers: 2}}
trainer: {{max_iterations: {iterations}, checkpoint_every: 500, log_every: 100, image_every: 1000}}
data:
  edges: none
  train: {{roots: [{folder}/lmdb/train], batch_size: 2, augmentations: {{resize_h_w: [32, 32], horizontal_flip: true}}}}
  val: {{roots: [{folder}/lmdb/val], batch_size: 2, augmentations: {{resize_h_w: [32, 32]}}}}
test_data: {{roots: [{folder}/lmdb/val], batch_size: 2}}
"""


@dataclass
class Run:
    """What one command took."""

    name: str
    killed: bool = False
    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_mib: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, MiB), every half second."""

    def __str__(self) -> str:
        return (
            f"{self.name:44}{self.seconds:8.1f} s{self.processor_seconds:8.1f} s of processors{self.peak_mib:7.0f} MiB"
            f"{'  killed' if self.killed else ''}"
        )


def run(folder: Path, name: str, *command: object, until: Callable[[float], bool] = lambda _: False) -> Run:
    """Run a command of the repository to its end, or kill all its processes once ``until(seconds)`` says so.

    Its output goes to ``folder``/output.txt, behind that of the commands before.

    Raises:
        RuntimeError: it failed by itself.
    """
    result, started_at, used = Run(name), time.perf_counter(), dict[int, float]()
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        while process.poll() is None:
            result.seconds = time.perf_counter() - started_at
            if until(result.seconds):
                result.killed = True
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            else:
                result.memory.append((result.seconds, _look(process.pid, used)))
                time.sleep(0.5)
    result.seconds, result.processor_seconds = time.perf_counter() - started_at, sum(used.values())
    result.peak_mib = max((mib for _, mib in result.memory), default=0.0)
    if process.returncode and not result.killed:
        raise RuntimeError(f"{name} failed with {process.returncode}; its output: {folder}/output.txt")
    print(result, flush=True)
    return result


def _look(session: int, used: dict[int, float]) -> float:
    """Sum the proportional memory (PSS) of a session's processes, in MiB, and note the processor seconds of each."""
    kib = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                kib += int((process / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                used[int(process.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):  # it has just ended
            continue
    return kib / 1024


def drawn(folder: Path) -> Path:
    """Draw the scenes, once."""
    if not (scenes := folder / "scenes").is_dir():
        command = "scripts/make_sample_data.py", "--num_train", SCENES, "--num_val", 16, "--height", 32, "--width", 32
        run(folder, "draw the scenes", *command, "--output_root", scenes)
    return scenes


def fill(raw: Path, scenes: Path, count: int) -> Path:
    """Write ``count`` samples, each in files of its own, or add what is missing to as many."""
    for kind in KINDS:
        (raw / kind).mkdir(parents=True, exist_ok=True)
        files = sorted((scenes / "train" / kind).iterdir())
        contents = [file.read_bytes() for file in files]
        for index in range(sum(1 for _ in (raw / kind).iterdir()), count):
            (raw / kind / f"{index:07d}{files[0].suffix}").write_bytes(contents[index % len(contents)])
    return raw


def build(folder: Path, counts: list[int]) -> list[Run]:
    """Build each count, then the last once more with a kill at half its time; both must hold the same bytes."""
    runs, raw, scenes = [], folder / "raw", drawn(folder)
    for old in (raw, folder / "resumed"):  # of a run before
        shutil.rmtree(old, ignore_errors=True)

    def command(out: Path, count: int) -> tuple[object, ...]:
        shards = "--num_shards", max(1, count // 25_000)
        return ("scripts/build_lmdb.py", "--config", LABELS, "--data_root", raw, "--output_root", out, *shards,
                "--data_types", *KINDS)  # fmt: skip

    for count in sorted(counts):
        fill(raw, scenes, count)
        shutil.rmtree(folder / "built", ignore_errors=True)
        runs.append(run(folder, f"build {count:,} samples", *command(folder / "built", count)))
    again, half = command(folder / "resumed", count), runs[-1].seconds / 2
    runs.append(run(folder, f"build {count:,} samples", *again, until=lambda seconds: seconds > half))
    runs.append(run(folder, f"build {count:,} samples, the rest", *again))
    equal = digests(folder / "built") == digests(folder / "resumed")
    print(f"with and without a kill: {'the same bytes' if equal else 'DIFFERENT FILES'}")
    return runs


def digests(root: Path) -> dict[str, str]:
    """Hash the files of a built data set."""
    files = (file for file in root.rglob("*") if file.is_file() and file.name != "lock.mdb")
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train(folder: Path, iterations: int, kills: int) -> list[Run]:
    """Train with as many kills, at drawn moments, and without: the last checkpoints must hold the same numbers."""
    scenes, runs = drawn(folder), []
    for split in ("train", "val"):
        if not (folder / "lmdb" / split).is_dir():
            command = "scripts/build_lmdb.py", "--config", LABELS, "--data_root", scenes / split, "--data_types", *KINDS
            run(folder, f"build {split}", *command, "--output_root", folder / "lmdb" / split)
    (config := folder / "config.yaml").write_text(
        CONFIG.format(root=ROOT, folder=folder, iterations=iterations), encoding="utf-8"
    )

    def command_of(logdir: Path) -> tuple[object, ...]:
        shutil.rmtree(logdir, ignore_errors=True)
        return "train.py", "--config", config, "--logdir", logdir, "--device", "cpu"

    command = command_of(folder / "whole")
    runs.append(run(folder, f"train for {iterations:,} iterations", *command))
    command, moments = command_of(folder / "killed"), random.Random(0)
    for number in range(kills):
        # A start takes some seconds: half the kills come before or soon after the first new checkpoint.
        after = moments.uniform(2.0, 2.0 * runs[0].seconds / (kills + 1))
        runs.append(run(folder, f"kill {number + 1}", *command, until=lambda seconds, after=after: seconds > after))
        if not runs[-1].killed:
            break
    if runs[-1].killed:
        runs.append(run(folder, "train the rest", *command))
    last = [checkpoints_in(folder / name / "checkpoints")[-1] for name in ("whole", "killed")]
    equal = same(*(torch.load(file, map_location="cpu", weights_only=True) for file in last))
    sizes = [sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file()) / 2**20
             for name in ("whole", "killed")]  # fmt: skip
    print(
        f"with and without kills: {'the same' if equal else 'DIFFERENT'} checkpoints ({last[0].name}, {last[1].name})"
    )
    print(f"log dirs: {sizes[0]:.1f} MiB without kills, {sizes[1]:.1f} MiB with them")
    return runs


def same(one: object, other: object) -> bool:
    """Compare two checkpoints by every number in them; the run's own name and times may differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            same(one[key], other[key]) for key in one if key not in ("config", "run")
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other
    )


def evaluate(folder: Path, counts: list[int], features: str) -> list[Run]:
    """Score as many images against the 1,000 scenes: Frechet and kernel distance."""
    runs, scenes = [], drawn(folder)
    for count in sorted(counts):
        files = sorted((fill(folder / "raw", scenes, count) / "images").iterdir())[:count]
        (fake := folder / f"images_{count}").mkdir(exist_ok=True)
        for file in files:
            if not (fake / file.name).exists():
                (fake / file.name).hardlink_to(file)
        command = "evaluate.py", "--real", scenes / "train", "--fake", fake, "--reference_split", "train"
        options = "--metrics", "fid,kid", "--features", features, "--device", "cpu"
        runs.append(run(folder, f"evaluate {count:,} images", *command, *options))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("build", "train", "evaluate"))
    parser.add_argument("--folder", type=Path, default=Path("long_runs"), help="to write to (default: long_runs)")
    parser.add_argument("--counts", type=positive_integer, nargs="+", default=[5_000, 15_000, 50_000])
    parser.add_argument("--iterations", type=positive_integer, default=20_000)
    parser.add_argument("--kills", type=positive_integer, default=20)
    parser.add_argument("--features", default="efficientnet_lite0", help="of evaluate, as evaluate.py takes them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures, memory over time among them")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "train":
        runs = train(folder, arguments.iterations, arguments.kills)
    elif arguments.what == "build":
        runs = build(folder, arguments.counts)
    else:
        runs = evaluate(folder, arguments.counts, arguments.features)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in runs], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command_line(main)
