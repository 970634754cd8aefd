"""Generate images from label maps, in memory.

Responsible for the way of a label map through the generator: batches of one size, padding and cropping, the messages
about too little memory and damaged weights; and each image's style code: from a seed, from an image, or between two.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.batch import normalise
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.data.photos import decode_photo, to_stored, to_training
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, UserError, is_out_of_memory
from imaginaire_spade.files import AnyImage, refuse_special, resize_image
from imaginaire_spade.inference.local_noise import LocalNoise, NoiseKind, Place, PlacedNoise, stack_noise
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.sizes import scale
from imaginaire_spade.layout import Noise, SemanticLayout
from imaginaire_spade.models.generator import sample_style
from imaginaire_spade.noise import style_noise
from imaginaire_spade.training.step import AUTOCAST

AUTO_TILE = 768
"""Side of a tile: with what it needs around it, about 3 GiB for a generator of 32 filters."""

BATCHES_HELD = 8
"""Label maps waiting for others of their size: at most this many batches."""


@dataclass(frozen=True)
class Request:
    """One image to make."""

    name: str
    labels: Tensor
    """uint8 or int16 [H, W], train ids."""
    edges: Tensor | None = None
    """uint8 [H, W] of 0/1."""
    z: Tensor | LocalNoise | PlacedNoise | None = None
    """float [style_dims]; or noise that differs from place to place."""
    distances: Tensor | None = None
    """float32 [2, H, W]; computed if the generator needs them and they are not given."""
    resize_to: tuple[int, int] | None = None
    """(height, width) to which the image is resized; None: it keeps the label map's."""
    conditions: Tensor | None = None
    """float32 [C, H, W], scaled to [-1, 1]."""
    soft: Tensor | None = None
    """float32 [label channels, H, W]: shares of the classes in each pixel, which then count instead of ``labels``."""

    def padded_size(self, multiple: int) -> tuple[int, int]:
        """Return the smallest (height, width), at least the label map's, that ``multiple`` divides."""
        height, width = self.labels.shape
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple


Convert = Callable[[Tensor, ImageSpec], Tensor]
"""(images float [N, C, H, W] in [-1, 1], what numbers mean) -> what is wanted of them, [N, C, H, W]."""


def synthesise(
    model: Model,
    requests: Iterable[Request],
    batch_size: int = 1,
    *,
    convert: Convert = to_stored,
    tile: int | None = None,
) -> Iterator[tuple[str, AnyImage]]:
    """Generate images: yield (name, image [H, W, C] of the label map's size or ``resize_to``) in arbitrary order.

    By default images have the values and the dtype of the data's files: uint8 RGB, or as ``data.images`` says.

    Requests are taken lazily and wait for others of their padded size, at most ``BATCHES_HELD`` batches of them.

    Args:
        tile: label maps with a longer side are generated in tiles of this side (see ``check_tile``): the same image,
            up to rounding, in the memory of one tile.
    Raises:
        UserError: the device has too little memory, or the network's output is not finite.
    """
    # The next batch is launched before the last one is fetched, so that a GPU does not wait for the host.
    launched: tuple[list[Request], Tensor] | None = None
    for batch in group_by_size(requests, model.generator.size_multiple, batch_size):
        if tile is not None and max(batch[0].labels.shape) > tile:
            yield from ((request.name, _in_tiles(model, request, tile, convert)) for request in batch)
            continue
        previous, launched = launched, (batch, _forward(model, batch))
        if previous is not None:
            yield from _fetch(model, convert, *previous)
    if launched is not None:
        yield from _fetch(model, convert, *launched)


def check_tile(model: Model, given: str | None) -> int | None:
    """Parse ``--tile``: "auto", or the side of a tile in pixels; None: none.

    Raises:
        ConfigError: no such side, too small, or this generator's images depend on the whole label map everywhere.
    """
    if given is None:
        return None
    halo, step = model.generator.halo, model.generator.size_multiple
    if halo is None:
        raise ConfigError(
            "--tile: this generator cannot make tiles that fit together, since every pixel depends on the whole label"
            " map (instance norms, a style code, noise injection or a start map of fixed size). Leave --tile out, and"
            " write a smaller --size"
        )
    if given == "auto":
        return -(-AUTO_TILE // step) * step
    tile = int(given) if given.isdecimal() else 0
    if tile < halo or tile % step:
        raise ConfigError(
            f"--tile {given}: write auto, or a multiple of {step} of at least {halo}, which is what a tile of this"
            " generator needs around it on each side"
        )
    return tile


def _in_tiles(model: Model, request: Request, tile: int, convert: Convert) -> AnyImage:
    """Generate one image in tiles, each with so much around it that it comes out as in the whole."""
    halo, (height, width) = model.generator.halo, request.labels.shape
    assert halo is not None
    if model.layout_spec.has_distances:
        request = replace(request, distances=_distances_of(request))
    z = request.z.place(request.labels) if isinstance(request.z, LocalNoise) else request.z
    whole: AnyImage | None = None
    for top, left in itertools.product(range(0, height, tile), range(0, width, tile)):
        y, x = max(0, top - halo), max(0, left - halo)
        window = slice(y, top + tile + halo), slice(x, left + tile + halo)
        maps: dict[str, Any] = {
            name: value[..., *window] for name, value in vars(request).items()
            if isinstance(value, Tensor) and name != "z"
        }  # fmt: skip
        of_part = z.window(*window) if isinstance(z, PlacedNoise) else z
        part = replace(request, **maps, resize_to=None, z=of_part)
        ((_, made),) = _fetch(model, convert, [part], _forward(model, [part]))
        if whole is None:
            whole = np.empty((height, width, *made.shape[2:]), made.dtype)
        whole[top : top + tile, left : left + tile] = made[top - y :, left - x :][:tile, :tile]
    assert whole is not None
    return resize_image(whole, *(request.resize_to or (height, width)))


def group_by_size(requests: Iterable[Request], multiple: int, batch_size: int) -> Iterator[list[Request]]:
    """Group requests of one padded size into batches of up to ``batch_size``."""
    waiting: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        size = request.padded_size(multiple)
        group = waiting.setdefault(size, [])
        group.append(request)
        if len(group) == batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= BATCHES_HELD * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def pad_to_layout(model: Model, requests: Sequence[Request]) -> SemanticLayout:
    """Stack requests of one padded size, filled up at the bottom and on the right: with don't-care, without edges, by
    the last values of conditions. All of them have soft label maps, or none."""
    spec = model.layout_spec
    height, width = requests[0].padded_size(model.generator.size_multiple)

    def stack(maps: Sequence[Tensor], fill: int) -> Tensor:
        return torch.stack([F.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2]), value=fill) for m in maps])

    labels = stack([request.labels for request in requests], spec.num_classes)
    edges = [request.edges for request in requests if request.edges is not None]
    distances = None
    if spec.has_distances:  # of the label map itself, not of its padding
        distances = stack([_distances_of(request) for request in requests], 0)
    conditions = None
    if spec.num_conditions:
        given = [request.conditions for request in requests if request.conditions is not None]
        below = [(0, width - c.shape[2], 0, height - c.shape[1]) for c in given]
        conditions = torch.stack([F.pad(c, sides, "replicate") for c, sides in zip(given, below, strict=True)])
    layout = SemanticLayout(spec, labels, stack(edges, 0) if edges else None, distances, conditions)
    soft = [request.soft for request in requests if request.soft is not None]
    if not soft:
        return layout
    dense = layout.one_hot()
    for row, shares in zip(dense, soft, strict=True):
        row[: spec.num_label_channels, : shares.shape[1], : shares.shape[2]] = shares
    return SemanticLayout.from_dense(spec, dense, distances)


def _distances_of(request: Request) -> Tensor:
    given = request.distances
    return torch.from_numpy(class_distances(request.labels.numpy())) if given is None else given


def _noise_of(requests: Sequence[Request], layout: SemanticLayout) -> Noise | None:
    """Stack style codes, or noise that differs from place to place, on the device of the requests' layout."""
    given = [request.z for request in requests]
    codes = [z for z in given if isinstance(z, Tensor)]
    if codes:
        return torch.stack(codes).to(layout.device)
    placed = [
        z.place(request.labels) if isinstance(z, LocalNoise) else z
        for request, z in zip(requests, given, strict=True)
        if z is not None and not isinstance(z, Tensor)
    ]
    if not placed:
        return None
    noise = stack_noise(placed, layout.height, layout.width)
    return noise.to(layout.device)


@torch.inference_mode()
def _forward(model: Model, requests: Sequence[Request]) -> Tensor:
    """Generate requests of one padded size: float [N, C, H, W] on the device, padding included."""
    step = 1 if model.one_by_one else len(requests)
    dtype = AUTOCAST[model.precision]
    try:
        images = []
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            layout = pad_to_layout(model, part).to(model.device)
            z = _noise_of(part, layout)
            with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                images.append(model.generator(layout, z))
        return torch.cat(images)
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).partition("\n")[0]
            raise UserError(f"--compile: torch cannot compile this generator here ({reason}); leave it out") from error
        if not is_out_of_memory(error):
            raise
        height, width = requests[0].padded_size(model.generator.size_multiple)
        raise UserError(
            f"{requests[0].name}: not enough memory on {model.device} for {step} image(s) of {height}x{width} at once. "
            + ("Write a smaller --batch_size" if step > 1 else "Make the label map smaller, or use a machine with more")
        ) from None


def _fetch(
    model: Model, convert: Convert, requests: Sequence[Request], images: Tensor
) -> Iterator[tuple[str, AnyImage]]:
    """Yield a batch's (name, image), cropped and resized."""
    finite = images.isfinite().flatten(1).all(1).cpu()
    pixels = convert(images, model.config.data.images).permute(0, 2, 3, 1).cpu().numpy()
    for request, image, is_finite in zip(requests, pixels, finite.tolist(), strict=True):
        if not is_finite:
            raise UserError(
                f"{request.name}: the generator's output is not finite. The weights are damaged, or training had"
                " diverged: try an earlier checkpoint, or --weights raw"
            )
        height, width = request.labels.shape
        yield request.name, resize_image(image[:height, :width], *(request.resize_to or (height, width)))


StyleOf = Callable[[str, int], Tensor | LocalNoise | None]
"""(key, number of the sample) -> style code float32 [style_dims] on the CPU, or noise that differs from place to place;
None for a generator that takes none.

A function of these two, so that neither order nor the number of processes changes an image.
"""

EVERY_LABEL_MAP = ""
"""The key under which a style code that all label maps share is drawn."""


# -------------------------------------------------------------------------------------- style codes of seeds


def drawn_styles(seed: int, style_dims: int, num_samples: int = 1) -> StyleOf:
    """Give each image a random style code for (seed, key, sample); none where ``style_dims`` is 0."""
    return lambda key, sample: _noise(seed, key, sample, style_dims, num_samples) if style_dims else None


def shared_styles(seed: int, style_dims: int) -> StyleOf:
    """Use one style code for all label maps: sample j has that of ``seed + j``; none where ``style_dims`` is 0."""
    return lambda key, sample: style_of_seed(seed + sample, style_dims) if style_dims else None


def style_of_seed(seed: int, style_dims: int) -> Tensor:
    """Return the style code of a seed, the same for every label map: float32 [style_dims]."""
    return style_noise(seed, [EVERY_LABEL_MAP], style_dims)[0]


def local_styles(
    style_of: StyleOf, kind: NoiseKind, seed: int, anew: Sequence[tuple[Place, int]], style_dims: int,
    *, num_samples: int = 1, shared: bool = False,
) -> StyleOf:  # fmt: skip
    """Give each image noise that differs from place to place: by class, region or pixel, or by image with some parts
    anew.

    Args:
        style_of: gives the vector of noise by image.
        seed, num_samples: as in ``drawn_styles``; ``shared``: as in ``shared_styles``.
        anew: parts of every image, each with its own seed.
    """

    def style(key: str, sample: int) -> LocalNoise:
        more, of = (sample, EVERY_LABEL_MAP) if shared else (0, _sample_key(key, sample, num_samples))
        parts = tuple((place, other + more) for place, other in anew)
        base = style_of(key, sample) if kind == "image" else None
        assert not isinstance(base, LocalNoise)
        return LocalNoise(kind, style_dims, seed + more, of, base, parts)

    return style


def _noise(seed: int, key: str, sample: int, style_dims: int, num_samples: int) -> Tensor:
    return style_noise(seed, [_sample_key(key, sample, num_samples)], style_dims)[0]


def _sample_key(key: str, sample: int, num_samples: int) -> str:
    return key if num_samples == 1 else f"{key}#{sample}"


# -------------------------------------------------------------------------------------- style codes of images


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
        styles = [encode_style(model, read_style_image(model, path))]
        return _around_mean(lambda key: styles[0], seed, num_samples)
    source = open_source(path, ["images"], bare=True)
    source.spell_as(keys)
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
        data, where = source.read(name, "images"), source.describe(name, "images")
        return encode_style(model, decode_photo(data, where, model.config.data.images))

    return _around_mean(lambda key: encoded(names[key] if names else key), seed, num_samples)


def _around_mean(style_of: Callable[[str], tuple[Tensor, Tensor]], seed: int, num_samples: int) -> StyleOf:
    """Sample around what ``style_of`` gives: key -> (mu, logvar)."""

    def style(key: str, sample: int) -> Tensor:
        mu, logvar = style_of(key)
        return mu if num_samples == 1 else sample_style(mu, logvar, _noise(seed, key, sample, len(mu), num_samples))

    return style


def read_style_image(model: Model, path: Path) -> AnyImage:
    """Read an image file, which must be as the model's ``data.images`` says: [H, W, C], values as in the file.

    Raises:
        DataError: no image.
    """
    refuse_special(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"style image {path}: cannot be read: {error.strerror}") from None
    return decode_photo(content, f"style image {path}", model.config.data.images)


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
def encode_style(model: Model, image: AnyImage) -> tuple[Tensor, Tensor]:
    """Encode (mu, logvar) of an image's style, float32 [style_dims] each, on the CPU.

    Args:
        image: [H, W, C] of any size, with the values of the data's files (uint8 RGB, or as ``data.images`` says).
    Raises:
        CheckpointError: trained without an encoder.
    """
    check_has_encoder(model)
    assert model.encoder is not None
    image = to_training(image, model.config.data.images)
    # Shrunk by area average to about the size of the training images; the encoder's own resizing would alias.
    if model.trained_size and min(model.trained_size) < min(image.shape[:2]):
        image = resize_image(image, *scale((image.shape[0], image.shape[1]), min(model.trained_size)))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(model.device)
    mu, logvar = model.encoder(normalise(pixels))
    return mu[0].float().cpu(), logvar[0].float().cpu()


# -------------------------------------------------------------------------------------- style codes between two


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
    check_has_encoder(model)
    return encode_style(model, read_style_image(model, Path(name)))[0]


def slerp(start: Tensor, end: Tensor, place: float) -> Tensor:
    """Interpolate spherically between two style codes, float32 [style_dims]; ``place`` 0..1 (White 2016, "Sampling
    generative networks"). Codes on the way are as long as the ends; linear ones are shorter than any seen in training.
    """
    cosine = torch.dot(start, end) / (start.norm() * end.norm()).clamp_min(1e-12)
    angle = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(angle) < 1e-4:  # parallel: a straight line
        return torch.lerp(start, end, place)
    return (math.sin((1 - place) * angle) * start + math.sin(place * angle) * end) / math.sin(angle)
