"""Compute feature statistics of images once, for many evaluations: evaluate.py --real STATS.npz.

    python scripts/compute_fid_stats.py --real DIR --reference_split val --output stats.npz
    python scripts/compute_fid_stats.py --config C.yaml --reference_split val --output stats.npz

DIR is a folder of images or an LMDB folder; with --config they are the photos of that split, cut as data.val says.
The file says of what images and network it is; pytorch-fid reads it too. Under torchrun the processes share the work.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imaginaire_spade.cli import CommandParser, add_shared_flags, check_output_file
from imaginaire_spade.errors import ConfigError, positive_integer
from imaginaire_spade.evaluation import REFERENCE_SPLITS
from imaginaire_spade.pretrained import FEATURE_DIMS, FEATURES, RESIZES

if TYPE_CHECKING:
    from imaginaire_spade.evaluation.images import ImageSource


def main() -> None:
    parser = CommandParser(__doc__)
    pictures = parser.add_mutually_exclusive_group(required=True)
    pictures.add_argument("--real", type=Path, metavar="DIR", help="images: a folder or an LMDB root")
    pictures.add_argument("--config", type=Path, metavar="C.yaml", help="the photos of its data")
    parser.add_argument("--reference_split", choices=REFERENCE_SPLITS, required=True, help="which split they are")
    parser.add_argument("--output", type=Path, required=True, metavar="STATS.npz")
    parser.add_argument("--features", default="inception", metavar="NAME[:WEIGHTS]",
                        help=f"{', '.join(FEATURES)} (default: inception)")  # fmt: skip
    parser.add_argument("--inception_weights", metavar="FILE",
                        help="default: torch's cache; random:SEED: an untrained network, for dry runs")  # fmt: skip
    parser.add_argument("--feature_dim", type=int, choices=FEATURE_DIMS, default=2048)
    parser.add_argument(
        "--resize", choices=RESIZES, default="legacy", help="legacy: as pytorch-fid; clean: antialiased"
    )
    parser.add_argument("--batch_size", type=positive_integer, default=32, metavar="B")
    add_shared_flags(parser, "--device", "--set")
    parser.add_argument("--skip_bad", action="store_true", help="skip unreadable images; they are counted and named")
    arguments = parser.parse_args()

    from imaginaire_spade import distributed
    from imaginaire_spade.evaluation.collection import collect
    from imaginaire_spade.pretrained.feature_networks import feature_network

    if arguments.output.suffix != ".npz":
        raise ConfigError(f"--output {arguments.output}: the name must end with .npz")
    check_output_file(arguments.output, overwrite=True)

    info = distributed.process_info_from_environment()
    device = distributed.choose_device(arguments.device, info)
    network = feature_network(
        arguments.inception_weights, features=arguments.features, dim=arguments.feature_dim, resize=arguments.resize,
        device=device,
    )  # fmt: skip
    source = _source(arguments)
    distributed.init_process_group(info, device, 3600)
    try:
        collection = collect(source, network, batch_size=arguments.batch_size, skip_bad=arguments.skip_bad, info=info)
    finally:
        distributed.leave_process_group()
    if info.is_main:
        for message in (*collection.problems, *collection.warnings):
            print(f"note: {message}", file=sys.stderr)
        collection.save(arguments.output, {"network": network.identity, "reference_split": arguments.reference_split})
        told = f"{network.name} (sha256 {network.sha256}), {network.dim} dimensions, {network.resize} resizing"
        print(f"{arguments.output}: {collection.count} images of {source.name}; {told}")


def _source(arguments: argparse.Namespace) -> "ImageSource":
    from imaginaire_spade.build import build_split
    from imaginaire_spade.config_files import load_config
    from imaginaire_spade.evaluation.images import DatasetImages, StoredImages

    if arguments.real:
        return StoredImages(arguments.real)
    config = load_config(arguments.config, arguments.overrides)
    val = config.data.val
    if val is None:
        raise ConfigError(f"{arguments.config}: no data.val, whose geometry the photos would go through")
    roots = config.data.train.roots if arguments.reference_split == "train" else val.roots
    return DatasetImages(build_split(config, val.model_copy(update={"roots": roots})), ", ".join(roots))
