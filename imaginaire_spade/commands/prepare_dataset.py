"""Turn the official download of a data set, or the export of an annotation tool, into raw folders or LMDBs.

    python scripts/prepare_dataset.py cocostuff --source DOWNLOADS --output dataset/cocostuff_raw
    python scripts/prepare_dataset.py cityscapes --source DOWNLOADS --output dataset/cityscapes --lmdb

What --source must hold, unpacked:
    cocostuff       train2017/ val2017/ stuffthingmaps_trainval2017/{train,val}2017/
                    [annotations/panoptic_{train,val}2017/ or annotations/instances_{train,val}2017.json (for
                    which the package pycocotools is needed): instance maps, whose borders are the combined boundary
                    maps (data.edges: instances)]
    ade20k          ADEChallengeData2016/{images,annotations}/{training,validation}/
    ade20k_outdoor  the same: the scenes of --scene_list FILE, or those that show sky, mountain or earth and no
                    ceiling, bed or sink (a few indoor scenes stay: look through them)
    cityscapes      leftImg8bit/{train,val}/CITY/ gtFine/{train,val}/CITY/; made 512 x 256 (see --resize_h_w)
    camvid          {train,val,test}/ {train,val,test}annot/ (SegNet's split)
    facades         base/ extended/ (CMP); 106 images, evenly spread, become val
    landscapes      photos (LHQ, Flickr): no labels, see scripts/label_images.py
    celebamask_hq   CelebA-HQ-img/ CelebAMask-HQ-mask-anno/; the parts are merged, photos made 512 x 512 like them
    loveda          {Train,Val}/{Urban,Rural}/{images_png,masks_png}/
    isprs           Potsdam: 2_Ortho_RGB/ 5_Labels_all/; Vaihingen: top/ gts_for_participants/ [--images, --labels]
    ade20k_full     ADE20K_2021_17_01/images/ADE/{training,validation}/ with all classes, or those of --classes
    mapillary       {training,validation}/{images,v2.0,...}/ config_v2.0.json [--labels v1.2]
    custom          images/ labels/ [--images, --labels, --instances name other folders; in one folder for both, the
                    label maps are NAME_mask.png, as Roboflow exports them]

What annotation tools export, unpacked (docs/data_from_tools.md says which export to choose):
    coco            any COCO JSON with polygons or masks, or panoptic maps in the folder of its name, and the photos
                    (CVAT, Roboflow, ...) [--images, --labels JSON]
    cvat, voc       labelmap.txt SegmentationClass/ JPEGImages/ [SegmentationObject/ ImageSets/]; PASCAL VOC's own
                    folders need no labelmap.txt
    labelme         photos, each with its JSON [--images]
    label_studio    the JSON, and the photos [--images]
    parts           images/ masks/ with one mask per part: PHOTO_PART.png, PHOTO/PART.png or PART/PHOTO.png; --classes
                    names the parts from the lowest to the top one

Label ids stay those of the download; configs/labels/NAME.yaml says what they mean. For the tools, mapillary and
ade20k_full, OUTPUT/labels.yaml does; pixels that nothing covers have no class, and --classes chooses classes.

Run it again to continue. Under torchrun or in a SLURM job array each process writes its share of the folders; --lmdb
and --edge_maps need one process.
"""

import shutil
from pathlib import Path

from imaginaire_spade.cli import CommandParser
from imaginaire_spade.dataset_prep import BORDERS, NAMES
from imaginaire_spade.errors import ConfigError


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--source", required=True, type=Path, help="folder of the unpacked download")
    parser.add_argument(
        "--output", required=True, type=Path, help="folder to write SPLIT/images, SPLIT/seg_maps ... into"
    )
    parser.add_argument("--lmdb", action="store_true", help="write LMDBs OUTPUT/SPLIT instead of folders")
    parser.add_argument("--link", action="store_true", help="link to the downloaded files instead of copying them")
    parser.add_argument("--edge_maps", choices=list(BORDERS), help="also write edge maps, from these borders")
    parser.add_argument("--resize_h_w", type=int, nargs=2, metavar=("H", "W"), help="resize everything to this size")
    parser.add_argument(
        "--scene_list",
        type=Path,
        help="ade20k_outdoor: scenes (as in sceneCategories.txt) or names of images, one per line",
    )
    parser.add_argument("--num_val", type=int, default=0, help="number of images for val, if the download has no split")
    parser.add_argument("--images", type=Path, help="folder of the photos below --source, if it has another name")
    parser.add_argument("--labels", type=Path, help="folder of the label maps, or the JSON, below --source")
    parser.add_argument("--instances", type=Path, help="custom: folder of the instance maps below --source")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME",
        help="tools: the classes with the ids 0, 1, ...; all others count as no class (default: all)",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="--lmdb: YAML with data.labels (default: configs/labels/NAME.yaml)")
    parser.add_argument("--num_workers", type=int, help="processes (default: min(8, cores))")
    arguments = parser.parse_args()

    from imaginaire_spade.config_files import CONFIGS, load_labels
    from imaginaire_spade.dataset_prep.maps import make_edge_maps
    from imaginaire_spade.dataset_prep.prepare import LABELS, TOOLS, Options, prepare
    from imaginaire_spade.distributed import rank_from_environment
    from imaginaire_spade.lmdb_builder.build import build_dataset

    rank, world_size = rank_from_environment()
    if world_size > 1 and (arguments.lmdb or arguments.edge_maps):
        raise ConfigError(
            f"{world_size} processes: --lmdb and --edge_maps need all folders. Prepare the folders first, then run"
            " scripts/build_lmdb.py and scripts/make_edge_maps.py, which work with several processes as well"
        )
    choosers = [name for name in TOOLS if name != "mapillary"]
    if arguments.classes and arguments.name not in choosers:
        raise ConfigError(f"--classes: {arguments.name} has fixed classes; those with a choice: {', '.join(choosers)}")
    table = arguments.config or CONFIGS / f"labels/{arguments.name}.yaml"
    labels = None
    if arguments.lmdb:
        if arguments.name == "landscapes":
            raise ConfigError("--lmdb needs label maps: prepare folders first, then scripts/label_images.py")
        if arguments.config is None and not table.is_file() and arguments.name not in TOOLS:
            raise ConfigError("--lmdb needs a label table: give --config (YAML with data.labels), or prepare folders")
        labels = load_labels(table) if arguments.config or arguments.name not in TOOLS else None
    size = tuple(arguments.resize_h_w) if arguments.resize_h_w else None
    options = Options(
        size, arguments.scene_list, arguments.num_val, arguments.images, arguments.labels, arguments.instances,
        tuple(arguments.classes),
    )  # fmt: skip
    raw = arguments.output / ".raw" if arguments.lmdb else arguments.output
    counts = prepare(
        arguments.name, arguments.source, raw, options,
        link=arguments.link or arguments.lmdb, num_workers=arguments.num_workers, rank=rank, world_size=world_size,
    )  # fmt: skip
    if arguments.lmdb and labels is None:
        labels = load_labels(raw / LABELS)
    for split, count in counts.items():
        if arguments.edge_maps:
            make_edge_maps(raw / split, arguments.edge_maps, num_workers=arguments.num_workers)
        if labels is not None:
            build_dataset(raw / split, arguments.output / split, labels, num_workers=arguments.num_workers)
        print(f"{split}: {count} samples: {arguments.output / split}")
    if arguments.name in TOOLS:
        if arguments.lmdb:
            (raw / LABELS).replace(arguments.output / LABELS)
        print(f"label table: {arguments.output / LABELS} (a config may name it as a base)")
    if arguments.lmdb:
        shutil.rmtree(raw)
