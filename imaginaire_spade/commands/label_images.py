"""Label photos that have no label maps with a segmentation network.

    python scripts/label_images.py --data_root RAW/train --model MODEL_ID_OR_FOLDER
    torchrun --nproc_per_node=8 scripts/label_images.py --data_root RAW/train --model MODEL_ID_OR_FOLDER

reads RAW/train/images, writes RAW/train/seg_maps/NAME.png (ids of the model) and RAW/train/labels.yaml, the label table
to base a config on. Under torchrun or in a SLURM job array each process labels its share. Run it again to continue.
--model takes any Hugging Face semantic segmentation model (package transformers); --deeplab a state dict
of torchvision's deeplabv3_resnet50.
"""

from pathlib import Path

from imaginaire_spade.cli import CommandParser, add_shared_flags


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--data_root", required=True, type=Path, help="folder that holds images/")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="Hugging Face model id, or a local folder")
    which.add_argument("--deeplab", type=Path, metavar="WEIGHTS", help="state dict of deeplabv3_resnet50")
    parser.add_argument("--names", type=Path, help="--deeplab: file of class names, one per line")
    add_shared_flags(parser, "--device")
    parser.add_argument("--overwrite", action="store_true", help="replace existing label maps")
    arguments = parser.parse_args()

    from imaginaire_spade.dataset_prep.maps import label_photos
    from imaginaire_spade.distributed import (
        ProcessInfo,
        choose_device,
        process_info_from_environment,
        rank_from_environment,
    )
    from imaginaire_spade.pretrained.segmenters import deeplab_segmenter, hugging_face_segmenter

    rank, world_size = rank_from_environment()
    info = process_info_from_environment() if world_size > 1 else ProcessInfo()
    device = choose_device(arguments.device, info)
    if arguments.model:
        segmenter = hugging_face_segmenter(arguments.model, device)
    else:
        names = arguments.names.read_text(encoding="utf-8").splitlines() if arguments.names else []
        segmenter = deeplab_segmenter(arguments.deeplab, names, device)
    made, kept = label_photos(
        segmenter, arguments.data_root, overwrite=arguments.overwrite, rank=rank, world_size=world_size
    )
    print(f"{made} label maps made, {kept} kept: {arguments.data_root / 'seg_maps'}")
