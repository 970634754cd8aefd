#!/usr/bin/env bash
# A run of DistributedDataParallel that is stopped and resumed, on a CPU.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. The same was seen in 2.15.0.
# Good guess: with weights, moments and the order of data restored, a resumed run equals the undisturbed one bit for bit,
#   in two processes as in three: every sum is made of the same numbers.
# Behaviour: it does in two processes and does not in three or four. DDP exchanges the first iteration's gradients in one
#   piece, in the order of parameters, and all later ones in pieces in the order of their arrival; gloo's order of adding
#   depends on where in its piece a gradient lies. Two terms have one sum in any order, three have not. A resumed run has
#   a "first" iteration in its middle. find_unused_parameters=True keeps the pieces, and resumes bit for bit.
# For users: a test of resuming in two processes proves nothing for eight.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/resume.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

STEPS = 8


def weights_after(pieces, find_unused):
    """Train STEPS iterations, wrapped anew at each of the pieces' ends."""
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for start, end in pieces:
        wrapped = DistributedDataParallel(network, find_unused_parameters=find_unused)
        for step in range(start, end):
            draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
            optimizer.zero_grad()
            wrapped(torch.randn(8, 64, generator=draw)).square().mean().backward()
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def work(rank, processes, folder, same):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{processes}", rank=rank, world_size=processes)
    for find_unused in (False, True):
        straight = weights_after([(0, STEPS)], find_unused)
        again = weights_after([(0, STEPS)], find_unused)
        resumed = weights_after([(0, STEPS // 2), (STEPS // 2, STEPS)], find_unused)
        if rank == 0:
            same[find_unused, processes] = torch.equal(straight, resumed) if torch.equal(straight, again) else None
    dist.destroy_process_group()


if __name__ == "__main__":
    same = mp.Manager().dict()
    for processes in (2, 3, 4):
        mp.spawn(work, (processes, sys.argv[1], same), processes)
    print("torch", torch.__version__)
    for find_unused in (False, True):
        row = [f"{n} processes: {same[find_unused, n]}" for n in (2, 3, 4)]
        print(f"find_unused_parameters={find_unused}, resumed equals undisturbed:", ", ".join(row))
    expected = {(find, n): find or n == 2 for find in (False, True) for n in (2, 3, 4)}
    sys.exit(0 if dict(same) == expected else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/resume.py" "$folder"
# Output seen (2026-12-01, Python 3.11):
#   torch 2.13.0+cpu
#   find_unused_parameters=False, resumed equals undisturbed: 2 processes: True, 3 processes: False, 4 processes: False
#   find_unused_parameters=True, resumed equals undisturbed: 2 processes: True, 3 processes: True, 4 processes: True
