"""Turn a checkpoint of another system into an ordinary one of ours: for inference, fine-tuning, evaluation, export.

The networks are described by --architecture, a JSON object of the other system's hyper-parameters, such as
  {"label_nc": 182, "contain_dontcare_label": true, "no_instance": false, "ngf": 64, "use_vae": false}
(what is left out has the 2019 release's default), or by --config alone, a config of ours. With both, --config gives
everything but the networks: label table (of ADE20K, as the other system reads it), names, colours, schedule, paths.
OASIS's networks are found in the tensors: the recipe of the data set as --config says the rest.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from imaginaire_spade.cli import SOURCES, CommandParser, add_shared_flags, check_output_file
from imaginaire_spade.errors import CheckpointError, ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--source", required=True, choices=SOURCES, help="the system that wrote the weights")
    parser.add_argument("--weights", required=True, type=Path, metavar="F",
                        help="latest_net_G.pth; of CLADE best_net_G.pth; of OASIS best_G.pth, or best_EMA.pth alone; a"
                        " .pt of imaginaire")  # fmt: skip
    parser.add_argument("--ema_weights", type=Path, metavar="F", help="OASIS: best_EMA.pth, beside best_G.pth")
    parser.add_argument("--encoder_weights", type=Path, metavar="F", help="latest_net_E.pth")
    parser.add_argument("--discriminator_weights", type=Path, metavar="F",
                        help="latest_net_D.pth, best_D.pth: to fine-tune with")  # fmt: skip
    parser.add_argument("--architecture", type=Path, metavar="A.json", help="the hyper-parameters of the networks")
    parser.add_argument("--config", type=Path, metavar="C.yaml", help="a config of ours, such as the data set's recipe")
    add_shared_flags(parser, "--set", help="override a key of --config")
    parser.add_argument("--output", required=True, type=Path, metavar="P", help="the checkpoint to write")
    parser.add_argument("--overwrite", action="store_true", help="replace P where it exists")
    parser.add_argument("--trust", action="store_true",
                        help="unpickle files that hold more than tensors: runs whatever code is in them")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()

    from imaginaire_spade.config_files import load_config
    from imaginaire_spade.interop.architecture import find_architecture
    from imaginaire_spade.interop.checkpoint import architecture_config, import_checkpoint, networks_in, read_weights
    from imaginaire_spade.interop.label_tables import adapt_config
    from imaginaire_spade.training.checkpoint import write_checkpoint

    check_output_file(arguments.output, overwrite=arguments.overwrite)
    in_tensors = arguments.source == "oasis"
    if arguments.ema_weights is not None and not in_tensors:
        raise ConfigError(f"--ema_weights: {arguments.source} keeps no EMA in a file of its own; leave it out")
    if arguments.architecture is None and arguments.config is None and not in_tensors:
        raise ConfigError(
            "give --architecture A.json (the other system's hyper-parameters), or --config C.yaml, or both"
        )
    config, notes = None, list[str]()
    if arguments.config is not None:
        given = load_config(arguments.config, arguments.overrides)
        config, notes = adapt_config(arguments.source, given, has_networks=arguments.architecture is None)
    hyper = {} if arguments.architecture is None else _hyper(arguments.architecture)
    parts = networks_in(read_weights(arguments.weights, arguments.trust), arguments.weights)
    for part, path in (("generator_ema", arguments.ema_weights), ("encoder", arguments.encoder_weights),
                       ("discriminator", arguments.discriminator_weights)):  # fmt: skip
        if path is not None:
            parts[part] = networks_in(read_weights(path, arguments.trust), path)["generator"]
    if in_tensors:
        hyper, found = find_architecture(parts, hyper, config)
        notes += found
    if arguments.architecture is not None or in_tensors:
        config = architecture_config(arguments.source, hyper, config)
    assert config is not None
    content, more = import_checkpoint(arguments.source, config, parts)
    write_checkpoint(arguments.output, content)
    for note in [*notes, *more]:
        print(f"note: {note}", file=sys.stderr)
    for name in ("generator", "generator_ema", "encoder", "discriminator"):
        if content[name] is not None:
            values = sum(tensor.numel() for tensor in content[name].values())
            print(f"{name}: {len(content[name])} tensors, {values / 1e6:.2f} M values, every one in its place")
    print(f"wrote {arguments.output}; its licence is still that of {arguments.source}'s weights")


def _hyper(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--architecture {path}: cannot be read as JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("hyper"), dict):
        content = content["hyper"]
    if not isinstance(content, dict):
        raise CheckpointError(f'--architecture {path}: a JSON object of hyper-parameters, such as {{"label_nc": 182}}')
    return content
