#!/usr/bin/env python
"""Build an LMDB data set from folders of photos, label maps, edge maps and instance maps.

    python scripts/build_lmdb.py --config configs/my.yaml --data_root RAW --output_root datasets/my/train

RAW/images/NAME.jpg, RAW/seg_maps/NAME.png, RAW/edge_maps/NAME.png and RAW/inst_maps/NAME.png join by name; sub-folders
are sequences. Every file is decoded and every label checked against the config's data.labels before anything is built.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imaginaire_spade.build import import_modules
from imaginaire_spade.config import load_config
from imaginaire_spade.data.build import build_dataset
from imaginaire_spade.data.shard import summary
from imaginaire_spade.errors import run_command_line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML whose data.labels and data.edges hold for this data")
    parser.add_argument("--data_root", required=True, help="folder of images/, seg_maps/ (edge_maps/, inst_maps/)")
    parser.add_argument("--output_root", required=True, help="folder to make")
    parser.add_argument("--num_shards", type=int, default=1, help="number of shards (default: 1, the root itself)")
    parser.add_argument("--num_workers", type=int, help="processes that check files (default: min(8, cores))")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set once this one is built")
    parser.add_argument("--resume", action="store_true", help="keep the finished shards of an interrupted build")
    parser.add_argument("--drop_unpaired", action="store_true", help="build from the samples that have all data types")
    parser.add_argument("--input_list", help="file of keys, one SEQUENCE/NAME or NAME per line: build these only")
    parser.add_argument("--paired", action="store_true", help="accepted and ignored: data here is always paired")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    parser.add_argument("--import", action="append", default=[], metavar="MODULE", dest="imports",
                        help="import a module that registers components")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    started_at = time.perf_counter()
    import_modules(arguments.imports)
    data = load_config(arguments.config, arguments.set).data
    manifest = build_dataset(
        arguments.data_root,
        arguments.output_root,
        data.labels,
        edges=data.edges,
        num_shards=arguments.num_shards,
        num_workers=arguments.num_workers,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        drop_unpaired=arguments.drop_unpaired,
        input_list=arguments.input_list,
    )
    print(summary(manifest, data.labels, Path(arguments.output_root), time.perf_counter() - started_at))


if __name__ == "__main__":
    run_command_line(main)
