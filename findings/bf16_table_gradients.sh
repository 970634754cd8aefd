#!/usr/bin/env bash
# Gradients of rows of a bfloat16 table that many places look up (class tables, CLADE), on a CPU.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. The same was seen in 2.15.0.
# Good guess: ways to look up rows are alike, also in their gradients: either all add up in bfloat16, or none does.
# Behaviour: 10,000 places with a gradient of 1 give 256 with F.embedding, F.embedding_bag and table[index] (bfloat16 cannot
#   count beyond 256), and 9984, the nearest bfloat16 to 10,000, with index_select and gather.
# For users: classes that fill much of the picture learn hundreds of times too slowly, small ones as they should. This
#   project adds up in float32 whatever the table's dtype (models/modulation.py).
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
PLACES, CHANNELS = 10_000, 4
index = torch.zeros(PLACES, dtype=torch.long)
ways = {
    "F.embedding": lambda table: F.embedding(index, table),
    "F.embedding_bag": lambda table: F.embedding_bag(index[:, None], table, mode="sum"),
    "table[index]": lambda table: table[index],
    "index_select": lambda table: table.index_select(0, index),
    "gather": lambda table: table.gather(0, index[:, None].expand(-1, CHANNELS)),
}
sums = {}
for name, look_up in ways.items():
    table = torch.zeros(3, CHANNELS, dtype=torch.bfloat16, requires_grad=True)
    look_up(table).backward(torch.ones(PLACES, CHANNELS, dtype=torch.bfloat16))
    sums[name] = table.grad[0, 0].item()
    print(f"{name}: gradient {sums[name]:.0f} instead of {PLACES}")
as_seen = list(sums.values()) == [256, 256, 256, 9984, 9984]
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   torch 2.13.0+cpu
#   F.embedding: gradient 256 instead of 10000
#   F.embedding_bag: gradient 256 instead of 10000
#   table[index]: gradient 256 instead of 10000
#   index_select: gradient 9984 instead of 10000
#   gather: gradient 9984 instead of 10000
