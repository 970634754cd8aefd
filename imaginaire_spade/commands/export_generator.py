"""Write a checkpoint's generator as one file to publish: safetensors, for inference.py --checkpoint model.safetensors.

A fraction of the checkpoint's size: no optimizers, no discriminator. It carries its config with the label table;
folders of this machine are left out. (Other systems' formats: export_checkpoint.py.)
"""

import sys
from pathlib import Path

from imaginaire_spade.cli import CommandParser, add_shared_flags, check_output_file


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="P", help="a file, or a folder: its newest")
    parser.add_argument("--output", required=True, type=Path, metavar="model.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_shared_flags(parser, "--weights", "--import")
    arguments = parser.parse_args()

    from imaginaire_spade.build import import_modules
    from imaginaire_spade.files import file_sha256
    from imaginaire_spade.inference.model import Model, find_checkpoint

    check_output_file(arguments.output, overwrite=arguments.overwrite, suffixes=[".safetensors"])
    import_modules(arguments.imports)
    model = Model.load(
        find_checkpoint(arguments.checkpoint, None, None), weights=arguments.weights, for_inference=False
    )
    model.publish(arguments.output)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {arguments.output}: {model.weights} weights after {model.images_seen} images")
    print(f"for pretrained_weight in a config: sha256: {file_sha256(arguments.output)}")
