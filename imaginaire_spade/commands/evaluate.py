"""Score generated images against real ones, and state the evaluation protocol.

    python evaluate.py --real DIR --fake DIR --reference_split val --metrics fid,kid --output report.json
    python evaluate.py --checkpoint P --config C.yaml --reference_split val      # images made on the fly
    python evaluate.py --checkpoint P --reference_split val --metrics segmentation --segmenter MODEL --html page.html
    python evaluate.py --compare A.json B.json                                   # refused if protocols differ

DIR is a folder of images or an LMDB folder; --real also takes statistics (.npz, or a folder with m.npy and s.npy).
Under torchrun the processes share the work. Weights come from files: docs/evaluation.md.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imaginaire_spade.cli import CommandParser, add_shared_flags, check_output_file
from imaginaire_spade.errors import ConfigError, positive_integer
from imaginaire_spade.evaluation import METRICS, NEED_FEATURES, REFERENCE_SPLITS, check_metrics
from imaginaire_spade.inference.sizes import SIZE_HELP, Asked, read_size
from imaginaire_spade.pretrained import FEATURE_DIMS, FEATURES, RESIZES
from imaginaire_spade.processes import keep_large_buffers

if TYPE_CHECKING:
    import torch

    from imaginaire_spade.evaluation.segmentation import Segmentation
    from imaginaire_spade.inference.images_to_score import ImagesToScore
    from imaginaire_spade.labels import LabelSpec
    from imaginaire_spade.pretrained.feature_networks import FeatureNetwork

PROCESS_GROUP_TIMEOUT_S = 3600.0
"""Shares of the work end at different times."""


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    fake = parser.add_argument_group("generated images")
    fake.add_argument("--fake", type=Path, metavar="DIR", help="folder or LMDB folder of generated images")
    fake.add_argument(
        "--checkpoint", type=Path, metavar="P", help="generate the images of data.val with this checkpoint"
    )
    fake.add_argument("--logdir", type=Path, metavar="DIR", help="log dir of a training run: its newest checkpoint")
    fake.add_argument(
        "--config",
        type=Path,
        metavar="C.yaml",
        help="config whose data is used (default: the checkpoint's own); with --fake: whose data.images says what the"
        " numbers in files of other than 8 bits mean",
    )
    add_shared_flags(fake, "--weights", "--set", "--import")
    fake.add_argument("--size", metavar="trained|own|HxW",
                      help=f"{SIZE_HELP}; photos of the data likewise (default: the geometry of data.val)")  # fmt: skip
    fake.add_argument("--num_samples", type=positive_integer, default=1, metavar="k",
                      help="images per label map; diversity uses all, other scores the first")  # fmt: skip
    fake.add_argument("--seed", type=int, metavar="S", help="seed of the style codes (default: the config's seed)")
    real = parser.add_argument_group("real images")
    real.add_argument("--real", type=Path, metavar="DIR",
                      help="photos, or statistics of them (default with a checkpoint: its data's photos)")  # fmt: skip
    real.add_argument("--reference_split", choices=REFERENCE_SPLITS, help="split of the real images; required")
    segmentation = parser.add_argument_group("segmentation: do the images show what their label maps say?")
    which = segmentation.add_mutually_exclusive_group()
    which.add_argument("--segmenter", metavar="MODEL", help="Hugging Face segmentation model: id or local folder")
    which.add_argument("--predictions", type=Path, nargs=2, metavar=("FAKE_DIR", "REAL_DIR"),
                       help="instead of a network: predicted id maps of the images and of the photos")  # fmt: skip
    segmentation.add_argument("--segmenter_labels", type=Path, metavar="FILE",
                              help="YAML or JSON: class of our table -> label (default: by name)")  # fmt: skip
    segmentation.add_argument("--label_maps", type=Path, metavar="DIR",
                              help="with --fake: the label maps of the images, a folder or an LMDB folder")  # fmt: skip
    segmentation.add_argument("--label_table", type=Path, metavar="C.yaml",
                              help="with --label_maps: config with data.labels (configs/labels/)")  # fmt: skip
    how = parser.add_argument_group("settings")
    how.add_argument("--metrics", default="fid", help=f"comma-separated: {','.join(METRICS)} (default: fid)")
    how.add_argument("--features", default="inception", metavar="NAME[:WEIGHTS]",
                     help=f"network of the scores: {', '.join(FEATURES)} (default: inception)")  # fmt: skip
    how.add_argument("--inception_weights", metavar="FILE",
                     help="default: torch's cache; random:SEED: an untrained network, for dry runs")  # fmt: skip
    how.add_argument("--lpips_weights", metavar="FILE", help="torchvision's AlexNet; default as above")
    how.add_argument("--feature_dim", type=int, choices=FEATURE_DIMS, default=2048, help="2048: standard FID")
    how.add_argument("--resize", choices=RESIZES, default="legacy", help="legacy: as pytorch-fid; clean: antialiased")
    how.add_argument("--batch_size", type=positive_integer, default=32, metavar="B")
    add_shared_flags(how, "--device")
    how.add_argument("--skip_bad", action="store_true", help="skip unreadable images; the report counts and names them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report page, one HTML file with images")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="compare two reports")
    add_shared_flags(parser, "--local-rank")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    keep_large_buffers()

    from imaginaire_spade import distributed
    from imaginaire_spade.build import import_modules
    from imaginaire_spade.evaluation.evaluate import evaluate
    from imaginaire_spade.evaluation.report import compare, write_report_page
    from imaginaire_spade.inference.folder import PassProgress
    from imaginaire_spade.pretrained.feature_networks import feature_network, perceptual_network

    if arguments.compare:
        print(compare(tuple(arguments.compare)))
        return
    metrics, size = _check(arguments), read_size(arguments.size, "--size")
    for flag, path in (("--output", arguments.output), ("--html", arguments.html)):
        if path is not None:
            check_output_file(path, overwrite=True, flag=flag)
    import_modules(arguments.imports)
    info = distributed.process_info_from_environment()
    device = distributed.choose_device(arguments.device, info)
    # Networks first: whether their weights are there is known before any image is generated.
    network = perceptual = segmentation = None
    if set(metrics) & set(NEED_FEATURES):
        network = feature_network(
            arguments.inception_weights, features=arguments.features, dim=arguments.feature_dim,
            resize=arguments.resize, device=device,
        )  # fmt: skip
    if "diversity" in metrics:
        perceptual = perceptual_network(arguments.lpips_weights, device=device)
    images = _images(arguments, metrics, size, network, device)
    if "segmentation" in metrics:
        assert images.fake.label_table is not None
        segmentation = _segmentation(arguments, images.fake.label_table, device)

    distributed.init_process_group(info, device, PROCESS_GROUP_TIMEOUT_S)
    progress = PassProgress(shown=info.is_main)
    try:
        report = evaluate(
            images.fake, images.real, network, metrics=metrics, reference_split=arguments.reference_split,
            perceptual=perceptual, segmentation=segmentation, photos=images.photos, subject=images.subject,
            geometry=images.geometry, batch_size=arguments.batch_size, skip_bad=arguments.skip_bad, info=info,
            on_image=progress,
        )  # fmt: skip
    finally:
        progress.close()
        distributed.leave_process_group()
    if not info.is_main:
        return
    print(report.text(), flush=True)
    if arguments.output:
        report.save(arguments.output)
    if arguments.html:
        write_report_page(arguments.html, report, images.fake, images.photos)


def _check(arguments: argparse.Namespace) -> list[str]:
    """Return the metrics.

    Raises:
        ConfigError: flags that do not go together.
    """
    from imaginaire_spade.evaluation.collection import holds_statistics

    metrics = [name for name in arguments.metrics.split(",") if name]
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ConfigError(f"--metrics {','.join(unknown)}: unknown; choose from {','.join(METRICS)}")
    if not metrics:
        raise ConfigError(f"--metrics: choose from {','.join(METRICS)}")
    check_metrics(metrics, arguments.features, "--features")
    generates = bool(arguments.checkpoint or arguments.logdir or (arguments.config and not arguments.fake))
    if bool(arguments.fake) == generates:
        raise ConfigError("give --fake DIR, or --checkpoint P (or --logdir DIR) to generate the images, one of the two")
    if arguments.size is not None and not generates:
        raise ConfigError("--size is the size at which a checkpoint generates images; stored ones (--fake) have a size:"
                          " leave it out")  # fmt: skip
    if arguments.fake and not arguments.real:
        raise ConfigError("--real is missing: the folder of real images, or statistics of them (.npz)")
    if not arguments.reference_split:
        raise ConfigError(
            "--reference_split is missing: write train or val, whichever the real images are. Scores against"
            " different splits are not comparable"
        )
    served = ("fid", "segmentation") if generates and "fid" in metrics else ("fid",)  # photos: those of data.val
    beyond = [name for name in metrics if name not in served]
    if arguments.real and holds_statistics(arguments.real) and beyond:
        raise ConfigError(f"--real {arguments.real} holds statistics, which serve fid only: {','.join(beyond)} needs"
                          " the images")  # fmt: skip
    if "diversity" in metrics and arguments.num_samples < 2:
        raise ConfigError("--metrics diversity compares the samples of one label map: write --num_samples 2 or more")
    segmented = bool(arguments.segmenter or arguments.predictions)
    if ("segmentation" in metrics) != segmented:
        raise ConfigError(
            "--metrics segmentation and --segmenter MODEL (or --predictions FAKE_DIR REAL_DIR) belong together: write"
            " both or neither"
        )
    if arguments.segmenter_labels and not arguments.segmenter:
        raise ConfigError("--segmenter_labels says what the labels of --segmenter MODEL mean: that is missing")
    if bool(arguments.label_maps) != bool(arguments.label_table) or (arguments.label_maps and generates):
        raise ConfigError("--label_maps DIR and --label_table C.yaml belong together, and to --fake: a checkpoint has"
                          " both from its config")  # fmt: skip
    if "segmentation" in metrics and not generates and not arguments.label_maps:
        raise ConfigError(
            "--metrics segmentation needs the label maps that the images were generated from: write --label_maps DIR"
            " --label_table C.yaml (a config with data.labels, such as configs/labels/camvid.yaml)"
        )
    return metrics


def _images(
    arguments: argparse.Namespace,
    metrics: list[str],
    size: Asked,
    network: "FeatureNetwork | None",
    device: "torch.device",
) -> "ImagesToScore":
    from imaginaire_spade.config_files import load_data
    from imaginaire_spade.inference.images_to_score import checkpoint_images, stored_images
    from imaginaire_spade.inference.model import load_named

    if arguments.fake:
        return stored_images(
            arguments.fake, arguments.real, reference_split=arguments.reference_split, network=network,
            num_samples=arguments.num_samples, label_maps=arguments.label_maps, label_table=arguments.label_table,
            images=load_data(arguments.config, arguments.overrides).images if arguments.config else None,
        )  # fmt: skip
    path, model, given = load_named(
        arguments.checkpoint, arguments.logdir, arguments.config, arguments.overrides, weights=arguments.weights,
        device=device,
    )  # fmt: skip
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    return checkpoint_images(
        path, model, given, size=size, real=arguments.real, reference_split=arguments.reference_split, network=network,
        num_samples=arguments.num_samples, seed=arguments.seed, batch_size=arguments.batch_size,
        with_photos="segmentation" in metrics,
    )  # fmt: skip


def _segmentation(arguments: argparse.Namespace, labels: "LabelSpec", device: "torch.device") -> "Segmentation":
    from imaginaire_spade.evaluation.segmentation import StoredSegmentation, load_segmentation

    if arguments.predictions:
        generated, real = arguments.predictions
        return StoredSegmentation(generated, real, labels)
    return load_segmentation(arguments.segmenter, arguments.segmenter_labels, labels, device, "--segmenter")
