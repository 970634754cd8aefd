#!/usr/bin/env bash
# Reading images at half size while they are decoded, with OpenCV's IMREAD_REDUCED flags.
#
# Versions: opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Good guess: the flag gives every format the same size, and a map of few values keeps its values where the decoder
#   cannot scale by itself (it would skip pixels).
# Behaviour: 333x333 becomes 167x167 as JPEG and 166x166 as PNG, TIFF, WebP and BMP. Formats other than JPEG are blended
#   after decoding: a label map of 5 ids comes back with some 200.
# For users: photo (JPEG) and label map (PNG) of one sample no longer fit, and the map's ids are made up. This project
#   scales photos alone, and only JPEGs, while decoding (data/photos.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import cv2
import numpy as np

print("opencv", cv2.__version__)
label_map = np.random.default_rng(0).integers(0, 5, (333, 333)).astype(np.uint8) * 50
read = {}
for ending in (".jpg", ".png", ".tiff", ".bmp"):
    encoded = cv2.imencode(ending, label_map)[1]
    half = cv2.imdecode(encoded, cv2.IMREAD_REDUCED_GRAYSCALE_2)
    read[ending] = half.shape, len(np.unique(half))
    print(f"{ending}: 333x333 with 5 values -> {half.shape[0]}x{half.shape[1]} with {read[ending][1]} values")
lossless = [read[ending] for ending in (".png", ".tiff", ".bmp")]
as_seen = read[".jpg"][0] == (167, 167) and all(size == (166, 166) and values > 100 for size, values in lossless)
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   opencv 5.0.0
#   .jpg: 333x333 with 5 values -> 167x167 with 70 values
#   .png: 333x333 with 5 values -> 166x166 with 201 values
#   .tiff: 333x333 with 5 values -> 166x166 with 201 values
#   .bmp: 333x333 with 5 values -> 166x166 with 201 values
