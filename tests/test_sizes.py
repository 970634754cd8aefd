"""The size at which label maps are generated, and the promise that evaluated pictures are the written ones."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import blocky_labels, write_png
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_evaluation import RANDOM
from test_inference import TREE, changed, command_line, save, size_of

from imaginaire_spade import Synthesizer
from imaginaire_spade.commands import evaluate as evaluate_command
from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.distances import class_distances, encode_distances
from imaginaire_spade.errors import ConfigError, DataError, UserError
from imaginaire_spade.evaluation.report import load_report
from imaginaire_spade.files import resize_image
from imaginaire_spade.inference import images_to_score
from imaginaire_spade.inference.model import Model, load_named
from imaginaire_spade.inference.sizes import MAX_PIXELS, SizeRule, read_size
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.models.for_inference import WinogradConv2d
from imaginaire_spade.models.norms import SPADE

TRAINED, OWN = (64, 96), (130, 150)
"""Of the checkpoints here, and of the label maps of ``val``."""


pytestmark = pytest.mark.usefixtures("one_thread")


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# ------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("asked", "own", "made"),
    [
        (None, (96, 128), (96, 128)),
        (None, (360, 480), (96, 128)),
        (None, (144, 192), (144, 192)),  # 1.5 times is not more than that
        (None, (145, 192), (96, 128)),
        (None, (144, 193), (96, 128)),
        (None, (64, 86), (64, 86)),
        (None, (63, 128), (96, 128)),
        (None, (1, 1), (96, 128)),
        ("trained", (97, 128), (96, 128)),
        ("own", (2000, 1), (2000, 1)),
        ((10, 20), (360, 480), (10, 20)),
    ],
)
def test_the_rule(asked, own, made):
    assert SizeRule(asked, (96, 128))(own) == made


def test_without_a_trained_size_label_maps_keep_their_own():
    assert SizeRule()((2000, 3)) == (2000, 3) and SizeRule((4, 5))((2000, 3)) == (4, 5)
    assert SizeRule().note({(2000, 3): 5}, resize_back=False) is None
    with pytest.raises(ConfigError, match=r"size trained: this generator was trained on images of many sizes .* own"):
        SizeRule("trained")


def test_what_a_size_may_be():
    assert [read_size(text, "size") for text in (None, "own", "trained")] == [None, "own", "trained"]
    for wanted in ("256x512", "256X512", (256, 512), [np.int64(256), 512]):
        assert read_size(wanted, "size") == (256, 512)
    for wanted in ("0x10", "10x0", "abc", "256", "", "256x", "x3", "-1x5", "1.5x2", "2x3x4", "٣x٣", (0, 4), (4,), 7,
                  (1.5, 2), "1" * 30 + "x1"):  # fmt: skip
        with pytest.raises(ConfigError, match=r"^--size .*: write trained, own, or HEIGHTxWIDTH in pixels, such as"):
            read_size(wanted, "--size")
    with pytest.raises(ConfigError, match=r"--size 100000x100000: 10,000,000,000 pixels.* at most 16,777,216 pixels$"):
        read_size("100000x100000", "--size")
    with pytest.raises(ConfigError, match=r"at most 50 pixels, or --max_pixels 51 if the memory is there$"):
        read_size("3x17", "--size", max_pixels=50)
    assert read_size("4096x4096", "--size") == (4096, 4096) and MAX_PIXELS == 4096**2


AT_TRAINED = "generated at 96x128, the size this generator was trained at"
OWN_HINT, BACK_HINT = (
    "--size own generates at their own size",
    "--resize_back resizes the images to the label maps' own size",
)
BACK = "the images are resized back to the label maps' own size"
NEVER = (
    "generated at their own size; this generator was trained at 96x128 and has never seen such sizes (--size trained"
    " generates at that one)"
)
NOTES = [
    (None, {(360, 480): 101}, False, f"101 label maps of 360x480 are {AT_TRAINED} ({OWN_HINT}; {BACK_HINT})"),
    (None, {(360, 480): 1}, True, f"1 label map of 360x480 is {AT_TRAINED}; {BACK} ({OWN_HINT})"),
    (None, {(96, 128): 4, (100, 100): 2}, False, None),
    (None, {(360, 480): 1, (500, 375): 2, (96, 128): 1}, True,
     f"3 of 4 label maps of 2 sizes (360x480 to 500x375) are {AT_TRAINED}; the aspect ratio of 2 of them changes, width"
     f" / height 0.75 becomes 1.33; {BACK} ({OWN_HINT})"),
    ((64, 64), {(360, 480): 3}, True,
     "3 label maps of 360x480 are generated at 64x64, as --size says; 96x128 is the size this generator was trained at;"
     f" the aspect ratio changes, width / height 1.33 becomes 1.00; {BACK} (--size 64x85 keeps it)"),
    ("trained", {(97, 129): 3}, False, f"3 label maps of 97x129 are {AT_TRAINED} ({BACK_HINT})"),
    ("trained", {(97, 129): 3}, True, f"3 label maps of 97x129 are {AT_TRAINED}; {BACK}"),
    ((192, 256), {(360, 480): 3}, False,
     "3 label maps of 360x480 are generated at 192x256, as --size says; 96x128 is the size this generator was trained"
     f" at ({BACK_HINT})"),
    ((360, 480), {(360, 480): 3}, False, f"3 label maps of 360x480 are {NEVER}"),
    ("own", {(360, 480): 3, (96, 128): 1}, False, f"3 of 4 label maps of 360x480 are {NEVER}"),
    ("own", {(96, 128): 1}, False, None),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "label_maps", "resize_back", "note"), NOTES)
def test_what_is_said(asked, label_maps, resize_back, note):
    assert SizeRule(asked, (96, 128)).note(label_maps, resize_back=resize_back) == note


# ------------------------------------------------------------------------------------------------ label maps


@pytest.mark.parametrize("edges", ["none", "file", "instances", "labels"])
@pytest.mark.parametrize("distances", ["stored", "computed", None])
def test_a_label_map_is_resized_as_the_data_pipeline_does(tiny_folder, edges, distances):
    root, labels = tiny_folder(size=(40, 56)), LabelSpec(num_classes=5)
    if distances == "stored":
        for path in (root / "seg_maps").iterdir():
            ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            (root / "distances").mkdir(exist_ok=True)
            (root / "distances" / f"{path.stem}.npy").write_bytes(encode_distances(class_distances(ids)))
    common = {"edges": edges, "distances": distances is not None, "with_images": False}
    for size in ((40, 56), (17, 90), (96, 128), (1, 1)):
        given_size = LabelMapDataset(root, labels, **common, size_of=lambda own, size=size: size)
        augmented = LabelMapDataset(root, labels, **common, augmentations=AugmentationConfig(resize_h_w=size))
        for index in range(len(augmented)):
            one, other = given_size[index], augmented[index]
            for name in ("labels", "edges", "distances"):
                a, b = getattr(one, name), getattr(other, name)
                assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
            assert one.labels.shape == size and one.original_size == (40, 56)
            assert given_size.check_label_map(index) == ((40, 56), size)


def test_photos_follow_their_label_maps(tiny_folder):
    root, labels = tiny_folder(size=(80, 112)), LabelSpec(num_classes=5)
    given_size = LabelMapDataset(root, labels, size_of=lambda own: (20, 28))
    augmented = LabelMapDataset(root, labels, augmentations=AugmentationConfig(resize_h_w=(20, 28)))
    for one, other in zip(given_size, augmented, strict=True):
        assert torch.equal(one.image, other.image)


@given(st.tuples(*[st.integers(1, 30)] * 2), st.tuples(*[st.integers(1, 30)] * 2), st.integers(0, 255))
def test_a_resized_picture_has_the_size_and_keeps_a_plain_colour(size, to, value):
    picture = np.full((*size, 3), value, np.uint8)
    assert np.array_equal(resize_image(picture, *to), np.full((*to, 3), value, np.uint8))


# ------------------------------------------------------------------------------------------------ the command line


def tree(**more) -> dict:
    """Wide enough for Winograd convolutions, with a style code."""
    return changed(
        TREE, gen__num_filters=16, encoder=None, data__edges="labels",
        data__train__augmentations={"resize_h_w": list(TRAINED)}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("sizes") / "model.pt", tree())


@pytest.fixture
def label_maps(tmp_path) -> Path:
    """Near the trained size, far from it, and of another shape."""
    for number, size in enumerate([(60, 90), OWN, OWN, (40, 200)]):
        labels = blocky_labels(np.random.default_rng(number), *size, 5)
        write_png(tmp_path / "maps" / f"{number}.png", labels)
    return tmp_path / "maps"


@pytest.fixture
def run(monkeypatch, checkpoint, label_maps, tmp_path, capsys):
    """``main`` in this process: what it said on stderr, and the pictures' sizes."""

    def call(*flags: object, to: str = "out", model: Path = checkpoint) -> tuple[str, dict[str, tuple[int, ...]]]:
        arguments = ["--device", "cpu", "--checkpoint", model, "--input_dir", label_maps, "--output_dir", tmp_path / to]
        monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, [*arguments, *flags])])
        command_line.main()
        found = sorted((tmp_path / to).glob("*.[pj][np]g"))
        return capsys.readouterr().err, {path.stem: size_of(path) for path in found}

    return call


def test_label_maps_far_from_the_trained_size_are_generated_at_it(run, tmp_path):
    said, sizes = run()
    assert sizes == {"0": (60, 90), "1": TRAINED, "2": TRAINED, "3": TRAINED}
    assert said == (
        "note: 3 of 4 label maps of 2 sizes (40x200 to 130x150) are generated at 64x96, the size this generator was"
        " trained at; the aspect ratio changes, width / height 1.15 to 5.00 becomes 1.50 (--size own"
        " generates at their own size; --resize_back resizes the images to the label maps' own size)\n"
    )
    for name, size in sizes.items():  # the gallery shows both at one size
        assert size_of(tmp_path / "out" / "_labels" / f"{name}.png") == size


def test_every_size_on_request(run, label_maps, checkpoint, tmp_path):
    said, sizes = run("--size", "own", to="own")
    assert sizes == {"0": (60, 90), "1": OWN, "2": OWN, "3": (40, 200)}
    assert said.count("note: ") == 1 and "3 of 4 label maps" in said and "has never seen such sizes" in said
    said, sizes = run("--size", "trained", to="trained")
    assert set(sizes.values()) == {TRAINED} and "4 label maps of 3 sizes (60x90 to 130x150) are generated" in said
    said, sizes = run("--size", "50x70", to="HxW")
    assert set(sizes.values()) == {(50, 70)}
    assert "are generated at 50x70, as --size says; 64x96 is the size this generator was trained at" in said
    # Each is what the library makes of the label map resized beforehand.
    synthesizer = Synthesizer.load(checkpoint, device="cpu", size="own")
    ids = cv2.imread(str(label_maps / "1.png"), cv2.IMREAD_UNCHANGED)
    for to, size in (("own", OWN), ("trained", TRAINED), ("HxW", (50, 70))):
        rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size, OWN, strict=True))
        run("--size", to if to != "HxW" else "50x70", "--style_seed", 3, "--overwrite", to=to)
        assert np.array_equal(read(tmp_path / to / "1.png"), synthesizer(ids[rows][:, columns], seed=3))


def test_pictures_are_resized_back(run, tmp_path):
    run("--seed", 1, to="as made")
    said, sizes = run("--seed", 1, "--resize_back", to="back")
    assert sizes == {"0": (60, 90), "1": OWN, "2": OWN, "3": (40, 200)}
    assert "; the images are resized back to the label maps' own size" in said and "--resize_back" not in said
    for name, size in sizes.items():
        made = read(tmp_path / "as made" / f"{name}.png")
        assert np.array_equal(
            read(tmp_path / "back" / f"{name}.png"), made if name == "0" else resize_image(made, *size)
        )
    assert size_of(tmp_path / "back" / "_labels" / "1.png") == TRAINED


def test_samples_and_animations_are_of_one_size_each(run, tmp_path):
    _, sizes = run("--num_samples", 2, to="samples")
    assert sizes["1_00"] == sizes["1_01"] == TRAINED and sizes["0_01"] == (60, 90)
    for flags, size in (((), TRAINED), (("--resize_back",), OWN)):
        _, sizes = run("--style_interpolate", 1, 2, "--steps", 3, *flags, to=f"films {len(flags)}")
        with Image.open(tmp_path / f"films {len(flags)}" / "1.gif") as film:
            assert film.size == size[::-1] and film.n_frames == 4
        assert sizes["1_02"] == size


def test_a_folder_of_several_sizes_is_told_of(run, label_maps, tmp_path):
    (label_maps / "0.png").unlink()
    run("--size", "own")
    (tmp_path / "out" / "2.png").unlink()
    said, sizes = run("--skip_existing")
    assert sizes == {"1": OWN, "2": TRAINED, "3": (40, 200)}
    kept, made = said.splitlines()
    assert "1.png is kept at 130x150, but this run would write 64x96" in kept and "--overwrite" in kept
    assert made.startswith("note: 1 label map of 130x150 is generated at 64x96, the size")
    said, sizes = run("--skip_existing", "--size", "own")
    assert "is kept at" not in said


def test_sizes_of_label_maps_that_are_not_looked_at_before_are_told_at_the_end(run, label_maps):
    (label_maps / "bad.png").write_text("no image")
    said, sizes = run("--on_bad_label", "skip")
    assert len(sizes) == 4 and said.count("are generated at") == 1 and "3 of 4 label maps of 2 sizes" in said
    assert "left out" in said


def test_rank_zero_speaks_of_its_share(run, label_maps, monkeypatch):
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        said, _ = run("--skip_existing")
        assert (said == "") == (rank == 1)
    assert said.startswith("note: process 0 of 2: 1 of 2 label maps of 130x150 is generated at 64x96")


def test_pixels_are_those_that_are_made(run, tmp_path):
    assert run("--max_pixels", 64 * 96)[1]["1"] == TRAINED  # the label map is larger
    with pytest.raises(DataError, match=r"1: .* at 130x150, 19,500 pixels.* --size trained .*--max_pixels 19500"):
        run("--max_pixels", 64 * 96, "--size", "own", to="own")
    with pytest.raises(DataError, match=r"1: .* 130x150, 19,500 pixels, .* resized back\. Leave --resize_back out"):
        run("--max_pixels", 64 * 96, "--resize_back", to="back")
    with pytest.raises(ConfigError, match=r"--size 100x100: 10,000 pixels.* or --max_pixels 10000 if"):
        run("--max_pixels", 64 * 96, "--size", "100x100", to="HxW")
    assert not [path for to in ("own", "back", "HxW") for path in (tmp_path / to).glob("*.png")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--size", "0x10"), "--size 0x10: write trained, own, or HEIGHTxWIDTH"),
        (("--size", "abc"), "--size abc: write trained"),
        (("--size", "256"), "--size 256: write trained"),
        (("--size", "99999x99999"), "--size 99999x99999: 9,999,800,001 pixels"),
        (("--size", "own", "--resize_back"), "--resize_back: with --size own"),
    ],
)
def test_one_mistake_one_message_before_anything_is_loaded(monkeypatch, run, flags, words):
    monkeypatch.setattr(Model, "load", None)
    with pytest.raises(ConfigError, match=words):
        run(*flags)


def test_a_published_generator_knows_its_size(run, checkpoint, tmp_path):
    path = tmp_path / "model.safetensors"
    model = Model.load(checkpoint, for_inference=False)
    model.publish(path)
    said, sizes = run(model=path)
    assert sizes["1"] == TRAINED and "3 of 4 label maps" in said
    run(to="checkpoint")
    assert np.array_equal(read(tmp_path / "out" / "1.png"), read(tmp_path / "checkpoint" / "1.png"))


# ------------------------------------------------------------------------------------------------ in Python


def test_the_synthesizer_follows_the_rule(checkpoint, run, label_maps, tmp_path):
    ids = cv2.imread(str(label_maps / "1.png"), cv2.IMREAD_UNCHANGED)
    synthesizer = Synthesizer.load(checkpoint, device="cpu")
    with pytest.warns(UserWarning, match=r"the label map is 130x150 .* generated at 64x96.* resize_back=True"):
        made = synthesizer(ids)
    assert made.shape == (*TRAINED, 3) and synthesizer.sizes(OWN) == TRAINED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(synthesizer(ids), made)  # said once
        other = Synthesizer.load(checkpoint, device="cpu", resize_back=True)
        assert np.array_equal(other(ids), resize_image(made, *OWN))
        assert np.array_equal(other(Image.fromarray(ids)), other(ids))
        assert np.array_equal(other(ids, resize_back=False, size="trained"), made)
        assert other(ids, size="own").shape == (*OWN, 3) and synthesizer(ids, size=(50, 70)).shape == (50, 70, 3)
        own = Synthesizer.load(checkpoint, device="cpu", size="own")
        assert np.array_equal(own(ids), other(ids, size="own"))
    for flags, to in (((), "default"), (("--size", "own"), "own"), (("--resize_back",), "back")):
        run("--style_seed", 0, *flags, to=to)
    assert np.array_equal(read(tmp_path / "default" / "1.png"), made)
    assert np.array_equal(read(tmp_path / "own" / "1.png"), own(ids))
    assert np.array_equal(read(tmp_path / "back" / "1.png"), other(ids))
    for size in ("big", (0, 5), 64):
        with pytest.raises(ConfigError, match=r"^size .*: write trained, own, or HEIGHTxWIDTH"):
            synthesizer(ids, size=size)
    with pytest.raises(ConfigError, match=r"^size big"):
        Synthesizer.load(checkpoint, device="cpu", size="big")


@pytest.mark.parametrize("edges", ["file", "instances"])
def test_edges_are_resized_as_those_of_a_data_set(tiny_folder, tmp_path, edges):
    root, size = tiny_folder(size=OWN), (70, 80)
    synthesizer = Synthesizer.load(save(tmp_path / "c.pt", changed(tree(), data__edges=edges)), device="cpu", size=size)
    dataset = LabelMapDataset(root, synthesizer.labels, edges=edges, size_of=lambda own: size, with_images=False)
    folder, name = ("edge_maps", "edges") if edges == "file" else ("inst_maps", "instances")
    ids, given = (cv2.imread(str(root / f / "0000.png"), cv2.IMREAD_UNCHANGED) for f in ("seg_maps", folder))
    sample = dataset[0]
    expected = Synthesizer(synthesizer.model, size="own")(sample.labels.numpy(), edges=sample.edges.numpy())
    assert np.array_equal(synthesizer(ids, **{name: given}), expected)


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.fixture
def data_set(tiny_folder) -> Path:
    return tiny_folder("val", keys=4, size=OWN)


@pytest.fixture
def model_of(data_set, tmp_path) -> Callable[..., Path]:
    """Makes a checkpoint whose data.val is ``data_set`` at the trained size."""

    def make(**more) -> Path:
        val = {"roots": [str(data_set)], "augmentations": {"resize_h_w": list(TRAINED)}}
        return save(tmp_path / "model.pt", changed(tree(data__val=val), **more))

    return make


@pytest.fixture
def differences(monkeypatch, data_set, tmp_path) -> Callable[..., int]:
    """How many numbers of the pictures that inference.py writes are not those that evaluate.py looks at."""

    def count(path: Path, *overrides: str, size: str | None, weights: str = "ema", evaluated_at: object = ...) -> int:
        flags = ["--weights", weights, "--seed", "5", "--no_gallery", "--overwrite", *(f"--set={o}" for o in overrides)]
        flags += [] if size is None else ["--size", size]
        paths = ["--checkpoint", path, "--input_dir", data_set, "--output_dir", tmp_path / "written"]
        monkeypatch.setattr(sys, "argv", ["inference.py", "--device", "cpu", *flags, *map(str, paths)])
        command_line.main()
        at = read_size(size if evaluated_at is ... else evaluated_at, "--size")
        source = images_to_score.checkpoint_images(
            *load_named(path, None, None, overrides, weights=weights), size=at, real=None, reference_split="val",
            num_samples=1, seed=5, batch_size=3, with_photos=False,
        ).fake  # fmt: skip
        pictures = list(source.read(range(len(source.keys))))
        assert len(pictures) == 4
        number = 0
        for index, picture in pictures:
            written = read(tmp_path / "written" / f"{source.keys[index]}.png")
            number += int((written != picture.pixels.permute(1, 2, 0).numpy()).sum())
        return number

    return count


@pytest.mark.parametrize("size", ["trained", "own", "48x80"])
@pytest.mark.parametrize("overrides", [(), ("gen.norm.path=dense",)], ids=["", "dense"])
def test_evaluated_pictures_are_the_written_ones(model_of, differences, size, overrides):
    path = model_of()
    assert any(isinstance(m, WinogradConv2d) for m in Model.load(path).generator.modules())
    assert differences(path, *overrides, size=size) == 0
    assert differences(path, *overrides, size=size, weights="raw") == 0


@pytest.mark.parametrize("edges", ["none", "file", "instances"])
def test_edges_are_the_same_in_both(model_of, differences, edges):
    path = model_of(data__edges=edges)
    assert differences(path, size="trained") == differences(path, size="own") == 0


def test_distances_are_the_same_in_both(model_of, differences):
    path = model_of(gen__norm={"type": "clade_icpe"})
    assert differences(path, size="trained") == differences(path, size="own") == 0


def test_the_default_of_both_is_the_trained_size_where_data_val_is_resized_to_it(model_of, differences):
    path = model_of()
    assert differences(path, size=None) == 0
    assert differences(path, size="trained", evaluated_at=None) == 0
    assert differences(path, size="own", evaluated_at="own") == 0


def test_overrides_reach_the_network_that_is_evaluated(model_of, monkeypatch):
    path, generated = model_of(), []

    def synthesise(model, *arguments, **options):
        generated.append(model.generator)
        return iter(())

    monkeypatch.setattr(images_to_score, "synthesise", synthesise)

    def norms(*overrides: str) -> set[str]:
        fake = images_to_score.checkpoint_images(
            *load_named(path, None, None, overrides), real=None, reference_split="val",
            num_samples=1, seed=None, batch_size=1, with_photos=False,
        ).fake  # fmt: skip
        assert list(fake.read([])) == []
        return {module.path for module in generated.pop().modules() if isinstance(module, SPADE)}

    for way in ("auto", "dense", "table"):
        assert norms(f"gen.norm.path={way}") == {way}
    assert norms() == {"auto"}


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    def call(*arguments: object, output: str = "report.json"):
        flags = [*RANDOM, "--device", "cpu", "--output", tmp_path / output]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*arguments, *flags])])
        evaluate_command.main()
        return load_report(tmp_path / output)

    return call


def test_evaluation_at_a_size_is_recorded(model_of, evaluate, tmp_path, monkeypatch, capsys):
    path = model_of()
    usual = evaluate("--checkpoint", path, output="usual.json")
    trained = evaluate("--checkpoint", path, "--size", "trained", output="trained.json")
    assert trained == usual and usual.protocol.geometry == '{"resize_h_w": [64, 96]}'
    for size, of in (("own", "130x150"), ("48x80", "48x80")):
        report = evaluate("--checkpoint", path, "--size", size, "--html", tmp_path / "page.html", output=f"{size}.json")
        stamp = report.protocol
        assert (stamp.real_size, stamp.fake_size, stamp.num_fake) == (of, of, 4) and report.scores != usual.scores
        assert stamp.geometry == ("own sizes" if size == "own" else '{"resize_h_w": [48, 80]}')
        monkeypatch.setattr(
            sys, "argv", ["", "--compare", str(tmp_path / "usual.json"), str(tmp_path / f"{size}.json")]
        )
        with pytest.raises(UserError, match=r"(?s)not obtained under one protocol.*\n  geometry: "):
            evaluate_command.main()
    # One size, reached another way: the pictures are others, and so is the protocol.
    cut = "data.val.augmentations={resize_h_w: [128, 150], center_crop_h_w: [64, 96]}"
    cropped = evaluate("--checkpoint", path, "--set", cut, output="cut.json")
    assert cropped.protocol.fake_size == usual.protocol.fake_size and cropped.scores != usual.scores
    monkeypatch.setattr(sys, "argv", ["", "--compare", str(tmp_path / "usual.json"), str(tmp_path / "cut.json")])
    with pytest.raises(UserError, match="geometry: "):
        evaluate_command.main()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--checkpoint", "x", "--size", "abc"), "--size abc: write trained, own"),
        (("--checkpoint", "x", "--size", "99999x99999"), "--size 99999x99999: 9,999,800,001 pixels"),
        (("--fake", "x", "--real", "y", "--size", "own"), "--size is the size at which a checkpoint generates images"),
    ],
)
def test_evaluation_of_no_such_size(evaluate, flags, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(*flags)
