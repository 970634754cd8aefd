"""Checkpoint + label maps -> picture files.

Owns the way of a label map through a trained generator: padding and cropping, style codes, batches of mixed sizes,
writing, the split over processes, and the gallery page. Needs no photos, no discriminator and no loss network.

A picture is a function of the checkpoint, the seed and the label map's key: neither batch size, nor order, nor the
number of processes changes it (on a GPU up to the rounding of its kernels; on a CPU label maps go through the
generator one by one, which costs nothing there and makes files equal bit by bit).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import sys
import tempfile
import time
import urllib.error
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlparse

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from imaginaire_spade.build import build_encoder, build_generator, layout_spec
from imaginaire_spade.compatibility import explain_mismatch
from imaginaire_spade.config import RunConfig, WeightSource, dump_yaml, load_config, parse_config
from imaginaire_spade.data.dataset import LabelMapDataset, Sample, denormalise, normalise
from imaginaire_spade.data.decode import decode_image
from imaginaire_spade.data.folders import DATA_TYPES
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import CheckpointError, DataError, UserError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.layout import SemanticLayout
from imaginaire_spade.models.encoder import sample_style
from imaginaire_spade.noise import style_noise
from imaginaire_spade.pictures import SUFFIXES, GalleryEntry, Picture, write_gallery, write_image
from imaginaire_spade.training.checkpoint import load_checkpoint, newest_checkpoint

LABELS_FOLDER = "_labels"
"""Folder inside the output folder that holds the gallery's coloured label maps."""
BATCHES_HELD = 8
"""Label maps waiting for others of their size: at most this many batches."""

T = TypeVar("T")
R = TypeVar("R")


# ------------------------------------------------------------------------------------------------ the checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A trained generator, ready for use."""

    generator: nn.Module
    """In evaluation mode, without gradients, on ``device``."""
    encoder: nn.Module | None
    config: RunConfig
    """The checkpoint's own."""
    images_seen: int
    weights: str
    """"ema" or "raw": what was loaded."""
    device: torch.device
    notes: tuple[str, ...] = ()
    """What the user should know."""

    @property
    def one_by_one(self) -> bool:
        """Whether pictures of a batch are made singly: on a CPU batching saves nothing, and some convolutions and all
        matrix products round differently by batch size."""
        return self.device.type == "cpu"

    @property
    def size_multiple(self) -> int:
        return int(self.generator.size_multiple)  # type: ignore[arg-type]

    @property
    def style_dims(self) -> int:
        return int(self.generator.style_dims)  # type: ignore[arg-type]


def load_generator(path: Path, *, weights: str = "ema", device: torch.device | str = "cpu") -> LoadedModel:
    """Load a checkpoint's generator, and its style encoder if it has one.

    Args:
        path: a checkpoint file of this package.
        weights: "ema" (moving average; "raw" where the checkpoint has none, with a note) or "raw".
    Raises:
        CheckpointError: absent, damaged, foreign, or not of the architecture that its own config describes.
        ConfigError: a component of the user's own is not registered.
    """
    content = load_checkpoint(path)
    if missing := {"config", "generator"} - set(content):
        raise CheckpointError(f"{path}: a checkpoint without {' and '.join(sorted(missing))}: not one to generate with")
    config = parse_config(content["config"], source=str(path))
    notes = []
    average = content.get("generator_ema")
    if weights == "ema" and average is None:
        weights, notes = "raw", [f"{path} has no moving average of the weights: the raw weights are used"]
    generator = build_generator(config)
    _load(generator, average if weights == "ema" else content["generator"], path, "generator")
    encoder = build_encoder(config) if content.get("encoder") is not None else None
    if encoder is not None:
        _load(encoder, content["encoder"], path, "encoder")
    device = torch.device(device)
    channels_last = config.trainer.channels_last and device.type == "cuda"
    for network in filter(None, (generator, encoder)):
        network.eval().requires_grad_(False).to(
            device, memory_format=torch.channels_last if channels_last else torch.preserve_format
        )  # type: ignore[call-overload]
    images_seen = int(content.get("images_seen") or 0)
    return LoadedModel(generator, encoder, config, images_seen, weights, device, tuple(notes))


def _load(network: nn.Module, state: Any, path: Path, name: str) -> None:
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the weights of its {name} do not fit the architecture of its own config; it is damaged, or its"
            f" components were changed since ({error})"
        ) from None


def find_checkpoint(checkpoint: Path | None, logdir: Path | None, config: RunConfig | None) -> Path:
    """The checkpoint file that the command line means: --checkpoint, else --logdir, else pretrained_weight.

    Raises:
        CheckpointError: nothing is given, or nothing is there.
    """
    for flag, place in (("--checkpoint", checkpoint), ("--logdir", logdir)):
        if place is None:
            continue
        if flag == "--checkpoint" and place.is_file():
            return place
        if not place.is_dir():
            wanted = "file or folder" if flag == "--checkpoint" else "log dir"
            raise CheckpointError(f"{flag} {place}: no such {wanted}")
        newest = newest_checkpoint(place)
        if newest is None:
            raise CheckpointError(f"{flag} {place}: no checkpoint_*.pt there or in its checkpoints/ folder")
        return newest
    if config is not None and config.pretrained_weight is not None:
        return fetch_weights(config.pretrained_weight)
    raise CheckpointError(
        "no checkpoint: give --checkpoint FILE, or --logdir DIR of a training run, or a --config with"
        " pretrained_weight: {path: FILE}"
    )


def fetch_weights(source: WeightSource) -> Path:
    """The file that a config's ``pretrained_weight`` names, downloaded into torch's hub cache at the first use.

    Raises:
        CheckpointError: no such file, no connection, or other bytes than its sha256 says.
    """
    if source.path is not None:
        if not Path(source.path).is_file():
            raise CheckpointError(f"pretrained_weight.path: {source.path}: no such file")
        return Path(source.path)
    assert source.url is not None and source.sha256 is not None
    name = PurePosixPath(urlparse(source.url).path).name or "checkpoint.pt"
    target = Path(torch.hub.get_dir(), "checkpoints", f"{source.sha256[:16]}-{name}")
    if target.is_file() and _sha256(target) == source.sha256:
        return target
    print(f"downloading {source.url} to {target}", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source.url, str(target), hash_prefix=source.sha256, progress=sys.stderr.isatty())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CheckpointError(
            f"pretrained_weight.url: {source.url} cannot be downloaded ({error}). Without a connection: fetch the file"
            f" elsewhere and give it as --checkpoint FILE, or put it at {target}"
        ) from None
    except RuntimeError as error:
        raise CheckpointError(
            f"pretrained_weight.url: {source.url} is not the file with sha256 {source.sha256} ({error}). Nothing was"
            " kept; correct the url or the sha256"
        ) from None
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fits(model: LoadedModel, given: RunConfig, where: str) -> None:
    """Raises CheckpointError, in words, where ``given`` describes another generator than the checkpoint holds."""
    if differences := explain_mismatch(model.config, given, parts=("gen",)):
        raise CheckpointError(
            f"{where} does not fit the checkpoint:\n  " + "\n  ".join(differences) + "\nThe checkpoint carries its own"
            " config: leave that out, or give the checkpoint of this config"
        )


def with_overrides(config: RunConfig, overrides: Sequence[str], name: str) -> RunConfig:
    """``config`` with ``--set`` values. Raises ConfigError."""
    if not overrides:
        return config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"config of {name}")
        path.write_text(dump_yaml(config), encoding="utf-8")
        return load_config(path, overrides)


# ------------------------------------------------------------------------------------------------ the generator


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    name: str
    labels: Tensor
    """uint8 or int16 [H, W], train ids."""
    edges: Tensor | None = None
    """uint8 [H, W] of 0/1."""
    z: Tensor | None = None
    """float [style_dims]."""


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The smallest (height, width) at or above that ``multiple`` divides."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def synthesise(model: LoadedModel, requests: Iterable[Request], batch_size: int = 1) -> Iterator[tuple[str, Picture]]:
    """Make the pictures: (name, RGB uint8 [H, W, 3] of the label map's size), in an order of their own.

    Requests are taken lazily and wait for others of their padded size, at most ``BATCHES_HELD`` batches of them.

    Raises:
        UserError: the device's memory does not do, or the network's values are not finite.
    """
    # The next batch is launched before the last one is fetched, so that a GPU does not wait for the host.
    launched: tuple[list[Request], Tensor] | None = None
    for batch in batches_of_one_size(requests, model.size_multiple, batch_size):
        previous, launched = launched, (batch, _forward(model, batch))
        if previous is not None:
            yield from _fetched(*previous)
    if launched is not None:
        yield from _fetched(*launched)


def batches_of_one_size(requests: Iterable[Request], multiple: int, batch_size: int) -> Iterator[list[Request]]:
    """Requests that have one padded size, ``batch_size`` of them where so many are at hand."""
    waiting: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        height, width = request.labels.shape
        group = waiting.setdefault(padded_size(height, width, multiple), [])
        group.append(request)
        if len(group) == batch_size:
            del waiting[padded_size(height, width, multiple)]
            yield group
        elif sum(map(len, waiting.values())) >= BATCHES_HELD * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def _padded_size_of(request: Request, model: LoadedModel) -> tuple[int, int]:
    return padded_size(request.labels.shape[0], request.labels.shape[1], model.size_multiple)


def padded_layout(model: LoadedModel, requests: Sequence[Request]) -> SemanticLayout:
    """Requests of one padded size as a layout, filled up with don't-care (no edges) at the bottom and on the right."""
    spec = layout_spec(model.config)
    height, width = _padded_size_of(requests[0], model)

    def stacked(maps: Sequence[Tensor], fill: int) -> Tensor:
        return torch.stack([F.pad(m, (0, width - m.shape[1], 0, height - m.shape[0]), value=fill) for m in maps])

    edges = [request.edges for request in requests if request.edges is not None]
    labels = stacked([request.labels for request in requests], spec.num_classes)
    return SemanticLayout(spec, labels, stacked(edges, 0) if edges else None)


@torch.inference_mode()
def _forward(model: LoadedModel, requests: Sequence[Request]) -> Tensor:
    """The generator's output for requests of one padded size: float [N, 3, H, W] on the device, padding included."""
    step = 1 if model.one_by_one else len(requests)
    try:
        images = []
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            codes = [request.z for request in part if request.z is not None]
            z = torch.stack(codes).to(model.device) if codes else None
            images.append(model.generator(padded_layout(model, part).to(model.device), z))
        return torch.cat(images)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    height, width = _padded_size_of(requests[0], model)
    raise UserError(
        f"{requests[0].name}: not enough memory on {model.device} for {step} picture(s) of {height}x{width} at once."
        f" {'Write a smaller --batch_size' if step > 1 else 'Make the label map smaller, or use a machine with more'}"
    )


def _fetched(requests: Sequence[Request], images: Tensor) -> Iterator[tuple[str, Picture]]:
    finite = images.isfinite().flatten(1).all(1).cpu()
    pictures = denormalise(images).permute(0, 2, 3, 1).cpu().numpy()
    for request, picture, is_finite in zip(requests, pictures, finite.tolist(), strict=True):
        if not is_finite:
            raise UserError(
                f"{request.name}: the generator's output is not finite. The weights are damaged, or training had"
                " diverged: try an earlier checkpoint, or --weights raw"
            )
        height, width = request.labels.shape
        yield request.name, picture[:height, :width]


@torch.inference_mode()
def encode_style(model: LoadedModel, path: Path) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of a picture's style, float [style_dims] each, on the CPU.

    Raises:
        CheckpointError: trained without an encoder.
        DataError: the picture cannot be read.
    """
    if model.encoder is None:
        raise CheckpointError(
            "--style_image: this checkpoint was trained without a style encoder; leave the flag out, or take a"
            " checkpoint whose config has encoder: {type: conv}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--style_image {path}: cannot be read: {error.strerror}") from None
    picture = decode_image(content, f"--style_image {path}")
    # Shrunk by area average to about the size of the training pictures; the encoder's own resizing would alias.
    trained_at = model.config.data.train.augmentations.output_h_w
    scale = min(trained_at) / min(picture.shape[:2]) if trained_at else 1
    if scale < 1:
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(model.device)
    mu, logvar = model.encoder(normalise(image))
    return mu[0].float().cpu(), logvar[0].float().cpu()


# ------------------------------------------------------------------------------------------------ the output folder


@dataclass(frozen=True)
class Output:
    """Files of one label map, relative to the output folder."""

    key: str
    index: int
    """Place in the data set."""
    pictures: tuple[str, ...]
    label_map: str


def plan_outputs(keys: Sequence[str], num_samples: int = 1, suffix: str = ".png") -> list[Output]:
    """The files of every key, sorted by key. Raises DataError for keys that lead out of the folder or collide."""
    digits = max(2, len(str(num_samples - 1)))
    outputs = []
    for index, key in sorted(enumerate(keys), key=lambda item: item[1]):
        _check_key(key)
        stems = [key] if num_samples == 1 else [f"{key}_{j:0{digits}d}" for j in range(num_samples)]
        pictures = tuple(f"{stem}{suffix}" for stem in stems)
        outputs.append(Output(key, index, pictures, f"{LABELS_FOLDER}/{key}.png"))
    taken: dict[str, str] = {}
    for output in outputs:
        for path in (*output.pictures, output.label_map):
            if path in taken:
                raise DataError(
                    f"label maps {taken[path]!r} and {output.key!r} would both be written to {path}: rename one"
                )
            taken[path] = output.key
    for path, key in taken.items():
        for parent in itertools.takewhile(lambda p: p.name, PurePosixPath(path).parents):
            if str(parent) in taken:
                raise DataError(
                    f"label map {key!r} needs a folder {parent}, but that is a picture of"
                    f" {taken[str(parent)]!r}: rename one"
                )
    return outputs


def _check_key(key: str) -> None:
    if (
        any(part in ("", ".", "..") for part in key.split("/"))
        or any(character in key for character in "\\\0")
        or re.match(r"[A-Za-z]:", key)
    ):
        raise DataError(
            f"{key!r}: a sample's key must be a plain relative path (SEQUENCE/NAME): no '..', no leading '/', drive"
            " letter or backslash. Rename it in the data set"
        )


def check_output_folder(directory: Path, own: Sequence[Output], everything: Sequence[Output]) -> None:
    """Raises UserError where the folder holds pictures already: an evaluation of it would mix two runs.

    Several processes check without waiting for each other: each looks for what no other process writes, which is its
    own share and what belongs to nobody.
    """
    planned = {path for output in everything for path in output.pictures}
    mine = {path for output in own for path in output.pictures}
    for folder, folders, files in os.walk(directory):
        at = Path(folder).relative_to(directory).as_posix()
        if at == ".":
            folders[:] = [name for name in folders if name != LABELS_FOLDER]
        for name in files:
            path = name if at == "." else f"{at}/{name}"
            is_picture = name.lower().endswith(SUFFIXES) and not name.startswith(".")
            if is_picture and (path in mine or path not in planned):
                raise UserError(
                    f"--output_dir {directory} already holds pictures, such as {path}. Write --skip_existing to keep"
                    " them and make the missing ones, --overwrite to replace those of the same name, or another folder"
                )


def check_apart(directory: Path, roots: Iterable[str | Path]) -> None:
    """Raises UserError where pictures would land among the label maps they are made of."""
    target = directory.resolve()
    for root in roots:
        source = Path(root).resolve()
        if not target.is_relative_to(source):
            continue
        below = target.relative_to(source).parts
        if not below or below[0] in DATA_TYPES or not any((source / name).is_dir() for name in DATA_TYPES):
            raise UserError(
                f"--output_dir {directory} lies among the label maps of {root}: pictures would replace them or be taken"
                " for label maps. Give a folder elsewhere"
            )


# ------------------------------------------------------------------------------------------------ the run


class Progress:
    """Progress on stderr: a bar on a terminal, else a line now and then; nothing where ``shown`` is False."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._bar = tqdm(unit="image", dynamic_ncols=True) if shown and sys.stderr.isatty() else None
        self._started_at = self._line_at = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif self._shown and time.perf_counter() - self._line_at >= self.SECONDS_BETWEEN_LINES:
            self._line_at = time.perf_counter()
            rate = done / (self._line_at - self._started_at)
            print(f"{done} of {total} pictures, {rate:.2f} images/s", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class RunReport:
    """What one process did."""

    pictures: int
    """Written by this process."""
    total: int
    """Of all processes, those that were there already included."""
    seconds: float
    gallery: Path | None


def generate_folder(
    model: LoadedModel,
    dataset: LabelMapDataset,
    directory: Path,
    *,
    batch_size: int = 1,
    num_samples: int = 1,
    seed: int = 0,
    style: tuple[Tensor, Tensor] | None = None,
    suffix: str = ".png",
    existing: str = "refuse",
    gallery: bool = True,
    info: ProcessInfo | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> RunReport:
    """Write the pictures of this process's share of a data set: every ``world_size``-th key, in sorted order.

    Args:
        dataset: label maps, made with ``with_images=False``.
        directory: output folder.
        num_samples: pictures per label map, each with a style code of its own.
        style: (mu, logvar) of ``encode_style``, instead of drawn codes: the mean itself for one picture per label map,
            draws around it for several.
        existing: what to do with pictures in ``directory``: "refuse", "skip" or "overwrite".
        gallery: write ``index.html`` (rank 0; it names every process's pictures) and coloured label maps for it.
        on_written: called with (pictures done, pictures to do) of this process.
    Raises:
        UserError: before the first picture, for whatever can be known by then; DataError for a label map that cannot
            be used, naming the file. Pictures written by then stay, and are whole.
    """
    info = info or ProcessInfo()
    everything = plan_outputs(dataset.keys, num_samples, suffix)
    own = everything[info.rank :: info.world_size]
    if existing == "refuse":
        check_output_folder(directory, own, everything)
    _make_folder(directory)

    wanted: dict[str, list[int]] = {}  # key -> numbers of the pictures to make
    for output in own:
        files = [j for j, path in enumerate(output.pictures) if existing != "skip" or not (directory / path).is_file()]
        if files or (gallery and not (directory / output.label_map).is_file()):
            wanted[output.key] = files
    todo = [output for output in own if output.key in wanted]
    number = sum(map(len, wanted.values()))

    started_at, done = time.perf_counter(), 0
    with Writer() as writer:

        def requests() -> Iterator[Request]:
            for output, sample in read_ahead(lambda o: (o, dataset[o.index]), todo, BATCHES_HELD):
                if gallery:
                    writer.put(directory / output.label_map, dataset.labels.colourise(sample.labels.numpy()))
                yield from _requests(model, output, sample, wanted[output.key], seed, style)

        for path, picture in synthesise(model, requests(), batch_size):
            writer.put(directory / path, picture)
            done += 1
            on_written(done, number)
    seconds = time.perf_counter() - started_at
    page = None
    if gallery and info.is_main:
        page = _write_gallery(model, dataset.labels, directory, everything)
    return RunReport(done, sum(len(output.pictures) for output in everything), seconds, page)


def _requests(
    model: LoadedModel,
    output: Output,
    sample: Sample,
    wanted: Sequence[int],
    seed: int,
    style: tuple[Tensor, Tensor] | None,
) -> Iterator[Request]:
    for j in wanted:
        z = None
        if model.style_dims:
            name = output.key if len(output.pictures) == 1 else f"{output.key}#{j}"
            z = style_noise(seed, [name], model.style_dims)[0]
            if style is not None:
                z = style[0] if len(output.pictures) == 1 else sample_style(*style, z)
        yield Request(output.pictures[j], sample.labels, sample.edges, z)


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {directory}: no permission to write there")


def _write_gallery(model: LoadedModel, labels: LabelSpec, directory: Path, outputs: Sequence[Output]) -> Path:
    legend = [(labels.name(i), tuple(labels.colours[i].tolist())) for i in range(labels.num_classes + 1)]
    entries = [GalleryEntry(output.key, output.label_map, output.pictures) for output in outputs]
    title = f"{directory.resolve().name}: generator after {model.images_seen:,} images ({model.weights} weights)"
    return write_gallery(directory, entries, title, legend=legend)


def read_ahead(function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """``map``, computed by one thread up to ``ahead`` items before they are asked for."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1, "read") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Writer:
    """Encodes and writes pictures in a few threads, with a bounded queue. Leaving it waits for all of them.

    Raises UserError (from ``put`` or on leaving) for a picture that could not be written.
    """

    def __init__(self, num_threads: int = 3) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "write")
        self._pending: deque[Future[None]] = deque()
        self._bound = 8 * num_threads

    def put(self, path: Path, picture: Picture) -> None:
        self._pending.append(self._pool.submit(write_image, path, picture))
        while self._pending and (len(self._pending) > self._bound or self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)
