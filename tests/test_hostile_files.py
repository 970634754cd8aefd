"""Files of strangers, or damaged ones: each is one short message. (What a config may hold: test_config.py; checkpoints:
test_training.py and test_published.py; images: test_images.py.)"""

import io
import json
import os
import random
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import download_test_data
import numpy as np
import pytest

from imaginaire_spade.dataset_prep.annotations import paint
from imaginaire_spade.dataset_prep.archives import unpack
from imaginaire_spade.dataset_prep.coco import _coco_mask
from imaginaire_spade.dataset_prep.prepare import _read_objects
from imaginaire_spade.errors import DataError, UserError, run_command_line
from imaginaire_spade.evaluation.collection import Collection
from imaginaire_spade.evaluation.report import Protocol, Report, compare
from imaginaire_spade.inference.output import check_apart
from imaginaire_spade.inference.synthesis import read_style_image
from imaginaire_spade.lmdb_builder.output import check_output


def npy(array: np.ndarray) -> bytes:
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


def write_statistics(path: Path, **arrays: bytes) -> Path:
    """Write an .npz of files that need not be arrays."""
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in arrays.items():
            packed.writestr(f"{name}.npy", content)
    return path


ORIGIN = {"description": {"count": 9, "size": "8x8", "format": "png", "digest": "0"}, "warnings": []}
DAMAGED = {
    "brackets left open": {"sigma": npy(np.eye(8)).replace(b"(8, 8)", b"((((((")},
    "a size that memory does not hold": {"sigma": npy(np.eye(8)).replace(b"(8, 8), }    ", b"(8, 10**15), }")},
    "text for numbers": {"sigma": npy(np.full((8, 8), "x"))},
    "complex numbers": {"sigma": npy(np.eye(8) * 1j)},
    "objects": {"mu": npy(np.zeros(8)).replace(b"'<f8'", b"'|O' ")},
    "origin is no JSON": {"origin": npy(np.array("{"))},
    "origin is a list": {"origin": npy(np.array("[1]"))},
    "count is text": {"origin": npy(np.array(json.dumps({"description": {**ORIGIN["description"], "count": "x"}})))},
    "features of one axis": {"features": npy(np.zeros(8, np.float32))},
    "features that are not finite": {"features": npy(np.full((9, 8), np.nan, np.float32))},
    "counts of another shape": {"confusion_counts": npy(np.zeros((2, 2), np.int64))},
    "counts below 0": {"confusion_counts": npy(np.full((2, 3), -1))},
}  # fmt: skip


def test_damaged_statistics_are_one_message(tmp_path):
    sound = {"mu": npy(np.zeros(8)), "sigma": npy(np.eye(8)), "origin": npy(np.array(json.dumps(ORIGIN)))}
    sound |= {f"confusion_{name}": npy(np.array(3)) for name in ("ignored", "images")}
    assert Collection.load(write_statistics(tmp_path / "s.npz", **sound)).count == 9
    for name, damage in DAMAGED.items():
        with pytest.raises(DataError):
            Collection.load(write_statistics(tmp_path / "s.npz", **{**sound, **damage}))
            pytest.fail(f"{name}: accepted")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("mu.npy", bytes(10**6))
    bomb = (tmp_path / "bomb.npz").read_bytes()
    size = (10**6).to_bytes(4, "little")
    (tmp_path / "bomb.npz").write_bytes(bomb.replace(size, b"\xff\xff\xff\xf0"))
    (tmp_path / "s.npz").write_bytes(b"")
    for path in (tmp_path / "s.npz", tmp_path / "bomb.npz"):
        with pytest.raises(DataError):
            Collection.load(path)


def test_a_score_that_is_no_number_gets_no_verdict(tmp_path):
    protocol = Protocol("0", "val", "0", 9, 9, "8x8", "8x8", "png", "png")
    for name, score in (("a", float("nan")), ("b", 1.0), ("c", 2.0)):
        Report({"fid": score}, protocol, {}).save(tmp_path / f"{name}.json")
    assert "no verdict: not a number" in compare((tmp_path / "a.json", tmp_path / "b.json"))
    assert "the first is better" in compare((tmp_path / "b.json", tmp_path / "c.json"))
    tree = json.loads((tmp_path / "b.json").read_text())
    for change in ({"scores": {"fid": "x"}}, {"scores": [1]}, {"scores": {"fid": 10**400}}, {"protocol": 5}):
        (tmp_path / "d.json").write_text(json.dumps(tree | change))
        with pytest.raises(UserError):
            compare((tmp_path / "b.json", tmp_path / "d.json"))


MODES = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA} | {
    mode: f"w:{mode}" for mode in ("gz", "bz2", "xz")
}


@pytest.mark.parametrize("mode", MODES)
def test_an_archive_with_a_flipped_bit_is_refused_or_unpacked_to_the_same(tmp_path, mode):
    body, stream = b"".join(b"%d line\n" % random.Random(n).randrange(10**6) for n in range(500)), io.BytesIO()
    if mode in ("gz", "bz2", "xz"):
        with tarfile.open(fileobj=stream, mode=MODES[mode]) as tar:
            info = tarfile.TarInfo("f")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    else:
        with zipfile.ZipFile(stream, "w", MODES[mode]) as packed:
            packed.writestr("f", body)
    refused = 0
    for seed in range(30):
        data = bytearray(stream.getvalue())
        data[random.Random(seed).randrange(80, len(data) - 60)] ^= 4
        (tmp_path / "a").write_bytes(data)
        try:
            unpack(tmp_path / "a", tmp_path / f"out{seed}")
        except DataError:
            refused += 1
        else:
            assert (tmp_path / f"out{seed}/f").read_bytes() == body
    assert refused > 5
    assert not list(tmp_path.rglob(".partial-*"))


AREAS = [{"area": value} for value in ([1], None, "x")]


@pytest.mark.parametrize("change", [*AREAS, {"image_id": []}, {"segmentation": 5}])
def test_instances_of_other_types_are_one_message(tmp_path, change):
    image = {"id": 1, "file_name": "a.jpg", "height": 8, "width": 8}
    note = {"id": 1, "image_id": 1, "category_id": 1, "area": 1.0, "segmentation": [[1, 1, 5, 1, 5, 5]]}
    tree = {"images": [image], "annotations": [note | change], "categories": []}
    (tmp_path / "i.json").write_text(json.dumps(tree))
    try:
        objects = _read_objects(tmp_path / "i.json")
    except UserError:
        return
    with pytest.raises(Exception):  # noqa: B017 (``paint`` names the annotation)
        [area() for _, _, _, area in objects["a"][1]]


FAR = [[[1, 1, 5, far, 5, 5]] for far in (2**32, -1e9, 1e300, float("nan"), 40)]
CODES = [{"size": [8, 8], "counts": counts} for counts in ([8, 8], [70], [-8, 72], [64.5], [], "03t1", "", "o" * 10**6)]


@pytest.mark.parametrize("shape", [*FAR, *CODES, {"size": [8, 2**40], "counts": [2**43]}, {"size": [8], "counts": [8]}])
def test_regions_that_pycocotools_dies_of_or_makes_up_are_refused(shape):
    """Far points end the process (a segmentation fault); of too few run lengths the rest is what memory held."""
    with pytest.raises(DataError, match=r"here: unreadable|run length code"):
        paint([(1, "here", partial(_coco_mask, shape, 8, 8))], (8, 8), 0)


def test_run_length_codes_are_read_as_pycocotools_writes_them():
    mask = pytest.importorskip("pycocotools.mask", reason="the package pycocotools (extra data) is not installed")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        inside = rng.random((rng.integers(1, 90), rng.integers(1, 3000))) < rng.choice([0, 0.001, 0.5, 1])
        code = mask.encode(np.asfortranarray(inside.astype(np.uint8)))
        read = _coco_mask({**code, "counts": code["counts"].decode()}, *inside.shape)
        assert np.array_equal(read, inside)


def test_a_manifest_of_other_types_is_one_message(tmp_path):
    changes = ({"folder": "a\0b"}, {"url": "http://["}, {"url": "ftp://x/a"}, {"folder": 5}, {"url": []})
    for change in changes:
        archive = {"url": "http://127.0.0.1:9/a.zip", "sha256": "0" * 64, "folder": "x"} | change
        (tmp_path / "m.json").write_text(json.dumps({"spade": {"archives": [archive]}}))
        with pytest.raises(DataError):
            download_test_data.read_archives(tmp_path / "m.json", "spade")


def test_a_file_that_may_not_be_read_is_named(capsys):
    def refused() -> None:
        raise PermissionError(13, "Permission denied", "photos/1.jpg")

    def in_a_worker() -> None:
        raise PermissionError("Caught PermissionError in DataLoader worker\nPermissionError: [Errno 13] no: 'a.png'")

    for main, named in ((refused, "photos/1.jpg: Permission denied"), (in_a_worker, "'a.png'")):
        with pytest.raises(SystemExit) as ended:
            run_command_line(main)
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert named in message and "chmod" in message and message.count("\n") == 1


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Path.resolve goes no further there, and says nothing")
def test_a_link_to_itself_is_named(tmp_path, capsys):
    (loop := tmp_path / "loop").symlink_to(loop)
    for check in (lambda: check_apart(loop, ["maps"]), lambda: check_output(tmp_path, loop, False, False)):
        with pytest.raises(SystemExit):
            run_command_line(check)
        message = capsys.readouterr().err
        assert "loop': a link that leads to itself" in message and message.count("\n") == 1


def test_what_never_ends_is_no_style_image_and_no_report(tmp_path):
    os.mkfifo(path := tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: a named pipe"):
        read_style_image(Mock(), path)
    with pytest.raises(DataError, match="pipe: a named pipe"):
        compare((path, path))
