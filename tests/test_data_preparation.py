"""Official layouts -> raw folders or LMDBs, on miniature trees; archives fetched and unpacked."""

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from functools import partial
from pathlib import Path

import cv2
import download_test_data
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_jpg, write_png
from PIL import Image
from torchvision.models.segmentation import deeplabv3_resnet50

from imaginaire_spade.commands import prepare_dataset
from imaginaire_spade.config_files import load_labels
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_image, decode_instances, decode_label
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.dataset_prep.archives import unpack
from imaginaire_spade.dataset_prep.maps import label_photos, make_edge_maps
from imaginaire_spade.dataset_prep.prepare import DATASETS, Options, prepare
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.files import download as download_file
from imaginaire_spade.labels import edges_from_ids
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.pretrained.segmenters import Segmenter, deeplab_segmenter, hugging_face_segmenter

# ------------------------------------------------------------------------------------------------ data sets


def photo(path, size=(24, 32)):
    write_jpg(path, np.full((*size, 3), 90, np.uint8))


def ids(values, size=(24, 32)):
    return np.resize(np.repeat(np.asarray(values, np.uint8), 4), size)


def download(name, root):
    """A miniature of the unpacked official download, with its names and value ranges."""
    if name == "cocostuff":
        for split, numbers in (("train", (9, 25)), ("val", (139,))):
            for number in numbers:
                photo(root / f"{split}2017/{number:012d}.jpg")
                labels = root / f"stuffthingmaps_trainval2017/{split}2017/{number:012d}.png"
                write_png(labels, ids([0, 91, 181, 255]))
                panoptic = np.zeros((24, 32, 3), np.uint8)
                panoptic[:, 16:] = (7, 2, 1)
                write_png(root / f"annotations/panoptic_{split}2017/{number:012d}.png", panoptic)
            images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 24, "width": 32} for n in numbers]
            objects = [
                {"id": 7, "image_id": numbers[0], "area": 16, "iscrowd": 0, "category_id": 1,
                 "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]]},
                {"id": 8, "image_id": numbers[0], "area": 100, "iscrowd": 0, "category_id": 90,
                 "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10], [20, 10, 30, 10, 30, 20, 20, 20]]},
                {"id": 9, "image_id": numbers[0], "area": 48, "iscrowd": 1, "category_id": 1,
                 "segmentation": {"size": [24, 32], "counts": [720, 48]}},
            ]  # fmt: skip
            instances = {"images": images, "annotations": objects, "categories": []}
            (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(instances))
    elif name in ("ade20k", "ade20k_outdoor"):
        scenes = (("training", "ADE_train_00000001", "attic", [0, 1, 6, 150]),  # a ceiling
                  ("training", "ADE_train_00000002", "bedroom", [1, 3, 8]),  # sky behind a bed
                  ("training", "ADE_train_00000003", "beach", [0, 3, 22, 150]),
                  ("validation", "ADE_val_00000001", "beach", [17, 14]))  # fmt: skip
        root = root / "ADEChallengeData2016"
        for folder, key, _, values in scenes:
            photo(root / f"images/{folder}/{key}.jpg")
            write_png(root / f"annotations/{folder}/{key}.png", ids(values))
        (root / "sceneCategories.txt").write_text("".join(f"{key} {scene}\n" for _, key, scene, _ in scenes))
        root = root.parent
    elif name == "cityscapes":
        for split, city in (("train", "aachen"), ("val", "lindau")):
            stem = f"{city}/{city}_000000_000019"
            write_png(root / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", np.full((64, 128, 3), 9, np.uint8))
            write_png(root / f"gtFine/{split}/{stem}_gtFine_labelIds.png", ids([0, 7, 26, 33], (64, 128)))
            instances = ids([7, 26], (64, 128)).astype(np.uint16) * 1000 + 1
            write_png(root / f"gtFine/{split}/{stem}_gtFine_instanceIds.png", instances)
            write_png(root / f"gtFine/{split}/{stem}_gtFine_color.png", np.zeros((64, 128, 3), np.uint8))
    elif name == "camvid":
        for split in ("train", "val", "test"):
            write_png(root / split / "0001TP_006690.png", np.full((24, 32, 3), 9, np.uint8))
            write_png(root / f"{split}annot" / "0001TP_006690.png", ids([0, 10, 11]))
    elif name == "facades":
        for part, letter in (("base", "b"), ("extended", "x")):
            for number in range(3):
                photo(root / part / f"cmp_{letter}{number:04d}.jpg")
                palette = Image.fromarray(ids([1, 5, 12])).convert("P")
                palette.putpalette(list(range(192)))
                palette.save(root / part / f"cmp_{letter}{number:04d}.png")
                (root / part / f"cmp_{letter}{number:04d}.xml").write_text("<x/>")
    elif name == "landscapes":
        for number in range(5):
            photo(root / "some" / f"{number}.jpg")
    elif name == "celebamask_hq":
        root = root / "CelebAMask-HQ"
        for number in range(3):
            photo(root / f"CelebA-HQ-img/{number}.jpg", (64, 64))
            for part, rows in (("hair", (0, 200)), ("skin", (100, 512)), ("l_eye", (150, 250))):
                mask = np.zeros((512, 512, 3), np.uint8)
                mask[slice(*rows)] = 255
                write_png(root / f"CelebAMask-HQ-mask-anno/0/{number:05}_{part}.png", mask)
        root = root.parent
    elif name == "loveda":
        for split in ("Train", "Val"):
            for scene, number in (("Urban", 1366), ("Rural", 0)):
                write_png(root / split / scene / f"images_png/{number}.png", np.full((24, 32, 3), 9, np.uint8))
                write_png(root / split / scene / f"masks_png/{number}.png", ids([0, 1, 7]))
    elif name == "isprs":
        for tile in ("2_10", "2_11", "2_12", "9_99"):
            write_png(root / f"2_Ortho_RGB/top_potsdam_{tile}_RGB.png", np.full((24, 32, 3), 9, np.uint8))
            colours = np.array([[255, 255, 255], [0, 0, 255], [255, 255, 0], [0, 0, 0]], np.uint8)
            if tile != "9_99":  # tiles of the test have no labels
                write_png(root / f"5_Labels_all/top_potsdam_{tile}_label.png", colours[ids([0, 1, 2, 3])])
    elif name == "custom":
        for number in range(3):
            photo(root / "images" / f"{number}.jpg")
            write_png(root / "labels" / f"{number}.png", ids([0, 1]))
    return root


EXPECTED = {"cocostuff": (2, 1), "ade20k": (3, 1), "ade20k_outdoor": (1, 1), "cityscapes": (1, 1), "camvid": (1, 1),
            "facades": (4, 2), "landscapes": (4, 1), "custom": (2, 1), "celebamask_hq": (2, 1), "loveda": (2, 2),
            "isprs": (2, 1)}  # fmt: skip


@pytest.mark.parametrize("name", list(DATASETS))
def test_official_download_becomes_a_data_set_that_its_table_reads(name, tmp_path):
    source, raw = download(name, tmp_path / "download"), tmp_path / "raw"
    options = Options(num_val={"facades": 2, "landscapes": 1, "custom": 1, "celebamask_hq": 1, "isprs": 1}.get(name, 0))
    counts = prepare(name, source, raw, options, num_workers=0)
    assert (counts["train"], counts["val"]) == EXPECTED[name]
    assert prepare(name, source, raw, options, num_workers=0, link=True) == counts  # all is there already
    if name == "landscapes":
        assert sorted(p.name for p in (raw / "train").iterdir()) == ["images"]
        return
    if name == "custom":
        assert FolderSource(raw / "train", ["images", "seg_maps"]).keys == ["1", "2"]
        return
    labels = load_labels(REPOSITORY / f"configs/labels/{name}.yaml")
    for split in ("train", "val"):
        assert build_dataset(raw / split, tmp_path / split, labels, num_workers=0)["num_samples"] == counts[split]
    store = open_source(tmp_path / "train", ["images", "seg_maps"])
    label = decode_label(store.read(store.keys[0], "seg_maps"), "x")
    if name == "cityscapes":
        assert store.keys == ["aachen/aachen_000000_000019"] and label.shape == (256, 512)
        assert set(np.unique(label)) == {0, 7, 26, 33}
        assert set(np.unique(decode_instances(store.read(store.keys[0], "inst_maps"), "x"))) == {7001, 26001}
    if name == "camvid":
        assert set(np.unique(label)) == {0, 10, 255}
    if name == "cocostuff":
        instances = decode_instances(store.read(store.keys[0], "inst_maps"), "x")
        assert set(np.unique(instances)) == {0, 7 + 2 * 256 + 65536}
        assert set(np.unique(label)) == {0, 91, 181, 255}
        make_edge_maps(raw / "val", "both", num_workers=0)
        edges = cv2.imread(str(raw / "val/edge_maps/000000000139.png"), cv2.IMREAD_UNCHANGED)
        assert edges[:, 15:17].all() and edges[0, 3] and not edges[0, 1]
    if name == "celebamask_hq":  # hair lies upon skin and eyes, as the authors' later ids lie upon earlier ones
        assert label.shape == (512, 512) and label[::50, 0].tolist() == [13] * 4 + [4] + [1] * 6
        assert decode_image(store.read(store.keys[0], "images"), "x").shape == (512, 512, 3)
    if name == "loveda":
        assert store.keys == ["Rural/0", "Urban/1366"] and set(np.unique(label)) == {0, 1, 7}
    if name == "isprs":
        assert store.keys == ["top_potsdam_2_11", "top_potsdam_2_12"]
        assert np.unique(labels.to_train_ids(label, "x")).tolist() == [0, 1, 4, 6]
    if name == "facades":
        assert set(np.unique(label)) == {1, 5, 12}
    if name == "ade20k":
        assert set(np.unique(label)) == {0, 1, 6, 150}
    if name == "ade20k_outdoor":
        assert store.keys == ["ADE_train_00000003"]


def test_cocos_instances_become_numbers_above_the_label_ids(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools", reason="the package pycocotools (extra data) is not installed")
    source = download("cocostuff", tmp_path / "download")
    for split in ("train", "val"):
        shutil.rmtree(source / f"annotations/panoptic_{split}2017")
    prepare("cocostuff", source, tmp_path / "raw", Options(), num_workers=0)
    label = ids([0, 91, 181, 255]).astype(np.int32)
    assert np.array_equal(
        decode_instances((tmp_path / "raw/train/inst_maps/000000000025.png").read_bytes(), "x"), label
    )
    label[0:10, 0:10] = label[10:20, 20:30] = 257  # one object of two pieces
    label[2:6, 2:6] = 256  # a smaller one upon it
    columns = label.T.copy().reshape(-1)  # COCO counts down the columns
    columns[720:] = 258
    expected = columns.reshape(32, 24).T
    instances = decode_instances((tmp_path / "raw/val/inst_maps/000000000139.png").read_bytes(), "x")
    assert np.array_equal(instances, expected)
    # Their borders are those of objects and of stuff: the combined boundary map.
    make_edge_maps(tmp_path / "raw/val", "instances", num_workers=0)
    edges = cv2.imread(str(tmp_path / "raw/val/edge_maps/000000000139.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(edges > 0, edges_from_ids(expected) > 0) and edges[9, 5] and edges[22, 3]
    prepare("cocostuff", source, tmp_path / "small", Options(resize_h_w=(12, 16)), num_workers=0)
    small = decode_instances((tmp_path / "small/val/inst_maps/000000000139.png").read_bytes(), "x")
    assert np.array_equal(small, expected[1::2, 1::2])

    path = source / "annotations/instances_val2017.json"
    tree = json.loads(path.read_text())
    for change, message in (
        ({"images": []}, "annotation 7: its image_id 139 is not in the list of images"),
        ({"annotations": [{}]}, "no instances JSON of COCO"),
        ({"images": [], "annotations": []}, r"lists no image 000000000139\.jpg"),
        ({"images": [tree["images"][0] | {"file_name": "000000000140.jpg"}]}, r"lists no image 000000000139\.jpg"),
        ({"images": [tree["images"][0] | {"height": 25}]}, "says 8 bit, 25 x 32"),
        ({"annotations": [tree["annotations"][0] | {"segmentation": 5}]}, "annotation 7: unreadable"),
        ({"annotations": [tree["annotations"][2] | {"segmentation": {"size": [2, 2], "counts": [2, 2]}}]},
         "annotation 9 is of another size"),
    ):  # fmt: skip
        path.write_text(json.dumps(tree | change))
        with pytest.raises(DataError, match=message):
            prepare("cocostuff", source, tmp_path / "wrong", Options(), num_workers=0)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match=r"pip install -U pycocotools.* go without instance maps"):
        prepare("cocostuff", source, tmp_path / "wrong", Options(), num_workers=0)


def test_what_is_missing_is_named(tmp_path):
    source = download("ade20k", tmp_path / "download")
    with pytest.raises(DataError, match="none of train2017/, images/train2017/ is there"):
        prepare("cocostuff", source, tmp_path / "raw", Options(), num_workers=0)
    scenes = Options(scene_list=tmp_path / "scenes.txt")
    with pytest.raises(DataError, match=r"scenes\.txt: cannot be read"):
        prepare("ade20k_outdoor", source, tmp_path / "raw", scenes, num_workers=0)
    scenes.scene_list.write_text("beach\nbeech\n")
    with pytest.raises(DataError, match=r"not in sceneCategories\.txt: beech"):
        prepare("ade20k_outdoor", source, tmp_path / "raw", scenes, num_workers=0)
    (source / "ADEChallengeData2016/annotations/training/ADE_train_00000003.png").unlink()
    for name in ("ade20k", "ade20k_outdoor"):
        with pytest.raises(DataError, match=r"(?s)1 of the files.*ADE_train_00000003\.png"):
            prepare(name, source, tmp_path / "raw", Options(), num_workers=0)
    assert not (tmp_path / "raw").exists()


def test_outdoor_scenes_of_a_list(tmp_path):
    source = download("ade20k_outdoor", tmp_path / "download")
    (tmp_path / "scenes.txt").write_text("bedroom\n\nADE_train_00000001\nADE_val_00000001\n")
    counts = prepare(
        "ade20k_outdoor", source, tmp_path / "raw", Options(scene_list=tmp_path / "scenes.txt"), num_workers=0
    )
    assert counts == {"train": 2, "val": 1}
    assert sorted(p.stem for p in (tmp_path / "raw/train/seg_maps").iterdir()) == [
        "ADE_train_00000001", "ADE_train_00000002"
    ]  # fmt: skip


def test_prepare_straight_to_lmdb(tmp_path, monkeypatch, capsys):
    source = download("cocostuff", tmp_path / "download")
    arguments = ["cocostuff", "--source", source, "--output", tmp_path / "out", "--lmdb", "--edge_maps", "instances"]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, arguments), "--num_workers", "0"])
    prepare_dataset.main()
    assert "train: 2 samples" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert open_source(tmp_path / "out/train", ["images", "seg_maps", "inst_maps", "edge_maps"]).keys


# ------------------------------------------------------------------------------------------------ downloads


class Server(http.server.SimpleHTTPRequestHandler):
    """Cuts the first answer off in the middle."""

    requests: list[str]

    def do_GET(self):
        if not (self.folder / self.path.lstrip("/")).is_file():
            self.send_error(404)
            return
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        self.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if len(self.requests) == 1 else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    handler = type("Handler", (Server,), {"folder": tmp_path / "served", "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.url, running.requests, running.folder = (
            f"http://127.0.0.1:{running.server_port}", handler.requests, tmp_path / "served"
        )  # fmt: skip
        yield running
        running.shutdown()


def test_a_download_is_tried_again_checked_and_unpacked(server, tmp_path, monkeypatch, capsys):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("seg_maps/a.png", np.random.default_rng(0).bytes(50_000))
    (server.folder / "data.zip").write_bytes(buffer.getvalue())
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    manifest = {"spade": {"archives": [{"url": "https://example.invalid/x/data.zip", "sha256": sha256, "folder": "c"}]}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    command = ["x", "--model_name", "spade", "--manifest", tmp_path / "manifest.json",
               "--mirror", server.url, "--output_dir", tmp_path / "projects"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(DataError, match=r"the file was cut off or replaced\. Try again"):
        download_test_data.main()
    assert not [path for path in (tmp_path / "projects").rglob("*") if path.is_file()]
    download_test_data.main()
    assert "1 files from" in capsys.readouterr().out
    unpacked = tmp_path / "projects/spade/test_data/c/seg_maps/a.png"
    assert unpacked.read_bytes() == np.random.default_rng(0).bytes(50_000)

    def fetch(url, path, sha256):
        download_file(url, path, sha256, DataError, "--mirror URL")

    fetch(f"{server.url}/data.zip", tmp_path / "projects/spade/.downloads/data.zip", sha256)
    assert len(server.requests) == 2  # it is there
    with pytest.raises(DataError, match=rf"data\.zip is not the file with sha256 00 \(invalid hash .* got \"{sha256}"):
        fetch(f"{server.url}/data.zip", tmp_path / "other.zip", "00")
    with pytest.raises(DataError, match=r"absent\.zip cannot be downloaded \(HTTP Error 404: .*--mirror URL"):
        fetch(f"{server.url}/absent.zip", tmp_path / "absent.zip", "00")
    for url in ("nowhere", "weird://x/y.zip", "http://[::1/x.zip", (tmp_path / "none.zip").as_uri()):
        with pytest.raises(DataError, match=re.escape(url)):
            fetch(url, tmp_path / "other.zip", "00")
    assert not list(tmp_path.glob("other*")) + list(tmp_path.glob("absent*"))
    fetch((server.folder / "data.zip").as_uri(), tmp_path / "other.zip", sha256)
    assert (tmp_path / "other.zip").read_bytes() == buffer.getvalue()


DIGEST = "0" * 64


def test_without_sources_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--output_dir", str(tmp_path)])
    with pytest.raises(DataError, match=r"publishes no test data.*--manifest FILE"):
        download_test_data.main()
    monkeypatch.setattr(sys, "argv", ["x", "--model_name", "munit"])
    with pytest.raises(DataError, match="no entry 'munit'; there are: spade"):
        download_test_data.main()
    manifest = tmp_path / "manifest.json"
    monkeypatch.setattr(sys, "argv", ["x", "--manifest", str(manifest), "--output_dir", str(tmp_path)])
    for content, message in (
        ([], "no entry 'spade'; there are: none"),
        ({"spade": []}, 'spade lacks a list: {"archives"'),
        ({"spade": {"archives": []}}, "names no sources"),
        ({"spade": {"archives": [{"url": "http://127.0.0.1/a.zip"}]}}, "an archive lacks url or sha256"),
        ({"spade": {"archives": [{"url": "http://x/a.zip", "sha256": ""}]}}, "sha256 is 64 hexadecimal digits"),
        ({"spade": {"archives": [{"url": "http://x/a.zip", "sha256": DIGEST, "folder": 1}]}}, "all text"),
        ({"spade": {"archives": [{"url": "http://x/a.zip", "sha256": DIGEST, "dir": "x"}]}}, "has url, sha256 and fo"),
        ({"spade": {"archives": [{"url": "http://x/a.zip", "sha256": DIGEST, "folder": "../../.."}]}}, "leads out of"),
        ({"spade": {"archives": [{"url": "http://x/", "sha256": DIGEST}]}}, "leads out of"),
    ):
        manifest.write_text(json.dumps(content))
        with pytest.raises(DataError, match=re.escape(message)):
            download_test_data.main()


def tar_with(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_with(name, content, mode=0):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        archive.writestr(info, content)
    return buffer.getvalue()


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


GOOD = (tarfile.TarInfo("a.png"), b"x")


@pytest.mark.parametrize(
    "content, message",
    [
        (tar_with(GOOD, (tarfile.TarInfo("../b.png"), b"x")), "leads out"),
        (tar_with(GOOD, (tarfile.TarInfo("/tmp/b.png"), b"x")), "leads out"),
        (tar_with(GOOD, link("l", "/etc")), "nothing was unpacked: .*absolute"),
        (tar_with(GOOD, link("l", "../../x")), "nothing was unpacked: .*outside"),
        (tar_with(GOOD, link("l", "/etc/passwd", tarfile.LNKTYPE)), "nothing was unpacked: .*absolute"),
        (tar_with(GOOD, link("l", "a.png")), "'l' is a link: nothing was unpacked"),
        (tar_with(GOOD, link("fifo", "", tarfile.FIFOTYPE)), "nothing was unpacked: .*special"),
        (tar_with(GOOD, (tarfile.TarInfo("zeros"), bytes(60_000_000))), "unpacks to 60,000,001 bytes, but 50,000,000"),
        (zip_with("../b.png", b"x"), "leads out"),
        (zip_with("/b.png", b"x"), "leads out"),
        (zip_with("c:\\b.png", b"x"), "leads out"),
        (zip_with("zeros", bytes(60_000_000)), "unpacks to 60,000,000 bytes, but 50,000,000 are free"),
        (zip_with("a.png", b"x" * 100)[:60], "neither a zip nor a tar|damaged"),
        (b"hello", "neither a zip nor a tar"),
    ],
    ids=range(14),
)
def test_hostile_archives_leave_nothing(content, message, tmp_path, monkeypatch):
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(50_000_000))
    with pytest.raises(DataError, match=message):
        unpack(archive, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive"]


def test_good_archives(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tar_with(GOOD, (tarfile.TarInfo("d/b.png"), b"yy")))
    assert unpack(tmp_path / "a.tar.gz", tmp_path / "out") == 2
    assert (tmp_path / "out/d/b.png").read_bytes() == b"yy"
    # The next one comes beside it. What a zip calls a link is a file of its target's name.
    (tmp_path / "a.zip").write_bytes(zip_with("d/link", b"/etc", 0o120777))
    assert unpack(tmp_path / "a.zip", tmp_path / "out") == 1
    assert (tmp_path / "out/d/link").read_bytes() == b"/etc" and not (tmp_path / "out/d/link").is_symlink()
    assert (tmp_path / "out/d").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o777
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["a.png", "b.png", "d", "link"]
    (tmp_path / "b.zip").write_bytes(zip_with("a..b.png", b"z"))
    assert unpack(tmp_path / "b.zip", tmp_path / "out") == 1
    # A link that the user put there leads elsewhere: nothing goes through it.
    (tmp_path / "out/d").rename(tmp_path / "other")
    (tmp_path / "out/d").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="leads out of it"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


# ------------------------------------------------------------------------------------------------ labels for photos


def test_deeplab_labels_photos_by_shares(tiny_folder, tmp_path):
    torch.manual_seed(0)
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    segmenter = deeplab_segmenter(tmp_path / "weights.pt", ["sky", "sea", "rock"], torch.device("cpu"))
    root = tiny_folder(keys=2, size=(16, 16), types=("images",))
    assert [label_photos(segmenter, root, rank=rank, world_size=2) for rank in (0, 1)] == [(1, 0), (1, 0)]
    assert label_photos(segmenter, root) == (0, 2)
    labels = load_labels(root / "labels.yaml")
    assert labels.names == ("sky", "sea", "rock")
    assert build_dataset(root, tmp_path / "out", labels, num_workers=0)["num_samples"] == 2
    with pytest.raises(ConfigError, match=r"2 names; .* has 3 classes"):
        deeplab_segmenter(tmp_path / "weights.pt", ["a", "b"], torch.device("cpu"))
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="no weights of torchvision's"):
        deeplab_segmenter(tmp_path / "weights.pt", [], torch.device("cpu"))


@pytest.mark.parametrize("script", ["make_distance_maps", "make_edge_maps", "label_images"])
def test_in_a_job_array_each_sample_is_made_by_one_task(script, tiny_folder, tiny_config, tmp_path, commands):
    types = ("images",) if script == "label_images" else ("images", "seg_maps")
    root = tiny_folder(keys=["a", "b", "c", "s/d", "s/e"], size=(16, 16), types=types)
    if script == "label_images":
        weights = tmp_path / "weights.pt"
        network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
        torch.save(network.state_dict(), weights)
    own = {
        "make_distance_maps": ["--config", tiny_config(), "--num_workers", "0"],
        "make_edge_maps": ["--of", "labels", "--num_workers", "0"],
        "label_images": ["--deeplab", tmp_path / "weights.pt", "--device", "cpu"],
    }[script]
    made = []
    for task in (3, 5, 7):
        array = {"ID": task, "MIN": 3, "MAX": 7, "STEP": 2, "COUNT": 3}
        result = commands.run(
            f"scripts/{script}.py", "--data_root", root, "--overwrite", *own,
            **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        made.append(int(re.match(r"(\d+) \w+ maps made", result.stdout)[1]))
    assert made == [2, 2, 1]
    folder = {"make_distance_maps": "distances", "make_edge_maps": "edge_maps", "label_images": "seg_maps"}[script]
    assert sorted(path.stem for path in (root / folder).rglob("*.*")) == ["a", "b", "c", "d", "e"]


def test_several_processes_prepare_a_download_together(tmp_path, commands):
    source, together, alone = download("cityscapes", tmp_path / "download"), tmp_path / "together", tmp_path / "alone"
    command = ["scripts/prepare_dataset.py", "cityscapes", "--source", source, "--num_workers", "0", "--output"]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1)]
    for rank in ranks:
        result = commands.run(*command, together, **rank)
        assert result.returncode == 0 and "train: 1 samples" in result.stdout, result.stderr
        missing = 7 - sum(path.is_file() for path in together.rglob("*"))
        assert missing == (3 if rank is ranks[0] else 0)
    assert commands.run(*command, alone).returncode == 0
    for path in filter(Path.is_file, alone.rglob("*")):
        assert (together / path.relative_to(alone)).read_bytes() == path.read_bytes()
    for option in (["--lmdb"], ["--edge_maps", "labels"]):
        result = commands.run(*command, tmp_path / "x", *option, **ranks[0])
        assert result.returncode == 2 and "2 processes: --lmdb and --edge_maps need all folders" in result.stderr
    assert not (tmp_path / "x").exists()


def test_ids_are_the_highest_scores_at_the_photos_size():
    scores = torch.zeros(3, 2, 2)
    scores[1, 0], scores[2, 1] = 1, 1
    ids = Segmenter(("a", "b", "c"), lambda photo: scores).label(np.zeros((8, 6, 3), np.uint8))
    assert ids.dtype == np.uint8 and ids.shape == (8, 6) and (ids[:4] == 1).all() and (ids[4:] == 2).all()


def test_a_hugging_face_model_labels_photos(tiny_folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers (extra eval) is not installed")
    torch.manual_seed(0)
    names = {0: "sky", 1: "sea", 2: "rock", 3: "sand"}
    config = transformers.SegformerConfig(
        num_labels=4, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8, id2label=names,
    )  # fmt: skip
    network = transformers.SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path / "model")
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path / "model")
    segmenter = hugging_face_segmenter(str(tmp_path / "model"), torch.device("cpu"))
    root = tiny_folder(keys=["a", "s/b"], types=("images",))
    assert label_photos(segmenter, root) == (2, 0)
    image = decode_image((root / "images/s/b.jpg").read_bytes(), "x")
    with torch.no_grad():
        logits = network(**processor(images=image, return_tensors="pt")).logits
    expected = torch.nn.functional.interpolate(logits, (40, 56), mode="bilinear").argmax(1)[0].numpy()
    ids = decode_label((root / "seg_maps/s/b.png").read_bytes(), "x")
    assert np.array_equal(ids, expected) and len(np.unique(ids)) > 1
    labels = load_labels(root / "labels.yaml")
    assert labels.names == tuple(names.values())
    assert build_dataset(root, tmp_path / "out", labels, num_workers=0)["num_samples"] == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not usable for semantic segmentation"):
        hugging_face_segmenter(str(tmp_path / "empty"), torch.device("cpu"))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install -U transformers"):
        hugging_face_segmenter("x", torch.device("cpu"))


def test_masks_beside_their_photos(tmp_path):
    for name in ("a", "b"):
        write_jpg(tmp_path / f"mixed/{name}.jpg", np.full((8, 8, 3), 9, np.uint8))
        write_png(tmp_path / f"mixed/{name}_mask.png", np.full((8, 8), ord(name), np.uint8))
    options = Options(images=Path("mixed"), labels=Path("mixed"))
    assert prepare("custom", tmp_path, tmp_path / "raw", options, num_workers=0) == {"train": 2}
    for name in ("a", "b"):
        assert (tmp_path / f"raw/train/images/{name}.jpg").is_file()
        assert cv2.imread(str(tmp_path / f"raw/train/seg_maps/{name}.png"), cv2.IMREAD_UNCHANGED)[0, 0] == ord(name)
        (tmp_path / f"mixed/{name}_mask.png").unlink()
    with pytest.raises(DataError, match=r"mixed: photos and label maps in one folder, and no NAME_mask\.png"):
        prepare("custom", tmp_path, tmp_path / "again", options, num_workers=0)


def test_again_with_newer_files_or_other_options(tmp_path):
    for number in range(4):
        for folder in ("images", "labels"):
            write_png(tmp_path / folder / f"{number}.png", np.full((8, 8), number, np.uint8))
    raw = tmp_path / "raw"
    run = partial(prepare, "custom", tmp_path, raw, num_workers=0)
    assert run(Options(num_val=2)) == run(Options(num_val=2)) == {"train": 2, "val": 2}
    source = tmp_path / "labels" / "0.png"
    write_png(source, np.full((8, 8), 7, np.uint8))
    os.utime(source, (2e9, 2e9))
    run(Options(num_val=2))
    (written,) = raw.glob("*/seg_maps/0.png")
    assert written.read_bytes() == source.read_bytes()
    for options in (Options(num_val=1), Options(num_val=3), Options()):
        with pytest.raises(DataError, match=r"images.\d\.png: of an earlier run \(\d such files\): take another"):
            run(options)
    with pytest.raises(DataError, match=r"prepared\.yaml: prepared with .*None}, now .*\[4, 4\]}: take another"):
        run(Options(num_val=2, resize_h_w=(4, 4)))
    assert len([*raw.glob("*/images/*.png")]) == 4
