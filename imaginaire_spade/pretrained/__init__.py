"""Load networks with pretrained weights, for losses and evaluation. Nothing is downloaded: weights come from files."""

BACKBONES = ("efficientnet_lite0", "efficientnet_lite2", "torchvision:NAME", "timm:NAME")
FEATURES = ("inception", *BACKBONES, "dinov2", "clip")
"""Networks of scores, as ``--features`` names them; ``:WEIGHTS`` may follow."""
FEATURE_DIMS = (64, 192, 768, 2048)
"""Of the Inception network's layers that can be asked for; 2048: that of FID."""
RESIZES = ("legacy", "clean")
