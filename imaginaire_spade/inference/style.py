"""Style codes: of a seed, of a picture, and between two."""

from __future__ import annotations

from pathlib import Path

import cv2
import torch
from torch import Tensor

from imaginaire_spade.data.dataset import normalise
from imaginaire_spade.data.decode import decode_image
from imaginaire_spade.errors import CheckpointError, DataError
from imaginaire_spade.inference.weights import LoadedModel
from imaginaire_spade.noise import style_noise
from imaginaire_spade.pictures import Picture

EVERY_LABEL_MAP = ""
"""The key under which a style code that all label maps share is drawn."""


def style_of_seed(seed: int, style_dims: int) -> Tensor:
    """The style code of a seed, the same for every label map: float32 [style_dims]."""
    return style_noise(seed, [EVERY_LABEL_MAP], style_dims)[0]


def read_style_picture(path: Path) -> Picture:
    """A picture's file: RGB uint8 [H, W, 3]. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"style picture {path}: cannot be read: {error.strerror}") from None
    return decode_image(content, f"style picture {path}")


def check_has_encoder(model: LoadedModel) -> None:
    """Raises CheckpointError where the checkpoint was trained without a style encoder."""
    if model.encoder is None:
        instead = "a seed gives it a style (--style_seed)" if model.style_dims else "it takes no style at all"
        raise CheckpointError(
            f"the style of a picture: this checkpoint was trained without a style encoder; {instead}. Take a checkpoint"
            " whose config has encoder: {type: conv}"
        )


@torch.inference_mode()
def encode_style(model: LoadedModel, picture: Picture) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of a picture's style, float32 [style_dims] each, on the CPU.

    Args:
        picture: RGB uint8 [H, W, 3] of any size.
    Raises:
        CheckpointError: trained without an encoder.
    """
    check_has_encoder(model)
    assert model.encoder is not None
    # Shrunk by area average to about the size of the training pictures; the encoder's own resizing would alias.
    trained_at = model.config.data.train.augmentations.output_h_w
    scale = min(trained_at) / min(picture.shape[:2]) if trained_at else 1
    if scale < 1:
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(model.device)
    mu, logvar = model.encoder(normalise(image))
    return mu[0].float().cpu(), logvar[0].float().cpu()
