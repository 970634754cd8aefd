"""Score generated images, state the evaluation protocol, and write reports.

Knows images, data sets and networks; knows neither checkpoints nor the training loop, which calls it.
"""

METRICS = ("fid", "kid", "precision_recall", "cmmd", "diversity", "segmentation")
NEED_FEATURES = ("fid", "kid", "precision_recall", "cmmd")
REFERENCE_SPLITS = ("train", "val")
