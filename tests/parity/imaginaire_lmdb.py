"""Check of imaginaire's LMDBs: opened and decoded by us, and the sample that its loader makes of each.

Its loader resizes label maps by another nearest rule than ours and pictures and edges linearly: that part is computed
here as its facts say, from what our reader decodes.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaginaire_spade.data.image_files import decode_image, decode_label
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.labels import LabelSpec
from parity.fixture import Fixture


def check(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    source = open_source(fixture.path / fixture.config["lmdb_folder"], ("images", "seg_maps", "edge_maps"))
    sample = fixture.config["sample"]
    size = sample["resize_h_w"][::-1]
    classes = sample["seg_classes"]
    labels = LabelSpec(num_classes=classes, ignore=tuple(range(classes, 256)))
    for index, key in enumerate(source.keys):
        stored = key if "/" in key else f"./{key}"
        image = decode_image(source.read(key, "images"), key)
        label, edges = (decode_label(source.read(key, t), key) for t in ("seg_maps", "edge_maps"))
        for name, array in (("images", image), ("seg_maps", label), ("edge_maps", edges)):
            yield f"decoded/{name}/{stored}", torch.from_numpy(np.ascontiguousarray(array))
        resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        yield f"sample/{index}/images", torch.from_numpy(resized).permute(2, 0, 1) / 127.5 - 1
        ids: NDArray[np.uint8] = labels.to_train_ids(label, key).astype(np.uint8)
        nearest = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
        yield f"sample/{index}/label_onehot_nonzero_channel", torch.from_numpy(nearest)
        linear = cv2.resize(edges.astype(np.uint8), size, interpolation=cv2.INTER_LINEAR)
        yield f"sample/{index}/edge", torch.from_numpy(linear) / 255
        yield f"sample/{index}/original_h_w", torch.tensor(image.shape[:2])
