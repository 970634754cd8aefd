"""The one prepared check of a GPU: are the CUDA paths right, how fast are they, and what do they wait for?

    python -m benchmarks.gpu --out FOLDER [--label_maps FOLDER]              # one GPU, at most --budget_s seconds
    torchrun --nproc_per_node=2 -m benchmarks.gpu --out FOLDER               # the two checks of NCCL before the others
    python -m benchmarks.gpu --device cpu --quick --out FOLDER               # does the check itself run?

Each part catches its own failure, and the next one goes on. FOLDER/gpu.json and FOLDER/gpu.txt are written after each.
The exit code is 1 if something failed. Networks, batches and iterations are those of train.py.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import imaginaire_spade
from benchmarks.gpu_processes import equal_statistics, order_of_collectives
from benchmarks.iteration import write_random_vgg
from benchmarks.measure import matmul_peak_tflops
from imaginaire_spade import distributed
from imaginaire_spade.build import build_losses
from imaginaire_spade.config_files import load_config
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, first_line, positive_integer, run_command_line
from imaginaire_spade.models import layers, modulation
from imaginaire_spade.models.norms import SPADE
from imaginaire_spade.noise import style_codes
from imaginaire_spade.scenes import write_sample_data
from imaginaire_spade.training.setup import Run, prepare
from imaginaire_spade.training.step import AUTOCAST, train_step
from imaginaire_spade.version import __version__

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "projects"
PACKAGE = str(Path(imaginaire_spade.__file__).parent)
CPU = torch.device("cpu")

RECIPES: dict[str, tuple[str, str]] = {
    "SPADE dense": ("spade/cocostuff/base256.yaml", "gen.norm.path=dense"),
    "SPADE tables": ("spade/cocostuff/base256.yaml", "gen.norm.path=table"),
    "SPADE auto": ("spade/cocostuff/base256.yaml", "gen.norm.path=auto"),
    "CLADE": ("clade/cocostuff/base256.yaml", "trainer.channels_last=true"),
    "CLADE-ICPE": ("clade/cocostuff/base256_icpe.yaml", "trainer.channels_last=true"),
    "OASIS": ("oasis/cocostuff/base256.yaml", "gen.norm.path=auto"),
    "OASIS tables": ("oasis/cocostuff/base256.yaml", "gen.norm.path=table"),
}
"""Name -> config and one override. A further recipe is one further line. The first is the baseline; recipes of one
config compute the same numbers, and the first of them is what the others are compared with on the CPU."""

LESSER = ("SPADE auto", "CLADE-ICPE", "OASIS")
"""Recipes that --quick leaves out."""

GRAPHED = ("SPADE dense", "SPADE auto", "CLADE", "OASIS")
"""Recipes whose updates a CUDA graph may hold: tables change in size from batch to batch."""

SMALL = ["gen.num_filters=8", "dis.num_filters=8"]
"""Overrides for narrow networks, at 128x128 (--quick: 64x64). Smaller ones would start from one pixel, of whose batch
statistics rounding makes anything."""

RUNNING = "running"

MOST_SYNCS = 2
"""Host synchronisations of an iteration that are no failure."""

BOUNDS = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Relative error of a norm's output or gradients that is rounding, in each precision."""


class Check:
    """The report, and what the parts share."""

    def __init__(self, options: argparse.Namespace, device: torch.device, info: ProcessInfo, place: Path) -> None:
        self.options, self.device, self.info, self.place = options, device, info, place
        self.quick, self.on_gpu = options.quick, device.type == "cuda"
        self.started_at, self.running = time.monotonic(), "the start"
        self.facts: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "imaginaire_spade": __version__}
        self.facts |= {"torch": torch.__version__, "CUDA": torch.version.cuda, "device": device.type}
        self.facts |= {"processes": info.world_size, "label maps": options.label_maps or "drawn scenes"}
        self.facts["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")
        if self.on_gpu:
            self.facts |= {"device": torch.cuda.get_device_name(), "GPUs": torch.cuda.device_count()}
            self.facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        self.seconds: dict[str, float] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.peak_tflops = 0.0
        self.recipes = [recipe for recipe in RECIPES if not (self.quick and recipe in LESSER)]
        self.heard: list[str] = []
        """What Dynamo and the package warned of."""

    @cached_property
    def drawn(self) -> Path:
        count, size = (8, 64) if self.quick else (32, 256)
        write_sample_data(self.place, count, 0, size, size, seed=0, num_workers=0)
        return self.place / "train"

    @cached_property
    def vgg(self) -> Path:
        write_random_vgg(self.place / "vgg19.pth")
        return self.place / "vgg19.pth"

    def left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.started_at)

    def say(self, name: str, ok: bool | None, detail: object) -> None:
        """Record a result: right, wrong or (None) a figure."""
        self.found[name] = {"ok": ok, "detail": detail}
        if detail != RUNNING and (self.info.is_main or ok is False):
            print(line_of(name, ok, detail), flush=True)
        self.write()

    def write(self) -> None:
        """Write the report as it is now."""
        if self.info.is_main:
            content = {"facts": self.facts, "results": self.found, "seconds": self.seconds}
            (self.options.out / "gpu.json").write_text(
                json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8"
            )
            (self.options.out / "gpu.txt").write_text(self.page(), encoding="utf-8")

    def part(self, name: str, function: Callable[[Check, str], None], needs_s: float = 15) -> None:
        """Run one part, unless the time is up. It reports by ``say``."""
        if self.left_s() < needs_s and not self.quick:
            self.say(name, None, f"left out: {self.left_s():.0f} s of --budget_s left, {needs_s:.0f} s needed")
            return
        torch._dynamo.reset()  # as in a process of its own
        torch._dynamo.utils.clear_compilation_metrics()
        self.heard.clear()
        self.running = name
        self.say(name, None, RUNNING)  # what a process that is killed leaves behind
        started_at = time.monotonic()
        try:
            function(self, name)
        except Exception as error:
            stack = traceback.extract_tb(error.__traceback__)
            at = f"{place_in_package(stack)}, {Path(stack[-1].filename).name}:{stack[-1].lineno}"
            self.say(f"{name}, stopped", False, f"{type(error).__name__} at {at}: {first_line(error)[:300]}")
        if self.found[name]["detail"] == RUNNING:
            del self.found[name]
        self.seconds[name] = round(time.monotonic() - started_at, 1)
        self.write()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def give_up(self) -> None:
        """End the process in the midst of a part: the time is up. Temporary files stay, since the part reads them."""
        self.say(f"{self.running}, stopped", False, f"not finished after --budget_s {self.options.budget_s:g}")
        os._exit(1)

    def run(self, recipe: str, batch: int, precision: str, *more: str, device: torch.device | None = None) -> Run:
        """Prepare a recipe as train.py would. ``*SMALL`` makes it a small one; --quick has no others."""
        (file, override), is_oasis = RECIPES[recipe], recipe.startswith("OASIS")
        root = self.options.label_maps.parent if self.options.label_maps else self.drawn
        overrides = [override, f"data.train.roots=[{root}]", "data.val=null", f"data.train.batch_size={batch}"]
        overrides += [f"trainer.precision={precision}", "trainer.channels_last=true"]
        if self.quick or SMALL[0] in more:
            size = 64 if self.quick else 128
            crop = f"{{resize_h_w: [{size + 8}, {size + 8}], random_crop_h_w: [{size}, {size}]}}"
            overrides += [*SMALL, f"data.train.augmentations={crop}"]
            if is_oasis:
                overrides += [f"dis.{part}_num_filters=8" for part in ("middle", "max", "last")]
            else:
                overrides.append("losses.perceptual.weight=0")
        elif not is_oasis:
            overrides.append(f"losses.perceptual.weights_path={self.vgg}")
        config = load_config(CONFIGS / file, [*overrides, *more])
        info = self.info if dist.is_initialized() else ProcessInfo()
        return prepare(config, build_losses(config), info, device or self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def page(self) -> str:
        """Return the report as text: facts, results, and a table of the iterations."""
        facts = [f"{name}: {value}" for name, value in self.facts.items()]
        lines = [line_of(name, result["ok"], result["detail"]) for name, result in self.found.items()]
        columns = ("ms", "host ms", "images/s", "x baseline", "peak GiB", "syncs", "TFLOP/s", "of peak")
        table = ["".join([f"{'bf16, channels_last':34}", *(f"{column:>12}" for column in columns)])]
        for name, detail in ((name, result["detail"]) for name, result in self.found.items()):
            if isinstance(detail, dict) and "ms" in detail:
                table.append("".join([f"{name:34}", *(f"{detail.get(column, ''):>12}" for column in columns)]))
        failed = [name for name, result in self.found.items() if result["ok"] is False]
        end = f"{len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}"
        return "\n".join([*facts, "", *lines, "", *table, "", end, ""])


def place_in_package(stack: traceback.StackSummary) -> str:
    """Return file:line of the innermost frame that is the package's."""
    ours = [f for f in stack if f.filename.startswith(PACKAGE) and f.name != "run_command_line"]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"


def line_of(name: str, ok: bool | None, detail: object) -> str:
    mark = "    " if ok is None else "PASS" if ok else "FAIL"
    if isinstance(detail, dict):
        detail = ", ".join(f"{key} {value}" for key, value in detail.items())
    return f"{mark}  {name}: {detail}"


# ------------------------------------------------------------------------------------------------- right numbers


def norms(check: Check, name: str) -> None:
    """Compare a SPADE norm by tables (as it runs, and by the kernels' twins) and dense here with dense on the CPU."""
    batch = next(check.run("SPADE tables", 1 if check.quick else 2, "fp32").batches(num_workers=0))
    variants = {"dense": ("dense", False), "tables": ("table", False)}
    if check.on_gpu:
        variants["tables, plain twins"] = ("table", True)
    forms: tuple[dict[str, Any], ...] = ({"upsample": 2, "slope": 0.2}, {"upsample": 2}, {"slope": 0.2}, {})
    for options in forms[: 1 if check.quick else None]:
        truth = _norm_and_gradients("dense", "fp64", batch.to(CPU), options)
        for precision, bound in BOUNDS.items():
            torch._dynamo.reset()  # its limit is for one training, not for all forms and precisions
            errors = {}
            for variant, (path, eager) in variants.items():
                with without_kernels() if eager else nullcontext():
                    found = _norm_and_gradients(path, precision, batch, options)
                pairs = zip(found, truth, strict=True)
                errors[variant] = max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)
            bounded = all(error <= max(bound, 2 * errors["dense"]) for error in errors.values())
            ok = bounded and errors["dense"] <= 10 * bound
            case = ", ".join([precision, *(f"{key} {value}" for key, value in options.items())])
            check.say(f"{name}, {case}", ok, {key: f"{error:.1e}" for key, error in errors.items()})


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run the kernels' plain twins."""
    modules: tuple[Any, ...] = (layers, modulation)
    before = layers.triton_kernels
    for module in modules:
        module.triton_kernels = lambda device: None
    try:
        yield
    finally:
        for module in modules:
            module.triton_kernels = before


def _norm_and_gradients(path: Any, precision: str, batch: Batch, options: dict[str, Any]) -> list[Tensor]:
    layout, device = batch.layout, batch.layout.device
    dtype = torch.float64 if precision == "fp64" else torch.float32
    autocast = None if precision == "fp64" else AUTOCAST[precision]
    torch.manual_seed(0)
    norm = SPADE(16, layout.spec, path=path, hidden_channels=16).to(device, dtype)
    shape = (len(layout), 16, *(length // options.get("upsample", 1) for length in (layout.height, layout.width)))
    x = torch.randn(shape).bfloat16().to(device, autocast or dtype).requires_grad_()  # values of every precision
    weights = torch.randn(len(layout), 16, layout.height, layout.width, dtype=torch.float64).to(device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        y = norm(x, layout, **options)
    return [y.detach(), *torch.autograd.grad((y.double() * weights).sum(), [x, *norm.parameters()])]


def same_as_on_the_cpu(check: Check, name: str) -> None:
    """Compare losses and gradients of one small iteration here with the same on the CPU, in float32."""
    references: dict[str, tuple[dict[str, Tensor], list[Tensor]]] = {}

    def iterate(recipe: str, device: torch.device) -> tuple[dict[str, Tensor], list[Tensor]]:
        # With such an epsilon Adam's first step follows the gradient, not its sign, which rounding can turn.
        run = check.run(recipe, 2, "fp32", *SMALL, "dis_opt.adam_eps=1.0", device=device)
        losses = train_step(run.state, run.networks, next(run.batches(num_workers=0)), run.settings)
        networks = (run.state.generator, run.state.discriminator)
        gradients = [p.grad.cpu() for network in networks for p in network.parameters() if p.grad is not None]
        return {key: value.cpu() for key, value in losses.items()}, gradients

    for recipe in check.recipes:
        file = RECIPES[recipe][0]
        if file not in references:
            references[file] = iterate(recipe, CPU)
        losses, gradients = iterate(recipe, check.device)
        (wanted, directions), worst = references[file], 0.0
        for key, value in wanted.items():
            worst = max(worst, abs(float(losses[key] - value)) / (abs(float(value)) + 1e-3))
        # A bias before a norm has no gradient but rounding: no tensor counts as smaller than this.
        least = 1e-3 * max(float(b.norm()) for b in directions)
        pairs = zip(gradients, directions, strict=True)
        apart = max(float((a - b).norm()) / max(float(b.norm()), least) for a, b in pairs)
        detail = {"losses": f"{worst:.1e}", "gradients": f"{apart:.1e}"}
        check.say(f"{name}, {recipe}", worst < 1e-3 and apart < 1e-2, detail)


def sample_training(check: Check, name: str) -> None:
    """Train the sample recipe in each precision: l1 falls, as it does in float32."""
    iterations, lasts = 2 if check.quick else 200, dict[str, float]()
    for precision in ("fp32", "bf16") if check.quick else AUTOCAST:
        overrides = [f"data.train.roots=[{check.drawn}]", "data.val=null", f"trainer.precision={precision}"]
        config = load_config(CONFIGS / "spade/sample/small64.yaml", overrides)
        run = prepare(config, build_losses(config), ProcessInfo(), check.device)
        batches = run.batches(num_workers=0)
        steps = [train_step(run.state, run.networks, next(batches), run.settings)["l1"] for _ in range(iterations)]
        l1 = torch.stack(steps).float().cpu()
        share = max(1, iterations // 20)
        first, last = float(l1[:share].mean()), float(l1[-share:].mean())
        fell = last < 0.8 * first and last < 1.2 * lasts.setdefault("fp32", last)
        ok = bool(l1.isfinite().all()) and (check.quick or fell)
        check.say(f"{name}, {iterations} iterations, {precision}", ok, f"l1 {first:.3f} at first, {last:.3f} at last")


# ------------------------------------------------------------------------------------------------- speed


def iteration(check: Check, name: str, recipe: str, batch: int) -> None:
    """Measure a recipe's iteration in bf16 and channels_last: time, memory, arithmetic, kernels, synchronisations."""
    run = check.run(recipe, batch, "bf16")
    batches = run.batches(num_workers=0)

    def step(sample: Batch) -> None:
        train_step(run.state, run.networks, sample, run.settings)

    first = next(batches)
    z = style_codes(0, first.positions, run.state.generator.style_dims, check.device)
    with torch.no_grad():  # train.py starts with batch statistics and previews in float32, which Dynamo compiles too
        for network in filter(None, (run.state.generator, run.state.generator_ema)):
            network(first.layout, z)
    for _ in range(0 if check.quick else 4):
        step(next(batches))
    times, host = [], []
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if check.quick else 12):
        sample = next(batches)  # a new one each time: what is derived from its label maps is part of the iteration
        check.wait()
        started_at = time.perf_counter()
        step(sample)
        host.append(time.perf_counter() - started_at)  # until the last launch
        check.wait()
        times.append(time.perf_counter() - started_at)
    seconds = statistics.median(times)
    detail: dict[str, Any] = {"ms": round(seconds * 1e3, 1), "host ms": round(statistics.median(host) * 1e3, 1)}
    detail["images/s"] = round(run.calendar.global_batch / seconds, 1)
    baseline = check.found.get(name.replace(recipe, next(iter(RECIPES))), {}).get("detail")
    if isinstance(baseline, dict):
        detail["x baseline"] = round(baseline["ms"] / detail["ms"], 2)
    if check.on_gpu:
        detail["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    check.say(name, None, detail)  # before what may fail
    if check.on_gpu:
        compiled_variants(check, f"compiled, {name}")
        where = syncs(partial(step, next(batches)))
        detail["syncs"] = sum(where.values())
        check.say(f"at most {MOST_SYNCS} syncs, {name}", detail["syncs"] <= MOST_SYNCS, where or "none")
    with FlopCounterMode(display=False) as counter:
        step(next(batches))
    tflops = counter.get_total_flops() / seconds / 1e12
    detail |= {"TFLOP/s": round(tflops, 1), "of peak": f"{tflops / check.peak_tflops:.0%}" if check.peak_tflops else ""}
    check.say(name, None, detail)


def syncs(step: Callable[[], None]) -> dict[str, int]:
    """Count the host synchronisations of an iteration by file and line of the package."""
    where: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" in str(message):
            where[place_in_package(traceback.extract_stack())] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(where.most_common())


def kernels(check: Check, name: str, recipe: str, batch: int) -> None:
    """Count the kernels of an iteration, the time that the GPU is busy, and the kernels that take most of it."""
    run = check.run(recipe, batch, "bf16")
    batches = run.batches(num_workers=0)
    for _ in range(3):
        train_step(run.state, run.networks, next(batches), run.settings)
    sample = next(batches)
    check.wait()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        train_step(run.state, run.networks, sample, run.settings)
        check.wait()
    events = [event for event in profiler.key_averages() if "CUDA" in str(event.device_type)]
    events.sort(key=lambda event: -event.self_device_time_total)
    top = {event.key[:70]: round(event.self_device_time_total / 1e3, 2) for event in events[:12]}
    busy_ms = round(sum(event.self_device_time_total for event in events) / 1e3, 1)
    check.say(name, None, {"number": sum(event.count for event in events), "busy ms": busy_ms, "top, ms": top})


def compiled_variants(check: Check, name: str) -> None:
    """Count how often each function of the package was compiled, and say whether Dynamo gave one up."""
    from torch._dynamo.utils import get_compilation_metrics

    made = [m for m in get_compilation_metrics() if (m.co_filename or "").startswith(PACKAGE) and m.fail_type is None]
    limit = getattr(torch._dynamo.config, "recompile_limit", "?")
    variants = collections.Counter(str(metrics.co_name) for metrics in made)
    check.say(
        name, not check.heard, {"limit": limit, **variants, "warnings": list(dict.fromkeys(check.heard)) or "none"}
    )


# ------------------------------------------------------------------------------------------------- CUDA graphs


def graphs(check: Check, name: str) -> None:
    """Try captures in processes of their own: a capture that fails leaves CUDA in a state that others would suffer."""
    todo = [f"{recipe}:{batch}" for batch in (4, 16) for recipe in GRAPHED]
    maps = check.options.label_maps or check.drawn / "seg_maps"
    command = [sys.executable, "-m", "benchmarks.gpu_graphs", str(maps), str(int(check.quick))]
    while todo and (limit := check.left_s() - 10) > 20:
        try:
            child = subprocess.run([*command, *todo], capture_output=True, text=True, timeout=limit, check=False)
            output, error = child.stdout, child.stderr.strip()[-200:]
        except subprocess.TimeoutExpired as expired:
            output, error = (expired.stdout or b"").decode(), "no answer in time"
        answers = [json.loads(line) for line in output.splitlines() if line.startswith('{"graph"')]
        for answer in answers:
            check.say(f"CUDA graph, {answer.pop('graph')}", None, answer)
        if not answers:
            check.say(f"CUDA graph, {todo[0]}", False, f"the process ended: {error}")
        todo = todo[max(1, len(answers)) :]
    if todo:
        check.say(name, None, f"left out, no time: {', '.join(todo)}")


# ------------------------------------------------------------------------------------------------- the whole


def peak(check: Check, name: str) -> None:
    check.peak_tflops = matmul_peak_tflops(check.device, 256 if check.quick else 8192)
    check.say(name, None, f"{check.peak_tflops:.1f} TFLOP/s in bf16")


def parts_of(check: Check) -> dict[str, tuple[Callable[[Check, str], None], float]]:
    """List the parts in their order: name -> function, seconds that it needs."""
    parts: dict[str, tuple[Callable[[Check, str], None], float]] = {
        "matmul peak": (peak, 10),
        "one norm": (norms, 60),
        "iteration as on the CPU": (same_as_on_the_cpu, 60),
    }
    for batch in (2,) if check.quick else (4, 16):
        for recipe in check.recipes:
            parts[f"{recipe}, batch {batch}"] = (partial(iteration, recipe=recipe, batch=batch), 25)
    parts["sample"] = (sample_training, 60)
    if check.on_gpu:
        parts["CUDA graphs"] = (graphs, 45)
        for recipe in check.recipes:  # last: the profiler needs more of the driver than all others do
            parts[f"kernels, {recipe}, batch {batch}"] = (partial(kernels, recipe=recipe, batch=batch), 20)
    return parts


def listen(check: Check) -> None:
    """Keep what Dynamo says of its limit, and what the package warns of."""
    torch._dynamo.utils.set_compilation_metrics_limit(4096)

    def hear(record: logging.LogRecord) -> bool:
        if "hit config." in record.getMessage():
            check.heard.append(" ".join(record.getMessage().split())[:200])
        return True

    logging.getLogger("torch._dynamo.convert_frame").addFilter(hear)
    show = warnings.showwarning

    def keep(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "slower" in str(message):  # what it then runs
            check.heard.append(str(message)[:200])
        show(message, *args, **kwargs)

    warnings.showwarning = keep


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="narrow networks, small pictures: does everything run?")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the report (default: gpu_check)")
    parser.add_argument("--budget_s", type=positive_integer, default=540, help="end in this time (default: 540)")
    parser.add_argument(
        "--label_maps", type=Path, metavar="FOLDER",
        help="seg_maps/ of COCO-Stuff, with images/ and inst_maps/ beside it (default: drawn scenes)",
    )  # fmt: skip
    options = parser.parse_args()
    if (maps := options.label_maps) is not None:
        maps = options.label_maps = maps.resolve()
        if maps.name != "seg_maps" or not (maps.parent / "images").is_dir():
            raise ConfigError(f"--label_maps {maps}: name a folder seg_maps that has images/ and inst_maps/ beside it")
    info = distributed.process_info_from_environment()
    device = distributed.choose_device(options.device, info)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file; name a folder for the report")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # as matrix products by default: float32 means float32
    with tempfile.TemporaryDirectory() as place:
        check = Check(options, device, info, Path(place))
        listen(check)
        timer = threading.Timer(options.budget_s, check.give_up)
        timer.daemon = True
        timer.start()
        distributed.init_process_group(info, device, timeout_s=60)
        if info.world_size > 1:
            check.part("statistics of all processes", equal_statistics)
            check.part("order of collectives", order_of_collectives)
            for recipe in () if check.quick else list(RECIPES)[:2]:
                check.part(f"{info.world_size} processes, {recipe}", partial(iteration, recipe=recipe, batch=4), 40)
            distributed.leave_process_group()
        if info.is_main:
            for name, (function, needs_s) in parts_of(check).items():
                check.part(name, function, needs_s)
            print(check.page())
        timer.cancel()
    sys.exit(info.is_main and any(result["ok"] is False for result in check.found.values()))


if __name__ == "__main__":
    run_command_line(main)
