#!/usr/bin/env python
"""Download and unpack the archives that a manifest lists.

    python scripts/download_test_data.py --model_name spade [--manifest FILE] [--mirror URL]

The manifest is JSON; write your own for your own archives:

    {"spade": {"archives": [{"url": "https://HOST/PATH/data.zip",
                             "sha256": "64 hexadecimal digits, as sha256sum prints them",
                             "folder": "cocostuff"}]}}

Each zip or tar is unpacked below projects/MODEL/test_data/FOLDER ("folder" is optional). A mirror (--mirror, or
IMAGINAIRE_SPADE_MIRROR in the environment) is the URL of a folder that holds files of the same names. Run it again to
continue: archives that are complete are not downloaded again.
"""

import argparse
import json
import os
import re
import socket
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from imaginaire_spade.dataset_prep.archives import unpack
from imaginaire_spade.errors import DataError, run_command_line
from imaginaire_spade.files import download, read_json

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="spade", help="entry of the manifest (default: spade)")
    parser.add_argument("--manifest", type=Path, default=REPOSITORY / "projects/spade/test_data.json", help="JSON file")
    parser.add_argument("--mirror", default=os.environ.get("IMAGINAIRE_SPADE_MIRROR"), help="URL of a folder to ask")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "projects", help="where MODEL/test_data/ goes")
    arguments = parser.parse_args()
    socket.setdefaulttimeout(30)  # torch's downloader sets none: a server that falls silent would never be given up
    for archive in read_archives(arguments.manifest, arguments.model_name):
        name = PurePosixPath(urlsplit(archive["url"]).path).name
        folder = arguments.output_dir / arguments.model_name / "test_data" / archive.get("folder", "")
        if not folder.resolve().is_relative_to(arguments.output_dir.resolve()) or name in ("", "..", "."):
            raise DataError(f"{arguments.manifest}: {json.dumps(archive)} leads out of {arguments.output_dir}")
        url = f"{arguments.mirror.rstrip('/')}/{name}" if arguments.mirror else archive["url"]
        downloaded = arguments.output_dir / arguments.model_name / ".downloads" / name
        download(url, downloaded, archive["sha256"].lower(), DataError, "Try again, or use --mirror URL")
        print(f"{unpack(downloaded, folder)} files from {url}: {folder}")


def read_archives(path: Path, model_name: str) -> list[dict[str, Any]]:
    """Read the archives of one entry of a manifest.

    Raises:
        DataError: the manifest is not as the text above describes it, or lists nothing.
    """
    entries = read_json(path)
    if not isinstance(entries, dict) or model_name not in entries:
        known = ", ".join(entries) if isinstance(entries, dict) else "none"
        raise DataError(f"{path}: no entry {model_name!r}; there are: {known}")
    entry = entries[model_name]
    archives = entry.get("archives") if isinstance(entry, dict) else None
    if not isinstance(archives, list):
        raise DataError(f'{path}: {model_name} lacks a list: {{"archives": [...]}}')
    if not archives:
        raise DataError(f"{model_name}: {entry.get('note', 'the manifest names no sources')}")
    for archive in archives:
        if not isinstance(archive, dict) or not {"url", "sha256"} <= set(archive):
            raise DataError(f"{path}: an archive lacks url or sha256: {json.dumps(archive)}")
        if not all(isinstance(value, str) for value in archive.values()) or set(archive) - {"url", "sha256", "folder"}:
            raise DataError(f"{path}: an archive has url, sha256 and folder, all text: {json.dumps(archive)}")
        try:
            known = urlsplit(archive["url"]).scheme in ("http", "https", "file")
        except ValueError:
            known = False
        if not known or "\0" in "".join(archive.values()):
            raise DataError(f"{path}: no http, https or file URL, or a zero byte: {json.dumps(archive)}")
        if not re.fullmatch("[0-9a-fA-F]{64}", archive["sha256"]):
            raise DataError(f"{path}: sha256 is 64 hexadecimal digits: {json.dumps(archive)}")
    return archives


if __name__ == "__main__":
    run_command_line(main)
