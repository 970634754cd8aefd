"""Building and loading data, against the floors that the machine sets: medians and ratios, in one run.

    python -m benchmarks.data --data_root FOLDER      # images/ seg_maps/ edge_maps/, with a config of its labels
        [--config configs/projects/spade/camvid/base256.yaml] [--num_workers 2] [--rounds 5]

The contestants of a table take turns, so that what else the machine does falls on all of them alike.
"""

import argparse
import contextlib
import io
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import lmdb
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from imaginaire_spade.config import AugmentationConfig, load_config
from imaginaire_spade.data.build import build_dataset
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.loader import training_loader

TYPES = ("images", "seg_maps", "edge_maps")
AUGMENTATIONS = AugmentationConfig(
    resize_smallest_side=256, random_scale_limit=0.2, random_crop_h_w=(256, 256), horizontal_flip=True
)
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of images/, seg_maps/ and edge_maps/")
    parser.add_argument("--config", default="configs/projects/spade/camvid/base256.yaml", help="YAML with data.labels")
    parser.add_argument("--num_workers", type=int, default=2, help="the larger number of workers (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default: 5)")
    arguments = parser.parse_args()
    labels = load_config(arguments.config, []).data.labels
    source = FolderSource(arguments.data_root, TYPES)
    number, many = len(source.keys), arguments.num_workers
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        build = partial(build_dataset, arguments.data_root, scratch / "out", labels, data_types=TYPES)
        show(
            "build",
            number,
            arguments.rounds,
            {
                "copy the files (cp)": lambda: copy(source, scratch / "copy"),
                "read and put, one LMDB each": lambda: put(source, scratch / "put"),
                "no check, 1 worker": lambda: quiet(build, num_workers=1, check=False),
                f"no check, {many} workers": lambda: quiet(build, num_workers=many, num_shards=many, check=False),
                "decode only, 1 process": lambda: decode(source, TYPES),
                "checked, 1 worker": lambda: quiet(build, num_workers=1),
                f"checked, {many} workers": lambda: quiet(build, num_workers=many, num_shards=many),
            },
            scratch,
        )
        quiet(build)
        data = LabelMapDataset(scratch / "out", labels, edges="labels", augmentations=AUGMENTATIONS)
        plain = DataLoader(PlainDataset(source), BATCH, shuffle=True, num_workers=many, drop_last=True)
        show(
            "load (256 x 256, edges from labels)",
            number,
            arguments.rounds,
            {
                "decode only, 1 process": lambda: decode(source, TYPES[:2]),
                "samples in this process": lambda: [data[i, i] for i in range(number)],
                "loader, 1 worker": lambda: load(data, number, 1),
                f"loader, {many} workers": lambda: load(data, number, many),
                f"PIL + torchvision, {many} workers": lambda: list(plain),
            },
            None,
        )


def show(
    title: str, number: int, rounds: int, contestants: dict[str, Callable[[], object]], clean: Path | None
) -> None:
    """Let them take turns; print medians of samples/s and ratios to the first of them, and to decoding alone."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _, (name, run) in itertools.product(range(rounds), contestants.items()):
        if clean:
            for path in clean.iterdir():
                shutil.rmtree(path)
        started_at = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - started_at)
    first, floor = next(iter(contestants)), "decode only, 1 process"
    print(f"\n{title}: {number} samples, median of {rounds}")
    print(f"{'':36s}{'samples/s':>10s}{'/ ' + first:>26s}{'/ decode only':>16s}")
    rate = {name: number / statistics.median(times) for name, times in seconds.items()}
    for name, value in rate.items():
        print(f"{name:36s}{value:10.0f}{value / rate[first]:26.2f}{value / rate[floor]:16.2f}", flush=True)


def quiet(build: Callable[..., object], **options: object) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bars between the lines of a table
        build(overwrite=True, **options)


def copy(source: FolderSource, target: Path) -> None:
    target.mkdir()
    subprocess.run(["cp", "-rL", *(source.root / t for t in TYPES), target], check=True)


def put(source: FolderSource, target: Path) -> None:
    """What a builder does that looks at nothing: read each file, put it, flush."""
    for t in TYPES:
        (target / t).mkdir(parents=True)
        with lmdb.open(str(target / t), map_size=1 << 34, lock=False) as env, env.begin(write=True) as transaction:
            for key in source.keys:
                transaction.put(key.encode(), source.read(key, t))


def decode(source: FolderSource, types: tuple[str, ...]) -> None:
    """The floor: OpenCV turns the bytes into pixels, and nothing else happens."""
    for key, t in itertools.product(source.keys, types):
        flag = cv2.IMREAD_COLOR if t == "images" else cv2.IMREAD_UNCHANGED
        cv2.imdecode(np.frombuffer(source.read(key, t), np.uint8), flag)


def load(data: LabelMapDataset, number: int, num_workers: int) -> None:
    batches = training_loader(data, BATCH, seed=0, num_workers=num_workers)
    for _ in itertools.islice(batches, number // BATCH):
        pass


class PlainDataset(Dataset):
    """The usual folder data set: PIL decodes, torchvision resizes, crops and flips."""

    def __init__(self, source: FolderSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.keys)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        from torchvision.transforms import InterpolationMode, v2

        key = self.source.keys[index]
        side = int(256 * (1 + 0.2 * torch.rand(())))
        flip = bool(torch.rand(()) < 0.5)
        place = None
        out = []
        for t, how in (("images", InterpolationMode.BILINEAR), ("seg_maps", InterpolationMode.NEAREST)):
            picture = v2.functional.resize(Image.open(self.source.where(key, t)), [side], how)
            if place is None:
                top = int(torch.randint(picture.height - 255, ()))
                place = top, int(torch.randint(picture.width - 255, ()))
            picture = v2.functional.crop(picture, *place, 256, 256)
            out.append(v2.functional.pil_to_tensor(v2.functional.hflip(picture) if flip else picture))
        return tuple(out)


if __name__ == "__main__":
    main()
