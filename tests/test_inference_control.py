"""Control over inference: styles, replaced classes, kinds of label maps, and what label maps may not be."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import av
import lmdb
import numpy as np
import pytest
import torch
from conftest import blocky_labels, write_jpg, write_png
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_inference import REPOSITORY, TREE, changed, command_line, files, save

from imaginaire_spade import SemanticLayout, Synthesizer, build_generator
from imaginaire_spade.build import layout_spec
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.data.distances import class_distances
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, LabelError, UserError
from imaginaire_spade.inference import output
from imaginaire_spade.inference.folder import Progress
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.synthesis import slerp
from imaginaire_spade.labels import edges_from_ids
from imaginaire_spade.models.for_inference import WinogradConv2d, optimise_for_inference
from imaginaire_spade.processes import one_writer
from imaginaire_spade.training.checkpoint import write_checkpoint

PALETTE = [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [7, 8, 9]]
KEYS = ["a", "seq/b", "seq/c"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def styled(folder) -> Path:
    """With style code, encoder and edges."""
    tree = changed(TREE, data__labels__palette=PALETTE, data__labels__names=["tree", "water", "sky", "road", "house"])
    return save(folder / "styled.pt", tree)


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    tree = changed(TREE, gen__style_dims=0, encoder=None, data__edges="none")
    return save(folder / "plain.pt", tree)


def labels_of(key: str) -> np.ndarray:
    return blocky_labels(np.random.default_rng(KEYS.index(key)), 40, 56, 5)


@pytest.fixture
def label_maps(tmp_path) -> Path:
    for key in KEYS:
        write_png(tmp_path / "maps" / f"{key}.png", labels_of(key))
    return tmp_path / "maps"


@pytest.fixture
def run(monkeypatch, label_maps, tmp_path):
    """``main`` in this process; the pictures it wrote, by path."""

    def call(
        checkpoint: Path, *flags: object, input_dir: Path = label_maps, to: str = "out", overwrite: bool = True
    ) -> dict[str, np.ndarray]:
        known = ["--device", "cpu", "--size", "own", "--no_gallery", "--checkpoint", checkpoint]
        known += ["--input_dir", input_dir]
        existing = ["--overwrite"] if overwrite else []
        arguments = ["inference.py", *known, "--output_dir", tmp_path / to, *existing, *flags]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        command_line.main()
        return {path: read(tmp_path / to / path) for path in files(tmp_path / to)}

    return call


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def photo(path: Path, seed: int, mean: int) -> Path:
    noise = np.random.default_rng(seed).integers(-50, 50, (90, 120, 3)) + mean
    return write_jpg(path, noise.clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------ styles


def test_a_style_seed_is_one_style_for_all_label_maps(run, styled):
    synthesizer = Synthesizer.load(styled, device="cpu", size="own")
    made = run(styled, "--style_seed", 3, "--num_samples", 2)
    assert len(made) == 6
    for path, picture in made.items():
        key, _, sample = path.removesuffix(".png").rpartition("_")
        assert np.array_equal(picture, synthesizer(labels_of(key), seed=3 + int(sample)))
    own = run(styled, "--seed", 3, to="own")
    assert not np.array_equal(own["a.png"], made["a_00.png"])


def test_a_folder_of_style_pictures_joins_by_name_or_takes_turns(run, styled, tmp_path):
    synthesizer = Synthesizer.load(styled, device="cpu", size="own")
    for number, key in enumerate(KEYS):
        photo(tmp_path / "named" / f"{key}.jpg", number, 60 * number)
    for path, picture in run(styled, "--style_image", tmp_path / "named").items():
        key = path.removesuffix(".png")
        assert np.array_equal(picture, synthesizer(labels_of(key), style=tmp_path / "named" / f"{key}.jpg"))
    style = photo(tmp_path / "accents" / unicodedata.normalize("NFD", "é.jpg"), 7, 90)
    photo(tmp_path / "accents" / "f.jpg", 8, 90)
    for key in ("f", "é"):
        write_png(tmp_path / "french" / f"{key}.png", labels_of(KEYS[0]))
    made = run(styled, "--style_image", tmp_path / "accents", input_dir=tmp_path / "french", to="joined")
    assert np.array_equal(made["é.png"], synthesizer(labels_of(KEYS[0]), style=style)), "joined by name"
    turns = [photo(tmp_path / "turns" / f"style{i}.jpg", i, 90 * i) for i in range(2)]
    made = run(styled, "--style_image", tmp_path / "turns")
    for number, key in enumerate(KEYS):
        assert np.array_equal(made[f"{key}.png"], synthesizer(labels_of(key), style=turns[number % 2]))
    (tmp_path / "named" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"style images .*named: none for 1 label map\(s\): a\. Add them; or"):
        run(styled, "--style_image", tmp_path / "named")


def test_a_way_between_two_styles(run, styled, tmp_path):
    synthesizer = Synthesizer.load(styled, device="cpu", size="own")
    end = photo(tmp_path / "end.jpg", 0, 200)
    made = run(styled, "--style_interpolate", 5, end, "--steps", 4)
    assert len(made) == 12
    for key in KEYS:
        assert np.array_equal(made[f"{key}_00.png"], synthesizer(labels_of(key), seed=5))
        assert np.array_equal(made[f"{key}_03.png"], synthesizer(labels_of(key), style=end))
        with Image.open(tmp_path / "out" / f"{key}.gif") as film:
            assert film.is_animated and film.n_frames == 6 and film.size == (56, 40)  # there and back
            film.seek(4)
            shown = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(shown - made[f"{key}_02.png"]).mean() < 4  # 256 colours
    (tmp_path / "out" / "a.gif").unlink()
    (tmp_path / "out" / "seq" / "b_01.png").unlink()
    kept = (tmp_path / "out" / "seq" / "c_00.png").stat().st_mtime_ns
    again = run(styled, "--style_interpolate", 5, end, "--steps", 4, "--skip_existing", overwrite=False)
    assert again.keys() == made.keys() and (tmp_path / "out" / "a.gif").is_file()
    assert (tmp_path / "out" / "seq" / "c_00.png").stat().st_mtime_ns == kept


def test_films_that_browsers_play(run, styled, label_maps, tmp_path, monkeypatch):
    write_png(label_maps / "odd.png", labels_of("a")[:33, :55])
    flags = ("--style_interpolate", 1, 2, "--steps", 3, "--animation")
    made = run(styled, *flags, "mp4")
    for name, size in (("a", (40, 56)), ("odd", (34, 56))):
        with av.open(tmp_path / "out" / f"{name}.mp4") as film:
            assert film.streams.video[0].codec_context.name == "h264" and film.streams.video[0].pix_fmt == "yuv420p"
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert len(frames) == 4 and frames[0].shape[:2] == size
        height, width = made[f"{name}_01.png"].shape[:2]
        assert np.abs(frames[1][:height, :width].astype(int) - made[f"{name}_01.png"]).mean() < 6  # half the colours
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ConfigError, match=r"--animation mp4 needs the package av .*pip install -U av.*--animation webp"
    ):
        run(styled, *flags, "mp4")
    run(styled, *flags, "webp")
    with Image.open(tmp_path / "out" / "odd.webp") as film:
        assert film.format == "WEBP" and film.n_frames == 4 and film.size == (55, 33)
        film.seek(1)
        assert np.abs(np.asarray(film.convert("RGB")).astype(int) - made["odd_01.png"]).mean() < 6


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0, 1))
def test_codes_between_two_are_as_long_as_their_ends(seed, dims, place):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, dims, generator=generator)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-4) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-4)
    unit = slerp(a / a.norm(), b / b.norm(), place)
    if abs(torch.dot(a / a.norm(), b / b.norm())) < 0.999:
        assert abs(float(unit.norm()) - 1) < 1e-3
    assert torch.isfinite(slerp(a, -a, place)).all() and torch.allclose(slerp(a, a, place), a, atol=1e-4)


def test_a_generator_without_style(run, plain, styled, folder, tmp_path, capsys):
    made = run(plain, "--num_samples", 2, "--style_seed", 4)
    assert "takes no style code, so its images do not vary" in capsys.readouterr().err
    assert np.array_equal(made["a_00.png"], made["a_01.png"])
    with pytest.raises(CheckpointError, match="takes no style code: a label map has one image"):
        run(plain, "--style_interpolate", 1, 2)
    picture = photo(tmp_path / "p.jpg", 0, 99)
    with pytest.raises(CheckpointError, match="without a style encoder; it takes no style at all"):
        run(plain, "--style_image", picture)
    seeds_only = save(folder / "seeds.pt", changed(TREE, encoder=None, data__edges="none"))
    for flags in (("--style_image", picture), ("--style_image", tmp_path), ("--style_interpolate", 1, picture)):
        with pytest.raises(CheckpointError, match="a seed gives it a style"):
            run(seeds_only, *flags)
    with pytest.raises(SystemExit):
        run(styled, "--style_interpolate", 1, 2, "--num_samples", 3)
    with pytest.raises(SystemExit):
        run(styled, "--style_interpolate", 1, 2, "--steps", 1)
    for alone in (("--steps", 5), ("--animation", "gif")):
        with pytest.raises(SystemExit):
            run(styled, "--num_samples", 2, *alone)
    with pytest.raises(SystemExit):
        run(styled, "--style_seed", 1, "--style_image", picture)


# ------------------------------------------------------------------------------------------------ label maps


def test_ids_palette_and_colours_give_one_picture(run, styled, tmp_path):
    expected = run(styled)
    table = np.array(PALETTE, np.uint8)
    for key in KEYS:
        palette = Image.fromarray(labels_of(key), "P")
        palette.putpalette(table.tobytes())
        for name, image in (("palette", palette), ("rgb", Image.fromarray(table[labels_of(key)]))):
            path = tmp_path / name / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        write_png(tmp_path / "wide" / f"{key}.png", labels_of(key).astype(np.uint16))
    for name in ("palette", "rgb", "wide"):
        made = run(styled, input_dir=tmp_path / name, to=f"out {name}")
        assert made.keys() == expected.keys() and all(np.array_equal(made[k], expected[k]) for k in made)


def test_classes_are_replaced(run, styled, tmp_path):
    made = run(styled, "--map", "tree=water", "--map", "water=tree", "--map", "3=sky")
    table = np.array([1, 0, 2, 2, 4], np.uint8)
    for key in KEYS:
        write_png(tmp_path / "edited" / f"{key}.png", table[labels_of(key)])
    expected = run(styled, input_dir=tmp_path / "edited", to="expected")  # edges are drawn after the replacement
    assert all(np.array_equal(made[path], expected[path]) for path in expected)
    for wrong, message in (
        ("tre=water", r"--map tre=water: 'tre' is no class of the table: write a name \(tree"),
        ("tree=9", r"'9' is no class .* or an id \(0\.\.5\)"),
        ("tree", r"write CLASS=CLASS, such as --map tree=water"),
        ("tree=sky", "--map tree=sky: another --map replaces the same class"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(styled, "--map", "tree=water", "--map", wrong)


@pytest.fixture
def bad_maps(label_maps) -> Path:
    """Three that are good, and one each with an unknown id, damaged, no image, and huge by its header."""
    unknown = labels_of("a")
    unknown[:8] = 77
    write_png(label_maps / "unknown.png", unknown)
    (label_maps / "text.png").write_text("no image")
    whole = (label_maps / "a.png").read_bytes()
    (label_maps / "cut.png").write_bytes(whole[:60])
    (label_maps / "huge.png").write_bytes(whole[:16] + (99_999).to_bytes(4, "big") * 2 + whole[24:])
    return label_maps


def test_bad_label_maps_fail_before_the_first_picture(run, plain, bad_maps, tmp_path):
    with pytest.raises(DataError) as caught:
        run(plain)
    text = str(caught.value)
    assert "3 more:" in text and "--on_bad_label skip" in text
    for words in ("cut.png: not readable", "99999 x 99999 pixels", "text.png: not readable as an image",
                  "unknown.png: label value(s) 77"):  # fmt: skip
        assert words in text
    assert not files(tmp_path / "out")


def test_bad_label_maps_are_left_out_or_their_unknown_ids_ignored(run, plain, bad_maps, capsys):
    good = {f"{key}.png" for key in KEYS}
    assert set(run(plain, "--on_bad_label", "skip")) == good
    captured = capsys.readouterr()
    assert "wrote 3 of 7 images" in captured.out and "4 label map(s) left out" in captured.out
    assert captured.err.count("note: left out: ") == 4
    with pytest.raises(DataError, match="2 more"):  # not readable is not unknown
        run(plain, "--on_bad_label", "ignore", to="ignored")
    for name in ("text", "cut", "huge"):
        (bad_maps / f"{name}.png").unlink()
    made = run(plain, "--on_bad_label", "ignore", to="ignored")
    assert "unknown ids taken as don't care: " in capsys.readouterr().err
    write_png(bad_maps / "unknown.png", np.where(np.arange(40)[:, None] < 8, 255, labels_of("a")).astype(np.uint8))
    assert np.array_equal(run(plain, to="again")["unknown.png"], made["unknown.png"])


def test_the_gallery_names_no_label_map_that_another_process_leaves_out(run, plain, bad_maps, tmp_path, monkeypatch):
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        known = ["--device", "cpu", "--on_bad_label", "skip", "--skip_existing"]
        arguments = ["inference.py", "--checkpoint", plain, "--input_dir", bad_maps, "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [*map(str, arguments), *known])
        command_line.main()
    page = (tmp_path / "out/index.html").read_text()
    named = {source.removeprefix("./") for source in re.findall(r'src="([^"]+)"', page)}
    assert all((tmp_path / "out" / name).is_file() for name in named)
    assert {name for name in named if not name.startswith("_labels/")} == set(files(tmp_path / "out")) - {"index.html"}
    assert not any(f"{name}.png" in page for name in ("unknown", "text", "cut", "huge"))


def test_an_output_folder_has_one_writer(run, plain, tmp_path):
    with one_writer(tmp_path / "out", "--output_dir"):
        with pytest.raises(
            UserError, match=rf"--output_dir .*out: process {os.getpid()} on .* writes there. Wait for it"
        ):
            run(plain)
        assert not files(tmp_path / "out")
    assert set(run(plain)) == {"a.png", "seq/b.png", "seq/c.png"} and not (tmp_path / "out/.lock").exists()


def test_unknown_colours(run, plain, styled, tmp_path):
    table = np.array(PALETTE, np.uint8)
    colours = table[labels_of("a")]
    colours[:8] = 1, 2, 3
    write_png(tmp_path / "rgb" / "a.png", colours)
    with pytest.raises(LabelError, match=r"a\.png: 1 colour\(s\) that data.labels.palette does not have: \(1, 2, 3\)"):
        run(styled, input_dir=tmp_path / "rgb")
    assert set(run(styled, "--on_bad_label", "ignore", input_dir=tmp_path / "rgb")) == {"a.png"}
    for mode in ("fail", "ignore"):
        with pytest.raises(LabelError, match=r"a\.png: an RGB colour image, but .* data\.labels\.palette: \[\["):
            run(plain, "--on_bad_label", mode, input_dir=tmp_path / "rgb", to="none")


def test_large_label_maps_are_announced(run, plain, tmp_path):
    with pytest.raises(DataError, match=r"a: a label map .* at 40x56, 2,240 pixels .* write --max_pixels 2240"):
        run(plain, "--max_pixels", 2239)
    assert len(run(plain, "--max_pixels", 2240)) == 3


def test_names_that_lead_out_or_meet(run, plain, label_maps, tmp_path, monkeypatch):
    for name in ("../evil", "/evil", "a/../../evil"):
        root = tmp_path / "lmdb"
        (root / "seg_maps").mkdir(parents=True, exist_ok=True)
        with lmdb.open(str(root / "seg_maps"), map_size=1 << 20) as environment, environment.begin(write=True) as write:
            write.put(name.encode(), (label_maps / "a.png").read_bytes())
        sequence, _, stem = name.rpartition("/")
        (root / "all_filenames.json").write_text(json.dumps({sequence: [stem]}))
        (root / "metadata.json").write_text(json.dumps({"seg_maps": {"ext": "png"}}))
        with pytest.raises(DataError, match="plain relative path"):
            run(plain, input_dir=root)
        assert not list(tmp_path.parent.glob("evil*")) and not list(tmp_path.rglob("evil*"))
    Image.fromarray(labels_of("a")).save(label_maps / "a.bmp")
    with pytest.raises(DataError, match=r"a\.bmp and a\.png have one name"):
        run(plain)
    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"'a' and 'a\.gif' would both be written to a\.gif"),
    ):
        patch.setattr(output, "choose_suffix", lambda *_: "")
        output.plan_outputs(["a", "a.gif"], 1, "", ".gif")
    (tmp_path / "nothing" / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match="nothing: no data set there"):
        run(plain, input_dir=tmp_path / "nothing")


def test_a_checkpoint_without_a_label_table(run, plain, tmp_path):
    content = torch.load(plain, weights_only=True)
    del content["config"]["data"]["labels"]
    write_checkpoint(tmp_path / "bare.pt", content)
    with pytest.raises(CheckpointError, match=r"bare\.pt: a checkpoint without a label table"):
        run(tmp_path / "bare.pt")


# ------------------------------------------------------------------------------------------------ runs that end early


def test_an_interrupted_run_leaves_whole_files_and_goes_on(run, plain, label_maps, tmp_path, monkeypatch, capsys):
    expected = run(plain, to="expected")

    def interrupt(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plain)
    assert "stopped: every written file is complete; --skip_existing generates the rest" in capsys.readouterr().err
    left = {path: read(tmp_path / "out" / path) for path in files(tmp_path / "out")}
    assert len(left) < 3 and all(np.array_equal(left[path], expected[path]) for path in left)
    made = run(plain, "--skip_existing", overwrite=False)
    assert made.keys() == expected.keys() and all(np.array_equal(made[path], expected[path]) for path in made)


KILLED = """
import os, runpy, signal, sys
from imaginaire_spade.inference.folder import Progress
Progress.__call__ = lambda self, done, total: done == 4 and os.kill(os.getpid(), signal.SIGKILL)
sys.argv[0] = "inference.py"
runpy.run_path("inference.py", run_name="__main__")
"""


def test_a_killed_run_leaves_whole_pictures_and_is_finished(run, plain, label_maps, tmp_path):
    for number in range(4):
        write_png(label_maps / f"{number}.png", blocky_labels(np.random.default_rng(number), 64, 90, 5))
    expected = run(plain, to="whole")
    out = tmp_path / "out"
    command = ["--checkpoint", plain, "--input_dir", label_maps, "--device", "cpu", "--size", "own", "--no_gallery",
               "--output_dir", out]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, command)], cwd=REPOSITORY, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    before = files(out)
    assert len(before) < len(expected) and all(np.array_equal(read(out / path), expected[path]) for path in before)
    leftover = out / f"{output.PARTIAL}of a killed process"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    written = {path: (out / path).stat().st_mtime_ns for path in before}
    made = run(plain, "--skip_existing", overwrite=False)
    assert made.keys() == expected.keys() and all(np.array_equal(made[path], expected[path]) for path in made)
    assert {path: (out / path).stat().st_mtime_ns for path in before} == written
    assert not [path for path in out.rglob("*") if path.name.startswith(output.PARTIAL)]


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(run, styled, precision):
    full, half = run(styled), run(styled, "--precision", precision, to=precision)
    for path, picture in full.items():
        assert np.abs(picture.astype(int) - half[path]).mean() < 2, path
    assert any(not np.array_equal(full[path], half[path]) for path in full)


def test_what_cannot_be_compiled_is_said(run, plain, monkeypatch):
    compiled = []

    def fail(self: torch.nn.Module, **options: object) -> None:
        error = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
        compiled.append(options)

        def forward(*_: object) -> torch.Tensor:
            raise error("no C++ compiler found\nand what to do")

        self.forward = forward

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    with pytest.raises(
        UserError, match=r"--compile: torch cannot compile .* \(no C\+\+ compiler found\); leave it out"
    ):
        run(plain, "--compile")
    assert compiled == [{"dynamic": True}]


KINDS = {
    "spade": {"norm": {"type": "spade", "hidden_channels": 8}},
    "spade of tables": {"norm": {"type": "spade", "hidden_channels": 8, "path": "table"}},
    "as imaginaire's": {
        "type": "style_spade", "style_dims": 4,
        "norm": {"type": "spade", "hidden_channels": 8, "kernel_size": 5, "affine": True, "spectral_norm": True},
    },
    "instance": {"norm": {"type": "spade", "hidden_channels": 8, "normalization": "instance"}},
    "clade": {"norm": {"type": "clade"}},
    "clade_icpe": {"norm": {"type": "clade_icpe"}},
    "wide": {"num_filters": 16, "norm": {"type": "clade"}},  # 256 channels at 1/16: Winograd
    "reflecting": {"type": "pix2pixhd", "num_filters": 64, "num_downsamplings": 2, "num_blocks": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weights_made_ready_for_inference_give_the_training_graphs_pictures(kind, tmp_path):
    tree = changed(TREE, encoder=None, gen={"type": "spade", "num_filters": 2} | KINDS[kind])
    config = parse_config(tree)
    torch.manual_seed(1)
    generator = build_generator(config)
    labels = torch.stack([torch.from_numpy(blocky_labels(np.random.default_rng(i), 64, 64, 5)) for i in range(2)])
    edges = torch.stack([torch.from_numpy(edges_from_ids(ids.numpy())) for ids in labels])
    spec = layout_spec(config)
    distances = torch.stack([torch.from_numpy(class_distances(ids.numpy())) for ids in labels])
    layout = SemanticLayout(spec, labels, edges, distances if spec.has_distances else None)
    z = torch.randn(2, generator.style_dims) if generator.style_dims else None
    for _ in range(3):  # spectral norms and running statistics move
        generator.train()(layout, z)
    with torch.no_grad():
        expected = generator.eval()(layout, z)
    state = {"config": dump_config(config), "generator": generator.state_dict(), "images_seen": 1}
    write_checkpoint(tmp_path / "model.pt", state)
    model = Model.load(tmp_path / "model.pt", weights="raw")
    assert not [name for name in model.generator.state_dict() if name.endswith("weight_u")]
    assert (kind == "wide") == any(isinstance(layer, WinogradConv2d) for layer in model.generator.modules())
    with torch.inference_mode():
        assert (model.generator(layout, z) - expected).abs().max() < 2e-5
    as_they_were = optimise_for_inference(copy.deepcopy(generator), winograd=False)
    cast = optimise_for_inference(copy.deepcopy(generator), winograd=False, dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(layout, z), as_they_were(layout, z))
    half = Model.load(tmp_path / "model.pt", weights="raw", precision="bf16").generator.state_dict()
    assert {half[key].dtype for key in half if key.endswith("to_image.weight")} == {torch.bfloat16}
