#!/usr/bin/env bash
# Speed of the gradient of a convolution's weight in memory format channels_last, on a CPU with AVX2.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. First seen in 2.15.0, in the profile of a training on an AMD EPYC (Zen 3).
# Good guess: channels_last, which torch recommends for convolutions on CPUs, is about as fast as contiguous memory, or
#   faster. (Guessed before this script ran: forward and gradient of the input within 1.3 times of contiguous, right;
#   a weight in channels_last changes nothing, right; 1x1 convolutions are not affected, right; 32 channels twice as
#   slow: three times.)
# Behaviour: forward and gradient of the input are as fast or faster; the gradient of a 3x3 weight takes three to five
#   times as long, whatever the weight's own format. To copy both tensors into contiguous memory first is faster.
# For users: on such processors (no AVX-512) half of a training's time may go there. This project computes that gradient
#   as matrix products (models/spectral_norm.py), faster than in contiguous memory, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
export ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

print("torch", torch.__version__)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def seconds(function: Callable[[], object]) -> float:
    """Least processor time of five calls, after two."""
    taken = []
    for _ in range(7):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken[2:])


def measure(channels: int, size: int, side: int, weight_format: str) -> dict[str, float]:
    """Time in channels_last / time with everything contiguous: forward, gradient of the input, gradient of the weight."""
    found: dict[str, list[float]] = {}
    for x_format, w_format in (("contiguous", "contiguous"), ("channels_last", weight_format)):
        x = torch.randn(1, channels, side, side).contiguous(memory_format=FORMATS[x_format]).requires_grad_()
        weight = torch.randn(channels, channels, size, size).contiguous(memory_format=FORMATS[w_format])
        y = F.conv2d(x, weight.requires_grad_(), padding=size // 2)
        gradient = torch.randn_like(y)
        runs = {
            "forward": partial(F.conv2d, x.detach(), weight.detach(), padding=size // 2),
            "input": partial(torch.autograd.grad, y, x, gradient, retain_graph=True),
            "weight": partial(torch.autograd.grad, y, weight, gradient, retain_graph=True),
        }
        for name, run in runs.items():
            found.setdefault(name, []).append(seconds(run))
    return {name: last / first for name, (first, last) in found.items()}


ratios = {}
for channels, size, side, weight_format in (
    (64, 3, 256, "contiguous"), (64, 3, 256, "channels_last"), (128, 3, 128, "contiguous"),
    (32, 3, 256, "contiguous"), (64, 1, 256, "contiguous"),
):  # fmt: skip
    ratio = ratios[channels, size, weight_format] = measure(channels, size, side, weight_format)
    shown = ", ".join(f"{name} {value:.2f}" for name, value in ratio.items())
    print(f"{channels} channels, {size}x{size}, {side}x{side} pixels, weight {weight_format}: {shown} of the time")
slow = [ratio["weight"] for (_, size, _), ratio in ratios.items() if size == 3]
others = [ratio[name] for ratio in ratios.values() for name in ("forward", "input")]
others.append(ratios[64, 1, "contiguous"]["weight"])
sys.exit(0 if min(slow) > 2 and max(others) < 1.6 else "the behaviour has changed")
PYTHON
# Output seen (2026-12-01, Python 3.11, AMD EPYC 7003, other work on the machine):
#   torch 2.13.0+cpu
#   64 channels, 3x3, 256x256 pixels, weight contiguous: forward 0.55, input 0.82, weight 4.63 of the time
#   64 channels, 3x3, 256x256 pixels, weight channels_last: forward 0.59, input 0.66, weight 3.45 of the time
#   128 channels, 3x3, 128x128 pixels, weight contiguous: forward 1.00, input 1.13, weight 3.44 of the time
#   32 channels, 3x3, 256x256 pixels, weight contiguous: forward 1.23, input 1.01, weight 3.34 of the time
#   64 channels, 1x1, 256x256 pixels, weight contiguous: forward 0.58, input 0.65, weight 1.03 of the time
