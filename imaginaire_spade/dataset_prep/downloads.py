"""Locate the files in the official downloads of the field's data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imaginaire_spade.data.image_files import IMAGE_EXTENSIONS, decode_label
from imaginaire_spade.dataset_prep.coco_instances import Objects, read_objects
from imaginaire_spade.errors import DataError


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
    """To draw an instance map from, if there is no file of it."""


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
        objects = read_objects(instances) if instances and not panoptic else {}
        for key, image in _pairs(images).items():
            files = {"images": image, "seg_maps": labels / f"{key}.png"}
            if panoptic:  # true colour: the id is R + 256 G + 65536 B
                files["inst_maps"] = panoptic / f"{key}.png"
            if objects and key not in objects:
                raise DataError(f"{instances}: lists no image {image.name}, which {image.parent} has")
            yield RawSample(split, key, files, objects=objects.get(key))


def _ade20k_root(source: Path) -> Path:
    return _find(source, "ADEChallengeData2016") or source


def _ade20k(source: Path, options: Options) -> Iterator[RawSample]:
    root = _ade20k_root(source)
    for split, name in (("train", "training"), ("val", "validation")):
        labels = _folder(root, f"annotations/{name}")
        for key, image in _pairs(_folder(root, f"images/{name}")).items():
            yield RawSample(split, key, {"images": image, "seg_maps": labels / f"{key}.png"})


# Raw ids of ADE20K's label maps.
_OUTDOOR = {3: "sky", 14: "earth", 17: "mountain"}
_INDOOR = {6: "ceiling", 8: "bed", 48: "sink"}


def _ade20k_outdoor(source: Path, options: Options) -> Iterator[RawSample]:
    """Yield the scenes of ``options.scene_list``, or those that show something of the outside and nothing of a room.

    No list of the papers' subset (Qi et al. 2018) was published. The second rule is how the authors of OASIS say that
    they rebuilt it (boschresearch/OASIS, issue 23), except for the few indoor scenes that they then removed by eye.
    """
    root = _ade20k_root(source)
    if options.scene_list is None:
        for sample in _ade20k(source, options):
            path = sample.files["seg_maps"]
            present = (
                set(np.unique(decode_label(path.read_bytes(), str(path))).tolist()) if path.is_file() else _OUTDOOR
            )
            if present & _OUTDOOR.keys() and not present & _INDOOR.keys():
                yield sample
        return
    wanted = {line.split()[0] for line in _read_lines(options.scene_list) if line.strip()}
    scene_of = {}
    if (root / "sceneCategories.txt").is_file():
        scene_of = dict(line.split()[:2] for line in _read_lines(root / "sceneCategories.txt") if len(line.split()) > 1)
    unknown = wanted - set(scene_of) - set(scene_of.values()) if scene_of else set()
    if unknown:
        raise DataError(f"--scene_list {options.scene_list}: not in sceneCategories.txt: {', '.join(sorted(unknown))}")
    for sample in _ade20k(source, options):
        if sample.key in wanted or scene_of.get(sample.key, "") in wanted:
            yield sample


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


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
    found = {
        image.stem: image for part in ("base", "extended") for image in _pairs(source / part, "", ["jpg"]).values()
    }
    if not found:
        raise DataError(f"--source {source}: no base/*.jpg or extended/*.jpg there (CMP_facade_DB)")
    for split, key in _split(found, options.num_val or 106):
        yield RawSample(split, key, {"images": found[key], "seg_maps": found[key].with_suffix(".png")})


def _photos(source: Path, options: Options) -> Iterator[RawSample]:
    found = _pairs(source)
    for split, key in _split(found, options.num_val):
        yield RawSample(split, key, {"images": found[key]})


def _custom(source: Path, options: Options) -> Iterator[RawSample]:
    folders = {"images": source / (options.images or "images"), "seg_maps": source / (options.labels or "labels")}
    if options.instances:
        folders["inst_maps"] = source / options.instances
    found = {data_type: _pairs(_folder(folder.parent, folder.name)) for data_type, folder in folders.items()}
    for split, key in _split(found["images"], options.num_val):
        files = {t: found[t].get(key, folder / f"{key}.png") for t, folder in folders.items()}
        yield RawSample(split, key, files)


def _split(found: dict[str, Path], num_val: int) -> Iterator[tuple[str, str]]:
    """Yield ("train" or "val", key): ``num_val`` of them, evenly spread, are for validation."""
    if num_val >= len(found) > 0:
        raise DataError(f"--num_val {num_val}: there are {len(found)} images")
    val = {len(found) * i // num_val for i in range(num_val)}
    for number, key in enumerate(found):
        yield ("val" if number in val else "train"), key


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
