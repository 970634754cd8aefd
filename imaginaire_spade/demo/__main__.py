"""Paint label maps in a browser and see the images: ``python -m imaginaire_spade.demo --checkpoint P``.

Needs nothing but the checkpoint. The page is for this machine alone unless --host says otherwise.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.errors import ConfigError, DataError, run_command_line
from imaginaire_spade.inference.sizes import SIZE_HELP, read_size

if TYPE_CHECKING:
    from imaginaire_spade.config import RunConfig
    from imaginaire_spade.data.dataset import LabelMapDataset


def parse_arguments() -> argparse.Namespace:
    name = sys.argv[0] if sys.argv[0].startswith("imaginaire-spade") else "python -m imaginaire_spade.demo"
    parser = CommandParser(__doc__, name)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="P",
                        help="checkpoint file, or a folder or log dir, whose newest checkpoint is used")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any free port")
    parser.add_argument("--samples", metavar="DIR",
                        help="label maps to start from: a folder, a data set or an LMDB folder (default: the"
                             " checkpoint's own validation data, if available)")  # fmt: skip
    parser.add_argument("--size", metavar="trained|own|HxW",
                        help=f"{SIZE_HELP} (default: trained if a side of the canvas differs from it by more than a"
                             " factor of 1.5, else own); images are resized to the canvas")  # fmt: skip
    add_shared_flags(parser, "--weights", "--device", "--import")
    return parser.parse_args()


def find_samples(config: "RunConfig", given: str | None) -> "LabelMapDataset | None":
    """Label maps to start from: of ``given``, else of the data set that the checkpoint was validated on.

    Raises:
        DataError: ``given`` holds no label maps. Validation data that is not there is not missed.
    """
    from imaginaire_spade.data.dataset import LabelMapDataset

    roots = (given,) if given else config.data.val.roots if config.data.val else ()
    if not roots:
        return None
    try:
        return LabelMapDataset(roots, config.data.labels, with_images=False, suffixes=config.data.suffixes)
    except DataError:
        if given:
            raise
        return None


def main() -> None:
    arguments = parse_arguments()

    from imaginaire_spade.build import import_modules
    from imaginaire_spade.demo.server import PaintingServer, is_loopback
    from imaginaire_spade.demo.service import PaintingService
    from imaginaire_spade.inference.synthesizer import Synthesizer

    size = read_size(arguments.size, "--size")
    import_modules(arguments.imports)
    synthesizer = Synthesizer.load(arguments.checkpoint, weights=arguments.weights, device=arguments.device, size=size)
    config = synthesizer.model.config
    if synthesizer.dense or not synthesizer.labels.num_classes:
        inputs = ", ".join(["edges"] * (config.data.edges != "none") + [c.name for c in synthesizer.dense])
        raise ConfigError(
            f"--checkpoint {arguments.checkpoint}: its generator is made for {inputs}, which cannot be painted as label"
            " maps: make its images with inference.py, or with Synthesizer in Python"
        )
    for note in synthesizer.model.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    if (samples := find_samples(config, arguments.samples)) is None:
        print("note: the data of validation is not here, so there are no label maps to start from (--samples DIR)",
              file=sys.stderr)  # fmt: skip
    service = PaintingService(synthesizer, config.data.name, samples)
    with PaintingServer(service, arguments.host, arguments.port) as server:
        service.warm_up()
        if not is_loopback(arguments.host):
            print(f"note: whoever can reach {server.url} can use the page: it asks for no password", file=sys.stderr)
        print(f"painting page: {server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", flush=True)


if __name__ == "__main__":
    run_command_line(main)
