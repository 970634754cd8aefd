"""Fetch and unpack archives: resumable, checked by sha256, never outside the target folder.

Owns nothing but the transport; what is fetched from where is a manifest's business.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from imaginaire_spade.errors import DataError
from imaginaire_spade.files import file_sha256

MAX_FILES = 1_000_000
MAX_BYTES = 1 << 40
MAX_RATIO = 1000
"""Largest unpacked size of one file, as a multiple of its packed size (with 1 MiB free)."""
_BLOCK = 1 << 20


def fetch(url: str, path: Path, sha256: str, *, timeout_s: float = 30) -> None:
    """Download ``url`` to ``path``, unless it is there already; a part that an earlier try left is continued.

    Raises:
        DataError: unreachable, cut off (run again to continue), or of another checksum (what came is removed).
    """
    if path.is_file() and file_sha256(path) == sha256:
        return
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: only http and https are fetched")
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            continued = have > 0 and answer.status == 206
            with part.open("ab" if continued else "wb") as file:
                expected = answer.headers["Content-Length"]
                written = 0
                while block := answer.read(_BLOCK):
                    file.write(block)
                    written += len(block)
        if expected is not None and written < int(expected):
            raise DataError(f"{url}: cut off after {part.stat().st_size:,} bytes: run again to continue")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": the part is the whole file
            raise DataError(
                f"{url}: the server answers {error.code} {error.reason}; name one that has it: --mirror URL"
            ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url}: {reason}. Run again to continue, or try --mirror URL") from None
    found = file_sha256(part)
    if found != sha256:
        part.unlink()
        raise DataError(
            f"{url}: sha256 {found}, expected {sha256}: it was removed; another file, or damaged on the way"
        )
    part.replace(path)


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar below ``folder``; return the number of files. All names are looked at before any is written.

    Raises:
        DataError: no archive, damaged, or with an entry that leads out of ``folder``, is no plain file, or grows beyond
            all measure.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                entries = packed.infolist()
                for entry in entries:
                    mode = entry.external_attr >> 16
                    kind = stat.S_IFMT(mode)
                    _check_entry(archive, entry.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                    if entry.file_size > MAX_RATIO * entry.compress_size + (1 << 20):
                        raise DataError(f"{archive}: {entry.filename} grows {entry.file_size:,} bytes large: refused")
                _check_total(archive, len(entries), sum(entry.file_size for entry in entries))
                files = [entry for entry in entries if not entry.is_dir()]
                for entry in files:
                    with packed.open(entry) as content:
                        _write(folder, entry.filename, content, entry.file_size)
                return len(files)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as packed_tar:
                members = list(_members(archive, packed_tar))
                for member in members:
                    content_tar = packed_tar.extractfile(member)
                    assert content_tar
                    with content_tar:
                        _write(folder, member.name, content_tar, member.size)
                return len(members)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError) as error:
        raise DataError(f"{archive}: damaged: {error}") from None
    raise DataError(f"{archive}: neither a zip nor a tar archive")


def _members(archive: Path, packed: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    files, total, allowed = [], 0, MAX_RATIO * archive.stat().st_size + (1 << 20)
    for member in packed:
        _check_entry(archive, member.name, member.isfile() or member.isdir())
        total += member.size
        if total > allowed:
            raise DataError(f"{archive}: unpacks to more than {allowed:,} bytes: refused")
        files += [member] if member.isfile() else []
        _check_total(archive, len(files), total)
    yield from files


def _check_entry(archive: Path, name: str, is_plain: bool) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise DataError(f"{archive}: the entry {name!r} leads out of the folder: nothing was unpacked")
    if not is_plain:
        raise DataError(f"{archive}: the entry {name!r} is a link or a device: nothing was unpacked")


def _check_total(archive: Path, num_files: int, num_bytes: int) -> None:
    if num_files > MAX_FILES or num_bytes > MAX_BYTES:
        raise DataError(f"{archive}: {num_files:,} files of {num_bytes:,} bytes: refused")


def _write(folder: Path, name: str, content: IO[bytes], size: int) -> None:
    target = folder / name
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{target}: a link below {folder} leads out of it")
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.part")
    with hidden.open("wb") as file:
        remaining = size + 1
        while block := content.read(min(_BLOCK, remaining)):
            remaining -= len(block)
            if remaining < 1:
                raise DataError(f"{name}: larger than the archive says")
            file.write(block)
    shutil.move(hidden, target)
