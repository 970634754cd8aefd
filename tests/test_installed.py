# ruff: noqa: F811 (the fixture tiny_run is imported)
"""What a user gets from ``pip install``: one command, the recipes, ``train`` and ``hf://`` in Python, the schema."""

import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import REPOSITORY
from test_training import tiny_run  # noqa: F401

import imaginaire_spade
from imaginaire_spade import commands, load_config, train
from imaginaire_spade.command_names import as_called
from imaginaire_spade.commands.export_schema import config_schema
from imaginaire_spade.config_files import read_yaml
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError
from imaginaire_spade.files import atomic_write, from_hub, write_bytes, write_json
from imaginaire_spade.inference.model import find_checkpoint
from imaginaire_spade.version import __version__

RECIPE = "configs/projects/spade/sample/small64.yaml"


@pytest.fixture
def call(monkeypatch, capsys):
    """``imaginaire-spade ...`` in this process: exit code and what it printed."""

    def call(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["imaginaire-spade", *words])
        try:
            commands.main()
        except SystemExit as leaving:
            return leaving.code, "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())

    return call


def test_one_command_lists_all(call):
    assert call("--version") == (0, f"imaginaire-spade {__version__}\n")
    for words in ((), ("--help",), ("-h",)):
        code, printed = call(*words)
        assert code == 0 and all(f"\n  {name} " in printed for name in commands.COMMANDS)
    code, printed = call("data")
    assert code == 0 and "data build" in printed and "train" not in printed
    assert call("trian")[0] == 2 and "trian: no such command; did you mean 'train'?" in call("trian")[1]
    assert "data bild: no such command; did you mean 'data build'?" in call("data", "bild", "--config")[1]
    code, printed = call("data", "edges", "--help")
    assert code == 0 and printed.startswith("usage: imaginaire-spade data edges [-h] --data_root")
    assert call("paint", "--help")[1].startswith("usage: imaginaire-spade paint [-h] --checkpoint")


HELP = """
import contextlib, io, sys
from imaginaire_spade import commands
for name in commands.COMMANDS:
    sys.argv = ["imaginaire-spade", *name.split(), "--help"]
    with contextlib.suppress(SystemExit):
        commands.main()
sys.exit("torch" in sys.modules)
"""


def test_help_comes_without_torch_and_names_commands_as_they_are_called():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    for name in commands.COMMANDS:
        assert f"usage: imaginaire-spade {name} [-h]" in done.stdout, name
    assert not re.findall(
        r"(?:scripts/\S+|\b(?:train|inference|evaluate|build_lmdb))\.py|python -m imaginaire", done.stdout
    )
    for line in (
        "    imaginaire-spade data build --config my.yaml --data_root RAW --output_root datasets/my/train",
        "    torchrun --nproc_per_node=8 -m imaginaire_spade data build --config ... --data_root RAW",
        "``torchrun --nproc_per_node=K -m imaginaire_spade train --config C.yaml --logdir DIR``",
        "Paint label maps in a browser and see the images: ``imaginaire-spade paint --checkpoint P``",
    ):
        assert line in done.stdout
    script = [sys.executable, REPOSITORY / "scripts/build_lmdb.py", "--help"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert "    python scripts/build_lmdb.py --config my.yaml --data_root RAW" in done.stdout


def test_messages_name_commands_as_they_are_called(tmp_path, call, monkeypatch):
    arguments = ("--source", "x", "--output", str(tmp_path / "out"), "--lmdb")
    assert "then imaginaire-spade data label\n" in call("data", "prepare", "landscapes", *arguments)[1]
    text = f"{tmp_path}/scripts/build_lmdb.py: train.py, scripts/build_lmdb.py --resume"
    assert (
        as_called(text)
        == f"{tmp_path}/scripts/build_lmdb.py: imaginaire-spade train, imaginaire-spade data build --resume"
    )
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert as_called(text) == str(DataError(text)) == text
    monkeypatch.setattr("imaginaire_spade.command_names._HAS_SCRIPTS", False)  # as installed from a wheel
    assert str(DataError("build it with scripts/build_lmdb.py")) == "build it with imaginaire-spade data build"


def test_every_script_is_a_command():
    """But for those that need the repository around the package."""
    scripts = {path.stem for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("scripts/*.py")]}
    named = {module.removeprefix("commands.") for module, _ in commands.COMMANDS.values()} - {"demo.__main__"}
    assert scripts - named == {"download_test_data", "verify_parity", "write_config_reference"} and named <= scripts


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = load_config(RECIPE)
    mine = tmp_path / "sub/mine.yaml"
    mine.parent.mkdir()
    mine.write_text(f"base: {RECIPE}\nseed: 12\n")
    assert load_config(mine) == ours.model_copy(update={"seed": 12}) == load_config("sub/mine.yaml")
    for folder in (mine.parent, tmp_path):  # a file on disk goes first
        (folder / RECIPE).parent.mkdir(parents=True)
        (folder / RECIPE).write_text(f"base: {REPOSITORY / RECIPE}\nseed: 99\n")
    assert load_config(RECIPE).seed == 99
    (tmp_path / "sub/other.yaml").write_text(f"base: {RECIPE}\n")
    assert load_config("sub/other.yaml").seed == 99
    with pytest.raises(
        ConfigError, match=r"^configs/labels/camvidd\.yaml: .* did you mean 'configs/labels/camvid\.yaml'\? R"
    ):
        load_config("configs/labels/camvidd.yaml")


def test_a_checkpoint_on_the_hub(tmp_path, monkeypatch):
    """With a stand-in for huggingface_hub: nothing is downloaded here."""
    asked = []

    def hf_hub_download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        if repo_id == "user/gone":
            raise FileNotFoundError("404: no such repository\nsecond line")
        (tmp_path / "cached").write_bytes(b"")
        return str(tmp_path / "cached")

    stand_in = types.ModuleType("huggingface_hub")
    stand_in.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    assert find_checkpoint(Path("hf://user/repo"), None, None) == tmp_path / "cached"
    assert from_hub(Path("hf://user/repo/sub/a.pt"), "--init_from") == tmp_path / "cached"
    assert asked == [("user/repo", "model.safetensors"), ("user/repo", "sub/a.pt")]
    assert from_hub(tmp_path, "--checkpoint") == tmp_path
    with pytest.raises(CheckpointError, match=r"^--checkpoint hf://user/gone: model\.safetensors .*repository$"):
        from_hub(Path("hf://user/gone"), "--checkpoint")
    with pytest.raises(CheckpointError, match="write hf://USER/REPO or"):
        from_hub(Path("hf://user"), "--checkpoint")
    with pytest.raises(CheckpointError, match=r"^--checkpoint hf://: write hf://USER/REPO or"):
        from_hub(Path("hf://"), "--checkpoint")
    with pytest.raises(CheckpointError, match=r"^--checkpoint https://host\.org/a\.pt: download the file"):
        from_hub(Path("https://host.org/a.pt"), "--checkpoint")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install huggingface_hub$"):
        from_hub(Path("hf://user/repo"), "--checkpoint")


def test_the_schema_for_editors(tmp_path, call):
    code, printed = call("export", "schema", "--output", str(tmp_path / "schema.json"))
    assert (code, printed) == (0, f"wrote {tmp_path / 'schema.json'}\n")
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema == config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    recipes = [*(REPOSITORY / "configs").rglob("*.yaml")]
    assert len(recipes) > 50
    for path in recipes:
        validator.validate(read_yaml(path.read_text(encoding="utf-8"), str(path)))
    for wrong in ({"gne": {}}, {"gen": "spad"}, {"gen": {"type": "spade", "filters": 3}}, {"losses": {"gna": 1}},
                  {"losses": {"gan": {"mode": "hnge"}}}, {"trainer": {"log_every": "often"}}):  # fmt: skip
        assert not validator.is_valid(wrong), wrong


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            write_bytes(tmp_path / f"{mask}/bytes", b"")
            write_json(tmp_path / f"{mask}/json", {})
            with atomic_write(tmp_path / f"{mask}/torch") as path:
                torch.save({}, path)
        finally:
            os.umask(before)
        for path in (tmp_path / str(mask)).iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


def test_train_is_a_function(tiny_run, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr("imaginaire_spade.training.run_log.write_curves", lambda *_: None)  # they take longer
    assert importlib.import_module("imaginaire_spade.train") is imaginaire_spade.train is train
    path, _ = tiny_run
    train(path, tmp_path / "log", max_iterations=1, device="cpu")
    assert [*(tmp_path / "log/checkpoints").glob("*.pt")]
    with pytest.raises(ConfigError, match=r"trainer\.nothing: unknown key"):
        train(path, tmp_path / "log", overrides=["trainer.nothing=1"])


WHEEL = """
set -e
imaginaire-spade --version
imaginaire-spade data sample --output_root raw --num_train 6 --num_val 2 --height 64 --width 64
imaginaire-spade data build --config configs/labels/sample.yaml --data_root raw/train --output_root lmdb --num_workers 0
imaginaire-spade train --config RECIPE --logdir log --set data.train.roots=[lmdb] --set trainer.max_iterations=1 \
  --set data.val.roots=[raw/val]
printf 'base: RECIPE\\ntrainer: {max_iterations: 2}\\n' > my.yaml
printf 'data: {train: {roots: [lmdb]}, val: {roots: [raw/val]}}\\n' >> my.yaml
python -m torch.distributed.run --standalone -m imaginaire_spade.train --config my.yaml --logdir log
imaginaire-spade infer --logdir log --input_dir raw/val --output_dir made
imaginaire-spade evaluate --real raw/val/images --fake made --reference_split val --metrics fid --output report.json \
  --inception_weights random:0 --feature_dim 64
python -c 'import imaginaire_spade; print(imaginaire_spade.__file__)'
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_wheel_needs_nothing_of_the_repository(tmp_path):
    tree = tmp_path / "tree"
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if name.startswith(("imaginaire_spade/", "configs/")) or "/" not in name:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((REPOSITORY / name).read_bytes())
    run = {"check": True, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree], **run)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], **run)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "torch_and_others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "--python", tmp_path / "venv/bin/python", "install", "-q", "--no-deps", wheel], **run)
    away = tmp_path / "away"
    away.mkdir()
    run["env"]["PATH"] = f"{tmp_path / 'venv/bin'}:{run['env']['PATH']}"
    done = subprocess.run(
        ["bash", "-c", WHEEL.replace("RECIPE", RECIPE)], cwd=away, capture_output=True, text=True, env=run["env"]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith(f"{packages}/imaginaire_spade/__init__.py\n") and (away / "report.json").is_file()
