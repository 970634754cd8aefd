"""Draw edge maps for a raw data set, from its instance maps, its label maps, or both.

    python scripts/make_edge_maps.py --data_root RAW --of instances

writes RAW/edge_maps/NAME.png for every sample that lacks one. Under torchrun or a SLURM job array each process makes
its share. Run it again to continue. (Edge maps on disk are optional: data.edges: instances or labels draws them after
the augmentation.)
"""

from pathlib import Path

from imaginaire_spade.cli import CommandParser
from imaginaire_spade.dataset_prep import BORDERS


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--data_root", required=True, type=Path, help="folder of seg_maps/ and inst_maps/")
    parser.add_argument("--of", choices=list(BORDERS), default="instances", help="whose borders (default: instances)")
    parser.add_argument("--num_workers", type=int, help="processes (default: min(8, cores))")
    parser.add_argument("--overwrite", action="store_true", help="replace existing edge maps")
    arguments = parser.parse_args()

    from imaginaire_spade.dataset_prep.maps import make_edge_maps
    from imaginaire_spade.distributed import rank_from_environment

    rank, world_size = rank_from_environment()
    made, kept = make_edge_maps(
        arguments.data_root, arguments.of, num_workers=arguments.num_workers, overwrite=arguments.overwrite,
        rank=rank, world_size=world_size,
    )  # fmt: skip
    print(f"{made} edge maps made, {kept} kept: {arguments.data_root / 'edge_maps'}")
