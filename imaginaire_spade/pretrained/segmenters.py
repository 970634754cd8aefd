"""Load segmentation networks: photos in, ids out, names of the classes, and which weights these are.

They label photos that have no label map (``scripts/label_images.py``) and score generated images (``evaluation``).
"""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from imaginaire_spade.errors import ConfigError, how_to_install
from imaginaire_spade.pretrained.weights import network_sha256

# ImageNet's, which torchvision's segmenters were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SETTINGS = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""Of an image processor of transformers: those that change the network's input."""


@dataclass(frozen=True)
class Segmenter:
    """A network that gives every pixel a class."""

    names: tuple[str, ...]
    scores: Callable[[NDArray[np.uint8]], Tensor]
    """RGB uint8 [H, W, 3] -> float [classes, h, w], of any size."""
    model: str = ""
    """What the user called it."""
    sha256: str = ""
    """Of the weights (names and bytes of all tensors); empty where no score depends on it."""
    preprocessing: str = ""
    """What is done to a photo first, as JSON; likewise."""

    def label(self, photo: NDArray[np.uint8], size: tuple[int, int] | None = None) -> NDArray[np.uint8 | np.uint16]:
        """Label a photo: RGB uint8 [H, W, 3] -> ids uint8 (uint16 beyond 256 classes) of ``size`` (height, width), else
        of the photo's.

        The class scores are resized (bilinear), then the highest is taken.
        """
        with torch.inference_mode():
            scores = functional.interpolate(self.scores(photo)[None].float(), size or photo.shape[:2], mode="bilinear")
            ids = scores[0].argmax(0).cpu().numpy()
        return ids.astype(np.uint8 if len(self.names) <= 256 else np.uint16)


def hugging_face_segmenter(model: str, device: torch.device, flag: str = "--model") -> Segmenter:
    """Load any semantic segmentation model of the hub (id) or of a local folder: one class score per pixel (SegFormer,
    UPerNet, DPT, BEiT, ...) or masks with classes (MaskFormer, Mask2Former).

    Args:
        flag: what to call the setting in messages.
    Raises:
        ConfigError: transformers is not installed, or the model cannot be used.
    """
    otherwise = " (or give --deeplab WEIGHTS)" if flag == "--model" else ""
    with how_to_install("transformers", f"{flag} needs the package transformers", otherwise):
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    transformers.utils.logging.disable_progress_bar()
    try:
        model_type = transformers.AutoConfig.from_pretrained(model).model_type
        by_masks = model_type in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
        processor = transformers.AutoImageProcessor.from_pretrained(model)
        kind = "AutoModelForUniversalSegmentation" if by_masks else "AutoModelForSemanticSegmentation"
        network = getattr(transformers, kind).from_pretrained(model).to(device).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{flag} {model}: not usable for semantic segmentation: {error}") from None
    names = tuple(network.config.id2label[i] for i in range(network.config.num_labels))

    def scores(photo: NDArray[np.uint8]) -> Tensor:
        outputs = network(**processor(images=photo, return_tensors="pt").to(device))
        if not by_masks:
            return outputs.logits[0]
        classes = outputs.class_queries_logits[0].softmax(-1)[:, :-1]  # the last is "no object"
        return torch.einsum("qc,qhw->chw", classes, outputs.masks_queries_logits[0].sigmoid())

    settings = processor.to_dict()
    preprocessing = json.dumps({key: settings[key] for key in _SETTINGS if key in settings}, default=str)
    return Segmenter(names, scores, model, network_sha256(network), preprocessing)


def deeplab_segmenter(weights: Path, names: Sequence[str], device: torch.device) -> Segmenter:
    """Load torchvision's DeepLabV3 (ResNet-50) with the weights of a file; the classes are counted there.

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

    return Segmenter(tuple(names) or tuple(f"class {i}" for i in range(num_classes)), scores, str(weights))
