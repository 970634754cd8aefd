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
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import imaginaire_spade
from benchmarks.iteration import write_random_vgg
from benchmarks.measure import largest_difference, matmul_peak_tflops
from imaginaire_spade import distributed
from imaginaire_spade.build import build_losses
from imaginaire_spade.config_files import load_config
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, first_line, run_command_line
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import SPADEGenerator
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.norms import SPADE, BatchNorm2d, synchronize_batch_norm
from imaginaire_spade.training.setup import Run, prepare
from imaginaire_spade.training.step import AUTOCAST, generate, train_step
from imaginaire_spade.version import __version__
from projects.sample.scenes import write_sample_data

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "projects"
PACKAGE = str(Path(imaginaire_spade.__file__).parent)
CPU = torch.device("cpu")

RECIPES: dict[str, tuple[str, str]] = {
    "SPADE dense": ("spade/cocostuff/base256.yaml", "gen.norm.path=dense"),
    "SPADE tables": ("spade/cocostuff/base256.yaml", "gen.norm.path=table"),
    "SPADE auto": ("spade/cocostuff/base256.yaml", "gen.norm.path=auto"),
    "CLADE": ("clade/cocostuff/base256.yaml", "trainer.channels_last=true"),
    "CLADE-ICPE": ("clade/cocostuff/base256_icpe.yaml", "trainer.channels_last=true"),
}
"""Name -> config and one override. A further recipe is one further line. The first is the baseline; recipes of one
config compute the same numbers, and the first of them is what the others are compared with on the CPU."""

MOST_SYNCS = 2
"""Host synchronisations of an iteration that are no failure."""

BOUNDS = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Relative error of a norm's output or gradients that is rounding, in each precision."""


class Check:
    """The report, and what the parts share."""

    def __init__(self, options: argparse.Namespace, device: torch.device, info: ProcessInfo, place: Path) -> None:
        self.options, self.device, self.info, self.quick = options, device, info, options.quick
        self.on_gpu = device.type == "cuda"
        self.started_at = time.monotonic()
        self.facts: dict[str, object] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.heard: list[str] = []
        """What Dynamo and the package warned of."""
        self.size, self.filters = (64, 8) if self.quick else (256, 64)
        self.drawn = place / "train"
        self.vgg = place / "vgg19.pth"
        if info.is_main:
            write_sample_data(place, 8 if self.quick else 32, 0, self.size, self.size, 0, 0)
            if not self.quick:
                write_random_vgg(self.vgg)

    def left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.started_at)

    def say(self, name: str, ok: bool | None, detail: object) -> None:
        """Record a result: right, wrong or (None) a figure. Write the whole report."""
        self.found[name] = {"ok": ok, "detail": detail}
        if self.info.is_main:
            print(line_of(name, ok, detail), flush=True)
            folder: Path = self.options.out
            content = {"facts": self.facts, "results": self.found, "warnings": self.heard}
            (folder / "gpu.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
            (folder / "gpu.txt").write_text(self.page(), encoding="utf-8")

    def part(self, name: str, function: Callable[[Check, str], None], needs_s: float = 15) -> None:
        """Run one part, unless the time is up. It reports by ``say``."""
        if self.left_s() < needs_s and not self.quick:
            return self.say(name, None, f"left out: {self.left_s():.0f} s of --budget_s left, {needs_s:.0f} s needed")
        self.say(name, None, "running")  # what a process that is killed leaves behind
        started_at = time.monotonic()
        try:
            function(self, name)
        except Exception as error:
            at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
            self.say(name, False, f"{type(error).__name__}: {first_line(error)[:300]} (at {', '.join(at)})")
        if self.found[name]["detail"] == "running":
            del self.found[name]
        self.facts[f"seconds of {name}"] = round(time.monotonic() - started_at, 1)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def run(
        self, recipe: str, batch: int, precision: str, device: torch.device | None = None, *more: str, small: bool = False
    ) -> Run:
        """Prepare a recipe as train.py would: ``small`` with narrow networks at 64x64, without the VGG19 term."""
        file, override = RECIPES[recipe]
        small = small or self.quick
        size, maps = (64 if small else self.size), self.options.label_maps
        common = [override, f"data.train.roots=[{self.drawn if maps is None else maps.parent}]", "data.val=null"]
        common += [f"data.train.batch_size={batch}", f"trainer.precision={precision}", "trainer.channels_last=true"]
        if small:
            resized = f"{{resize_h_w: [{size + 8}, {size + 8}], random_crop_h_w: [{size}, {size}]}}"
            common += [f"data.train.augmentations={resized}", "gen.num_filters=8", "dis.num_filters=8"]
        vgg = "losses.perceptual.weight=0" if small else f"losses.perceptual.weights_path={self.vgg}"
        config = load_config(CONFIGS / file, [*common, vgg, *more])
        return prepare(config, build_losses(config), ProcessInfo(), device or self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def page(self) -> str:
        """Return the report as text: facts, results, and a table of the iterations."""
        facts = [f"{name}: {value}" for name, value in self.facts.items() if not name.startswith("seconds")]
        lines = [line_of(name, result["ok"], result["detail"]) for name, result in self.found.items()]
        speeds = {name: r["detail"] for name, r in self.found.items() if isinstance(r["detail"], dict) and "ms" in r["detail"]}
        columns = ("ms", "host ms", "images/s", "x baseline", "peak GiB", "syncs", "TFLOP/s", "of peak")
        table = ["".join([f"{'iteration':34}", *(f"{column:>12}" for column in columns)])] if speeds else []
        for name, detail in speeds.items():
            table.append("".join([f"{name:34}", *(f"{detail.get(column, ''):>12}" for column in columns)]))
        failed = [name for name, result in self.found.items() if result["ok"] is False]
        end = f"{len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}"
        return "\n".join([*facts, "", *lines, "", *table, *([""] if table else []), end, ""])


def line_of(name: str, ok: bool | None, detail: object) -> str:
    mark = "    " if ok is None else "PASS" if ok else "FAIL"
    if isinstance(detail, dict):
        detail = ", ".join(f"{key} {value}" for key, value in detail.items())
    return f"{mark}  {name}: {detail}"


# ------------------------------------------------------------------------------------------------- right numbers


def norms(check: Check, name: str) -> None:
    """Compare a SPADE norm by tables (as it runs, and with nothing compiled) and dense here with dense on the CPU."""
    batch = next(check.run("SPADE tables", 2, "fp32", CPU).batches(num_workers=0))
    variants = {"dense": ("dense", False), "tables": ("table", False)}
    if check.on_gpu:
        variants["tables, uncompiled"] = ("table", True)
    for options in ({}, {"upsample": 2}, {"slope": 0.2}, {"upsample": 2, "slope": 0.2}):
        truth = _norm_and_gradients("dense", "fp64", batch, options)
        for precision, bound in BOUNDS.items():
            errors = {}
            for variant, (path, eager) in variants.items():
                with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                    found = _norm_and_gradients(path, precision, batch.to(check.device), options)
                pairs = zip(found, truth, strict=True)
                errors[variant] = max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)
            bounded = all(error <= max(bound, 2 * errors["dense"]) for error in errors.values())
            ok = bounded and errors["dense"] <= 10 * bound
            case = ", ".join([precision, *(f"{key} {value}" for key, value in options.items())])
            check.say(f"{name}, {case}", ok, {key: f"{error:.1e}" for key, error in errors.items()})


def _norm_and_gradients(path: Any, precision: str, batch: Batch, options: dict[str, Any]) -> list[Tensor]:
    layout, device = batch.layout, batch.layout.device
    dtype = torch.float64 if precision == "fp64" else torch.float32
    autocast = None if precision == "fp64" else AUTOCAST[precision]
    torch.manual_seed(0)
    norm = SPADE(16, layout.spec, path=path, hidden_channels=16).to(device, dtype)
    shape = (2, 16, *(length // options.get("upsample", 1) for length in (layout.height, layout.width)))
    x = torch.randn(shape).bfloat16().to(device, autocast or dtype).requires_grad_()  # values of every precision
    weights = torch.randn(2, 16, layout.height, layout.width, dtype=torch.float64).to(device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        y = norm(x, layout, **options)
    return [y.detach(), *torch.autograd.grad((y.double() * weights).sum(), [x, *norm.parameters()])]


def same_as_on_the_cpu(check: Check, name: str) -> None:
    """Compare losses and gradients of one small iteration here with the same on the CPU, in float32."""
    references: dict[str, tuple[dict[str, Tensor], list[Tensor]]] = {}

    def iterate(recipe: str, device: torch.device) -> tuple[dict[str, Tensor], list[Tensor]]:
        # With such an epsilon Adam's first step follows the gradient, not its sign, which rounding can turn.
        run = check.run(recipe, 2, "fp32", device, "dis_opt.adam_eps=1.0", small=True)
        losses = train_step(run.state, run.networks, next(run.batches(num_workers=0)), run.settings)
        networks = (run.state.generator, run.state.discriminator)
        gradients = [p.grad.cpu() for network in networks for p in network.parameters() if p.grad is not None]
        return {key: value.cpu() for key, value in losses.items()}, gradients

    for recipe, (file, _) in RECIPES.items():
        if file not in references:
            references[file] = iterate(recipe, CPU)
        losses, gradients = iterate(recipe, check.device)
        (wanted, directions), worst = references[file], 0.0
        for key, value in wanted.items():
            worst = max(worst, abs(float(losses[key] - value)) / (abs(float(value)) + 1e-3))
        norm = torch.stack([(a - b).norm() for a, b in zip(gradients, directions, strict=True)]).norm()
        apart = float(norm / torch.stack([b.norm() for b in directions]).norm())
        largest = largest_difference(gradients, directions, relative=True)
        detail = {"losses": f"{worst:.1e}", "gradients": f"{apart:.1e}", "largest of a tensor": f"{largest:.1e}"}
        check.say(f"{name}, {recipe}", worst < 1e-3 and apart < 1e-3, detail)


def sample_training(check: Check, name: str) -> None:
    """Train the sample recipe in each precision: l1 falls, as it does in float32."""
    iterations, ends = 4 if check.quick else 200, {}
    precisions = ("fp32", "bf16") if check.quick else ("fp32", "bf16", "fp16")
    for precision in precisions:
        overrides = [f"data.train.roots=[{check.drawn}]", "data.val=null", f"trainer.precision={precision}"]
        config = load_config(CONFIGS / "spade/sample/small64.yaml", overrides)
        run = prepare(config, build_losses(config), ProcessInfo(), check.device)
        batches = run.batches(num_workers=0)
        steps = [train_step(run.state, run.networks, next(batches), run.settings)["l1"] for _ in range(iterations)]
        l1 = torch.stack(steps).float().cpu()
        share = max(1, iterations // 20)
        ends[precision] = float(l1[:share].mean()), float(l1[-share:].mean())
        finite = bool(l1.isfinite().all())
        fell = ends[precision][1] < 0.8 * ends[precision][0] and ends[precision][1] < 1.2 * ends["fp32"][1]
        detail = {"first l1": round(ends[precision][0], 3), "last": round(ends[precision][1], 3)}
        check.say(f"{name}, {iterations} iterations, {precision}", finite and (check.quick or fell), detail)


# ------------------------------------------------------------------------------------------------- speed


def iteration(check: Check, name: str, recipe: str, batch: int) -> None:
    """Measure a recipe's iteration in bf16 and channels_last: time, memory, arithmetic, kernels, synchronisations."""
    run = check.run(recipe, batch, "bf16")
    batches = run.batches(num_workers=0)

    def step(sample: Batch) -> None:
        train_step(run.state, run.networks, sample, run.settings)

    for _ in range(1 if check.quick else 4):
        step(next(batches))
    times, host = [], []
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2 if check.quick else 12):
        sample = next(batches)  # a new one each time: what is derived from its label maps is part of the iteration
        check.wait()
        started_at = time.perf_counter()
        step(sample)
        host.append(time.perf_counter() - started_at)  # until the last launch
        check.wait()
        times.append(time.perf_counter() - started_at)
    seconds = statistics.median(times)
    detail: dict[str, Any] = {"ms": round(seconds * 1e3, 1), "host ms": round(statistics.median(host) * 1e3, 1)}
    detail["images/s"] = round(batch / seconds, 1)
    baseline = check.found.get(f"iteration, {next(iter(RECIPES))}, batch {batch}", {}).get("detail")
    if isinstance(baseline, dict):
        detail["x baseline"] = round(baseline["ms"] / detail["ms"], 2)
    if check.on_gpu:
        detail["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    check.say(name, None, detail)  # before what may fail
    with FlopCounterMode(display=False) as counter:
        step(next(batches))
    detail["TFLOP/s"] = round(counter.get_total_flops() / seconds / 1e12, 1)
    if isinstance(peak := check.facts.get("bf16 matmul peak, TFLOP/s"), float) and peak > 0:
        detail["of peak"] = f"{detail['TFLOP/s'] / peak:.0%}"
    if check.on_gpu:
        where = syncs(partial(step, next(batches)))
        detail |= {"syncs": sum(where.values()), "where": where}
        detail["kernels"] = kernels(partial(step, next(batches)), check)
        few = detail["syncs"] <= MOST_SYNCS
        check.say(f"syncs, {recipe}, batch {batch}: at most {MOST_SYNCS}", few, f"{detail['syncs']} {where}")
    check.say(name, None, detail)


def syncs(step: Callable[[], None]) -> dict[str, int]:
    """Count the host synchronisations of an iteration by file and line of the package."""
    where: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            ours = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            where[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(where.most_common())


def kernels(step: Callable[[], None], check: Check) -> object:
    """Return the number of kernels of an iteration, the GPU's busy time, and the kernels that take most of it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            step()
            check.wait()
        events = [e for e in profiler.key_averages() if "CUDA" in str(e.device_type)]
    except Exception as error:  # the profiler needs more of the driver than the rest does
        return f"{type(error).__name__}: {first_line(error)}"
    busy = sorted(events, key=lambda event: -event.self_device_time_total)
    top = {event.key[:70]: round(event.self_device_time_total / 1e3, 2) for event in busy[:12]}
    total = sum(event.self_device_time_total for event in events) / 1e3
    return {"count": sum(event.count for event in events), "busy ms": round(total, 1), "top ms": top}


def compiled_variants(check: Check, name: str) -> None:
    """Count how often each function of the package was compiled, and whether Dynamo gave one up."""
    from torch._dynamo.utils import get_compilation_metrics

    variants: collections.Counter[str] = collections.Counter()
    for metrics in get_compilation_metrics():
        if (metrics.co_filename or "").startswith(PACKAGE) and metrics.fail_type is None:
            variants[f"{Path(str(metrics.co_filename)).name}:{metrics.co_name}"] += 1
    config = torch._dynamo.config
    limit = getattr(config, "recompile_limit", None) or config.cache_size_limit
    check.say(name, not check.heard, {"limit": limit, **variants, "warnings": check.heard[:3] or "none"})


# ------------------------------------------------------------------------------------------------- CUDA graphs


def graphs(check: Check, name: str) -> None:
    """Try captures in processes of their own: a capture that fails leaves CUDA in a state that others would suffer."""
    recipes = [recipe for recipe in RECIPES if recipe not in ("SPADE auto", "CLADE-ICPE")]
    todo = [f"{recipe}:{batch}" for batch in (4, 16) for recipe in recipes]
    maps = check.options.label_maps or check.drawn / "seg_maps"
    command = [sys.executable, "-m", "benchmarks.gpu", "--label_maps", str(maps), "--out", str(check.options.out)]
    command += ["--quick"] if check.quick else []
    while todo and (check.left_s() > 30 or check.quick):
        try:
            child = subprocess.run(
                [*command, "--graphs", *todo], capture_output=True, text=True, timeout=max(check.left_s(), 1), check=False
            )
            output, error = child.stdout, child.stderr.strip()[-200:]
        except subprocess.TimeoutExpired as expired:
            output, error = (expired.stdout or b"").decode(), "no answer in time"
        answers = [json.loads(line) for line in output.splitlines() if line.startswith('{"graph"')]
        for answer in answers:
            check.say(f"CUDA graph, {answer.pop('graph')}", None, answer)
        done = len(answers) or check.say(f"CUDA graph, {todo[0]}", False, f"the process ended: {error}") or 1
        todo = todo[done:]
    if todo:
        check.say(name, None, f"left out, no time: {', '.join(todo)}")


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
            ours = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
            place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
            answer["fails"] = f"{type(error).__name__}{place}: {first_line(error)[:200]}"
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


# ------------------------------------------------------------------------------------------------- several processes


def equal_statistics(check: Check, name: str) -> None:
    """Compare batch statistics of processes whose label maps differ: x is a rank's number, so the mean is known."""
    rank, world = check.info.rank, check.info.world_size
    labels = _blocks(rank, 64, 64 if rank == 0 else 1)
    layout = SemanticLayout(LayoutSpec(20), labels, None).to(check.device)
    mean, variance = (world - 1) / 2, (world**2 - 1) / 12
    paths: dict[str, Any] = {path: path for path in ("dense", "table", "auto")}
    for case, path in (paths | {"table on rank 0, dense on the others": "dense" if rank else "table"}).items():
        torch.manual_seed(0)
        norm = SPADE(64, layout.spec, path=path).to(check.device)
        synchronize_batch_norm(norm)
        (statistic,) = (module for module in norm.modules() if isinstance(module, BatchNorm2d))
        statistic.momentum = 1.0
        x = torch.full((2, 64, 32, 32), float(rank)) + 1e-3 * torch.randn(2, 64, 32, 32)
        norm(x.to(check.device), layout, upsample=2)
        assert statistic.running_mean is not None and statistic.running_var is not None
        here = [float(statistic.running_mean.mean()), float(statistic.running_var.mean())]
        found = distributed.gather_objects(here)
        ok = all(abs(m - mean) < 1e-3 and abs(v - variance) < 1e-3 for m, v in found) and found == [here] * world
        detail = f"mean {here[0]:.4f} (right: {mean:.4f}), variance {here[1]:.4f} (right: {variance:.4f})"
        check.say(f"{name}, {case}", ok, detail)


def order_of_collectives(check: Check, name: str) -> None:
    """Train a small generator under DDP with small buckets: all processes exchange the same things in one order."""
    rank, size = check.info.rank, 64
    spec = LayoutSpec(20, has_edges=True)
    layout = SemanticLayout(spec, _blocks(rank, size, 16 if rank == 0 else 1), "labels").to(check.device)
    for path in ("dense", "table", "auto"):
        torch.manual_seed(0)
        norm = partial(SPADE, hidden_channels=16, path=path)  # type: ignore[arg-type]
        generator = SPADEGenerator(spec, (size, size), num_filters=4 if check.quick else 16, norm=norm)
        initialise(generator, "xavier", 1.0)
        synchronize_batch_norm(generator.to(check.device))
        network = distributed.wrap(generator, check.device, 0.02)
        order: list[object] = []
        collectives = [c for c in vars(dist) if c.startswith(("all_", "reduce", "broadcast")) and "object" not in c]
        real = {c: getattr(dist, c) for c in collectives if callable(getattr(dist, c))}

        def noting(collective: str, real: Any, order: list[object] = order) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
                order.append((collective, shapes, [str(a.dtype) for a in args if isinstance(a, Tensor)]))
                return real(*args, **kwargs)

            return call

        def bucket_hook(_: object, bucket: dist.GradBucket, order: list[object] = order) -> Any:
            order.append(("bucket", bucket.index(), bucket.buffer().numel()))
            return dist.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]

        network.register_comm_hook(None, bucket_hook)  # type: ignore[operator]
        for collective, function in real.items():
            setattr(dist, collective, noting(collective, function))
        try:
            for _ in range(3):  # DDP makes its buckets anew after the first
                generator.zero_grad()
                network(layout[:]).square().mean().backward()
            check.wait()
        finally:
            for collective, function in real.items():
                setattr(dist, collective, function)
        norms_of = [float(p.grad.norm()) for p in generator.parameters() if p.grad is not None]
        found = distributed.gather_objects((order, norms_of))
        ok = found == [found[0]] * len(found) and all(map(torch.isfinite, torch.tensor(norms_of)))
        detail = f"{len(order)} exchanges, {'the same on all' if ok else 'which differ'}"
        check.say(f"{name}, {path}", ok, detail)


def _blocks(seed: int, size: int, block: int) -> Tensor:
    """Draw two label maps of squares of one class: ``block`` pixels wide, so 1 is a busy map."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 20, (2, size // block, size // block), generator=draw).to(torch.uint8)
    return labels.repeat_interleave(block, 1).repeat_interleave(block, 2)


# ------------------------------------------------------------------------------------------------- the whole


def facts_of(check: Check) -> dict[str, object]:
    facts: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "imaginaire_spade": __version__}
    facts |= {"torch": torch.__version__, "device": check.device.type, "processes": check.info.world_size}
    facts["label maps"] = "drawn scenes" if check.options.label_maps is None else str(check.options.label_maps)
    facts["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default")
    if check.on_gpu:
        facts |= {"device": torch.cuda.get_device_name(), "GPUs": torch.cuda.device_count()}
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["CUDA"] = torch.version.cuda
    return facts


def peak(check: Check, name: str) -> None:
    check.facts["bf16 matmul peak, TFLOP/s"] = round(matmul_peak_tflops(check.device, 256 if check.quick else 8192), 1)
    check.say(name, None, f"{check.facts['bf16 matmul peak, TFLOP/s']} TFLOP/s")


def parts_of(check: Check) -> dict[str, tuple[Callable[[Check, str], None], float]]:
    """List the parts in their order: name -> function, seconds that it needs."""
    parts: dict[str, tuple[Callable[[Check, str], None], float]] = {
        "matmul peak": (peak, 10),
        "one norm": (norms, 60),
        "iteration as on the CPU": (same_as_on_the_cpu, 60),
    }
    for batch in (2,) if check.quick else (4, 16):
        for recipe in RECIPES:
            parts[f"iteration, {recipe}, batch {batch}"] = (partial(iteration, recipe=recipe, batch=batch), 25)
    parts["sample"] = (sample_training, 60)
    parts["compiled variants"] = (compiled_variants, 1)
    if check.on_gpu:
        parts["CUDA graphs"] = (graphs, 45)
    return parts


def listen(check: Check) -> None:
    """Keep what Dynamo says of its limit, and what the package warns of."""
    torch._dynamo.utils.set_compilation_metrics_limit(4096)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "hit config." in record.getMessage():
                check.heard.append(" ".join(record.getMessage().split())[:200])

    logging.getLogger("torch._dynamo.convert_frame").addHandler(Listener())
    show = warnings.showwarning

    def keep(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "uncompiled" in str(message):
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
    parser.add_argument("--budget_s", type=float, default=540, help="end within so many seconds (default: 540)")
    parser.add_argument(
        "--label_maps", type=Path, metavar="FOLDER",
        help="seg_maps/ of COCO-Stuff, with images/ and inst_maps/ beside it (default: drawn scenes)",
    )  # fmt: skip
    parser.add_argument("--graphs", nargs="*", metavar="RECIPE:BATCH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (maps := options.label_maps) is not None:
        maps = options.label_maps = maps.resolve()
        if maps.name != "seg_maps" or not (maps.parent / "images").is_dir():
            raise ConfigError(f"--label_maps {maps}: name a folder seg_maps that has images/ and inst_maps/ beside it")
    info = distributed.process_info_from_environment()
    device = distributed.choose_device(options.device, info)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # as matrix products by default: float32 means float32
    with tempfile.TemporaryDirectory() as place:
        if options.graphs is not None:
            return try_graphs(Check(options, device, ProcessInfo(), Path(place)), options.graphs)
        check = Check(options, device, info, Path(place))
        check.facts |= facts_of(check)
        listen(check)
        distributed.init_process_group(info, device, timeout_s=60)
        if info.world_size > 1:
            check.part("statistics of all processes", equal_statistics)
            check.part("order of collectives", order_of_collectives)
            distributed.leave_process_group()
        if info.is_main:
            for name, (function, needs_s) in parts_of(check).items():
                check.part(name, function, needs_s)
            print(check.page())
    sys.exit(any(result["ok"] is False for result in check.found.values()))


if __name__ == "__main__":
    run_command_line(main)
