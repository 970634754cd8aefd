"""Turn downloads and photos into raw folders. Nothing that trains or generates imports this."""

NAMES = (
    "cocostuff", "ade20k", "ade20k_outdoor", "cityscapes", "camvid", "facades", "landscapes", "custom", "celebamask_hq",
    "isprs", "loveda", "coco", "cvat", "voc", "labelme", "label_studio", "parts", "ade20k_full", "mapillary",
)  # fmt: skip
"""What can be prepared (the functions: ``prepare.DATASETS`` and ``TOOLS``)."""
BORDERS = {"instances": ("inst_maps",), "labels": ("seg_maps",), "both": ("seg_maps", "inst_maps")}
"""Whose borders an edge map marks -> the data types that it is made from."""
