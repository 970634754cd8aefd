"""A label map to a photo with onnxruntime alone, no torch: python run_onnx.py MODEL.onnx LABEL_MAP.png PHOTO.png

A fourth argument, image (default), class or pixel, says what has noise of its own, for OASIS: class and pixel need a
file that was exported with --noise pixel.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

if len(sys.argv) not in (4, 5):
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
table, multiple = about["label_table"], about["size_multiple"]

ids = np.asarray(Image.open(sys.argv[2])).astype(np.int32)  # [H, W] of class ids, as in the data set's files
labels = np.where(np.isin(ids, table["ignore"]), table["num_classes"], ids)
for raw_id, train_id in table["remap"].items():
    labels[ids == int(raw_id)] = train_id
padding = [(0, max(2 * multiple, -(-length // multiple) * multiple) - length) for length in labels.shape]
feed = {"labels": np.pad(labels, padding, constant_values=table["num_classes"])[None]}
wanted = [node.name for node in session.get_inputs()]
if "edges" in wanted:  # of the label map, for want of object outlines
    around = np.pad(labels, 1, mode="edge")
    neighbours = around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]
    feed["edges"] = np.pad(np.any([labels != n for n in neighbours], 0), padding)[None].astype(np.float32)
noise = sys.argv[4] if len(sys.argv) > 4 else "image"
by_pixel = any(node.name == "z" and len(node.shape) == 4 for node in session.get_inputs())
if noise not in ("image", "class", "pixel"):
    sys.exit(f"{noise}: write image, class or pixel")
if noise != "image" and not by_pixel:
    sys.exit(f"{sys.argv[1]}: takes no noise by {noise}: export an OASIS generator with --noise pixel, or write image")
if "z" in wanted:  # any style: standard normal numbers
    padded = feed["labels"][0]
    kinds = {"image": 0 * padded, "class": padded, "pixel": np.arange(padded.size).reshape(padded.shape)}
    codes = np.random.default_rng(0).standard_normal((kinds[noise].max() + 1, about["style_dims"]), np.float32)
    feed["z"] = codes[kinds[noise]].transpose(2, 0, 1)[None] if by_pixel else codes
image = session.run(["images"], feed)[0][0, :, : labels.shape[0], : labels.shape[1]]  # [3, H, W], -1 to 1
Image.fromarray(np.round((image + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)).save(sys.argv[3])
