#!/usr/bin/env bash
# Datumaro's VOC export: coloured masks beside a labelmap.txt without colours.
#
# Versions: datumaro 1.13.12, numpy 2.4.6, pillow 12.3.0.
# Good guess: labelmap.txt, whose head says "label:color_rgb:parts:actions", holds the colours that the masks in
#   SegmentationClass/ are painted with, as the exports of CVAT in this form do. A reader takes colours from there.
# Behaviour: for a data set without colours of its own (any that came from COCO, for example) the masks are RGB images in
#   the colours of VOC's devkit by number of class, and labelmap.txt leaves all colours empty ("cat:::"). A class
#   "background" is put in front if there is none, so that a class has another number in the masks than before.
# For users: a script that takes the colours of the masks from labelmap.txt finds none. This project fills empty colours in
#   by VOC's rule (dataset_prep/annotations.py, with a test on such an export).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datumaro==1.13.12 numpy==2.4.6 pillow==12.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
from datumaro.components.annotation import Mask
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image

print("datumaro", version("datumaro"), "numpy", version("numpy"), "pillow", version("pillow"))
area = np.zeros((24, 32), bool)
area[4:12, 6:20] = True
masks = [Mask(area, label=0, id=1, group=1), Mask(area[::-1], label=1, id=2, group=2)]
item = DatasetItem("a", subset="train", media=Image.from_numpy(np.zeros((24, 32, 3), np.uint8)), annotations=masks)
with tempfile.TemporaryDirectory() as coco, tempfile.TemporaryDirectory() as voc:
    Dataset.from_iterable([item], categories=["cat", "dog"]).export(coco, "coco_instances", save_media=True)
    Dataset.import_from(coco, "coco_instances").export(voc, "voc_segmentation", save_media=True)
    lines = Path(voc, "labelmap.txt").read_text().split()
    mask = PIL.Image.open(Path(voc, "SegmentationClass/a.png"))
    colours = sorted(colour for _, colour in mask.getcolors())
print("RESULT labelmap.txt:", lines)
print("RESULT mask:", mask.mode, colours)
expected = ["#", "label:color_rgb:parts:actions", "background:::", "cat:::", "dog:::"]
same = lines == expected and mask.mode == "RGB" and colours == [(0, 0, 0), (0, 128, 0), (128, 0, 0)]
sys.exit(0 if same else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11), without the log lines of the packages:
#   datumaro 1.13.12 numpy 2.4.6 pillow 12.3.0
#   RESULT labelmap.txt: ['#', 'label:color_rgb:parts:actions', 'background:::', 'cat:::', 'dog:::']
#   RESULT mask: RGB [(0, 0, 0), (0, 128, 0), (128, 0, 0)]
