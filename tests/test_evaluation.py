"""evaluate.py: what it reports for given pictures, under which protocol, and what it says to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import write_jpg, write_png

from imaginaire_spade.build import build_generator
from imaginaire_spade.commands import compute_fid_stats
from imaginaire_spade.commands import evaluate as evaluate_command
from imaginaire_spade.config_files import dump_config, parse_config
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError, UserError
from imaginaire_spade.evaluation.collection import collect
from imaginaire_spade.evaluation.evaluate import evaluate
from imaginaire_spade.evaluation.images import StoredImages
from imaginaire_spade.evaluation.report import Protocol, differences, load_report
from imaginaire_spade.files import write_image
from imaginaire_spade.inference.folder import FolderOptions, generate_folder
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.synthesis import drawn_styles
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.pretrained.feature_networks import feature_network
from imaginaire_spade.training.checkpoint import write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
LABELS = LabelSpec(num_classes=5)
RANDOM = ("--inception_weights", "random:0", "--feature_dim", "64", "--reference_split", "val")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """evaluate.py in this process; the report it wrote. Its errors come as exceptions."""

    def call(*arguments, module=evaluate_command):
        output = tmp_path / "report.json" if module is evaluate_command else tmp_path / "stats.npz"
        given = [*map(str, arguments), "--output", str(output)] if "--compare" not in arguments else arguments
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, given)])
        module.main()
        return load_report(output) if module is evaluate_command and "--compare" not in arguments else output

    return call


def photos(folder: Path, count: int, seed: int, size: tuple[int, int] = (40, 48), suffix: str = ".png") -> Path:
    """Pictures of smooth noise, named 000 and so on, every third in a sub-folder."""
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        name = f"deep/er/{number:03}" if number % 3 == 2 else f"{number:03}"
        write_image(folder / f"{name}{suffix}", cv2.resize(small, size[::-1]))
    return folder


@pytest.fixture
def real(tmp_path) -> Path:
    return photos(tmp_path / "real", 23, 1)


@pytest.fixture
def fake(tmp_path) -> Path:
    return photos(tmp_path / "fake", 19, 2)


# ------------------------------------------------------------------------------------------------ what is reported


def test_scores_stamp_and_file(run, real, fake, capsys):
    report = run("--real", real, "--fake", fake, "--metrics", "fid,kid,precision_recall", *RANDOM)
    assert set(report.scores) == {
        "random_feature_distance", "random_feature_mmd", "random_feature_mmd_std", "random_feature_precision",
        "random_feature_recall",
    }  # fmt: skip
    stamp = report.protocol
    assert (stamp.feature_network, stamp.feature_dim, stamp.resize, stamp.resized_to) == ("random:0", 64, "legacy", 64)
    assert (stamp.num_real, stamp.num_fake, stamp.real_size, stamp.fake_size) == (23, 19, "40x48", "40x48")
    assert (stamp.real_format, stamp.reference_split, len(stamp.weights_sha256 or "")) == ("png", "val", 64)
    assert stamp.kid == "100 subset(s) of 19, kernel (x.y/D + 1)^3, seed 0"
    printed = capsys.readouterr().out
    for name, value in stamp.stated().items():
        assert f"{name}: {value}" in printed
    assert "only 19 images" in printed and "KID has no such bias" in printed and "untrained network" in printed
    assert f"random_feature_distance: {report.scores['random_feature_distance']:.6g}" in printed


def test_scores_of_an_untrained_network_are_nowhere_called_fid_or_kid(run, real, fake, tmp_path):
    run("--real", real, "--fake", fake, "--metrics", "fid,kid", *RANDOM)
    tree = json.loads((tmp_path / "report.json").read_text())
    assert all("random" in name and "fid" not in name and "kid" not in name for name in tree["scores"])
    assert any("untrained" in warning and "no FID" in warning for warning in tree["warnings"])


def test_equal_pictures_have_distance_zero(run, real):
    report = run("--real", real, "--fake", real, *RANDOM)
    assert report.scores["random_feature_distance"] == pytest.approx(0, abs=1e-9)


def test_stored_pictures_of_sixteen_bits_are_scored_as_the_config_reads_them(run, tmp_path):
    for side, seed in (("real", 1), ("fake", 2)):
        for path in photos(tmp_path / side, 4, seed).rglob("*.png"):
            pixels = cv2.imread(str(path))
            write_png(
                tmp_path / f"{side}16" / path.relative_to(tmp_path / side), pixels[..., ::-1].astype(np.uint16) * 16
            )
    deep = ("--real", tmp_path / "real16", "--fake", tmp_path / "fake16", *RANDOM)
    with pytest.raises(DataError, match=r"3 channel\(s\) of uint16, .*: write --config C\.yaml, whose data\.images"):
        run(*deep)
    (tmp_path / "deep.yaml").write_text("data: {labels: {num_classes: 2}, images: {range: [0, 4080]}}")
    same = run("--real", tmp_path / "real", "--fake", tmp_path / "fake", *RANDOM)
    assert run(*deep, "--config", tmp_path / "deep.yaml").scores == pytest.approx(same.scores)


def id_maps(folder: Path, like: Path, seed: int) -> Path:
    """An id map for each picture of ``like``."""
    for number, path in enumerate(sorted(like.rglob("*.png"))):
        ids = np.random.default_rng((seed, number)).integers(0, 4, (40, 48), dtype=np.uint8)
        write_png(folder / path.relative_to(like), ids)
    return folder


def test_neither_batch_size_nor_number_of_processes_changes_a_score(run, real, fake, tmp_path):
    maps, *predicted = (
        id_maps(tmp_path / name, fake, seed) for seed, name in enumerate(("maps", "of_fake", "of_real"))
    )
    (tmp_path / "table.yaml").write_text("data: {labels: {num_classes: 5}}")
    common = ("--real", real, "--fake", fake, "--metrics", "fid,kid,precision_recall,segmentation", "--predictions",
              *predicted, "--label_maps", maps, "--label_table", tmp_path / "table.yaml", *RANDOM)  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives each process: sums of a matrix product depend on their number
    try:
        one = run(*common, "--batch_size", "1")
    finally:
        torch.set_num_threads(threads)
    assert one.details["segmentation"]["pixels"] == len(list(maps.rglob("*.png"))) * 40 * 48
    for batch_size in (7, 32):
        other = run(*common, "--batch_size", batch_size)
        assert other.protocol == one.protocol
        assert other.scores == pytest.approx(one.scores, rel=1e-6)  # a batch's float32 features round differently
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py",
         *map(str, common), "--batch_size", "1", "--output", str(tmp_path / "two.json")],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = load_report(tmp_path / "two.json")
    assert two.protocol == one.protocol and two.warnings == one.warnings
    assert two.details == one.details
    assert two.scores == pytest.approx(one.scores, rel=1e-10)
    assert {k: v for k, v in two.scores.items() if "distance" not in k} == {
        k: v for k, v in one.scores.items() if "distance" not in k
    }
    assert done.stdout.count("random_feature_distance") == 1  # one process reports


def test_shares_of_processes_are_disjoint_and_complete(fake, monkeypatch):
    source, network = StoredImages(fake), feature_network("random:0", dim=64)
    whole = collect(source, network, keep_features=True)
    shares = []
    monkeypatch.setattr(
        "imaginaire_spade.evaluation.collection.gather_objects", lambda share: shares.append(share) or []
    )
    for rank in range(3):
        with pytest.raises(AssertionError, match="not each of 19 images once"):  # a missing process is noticed
            collect(source, network, keep_features=True, info=ProcessInfo(rank, 3), batch_size=2)
    assert sorted(index for share in shares for index in share.found) == list(range(19))
    monkeypatch.setattr("imaginaire_spade.evaluation.collection.gather_objects", lambda _: shares)
    monkeypatch.setattr("imaginaire_spade.evaluation.scores.total_over_processes", lambda value: value * 0 + 19)
    joined = collect(source, network, keep_features=True, info=ProcessInfo(0, 3))
    torch.testing.assert_close(joined.features, whole.features)
    for name in ("count", "size", "format", "digest"):
        assert getattr(joined, name) == getattr(whole, name)


def test_an_lmdb_scores_as_the_folder_it_was_built_from(run, tiny_folder, fake, tmp_path):
    raw = tiny_folder(types=("images", "seg_maps"))
    build_dataset(raw, tmp_path / "lmdb", LABELS, num_shards=2, num_workers=0)
    reports = [
        run("--real", place, "--fake", fake, "--metrics", "fid,kid", *RANDOM)
        for place in (raw, raw / "images", tmp_path / "lmdb")
    ]
    assert reports[0].scores == reports[1].scores == reports[2].scores
    assert reports[0].protocol == reports[1].protocol == reports[2].protocol
    assert (reports[0].protocol.num_real, reports[0].protocol.real_format) == (6, "jpeg")


# ------------------------------------------------------------------------------------------------ a checkpoint


@pytest.fixture
def checkpoint(tiny_folder, tmp_path):
    """Makes a checkpoint of an untrained generator whose data.val is a tiny folder."""

    def make(style_dims: int = 0) -> Path:
        train, val = (tiny_folder(name, keys=n, size=(32, 32), seed=n) for name, n in (("train", 4), ("val", 5)))
        cut = {"resize_h_w": [32, 32]}
        config = parse_config({
            "gen": {"type": "spade", "num_filters": 2, "style_dims": style_dims, "norm": {"type": "spade"}},
            "dis": "multiscale_patch", "losses": {"gan": 1.0}, "gen_opt": {"lr": 1e-4}, "dis_opt": {"lr": 1e-4},
            "trainer": {"max_iterations": 1, "init": {"type": "xavier", "gain": 0.9}},
            "data": {"labels": LABELS.model_dump(), "train": {"roots": [str(train)], "augmentations": cut},
                     "val": {"roots": [str(val)], "augmentations": cut}},
        })  # fmt: skip
        torch.manual_seed(0)
        generator = build_generator(config)
        path = tmp_path / "checkpoint_000000000007.pt"
        write_checkpoint(path, {"config": dump_config(config), "generator": generator.state_dict(), "images_seen": 7})
        return path

    return make


def test_a_checkpoint_scores_as_the_pictures_that_inference_writes(run, checkpoint, tmp_path):
    path = checkpoint()
    made = run("--checkpoint", path, "--metrics", "fid,kid", *RANDOM)
    assert (made.protocol.num_real, made.protocol.num_fake, made.protocol.fake_size) == (5, 5, "32x32")
    assert made.protocol.fake_format == "generated, not stored"
    assert made.subject["weights"] == "raw after 7 images" and made.subject["real"] == str(tmp_path / "val")
    dataset = LabelMapDataset(tmp_path / "val", LABELS, with_images=False)
    generate_folder(Model.load(path), dataset, tmp_path / "out")
    stored = run("--real", tmp_path / "val", "--fake", tmp_path / "out", "--metrics", "fid,kid", *RANDOM)
    assert stored.scores == made.scores  # and the gallery's label maps were not taken for pictures
    assert stored.protocol.reference == made.protocol.reference
    against_train = run("--checkpoint", path, *RANDOM, "--reference_split", "train")
    assert against_train.protocol.num_real == 4 and against_train.subject["real"] == str(tmp_path / "train")
    with pytest.raises(ConfigError, match="--num_samples 2: this generator takes no style code"):
        run("--checkpoint", path, *RANDOM, "--num_samples", "2")
    with pytest.raises(ConfigError, match=r"no data.val to evaluate on"):
        run("--checkpoint", path, *RANDOM, "--set", "data.val=null")
    with pytest.raises(CheckpointError, match="does not fit the checkpoint"):
        run("--checkpoint", path, *RANDOM, "--set", "gen.num_filters=3")


def test_diversity_of_samples_made_on_the_fly_is_that_of_the_stored_ones(run, checkpoint, tmp_path):
    path = checkpoint(style_dims=4)
    flags = ("--metrics", "fid,diversity", "--lpips_weights", "random:0", "--num_samples", "3", *RANDOM)
    made = run("--checkpoint", path, "--seed", "5", *flags)
    assert made.scores["random_feature_diversity"] > 0 and "lpips_diversity" not in made.scores
    assert made.protocol.diversity is not None and made.protocol.diversity.startswith("random:0 (sha256 ")
    assert made.protocol.diversity.endswith("3 samples per label map") and made.protocol.num_fake == 5
    dataset = LabelMapDataset(tmp_path / "val", LABELS, with_images=False)
    generate_folder(
        Model.load(path),
        dataset,
        tmp_path / "out",
        FolderOptions(num_samples=3),
        style_of=drawn_styles(5, 4, num_samples=3),
    )
    stored = run("--real", tmp_path / "val", "--fake", tmp_path / "out", *flags)
    assert stored.scores == pytest.approx(made.scores, rel=1e-6)
    with pytest.raises(DataError, match=r"not 2 samples of '0000' .found 0000_00, 0000_01, 0000_02."):
        run("--real", tmp_path / "val", "--fake", tmp_path / "out", *flags, "--num_samples", "2")
    with pytest.raises(ConfigError, match="write --num_samples 2 or more"):
        run("--real", tmp_path / "val", "--fake", tmp_path / "out", *flags, "--num_samples", "1")


def test_a_damaged_label_map_is_named_or_left_out_of_both_sides(run, checkpoint, tmp_path):
    path = checkpoint(style_dims=4)
    damaged = tmp_path / "val/seg_maps/0002.png"
    damaged.write_bytes(b"no image")
    flags = ("--checkpoint", path, "--metrics", "fid,diversity", "--lpips_weights", "random:0", "--num_samples", "2")
    with pytest.raises(DataError, match=r"seg_maps/0002.png: .*--skip_bad leaves such images out"):
        run(*flags, *RANDOM)
    report = run(*flags, *RANDOM, "--skip_bad", "--html", tmp_path / "page.html")
    assert (report.protocol.num_fake, report.protocol.num_real) == (4, 4)
    assert len(report.problems) == 2 and all("0002.png" in problem for problem in report.problems)
    assert report.scores["random_feature_diversity"] > 0


# ------------------------------------------------------------------------------------------------ statistics in files


def test_stored_statistics_serve_as_the_reference(run, real, fake, tmp_path):
    direct = run("--real", real, "--fake", fake, *RANDOM)
    stats = run("--real", real, *RANDOM, module=compute_fid_stats)
    report = run("--real", stats, "--fake", fake, *RANDOM)
    assert report.scores == direct.scores and report.protocol == direct.protocol
    with pytest.raises(ConfigError, match="holds statistics, which serve fid only: kid needs the images"):
        run("--real", stats, "--fake", fake, "--metrics", "fid,kid", *RANDOM)
    for flags, message in (
        (("--inception_weights", "random:1"), "name: random:0 there, random:1 here; sha256"),
        (("--resize", "clean"), "resize: legacy there, clean here"),
        (("--reference_split", "train"), "split: val there, train here"),
        (("--feature_dim", "192"), "statistics of 64 dimensions, but the features have 192: write --feature_dim 64"),
    ):
        with pytest.raises(DataError, match=message):
            run("--real", stats, "--fake", fake, *RANDOM, *flags)

    with np.load(stats) as ours:  # as pytorch-fid keeps them, and CLADE
        mu, sigma = ours["mu"], ours["sigma"]
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    (tmp_path / "clade").mkdir()
    np.save(tmp_path / "clade/m.npy", mu)
    np.save(tmp_path / "clade/s.npy", sigma)
    for place in ("theirs.npz", "clade"):
        report = run("--real", tmp_path / place, "--fake", fake, *RANDOM)
        assert report.scores == pytest.approx(direct.scores, rel=1e-9)
        assert report.protocol.num_real is None and len(report.protocol.reference) == 64
        assert any("do not say what network" in warning for warning in report.warnings)


def test_statistics_of_a_configs_photos(run, checkpoint, tmp_path):
    path = checkpoint()
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(dump_config(Model.load(path, for_inference=False).config)))  # JSON is YAML
    stats = run("--config", config, *RANDOM, module=compute_fid_stats)
    assert run("--checkpoint", path, "--real", stats, *RANDOM).scores == run("--checkpoint", path, *RANDOM).scores
    with pytest.raises(ConfigError, match="holds statistics, which serve fid only: segmentation needs the images"):
        run("--checkpoint", path, "--real", stats, "--metrics", "segmentation", "--segmenter", "x", *RANDOM)


# ------------------------------------------------------------------------------------------------ comparing


def test_reports_are_compared_only_under_one_protocol(run, real, fake, tmp_path, capsys):
    report = run("--real", real, "--fake", fake, "--metrics", "fid,kid", *RANDOM)
    better, other = tmp_path / "better.json", tmp_path / "other.json"
    evaluated = dict(report.scores) | {"random_feature_distance": 0.1}
    type(report)(evaluated, report.protocol, {"fake": "elsewhere"}).save(better)
    capsys.readouterr()
    run("--compare", tmp_path / "report.json", better)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[::2] == ["random_feature_distance", "0.1", "second", "better"]
    run("--real", real, "--fake", fake, *RANDOM, "--resize", "clean")
    (tmp_path / "report.json").rename(other)
    with pytest.raises(UserError, match=r"not obtained under one protocol.*\n  resize: legacy / clean$"):
        run("--compare", better, other)
    for content in ("{", "[]", '{"scores": {}}', (better.read_text()).replace('"version"', '"vers"')):
        other.write_text(content)
        with pytest.raises(DataError, match=r"other.json: "):
            run("--compare", better, other)


def test_every_field_of_the_stamp_counts():
    values = {field: f"{field} here" for field in Protocol.__dataclass_fields__}
    for field in values:
        a, b = Protocol(**values), Protocol(**values | {field: "elsewhere"})
        assert differences(a, a) == [] and differences(a, b) == [f"{field}: {field} here / elsewhere"]
    # What only one of the two measured does not part them.
    assert differences(Protocol(**values), Protocol(**values | {"kid": None, "feature_network": None})) == []


# ------------------------------------------------------------------------------------------------ bad input


def test_folders_that_cannot_be_evaluated(run, real, fake, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("x")
    (tmp_path / "file.png").write_bytes(b"x")
    write_png(tmp_path / "twice/a.png", np.zeros((4, 4, 3), np.uint8))
    write_jpg(tmp_path / "twice/a.jpg", np.zeros((4, 4, 3), np.uint8))
    for place, message in (
        ("empty", "the folder is empty; expected images"), ("nowhere", "no such folder"), ("texts", "no data set"),
        ("file.png", "a file; expected a folder of images"), ("twice", "have one name"),
    ):  # fmt: skip
        for flags in (("--real", tmp_path / place, "--fake", fake), ("--real", real, "--fake", tmp_path / place)):
            with pytest.raises(DataError, match=f"{place}.*{message}"):
                run(*flags, *RANDOM)


def test_corrupt_files_are_named_or_left_out_and_counted(run, real, fake, tmp_path, capsys):
    whole = run("--real", real, "--fake", fake, *RANDOM)
    (fake / "bad1.png").write_bytes(b"not a picture")
    write_jpg(fake / "deep/bad2.jpg", np.zeros((40, 48, 3), np.uint8))
    (fake / "deep/bad2.jpg").write_bytes((fake / "deep/bad2.jpg").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"bad1.png: not readable as an image .*--skip_bad leaves"):
        run("--real", real, "--fake", fake, *RANDOM)
    report = run("--real", real, "--fake", fake, *RANDOM, "--skip_bad")
    assert report.scores == whole.scores and report.protocol == whole.protocol
    assert len(report.problems) == 2 and "bad1.png" in report.problems[0] and "bad2.jpg" in report.problems[1]
    assert any("2 of 21 images cannot be read and are left out" in warning for warning in report.warnings)
    assert "left out: " in capsys.readouterr().out
    for path in real.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 23 images can be read; the first: .*000.png"):
        run("--real", real, "--fake", fake, *RANDOM, "--skip_bad")


def test_grey_and_alpha_pictures_are_made_rgb_and_named(run, real, fake):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    write_png(fake / "x_grey.png", rgb[..., 0])
    bgra = np.dstack([rgb, np.full((40, 48), 7, np.uint8)])
    (fake / "x_alpha.png").write_bytes(cv2.imencode(".png", bgra)[1].tobytes())
    mixed = run("--real", real, "--fake", fake, *RANDOM)
    assert f"{fake}: alpha dropped in 1 image(s), such as x_alpha" in mixed.warnings
    assert f"{fake}: grey made RGB in 1 image(s), such as x_grey" in mixed.warnings
    write_png(fake / "x_grey.png", np.repeat(rgb[..., :1], 3, 2))
    write_png(fake / "x_alpha.png", rgb[..., ::-1])
    assert run("--real", real, "--fake", fake, *RANDOM).scores == mixed.scores


def test_mixed_sizes_are_taken_and_told(run, real, fake):
    photos(fake, 2, 9, size=(70, 33))
    report = run("--real", real, "--fake", fake, *RANDOM, "--batch_size", "5")
    assert report.protocol.fake_size == "2 sizes from 40x48 to 70x33" and report.protocol.num_fake == 19
    assert any("part of the distance is that of the sizes" in warning for warning in report.warnings)


def test_features_that_are_not_finite_name_the_picture(fake):
    network = feature_network("random:0", dim=64)
    network.layers.layers[0].weight.data[0] = torch.nan
    with pytest.raises(
        UserError, match=r"the features of .* are not finite: the feature network's weights are damaged"
    ):
        collect(StoredImages(fake), network)


def test_too_little_memory_says_what_to_write(fake):
    network = feature_network("random:0", dim=64)
    for error in (torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")):

        def fail(images, error=error):
            raise error

        network.layers.forward = fail
        with pytest.raises(UserError, match="features of 19 images at once: write a smaller --batch_size"):
            collect(StoredImages(fake), network)


def test_too_few_pictures(run, real, fake, tmp_path):
    one = photos(tmp_path / "one", 1, 3)
    with pytest.raises(DataError, match=r"one: 1 image.*at least 2"):
        run("--real", real, "--fake", one, *RANDOM)
    with pytest.raises(DataError, match="more than 3 images on each side, not 23 and 2"):
        run("--real", real, "--fake", photos(tmp_path / "two", 2, 3), "--metrics", "precision_recall", *RANDOM)
    report = run("--real", real, "--fake", fake, *RANDOM)
    assert any("only 19 images" in w and "bias: report it" in w and "64 dimensions" in w for w in report.warnings)
    report = run("--real", real, "--fake", fake, "--metrics", "fid,kid", *RANDOM)
    assert any("only 19 images" in w and "only; KID has no such bias" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fake", "F"), "--real is missing"),
        (("--real", "R"), "give --fake DIR, or --checkpoint P"),
        (("--real", "R", "--fake", "F", "--checkpoint", "C"), "one of the two"),
        (("--real", "R", "--fake", "F", "--metrics", "fid,is"), "--metrics is: unknown; choose from fid,kid"),
        (("--real", "R", "--fake", "F", "--metrics", ""), "choose from"),
        (("--real", "R", "--fake", "F", "--inception_weights", "nowhere.pth"), "no weights at nowhere.pth"),
        (("--checkpoint", "nowhere.pt"), "no such file or folder"),
        (
            ("--real", "R", "--fake", "F", "--html", str(REPOSITORY)),
            f"--html {REPOSITORY} is a folder: give the name of a file",
        ),
        (("--real", "R", "--fake", "F", "--html", f"{__file__}/r.html"), r"test_evaluation.py is no place for a file"),
    ],
)
def test_flags_that_do_not_go_together(run, flags, message):
    with pytest.raises(UserError, match=message):
        run(*RANDOM, *flags)


def test_statistics_need_a_place_before_any_image_is_read(run, tmp_path):
    (tmp_path / "stats.npz").mkdir()
    with pytest.raises(ConfigError, match=r"--output .*stats\.npz is a folder: give the name of a file"):
        run("--real", "R", "--reference_split", "val", *RANDOM, module=compute_fid_stats)


def test_the_reference_split_must_be_stated(run, real, fake):
    with pytest.raises(ConfigError, match="--reference_split is missing: write train or val"):
        run("--real", real, "--fake", fake, "--inception_weights", "random:0")


def test_progress_is_told_and_without_metrics_there_is_no_score(fake):
    told: list[tuple[int, int]] = []
    collection = collect(StoredImages(fake), None, on_image=lambda *numbers: told.append(numbers))
    assert told == [(done, 19) for done in range(1, 20)] and collection.gaussian is None
    assert evaluate(StoredImages(fake), collection, None, metrics=(), reference_split="val").scores == {}
