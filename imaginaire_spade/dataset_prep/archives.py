"""Unpack archives of strangers (``scripts/download_test_data.py``)."""

import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from imaginaire_spade.errors import DataError
from imaginaire_spade.files import PARTIAL


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
                    packed.extractall(temporary)
            else:
                if not hasattr(tarfile, "data_filter"):
                    raise DataError(f"{archive}: unpack it yourself, or take Python 3.11.4 or newer")
                with tarfile.open(archive) as packed_tar:
                    _check_entries(archive, {entry.name: entry.size for entry in packed_tar})
                    packed_tar.extractall(temporary, filter="data")
                    while packed_tar.fileobj.read(2**20):
                        pass  # to the end, where the checksum of the compressed data is
        except DataError:
            raise
        except tarfile.ReadError as error:
            raise DataError(f"{archive}: neither a zip nor a tar archive, or damaged: {error}") from None
        except Exception as error:  # of damaged data zipfile, zlib and lzma raise whatever comes
            raise DataError(f"{archive}: nothing was unpacked: {error}") from None
        paths = [path for path in Path(temporary).rglob("*") if path.is_symlink() or path.is_file()]
        if links := [path.name for path in paths if path.is_symlink()]:
            raise DataError(f"{archive}: the entry {links[0]!r} is a link: nothing was unpacked")
        for path in paths:
            target = folder / path.relative_to(temporary)
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{target}: a link below {folder} leads out of it")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    return len(paths)


def _check_entries(archive: Path, sizes: dict[str, int]) -> None:
    for name in sizes:  # zipfile would give such an entry another name without a word
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise DataError(f"{archive}: the entry {name!r} leads out of the folder: nothing was unpacked")
    free = shutil.disk_usage(archive.parent).free
    if sum(sizes.values()) > free:
        raise DataError(f"{archive}: unpacks to {sum(sizes.values()):,} bytes, but {free:,} are free")
