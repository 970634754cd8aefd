"""Tensors that a graph of autograd does not keep for the backward pass, since they are cheap to make again.

A function of autograd that can do so has a ``make_again(ctx)``, which returns its output anew, bit for bit.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

Again = Callable[[], Tensor]


class _View(NamedTuple):
    """A view of a tensor that is to be made again."""

    again: Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Forgotten(threading.local):
    def __init__(self) -> None:
        self.storages: list[tuple[int, Again]] = []


_forgotten = _Forgotten()
"""Addresses of what the operations of this thread do not keep at present."""


def again_of(tensor: Tensor) -> Again | None:
    """Return what makes a tensor again; None where it must be kept."""
    if torch.compiler.is_compiling():
        return None
    node = tensor.grad_fn
    make_again = getattr(getattr(node, "_forward_cls", None), "make_again", None)
    return None if make_again is None else partial(make_again, node)


@contextmanager
def forgotten(tensor: Tensor, again: Again | None) -> Iterator[None]:
    """Let the operations inside not keep ``tensor`` for their backward passes, if it can be made again."""
    if again is None or torch.compiler.is_compiling():  # (a traced tensor has no address)
        yield
        return
    _forgotten.storages.append((tensor.untyped_storage().data_ptr(), again))
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _forgotten.storages.pop()


def _pack(kept: Tensor) -> Tensor | _View:
    place = kept.untyped_storage().data_ptr()
    for storage, again in _forgotten.storages:
        if place == storage:
            return _View(again, kept.size(), kept.stride(), int(kept.storage_offset()))
    return kept


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, _View):
        return kept.again().as_strided(kept.size, kept.stride, kept.offset)
    return kept


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """Return ``ctx.saved_tensors`` to ``make_again`` and to the backward pass, which ends with ``ctx.unpacked = None``:
    activation checkpointing lets each of them be asked for once."""
    if getattr(ctx, "unpacked", None) is None:
        ctx.unpacked = ctx.saved_tensors
    return ctx.unpacked


def derive(function: Callable[..., Tensor], y: Tensor, *others: Tensor) -> Tensor:
    """Compute ``function(y, *others)``; if y can be made again, so can the result, and only ``others`` are kept."""
    again = again_of(y)
    return function(y, *others) if again is None else _Derived.apply(function, again, y, *others)


class _Derived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], again: Again, y: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        ctx.function, ctx.again, ctx.made = function, again, None
        return function(y, *others)

    @staticmethod
    def make_again(ctx: Any) -> Tensor:
        """Compute the output anew, with a graph for the backward pass."""
        if ctx.made is None:
            inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in (ctx.again(), *saved(ctx))]
            with torch.enable_grad():
                ctx.made = ctx.function(*inputs), inputs
        made: Tensor = ctx.made[0].detach()
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _Derived.make_again(ctx)
        (output, inputs), ctx.made, ctx.unpacked = ctx.made, None, None
        return None, None, *torch.autograd.grad(output, inputs, gradient)
