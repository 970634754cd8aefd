"""Read the structure of image files: the header of a JPEG, the chunks of a PNG, the directories of a TIFF.

Decodes no pixels.
"""

import io
import struct
import zlib
from collections.abc import Collection

from PIL import TiffImagePlugin

from imaginaire_spade.errors import DataError

NPY, NPZ = b"\x93NUMPY", b"PK\x03\x04"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CHUNK = struct.Struct(">I4s").unpack_from
_SUBFILE = 254
_TAGS = (_SUBFILE, 256, 257, 258, 262, 274, 277, 322, 323, 338, 339)


def is_jpeg(data: bytes) -> bool:
    """Return whether a file begins as a JPEG does."""
    return data.startswith(b"\xff\xd8")


def jpeg_frame(data: bytes) -> tuple[int, int, bytes] | None:
    """Read width, height and Exif data (b"" without) of a JPEG, up to its frame header; None where there is none."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    place, exif = 2, b""
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame of any kind of coding
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big"), exif
        if marker in (0xFF, 0xD9, 0xDA):  # padding, end, scan
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xE1 and not exif and data.startswith(b"Exif", place + 4):
            exif = data[place + 4 : end]
        place = end
    return None


def png_chunks(data: bytes, where: str, names: Collection[bytes]) -> list[tuple[bytes, bytes]]:
    """Return name and bytes of the chunks of a PNG that have one of ``names``, up to its end.

    A chunk is four bytes of length, its name, its content ([8:-4]) and four bytes of checksum.

    Raises:
        DataError: one of them is damaged, by its checksum; or the file is cut off.
    """
    view, place, found, name = memoryview(data), 8, list[tuple[bytes, bytes]](), b""
    while place + 12 <= len(data) and name != b"IEND":
        length, name = _CHUNK(data, place)
        end = place + 12 + length
        if end > len(data):
            raise DataError(f"{where}: not readable: a PNG that is damaged or cut off: copy it again")
        if name in names:
            if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise DataError(f"{where}: not readable: a PNG that is damaged (a checksum differs): copy it again")
            found.append((name, data[place:end]))
        place = end
    return found


def tiff_tags(data: bytes, where: str | None = None) -> dict[int, int]:
    """Read the first value of each whole-number tag of a TIFF's first directory (Exif data is one); {}: no such.

    Args:
        where: the name of a file that is to have one page; None: do not look further. Smaller copies and masks (as in
            a cloud-optimised GeoTIFF) are no pages.
    Raises:
        DataError: it has several.
    """
    pages, seen = list[dict[int, int]](), {0}
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])
        file = io.BytesIO(data)
        while directory.next not in seen and not (pages and where is None):
            seen.add(directory.next)
            file.seek(directory.next)
            directory.load(file)
            values = {tag: directory[tag] for tag in _TAGS if tag in directory}
            first = {tag: value[0] if isinstance(value, tuple) else value for tag, value in values.items()}
            pages += [{tag: value for tag, value in first.items() if isinstance(value, int)}]
    except (SyntaxError, struct.error, OSError, ValueError, TypeError, KeyError):
        return pages[0] if pages else {}
    if (number := sum(not page.get(_SUBFILE, 0) & 5 for page in pages)) > 1:
        raise DataError(f"{where}: a TIFF of {number} pages: save the one that is meant as a file of its own")
    return pages[0] if pages else {}
