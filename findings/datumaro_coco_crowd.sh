#!/usr/bin/env bash
# Datumaro's COCO export: a mask becomes a crowd, even if its own attribute says that it is none.
#
# Versions: datumaro 1.13.12, pycocotools 2.0.11.
# Good guess: the documentation of the format says "is_crowd (boolean; on bbox, polygon and mask annotations) - Indicates
#   that the annotation covers multiple instances of the same class". So a mask without it, or with is_crowd False, is
#   exported with "iscrowd": 0, as polygons or as a run length code; COCO allows both.
# Behaviour: whatever is written as a run length code gets "iscrowd": 1. That is every mask that has no attribute (with
#   the default segmentation_mode "guess"), and every mask with segmentation_mode "mask", where is_crowd False is overruled
#   without a word. Is_crowd False with "guess" gives polygons and 0. Read back, the attribute of run length codes is True.
# For users: COCO's evaluation ignores crowds and many training loaders skip them. Objects drawn as masks are then missing
#   from training although the export holds them. This project draws crowds as what they are, regions with a class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datumaro==1.13.12 pycocotools==2.0.11
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datumaro.components.annotation import Mask
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image
from pycocotools.coco import COCO

print("datumaro", version("datumaro"), "pycocotools", version("pycocotools"))
AREA = np.zeros((24, 32), bool)
AREA[4:12, 6:20] = True


def export(attributes: dict, mode: str) -> tuple:
    """Export one mask of one cat; return what the file says, and how many cats remain without crowds."""
    mask = Mask(AREA, label=0, id=1, group=1, attributes=attributes)
    photo = Image.from_numpy(np.zeros((24, 32, 3), np.uint8))
    data = Dataset.from_iterable([DatasetItem("a", subset="train", media=photo, annotations=[mask])], categories=["cat"])
    with tempfile.TemporaryDirectory() as folder:
        data.export(folder, "coco_instances", save_media=True, segmentation_mode=mode)
        path = Path(folder, "annotations/instances_train.json")
        (note,) = json.loads(path.read_text())["annotations"]
        again = next(iter(Dataset.import_from(folder, "coco_instances"))).annotations
        read_back = [a.attributes.get("is_crowd") for a in again if isinstance(a, Mask)]
        kept = len(COCO(str(path)).getAnnIds(iscrowd=False))
    form = "run length code" if isinstance(note["segmentation"], dict) else "polygons"
    return form, note["iscrowd"], read_back, kept


seen = {}
for attributes in ({}, {"is_crowd": False}):
    for mode in ("guess", "mask"):
        seen[str(attributes), mode] = export(attributes, mode)
for (attributes, mode), (form, crowd, read_back, kept) in seen.items():
    print(f"RESULT {attributes} {mode}: {form}, iscrowd {crowd}, read back {read_back}; cats that are no crowd: {kept}")
expected = {
    ("{}", "guess"): ("run length code", 1, [True], 0),
    ("{}", "mask"): ("run length code", 1, [True], 0),
    ("{'is_crowd': False}", "guess"): ("polygons", 0, [], 1),
    ("{'is_crowd': False}", "mask"): ("run length code", 1, [True], 0),
}
sys.exit(0 if seen == expected else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11), without the log lines of the packages:
#   datumaro 1.13.12 pycocotools 2.0.11
#   RESULT {} guess: run length code, iscrowd 1, read back [True]; cats that are no crowd: 0
#   RESULT {} mask: run length code, iscrowd 1, read back [True]; cats that are no crowd: 0
#   RESULT {'is_crowd': False} guess: polygons, iscrowd 0, read back []; cats that are no crowd: 1
#   RESULT {'is_crowd': False} mask: run length code, iscrowd 1, read back [True]; cats that are no crowd: 0
