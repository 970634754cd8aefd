"""Generate images from label maps: ``python inference.py --checkpoint P --input_dir LABEL_MAPS --output_dir OUT``.

Writes OUT/KEY.png and a gallery OUT/index.html. If a side of a label map differs by more than a factor of 1.5 from the
trained size, the image is generated at the trained size, otherwise at the label map's own size. A note reports the
choice; --size and --resize_back change it. Needs only the checkpoint (which contains its config and label table) and
label maps: PNGs of class ids, palette PNGs, or RGB images in the table's colours. Under torchrun the processes share
the work. A model of edges or dense conditions reads their files from --input_dir DIR: DIR/edge_maps/, DIR/depth/ ...
After Ctrl-C every written file is complete; --skip_existing resumes.

With --num_samples k, or --style_interpolate A B --steps k, a label map's images are OUT/KEY_00.png, OUT/KEY_01.png...
"""

import argparse
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.errors import PROBLEMS_SHOWN, ConfigError, LabelError, positive_integer
from imaginaire_spade.inference.sizes import MAX_PIXELS, SIZE_HELP, SizeRule, read_size
from imaginaire_spade.processes import keep_large_buffers, one_writer

if TYPE_CHECKING:
    from imaginaire_spade.distributed import ProcessInfo
    from imaginaire_spade.inference.folder import RunReport
    from imaginaire_spade.inference.local_noise import Place
    from imaginaire_spade.inference.model import Model
    from imaginaire_spade.inference.synthesis import StyleOf
    from imaginaire_spade.labels import LabelSpec


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    model = parser.add_argument_group("generator")
    model.add_argument("--checkpoint", type=Path, metavar="P", help="checkpoint file, or a folder: its newest file")
    model.add_argument("--logdir", type=Path, metavar="DIR", help="log dir of a training run: its newest checkpoint")
    model.add_argument("--config", type=Path, metavar="C.yaml",
                       help="for test_data and pretrained_weight; the checkpoint knows its architecture")  # fmt: skip
    add_shared_flags(model, "--weights", "--set", "--import", "--device")
    model.add_argument("--batch_size", type=positive_integer, metavar="B",
                       help="label maps per batch on a GPU (default: test_data.batch_size, else 1); a CPU processes"
                       " them one by one")  # fmt: skip
    model.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                       help="precision of the convolutions (default: fp32)")  # fmt: skip
    model.add_argument("--compile", action="store_true", help="torch.compile the generator, which takes minutes")
    inputs = parser.add_argument_group("input")
    inputs.add_argument("--input_dir", type=Path, metavar="DIR",
                        help="label maps, a data set folder or an LMDB folder (default: test_data.roots)")  # fmt: skip
    inputs.add_argument("--map", action="append", default=[], metavar="CLASS=CLASS",
                        help="replace a class, by name or id, everywhere: --map tree=water (repeat)")  # fmt: skip
    inputs.add_argument("--on_bad_label", choices=("fail", "skip", "ignore"), default="fail",
                        help="fail (default): check all label maps before the first image and stop on errors; skip:"
                        " skip unusable label maps; ignore: ids outside the table become don't-care")  # fmt: skip
    inputs.add_argument("--max_pixels", type=positive_integer, default=MAX_PIXELS, metavar="N",
                        help=f"refuse to generate larger images (default: {MAX_PIXELS})")  # fmt: skip
    looks = parser.add_argument_group("style (generators with a style code)")
    looks.add_argument("--num_samples", type=positive_integer, default=1, metavar="k", help="images per label map")
    looks.add_argument("--seed", type=int, metavar="S",
                       help="seed of the style codes, one code per image (default: the config's seed)")  # fmt: skip
    one = looks.add_mutually_exclusive_group()
    one.add_argument("--style_seed", type=int, metavar="S",
                     help="one style for all label maps: sample j has the style of seed S + j")  # fmt: skip
    one.add_argument("--style_image", type=Path, metavar="FILE|DIR",
                     help="use the style of this image; DIR: of the image with the label map's name, or in turn if"
                     " no names match. With --num_samples: sample from the encoder's distribution")  # fmt: skip
    one.add_argument("--style_interpolate", nargs=2, metavar=("A", "B"),
                     help="interpolate from A to B, each a seed (digits) or an image, in --steps frames")  # fmt: skip
    looks.add_argument("--steps", type=positive_integer, metavar="k", help="frames of --style_interpolate (8)")
    looks.add_argument("--animation", choices=("gif", "webp", "mp4", "none"),
                       help="animation that --style_interpolate also writes (default: KEY.gif); mp4 needs the package"
                       " av")  # fmt: skip
    local = parser.add_argument_group("noise in parts of an image (generators that take it: OASIS)")
    local.add_argument("--noise", choices=("image", "class", "region", "pixel"), default="image",
                       help="what has a noise vector of its own: the image (default), each class, each connected region"
                       " of one class, or each pixel")  # fmt: skip
    local.add_argument("--resample", action="append", default=[], metavar="CLASS|X,Y",
                       help="new noise for a class (name or id), or for the region at a pixel (with --noise class: for"
                       " its class); the rest keeps its own (repeat)")  # fmt: skip
    local.add_argument("--resample_seed", type=int, metavar="S", help="seed of that (default: the other seed + 1)")
    outputs = parser.add_argument_group("output")
    outputs.add_argument("--output_dir", type=Path, required=True, metavar="OUT")
    outputs.add_argument("--size", metavar="trained|own|HxW",
                         help=f"{SIZE_HELP} (default: trained if a side of the label map differs from it by more than a"
                         " factor of 1.5, else own)")  # fmt: skip
    outputs.add_argument("--tile", nargs="?", const="auto", metavar="auto|N",
                         help="generate larger label maps in tiles of N pixels a side: the same images, in the memory"
                         " of one tile (auto: 768); --size is own then, unless given")  # fmt: skip
    outputs.add_argument("--resize_back", action="store_true", help="write images at their label maps' own size")
    outputs.add_argument("--format", choices=("png", "jpg", "tif", "npy"),
                         help="default: png, or what holds the channels and the depth of data.images")  # fmt: skip
    outputs.add_argument("--no_gallery", action="store_true", help="write no index.html and no coloured label maps")
    existing = outputs.add_mutually_exclusive_group()
    existing.add_argument("--skip_existing", action="store_true", help="keep existing images, generate the others")
    existing.add_argument("--overwrite", action="store_true", help="replace existing images")
    parser.add_argument("--single_gpu", action="store_true", help=argparse.SUPPRESS)  # imaginaire's; one is the default
    add_shared_flags(parser, "--local-rank")
    arguments = parser.parse_args()
    if not arguments.style_interpolate and (arguments.steps or arguments.animation):
        parser.error("--steps and --animation are for --style_interpolate A B: give that too, or leave them out")
    arguments.steps, arguments.animation = arguments.steps or 8, arguments.animation or "gif"
    if arguments.resample_seed is not None and not arguments.resample:
        parser.error("--resample_seed is for --resample CLASS or --resample X,Y: give that too, or leave it out")
    if arguments.noise != "image" and (arguments.style_image or arguments.style_interpolate):
        parser.error(f"--noise {arguments.noise} draws every vector from a seed: leave --style_image and"
                     " --style_interpolate out")  # fmt: skip
    if arguments.style_interpolate and (arguments.num_samples > 1 or arguments.steps < 2):
        parser.error("--style_interpolate makes --steps frames per label map (2 or more): leave --num_samples out")
    return arguments


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    arguments = parse_arguments()
    keep_large_buffers()

    from imaginaire_spade import distributed
    from imaginaire_spade.build import import_modules
    from imaginaire_spade.data.dataset import LabelMapDataset
    from imaginaire_spade.data.folders import DATA_TYPES
    from imaginaire_spade.inference.folder import FolderOptions, Progress, generate_folder
    from imaginaire_spade.inference.local_noise import check_takes_local_noise, read_place
    from imaginaire_spade.inference.model import load_named
    from imaginaire_spade.inference.output import check_animation, check_apart
    from imaginaire_spade.inference.synthesis import check_tile

    size = "own" if arguments.tile and not arguments.size else arguments.size
    asked = read_size(size, "--size", max_pixels=None if arguments.tile else arguments.max_pixels)
    if arguments.resize_back and asked == "own":
        raise ConfigError("--resize_back: with --size own images have their label maps' size already; leave one out")
    import_modules(arguments.imports)
    info = distributed.process_info_from_environment()
    device = distributed.choose_device(arguments.device, info)
    _, model, given = load_named(
        arguments.checkpoint, arguments.logdir, arguments.config, arguments.overrides, weights=arguments.weights,
        device=device, precision=arguments.precision, compiled=arguments.compile,
    )  # fmt: skip
    config, sizes = model.config, SizeRule(asked, model.trained_size)
    tile = check_tile(model, arguments.tile)
    test_data = (given.test_data if given else None) or config.test_data
    notes = list(model.notes)
    if arguments.noise != "image" or arguments.resample:
        check_takes_local_noise(model, f"--noise {arguments.noise}" if arguments.noise != "image" else "--resample")
    places = [read_place(config.data.labels, text, "--resample") for text in arguments.resample]
    if arguments.noise == "pixel":
        warnings.filterwarnings("ignore", "noise per pixel")
        notes.append("noise per pixel: SPADE norms are dense, which takes longer than tables")
    varied = arguments.num_samples > 1 or arguments.seed is not None or arguments.style_seed is not None
    if not model.generator.style_dims and varied:
        notes.append(
            "this generator takes no style code, so its images do not vary: seeds change nothing, samples of a label"
            " map are equal"
        )

    roots = (str(arguments.input_dir),) if arguments.input_dir else test_data.roots if test_data else ()
    if not roots:
        raise ConfigError("no label maps: give --input_dir DIR, or test_data: {roots: [DIR]} in the --config")
    check_apart(arguments.output_dir, roots, {*DATA_TYPES, *(condition.name for condition in config.data.conditions)})
    changed: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        dataset = LabelMapDataset(
            roots, config.data.labels, edges=config.data.edges, distances=model.layout_spec.has_distances,
            size_of=sizes, images=config.data.images, with_images=False,
            replace=_replacements(config.data.labels, arguments.map),
            on_unknown=partial(_remember, changed) if arguments.on_bad_label == "ignore" else None,
            conditions=config.data.conditions,
            suffixes=config.data.suffixes,
        )  # fmt: skip
    notes += [str(warning.message) for warning in caught]
    seed = config.seed if arguments.seed is None else arguments.seed
    style_of = _styles(arguments, model, dataset.keys, seed)
    if arguments.noise != "image" or places:
        style_of = _local(arguments, model, style_of, places, seed)
    animation = f".{arguments.animation}" if arguments.style_interpolate and arguments.animation != "none" else None
    if animation is not None:
        check_animation(animation)
    if info.is_main:
        _tell(notes)

    progress = Progress(shown=info.is_main)
    try:
        options = FolderOptions(
            batch_size=arguments.batch_size or (test_data.batch_size if test_data else 1),
            num_samples=arguments.steps if arguments.style_interpolate else arguments.num_samples,
            suffix=f".{arguments.format}" if arguments.format else None,
            animation=animation,
            existing="skip" if arguments.skip_existing else "overwrite" if arguments.overwrite else "refuse",
            on_bad_label="skip" if arguments.on_bad_label == "skip" else "fail",
            max_pixels=arguments.max_pixels, tile=tile, resize_back=arguments.resize_back,
            gallery=not arguments.no_gallery, sample_names=_sample_names(arguments, model, seed),
            named_pixels=[place for place in places if isinstance(place, tuple)],
        )  # fmt: skip
        with one_writer(arguments.output_dir, "--output_dir", info.rank):
            report = generate_folder(
                model, dataset, arguments.output_dir, options,
                style_of=style_of, sizes=sizes, info=info, on_written=progress, on_note=lambda note: _tell([note]),
            )  # fmt: skip
    except KeyboardInterrupt:
        print(
            "stopped: every written file is complete; --skip_existing generates the rest", file=sys.stderr, flush=True
        )
        raise
    finally:
        progress.close()
    _tell([f"unknown ids taken as don't care: {text}" for text in changed])
    _tell([f"left out: {text}" for text in report.left_out])
    print(_summary(arguments.output_dir, report, info), flush=True)


def _stop(number: int, _: object) -> None:
    """Stop as Ctrl-C does, so that every written file is whole, with the signal's exit status."""
    raise KeyboardInterrupt(number)


def _styles(arguments: argparse.Namespace, model: "Model", keys: list[str], seed: int) -> "StyleOf":
    from imaginaire_spade.inference import synthesis

    if arguments.style_interpolate:
        start, end = (synthesis.style_named(model, name) for name in arguments.style_interpolate)
        return synthesis.interpolated_styles(start, end, arguments.steps)
    if arguments.style_image is not None:
        return synthesis.image_styles(model, arguments.style_image, keys, seed, arguments.num_samples)
    if arguments.style_seed is not None:
        return synthesis.shared_styles(arguments.style_seed, model.generator.style_dims)
    return synthesis.drawn_styles(seed, model.generator.style_dims, arguments.num_samples)


def _local(
    arguments: argparse.Namespace, model: "Model", style_of: "StyleOf", places: "list[Place]", seed: int
) -> "StyleOf":
    """Apply --noise and --resample to the style codes of the images."""
    from imaginaire_spade.inference.synthesis import local_styles

    shared = arguments.style_seed is not None
    seed = arguments.style_seed if shared else seed
    other = seed + 1 if arguments.resample_seed is None else arguments.resample_seed
    anew = [(place, other) for place in places]
    return local_styles(
        style_of, arguments.noise, seed, anew, model.generator.style_dims, num_samples=arguments.num_samples,
        shared=shared,
    )  # fmt: skip


def _sample_names(arguments: argparse.Namespace, model: "Model", seed: int) -> list[str]:
    """Say of each sample where its style comes from, by the flag that gives it again."""
    if arguments.style_interpolate:
        start, end = (f"seed {name}" if name.isdecimal() else Path(name).name for name in arguments.style_interpolate)
        return [start, *(f"{100 * j / (arguments.steps - 1):.0f} %" for j in range(1, arguments.steps - 1)), end]
    if not model.generator.style_dims:
        return []
    count, image = arguments.num_samples, arguments.style_image
    if arguments.style_seed is not None and image is None:
        return [f"--style_seed {arguments.style_seed + j}" for j in range(count)]
    of, drawn = f"style of {image.name}" if image else "", f"--seed {seed}" if count > 1 or not image else ""
    return [", ".join(filter(None, (of, drawn, f"sample {j}" if count > 1 else ""))) for j in range(count)]


def _replacements(labels: "LabelSpec", texts: list[str]) -> dict[int, int]:
    found = dict[int, int]()
    if texts and not labels.num_classes:
        raise ConfigError("--map replaces classes of label maps, and this model takes none: leave it out")
    for text in texts:
        old, new = _replacement(labels, text)
        if found.setdefault(old, new) != new:
            raise ConfigError(f"--map {text}: another --map replaces the same class: write one of them")
    return found


def _replacement(labels: "LabelSpec", text: str) -> tuple[int, int]:
    old, equals, new = text.partition("=")
    if not equals:
        raise ConfigError(f"--map {text}: write CLASS=CLASS, such as --map tree=water or --map 6=5")
    try:
        return labels.id_of(old), labels.id_of(new)
    except LabelError as error:
        raise ConfigError(f"--map {text}: {error}") from None


def _remember(problems: list[str], error: LabelError) -> None:
    problems.append(str(error))


def _tell(notes: list[str]) -> None:
    more = [f"{len(notes) - PROBLEMS_SHOWN} more such notes"] if len(notes) > PROBLEMS_SHOWN else []
    for note in notes[:PROBLEMS_SHOWN] + more:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _summary(directory: Path, report: "RunReport", info: "ProcessInfo") -> str:
    share = f"process {info.rank} of {info.world_size}: " if info.world_size > 1 else ""
    left_out = f", {len(report.left_out)} label map(s) left out" if report.left_out else ""
    rate = f", {report.images / report.seconds:.2f} images/s" if report.images else ""
    page = f"; look at {report.gallery}" if report.gallery else ""
    return f"{share}wrote {report.images} of {report.total} images to {directory}{left_out}{rate}{page}"
