"""A label map to a photo with onnxruntime alone, no torch: python run_onnx.py MODEL.onnx LABEL_MAP.png PHOTO.png"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

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
if "z" in wanted:  # any style: a standard normal code
    feed["z"] = np.random.default_rng(0).standard_normal((1, about["style_dims"]), np.float32)
image = session.run(["images"], feed)[0][0, :, : labels.shape[0], : labels.shape[1]]  # [3, H, W], -1 to 1
Image.fromarray(np.round((image + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)).save(sys.argv[3])
