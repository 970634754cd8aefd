"""Download and unpack archives (``scripts/download_test_data.py``)."""

import http.client
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch

from imaginaire_spade.errors import DataError
from imaginaire_spade.files import PARTIAL, file_sha256


def download(url: str, path: Path, sha256: str) -> None:
    """Download ``url`` to ``path``, unless that file is there already.

    Raises:
        DataError: it cannot be downloaded, or has another checksum. Nothing is left under its name.
    """
    if path.is_file() and file_sha256(path) == sha256:
        return
    try:
        if urlsplit(url).scheme not in ("http", "https", "file"):
            raise ValueError("only http, https and file URLs are supported")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except RuntimeError as error:
        raise DataError(f"{url}: {error}: the file was cut off or replaced. Try again, or use --mirror URL") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {error}. Try again, or use --mirror URL") from None


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar archive below ``folder``; return its number of files. A refused archive leaves nothing.

    Raises:
        DataError: no archive, damaged, larger than the free space, or with an entry that leads out of ``folder`` or is
            a device.
    """
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=archive.parent) as temporary:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as packed:
                    _check_entries(archive, {entry.filename: entry.file_size for entry in packed.infolist()})
                shutil.unpack_archive(archive, temporary, "zip")
            else:
                with tarfile.open(archive) as packed_tar:
                    _check_entries(archive, {entry.name: entry.size for entry in packed_tar})
                shutil.unpack_archive(archive, temporary, "tar", filter="data")
        except tarfile.ReadError as error:
            raise DataError(f"{archive}: neither a zip nor a tar archive, or damaged: {error}") from None
        except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError) as error:
            raise DataError(f"{archive}: nothing was unpacked: {error}") from None
        paths = [path for path in Path(temporary).rglob("*") if path.is_symlink() or path.is_file()]
        for path in paths:
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    return len(paths)


def _check_entries(archive: Path, sizes: dict[str, int]) -> None:
    for name in sizes:  # shutil would leave such an entry out without a word
        if PurePosixPath(name).is_absolute() or ".." in name or "\\" in name:
            raise DataError(f"{archive}: the entry {name!r} leads out of the folder: nothing was unpacked")
    free = shutil.disk_usage(archive.parent).free
    if sum(sizes.values()) > free:
        raise DataError(f"{archive}: unpacks to {sum(sizes.values()):,} bytes, but {free:,} are free")
