"""Unpack archives (``scripts/download_test_data.py``); turn official downloads of data sets into raw folders
(``scripts/prepare_dataset.py``).

Ids stay as they are in the download wherever the table in ``configs/labels/NAME.yaml`` maps them; files are copied (or
linked), not decoded, wherever nothing has to change.
"""

import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.image_files import DECODERS, IMAGE_EXTENSIONS, decode_label, encode_map
from imaginaire_spade.data.photos import decode_photo
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.dataset_prep.maps import Writing, write_maps
from imaginaire_spade.errors import DataError, how_to_install
from imaginaire_spade.files import PARTIAL, encode_image, read_json, read_text

FIRST_OBJECT = 256
"""In an instance map, smaller numbers are label ids of pixels that belong to no object."""

Objects = Mapping[str, Any]
"""The annotated objects of one image of COCO: ``height``, ``width`` and, in COCO's form, ``annotations``."""


@dataclass(frozen=True)
class RawSample:
    """One sample of a download, and where to put it."""

    split: str
    key: str
    files: dict[str, Path]
    """Data type -> file."""
    resize_h_w: tuple[int, int] | None = None
    replace_ids: dict[int, int] = field(default_factory=dict)
    """Label id in the file -> id to write."""
    objects: Objects | None = None
    """To draw the instance map from: the file of ``inst_maps`` lists them."""


@dataclass(frozen=True)
class Options:
    """The options of scripts/prepare_dataset.py that concern the download."""

    resize_h_w: tuple[int, int] | None = None
    scene_list: Path | None = None
    num_val: int = 0
    images: Path | None = None
    labels: Path | None = None
    instances: Path | None = None


def _find(source: Path, *candidates: str) -> Path | None:
    """Return the first of ``candidates`` that is there."""
    return next((source / candidate for candidate in candidates if (source / candidate).exists()), None)


def _folder(source: Path, *candidates: str) -> Path:
    """Return the first of ``candidates`` that is there.

    Raises:
        DataError: none is.
    """
    found = _find(source, *candidates)
    if found is None:
        raise DataError(f"--source {source}: none of {', '.join(c + '/' for c in candidates)} is there")
    return found


def _pairs(images: Path, suffix: str = "", extensions: Sequence[str] = IMAGE_EXTENSIONS) -> dict[str, Path]:
    """Map the key (without ``suffix``) of every image below a folder to its file, sorted by path."""
    return {
        path.relative_to(images).with_suffix("").as_posix().removesuffix(suffix): path
        for path in sorted(images.rglob("*"))
        if path.suffix[1:].lower() in extensions and path.stem.endswith(suffix) and not path.name.startswith(".")
    }


def _cocostuff(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val"):
        year = f"{split}2017"
        images = _folder(source, year, f"images/{year}")
        maps = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations/stuffthingmaps", "pixelmaps")
        labels = _folder(source, *(f"{m}/{year}" for m in maps))
        panoptic = _find(source, *(f"{folder}panoptic_{year}" for folder in ("annotations/", "", "panoptic/")))
        instances = _find(source, *(f"{folder}instances_{year}.json" for folder in ("annotations/", "")))
        objects = _read_objects(instances) if instances and not panoptic else {}
        for key, image in _pairs(images).items():
            files = {"images": image, "seg_maps": labels / f"{key}.png"}
            if panoptic:  # true colour: the id is R + 256 G + 65536 B
                files["inst_maps"] = panoptic / f"{key}.png"
            elif instances:
                if key not in objects:
                    raise DataError(f"{instances}: lists no image {image.name}, which {image.parent} has")
                files["inst_maps"] = instances
            yield RawSample(split, key, files, objects=objects.get(key))


_ADE20K = ("ADEChallengeData2016/", "")
"""Where the folders of ADE20K's download are: below this one, or right there."""
# Raw ids of its label maps.
_OUTDOOR = {3: "sky", 14: "earth", 17: "mountain"}
_INDOOR = {6: "ceiling", 8: "bed", 48: "sink"}


def _ade20k(source: Path, options: Options) -> Iterator[RawSample]:
    for split, name in (("train", "training"), ("val", "validation")):
        images, labels = (_folder(source, *(f"{r}{t}/{name}" for r in _ADE20K)) for t in ("images", "annotations"))
        for key, image in _pairs(images).items():
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
    categories = _find(source, *(f"{r}sceneCategories.txt" for r in _ADE20K))
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
        labels = _folder(source, f"gtFine/{split}", f"gtFine_trainvaltest/gtFine/{split}")
        images = _folder(source, f"leftImg8bit/{split}", f"leftImg8bit_trainvaltest/leftImg8bit/{split}")
        for key, image in _pairs(images, "_leftImg8bit").items():
            files = {
                "images": image,
                "seg_maps": labels / f"{key}_gtFine_labelIds.png",
                "inst_maps": labels / f"{key}_gtFine_instanceIds.png",
            }
            yield RawSample(split, key, files, resize_h_w=(256, 512))


def _camvid(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val", "test"):
        labels = _folder(source, f"{split}annot")
        for key, image in _pairs(_folder(source, split)).items():
            # SegNet's files count "unlabelled" as 11; the table calls it 255.
            yield RawSample(split, key, {"images": image, "seg_maps": labels / f"{key}.png"}, replace_ids={11: 255})


def _facades(source: Path, options: Options) -> Iterator[RawSample]:
    images = {
        image.stem: image for part in ("base", "extended") for image in _pairs(source / part, "", ["jpg"]).values()
    }
    if not images:
        raise DataError(f"--source {source}: no base/*.jpg or extended/*.jpg there (CMP_facade_DB)")
    labels = {key: image.with_suffix(".png") for key, image in images.items()}
    return _split({"images": images, "seg_maps": labels}, options.num_val or 106)


def _photos(source: Path, options: Options) -> Iterator[RawSample]:
    return _split({"images": _pairs(source)}, options.num_val)


def _custom(source: Path, options: Options) -> Iterator[RawSample]:
    folders = {"images": source / (options.images or "images"), "seg_maps": source / (options.labels or "labels")}
    if options.instances:
        folders["inst_maps"] = source / options.instances
    found = {data_type: _pairs(_folder(folder.parent, folder.name)) for data_type, folder in folders.items()}
    expected = {t: {key: folder / f"{key}.png" for key in found["images"]} for t, folder in folders.items()}
    return _split({data_type: expected[data_type] | found[data_type] for data_type in folders}, options.num_val)


def _split(found: dict[str, dict[str, Path]], num_val: int) -> Iterator[RawSample]:
    """Yield the sample of every image; ``num_val`` of them, evenly spread, are for validation.

    Args:
        found: data type -> key -> file.
    """
    keys = list(found["images"])
    if num_val >= len(keys) > 0:
        raise DataError(f"--num_val {num_val}: there are {len(keys)} images")
    val = {len(keys) * i // num_val for i in range(num_val)}
    for number, key in enumerate(keys):
        yield RawSample("val" if number in val else "train", key, {t: files[key] for t, files in found.items()})


DATASETS: dict[str, Callable[[Path, Options], Iterator[RawSample]]] = {
    "cocostuff": _cocostuff,
    "ade20k": _ade20k,
    "ade20k_outdoor": _ade20k_outdoor,
    "cityscapes": _cityscapes,
    "camvid": _camvid,
    "facades": _facades,
    "landscapes": _photos,
    "custom": _custom,
}


# ------------------------------------------------------------------------------------------------ COCO's objects


def _read_objects(path: Path) -> dict[str, Objects]:
    """Map the file stem of every image in COCO's ``instances_*.json`` to its objects.

    Raises:
        ConfigError: pycocotools (extra ``data``) is not installed.
        DataError: the file is no instances JSON of COCO.
    """
    otherwise = " (or unpack the panoptic maps, or move the file away to go without instance maps)"
    with how_to_install("data", f"{path}: reading it needs the package pycocotools", otherwise):
        import pycocotools.mask  # noqa: F401
    tree = read_json(path)
    try:
        of_image: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in tree["images"]}
        for annotation in tree["annotations"]:
            kept = {name: annotation[name] for name in ("id", "area", "segmentation")}
            of_image[annotation["image_id"]].append(kept)
        return {
            PurePosixPath(image["file_name"]).stem: {
                "height": image["height"], "width": image["width"], "annotations": of_image[image["id"]]
            }
            for image in tree["images"]
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no instances JSON of COCO: {error!r}") from None


def _draw_instances(objects: Objects, where: Path, label_file: Path) -> NDArray[Any]:
    """Number the objects in a label map: uint16 [H, W].

    Pixels of the k-th object become ``FIRST_OBJECT`` + k, large objects beneath small ones; all others keep their label
    id. So the borders are those of objects and of stuff alike (COCO-Stuff's combined boundary maps).

    Args:
        where: the file that lists the objects, for messages.
        label_file: uint8 [H, W].
    Raises:
        DataError: the sizes differ, or a segmentation is unreadable.
    """
    from pycocotools import mask

    label_map = decode_label(label_file.read_bytes(), str(label_file))
    height, width = objects["height"], objects["width"]
    if label_map.shape != (height, width) or label_map.dtype != np.uint8:
        raise DataError(
            f"{label_file}: {label_map.dtype} {list(label_map.shape)}, but {where} says 8 bit, {height} x {width}"
            " (height x width): they are of different images"
        )
    instances = label_map.astype(np.uint16)
    numbered = enumerate(objects["annotations"], FIRST_OBJECT)
    for number, annotation in sorted(numbered, key=lambda item: -item[1]["area"]):
        try:
            coded = mask.frPyObjects(annotation["segmentation"], height, width)
            inside = mask.decode(mask.merge(coded) if isinstance(coded, list) else coded) != 0
        except Exception as error:  # pycocotools raises whatever comes
            raise DataError(f"{where}: annotation {annotation['id']}: unreadable: {error!r}") from None
        if inside.shape != instances.shape:
            raise DataError(f"{where}: annotation {annotation['id']} is of another size than its image")
        instances[inside] = number
    return instances


# ------------------------------------------------------------------------------------------------ writing


def prepare(
    name: str, source: Path, output: Path, options: Options, *, link: bool = False, **writing: Unpack[Writing]
) -> dict[str, int]:
    """Write ``output/SPLIT/{images,seg_maps,inst_maps}/KEY.ext``; return the number of samples per split.

    Existing files are kept, so that an interrupted run continues when it runs again.

    Args:
        link: make symbolic links where nothing has to change, instead of copies.
    Raises:
        DataError: the source is not laid out as the official download, or files are missing.
    """
    if not source.is_dir():
        raise DataError(f"--source {source}: no such folder")
    samples = [
        replace(sample, resize_h_w=options.resize_h_w or sample.resize_h_w)
        for sample in DATASETS[name](source, options)
    ]
    if not samples:
        raise DataError(f"--source {source}: no images there")
    missing = [path for sample in samples for path in sample.files.values() if not path.is_file()]
    if missing:
        shown = "\n  ".join(str(path) for path in missing[:10])
        raise DataError(f"--source {source}: {len(missing)} of the files that belong together are missing:\n  {shown}")
    targets = [target for sample in samples for target in _targets(sample, output)]
    write_maps(name, partial(_content, link), targets, **writing)
    return dict(Counter(sample.split for sample in samples))


_RawFile = tuple[RawSample, str]
"""A sample, and the data type of one of its files."""


def _targets(sample: RawSample, output: Path) -> Iterator[tuple[Path, _RawFile]]:
    for data_type, path in sample.files.items():
        keeps_format = data_type == "images" or not _changes(sample, data_type)
        extension = path.suffix[1:].lower() if keeps_format else "png"
        yield output / sample.split / data_type / f"{sample.key}.{extension}", (sample, data_type)


def _changes(sample: RawSample, data_type: str) -> bool:
    """Return whether the file that is written differs from the downloaded one."""
    changed = {"seg_maps": sample.replace_ids, "inst_maps": sample.objects}.get(data_type)
    return bool(sample.resize_h_w or changed)


def _content(link: bool, file: _RawFile) -> bytes | Path:
    sample, data_type = file
    path = sample.files[data_type]
    if not _changes(sample, data_type):
        return path.resolve() if link else path.read_bytes()
    if data_type == "inst_maps" and sample.objects:
        array = _draw_instances(sample.objects, path, sample.files["seg_maps"])
    else:
        photo = partial(decode_photo, spec=ImageSpec(drop_alpha=True))
        array = (photo if data_type == "images" else DECODERS[data_type])(path.read_bytes(), str(path))
    if data_type == "seg_maps":
        for old, new in sample.replace_ids.items():
            array = np.where(array == old, array.dtype.type(new), array)
    if sample.resize_h_w:
        geometry = Geometry.whole(array.shape, sample.resize_h_w)
        if data_type == "images":
            return encode_image(apply_to_image(array, geometry, any_area=True), path.suffix.lower())
        array = apply_to_map(array, geometry)
    return encode_map(array)


# ------------------------------------------------------------------------------------------------ archives


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar archive below ``folder``; return its number of files. A refused archive leaves nothing.

    Raises:
        DataError: no archive, damaged, larger than the free space, or with an entry that leads out of ``folder`` or is
            a device.
    """
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=archive.parent) as temporary:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as packed:
                    _check_entries(archive, {entry.filename: entry.file_size for entry in packed.infolist()})
                    packed.extractall(temporary)
            else:
                if not hasattr(tarfile, "data_filter"):
                    raise DataError(f"{archive}: unpack it yourself, or take Python 3.11.4 or newer")
                with tarfile.open(archive) as packed_tar:
                    _check_entries(archive, {entry.name: entry.size for entry in packed_tar})
                    packed_tar.extractall(temporary, filter="data")
        except tarfile.ReadError as error:
            raise DataError(f"{archive}: neither a zip nor a tar archive, or damaged: {error}") from None
        except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError) as error:
            raise DataError(f"{archive}: nothing was unpacked: {error}") from None
        paths = [path for path in Path(temporary).rglob("*") if path.is_symlink() or path.is_file()]
        if links := [path.name for path in paths if path.is_symlink()]:
            raise DataError(f"{archive}: the entry {links[0]!r} is a link: nothing was unpacked")
        for path in paths:
            target = folder / path.relative_to(temporary)
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{target}: a link below {folder} leads out of it")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    return len(paths)


def _check_entries(archive: Path, sizes: dict[str, int]) -> None:
    for name in sizes:  # zipfile would give such an entry another name without a word
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise DataError(f"{archive}: the entry {name!r} leads out of the folder: nothing was unpacked")
    free = shutil.disk_usage(archive.parent).free
    if sum(sizes.values()) > free:
        raise DataError(f"{archive}: unpacks to {sum(sizes.values()):,} bytes, but {free:,} are free")
