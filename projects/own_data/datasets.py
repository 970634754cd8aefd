"""Two data sets of one's own: pairs listed in a CSV file, and crops cut on the fly from large scenes.

    python train.py --import projects.own_data.datasets --config mine.yaml --logdir logs/mine

with ``data: {type: csv_pairs, train: {roots: [pairs.csv]}}`` in it, or ``data: {type: scene_crops, train: {roots:
[SCENES]}}``.
"""

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaginaire_spade.data.label_files import read_labels
from imaginaire_spade.data.own import OwnDataset
from imaginaire_spade.data.photos import decode_photo
from imaginaire_spade.errors import DataError
from imaginaire_spade.registry import DATASETS


@DATASETS.register("csv_pairs")
class CsvPairs(OwnDataset):
    """Photos and label maps that lie anywhere, as the rows of CSV files say.

    ``roots`` are CSV files with the columns ``photo`` and ``label_map``; their paths count from the CSV file's folder.

    Args:
        delimiter: between columns.
    """

    def __init__(self, *known: Any, delimiter: str = ",") -> None:
        self.delimiter = delimiter
        super().__init__(*known)

    def list_keys(self) -> list[str]:
        self.pairs: list[tuple[Path, Path]] = []
        for root in map(Path, self.roots):
            try:
                with root.open(newline="", encoding="utf-8-sig") as file:
                    for number, row in enumerate(csv.DictReader(file, delimiter=self.delimiter), 2):
                        if not row.get("photo") or not row.get("label_map"):
                            raise DataError(f"{root}:{number}: a row needs the columns photo and label_map")
                        self.pairs.append((root.parent / row["photo"], root.parent / row["label_map"]))
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"{root}: cannot be read as CSV in UTF-8: {error}") from None
        return [label_map.with_suffix("").name for _, label_map in self.pairs]

    def load(self, index: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        photo, label_map = self.pairs[index]
        sample: dict[str, NDArray[Any]] = {"seg_maps": read_labels(read(label_map), str(label_map), self.labels)}
        if self.with_images:
            sample["images"] = decode_photo(read(photo), str(photo), self.images)
        return sample


@DATASETS.register("scene_crops")
class SceneCrops(OwnDataset):
    """Crops of scenes that are too large to decode for every sample; of each only the crop's pixels are read.

    ``roots`` are folders with ``NAME.npy``, uint8 [H, W, 3], and ``NAME_labels.npy``, integers [H, W]. (Of a GeoTIFF,
    rasterio reads the same window: ``dataset.read(window=Window(left, top, width, height))``.)

    Args:
        crop_h_w: height and width of a crop. What ``augmentations`` do comes after.
        crops_per_scene: samples that a scene counts for; an epoch draws a new crop for each.
    """

    def __init__(self, *known: Any, crop_h_w: tuple[int, int] = (256, 256), crops_per_scene: int = 100) -> None:
        self.crop_h_w, self.crops_per_scene = crop_h_w, crops_per_scene
        super().__init__(*known)

    def list_keys(self) -> list[str]:
        paths = [path for root in self.roots for path in sorted(Path(root).glob("*_labels.npy"))]
        self.scenes = [path.with_name(path.name.replace("_labels.npy", ".npy")) for path in paths]
        return [f"{scene.stem}/{number:05d}" for scene in self.scenes for number in range(self.crops_per_scene)]

    def load(self, index: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        scene = self.scenes[index // self.crops_per_scene]
        labels = mapped(scene.with_name(f"{scene.stem}_labels.npy"))
        room = [whole - crop for whole, crop in zip(labels.shape, self.crop_h_w, strict=True)]
        if min(room) < 0:
            raise DataError(f"{scene}: {list(labels.shape)} is smaller than data.type.crop_h_w: {list(self.crop_h_w)}")
        top, left = (int(rng.integers(pixels + 1)) for pixels in room)
        window = slice(top, top + self.crop_h_w[0]), slice(left, left + self.crop_h_w[1])
        sample = {"seg_maps": np.array(labels[window])}
        if self.with_images:
            sample["images"] = np.array(mapped(scene)[window])
        return sample


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path, such as one with a NUL in it
        raise DataError(f"{path}: cannot be read: {error}") from None


@lru_cache(maxsize=64)
def mapped(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as a .npy file: {error}") from None
    return array
