"""Export: files that runtimes without this package turn into the generator's pictures."""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import blocky_labels, write_png
from PIL import Image
from test_inference import TREE, changed, save
from test_local_noise import GEN
from torch import nn

from imaginaire_spade import Synthesizer
from imaginaire_spade.build import build_generator, layout_spec
from imaginaire_spade.commands import export_onnx as command_line
from imaginaire_spade.config_files import parse_config
from imaginaire_spade.errors import CheckpointError, ConfigError, UserError
from imaginaire_spade.export import generator as export
from imaginaire_spade.export.generator import ExportedGenerator, check_output, example_inputs, export_model
from imaginaire_spade.inference.model import Model
from imaginaire_spade.layout import LayoutSpec, NoiseRegions, SemanticLayout
from imaginaire_spade.models.generator import SPADEGenerator, SPADEResidualBlock
from imaginaire_spade.models.norms import CLADE, SPADE

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shortened(model: Model) -> Model:
    """The SPADE generator with one block, of one SPADE and one CLADE norm: each norm takes seconds to export."""
    generator, spec = model.generator, layout_spec(model.config)
    norms = iter((SPADE(8, spec, hidden_channels=8), CLADE(8, spec)))
    torch.manual_seed(0)
    generator.blocks = nn.ModuleList([SPADEResidualBlock(8, 8, spec, lambda *known: next(norms), False)])
    generator.to_image = nn.Conv2d(8, 3, 3, padding=1)
    generator.fc = nn.Linear(generator.style_dims, 8 * 32 * 32)
    generator.upsample_before, generator.size_multiple, generator.start_size = (True,), 2, (32, 32)
    generator.eval().requires_grad_(False)
    return model


def run_script(model: Model | None, *arguments: str | Path) -> str:
    """The command line's output; ``model`` is what it loads."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        if model is not None:
            patch.setattr(Model, "load", lambda path, weights, for_inference: model)
        patch.setattr(sys, "argv", ["export_onnx.py", *map(str, arguments)])
        command_line.main()
    return said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def model(folder) -> Model:
    """With style code and edges; raw id 9 is class 1."""
    return shortened(
        Model.load(save(folder / "checkpoint.pt", changed(TREE, data__labels__remap={9: 1})), for_inference=False)
    )


@pytest.fixture(scope="module")
def written(model, folder) -> dict[str, str]:
    """What the command line says of checkpoint.onnx and checkpoint.pt2, which it writes."""
    umask = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export, "_traced", functools.cache(export._traced))  # one tracing does for both
            return {
                suffix: run_script(
                    model, "--checkpoint", folder / "checkpoint.pt", "--output", folder / f"new/checkpoint{suffix}"
                )
                for suffix in export.SUFFIXES
            }
    finally:
        os.umask(umask)


@pytest.fixture
def exported(written, folder) -> Path:
    return folder / "new/checkpoint.onnx"


def test_the_command_says_how_well_the_pictures_agree(written, folder):
    for suffix, said in written.items():
        *checks, last = said.splitlines()
        assert [line.partition(":")[0] for line in checks] == ["1 of 64x64", "1 of 4x4", "2 of 4x6", "3 of 8x4"]
        assert all(float(line.split()[-1]) < 1e-4 for line in checks)
        assert last.startswith(f"wrote {folder}/new/checkpoint{suffix}, 0.")
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["checkpoint.onnx", "checkpoint.pt2"]
    assert [path.stat().st_mode & 0o777 for path in (folder / "new").iterdir()] == [0o640, 0o640]


def test_an_onnx_file_says_what_it_takes_and_nothing_of_the_machine_it_was_made_on(exported, model):
    content = onnx.load(exported)
    axes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*content.graph.input, *content.graph.output)
    }
    sizes = ["batch", "height", "width"]
    assert axes == {"labels": sizes, "edges": sizes, "z": ["batch", 4], "images": ["batch", 3, "height", "width"]}
    about = {entry.key: json.loads(entry.value) for entry in content.metadata_props}
    assert about["size_multiple"] == 2 and about["trained_size"] == [64, 64]
    assert about["label_table"] == json.loads(json.dumps(model.config.data.labels.model_dump()))
    for path in (exported, exported.with_suffix(".pt2")):
        assert str(REPOSITORY).encode() not in path.read_bytes()


def test_the_example_makes_the_same_picture_without_torch(exported, model, tmp_path):
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
    wanted = Synthesizer(model)(ids, style=z[0], size="own")
    made = np.asarray(Image.open(photo))
    assert made.shape == (39, 50, 3) and wanted.std() > 5
    assert np.abs(made.astype(int) - wanted).max() <= 1
    refused = subprocess.run([sys.executable, *arguments, "pixel"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "takes no noise by pixel: export an OASIS generator with" in refused.stderr


def test_a_torch_export_package_runs_as_the_generator(exported, model):
    extra = {"label_table": ""}
    program = torch.export.load(exported.with_suffix(".pt2"), extra_files=extra)
    assert json.loads(extra["label_table"])["num_classes"] == 5
    network = ExportedGenerator(model.generator, layout_spec(model.config))
    inputs = example_inputs(network, 2, 12, 8)
    torch.testing.assert_close(program.module()(**inputs), network(**inputs), atol=1e-5, rtol=0)


def test_a_file_with_other_pictures_is_not_written(exported, folder, monkeypatch):
    class Before:
        """The file of the weights as they were."""

        model = SimpleNamespace(metadata_props={})

        def save(self, file, external_data):
            shutil.copy(exported, file)

    monkeypatch.setattr(export, "_traced", lambda *arguments: None)
    monkeypatch.setattr(export, "_to_onnx", lambda program: Before())
    changed_since = shortened(Model.load(folder / "checkpoint.pt", for_inference=False))
    for factor, difference in ((1.1, r"0\.\d+"), (float("nan"), "nan")):
        changed_since.generator.to_image.weight.mul_(factor)
        message = rf"wrong.onnx: not written.*1 of 64x64 pixels differ by up to {difference}, where 0.001 is allowed"
        with pytest.raises(UserError, match=message):
            export_model(changed_since, folder / "wrong.onnx", lambda name, difference: None)
    assert not (folder / "wrong.onnx").exists() and not list(folder.glob(".export-*"))


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
            run_script(None, "--checkpoint", "none", "--output", output)
    check_output(there, overwrite=True)
    with pytest.raises(CheckpointError, match="--checkpoint none: no such file or folder"):
        run_script(None, "--checkpoint", "none", "--output", tmp_path / "new.onnx")
    plain = ("--checkpoint", save(tmp_path / "plain.pt", TREE), "--output", tmp_path / "new.onnx", "--noise", "pixel")
    with pytest.raises(ConfigError, match=r"--noise pixel: this generator \(gen.type: spade\) takes no noise in parts"):
        run_script(None, *plain)
    with pytest.raises(ConfigError, match="--page: its noise is one vector"):
        run_script(None, *plain, "--page", "x.tgz")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs the package onnxruntime .*pip install -U onnx onnxscript onnxruntime"):
        check_output(tmp_path / "new.onnx")
    check_output(tmp_path / "new.pt2")


def test_packages_that_are_too_old_for_torch_are_named(model, tmp_path, monkeypatch):
    def of_torch(program):
        try:
            raise ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_2_11'")
        except ModuleNotFoundError as error:
            raise RuntimeError("Failed to export the model to ONNX") from error

    monkeypatch.setattr(export, "_traced", lambda *arguments: None)
    monkeypatch.setattr(export, "_to_onnx", of_torch)
    with pytest.raises(CheckpointError, match=r"_11'\. The packages for it are too old: pip install -U onnx"):
        export_model(model, tmp_path / "a.onnx", lambda name, difference: None)


def test_a_generator_that_looks_at_its_data_is_named(folder, tmp_path):
    class Choosing(SPADEGenerator):
        def forward(self, layout, z=None):
            return super().forward(layout, z) if layout.labels.max() > 3 else torch.zeros(1)

    choosing = shortened(Model.load(folder / "checkpoint.pt", for_inference=False))
    choosing.generator.__class__ = Choosing
    with pytest.raises(CheckpointError, match=r"gen.type: spade cannot be exported by torch .*values of tensors"):
        export_model(choosing, tmp_path / "a.pt2", lambda name, difference: None)
    assert not list(tmp_path.iterdir())


KINDS = {
    "spade": {},
    "clade": {"gen__norm": {"type": "clade"}},
    "noise": {"gen__norm": {"type": "clade"}, "gen__style_dims": 0, "gen__noise_injection": True, "encoder": None},
    "clade_icpe": {"gen__norm": {"type": "clade_icpe", "skip_ids": [0]}},
    "concat, instance": {"gen__norm": {"type": "concat", "normalization": "instance"}},
    "style_spade": {
        "gen": {
            "type": "style_spade", "num_filters": 2, "style_dims": 4, "positional_encoding": True,
            "norm": {"type": "spade", "hidden_channels": 4, "kernel_size": 5, "affine": True, "spectral_norm": True},
        },
    },
    "oasis": {"gen": GEN, "encoder": None},
    "oasis, clade": {"gen": {**GEN, "norm": {"type": "clade"}, "noise_injection": True}, "encoder": None},
    "pix2pixhd": {"gen": {"type": "pix2pixhd", "num_filters": 4, "num_blocks": 2}, "encoder": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_label_maps_are_resized_by_powers_of_two_alone(kind, monkeypatch):
    """ONNX Runtime 1.32 shrinks by the nearest pixel wrongly at other whole factors: 7, 13, 14, 15, 26 ..."""
    config = parse_config(changed(TREE, **KINDS[kind]))
    generator, spec = build_generator(config).eval(), layout_spec(config)
    factors, resized = set(), SemanticLayout.resized

    def noted(layout, height, width):
        factors.update({(layout.height / height, layout.width / width)})
        return resized(layout, height, width)

    monkeypatch.setattr(SemanticLayout, "resized", noted)
    network = ExportedGenerator(generator, spec)
    with torch.no_grad():
        network(**example_inputs(network, 1, 7 * generator.size_multiple, 13 * generator.size_multiple))
    assert factors <= {(2.0**step,) * 2 for step in range(7)}
    assert bool(factors) == (kind != "pix2pixhd")  # which takes a label map once, at its own size


def test_an_onnx_file_is_right_at_the_factors_that_its_runtime_gets_wrong(exported, model):
    run, network = export._load_onnx(exported), ExportedGenerator(model.generator, layout_spec(model.config))
    for height, width in ((14, 26), (28, 30), (182, 210)):
        assert export._difference(run, network, example_inputs(network, 1, height, width)) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_exported_generator_takes_noise_by_pixel(tmp_path):
    tree = changed(TREE, gen=GEN, encoder=None, data__edges="none")
    checkpoint, file = save(tmp_path / "oasis.pt", tree), tmp_path / "oasis.onnx"
    script = [sys.executable, REPOSITORY / "scripts/export_onnx.py", "--checkpoint", checkpoint, "--output", file]
    subprocess.run([*script, "--noise", "pixel"], check=True)
    ids = blocky_labels(np.random.default_rng(1), 64, 96, 5)
    example = [sys.executable, REPOSITORY / "projects/spade/run_onnx.py", file, write_png(tmp_path / "map.png", ids)]
    layout = SemanticLayout(LayoutSpec(5, has_dont_care=True), torch.from_numpy(ids)[None])
    codes = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 4), np.float32))
    with torch.inference_mode():
        image = Model.load(checkpoint).generator(layout, NoiseRegions(codes[None], layout.labels.long()))[0]
    wanted = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
    for noise in ("class", "pixel"):
        subprocess.run([*example, tmp_path / "photo.png", noise], check=True)
        differences = np.abs(np.asarray(Image.open(tmp_path / "photo.png")) - wanted)
        assert (differences.max() <= 1) == (noise == "class")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("suffix", export.SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_generator_and_norm_can_be_exported(kind, suffix, tmp_path):
    model = Model.load(save(tmp_path / "model.pt", changed(TREE, **KINDS[kind])), for_inference=False)
    seen = {}
    export_model(model, tmp_path / f"model{suffix}", seen.__setitem__)
    assert max(seen.values()) < 1e-4
