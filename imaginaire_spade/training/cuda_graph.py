"""Record an iteration's updates as a CUDA graph: the host then launches one graph instead of thousands of kernels.

Written by torch's documentation ("CUDA graphs", whole-network capture); it has never run on a GPU.
"""

from dataclasses import replace

import torch
from torch import Tensor

from imaginaire_spade.data.batch import Batch
from imaginaire_spade.errors import UserError, first_line, is_out_of_memory
from imaginaire_spade.losses import ClassPlan
from imaginaire_spade.noise import style_codes
from imaginaire_spade.training.augmentation import augmentation_draws
from imaginaire_spade.training.state import TrainState
from imaginaire_spade.training.step import STYLES, Networks, StepSettings, update_networks

WARM_UP = 3
"""Iterations before the recording, in which libraries choose algorithms and the optimizers make their state."""


class GraphedUpdate:
    """``update_networks`` on buffers that stay where they are: at first as it is, then recorded, then replayed.

    A replay repeats kernels on the memory that they were recorded with. So each batch and its style codes are copied
    into the same buffers, learning rates are tensors, and gradients lie in the graph's own memory: recorded from None,
    each backward pass overwrites them. torch advances the GPU's default random generator for each replay. Without a GPU
    nothing is recorded: that is what tests compare.

    Args:
        state: its optimizers' learning rates become tensors, and they may be captured from now on.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        for optimizer in (state.gen_optimizer, state.dis_optimizer):
            for group in optimizer.param_groups:
                group |= {"capturable": True, "lr": torch.tensor(float(group["lr"]), device=device)}
        self._device = device
        self._buffers: Batch | None = None
        self._plan: ClassPlan | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._to_warm_up = WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses: dict[str, Tensor] = {}

    def __call__(
        self, state: TrainState, networks: Networks, batch: Batch, settings: StepSettings, plan: ClassPlan | None
    ) -> dict[str, Tensor]:
        """Update D and G; see ``update_networks``. The losses are overwritten by the next call.

        Raises:
            UserError: the batch has another size than the first, or CUDA cannot record the updates.
        """
        known = settings.seed, batch.positions, settings.style_dims, self._device
        codes = [z for purpose in STYLES if (z := style_codes(*known, purpose)) is not None]
        batch = replace(batch, style_codes=torch.stack(codes, 1) if codes else None)
        if (augmentation := settings.trainer.discriminator_augmentation) is not None:
            draws = augmentation_draws(settings.seed, batch.positions, augmentation.policies, self._device)
            batch = replace(batch, augmentation=draws)
        buffers = self._fill(batch)
        if plan is not None:
            self._plan = self._plan or plan
            for buffer, tensor in zip(self._plan.tensors(), plan.tensors(), strict=True):
                buffer.copy_(tensor, non_blocking=True)
        if self._side is None:
            return update_networks(state, networks, buffers, settings, self._plan)
        if self._to_warm_up:
            self._to_warm_up -= 1
            present = torch.cuda.current_stream(self._device)
            self._side.wait_stream(present)
            with torch.cuda.stream(self._side):
                losses = update_networks(state, networks, buffers, settings, self._plan)
            present.wait_stream(self._side)
            return losses
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            try:  # thread_local: the loader's and the checkpoint's threads may call CUDA meanwhile
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._losses = update_networks(state, networks, buffers, settings, self._plan)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                why = f"CUDA cannot record the updates of this run: {first_line(error)[:300]}"
                raise UserError(f"trainer.cuda_graphs: {why}. Write trainer.cuda_graphs: false") from error
        self._graph.replay()
        return dict(self._losses)

    def _fill(self, batch: Batch) -> Batch:
        """Copy a batch into the buffers; return it there, with nothing computed from it yet."""
        if self._buffers is None:
            self._buffers = batch.map(torch.clone)
        ours, theirs = self._buffers.tensors(), batch.tensors()
        if (expected := [t.shape for t in ours]) != (given := [t.shape for t in theirs]):
            raise UserError(
                f"trainer.cuda_graphs: every batch must have the sizes of the first: {given}, not {expected}. Write"
                " trainer.cuda_graphs: false"
            )
        for buffer, tensor in zip(ours, theirs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        return self._buffers.map(lambda tensor: tensor)
