"""Write the distance maps of CLADE-ICPE next to the label maps of a data set: RAW/distances/NAME.npy.

    python scripts/make_distance_maps.py --config configs/labels/camvid.yaml --data_root RAW

They are optional: without them the loader computes distances. Run it before scripts/build_lmdb.py, which includes them
in the LMDB. Run it again to continue: it makes what is missing, damaged or older than its label map. Under torchrun or
in a SLURM job array each process makes its share.
"""

import time
from pathlib import Path

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.errors import ConfigError


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", required=True, help="YAML with data.labels: a run's config or a label table")
    parser.add_argument("--data_root", required=True, type=Path, help="folder of seg_maps/")
    parser.add_argument("--num_workers", type=int, help="processes (default: min(8, cores))")
    parser.add_argument("--overwrite", action="store_true", help="replace all distance maps")
    add_shared_flags(parser, "--set", "--local-rank")
    parser.add_argument("--import", metavar="MODULE", help="accepted and ignored: no components are used here")
    arguments = parser.parse_args()

    from imaginaire_spade.config_files import load_data
    from imaginaire_spade.data.folders import DISTANCES
    from imaginaire_spade.dataset_prep.maps import make_distance_maps
    from imaginaire_spade.distributed import rank_from_environment

    data = load_data(arguments.config, arguments.overrides)
    if not data.labels.num_classes:
        raise ConfigError(f"{arguments.config}: data.labels is null, and distances are those within label maps")
    rank, world_size = rank_from_environment()
    started_at = time.perf_counter()
    made, kept = make_distance_maps(
        arguments.data_root, data.labels, data.suffixes, num_workers=arguments.num_workers,
        overwrite=arguments.overwrite, rank=rank, world_size=world_size,
    )  # fmt: skip
    seconds = time.perf_counter() - started_at
    rate = f" at {made / seconds:.0f} maps/s" if made else ""
    print(f"{made} distance maps made{rate}, {kept} kept: {arguments.data_root / DISTANCES}", flush=True)
