"""A built data set looked at: counts, damage named, pictures, a sample taken out; edge maps drawn."""

import sys

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY

from imaginaire_spade.data.build import build_dataset
from imaginaire_spade.data.decode import decode_edges, decode_instances, decode_label
from imaginaire_spade.data.edge_maps import make_edge_maps
from imaginaire_spade.data.inspection import extract, look_through, stored_labels
from imaginaire_spade.data.transforms import edges_from_ids
from imaginaire_spade.errors import DataError
from imaginaire_spade.labels import LabelSpec

sys.path.insert(0, str(REPOSITORY / "scripts"))
import inspect_lmdb

LABELS = LabelSpec(num_classes=5, remap={77: 1}, ignore=(255,))


def test_contents_agree_with_the_manifest(tiny_folder, tmp_path):
    manifest = build_dataset(tiny_folder(keys=6), tmp_path / "out", LABELS, num_shards=2, num_workers=0)
    assert stored_labels(tmp_path / "out") == LABELS
    contents = look_through(tmp_path / "out", LABELS, 0)
    assert contents.problems == () and contents.num_samples == 6
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
    problems = look_through(tmp_path / "out", LABELS, 0).problems
    assert any("shard_00001/images/data.mdb: its checksum differs" in problem for problem in problems)
    damaged.write_bytes(content[: len(content) // 2])
    problems = look_through(tmp_path / "out", LABELS, 0).problems
    assert any("shard_00001/images/data.mdb: cut off" in problem for problem in problems)


def test_imaginaires_is_looked_through_as_well(shared_dir):
    contents = look_through(shared_dir / "parity/imaginaire_lmdb/lmdb", LabelSpec(num_classes=183, ignore=(255,)), 0)
    assert contents.problems == () and contents.num_samples == 3 and set(contents.num_bytes) >= {"images", "seg_maps"}


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
