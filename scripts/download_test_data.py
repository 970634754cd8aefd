#!/usr/bin/env python
"""Fetch and unpack test data by a manifest of sources.

    python scripts/download_test_data.py --model_name spade [--manifest FILE] [--mirror URL]

The manifest is JSON: {MODEL: {"archives": [{"url": ..., "sha256": ..., "folder": ...}], "note": ...}}. A mirror (flag,
or IMAGINAIRE_SPADE_MIRROR in the environment) is asked for the same file names. Interrupted, it continues where it was.
"""

import argparse
import json
import os
import sys
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imaginaire_spade.dataset_prep.download import fetch, unpack
from imaginaire_spade.errors import DataError, run_command_line
from imaginaire_spade.files import read_json

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="spade", help="entry of the manifest (default: spade)")
    parser.add_argument("--manifest", type=Path, default=REPOSITORY / "projects/spade/test_data.json", help="JSON file")
    parser.add_argument("--mirror", default=os.environ.get("IMAGINAIRE_SPADE_MIRROR"), help="URL of a folder to ask")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "projects", help="where MODEL/test_data/ goes")
    arguments = parser.parse_args()
    entries = read_json(arguments.manifest)
    if not isinstance(entries, dict) or arguments.model_name not in entries:
        known = ", ".join(entries) if isinstance(entries, dict) else "none"
        raise DataError(f"{arguments.manifest}: no entry {arguments.model_name!r}; there are: {known}")
    entry = entries[arguments.model_name]
    archives = entry.get("archives") if isinstance(entry, dict) else None
    if not isinstance(archives, list):
        raise DataError(f'{arguments.manifest}: {arguments.model_name} lacks a list: {{"archives": [...]}}')
    if not archives:
        raise DataError(f"{arguments.model_name}: {entry.get('note', 'the manifest names no sources')}")
    for archive in archives:
        if not isinstance(archive, dict) or not {"url", "sha256"} <= set(archive):
            raise DataError(f"{arguments.manifest}: an archive lacks url or sha256: {json.dumps(archive)}")
        name = PurePosixPath(urlsplit(archive["url"]).path).name
        folder = arguments.output_dir / arguments.model_name / "test_data" / archive.get("folder", "")
        if not folder.resolve().is_relative_to(arguments.output_dir.resolve()) or name in ("", "..", "."):
            raise DataError(f"{arguments.manifest}: {json.dumps(archive)} leads out of {arguments.output_dir}")
        url = f"{arguments.mirror.rstrip('/')}/{name}" if arguments.mirror else archive["url"]
        downloaded = arguments.output_dir / arguments.model_name / ".downloads" / name
        fetch(url, downloaded, archive["sha256"])
        print(f"{unpack(downloaded, folder)} files from {url}: {folder}")


if __name__ == "__main__":
    run_command_line(main)
