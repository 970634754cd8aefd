#!/usr/bin/env bash
# Label maps that GDAL writes with fewer than 8 bits, or with 0 as white, and Pillow reads.
#
# Versions: rasterio 1.4.4 (GDAL 3.10.3), pillow 13.0.0, numpy 2.4.6.
# Good guess: a label map of ids 0..15 written with NBITS=4 (a usual way to save space) gives these ids in every reader;
#   and PHOTOMETRIC=MINISWHITE, which is for viewers, changes them in all depths or in none.
# Behaviour: NBITS=4 gives 0, 17, 34 ... in Pillow, NBITS=2 gives 0, 85, 170, 255; NBITS=1 gives the ids. MINISWHITE turns
#   ids of 8 bits around (255 - id) and leaves those of 16 bits as they are. rasterio reads the ids each time.
# For users: a loader that opens such maps with Pillow trains on other classes without a word. This project divides samples
#   of 2 and 4 bits again, and refuses those of which 0 is white (data/image_files.py, with tests).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rasterio==1.4.4 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder/map.tif" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import rasterio
from PIL import Image

print("rasterio", version("rasterio"), "GDAL", rasterio.__gdal_version__, "pillow", version("pillow"))
path, seen = sys.argv[1], {}
for bits, options in ((8, {}), (4, {"nbits": 4}), (2, {"nbits": 2}), (1, {"nbits": 1}),
                      (8, {"photometric": "MINISWHITE"}), (16, {"photometric": "MINISWHITE"})):
    ids = (np.arange(15).reshape(3, 5) % (1 << bits)).astype(np.uint16 if bits == 16 else np.uint8)
    with rasterio.open(path, "w", driver="GTiff", height=3, width=5, count=1, dtype=ids.dtype, **options) as file:
        file.write(ids, 1)
    with rasterio.open(path) as file:
        assert (file.read(1) == ids).all()
    read = np.asarray(Image.open(path)).astype(int)
    seen[bits, *options.values()] = read[0].tolist()
    print(f"{bits} bits {options}: written {ids[0].tolist()}, Pillow reads {read[0].tolist()}")
expected = {
    (8,): [0, 1, 2, 3, 4], (4, 4): [0, 17, 34, 51, 68], (2, 2): [0, 85, 170, 255, 0], (1, 1): [0, 1, 0, 1, 0],
    (8, "MINISWHITE"): [255, 254, 253, 252, 251], (16, "MINISWHITE"): [0, 1, 2, 3, 4],
}
sys.exit(0 if seen == expected else "the behaviour has changed")
PYTHON
# Output seen (2026-12-01, Python 3.11):
#   rasterio 1.4.4 GDAL 3.10.3 pillow 13.0.0
#   8 bits {}: written [0, 1, 2, 3, 4], Pillow reads [0, 1, 2, 3, 4]
#   4 bits {'nbits': 4}: written [0, 1, 2, 3, 4], Pillow reads [0, 17, 34, 51, 68]
#   2 bits {'nbits': 2}: written [0, 1, 2, 3, 0], Pillow reads [0, 85, 170, 255, 0]
#   1 bits {'nbits': 1}: written [0, 1, 0, 1, 0], Pillow reads [0, 1, 0, 1, 0]
#   8 bits {'photometric': 'MINISWHITE'}: written [0, 1, 2, 3, 4], Pillow reads [255, 254, 253, 252, 251]
#   16 bits {'photometric': 'MINISWHITE'}: written [0, 1, 2, 3, 4], Pillow reads [0, 1, 2, 3, 4]
