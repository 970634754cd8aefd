"""Export: files that runtimes without this package turn into the generator's pictures."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import blocky_labels, write_png
from PIL import Image
from test_inference import TREE, changed, save
from torch import nn

from imaginaire_spade import Synthesizer
from imaginaire_spade.errors import CheckpointError, UserError
from imaginaire_spade.inference import export
from imaginaire_spade.inference.export import ExportedGenerator, check_output, example_inputs, export_model
from imaginaire_spade.inference.weights import LoadedModel, load_generator

REPOSITORY = Path(__file__).resolve().parents[1]

_specification = importlib.util.spec_from_file_location("export_command_line", REPOSITORY / "scripts/export_onnx.py")
assert _specification is not None and _specification.loader is not None
command_line = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(command_line)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shortened(model: LoadedModel) -> LoadedModel:
    """The SPADE generator with its last two blocks alone: exporting takes seconds per block."""
    generator = model.generator
    generator.blocks = generator.blocks[5:]
    generator.upsample_before = (True, True)
    generator.size_multiple = 4
    generator.start_size = (16, 16)
    torch.manual_seed(0)
    width = generator.blocks[0].norm_0.normalize.num_features
    if generator.style_dims:
        generator.fc = nn.Linear(generator.style_dims, width * 16 * 16)
    else:
        generator.fc = nn.Conv2d(export.layout_spec(model.config).num_channels, width, 3, padding=1)
    generator.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def styled(folder) -> LoadedModel:
    """SPADE with style code and edges; raw id 9 is class 1."""
    return shortened(load_generator(save(folder / "styled.pt", changed(TREE, data__labels__remap={9: 1}))))


@pytest.fixture(scope="module")
def exported(styled, folder) -> Path:
    export_model(styled, folder / "styled.onnx", lambda name, difference: None)
    return folder / "styled.onnx"


def run_script(monkeypatch, model: LoadedModel | None, *arguments: str | Path) -> None:
    if model is not None:
        monkeypatch.setattr(command_line, "load_generator", lambda path, weights: model)
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, arguments)])
    command_line.main()


def test_the_command_writes_an_onnx_file_of_clade_and_says_how_well_it_agrees(folder, monkeypatch, capsys):
    tree = changed(TREE, gen__style_dims=0, encoder=None, gen__norm={"type": "clade_icpe", "skip_ids": [0]})
    path = save(folder / "icpe.pt", tree)
    model = shortened(load_generator(path))
    norm = model.generator.blocks[0].norm_0
    norm.scale_position.weight.fill_(0.7)  # they start at zero
    run_script(monkeypatch, model, "--checkpoint", path, "--output", folder / "new/icpe.onnx")
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:-1]] == ["1 of 64x64", "1 of 8x8", "2 of 8x12", "3 of 16x8"]
    assert all(float(line.split()[-1]) < 1e-4 for line in said[:-1])
    assert said[-1].startswith(f"wrote {folder}/new/icpe.onnx, 0.")
    assert [p.name for p in (folder / "new").iterdir()] == ["icpe.onnx"]
    inputs = onnx.load(folder / "new/icpe.onnx").graph.input
    assert [i.name for i in inputs] == ["labels", "edges", "distances"]


def test_an_onnx_file_says_what_it_takes_and_nothing_of_the_machine_it_was_made_on(exported, styled):
    model = onnx.load(exported)
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*model.graph.input, *model.graph.output)}  # fmt: skip
    sizes = ["batch", "height", "width"]
    assert axes == {"labels": sizes, "edges": sizes, "z": ["batch", 4], "images": ["batch", 3, "height", "width"]}
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["size_multiple"] == 4 and about["trained_size"] == [64, 64]
    assert about["label_table"] == json.loads(json.dumps(styled.config.data.labels.model_dump()))
    assert str(REPOSITORY).encode() not in exported.read_bytes()


def test_the_example_makes_the_same_picture_without_torch(exported, styled, tmp_path):
    ids = blocky_labels(np.random.default_rng(1), 39, 50, 5)
    ids[:3] = 255
    ids[-2:] = 9
    label_map, photo = write_png(tmp_path / "map.png", ids), tmp_path / "photo.png"
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'torch', 'imaginaire_spade'} & set(sys.modules)"
    )
    example = REPOSITORY / "projects/spade/run_onnx.py"
    arguments = [str(path) for path in (example, exported, label_map, photo)]
    subprocess.run([sys.executable, "-c", f"import sys; sys.argv = {arguments!r}; {code}"], check=True, timeout=240)
    z = np.random.default_rng(0).standard_normal((1, 4), np.float32)
    wanted = Synthesizer(styled)(ids, style=z[0])
    made = np.asarray(Image.open(photo))
    assert made.shape == (39, 50, 3) and wanted.std() > 5
    assert np.abs(made.astype(int) - wanted).max() <= 1


def test_a_torch_export_package_runs_as_the_generator(styled, folder):
    seen = {}
    export_model(styled, folder / "styled.pt2", seen.__setitem__)
    assert len(seen) == 4 and max(seen.values()) <= 1e-5
    extra = {"label_table": ""}
    program = torch.export.load(folder / "styled.pt2", extra_files=extra)
    assert json.loads(extra["label_table"])["num_classes"] == 5
    network = ExportedGenerator(styled.generator, export.layout_spec(styled.config))
    inputs = example_inputs(network, 2, 12, 8)
    torch.testing.assert_close(program.module()(**inputs), network(**inputs), atol=1e-5, rtol=0)


def test_a_file_with_other_pictures_is_not_written(exported, styled, folder, monkeypatch):
    class Before:
        model = SimpleNamespace(metadata_props={})

        def save(self, file, external_data):
            shutil.copy(exported, file)

    monkeypatch.setattr(export, "_traced", lambda *arguments: None)
    monkeypatch.setattr(export, "_to_onnx", lambda program: Before())
    generator = shortened(load_generator(folder / "styled.pt")).generator
    generator.to_image.weight.mul_(1.1)
    with pytest.raises(UserError, match=r"wrong.onnx: not written.*1 of 64x64 pixels differ by up to 0\.0"):
        export_model(replace(styled, generator=generator), folder / "wrong.onnx", lambda name, difference: None)
    generator.to_image.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="differ by up to nan"):
        export_model(replace(styled, generator=generator), folder / "wrong.onnx", lambda name, difference: None)
    assert not (folder / "wrong.onnx").exists()
    assert not list(folder.glob(".export-*"))


def test_what_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    there = tmp_path / "there.onnx"
    there.write_bytes(b"x")
    (tmp_path / "folder.pt2").mkdir()
    for output, message in (
        (there, "is there already: give another name, or --overwrite"),
        (tmp_path / "folder.pt2", "is a folder"),
        (tmp_path / "model.pth", r"write a name that ends in .onnx or .pt2"),
    ):
        with pytest.raises(UserError, match=message):
            run_script(monkeypatch, None, "--checkpoint", "none", "--output", output)
    check_output(there, overwrite=True)
    with pytest.raises(CheckpointError, match="--checkpoint none: no such file or folder"):
        run_script(monkeypatch, None, "--checkpoint", "none", "--output", tmp_path / "new.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs the package onnxruntime .*pip install 'imaginaire_spade\[export\]'"):
        check_output(tmp_path / "new.onnx")
    check_output(tmp_path / "new.pt2")


def test_a_generator_that_looks_at_its_data_is_named(styled, tmp_path):
    class Choosing(type(styled.generator)):
        def forward(self, layout, z=None):
            return super().forward(layout, z) if layout.labels.max() > 3 else torch.zeros(1)

    generator = shortened(load_generator(save(tmp_path / "choosing.pt", TREE))).generator
    generator.__class__ = Choosing
    with pytest.raises(CheckpointError, match=r"gen.type: spade cannot be exported by torch .*values of tensors"):
        export_model(replace(styled, generator=generator), tmp_path / "a.pt2", lambda name, difference: None)


KINDS = {
    "spade": {},
    "clade": {"gen__norm": {"type": "clade"}},
    "clade_icpe": {"gen__norm": {"type": "clade_icpe"}},
    "concat, instance": {"gen__norm": {"type": "concat", "normalization": "instance"}},
    "style_spade": {
        "gen": {
            "type": "style_spade", "num_filters": 2, "style_dims": 4, "positional_encoding": True,
            "norm": {"type": "spade", "hidden_channels": 4, "kernel_size": 5, "affine": True, "spectral_norm": True},
        },
    },
    "pix2pixhd": {"gen": {"type": "pix2pixhd", "num_filters": 4, "num_blocks": 2}, "encoder": None},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("suffix", export.SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_generator_and_norm_can_be_exported(kind, suffix, tmp_path):
    model = load_generator(save(tmp_path / "model.pt", changed(TREE, **KINDS[kind])))
    seen = {}
    export_model(model, tmp_path / f"model{suffix}", seen.__setitem__)
    assert max(seen.values()) < 1e-4
