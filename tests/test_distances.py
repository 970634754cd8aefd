"""Positions within a class's regions (CLADE-ICPE): their computation, their files, their way through the pipeline."""

import json
import sys

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import write_png
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file

from imaginaire_spade.build import build_generator, build_losses, build_split, layout_spec
from imaginaire_spade.commands import make_distance_maps as make_distance_maps_script
from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.config_files import load_config
from imaginaire_spade.data.batch import Batch
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.distances import class_distances, decode_distances, encode_distances
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.dataset_prep.maps import make_distance_maps
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, DataError, LabelError
from imaginaire_spade.inference.folder import FolderOptions, generate_folder
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.synthesis import Request, pad_to_layout
from imaginaire_spade.interop.checkpoint import architecture_config, export_files, import_checkpoint
from imaginaire_spade.interop.configs import import_config
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.training import loop
from imaginaire_spade.training.checkpoint import newest_checkpoint
from imaginaire_spade.training.setup import prepare

LABELS = LabelSpec(num_classes=5, ignore=(255,))
SIDES = st.integers(1, 24)
LABEL_MAPS = st.tuples(SIDES, SIDES).flatmap(
    lambda size: arrays(np.uint8, size, elements=st.sampled_from([0, 1, 2, 255]), fill=st.just(0))
)


def plain_distances(ids: np.ndarray, normalise: bool) -> np.ndarray:
    """One class and one region after the other."""
    distances = np.zeros((2, *ids.shape))
    for value in np.unique(ids):
        count, regions = cv2.connectedComponents((ids == value).astype(np.uint8), connectivity=8)
        for region in range(1, count):
            for axis, places in enumerate(np.nonzero(regions == region)):
                offsets = places - places.mean()
                distances[axis][regions == region] = offsets / ((np.abs(offsets) + 1e-5).max() if normalise else 1)
    return distances


@settings(max_examples=150, deadline=None)
@given(ids=LABEL_MAPS, normalise=st.booleans())
@example(ids=np.eye(9, dtype=np.uint8), normalise=True)
@example(ids=(np.indices((7, 8)).sum(0) % 2).astype(np.uint8), normalise=True)
@example(ids=np.full((6, 1), 255, np.uint8), normalise=True)
def test_distances_equal_those_of_one_region_after_the_other(ids, normalise):
    found = class_distances(ids, normalise=normalise)
    assert found.dtype == np.float32 and found.shape == (2, *ids.shape)
    np.testing.assert_allclose(found, plain_distances(ids, normalise), atol=1e-6)
    np.testing.assert_array_equal(found, class_distances(ids.astype(np.int16) + 100, normalise=normalise))


@settings(max_examples=60, deadline=None)
@given(ids=LABEL_MAPS)
def test_a_mirrored_map_has_mirrored_distances_of_the_other_sign(ids):
    distances = class_distances(ids)
    for axis in (0, 1):
        mirrored = np.flip(distances, axis + 1).copy()
        mirrored[axis] *= -1
        np.testing.assert_allclose(class_distances(np.flip(ids, axis)), mirrored, atol=1e-6)


def test_a_region_of_one_row_has_no_row_offsets_and_a_pixel_alone_none_at_all():
    ids = np.zeros((5, 6), np.uint8)
    ids[2, 1:5] = 3
    ids[0, 0] = 7
    distances = class_distances(ids)
    assert (distances[0, 2, 1:5] == 0).all() and (distances[:, 0, 0] == 0).all()
    np.testing.assert_allclose(distances[1, 2, 1:5], [-1, -1 / 3, 1 / 3, 1], atol=1e-5)
    assert np.abs(distances).max() < 1


@pytest.mark.parametrize("name", ["camvid/val", "cocostuff/train"])
def test_real_label_maps(shared_dir, name):
    for path in sorted((shared_dir / "data" / name / "seg_maps").iterdir())[:2]:
        ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(class_distances(ids), plain_distances(ids, True), atol=1e-6)


# ------------------------------------------------------------------------------------------------ files


def test_a_stored_map_reads_back_and_so_does_one_of_clade(tmp_path):
    distances = class_distances(np.random.default_rng(0).integers(0, 3, (40, 30), dtype=np.uint8))
    assert np.abs(decode_distances(encode_distances(distances), "x").astype(np.float32) - distances).max() <= 0.0005
    np.save(tmp_path / "theirs.npy", distances)
    np.testing.assert_array_equal(decode_distances((tmp_path / "theirs.npy").read_bytes(), "x"), distances)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 200), value=st.binary(max_size=4), end=st.integers(0, 300))
def test_a_damaged_file_is_a_data_error_or_a_distance_map(position, value, end):
    data = encode_distances(np.zeros((2, 4, 5), np.float32))
    damaged = (data[:position] + value + data[position + len(value) :])[:end]
    try:
        assert decode_distances(damaged, "d.npy").shape[0] == 2
    except DataError as error:
        assert str(error).startswith("d.npy: ")


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 4, 5), np.int32), np.zeros((3, 4, 5)), np.zeros((2, 4)), np.asfortranarray(np.ones((2, 3, 4)))],
)
def test_other_arrays_are_no_distance_maps(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=r"no distance map, which is floats \[2, height, width\]"):
        decode_distances((tmp_path / "x.npy").read_bytes(), "x")


def test_stored_maps_are_made_once_kept_and_made_anew_where_they_do_not_fit(tiny_folder, tmp_path):
    root = tiny_folder(keys=["a", "b/c", "d"])
    assert make_distance_maps(root, LABELS, num_workers=0) == (3, 0)
    ids = cv2.imread(str(root / "seg_maps/b/c.png"), cv2.IMREAD_UNCHANGED)
    stored = decode_distances((root / "distances/b/c.npy").read_bytes(), "x")
    np.testing.assert_allclose(stored, class_distances(ids), atol=0.0005)
    (root / "distances/a.npy").write_bytes(b"\x93NUMPY cut off")
    write_png(root / "seg_maps/d.png", np.zeros((8, 8), np.uint8))
    assert make_distance_maps(root, LABELS) == (2, 1)
    assert make_distance_maps(root, LABELS) == (0, 3)
    assert [make_distance_maps(root, LABELS, overwrite=True, rank=r, world_size=2) for r in (0, 1)] == [(2, 0), (1, 0)]
    assert not list((root / "distances").rglob(".*"))
    write_png(root / "seg_maps/d.png", np.full((8, 8), 9, np.uint8))
    with pytest.raises(LabelError, match=r"d\.png: label value\(s\) 9 outside the table"):
        make_distance_maps(root, LABELS)


def test_the_script_makes_maps_that_build_lmdb_takes_along(tiny_folder, tiny_config, tmp_path, monkeypatch, capsys):
    root, config = tiny_folder(keys=4), tiny_config()
    arguments = ["--config", config, "--data_root", root, "--num_workers", 0]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    make_distance_maps_script.main()
    assert "4 distance maps made" in capsys.readouterr().out
    set_keys = "--set", "data.labels=null", "--set", "data.edges=file"
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), *set_keys])
    with pytest.raises(ConfigError, match=r"data\.labels is null, and distances are those within label maps"):
        make_distance_maps_script.main()
    manifest = build_dataset(root, tmp_path / "out", LABELS)
    assert "distances" in manifest["data_types"]
    folder, store = (LabelMapDataset(r, LABELS, distances=True) for r in (root, tmp_path / "out"))
    assert all(torch.equal(folder[i].distances, store[i].distances) for i in range(4))


def test_an_incomplete_folder_of_maps_is_left_out_of_the_lmdb_and_a_wrong_size_is_a_problem(
    tiny_folder, tmp_path, capsys
):
    root = tiny_folder(keys=3)
    make_distance_maps(root, LABELS)
    wrong = encode_distances(np.zeros((2, 3, 4), np.float32))
    (root / "distances/0001.npy").write_bytes(wrong)
    with pytest.raises(DataError, match=r"0001\.npy is 3 x 4 .*must be of one size"):
        build_dataset(root, tmp_path / "out", LABELS)
    (root / "distances/0001.npy").write_bytes(encode_distances(np.full((2, 40, 56), np.nan, np.float32)))
    with pytest.raises(DataError, match=r"0001\.npy: a distance map with values that are not finite"):
        build_dataset(root, tmp_path / "out", LABELS)
    (root / "distances/0001.npy").unlink()
    assert "distances" not in build_dataset(root, tmp_path / "out", LABELS)["data_types"]
    assert "lacks some samples: left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the pipeline

CROPPED = AugmentationConfig(random_scale_limit=0.5, random_crop_h_w=(24, 32), horizontal_flip=True)


def test_samples_have_the_distances_of_their_augmented_label_map(tiny_folder):
    data = LabelMapDataset(tiny_folder(), LABELS, distances=True, augmentations=CROPPED)
    samples = [data[i, position] for i in range(6) for position in (i, i + 6)]
    for sample in samples:
        np.testing.assert_array_equal(sample.distances, class_distances(sample.labels.numpy()))
    batch = Batch.collate(data.spec, samples)
    assert batch.layout.distances.shape == (12, 2, 24, 32) and batch.layout.distances.dtype == torch.float32
    assert any(t is batch.layout.distances for t in batch.tensors())
    torch.testing.assert_close(list(batch.split(2))[1].layout.distances, batch.layout.distances[6:])
    loaded = next(sequential_batches(data, [3, 4], 2, num_workers=1))
    assert torch.equal(loaded.layout.distances[1], data[4].distances)


def test_stored_distances_follow_the_geometry_and_a_mirror_turns_the_sign_of_the_columns(tiny_folder):
    root = tiny_folder()
    whole = LabelMapDataset(root, LABELS, distances=True)[0].distances
    make_distance_maps(root, LABELS)
    mirrored = AugmentationConfig(horizontal_flip=True)
    data = LabelMapDataset(root, LABELS, distances=True, augmentations=mirrored)
    upright = LabelMapDataset(root, LABELS)[0]
    seen = set()
    for position in range(8):
        sample = data[0, position]
        flipped = not torch.equal(sample.labels, upright.labels)
        seen.add(flipped)
        expected = whole.flip(2) * torch.tensor([1.0, -1.0])[:, None, None] if flipped else whole
        torch.testing.assert_close(sample.distances, expected, atol=0.0006, rtol=0)
    assert seen == {True, False}
    # Cut and enlarged as the labels are: a region's sign changes stay on its pixels.
    cut = LabelMapDataset(root, LABELS, distances=True, augmentations=CROPPED)[0, 3]
    assert cut.distances.shape == (2, 24, 32) and cut.distances.dtype == torch.float32


def test_distances_of_another_size_or_missing_are_computed_and_that_is_said_once(tiny_folder):
    root = tiny_folder()
    make_distance_maps(root, LABELS)
    for name in ("0002", "0004"):
        (root / f"distances/{name}.npy").write_bytes(encode_distances(np.zeros((2, 3, 4), np.float32)))
    data = LabelMapDataset(root, LABELS, distances=True)
    with pytest.warns(UserWarning, match=r"0002\.npy is 3 x 4 .*computed instead") as caught:
        samples = [data[i] for i in range(6)]
    assert len(caught) == 1
    for i in (2, 4):
        np.testing.assert_array_equal(samples[i].distances, class_distances(samples[i].labels.numpy()))
    (root / "distances/0003.npy").unlink()
    with pytest.warns(UserWarning, match="does not have every sample, so all are computed"):
        data = LabelMapDataset(root, LABELS, distances=True)
    np.testing.assert_array_equal(data[0].distances, class_distances(data[0].labels.numpy()))
    assert LabelMapDataset(root, LABELS)[0].distances is None
    (root / "distances/0003.npy").write_bytes(encode_distances(np.full((2, 40, 56), np.inf, np.float32)))
    with pytest.raises(DataError, match=r"0003\.npy: a distance map with values that are not finite"):
        LabelMapDataset(root, LABELS, distances=True)[3]


# ------------------------------------------------------------------------------------------------ the generator


@pytest.fixture
def icpe_config(tiny_folder, tmp_path):
    """A run with the norm and nothing else said about distances."""
    tree = {
        "gen": {"type": "spade", "num_filters": 2, "norm": {"type": "clade_icpe"}},
        "dis": {"type": "multiscale_patch", "num_filters": 2},
        "losses": {"gan": 1.0},
        "gen_opt": {"lr": 1e-4},
        "dis_opt": {"lr": 1e-4},
        "trainer": {"max_iterations": 2, "log_every": 1, "image_every": 1},
        "data": {
            "labels": {"num_classes": 5, "ignore": [255]},
            "num_workers": 0,
            "train": {
                "roots": [str(tiny_folder(size=(70, 70)))],
                "batch_size": 2,
                "augmentations": {"random_crop_h_w": [64, 64], "horizontal_flip": True},
            },
        },
    }
    path = tmp_path / "icpe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_the_norm_alone_decides_whether_layouts_have_distances(icpe_config):
    config = load_config(icpe_config)
    assert layout_spec(config).has_distances and build_split(config, config.data.train)[0].distances is not None
    plain = load_config(icpe_config, ["gen.norm={type: clade}"])
    assert not layout_spec(plain).has_distances and build_split(plain, plain.data.train)[0].distances is None


def test_label_maps_of_any_size_are_padded_after_their_distances_are_known(icpe_config):
    config = load_config(icpe_config)
    generator = build_generator(config).eval()
    model = Model(generator, None, config, 0, "raw", torch.device("cpu"))
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 6, (40, 50), dtype=np.uint8))
    given = torch.rand(2, 40, 50)
    layout = pad_to_layout(model, [Request("a", labels), Request("b", labels, distances=given)])
    assert layout.distances.shape == (2, 2, 64, 64)
    np.testing.assert_array_equal(layout.distances[0, :, :40, :50], class_distances(labels.numpy()))
    assert torch.equal(layout.distances[1, :, :40, :50], given)
    assert not layout.distances[:, :, 40:].any() and not layout.distances[..., 50:].any()


@pytest.mark.parametrize("value", [3, 255, 6], ids=["one class", "don't care", "wrong id"])
def test_training_and_inference_on_label_maps_of_one_value(icpe_config, tmp_path, value):
    label_maps = tmp_path / "raw/seg_maps"
    for path in label_maps.iterdir():
        write_png(path, np.full((70, 70), value, np.uint8))
    config = load_config(icpe_config)

    def train():
        run = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"), None)
        loop.train(run, tmp_path / "log", None)

    if value == 6:  # an id beyond the norms' tables never reaches them
        with pytest.raises(LabelError, match=r"label value\(s\) 6 outside the table \(num_classes: 5\)"):
            train()
        return
    train()
    model = Model.load(newest_checkpoint(tmp_path / "log"), for_inference=False)
    data = LabelMapDataset(label_maps, config.data.labels, distances=True, with_images=False)
    report = generate_folder(model, data, tmp_path / "images", FolderOptions(gallery=False))
    assert report.images == 6
    assert cv2.imread(str(tmp_path / "images/0000.png")).shape == (70, 70, 3)


# ------------------------------------------------------------------------------------------------ CLADE's checkpoints


def test_an_imported_checkpoint_knows_which_id_had_no_position(shared_dir, icpe_config, tmp_path):
    folder = shared_dir / "parity/clade_icpe_g"
    hyper = json.loads((folder / "config.json").read_text())["hyper"]
    weights = load_file(folder / "weights.safetensors")
    config = architecture_config("clade", hyper, None)
    assert layout_spec(config).has_distances and config.gen.args["norm"].args["skip_ids"] == (0,)
    content, _ = import_checkpoint("clade", config, {"generator": weights})
    exported = export_files("clade", content, config, "raw")
    assert [{k: v.shape for k, v in file.items()} for file in exported.values()] == [
        {k: v.shape for k, v in weights.items()}
    ]
    # Whatever our label maps hold: CLADE read ids as channels. What the architecture states is kept.
    counted_from_1 = {"num_classes": 5, "ignore": [0], "remap": {i + 1: i for i in range(5)}}
    base = load_config(icpe_config, [f"data.labels={counted_from_1}", "data.edges=labels"])
    for stated, expected in (({}, [0]), ({"skip_ids": []}, [])):
        made = architecture_config("clade", hyper | stated, base)
        assert made.gen.args["norm"].args["skip_ids"] == tuple(expected)


@pytest.mark.parametrize("dataset", ["ade20k", "coco"])
def test_translated_options_say_which_id_had_no_position(tmp_path, dataset):
    options = {"norm_mode": "clade", "add_dist": True, "label_nc": 150, "contain_dontcare_label": True,
               "no_instance": True, "dataset_mode": dataset, "batchSize": 1}  # fmt: skip
    path = tmp_path / "opt.txt"
    path.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    translated, _ = import_config("clade", path)
    norm = yaml.safe_load(translated)["gen"]["norm"]
    assert norm == {"type": "clade_icpe", "normalization": "batch", "skip_ids": [0]}
