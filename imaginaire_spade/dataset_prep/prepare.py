"""Turn official downloads of data sets into raw folders (``scripts/prepare_dataset.py``).

Ids stay as they are in the download wherever the table in ``configs/labels/NAME.yaml`` maps them; files are copied (or
linked), not decoded, wherever nothing has to change.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Unpack

import numpy as np
import yaml

from imaginaire_spade.data.image_files import DECODERS, check_size, decode_label, encode_map
from imaginaire_spade.data.photos import decode_stored
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.dataset_prep import samples as raw
from imaginaire_spade.dataset_prep.annotations import TOOLS, mask_file, paint
from imaginaire_spade.dataset_prep.coco import CocoRegion, coco_regions
from imaginaire_spade.dataset_prep.maps import Writing, write_maps
from imaginaire_spade.dataset_prep.samples import Export, Options, RawSample, find_folder, find_images, find_path
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.files import PARTIAL, encode_image, read_json, read_text, write_bytes
from imaginaire_spade.labels import LabelSpec

FIRST_OBJECT = 256
"""In an instance map, smaller numbers are label ids of pixels that belong to no object."""

LABELS = "labels.yaml"
"""The label table of an annotation tool's export, in the output folder."""

Objects = tuple[tuple[int, int], list[CocoRegion]]
"""The size of one image of COCO, and its objects."""


def _cocostuff(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val"):
        year = f"{split}2017"
        images = find_folder(source, year, f"images/{year}")
        maps = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations/stuffthingmaps", "pixelmaps")
        labels = find_folder(source, *(f"{m}/{year}" for m in maps))
        panoptic = find_path(source, *(f"{folder}panoptic_{year}" for folder in ("annotations/", "", "panoptic/")))
        instances = find_path(source, *(f"{folder}instances_{year}.json" for folder in ("annotations/", "")))
        objects = _read_objects(instances) if instances and not panoptic else {}
        for key, image in find_images(images).items():
            files, draw = {"images": image, "seg_maps": labels / f"{key}.png"}, dict[str, Callable[[], bytes]]()
            if panoptic:  # true colour: the id is R + 256 G + 65536 B
                files["inst_maps"] = panoptic / f"{key}.png"
            elif instances:
                if key not in objects:
                    raise DataError(f"{instances}: lists no image {image.name}, which {image.parent} has")
                draw["inst_maps"] = partial(_draw_instances, objects[key], instances, files["seg_maps"])
            yield RawSample(split, key, files, draw=draw)


_ADE20K = ("ADEChallengeData2016/", "")
"""Where the folders of ADE20K's download are: below this one, or right there."""
# Raw ids of its label maps.
_OUTDOOR = {3: "sky", 14: "earth", 17: "mountain"}
_INDOOR = {6: "ceiling", 8: "bed", 48: "sink"}


def _ade20k(source: Path, options: Options) -> Iterator[RawSample]:
    for split, name in (("train", "training"), ("val", "validation")):
        images, labels = (find_folder(source, *(f"{r}{t}/{name}" for r in _ADE20K)) for t in ("images", "annotations"))
        for key, image in find_images(images).items():
            yield RawSample(split, key, {"images": image, "seg_maps": labels / f"{key}.png"})


def _ade20k_outdoor(source: Path, options: Options) -> Iterator[RawSample]:
    """Yield the scenes of ``options.scene_list``, or those that show something of the outside and nothing of a room.

    No list of the papers' subset (Qi et al. 2018) was published. The second rule is how the authors of OASIS say that
    they rebuilt it (boschresearch/OASIS, issue 23), except for the few indoor scenes that they then removed by eye.
    """
    if options.scene_list is None:
        yield from filter(_is_outdoor, _ade20k(source, options))
        return
    wanted = {line.split()[0] for line in read_text(options.scene_list, DataError).splitlines() if line.strip()}
    categories = find_path(source, *(f"{r}sceneCategories.txt" for r in _ADE20K))
    lines = read_text(categories, DataError).splitlines() if categories else []
    scene_of = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
    unknown = wanted - set(scene_of) - set(scene_of.values()) if scene_of else set()
    if unknown:
        raise DataError(f"--scene_list {options.scene_list}: not in sceneCategories.txt: {', '.join(sorted(unknown))}")
    for sample in _ade20k(source, options):
        if wanted & {sample.key, scene_of.get(sample.key)}:
            yield sample


def _is_outdoor(sample: RawSample) -> bool:
    path = sample.files["seg_maps"]
    if not path.is_file():
        return True  # ``prepare`` names what is missing
    present = set(np.unique(decode_label(path.read_bytes(), str(path))).tolist())
    return bool(present & _OUTDOOR.keys()) and not present & _INDOOR.keys()


def _cityscapes(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val"):
        labels = find_folder(source, f"gtFine/{split}", f"gtFine_trainvaltest/gtFine/{split}")
        images = find_folder(source, f"leftImg8bit/{split}", f"leftImg8bit_trainvaltest/leftImg8bit/{split}")
        for key, image in find_images(images, "_leftImg8bit").items():
            files = {
                "images": image,
                "seg_maps": labels / f"{key}_gtFine_labelIds.png",
                "inst_maps": labels / f"{key}_gtFine_instanceIds.png",
            }
            yield RawSample(split, key, files, resize_h_w=(256, 512))


def _camvid(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val", "test"):
        labels = find_folder(source, f"{split}annot")
        for key, image in find_images(find_folder(source, split)).items():
            # SegNet's files count "unlabelled" as 11; the table calls it 255.
            yield RawSample(split, key, {"images": image, "seg_maps": labels / f"{key}.png"}, replace_ids={11: 255})


def _facades(source: Path, options: Options) -> Iterator[RawSample]:
    images = {
        image.stem: image for part in ("base", "extended") for image in find_images(source / part, "", ["jpg"]).values()
    }
    if not images:
        raise DataError(f"--source {source}: no base/*.jpg or extended/*.jpg there (CMP_facade_DB)")
    labels = {key: image.with_suffix(".png") for key, image in images.items()}
    return raw.split_samples({"images": images, "seg_maps": labels}, options.num_val or 106)


def _photos(source: Path, options: Options) -> Iterator[RawSample]:
    return raw.split_samples({"images": find_images(source)}, options.num_val)


def _custom(source: Path, options: Options) -> Iterator[RawSample]:
    folders = {"images": source / (options.images or "images"), "seg_maps": source / (options.labels or "labels")}
    if options.instances:
        folders["inst_maps"] = source / options.instances
    found = {data_type: find_images(find_folder(folder.parent, folder.name)) for data_type, folder in folders.items()}
    if folders["images"].resolve() == folders["seg_maps"].resolve():  # as Roboflow exports semantic masks
        found["seg_maps"] = find_images(folders["images"], "_mask")
        if not found["seg_maps"]:
            raise DataError(
                f"{folders['images']}: photos and label maps in one folder, and no NAME_mask.png among them"
            )
        found["images"] = {key: path for key, path in found["images"].items() if not path.stem.endswith("_mask")}
    expected = {t: {key: folder / f"{key}.png" for key in found["images"]} for t, folder in folders.items()}
    return raw.split_samples(
        {data_type: expected[data_type] | found[data_type] for data_type in folders}, options.num_val
    )


_FACE = "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth"
"""The parts of CelebAMask-HQ as ids 1, 2, ...: later ones lie on top, as in the authors' own label maps."""


def _celebamask_hq(source: Path, options: Options) -> Iterator[RawSample]:
    photos = find_images(find_folder(source, "CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img"))
    masks = find_images(find_folder(source, "CelebAMask-HQ-mask-anno", "CelebAMask-HQ/CelebAMask-HQ-mask-anno"))
    by_name, made = {path.stem: path for path in masks.values()}, []
    for key, photo in photos.items():
        files = ((i, by_name.get(f"{key:0>5}_{part}")) for i, part in enumerate(_FACE.split(), 1))
        regions = [(i, str(path), partial(mask_file, path)) for i, path in files if path]
        if not regions:
            raise DataError(f"{photo}: CelebAMask-HQ-mask-anno has no mask {key:0>5}_PART.png for it")
        draw: dict[str, Callable[[], bytes]] = {"seg_maps": partial(paint, regions, (512, 512), 0)}
        made.append(RawSample("", key, {"images": photo}, (512, 512), draw=draw))
    yield from raw.spread(made, options.num_val)


def _isprs(source: Path, options: Options) -> Iterator[RawSample]:
    """Yield the labelled tiles of Potsdam or Vaihingen, whose colours the table knows."""
    photos = find_folder(source, "2_Ortho_RGB", "top", chosen=options.images)
    labels = find_folder(source, "5_Labels_all", "gts_for_participants", chosen=options.labels)
    tile = re.compile("_(RGB|IRRG|RGBIR|label|noBoundary|label_noBoundary)$")
    by_tile = [{tile.sub("", k): path for k, path in find_images(folder).items()} for folder in (photos, labels)]
    found = dict(zip(("images", "seg_maps"), by_tile, strict=True))
    found["images"] = {key: path for key, path in found["images"].items() if key in found["seg_maps"]}
    return raw.split_samples(found, options.num_val)


def _loveda(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val"):
        for scene in ("Urban", "Rural"):
            folder = find_folder(source, f"{split.title()}/{scene}", f"{split.title()}/{split.title()}/{scene}")
            for key, image in find_images(folder / "images_png").items():
                yield RawSample(split, f"{scene}/{key}", {"images": image, "seg_maps": folder / f"masks_png/{key}.png"})


def _mapillary(source: Path, options: Options) -> Export:
    """Read Mapillary Vistas and its own label table: version 2.0 if it is there (``--labels v1.2``: the other)."""
    version = str(options.labels or ("v2.0" if (source / "training/v2.0").is_dir() else "v1.2"))
    path = find_path(source, f"config_{version}.json", "config.json") or source / f"config_{version}.json"
    labels, found = read_json(path)["labels"], []
    for split, name in (("train", "training"), ("val", "validation")):
        folder = find_folder(source, f"{name}/{version}", name)
        for key, image in find_images(source / name / "images").items():
            maps = {t: folder / f"{n}/{key}.png" for t, n in (("seg_maps", "labels"), ("inst_maps", "instances"))}
            found.append(RawSample(split, key, {"images": image, **maps}))
    names, palette = [label["name"] for label in labels], [tuple(label["color"]) for label in labels]
    unlabelled = len(names) - (names[-1] == "void--unlabeled")
    return Export(found, names[:unlabelled], palette[:unlabelled], ignore=unlabelled)


def _ade20k_full(source: Path, options: Options) -> Export:
    """Read all of ADE20K (ADE20K_2021_17_01): R / 10 * 256 + G is a class, which a JSON beside each photo names."""
    found, names = [], dict[str, int]()
    for path in raw.find_files(source, "**/*.json"):
        try:
            objects = json.loads(path.read_text("latin-1"))["annotation"]["object"]
            names |= {o["name"]: o["name_ndx"] for o in objects if not o["parts"]["part_level"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no JSON of ADE20K_2021_17_01: {error!r}") from None
        split = "val" if "validation" in path.parts else "train"
        found.append(RawSample(split, path.stem, {"images": path.with_suffix(".jpg")}))
    classes = raw.number_classes(sorted(names), options, f"{source}: ADE20K_2021_17_01 (with a JSON for each photo)")
    ids = {names[name]: i for name, i in classes.items()}
    found = [replace(s, draw={"seg_maps": partial(_ade20k_ids, s.files["images"], ids)}) for s in found]
    return Export(found, list(classes))


def _ade20k_ids(photo: Path, ids: Mapping[int, int]) -> bytes:
    path, table = photo.with_name(f"{photo.stem}_seg.png"), np.full(65536, raw.no_class(len(ids)))
    stored = decode_label(path.read_bytes(), str(path)).astype(np.int32)
    table[list(ids)] = list(ids.values())
    return raw.encode_ids(table[stored[..., 0] // 10 * 256 + stored[..., 1]])


TOOLS |= {"ade20k_full": _ade20k_full, "mapillary": _mapillary}
DATASETS: dict[str, Callable[[Path, Options], Iterator[RawSample]]] = {
    "cocostuff": _cocostuff, "ade20k": _ade20k, "ade20k_outdoor": _ade20k_outdoor, "cityscapes": _cityscapes,
    "camvid": _camvid, "facades": _facades, "landscapes": _photos, "custom": _custom,
    "celebamask_hq": _celebamask_hq, "isprs": _isprs, "loveda": _loveda,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ COCO's objects


def _read_objects(path: Path) -> dict[str, Objects]:
    """Map the file stem of every image in COCO's ``instances_*.json`` to its objects.

    Raises:
        ConfigError: pycocotools is not installed.
        DataError: the file is no instances JSON of COCO.
    """
    tree = read_json(path)
    try:
        otherwise = " (or unpack the panoptic maps, or move the file away to go without instance maps)"
        regions = coco_regions(path, tree, [], otherwise)
        return {
            PurePosixPath(image["file_name"]).stem: ((image["height"], image["width"]), regions[image["id"]])
            for image in tree["images"]
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(f"{path}: no instances JSON of COCO: {error!r}") from None


def _draw_instances(objects: Objects, where: Path, label_file: Path) -> bytes:
    """Number the objects in a label map: a PNG of uint16 [H, W].

    Pixels of the k-th object become ``FIRST_OBJECT`` + k, large objects beneath small ones; all others keep their label
    id. So the borders are those of objects and of stuff alike (COCO-Stuff's combined boundary maps).

    Args:
        where: the file that lists the objects, for messages.
        label_file: uint8 [H, W].
    Raises:
        DataError: the sizes differ, or a segmentation is unreadable.
    """
    label_map = decode_label(label_file.read_bytes(), str(label_file))
    (height, width), regions = objects
    if label_map.shape != (height, width) or label_map.dtype != np.uint8:
        raise DataError(
            f"{label_file}: {label_map.dtype} {list(label_map.shape)}, but {where} says 8 bit, {height} x {width}"
            " (height x width): they are of different images"
        )
    numbered = sorted(enumerate(regions, FIRST_OBJECT), key=lambda item: -item[1][0])
    return paint([(number, place, area) for number, (_, _, place, area) in numbered], (height, width), label_map)


# ------------------------------------------------------------------------------------------------ writing


def prepare(
    name: str, source: Path, output: Path, options: Options, *, link: bool = False, **writing: Unpack[Writing]
) -> dict[str, int]:
    """Write ``output/SPLIT/{images,seg_maps,inst_maps}/KEY.ext``; return the number of samples per split.

    Existing files are kept, so that an interrupted run continues when it runs again, but those that are older than the
    file that they were copied from; those of an annotation tool's export also if they are drawn.

    Args:
        link: make symbolic links where nothing has to change, instead of copies.
    Raises:
        DataError: the source is not laid out as the official download, or files are missing, or the output has samples
            of another run, or was prepared with other options.
    """
    if options.resize_h_w:
        check_size(*options.resize_h_w, "--resize_h_w")
    if not source.is_dir():
        raise DataError(f"--source {source}: no such folder" + ": unpack it first" * source.is_file())
    export = TOOLS[name](source, options) if name in TOOLS else Export(list(DATASETS[name](source, options)), [])
    samples = [replace(sample, resize_h_w=options.resize_h_w or sample.resize_h_w) for sample in export.samples]
    if name in TOOLS and options.num_val and not any(sample.split == "val" for sample in samples):
        samples = raw.spread(samples, options.num_val)
    if not samples:
        raise DataError(f"--source {source}: no images there")
    missing = [path for sample in samples for path in sample.files.values() if not path.is_file()]
    if missing:
        shown = "\n  ".join(str(path) for path in missing[:10])
        raise DataError(f"--source {source}: {len(missing)} of the files that belong together are missing:\n  {shown}")
    targets = [target for sample in samples for target in _targets(sample, output)]
    if twice := [str(path) for path, uses in Counter(path for path, _ in targets).items() if uses > 1]:
        raise DataError(
            f"--source {source}: {len(twice)} file names stand for several samples: {', '.join(twice[:10])}"
        )
    # Other tools may have added label maps to photos, not photos.
    kind = "seg_maps" if export.names else "images"
    written = (path for path in output.glob(f"*/{kind}/**/*.*") if not path.name.startswith(PARTIAL))
    if stray := sorted(set(written) - {path for path, _ in targets}):
        which = f"of an earlier {'export' if export.names else 'run'} ({len(stray)} such files)"
        raise DataError(f"{stray[0]}: {which}: take another --output, or remove that one")
    chosen = {"name": name, "resize_h_w": options.resize_h_w and list(options.resize_h_w)}
    if (record := output / "prepared.yaml").is_file() and (before := yaml.safe_load(record.read_text())) != chosen:
        raise DataError(f"{record}: prepared with {before}, now {chosen}: take another --output, or remove that one")
    if writing.get("rank", 0) == 0:
        write_bytes(record, yaml.safe_dump(chosen).encode())
        for note in export.notes:
            print(note)
        if export.names:
            _write_labels(output / LABELS, name, export)
    write_maps(name, partial(_content, link), targets, is_stale=partial(_is_stale, bool(export.names)), **writing)
    return dict(Counter(sample.split for sample in samples))


_RawFile = tuple[RawSample, str]
"""A sample, and the data type of one of its files."""


def _targets(sample: RawSample, output: Path) -> Iterator[tuple[Path, _RawFile]]:
    for data_type in {**sample.files, **sample.draw}:
        keeps_format = data_type == "images" or not _changes(sample, data_type)
        extension = sample.files[data_type].suffix[1:].lower() if keeps_format and data_type in sample.files else "png"
        yield output / sample.split / data_type / f"{sample.key}.{extension}", (sample, data_type)


def _changes(sample: RawSample, data_type: str) -> bool:
    """Return whether the file that is written differs from the downloaded one."""
    replaced = data_type == "seg_maps" and sample.replace_ids
    return bool(sample.resize_h_w or data_type in sample.draw or replaced)


def _is_stale(from_tool: bool, path: Path, file: _RawFile) -> bool:
    """Return whether a file may be of an earlier download or export."""
    sample, data_type = file
    if data_type in sample.draw:
        return from_tool
    return sample.files[data_type].stat().st_mtime > path.stat().st_mtime


def _content(link: bool, file: _RawFile) -> bytes | Path:
    sample, data_type = file
    path = sample.files.get(data_type, Path(f"{sample.key}.png"))
    if not _changes(sample, data_type):
        return path.resolve() if link else path.read_bytes()
    content = sample.draw[data_type]() if data_type in sample.draw else path.read_bytes()
    if not sample.resize_h_w and not sample.replace_ids:
        return content
    array = (decode_stored if data_type == "images" else DECODERS[data_type])(content, str(path))
    if data_type == "seg_maps":
        for old, new in sample.replace_ids.items():
            array = np.where(array == old, array.dtype.type(new), array)
    if sample.resize_h_w:
        geometry = Geometry.whole(array.shape, sample.resize_h_w)
        if data_type == "images":
            return encode_image(apply_to_image(array, geometry, any_area=True), path.suffix.lower())
        array = apply_to_map(array, geometry)
    return encode_map(array)


def _write_labels(path: Path, name: str, export: Export) -> None:
    """Write the label table of an export, which configs may name as a base.

    Raises:
        DataError: another table is there, so label maps there may have other ids.
    """
    names, palette = export.names, [list(colour) for colour in export.palette]
    ignore = export.ignore or raw.no_class(len(names))
    labels = {"num_classes": len(names), "dont_care": True, "ignore": [ignore], "names": names, "palette": palette}
    if sided := LabelSpec(num_classes=len(names), names=tuple(names)).sided_classes():
        labels["mirror"] = sided
    content = yaml.safe_dump({"data": {"name": name, "labels": labels}}, sort_keys=False, allow_unicode=True)
    if path.exists() and read_text(path, DataError) != content:
        raise DataError(f"{path}: another label table than this export's: take another --output, or remove that one")
    write_bytes(path, content.encode())
