"""Read photos as ``data.images`` says: bit depth, channels and orientation; and write generated images likewise.

Responsible for what the numbers of a photo mean. Nothing is converted in silence: what differs from ``ImageSpec`` is
refused, and the message names the key. 8-bit grey and RGB are decoded by ``image_files.decode_image``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.batch import denormalise
from imaginaire_spade.data.file_structure import NPY, NPZ, PNG, TIFF, is_jpeg, jpeg_frame, png_chunks, tiff_tags
from imaginaire_spade.data.image_files import check_size, decode_image, image_size, imdecode, open_image, read_array
from imaginaire_spade.data.lmdb_source import MANIFEST
from imaginaire_spade.distributed import to_double
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import AnyImage, RgbImage, read_json

MAX_TILE = 4096
"""Longest side of a TIFF's tiles."""
_KINDS = {1: "uint", 2: "int", 3: "float"}  # a TIFF's SampleFormat


class Header(NamedTuple):
    """A photo as its file's header describes it."""

    size: tuple[int, int]
    """(height, width) of the stored pixels."""
    dtype: str = "uint8"
    channels: int = 3
    """Alpha included."""
    has_alpha: bool = False
    orientation: int = 1
    """By EXIF or TIFF, 1 to 8; 1: as stored."""
    array: AnyImage | None = None
    """What a NumPy file holds."""

    def shown_size(self, upright: bool) -> tuple[int, int]:
        """Return (height, width) of the stored or of the upright pixels."""
        return self.size[::-1] if upright and self.orientation >= 5 else self.size


def read_header(data: bytes, where: str) -> Header:
    """Read what a photo is, without decoding it.

    Raises:
        DataError: no image, of too many pixels, or a NumPy file that holds no image.
    """
    if frame := jpeg_frame(data):
        return Header(
            check_size(frame[1], frame[0], where), orientation=_orientation(tiff_tags(frame[2][6:])) if frame[2] else 1
        )
    if data.startswith((NPY, NPZ)):
        array = _as_photo(read_array(data, where), where)
        size = check_size(array.shape[0], array.shape[1], where)
        return Header(size, array.dtype.name, array.shape[2] if array.ndim == 3 else 1, array=array)
    if data.startswith(TIFF) and {256, 257} <= (tags := tiff_tags(data, where)).keys():
        channels, kind = tags.get(277, 1), _KINDS.get(tags.get(339, 1), "uint")
        dtype = f"{kind}{max(8, 1 << (tags.get(258, 1) - 1).bit_length())}"
        if tags.get(262) == 5:
            raise DataError(f"{where}: a TIFF of CMYK colours: convert it to RGB")
        if (tile := max(tags.get(322, 0), tags.get(323, 0))) > MAX_TILE:  # decoded whole, however small the image is
            raise DataError(f"{where}: a TIFF of tiles of {tile} pixels: save it with tiles of at most {MAX_TILE}")
        if tags.get(262) == 3 and channels == 1:  # a palette
            channels, dtype = 3, "uint8"
        size = check_size(tags[257], tags[256], where)
        return Header(size, dtype, channels, tags.get(338) in (1, 2), _orientation(tags))
    size = image_size(data, where)
    if data.startswith(PNG):
        colour, chunks = data[25], dict(png_chunks(data, where, (b"tRNS", b"eXIf")))
        has_alpha, exif = colour in (4, 6) or b"tRNS" in chunks, chunks.get(b"eXIf", b"")[8:-4]
        channels = (1 if colour in (0, 4) else 3) + has_alpha
        return Header(size, f"uint{max(8, data[24])}", channels, has_alpha, _orientation(tiff_tags(exif)))
    if data[:4] == b"RIFF":
        image = open_image(data, where)
        has_alpha, exif = image.mode == "RGBA", image.info.get("exif", b"").removeprefix(b"Exif\0\0")
        return Header(size, "uint8", 3 + has_alpha, has_alpha, _orientation(tiff_tags(exif)))
    return Header(size)


def is_upright(header: Header, spec: ImageSpec, label_size: tuple[int, int] | None, where: str) -> bool:
    """Return whether a photo's pixels are turned as its EXIF orientation says.

    Args:
        label_size: (height, width) of its label map; None: it has none, and pixels stay as they are stored.
    Raises:
        DataError: the size of the label map does not tell, or is another.
    """
    if header.orientation == 1 or (label_size is None and spec.orientation is None):
        return False
    upright = header.shown_size(True) == label_size if spec.orientation is None else spec.orientation == "upright"
    way = "upright" if upright else "stored"
    problem = (
        f"{label_size}, its label map's (height, width), is not that of the {way} photo, {header.shown_size(upright)}"
    )
    if spec.orientation is None and header.shown_size(True) == header.size:
        problem = "sizes do not tell whether its label map is of the photo as shown (upright) or of the stored pixels"
    elif label_size in (None, header.shown_size(upright)):
        return upright
    turns = "mirrored" if header.orientation in (2, 4, 5, 7) else "turned"
    raise DataError(
        f"{where}: viewers show it {turns} (EXIF orientation {header.orientation}), and {problem}: write"
        " data.images.orientation: upright, or stored"
    )


def decode_photo(
    data: bytes, where: str, spec: ImageSpec, *, upright: bool = False, header: Header | None = None, reduction: int = 1
) -> AnyImage:
    """Decode a photo: [H, W, channels], values as in the file; uint8 unless ``spec`` has a range.

    Args:
        upright: turn it as its EXIF orientation says (``is_upright``).
        header: of ``data``, if it is known already.
        reduction: as of ``decode_image``; 1 where ``upright``.
    Raises:
        DataError: unreadable, or not as ``spec`` says.
    """
    header = header or read_header(data, where)
    _check_header(header, spec, where)
    is_tiff = data.startswith(TIFF)
    if header.array is not None:
        array = header.array
    elif is_jpeg(data) or (header.dtype == "uint8" and not header.has_alpha and header.channels <= 3):
        array = decode_image(data, where, reduction=reduction)
    else:
        array = _decode_whole(data, where, header)
    if header.has_alpha and spec.drop_alpha and array.ndim == 3 and array.shape[2] in (2, 4):
        array = array[..., :-1]
    array = _with_channels(array, spec, where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        number = array.size - int(np.isfinite(array).sum())
        raise DataError(f"{where}: {number} value(s) are not finite (NaN or infinite): replace them, such as by 0")
    if upright == is_tiff or header.orientation == 1:  # OpenCV turns TIFFs, and them alone
        return array
    inverse = {6: 8, 8: 6}.get(header.orientation, header.orientation)
    return np.ascontiguousarray(_turn(array, header.orientation if upright else inverse))


def decode_stored(data: bytes, where: str, *, upright: bool = False) -> AnyImage:
    """Decode a photo with the depth, the channels and the orientation that it is stored in: [H, W, C].

    Args:
        upright: turn it as its EXIF orientation says.
    Raises:
        DataError: unreadable.
    """
    header = read_header(data, where)
    any_range = None if header.dtype == "uint8" else (0.0, 1.0)
    spec = ImageSpec(channels=header.channels, range=any_range)
    return decode_photo(data, where, spec, upright=upright, header=header)


def to_training(array: AnyImage, spec: ImageSpec) -> AnyImage:
    """Scale a photo of ``decode_photo``, of any shape: float32 0..255 if ``spec`` has a range, clipped; else itself."""
    if spec.range is None:
        return array
    low, high = spec.limits
    return ((array.astype(np.float32) - low) * np.float32(255 / (high - low))).clip(0, 255)


def to_stored(images: Tensor, spec: ImageSpec) -> Tensor:
    """Convert generated images, floats in [-1, 1] of any shape, to the values and the dtype of the data's files."""
    if spec.range is None:
        return denormalise(images)
    low, high = spec.limits
    values = (to_double(images).clamp(-1, 1) + 1) * ((high - low) / 2) + low
    return (values if spec.dtype == "float32" else values.round()).to(getattr(torch, spec.dtype))


def to_preview(images: Tensor, spec: ImageSpec) -> Tensor:
    """Show generated images, floats [..., C, H, W] in [-1, 1], as uint8 RGB [..., 3, H, W] (``spec.preview``)."""
    return photo_preview(denormalise(images), spec)


def photo_preview(images: Tensor, spec: ImageSpec) -> Tensor:
    """Show photos of a batch, uint8 or floats [..., C, H, W] of 0..255, as uint8 RGB [..., 3, H, W]."""
    shown = images.round().to(torch.uint8) if images.is_floating_point() else images
    chosen = spec.preview or ((0, 1, 2) if spec.channels >= 3 else (0, 0, 0))
    return shown if chosen == (0, 1, 2) and spec.channels == 3 else shown[..., chosen, :, :]


def show(image: AnyImage, spec: ImageSpec) -> RgbImage:
    """Show an image in the values of the data's files, [H, W, C] or [H, W], as uint8 RGB [H, W, 3]."""
    channels = torch.from_numpy(to_training(image if image.ndim == 3 else image[..., None], spec)).permute(2, 0, 1)
    return np.ascontiguousarray(photo_preview(channels, spec).permute(1, 2, 0).numpy())


def measured(spec: ImageSpec, roots: Sequence[str | Path]) -> ImageSpec:
    """Replace ``range: auto`` by the minimum and maximum over all of ``roots``, which the builder measured.

    Raises:
        DataError: it measured none; or a data set was built, and so checked, under another ``data.images``.
    """
    found = [built_images(root).get("values") for root in roots]
    values = [value for pair in found for value in pair or ()]
    if spec.range == "auto" and (None in found or not min(values) < max(values)):
        raise DataError(
            f"data.images.range: auto: scripts/build_lmdb.py measured no values of {', '.join(map(str, roots))}: build"
            " it with this config, or write data.images.range: [LOW, HIGH]"
        )
    own = spec.model_dump(mode="json")
    for root in filter(built_images, roots):
        built = built_spec(root).model_copy(update={"preview": spec.preview})
        built = built.model_copy(update={"range": spec.range}) if built.range and spec.range else built
        differ = {key: value for key, value in built.model_dump(mode="json").items() if value != own[key]}
        if differ:
            raise DataError(f"{root} was built with other data.images: write {json.dumps(differ)}, or build it anew")
    return spec.model_copy(update={"range": (min(values), max(values))}) if spec.range == "auto" else spec


def built_images(root: str | Path) -> dict[str, Any]:
    """Read what the builder wrote of a data set's photos; {} where there is nothing of it."""
    path = Path(root, MANIFEST)
    manifest = read_json(path) if path.is_file() else {}
    found = manifest.get("images") if isinstance(manifest, dict) else None
    return found if isinstance(found, dict) else {}


def built_spec(root: str | Path) -> ImageSpec:
    """Return what the photos of a data set mean: as it was built, else 8-bit RGB.

    Raises:
        DataError: its manifest does not say so.
    """
    try:
        return ImageSpec.model_validate_json(json.dumps(built_images(root).get("spec", {})))
    except ValueError as error:
        raise DataError(f"{Path(root, MANIFEST)}: no usable data.images: {error}") from None


def _check_header(header: Header, spec: ImageSpec, where: str) -> None:
    """Refuse a photo that is not as the config says, with the line to write."""
    kind, channels = header.dtype.rstrip("0123456789"), header.channels - (header.has_alpha and spec.drop_alpha)
    example = {"float": "[0.0, 3000.0]", "int": "[-1024, 3071]", "uint": "[0, 4095]"}[kind]
    wrong = ""
    if header.dtype != "uint8" and spec.range is None:
        bits, also = header.dtype.removeprefix(kind), f"channels: {channels}, " * (channels != spec.channels)
        wrong = (
            f"{'signed ' * (kind == 'int')}{bits} bits per channel{' (floats)' * (kind == 'float')}, and no range is"
            f" given: write data.images: {{{also}range: auto}} (scripts/build_lmdb.py measures minimum and maximum), or"
            f" the range that is meant, such as {example}"
        )
    elif kind == "float" and spec.range != "auto" and spec.dtype != "float32":
        wrong = f"floats, and the range is of integers: write data.images.range: {[float(v) for v in spec.limits]}"
    elif header.has_alpha and not spec.drop_alpha and header.channels != spec.channels:
        wrong = (
            "an alpha channel (transparency): write data.images.drop_alpha: true to leave it out, or"
            f" data.images.channels: {header.channels} to train on it"
        )
    elif channels != spec.channels and {channels, spec.channels} != {1, 3}:
        wrong = f"{channels} channel(s) (bands), not {spec.channels}: write data.images.channels: {channels}"
    if wrong:
        raise DataError(f"{where}: a photo of {wrong}")


def _with_channels(array: AnyImage, spec: ImageSpec, where: str) -> AnyImage:
    """Bring [H, W] or [H, W, C] to ``spec.channels``: grey to R = G = B and back, and nothing else."""
    array = array if array.ndim == 3 else array[..., None]
    if array.shape[2] == spec.channels:
        return array
    if spec.channels == 3 and array.shape[2] == 1:
        return array.repeat(3, 2)
    if spec.channels == 1 and array.shape[2] == 3 and (array == array[..., :1]).all():
        return array[..., :1]
    found, wanted = array.shape[2], spec.channels
    raise DataError(f"{where}: a photo of {found} channels, not {wanted}: write data.images.channels: {found}")


def _decode_whole(data: bytes, where: str, header: Header) -> AnyImage:
    """Decode a file at its own depth, with all its channels."""
    if header.channels > 4:
        raise DataError(
            f"{where}: an image of {header.channels} bands; files of more than 4 are read as .npy [H, W, C]"
        )
    is_png = data.startswith(PNG) and header.channels == 2
    if header.dtype == "uint8" and (is_png or (data.startswith(TIFF) and tiff_tags(data).get(338) == 2)):
        try:  # OpenCV would multiply a TIFF's colours by alpha, and makes four channels of two, or one
            image = open_image(data, where)
            return np.asarray(image.convert("LA") if is_png and png_chunks(data, where, (b"IDAT",)) else image)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: not readable as an image: {error}") from None
    array = imdecode(data, cv2.IMREAD_UNCHANGED, where)
    if header.channels == 2 and array.ndim == 3 and array.shape[2] == 4:
        return array[..., [0, 3]]  # grey with alpha
    return array if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]


def _turn(array: AnyImage, orientation: int) -> AnyImage:
    """Turn stored pixels [H, W, ...] as an EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    return array[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _as_photo(array: AnyImage, where: str) -> AnyImage:
    """Check that an array is a photo: numbers [H, W] or [H, W, C]."""
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "uif":
        raise DataError(f"{where}: {array.dtype} {list(array.shape)}; a photo is numbers [height, width, channels]")
    if array.ndim == 3 and array.shape[0] < 16 < array.shape[2]:
        raise DataError(f"{where}: an array {list(array.shape)}: bands come last: save np.moveaxis(array, 0, -1)")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _orientation(tags: Mapping[int, int]) -> int:
    return tags.get(274, 1) if 1 <= tags.get(274, 1) <= 8 else 1
