"""Label maps for photos that have none, by a segmentation network (``scripts/label_images.py``).

Owns what a segmenter is here (photos in, ids out, names of its classes) and the loop over a folder.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from imaginaire_spade.data.decode import decode_image
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.pictures import write_bytes

# ImageNet's, which torchvision's segmenters were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Segmenter:
    """A network that gives every pixel a class."""

    names: tuple[str, ...]
    scores: Callable[[NDArray[np.uint8]], Tensor]
    """RGB uint8 [H, W, 3] -> float [classes, h, w], of any size."""

    def label(self, photo: NDArray[np.uint8]) -> NDArray[np.uint8 | np.uint16]:
        """RGB uint8 [H, W, 3] -> ids uint8 (uint16 beyond 256 classes) [H, W]."""
        with torch.inference_mode():
            scores = functional.interpolate(self.scores(photo)[None].float(), photo.shape[:2], mode="bilinear")
            ids = scores[0].argmax(0).cpu().numpy()
        return ids.astype(np.uint8 if len(self.names) <= 256 else np.uint16)


def hugging_face_segmenter(model: str, device: torch.device) -> Segmenter:
    """Any semantic segmentation model of the hub (id) or of a local folder. Raises ConfigError."""
    try:
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    except ImportError:
        raise ConfigError(
            "--model needs the package transformers: pip install 'imaginaire_spade[eval]' (or give --deeplab WEIGHTS)"
        ) from None
    try:
        processor = AutoImageProcessor.from_pretrained(model)
        network = AutoModelForSemanticSegmentation.from_pretrained(model).to(device).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: not usable for semantic segmentation: {error}") from None
    names = tuple(network.config.id2label[i] for i in range(network.config.num_labels))

    def scores(photo: NDArray[np.uint8]) -> Tensor:
        inputs = processor(images=photo, return_tensors="pt").to(device)
        return network(**inputs).logits[0]

    return Segmenter(names, scores)


def deeplab_segmenter(weights: Path, names: Sequence[str], device: torch.device) -> Segmenter:
    """torchvision's DeepLabV3 (ResNet-50) with the weights of a file; the classes are counted there.

    Raises:
        ConfigError: unreadable, another architecture, or another number of names.
    """
    from torchvision.models.segmentation import deeplabv3_resnet50

    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        num_classes = len(state["classifier.4.bias"])
        network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=num_classes)
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith("aux_classifier.")})
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"--deeplab {weights}: no weights of torchvision's deeplabv3_resnet50: {error}") from None
    if names and len(names) != num_classes:
        raise ConfigError(f"--names has {len(names)} names; {weights} has {num_classes} classes")
    network.to(device).eval()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _STD))

    def scores(photo: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(photo).to(device).permute(2, 0, 1).float() / 255
        return network(((pixels - mean) / std)[None])["out"][0]

    return Segmenter(tuple(names) or tuple(f"class {i}" for i in range(num_classes)), scores)


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
        ids = segmenter.label(decode_image(source.read(key, "images"), source.where(key, "images")))
        write_bytes(target, cv2.imencode(".png", ids)[1].tobytes())
        made += 1
    if rank == 0:
        table = {"data": {"labels": {"num_classes": len(segmenter.names), "ignore": [255] if len(segmenter.names) < 256
                 else [], "names": list(segmenter.names)}}}  # fmt: skip
        write_bytes(root / "labels.yaml", yaml.safe_dump(table, sort_keys=False).encode())
    return made, len(keys) - made
