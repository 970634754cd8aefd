"""Exports of annotation tools -> raw folders with a label table.

``tool_exports.json`` holds what the tools themselves wrote, with their own label maps (``make_tool_exports.py``).
"""

import base64
import json
import os
import re
import shutil
import sys
import zlib

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, write_png
from PIL import Image

from imaginaire_spade.commands import prepare_dataset
from imaginaire_spade.config_files import load_labels
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_image, decode_instances, decode_label
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.dataset_prep.prepare import DATASETS, LABELS, TOOLS, Options, prepare
from imaginaire_spade.errors import ConfigError, DataError

EXPORTS = json.loads((REPOSITORY / "tests/tool_exports.json").read_text(encoding="utf-8"))
NAMES = {
    "labelme": ["bird", "car", "road", "sun"],
    "coco": ["cat", "straße"],
    "voc": ["background", "cat", "straße"],
    "label_studio": ["sky", "tree"],
}


def export(tool, root):
    """What the tool wrote."""
    for name, content in EXPORTS[tool]["files"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else base64.b64decode(content["base64"])
        (root / name).write_bytes(data)
    return root


def run(tool, source, output, **options):
    if tool == "coco":
        pytest.importorskip("pycocotools", reason="the package pycocotools (extra data) is not installed")
    return prepare(tool, source, output, Options(**options), num_workers=0)


def label_map(path):
    return decode_label(path.read_bytes(), str(path))


def rows(ids):
    return ["".join("." if i == 255 else str(i) for i in row) for row in ids.tolist()]


def table(output):
    return load_labels(output / LABELS)


@pytest.mark.parametrize("tool", list(NAMES))
def test_an_export_gives_the_label_maps_of_the_tool_itself(tool, tmp_path):
    source, output = export(tool, tmp_path / "export"), tmp_path / "raw"
    counts = run(tool, source, output)
    assert run(tool, source, output, **{}) == counts  # all is there already
    labels = table(output)
    assert list(labels.names) == NAMES[tool] and labels.ignore == (255,)
    for key, expected in EXPORTS[tool]["classes"].items():
        assert rows(label_map(output / f"train/seg_maps/{key}.png")) == expected
        labels.to_train_ids(label_map(output / f"train/seg_maps/{key}.png"), key)
        (photo,) = (output / "train/images").glob(f"{key}.*")
        assert cv2.imread(str(photo)).shape[:2] == (len(expected), len(expected[0]))


def test_regions_become_objects(tmp_path):
    """One number per region: neighbours of one class have a border."""
    run("labelme", export("labelme", tmp_path / "export"), tmp_path / "raw")
    path = tmp_path / "raw/train/inst_maps/a.png"
    objects, classes = decode_instances(path.read_bytes(), "x"), label_map(tmp_path / "raw/train/seg_maps/a.png")
    assert set(np.unique(objects)) == {0, 1, 2, 3, 4, 5, 6}
    for number, label in enumerate([2, 1, 3, 2, 1, 0], 1):  # the shapes of the file
        assert (classes[objects == number] == label).all()
    assert ((objects == 0) == (classes == 255)).all()


def test_a_newer_export_replaces_the_older_one(tmp_path):
    source = export("voc", tmp_path / "voc")
    run("voc", source, tmp_path / "colours")
    for name in ("SegmentationClass/a.png", "SegmentationObject/a.png"):
        stored = np.asarray(Image.open(source / name))
        write_png(source / name, np.ascontiguousarray(stored[::-1]))
        os.utime(source / name, (2e9, 2e9))
    run("voc", source, tmp_path / "colours")
    assert rows(label_map(tmp_path / "colours/train/seg_maps/a.png")) == EXPORTS["voc"]["classes"]["a"][::-1]
    objects = tmp_path / "colours/train/inst_maps/a.png"
    assert objects.read_bytes() == (source / "SegmentationObject/a.png").read_bytes()

    source = export("labelme", tmp_path / "labelme")
    run("labelme", source, tmp_path / "raw")
    change(source / "a.json", lambda tree: tree["shapes"].reverse())
    run("labelme", source, tmp_path / "raw")
    run("labelme", source, tmp_path / "anew")
    for name in ("seg_maps/a.png", "inst_maps/a.png"):
        assert (tmp_path / "raw/train" / name).read_bytes() == (tmp_path / "anew/train" / name).read_bytes()
    for options in ({"num_val": 1}, {}):
        with pytest.raises(DataError, match=r"raw.train.seg_maps.a\.png: of an earlier export \(1 such files\)"):
            run("labelme", source, tmp_path / "raw", **options)
        (source / "a.json").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ classes


def test_classes_are_chosen_and_ordered(tmp_path):
    source = export("labelme", tmp_path / "export")
    run("labelme", source, tmp_path / "all")
    run("labelme", source, tmp_path / "raw", classes=("road", "bird"))
    assert table(tmp_path / "raw").names == ("road", "bird")
    table_of = np.array([1, 255, 0, 255] + [255] * 252)  # of bird, car, road, sun
    all_classes, chosen = (label_map(tmp_path / f"{name}/train/seg_maps/a.png") for name in ("all", "raw"))
    assert np.array_equal(chosen, table_of[all_classes])
    for classes, message in (
        (("road", "brid"), r"--classes: 'brid' is no class of .* bird, car, road, sun"),
        (("road", "road"), "--classes: 'road' stands there twice"),
    ):
        with pytest.raises(DataError, match=message):
            run("labelme", source, tmp_path / "wrong", classes=classes)
    with pytest.raises(DataError, match=r"raw.labels\.yaml: another label table .* another --output"):
        run("labelme", source, tmp_path / "raw")  # its label maps have other ids


def test_300_classes_need_16_bits(tmp_path):
    source = export("labelme", tmp_path / "export")
    tree = json.loads((source / "a.json").read_text())
    shape = {"shape_type": "rectangle", "points": [[0, 0], [0, 0]]}
    tree["shapes"] = [{**shape, "label": f"c{i:03}"} for i in range(299)]
    tree["shapes"].append({"label": "c299", "points": [[3, 2], [4, 3]], "shape_type": "rectangle"})
    (source / "a.json").write_text(json.dumps(tree))
    (source / "turned.json").unlink()
    run("labelme", source, tmp_path / "raw")
    ids = label_map(tmp_path / "raw/train/seg_maps/a.png")
    assert ids.dtype == np.uint16 and ids[2, 3] == 299 and ids[0, 0] == 298 and ids[5, 5] == 65535
    labels = table(tmp_path / "raw")
    assert labels.num_classes == 300 and labels.to_train_ids(ids, "x")[5, 5] == labels.dont_care_id


# ------------------------------------------------------------------------------------------------ photos


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_written_as_its_annotator_saw_it(orientation, tmp_path):
    """The photo that is trained on fits the label map: EXIF orientations are applied once and then gone."""
    source = export("labelme", tmp_path / "export")
    (source / "a.json").unlink()
    stored = np.zeros((12, 16, 3), np.uint8)
    stored[:4, :6] = 255  # one bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(source / "turned.png", exif=exif)
    upright = np.asarray(Image.open(source / "turned.png").convert("L"))
    upright = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T, 6: upright.T[:, ::-1],
        7: upright.T[::-1, ::-1], 8: upright.T[::-1],
    }[orientation]  # fmt: skip
    tree = json.loads((source / "turned.json").read_text())
    ys, xs = np.nonzero(upright)
    corner = [[int(xs.min()), int(ys.min())], [int(xs.max()), int(ys.max())]]
    tree |= {"imagePath": "turned.png", "imageHeight": upright.shape[0], "imageWidth": upright.shape[1]}
    tree["shapes"] = [{"label": "bright", "points": corner, "shape_type": "rectangle"}]
    (source / "turned.json").write_text(json.dumps(tree))
    run("labelme", source, tmp_path / "raw")
    photo = decode_image((tmp_path / "raw/train/images/turned.png").read_bytes(), "x")
    ids = label_map(tmp_path / "raw/train/seg_maps/turned.png")
    assert np.array_equal(photo[..., 0] == 255, ids == 0) and (ids == 0).sum() == 24
    assert Image.open(tmp_path / "raw/train/images/turned.png").getexif().get(0x0112, 1) == 1
    if orientation > 4:  # annotated on the stored pixels, as the size says
        tree |= {"imageHeight": 12, "imageWidth": 16}
        tree["shapes"][0]["points"] = [[0, 0], [5, 3]]
        (source / "turned.json").write_text(json.dumps(tree))
        run("labelme", source, tmp_path / "stored")
        photo = decode_image((tmp_path / "stored/train/images/turned.png").read_bytes(), "x")
        assert np.array_equal(photo, stored)
        assert (label_map(tmp_path / "stored/train/seg_maps/turned.png")[:4, :6] == 0).all()
    tree |= {"imageHeight": 13}
    (source / "turned.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"turned\.png: .* \(height x width\), but its annotations are for 13 x "):
        run("labelme", source, tmp_path / "wrong")


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "export.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"export\.zip: no such folder: unpack it first"):
        run("voc", tmp_path / "export.zip", tmp_path / "raw")
    for tool, photo in (
        ("labelme", "a.jpg"), ("coco", "images/train/a.jpg"), ("voc", "JPEGImages/a.jpg"),
        ("label_studio", "photos/my photo.jpg"),
    ):  # fmt: skip
        source = export(tool, tmp_path / tool)
        (source / photo).unlink()
        with pytest.raises(DataError, match=r"1 of the files that belong together are missing:\n.*(a|my photo)\.jpg"):
            run(tool, source, tmp_path / "raw")
        for path in [*source.rglob("*.json"), *source.rglob("*.txt")]:
            path.unlink()
        with pytest.raises(
            DataError, match=r"labelmap\.txt is needed|no classes there|COCO JSON with masks is not there"
        ):
            run(tool, source, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_photos_lie_elsewhere(tmp_path):
    source = export("labelme", tmp_path / "export")
    for name in ("a", "turned"):
        (tmp_path / "photos/deep").mkdir(parents=True, exist_ok=True)
        (source / f"{name}.jpg").replace(tmp_path / f"photos/deep/{name}.jpg")
        text = (source / f"{name}.json").read_text().replace(f'"{name}.jpg"', f'"..\\\\shots\\\\{name}.jpg"')
        (source / f"{name}.json").write_text(text)
    assert run("labelme", source, tmp_path / "raw", images=tmp_path / "photos", num_val=1) == {"train": 1, "val": 1}
    shutil.copytree(tmp_path / "photos/deep", tmp_path / "photos/copy")
    with pytest.raises(DataError, match=r"a\.jpg: several photos have this name: .*copy.a\.jpg, .*deep.a\.jpg"):
        run("labelme", source, tmp_path / "wrong", images=tmp_path / "photos")


# ------------------------------------------------------------------------------------------------ tool by tool


def change(path, function):
    """Rewrite a JSON file."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    function(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def test_labelme_says_what_it_cannot_draw(tmp_path):
    source = export("labelme", tmp_path / "export")
    change(source / "a.json", lambda tree: tree["shapes"][1].update(shape_type="points"))
    with pytest.raises(
        DataError, match=r"a\.json: shape 1: a shape of type 'points'; those that are read: mask, polygon"
    ):
        run("labelme", source, tmp_path / "raw")
    change(source / "a.json", lambda tree: tree["shapes"][1].update(shape_type="circle", points=[[1, 2]]))
    with pytest.raises(DataError, match=r"a\.json: shape 1: unreadable"):
        run("labelme", source, tmp_path / "raw")
    (source / "a.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"a\.json: no JSON of labelme with masks: KeyError\('imageHeight'\)"):
        run("labelme", source, tmp_path / "raw")


def test_labelmes_ignore_is_no_class(tmp_path):
    source = export("labelme", tmp_path / "export")
    run("labelme", source, tmp_path / "all")
    change(source / "a.json", lambda tree: [shape.update(label="__ignore__") for shape in tree["shapes"][4:]])
    (source / "turned.json").unlink()
    run("labelme", source, tmp_path / "raw")
    assert table(tmp_path / "raw").names == ("car", "road", "sun")
    number_of = np.array([255, 0, 1, 2] + [255] * 252)  # of bird, car, road, sun
    expected = number_of[label_map(tmp_path / "all/train/seg_maps/a.png")]
    expected[decode_instances((tmp_path / "all/train/inst_maps/a.png").read_bytes(), "x") > 4] = 255
    assert np.array_equal(label_map(tmp_path / "raw/train/seg_maps/a.png"), expected)


def test_coco_of_other_tools(tmp_path, capsys):
    """Roboflow's folders and category of the project; compressed codes; polygons without area; boxes; crowds."""
    mask = pytest.importorskip("pycocotools.mask", reason="the package pycocotools (extra data) is not installed")
    code = mask.encode(np.asfortranarray(np.eye(12, 16, dtype=np.uint8)))
    square = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
    for split in ("train", "valid", "test"):
        root = tmp_path / "export" / split
        root.mkdir(parents=True)
        Image.new("RGB", (16, 12)).save(root / "shot_jpg.rf.0a1b.jpg")
        notes = [
            {"category_id": 2, "segmentation": {**code, "counts": code["counts"].decode()}, "area": 12, "iscrowd": 1},
            {"category_id": 1, "segmentation": [[1.0, 1.0, 3.0, 3.0], square, []], "area": 36, "iscrowd": 0},
            {"category_id": 1, "segmentation": [], "area": 9, "iscrowd": 0},
            {"category_id": 1, "segmentation": [[1.0, 1.0, 3.0, 3.0]], "area": 9, "iscrowd": 0},
        ]  # fmt: skip
        tree = {
            "categories": [
                {"id": 0, "name": "shapes", "supercategory": "none"},
                {"id": 1, "name": "square", "supercategory": "shapes"},
                {"id": 2, "name": "line", "supercategory": "shapes"},
            ],
            "images": [{"id": 5, "file_name": "shot_jpg.rf.0a1b.jpg", "height": 12, "width": 16}],
            "annotations": [{"id": i, "image_id": 5, **note} for i, note in enumerate(notes)],
        }  # fmt: skip
        (root / "_annotations.coco.json").write_text(json.dumps(tree))
    source = tmp_path / "export"
    assert run("coco", source, tmp_path / "raw") == {"test": 1, "train": 1, "val": 1}
    assert "6 annotations left out, which have no mask" in capsys.readouterr().out
    assert table(tmp_path / "raw").names == ("square", "line")
    ids = label_map(tmp_path / "raw/val/seg_maps/shot_jpg.rf.0a1b.png")
    expected = np.full((12, 16), 255)
    expected[2:8, 2:8] = 0
    expected[np.eye(12, 16, dtype=bool)] = 1  # the smaller one lies on top
    assert np.array_equal(ids, expected)

    path = source / "train/_annotations.coco.json"
    for update, message in (
        ({"category_id": 7}, "annotation 0: its category_id is not in the list of categories"),
        ({"image_id": 7}, "annotation 0: its image_id 7 is not in the list of images"),
        ({"segmentation": 3}, "annotation 0: unreadable"),
        (
            {"segmentation": {"size": [3, 3], "counts": [4, 5]}},
            r"annotation 0 is of another size than its image: \(3, 3\)",
        ),
    ):
        before = path.read_text()
        change(path, lambda tree, update=update: tree["annotations"][0].update(update))
        with pytest.raises(DataError, match=message):
            run("coco", source, tmp_path / "wrong")
        path.write_text(before)
    for split in ("train", "valid", "test"):
        change(source / split / path.name, lambda tree: [note.update(segmentation=[]) for note in tree["annotations"]])
    with pytest.raises(DataError, match=r"COCO JSON with masks is not there \(12 boxes\): export segmentation"):
        run("coco", source, tmp_path / "wrong")


def test_without_pycocotools_coco_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match=r"needs the package pycocotools .*pip install -U pycocotools"):
        prepare("coco", export("coco", tmp_path / "export"), tmp_path / "raw", Options(), num_workers=0)


def test_cvats_colours(tmp_path):
    """CVAT writes the colours of its labels; a class that is not chosen, and VOC's borders, count as none."""
    source = export("voc", tmp_path / "export")
    lines = "# label:color_rgb:parts:actions\ncat:128,0,0::\nbackground:0,0,0::\nmy dog:0,128,0:head,tail:\n\n"
    (source / "labelmap.txt").write_text(lines)
    mask = source / "SegmentationClass/a.png"
    stored = np.asarray(Image.open(mask)).copy()
    stored[0] = 224, 224, 192
    write_png(mask, stored)
    assert run("cvat", source, tmp_path / "raw", classes=("my dog", "cat")) == {"train": 1}
    labels = table(tmp_path / "raw")
    assert labels.names == ("my dog", "cat") and labels.palette == ((0, 128, 0), (128, 0, 0))
    swapped = np.array([list(row) for row in EXPORTS["voc"]["classes"]["a"]])
    swapped[0] = "."
    expected = np.select([swapped == "1", swapped == "2"], ["1", "0"], ".")
    assert rows(label_map(tmp_path / "raw/train/seg_maps/a.png")) == ["".join(row) for row in expected]
    palette = Image.fromarray(stored).quantize()  # the same colours, indexed
    palette.save(mask)
    run("cvat", source, tmp_path / "again", classes=("my dog", "cat"))
    assert (tmp_path / "again/train/seg_maps/a.png").read_bytes() == (
        tmp_path / "raw/train/seg_maps/a.png"
    ).read_bytes()
    for text, message in (
        (
            lines.replace("my dog:0,128,0", "my dog:0,128,1"),
            r"a\.png: 1 colours that labelmap\.txt does not have: \(0, 128, 0\)",
        ),
        (lines.replace("my dog:0,128,0", "my dog:128,0,0"), r"several classes have the colour \(128, 0, 0\)"),
        (lines + "bird:x,y,z::\n", r"labelmap\.txt: 'bird:x,y,z::' is not NAME:R,G,B::"),
    ):
        (source / "labelmap.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            run("cvat", source, tmp_path / "wrong")


def test_label_studio_says_what_it_cannot_draw(tmp_path):
    source = export("label_studio", tmp_path / "export")
    path = source / "project-1.json"
    before = path.read_text()

    def region(tree):
        return tree[0]["annotations"][1]["result"][0]

    for update, message in (
        (lambda tree: region(tree).update(image_rotation=90), "task 7, region tree: .* photo turned by 90 degrees"),
        (
            lambda tree: region(tree)["value"].update(brushlabels=["a", "b"]),
            r"brushlabels \['a', 'b'\].* of one class each",
        ),
        (
            lambda tree: region(tree).update(original_width=17),
            "region tree: unreadable: .*768 values for 12 x 17 pixels",
        ),
        (lambda tree: region(tree)["value"].update(rle=region(tree)["value"]["rle"][:20]), "region tree: unreadable"),
        (lambda tree: tree[0].pop("data"), r"project-1\.json: no JSON of Label Studio \(not JSON-MIN\)"),
    ):
        path.write_text(before)
        change(path, update)
        with pytest.raises(DataError, match=message):
            run("label_studio", source, tmp_path / "wrong")
        shutil.rmtree(tmp_path / "wrong", ignore_errors=True)
    path.write_text(before)
    polygon = {"points": [[25, 0], [75, 0], [75, 50], [25, 50]], "polygonlabels": ["sea"]}
    change(path, lambda tree: region(tree).update(type="polygonlabels", value=polygon))
    change(path, lambda tree: tree[0]["annotations"][0].update(ground_truth=True))  # the older one, with the tree alone
    run("label_studio", source, tmp_path / "raw")
    assert table(tmp_path / "raw").names == ("tree",)
    change(path, lambda tree: tree[0]["annotations"][0].update(was_cancelled=True))
    run("label_studio", source, tmp_path / "polygon")
    ids = label_map(tmp_path / "polygon/train/seg_maps/my photo.png")
    assert table(tmp_path / "polygon").names == ("sea", "sky") and (ids[:3, 4:12] == 0).all() and ids[1, 13] == 255


@pytest.mark.parametrize("form", ["{photo}_{part}", "{photo}-{part}", "{photo}/{part}", "{part}/{photo}"])
def test_one_mask_per_part(form, tmp_path):
    source, parts = (
        tmp_path / "export",
        {"skin": np.s_[2:10, 2:10], "left_eye": np.s_[4:6, 4:6], "hat": np.s_[0:4, 0:16]},
    )
    for photo in ("p", "p_2", "nobody"):
        write_png(source / f"images/{photo}.png", np.zeros((12, 16, 3), np.uint8))
        for part, place in parts.items() if photo != "nobody" else ():
            mask = np.zeros((12, 16), np.uint8)
            mask[place] = 1 if part == "hat" else 255
            write_png(source / "masks" / f"{form.format(photo=photo, part=part)}.png", mask)
    (source / "masks").rename(source / "seg_maps")
    with pytest.raises(DataError, match=r"One mask per class and photo\? scripts/prepare_dataset\.py parts --source "):
        FolderSource(source, ["images", "seg_maps"])
    with pytest.raises(DataError, match=r"from the lowest to the top one: --classes hat left_eye skin$"):
        run("parts", source, tmp_path / "raw")
    assert run("parts", source, tmp_path / "raw", classes=("skin", "left_eye", "hat")) == {"train": 2}
    expected = np.full((12, 16), 255)
    for label, part in enumerate(("skin", "left_eye", "hat")):
        expected[parts[part]] = label
    for photo in ("p", "p_2"):
        assert np.array_equal(label_map(tmp_path / f"raw/train/seg_maps/{photo}.png"), expected)
    run("parts", source, tmp_path / "two", classes=("hat", "skin"))
    expected[:] = 255
    expected[parts["hat"]] = 0
    expected[parts["skin"]] = 1
    assert np.array_equal(label_map(tmp_path / "two/train/seg_maps/p.png"), expected)
    write_png(source / "seg_maps/stranger_hat.png", np.zeros((12, 16), np.uint8))
    with pytest.raises(DataError, match=r"stranger_hat\.png: of no photo"):
        run("parts", source, tmp_path / "wrong", classes=("skin",))


def test_the_command_line_builds_an_export(tmp_path, monkeypatch, capsys):
    source = export("labelme", tmp_path / "export")
    arguments = ["labelme", "--source", source, "--output", tmp_path / "out", "--lmdb", "--num_workers", "0"]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, arguments), "--classes", "road", "car"])
    prepare_dataset.main()
    assert "labels.yaml (a config may name it as a base)" in capsys.readouterr().out
    assert open_source(tmp_path / "out/train", ["images", "seg_maps", "inst_maps"]).keys == ["a", "turned"]
    assert table(tmp_path / "out").names == ("road", "car")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["labels.yaml", "train"]
    for name in ("camvid", "mapillary"):
        monkeypatch.setattr(sys, "argv", ["x", name, "--source", "s", "--output", "o", "--classes", "road"])
        with pytest.raises(ConfigError, match=f"--classes: {name} has fixed classes"):
            prepare_dataset.main()


# ------------------------------------------------------------------------------------------------ large sets


def test_full_ade20k(tmp_path):
    """Classes in R and G, named by a JSON in Latin-1; parts of objects are no classes."""
    source = tmp_path / "ADE20K_2021_17_01/images/ADE"
    for split, key, numbers in (("training", "ADE_train_00000001", {"wall": 2978, "café": 5}),
                                ("validation", "ADE_val_00000001", {"wall": 2978, "sky": 2420})):  # fmt: skip
        folder = source / split / "indoor/room"
        write_png(folder / f"{key}.png", np.zeros((12, 16, 3), np.uint8))
        Image.open(folder / f"{key}.png").save(folder / f"{key}.jpg")
        (folder / f"{key}.png").unlink()
        stored = np.zeros((12, 16, 3), np.uint8)  # R, G, B
        for row, number in enumerate(numbers.values()):
            stored[row] = number // 256 * 10, number % 256, row
        write_png(folder / f"{key}_seg.png", stored)
        objects = [{"name": name, "name_ndx": n, "parts": {"part_level": 0}} for name, n in numbers.items()]
        objects.append({"name": "knob", "name_ndx": 77, "parts": {"part_level": 1}})
        text = json.dumps({"annotation": {"object": objects}}, ensure_ascii=False)
        (folder / f"{key}.json").write_text(text, encoding="latin-1")
    assert run("ade20k_full", tmp_path, tmp_path / "raw") == {"train": 1, "val": 1}
    assert table(tmp_path / "raw").names == ("café", "sky", "wall")
    ids = label_map(tmp_path / "raw/val/seg_maps/ADE_val_00000001.png")
    assert ids[:3, 0].tolist() == [2, 1, 255]
    run("ade20k_full", tmp_path, tmp_path / "two", classes=("wall",))
    assert label_map(tmp_path / "two/val/seg_maps/ADE_val_00000001.png")[:3, 0].tolist() == [0, 255, 255]
    for path in source.rglob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"ADE20K_2021_17_01 .*: no classes there"):
        run("ade20k_full", tmp_path, tmp_path / "wrong")


@pytest.mark.parametrize("version", ["v1.2", "v2.0"])
def test_mapillary_vistas(version, tmp_path):
    source, names = tmp_path / "vistas", ("animal--bird", "construction--flat--road", "void--unlabeled")
    labels = [{"name": name, "color": [i, 10, 20], "readable": name} for i, name in enumerate(names)]
    (source / "training").mkdir(parents=True)
    (source / f"config_{version}.json").write_text(json.dumps({"labels": labels, "version": version}))
    for split in ("training", "validation"):
        maps = source / split / (version if version == "v2.0" else "")
        write_png(source / split / "images/a.png", np.zeros((12, 16, 3), np.uint8))
        for folder, dtype in (("labels", np.uint8), ("instances", np.uint16)):
            write_png(maps / folder / "a.png", np.arange(192, dtype=dtype).reshape(12, 16) % 3)
        palette = Image.open(maps / "labels/a.png").convert("P")
        palette.putdata((np.arange(192) % 3).tolist())
        palette.putpalette([0, 10, 20, 1, 10, 20, 0, 0, 0])
        palette.save(maps / "labels/a.png")
    assert run("mapillary", source, tmp_path / "raw") == {"train": 1, "val": 1}
    table_read = table(tmp_path / "raw")
    assert table_read.names == names[:2] and table_read.ignore == (2,) and table_read.palette[1] == (1, 10, 20)
    ids = table_read.to_train_ids(label_map(tmp_path / "raw/train/seg_maps/a.png"), "x")
    assert ids[0, :3].tolist() == [0, 1, table_read.dont_care_id]
    assert (tmp_path / "raw/val/inst_maps/a.png").is_file()


def test_a_turned_photo_of_16_bits_keeps_them(tmp_path):
    source = export("labelme", tmp_path / "export")
    stored = np.arange(12 * 16 * 3, dtype=np.uint16).reshape(12, 16, 3) * 100
    cv2.imwrite(str(source / "a.tif"), stored)
    with Image.open(source / "turned.jpg") as turned:  # the TIFF tag of the orientation has EXIF's number
        assert turned.getexif()[0x0112] == 6
    data = cv2.imencode(".png", stored)[1].tobytes()
    chunk = b"eXIf" + turned.info["exif"].removeprefix(b"Exif\0\0")
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (source / "turned.png").write_bytes(data[:33] + chunk + data[33:])
    change(source / "a.json", lambda tree: tree.update(imagePath="a.tif"))
    change(source / "turned.json", lambda tree: tree.update(imagePath="turned.png"))
    run("labelme", source, tmp_path / "raw")
    assert (tmp_path / "raw/train/images/a.tif").read_bytes() == (source / "a.tif").read_bytes()
    written = cv2.imread(str(tmp_path / "raw/train/images/turned.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(written, stored.transpose(1, 0, 2)[:, ::-1])


def test_processes_share_the_drawing(tmp_path):
    source = export("labelme", tmp_path / "export")
    run("labelme", source, tmp_path / "one")
    prepare("labelme", source, tmp_path / "two", Options(), num_workers=2)
    for path in (path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_the_page_about_tools_names_them_all():
    """Every command of the page is one, and every tool and every data set with a row of its own stands there."""
    page = (REPOSITORY / "docs/data_from_tools.md").read_text(encoding="utf-8")
    named = re.findall(r"`prepare_dataset\.py (\w+) --source \w+ ", page)
    assert set(named) == {*TOOLS, "celebamask_hq", "custom", "isprs", "loveda"} and set(named) <= {*DATASETS, *TOOLS}
    flags = set(re.findall(r"(--\w+)", page))
    listed = (REPOSITORY / "tests/options.txt").read_text(encoding="utf-8")
    assert flags - {"--help"} <= set(re.search(r"scripts/prepare_dataset\.py: (.*)", listed)[1].split())
