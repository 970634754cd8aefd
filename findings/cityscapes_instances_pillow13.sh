#!/usr/bin/env bash
# Cityscapes' own tool writes instance maps with a new Pillow.
#
# Versions: cityscapesScripts 2.3.0, pillow 13.0.0, numpy 2.4.6.
# Good guess: csCreateTrainIdInstanceImgs works with any Pillow that its requirements allow (they name no version).
# Behaviour: json2instanceImg draws on an image of mode "I", which Pillow 13 no longer writes as PNG: OSError "cannot write
#   mode I as PNG". Label maps (mode "L") are still written. With pillow 12.0.0 both are.
# For users: make the instance maps of Cityscapes in an environment with "pillow<13".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/write.py" <<'PYTHON'
import json
import pathlib
import sys

import PIL
from cityscapesscripts.preparation.json2instanceImg import json2instanceImg
from cityscapesscripts.preparation.json2labelImg import json2labelImg

folder = pathlib.Path(sys.argv[1])
car = {"label": "car", "polygon": [[10, 10], [40, 10], [40, 30], [10, 30]]}
annotation = folder / "street_gtFine_polygons.json"
annotation.write_text(json.dumps({"imgHeight": 40, "imgWidth": 60, "objects": [car]}))
for name, write in (("labels", json2labelImg), ("instances", json2instanceImg)):
    try:
        write(str(annotation), str(folder / f"{name}.png"), "ids")
        print(f"pillow {PIL.__version__}: {name} written")
    except OSError as error:
        print(f"pillow {PIL.__version__}: {name}: OSError: {error}")
PYTHON
for pillow in 12.0.0 13.0.0; do
  python3 -m venv "$folder/$pillow"
  "$folder/$pillow/bin/pip" install --quiet cityscapesScripts==2.3.0 pillow==$pillow numpy==2.4.6
  "$folder/$pillow/bin/python" "$folder/write.py" "$folder"
done | tee "$folder/seen"
expected='pillow 12.0.0: labels written
pillow 12.0.0: instances written
pillow 13.0.0: labels written
pillow 13.0.0: instances: OSError: cannot write mode I as PNG'
[ "$(cat "$folder/seen")" = "$expected" ] || { echo 'the behaviour has changed' >&2; exit 1; }
# Output seen (2026-11-30, Python 3.11):
#   pillow 12.0.0: labels written
#   pillow 12.0.0: instances written
#   pillow 13.0.0: labels written
#   pillow 13.0.0: instances: OSError: cannot write mode I as PNG
