#!/usr/bin/env bash
# Palette PNGs of less than 8 bits per pixel, read as they are by torchvision.
#
# Versions: torch 2.15.0, torchvision 0.29.2, pillow 13.0.0, numpy 2.4.6.
# Good guess: decode_image with ImageReadMode.UNCHANGED gives the indices of the palette at every bit depth, as it does at
#   8 bits.
# Behaviour: at 1, 2 and 4 bits it returns the packed bytes of each row, then zeros: a tensor of the right shape with wrong
#   values, and no error. Label tools write such files for few classes; Pillow does so by itself.
# For users: label maps of at most 16 classes are read as others. This project reads palettes with Pillow or libpng
#   (data/image_files.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

print("torchvision", torchvision.__version__)
equal = {}
for bits in (1, 2, 4, 8):
    indices = np.random.default_rng(0).integers(0, min(2**bits, 200), (7, 9)).astype(np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel())
    image.putpalette([value for index in range(min(2**bits, 200)) for value in (index, 40, 80)])
    file = io.BytesIO()
    image.save(file, "PNG", bits=bits)
    read = decode_image(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    equal[bits] = tuple(read.shape) == (1, 7, 9) and bool((read[0].numpy() == indices).all())
    print(f"{bits} bits: first row {read[0, 0].tolist()}, in the file {indices[0].tolist()}")
sys.exit(0 if equal == {1: False, 2: False, 4: False, 8: True} else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   torchvision 0.29.2+cu132
#   1 bits: first row [224, 0, 0, 0, 124, 1, 106, 6, 97], in the file [1, 1, 1, 0, 0, 0, 0, 0, 0]
#   2 bits: first row [233, 64, 31, 121, 84, 127, 0, 0, 0], in the file [3, 2, 2, 1, 1, 0, 0, 0, 0]
#   4 bits: first row [218, 132, 64, 16, 35, 127, 0, 0, 112], in the file [13, 10, 8, 4, 4, 0, 1, 0, 2]
#   8 bits: first row [170, 127, 102, 53, 61, 8, 15, 3, 35], in the file [170, 127, 102, 53, 61, 8, 15, 3, 35]
