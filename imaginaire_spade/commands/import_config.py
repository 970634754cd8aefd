"""Turn another system's config into one of ours: imaginaire's SPADE YAML, opt.txt of the SPADE release, CLADE, OASIS.

Lists what was chosen and every key that is ignored (no equivalent).
"""

import sys
from pathlib import Path

from imaginaire_spade.cli import SOURCES, CommandParser, check_output_file


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the .yaml or opt.txt")
    parser.add_argument("--source", required=True, choices=SOURCES, help="the system it belongs to")
    parser.add_argument("--output", type=Path, metavar="C.yaml", help="where to write it (default: the screen)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing C.yaml")
    arguments = parser.parse_args()

    from imaginaire_spade.config_files import CONFIGS
    from imaginaire_spade.files import write_bytes
    from imaginaire_spade.interop.configs import import_config

    if arguments.output is not None:
        check_output_file(arguments.output, overwrite=arguments.overwrite)
    text, notes = import_config(arguments.source, arguments.file, CONFIGS / "labels")
    text = f"# Translated from {arguments.file.name} ({arguments.source}).\n{text}"
    if arguments.output is None:
        print(text)
    else:
        write_bytes(arguments.output, text.encode())
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.output is not None:
        print(f"wrote {arguments.output}")
