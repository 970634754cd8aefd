"""The formats of docs/formats.md, through the command lines that the page names.

Files are those that the data sets' own tools wrote (``tool_exports.json``), or made by hand after the source that the
page states: real names of files and folders, depth, mode and ids.
"""

import ast
import base64
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, write_jpg
from PIL import Image
from test_annotation_exports import EXPORTS, export, rows
from test_foreign_labels import channels, opt_txt
from test_interop import IMAGINAIRE

from imaginaire_spade.config_files import load_labels, parse_config
from imaginaire_spade.data.image_files import decode_instances, decode_label
from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.dataset_prep import NAMES
from imaginaire_spade.errors import LabelError
from imaginaire_spade.interop.configs import import_config

PAGE = (REPOSITORY / "docs/formats.md").read_text(encoding="utf-8")
TABLES = REPOSITORY / "configs/labels"
SIZE = (12, 16)
NOTHING = "no class"


class Format(NamedTuple):
    """One format, and what its files must become."""

    write: Callable[[Path], None]
    """Makes the files below a folder."""
    command: str
    """What a user types: S is that folder, O the output, T the folder of label tables."""
    table: str
    """The label table: of configs/labels/, or "" for that of the output."""
    classes: list[str] | set[str]
    """Of the first pixels of the first label map; a set: of all its pixels."""
    instances: set[int] = set()
    """What the instance map holds."""


def pixels(values: list[int], dtype: type = np.uint8) -> np.ndarray:
    """A label map whose first pixels are those values; the others are the first."""
    made = np.full(SIZE, values[0], dtype)
    made.reshape(-1)[: len(values)] = values
    return made


def save(path: Path, values: list[int], palette: list[int] | None = None) -> None:
    """Write ids as a grey PNG of 8 bits, or as an indexed one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels(values))
    if palette is not None:
        image = image.convert("P")
        image.putdata(pixels(values).reshape(-1).tolist())
        image.putpalette(palette)
    image.save(path)


def photo(path: Path, size: tuple[int, int] = SIZE) -> None:
    if path.suffix == ".jpg":
        write_jpg(path, np.full((*size, 3), 90, np.uint8))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1], (90, 80, 70)).save(path)


def pairs(images: str, maps: str, values: list[int], palette: list[int] | None = None) -> Callable[[Path], None]:
    """Make a photo and a label map; both names are paths."""

    def write(root: Path) -> None:
        photo(root / images)
        save(root / maps, values, palette)

    return write


def several(*writers: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for writer in writers:
            writer(root)

    return write


def real(tool: str) -> Callable[[Path], None]:
    return lambda root: export(tool, root)


def table_with(name: str, **data: object) -> Callable[[Path], None]:
    """Write S/mine.yaml: a table and what else the data set needs."""
    return lambda root: (root / "mine.yaml").write_text(
        yaml.safe_dump({"base": str(TABLES / f"{name}.yaml"), "data": data})
    )


def link(**folders: str) -> Callable[[Path], None]:
    """Make S/raw of links: data type -> folder of the download."""

    def write(root: Path) -> None:
        (root / "raw").mkdir()
        for data_type, folder in folders.items():
            (root / "raw" / data_type).symlink_to(root / folder)

    return write


def voc_palette() -> list[int]:
    return [sum((i >> 3 * bit + c & 1) << 7 - bit for bit in range(8)) for i in range(256) for c in range(3)]


def colours(path: Path, values: list[tuple[int, int, int]]) -> None:
    made = np.zeros((*SIZE, 3), np.uint8)
    made[:] = values[0]
    made.reshape(-1, 3)[: len(values)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(made).save(path)


ISPRS = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0)]
ISPRS_CLASSES = ["impervious surface", "building", "low vegetation", "tree", "car", "clutter", NOTHING]


def isprs(photos: str, labels: str, *names: tuple[str, str]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for image, mask in names:
            photo(root / photos / image)
            colours(root / labels / mask, ISPRS)

    return write


def mapillary(version: str) -> Callable[[Path], None]:
    """Vistas with the names and colours that Datumaro knows: palette PNGs of ids, 16-bit instances."""

    def write(root: Path) -> None:
        entries = [line.split() for line in EXPORTS["mapillary"]["files"][f"{version}.txt"].splitlines()]
        labels = [{"name": name, "color": [*map(int, colour)], "readable": name} for name, *colour in entries]
        (root / f"config_{version}.json").write_text(json.dumps({"labels": labels}))
        palette = [value for label in labels for value in label["color"]] + [0] * (768 - 3 * len(labels))
        for split in ("training", "validation"):
            maps = root / split / version if version == "v2.0" else root / split
            photo(root / split / "images/M2kh294N9c72sICO990Uew.jpg")
            save(maps / "labels/M2kh294N9c72sICO990Uew.png", [*range(len(labels))], palette)
            (maps / "instances").mkdir(parents=True)
            ids = pixels([*range(len(labels))], np.uint16) * 256 + 1
            Image.fromarray(ids).save(maps / "instances/M2kh294N9c72sICO990Uew.png")

    return write


def vistas_classes(version: str) -> list[str]:
    names = [line.split()[0] for line in EXPORTS["mapillary"]["files"][f"{version}.txt"].splitlines()]
    return [*names[:-1], NOTHING]


def face_parts(root: Path) -> None:
    """CelebAMask-HQ: RGB masks of 0 and 255 for each part."""
    photo(root / "CelebA-HQ-img/0.jpg")
    for part, columns in (("skin", (0, 300)), ("r_eye", (100, 200)), ("hair", (200, 400)), ("cloth", (390, 500))):
        mask = np.zeros((512, 512, 3), np.uint8)
        mask[:, slice(*columns)] = 255
        (root / "CelebAMask-HQ-mask-anno/0").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / f"CelebAMask-HQ-mask-anno/0/00000_{part}.png")


def stuff_10k(root: Path) -> None:
    """COCO-Stuff 10K: a .mat, which the lines of the page turn into a PNG."""
    io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    photo(root / "images/COCO_train2014_000000000077.jpg")
    (root / "annotations").mkdir()
    io.savemat(root / "annotations/COCO_train2014_000000000077.mat", {"S": pixels([0, 1, 92, 182], np.uint16)})
    lines = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    (root / "lines.py").write_text(lines.replace('"cocostuff-10k-v1.1"', repr(str(root))))
    runpy.run_path(str(root / "lines.py"))


BISENET = [
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth",
    "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat",
]  # fmt: skip
CITYSCAPES = {"sky", "static", "road", "car", "person"}
PREPARE = "prepare_dataset.py {} --source S --output O --lmdb"
BUILD = "build_lmdb.py --config {} --data_root S/raw --output_root O/train"
FORMATS = {
    "cocostuff_164k": Format(
        several(*(pairs(f"{s}2017/000000000{n}.jpg", f"stuffthingmaps_trainval2017/{s}2017/000000000{n}.png",
                        [0, 90, 91, 181, 255]) for s, n in (("train", "009"), ("val", "139")))),
        PREPARE.format("cocostuff"), "cocostuff", ["person", "hair brush", "banner", "wood", NOTHING]),
    "cocostuff_171": Format(
        several(pairs("images/1.jpg", "seg/1_labelTrainIds.png", [0, 10, 11, 79, 80, 170, 255]),
                link(images="images", seg_maps="seg"),
                table_with("cocostuff_171", suffixes={"seg_maps": "_labelTrainIds"})),
        BUILD.format("S/mine.yaml"), "cocostuff_171",
        ["person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood", NOTHING]),
    "cocostuff_10k": Format(
        several(stuff_10k, link(images="images", seg_maps="annotations")),
        BUILD.format("T/cocostuff10k.yaml"), "cocostuff10k", [NOTHING, "person", "banner", "wood"]),
    "ade20k": Format(
        several(*(pairs(f"ADEChallengeData2016/images/{s}/ADE_{k}_00000001.jpg",
                        f"ADEChallengeData2016/annotations/{s}/ADE_{k}_00000001.png", [0, 1, 2, 150])
                  for s, k in (("training", "train"), ("validation", "val")))),
        PREPARE.format("ade20k"), "ade20k", [NOTHING, "wall", "building", "flag"]),
    "ade20k_release": Format(
        several(pairs("i/a.jpg", "m/a.png", [0, 1, 150]), link(images="i", seg_maps="m")),
        BUILD.format("T/ade20k_release.yaml"), "ade20k_release", ["other", "wall", "flag"]),
    "cityscapes_ids": Format(
        real("cityscapes"), PREPARE.format("cityscapes") + " --resize_h_w 12 16", "cityscapes", CITYSCAPES,
        {4, 7, 23, 26, 24000, 26000}),
    "cityscapes_ids_oasis": Format(
        real("cityscapes"), PREPARE.format("cityscapes") + " --resize_h_w 12 16 --config T/cityscapes_oasis.yaml",
        "cityscapes_oasis", CITYSCAPES),
    "cityscapes_trainids": Format(
        several(real("cityscapes"), link(images="leftImg8bit/train", seg_maps="gtFine/train"),
                table_with("cityscapes_trainids",
                           suffixes={"images": "_leftImg8bit", "seg_maps": "_gtFine_labelTrainIds"})),
        BUILD.format("S/mine.yaml"), "cityscapes_trainids", {"sky", NOTHING, "road", "car", "person"}),
    "mapillary_1.2": Format(mapillary("v1.2"), PREPARE.format("mapillary"), "", vistas_classes("v1.2"),
                            {i * 256 + 1 for i in range(66)}),
    "mapillary_2.0": Format(mapillary("v2.0"), PREPARE.format("mapillary"), "", vistas_classes("v2.0"),
                            {i * 256 + 1 for i in range(124)}),
    "camvid_11": Format(
        several(*(pairs(f"{s}/0001TP_006690.png", f"{s}annot/0001TP_006690.png", [0, 3, 10, 11])
                  for s in ("train", "val", "test"))),
        PREPARE.format("camvid"), "camvid", ["sky", "road", "bicyclist", NOTHING]),
    "camvid_32": Format(
        real("camvid"),
        "prepare_dataset.py custom --source S --images train --labels trainannot --output O --lmdb"
        " --config T/camvid32.yaml", "camvid32", [NOTHING, "Animal", "Archway", "Bicyclist"]),
    "camvid_32_ids": Format(
        several(pairs("i/0001TP_006690.png", "m/0001TP_006690_L.png", [0, 29, 30, 31]), link(images="i", seg_maps="m"),
                table_with("camvid32", suffixes={"seg_maps": "_L"})),
        BUILD.format("S/mine.yaml"), "camvid32", ["Animal", "VegetationMisc", NOTHING, "Wall"]),
    "facades": Format(
        several(*(pairs(f"{part}/cmp_{letter}000{n}.jpg", f"{part}/cmp_{letter}000{n}.png", [1, 2, 12, 0],
                        [v for i in range(256) for v in (i, 255 - i, 128)])
                  for part, letter in (("base", "b"), ("extended", "x")) for n in (1, 2))),
        PREPARE.format("facades") + " --num_val 2", "facades", ["background", "facade", "shop", "unlabelled"]),
    "celebamask_hq": Format(face_parts, PREPARE.format("celebamask_hq"), "celebamask_hq",
                            {"skin", "r_eye", "hair", "cloth", "background"}),
    "celebamask_hq_bisenet": Format(
        several(pairs("i/0.jpg", "m/0.png", [*range(19)]), link(images="i", seg_maps="m")),
        BUILD.format("T/celebamask_hq_bisenet.yaml"), "celebamask_hq_bisenet",
        BISENET),
    "loveda": Format(
        several(*(pairs(f"{s}/{scene}/images_png/{n}.png", f"{s}/{scene}/masks_png/{n}.png", [0, 1, 2, 7])
                  for s, n in (("Train", 0), ("Val", 2522)) for scene in ("Rural", "Urban"))),
        PREPARE.format("loveda"), "loveda", [NOTHING, "background", "building", "agriculture"]),
    "isprs_potsdam": Format(
        isprs("2_Ortho_RGB", "5_Labels_all_noBoundary",
              ("top_potsdam_2_10_RGB.tif", "top_potsdam_2_10_label_noBoundary.tif")),
        PREPARE.format("isprs") + " --labels 5_Labels_all_noBoundary", "isprs", ISPRS_CLASSES),
    "isprs_vaihingen": Format(
        isprs("top", "gts_for_participants", ("top_mosaic_09cm_area1.tif",) * 2),
        PREPARE.format("isprs"), "isprs", ISPRS_CLASSES),
    "voc": Format(
        several(pairs("JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png", [0, 1, 20, 255],
                      voc_palette()),
                pairs("JPEGImages/2007_000033.jpg", "SegmentationObject/2007_000032.png", [0, 1, 2], voc_palette()),
                lambda root: (root / "ImageSets/Main").mkdir(parents=True)),
        PREPARE.format("voc"), "", ["background", "aeroplane", "tvmonitor", NOTHING], {0, 1, 2}),
    "voc_aug": Format(
        several(pairs("JPEGImages/2007_000032.jpg", "SegmentationClassAug/2007_000032.png", [0, 1, 20, 255]),
                pairs("JPEGImages/2007_000033.jpg", "SegmentationClassAug/2007_000033.png", [0]),
                lambda root: (root / "trainaug.txt").write_text("2007_000032\n"),
                link(images="JPEGImages", seg_maps="SegmentationClassAug")),
        BUILD.format("T/voc.yaml") + " --input_list S/trainaug.txt", "voc",
        ["background", "aeroplane", "tvmonitor", NOTHING]),
    "pascal_context": Format(
        several(pairs("JPEGImages/2008_000002.jpg", "SegmentationClassContext/2008_000002.png", [0, 1, 2, 59]),
                lambda root: photo(root / "JPEGImages/2008_000003.jpg"),
                link(images="JPEGImages", seg_maps="SegmentationClassContext")),
        BUILD.format("T/pascal_context.yaml") + " --drop_unpaired", "pascal_context",
        [NOTHING, "aeroplane", "bag", "wood"]),
    "lip": Format(
        pairs("train_images/1000_1234574.jpg", "train_segmentations/1000_1234574.png", [0, 14, 15, 19]),
        "prepare_dataset.py custom --source S --images train_images --labels train_segmentations --output O --lmdb"
        " --config T/lip.yaml", "lip", ["background", "left-arm", "right-arm", "right-shoe"]),
    "deepfashion_multimodal": Format(
        several(pairs("images/WOMEN-Tees-id_1_4_full.jpg", "segm/WOMEN-Tees-id_1_4_full_segm.png", [0, 1, 17, 23]),
                lambda root: photo(root / "images/WOMEN-Tees-id_2_4_full.jpg"),
                link(images="images", seg_maps="segm"),
                table_with("deepfashion_multimodal", suffixes={"seg_maps": "_segm"})),
        BUILD.format("S/mine.yaml") + " --drop_unpaired", "deepfashion_multimodal",
        ["background", "top", "wrist wearing", "tie"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_files_become_their_classes(name, commands, tmp_path):
    """As a user would: the download, the command of the page, and what an LMDB holds in the end."""
    form = FORMATS[name]
    places = {"S": tmp_path / "download", "O": tmp_path / "out", "T": TABLES}
    places["S"].mkdir()
    form.write(places["S"])
    script, *arguments = form.command.split()
    typed = [re.sub(r"^[SOT](?=/|$)", lambda m: str(places[m[0]]), word) for word in arguments]
    result = commands.run(f"scripts/{script}", *typed, "--num_workers", "0")
    assert result.returncode == 0, result.stderr
    labels = load_labels(TABLES / f"{form.table}.yaml" if form.table else tmp_path / "out/labels.yaml")
    store = open_source(tmp_path / "out/train", ["images", "seg_maps"])
    ids = labels.to_train_ids(read_labels(store.read(store.keys[0], "seg_maps"), name, labels), name)
    found = [NOTHING if i == labels.dont_care_id else labels.name(i) for i in ids.reshape(-1).tolist()]
    if isinstance(form.classes, set):
        assert {*found} == form.classes
    else:
        assert found[: len(form.classes)] == form.classes
    if form.instances:
        store = open_source(tmp_path / "out/train", ["seg_maps", "inst_maps"])
        numbers = decode_instances(store.read(store.keys[0], "inst_maps"), name)
        assert {*np.unique(numbers).tolist()} == form.instances


def test_cityscapes_own_tool_draws_no_license_plate():
    """What lies beneath a plate shows, so no label ids are 255; a group has its class's id, without a number."""
    truth = "gtFine/train/aachen/aachen_000000_000019_gtFine"
    files = {name: base64.b64decode(EXPORTS["cityscapes"]["files"][f"{truth}_{name}.png"]["base64"])
             for name in ("labelIds", "labelTrainIds", "instanceIds")}  # fmt: skip
    ids, train_ids, objects = (decode_label(data, name) for name, data in files.items())
    plate, car, group, static = (6, 3), (4, 2), (5, 9), (10, 0)
    assert (ids.dtype, train_ids.dtype, objects.dtype) == (np.uint8, np.uint8, np.uint16)
    assert [int(ids[place]) for place in (plate, car, group, static)] == [26, 26, 26, 4]
    assert [int(train_ids[place]) for place in (plate, car, group, static)] == [13, 13, 13, 255]
    assert [int(objects[place]) for place in (plate, car, group, static)] == [26000, 26000, 26, 4]


def test_the_colours_of_vistas_2_do_not_tell_ids():
    for version, expected in (("v1.2", (66, 0, 0)), ("v2.0", (124, 36, 11))):
        entries = [line.split() for line in EXPORTS["mapillary"]["files"][f"{version}.txt"].splitlines()]
        uses = [number for number in Counter(tuple(colour) for _, *colour in entries).values() if number > 1]
        assert (len(entries), sum(uses), len(uses)) == expected and entries[-1][0] == "void--unlabeled"


@pytest.mark.parametrize("tool", ["coco_stuff", "coco_panoptic"])
def test_cocos_other_kinds_of_json(tool, commands, tmp_path):
    """Stuff (run length codes) and panoptic (ids in the colours of PNGs): a JSON for each split."""
    pytest.importorskip("pycocotools", reason="the package pycocotools (extra data) is not installed")
    source = export(tool, tmp_path / "export")
    command = ["scripts/prepare_dataset.py", "coco", "--source", str(source), "--num_workers", "0", "--output"]
    result = commands.run(*command, str(tmp_path / "raw"))
    assert result.returncode == 0, result.stderr
    assert load_labels(tmp_path / "raw/labels.yaml").names == ("cat", "straße")
    found = decode_label((tmp_path / "raw/train/seg_maps/a.png").read_bytes(), tool)
    assert rows(found) == EXPORTS[tool]["classes"]["a"]
    maps = {path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").glob("*/seg_maps/**/*.png")}
    assert maps == {"train/seg_maps/a.png"} | ({"val/seg_maps/sub/b.png"} if tool == "coco_stuff" else set())
    if tool == "coco_panoptic":
        (source / "annotations/panoptic_train/a.png").unlink()
        result = commands.run(*command, str(tmp_path / "again"))
        assert result.returncode == 2 and re.search(
            r"its panoptic map is not there: .*panoptic_train.a\.png", result.stderr
        )


def texts(**files: str) -> Callable[[Path], None]:
    """Make a photo, and text files."""

    def write(root: Path) -> None:
        photo(root / "a.jpg")
        for name, text in files.items():
            (root / name.replace("_DOT_", ".")).write_text(text)

    return write


def folder(name: str, file: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).mkdir()
        (root / name / file).write_bytes(b"MATLAB 5.0 MAT-file")

    return write


NOT_READ = {
    "ade20k_2016": ("ade20k_full", texts(a_atr_DOT_txt="001 # 0 # 0 # sky # sky # \"\"\n"), "no classes there"),
    "cvat_xml": ("cvat", texts(annotations_DOT_xml="<annotations/>"), "labelmap.txt is needed"),
    "datumaro_json": (
        "coco", texts(train_DOT_json='{"info": {}, "categories": {"label": {"labels": []}}, "items": []}'),
        "no JSON of COCO with masks"),
    "labelme_xml": ("labelme", texts(a_DOT_xml="<annotation/>"), "no classes there"),
    "mat_files": ("custom", several(pairs("images/a.jpg", "seg/a.png", [0]), folder("labels", "a.mat")),
                  "a.png"),
    "facades_pix2pix": ("facades", pairs("train/1.jpg", "train/1.png", [0]), "no base/*.jpg or extended/*.jpg"),
    "deepfashion2": ("coco", texts(a_DOT_json='{"source": "shop", "pair_id": 1, "item1": {"segmentation": [[1, 2]]}}'),
                     "no JSON of COCO with masks"),
    "label_studio_png": ("label_studio", texts(), "no classes there"),
}  # fmt: skip
"""Formats that are not read -> the source that a user would try, and the words of the message."""


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_ends_with_a_message(name, commands, tmp_path):
    source, write, words = NOT_READ[name]
    (tmp_path / "S").mkdir()
    write(tmp_path / "S")
    result = commands.run(
        "scripts/prepare_dataset.py", source, "--source", str(tmp_path / "S"), "--output", str(tmp_path / "O")
    )
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "O").exists()


@pytest.mark.parametrize(("values", "other"), [([0, 10, 12, 91, 181, 255], False), ([0, 10, 11, 79, 170, 255], True)])
def test_a_build_says_that_coco_stuff_may_be_numbered_otherwise(values, other, commands, tmp_path):
    """No file of the 182 ids shows a street sign (11); files of 171 classes do, where they mean a stop sign."""
    pairs("raw/images/a.jpg", "raw/seg_maps/a.png", values)(tmp_path)
    result = commands.run(
        "scripts/build_lmdb.py", "--config", str(TABLES / "cocostuff.yaml"), "--data_root", str(tmp_path / "raw"),
        "--output_root", str(tmp_path / "out"), "--num_workers", "0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    note = "11 (street sign) occur, which label maps of this data set never show: are their ids numbered otherwise"
    assert (f"note: {note}" in result.stdout) == other


def test_pixel_maps_of_the_stuff_challenge_are_refused(commands, tmp_path):
    """They count as labels.txt does, one more than cocostuff.yaml; their 183 gives them away."""
    for split in ("train", "val"):
        pairs(f"{split}2017/1.jpg", f"stuffthingmaps/{split}2017/1.png", [0, 92, 183])(tmp_path)
    result = commands.run(
        "scripts/prepare_dataset.py", "cocostuff", "--source", str(tmp_path), "--output", str(tmp_path / "O"),
        "--lmdb", "--num_workers", "0",
    )  # fmt: skip
    assert result.returncode == 2 and re.search(r"1\.png: label value\(s\) 183 outside the table", result.stderr)


# ------------------------------------------------------------------------------------------------ the page


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the rows of the tables below a heading."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE, re.S | re.M)[1]
    lines = [line.strip("| \n").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[-1] not in ("proof", "---|---") and not cells[0].startswith("---")]


HEADINGS = ("Data sets", "Tools", "What other systems make of the files")


def test_every_row_names_its_proof():
    """The last cell of each row is a test that exists; each table, source and parameter has a row."""
    used, known = set(), dict[str, set[str]]()
    for name in {*re.findall(r"`(test_\w+\.py)::", PAGE)}:
        tree = ast.parse((REPOSITORY / "tests" / name).read_text(encoding="utf-8"))
        known[name] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for heading in HEADINGS:
        for cells in table_rows(heading):
            proofs = re.findall(r"`(test_\w+\.py)::(test_\w+)(?:\[([\w.-]+)\])?`", cells[-1])
            assert proofs, cells
            for file, test, parameter in proofs:
                assert test in known[file], f"{cells[0]}: no test {file}::{test}"
                if file == "test_formats.py" and parameter:
                    used.add(parameter)
                    form = FORMATS.get(parameter)
                    stated = " ".join(cells)
                    assert form is None or not form.table or f"`{form.table}.yaml`" in stated, (cells[0], form.table)
                    prepared = form and re.match(r"prepare_dataset\.py (\w+)", form.command)
                    assert not prepared or f"`{prepared[1]}`" in stated, (cells[0], form.command)
    parameters = {*FORMATS, *NOT_READ, "coco_stuff", "coco_panoptic"}
    assert used == parameters, used ^ parameters
    tables = {path.name for path in TABLES.glob("*.yaml")} - {"sample.yaml"}
    assert tables <= {*re.findall(r"`(\w+\.yaml)`", PAGE)}, "a label table has no row"
    assert {*NAMES} <= {*re.findall(r"`(\w+)`", PAGE)}, "a source of prepare_dataset.py has no row"


def config_of(system: str, setting: str, folder: Path):
    """The config that our importer makes for a system's weights of a data set."""
    number = int((re.search(r"(?:label_nc|seg_maps) (\d+)", setting) or [0, 0])[1])
    if system == "imaginaire":
        (folder / "theirs.yaml").write_text(IMAGINAIRE.replace("{seg_maps: 183}", f"{{seg_maps: {number}}}"))
        return parse_config(yaml.safe_load(import_config(system, folder / "theirs.yaml")[0]))
    options: dict[str, object] = {"dataset_mode": re.search(r"dataset_mode (\w+)", setting)[1]}
    options |= {"label_nc": number} if number else {}
    if system == "oasis":
        options |= {"batch_size": 4, "lr_g": 1e-4, "lr_d": 4e-4} | ({"contain_dontcare_label": True} if number else {})
    else:
        has_dont_care = "contain_dontcare_label" in setting
        options |= {"batchSize": 1, "no_instance": True, "norm_mode": "clade", "contain_dontcare_label": has_dont_care}
    return parse_config(yaml.safe_load(import_config(system, opt_txt(folder / "opt.txt", **options))[0]))


@pytest.mark.parametrize("cells", table_rows(HEADINGS[2]), ids=lambda cells: f"{cells[0]}-{cells[1]}")
def test_the_page_states_other_systems_channels(cells, tmp_path):
    """They are those of the networks that our importer makes for that system's weights."""
    _, systems, setting, stated, refused, _ = cells
    lights = {}
    for first, last, channel in re.findall(r"(\d+)(?:\.\.(\d+))? → (\d+)", stated):
        begin, end = int(first), int(last or first)
        lights |= {raw: int(channel) + raw - begin for raw in {begin, (begin + end) // 2, end}}
    assert lights
    for system in re.findall(r"`(\w+)`", systems):
        config = config_of(system, setting, tmp_path)
        found = channels(config, tmp_path, list(lights))
        if system == "oasis":  # its don't care is the first channel, ours the last
            count = config.data.labels.num_classes + config.data.labels.dont_care
            found = [(channel + 1) % count for channel in found]
        assert dict(zip(lights, found, strict=True)) == lights
        for raw in map(int, re.findall(r"\d+", refused)):
            with pytest.raises(LabelError, match=rf"\b{raw}\b.* outside the table"):
                channels(config, tmp_path, [next(iter(lights)), raw])
