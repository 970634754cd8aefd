"""Building and loading data, against the floors that the machine sets: medians and ratios, in one run.

    python -m benchmarks.data --data_root FOLDER      # images/ seg_maps/ edge_maps/, with a config of its labels
        [--config configs/projects/spade/camvid/base256.yaml] [--num_workers 2] [--rounds 15] [--samples N]

"recoded" is a data set that was built with --recode_maps: its label maps are the same, but faster to decode. The
contestants of a table take turns, and a ratio is the median of the rounds' ratios, so that what else the machine does
falls on all of them alike. Beside the rate stands the time of all processors together (user and system) per sample,
which a busy machine disturbs less.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import lmdb
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.config_files import load_config
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.loader import sequential_batches
from imaginaire_spade.errors import positive_integer, run_command_line
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset

CAMVID = Path(__file__).resolve().parents[1] / "configs/projects/spade/camvid/base256.yaml"
TYPES = ("images", "seg_maps", "edge_maps")
AUGMENTATIONS = AugmentationConfig(
    resize_smallest_side=256, random_scale_limit=0.2, random_crop_h_w=(256, 256), horizontal_flip=True
)
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of images/, seg_maps/ and edge_maps/")
    parser.add_argument("--config", type=Path, default=CAMVID, help="YAML with data.labels")
    parser.add_argument(
        "--num_workers", type=positive_integer, default=2, help="the larger number of workers (default: 2)"
    )
    parser.add_argument(
        "--rounds", type=positive_integer, default=15, help="of which the median is taken (default: 15)"
    )
    parser.add_argument(
        "--samples", type=positive_integer, help="so many instead of all: some, evenly spread, or all several times"
    )
    arguments = parser.parse_args()
    labels, source = open_raw(arguments.data_root, arguments.config)
    compare(labels, source, arguments.num_workers, arguments.rounds, arguments.samples)


def open_raw(root: Path, config: Path) -> tuple[LabelSpec, FolderSource]:
    """The label table and the files. Raises UserError where they cannot be used."""
    return load_config(config, []).data.labels, FolderSource(root, TYPES)


def compare(
    labels: LabelSpec, source: FolderSource, many: int = 2, rounds: int = 15, samples: int | None = None
) -> dict[str, "Measured"]:
    """Measure and print. Returns the tables ``build`` and ``load``."""
    torch.set_num_threads(1)  # as in a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if samples:
            source = link(source, samples, scratch / "raw")
        number = len(source.keys)
        build = partial(build_dataset, source.root, labels=labels, data_types=TYPES)
        (scratch / "made").mkdir()
        make = partial(build, scratch / "made/out")
        built = measure(
            {
                "copy the files (cp)": lambda: copy(source, scratch / "made/copy"),
                "read and put, one LMDB each": lambda: put(source, scratch / "made/put"),
                "no check, 1 worker": lambda: quiet(make, num_workers=1, check=False),
                f"no check, {many} workers": lambda: quiet(make, num_workers=many, num_shards=many, check=False),
                DECODE: lambda: decode(source, TYPES),
                "checked, 1 worker": lambda: quiet(make, num_workers=1),
                f"checked, {many} workers": lambda: quiet(make, num_workers=many, num_shards=many),
                "checked and recoded, 1 worker": lambda: quiet(make, num_workers=1, recode_maps=True),
            },
            number,
            rounds,
            scratch / "made",
        )
        show(f"build: {number} samples, median of {rounds}", built)
        for name in ("plain", "recoded"):
            quiet(build, output_root=scratch / name, recode_maps=name == "recoded")
        data, recoded = (
            LabelMapDataset(scratch / name, labels, edges="labels", augmentations=AUGMENTATIONS)
            for name in ("plain", "recoded")
        )
        contestants: dict[str, Callable[[], float | None]] = {
            DECODE: lambda: decode(source, TYPES[:2]),
            f"decode only, {many} processes": lambda: decode_in_processes(source, TYPES[:2], many),
            "loader, this process": lambda: load(data, number, 0),
            "loader, 1 worker": lambda: load(data, number, 1),
            f"loader, {many} workers": lambda: load(data, number, many),
            "recoded, this process": lambda: load(recoded, number, 0),
            f"recoded, {many} workers": lambda: load(recoded, number, many),
            f"PIL + torchvision, {many} workers": lambda: steady_rate(
                DataLoader(PlainDataset(source), BATCH, shuffle=True, num_workers=many, drop_last=True)
            ),
        }
        try:
            write_tars(source, scratch, many)
            contestants[f"webdataset + OpenCV, {many} workers"] = lambda: steady_rate(tar_loader(scratch, many))
        except ImportError:
            print("webdataset is not installed: its pipeline is left out (pip install webdataset)")
        loaded = measure(contestants, number, rounds)
        show(f"load (256 x 256, edges from labels): {number} samples, median of {rounds}", loaded)
    print("\nratios of samples/s, and of processor time per sample:")
    for table, name, other in (
        (built, "no check, 1 worker", "copy the files (cp)"),
        (built, f"no check, {many} workers", "no check, 1 worker"),
        (built, "checked, 1 worker", DECODE),
        (built, f"checked, {many} workers", "checked, 1 worker"),
        (loaded, "loader, this process", DECODE),
        (loaded, "loader, 1 worker", DECODE),
        (loaded, f"loader, {many} workers", f"decode only, {many} processes"),
        (loaded, f"loader, {many} workers", f"PIL + torchvision, {many} workers"),
        (loaded, f"loader, {many} workers", f"webdataset + OpenCV, {many} workers"),
        (loaded, "recoded, this process", DECODE),
        (loaded, f"recoded, {many} workers", f"webdataset + OpenCV, {many} workers"),
    ):
        if other in table:
            rate, cpu = ratios(table[name], table[other])
            print(f"{name + ' / ' + other:66s}{rate:8.2f}{cpu:8.2f}")
    return {"build": built, "load": loaded}


DECODE = "decode only, 1 process"
Rounds = Sequence[tuple[float, float]]
"""(samples/s, milliseconds of processor time per sample) in each round."""
Measured = Mapping[str, Rounds]
"""By contestant."""


def measure(
    contestants: Mapping[str, Callable[[], float | None]], number: int, rounds: int, clean: Path | None = None
) -> Measured:
    """Let them take turns; ``clean`` is emptied before each. What returns a number has measured its own rate."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _, (name, run) in itertools.product(range(rounds), contestants.items()):
        for path in clean.iterdir() if clean else ():
            shutil.rmtree(path)
        started_at, cpu_before = time.perf_counter(), processor_seconds()
        rate = run() or number / (time.perf_counter() - started_at)
        measured[name].append((rate, 1000 / number * (processor_seconds() - cpu_before)))
    return measured


def ratios(one: Rounds, other: Rounds) -> tuple[float, float]:
    """How many times as fast ``one`` is, by the clock and by processor time: medians of each round's ratio."""
    pairs = list(zip(one, other, strict=True))
    return statistics.median(a[0] / b[0] for a, b in pairs), statistics.median(b[1] / a[1] for a, b in pairs)


def processor_seconds() -> float:
    """Of this process and of all that it has started."""
    for child in multiprocessing.active_children():
        child.join()  # what a process used is counted when it has ended
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def show(title: str, measured: Measured) -> None:
    first = next(iter(measured))
    print(f"\n{title}\n{'':36s}{'samples/s':>10s}{'CPU ms/sample':>15s}{'/ ' + first:>26s}{'/ decode only':>16s}")
    for name, rounds in measured.items():
        rate, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        by_first, by_floor = (ratios(rounds, measured[other])[0] for other in (first, DECODE))
        print(f"{name:36s}{rate:10.0f}{cpu:15.2f}{by_first:26.2f}{by_floor:16.2f}", flush=True)


def quiet(build: Callable[..., object], **options: object) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bars between the lines of a table
        build(overwrite=True, **options)


def copy(source: FolderSource, target: Path) -> None:
    target.mkdir()
    subprocess.run(["cp", "-rL", *(source.root / t for t in TYPES), target], check=True)


def link(source: FolderSource, samples: int, root: Path) -> FolderSource:
    """A folder of so many samples, as links: evenly spread ones, or all of them several times."""
    number = len(source.keys)
    for i, t in itertools.product(range(samples), TYPES):
        key = source.keys[i * number // samples if samples < number else i % number]
        path = root / t / f"{i // number}/{key}.{source.extension(key, t)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        original = source.path(key, t).resolve()
        try:
            path.hardlink_to(original)
        except OSError:  # another file system
            path.symlink_to(original)
    return FolderSource(root, TYPES)


def put(source: FolderSource, target: Path) -> None:
    """What a builder does that looks at nothing: read each file, put it, flush."""
    for t in TYPES:
        (target / t).mkdir(parents=True)
        with lmdb.open(str(target / t), map_size=1 << 34, lock=False) as env, env.begin(write=True) as transaction:
            for key in source.keys:
                transaction.put(key.encode(), source.read(key, t))


def decode(source: FolderSource, types: tuple[str, ...], first: int = 0, step: int = 1) -> None:
    """The floor: OpenCV turns the bytes into pixels, and nothing else happens."""
    for key, t in itertools.product(source.keys[first::step], types):
        flag = cv2.IMREAD_COLOR if t == "images" else cv2.IMREAD_UNCHANGED
        cv2.imdecode(np.frombuffer(source.read(key, t), np.uint8), flag)


def decode_in_processes(source: FolderSource, types: tuple[str, ...], number: int) -> None:
    """The floor of so many workers: two decoders on one machine are slower than each alone."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=decode, args=(source, types, i, number)) for i in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def load(data: LabelMapDataset, number: int, num_workers: int) -> float:
    """(The training loader has no end: its workers would be charged for batches that nobody takes.)"""
    indices = np.random.default_rng(0).permutation(number)[: number // BATCH * BATCH].tolist()
    batches = sequential_batches(data, indices, BATCH, num_workers=num_workers)
    return steady_rate(batch.layout.edges for batch in batches)  # drawn where batches are used


def steady_rate(batches: Iterable[object]) -> float:
    """Samples/s from the first batch on: workers start once in a training run."""
    iterator = iter(batches)
    next(iterator)
    started_at = time.perf_counter()
    count = sum(1 for _ in iterator)
    return count * BATCH / (time.perf_counter() - started_at)


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
            image = v2.functional.resize(Image.open(self.source.path(key, t)), [side], how)
            if place is None:
                top = int(torch.randint(image.height - 255, ()))
                place = top, int(torch.randint(image.width - 255, ()))
            image = v2.functional.crop(image, *place, 256, 256)
            out.append(v2.functional.pil_to_tensor(v2.functional.hflip(image) if flip else image))
        return tuple(out)


def write_tars(source: FolderSource, folder: Path, count: int) -> None:
    """The samples as ``count`` tar files, as webdataset reads them. Raises ImportError without webdataset."""
    import webdataset

    for part in range(count):
        with webdataset.TarWriter(str(folder / f"{part:06d}.tar")) as writer:
            for index in range(part, len(source.keys), count):
                photo, ids = (source.read(source.keys[index], t) for t in TYPES[:2])
                writer.write({"__key__": f"{index:08d}", "photo": photo, "ids": ids})


def tar_loader(folder: Path, num_workers: int) -> DataLoader:
    """The usual webdataset pipeline: tars, a shuffle buffer, OpenCV."""
    import webdataset

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(100).map(cut)
    return DataLoader(samples, BATCH, num_workers=num_workers)


def cut(sample: dict[str, bytes]) -> tuple[torch.Tensor, ...]:
    photo = cv2.imdecode(np.frombuffer(sample["photo"], np.uint8), cv2.IMREAD_COLOR)
    ids = cv2.imdecode(np.frombuffer(sample["ids"], np.uint8), cv2.IMREAD_UNCHANGED)
    factor = 256 * (1 + 0.2 * np.random.rand()) / min(ids.shape)
    size = round(ids.shape[1] * factor), round(ids.shape[0] * factor)
    photo = cv2.cvtColor(cv2.resize(photo, size), cv2.COLOR_BGR2RGB)
    ids = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    top, left = (np.random.randint(side - 255) for side in ids.shape)
    photo, ids = (array[top : top + 256, left : left + 256] for array in (photo, ids))
    if np.random.rand() < 0.5:
        photo, ids = photo[:, ::-1], ids[:, ::-1]
    edges = np.zeros(ids.shape, np.uint8)
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edges[:, :-1] |= ids[:, 1:] != ids[:, :-1]
    edges[1:] |= ids[1:] != ids[:-1]
    edges[:-1] |= ids[1:] != ids[:-1]
    arrays = (photo.transpose(2, 0, 1), ids, edges)
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


if __name__ == "__main__":
    run_command_line(main)
