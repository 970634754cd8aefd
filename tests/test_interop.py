"""Checkpoints of other systems: in, used, and out again, through the command lines."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import blocky_labels, write_png
from fork_server import ForkServer
from safetensors.torch import load_file

from imaginaire_spade.build import check_run, layout_spec
from imaginaire_spade.config_files import load_config
from imaginaire_spade.errors import CheckpointError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.interop import foreign_names, import_generator
from imaginaire_spade.interop.checkpoint import architecture_config, read_weights
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.training.checkpoint import load_checkpoint, newest_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]


server: ForkServer


@pytest.fixture(autouse=True)
def run_in_forks(commands):
    global server
    server = commands


def run(*arguments: object) -> subprocess.CompletedProcess:
    return server.run(*map(str, arguments), NO_CURVES="1")


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def fixture_file(shared_dir: Path, name: str, folder: Path, **extra) -> tuple[Path, Path]:
    """A fixture's weights as the reference would have saved them, and the architecture."""
    weights = folder / f"{name}.pth"
    torch.save(load_file(shared_dir / "parity" / name / "weights.safetensors"), weights)
    hyper = json.loads((shared_dir / "parity" / name / "config.json").read_text())["hyper"]
    (folder / f"{name}.json").write_text(json.dumps(hyper | extra))
    return weights, folder / f"{name}.json"


def test_import_generate_fine_tune_export_and_import_again(shared_dir, tmp_path, tiny_folder):
    weights, architecture = fixture_file(shared_dir, "spade_g_normal", tmp_path, ndf=4, n_layers_D=2)
    imported = tmp_path / "imported.pt"
    said = ok("scripts/import_checkpoint.py", "--source", "nvlabs_spade", "--weights", weights,
              "--architecture", architecture, "--output", imported)  # fmt: skip
    assert "generator: 234 tensors" in said and "every one in its place" in said and "a fresh one" in said

    # The same pixels: our inference of the imported file, on the fixture's own layout, gives the fixture's picture.
    inputs = load_file(shared_dir / "parity/spade_g_normal/inputs.safetensors")
    outputs = load_file(shared_dir / "parity/spade_g_normal/outputs.safetensors")
    model = Model.load(imported, weights="raw", for_inference=False)
    layout = SemanticLayout.from_dense(layout_spec(model.config), inputs["semantics"].float())
    torch.testing.assert_close(model.generator(layout), outputs["eval/fake_image"], atol=1e-5, rtol=0)

    maps = tmp_path / "maps"
    for i in range(2):
        write_png(maps / f"{i}.png", blocky_labels(np.random.default_rng(i), 50, 70, 5))
    said = ok("inference.py", "--checkpoint", imported, "--input_dir", maps, "--output_dir", tmp_path / "out",
              "--device", "cpu", "--no_gallery", "--set", "data.edges=labels")  # fmt: skip
    assert "wrote 2 of 2 images" in said

    raw = tiny_folder(keys=4, size=(64, 64))
    config = tmp_path / "fine_tune.yaml"
    config.write_text(
        json.dumps(
            {
                "gen": {"type": "spade", "num_filters": 3},
                "dis": {"type": "multiscale_patch", "num_filters": 4, "num_layers": 2},
                "losses": {"gan": 1.0, "feature_matching": 10.0},
                "gen_opt": {"lr": 1e-4},
                "dis_opt": {"lr": 4e-4},
                "trainer": {"max_epochs": 1, "model_average": {"start_iteration": 0, "batch_norm_images": 0}},
                "data": {
                    "labels": {"num_classes": 5, "ignore": [255]},
                    "edges": "instances",
                    "num_workers": 0,
                    "train": {"roots": [str(raw)], "batch_size": 2, "augmentations": {"resize_h_w": [64, 64]}},
                },
            }
        )
    )
    log = tmp_path / "log"
    said = ok("train.py", "--config", config, "--logdir", log, "--checkpoint", imported, "--device", "cpu")
    assert f"starting from the weights of {imported}; discriminator: fresh" in said
    tuned = newest_checkpoint(log)
    assert tuned is not None

    for kind in ("raw", "ema"):
        out = tmp_path / f"out_{kind}"
        ok("scripts/export_checkpoint.py", "--checkpoint", tuned, "--target", "nvlabs_spade", "--weights", kind,
           "--output_dir", out)  # fmt: skip
        assert sorted(p.name for p in out.iterdir()) == ["latest_net_D.pth", "latest_net_G.pth"]
        back = tmp_path / f"{kind}.pt"
        said = ok("scripts/import_checkpoint.py", "--source", "nvlabs_spade", "--weights", out / "latest_net_G.pth",
                  "--discriminator_weights", out / "latest_net_D.pth", "--architecture", architecture,
                  "--output", back)  # fmt: skip
        assert "discriminator:" in said
        before, after = (
            Model.load(tuned, weights=kind, for_inference=False),
            Model.load(back, weights="raw", for_inference=False),
        )
        torch.testing.assert_close(after.generator(layout), before.generator(layout), atol=2e-6, rtol=0)
        if kind == "raw":
            old, new = load_checkpoint(tuned), load_checkpoint(back)
            for part in ("generator", "discriminator"):
                assert all(torch.equal(new[part][key], value) for key, value in old[part].items())


def test_imaginaire_with_average_and_style_encoder(shared_dir, tmp_path):
    state = load_file(shared_dir / "parity/imaginaire_g/weights.safetensors")
    hyper = json.loads((shared_dir / "parity/imaginaire_g/config.json").read_text())["hyper"]
    dis = json.loads((shared_dir / "parity/imaginaire_d_fpse/config.json").read_text())["hyper"]
    dis_state = load_file(shared_dir / "parity/imaginaire_d_fpse/weights.safetensors")
    averaged = {}
    for key, value in state.items():
        if key.endswith("weight_orig"):
            u, v = state[key.replace("_orig", "_u")], state[key.replace("_orig", "_v")]
            averaged[key.replace("_orig", "")] = value / torch.dot(u, value.flatten(1) @ v)
        elif not key.endswith(("weight_u", "weight_v")):
            averaged[key] = value
    net_g = {f"module.module.{k}": v for k, v in state.items()}
    net_g |= {f"module.averaged_model.{k}": v for k, v in averaged.items()}
    net_g |= {"module.num_updates_tracked": torch.tensor([7])}
    file = tmp_path / "epoch.pt"
    torch.save({"net_G": net_g, "net_D": {f"module.{k}": v for k, v in dis_state.items()}, "current_epoch": 3}, file)
    architecture = tmp_path / "a.json"
    architecture.write_text(json.dumps({"hyper": hyper | {"dis": dis}}))
    imported = tmp_path / "imported.pt"
    said = ok("scripts/import_checkpoint.py", "--source", "imaginaire", "--weights", file,
              "--architecture", architecture, "--output", imported)  # fmt: skip
    for part in ("generator", "generator_ema", "encoder", "discriminator"):
        assert f"{part}: " in said

    inputs = load_file(shared_dir / "parity/imaginaire_g/inputs.safetensors")
    outputs = load_file(shared_dir / "parity/imaginaire_g/outputs.safetensors")
    for weights in ("raw", "ema"):
        model = Model.load(imported, weights=weights, for_inference=False)
        layout = SemanticLayout.from_dense(layout_spec(model.config), inputs["label"].float())
        torch.testing.assert_close(
            model.generator(layout, inputs["z"]), outputs["eval/from_z/fake_images"], atol=1e-5, rtol=0
        )
        mu, _ = model.encoder(inputs["images"])
        torch.testing.assert_close(mu, outputs["eval/style/mu"], atol=1e-5, rtol=0)

    ok(
        "scripts/export_checkpoint.py",
        "--checkpoint",
        imported,
        "--target",
        "imaginaire",
        "--output_dir",
        tmp_path / "o",
    )
    written = torch.load(tmp_path / "o/imaginaire.pt", weights_only=True)
    assert written["net_G"].keys() == {k.removeprefix("module.") for k in net_g} - {"num_updates_tracked"}
    assert written["net_D"].keys() == dis_state.keys()
    assert all(torch.equal(written["net_G"][f"module.{k}"], v) for k, v in state.items())


def import_arguments(weights: Path, architecture: Path, folder: Path) -> tuple[object, ...]:
    return ("scripts/import_checkpoint.py", "--source", "nvlabs_spade", "--weights", weights,
            "--architecture", architecture, "--output", folder / "out.pt")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_nc": 6}, "takes 7 label channels, this architecture has 8"),
        ({"num_upsampling_layers": "most"}, "write num_upsampling_layers: normal or more"),
        ({"ngf": 4}, r"fc.weight is [48, 7, 3, 3], these hyper-parameters make it [64, 7, 3, 3]"),
        ({"use_vae": True}, "label map: no use_vae"),
        ({"norm_G": "spectralfancynorm"}, "norm_G 'spectralfancynorm': expected such as"),
    ],
)
def test_hyper_parameters_of_another_network_are_refused_in_words(shared_dir, tmp_path, changes, message):
    weights, architecture = fixture_file(shared_dir, "spade_g_normal", tmp_path, **changes)
    result = run(*import_arguments(weights, architecture, tmp_path))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.pt").exists()


def test_a_discriminator_and_a_truncated_file_and_a_list_are_refused(shared_dir, tmp_path):
    generator, architecture = fixture_file(shared_dir, "spade_g_normal", tmp_path)
    discriminator, _ = fixture_file(shared_dir, "spade_d_multiscale", tmp_path)
    result = run(*import_arguments(discriminator, architecture, tmp_path))
    assert result.returncode == 2
    assert "these are the weights of a discriminator, not of a generator" in result.stderr
    short = tmp_path / "short.pth"
    short.write_bytes(generator.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        read_weights(short)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list, not named tensors"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "a.json").write_text('{"ngf": 3}')
    result = run(*import_arguments(generator, tmp_path / "a.json", tmp_path))
    assert result.returncode == 2 and "the architecture lacks 'label_nc'" in result.stderr


class Touch:
    """Pickles to a call that leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(shared_dir, tmp_path, zipped):
    _, architecture = fixture_file(shared_dir, "spade_g_normal", tmp_path)
    mark, evil = tmp_path / "mark", tmp_path / "evil.pth"
    if zipped:
        torch.save({"fc.weight": torch.zeros(1), "x": Touch(mark)}, evil)
    else:
        evil.write_bytes(pickle.dumps({"x": Touch(mark)}))
    result = run(*import_arguments(evil, architecture, tmp_path))
    assert result.returncode == 2 and not mark.exists()
    if zipped:
        assert "nothing of it was executed" in result.stderr and "mkdir" in result.stderr
        trusted = run(*import_arguments(evil, architecture, tmp_path), "--trust")
        assert trusted.returncode == 2 and mark.exists()  # run, as said, and then refused for what it holds
        assert "unpickled without restriction" in trusted.stderr and "are no tensors" in trusted.stderr


def test_foreign_names_are_one_to_one(shared_dir):
    hyper = json.loads((shared_dir / "parity/spade_g_normal/config.json").read_text())["hyper"]
    weights = load_file(shared_dir / "parity/spade_g_normal/weights.safetensors")
    names = foreign_names("nvlabs_spade", import_generator("nvlabs_spade", weights, hyper))
    assert sorted(names.values()) == sorted(weights)


OPTIONS = """----------------- Options ---------------
             aspect_ratio: 1.0
                batchSize: 32                            \t[default: 1]
                    beta1: 0.0
                    beta2: 0.9
          checkpoints_dir: ./checkpoints
   contain_dontcare_label: True                          \t[default: False]
                crop_size: 256
             dataset_mode: coco
                 gan_mode: hinge
                  gpu_ids: 0,1,2,3,4,5,6,7               \t[default: 0]
                 label_nc: 182
              lambda_kld: 0.05
                load_size: 286
                       lr: 0.0002
                     name: coco_pretrained
                      ndf: 64
                      ngf: 64
                    niter: 50
              niter_decay: 50                            \t[default: 0]
              no_instance: False
                   norm_G: spectralspadesyncbatch3x3
              lambda_vgg: 10.0
          preprocess_mode: resize_and_crop
                     seed: None
                  use_vae: True                          \t[default: False]
                    z_dim: 256
----------------- End -------------------
"""


def test_options_of_the_spade_release_become_a_config(tmp_path):
    (tmp_path / "opt.txt").write_text(OPTIONS)
    said = ok("scripts/import_config.py", tmp_path / "opt.txt", "--source", "nvlabs_spade",
              "--output", tmp_path / "c.yaml")  # fmt: skip
    config = load_config(tmp_path / "c.yaml")
    check_run(config, 8)
    assert config.gen.type == "spade" and config.gen.args["style_dims"] == 256
    assert (config.gen_opt.lr, config.dis_opt.lr, config.gen_opt.adam_beta2) == (1e-4, 4e-4, 0.9)
    assert config.trainer.max_epochs == 100 and config.gen_opt.lr_policy.decay_start == 0.5
    assert config.losses["kl"].weight == pytest.approx(0.2) and config.losses["perceptual"].weight == 10
    data = config.data
    assert data.train.batch_size == 4 and data.edges == "instances" and data.labels.ignore == (255,)
    assert data.train.augmentations.resize_h_w == (286, 286) and data.train.augmentations.output_h_w == (256, 256)
    assert "ignored (no equivalent): checkpoints_dir: ./checkpoints" in said
    assert "ignored (no equivalent): seed: None" in said
    assert "label_nc" not in said and "dataroot" in said

    for old, new, message in (
        ("gan_mode: hinge", "gan_mode: softplus", "gan_mode: 'softplus' is not supported"),
        ("seed: None", "netG: pix2pixhd", "netG: pix2pixhd: only spade is supported"),
        ("seed: None", "optimizer: sgd", "optimizer: sgd: only adam is supported"),
        ("label_nc: 182", "", "label_nc is not stated; add it to the file"),
    ):
        (tmp_path / "bad.txt").write_text(OPTIONS.replace(old, new))
        result = run("scripts/import_config.py", tmp_path / "bad.txt", "--source", "nvlabs_spade")
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr

    again = run("scripts/import_config.py", tmp_path / "opt.txt", "--source", "nvlabs_spade",
                "--output", tmp_path / "c.yaml")  # fmt: skip
    assert again.returncode == 2 and "is there already" in again.stderr


IMAGINAIRE = """
image_save_iter: 5000
snapshot_save_iter: 2500
snapshot_save_epoch: 5
max_epoch: 400
logging_iter: 100
trainer:
    type: imaginaire.trainers.spade
    model_average_config: {enabled: True, beta: 0.9999, start_iteration: 1000, num_batch_norm_estimation_iterations: 30}
    gan_mode: hinge
    amp_config: {enabled: True}
    perceptual_loss:
        mode: vgg19
        layers: [relu_1_1, relu_2_1, relu_3_1, relu_4_1, relu_5_1]
        weights: [0.03125, 0.0625, 0.125, 0.25, 1.0]
    loss_weight: {gan: 1.0, feature_matching: 10.0, kl: 0.05, perceptual: 10.0}
    init: {type: xavier, gain: 0.02}
gen:
    type: imaginaire.generators.spade
    num_filters: 16
    style_dims: 32
    use_posenc_in_input_layer: False
    output_multiplier: 1.0
    activation_norm_params:
        num_filters: 24
        kernel_size: 5
        separate_projection: True
        activation_norm_type: sync_batch
        activation_norm_params: {affine: True}
    style_enc: {num_filters: 16, kernel_size: 3}
dis:
    type: imaginaire.discriminators.spade
    num_filters: 16
    max_num_filters: 64
    num_discriminators: 2
    num_layers: 5
    weight_norm_type: spectral
gen_opt: {type: adam, lr: 1e-4, adam_beta1: 0., adam_beta2: 0.999, lr_policy: {iteration_mode: False, type: step, step_size: 1000000000, gamma: 1}}
dis_opt: {type: adam, lr: 4e-4, adam_beta1: 0., adam_beta2: 0.999}
data:
    name: cocostuff
    type: imaginaire.datasets.paired_images
    num_workers: 8
    input_types:
        - images: {ext: jpg, num_channels: 3}
        - seg_maps: {ext: png, num_channels: 1, is_mask: True}
        - edge_maps: {ext: png, num_channels: 1}
    one_hot_num_classes: {seg_maps: 183}
    use_dont_care: True
    input_labels: [seg_maps, edge_maps]
    train:
        roots: [dataset/cocostuff/train]
        batch_size: 4
        augmentations: {resize_smallest_side: 256, rotate: 0, random_scale_limit: 0.2, horizontal_flip: True, random_crop_h_w: "256, 256"}
    val:
        roots: [dataset/cocostuff/val]
        batch_size: 4
        augmentations: {resize_h_w: "256, 256", horizontal_flip: False}
test_data:
    test: {roots: [projects/spade/test_data], batch_size: 1}
cudnn: {deterministic: False}
"""  # noqa: E501


def test_a_config_of_imaginaire_becomes_ours(tmp_path):
    (tmp_path / "theirs.yaml").write_text(IMAGINAIRE)
    said = ok("scripts/import_config.py", tmp_path / "theirs.yaml", "--source", "imaginaire",
              "--output", tmp_path / "ours.yaml")  # fmt: skip
    config = load_config(tmp_path / "ours.yaml")
    check_run(config, 1)
    assert layout_spec(config).num_channels == 185 and config.gen.args["num_filters"] == 16
    assert config.gen.args["norm"].args["kernel_size"] == 5 and config.dis.type == "fpse"
    assert config.trainer.max_epochs == 400 and config.trainer.checkpoint_every == 2500
    assert config.trainer.model_average.batch_norm_images == 120
    assert config.losses["kl"].weight == pytest.approx(0.2) and config.trainer.precision == "fp16"
    assert config.test_data.roots == ("projects/spade/test_data",)
    for key in ("snapshot_save_epoch: 5", "cudnn.deterministic: False", "trainer.type: imaginaire.trainers.spade"):
        assert f"ignored (no equivalent): {key}" in said
    assert "style_enc" not in said and "num_filters" not in said

    for old, new, message in (
        ("num_filters: 24", "num_filters: many", "norm.hidden_channels"),
        ("separate_projection: True", "separate_projection: False", "separate_projection: False is not supported"),
        ("[seg_maps, edge_maps]", "[edge_maps, seg_maps]", "only seg_maps, then edge_maps if any, is supported"),
        ("    use_dont_care: True\n    input_labels: [seg_maps, edge_maps]", "", "data.input_labels is not stated"),
        ("roots: [dataset/cocostuff/val]", "", "data.val.roots is not stated; add it to the file"),
        ("- edge_maps: {ext: png, num_channels: 1}", "- edge_maps", "data.input_types: "),
        ("gan: 1.0, ", "", "trainer.loss_weight.gan is not stated"),
    ):
        (tmp_path / "bad.yaml").write_text(IMAGINAIRE.replace(old, new))
        result = run("scripts/import_config.py", tmp_path / "bad.yaml", "--source", "imaginaire")
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "wrong", [{"crop_size": None}, {"crop_size": "64"}, {"norm_G": 5}, {"aspect_ratio": 0}, {"label_nc": {"a": 5}}]
)
def test_an_architecture_of_wrong_types_is_refused(wrong):
    hyper = {"label_nc": 5, "ngf": 4, "crop_size": 64, "norm_G": "spectralspadesyncbatch3x3"}
    with pytest.raises(CheckpointError, match="the architecture has a value of a wrong type for nvlabs_spade: "):
        architecture_config("nvlabs_spade", hyper | wrong, None)
