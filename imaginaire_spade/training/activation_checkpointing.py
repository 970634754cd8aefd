"""Save memory by recomputing blocks in the backward pass: activation checkpointing (Chen et al. 2016)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imaginaire_spade.errors import ConfigError
from imaginaire_spade.models.generator import Generator, ResidualBlock, SPADEResidualBlock, StyleBlock

BLOCKS = (SPADEResidualBlock, StyleBlock, ResidualBlock)


def checkpoint_activations(generator: Generator) -> None:
    """Change ``generator`` so that each block keeps only its inputs for the backward pass.

    Raises:
        ConfigError: it has no block of a supported kind.
    """
    blocks: list[nn.Module] = [module for module in generator.modules() if isinstance(module, BLOCKS)]
    if not blocks:
        raise ConfigError(
            "trainer.activation_checkpointing: this generator has no block of a supported kind; write false"
        )
    for block in blocks:
        again = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=again)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward and of its repetition, which starts from the same buffers and changes none.

    So running statistics are updated once, and a repeated power iteration of spectral norm gives the same weights.
    """
    return nullcontext(), _in_place(block, {name: buffer.clone() for name, buffer in block.named_buffers()})


@contextmanager
def _in_place(block: nn.Module, buffers: dict[str, Tensor]) -> Iterator[None]:
    present = dict(block.named_buffers())
    _set(block, buffers)
    try:
        yield
    finally:
        _set(block, present)


def _set(block: nn.Module, buffers: dict[str, Tensor]) -> None:
    for path, buffer in buffers.items():
        module, _, name = path.rpartition(".")
        setattr(block.get_submodule(module), name, buffer)
