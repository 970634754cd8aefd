"""Decode image files into arrays, and encode maps; each data type keeps its exact meaning.

Responsible for what a photo, a label map, an edge map and an instance map may look like as a file. A photo may be
anything that OpenCV reads; a map must be lossless (an image, .npy or .npz), and its integers come out as they stand
in the file: palette images give their indices, 16-bit greys stay 16-bit, 1-, 2- and 4-bit greys give the raw sample
values (those of a TIFF too), signed files their negative ones. Knows nothing of label tables.
"""

import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from imaginaire_spade.data.distances import decode_distances
from imaginaire_spade.data.file_structure import NPY, NPZ, PNG, TIFF, is_jpeg, jpeg_frame, png_chunks, tiff_tags
from imaginaire_spade.errors import DataError

# No thread pool of OpenCV's own: work is spread over processes. It must be switched off here, before it exists: a child
# forked from a process with such a pool hangs for ever when it switches it off (or uses it).
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # no line per TIFF of unusual tags

MAX_PIXELS = 2**27
"""Largest image that is decoded (11,585 squared): a header may promise any size, memory may not."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "bmp", "webp", "tif", "tiff", "gif")
PHOTO_EXTENSIONS = (*IMAGE_EXTENSIONS, "npy", "npz")
"""Of the photos of a data set, and of its maps."""

# OpenCV has combined scale and colour flags for BGR only, so the individual flags are ORed.
_SCALE = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
MAX_BYTES = 1 << 31
"""Largest content of a .npz file that is unpacked."""
_GREY, _RGB, _PALETTE = 0, 2, 3  # PNG colour types
_SAMPLE_FORMAT, _SIGNED = 339, 2  # a TIFF tag; PIL reads signed bytes as unsigned ones


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Read (height, width) from the header alone.

    Raises:
        DataError: no image, or more than ``MAX_PIXELS``.
    """
    if data.startswith(PNG) and len(data) >= 26:
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith((NPY, NPZ)):
        height, width = _decode_map(data, where, "map").shape[:2]
    else:
        width, height = (jpeg_frame(data) or open_image(data, where).size)[:2]
    return check_size(height, width, where)


def check_size(height: int, width: int, where: str) -> tuple[int, int]:
    """Return (height, width) of an image.

    Raises:
        DataError: none, or more than ``MAX_PIXELS``.
    """
    if width * height > MAX_PIXELS:
        raise DataError(f"{where}: {width} x {height} pixels by its header; at most {MAX_PIXELS} are read")
    if width < 1 or height < 1:
        raise DataError(f"{where}: an image of {width} x {height} pixels")
    return height, width


def decode_image(data: bytes, where: str, *, reduction: int = 1) -> NDArray[np.uint8]:
    """Decode a photo: uint8 [H, W, 3] RGB.

    Pixels come as stored, except those of a TIFF: an EXIF orientation is ignored. Grey, palette, 16-bit and RGBA images
    become 8-bit RGB. (``photos.decode_photo`` decodes a data set's photos; it refuses what this would change.)

    Args:
        reduction: 2, 4 or 8: decode a JPEG at that part of its size, rounded up, which is several times faster.
    Raises:
        DataError: empty, truncated, huge or unreadable.
    """
    assert reduction == 1 or is_jpeg(data)
    image_size(data, where)
    whole = data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9") >= data.rfind(b"\xff\xda")
    if data.startswith(b"\xff\xd8") and not whole:
        # Some decoders fill the missing rest with grey. No end marker follows the last start of a scan.
        raise DataError(f"{where}: a JPEG that is cut off: copy or download it again")
    flags = _SCALE[reduction] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return np.asarray(imdecode(data, flags, where), np.uint8)


def imdecode(data: bytes, flags: int, where: str) -> NDArray[Any]:
    """Decode with OpenCV, whose ``flags`` say what comes out.

    Raises:
        DataError: unreadable.
    """
    # OpenCV allocates what a chunk says is its length; its reader of animations makes up what is damaged or missing.
    if data.startswith(PNG) and png_chunks(data, where, (b"acTL",)):
        data = _bare_png(data, where, data[25])
    return _imdecode(data, flags, where)


def _imdecode(data: bytes, flags: int, where: str) -> NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DataError(f"{where}: not readable as an image: {error}") from None
    if image is None:
        raise DataError(f"{where}: not readable as an image (damaged, or a format that OpenCV does not know)")
    return image


def _bare_png(data: bytes, where: str, colour: int, *, still: bool = False) -> bytes:
    """Return the same image as a PNG of the colour type ``colour``, without an animation or marks for viewers.

    Args:
        still: refuse an animation.
    """
    names = (b"IHDR", b"IDAT", b"IEND", b"acTL", *(b"PLTE", b"tRNS") * (colour != _GREY))
    chunks = png_chunks(data, where, names)
    if not chunks or chunks[-1][0] != b"IEND":
        raise DataError(f"{where}: not readable: a PNG that is cut off: copy it again")
    if still and any(name == b"acTL" for name, _ in chunks):
        raise DataError(f"{where}: an animated PNG; save the image that is meant alone")
    parts = [PNG, *(chunk for name, chunk in chunks if name != b"acTL")]
    if len(head := parts[1]) == 25 and head[17] != colour:
        body = head[4:17] + bytes([colour]) + head[18:21]
        parts[1] = head[:4] + body + struct.pack(">I", zlib.crc32(body))
    return b"".join(parts)


def decode_label(data: bytes, where: str, *, lossy: bool = False) -> NDArray[np.generic]:
    """Decode a label map as stored: uint8 or uint16 [H, W], int32 [H, W] if some are negative, or uint8 [H, W, 3] RGB
    of a true-colour image.

    Args:
        lossy: accept a lossy format, as RGB.
    Raises:
        DataError: unreadable, lossy, with alpha, or of values that are no 8- or 16-bit integers.
    """
    if lossy and _lossy_format(data):
        return decode_image(data, where)
    ids = _decode_map(data, where, "label map")
    if ids.dtype == np.int32:
        if ids.min() < -32768 or ids.max() > 65535:
            raise DataError(
                f"{where}: label values {ids.min()}..{ids.max()}; ids are -32768..65535: save the map with 8 or 16 bits"
                " (with -1 or 255 for no class, and data.labels.ignore: [-1] or [255])"
            )
        return ids if ids.min() < 0 else ids.astype(np.uint16)
    return ids


def colour_table(data: bytes, where: str) -> bytes:
    """Return the colours of an image of indexed colour, R, G, B, R, G, ...; empty for other files."""
    if data.startswith(PNG):
        place = data.find(b"PLTE", 8, data.find(b"IDAT")) if data[25] == _PALETTE else -1
        return data[place + 4 : place + 4 + int.from_bytes(data[place - 4 : place], "big")] if place > 0 else b""
    if data[:2] not in (b"BM", b"II", b"MM", b"GI"):
        return b""
    image = open_image(data, where)
    return bytes(image.getpalette("RGB") or ()) if image.mode == "P" else b""


def decode_edges(data: bytes, where: str) -> NDArray[np.uint8]:
    """Decode an edge map: uint8 [H, W] of 0/1; whatever is not 0 in the file is an edge.

    Raises:
        DataError: unreadable, lossy or with alpha.
    """
    stored = _decode_map(data, where, "edge map")
    edges = stored != 0
    return (edges.any(2) if edges.ndim == 3 else edges).view(np.uint8)


def decode_instances(data: bytes, where: str) -> NDArray[np.int32]:
    """Decode an instance map: int32 [H, W]; true colour reads as R + 256 G + 65536 B (COCO panoptic).

    Raises:
        DataError: unreadable, lossy or with alpha.
    """
    ids = _decode_map(data, where, "instance map")
    if ids.ndim == 3:
        return ids.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    return ids.astype(np.int32)


def _decode_map(data: bytes, where: str, what: str) -> NDArray[np.generic]:
    """Decode the stored integers: uint8, uint16 or int32 [H, W], or uint8 [H, W, 3] RGB."""
    if data.startswith((NPY, NPZ)):
        return _integers(read_array(data, where), where, what)
    if lossy := _lossy_format(data):
        raise DataError(
            f"{where}: a {what} stored as {lossy}, whose compression changes ids; save it as PNG from the original ids"
            " (converting this file does not bring them back). Label maps in colours that lie far apart can be read by"
            " the nearest colour: data.labels.nearest_color: 442"
        )
    image_size(data, where)
    return _decode_png(data, where, what) if data.startswith(PNG) else _decode_with_pil(data, where, what)


def _decode_png(data: bytes, where: str, what: str) -> NDArray[np.generic]:
    bits, colour = data[24], data[25]
    mode = {_GREY: "L", _RGB: "RGB", _PALETTE: "P"}.get(colour, "RGBA")
    _check_form(mode, where, what, 8 if colour == _GREY else bits)
    # Several times faster than PIL, which does not look at checksums and makes up missing rows. Indexed colour is read
    # as grey, since OpenCV would look the colours up.
    bare = _bare_png(data, where, _RGB if colour == _RGB else _GREY, still=True)
    stored = _imdecode(bare, cv2.IMREAD_COLOR_RGB if colour == _RGB else cv2.IMREAD_UNCHANGED, where)
    return stored if bits >= 8 else stored // np.uint8(255 // (2**bits - 1))  # OpenCV scales 0..3 to 0..255


def _check_form(mode: str, where: str, what: str, bits: int = 8) -> None:
    """Refuse what is no map, by PIL's mode and the bits per channel."""
    if mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        raise DataError(f"{where}: a {what} with an alpha channel: save it without (single-channel PNG of ids)")
    if mode not in ("1", "L", "P", "RGB", "I", "I;16", "I;16B", "I;16L") or bits == 16:
        form = "floats" if mode == "F" else f"pixel format {mode}, {bits} bits per channel"
        raise DataError(f"{where}: a {what} of {form}; save it as a single-channel PNG of 8 or 16 bits")


def _decode_with_pil(data: bytes, where: str, what: str) -> NDArray[np.generic]:
    image = open_image(data, where)
    tags = tiff_tags(data, where) if data.startswith(TIFF) else {}  # several pages are refused
    bits = tags.get(258, 8)
    _check_form(image.mode, where, what, bits if image.mode == "RGB" else 8)  # PIL drops the lower 8 bits of 16
    if image.mode == "L" and tags.get(262) == 0:  # PIL turns them around; others, and of 16 bits PIL too, do not
        raise DataError(f"{where}: a {what} in a TIFF whose 0 is white, so ids may be turned around: save it as PNG")
    try:
        stored = np.asarray(image)
    except (OSError, SyntaxError, ValueError, IndexError) as error:  # PIL's words for damaged data
        raise DataError(f"{where}: not readable as an image: {error}") from None
    if image.mode == "1":
        return stored.astype(np.uint8)
    if image.mode == "L" and image.format == "TIFF" and image.getexif().get(_SAMPLE_FORMAT) == _SIGNED:
        return stored.view(np.int8).astype(np.int32)
    if image.mode.startswith("I;16"):
        return stored.astype(np.uint16)
    return stored // np.uint8(255 // (2**bits - 1)) if image.mode == "L" and bits < 8 else stored  # as in _decode_png


def read_array(data: bytes, where: str) -> NDArray[Any]:
    """Read the array of a .npy file, or the only one of a .npz file, of numbers; read-only.

    Raises:
        DataError: another kind of file, cut off, or several arrays.
    """
    try:
        if data.startswith(NPZ) and sum(e.file_size for e in zipfile.ZipFile(io.BytesIO(data)).infolist()) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes once unpacked")
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if data.startswith(NPZ) and len(loaded.files) != 1:
            raise ValueError(f"it holds {', '.join(loaded.files) or 'nothing'}; one array is read")
        return loaded[loaded.files[0]] if data.startswith(NPZ) else loaded
    except (ValueError, SyntaxError, tokenize.TokenError, KeyError, OSError, EOFError, MemoryError, zlib.error,
            zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # fmt: skip
        raise DataError(f"{where}: not readable as a NumPy file of one array: {error}") from None


def _integers(array: NDArray[Any], where: str, what: str) -> NDArray[np.generic]:
    """Check that an array is a map: [H, W] (or with a channel of its own), or uint8 [H, W, 3] RGB."""
    stored = array
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    is_rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if array.dtype.kind not in "bui" or not (array.ndim == 2 or is_rgb) or not 0 < array.size <= 3 * MAX_PIXELS:
        raise DataError(
            f"{where}: an array of {stored.dtype} {list(stored.shape)}; a {what} is integers [height, width]:"
            " save it as ids.astype(np.uint8) or another integer type"
        )
    if array.dtype.itemsize > 2 and (array.min() < -(2**31) or array.max() >= 2**31):
        raise DataError(f"{where}: values {array.min()}..{array.max()}; save the {what} with 8 or 16 bits")
    kept = {"b1": np.uint8, "u1": np.uint8, "u2": np.uint16}.get(array.dtype.str[1:], np.int32)
    return array.astype(kept, copy=False)


def open_image(data: bytes, where: str) -> Image.Image:
    """Open with PIL, which reads only the header now."""
    if not data:
        raise DataError(f"{where}: the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        is_animated = image.format in ("GIF", "WEBP") and getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        raise DataError(f"{where}: more pixels by its header than the {MAX_PIXELS} that are read") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, IndexError):
        raise DataError(f"{where}: not readable as an image (damaged, or no image at all)") from None
    if is_animated:
        raise DataError(f"{where}: an animated {image.format}; save the image that is meant alone, as PNG")
    return image


def _lossy_format(data: bytes) -> str:
    """Name the lossy format of a file; "" if it is none."""
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    return "lossy WebP" * (data[:4] == b"RIFF" and data[8:12] == b"WEBP" and b"VP8L" not in data[12:4096])


# Without PNG's row filters, which are made for photos: maps become smaller, and decode two to three times faster.
_MAP_OPTIONS = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_COMPRESSION, 6]


def encode_map(ids: NDArray[Any]) -> bytes:
    """Encode a label, edge or instance map as a PNG from which the decoders give the same integers.

    Args:
        ids: uint8 or uint16 [H, W]; int32 [H, W], written with 16 bits or, where one is larger, as R + 256 G + 65536 B,
            or, where one is negative, as the content of a .npy file; or uint8 [H, W, 3] RGB.
    """
    if ids.dtype == np.int32 and ids.min() < 0:
        file = io.BytesIO()
        np.save(file, ids)
        return file.getvalue()
    if ids.dtype == np.int32:
        small = ids.max() <= 65535
        ids = ids.astype(np.uint16) if small else np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], 2)
    stored = ids if ids.dtype == np.uint16 else ids.astype(np.uint8, copy=False)
    return cv2.imencode(".png", stored[..., ::-1] if stored.ndim == 3 else stored, _MAP_OPTIONS)[1].tobytes()


DECODERS: dict[str, Callable[[bytes, str], NDArray[Any]]] = {
    "seg_maps": decode_label,
    "edge_maps": decode_edges,
    "inst_maps": decode_instances,
    "distances": decode_distances,
}
"""Data type -> how its files are decoded: [H, W] or [H, W, 3]; distances are [2, H, W]. (Photos: ``photos.py``.)"""
