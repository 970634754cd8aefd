# ruff: noqa: F811 (the fixture tiny_run is imported)
"""A generator to give away: it makes the checkpoint's pictures, knows what it is, and tells nothing of its machine."""

import hashlib
import json
import os

import cv2
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file
from test_layout import random_layout
from test_training import tiny_run  # noqa: F401

from imaginaire_spade.build import layout_spec
from imaginaire_spade.errors import CheckpointError, UserError
from imaginaire_spade.inference.model import Model
from imaginaire_spade.training.checkpoint import load_checkpoint, newest_checkpoint

VAE = ("gen.style_dims=6", "encoder={type: conv, num_filters: 2, image_size: 128}", "losses.kl=0.1")


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_it_makes_the_checkpoints_pictures(tiny_run, tmp_path, weights):
    _, run = tiny_run
    run("log", *VAE, stop_after=1)
    trained = Model.load(newest_checkpoint(tmp_path / "log"), weights=weights, for_inference=False)
    path = tmp_path / "model.safetensors"
    trained.publish(path)
    with pytest.raises(AssertionError, match="for_inference=False"):
        Model.load(path).publish(tmp_path / "other.safetensors")
    published = Model.load(path, for_inference=False)
    assert (published.weights, published.images_seen) == (weights, 4)
    assert published.config.data.labels == trained.config.data.labels and published.config.gen == trained.config.gen
    layout, z = random_layout(layout_spec(trained.config), 2, 32, 64), torch.randn(2, 6)
    images = torch.rand(2, 3, 32, 64)
    assert torch.equal(published.generator(layout, z), trained.generator(layout, z))
    assert all(map(torch.equal, published.encoder(images), trained.encoder(images)))
    if weights == "ema":
        with pytest.raises(CheckpointError, match="holds only the EMA of the weights"):
            Model.load(path, weights="raw", for_inference=False)
    else:
        assert "has no EMA of the weights" in published.notes[0]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert str(tmp_path) not in json.dumps(metadata)
    assert json.loads(metadata["config"])["data"]["labels"]["num_classes"] == 5


def test_a_damaged_file_and_an_oversized_config_are_refused(tiny_run, tmp_path):
    _, run = tiny_run
    run("log", stop_after=1)
    path = tmp_path / "model.safetensors"
    Model.load(newest_checkpoint(tmp_path / "log"), for_inference=False).publish(path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert not Model.load(path, for_inference=False).notes
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 64]) + whole[-7:])
    with pytest.raises(CheckpointError, match="its sha256 is not the one in its metadata"):
        Model.load(path, for_inference=False)
    path.write_bytes(whole.replace(b"images_seen", b"images_sewn"))
    with pytest.raises(CheckpointError, match="damaged"):
        Model.load(path, for_inference=False)
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["sha256"]  # as earlier versions wrote it
    save_file(tensors, path, metadata)
    assert "without its sha256" in Model.load(path, for_inference=False).notes[0]
    for change in ({"num_filters": 65_536}, {"num_filters": -1}):
        config = json.loads(metadata["config"])
        config["gen"] |= change
        save_file(tensors, path, {**metadata, "config": json.dumps(config)})
        with pytest.raises(UserError):
            Model.load(path, for_inference=False)
    for wrong in ("[" * 10**5, "5", json.dumps({"data": {"labels": 5}})):
        save_file(tensors, path, {**metadata, "config": wrong})
        with pytest.raises(UserError):
            Model.load(path, for_inference=False)


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_the_command_lines(tiny_run, tmp_path, commands):
    _, run = tiny_run
    run("log", stop_after=1)
    path, log = tmp_path / "model.safetensors", tmp_path / "log"
    exported = commands.run("scripts/export_generator.py", "--checkpoint", log, "--output", path, "--model_card")
    assert exported.returncode == 0, exported.stderr
    assert f"wrote {path}: ema weights after 4 images" in exported.stdout
    again = commands.run("scripts/export_generator.py", "--checkpoint", log, "--output", path)
    assert again.returncode == 2 and "--overwrite" in again.stderr
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "imaginaire_spade" and card.data.pipeline_tag == "image-to-image"
    assert 'Synthesizer.load("hf://USER/REPO")(label_map)' in card.text and "| 4 | class 4 | " in card.text
    assert f"`model.safetensors`, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in card.text
    path.unlink()
    again = commands.run("scripts/export_generator.py", "--checkpoint", log, "--output", path, "--model_card")
    assert again.returncode == 2 and f"{tmp_path}/README.md is there already" in again.stderr and not path.exists()
    commands.run("scripts/export_generator.py", "--checkpoint", log, "--output", path)
    for name, checkpoint in (("a", path), ("b", newest_checkpoint(log))):
        made = commands.run("inference.py", "--checkpoint", checkpoint, "--input_dir", tmp_path / "raw",
                            "--output_dir", tmp_path / name)  # fmt: skip
        assert made.returncode == 0, made.stderr
    for picture in (tmp_path / "a").glob("*.png"):
        assert (cv2.imread(str(picture)) == cv2.imread(str(tmp_path / "b" / picture.name))).all()
    assert len(list((tmp_path / "a").glob("*.png"))) == 10


def test_other_files_are_refused_in_words(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        Model.load(path, for_inference=False)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not written by scripts/export_generator\.py"):
        Model.load(path, for_inference=False)
    with pytest.raises(CheckpointError, match="training needs the checkpoint it was exported from"):
        load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="cannot be read as a published generator, it is damaged"):
        Model.load(path, for_inference=False)
