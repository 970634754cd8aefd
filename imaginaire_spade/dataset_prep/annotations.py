"""Read what annotation tools export: COCO, labelme, Label Studio, CVAT and VOC, one mask per part.

Responsible for the regions of each photo, their classes and their order; ``prepare`` writes the files. A pixel that no
region covers has no class. A photo with an EXIF orientation is turned as the tool showed it to its user.
"""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS, decode_label, image_size
from imaginaire_spade.data.photos import decode_stored, read_header
from imaginaire_spade.dataset_prep import samples
from imaginaire_spade.dataset_prep.coco import Area, coco_regions
from imaginaire_spade.dataset_prep.samples import Export, Options, RawSample, find_folder, find_images, no_class
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.files import encode_image, read_json, read_text

Regions = Sequence[tuple[Any, str, Area]]
"""Class or id, place of the description, and what draws it; the last lies on top."""


class Annotated(NamedTuple):
    """A photo, and what an export says of it."""

    split: str
    key: str
    photo: Path
    size: tuple[int, int]
    """Height and width of the regions."""
    regions: Regions


def paint(regions: Regions, size: tuple[int, int], below: int | NDArray[np.generic]) -> bytes:
    """Draw regions, whose classes are ids, upon ids: a PNG of 8 bits, or 16 as needed.

    Args:
        size: (height, width).
        below: the ids where no region is.
    Raises:
        DataError: a region cannot be drawn, or has another size.
    """
    ids = np.full(size, below, np.int32)
    for value, where, area in regions:
        try:
            inside = area()
        except Exception as error:  # pycocotools raises whatever comes
            raise error if isinstance(error, DataError) else DataError(f"{where}: unreadable: {error!r}") from None
        if inside.shape != size:
            raise DataError(f"{where} is of another size than its image: {inside.shape}, not {size}")
        ids[inside] = value
    return samples.encode_ids(ids)


def mask_file(path: Path) -> NDArray[np.bool_]:
    """Read a mask of one part, 0/1 or 0/255: bool [H, W]."""
    values = decode_label(path.read_bytes(), str(path))
    values = values.max(2) if values.ndim == 3 else values
    return values > values.max() / 2


# ------------------------------------------------------------------------------------------------ photos


def _turn(path: Path, size: tuple[int, int]) -> dict[str, Callable[[], bytes]]:
    """Return how to make a photo that was annotated at ``size`` (height, width); nothing where a copy does.

    Tools show a photo as its EXIF orientation says; a size that only the stored pixels have decides otherwise.

    Raises:
        DataError: no image, or of another size.
    """
    header = read_header(path.read_bytes(), str(path))
    upright = header.shown_size(True)
    if size not in (header.size, upright):
        sizes = f"{upright[0]} x {upright[1]} (height x width), but its annotations are for {size[0]} x {size[1]}"
        raise DataError(f"{path}: {sizes}: they are of another photo, or one of them was resized")
    return {"images": partial(_without_orientation, path, size == upright)} if header.orientation != 1 else {}


def _without_orientation(path: Path, turn: bool) -> bytes:
    """Encode a photo without its EXIF orientation, turned as it says or with its pixels where they are."""
    photo = decode_stored(path.read_bytes(), str(path), upright=turn)
    return encode_image(photo[..., [0, 0, 0, 1]] if photo.shape[2] == 2 else photo, path.suffix)  # (grey with alpha)


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Map file names to the photos below a folder that have them."""
    photos: dict[str, list[Path]] = {}
    for path in find_images(folder).values():
        photos.setdefault(path.name, []).append(path)
    return photos


def _find_photo(photos: Mapping[str, list[Path]], name: str, *folders: Path) -> Path:
    """Return the photo at ``name`` below one of the folders, or the only one of ``photos`` with that file name.

    Raises:
        DataError: several photos could be meant.
    """
    places = [folder / name.replace("\\", "/") for folder in folders]
    found = [place for place in places if place.is_file()][:1] or photos.get(places[0].name, places[:1])
    if len(found) > 1:
        raise DataError(f"{name}: several photos have this name: {', '.join(map(str, found[:5]))}")
    return found[0]


# ------------------------------------------------------------------------------------------------ JSON


_Reader = Callable[[Path, Any], Iterator[Annotated]]
"""Takes a JSON file and its content."""


def _gather(paths: Sequence[Path], tool: str, read: _Reader) -> tuple[list[Annotated], list[str]]:
    """Read the photos of JSON files, and the names of their classes in alphabetical order."""
    found: list[Annotated] = []
    for path in paths:
        tree = read_json(path)
        try:
            found += read(path, tree)
        except Exception as error:  # whatever comes of other trees
            if isinstance(error, UserError):
                raise
            raise DataError(f"{path}: no JSON of {tool} with masks: {error!r}") from None
    return found, sorted({name for photo in found for name, _, _ in photo.regions})


def _coco(source: Path, options: Options) -> Export:
    """Read COCO's polygons, run length codes and panoptic maps. Small regions lie upon large ones."""
    folder, categories, empty = source / (options.images or "."), dict[str, None](), list[str]()
    photos = _by_name(folder)

    def read(path: Path, tree: Any) -> Iterator[Annotated]:
        names = {category["id"]: str(category["name"]) for category in tree["categories"]}
        categories.update(dict.fromkeys(names.values()))
        regions = coco_regions(path, tree, empty)
        named = re.fullmatch("(?:instances|stuff|panoptic|person_keypoints)_(.+)", path.stem)
        subset, end = named[1] if named else path.parent.name, r"(?:^|[_-]){}(?:id|idation|ing)?\d*$"
        told = (
            split for split in ("val", "test") if split in subset.lower() or re.search(end.format(split), path.stem)
        )
        split = next(told, "train")
        for image in tree["images"]:
            name = image["file_name"]
            places = [path.parent, *(folder / place for place in (f"images/{subset}", subset, "images", "."))]
            ordered = sorted(regions[image["id"]], key=lambda region: -region[0])
            if unknown := [where for _, category, where, _ in ordered if category not in names]:
                raise DataError(f"{unknown[0]}: its category_id is not in the list of categories")
            key = PurePosixPath(name.replace("\\", "/")).with_suffix("")
            key = PurePosixPath(key.name) if key.is_absolute() or ".." in key.parts else key
            drawn = [(names[category], where, area) for _, category, where, area in ordered]
            size = (image["height"], image["width"])
            yield Annotated(split, key.as_posix(), _find_photo(photos, name, *places), size, drawn)

    files = samples.find_files(source, "**/instances_*.json") or samples.find_files(source, "**/*.json")
    found, used = _gather([source / options.labels] if options.labels else files, "COCO", read)
    if not used:
        raise DataError(f"{source}: COCO JSON with masks is not there ({len(empty)} boxes): export segmentation")
    notes = [f"{len(empty)} annotations left out, which have no mask: {empty[0]} ..."] if empty else []
    # (Roboflow lists the project itself as a category, which is never used.)
    return _export(found, [name for name in categories if name in used], options, notes)


def _labelme(source: Path, options: Options) -> Export:
    """Read labelme's JSON, one file for each photo. Later shapes lie upon earlier ones, as in labelme's own export."""
    photos = _by_name(source / (options.images or "."))

    def read(path: Path, tree: Any) -> Iterator[Annotated]:
        size, regions = (tree["imageHeight"], tree["imageWidth"]), []
        for number, shape in enumerate(tree["shapes"]):
            where, kind = f"{path}: shape {number}", shape.get("shape_type") or "polygon"
            if kind not in (*_DRAW, "mask"):
                raise DataError(f"{where}: a shape of type {kind!r}; those that are read: mask, {', '.join(_DRAW)}")
            area = partial(_labelme_shape, kind, shape["points"], shape.get("mask"), size)
            regions.append((shape["label"], where, area))
        key = path.relative_to(source).with_suffix("").as_posix()
        yield Annotated("train", key, _find_photo(photos, tree["imagePath"], path.parent), size, regions)

    found, names = _gather(samples.find_files(source, "**/*.json"), "labelme", read)
    return _export(found, [name for name in names if name != "__ignore__"], options)


_DRAW: dict[str, Callable[..., None]] = {
    "polygon": lambda draw, *points: draw.polygon(points, 1, 1),
    "oriented_rectangle": lambda draw, *points: draw.polygon(points, 1, 1),
    "rectangle": lambda draw, *points: draw.rectangle((*map(min, *points), *map(max, *points)), 1, 1),
    "circle": lambda draw, centre, point: draw.circle(centre, math.dist(centre, point), 1, 1),
    "line": lambda draw, *points: draw.line(points, 1, 10),
    "linestrip": lambda draw, *points: draw.line(points, 1, 10),
    "point": lambda draw, point: draw.circle(point, 5, 1, 1),
}
"""Type of shape -> how labelme makes an area of it: lines are 10 pixels wide, points discs of radius 5."""


def _labelme_shape(kind: str, points: list[list[float]], mask: str | None, size: tuple[int, int]) -> NDArray[np.bool_]:
    if kind != "mask":
        canvas = Image.new("L", size[::-1])
        _DRAW[kind](ImageDraw.Draw(canvas), *map(tuple, points))
        return np.asarray(canvas) != 0
    inside, stored = np.zeros(size, np.bool_), np.asarray(Image.open(io.BytesIO(base64.b64decode(mask or ""))))
    x, y = map(int, points[0])
    inside[y : y + stored.shape[0], x : x + stored.shape[1]] = stored != 0
    return inside


def _label_studio(source: Path, options: Options) -> Export:
    """Read Label Studio's JSON: brushes and polygons. Later regions lie upon earlier ones.

    Of several annotations of a photo the ground truth counts, or the one that was updated last.
    """
    folder = source / (options.images or ".")
    photos = _by_name(folder)

    def read(path: Path, tasks: Any) -> Iterator[Annotated]:
        for task in tasks:
            url = next(text for text in task["data"].values() if str(text).lower().endswith(IMAGE_EXTENSIONS))
            photo = _find_photo(photos, name := re.split("[/=]", unquote(url))[-1], folder)
            if not photo.is_file():  # uploads get eight digits in front
                photo = _find_photo(photos, re.sub("^[0-9a-f]{8}-", "", name), folder)
            done = [note for note in task["annotations"] if not note.get("was_cancelled")]
            best: dict[str, Any] = max(
                done, key=lambda a: (bool(a.get("ground_truth")), a.get("updated_at", "")), default={}
            )
            regions, size = [], (0, 0)
            for result in best.get("result", []):
                kind, where = str(result.get("type")), f"{path}: task {task['id']}, region {result.get('id')}"
                if not kind.endswith("labels"):
                    continue  # choices, texts
                names, size = result["value"][kind], (result["original_height"], result["original_width"])
                turned = result.get("image_rotation", 0)
                if kind not in ("brushlabels", "polygonlabels") or len(names) != 1 or turned:
                    readable = "brushlabels and polygonlabels of one class each, on photos that are not turned"
                    raise DataError(f"{where}: {kind} {names}, photo turned by {turned} degrees; read are {readable}")
                regions.append((names[0], where, partial(_label_studio_area, result["value"], size)))
            yield Annotated("train", photo.stem, photo, size, regions)

    paths = [source / options.labels] if options.labels else samples.find_files(source, "*.json")
    found, names = _gather(paths, "Label Studio (not JSON-MIN)", read)
    return _export(found, names, options)


def _label_studio_area(value: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw a polygon in percent, or a brush: RGBA in the code "rle-pack", whose alpha says how much is covered.

    The head of a code states the number of values (32 bits), the bits of a value (5) and of four kinds of length (4
    each). Each block is one bit (a run?), two bits (the kind of its length), its length and its value or values.
    """
    height, width = size
    if "rle" not in value:
        return _labelme_shape("polygon", [[x * width / 100, y * height / 100] for x, y in value["points"]], None, size)
    bits, place, at = "".join(f"{byte:08b}" for byte in value["rle"]), 0, 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word, lengths = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    if total != 4 * height * width:
        raise ValueError(f"{total} values for {height} x {width} pixels")
    values = np.zeros(total, np.uint8)
    while at < total:
        is_run, end = read(1), at + 1 + read(lengths[read(2)])
        values[at:end] = read(word) if is_run else [read(word) for _ in range(end - at)]
        at = end
    return values.reshape(height, width, 4)[..., 3] > 127


# ------------------------------------------------------------------------------------------------ masks in files


def _voc(source: Path, options: Options) -> Export:
    """Read CVAT's "Segmentation mask" and other exports in VOC's form: colours as labelmap.txt says."""
    path, colours, notes = source / "labelmap.txt", dict[str, tuple[int, int, int]](), list[str]()
    if not path.exists() and (source / "ImageSets/Main").is_dir():  # which exports of masks do not have
        text = _VOC.replace(" ", ":\n") + ":"
        notes.append(f"{path} is not there, so the classes are those of PASCAL VOC itself, in its colours")
    else:
        text = read_text(path, DataError, f"{path} is needed, with a line NAME:R,G,B:: for each class")
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        found = re.fullmatch(r"([^:]+):(?:(\d+),(\d+),(\d+))?(?::.*)?", line)
        if found is None:
            raise DataError(f"{path}: {line!r} is not NAME:R,G,B::")
        red, green, blue = map(int, found.groups()[1:]) if found[2] else _voc_colour(len(colours))
        colours[found[1]] = red, green, blue
    if double := [colour for colour, uses in Counter(colours.values()).items() if uses > 1]:
        raise DataError(f"{path}: several classes have the colour {double[0]}")
    classes = samples.number_classes(colours, options, path)
    masks = find_images(find_folder(source, "SegmentationClass", chosen=options.labels))
    objects, photos = (
        find_images(source / "SegmentationObject"),
        find_folder(source, "JPEGImages", chosen=options.images),
    )
    shown, made = find_images(photos), []
    val = set("".join(read_text(p, DataError) for p in source.glob("ImageSets/Segmentation/val*.txt")).split("\n"))
    for key, mask in masks.items():
        photo = shown.get(key, photos / f"{key}.jpg")
        draw = _turn(photo, image_size(mask.read_bytes(), str(mask))) if photo.is_file() else {}
        draw["seg_maps"] = partial(_by_colour, mask, colours, classes)
        files = {"images": photo} | ({"inst_maps": objects[key]} if key in objects else {})
        made.append(RawSample("val" if key in val else "train", key, files, draw=draw))
    if number := len(shown.keys() - masks):
        notes.append(f"{number} photos left out, which have no mask")
    return Export(made, list(classes), [colours[name] for name in classes], notes)


_VOC_BORDER = (224, 224, 192)
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
    " pottedplant sheep sofa train tvmonitor"
)
"""The classes of PASCAL VOC, whose own download has no labelmap.txt."""


def _voc_colour(index: int) -> list[int]:
    """Return the colour that VOC gives to a class: three bits of its number at a time, the lowest first."""
    return [sum((index >> 3 * i + channel & 1) << 7 - i for i in range(8)) for channel in range(3)]


def _by_colour(path: Path, colours: Mapping[str, tuple[int, int, int]], classes: Mapping[str, int]) -> bytes:
    """Turn a mask of colours into ids; VOC's colour of borders, and classes that have no id, are no class."""
    known = {_VOC_BORDER: no_class(len(classes))}
    known |= {colour: classes.get(name, no_class(len(classes))) for name, colour in colours.items()}
    with Image.open(path) as image:
        codes = np.asarray(image.convert("RGB"), np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    ids = np.full(codes.shape, -1, np.int32)
    for (red, green, blue), value in known.items():
        ids[codes == (red << 16 | green << 8 | blue)] = value
    if unknown := [(c >> 16, c >> 8 & 255, c & 255) for c in np.unique(codes[ids < 0]).tolist()]:
        raise DataError(f"{path}: {len(unknown)} colours that labelmap.txt does not have: {str(unknown[:5])[1:-1]}")
    return samples.encode_ids(ids)


def _parts(source: Path, options: Options) -> Export:
    """Merge one mask per part: PHOTO_PART.png, PHOTO/PART.png or PART/PHOTO.png. Later ``--classes`` lie on top."""
    photos = find_images(find_folder(source, "images", chosen=options.images))
    folder = find_folder(source, "masks", "labels", "seg_maps", chosen=options.labels)
    parts: dict[str, dict[str, Path]] = {key: {} for key in photos}
    for key, path in find_images(folder).items():
        cuts = [(key[: m.start()], key[m.end() :]) for m in re.finditer("[-_./]", key)][::-1]
        pair = next((cut for a, b in cuts for cut in ((a, b), (b, a)) if cut[0] in photos), None)
        if pair is None:
            raise DataError(f"{path}: of no photo; masks are named PHOTO_PART, PHOTO/PART or PART/PHOTO")
        parts[pair[0]][pair[1]] = path
    names = sorted({part for masks in parts.values() for part in masks})
    if not options.classes:
        raise DataError(f"{folder}: write the parts, from the lowest to the top one: --classes {' '.join(names)}")
    order, found = samples.number_classes(names, options, folder), list[Annotated]()
    for key, masks in parts.items():
        ordered = sorted(masks, key=lambda part: order.get(part, -1))
        regions = [(part, str(masks[part]), partial(mask_file, masks[part])) for part in ordered]
        size = image_size(Path(regions[0][1]).read_bytes(), regions[0][1]) if regions else (0, 0)
        found.append(Annotated("train", key, photos[key], size, regions))
    return _export(found, names, options, objects=False)


def _export(
    found: Sequence[Annotated], names: Sequence[str], options: Options, notes: Sequence[str] = (), objects: bool = True
) -> Export:
    """Give regions their ids. Regions of other classes have no class; photos without regions are left out."""
    classes, made = samples.number_classes(names, options, "the export"), []
    nothing = no_class(len(classes))
    for split, key, photo, size, regions in (item for item in found if item.regions):
        draw = _turn(photo, size) if photo.is_file() else {}
        ids = [(classes.get(name, nothing), where, area) for name, where, area in regions]
        draw["seg_maps"] = partial(paint, ids, size, nothing)
        if objects:
            numbered = [(number, where, area) for number, (_, where, area) in enumerate(regions, 1)]
            draw["inst_maps"] = partial(paint, numbered, size, 0)
        made.append(RawSample(split, key, {"images": photo}, draw=draw))
    if empty := len(found) - len(made):
        notes = [*notes, f"{empty} photos left out, in which nothing is annotated"]
    return Export(made, list(classes), notes=list(notes))


TOOLS: dict[str, Callable[[Path, Options], Export]] = {
    "coco": _coco, "cvat": _voc, "label_studio": _label_studio, "labelme": _labelme, "parts": _parts, "voc": _voc
}  # fmt: skip
