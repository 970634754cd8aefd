#!/usr/bin/env bash
# Shrinking with an antialias filter to a width of one pixel.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6. The same was seen in 2.11.0 and 2.15.0.
# Good guess: every row of the result is the mean of other rows of the input; memory format changes nothing.
# Behaviour: torch.nn.functional.interpolate(x, (h, 1), mode="bilinear", antialias=True) of one contiguous channel
#   repeats the first row h times when the height changes too; the same values as several channels in channels_last come
#   out right. In float64 as in float32.
# For users: a profile of an image's rows (brightness per row, for instance) becomes a constant without a word. Shrink
#   one axis after the other, or take the mean.
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
torch.manual_seed(0)
image = torch.rand(1, 1, 6, 5, dtype=torch.float64)
three = image.expand(1, 3, 6, 5).contiguous(memory_format=torch.channels_last)
one = F.interpolate(image, (3, 1), mode="bilinear", antialias=True).flatten()
right = F.interpolate(three, (3, 1), mode="bilinear", antialias=True)[0, 0].flatten()
two = F.interpolate(image, (3, 2), mode="bilinear", antialias=True)
print("rows, one contiguous channel:", [round(value, 4) for value in one.tolist()])
print("rows, channels_last:         ", [round(value, 4) for value in right.tolist()])
print("to a width of two, different rows:", len(two.unique(dim=2)[0, 0]))
repeats = bool((one == one[0]).all()) and not bool((right == right[0]).any(dim=0).all() and (right == right[0]).all())
sys.exit(0 if repeats else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   torch 2.13.0+cpu
#   rows, one contiguous channel: [0.5477, 0.5477, 0.5477]
#   rows, channels_last:          [0.5477, 0.4276, 0.4682]
#   to a width of two, different rows: 3
