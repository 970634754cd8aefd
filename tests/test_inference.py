"""Inference: the real command line on tiny data, and the promise that a picture depends on (seed, key) alone."""

import errno
import hashlib
import http.client
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import blocky_labels, write_jpg, write_png
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imaginaire_spade.build import build_encoder, build_generator
from imaginaire_spade.commands import inference as command_line
from imaginaire_spade.config_diff import explain_mismatch
from imaginaire_spade.config_files import dump_config, load_config, parse_config
from imaginaire_spade.data.batch import Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, LabelError, UserError, run_command_line
from imaginaire_spade.inference import folder as folder_run
from imaginaire_spade.inference.model import Model, find_checkpoint
from imaginaire_spade.inference.output import check_empty, plan_outputs
from imaginaire_spade.inference.synthesis import BATCHES_HELD, Request, group_by_size, pad_to_layout, synthesise
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.for_inference import optimise_for_inference
from imaginaire_spade.models.spectral_norm import fold_spectral_norm
from imaginaire_spade.noise import style_noise
from imaginaire_spade.training.checkpoint import write_checkpoint
from imaginaire_spade.training.state import new_average

REPOSITORY = Path(__file__).resolve().parents[1]
TREE = {
    "gen": {"type": "spade", "num_filters": 2, "style_dims": 4, "norm": {"type": "spade", "hidden_channels": 8}},
    "encoder": {"type": "conv", "num_filters": 2, "image_size": 128},
    "dis": {"type": "multiscale_patch", "num_filters": 4},
    "losses": {"gan": 1.0},
    "gen_opt": {"lr": 1e-4},
    "dis_opt": {"lr": 1e-4},
    "trainer": {"max_iterations": 1, "init": {"type": "xavier", "gain": 0.7}},
    "data": {
        "labels": {"num_classes": 5, "ignore": [255]}, "edges": "file",
        "train": {"roots": ["unused"], "augmentations": {"random_crop_h_w": [64, 64]}},
    },
}  # fmt: skip


CONFIG = parse_config(TREE)


def changed(tree: dict, **values) -> dict:
    """A copy with ``section__key=value`` set."""
    tree = yaml.safe_load(yaml.safe_dump(tree))
    for dotted, value in values.items():
        *parents, last = dotted.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree


def save(path: Path, tree: dict, **content) -> Path:
    torch.manual_seed(0)
    config = parse_config(tree)
    generator, average, encoder = build_generator(config), new_average(build_generator(config)), build_encoder(config)
    state = {
        "config": dump_config(config), "generator": generator.state_dict(), "generator_ema": average.state_dict(),
        "encoder": None if encoder is None else encoder.state_dict(), "images_seen": 2400,
    }  # fmt: skip
    write_checkpoint(path, state | content)
    return path


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "checkpoint_000000002400.pt", TREE)


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory) -> Path:
    """Without style code, encoder, edges and moving average."""
    tree = changed(TREE, gen__style_dims=0, encoder=None, data__edges="none")
    return save(tmp_path_factory.mktemp("plain") / "plain.pt", tree, generator_ema=None)


NAMES = ["a", "b c", "seq/ü#1", "seq/50%25?", "日本/x&y", "z_00", "z"]
SIZES = [(40, 56), (64, 64), (33, 31), (40, 56), (64, 64), (1, 70), (40, 60)]


@pytest.fixture
def label_maps(tmp_path) -> Path:
    folder = tmp_path / "label maps"
    for number, (name, (height, width)) in enumerate(zip(NAMES, SIZES, strict=True)):
        labels = blocky_labels(np.random.default_rng(number), height, width, 5)
        labels[0, 0] = 255
        write_png(folder / f"{name}.png", labels)
    return folder


@pytest.fixture
def run(monkeypatch):
    """The command line's ``main`` in this process, on the CPU; its errors as exceptions."""

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["inference.py", "--device", "cpu", *map(str, arguments)])
        command_line.main()

    return call


def files(directory: Path) -> dict[str, str]:
    """Picture path -> sha256 of its bytes, without the gallery."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix in (".png", ".jpg") and "_labels" not in path.parts
    }


def size_of(path: Path) -> tuple[int, ...]:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR).shape[:2]


# ------------------------------------------------------------------------------------------------ what is promised


def test_sizes_names_and_gallery(run, checkpoint, label_maps, tmp_path, capsys):
    out = tmp_path / "out put"
    run("--checkpoint", checkpoint, "--input_dir", label_maps, "--output_dir", out, "--size", "own", "--single_gpu",
        "--local-rank=0")  # fmt: skip
    assert set(files(out)) == {f"{name}.png" for name in NAMES}
    for name, size in zip(NAMES, SIZES, strict=True):
        assert size_of(out / f"{name}.png") == size
        assert size_of(out / "_labels" / f"{name}.png") == size
    page = (out / "index.html").read_text(encoding="utf-8")
    for url in [part.split('"')[0] for part in page.split('src="')[1:]]:
        assert (out / unquote(url)).is_file(), url
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]
    captured = capsys.readouterr()
    assert f"wrote 7 of 7 images to {out}" in captured.out and "images/s" in captured.out
    assert str(out / "index.html") in captured.out
    assert "edges are drawn from the borders" in captured.err


def test_the_gallery_says_what_made_each_image_and_shows_photos(run, checkpoint, tmp_path):
    for key, shape in (("a", (40, 56)), ("seq/b", (9, 9)), ("c", (0, 0))):
        write_png(tmp_path / "data/seg_maps" / f"{key}.png", np.zeros((40, 56), np.uint8))
        if any(shape):
            write_jpg(tmp_path / "data/images" / f"{key}.jpg", np.full((*shape, 3), 90, np.uint8))
    out = tmp_path / "out"
    flags = ("--checkpoint", checkpoint, "--input_dir", tmp_path / "data", "--output_dir", out, "--overwrite",
             "--size", "20x28", "--num_samples", 2)  # fmt: skip
    run(*flags, "--seed", 3)
    copy = cv2.imread(str(out / "_labels/a.photo.jpg"))
    assert copy.shape == (20, 28, 3) and abs(int(copy.mean()) - 90) < 3
    assert not (out / "_labels/seq/b.photo.jpg").exists()  # of another size than its label map
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<small>--seed 3, sample 1</small>" in page and page.count(".photo.jpg") == 2 * 2
    run(*flags, "--style_seed", 3)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<small>--style_seed 4</small>" in page and "3 label maps, 2 generated images each" in page


def test_neither_batch_size_nor_processes_change_a_file(run, checkpoint, label_maps, tmp_path):
    common = ("--checkpoint", checkpoint, "--input_dir", label_maps, "--seed", "3")
    run(*common, "--output_dir", tmp_path / "1", "--no_gallery")
    for batch_size in (2, 5):
        run(*common, "--output_dir", tmp_path / str(batch_size), "--no_gallery", "--batch_size", batch_size)
        assert files(tmp_path / str(batch_size)) == files(tmp_path / "1")
    assert not (tmp_path / "1" / "index.html").exists()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "inference.py",
         *map(str, common), "--device", "cpu", "--output_dir", str(tmp_path / "two"), "--batch_size", "2"],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "1")
    assert "process 0 of 2: wrote 4 of 7" in done.stdout and "process 1 of 2: wrote 3 of 7" in done.stdout
    page = (tmp_path / "two" / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 7  # of both processes
    run(*common[:-1], "4", "--output_dir", tmp_path / "other", "--no_gallery")
    assert not set(files(tmp_path / "other").values()) & set(files(tmp_path / "1").values())


def test_order_and_batch_mates_change_nothing(checkpoint, label_maps):
    model = Model.load(checkpoint, for_inference=False)
    batching = Batching(**vars(model))
    dataset = LabelMapDataset(label_maps, model.config.data.labels, edges="labels", with_images=False)
    requests = [
        Request(key, dataset[i].labels, dataset[i].edges, style_noise(0, [key], 4)[0])
        for i, key in enumerate(dataset.keys)
    ]
    expected = dict(synthesise(model, requests))
    shuffler = random.Random(0)
    for batch_size in range(1, 6):
        shuffler.shuffle(requests)
        made = dict(synthesise(model, requests, batch_size))
        assert made.keys() == expected.keys()
        assert all(np.array_equal(made[key], expected[key]) for key in made)
        for key, picture in synthesise(batching, requests, batch_size):  # real batches: up to rounding
            assert np.abs(picture.astype(int) - expected[key]).max() <= 1


class Echo(torch.nn.Module):
    """A generator that shows its label map, and insists on what every generator may."""

    style_dims = 0

    def __init__(self, size_multiple: int) -> None:
        super().__init__()
        self.size_multiple = size_multiple
        self.batches: list[int] = []

    def forward(self, layout: SemanticLayout, z: torch.Tensor | None = None) -> torch.Tensor:
        assert layout.height % self.size_multiple == 0 and layout.width % self.size_multiple == 0
        self.batches.append(len(layout))
        assert layout.edges is not None
        planes = [layout.labels, layout.edges, torch.full_like(layout.labels, 5)]
        return torch.stack([(plane.float() - 127.5) / 127.5 for plane in planes], 1)


class Batching(Model):
    """As on a GPU."""

    one_by_one = False


def echo_model(size_multiple: int, kind: type[Model] = Batching) -> Model:
    return kind(Echo(size_multiple), None, CONFIG, 0, "raw", torch.device("cpu"))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30),
    multiple=st.sampled_from([1, 2, 7, 32]),
    batch_size=st.integers(1, 5),
)
def test_padding_and_cropping_keep_every_pixel(sizes, multiple, batch_size):
    rng = np.random.default_rng(0)
    model = echo_model(multiple)
    requests = {
        str(i): Request(str(i), *(torch.from_numpy(rng.integers(0, n, s, dtype=np.uint8)) for n in (6, 2)))
        for i, s in enumerate(sizes)
    }
    made = dict(synthesise(model, requests.values(), batch_size))
    assert made.keys() == requests.keys()
    for name, picture in made.items():
        assert np.array_equal(picture[..., 0], requests[name].labels.numpy())
        assert np.array_equal(picture[..., 1], requests[name].edges.numpy())
    assert isinstance(model.generator, Echo) and sum(model.generator.batches) == len(sizes)
    assert max(model.generator.batches, default=0) <= batch_size


def test_padding_is_dont_care_without_edges_at_the_bottom_and_right():
    request = Request("a", torch.zeros(3, 5, dtype=torch.uint8), torch.ones(3, 5, dtype=torch.uint8))
    layout = pad_to_layout(echo_model(8), [request])
    assert layout.labels.shape == (1, 8, 8) and layout.labels.dtype == torch.uint8
    assert (layout.labels[0, :3, :5] == 0).all() and (layout.labels == 5).sum() == 64 - 15
    assert layout.edges is not None and layout.edges.sum() == 15 and (layout.edges[0, :3, :5] == 1).all()


def test_batches_are_of_one_size_and_few_wait():
    taken = 0

    def endless():
        nonlocal taken
        for i in range(10_000):
            taken += 1
            size = 8 * (1 + i % 100)
            yield Request(str(i), torch.zeros(size, 8, dtype=torch.uint8))

    for number, batch in enumerate(group_by_size(endless(), 8, 4)):
        assert len({r.labels.shape for r in batch}) == 1 and 1 <= len(batch) <= 4
        if number == 20:
            break
    assert taken <= 21 * 4 + BATCHES_HELD * 4
    sizes = [len(b) for b in group_by_size(
        (Request(str(i), torch.zeros(8 * (1 + i % 3), 8, dtype=torch.uint8)) for i in range(48)), 8, 4)]  # fmt: skip
    assert sizes == [4] * 12


def test_tiles_make_the_image_of_the_whole(run, plain_checkpoint, checkpoint, tmp_path, monkeypatch):
    model = Model.load(plain_checkpoint, for_inference=False)
    for norm in (module for module in model.generator.modules() if hasattr(module, "running_var")):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    optimise_for_inference(model.generator, winograd=True)
    labels = torch.from_numpy(blocky_labels(np.random.default_rng(0), 460, 500, 5))

    def make(tile: int | None) -> np.ndarray:
        ((_, image),) = synthesise(model, [Request("a", labels)], convert=lambda images, _: images, tile=tile)
        return image

    halo, whole = model.generator.halo, make(None)
    assert halo == 224 and np.abs(make(halo) - whole).max() < 1e-5 < whole.std() / 1e3
    monkeypatch.setattr(type(model.generator), "halo", halo // 2)
    assert np.abs(make(halo) - whole).max() > 1e-5  # the halo matters
    monkeypatch.undo()
    # The command line: no limit of pixels, since none is made in one piece.
    folder = tmp_path / "large"
    write_png(folder / "a.png", labels.numpy())
    large = ("--input_dir", folder, "--no_gallery", "--size", "own", "--max_pixels", "1000")
    with pytest.raises(DataError, match="or --tile to generate it in pieces"):
        run("--checkpoint", plain_checkpoint, *large, "--output_dir", tmp_path / "out")
    own = ("--input_dir", folder, "--no_gallery", "--max_pixels", "1000", "--tile", "224")
    run("--checkpoint", plain_checkpoint, *own, "--output_dir", tmp_path / "out")
    assert size_of(tmp_path / "out/a.png")[:2] == (460, 500)
    for tile in ("100", "225", "big"):
        with pytest.raises(ConfigError, match=f"--tile {tile}: write auto, or a multiple of 32 of at least 224"):
            run("--checkpoint", plain_checkpoint, *large, "--output_dir", tmp_path / "other", "--tile", tile)
    with pytest.raises(ConfigError, match="every pixel depends on the whole label map"):
        run("--checkpoint", checkpoint, *large, "--output_dir", tmp_path / "other", "--tile", "auto")


class LargestTensor(TorchDispatchMode):
    """Notes how large the largest tensor is that is computed meanwhile."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_grows_with_the_tile_and_not_with_the_label_map(plain_checkpoint):
    model = Model.load(plain_checkpoint)

    def largest(height: int, tile: int | None) -> int:
        labels = torch.from_numpy(blocky_labels(np.random.default_rng(0), height, 32, 5))
        with LargestTensor() as noted:
            list(synthesise(model, [Request("a", labels)], tile=tile))
        return noted.elements

    assert largest(672, 224) == largest(896, 224) < largest(896, None)


def test_few_large_label_maps_are_in_memory_at_once(run, plain_checkpoint, tmp_path, monkeypatch):
    for number in range(6):
        write_png(tmp_path / f"maps/{number}.png", np.zeros((40, 40), np.uint8))
    read, read_at_first, read_one = [], [], LabelMapDataset.__getitem__

    def note(dataset: LabelMapDataset, index: int) -> Sample:
        read.append(index)
        return read_one(dataset, index)

    def take_time(model, requests, batch_size, tile):
        for request in requests:
            if not read_at_first:
                time.sleep(0.2)  # for readers that would read on
                read_at_first.append(len(read))
            yield request.name, np.zeros((40, 40, 3), np.uint8)

    monkeypatch.setattr(LabelMapDataset, "__getitem__", note)
    monkeypatch.setattr(folder_run, "synthesise", take_time)
    shown = ("--input_dir", tmp_path / "maps", "--no_gallery", "--output_dir", tmp_path / "out", "--tile", "auto")
    run("--checkpoint", plain_checkpoint, *shown)
    assert read_at_first[0] <= 2 < len(read) == 6


def test_maps_that_hardly_mean_what_they_say_draw_a_note(tmp_path):
    drawing = np.full((16, 16), 255, np.uint8)
    drawing[4] = 0
    write_png(tmp_path / "drawn" / "edge_maps" / "a.png", drawing)
    write_png(tmp_path / "white" / "edge_maps" / "a.png", 255 - drawing)
    write_png(tmp_path / "masks" / "a.png", drawing)
    write_png(tmp_path / "classes" / "a.png", drawing // 255)
    none, two = LabelSpec(num_classes=0, dont_care=False), LabelSpec(num_classes=2, ignore=(255,))
    for name, labels, edges, message in (
        ("drawn", none, "file", r"edge_maps/a\.png: most pixels are edges \(not 0\)\. Lines are white on black"),
        ("masks", two, "none", r"masks/a\.png: holds 0 and 255 alone, and 255 means no class here"),
    ):
        with pytest.warns(UserWarning, match=message):
            LabelMapDataset(tmp_path / name, labels, edges=edges, with_images=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LabelMapDataset(tmp_path / "white", none, edges="file", with_images=False)
        LabelMapDataset(tmp_path / "classes", two, with_images=False)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_stops_has_its_exit_status(number, status):
    before = signal.signal(number, command_line._stop)
    try:
        with pytest.raises(SystemExit) as ended:
            run_command_line(lambda: os.kill(os.getpid(), number))
    finally:
        signal.signal(number, before)
    assert ended.value.code == status


def test_several_samples_differ_and_a_style_image_rules(run, checkpoint, label_maps, tmp_path):
    common = ("--checkpoint", checkpoint, "--input_dir", label_maps, "--format", "jpg", "--output_dir")
    run(*common, tmp_path / "k", "--num_samples", 3)
    made = files(tmp_path / "k")
    assert set(made) == {f"{name}_{j:02d}.jpg" for name in NAMES for j in range(3)}
    assert len(set(made.values())) > 15  # the smallest maps may agree
    photos = [write_jpg(tmp_path / f"{i}.jpg", np.full((90, 200, 3), 60 + 90 * i, np.uint8)) for i in range(2)]
    write_jpg(tmp_path / "noise.jpg", np.random.default_rng(0).integers(0, 256, (300, 170, 3), dtype=np.uint8))
    run(*common, tmp_path / "s0", "--style_image", photos[0], "--no_gallery")
    run(*common, tmp_path / "s1", "--style_image", tmp_path / "noise.jpg", "--no_gallery", "--seed", 8)
    run(*common, tmp_path / "s2", "--style_image", tmp_path / "noise.jpg", "--no_gallery", "--seed", 9)
    assert files(tmp_path / "s1") == files(tmp_path / "s2") != files(tmp_path / "s0")


def test_ema_and_raw_weights(run, checkpoint, plain_checkpoint, label_maps, tmp_path, capsys):
    state = {w: Model.load(checkpoint, weights=w, for_inference=False).generator.state_dict() for w in ("ema", "raw")}
    content = torch.load(checkpoint, weights_only=True)
    trained = build_generator(CONFIG)
    trained.load_state_dict(content["generator"])
    for weights, stored in (("ema", content["generator_ema"]), ("raw", fold_spectral_norm(trained).state_dict())):
        assert state[weights].keys() == stored.keys()
        assert all(torch.equal(state[weights][key], value) for key, value in stored.items())
    model = Model.load(plain_checkpoint, for_inference=False)
    assert model.weights == "raw" and "no EMA of the weights" in model.notes[0]
    assert not model.generator.training and model.generator.style_dims == 0
    run("--checkpoint", plain_checkpoint, "--input_dir", label_maps, "--output_dir", tmp_path / "o", "--num_samples", 2)
    err = capsys.readouterr().err
    assert "no EMA of the weights" in err and "takes no style code" in err and "edges" not in err
    assert len(files(tmp_path / "o")) == 14


def test_existing_pictures_are_refused_kept_or_replaced(run, checkpoint, label_maps, tmp_path):
    out = tmp_path / "out"
    common = ("--checkpoint", checkpoint, "--input_dir", label_maps, "--output_dir", out)
    run(*common)
    fresh = files(out)
    (out / "a.png").unlink()
    (out / "_labels" / "z.png").unlink()
    write_png(out / "b c.png", np.zeros((2, 2), np.uint8))
    mine = files(out)["b c.png"]
    with pytest.raises(UserError, match=r"already holds images, such as .*--skip_existing .*--overwrite"):
        run(*common)
    run(*common, "--skip_existing")
    assert files(out) == fresh | {"b c.png": mine}
    assert (out / "_labels" / "z.png").is_file()
    run(*common, "--overwrite")
    assert files(out) == fresh
    foreign = write_png(tmp_path / "new" / "sub" / "old.PNG", np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match=r"already holds images, such as sub/old\.PNG"):
        run(*common[:-1], foreign.parents[1])


def test_processes_refuse_existing_pictures_without_seeing_each_others_as_such(tmp_path):
    everything = plan_outputs(["a", "b"])
    write_png(tmp_path / "b.png", np.zeros((2, 2), np.uint8))
    write_png(tmp_path / "._a.png", np.zeros((2, 2), np.uint8))  # what macOS leaves beside a file is no image
    check_empty(tmp_path, everything[:1], everything)  # b belongs to the other process
    with pytest.raises(UserError, match=r"b\.png"):
        check_empty(tmp_path, everything[1:], everything)


# ------------------------------------------------------------------------------------------------ what is taken


def test_the_newest_checkpoint_of_a_log_dir_and_inputs_from_a_config(run, checkpoint, label_maps, tmp_path, capsys):
    logdir = tmp_path / "log"
    (logdir / "checkpoints").mkdir(parents=True)
    (logdir / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    (logdir / "checkpoints" / "checkpoint_000000000100.pt").write_bytes(b"old and damaged")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(changed(TREE, test_data={"roots": [str(label_maps)], "batch_size": 2})))
    run("--logdir", logdir, "--config", config, "--output_dir", tmp_path / "a")
    run("--checkpoint", logdir, "--set", f"test_data.roots=['{label_maps}']", "--output_dir", tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 7


def test_published_weights_are_checked_by_their_sha256(run, checkpoint, label_maps, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    config = tmp_path / "c.yaml"

    def with_weight(**source) -> Path:
        config.write_text(yaml.safe_dump(changed(TREE, pretrained_weight=source)))
        return config

    common = ("--input_dir", label_maps, "--no_gallery", "--output_dir")
    run("--config", with_weight(url=checkpoint.as_uri(), sha256=digest), *common, tmp_path / "a")
    assert len(files(tmp_path / "a")) == 7
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # not needed again
    run("--config", config, *common, tmp_path / "b")
    run("--config", with_weight(path=str(checkpoint)), *common, tmp_path / "c")
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub2"))
    wrong = with_weight(url=checkpoint.as_uri(), sha256="0" * 64)
    with pytest.raises(CheckpointError, match="is not the file with sha256 0000"):
        find_checkpoint(None, None, load_config(wrong))
    assert not [p for p in (tmp_path / "hub2").rglob("*") if p.is_file()]
    gone = with_weight(url=(tmp_path / "gone.pt").as_uri(), sha256=digest)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .* give it as --checkpoint"):
        find_checkpoint(None, None, load_config(gone))

    def break_off(*_: object, **__: object) -> None:
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(IncompleteRead"):
        find_checkpoint(None, None, load_config(gone))
    with pytest.raises(CheckpointError, match=r"pretrained_weight.path: nowhere.pt: no such file"):
        find_checkpoint(None, None, load_config(with_weight(path="nowhere.pt")))


def test_one_mistake_one_message(run, checkpoint, plain_checkpoint, label_maps, tmp_path, monkeypatch):
    out, empty, damaged, text = tmp_path / "out", tmp_path / "empty", tmp_path / "damaged.pt", tmp_path / "text"
    empty.mkdir()
    damaged.write_bytes(b"damaged")
    text.write_text("no folder")
    photo = write_jpg(tmp_path / "photo.jpg", np.zeros((8, 8, 3), np.uint8))
    plain, styled = ("--checkpoint", plain_checkpoint), ("--checkpoint", checkpoint)
    inputs = ("--input_dir", label_maps)
    to = ("--output_dir", out)
    cases: list[tuple[tuple, type[Exception], str]] = [
        ((*inputs, *to), CheckpointError, "no checkpoint: give --checkpoint FILE, or --logdir"),
        (("--checkpoint", empty, *inputs, *to), CheckpointError, r"--checkpoint .*empty: no checkpoint_\*\.pt there"),
        (("--logdir", empty, *inputs, *to), CheckpointError, "--logdir .*empty: no checkpoint_"),
        (("--checkpoint", "nowhere", *inputs, *to), CheckpointError, "--checkpoint nowhere: no such file"),
        (("--logdir", "nowhere", *inputs, *to), CheckpointError, "--logdir nowhere: no such log dir"),
        (("--checkpoint", damaged, *inputs, *to), CheckpointError, r"damaged\.pt: cannot be read"),
        ((*plain, *to), ConfigError, "no label maps: give --input_dir"),
        ((*plain, "--input_dir", "nowhere", *to), DataError, "nowhere: no such folder"),
        ((*plain, "--input_dir", empty, *to), DataError, "empty: no data set there"),
        ((*plain, *inputs, *to, "--style_image", photo), CheckpointError, "trained without a style encoder"),
        ((*styled, *inputs, *to, "--style_image", "gone.jpg"), DataError, r"style image gone\.jpg: cannot be read"),
        ((*styled, *inputs, *to, "--style_image", damaged), DataError, r"style image .*damaged\.pt"),
        ((*plain, *inputs, "--output_dir", text / "o"), UserError, "cannot be written: Not a directory"),
        ((*plain, *inputs, "--output_dir", label_maps), UserError, "lies among the label maps"),
        ((*plain, *inputs, "--output_dir", label_maps / "out"), UserError, "lies among the label maps"),
        ((*plain, *inputs, *to, "--set", "gen.num_filters=4"), CheckpointError, "num_filters: 2, this config has 4"),
        ((*plain, *inputs, *to, "--set", "data.labels.bogus=4"), ConfigError, "data.labels.bogus: unknown key"),
        ((*plain, *inputs, *to, "--set", "data.labels.ignore=[]"), LabelError, r"7 of 7 .* label value\(s\) 255"),
        ((*plain, *inputs, *to, "--import", "no_such_module"), ConfigError, "--import no_such_module"),
    ]  # fmt: skip
    if not torch.cuda.is_available():
        cases.append(((*plain, *inputs, *to, "--device", "cuda"), UserError, "--device cpu"))
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(*arguments)
        assert not files(out) and len(files(label_maps)) == 7, arguments


@pytest.mark.parametrize("flags", [["--batch_size", "0"], ["--num_samples", "x"], ["--skip_existing", "--overwrite"]])
def test_flags_are_checked(run, flags, capsys):
    with pytest.raises(SystemExit):
        run("--output_dir", "out", *flags)
    assert flags[0] in capsys.readouterr().err


def test_a_config_of_another_architecture_is_explained(run, checkpoint, label_maps, tmp_path):
    tree = changed(TREE, data__edges="none", data__labels__num_classes=183, gen__num_filters=64)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError) as caught:
        run("--checkpoint", checkpoint, "--config", tmp_path / "c.yaml", "--output_dir", tmp_path / "o")
    for part in ("c.yaml", "with an edge channel, this config has none", "with 5 classes, this config has 183",
                 "gen.num_filters: 2, this config has 64"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"data__labels__ignore": [254], "data__edges": "labels", "trainer__log_every": 3}, []),
        ({"data__labels__dont_care": False}, ["trained with a don't-care channel, this config has none"]),
        ({"data__edges": "none"}, ["trained with an edge channel, this config has none (data.edges: file, now none)"]),
        ({"gen__norm": {"type": "spade", "hidden_channels": 16}},
         ["trained with gen.norm.hidden_channels: 8, this config has 16"]),
        ({"encoder": None}, ["trained with encoder: conv, this config has none"]),
        ({"dis__num_filters": 8}, ["trained with dis.num_filters: 4, this config has 8"]),
        ({"data__train__augmentations": {"random_crop_h_w": [64, 128]}}, ["trained on images of 64x64, this config"]),
    ],
)  # fmt: skip
def test_mismatches_in_words(change, words):
    lines = explain_mismatch(parse_config(TREE), parse_config(changed(TREE, **change)))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_a_mismatch_of_types_is_one_line():
    trained = parse_config(TREE)
    other = trained.model_copy(update={"gen": trained.gen.model_copy(update={"type": "clade", "args": {}})})
    assert explain_mismatch(trained, other) == ["trained with gen.type: spade, this config has clade"]


# ------------------------------------------------------------------------------------------------ bad data, bad disks


@pytest.mark.parametrize("key", ["../a", "a/../../b", "/etc/x", "C:/x", "c:x", "a\\b", "", "a//b", "./a", "a\0b"])
def test_a_key_never_leads_out(key):
    with pytest.raises(DataError, match="must be a plain relative path"):
        plan_outputs(["fine", key])


def test_outputs_never_collide():
    assert [o.images for o in plan_outputs(["b", "a"], 2, ".jpg")] == [
        ("a_00.jpg", "a_01.jpg"), ("b_00.jpg", "b_01.jpg")]  # fmt: skip
    assert plan_outputs(["a"], 101)[0].images[100] == "a_100.png"
    with pytest.raises(DataError, match=r"'a' and 'a' would both be written to a\.png"):
        plan_outputs(["a", "a"])
    with pytest.raises(DataError, match=r"would both be written to _labels/a\.png"):
        plan_outputs(["a", "_labels/a"])
    with pytest.raises(DataError, match=r"needs a folder a\.png"):
        plan_outputs(["a", "a.png/b"])


def test_a_bad_label_map_is_named_and_what_is_written_is_whole(run, plain_checkpoint, label_maps, tmp_path):
    (label_maps / "k.png").write_bytes((label_maps / "z.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"k\.png"):
        run("--checkpoint", plain_checkpoint, "--input_dir", label_maps, "--output_dir", tmp_path / "o")
    assert all(size_of(tmp_path / "o" / name) for name in files(tmp_path / "o"))
    assert not (tmp_path / "o" / "index.html").exists()


def test_a_full_disk_is_named(run, plain_checkpoint, label_maps, tmp_path, monkeypatch):
    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"\.png: cannot be written: No space left on device"):
        run("--checkpoint", plain_checkpoint, "--input_dir", label_maps, "--output_dir", tmp_path / "o")
    assert not [p for p in (tmp_path / "o").rglob("*") if p.is_file()]


def test_how_a_norm_computes_is_no_mismatch():
    faster = changed(TREE, gen__norm={**TREE["gen"]["norm"], "path": "table"})
    assert not explain_mismatch(CONFIG, parse_config(faster))


def test_damaged_weights(tmp_path, label_maps, run):
    tree = changed(TREE, gen__style_dims=0, encoder=None, data__edges="none")
    state = new_average(build_generator(parse_config(tree))).state_dict()
    broken = {key: value * float("nan") if key.startswith("to_image") else value for key, value in state.items()}
    bad = save(tmp_path / "bad.pt", tree, generator_ema=broken)
    with pytest.raises(UserError, match="output is not finite"):
        run("--checkpoint", bad, "--input_dir", label_maps, "--output_dir", tmp_path / "o")
    assert not files(tmp_path / "o")
    short = save(tmp_path / "short.pt", tree, generator_ema={k: v for k, v in state.items() if k != "to_image.bias"})
    with pytest.raises(CheckpointError, match=r"short\.pt: its generator lacks to_image\.bias"):
        Model.load(short, for_inference=False)
    for name, weight in (("wide", state["to_image.weight"].double()), ("thin", state["to_image.weight"].to_sparse())):
        path = save(tmp_path / f"{name}.pt", tree, generator_ema={**state, "to_image.weight": weight})
        with pytest.raises(CheckpointError, match=rf"{name}\.pt: its generator does not fit .*: to_image\.weight is"):
            Model.load(path, for_inference=False)
    for seen in ("many", (1, 2), float("inf"), -1):
        path = save(tmp_path / "seen.pt", tree, generator_ema=state, images_seen=seen)
        with pytest.raises(CheckpointError, match=r"seen\.pt: images_seen does not fit: it is"):
            Model.load(path, for_inference=False)
    write_checkpoint(tmp_path / "other.pt", {"config": {}})
    with pytest.raises(CheckpointError, match="without generator"):
        Model.load(tmp_path / "other.pt", for_inference=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_said(monkeypatch, error):
    model = echo_model(8)

    def fail(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(model.generator, "forward", fail)
    zeros = torch.zeros(3, 5, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"x\.png: not enough memory on cpu for 2 image\(s\) of 8x8 .*--batch_size"):
        list(synthesise(model, [Request(name, zeros, zeros) for name in ("x.png", "y.png")], 2))
