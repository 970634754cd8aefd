"""Label a folder of photos with a segmentation network (``scripts/label_images.py``)."""

from __future__ import annotations

from pathlib import Path

import yaml
from tqdm import tqdm

from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_image, encode_map
from imaginaire_spade.files import write_bytes
from imaginaire_spade.pretrained.segmenters import Segmenter


def label_photos(
    segmenter: Segmenter, root: Path, *, overwrite: bool = False, rank: int = 0, world_size: int = 1
) -> tuple[int, int]:
    """Write ``root/seg_maps/KEY.png`` for every photo in ``root/images``, and ``root/labels.yaml``, the label table.

    Args:
        rank, world_size: label every ``world_size``-th photo, from number ``rank`` on.
    Returns:
        The number of maps made and kept.
    Raises:
        DataError: naming the photo.
    """
    source = FolderSource(root, ["images"])
    keys = source.keys[rank::world_size]
    made = 0
    for key in tqdm(keys, "labelling", unit="images", mininterval=0.5, disable=rank > 0):
        target = root / "seg_maps" / f"{key}.png"
        if target.is_file() and not overwrite:
            continue
        ids = segmenter.label(decode_image(source.read(key, "images"), source.describe(key, "images")))
        write_bytes(target, encode_map(ids))
        made += 1
    if rank == 0:
        table = {"data": {"labels": {"num_classes": len(segmenter.names), "ignore": [255] if len(segmenter.names) < 256
                 else [], "names": list(segmenter.names)}}}  # fmt: skip
        write_bytes(root / "labels.yaml", yaml.safe_dump(table, sort_keys=False).encode())
    return made, len(keys) - made
