#!/usr/bin/env bash
# Fused Adam on a CPU after a resume with another memory format of the weights.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6.
# Good guess: Optimizer.load_state_dict brings moments to their parameters' memory format, or fused Adam refuses tensors
#   of different strides, as it does on CUDA ("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and
#   layout"); either way the weights after the next step are those of the unfused optimizer.
# Behaviour: load_state_dict keeps the strides that the moments were saved with, and the fused CPU kernel pairs elements by
#   their place in memory: weights get other weights' moments, without a word. The unfused optimizer is right.
# For users: a run that is resumed with channels_last switched on or off trains on with scrambled moments. This project
#   copies each moment into its parameter's format first (training/state.py, with a test).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import torch

print("torch", torch.__version__)


def difference(fused: bool) -> float:
    """Largest difference of a weight after one more step, in one memory format and resumed in the other."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, bias=False)
    adam = torch.optim.Adam(conv.parameters(), lr=1e-2, fused=fused)

    def step(layer, optimizer, x):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(conv, adam, torch.randn(2, 4, 8, 8))
    resumed = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    resumed_adam = torch.optim.Adam(resumed.parameters(), lr=1e-2, fused=fused)
    resumed_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
    x = torch.randn(2, 4, 8, 8)
    step(conv, adam, x)
    step(resumed, resumed_adam, x)
    moment = resumed_adam.state[resumed.weight]["exp_avg"]
    print(f"fused={fused}: strides of the weight {resumed.weight.stride()}, of its moment {moment.stride()}")
    return (conv.weight - resumed.weight).abs().max().item()


unfused, fused = difference(False), difference(True)
print(f"largest difference of a weight after one step of 0.01: unfused {unfused:.1e}, fused {fused:.1e}")
sys.exit(0 if unfused < 1e-6 and fused > 1e-3 else "the behaviour has changed")
PYTHON
# Output seen (2026-11-29, Python 3.11):
#   torch 2.13.0+cpu
#   fused=False: strides of the weight (36, 1, 12, 4), of its moment (36, 9, 3, 1)
#   fused=True: strides of the weight (36, 1, 12, 4), of its moment (36, 9, 3, 1)
#   largest difference of a weight after one step of 0.01: unfused 0.0e+00, fused 1.6e-02
