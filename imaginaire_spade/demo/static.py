"""Write the painting page as a folder of static files: the generator runs in the browser, by onnxruntime-web.

Responsible for what the folder holds. ``page/`` is the page itself, as the server shows it; ``static_page/`` has what
stands in for the server.
"""

import json
import shutil
import tarfile
from pathlib import Path

from imaginaire_spade.demo.service import PaintingService
from imaginaire_spade.errors import ConfigError, first_line
from imaginaire_spade.files import write_bytes
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.sizes import FAR
from imaginaire_spade.inference.synthesizer import Synthesizer

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of the npm package onnxruntime-web, in its dist/."""


def read_runtime(package: Path) -> dict[str, bytes]:
    """Read the files of ``RUNTIME`` from ``onnxruntime-web-VERSION.tgz``, as ``npm pack onnxruntime-web`` fetches it.

    Raises:
        ConfigError: it does not hold them.
    """
    try:
        with tarfile.open(package, "r:gz") as archive:
            members = {name: archive.extractfile(f"package/dist/{name}") for name in RUNTIME}
            return {name: file.read() for name, file in members.items() if file is not None}
    except (OSError, tarfile.TarError, KeyError) as error:
        raise ConfigError(
            f"--page {package}: not the npm package onnxruntime-web ({first_line(error)}); npm pack onnxruntime-web"
            " fetches its .tgz"
        ) from None


def check_paintable(model: Model) -> None:
    """Check that the browser can make all inputs of a generator from a painted label map.

    Raises:
        ConfigError: it cannot.
    """
    spec = model.layout_spec
    if spec.has_distances or spec.num_conditions or not spec.num_label_channels:
        raise ConfigError(
            "--page: this generator takes distances (CLADE-ICPE) or dense conditions, or no label map: the page cannot"
            " paint that. Leave --page out (a page with a server: python -m imaginaire_spade.demo)"
        )


def write_page(model: Model, file: Path, runtime: dict[str, bytes]) -> None:
    """Write the page beside an exported generator.

    Args:
        model: what was exported.
        file: the ``.onnx`` file.
        runtime: what ``read_runtime`` returns.
    Raises:
        UserError: a file cannot be written.
    """
    service = PaintingService(Synthesizer(model), model.config.data.name)
    about, labels, spec = service.describe(), model.config.data.labels, model.config.data.images
    about |= {
        "file": file.name,
        "inputs": ["labels", *["edges"] * model.layout_spec.has_edges, *["z"] * bool(about["style_dims"])],
        "has_style_encoder": False,
        "takes_local_noise": False,
        "num_classes": labels.num_classes,
        "size_multiple": model.generator.size_multiple,
        "far": FAR,
        "bands": spec.preview or ((0, 1, 2) if spec.channels >= 3 else (0, 0, 0)),
        "train_ids": {raw: int(labels.table[raw]) for raw in labels.known_ids},
    }
    write_bytes(file.parent / "model.json", json.dumps(about).encode())
    for folder in ("page", "static_page"):  # the second one's server.js takes the place of the first one's
        shutil.copytree(Path(__file__).parent / folder, file.parent, dirs_exist_ok=True)
    for name, content in runtime.items():
        write_bytes(file.parent / "onnxruntime" / name, content)
