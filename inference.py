"""Make pictures of label maps: ``python inference.py --checkpoint P --input_dir LABEL_MAPS --output_dir OUT``.

Writes OUT/KEY.png at each label map's own size, and OUT/index.html to look at them. Needs nothing but the checkpoint
(which carries its config and label table) and label maps. Under torchrun the processes share the work.
"""

import argparse
import sys
import warnings
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from imaginaire_spade import distributed
from imaginaire_spade.build import import_modules, layout_spec
from imaginaire_spade.config import RunConfig, load_config
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.errors import ConfigError, run_command_line
from imaginaire_spade.inference.folder import Progress, check_apart, generate_folder
from imaginaire_spade.inference.style import encode_style, read_style_picture
from imaginaire_spade.inference.weights import LoadedModel, check_fits, find_checkpoint, load_generator, with_overrides


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("what generates")
    model.add_argument("--checkpoint", type=Path, metavar="P", help="checkpoint file, or a folder: its newest one")
    model.add_argument("--logdir", type=Path, metavar="DIR", help="log dir of a training run: its newest checkpoint")
    model.add_argument("--config", type=Path, metavar="C.yaml",
                       help="for test_data and pretrained_weight; the checkpoint knows its architecture")  # fmt: skip
    model.add_argument("--weights", choices=("ema", "raw"), default="ema", help="moving average (default) or raw")
    model.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key (repeat)")
    model.add_argument("--import", action="append", default=[], dest="modules", metavar="MODULE",
                       help="import your module, which registers your components (repeat)")  # fmt: skip
    model.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    model.add_argument("--batch_size", type=_positive, metavar="B", help="default: test_data.batch_size, else 1")
    inputs = parser.add_argument_group("what it generates from")
    inputs.add_argument("--input_dir", type=Path, metavar="DIR",
                        help="label maps, a data set folder or an LMDB root (default: test_data.roots)")  # fmt: skip
    inputs.add_argument("--num_samples", type=_positive, default=1, metavar="k", help="pictures per label map")
    inputs.add_argument("--seed", type=int, metavar="S", help="of the style codes (default: the config's)")
    inputs.add_argument("--style_image", type=Path, metavar="PATH", help="take the style of this picture")
    outputs = parser.add_argument_group("what it writes")
    outputs.add_argument("--output_dir", type=Path, required=True, metavar="OUT")
    outputs.add_argument("--format", choices=("png", "jpg"), default="png")
    outputs.add_argument("--no_gallery", action="store_true", help="no index.html, no coloured label maps")
    existing = outputs.add_mutually_exclusive_group()
    existing.add_argument("--skip_existing", action="store_true", help="keep pictures that are there, make the others")
    existing.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    parser.add_argument("--single_gpu", action="store_true", help=argparse.SUPPRESS)  # imaginaire's; one is the default
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # older launchers pass it
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main() -> None:
    arguments = parse_arguments()
    import_modules(arguments.modules)
    info = distributed.process_info_from_environment()
    device = distributed.choose_device(arguments.device, info)
    given = load_config(arguments.config, arguments.set) if arguments.config else None
    checkpoint = find_checkpoint(arguments.checkpoint, arguments.logdir, given)
    model = load_generator(checkpoint, weights=arguments.weights, device=device)
    config = with_overrides(model.config, arguments.set, checkpoint.name)
    for other, where in ((given, str(arguments.config)), (config, f"--set {' '.join(arguments.set)}")):
        if other is not None:
            check_fits(model, other, where)
    test_data = (given.test_data if given else None) or config.test_data
    notes = [*model.notes, *_notes(arguments, model, config, given)]

    roots = (str(arguments.input_dir),) if arguments.input_dir else test_data.roots if test_data else ()
    if not roots:
        raise ConfigError("no label maps: give --input_dir DIR, or test_data: {roots: [DIR]} in the --config")
    check_apart(arguments.output_dir, roots)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        dataset = LabelMapDataset(
            roots, config.data.labels, edges=config.data.edges, distances=layout_spec(config).has_distances,
            with_images=False,
        )  # fmt: skip
    notes += [str(warning.message) for warning in caught]
    style = encode_style(model, read_style_picture(arguments.style_image)) if arguments.style_image else None
    if info.is_main:
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)

    progress = Progress(shown=info.is_main)
    try:
        report = generate_folder(
            model, dataset, arguments.output_dir,
            batch_size=arguments.batch_size or (test_data.batch_size if test_data else 1),
            num_samples=arguments.num_samples,
            seed=config.seed if arguments.seed is None else arguments.seed,
            style=style,
            suffix=f".{arguments.format}",
            existing="skip" if arguments.skip_existing else "overwrite" if arguments.overwrite else "refuse",
            gallery=not arguments.no_gallery, info=info, on_written=progress,
        )  # fmt: skip
    finally:
        progress.close()
    share = f"process {info.rank} of {info.world_size}: " if info.world_size > 1 else ""
    rate = f", {report.pictures / report.seconds:.2f} images/s" if report.pictures else ""
    page = f"; look at {report.gallery}" if report.gallery else ""
    count = f"{report.pictures} of {report.total} pictures"
    print(f"{share}wrote {count} to {arguments.output_dir}{rate}{page}", flush=True)


def _notes(arguments: argparse.Namespace, model: LoadedModel, config: RunConfig, given: RunConfig | None) -> list[str]:
    notes = []
    if given is not None and given.data.labels != config.data.labels:
        notes.append(
            f"data.labels of {arguments.config} differs from the checkpoint's, which is used (change it with --set)"
        )
    if not model.style_dims and (arguments.num_samples > 1 or arguments.seed is not None):
        notes.append("this generator takes no style code: --seed changes nothing, samples of a label map are equal")
    return notes


if __name__ == "__main__":
    record(run_command_line)(main)
