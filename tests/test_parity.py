"""Our networks and losses against the reference systems' numbers (``../shared/parity``)."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from parity import verify
from safetensors.torch import load_file, save_file
from test_layout import random_layout

from imaginaire_spade.build import build_component
from imaginaire_spade.config_files import parse_component
from imaginaire_spade.errors import CheckpointError, UserError
from imaginaire_spade.interop import describe, foreign_names, import_discriminator, import_encoder, import_generator
from imaginaire_spade.models.norms import SPADE
from imaginaire_spade.registry import GENERATORS

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = ["spade_g_normal", "spade_g_more_ar2", "spade_g_vae", "spade_encoder", "spade_d_multiscale", "spade_losses",
            "imaginaire_g", "imaginaire_d_fpse", "imaginaire_losses", "imaginaire_ema", "imaginaire_lmdb",
            "clade_g", "clade_icpe_g", "clade_train_step", "clade_distmap",
            "oasis_g", "oasis_g_no3dnoise", "oasis_d", "oasis_losses"]  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_every_tensor_of_the_fixture_agrees(shared_dir, name):
    rows = verify(shared_dir / "parity" / name)
    assert len(rows) >= 18
    assert not [row for row in rows if not row.ok]


def test_every_tensor_agrees_by_tables_too(shared_dir, monkeypatch):
    taken = []
    monkeypatch.setattr(SPADE, "_takes_tables", lambda _, view: view.is_discrete and not taken.append(view.noise))
    assert all(row.ok for row in verify(shared_dir / "parity/oasis_g"))
    assert len(taken) >= 30 and None not in taken  # 16 norms, in evaluation and in training mode, all with noise


def copy_of(shared_dir: Path, name: str, to: Path) -> Path:
    folder = to / name
    shutil.copytree(shared_dir / "parity" / name, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def run_script(commands: ForkServer, *folders: Path) -> subprocess.CompletedProcess:
    return commands.run("scripts/verify_parity.py", *folders)


def test_the_script_names_every_tensor_and_fails_on_a_wrong_or_unknown_one(shared_dir, tmp_path, commands):
    good = run_script(commands, shared_dir / "parity/spade_losses")
    assert good.returncode == 0 and good.stdout.rstrip().endswith("tensors compared, 0 failed")

    folder = copy_of(shared_dir, "spade_losses", tmp_path)
    outputs = load_file(folder / "outputs.safetensors")
    outputs["hinge/G/GAN"] = outputs["hinge/G/GAN"] + 1e-3
    outputs["hinge/G/SOMETHING"] = torch.zeros(1)
    save_file(outputs, folder / "outputs.safetensors")
    bad = run_script(commands, folder)
    assert bad.returncode == 1
    failed = [line for line in bad.stdout.splitlines() if "FAIL" in line]
    assert len(failed) == 2
    assert failed[0].startswith("spade_losses/hinge/G/GAN 0.001 FAIL")
    assert failed[1].startswith("spade_losses/hinge/G/SOMETHING nan FAIL") and "missing" in failed[1]


def test_a_folder_that_is_no_fixture_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match="not a parity fixture"):
        verify(tmp_path)


def test_import_names_what_does_not_fit(shared_dir):
    folder = shared_dir / "parity/spade_g_normal"
    hyper = json.loads((folder / "config.json").read_text())["hyper"]
    weights = load_file(folder / "weights.safetensors")
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    assert import_generator("nvlabs_spade", prefixed, hyper)
    with pytest.raises(CheckpointError, match=r"fc\.weight is \[48, 7, 3, 3\], these hyper-parameters make it"):
        import_generator("nvlabs_spade", weights, hyper | {"ngf": 6})
    without = {key: value for key, value in weights.items() if not key.startswith("up_2.conv_0.")}
    with pytest.raises(CheckpointError, match=r"missing: up_2\.conv_0\.weight_orig \[.* left over: extra \[1\]"):
        import_generator("nvlabs_spade", without | {"extra": torch.zeros(1)}, hyper)
    with pytest.raises(CheckpointError, match="weights of a generator, not of a style encoder"):
        import_encoder("nvlabs_spade", weights, hyper)
    with pytest.raises(CheckpointError, match="weights of a generator, not of a discriminator"):
        import_discriminator("nvlabs_spade", weights, hyper | {"num_D": 1, "n_layers_D": 3, "ndf": 4, "norm_D": ""})
    with pytest.raises(CheckpointError, match="unknown source 'tensorflow'"):
        import_generator("tensorflow", weights, hyper)


@pytest.mark.parametrize("size", [512, 1024])
def test_imaginaires_larger_generators_are_imported_under_their_names(shared_dir, size):
    # No fixture holds one: random weights of ours go out under imaginaire's names and come back.
    hyper = json.loads((shared_dir / "parity/imaginaire_g/config.json").read_text())["hyper"]
    hyper |= {"out_image_small_side_size": size, "use_posenc_in_input_layer": True}
    component = parse_component(describe("imaginaire", "generator", hyper), GENERATORS, "gen")
    spec = describe("imaginaire", "layout_spec", hyper)
    ours = build_component(GENERATORS, component, spec, describe("imaginaire", "image_size", hyper))
    layout, z = random_layout(spec, 2, 64, 128), torch.randn(2, hyper["style_dims"])
    ours(layout, z)  # one power iteration: new spectral-norm vectors fit no weights
    names = foreign_names("imaginaire", ours)
    expected = {"conv_img256.layers.conv.weight_orig", f"conv_img{size}.layers.conv.weight_orig",
                "up_3a.conv_block_s.layers.norm.mlps.0.0.layers.conv.bias", "up_3b.conv_block_1.layers.conv.weight_u",
                "head_0.layers.conv.weight_orig"}  # fmt: skip
    assert {f"spade_generator.{name}" for name in expected} <= set(names.values())
    assert len(set(names.values())) == len(names)
    assert ours.head_0.weight.shape[1] == hyper["num_labels"] + 2
    theirs = {names[key]: value for key, value in ours.state_dict().items()}
    back = import_generator("imaginaire", theirs, hyper).eval()
    image = back(layout, z)
    assert torch.equal(image, ours.eval()(layout, z)) and image.std() > 0.01
    with pytest.raises(CheckpointError, match="out_image_small_side_size: 2048 must be 256, 512 or 1024"):
        import_generator("imaginaire", theirs, hyper | {"out_image_small_side_size": 2048})
