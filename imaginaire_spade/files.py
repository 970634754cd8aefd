"""Write files complete or not at all: images, JSON, any bytes. Read text and JSON. Download, and compute checksums."""

import codecs
import hashlib
import http.client
import io
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.errors import CheckpointError, DataError, UserError

PARTIAL = ".partial-"
"""The name of a file begins with this while it is being written; a killed process may leave such a file."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".npy")
LABELS_FOLDER = "_labels"
"""Folder among generated images that holds the gallery's coloured label maps."""

RgbImage = NDArray[np.uint8]
"""RGB, uint8 [H, W, 3]."""
AnyImage = NDArray[Any]
"""Numbers [H, W, C] of any dtype: uint8 RGB unless ``data.images`` says otherwise."""


@contextmanager
def atomic_write(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. The file written there gets the name ``path`` when the block ends, and is
    removed if the block fails. Missing folders are made.

    Args:
        flush: wait until the file is on the disk before it gets its name.
    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        if flush:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all. Missing folders are made.

    Raises:
        UserError: the file cannot be written; the message names it.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_image(path: Path, rgb: AnyImage, *, quality: int = 95) -> None:
    """Write an image in the format of its suffix, complete or not at all. Missing folders are made.

    Raises:
        UserError: the file cannot be written; the message names it.
    """
    write_bytes(path, encode_image(rgb, path.suffix, quality=quality))


def encode_image(image: AnyImage, suffix: str, *, quality: int = 95) -> bytes:
    """Encode an image in the format of ``suffix`` (".jpg"); ``quality`` of JPEG and WebP: 1..100."""
    if suffix.lower() in (".npy", ".npz"):
        file = io.BytesIO()
        (np.save if suffix.lower() == ".npy" else np.savez_compressed)(file, image)
        return file.getvalue()
    flags = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".jpeg": cv2.IMWRITE_JPEG_QUALITY, ".webp": cv2.IMWRITE_WEBP_QUALITY}
    options = [flags[suffix.lower()], quality] if suffix.lower() in flags else []
    bgr = image[..., [2, 1, 0, 3]] if image.shape[2] == 4 else image[..., ::-1]
    return cv2.imencode(suffix, bgr, options)[1].tobytes()


def resize_image(image: AnyImage, height: int, width: int) -> AnyImage:
    """Resize an image: area averaging when shrinking, bicubic when enlarging."""
    if image.shape[:2] == (height, width):
        return image
    method = cv2.INTER_AREA if height * width < image.shape[0] * image.shape[1] else cv2.INTER_CUBIC
    return by_channels(image, lambda part: cv2.resize(part, (width, height), interpolation=method))


def by_channels(image: AnyImage, function: Callable[[AnyImage], AnyImage]) -> AnyImage:
    """Apply a function of OpenCV's, which takes four channels at most and gives a single one as [H, W]."""
    if image.shape[2] == 3:
        return function(image)
    parts = [function(np.ascontiguousarray(image[..., i : i + 4])) for i in range(0, image.shape[2], 4)]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], 2)


def write_json(path: Path, content: Any) -> None:
    """Write JSON and flush it to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path, flush=True) as temporary:
        temporary.write_text(json.dumps(content, indent=4), encoding="utf-8")


def refuse_special(path: str | Path) -> None:
    """Refuse a pipe, a socket or a device, also behind a link: reading it may never end.

    Raises:
        DataError: it is one.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (a Path takes ten times as long to make)
    except OSError:
        return  # whoever reads it says why it cannot be read
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise DataError(f"{path}: a {kind}, no file: remove it")


def read_text(path: Path, error_type: type[UserError], message: str = "") -> str:
    """Read a text file in UTF-8, or as Windows writes it: with a byte order mark, in UTF-8 or UTF-16.

    Args:
        error_type, message: what is raised if it cannot be read; the reason follows the message.
    """
    try:
        is_wide = path.read_bytes()[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return path.read_text(encoding="utf-16" if is_wide else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise error_type(f"{message or f'{path}: cannot be read'}: {error}") from None


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DataError: the file cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None


def flush_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk, so that new ones survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, sha256: str, error_type: type[UserError], advice: str) -> None:
    """Download ``url`` to ``path``, unless that file is there already.

    Args:
        sha256: of the file, in lower case.
        error_type, advice: what is raised if it cannot be downloaded or has another checksum, and the end of the
            message. Nothing is then left under its name.
    """
    import torch  # (It takes seconds, which reading and writing need not.)

    if path.is_file() and file_sha256(path) == sha256:
        return
    print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
    try:
        if urlsplit(url).scheme not in ("http", "https", "file"):
            raise ValueError("only http, https and file URLs are supported")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise error_type(f"{url} cannot be downloaded ({error}). {advice}") from None
    except RuntimeError as error:
        raise error_type(
            f"{url} is not the file with sha256 {sha256} ({error}): the file was cut off or replaced. {advice}"
        ) from None


def from_hub(path: Path, flag: str) -> Path:
    """Return ``path``; of ``hf://USER/REPO[/FILE]`` that file of the Hugging Face Hub, downloaded on first use.

    Without FILE it is model.safetensors, as ``scripts/export_generator.py`` writes it. Downloaded files stay in
    huggingface_hub's cache, which is found without a connection too.

    Args:
        flag: the command line's, for messages.
    Raises:
        CheckpointError: huggingface_hub is not installed, the file cannot be downloaded, or ``path`` is another URL.
    """
    scheme, *parts = path.as_posix().split("/")  # (``Path`` makes hf:/ of hf://.)
    if scheme in ("http:", "https:"):
        raise CheckpointError(f"{flag} {scheme}//{'/'.join(parts)}: download the file, or write hf://USER/REPO/FILE")
    if scheme != "hf:":
        return path
    address = "/".join(["hf:/", *(parts or [""])])
    if len(parts) < 2:
        raise CheckpointError(f"{flag} {address}: write hf://USER/REPO or hf://USER/REPO/FILE")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(f"{flag} {address}: {error}: pip install huggingface_hub") from None
    name = "/".join(parts[2:]) or "model.safetensors"
    try:
        return Path(huggingface_hub.hf_hub_download("/".join(parts[:2]), name))
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError, a wrong name a ValueError
        told = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{flag} {address}: {name} cannot be downloaded: {told}") from None
