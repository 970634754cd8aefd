"""Draw the sample data set: landscapes with exact label, instance and edge maps.

    python scripts/make_sample_data.py --output_root dataset/sample

writes OUTPUT/train and OUTPUT/val, each with images/NAME.jpg, seg_maps/NAME.png, inst_maps/NAME.png (16 bit) and
edge_maps/NAME.png. The same arguments give the same bytes, with any number of workers. The classes are those of
configs/labels/sample.yaml.
"""

import argparse
import os
import shutil
from pathlib import Path

from imaginaire_spade.cli import CommandParser
from imaginaire_spade.errors import ConfigError, DataError


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--output_root", required=True, type=Path, help="folder to write train/ and val/ into")
    parser.add_argument("--num_train", type=int, default=400, help="number of training scenes (default: 400)")
    parser.add_argument("--num_val", type=int, default=40, help="number of validation scenes (default: 40)")
    parser.add_argument("--height", type=int, default=128, help="height in pixels, at least 32 (default: 128)")
    parser.add_argument("--width", type=int, default=128, help="width in pixels, at least 32 (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes, >= 0 (default: 0)")
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1),
                        help="processes that draw; 0 or 1: this process alone (default: min(8, cores))")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
                        help="replace train/ and val/ of a folder that is not empty")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()

    from tqdm import tqdm

    from imaginaire_spade.scenes import write_sample_data

    for name, least in (("num_train", 0), ("num_val", 0), ("height", 32), ("width", 32), ("seed", 0)):
        value = vars(arguments)[name]
        if value < least:
            raise ConfigError(f"--{name} {value}: must be at least {least}; write --{name} {least} or more")
    root: Path = arguments.output_root
    if root.exists() and not root.is_dir():
        raise DataError(f"--output_root {root} is a file; name a folder instead")
    if root.is_dir() and any(root.iterdir()):
        if not arguments.overwrite:
            raise DataError(
                f"--output_root {root} is not empty; name another, or add --overwrite to replace its train/ and val/"
            )
        for split in ("train", "val"):
            shutil.rmtree(root / split, ignore_errors=True)
    with tqdm(total=arguments.num_train + arguments.num_val, unit="scene") as bar:
        write_sample_data(
            root,
            arguments.num_train,
            arguments.num_val,
            arguments.height,
            arguments.width,
            arguments.seed,
            arguments.num_workers,
            on_written=bar.update,
        )
