"""The painter of sample scenes and the writer of the sample data set."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from imaginaire_spade import scenes
from imaginaire_spade.scenes import CLASSES, Scene, draw_scene, edge_map, write_sample_data

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_sample_data.py"


def assert_valid(scene: Scene, height: int, width: int) -> None:
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    for ids, dtype in ((scene.labels, np.uint8), (scene.instances, np.uint16), (scene.edges, np.uint8)):
        assert ids.shape == (height, width)
        assert ids.dtype == dtype
    assert scene.labels.max() < len(CLASSES)
    assert set(np.unique(scene.edges)) <= {0, 255}


def plain_edges(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """`edge_map`, pixel by pixel."""
    height, width = labels.shape
    edges = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= ny < height and 0 <= nx < width
                if inside and (labels[y, x], instances[y, x]) != (labels[ny, nx], instances[ny, nx]):
                    edges[y, x] = 255
    return edges


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [draw_scene(3, index, 40, 48) for index in range(200)]


def test_a_scene_is_a_function_of_seed_and_index():
    one, again = draw_scene(1, 2, 64, 80), draw_scene(1, 2, 64, 80)
    for name in ("image", "labels", "instances", "edges"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert (draw_scene(1, 3, 64, 80).image != one.image).any()
    assert (draw_scene(2, 2, 64, 80).image != one.image).any()


@settings(max_examples=12, deadline=None)
@given(height=st.integers(32, 200), width=st.integers(32, 200), index=st.integers(0, 10_000))
def test_every_size_can_be_drawn(height, width, index):
    assert_valid(draw_scene(0, index, height, width), height, width)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 400), (400, 32), (256, 512)])
def test_extreme_shapes_can_be_drawn(height, width):
    for index in range(3):
        assert_valid(draw_scene(0, index, height, width), height, width)


def test_a_smaller_scene_is_refused():
    with pytest.raises(ValueError, match="at least 32"):
        draw_scene(0, 0, 31, 64)


def test_every_class_occurs_often(many):
    share = np.mean([[np.any(scene.labels == label) for label in range(len(CLASSES))] for scene in many], axis=0)
    assert dict(zip((name for name, _ in CLASSES), share > 0.25, strict=True)) == {name: True for name, _ in CLASSES}


def test_classes_match_the_label_table():
    table = yaml.safe_load((SCRIPT.parents[1] / "configs" / "labels" / "sample.yaml").read_text(encoding="utf-8"))
    labels = table["data"]["labels"]
    assert labels["num_classes"] == len(CLASSES)
    assert list(zip(labels["names"], map(tuple, labels["palette"]), strict=True)) == list(CLASSES)


def test_instances_tell_things_from_stuff(many):
    stuff = [scenes.SKY, scenes.MOUNTAIN, scenes.GRASS, scenes.WATER, scenes.ROAD]
    for scene in many:
        np.testing.assert_array_equal(scene.instances == 0, np.isin(scene.labels, stuff))
        for instance in np.unique(scene.instances[scene.instances > 0]):
            parts = set(np.unique(scene.labels[scene.instances == instance]).tolist())
            assert len(parts) == 1 or parts <= {scenes.HOUSE, scenes.ROOF, scenes.WINDOW}


def test_edges_equal_a_plain_computation(many):
    for scene in many[:4]:
        np.testing.assert_array_equal(scene.edges, plain_edges(scene.labels, scene.instances))
    labels, instances = np.zeros((3, 4), np.uint8), np.zeros((3, 4), np.uint16)
    instances[1, 1] = 300
    assert (edge_map(labels, instances) > 0).astype(int).tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]


def test_pictures_are_not_flat(many):
    for scene in many[:60]:
        for label in np.unique(scene.labels):
            region = scene.image[scene.labels == label].astype(float)
            if len(region) > 150:
                assert region.std(axis=0).max() > 2.0, CLASSES[label][0]


def test_classes_can_be_told_by_colour(many):
    def mean(label: int) -> np.ndarray:
        return np.concatenate([scene.image[scene.labels == label] for scene in many]).mean(axis=0)

    sky, grass, tree, sun = mean(scenes.SKY), mean(scenes.GRASS), mean(scenes.TREE), mean(scenes.SUN)
    assert sky[2] > sky[0]
    assert grass[1] > grass[2] + 20
    assert tree.mean() < grass.mean()
    assert sun.mean() > sky.mean() + 30


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "one"
    write_sample_data(root, 5, 2, 32, 48, 7, 0)
    return root


def test_files_do_not_depend_on_the_number_of_workers(written, tmp_path):
    write_sample_data(tmp_path / "two", 5, 2, 32, 48, 7, 2)
    assert files_of(written) == files_of(tmp_path / "two")


def test_written_files_hold_the_scene(written):
    names = {path.name.partition(".")[0] for path in (written / "train").rglob("*.*")}
    assert names == {f"scene_{index:05d}" for index in range(5)}
    assert {path.stem for path in (written / "val" / "images").iterdir()} == {"scene_00005", "scene_00006"}
    assert len(files_of(written)) == 4 * 7
    scene = draw_scene(7, 6, 32, 48)
    for folder, expected in (
        ("seg_maps", scene.labels), ("inst_maps", scene.instances), ("edge_maps", scene.edges),
    ):  # fmt: skip
        stored = cv2.imread(str(written / "val" / folder / "scene_00006.png"), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == expected.dtype
        np.testing.assert_array_equal(stored, expected)
    photo = cv2.imread(str(written / "val" / "images" / "scene_00006.jpg"))[..., ::-1]
    assert np.abs(photo.astype(int) - scene.image).mean() < 6


def test_instance_ids_above_255_survive(tmp_path, monkeypatch):
    crafted = Scene(
        image=np.zeros((32, 32, 3), np.uint8),
        labels=np.full((32, 32), scenes.TREE, np.uint8),
        instances=np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64,
        edges=np.zeros((32, 32), np.uint8),
    )
    monkeypatch.setattr(scenes.files, "draw_scene", lambda *_: crafted)
    write_sample_data(tmp_path, 1, 0, 32, 32, 0, 0)
    stored = cv2.imread(str(tmp_path / "train" / "inst_maps" / "scene_00000.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored, crafted.instances)


def arguments_for(root: Path) -> list[str]:
    values = {"num_train": 5, "num_val": 2, "height": 32, "width": 48, "seed": 7, "num_workers": 1}
    return ["--output_root", str(root), *(part for key, value in values.items() for part in (f"--{key}", str(value)))]


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The script in this process, which has torch imported already."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_command_refuses_a_folder_that_is_not_empty(written, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    (root / "note.txt").write_text("kept", encoding="utf-8")
    (root / "train" / "old.txt").write_text("replaced", encoding="utf-8")
    with pytest.raises(SystemExit) as refused:
        run_here(monkeypatch, *arguments_for(root))
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert str(root) in message
    assert "--overwrite" in message
    assert set(files_of(root)) == {"note.txt", "train/old.txt"}
    run_here(monkeypatch, *arguments_for(root), "--overwrite")
    assert files_of(root) == {**files_of(written), "note.txt": b"kept"}


def test_the_command_names_a_bad_argument(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        run_here(monkeypatch, *arguments_for(tmp_path / "new"), "--height", "8")
    assert refused.value.code == 2
    assert "--height 8" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
