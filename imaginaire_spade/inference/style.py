"""Choose each image's style code: from a seed, from an image, or between two.

A ``StyleOf`` is a function of a label map's key and the number of the sample, so that neither order nor the number of
processes changes a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import torch
from torch import Tensor

from imaginaire_spade.data.batch import normalise
from imaginaire_spade.data.image_files import decode_image
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.errors import CheckpointError, DataError
from imaginaire_spade.inference.weights import LoadedModel
from imaginaire_spade.models.encoder import sample_style
from imaginaire_spade.noise import style_noise
from imaginaire_spade.pictures import Picture

StyleOf = Callable[[str, int], Tensor | None]
"""(key, number of the sample) -> style code float32 [style_dims] on the CPU; None for a generator that takes none."""

EVERY_LABEL_MAP = ""
"""The key under which a style code that all label maps share is drawn."""


# ------------------------------------------------------------------------------------------------ of seeds


def drawn_styles(seed: int, style_dims: int, num_samples: int = 1) -> StyleOf:
    """Give each image a random style code for (seed, key, sample); none where ``style_dims`` is 0."""
    return lambda key, sample: _noise(seed, key, sample, style_dims, num_samples) if style_dims else None


def shared_styles(seed: int, style_dims: int) -> StyleOf:
    """Use one style code for all label maps: sample j has that of ``seed + j``; none where ``style_dims`` is 0."""
    return lambda key, sample: style_of_seed(seed + sample, style_dims) if style_dims else None


def style_of_seed(seed: int, style_dims: int) -> Tensor:
    """Return the style code of a seed, the same for every label map: float32 [style_dims]."""
    return style_noise(seed, [EVERY_LABEL_MAP], style_dims)[0]


def _noise(seed: int, key: str, sample: int, style_dims: int, num_samples: int) -> Tensor:
    return style_noise(seed, [key if num_samples == 1 else f"{key}#{sample}"], style_dims)[0]


# ------------------------------------------------------------------------------------------------ of pictures


def picture_styles(model: LoadedModel, path: Path, keys: Sequence[str], seed: int = 0, num_samples: int = 1) -> StyleOf:
    """Encode the styles of one image file, or of a folder's (data set's) images.

    A folder's pictures join the label maps by name (SEQUENCE/STEM). Where no name agrees, they take turns: the i-th
    label map, sorted by key, gets the i-th picture, and after the last one the first again.

    Args:
        keys: of all label maps.
        num_samples: for 1 a picture gets the mean of the encoder's distribution; for more, draws from it.
    Raises:
        CheckpointError: trained without an encoder.
        DataError: no picture; or a folder that has pictures for some label maps only.
    """
    check_has_encoder(model)
    if not path.is_dir():
        styles = [encode_style(model, read_style_picture(path))]
        return _around(lambda key: styles[0], seed, num_samples)
    source = open_source(path, ["images"], bare=True)
    missing = sorted(set(keys) - set(source.keys))
    if missing and len(missing) < len(set(keys)):
        raise DataError(
            f"style images {path}: none for {len(missing)} label map(s): {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Add them; or give one file, or a folder none of whose names is a"
            " label map's: its images take turns"
        )
    names = {key: source.keys[i % len(source.keys)] for i, key in enumerate(sorted(keys))} if missing else None

    @lru_cache(maxsize=256)
    def encoded(name: str) -> tuple[Tensor, Tensor]:
        return encode_style(model, decode_image(source.read(name, "images"), source.describe(name, "images")))

    return _around(lambda key: encoded(names[key] if names else key), seed, num_samples)


def _around(style_of: Callable[[str], tuple[Tensor, Tensor]], seed: int, num_samples: int) -> StyleOf:
    """``style_of``: key -> (mu, logvar)."""

    def style(key: str, sample: int) -> Tensor:
        mu, logvar = style_of(key)
        return mu if num_samples == 1 else sample_style(mu, logvar, _noise(seed, key, sample, len(mu), num_samples))

    return style


def read_style_picture(path: Path) -> Picture:
    """Read an image file: RGB uint8 [H, W, 3]. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"style image {path}: cannot be read: {error.strerror}") from None
    return decode_image(content, f"style image {path}")


def check_has_encoder(model: LoadedModel) -> None:
    """Raise CheckpointError if the checkpoint was trained without a style encoder."""
    if model.encoder is None:
        instead = "a seed gives it a style (--style_seed)" if model.style_dims else "it takes no style at all"
        raise CheckpointError(
            f"the style of an image: this checkpoint was trained without a style encoder; {instead}. Take a checkpoint"
            " whose config has encoder: {type: conv}"
        )


@torch.inference_mode()
def encode_style(model: LoadedModel, picture: Picture) -> tuple[Tensor, Tensor]:
    """Encode (mu, logvar) of an image's style, float32 [style_dims] each, on the CPU.

    Args:
        picture: RGB uint8 [H, W, 3] of any size.
    Raises:
        CheckpointError: trained without an encoder.
    """
    check_has_encoder(model)
    assert model.encoder is not None
    # Shrunk by area average to about the size of the training pictures; the encoder's own resizing would alias.
    scale = min(model.trained_size) / min(picture.shape[:2]) if model.trained_size else 1
    if scale < 1:
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(model.device)
    mu, logvar = model.encoder(normalise(image))
    return mu[0].float().cpu(), logvar[0].float().cpu()


# ------------------------------------------------------------------------------------------------ between two


def interpolated_styles(start: Tensor, end: Tensor, steps: int) -> StyleOf:
    """Interpolate between two style codes in ``steps`` samples, ends included, the same for every label map."""
    return lambda key, sample: between(start, end, sample / (steps - 1))


def style_named(model: LoadedModel, name: str) -> Tensor:
    """Return the style code of ``name``, float32 [style_dims]: digits are a seed, all else is an image file.

    Raises:
        CheckpointError: the generator takes no style code, or the checkpoint has no encoder. DataError: no picture.
    """
    if not model.style_dims:
        raise CheckpointError(
            "this generator takes no style code: a label map has one image, so there is nothing to interpolate"
        )
    if name.isdecimal():
        return style_of_seed(int(name), model.style_dims)
    check_has_encoder(model)
    return encode_style(model, read_style_picture(Path(name)))[0]


def between(start: Tensor, end: Tensor, place: float) -> Tensor:
    """Spherical interpolation (White 2016, "Sampling generative networks"): codes on the way are as long as its ends,
    where a straight line's middle is shorter than any code that training drew. ``place`` 0..1."""
    cosine = torch.dot(start, end) / (start.norm() * end.norm()).clamp_min(1e-12)
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-4:  # parallel: a straight line
        return torch.lerp(start, end, place)
    return (math.sin((1 - place) * angle) * start + math.sin(place * angle) * end) / math.sin(angle)
