"""Build an LMDB data set from folders of photos, label maps, edge maps and instance maps.

    python scripts/build_lmdb.py --config my.yaml --data_root RAW --output_root datasets/my/train

RAW/images/NAME.jpg, RAW/seg_maps/NAME.png, RAW/edge_maps/NAME.png and RAW/inst_maps/NAME.png join by name; sub-folders
are sequences. Folders of data.conditions (RAW/depth/NAME.png) join likewise. The build decodes every file and checks
every label against the label table. --config is the config of a
run, or a label table alone (configs/labels/).

Run the same command again after an interruption: the finished shards are kept. For more speed, on one machine or many,
start several processes: each process of torchrun, or each task of a SLURM job array, builds its share of the shards,
and the last to finish joins them:

    torchrun --nproc_per_node=8 scripts/build_lmdb.py --config ... --data_root RAW --output_root OUT --num_shards 64
"""

import argparse
import gc
import time
from pathlib import Path

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.data.folders import DATA_TYPES


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--config", required=True, help="YAML with data.labels, .images and .edges: a run's config, or a label table"
    )
    parser.add_argument("--data_root", required=True, help="folder of images/, seg_maps/ (edge_maps/, inst_maps/)")
    parser.add_argument("--output_root", required=True, help="folder to make")
    # fmt: off
    parser.add_argument("--num_shards", type=int,
                        help="number of shards (default: one per process; with one the root itself is the shard)")
    parser.add_argument("--num_workers", type=int,
                        help="processes that read and check what this one writes (default: min(8, cores); 0: none);"
                        " about six keep one writer busy, so for more speed start several processes")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set once this one is built")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="keep the finished shards of an interrupted build")
    parser.add_argument("--drop_unpaired", action="store_true", help="build from the samples that have all data types")
    parser.add_argument("--skip_bad", action="store_true",
                        help="build from the samples without a problem; OUTPUT_ROOT.bad_files.txt lists the others")
    parser.add_argument("--input_list", help="file of keys, one SEQUENCE/NAME or NAME per line: build these only")
    parser.add_argument("--data_types", nargs="+", choices=DATA_TYPES,
                        help="what to build (default: images seg_maps, and the others whose folders exist)")
    parser.add_argument("--resize_smallest_side", type=int, metavar="PIXELS",
                        help="shrink larger images (photos by area, maps by nearest pixel); without it, the LMDB"
                        " holds the original files")
    parser.add_argument("--quality", type=int, default=95, help="quality of shrunk JPEGs (default: 95)")
    parser.add_argument("--recode_maps", action="store_true",
                        help="re-encode label, edge and instance maps as PNGs of the same integers without row"
                        " filters: smaller, and about twice as fast to decode in training; building takes longer")
    parser.add_argument("--no_check", action="store_true",
                        help="decode nothing: check neither sizes nor labels, and count no labels")
    parser.add_argument("--paired", action="store_true", help="accepted and ignored: data here is always paired")
    add_shared_flags(parser, "--set")
    parser.add_argument("--import", metavar="MODULE", help="accepted and ignored: no components are used here")
    # fmt: on
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()

    from imaginaire_spade.config_files import load_data
    from imaginaire_spade.distributed import rank_from_environment
    from imaginaire_spade.lmdb_builder.build import build_dataset
    from imaginaire_spade.lmdb_builder.shard import summary

    gc.freeze()  # What is imported stays: the lists of files that follow would have it looked through time and again.
    started_at = time.perf_counter()
    data = load_data(arguments.config, arguments.overrides)
    rank, world_size = rank_from_environment()
    manifest = build_dataset(
        arguments.data_root,
        arguments.output_root,
        data.labels,
        edges=data.edges,
        conditions=data.conditions,
        images=data.images,
        data_types=arguments.data_types,
        num_shards=arguments.num_shards,
        num_workers=arguments.num_workers,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        drop_unpaired=arguments.drop_unpaired,
        skip_bad=arguments.skip_bad,
        suffixes=data.suffixes,
        input_list=arguments.input_list,
        check=not arguments.no_check,
        resize_smallest_side=arguments.resize_smallest_side,
        quality=arguments.quality,
        recode_maps=arguments.recode_maps,
        rank=rank,
        world_size=world_size,
    )
    seconds = time.perf_counter() - started_at
    if manifest is None:
        print(f"process {rank} of {world_size}: its shards are finished ({seconds:.1f} s); others are at work")
        return
    print(summary(manifest, data.labels, Path(arguments.output_root)))
    print(f"{seconds:.1f} s")
