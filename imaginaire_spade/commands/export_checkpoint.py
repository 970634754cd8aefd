"""Write a checkpoint's networks under another system's tensor names, for its tools: the way back of import_checkpoint.

nvlabs_spade and clade: OUT/latest_net_G.pth, and _E and _D where the checkpoint has them. imaginaire: OUT/imaginaire.pt
with net_G (network, average and style encoder) and net_D. All three read the ids of label maps as channels, so label
channels are put into the order of raw ids. oasis: OUT/best_G.pth, best_EMA.pth, best_D.pth, for a run's folder models/;
don't care comes first.
"""

import sys
from pathlib import Path

from imaginaire_spade.cli import SOURCES, CommandParser, add_shared_flags
from imaginaire_spade.errors import ConfigError


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="P", help="a checkpoint of ours, or its log dir"
    )
    parser.add_argument("--target", required=True, choices=SOURCES, help="the system to write for")
    add_shared_flags(
        parser, "--weights", help="if the target holds only one: ema (default), or raw: non-averaged weights"
    )
    parser.add_argument("--label_order", choices=("raw", "train"), default="raw",
                        help="label channels: in the order of raw ids, so that the target reads the same label maps"
                        " (default), or in the order of train ids, as in the checkpoint")  # fmt: skip
    parser.add_argument("--output_dir", required=True, type=Path, metavar="OUT")
    arguments = parser.parse_args()

    import torch

    from imaginaire_spade.config_files import parse_config
    from imaginaire_spade.inference.model import find_checkpoint
    from imaginaire_spade.interop.checkpoint import export_files
    from imaginaire_spade.interop.label_tables import export_notes
    from imaginaire_spade.training.checkpoint import load_checkpoint

    path = find_checkpoint(arguments.checkpoint, None, None)
    content = load_checkpoint(path)
    config = parse_config(content.get("config"), source=str(path))
    files = export_files(arguments.target, content, config, arguments.weights, arguments.label_order)
    if existing := [name for name in files if (arguments.output_dir / name).exists()]:
        raise ConfigError(f"{arguments.output_dir} has {', '.join(existing)} already: give another --output_dir")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, state in files.items():
        torch.save(state, arguments.output_dir / name)
        print(f"wrote {arguments.output_dir / name}")
    for note in export_notes(arguments.target, config, arguments.label_order):
        print(f"note: {note}", file=sys.stderr)
