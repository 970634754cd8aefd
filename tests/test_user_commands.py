"""The commands that users know, of imaginaire's SPADE project and of our README, word for word, on miniature data."""

import importlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import write_jpg, write_png
from fork_server import Forked, ForkServer

from imaginaire_spade.config_files import load_config
from imaginaire_spade.data.transforms import Geometry, draw_geometry
from imaginaire_spade.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]

# The recipe's networks are made for GPUs: narrower ones, smaller pictures, no VGG19, one iteration.
SHRUNK = [
    f"--set={item}"
    for item in (
        "gen.num_filters=2", "gen.norm.hidden_channels=4", "gen.norm.kernel_size=3", "dis.num_filters=4",
        "encoder.num_filters=2", "losses.perceptual=0", "trainer.max_epochs=1",
        "data.train.augmentations={resize_smallest_side: 128, horizontal_flip: true, random_crop_h_w: [128, 128]}",
        "data.val.augmentations={resize_h_w: [128, 128]}", "data.train.batch_size=2", "data.num_workers=1",
    )
]  # fmt: skip


def shell(commands: ForkServer, command: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    name, *words = command.split()
    assert name == "python"
    result = commands.run(*words, *more, cwd=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def raw_cocostuff(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(count):
        name = f"{number:012d}"
        labels = rng.integers(0, 183, (9, 12)).astype(np.uint8)
        labels[0, 0] = 255
        labels = np.kron(labels, np.ones((8, 8), np.uint8))
        photo = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (96, 72))
        write_jpg(folder / "images" / f"{name}.jpg", photo)
        write_png(folder / "seg_maps" / f"{name}.png", labels)
        write_png(folder / "edge_maps" / f"{name}.png", (rng.random((72, 96)) < 0.1).astype(np.uint8) * 255)


def test_build_train_and_generate_as_imaginaires_readme_says(tmp_path, commands):
    for name in ("train.py", "inference.py", "scripts", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for split, count in (("train", 4), ("val", 2)):
        raw_cocostuff(tmp_path / "dataset/cocostuff_raw" / split, count, seed=count)
        shell(
            commands,
            "python scripts/build_lmdb.py --config configs/projects/spade/cocostuff/base128_bs4.yaml"
            f" --data_root dataset/cocostuff_raw/{split} --output_root dataset/cocostuff/{split} --overwrite --paired",
            tmp_path,
        )
    trained = shell(
        commands,
        "python -m torch.distributed.launch --nproc_per_node=2 train.py"
        " --config configs/projects/spade/cocostuff/base128_bs4.yaml"
        " --logdir logs/projects/spade/cocostuff/base128_bs4.yaml",
        tmp_path,
        *SHRUNK,
    )
    assert "batch: 2 per process x 2 process(es) = 4 globally" in trained.stdout
    # Their test data lies where the config says, and the newest checkpoint of the log dir is taken.
    raw_cocostuff(tmp_path / "projects/spade/test_data/cocostuff", 3, seed=9)
    made = shell(
        commands,
        "python inference.py --single_gpu --config configs/projects/spade/cocostuff/base128_bs4.yaml"
        " --output_dir projects/spade/output/cocostuff --logdir logs/projects/spade/cocostuff/base128_bs4.yaml",
        tmp_path,
        *SHRUNK,
    )
    assert "wrote 3 of 3 images" in made.stdout
    output = tmp_path / "projects/spade/output/cocostuff"
    # Label maps of 72x96 are far from 128x128, at which it was trained: they are generated at that, as imaginaire does.
    assert "3 label maps of 72x96 are generated at 128x128" in made.stderr
    assert cv2.imread(str(output / "000000000001.png")).shape == (128, 128, 3)
    assert (output / "index.html").exists()
    sheet = shell(
        commands,
        "python scripts/make_contact_sheet.py --config configs/projects/spade/cocostuff/base128_bs4.yaml"
        " --data_root projects/spade/test_data/cocostuff --generated projects/spade/output/cocostuff"
        " --output sheet.png --rows 2 --columns 1",
        tmp_path,
    )
    assert sheet.stdout == "2 samples: sheet.png\n"
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] > 3 * 96


def test_inference_without_weights_says_what_to_give(tmp_path, commands):
    config = "configs/projects/spade/cocostuff/base128_bs4.yaml"
    result = commands.run("inference.py", "--config", config, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no checkpoint: give --checkpoint FILE, or --logdir DIR")


# ------------------------------------------------------------------------------------------------ README, own data


def section(page: str, heading: str) -> str:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert text.count(f"\n## {heading}\n") == 1, f"{page} has no section {heading!r}"
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def blocks_of(text: str) -> list[str]:
    """The indented blocks of a page (below a list's items: seven spaces), without the indentation."""
    found = re.findall(r"(?:^ {7}.*\n|^\n(?= {7}))+", text, re.MULTILINE)
    return [re.sub(r"^ {7}", "", block, flags=re.MULTILINE).strip() for block in found]


def config_in(text: str) -> str:
    (config,) = (block for block in blocks_of(text) if block.startswith("base: "))
    return config


def test_the_readmes_own_data_is_built_trained_and_painted_as_it_says(tiny_folder, tmp_path, commands):
    text = section("README.md", "Your own data")
    config = config_in(text)
    lines = [line for block in blocks_of(text) if block != config for line in block.splitlines()]
    assert len(lines) == 8
    (tmp_path / "mine.yaml").write_text(config)
    labels = yaml.safe_load(config)["data"]["labels"]
    assert len(set(labels["names"])) == len(labels["palette"]) == labels["num_classes"] > 1
    for name in ("train.py", "inference.py", "evaluate.py", "scripts", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    mine = tiny_folder("MINE", keys=24, size=(108, 144), num_classes=labels["num_classes"],
                       types=("images", "seg_maps"))  # fmt: skip
    (mine / "images").rename(mine / "photos")
    (mine / "seg_maps").rename(mine / "maps")

    # What is added to the lines, by the script that they start: a short run of few filters, no weights for the scores.
    narrow = ("gen.num_filters=4", "gen.norm.hidden_channels=8", "dis.num_filters=4", "data.num_workers=0")
    more = {
        "train.py": ["--max_iterations", "2", *(f"--set={item}" for item in narrow)],
        "evaluate.py": ["--inception_weights", "random:0", "--feature_dim", "64"],
        "imaginaire_spade.demo": ["--port", "0"],
    }
    assert more["evaluate.py"][0] + " random:0" in text
    printed = {}
    for line in lines:
        python, *words = shlex.split(line, comments=True)
        assert python == "python", f"one process needs no launcher: {line}"
        script = words[1] if words[0] == "-m" else words[0]
        if script == "imaginaire_spade.demo":
            look_at_the_page(commands.start(*words, *more[script], cwd=tmp_path))
            continue
        result = commands.run(*words, *more.get(script, []), cwd=tmp_path, NO_CURVES="1")
        assert result.returncode == 0, f"{line}\n{result.stdout[-1000:]}{result.stderr[-3000:]}"
        printed[script] = result.stdout
    scripts = {f"scripts/{name}.py" for name in ("prepare_dataset", "build_lmdb", "inspect_lmdb")}
    assert set(printed) == {*scripts, "train.py", "inference.py", "evaluate.py"}
    assert all((tmp_path / name).stat().st_size for name in ("legend.png", "sheet.png", "logs/mine/train.log"))
    assert labels["names"][0] in printed["scripts/build_lmdb.py"] and "class 0" not in printed["scripts/build_lmdb.py"]
    assert "wrote 20 of 20 images" in printed["inference.py"]
    assert labels["names"][0] in (tmp_path / "pictures/index.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["scores"]


def look_at_the_page(process: Forked) -> None:
    give_up_at = time.monotonic() + 60
    url = None
    while url is None:
        assert process.poll() is None and time.monotonic() < give_up_at, process.stderr.read_text()
        time.sleep(0.02)
        url = re.search(r"painting page: (\S+)", process.stdout.read_text()) if process.stdout.exists() else None
    with urllib.request.urlopen(url[1]) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    assert process.output().endswith("ended\n")


def test_the_readmes_line_for_square_and_upright_photos_is_true(tmp_path):
    config = config_in(section("README.md", "Your own data"))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    for name, text in (("as_it_is.yaml", config), ("with_it.yaml", re.sub(r"# .*(?=augmentations: )", "", config))):
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="enlarge first: resize_smallest_side: 128"):
        geometry_of(tmp_path / "as_it_is.yaml", 200, 200)
    for height, width in ((200, 200), (300, 200), (90, 120), (1000, 1001)):
        geometry = geometry_of(tmp_path / "with_it.yaml", height, width)
        assert (geometry.height, geometry.width) == (96, 128)


def geometry_of(config: Path, height: int, width: int) -> Geometry:
    """Of the photo at its smallest."""
    return draw_geometry(height, width, load_config(config).data.train.augmentations, [0, 0, 0, 0], "it")


def test_the_readme_says_when_weights_are_needed_and_where_that_is_told():
    text = section("README.md", "Your own data")
    config = config_in(text)
    without = load_config(REPOSITORY / yaml.safe_load(config)["base"])
    assert without.losses["perceptual"].weight == 0, "this recipe needs the weights of VGG19"
    link = re.search(r"VGG19[^.]*\[INSTALL\.md\]\(INSTALL\.md#([\w-]+)\)", text)
    assert link, "no sentence says when VGG19 is needed and where INSTALL.md says how"
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "INSTALL.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert link[1] in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_readmes_lines_of_python_run(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    text = re.search(r"To build only a network.*?\n\n((?: {4}.*\n|\n)+)", page)[1]
    names: dict = {}
    exec(re.sub(r"^ {4}", "", text, flags=re.MULTILINE), names)  # noqa: S102
    assert names["image"].shape == (1, 3, 256, 256) and names["image"].abs().max() <= 1


# ------------------------------------------------------------------------------------------------ label tables

LABEL_READERS = {
    "build_lmdb.py": "--data_root raw --output_root built --num_workers 0",
    "inspect_lmdb.py": "raw --verify --num_workers 0 --legend legend.png",
    "make_distance_maps.py": "--data_root raw --num_workers 0",
    "make_contact_sheet.py": "--data_root raw --generated raw/images --output sheet.png",
    "prepare_dataset.py": "custom --source raw --labels seg_maps --output prepared --lmdb --num_workers 0",
}
"""The scripts that need to know what the ids of a label map mean, and nothing else of a config."""


@pytest.mark.parametrize("script", LABEL_READERS)
def test_a_label_table_alone_is_enough_where_only_labels_matter(script, tiny_folder, tmp_path, commands):
    raw = tiny_folder(keys=3, num_classes=11, types=("images", "seg_maps"))
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")

    def run(config: str) -> subprocess.CompletedProcess:
        words = LABEL_READERS[script].split()
        return commands.run(REPOSITORY / "scripts" / script, *words, "--config", config, cwd=tmp_path)

    # 1. What it takes: a table, the config of a run, one that is based on several files. 2. What it does not.
    (tmp_path / "based.yaml").write_text("base: [configs/labels/camvid.yaml, more.yaml]\n")
    (tmp_path / "more.yaml").write_text("data: {edges: labels, labels: {ignore: [254, 255]}}\n")
    for config in ("configs/labels/camvid.yaml", "configs/projects/spade/camvid/small96x128.yaml", "based.yaml"):
        result = run(config)
        assert result.returncode == 0, result.stderr
        for built in ("built", "prepared"):
            shutil.rmtree(tmp_path / built, ignore_errors=True)
    write_png(raw / "seg_maps/0002.png", np.full((40, 56), 254, np.uint8))
    shutil.rmtree(raw / "distances", ignore_errors=True)
    assert run("based.yaml").returncode == 0
    shutil.rmtree(tmp_path / "prepared", ignore_errors=True)

    (tmp_path / "neither.yaml").write_text("names: [sky, road]\n")
    (tmp_path / "misspelt.yaml").write_text("data: {edgs: labels, labels: {num_classes: 11, ignroe: [255]}}\n")
    (tmp_path / "section.yaml").write_text("base: configs/labels/camvid.yaml\ntrainr: {log_every: 1}\n")
    for config, *parts in (
        ("neither.yaml", "neither.yaml: no label table, in it or in its base. Write data:", "base: configs/labels/"),
        ("misspelt.yaml", "misspelt.yaml:1: data.edgs: unknown key; did you mean 'edges'?", "did you mean 'ignore'?"),
        ("section.yaml", "section.yaml:2: trainr: unknown key; did you mean 'trainer'?"),
        ("absent.yaml", "absent.yaml: no such config file"),
    ):
        result = run(config)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert all(part in result.stderr for part in parts), result.stderr
        assert not (tmp_path / "prepared").exists()


def test_a_key_set_by_hand_reaches_the_label_table(tiny_folder, tmp_path, commands):
    raw = tiny_folder(keys=2, num_classes=12, types=("images", "seg_maps"))
    build = ["scripts/build_lmdb.py", "--config", "configs/labels/camvid.yaml", "--data_root", raw]
    build += ["--output_root", tmp_path / "out", "--num_workers", "0"]
    assert "label value(s) 11 outside the table" in commands.run(*build).stderr
    assert "trainr: unknown key" in commands.run(*build, "--set", "trainr.log_every=1").stderr
    result = commands.run(*build, "--set", "data.labels.ignore=[11, 255]")
    assert result.returncode == 0 and "don't care" in result.stdout, result.stderr
    result = commands.run(*build, "--set", "data.labels.ignore=[11, 255]", "--set", "data.edges=instances")
    assert result.returncode == 2 and "no folder inst_maps/" in result.stderr


def test_a_label_table_is_no_config_of_a_run_and_one_message_says_so(tmp_path, commands):
    result = commands.run("train.py", "--config", "configs/labels/camvid.yaml", "--logdir", tmp_path / "log")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "configs/labels/camvid.yaml: not the config of a run: it has no gen, dis, losses" in result.stderr
    assert "base: [configs/projects/" in result.stderr


# ------------------------------------------------------------------------------------------------ modes of files

WITH_UMASK = """
import os, runpy, sys
os.umask(int(sys.argv[1], 8))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TINY_SAMPLE = """
base: configs/projects/spade/sample/small64.yaml
gen: {num_filters: 2, norm: {hidden_channels: 4}, style_dims: 4, noise_injection: false, upsampling: normal}
dis: {num_filters: 4, num_layers: 2, num_discriminators: 1}
encoder: {type: conv, num_filters: 2, image_size: 128}
losses: {kl: 0.1}
trainer:
  max_iterations: 2
  image_every: 2
  checkpoint_every: 2
  keep_every: 2
  evaluation: {every_images: 4, metrics: [fid], inception_weights: "random:0", feature_dim: 64}
data:
  edges: labels
  train: {roots: [lmdb], batch_size: 2}
  val: {roots: [val], batch_size: 2}
"""

WRITERS = """
scripts/make_sample_data.py --output_root drawn --num_train 6 --num_val 4 --height 64 --width 64
scripts/prepare_dataset.py custom --source drawn/train --labels seg_maps --output raw --num_val 2 --num_workers 0
scripts/make_distance_maps.py --config configs/labels/sample.yaml --data_root raw/train --num_workers 0
scripts/make_edge_maps.py --data_root raw/train --of labels --num_workers 0
scripts/build_lmdb.py --config tiny.yaml --data_root raw/train --output_root lmdb --num_shards 2 --num_workers 0
scripts/build_lmdb.py --config tiny.yaml --data_root drawn/val --output_root val --recode_maps --num_workers 0
scripts/inspect_lmdb.py lmdb --legend legend.png --contact_sheet sheet.jpg
scripts/inspect_lmdb.py val --extract scene_00006 --output_dir taken
train.py --config tiny.yaml --logdir log
inference.py --logdir log --input_dir val --output_dir made --style_interpolate 0 1 --steps 2 --animation gif
scripts/make_contact_sheet.py --config tiny.yaml --data_root val --generated drawn/val/images --output made.png
scripts/export_generator.py --checkpoint log --output out/model.safetensors
scripts/export_checkpoint.py --target nvlabs_spade --checkpoint log/checkpoints/best.pt --output_dir out/theirs
scripts/compute_fid_stats.py --real drawn/val/images --reference_split val --output stats.npz INCEPTION
evaluate.py --real stats.npz --fake made --reference_split val --output report.json --html report.html INCEPTION
""".replace("INCEPTION", "--inception_weights random:0 --feature_dim 64")


@pytest.mark.parametrize("umask", [pytest.param("022", marks=pytest.mark.slow), "027"])
def test_every_file_has_the_mode_that_the_umask_leaves(umask, tmp_path, commands):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "tiny.yaml").write_text(TINY_SAMPLE)
    (tmp_path / "with_umask.py").write_text(WITH_UMASK)
    before = set(tmp_path.iterdir())
    for line in WRITERS.strip().splitlines():
        script, *words = line.split()
        result = commands.run("with_umask.py", umask, REPOSITORY / script, *words, cwd=tmp_path)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
    written = [path for top in set(tmp_path.iterdir()) - before for path in (top, *top.rglob("*"))]
    kinds = {path.suffix for path in written}
    assert kinds >= {".pt", ".sha256", ".safetensors", ".pth", ".jpg", ".png", ".gif", ".html", ".json", ".jsonl"}
    assert kinds >= {".mdb", ".npz", ".npy", ".yaml"}
    left = {True: 0o777 & ~int(umask, 8), False: 0o666 & ~int(umask, 8)}
    assert not {str(p): oct(p.stat().st_mode) for p in written if p.stat().st_mode & 0o777 != left[p.is_dir()]}


def test_names_that_the_output_cannot_show_stop_nothing(tiny_folder, tmp_path):
    root = tiny_folder(keys=2, num_classes=2, types=("images", "seg_maps"))
    (tmp_path / "c.yaml").write_text("data: {labels: {num_classes: 2, names: [Straße, Grün]}}", encoding="utf-8")
    ascii_only = {
        **os.environ,
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    arguments = [
        "--config",
        tmp_path / "c.yaml",
        "--data_root",
        root,
        "--output_root",
        tmp_path / "out",
        "--num_workers",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts/build_lmdb.py", *arguments],
        env=ascii_only, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Stra\\xdfe" in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("chosen", "is_kept"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, False),
    ],
)
def test_freed_memory_is_kept_for_the_next_tensor_unless_the_user_chose_otherwise(chosen, is_kept):
    code = """
from imaginaire_spade.processes import keep_large_buffers
def resident():
    return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0]) / 1024  # MiB
keep_large_buffers()
before = resident()
large = b"x" * 2**27
most = resident()
del large
print(before, most, resident())
"""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, check=True,
                            capture_output=True, text=True)  # fmt: skip
    before, most, after = map(float, result.stdout.split())
    assert most > before + 100 and (after > before + 100) == is_kept


@pytest.mark.skipif(platform.system() != "Linux", reason="torch has GNU's OpenMP on Linux")
@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "20"}, "20"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_of_a_command_fall_asleep_soon_unless_the_user_chose_otherwise(chosen, spins):
    """OpenMP says what it was loaded with, by a command that loads torch."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | chosen
    result = subprocess.run([sys.executable, "inference.py", "--checkpoint", "none.pt", "--input_dir", "none",
                             "--output_dir", "none"], cwd=REPOSITORY, env=environment | {"OMP_DISPLAY_ENV": "verbose"},
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)) == {spins}, result.stderr


@pytest.mark.parametrize("command", ["train", "inference", "evaluate"])
def test_commands_that_run_networks_keep_freed_memory(command, monkeypatch):
    module = importlib.import_module(f"imaginaire_spade.commands.{command}")

    class Called(Exception):
        pass

    def called():
        raise Called

    monkeypatch.setattr(module, "keep_large_buffers", called)
    monkeypatch.setattr(module, "parse_arguments", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(Called):
        module.main()
