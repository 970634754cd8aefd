"""A built data set looked at: counts, damage named, pictures, a sample taken out; edge maps drawn."""

import contextlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, write_png

from imaginaire_spade.commands import inspect_lmdb
from imaginaire_spade.data.distances import class_distances, encode_distances
from imaginaire_spade.data.folders import DATA_TYPES, FolderSource
from imaginaire_spade.data.image_files import decode_edges, decode_instances, decode_label
from imaginaire_spade.data.lmdb_source import open_source, store_key
from imaginaire_spade.dataset_prep.maps import make_edge_maps
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec, edges_from_ids
from imaginaire_spade.lmdb_builder.build import build_dataset, extract, look_through, stored_labels
from imaginaire_spade.lmdb_builder.shard import EnvironmentWriter, write_index

LABELS = LabelSpec(num_classes=5, remap={77: 1}, ignore=(255,))


def test_contents_agree_with_the_manifest(tiny_folder, tmp_path):
    manifest = build_dataset(tiny_folder(keys=6), tmp_path / "out", LABELS, num_shards=2, num_workers=0)
    assert stored_labels(tmp_path / "out") == LABELS
    contents = look_through(tmp_path / "out", LABELS, 0)
    assert contents.problems == [] and contents.num_samples == 6
    assert [contents.class_pixels[i] for i in range(6)] == manifest["class_pixels"]
    assert [contents.class_samples[i] for i in range(6)] == manifest["class_samples"]
    assert contents.num_bytes == {t: entry["bytes"] for t, entry in manifest["data_types"].items()}
    assert dict(contents.sizes) == manifest["sizes_h_w"]
    assert sum(manifest["class_shares"]) == pytest.approx(1, abs=1e-5)


def test_a_flipped_byte_is_found_and_named(tiny_folder, tmp_path):
    build_dataset(tiny_folder(keys=4), tmp_path / "out", LABELS, num_shards=2, num_workers=0)
    damaged = tmp_path / "out/shard_00001/images/data.mdb"
    content = bytearray(damaged.read_bytes())
    content[content.find(b"\xff\xd8\xff") + 400] ^= 1
    damaged.write_bytes(content)
    problems = [*map(str, look_through(tmp_path / "out", LABELS, 0).problems)]
    assert any("shard_00001/images/data.mdb: its checksum differs" in problem for problem in problems)
    damaged.write_bytes(content[: len(content) // 2])
    [problem] = map(str, look_through(tmp_path / "out", LABELS, 0).problems)  # (nothing is mapped)
    assert "shard_00001/images/data.mdb: its checksum differs" in problem
    with pytest.raises(DataError, match=r"shard_00001/images/data\.mdb: cut off or replaced"):
        open_source(tmp_path / "out", ["images"])


def store_unchecked(root: Path, output: Path) -> None:
    """The LMDB of a raw folder, byte for byte, whatever its files hold."""
    source = FolderSource(root, DATA_TYPES)
    for data_type in DATA_TYPES:
        with contextlib.closing(EnvironmentWriter(output / data_type)) as writer:
            for key in source.keys:
                writer.put(store_key(key), source.read(key, data_type))
            writer.finish(len(source.keys))
    write_index(output, source.keys, {t: {key: source.extension(key, t) for key in source.keys} for t in DATA_TYPES})


def distance_map(value: float, size: tuple[int, int] = (40, 56)) -> bytes:
    distances = class_distances(np.zeros(size, np.uint8))
    distances[1, 3, 4] = value
    return encode_distances(distances)


def written_png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


DAMAGE = {
    "a distance map with NaN": ("distances", distance_map(np.nan)),
    "a distance map with infinity": ("distances", distance_map(-np.inf)),
    "a distance map of another size": ("distances", distance_map(0, (20, 28))),
    "a distance map cut off": ("distances", distance_map(0)[:-2]),
    "a distance map of integers": ("distances", b"\x93NUMPY\x01\x00"),
    "a label outside the table": ("seg_maps", written_png(np.full((40, 56), 9, np.uint8))),
    "a label map in colour": ("seg_maps", written_png(np.zeros((40, 56, 3), np.uint8))),
    "a label map with alpha": ("seg_maps", written_png(np.zeros((40, 56, 4), np.uint8))),
    "a label map of another size": ("seg_maps", written_png(np.zeros((20, 28), np.uint8))),
    "a label map as JPEG": ("seg_maps", cv2.imencode(".jpg", np.zeros((40, 56), np.uint8))[1].tobytes()),
    "a label map that is empty": ("seg_maps", b""),
    "a photo that is empty": ("images", b""),
    "a photo cut off": ("images", cv2.imencode(".jpg", np.zeros((40, 56, 3), np.uint8))[1].tobytes()[:-20]),
    "a photo of another size": ("images", cv2.imencode(".jpg", np.zeros((20, 28, 3), np.uint8))[1].tobytes()),
    "a photo that is text": ("images", b"no photo at all"),
    "an edge map of another size": ("edge_maps", written_png(np.zeros((56, 40), np.uint8))),
    "an edge map that is text": ("edge_maps", b"no edges at all"),
    "an edge map that is empty": ("edge_maps", b""),
    "an instance map as JPEG": ("inst_maps", cv2.imencode(".jpg", np.zeros((40, 56), np.uint8))[1].tobytes()),
    "an instance map that is empty": ("inst_maps", b""),
    "distances that are empty": ("distances", b""),
}


@pytest.mark.parametrize("damage", [None, *DAMAGE])
def test_what_the_builder_refuses_verify_refuses_in_the_same_words(damage, tiny_folder, tmp_path):
    root = tiny_folder(keys=2)
    for key in ("0000", "0001"):
        path = root / "distances" / f"{key}.npy"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(distance_map(0))
    if damage:
        data_type, content = DAMAGE[damage]
        next((root / data_type).glob("0001.*")).write_bytes(content)
    store_unchecked(root, tmp_path / "stored")
    problems = [*map(str, look_through(tmp_path / "stored", LABELS, 0).problems)]
    if not damage:
        assert build_dataset(root, tmp_path / "built", LABELS, num_workers=0)
        assert problems == []
        return
    with pytest.raises(DataError) as refused:
        build_dataset(root, tmp_path / "built", LABELS, num_workers=0)
    listed = str(refused.value).partition("\n  ")[2].split("\n  ")
    for data_type in DATA_TYPES:  # what the two call a sample
        path = next((root / data_type).glob("0001.*"))
        listed = [line.replace(str(path), f"{tmp_path / 'stored'}/{data_type} key ./0001") for line in listed]
    assert problems == listed


def test_imaginaires_is_looked_through_as_well(shared_dir):
    contents = look_through(shared_dir / "parity/imaginaire_lmdb/lmdb", LabelSpec(num_classes=183, ignore=(255,)), 0)
    assert contents.problems == [] and contents.num_samples == 3 and set(contents.num_bytes) >= {"images", "seg_maps"}


def test_a_sample_comes_out_as_it_went_in(tiny_folder, tmp_path):
    root = tiny_folder(keys=["a", "s/b"])
    build_dataset(root, tmp_path / "out", LABELS, num_workers=0)
    written = extract(tmp_path / "out", "s/b", tmp_path / "taken")
    assert len(written) == 4
    for path in written:
        assert path.read_bytes() == (root / path.relative_to(tmp_path / "taken")).read_bytes()
    with pytest.raises(DataError, match="no sample 'b'; keys look like: a, s/b"):
        extract(tmp_path / "out", "b", tmp_path)


def test_the_command_draws_and_verifies(tiny_folder, tmp_path, monkeypatch, capsys):
    build_dataset(tiny_folder(keys=3), tmp_path / "out", LABELS, num_workers=0)
    pictures = ["--legend", tmp_path / "legend.png", "--contact_sheet", tmp_path / "sheet.png"]
    monkeypatch.setattr(sys, "argv", list(map(str, ["x", tmp_path / "out", "--verify", "--num_workers", 0, *pictures])))
    inspect_lmdb.main()
    printed = capsys.readouterr().out
    assert "3 samples of images" in printed and "everything decodes, checksums agree" in printed
    legend = cv2.imread(str(tmp_path / "legend.png"))[..., ::-1]
    assert all((legend == colour).all(2).sum() > 100 for colour in LABELS.colours[:5])
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[0] > 3 * 40


def test_a_raw_folder_is_looked_through_as_well(tiny_folder, tmp_path, commands):
    root = tiny_folder(keys=3)
    (root / "seg_maps/0001.png").write_bytes(written_png(np.full((40, 56), 77, np.uint8)))
    result = commands.run("scripts/inspect_lmdb.py", root, "--extract", "0002", "--output_dir", tmp_path)
    assert result.returncode == 0 and (tmp_path / "images/0002.jpg").is_file(), result.stderr
    config = REPOSITORY / "configs/projects/spade/sample/small64.yaml"
    result = commands.run("scripts/inspect_lmdb.py", root, "--verify", "--config", config)
    assert result.returncode == 2
    assert result.stdout.startswith(f"3 samples of images, seg_maps, edge_maps, inst_maps: {root}")
    assert "1 problem(s)" in result.stderr and "0001.png: label value(s) 77 outside the table" in result.stderr


@pytest.mark.parametrize("of", ["instances", "labels", "both"])
def test_edge_maps_are_the_borders(tiny_folder, of):
    root = tiny_folder(keys=3, types=("images", "seg_maps", "inst_maps"))
    instances = decode_instances((root / "inst_maps/0000.png").read_bytes(), "x")
    labels = decode_label((root / "seg_maps/0000.png").read_bytes(), "x").copy()
    labels[5, 5] = 4 - labels[5, 5] + 1
    cv2.imwrite(str(root / "seg_maps/0000.png"), labels)
    expected = {"instances": edges_from_ids(instances), "labels": edges_from_ids(labels)}
    expected["both"] = np.maximum(expected["instances"], expected["labels"])
    assert [make_edge_maps(root, of, num_workers=0, rank=r, world_size=2) for r in (0, 1)] == [(2, 0), (1, 0)]
    assert np.array_equal(decode_edges((root / "edge_maps/0000.png").read_bytes(), "x"), expected[of])
    assert make_edge_maps(root, of, num_workers=0) == (0, 3)
    for command in (lambda: make_edge_maps(root, of, num_workers=-1), lambda: look_through(root, None, -1)):
        with pytest.raises(DataError, match=r"--num_workers -1: write at least 0"):
            command()


def test_a_plain_folder_is_read_as_the_config_says(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        write_png(tmp_path / f"raw/images/{name}.png", np.full((16, 16), 900, np.uint16))
        write_png(tmp_path / f"raw/seg_maps/{name}_mask.png", np.zeros((16, 16), np.uint8))
    (tmp_path / "c.yaml").write_text(
        "data: {labels: {num_classes: 2}, suffixes: {seg_maps: _mask}, images: {channels: 1, range: auto}}"
    )
    told = ["inspect_lmdb.py", tmp_path / "raw", "--config", tmp_path / "c.yaml", "--verify", "--num_workers", "0"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in told])
    inspect_lmdb.main()
    assert "read 2 samples" in (printed := capsys.readouterr().out) and "everything decodes" in printed
