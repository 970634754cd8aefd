"""Choose each image's style code: from a seed, from an image, or between two.

A ``StyleOf`` is a function of a label map's key and the number of the sample, so that neither order nor the number of
processes changes an image.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from imaginaire_spade.data.batch import normalise
from imaginaire_spade.data.image_files import decode_image
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.errors import CheckpointError, DataError
from imaginaire_spade.files import RgbImage, resize_image
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.sizes import scale
from imaginaire_spade.models.encoder import sample_style
from imaginaire_spade.noise import style_noise

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


# ------------------------------------------------------------------------------------------------ of images


def image_styles(model: Model, path: Path, keys: Sequence[str], seed: int = 0, num_samples: int = 1) -> StyleOf:
    """Encode the styles of one image file, or of a folder's (data set's) images.

    A folder's images join the label maps by name (SEQUENCE/STEM). If no name agrees, they take turns: the i-th label
    map, sorted by key, gets the i-th image, and after the last one the first again.

    Args:
        keys: of all label maps.
        num_samples: for 1 an image gets the mean of the encoder's distribution; for more, draws from it.
    Raises:
        CheckpointError: trained without an encoder.
        DataError: no image; or a folder that has images for some label maps only.
    """
    check_has_encoder(model)
    if not path.is_dir():
        styles = [encode_style(model, read_style_image(path))]
        return _around_mean(lambda key: styles[0], seed, num_samples)
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

    return _around_mean(lambda key: encoded(names[key] if names else key), seed, num_samples)


def _around_mean(style_of: Callable[[str], tuple[Tensor, Tensor]], seed: int, num_samples: int) -> StyleOf:
    """Sample around what ``style_of`` gives: key -> (mu, logvar)."""

    def style(key: str, sample: int) -> Tensor:
        mu, logvar = style_of(key)
        return mu if num_samples == 1 else sample_style(mu, logvar, _noise(seed, key, sample, len(mu), num_samples))

    return style


def read_style_image(path: Path) -> RgbImage:
    """Read an image file: RGB uint8 [H, W, 3].

    Raises:
        DataError: no image.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"style image {path}: cannot be read: {error.strerror}") from None
    return decode_image(content, f"style image {path}")


def check_has_encoder(model: Model) -> None:
    """Check that the checkpoint was trained with a style encoder.

    Raises:
        CheckpointError: it was not.
    """
    if model.encoder is None:
        instead = "a seed gives it a style (--style_seed)" if model.generator.style_dims else "it takes no style at all"
        raise CheckpointError(
            f"the style of an image: this checkpoint was trained without a style encoder; {instead}. Take a checkpoint"
            " whose config has encoder: {type: conv}"
        )


@torch.inference_mode()
def encode_style(model: Model, image: RgbImage) -> tuple[Tensor, Tensor]:
    """Encode (mu, logvar) of an image's style, float32 [style_dims] each, on the CPU.

    Args:
        image: RGB uint8 [H, W, 3] of any size.
    Raises:
        CheckpointError: trained without an encoder.
    """
    check_has_encoder(model)
    assert model.encoder is not None
    # Shrunk by area average to about the size of the training images; the encoder's own resizing would alias.
    if model.trained_size and min(model.trained_size) < min(image.shape[:2]):
        image = resize_image(image, *scale((image.shape[0], image.shape[1]), min(model.trained_size)))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(model.device)
    mu, logvar = model.encoder(normalise(pixels))
    return mu[0].float().cpu(), logvar[0].float().cpu()


# ------------------------------------------------------------------------------------------------ between two


def interpolated_styles(start: Tensor, end: Tensor, steps: int) -> StyleOf:
    """Interpolate between two style codes in ``steps`` samples, ends included, the same for every label map."""
    return lambda key, sample: slerp(start, end, sample / (steps - 1))


def style_named(model: Model, name: str) -> Tensor:
    """Return the style code of ``name``, float32 [style_dims]: digits are a seed, all else is an image file.

    Raises:
        CheckpointError: the generator takes no style code, or the checkpoint has no encoder.
        DataError: no image.
    """
    if not model.generator.style_dims:
        raise CheckpointError(
            "this generator takes no style code: a label map has one image, so there is nothing to interpolate"
        )
    if name.isdecimal():
        return style_of_seed(int(name), model.generator.style_dims)
    return encode_style(model, read_style_image(Path(name)))[0]


def slerp(start: Tensor, end: Tensor, place: float) -> Tensor:
    """Interpolate spherically between two style codes, float32 [style_dims]; ``place`` 0..1 (White 2016, "Sampling
    generative networks"). Codes on the way are as long as the ends; linear ones are shorter than any seen in training.
    """
    cosine = torch.dot(start, end) / (start.norm() * end.norm()).clamp_min(1e-12)
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-4:  # parallel: a straight line
        return torch.lerp(start, end, place)
    return (math.sin((1 - place) * angle) * start + math.sin(place * angle) * end) / math.sin(angle)
