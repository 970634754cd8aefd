#!/usr/bin/env bash
# What two packages feed to FID's network from pictures that are not 299x299.
#
# Versions: torchmetrics 1.9.0, torch-fidelity 0.4.0, torch 2.15.0, torchvision 0.29.2, numpy 2.4.6.
# Good guess: torchmetrics' FrechetInceptionDistance runs torch-fidelity's network on torch-fidelity's weights, so with
#   one file of weights both give the same features for any picture.
# Behaviour: only for pictures of 299x299. torchmetrics resizes with antialias unless it is told not to, and differs from
#   torch-fidelity both where pictures shrink (by as much as pictures differ from each other, with this untrained
#   network) and where they grow. With antialias=False the features are torch-fidelity's, to the bit.
# For users: scores of 256x256 or 512x512 pictures by the two are of two protocols. This project's evaluation states
#   its resizing in the report and refuses to compare reports that differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 torchmetrics==1.9.0 torch-fidelity==0.4.0 \
  numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

print(", ".join(f"{name} {version(name)}" for name in ("torchmetrics", "torch-fidelity", "torch")))


class Unloaded(FeatureExtractorInceptionV3):
    """The network before any weights are loaded: there is no download here."""

    def load_state_dict(self, *arguments, **options):
        return None


torch.manual_seed(0)
torch.save({}, "none.pth")
state = Unloaded("inception", ["2048"], "none.pth").state_dict()
for name, value in state.items():
    if value.dim() > 1:
        torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
    elif name.endswith("running_var"):
        value.fill_(1.0)
torch.save(state, "weights.pth")
fidelity = FeatureExtractorInceptionV3("inception", ["2048"], "weights.pth").eval()
metrics = {
    antialias: FrechetInceptionDistance(feature_extractor_weights_path="weights.pth", antialias=antialias).inception
    for antialias in (True, False)
}
as_seen = True
for side in (64, 256, 299, 512):
    smooth = F.interpolate(torch.rand(8, 3, 16, 16), (side, side), mode="bicubic").clamp(0, 1)
    pictures = ((smooth + 0.2 * torch.rand(8, 3, side, side)) / 1.2 * 255).to(torch.uint8)
    with torch.no_grad():
        features = fidelity(pictures)[0]
        others = {name: network(pictures) for name, network in metrics.items()}
    apart = {name: float((other - features).abs().mean() / features.std(0).mean()) for name, other in others.items()}
    print(f"{side}x{side}:", ", ".join(f"antialias={name}: {value:.4f}" for name, value in apart.items()))
    as_seen &= apart[False] == 0 and (apart[True] == 0 if side == 299 else apart[True] > 0.02)
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
# Output seen (2026-12-01, Python 3.11):
#   torchmetrics 1.9.0, torch-fidelity 0.4.0, torch 2.15.0
#   64x64: antialias=True: 0.2441, antialias=False: 0.0000
#   256x256: antialias=True: 0.0408, antialias=False: 0.0000
#   299x299: antialias=True: 0.0000, antialias=False: 0.0000
#   512x512: antialias=True: 0.8390, antialias=False: 0.0000
