"""Official downloads of the field's data sets -> raw folders (``scripts/prepare_dataset.py``).

Owns where each data set keeps its files. Ids stay as they are in the download wherever the table in
``configs/labels/NAME.yaml`` maps them; files are copied (or linked), not decoded, wherever nothing has to change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from imaginaire_spade.data.decode import IMAGE_EXTENSIONS, decode_image, decode_instances, decode_label
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map
from imaginaire_spade.data.workers import map_in_processes
from imaginaire_spade.errors import DataError
from imaginaire_spade.pictures import write_bytes

Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class RawSample:
    """One sample of the download, and where it goes."""

    split: str
    key: str
    files: dict[str, Path]
    """Data type -> file."""
    resize_h_w: tuple[int, int] | None = None
    replace_ids: dict[int, int] = field(default_factory=dict)
    """Label id in the file -> id to write."""


@dataclass(frozen=True)
class Options:
    """What a user may say about a download."""

    resize_h_w: tuple[int, int] | None = None
    scene_list: Path | None = None
    num_val: int = 0
    images: Path | None = None
    labels: Path | None = None
    instances: Path | None = None


def _folder(source: Path, *candidates: str) -> Path:
    """The first of ``candidates`` that is there. Raises DataError, listing them."""
    for candidate in candidates:
        if (source / candidate).is_dir():
            return source / candidate
    raise DataError(f"--source {source}: none of {', '.join(c + '/' for c in candidates)} is there")


def _pairs(images: Path, suffix: str, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> Iterator[tuple[str, Path]]:
    """(key without ``suffix``, file) of every image below a folder, sorted."""
    for path in sorted(images.rglob("*")):
        if path.suffix[1:].lower() in extensions and path.stem.endswith(suffix) and not path.name.startswith("."):
            relative = path.relative_to(images).with_suffix("")
            yield relative.as_posix().removesuffix(suffix), path


def _cocostuff(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val"):
        year = f"{split}2017"
        images = _folder(source, year, f"images/{year}")
        maps = ("stuffthingmaps_trainval2017", "stuffthingmaps", "annotations/stuffthingmaps", "pixelmaps")
        labels = _folder(source, *(f"{m}/{year}" for m in maps))
        panoptic = next(
            (p for m in ("annotations/", "", "panoptic/") if (p := source / f"{m}panoptic_{year}").is_dir()), None
        )
        for key, image in _pairs(images, ""):
            files = {"images": image, "seg_maps": labels / f"{key}.png"}
            if panoptic:  # true colour: the id is R + 256 G + 65536 B
                files["inst_maps"] = panoptic / f"{key}.png"
            yield RawSample(split, key, files)


def _ade20k(source: Path, options: Options) -> Iterator[RawSample]:
    root = source / "ADEChallengeData2016" if (source / "ADEChallengeData2016").is_dir() else source
    for split, name in (("train", "training"), ("val", "validation")):
        labels = _folder(root, f"annotations/{name}")
        for key, image in _pairs(_folder(root, f"images/{name}"), ""):
            yield RawSample(split, key, {"images": image, "seg_maps": labels / f"{key}.png"})


def _ade20k_outdoor(source: Path, options: Options) -> Iterator[RawSample]:
    if options.scene_list is None:
        raise DataError(
            "ade20k_outdoor needs --scene_list FILE: the outdoor scenes, one per line, as sceneCategories.txt of the"
            " download spells them (beach, mountain, street, ...), or names of pictures (ADE_train_00000001). We know"
            " of no published list of the papers' subset, so none is built in"
        )
    root = source / "ADEChallengeData2016" if (source / "ADEChallengeData2016").is_dir() else source
    wanted = {line.split()[0] for line in options.scene_list.read_text().splitlines() if line.strip()}
    scene_of = {}
    if (root / "sceneCategories.txt").is_file():
        lines = (root / "sceneCategories.txt").read_text().splitlines()
        scene_of = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
    unknown = wanted - set(scene_of) - set(scene_of.values()) if scene_of else set()
    if unknown:
        raise DataError(f"--scene_list {options.scene_list}: not in sceneCategories.txt: {', '.join(sorted(unknown))}")
    for sample in _ade20k(source, options):
        if sample.key in wanted or scene_of.get(sample.key, "") in wanted:
            yield sample


def _cityscapes(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val"):
        labels = _folder(source, f"gtFine/{split}", f"gtFine_trainvaltest/gtFine/{split}")
        images = _folder(source, f"leftImg8bit/{split}", f"leftImg8bit_trainvaltest/leftImg8bit/{split}")
        for key, image in _pairs(images, "_leftImg8bit"):
            files = {
                "images": image,
                "seg_maps": labels / f"{key}_gtFine_labelIds.png",
                "inst_maps": labels / f"{key}_gtFine_instanceIds.png",
            }
            yield RawSample(split, key, files, resize_h_w=(256, 512))


def _camvid(source: Path, options: Options) -> Iterator[RawSample]:
    for split in ("train", "val", "test"):
        labels = _folder(source, f"{split}annot")
        for key, image in _pairs(_folder(source, split), ""):
            # SegNet's files count "unlabelled" as 11; the table calls it 255.
            yield RawSample(split, key, {"images": image, "seg_maps": labels / f"{key}.png"}, replace_ids={11: 255})


def _facades(source: Path, options: Options) -> Iterator[RawSample]:
    found = [image for part in ("base", "extended") if (source / part).is_dir()
             for _, image in _pairs(source / part, "", ("jpg",))]  # fmt: skip
    if not found:
        raise DataError(f"--source {source}: no base/*.jpg or extended/*.jpg there (CMP_facade_DB)")
    for split, image in _split(found, options.num_val or 106):
        yield RawSample(split, image.stem, {"images": image, "seg_maps": image.with_suffix(".png")})


def _photos(source: Path, options: Options) -> Iterator[RawSample]:
    found = dict(_pairs(source, ""))
    keys = {path: key for key, path in found.items()}
    for split, image in _split(list(found.values()), options.num_val):
        yield RawSample(split, keys[image], {"images": image})


def _custom(source: Path, options: Options) -> Iterator[RawSample]:
    images, labels = source / (options.images or "images"), source / (options.labels or "labels")
    instances = source / options.instances if options.instances else None
    for place in filter(None, (images, labels, instances)):
        _folder(place.parent, place.name)
    of_label, of_instance = dict(_pairs(labels, "")), dict(_pairs(instances, "")) if instances else {}
    found = dict(_pairs(images, ""))
    keys = {path: key for key, path in found.items()}
    for split, image in _split(list(found.values()), options.num_val):
        key = keys[image]
        files = {"images": image, "seg_maps": of_label.get(key, labels / f"{key}.png")}
        if instances:
            files["inst_maps"] = of_instance.get(key, instances / f"{key}.png")
        yield RawSample(split, key, files)


def _split(paths: list[Path], num_val: int) -> Iterator[tuple[str, Path]]:
    """("train" or "val", path): ``num_val`` of them, evenly spread, are for validation."""
    if num_val >= len(paths) > 0:
        raise DataError(f"--num_val {num_val}: there are {len(paths)} pictures")
    val = {len(paths) * i // num_val for i in range(num_val)}
    for number, path in enumerate(paths):
        yield ("val" if number in val else "train"), path


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


def prepare(
    name: str, source: Path, output: Path, options: Options, *, link: bool = False, num_workers: int | None = None
) -> dict[str, int]:
    """Write ``output/SPLIT/{images,seg_maps,inst_maps}/KEY.ext``; return the number of samples per split.

    Files that are there already are kept, so that an interrupted run is continued by running it again.

    Args:
        link: make symbolic links where nothing has to change, instead of copies.
    Raises:
        DataError: the source is not laid out as the official download, or files are missing.
    """
    if not source.is_dir():
        raise DataError(f"--source {source}: no such folder")
    samples = list(DATASETS[name](source, options))
    if not samples:
        raise DataError(f"--source {source}: no pictures there")
    missing = [path for sample in samples for path in sample.files.values() if not path.is_file()]
    if missing:
        shown = "\n  ".join(str(path) for path in missing[:10])
        raise DataError(f"--source {source}: {len(missing)} of the files that belong together are missing:\n  {shown}")
    task = partial(_write, output, options.resize_h_w, link)
    for _ in tqdm(map_in_processes(task, samples, num_workers), name, len(samples), unit="images", mininterval=0.5):
        pass
    return {split: sum(s.split == split for s in samples) for split in dict.fromkeys(s.split for s in samples)}


def _write(output: Path, resize_h_w: tuple[int, int] | None, link: bool, sample: RawSample) -> None:
    size = resize_h_w or sample.resize_h_w
    for data_type, path in sample.files.items():
        changes = size is not None or (data_type == "seg_maps" and sample.replace_ids)
        extension = path.suffix[1:].lower() if data_type == "images" or not changes else "png"
        target = output / sample.split / data_type / f"{sample.key}.{extension}"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if changes:
            write_bytes(target, _changed(path, data_type, size, sample.replace_ids))
        elif link:
            target.symlink_to(path.resolve())
        else:
            partial_copy = target.with_name(f".{target.name}.tmp")  # hidden files are no samples
            shutil.copyfile(path, partial_copy)
            partial_copy.replace(target)


def _changed(path: Path, data_type: str, size: tuple[int, int] | None, replace_ids: dict[int, int]) -> bytes:
    data, where = path.read_bytes(), str(path)
    decode: Callable[[bytes, str], NDArray[Any]] = {
        "images": decode_image, "seg_maps": decode_label, "inst_maps": decode_instances
    }[data_type]  # fmt: skip
    array = decode(data, where)
    if data_type == "seg_maps":
        for old, new in replace_ids.items():
            array = np.where(array == old, array.dtype.type(new), array)
    if size:
        geometry = Geometry(*size, 0, 0, *size, False)
        array = (
            apply_to_image(array, geometry, any_area=True) if data_type == "images" else apply_to_map(array, geometry)
        )
    if data_type == "inst_maps":
        if array.max() > 65535:
            raise DataError(f"{where}: instance ids beyond 65535 are not resized: leave out --resize_h_w")
        array = array.astype(np.uint16)
    suffix = path.suffix.lower() if data_type == "images" else ".png"
    stored = array[..., ::-1] if array.ndim == 3 else array
    return cv2.imencode(suffix, np.ascontiguousarray(stored))[1].tobytes()
