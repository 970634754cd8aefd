"""Let the annotation tools write ``tool_exports.json``, for ``test_annotation_exports.py`` and ``test_formats.py``.

Run it in an environment of its own, since these packages bring another OpenCV (and cityscapesScripts cannot write
instance maps with a newer Pillow):

    pip install labelme datumaro label-studio-converter cityscapesScripts "pillow<13"
    QT_QPA_PLATFORM=offscreen python tests/make_tool_exports.py

Each export holds its files (text, or base64 of photos and masks) and, as rows of one character per pixel, the classes
that the tool itself makes of them ("." where there is none).
"""

import base64
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16
PHOTO = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


def photo(path, orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(PHOTO).save(path, exif=exif)


def rows(ids):
    """Rows of one character per pixel: class 1 is "0", and 0 is "."."""
    return ["".join("." if i == 0 else str(i - 1) for i in row) for row in np.asarray(ids).tolist()]


def labelme(root):
    from labelme import utils
    from labelme._label_file import LabelFile, read_label_file

    mask = np.zeros((4, 5), bool)
    mask[1:, 1:4] = True

    def shape(label, kind, points, **more):
        return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}

    shapes = [
        shape("road", "polygon", [[0.6, 1.2], [10.7, 0.4], [9.5, 9.9], [2, 10]]),
        shape("car", "rectangle", [[6.2, 5.7], [3.5, 2.4]]),
        shape("sun", "circle", [[8, 7], [9.5, 8.2]]),
        shape("road", "line", [[1, 11], [3, 11]]),
        shape("car", "oriented_rectangle", [[7, 1], [10, 2], [9, 4], [6, 3]]),
        shape("bird", "mask", [[1, 4], [5, 7]], mask=utils.img_arr_to_b64(mask)),
    ]  # fmt: skip
    expected = {}
    photo(root / "a.jpg")
    photo(root / "turned.jpg", orientation=6)
    for name in ("a", "turned"):
        data = LabelFile.load_image_file(str(root / f"{name}.jpg"))
        size = utils.img_data_to_pil(data).size
        LabelFile().save(
            str(root / f"{name}.json"), shapes=shapes, image_path=f"{name}.jpg", image_height=size[1],
            image_width=size[0], image_data=None,
        )  # fmt: skip
        read = read_label_file(str(root / f"{name}.json")).shapes
        numbers = {"bird": 1, "car": 2, "road": 3, "sun": 4}
        expected[name] = rows(utils.shapes_to_label(size[::-1], read, numbers)[0])
    return expected


def datumaro(root):
    from datumaro.components.annotation import Bbox, Mask, Polygon
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image as Media

    high, low = np.zeros((2, HEIGHT, WIDTH), bool)
    high[1:8, 2:12], low[5:11, 6:15] = True, True
    media = Media.from_numpy(PHOTO)
    drawn = {
        ("a", "train"): [Mask(high, label=1, id=1, group=1), Mask(low, label=2, id=2, group=2, z_order=1)],
        ("sub/b", "val"): [Polygon([2, 2, 10, 2, 10, 10], label=2), Bbox(1, 1, 5, 5, label=1)],
        ("c", "val"): [],
    }
    items = [DatasetItem(key, subset=split, media=media, annotations=a) for (key, split), a in drawn.items()]
    data = Dataset.from_iterable(items, categories=["background", "cat", "straße"])
    form = {"coco": "coco_instances", "voc": "voc_segmentation"}.get(root.name, root.name)
    data.export(str(root), form, save_media=True)
    classes = np.zeros((HEIGHT, WIDTH), int)
    if root.name == "voc":
        classes[:] = 1
        classes[high], classes[low] = 2, 3
    else:  # small ones on top
        classes[high], classes[low] = 1, 2
    return {"a": rows(classes)}


def label_studio(root):
    from label_studio_converter import brush

    distance = np.hypot(*(np.mgrid[:HEIGHT, :WIDTH] - [[[6]], [[7]]]))
    masks = [np.clip((radius - distance) * 100 + 128, 0, 255).astype(np.uint8) for radius in (5, 3)]
    results = [
        {"id": name, "type": "brushlabels", "from_name": "tag", "to_name": "image", "image_rotation": 0,
         "original_width": WIDTH, "original_height": HEIGHT, "origin": "manual",
         "value": {"format": "rle", "rle": brush.mask2rle(mask), "brushlabels": [name]}}
        for name, mask in zip(("tree", "sky"), masks, strict=True)
    ]  # fmt: skip
    choice = {"id": "c", "type": "choices", "from_name": "q", "to_name": "image", "value": {"choices": ["good"]}}
    note = {
        "id": 3,
        "was_cancelled": False,
        "ground_truth": False,
        "updated_at": "2026-01-02",
        "result": [*results, choice],
    }
    older = {"id": 2, "was_cancelled": False, "ground_truth": False, "updated_at": "2026-01-01", "result": results[:1]}
    task = {"id": 7, "data": {"image": "/data/upload/1/0123abcd-my%20photo.jpg"}, "annotations": [older, note]}
    (root / "project-1.json").write_text(json.dumps([task, {**task, "id": 8, "annotations": []}]))
    photo(root / "photos/my photo.jpg")
    classes = np.zeros((HEIGHT, WIDTH), int)
    for result, number in zip(results, (2, 1), strict=True):
        alpha = brush.decode_rle(result["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3]
        classes[alpha > 127] = number
    return {"my photo": rows(classes)}


def cityscapes(root):
    """Write one annotated photo per split with the tool that wrote the data set's own label maps."""
    from cityscapesscripts.preparation.json2instanceImg import json2instanceImg
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    boxes = {
        "road": (0, 6, 15, 11), "sky": (0, 0, 15, 5), "car": (2, 4, 6, 8), "license plate": (3, 6, 4, 7),
        "cargroup": (8, 4, 11, 8), "person": (13, 6, 14, 10), "static": (0, 9, 1, 11),
    }  # fmt: skip
    objects = [{"label": name, "polygon": [[a, b], [c, b], [c, d], [a, d]]} for name, (a, b, c, d) in boxes.items()]
    for split, city in (("train", "aachen"), ("val", "lindau")):
        stem = f"{split}/{city}/{city}_000000_000019"
        photo(root / f"leftImg8bit/{stem}_leftImg8bit.png")
        truth = root / f"gtFine/{stem}_gtFine"
        truth.parent.mkdir(parents=True)
        annotation = root / f"gtFine/{stem}_gtFine_polygons.json"
        annotation.write_text(json.dumps({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}))
        for name, encoding in (("labelIds", "ids"), ("labelTrainIds", "trainIds")):
            json2labelImg(str(annotation), f"{truth}_{name}.png", encoding)
        json2instanceImg(str(annotation), f"{truth}_instanceIds.png", "ids")
    return {}


def camvid(root):
    """Write one image in CamVid's own 32 colours."""
    from datumaro.components.annotation import Mask
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image as Media
    from datumaro.plugins.data_formats.camvid import CamvidLabelMap

    masks = [Mask(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) == i, label=i) for i in range(len(CamvidLabelMap))]
    item = DatasetItem("a", subset="train", media=Media.from_numpy(PHOTO), annotations=masks)
    data = Dataset.from_iterable([item], categories=list(CamvidLabelMap))
    data.export(str(root), "camvid", save_media=True, label_map="camvid")
    return {}


def mapillary(root):
    """Write the names and colours of both versions of Vistas, as Datumaro knows them."""
    from datumaro.plugins.data_formats.mapillary_vistas.format import MapillaryVistasLabelMaps

    for release, colours in MapillaryVistasLabelMaps.items():
        labels = [f"{name} {red} {green} {blue}" for name, (red, green, blue) in colours.items()]
        (root / f"{release}.txt").write_text("\n".join(labels))
    return {}


def content(path):
    data = path.read_bytes()
    return data.decode() if path.suffix in (".json", ".txt") else {"base64": base64.b64encode(data).decode()}


if __name__ == "__main__":
    packages = ("labelme", "datumaro", "label-studio-converter", "cityscapesScripts", "pycocotools", "pillow")
    exports = {"versions": {package: version(package) for package in packages}}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (
            ("labelme", labelme), ("coco", datumaro), ("voc", datumaro), ("label_studio", label_studio),
            ("coco_stuff", datumaro), ("coco_panoptic", datumaro), ("cityscapes", cityscapes), ("camvid", camvid),
            ("mapillary", mapillary),
        ):  # fmt: skip
            root = Path(folder, name)
            root.mkdir()
            expected = write(root)
            files = {p.relative_to(root).as_posix(): content(p) for p in sorted(root.rglob("*")) if p.is_file()}
            exports[name] = {"files": files, "classes": expected}
    text = json.dumps(exports, indent=1, ensure_ascii=False)
    Path(__file__).with_name("tool_exports.json").write_text(text + "\n", encoding="utf-8")
