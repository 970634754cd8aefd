#!/usr/bin/env bash
# A gradient penalty under DistributedDataParallel with static_graph=True.
#
# Versions: torch 2.13.0 (CPU, gloo), numpy 2.4.6. The same was seen in 2.11.0 and 2.15.0.
# Good guess: static_graph=True either refuses the double backward of a gradient penalty or exchanges gradients as
#   without it; documentation recommends it for graphs that do not change.
# Behaviour: torch.autograd.grad(..., create_graph=True) before the loss uses up the exchange: from the first iteration on
#   each process keeps its own gradients, without a word. With static_graph=False both have the same.
# For users: a discriminator with an R1 or gradient penalty becomes a different network on each GPU. This project does not
#   set static_graph.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/penalty.py" <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
differences = {}
for static in (False, True):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
    parallel = nn.parallel.DistributedDataParallel(network, static_graph=static)
    images = torch.Generator().manual_seed(dist.get_rank())
    for iteration in range(3):
        network.zero_grad()
        x = torch.randn(2, 3, 8, 8, generator=images).requires_grad_()
        scores = parallel(x)
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        (scores.mean() + slope.square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
        all_gradients = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(all_gradients, gradient)
        differences[static, iteration] = (all_gradients[0] - all_gradients[1]).abs().max().item()
        if dist.get_rank() == 0:
            print(f"static_graph={static}, iteration {iteration}: gradients of the two processes differ by"
                  f" {differences[static, iteration]:.1e}", flush=True)
dist.destroy_process_group()
as_seen = all((difference > 0.1) == static for (static, _), difference in differences.items())
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc_per_node 2 "$folder/penalty.py"
# Output seen (2026-11-30, Python 3.11):
#   static_graph=False, iteration 0: gradients of the two processes differ by 0.0e+00
#   static_graph=False, iteration 1: gradients of the two processes differ by 0.0e+00
#   static_graph=False, iteration 2: gradients of the two processes differ by 0.0e+00
#   static_graph=True, iteration 0: gradients of the two processes differ by 7.6e+00
#   static_graph=True, iteration 1: gradients of the two processes differ by 8.0e+00
#   static_graph=True, iteration 2: gradients of the two processes differ by 8.1e+00
