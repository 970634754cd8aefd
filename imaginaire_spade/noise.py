"""Draw random numbers that belong to a sample, not to a process.

Every draw is a function of (seed, sample): the same numbers for any batch size, order, number of workers or of
processes, and after a restart.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator_for(seed: int, sample: int | str, purpose: str) -> np.random.Generator:
    """Make the random generator of one sample (its position in the run, or its key) for one purpose."""
    return np.random.default_rng(np.frombuffer(_digest(seed, sample, purpose), np.uint32))


def uniform_draws(seed: int, sample: int | str, purpose: str) -> tuple[float, ...]:
    """Draw four independent numbers, uniform in [0, 1), at a small part of the cost of ``generator_for``."""
    # Of each eight bytes the 53 bits that a float holds.
    return tuple((number >> 11) * 2.0**-53 for number in struct.unpack("<4Q", _digest(seed, sample, purpose)))


def _digest(seed: int, sample: int | str, purpose: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{type(sample).__name__}/{sample}".encode()).digest()


def style_noise(seed: int, samples: Sequence[int | str], dims: int, purpose: str = "style") -> Tensor:
    """Draw standard normal style codes: float32 [len(samples), dims], on the CPU."""
    rows = [generator_for(seed, s, purpose).standard_normal(dims, dtype=np.float32) for s in samples]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, dims)


def style_codes(
    seed: int, samples: Sequence[int | str], dims: int, device: torch.device, purpose: str = "style"
) -> Tensor | None:
    """Draw ``style_noise`` for a generator on ``device``; None for one without style codes (``dims`` 0)."""
    if not dims:
        return None
    codes = style_noise(seed, samples, dims, purpose)
    return codes.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else codes.to(device)
