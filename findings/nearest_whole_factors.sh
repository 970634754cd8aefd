#!/usr/bin/env bash
# Nearest resize by whole factors in three libraries.
#
# Versions: torch 2.13.0 (CPU), onnxruntime 1.32.0, onnx 1.23.2, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Good guess: at a whole factor k, nearest with the floor rule takes pixels 0, k, 2k ... when it shrinks, and repeats each
#   pixel k times when it enlarges: in every library, for every k.
# Behaviour: each library multiplies by a rounded float32 factor and falls one pixel short at some k. ONNX Runtime when it
#   shrinks by 7, 13, 14, 15, 26 ...; torch when it enlarges by 41, 47, 55, 61 ...; OpenCV when it shrinks by 93 ... Powers
#   of two are right everywhere.
# For users: an exported generator that shrinks label maps by such a factor sees other labels than in training. The
#   factors of this project's generators are powers of two.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnxruntime==1.32.0 onnx==1.23.2 \
  opencv-python-headless==5.0.0.93 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import cv2
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__, "opencv", cv2.__version__)
WIDTHS = (8, 16, 32)


def by_onnxruntime(row: np.ndarray, width: int) -> np.ndarray:
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest", nearest_mode="floor",
                            coordinate_transformation_mode="asymmetric")
    graph = helper.make_graph(
        [node], "resize", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 1, None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, 1, width])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": row[None, None, None]})[0].ravel()


def by_torch(row: np.ndarray, width: int) -> np.ndarray:
    return F.interpolate(torch.from_numpy(row)[None, None, None], size=(1, width), mode="nearest").numpy().ravel()


def by_opencv(row: np.ndarray, width: int) -> np.ndarray:
    return cv2.resize(row[None], (width, 1), interpolation=cv2.INTER_NEAREST).ravel()


def wrong_factors(resize, shrink: bool) -> list[int]:
    wrong = []
    for factor in range(2, 100):
        for width in WIDTHS:
            small, large = np.arange(width, dtype=np.float32), np.arange(width * factor, dtype=np.float32)
            got = resize(large, width) if shrink else resize(small, width * factor)
            if (got != (small * factor if shrink else large // factor)).any():
                wrong.append(factor)
                break
    return wrong


found = {}
for name, resize in (("onnxruntime", by_onnxruntime), ("torch", by_torch), ("opencv", by_opencv)):
    for shrink in (True, False):
        found[name, shrink] = wrong_factors(resize, shrink)
        print(name, "shrinks" if shrink else "enlarges", "wrongly at", found[name, shrink][:8])
powers = {2, 4, 8, 16, 32, 64}
as_seen = (
    found["onnxruntime", True][:4] == [7, 13, 14, 15] and found["torch", False][:4] == [41, 47, 55, 61]
    and not found["torch", True] and found["opencv", True][:1] == [93]
    and not any(powers & set(factors) for factors in found.values())
)
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
# Output seen (2026-11-30, Python 3.11):
#   torch 2.13.0+cpu onnxruntime 1.32.0 opencv 5.0.0
#   onnxruntime shrinks wrongly at [7, 13, 14, 15, 26, 28, 30, 51]
#   onnxruntime enlarges wrongly at []
#   torch shrinks wrongly at []
#   torch enlarges wrongly at [41, 47, 55, 61, 82, 83, 94, 97]
#   opencv shrinks wrongly at [93, 99]
#   opencv enlarges wrongly at [49, 98]
