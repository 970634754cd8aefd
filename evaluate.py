"""Score generated pictures against real ones, and state the protocol the scores were obtained under.

    python evaluate.py --real DIR --fake DIR --reference_split val --metrics fid,kid --output report.json
    python evaluate.py --checkpoint P --config C.yaml --reference_split val      # pictures made on the fly
    python evaluate.py --compare A.json B.json                                   # refused where protocols differ

DIR is a folder of pictures or an LMDB root; --real also takes statistics (.npz, or a folder with m.npy and s.npy).
Under torchrun the processes share the work. Weights come from files: docs/evaluation.md.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from imaginaire_spade import distributed
from imaginaire_spade.build import build_split, import_modules
from imaginaire_spade.config import load_config
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, run_command_line
from imaginaire_spade.evaluation.collection import Collection, collect, load_collection
from imaginaire_spade.evaluation.diversity import PerceptualNetwork, perceptual_network
from imaginaire_spade.evaluation.features import FEATURE_DIMS, RESIZES, FeatureNetwork, feature_network
from imaginaire_spade.evaluation.protocol import REFERENCE_SPLITS
from imaginaire_spade.evaluation.report import compare
from imaginaire_spade.evaluation.scores import KEEP_FEATURES, METRICS, NEED_FEATURES, evaluate_pictures
from imaginaire_spade.evaluation.sources import DatasetPhotos, FolderPictures, PictureSource
from imaginaire_spade.evaluation.statistics import holds_statistics
from imaginaire_spade.inference.folder import Progress
from imaginaire_spade.inference.generated import GeneratedPictures
from imaginaire_spade.inference.weights import check_fits, find_checkpoint, load_generator, with_overrides

PROCESS_GROUP_TIMEOUT_S = 3600.0
"""Shares of the work end at different times."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fake = parser.add_argument_group("what is evaluated")
    fake.add_argument("--fake", type=Path, metavar="DIR", help="generated pictures: a folder or an LMDB root")
    fake.add_argument("--checkpoint", type=Path, metavar="P", help="make the pictures of data.val with this checkpoint")
    fake.add_argument("--logdir", type=Path, metavar="DIR", help="log dir of a training run: its newest checkpoint")
    fake.add_argument("--config", type=Path, metavar="C.yaml", help="for its data (default: the checkpoint's own)")
    fake.add_argument("--weights", choices=("ema", "raw"), default="ema", help="moving average (default) or raw")
    fake.add_argument("--num_samples", type=_positive, default=1, metavar="k",
                      help="pictures per label map; the first counts, all show diversity")  # fmt: skip
    fake.add_argument("--seed", type=int, metavar="S", help="of the style codes (default: the config's)")
    fake.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key (repeat)")
    fake.add_argument("--import", action="append", default=[], dest="modules", metavar="MODULE",
                      help="import your module, which registers your components (repeat)")  # fmt: skip
    real = parser.add_argument_group("what it is compared with")
    real.add_argument("--real", type=Path, metavar="DIR",
                      help="photos, or statistics of them (default with a checkpoint: its data's photos)")  # fmt: skip
    real.add_argument("--reference_split", choices=REFERENCE_SPLITS, help="what the real pictures are; required")
    how = parser.add_argument_group("how")
    how.add_argument("--metrics", default="fid", help=f"comma-separated: {','.join(METRICS)} (default: fid)")
    how.add_argument("--inception_weights", metavar="FILE",
                     help="default: torch's cache; random:SEED: an untrained network, for dry runs")  # fmt: skip
    how.add_argument("--lpips_weights", metavar="FILE", help="AlexNet of torchvision; as above")
    how.add_argument("--feature_dim", type=int, choices=FEATURE_DIMS, default=2048, help="2048: FID proper")
    how.add_argument("--resize", choices=RESIZES, default="legacy", help="pytorch-fid's, or antialiased")
    how.add_argument("--batch_size", type=_positive, default=32, metavar="B")
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    how.add_argument("--skip_bad", action="store_true", help="leave out, count and name pictures that cannot be read")
    parser.add_argument("--output", type=Path, metavar="FILE", help="report to write, JSON")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="compare two reports")
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # older launchers pass it
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        print(compare(tuple(arguments.compare)))
        return
    metrics = _check(arguments)
    import_modules(arguments.modules)
    info = distributed.process_info_from_environment()
    device = distributed.choose_device(arguments.device, info)
    # Networks first: whether their weights are there is known before any picture is made.
    network = perceptual = None
    if set(metrics) & set(NEED_FEATURES):
        network = feature_network(
            arguments.inception_weights, dim=arguments.feature_dim, resize=arguments.resize, device=device
        )
    if "diversity" in metrics:
        perceptual = perceptual_network(arguments.lpips_weights, device=device)
    fake, real, subject = _sources(arguments, device)

    distributed.init_process_group(info, device, PROCESS_GROUP_TIMEOUT_S)
    try:
        if isinstance(real, Path):
            assert network is not None
            reference = load_collection(real, network, arguments.reference_split)
        else:
            reference = _collect(real, network, None, metrics, arguments, info)
        made = _collect(fake, network, perceptual, metrics, arguments, info)
    finally:
        distributed.leave_process_group()
    if info.is_main:
        report = evaluate_pictures(
            reference, made, network, metrics=metrics, reference_split=arguments.reference_split,
            perceptual=perceptual, num_samples=arguments.num_samples, subject=subject,
        )  # fmt: skip
        print(report.text(), flush=True)
        if arguments.output:
            report.save(arguments.output)


def _check(arguments: argparse.Namespace) -> list[str]:
    """The metrics. Raises ConfigError for flags that do not go together."""
    metrics = [name for name in arguments.metrics.split(",") if name]
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ConfigError(f"--metrics {','.join(unknown)}: unknown; choose from {','.join(METRICS)}")
    if not metrics:
        raise ConfigError(f"--metrics: choose from {','.join(METRICS)}")
    generates = bool(arguments.checkpoint or arguments.logdir or arguments.config)
    if bool(arguments.fake) == generates:
        raise ConfigError("give --fake DIR, or --checkpoint P (or --logdir DIR) to make the pictures, one of the two")
    if arguments.fake and not arguments.real:
        raise ConfigError("--real is missing: the folder of real pictures, or statistics of them (.npz)")
    if not arguments.reference_split:
        raise ConfigError(
            "--reference_split is missing: write train or val, whichever the real pictures are. Scores against one"
            " are no scores against the other"
        )
    beyond = [name for name in metrics if name != "fid"]
    if arguments.real and holds_statistics(arguments.real) and beyond:
        raise ConfigError(f"--real {arguments.real} holds statistics, which serve fid only: {','.join(beyond)} needs"
                          " the pictures")  # fmt: skip
    if "diversity" in metrics and arguments.num_samples < 2:
        raise ConfigError("--metrics diversity compares the samples of one label map: write --num_samples 2 or more")
    return metrics


def _sources(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[PictureSource, PictureSource | Path, dict[str, str]]:
    """(generated pictures, real ones or the place of their statistics, what the report says of them)."""
    real = arguments.real
    if real is not None and not holds_statistics(real):
        real = FolderPictures(real)
    if arguments.fake:
        return FolderPictures(arguments.fake, arguments.num_samples), real, _names(arguments.real, arguments.fake)

    given = load_config(arguments.config, arguments.set) if arguments.config else None
    path = find_checkpoint(arguments.checkpoint, arguments.logdir, given)
    model = load_generator(path, weights=arguments.weights, device=device)
    config = with_overrides(model.config, arguments.set, path.name)
    for other, where in ((given, str(arguments.config)), (config, f"--set {' '.join(arguments.set)}")):
        if other is not None:
            check_fits(model, other, where)
    if given is not None and given.data.labels != config.data.labels:
        print(f"note: data.labels of {arguments.config} differs from the checkpoint's, which is used", file=sys.stderr)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    train, val = (given or config).data.train, (given or config).data.val
    if val is None:
        raise ConfigError(
            f"{arguments.config or path}: no data.val to evaluate on: write data: {{val: {{roots: [DIR]}}}}"
        )
    if arguments.num_samples > 1 and not model.style_dims:
        raise ConfigError(
            f"--num_samples {arguments.num_samples}: this generator takes no style code, so that the samples of a label"
            " map are equal: leave the flag out"
        )
    seed = config.seed if arguments.seed is None else arguments.seed
    maps = build_split(config, val, with_images=False)
    fake = GeneratedPictures(
        model, maps, str(path), num_samples=arguments.num_samples, seed=seed, batch_size=arguments.batch_size
    )
    subject = _names(arguments.real, path) | {
        "weights": f"{model.weights} after {model.images_seen} images", "style_seed": str(seed),
        "label_maps": ", ".join(val.roots),
    }  # fmt: skip
    if real is None:
        # Through the same geometry as the label maps, so that real and generated pictures are of one size.
        roots = train.roots if arguments.reference_split == "train" else val.roots
        photos = build_split(config, val.model_copy(update={"roots": roots}))
        real = DatasetPhotos(photos, ", ".join(roots))
        subject["real"] = real.name
    return fake, real, subject


def _names(real: Path | None, fake: Path) -> dict[str, str]:
    return {"real": str(real), "fake": str(fake)}


def _collect(
    source: PictureSource,
    network: FeatureNetwork | None,
    perceptual: PerceptualNetwork | None,
    metrics: Sequence[str],
    arguments: argparse.Namespace,
    info: ProcessInfo,
) -> Collection:
    progress, done = Progress(shown=info.is_main), itertools.count(1)
    total = len(source.keys[info.rank :: info.world_size])
    try:
        return collect(
            source, network, batch_size=arguments.batch_size, keep_features=bool(set(metrics) & set(KEEP_FEATURES)),
            perceptual=perceptual, skip_bad=arguments.skip_bad, info=info,
            on_picture=lambda _: progress(next(done), total),
        )  # fmt: skip
    finally:
        progress.close()


if __name__ == "__main__":
    record(run_command_line)(main)
