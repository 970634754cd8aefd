"""Checkpoints of OASIS: in, used, and out again, through the command lines; and what its label channels mean."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import blocky_labels, write_png
from safetensors.torch import load_file
from test_foreign_labels import channels, opt_txt

from imaginaire_spade.build import build_generator, check_run, layout_spec
from imaginaire_spade.config_files import load_config, parse_config
from imaginaire_spade.errors import CheckpointError, LabelError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.interop import foreign_names, import_discriminator, import_generator
from imaginaire_spade.interop.architecture import find_architecture
from imaginaire_spade.interop.checkpoint import architecture_config, export_files
from imaginaire_spade.interop.configs import import_config
from imaginaire_spade.interop.label_tables import export_notes
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.training.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "configs/projects/oasis"
State = dict[str, torch.Tensor]


def ok(commands: Any, *arguments: object) -> str:
    result = commands.run(*map(str, arguments), NO_CURVES="1")
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def refused(commands: Any, message: str, *arguments: object) -> None:
    result = commands.run(*map(str, arguments))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


def hyper_of(shared_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((shared_dir / "parity" / name / "config.json").read_text())["hyper"]


@pytest.fixture(scope="module")
def release(shared_dir, tmp_path_factory) -> Path:
    """The folder models/ of a run of the release: small networks, and an average whose vectors are no unit vectors."""
    folder = tmp_path_factory.mktemp("models")
    weights = load_file(shared_dir / "parity/oasis_train_step/weights.safetensors")
    nets = {n: {k.removeprefix(f"net{n}."): v for k, v in weights.items() if k.startswith(f"net{n}.")} for n in "GD"}
    torch.manual_seed(0)
    nets["EMA"] = {
        key: value + 0.1 * torch.randn_like(value) * value.std(correction=0) if value.is_floating_point() else value
        for key, value in nets["G"].items()
    }
    for which, state in nets.items():
        torch.save(state, folder / f"best_{which}.pth")
    return folder


def import_arguments(release: Path, output: Path, *more: object) -> tuple[object, ...]:
    given = ("--source", "oasis", "--weights", release / "best_G.pth", "--output", output, *more)
    return ("scripts/import_checkpoint.py", *given)


CUSTOM = {"num_classes": 5, "ignore": [0], "remap": {raw: raw - 1 for raw in range(1, 6)}}
"""A table for ids such as ADE20K's: 0 is don't care, the classes are 1 to 5."""


def test_import_generate_fine_tune_and_export(commands, release, tmp_path, tiny_folder):
    both = ("--ema_weights", release / "best_EMA.pth", "--discriminator_weights", release / "best_D.pth")
    imported = tmp_path / "imported.pt"
    said = ok(commands, *import_arguments(release, imported, *both))  # nothing else: the rest is in the tensors
    for part in ("generator", "generator_ema", "discriminator"):
        assert f"{part}: " in said
    config = load_checkpoint(imported)["config"]
    assert config["gen"]["style_dims"] == 4 and config["gen"]["norm"]["hidden_channels"] == 8
    assert config["dis"]["max_num_filters"] == 12 and config["data"]["labels"]["num_classes"] == 5

    # The average's pictures are those of best_EMA.pth as it is: its vectors divide its weights, as in the release.
    alone = tmp_path / "alone.pt"
    (tmp_path / "a.json").write_text('{"label_nc": 5, "z_dim": 4}')
    ok(commands, "scripts/import_checkpoint.py", "--source", "oasis", "--weights", release / "best_EMA.pth",
       "--architecture", tmp_path / "a.json", "--output", alone)  # fmt: skip
    layout = SemanticLayout(layout_spec(parse_config(config)), torch.randint(6, (1, 64, 64), dtype=torch.int16))
    z = torch.randn(1, 4)
    models = Model.load(imported, for_inference=False), Model.load(alone, weights="raw", for_inference=False)
    pictures = [model.generator(layout, z) for model in models]
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-5, rtol=0)
    assert pictures[0].std() > 0.01

    # Files with the release's ids, as they are.
    raw = tiny_folder(keys=4, size=(64, 64))
    for path in (raw / "seg_maps").iterdir():
        write_png(path, blocky_labels(np.random.default_rng(7), 64, 64, 6))
    said = ok(commands, "inference.py", "--checkpoint", imported, "--input_dir", raw / "seg_maps", "--output_dir",
              tmp_path / "out", "--device", "cpu", "--no_gallery")  # fmt: skip
    assert "wrote 4 of 4 images" in said

    # Out again, bit for bit.
    ok(commands, "scripts/export_checkpoint.py", "--checkpoint", imported, "--target", "oasis", "--output_dir",
       tmp_path / "back")  # fmt: skip
    for which in ("G", "D", "EMA"):
        theirs, ours = (torch.load(folder / f"best_{which}.pth") for folder in (release, tmp_path / "back"))
        assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())

    # Fine-tuning: fresh optimizers; then the trained networks go out, too.
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(yaml.safe_dump({
        "gen": config["gen"], "dis": config["dis"], "losses": {"segmentation_gan": 1.0},
        "gen_opt": {"lr": 1e-4}, "dis_opt": {"lr": 4e-4}, "trainer": {"max_iterations": 1},
        "data": {
            "labels": CUSTOM, "edges": "none", "num_workers": 0,
            "train": {"roots": [str(raw)], "batch_size": 2, "augmentations": {"resize_h_w": [64, 64]}},
        },
    }))  # fmt: skip
    log = tmp_path / "log"
    said = ok(commands, "train.py", "--config", tuned, "--logdir", log, "--init_from", imported, "--device", "cpu")
    assert "starting from the weights of" in said and "all 5 classes continue" in said
    ok(commands, "scripts/export_checkpoint.py", "--checkpoint", log, "--target", "oasis",
       "--output_dir", tmp_path / "trained")  # fmt: skip
    for which in ("G", "D", "EMA"):
        theirs, ours = (torch.load(folder / f"best_{which}.pth") for folder in (release, tmp_path / "trained"))
        assert theirs.keys() == ours.keys() and not all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["oasis_g", "oasis_g_no3dnoise"])
def test_pictures_of_label_files_are_the_releases(shared_dir, name):
    """Of ids as in the files: 0 lights the release's first channel, whatever place it has here."""
    folder, hyper = shared_dir / "parity" / name, hyper_of(shared_dir, name)
    weights, inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "outputs"))
    found, notes = find_architecture({"generator": weights}, {"label_nc": hyper["label_nc"], "z_dim": hyper["z_dim"]},
                                     None)  # fmt: skip
    assert not notes and all(hyper[key] == value for key, value in found.items() if key != "z_dim")
    config = architecture_config("oasis", {**hyper, **found}, None)
    generator = import_generator("oasis", weights, hyper).eval()
    raw = inputs["label"][:, 0].numpy()
    labels = np.stack([config.data.labels.to_train_ids(image, "the fixture") for image in raw])
    with torch.no_grad():
        image = generator(SemanticLayout(layout_spec(config), torch.from_numpy(labels)), inputs.get("z"))
    torch.testing.assert_close(image, outputs["eval/fake_image"], atol=1e-5, rtol=0)


def test_names_are_one_to_one_and_scores_keep_their_channels(shared_dir):
    hyper = hyper_of(shared_dir, "oasis_d")
    weights = load_file(shared_dir / "parity/oasis_d/weights.safetensors")
    network = import_discriminator("oasis", weights, hyper)
    assert sorted(foreign_names("oasis", network).values()) == sorted(weights)
    # With don't care, which is their first label channel, the scores move with it; "generated" stays the first.
    moved = import_discriminator("oasis", weights, hyper | {"contain_dontcare_label": True})
    assert torch.equal(moved.to_logits.bias, network.to_logits.bias[[0, 2, 3, 4, 1]])


DATA_SETS = {
    # parity/oasis_g/notes.md: ADE20K's and Cityscapes' ids as they are, COCO-Stuff's plus one and 255 -> 0; channel 34
    # of Cityscapes is never used.
    "ade20k": ("ade20k/base256", 151, {0: 0, 1: 1, 75: 75, 150: 150}, [151, 255]),
    "coco": ("cocostuff/base256", 183, {255: 0, 0: 1, 90: 91, 181: 182}, [182, 254]),
    "cityscapes": ("cityscapes/base256x512", 35, {0: 0, 1: 1, 7: 7, 33: 33}, [35]),
}


@pytest.mark.parametrize("dataset", DATA_SETS)
def test_each_raw_id_lights_the_releases_channel(dataset, tmp_path):
    """In our recipe, in the translated opt.txt, and with no more than the data set's name."""
    recipe, count, lights, wrong = DATA_SETS[dataset]
    file = opt_txt(tmp_path / "opt.txt", dataset_mode=dataset, batch_size=4, lr_g=1e-4, lr_d=4e-4)
    text, _ = import_config("oasis", file, REPOSITORY / "configs/labels")
    configs = [
        load_config(RECIPES / f"{recipe}.yaml"),
        parse_config(yaml.safe_load(text)),
        architecture_config("oasis", {"dataset_mode": dataset}, None),
    ]
    for config in configs:
        spec = layout_spec(config)
        assert spec.num_channels == count and spec.has_dont_care
        ours = channels(config, tmp_path, list(lights))
        assert [(channel + 1) % count for channel in ours] == list(lights.values())
        for raw in wrong:
            with pytest.raises(LabelError, match=rf"\b{raw}\b.* outside the table"):
                channels(config, tmp_path, [1, raw])
        mode = {"coco": "coco", "ade20k": "ade20k or cityscapes", "cityscapes": "ade20k or cityscapes"}[dataset]
        (note, *others) = export_notes("oasis", config, "raw")
        assert f"dataset_mode {mode}" in note
        assert not others or (dataset == "cityscapes" and "raw ids 255 light another channel" in others[0])
    named = configs[1].data.labels
    assert named.names == configs[0].data.labels.names and named.palette == configs[0].data.labels.palette


OPTIONS = {
    "name": "oasis_cityscapes", "seed": 42, "gpu_ids": "0,1,2,3", "checkpoints_dir": "./checkpoints",
    "no_spectral_norm": False, "batch_size": 20, "dataroot": "datasets/cityscapes", "dataset_mode": "cityscapes",
    "no_flip": False, "num_res_blocks": 6, "channels_G": 64, "param_free_norm": "syncbatch", "spade_ks": 3,
    "no_EMA": False, "EMA_decay": 0.999, "no_3dnoise": False, "z_dim": 64, "num_epochs": 200, "beta1": 0.0,
    "beta2": 0.999, "lr_g": 0.0004, "lr_d": 0.0004, "channels_D": 64, "add_vgg_loss": False, "lambda_vgg": 10.0,
    "no_balancing_inloss": False, "no_labelmix": False, "lambda_labelmix": 5.0,
}  # fmt: skip


def test_options_become_a_config(commands, tmp_path):
    file = opt_txt(tmp_path / "opt.txt", **OPTIONS)
    said = ok(commands, "scripts/import_config.py", file, "--source", "oasis", "--output", tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml")
    check_run(config, 4)
    # The recipe is the same, but for what only one of the two states.
    recipe = load_config(RECIPES / "cityscapes/base256x512.yaml")
    assert (config.gen, config.dis) == (recipe.gen, recipe.dis)
    assert config.losses == recipe.losses and config.data.labels == recipe.data.labels
    assert (config.gen_opt, config.dis_opt) == (recipe.gen_opt, recipe.dis_opt)
    assert config.data.train.augmentations == recipe.data.train.augmentations
    assert config.data.train.batch_size == 5 and config.trainer.max_epochs == 200
    assert config.trainer.iteration == "reference" and config.trainer.model_average.beta == 0.999
    assert "ignored (no equivalent): channels_D: 64" in said and "of each GPU's 5 there" in said
    for option, value, message in (
        ("num_res_blocks", 4, "num_res_blocks 4: only 6 is supported"),
        ("dataset_mode", "mine", "for your own data set add label_nc"),
        ("param_free_norm", "group", "param_free_norm 'group': expected such as syncbatch"),
        ("batch_size", 21, "batch_size: 21 is no multiple of the 4 GPUs"),
    ):
        opt_txt(tmp_path / "bad.txt", **OPTIONS | {option: value})
        refused(commands, message, "scripts/import_config.py", tmp_path / "bad.txt", "--source", "oasis")


@pytest.mark.parametrize("encoder", ["efficientnet_lite0", "oasis, num_blocks: 5"])
def test_a_discriminator_of_our_own_stays_here_and_the_generator_goes_out(encoder):
    changes = ["gen={type: oasis, num_filters: 1, style_dims: 3}", f"dis.encoder={{type: {encoder}}}"]
    config = load_config(RECIPES / "sample/small64.yaml", changes)
    state = build_generator(config).state_dict()
    files = export_files("oasis", {"generator": state, "discriminator": {}}, config, "ema")
    assert files.keys() == {"best_G.pth", "best_EMA.pth"}
    assert torch.equal(files["best_G.pth"]["fc.weight"][:, :3], state["fc.weight"][:, :3])  # noise
    assert torch.equal(files["best_G.pth"]["fc.weight"][:, 3], state["fc.weight"][:, -1])  # don't care
    assert f"dis.encoder: {encoder} has no counterpart in OASIS" in export_notes("oasis", config, "raw")[0]
    with pytest.raises(CheckpointError, match=r"data\.edges: labels: oasis has generators of label maps alone"):
        export_files("oasis", {"generator": state}, load_config(RECIPES / "sample/small64.yaml", ["data.edges=labels"]),
                     "ema")  # fmt: skip


def test_a_generator_with_noise_injection_stays_here():
    config = load_config(REPOSITORY / "configs/projects/spade/sample/small64.yaml", ["gen.noise_injection=true"])
    small = load_config(REPOSITORY / "configs/projects/spade/sample/small64.yaml", ["gen.noise_injection=false"])
    with pytest.raises(CheckpointError, match=r"gen\.upsampling: fewer: nvlabs_spade.s generators start smaller"):
        export_files("nvlabs_spade", {"generator": {}}, small, "ema")
    smooth = load_config(REPOSITORY / "configs/projects/spade/camvid/small96x128.yaml",
                         ["gen.noise_injection=false", "gen.upsampling=normal"])  # fmt: skip
    with pytest.raises(CheckpointError, match=r"gen\.interpolation: bilinear: nvlabs_spade.s generators have nearest"):
        export_files("nvlabs_spade", {"generator": {}}, smooth, "ema")
    with pytest.raises(CheckpointError, match=r"gen\.noise_injection: true: nvlabs_spade.s generators have none"):
        export_files("nvlabs_spade", {"generator": {}}, config, "ema")


def test_what_does_not_fit_is_one_message_each(commands, release, tmp_path):
    g, d, out = release / "best_G.pth", release / "best_D.pth", tmp_path / "out.pt"

    def given(message: str, *more: object, **hyper: Any) -> None:
        if hyper:
            (tmp_path / "a.json").write_text(json.dumps(hyper))
            more = (*more, "--architecture", tmp_path / "a.json")
        refused(commands, message, *import_arguments(release, out, *more))
        assert not out.exists()

    given("takes 10 channels of noise and labels together: give --config, a recipe")
    given("these are the weights of a generator, not of a discriminator", "--discriminator_weights", g)
    no_dont_care = RECIPES.parent / "spade/cityscapes/base256x512.yaml"
    given("weights of OASIS have a don't-care channel", "--config", no_dont_care, "--set", "data.edges=none")
    given("counted differently: 6 by --discriminator_weights, 151 by data.labels of --config", "--config",
          RECIPES / "ade20k/base256.yaml", "--discriminator_weights", d)  # fmt: skip
    given("10 channels of noise and labels together; 151 label channels by --architecture", dataset_mode="ade20k")
    given("4 label channels by --architecture and 64 of noise (z_dim) make 68", label_nc=3)
    given("--architecture does not fit the weights: channels_G: 64 there, 1 by the tensors", label_nc=5, z_dim=4,
          channels_G=64)  # fmt: skip
    given("a value of a wrong type for oasis: z_dim: '4', not a whole number", label_nc=5, z_dim="4")
    given("the edge channel", "--discriminator_weights", d, "--config", write_config(tmp_path, edges="labels"))
    refused(commands, "--ema_weights: clade keeps no EMA in a file of its own", "scripts/import_checkpoint.py",
            "--source", "clade", "--weights", g, "--ema_weights", g, "--output", out)  # fmt: skip
    # Tensors that are missing, of another type, or pickled objects.
    state = torch.load(g)
    for name, broken, message in (
        ("short", {k: v for k, v in state.items() if k != "body.3.conv_s.weight_u"}, "missing: body.3.conv_s.weight_u"),
        ("type", state | {"fc.bias": state["fc.bias"].long()}, "fc.bias is torch.int64, not torch.float32"),
        ("shape", state | {"fc.bias": torch.zeros(3)}, "fc.bias is [3], these hyper-parameters make it [16]"),
        ("none", {"conv.weight": torch.zeros(1)}, "not the weights of OASIS's networks"),
        ("opt", {"opt": opt_txt}, "nothing of it was executed"),
    ):
        torch.save(broken, tmp_path / f"{name}.pth")
        refused(commands, message, "scripts/import_checkpoint.py", "--source", "oasis", "--weights",
                tmp_path / f"{name}.pth", "--discriminator_weights", d, "--output", out)  # fmt: skip


def write_config(folder: Path, **data: Any) -> Path:
    """A config of the fixture's size."""
    path = folder / "mine.yaml"
    labels = {"names": [], "palette": [], **CUSTOM}
    path.write_text(yaml.safe_dump({"base": str(RECIPES / "camvid/base256.yaml"), "data": {"labels": labels} | data}))
    return path


def test_networks_without_spectral_or_batch_norm_are_told_by_their_tensors(shared_dir):
    weights = load_file(shared_dir / "parity/oasis_g/weights.safetensors")
    plain = {k.replace("_orig", ""): v for k, v in weights.items() if not k.endswith(("weight_u", "weight_v"))}
    plain = {key: value for key, value in plain.items() if ".first_norm." not in key}
    found, notes = find_architecture({"generator": plain}, {"label_nc": 5, "z_dim": 4}, None)
    assert found["no_spectral_norm"] and found["param_free_norm"] == "instance"
    assert notes == ["no batch statistics in the file: its norms are taken for instance norms"]
    config = architecture_config("oasis", found, None)
    assert config.gen.args["spectral_norm"] is False and config.gen.args["norm"].args["normalization"] == "instance"
    import_generator("oasis", plain, found)
    with pytest.raises(CheckpointError, match="dataset_mode None: ade20k, coco, cityscapes are known"):
        architecture_config("oasis", {}, None)
