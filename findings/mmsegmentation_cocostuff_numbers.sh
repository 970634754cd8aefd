#!/usr/bin/env bash
# How mmsegmentation's converters number the classes of the two COCO-Stuff releases.
#
# Versions: mmsegmentation 1.2.2.
# Good guess: both write NAME_labelTrainIds.png, so the files agree: 171 classes from 0 on, 255 where nothing is labelled.
# Behaviour: the converter of the 164k release writes 0..170 and 255, that of the 10K release 1..171 and 0. A person is 0
#   in one and 1 in the other, wood 170 and 171.
# For users: neither the name nor the mode of such a file tells its numbering. Mixed, every class of the 10K release is
#   taken for its neighbour, unlabelled pixels for persons, and 171 alone is out of range.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/wheel" mmsegmentation==1.2.2
"$folder/venv/bin/python" - "$folder/wheel" <<'PYTHON'
import ast
import pathlib
import sys

seen = {}
for release in ("164k", "10k"):
    (path,) = pathlib.Path(sys.argv[1]).rglob(f"coco_stuff{release}.py")
    text = path.read_text()
    (table,) = (ast.literal_eval(node.value) for node in ast.parse(text).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "clsID_to_trID")
    person, wood, unlabelled = (0, 181, 255) if release == "164k" else (1, 182, 0)
    seen[release] = (table[person], table[wood], table[unlabelled], "_labelTrainIds.png" in text)
    print(release, "person, wood, unlabelled, the same ending:", seen[release])
as_seen = seen == {"164k": (0, 170, 255, True), "10k": (1, 171, 0, True)}
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
# Output seen (2026-12-01, Python 3.11):
#   164k person, wood, unlabelled, the same ending: (0, 170, 255, True)
#   10k person, wood, unlabelled, the same ending: (1, 171, 0, True)
