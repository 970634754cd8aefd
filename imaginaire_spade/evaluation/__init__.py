"""Score generated images, state the evaluation protocol, and write reports.

Knows images, data sets and networks; knows neither checkpoints nor the training loop, which calls it.
"""

from collections.abc import Sequence

from imaginaire_spade.errors import ConfigError

METRICS = ("fid", "kid", "precision_recall", "cmmd", "diversity", "segmentation")
NEED_FEATURES = ("fid", "kid", "precision_recall", "cmmd")
REFERENCE_SPLITS = ("train", "val")


def check_metrics(metrics: Sequence[str], features: str, setting: str) -> None:
    """Raise ConfigError if a metric is not one of this network.

    Args:
        features, setting: the network, and the flag or key that gave it.
    """
    if "cmmd" in metrics and features.partition(":")[0] != "clip":
        raise ConfigError(f"the metric cmmd is a distance of CLIP's features: write {setting} clip")
