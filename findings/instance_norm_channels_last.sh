#!/usr/bin/env bash
# Gradient of instance norm for one image whose gradient arrives in memory format channels_last, on a CPU.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. The same was seen in 2.11.0 and 2.15.0.
# Good guess: the memory format of a gradient changes nothing but rounding.
# Behaviour: torch.nn.functional.instance_norm gives a wrong gradient for a batch of one as soon as the gradient that
#   comes in is channels_last: as large an error as the gradient itself, in float64 too. A batch of two is right.
# For users: whoever trains at batch 1 per process with channels_last trains on noise through instance norms. This
#   project has its own (models/layers.py, with a test).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

print("torch", torch.__version__)


def error(batch: int, memory_format: torch.memory_format) -> float:
    """Error of the gradient of instance_norm against its definition, relative to the largest value."""
    torch.manual_seed(0)
    x = torch.randn(batch, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(batch, 4, 5, 6, dtype=torch.float64)
    centred = x - x.mean((2, 3), keepdim=True)
    right = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(right, x, gradient)
    laid_out = gradient.contiguous(memory_format=memory_format)
    (got,) = torch.autograd.grad(F.instance_norm(x), x, laid_out)
    return ((got - expected).abs().max() / expected.abs().max()).item()


errors = {}
for batch in (1, 2):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        errors[batch, memory_format] = error(batch, memory_format)
        print(f"batch {batch}, gradient {memory_format}: relative error {errors[batch, memory_format]:.1e}")
wrong = errors.pop((1, torch.channels_last))
sys.exit(0 if wrong > 0.1 and max(errors.values()) < 1e-9 else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   torch 2.13.0+cpu
#   batch 1, gradient torch.contiguous_format: relative error 3.6e-16
#   batch 1, gradient torch.channels_last: relative error 1.5e+00
#   batch 2, gradient torch.contiguous_format: relative error 2.0e-16
#   batch 2, gradient torch.channels_last: relative error 2.0e-16
