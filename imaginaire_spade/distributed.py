"""Find this process's place among the processes, and provide the collectives that the package uses.

No other module touches ``torch.distributed``. It works alike under torchrun, the older
``python -m torch.distributed.launch``, SLURM through either, and without any launcher (one process).
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imaginaire_spade.errors import ConfigError


@dataclass(frozen=True)
class ProcessInfo:
    """The place of this process among its peers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def process_info_from_environment() -> ProcessInfo:
    """Read what a launcher put into the environment; without a launcher there is one process.

    Raises:
        ConfigError: the environment names only a part of it.
    """
    names = ("rank", "world_size", "local_rank")
    info = {name: int(os.environ[name.upper()]) for name in names if name.upper() in os.environ}
    if info and len(info) < len(names):
        missing = ", ".join(name.upper() for name in names if name not in info)
        raise ConfigError(f"the launcher's environment lacks {missing}: start with torchrun")
    return ProcessInfo(**info, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", info.get("world_size", 1))))


def rank_from_environment() -> tuple[int, int]:
    """Return (rank, number of processes) of torchrun or of a SLURM job array, for work without a process group.

    Raises:
        ConfigError: the array's task ids have gaps, so that a task cannot know its share of the work.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ and "RANK" not in os.environ:
        task, first, step, count = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        last = int(os.environ.get("SLURM_ARRAY_TASK_MAX", first + step * (count - 1)))
        if (last - first) // step + 1 != count:
            raise ConfigError(
                f"the job array's {count} task ids from {first} to {last} have gaps: write --array=0-{count - 1}"
            )
        return (task - first) // step, count
    info = process_info_from_environment()
    return info.rank, info.world_size


def choose_device(name: str, info: ProcessInfo) -> torch.device:
    """Choose this process's device by ``auto`` (``cuda`` or ``cpu``), ``cpu``, ``cuda`` or ``mps`` (Apple's GPU).

    Raises:
        ConfigError: there is no such device, or it is not usable here, or this node has fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available() or info.world_size > 1:
            why = "torch cannot use an Apple GPU here" if info.world_size == 1 else "it serves one process alone"
            raise ConfigError(f"--device mps: {why}. Write --device cpu")
        return torch.device("mps")
    if name != "cuda":
        raise ConfigError(f"--device {name}: write auto, cpu, cuda or mps")
    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: this machine or this build of torch has no usable CUDA device. Write --device cpu, or"
            " install a CUDA build of torch (INSTALL.md)"
        )
    count = torch.cuda.device_count()
    if info.local_rank >= count:
        raise ConfigError(
            f"{info.local_world_size} processes on this node, but it has {count} GPU(s): start it with"
            f" --nproc_per_node={count}"
        )
    torch.cuda.set_device(info.local_rank)
    return torch.device("cuda", info.local_rank)


def to_double(x: Tensor) -> Tensor:
    """Return x in double precision; on the CPU, if it is on an Apple GPU, which has none."""
    return (x.cpu() if x.is_mps else x).double()


def init_process_group(info: ProcessInfo, device: torch.device, timeout_s: float) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) if a launcher started several processes."""
    if info.world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        open_own_groups(timeout)


_own_groups: dict[str, dist.ProcessGroup] = {}
"""Purpose -> the process group for it; none before ``open_own_groups``."""


def open_own_groups(timeout: timedelta | None = None) -> dict[str, dist.ProcessGroup]:
    """Return the process groups beside the default one by purpose; make them, unless they exist.

    All processes call it together, at the latest with their first exchange on one of them.

    "statistics" is for batch statistics: DDP sends its buckets of gradients on the default group as they fill up, so
    the order of the two kinds in one group would depend on what each process computes. "host" is for numbers in the
    host's memory (gloo on any device), so that a decision does not wait for a GPU.
    """
    if not _own_groups:
        for purpose, backend in (("statistics", None), ("host", "gloo")):
            group = dist.new_group(timeout=timeout, backend=backend)
            assert isinstance(group, dist.ProcessGroup)  # which all processes are in
            _own_groups[purpose] = group
    return _own_groups


def leave_process_group() -> None:
    """Leave the process group and those beside it, if this process is in one."""
    if dist.is_initialized():
        _own_groups.clear()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` (any picklable object) on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total_over_processes(values: Tensor) -> Tensor:
    """Sum ``values`` over the processes (no gradient)."""
    return _reduce(values, dist.ReduceOp.SUM)


def maximum_over_processes(values: Tensor) -> Tensor:
    """Compute the element-wise maximum of ``values`` over the processes."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Tensor, operation: Any, group: dist.ProcessGroup | None = None) -> Tensor:
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, operation, group=group)
    return values


def gather_statistics(values: Tensor) -> Tensor:
    """Collect every process's batch statistics [n], in the order of ranks: [processes, n] (no gradient)."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    gathered = values.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(gathered, values, group=open_own_groups()["statistics"])
    return gathered.view(-1, len(values))


def mean_of_host_numbers(first: float, second: float) -> tuple[float, float]:
    """Average two numbers over the processes, exactly the same on all of them. Does not wait for a GPU."""
    if not dist.is_initialized():
        return first, second
    values = _reduce(torch.tensor([first, second], dtype=torch.float64), dist.ReduceOp.SUM, open_own_groups()["host"])
    first, second = (values / dist.get_world_size()).tolist()
    return first, second


def gather_objects(value: Any) -> list[Any]:
    """Collect every process's ``value`` (any picklable object), in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class LaggedMaximum:
    """Tell every process the largest integer that any of them gave in its call before, so that one process's news (a
    signal) reaches all of them. The exchange runs beside the training: nothing waits for the GPU.

    All processes call it equally often. A process alone gets the present value.
    """

    def __init__(self) -> None:
        self._largest = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None

    def __call__(self, value: int) -> int:
        if not dist.is_initialized():
            return value
        if self._exchange is not None:
            self._exchange.wait()
        known, self._largest = int(self._largest), torch.tensor([value], dtype=torch.int32)
        self._exchange = dist.all_reduce(self._largest, dist.ReduceOp.MAX, open_own_groups()["host"], async_op=True)
        return known


def sum_statistics(values: Tensor) -> Tensor:
    """Sum batch statistics, or gradients of them, over the processes (no gradient)."""
    return _reduce(values, dist.ReduceOp.SUM, open_own_groups()["statistics"]) if dist.is_initialized() else values


def wrap(model: nn.Module, device: torch.device, bucket_cap_mb: float) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes.

    Buffers are not broadcast: batch statistics are equal by synchronization and spectral-norm vectors by equal
    weights, and an in-place broadcast between two forwards breaks backward on some torch versions.

    On CPUs gradients are added in the order of ranks (``add_in_order_of_ranks``), so that resuming is exact.

    Args:
        bucket_cap_mb: size in MiB of the pieces in which gradients are exchanged.
    """
    if not dist.is_initialized():
        return model
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.15
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    options["device_ids"] = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=True, **options)
    if device.type == "cpu":
        wrapped.register_comm_hook(None, add_in_order_of_ranks)
    return wrapped


def add_in_order_of_ranks(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a piece of the gradients over the processes, with the same rounding wherever in a piece a gradient lies.

    gloo's own sum has an order for each place, and DDP makes its pieces anew after its first iteration, which a resumed
    run has in its middle: from three processes on, it would differ from an undisturbed run in the last bits.
    """
    mine = bucket.buffer()
    gathered = mine.new_empty(dist.get_world_size(), len(mine))
    exchange = dist.all_gather_into_tensor(gathered.view(-1), mine / dist.get_world_size(), async_op=True)
    assert exchange is not None  # (it is for a group that this process is not in)

    def add(_: torch.futures.Future) -> Tensor:
        for other in gathered[1:]:
            gathered[0] += other
        return gathered[0]

    return exchange.get_future().then(add)
