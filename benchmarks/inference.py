"""Inference as inference.py does it: label maps -> pictures in memory, and a folder of files -> a folder of files.

The dense reference path convolves the one-hot label maps of a batch with the weights as they were trained.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.layouts import SPEC, dense, make_layout
from benchmarks.measure import Row, rows_of, take_turns
from imaginaire_spade.build import build_generator
from imaginaire_spade.config import RunConfig
from imaginaire_spade.config_files import dump_config, load_config
from imaginaire_spade.data.batch import denormalise
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.files import RgbImage, write_image
from imaginaire_spade.inference.folder import FolderOptions, generate_folder
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.synthesis import Request, pad_to_layout, synthesise
from imaginaire_spade.training.checkpoint import write_checkpoint

RECIPE = Path(__file__).resolve().parents[1] / "configs/projects/spade/cocostuff/base256.yaml"
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def measure(
    folder: Path | None, device: torch.device, repeats: int, num_filters: int, size: int, quick: bool
) -> list[Row]:
    """Batches of ``size`` squared, and a folder of label maps of mixed sizes up to that."""
    config = load_config(RECIPE, [f"gen.num_filters={num_filters}", "trainer.init.gain=1.0"])
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary, "checkpoint.pt")
        _save(checkpoint, config)
        plain = Model.load(checkpoint, weights="raw", device=device, for_inference=False)
        models = {
            precision: Model.load(checkpoint, weights="raw", device=device, precision=precision)
            for precision in PRECISIONS[device.type]
        }
        rows = []
        for batch in (1, 2) if quick else (1, 8):
            requests = _requests(folder, [(size, size)] * batch)
            rows += _in_memory(f"batch {batch}, {size}x{size}", plain, models, requests, repeats)
        sizes = [(size, size), (3 * size // 4, size), (size, 3 * size // 4)]
        requests = _requests(folder, [sizes[i % 3] for i in range(3 if quick else 24)])
        rows += _of_files(Path(temporary), plain, models["fp32"], requests, max(1, repeats // 3))
    return rows


def _save(path: Path, config: RunConfig) -> None:
    torch.manual_seed(0)
    state = build_generator(config).state_dict()
    write_checkpoint(path, {"config": dump_config(config), "generator": state})


def _requests(folder: Path | None, sizes: Sequence[tuple[int, int]]) -> list[Request]:
    layouts = {size: make_layout(folder, len(sizes), *size) for size in set(sizes)}
    requests = []
    for number, size in enumerate(sizes):
        layout = layouts[size]
        assert layout.edges is not None
        requests.append(Request(f"{number:04d}", layout.labels[number], layout.edges[number]))
    return requests


@torch.inference_mode()
def _dense(model: Model, requests: Sequence[Request]) -> list[RgbImage]:
    layout = dense(pad_to_layout(model, requests).to(model.device))
    pictures = denormalise(model.generator(layout)).permute(0, 2, 3, 1).cpu().numpy()
    return [p[: r.labels.shape[0], : r.labels.shape[1]] for p, r in zip(pictures, requests, strict=True)]


def _ours(model: Model, requests: Sequence[Request]) -> list[RgbImage]:
    made = dict(synthesise(model, requests, len(requests)))
    return [made[request.name] for request in requests]


def _in_memory(
    case: str, plain: Model, models: dict[str, Model], requests: Sequence[Request], repeats: int
) -> list[Row]:
    runs: dict[str, Callable[[], list[RgbImage]]] = {"dense": partial(_dense, plain, requests)}
    runs |= {name: partial(_ours, model, requests) for name, model in models.items()}
    expected = runs["dense"]()
    differences = {name: _difference(run(), expected) for name, run in runs.items() if name != "dense"}
    times = take_turns(runs, repeats, plain.device)
    return rows_of("inference", case, times, differences, _rates(times, len(requests)))


def _difference(ours: Sequence[RgbImage], reference: Sequence[RgbImage]) -> float:
    """Largest difference of pixel values, in [-1, 1] as a network's."""
    return max(float(np.abs(a.astype(int) - b).max()) for a, b in zip(ours, reference, strict=True)) / 127.5


def _rates(times: dict[str, list[float]], count: int) -> dict[str, str]:
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    return {name: f"{ms / count:.1f} ms per image, {1000 * count / ms:.2f} images/s" for name, ms in medians.items()}


def _of_files(temporary: Path, plain: Model, model: Model, requests: Sequence[Request], repeats: int) -> list[Row]:
    """A folder of label maps -> one of pictures: each read, generated and written in turn, or overlapping."""
    source, target = temporary / "label_maps", temporary / "pictures"
    source.mkdir()
    for request in requests:
        ids = request.labels.numpy()
        (source / f"{request.name}.png").write_bytes(
            cv2.imencode(".png", np.where(ids == SPEC.num_classes, 255, ids).astype(np.uint8))[1].tobytes()
        )
    dataset = LabelMapDataset(source, model.config.data.labels, edges="labels", with_images=False)

    def in_turn(loaded: Model, make: Callable[[Model, Sequence[Request]], list[RgbImage]]) -> None:
        for index, key in enumerate(dataset.keys):
            sample = dataset[index]
            write_image(target / f"{key}.png", make(loaded, [Request(key, sample.labels, sample.edges)])[0])

    def run(batch_size: int) -> None:
        generate_folder(model, dataset, target, FolderOptions(batch_size, existing="overwrite", gallery=False))

    runs: dict[str, Callable[[], None]] = {
        "dense, in turn": partial(in_turn, plain, _dense),
        "fp32, in turn": partial(in_turn, model, _ours),
        "fp32, overlapping": partial(run, 1),
    }
    if model.device.type == "cuda":
        runs["fp32, batch 8"] = partial(run, 8)
    times = take_turns(runs, repeats, model.device, warm_up=0)
    return rows_of("inference", f"{len(requests)} files", times, {}, _rates(times, len(requests)))
