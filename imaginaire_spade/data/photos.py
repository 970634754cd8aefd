"""Read photos as ``data.images`` says: bit depth, channels and orientation; and write generated images likewise.

Responsible for what the numbers of a photo mean. Nothing is converted in silence: what differs from ``ImageSpec`` is
refused, and the message names the key. 8-bit grey and RGB are decoded by ``image_files.decode_image``.
"""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.batch import denormalise
from imaginaire_spade.data.image_files import check_size, decode_image, image_size, is_jpeg, jpeg_frame, open_image
from imaginaire_spade.data.lmdb_source import MANIFEST
from imaginaire_spade.errors import DataError
from imaginaire_spade.files import AnyImage, RgbImage, read_json

NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_KINDS = {1: "uint", 2: "int", 3: "float"}  # a TIFF's SampleFormat
SHOWN = {
    2: "mirrored", 3: "upside down", 4: "mirrored upside down", 5: "mirrored and turned by 90 degrees",
    6: "turned by 90 degrees", 7: "mirrored and turned by 90 degrees", 8: "turned by 90 degrees",
}  # fmt: skip
"""EXIF orientation -> how stored pixels are shown."""


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

    def shown_size(self, upright: bool) -> tuple[int, int]:
        """Return (height, width) of the stored or of the upright pixels."""
        return self.size[::-1] if upright and self.orientation >= 5 else self.size


def read_header(data: bytes, where: str) -> Header:
    """Read what a photo is, without decoding it.

    Raises:
        DataError: no image, of too many pixels, or a NumPy file that holds no image.
    """
    if frame := jpeg_frame(data):
        exif = frame[2]
        return Header(image_size(data, where), orientation=_orientation(exif) if exif else 1)
    if data.startswith((NPY, NPZ)):
        shape, stored, _, _ = _open_numpy(data, where)
        return Header((shape[0], shape[1]), stored.name, shape[2] if len(shape) == 3 else 1)
    if data.startswith(_TIFF) and {256, 257} <= (tags := _tiff_tags(data)).keys():
        channels, bits = tags.get(277, 1), tags.get(258, 1)
        dtype = f"{_KINDS.get(tags.get(339, 1), 'uint')}{max(8, 1 << (bits - 1).bit_length())}"
        if tags.get(262) == 3 and channels == 1:  # a palette
            channels, dtype = 3, "uint8"
        return Header(
            check_size(tags[257], tags[256], where), dtype, channels, tags.get(338) in (1, 2), tags.get(274, 1)
        )
    size = image_size(data, where)
    if data.startswith(b"\x89PNG"):
        colour, chunks = data[25], dict(_chunks(data, 8, ">", 12))
        has_alpha = colour in (4, 6) or b"tRNS" in chunks
        dtype = "uint16" if data[24] == 16 else "uint8"
        channels = (1 if colour in (0, 4) else 3) + has_alpha
        return Header(size, dtype, channels, has_alpha, _orientation(chunks.get(b"eXIf", b"")))
    if data[:4] == b"RIFF":
        chunks = dict(_chunks(data, 12, "<", 8))
        lossless = chunks.get(b"VP8L", b"")
        has_alpha = b"ALPH" in chunks or (len(lossless) > 4 and bool(lossless[4] & 16))
        return Header(size, "uint8", 3 + has_alpha, has_alpha, _orientation(chunks.get(b"EXIF", b"")))
    return Header(size)


def is_upright(header: Header, spec: ImageSpec, label_size: tuple[int, int] | None, where: str) -> bool:
    """Return whether a photo's pixels are turned as its EXIF orientation says.

    Args:
        label_size: (height, width) of its label map; None: it has none, and pixels stay as they are stored.
    Raises:
        DataError: the size of the label map does not tell, or is another.
    """
    if header.orientation not in SHOWN or (label_size is None and spec.orientation is None):
        return False
    exif = f"{where}: its EXIF orientation ({header.orientation}) shows it {SHOWN[header.orientation]}"
    if spec.orientation is None and header.shown_size(True) == header.size == label_size:
        raise DataError(
            f"{exif}, and the sizes do not tell whether its label map is of the photo as shown or of the pixels as"
            " stored: write data.images.orientation: upright, or stored"
        )
    upright = header.shown_size(True) == label_size if spec.orientation is None else spec.orientation == "upright"
    if label_size is not None and (size := header.shown_size(upright)) != label_size:
        taken = "turned so, as data.images.orientation says," if upright else "as stored"
        raise DataError(
            f"{exif}; {taken} it is {size[0]} x {size[1]} (height x width), but its label map is {label_size[0]} x"
            f" {label_size[1]}: they must be of one size (data.images.orientation: upright or stored)"
        )
    return upright


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
    is_tiff = data.startswith(_TIFF)
    if data.startswith((NPY, NPZ)):
        array = _decode_numpy(data, where)
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
    """Scale a photo of ``decode_photo``: float32 in [-1, 1] if ``spec`` has a range, clipped; else uint8 as it is."""
    if spec.range is None:
        return array
    low, high = _range_of(spec)
    return ((array.astype(np.float32) - low) * np.float32(2 / (high - low)) - 1).clip(-1, 1)


def to_stored(images: Tensor, spec: ImageSpec) -> Tensor:
    """Convert generated images, floats in [-1, 1] of any shape, to the values and the dtype of the data's files."""
    if spec.dtype == "uint8" and spec.range is None:
        return denormalise(images)
    low, high = _range_of(spec)
    values = (images.double().clamp(-1, 1) + 1) * ((high - low) / 2) + low
    return (values if spec.dtype == "float32" else values.round()).to(getattr(torch, spec.dtype))


def to_preview(images: Tensor, spec: ImageSpec) -> Tensor:
    """Show images [..., C, H, W], floats in [-1, 1] or uint8, as uint8 RGB [..., 3, H, W] (``spec.preview``)."""
    shown = images if images.dtype == torch.uint8 else denormalise(images)
    chosen = spec.preview or ((0, 1, 2) if spec.channels >= 3 else (0, 0, 0))
    return shown if chosen == (0, 1, 2) and spec.channels == 3 else shown[..., chosen, :, :]


def show(image: AnyImage, spec: ImageSpec) -> RgbImage:
    """Show an image in the values of the data's files, [H, W, C] or [H, W], as uint8 RGB [H, W, 3]."""
    channels = torch.from_numpy(to_training(image if image.ndim == 3 else image[..., None], spec)).permute(2, 0, 1)
    return np.ascontiguousarray(to_preview(channels, spec).permute(1, 2, 0).numpy())


def measured(spec: ImageSpec, roots: Sequence[str | Path]) -> ImageSpec:
    """Replace ``range: auto`` by the minimum and maximum over all of ``roots``, which the builder measured.

    Raises:
        DataError: one of them is not a data set of which they are known.
    """
    if spec.range != "auto":
        return spec
    values: list[int | float] = []
    for root in roots:
        if (found := built_images(root).get("values")) is None:
            raise DataError(
                f"{root}: data.images.range: auto is what scripts/build_lmdb.py measures, and this is no data set that"
                " it measured: build one with this config, or write data.images.range: [LOW, HIGH]"
            )
        values += found
    if not min(values) < max(values):
        raise DataError(f"data.images.range: auto: every value is {values[0]}: write data.images.range: [LOW, HIGH]")
    return spec.model_copy(update={"range": (min(values), max(values))})


def check_built(spec: ImageSpec, roots: Sequence[str | Path]) -> None:
    """Refuse data sets that were built, and so checked, under another meaning of photos.

    Raises:
        DataError: with the keys that differ.
    """
    own = spec.model_dump(mode="json", include={"channels", "drop_alpha", "orientation"})
    for root in roots:
        built = built_images(root).get("spec", {})
        differ = [f"{key}: {built[key]} (here {value})" for key, value in own.items() if built.get(key, value) != value]
        if (built.get("range", spec.range) is None) != (spec.range is None):
            differ.append(f"range: {built['range']} (here {spec.range})")
        if differ:
            raise DataError(f"{root} was built with data.images.{', '.join(differ)}: write the same, or build it anew")


def built_images(root: str | Path) -> dict[str, Any]:
    """Read what the builder wrote of a data set's photos; {} where there is nothing of it."""
    path = Path(root, MANIFEST)
    manifest = read_json(path) if path.is_file() else {}
    found = manifest.get("images") if isinstance(manifest, dict) else None
    return found if isinstance(found, dict) else {}


def _range_of(spec: ImageSpec) -> tuple[float, float]:
    assert isinstance(spec.range, tuple), "replaced by build.with_measured_range"
    return spec.range


def _check_header(header: Header, spec: ImageSpec, where: str) -> None:
    """Refuse a photo that is not as the config says, with the line to write."""
    kind, channels = header.dtype.rstrip("0123456789"), header.channels - (header.has_alpha and spec.drop_alpha)
    if header.dtype != "uint8" and spec.range is None:
        bits = header.dtype.removeprefix(kind)
        numbers = "floats" if kind == "float" else f"signed {bits}-bit integers" if kind == "int" else f"{bits} bits"
        example = "[0.0, 3000.0]" if kind == "float" else "[-1024, 3071]" if kind == "int" else "[0, 4095]"
        only = f"channels: {header.channels}, " if header.channels != spec.channels else ""
        raise DataError(
            f"{where}: a photo of {numbers} per channel, and data.images.range is not given: write data.images:"
            f" {{{only}range: auto}} (from minimum to maximum, which build_lmdb.py measures), or the range that is"
            f" meant, such as {example}"
        )
    if kind == "float" and isinstance(spec.range, tuple) and all(isinstance(value, int) for value in spec.range):
        floats = [float(value) for value in spec.range]
        raise DataError(
            f"{where}: a photo of floats, and data.images.range {list(spec.range)} is of integers: write {floats}"
        )
    if header.has_alpha and not spec.drop_alpha and header.channels != spec.channels:
        raise DataError(
            f"{where}: a photo with an alpha channel (transparency): write data.images.drop_alpha: true to leave it"
            f" out, or data.images.channels: {header.channels} to train on it"
        )
    if channels != spec.channels and {channels, spec.channels} != {1, 3}:
        raise DataError(
            f"{where}: a photo of {channels} channel(s) (bands), and data.images.channels is {spec.channels}: write"
            f" data.images.channels: {channels}"
        )


def _with_channels(array: AnyImage, spec: ImageSpec, where: str) -> AnyImage:
    """Bring [H, W] or [H, W, C] to ``spec.channels``: grey to R = G = B and back, and nothing else."""
    array = array if array.ndim == 3 else array[..., None]
    if array.shape[2] == spec.channels:
        return array
    if spec.channels == 3 and array.shape[2] == 1:
        return array.repeat(3, 2)
    if spec.channels == 1 and array.shape[2] == 3 and (array == array[..., :1]).all():
        return array[..., :1]
    raise DataError(
        f"{where}: a photo of {array.shape[2]} different channels, and data.images.channels is {spec.channels}: write"
        f" data.images.channels: {array.shape[2]}, or convert the photos to grey"
    )


def _decode_whole(data: bytes, where: str, header: Header) -> AnyImage:
    """Decode a file at its own depth, with all its channels."""
    if header.channels > 4:
        raise DataError(
            f"{where}: an image of {header.channels} bands; files of more than 4 are read as .npy [H, W, C]"
        )
    try:
        if data.startswith(_TIFF) and header.dtype == "uint8" and _tiff_tags(data).get(338) == 2:
            return np.asarray(open_image(data, where))  # (OpenCV would multiply its colours by alpha)
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (cv2.error, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: not readable as an image: {error}") from None
    if array is None:
        raise DataError(f"{where}: not readable as an image (damaged, or a format that OpenCV does not know)")
    return array if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]


def _turn(array: AnyImage, orientation: int) -> AnyImage:
    """Turn stored pixels [H, W, ...] as an EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    return array[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _open_numpy(data: bytes, where: str) -> tuple[tuple[int, ...], np.dtype[Any], bool, IO[bytes]]:
    """Read shape, dtype and order (whether Fortran's) of the array of a .npy or .npz file, which is then at its values.

    Raises:
        DataError: no such file, or not one photo.
    """
    try:
        file: IO[bytes] = io.BytesIO(data)
        if data.startswith(NPZ):
            archive = zipfile.ZipFile(file)
            if len(names := archive.namelist()) != 1:
                raise DataError(f"{where}: holds {len(names)} arrays ({', '.join(names[:5])}); save the photo alone")
            file = archive.open(names[0])
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except (ValueError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not readable as a NumPy file: {error}") from None
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "uif":
        raise DataError(f"{where}: an array of {dtype} {list(shape)}; a photo is numbers [height, width, channels]")
    if len(shape) == 3 and shape[0] < 16 < shape[2]:
        raise DataError(f"{where}: an array {list(shape)}: bands come last: save np.moveaxis(array, 0, -1)")
    check_size(shape[0], shape[1], where)
    return shape, dtype, is_fortran, file


def _decode_numpy(data: bytes, where: str) -> AnyImage:
    shape, dtype, is_fortran, file = _open_numpy(data, where)
    try:
        values = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
        array = values.reshape(shape, order="F" if is_fortran else "C")
    except (ValueError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise DataError(f"{where}: a NumPy file that is cut off ({error}): copy or make it again") from None
    return np.array(array, dtype.newbyteorder("="), order="C")


def _chunks(data: bytes, place: int, order: str, extra: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and content of each chunk of a PNG or WebP file; of the pixels' only the first bytes."""
    while place + 8 <= len(data):
        if order == ">":
            length, name = struct.unpack_from(">I4s", data, place)
        else:
            name, length = struct.unpack_from("<4sI", data, place)
            length += length & 1
        yield name, data[place + 8 : place + 8 + min(length, 1 << 16)]
        place += extra + length


def _orientation(exif: bytes) -> int:
    """Read the orientation of Exif data, 1 to 8; 1 where it states none."""
    found = _tiff_tags(exif.removeprefix(b"Exif\0\0")).get(274, 1)
    return found if found in SHOWN else 1


def _tiff_tags(data: bytes) -> dict[int, int]:
    """Read the first value of each whole-number tag of a TIFF's (or BigTIFF's) first directory; {} if it has none."""
    order, tags = {b"II": "<", b"MM": ">"}.get(data[:2]), dict[int, int]()
    if order is None:
        return tags
    try:
        is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
        whole, count, step, start = ("Q", "Q", 20, 8) if is_big else ("I", "H", 12, 4)
        (place,) = struct.unpack_from(order + whole, data, start)
        (number,) = struct.unpack_from(order + count, data, place)
        place += struct.calcsize(order + count)
        for entry in range(place, place + step * min(number, 4096), step):
            tag, kind, length = struct.unpack_from(f"{order}HH{whole}", data, entry)
            if (form := {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)) is None or not length:
                continue
            at = entry + step - start
            if length * struct.calcsize(form) > start:
                (at,) = struct.unpack_from(order + whole, data, at)
            (tags[tag],) = struct.unpack_from(order + form, data, at)
    except struct.error:  # cut off, or no TIFF
        pass
    return tags
