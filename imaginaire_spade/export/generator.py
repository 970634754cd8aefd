"""Export a generator to run without this package: ONNX (``.onnx``) or ``torch.export`` (``.pt2``).

Responsible for the inputs and outputs of such a file, its metadata, and the check that its images are the generator's.
A file takes, in this order, those of the following inputs that the generator needs:

- ``labels`` int32 [N, H, W]: train ids 0..num_classes (num_classes = don't care), unless ``data.labels`` was null;
- ``edges`` float32 [N, H, W]: 1 where there is an edge, else 0;
- ``distances`` float32 [N, 2, H, W]: of ``data/distances.py`` (CLADE-ICPE);
- ``conditions`` float32 [N, C, H, W]: dense conditions (depth, normals), their ranges scaled to [-1, 1];
- ``z`` float32 [N, style_dims]: style codes, standard normal; exported with noise by pixel [N, style_dims, H, W], which
  may then differ from place to place (OASIS).

It returns ``images`` float32 [N, C, H, W] in [-1, 1], RGB unless ``image_values`` says otherwise. N, H and W are free;
H and W must be multiples of ``size_multiple``, and at least twice that.
"""

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from imaginaire_spade.build import image_size
from imaginaire_spade.cli import check_output_file
from imaginaire_spade.errors import CheckpointError, UserError, first_line, how_to_install
from imaginaire_spade.inference.model import Model
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models.generator import Generator

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-3
"""The largest difference allowed between a file's images and the generator's, on the scale of [-1, 1]."""
CHECKED = ((1, 2, 2), (2, 2, 3), (3, 4, 2))
"""(images, height, width) that the check tries besides the training size; sizes in multiples of ``size_multiple``."""

_PACKAGES = "onnx onnxscript onnxruntime"

Run = Callable[[dict[str, Tensor]], NDArray[np.float32]]


class ExportedGenerator(nn.Module):
    """A generator as a function of tensors, as a file computes it (see the module's description)."""

    def __init__(self, generator: Generator, spec: LayoutSpec, by_pixel: bool = False) -> None:
        super().__init__()
        self.generator = generator
        self.spec = spec
        self.by_pixel = by_pixel

    def forward(
        self, labels: Tensor | None = None, edges: Tensor | None = None, distances: Tensor | None = None,
        conditions: Tensor | None = None, z: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if labels is None:  # without label maps every pixel has the id of no class, 0
            like = edges if conditions is None else conditions[:, 0]
            assert like is not None
            labels = torch.zeros_like(like)
        return self.generator(SemanticLayout(self.spec, labels.to(torch.int16), edges, distances, conditions), z)


def check_output(output: Path, *, overwrite: bool = False) -> None:
    """Check, before any work, that ``output`` can be written.

    Raises:
        UserError: the name does not say the format or is taken, or a package for this format is not installed.
    """
    check_output_file(output, overwrite=overwrite, suffixes=SUFFIXES)
    if output.suffix == ".onnx":
        for package in _PACKAGES.split():
            otherwise = "; or write --output with a name that ends in .pt2, which needs torch alone"
            with how_to_install(_PACKAGES, f"--output {output}: ONNX needs the package {package}", otherwise):
                importlib.import_module(package)


def export_model(
    model: Model, output: Path, on_checked: Callable[[str, float], None], *, by_pixel: bool = False
) -> None:
    """Write the generator to a file, after checking that the file's images are the generator's.

    Args:
        model: on the CPU.
        output: ends in ``.onnx`` or ``.pt2``. Weights beyond 1.5 GB go to ``OUTPUT.data`` beside an ``.onnx`` file.
        on_checked: called after each comparison with its name and the largest difference.
        by_pixel: whether the file takes noise by pixel, for a generator that does.
    Raises:
        CheckpointError: the generator cannot be exported.
        UserError: the file's images differ from the generator's; then no file is written.
    """
    # Trace and convert.
    network = ExportedGenerator(model.generator, model.layout_spec, by_pixel)
    multiple = model.generator.size_multiple
    is_onnx = output.suffix == ".onnx"
    try:
        with _quiet(), torch.no_grad():
            program = _traced(network, multiple)
            converted = _to_onnx(program) if is_onnx else None
    except Exception as error:  # whatever torch meets in a component of the user's own
        advice = "A network to export must not choose its operations by the values of tensors or by particular sizes"
        if isinstance(_origin(error), ImportError):  # torch 2.11 needs onnxscript 0.6
            advice = f"The packages for it are too old: pip install -U {_PACKAGES}"
        raise CheckpointError(
            f"gen.type: {model.config.gen.type} cannot be exported by torch {torch.__version__}:"
            f" {first_line(_origin(error))}. {advice}"
        ) from error

    # Write to a temporary folder, compare, then move.
    about = {key: json.dumps(value) for key, value in metadata(model).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        file = Path(folder, output.name)
        if converted is not None:
            converted.model.metadata_props.update(about)
            converted.save(file, external_data=False)
            run = _load_onnx(file)
        else:
            torch.export.save(program, file, extra_files=about)
            run = _load_pt2(file)
        trained_at = [max(2, length // multiple) for length in image_size(model.config)]
        for count, *size in dict.fromkeys(((1, *trained_at), *CHECKED)):
            height, width = (multiple * length for length in size)
            name, inputs = f"{count} of {height}x{width}", example_inputs(network, count, height, width)
            difference = _difference(run, network, inputs)
            on_checked(name, difference)
            if not difference <= TOLERANCE:  # NaN too
                packages = "onnxscript and onnxruntime" if is_onnx else "torch"
                raise UserError(
                    f"{output}: not written: its images differ from the generator's: {name} pixels differ by up to"
                    f" {difference:.2g}, where {TOLERANCE} is allowed. That is a fault of the exporter or the runtime:"
                    f" try other versions of {packages}"
                )
        for part in sorted(Path(folder).iterdir(), key=lambda path: path == file):  # the file itself last
            part.replace(output.parent / part.name)


def metadata(model: Model) -> dict[str, Any]:
    """Describe a generator for its file: in an ONNX file's metadata, one JSON value per key."""
    config, channels = model.config, model.config.data.images.channels
    return {
        "images": f"float32 [N, {channels}, H, W], {'RGB' if channels == 3 else 'grey' if channels == 1 else 'bands'},"
        " -1 to 1",
        "image_values": config.data.images.model_dump(mode="json"),
        "size_multiple": model.generator.size_multiple,
        "trained_size": image_size(config),
        "style_dims": model.generator.style_dims,
        "edges": config.data.edges,
        "conditions": [condition.model_dump(mode="json") for condition in config.data.conditions],
        "label_table": config.data.labels.model_dump(),
        "generator": config.gen.type,
        "weights": model.weights,
        "images_seen": model.images_seen,
    }


def example_inputs(network: ExportedGenerator, count: int, height: int, width: int) -> dict[str, Tensor]:
    """Make every input that the generator takes, the same each time; labels come in blocks, some of them don't care."""
    spec, rng = network.spec, np.random.default_rng((count, height, width))
    blocks = rng.integers(0, spec.num_classes + 1, (count, height // 4 + 1, width // 4 + 1), dtype=np.int32)
    inputs: dict[str, NDArray[np.generic]] = {}
    if spec.num_label_channels:
        inputs["labels"] = blocks.repeat(4, 1).repeat(4, 2)[:, :height, :width].copy()
    if spec.has_edges:
        inputs["edges"] = (rng.random((count, height, width)) < 0.1).astype(np.float32)
    if spec.has_distances:
        inputs["distances"] = rng.uniform(-1, 1, (count, 2, height, width)).astype(np.float32)
    if spec.num_conditions:
        inputs["conditions"] = rng.uniform(-1, 1, (count, spec.num_conditions, height, width)).astype(np.float32)
    if network.generator.style_dims:
        places = (height, width) if network.by_pixel else ()
        inputs["z"] = rng.standard_normal((count, network.generator.style_dims, *places), dtype=np.float32)
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def _traced(network: ExportedGenerator, multiple: int) -> ExportedProgram:
    """Trace the network for any number of images of any size."""
    maps = (count, height, width) = Dim("batch"), multiple * Dim("height"), multiple * Dim("width")
    planes = (count, None, height, width)
    codes = planes if network.by_pixel else (count,)
    sizes = {"labels": maps, "edges": maps, "distances": planes, "conditions": planes, "z": codes}
    inputs = example_inputs(network, 2, 2 * multiple, 3 * multiple)
    shapes = {name: dict(enumerate(sizes[name])) for name in inputs}
    program = torch.export.export(network, (), inputs, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines with this machine's paths
    return program


def _to_onnx(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    converted = torch.onnx.export(program, kwargs=program.example_inputs[1], output_names=["images"], verbose=False)
    assert converted is not None
    model = converted.model
    model.doc_string = __doc__
    shapes = [value.shape for value in (*model.graph.inputs, *model.graph.outputs) if value.shape is not None]
    axes = dict(zip(map(str, shapes[0]), ("batch", "height", "width"), strict=True))
    for shape in shapes:
        for axis, size in enumerate(map(str, shape)):
            if size in axes:
                shape[axis] = axes[size]
    return converted


def _origin(error: BaseException) -> BaseException:
    """Return the error that was there first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _load_onnx(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["images"], {name: value.numpy() for name, value in inputs.items()})[0]


def _load_pt2(file: Path) -> Run:
    module = torch.export.load(file).module()
    return lambda inputs: module(**inputs).numpy()


@torch.inference_mode()
def _difference(run: Run, network: ExportedGenerator, inputs: dict[str, Tensor]) -> float:
    """Return the largest difference between the file's images and the generator's; NaN if one is not finite."""
    return float(np.abs(run(inputs) - network(**inputs).numpy()).max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' remarks on their own progress and internals."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
