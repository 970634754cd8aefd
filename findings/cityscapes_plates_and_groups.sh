#!/usr/bin/env bash
# What Cityscapes' own tool makes of license plates and of groups in label maps.
#
# Versions: cityscapesScripts 2.3.0, pillow 12.0.0, numpy 2.4.6.
# Good guess: a license plate, whose id is -1, is 255 in a map of 8 bits (or void, 0); a "cargroup" is void, since it is no
#   single car and the instance map leaves it without a number.
# Behaviour: plates are not drawn: their pixels keep what lies beneath, the car. Groups are drawn with the id of their
#   class, 26. In instance maps a car is 26000, a group 26.
# For users: no pixel of a Cityscapes label map says "license plate", and a map with 255 in it is not this tool's. An
#   instance is value >= 1000; 26 alone is a group.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cityscapesScripts==2.3.0 pillow==12.0.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import pathlib
import sys

import numpy as np
from cityscapesscripts.preparation.json2instanceImg import json2instanceImg
from cityscapesscripts.preparation.json2labelImg import json2labelImg
from PIL import Image


def box(label: str, left: int, top: int, right: int, bottom: int) -> dict:
    return {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]}


folder = pathlib.Path(sys.argv[1])
annotation = folder / "street_gtFine_polygons.json"
objects = [box("road", 0, 0, 59, 39), box("car", 10, 10, 40, 30), box("license plate", 20, 20, 26, 24),
           box("cargroup", 45, 5, 55, 15)]
annotation.write_text(json.dumps({"imgHeight": 40, "imgWidth": 60, "objects": objects}))
seen = {}
for name, write in (("labels", json2labelImg), ("instances", json2instanceImg)):
    write(str(annotation), str(folder / f"{name}.png"), "ids")
    ids = np.array(Image.open(folder / f"{name}.png"))
    seen[name] = {"car": int(ids[12, 12]), "license plate": int(ids[22, 23]), "cargroup": int(ids[10, 50])}
    print(name, ids.dtype, seen[name])
as_seen = seen["labels"] == {"car": 26, "license plate": 26, "cargroup": 26} and seen["instances"] == {
    "car": 26000, "license plate": 26000, "cargroup": 26}
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   labels uint8 {'car': 26, 'license plate': 26, 'cargroup': 26}
#   instances uint16 {'car': 26000, 'license plate': 26000, 'cargroup': 26}
