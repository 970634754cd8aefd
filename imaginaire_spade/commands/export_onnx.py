"""Write a checkpoint's generator to a file that runs without this package.

OUTPUT.onnx runs with onnxruntime (projects/spade/run_onnx.py is an example); OUTPUT.pt2 with torch alone
(torch.export.load). Inputs, sizes and metadata: projects/spade/README.md, "Export". The file is written only if its
pictures are the generator's, to within 0.001 on the scale of -1 to 1, at several sizes and batches. --page writes a
painting page around OUTPUT.onnx that any web server can show: docs/painting.md, "Without a server".
"""

import sys
from pathlib import Path

from imaginaire_spade.cli import CommandParser, add_shared_flags
from imaginaire_spade.errors import ConfigError


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="P",
                        help="checkpoint file, or a folder or log dir, whose newest checkpoint is used")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="ends in .onnx or .pt2")
    add_shared_flags(parser, "--weights", "--import")
    parser.add_argument("--noise", choices=("image", "pixel"), default="image",
                        help="z: a vector for each image (default), or for each pixel, so that noise may differ from"
                        " place to place (generators that take it: OASIS)")  # fmt: skip
    parser.add_argument("--page", type=Path, metavar="ONNXRUNTIME_WEB.tgz",
                        help="also write, beside OUTPUT, a painting page that runs in the browser, without a server of"
                        " ours: its runtime is the npm package onnxruntime-web (npm pack onnxruntime-web)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args()

    from imaginaire_spade.build import import_modules
    from imaginaire_spade.demo.static import check_paintable, read_runtime, write_page
    from imaginaire_spade.export.generator import check_output, export_model
    from imaginaire_spade.inference.local_noise import check_takes_local_noise
    from imaginaire_spade.inference.model import Model, find_checkpoint

    check_output(arguments.output, overwrite=arguments.overwrite)
    if arguments.page and arguments.output.suffix != ".onnx":
        raise ConfigError("--page: browsers run ONNX: write --output FOLDER/model.onnx, in a folder for the page alone")
    if arguments.page and arguments.noise == "pixel":
        raise ConfigError("--page: its noise is one vector for the image: leave --noise pixel out")
    runtime = read_runtime(arguments.page) if arguments.page else {}
    import_modules(arguments.imports)
    model = Model.load(
        find_checkpoint(arguments.checkpoint, None, None), weights=arguments.weights, for_inference=False
    )
    if arguments.page:
        check_paintable(model)
    if arguments.noise == "pixel":
        check_takes_local_noise(model, "--noise pixel")
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)

    def report(name: str, difference: float) -> None:
        print(f"{name}: largest difference {difference:.1e}", flush=True)

    export_model(model, arguments.output, report, by_pixel=arguments.noise == "pixel")
    print(f"wrote {arguments.output}, {arguments.output.stat().st_size / 2**20:.1f} MiB")
    if arguments.page:
        write_page(model, arguments.output, runtime)
        print(f"wrote its painting page; any web server shows it: python -m http.server -d {arguments.output.parent}")
