"""What several processes must agree on: two checks of ``python -m benchmarks.gpu`` under torchrun (NCCL, or gloo)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from imaginaire_spade import distributed
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import SPADEGenerator
from imaginaire_spade.models.layers import initialise
from imaginaire_spade.models.norms import SPADE, BatchNorm2d, synchronize_batch_norm

if TYPE_CHECKING:
    from benchmarks.gpu import Check

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


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
        norm = partial(SPADE, hidden_channels=16, path=path)
        generator = SPADEGenerator(spec, (size, size), num_filters=4 if check.quick else 16, norm=norm)
        initialise(generator, "xavier", 1.0)
        synchronize_batch_norm(generator.to(check.device))
        network = distributed.wrap(generator, check.device, 0.02)
        order: list[object] = []
        real = {name: function for name, function in vars(dist).items() if name in COLLECTIVES}

        def noting(collective: str, real: Any, order: list[object] = order) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
                order.append((collective, shapes, [str(a.dtype) for a in args if isinstance(a, Tensor)]))
                return real(*args, **kwargs)

            return call

        def bucket_hook(_, bucket, order=order):  # without types: DDP refuses those that are text
            order.append(("bucket", bucket.index(), bucket.buffer().numel()))
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]

        if check.device.type == "cuda":  # (on CPUs the product has a hook of its own, of noted collectives)
            network.register_comm_hook(None, bucket_hook)  # type: ignore[operator]
        for collective, function in real.items():
            setattr(dist, collective, noting(collective, function))
        try:
            for _ in range(2 if check.quick else 3):  # DDP makes its buckets anew after the first
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
