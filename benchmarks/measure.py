"""Timing: variants take turns, so that a machine that slows down slows all of them down; medians; peak memory."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from imaginaire_spade.processes import keep_large_buffers


@dataclass(frozen=True)
class Row:
    """One measured variant."""

    section: str
    case: str
    variant: str
    ms: float
    """Median."""
    ratio: float
    """How many times faster than the first variant of its case, the plain dense path: median of the rounds' ratios."""
    difference: float | None
    """Largest difference from the first variant's numbers; None where they are another network's."""
    note: str = ""

    def __str__(self) -> str:
        difference = "" if self.difference is None else f"{self.difference:.1e}"
        return f"{self.case:30}{self.variant:34}{self.ms:>10.1f} ms{self.ratio:>8.2f}x  {difference:>8}  {self.note}"

    def plain(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Conditions:
    """How variants are timed."""

    beside_load: bool = False
    """Each round runs each variant twice: alone, and beside another process that keeps one core busy."""
    clock: Callable[[], float] = time.perf_counter


conditions = Conditions()
"""Those of this run: the command line sets them."""

BESIDE_LOAD = ", beside load"


def take_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round. One round runs each once; beside load (its name plus BESIDE_LOAD)
    once more, if that is among the conditions."""
    settings = {"": nullcontext, BESIDE_LOAD: other_busy_process} if conditions.beside_load else {"": nullcontext}
    times: dict[str, list[float]] = {f"{name}{setting}": [] for setting in settings for name in variants}
    for round_index in range(-warm_up, repeats):
        for name, run in variants.items():
            for setting, enter in settings.items():
                with enter():
                    _wait(device)
                    started_at = conditions.clock()
                    run()
                    _wait(device)
                    if round_index >= 0:
                        times[f"{name}{setting}"].append((conditions.clock() - started_at) * 1000)
    return times


BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    sum(range(10**6))
"""


@contextmanager
def other_busy_process() -> Iterator[None]:
    """Have another process keep one core busy while the block runs. It also ends when this process is gone."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    # A session of its own: Ctrl-C does not reach it, with a traceback.
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it is about to be busy
            yield
        finally:
            process.kill()


def rows_of(
    section: str,
    case: str,
    times: Mapping[str, Sequence[float]],
    differences: Mapping[str, float | None],
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of one case; the first variant is what the others are compared with, beside load as without."""
    first, rows = next(iter(times)), dict[str, Row]()
    for name, ms in times.items():
        variant, setting, _ = name.partition(BESIDE_LOAD)
        ratio = statistics.median(b / a for a, b in zip(ms, times[f"{first}{setting}"], strict=True))
        note = (notes or {}).get(name, "")
        if setting and variant != first:
            note = f"{note} {ratio / rows[variant].ratio:.2f} of the ratio without load".strip()
        rows[name] = Row(section, case, name, statistics.median(ms), ratio, differences.get(name), note)
    return list(rows.values())


def largest_difference(
    ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], relative: bool = False
) -> float:
    """Largest absolute difference; ``relative``: divided by each reference tensor's largest value.

    (At least by a millionth of the largest of all: a bias before a batch norm has no gradient but rounding.)
    """
    floor = 1e-6 * max(float(b.abs().max()) for b in reference)
    return max(
        float((a.double() - b.double()).abs().max()) / (max(float(b.abs().max()), floor) if relative else 1.0)
        for a, b in zip(ours, reference, strict=True)
    )


def peak_memory_gib(function: Callable[..., None], *arguments: object) -> float:
    """Largest resident memory of a fresh process that runs ``function``, a module-level one."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, torch.get_num_threads(), function, arguments))
    process.start()
    sender.close()
    peak = float(receiver.recv())
    process.join()
    return peak


def _measured(sender: object, threads: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    keep_large_buffers()
    torch.set_num_threads(threads)
    function(*arguments)
    # VmHWM, not ru_maxrss: that one starts with what the parent had when it forked.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sender.send(int(status.partition("VmHWM:")[2].split()[0]) / 2**20)  # type: ignore[attr-defined]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_peak_tflops(device: torch.device, size: int = 8192) -> float:
    """What a large bf16 matrix product reaches on this GPU, in TFLOP/s."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    ms = statistics.median(take_turns({"matmul": lambda: a @ b}, 20, device, warm_up=5)["matmul"])
    return 2 * size**3 / ms / 1e9
