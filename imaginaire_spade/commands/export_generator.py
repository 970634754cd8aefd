"""Write a checkpoint's generator as one file to publish: safetensors, for inference.py --checkpoint model.safetensors.

A fraction of the checkpoint's size: no optimizers, no discriminator. It carries its config with the label table;
folders of this machine are left out. --model_card writes README.md beside it, as the Hugging Face Hub shows it; hf
upload USER/REPO FOLDER puts the folder there. (Other systems' formats: export_checkpoint.py.)
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imaginaire_spade.cli import CommandParser, add_shared_flags, check_output_file

if TYPE_CHECKING:
    from imaginaire_spade.inference.model import Model

CARD = """---
library_name: imaginaire_spade
pipeline_tag: image-to-image
tags: [semantic-image-synthesis, {type}]
---
# {name}

A generator that makes {size} photos of label maps: `{type}`, {millions:.1f} M parameters, {weights} weights after
{images:,} training images.

    from imaginaire_spade import Synthesizer

    image = Synthesizer.load("hf://USER/REPO{file}")(label_map)

    imaginaire-spade infer --checkpoint hf://USER/REPO{file} --input_dir LABEL_MAPS --output_dir OUT

## Label maps

PNGs of ids{colours}{edges}. {ignored}

| id | class | colour (RGB) |
|---|---|---|
{rows}

## File

`{filename}`, sha256 {sha256}
"""


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="P", help="a file, or a folder: its newest")
    parser.add_argument("--output", required=True, type=Path, metavar="model.safetensors")
    parser.add_argument("--model_card", action="store_true", help="also write README.md beside the output")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_shared_flags(parser, "--weights", "--import")
    arguments = parser.parse_args()

    from imaginaire_spade.build import import_modules
    from imaginaire_spade.files import file_sha256, write_bytes
    from imaginaire_spade.inference.model import Model, find_checkpoint

    check_output_file(arguments.output, overwrite=arguments.overwrite, suffixes=[".safetensors"])
    card = arguments.output.with_name("README.md")
    if arguments.model_card:
        check_output_file(card, overwrite=arguments.overwrite)
    import_modules(arguments.imports)
    model = Model.load(
        find_checkpoint(arguments.checkpoint, None, None), weights=arguments.weights, for_inference=False
    )
    model.publish(arguments.output)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {arguments.output}: {model.weights} weights after {model.images_seen} images")
    sha256 = file_sha256(arguments.output)
    print(f"for pretrained_weight in a config: sha256: {sha256}")
    if arguments.model_card:
        write_bytes(card, model_card(model, arguments.output.name, sha256).encode())
        print(f"wrote {card}: add the licence (license: NAME in its first lines), and what the training images were")


def model_card(model: "Model", filename: str, sha256: str) -> str:
    """Describe a published generator: Markdown with the front matter of the Hugging Face Hub."""
    config, labels = model.config, model.config.data.labels
    ids: dict[int, list[str]] = {}
    for raw in labels.known_ids:
        ids.setdefault(int(labels.table[raw]), []).append(str(raw))
    height, width = model.trained_size or (0, 0)
    return CARD.format(
        type=config.gen.type, name=config.data.name, weights=model.weights, images=model.images_seen,
        size=f"{width}x{height}" if model.trained_size else "",
        millions=sum(parameter.numel() for parameter in model.generator.parameters()) / 1e6,
        file="" if filename == "model.safetensors" else f"/{filename}",
        colours=", or of these colours" if labels.palette else "",
        edges="" if config.data.edges == "none" else f", with edges (`data.edges: {config.data.edges}`)",
        ignored=f'Ids that mean "no class": {", ".join(map(str, labels.ignore)) or "none"}.',
        rows="\n".join(
            f"| {', '.join(ids.get(i, []))} | {labels.name(i)} | {', '.join(map(str, labels.colours[i].tolist()))} |"
            for i in range(labels.num_classes)
        ),
        filename=filename, sha256=sha256,
    )  # fmt: skip
