"""Compare our networks with the numbers of a reference system: one line per output tensor; exit 1 on any FAIL."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from parity import verify

from imaginaire_spade.errors import run_command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FIXTURE_FOLDER",
                        help="holds config.json, weights/inputs/outputs.safetensors")  # fmt: skip
    failed = compared = 0
    for folder in parser.parse_args().folders:
        for row in verify(folder):
            compared += 1
            failed += not row.ok
            verdict = "ok" if row.ok else f"FAIL (bound {row.bound:.3g}{'; ' + row.note if row.note else ''})"
            print(f"{folder.name}/{row.name} {row.error:.3g} {verdict}")
    print(f"{compared} tensors compared, {failed} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command_line(main)
