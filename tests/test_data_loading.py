"""Geometry, data set, batches and loader: aligned, inside the picture, and functions of (seed, position) alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import cv2
import lmdb
import numpy as np
import pytest
import torch
from conftest import write_jpg, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from imaginaire_spade.config import AugmentationConfig
from imaginaire_spade.data import dataset as dataset_module
from imaginaire_spade.data import lmdb_source as lmdb_module
from imaginaire_spade.data import loader as loader_module
from imaginaire_spade.data.batch import Batch, Sample, denormalise, normalise
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.loader import (
    PREFETCH,
    Prefetcher,
    default_num_workers,
    sequential_batches,
    training_loader,
    training_order,
)
from imaginaire_spade.data.transforms import Geometry, apply_to_image, apply_to_map, draw_geometry
from imaginaire_spade.errors import DataError, LabelError
from imaginaire_spade.labels import LabelSpec, edges_from_ids
from imaginaire_spade.layout import LayoutSpec, borders
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.noise import uniform_draws

LABELS = LabelSpec(num_classes=5)
CROPPED = AugmentationConfig(
    resize_smallest_side=36, random_scale_limit=0.3, random_crop_h_w=(32, 32), horizontal_flip=True
)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def draws(seed: int) -> list[float]:
    return rng(seed).random(4).tolist()


# ------------------------------------------------------------------------------------------------ geometry


@st.composite
def augmentations(draw) -> AugmentationConfig:
    side = st.integers(1, 90)
    resize = draw(st.sampled_from(["none", "smallest", "exact"]))
    crop = draw(st.sampled_from(["none", "random", "center"]))
    keys = {
        "resize_smallest_side": draw(side) if resize == "smallest" else None,
        "resize_h_w": (draw(side), draw(side)) if resize == "exact" else None,
        "random_scale_limit": draw(st.sampled_from([0.0, 0.2, 1.5])),
        "horizontal_flip": draw(st.booleans()),
    }
    limit = keys["resize_h_w"] or (keys["resize_smallest_side"],) * 2
    if crop != "none":
        size = draw(st.integers(1, limit[0] or 90)), draw(st.integers(1, limit[1] or 90))
        keys["random_crop_h_w" if crop == "random" else "center_crop_h_w"] = size
    return AugmentationConfig(**keys)


@settings(max_examples=300, deadline=None)
@given(augmentations(), st.integers(1, 120), st.integers(1, 120), st.integers(0, 2**20))
def test_every_crop_lies_inside_and_maps_stay_aligned(config, height, width, seed):
    try:
        g = draw_geometry(height, width, config, draws(seed), "a.png")
    except DataError as error:
        assert "crop_h_w" in str(error) and "a.png" in str(error)
        resized = draw_geometry(
            height,
            width,
            config.model_copy(update={"random_crop_h_w": None, "center_crop_h_w": None}),
            draws(seed),
            "x",
        )
        assert resized.height < config.crop_h_w[0] or resized.width < config.crop_h_w[1]
        return
    assert g.top >= 0 and g.top + g.rows <= height and g.left >= 0 and g.left + g.columns <= width
    assert g.rows >= g.height * g.reduction or g.reduction == 1
    assert (g.height, g.width) == (config.output_h_w or (g.height, g.width))
    places = np.arange(height * width).reshape(height, width)
    cut = apply_to_map(places, g)
    assert cut.shape == (g.height, g.width)
    for i, j in ((0, 0), (g.height - 1, g.width - 1)):
        column = g.width - 1 - j if g.flip else j
        row, column = g.top + (i + 0.5) * g.rows / g.height, g.left + (column + 0.5) * g.columns / g.width
        assert abs(cut[i, j] // width + 0.5 - row) <= 0.5 + 1e-6
        assert abs(cut[i, j] % width + 0.5 - column) <= 0.5 + 1e-6
    picture = rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cut = apply_to_image(picture, g)
    assert cut.shape == (g.height, g.width, 3) and cut.flags.c_contiguous
    out = np.zeros_like(cut)
    assert apply_to_image(picture, g, out=out) is out and np.array_equal(out, cut)
    if (g.rows, g.columns) == (g.height, g.width):  # nothing was resized
        expected = picture[g.top : g.top + g.rows, g.left : g.left + g.columns]
        assert np.array_equal(cut, expected[:, ::-1] if g.flip else expected)


@settings(max_examples=300, deadline=None)
@given(augmentations(), st.integers(20, 400), st.integers(20, 400), st.integers(0, 2**20))
def test_a_crop_has_the_scale_of_its_resize(config, height, width, seed):
    """To half a pixel of the stored picture (of its every 2nd, 4th or 8th, where a JPEG is decoded smaller)."""
    try:
        g = draw_geometry(height, width, config, draws(seed), "x")
    except DataError:
        return
    uncut = config.model_copy(update={"random_crop_h_w": None, "center_crop_h_w": None})
    whole = draw_geometry(height, width, uncut, draws(seed), "x")
    assert (whole.top, whole.left, whole.rows, whole.columns) == (0, 0, height, width)
    assert whole.reduction == g.reduction and whole.flip == g.flip
    for cut, crop, size, resized in (
        (g.rows, g.height, height, whole.height),
        (g.columns, g.width, width, whole.width),
    ):
        assert abs(cut - crop * size / resized) <= g.reduction / 2 + 1e-6 or (cut == 1 and resized > size)


@pytest.mark.parametrize(("side", "flip"), [(90, False), (90, True), (60, False), (130, True), (37, False)])
def test_a_crop_comes_from_where_its_geometry_says(side, flip):
    """Two ramps of 2 per pixel: a value tells its row or column to a quarter of a pixel."""
    height, width = 100, 127
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([2 * rows, 2 * columns, 0 * rows], 2).astype(np.uint8)
    config = AugmentationConfig(
        resize_smallest_side=side, random_scale_limit=0.2, random_crop_h_w=(32, 32), horizontal_flip=True
    )
    found = 0
    for seed in range(200):
        g = draw_geometry(height, width, config, draws(seed), "x")
        if g.flip != flip:
            continue
        found += 1
        cut = apply_to_image(ramp, g).astype(float) / 2
        places = np.arange(32) + 0.5
        from_row = g.top + places * g.rows / g.height - 0.5
        from_column = g.left + (places[::-1] if flip else places) * g.columns / g.width - 0.5
        assert np.abs(cut[..., 0] - from_row[:, None])[1:-1].max() <= 0.51
        assert np.abs(cut[..., 1] - from_column[None])[:, 1:-1].max() <= 0.51
    assert found > 50


def test_draws_are_uniform_and_belong_to_their_sample():
    numbers = np.array([uniform_draws(1, i, "augmentation") for i in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.08
    for column in numbers.T:
        shares = np.histogram(column, 10, (0, 1))[0] / 4000
        assert np.abs(shares - 0.1).max() < 0.025
    others = [uniform_draws(*of) for of in ((1, 0, "style"), (2, 0, "augmentation"), (1, "0", "augmentation"))]
    assert len({tuple(numbers[0]), *others}) == 4


def test_crop_offsets_reach_both_ends():
    config = AugmentationConfig(random_crop_h_w=(4, 4))
    offsets = {(g.top, g.left) for i in range(400) for g in [draw_geometry(6, 5, config, draws(i), "x")]}
    assert offsets == set(itertools.product(range(3), range(2)))


def test_rounding_alone_never_makes_the_picture_smaller_than_the_crop():
    # 33 x 100 at smallest side 30: the other is 90.9; 100 x 301 at 256: 770.56; a crop of ceil(...) must fit.
    for height, width, side, crop in ((33, 100, 30, 91), (100, 301, 256, 771), (300, 100, 10, 30)):
        config = AugmentationConfig(resize_smallest_side=side, center_crop_h_w=(min(side, crop), 1))
        assert draw_geometry(height, width, config, draws(0), "x").height == min(side, crop)
        wide = AugmentationConfig(resize_smallest_side=side, random_crop_h_w=(side, crop))
        if width > height:
            g = draw_geometry(height, width, wide, draws(0), "x")
            assert (g.columns, g.width) == (width, crop)


def test_the_crop_error_names_file_sizes_and_line():
    config = AugmentationConfig(random_crop_h_w=(64, 64))
    with pytest.raises(DataError, match=r"(?s)seg/a\.png.*\[64, 64\].*48 x 80.*resize_smallest_side: 64"):
        draw_geometry(48, 80, config, draws(0), "seg/a.png")


def test_photo_and_map_move_together():
    ids = np.kron(rng(1).integers(0, 200, (6, 9), dtype=np.uint8), np.ones((16, 16), np.uint8))
    for seed in range(20):
        g = draw_geometry(*ids.shape, AugmentationConfig(
            resize_smallest_side=64, random_scale_limit=0.5, random_crop_h_w=(48, 48), horizontal_flip=True
        ), draws(seed), "x")  # fmt: skip
        photo = apply_to_image(np.stack([ids] * 3, 2), g)[..., 0]
        cut = apply_to_map(ids, g)
        inside = cv2.dilate(edges_from_ids(cut), np.ones((3, 3))) == 0  # away from borders, where interpolation mixes
        inner = np.s_[3:-3, 3:-3]  # a block may begin just outside the crop
        assert inside[inner].mean() > 0.2
        assert np.abs(photo.astype(int) - cut)[inner][inside[inner]].max() <= 1


def test_maps_of_any_dtype_and_channels():
    g = Geometry(1, 2, 3, 4, 5, 3, flip=True)
    for array in (np.arange(30, dtype=np.int32).reshape(5, 6) * 100_000, np.arange(30, dtype=np.uint16).reshape(5, 6)):
        cut = apply_to_map(array, g)
        assert cut.dtype == array.dtype
        assert np.array_equal(apply_to_map(np.stack([array, array], 2), g)[..., 1], cut)


def test_edges_mark_both_sides_and_do_not_wrap():
    assert edges_from_ids(np.array([[1, 1, 2], [1, 1, 1], [1, 1, 1]])).tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert edges_from_ids(np.array([[1, 1, 2]])).tolist() == [[0, 1, 1]]
    assert edges_from_ids(np.array([[7]])).dtype == np.uint8


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_edges_equal_their_definition(height, width, seed):
    ids = rng(seed).integers(0, 3, (height, width))
    expected = np.zeros(ids.shape, np.uint8)
    for axis in (0, 1):
        differ = (np.diff(ids, axis=axis) != 0).view(np.uint8)
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (1, 0), (0, 1)
        expected |= np.pad(differ, before) | np.pad(differ, after)
    for dtype in (np.uint8, np.uint16, np.int16, np.int32):
        assert np.array_equal(edges_from_ids(ids.astype(dtype)[::-1]), expected[::-1])
    assert np.array_equal(edges_from_ids(ids << 32), expected)  # ids that differ in their upper half alone
    assert np.array_equal(borders(torch.from_numpy(np.stack([ids, ids]))), [expected, expected])  # its twin


# ------------------------------------------------------------------------------------------------ data set


def samples_equal(a, b) -> bool:
    tensors = all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    return tensors and a[3:] == b[3:]


@pytest.mark.parametrize("edges", ["none", "file", "instances", "labels"])
def test_folder_and_lmdb_give_the_same_samples(tiny_folder, tmp_path, edges):
    root = tiny_folder(keys=["a", "b", "s/c"])
    build_dataset(root, tmp_path / "out", LABELS, edges=edges, num_shards=2, num_workers=0)
    folder, store = (
        LabelMapDataset(r, LABELS, edges=edges, augmentations=CROPPED, seed=3) for r in (root, tmp_path / "out")
    )
    assert folder.keys == store.keys == ["a", "b", "s/c"]
    assert folder.spec == store.spec and folder.spec.has_edges == (edges != "none")
    for item in (0, 1, 2, (1, 77), (2, 10**9)):
        assert samples_equal(folder[item], store[item])
    sample = folder[1, 77]
    assert sample.image.dtype == torch.uint8 and sample.image.shape == (3, 32, 32)
    assert sample.labels.dtype == torch.uint8 and sample.labels.shape == (32, 32)
    assert (sample.key, sample.original_size, sample.position) == ("b", (40, 56), 77)
    if edges != "none":
        assert sample.edges.dtype == torch.uint8 and set(sample.edges.unique().tolist()) <= {0, 1}
    if edges in ("instances", "labels"):  # here instances follow labels
        assert np.array_equal(sample.edges.numpy(), edges_from_ids(sample.labels.numpy()))


def test_augmentation_is_a_function_of_seed_and_position(tiny_folder):
    root = tiny_folder(keys=2)
    data = LabelMapDataset(root, LABELS, augmentations=CROPPED, seed=1)
    assert samples_equal(data[0, 5], LabelMapDataset(root, LABELS, augmentations=CROPPED, seed=1)[0, 5])
    assert len({data[0, position].image.numpy().tobytes() for position in range(8)}) == 8
    assert not samples_equal(data[0, 5], LabelMapDataset(root, LABELS, augmentations=CROPPED, seed=2)[0, 5])


def test_samples_are_those_that_were_recorded(tmp_path):
    """Same seed and position, same bits, in any version. (No photo is resized: that rounds by machine.)"""
    for number in range(3):
        rows, columns = np.mgrid[:60, :80] + number
        photo = np.stack([rows * 4, columns * 3, rows ^ columns], 2).astype(np.uint8)
        write_png(tmp_path / f"raw/images/{number}.png", photo)
        labels = np.where(rows % 7, rows // 9 * columns // 11 % 5, 255).astype(np.uint8)
        write_png(tmp_path / f"raw/seg_maps/{number}.png", labels)
        write_png(tmp_path / f"raw/edge_maps/{number}.png", (rows * columns % 5 == 0).astype(np.uint8))
        write_png(tmp_path / f"raw/inst_maps/{number}.png", (rows // 8 * 1000 + columns // 13).astype(np.uint16))
    table = LabelSpec(num_classes=5, ignore=(255,))
    cut = AugmentationConfig(random_crop_h_w=(32, 48), horizontal_flip=True)
    scaled = CROPPED.model_copy(update={"random_scale_limit": 0.5})

    def digest(*tensors: torch.Tensor | None) -> str:
        content = b"".join(t.contiguous().numpy().tobytes() for t in tensors if t is not None)
        return hashlib.sha256(content).hexdigest()[:16]

    found = []
    for edges, augmentations in itertools.product(("none", "file", "instances", "labels"), (cut, scaled)):
        data = LabelMapDataset(tmp_path / "raw", table, edges=edges, augmentations=augmentations, seed=5)
        for batch in itertools.islice(training_loader(data, 2, seed=5, images_seen=100, num_workers=0), 2):
            maps = batch.layout.labels, batch.layout.edges
            found.append("".join(batch.keys) + " " + digest(*maps, batch.images if augmentations is cut else None))
    assert found == RECORDED_SAMPLES


RECORDED_SAMPLES = [
    "21 ed605e934a2411a6", "01 fb264b7d3c46b9d1", "21 f550cfed33f95e16", "01 94430f734b4bdc7c",
    "21 319af5058dd1e5f8", "01 6306b22e5b95391a", "21 6ba614b744717401", "01 ae3baa2e3368ec35",
    "21 0fc1357a93d01d55", "01 2d1132d88cf9a013", "21 ef23e7bf7d11948f", "01 84bb5cff626421bd",
    "21 824a0f94e7696991", "01 d3ad9b330f271688", "21 6583f65cb5c8a817", "01 d385eb603cf6cad7",
]  # fmt: skip


def test_keys_of_several_roots_stay_unique(tiny_folder):
    a, b = tiny_folder("a", keys=2), tiny_folder("b", keys=3, seed=1)
    both = LabelMapDataset([a, b], LABELS)
    assert both.keys == ["a/0000", "a/0001", "b/0000", "b/0001", "b/0002"]
    assert samples_equal(both[3][:3], LabelMapDataset(b, LABELS)[1][:3])
    with pytest.raises(DataError, match="different names"):
        LabelMapDataset([a, a], LABELS)
    c = tiny_folder("c", keys=["x"])
    assert LabelMapDataset([a, c], LABELS).keys == ["0000", "0001", "x"]
    with pytest.raises(IndexError):
        both[5]


def test_mistakes_are_found_on_load(tiny_folder):
    root = tiny_folder(keys=2)
    write_png(root / "seg_maps/0000.png", np.full((40, 56), 9, np.uint8))
    write_png(root / "seg_maps/0001.png", np.zeros((40, 55), np.uint8))
    data = LabelMapDataset(root, LABELS)
    with pytest.raises(LabelError, match=r"0000\.png: label value\(s\) 9"):
        data[0]
    with pytest.raises(DataError, match=r"(?s)0001\.jpg is 40 x 56 .*0001\.png is\s+40 x 55"):
        data[1]


def test_more_than_254_classes_travel_as_int16(tmp_path):
    write_png(tmp_path / "raw/seg_maps/a.png", np.array([[0, 299, 300]], np.uint16))
    data = LabelMapDataset(tmp_path / "raw", LabelSpec(num_classes=300, ignore=(300,)), with_images=False)
    assert data[0].labels.dtype == torch.int16 and data[0].labels.tolist() == [[0, 299, 300]]


def test_inference_reads_bare_folders_and_derives_edges(tiny_folder, tmp_path):
    root = tiny_folder(keys=["a", "s/b"], types=("seg_maps",))
    with pytest.warns(UserWarning, match="no edge_maps.*borders of the label maps"):
        data = LabelMapDataset(root, LABELS, edges="file", with_images=False)
    assert data[0].image is None
    assert np.array_equal(data[0].edges.numpy(), edges_from_ids(data[0].labels.numpy()))
    bare = LabelMapDataset(root / "seg_maps", LABELS, edges="labels", with_images=False)
    assert bare.keys == ["a", "s/b"] and samples_equal(bare[1], data[1])
    full = tiny_folder("full", keys=2)
    with pytest.warns(UserWarning, match="borders of the label maps"):
        both = LabelMapDataset([full, root], LABELS, edges="file", with_images=False, augmentations=CROPPED)
    mixed = next(sequential_batches(both, [0, 2], 2))
    assert torch.equal(mixed.layout.edges, torch.stack([both[0].edges, both[2].edges]))
    for_inference = LabelMapDataset(full, LABELS, edges="file", with_images=False)
    assert torch.equal(for_inference[0].edges, LabelMapDataset(full, LABELS, edges="file")[0].edges)
    with pytest.raises(DataError, match="no data set there"):
        LabelMapDataset(root / "seg_maps", LABELS)
    with pytest.raises(DataError, match="no folder seg_maps/"):
        LabelMapDataset(tiny_folder("photos", types=("images",)), LABELS, with_images=False)


def test_imaginaires_samples(shared_dir):
    fixture = shared_dir / "parity" / "imaginaire_lmdb"
    arrays = load_file(fixture / "outputs.safetensors")
    height, width = json.loads((fixture / "config.json").read_text())["sample"]["resize_h_w"]
    data = LabelMapDataset(
        fixture / "lmdb",
        LabelSpec(num_classes=183, ignore=(255,)),
        edges="file",
        augmentations=AugmentationConfig(resize_h_w=(height, width)),
    )
    for i in range(len(data)):
        sample = data[i]
        assert sample.original_size == tuple(arrays[f"sample/{i}/original_h_w"])
        expected = arrays[f"sample/{i}/label_onehot_nonzero_channel"]
        # Ours takes pixel centres, OpenCV's INTER_NEAREST corners: they differ at borders only.
        assert (sample.labels.numpy() == expected).mean() > 0.95
        photo = arrays[f"sample/{i}/images"]  # resized linearly there, by area here: alike but not equal
        assert np.abs(normalise(sample.image).numpy() - photo).mean() < 0.1


# ------------------------------------------------------------------------------------------------ batches


def test_batch_round_trips(tiny_folder):
    data = LabelMapDataset(tiny_folder(keys=4), LABELS, edges="instances")
    batch = Batch.collate(data.spec, [data[i] for i in range(4)])
    for i, image in enumerate(batch.images):
        assert torch.equal(image, data[i].image) and torch.equal(batch.layout.labels[i], data[i].labels)
    assert len(batch) == 4 and batch.images.shape == (4, 3, 40, 56) and batch.images.dtype == torch.uint8
    parts = list(batch.split(2))
    assert [part.keys for part in parts] == [batch.keys[:2], batch.keys[2:]]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.layout.edges for part in parts]), batch.layout.edges)
    assert next(batch.split(1)) is batch  # with what its layout has cached
    with pytest.raises(AssertionError):
        list(batch.split(3))
    moved = batch.to("cpu", non_blocking=True)
    assert torch.equal(moved.layout.labels, batch.layout.labels) and moved.positions == (0, 1, 2, 3)
    assert len(batch.tensors()) == 3
    images = torch.arange(256, dtype=torch.uint8)
    assert normalise(images).min() == -1 and normalise(images).max() == 1
    assert torch.equal(denormalise(normalise(images)), images)
    assert denormalise(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_a_batch_holds_all_tensors_of_its_samples():
    spec = LayoutSpec(300, has_dont_care=True, has_edges=True, has_distances=True)
    random = rng(3)
    samples = [
        Sample(
            torch.from_numpy(random.integers(0, 256, (3, 5, 7), dtype=np.uint8)),
            torch.from_numpy(random.integers(0, 301, (5, 7), dtype=np.int16)),
            torch.from_numpy(random.integers(0, 2, (5, 7), dtype=np.uint8)),
            torch.from_numpy(random.random((2, 5, 7), dtype=np.float32)),
            str(i), (5, 7), i,
        )
        for i in range(3)
    ]  # fmt: skip
    batch = Batch.collate(spec, samples)
    expected = [torch.stack([s[i] for s in samples]) for i in range(4)]
    layout = batch.layout
    for got, wanted in zip((batch.images, layout.labels, layout.edges, layout.distances), expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("num_classes", [5, 300], ids=["uint8", "int16"])
@pytest.mark.parametrize("edges", ["none", "file", "labels"])
def test_workers_use_their_memory_again_but_never_under_a_batch_that_lives(tiny_folder, edges, num_classes):
    root = tiny_folder(keys=30)
    table = LabelSpec(num_classes=num_classes)
    data = LabelMapDataset(root, table, edges=edges, distances=True, augmentations=CROPPED)
    expected = list(sequential_batches(data, range(29), 2))
    if edges == "labels":
        assert torch.equal(expected[1].layout.edges[0], data[2].edges)
    for batches in (data, data.without_images()):
        kept = list(sequential_batches(batches, range(29), 2, num_workers=2))  # more than there are slots
        assert len(kept) == 15 > 2 * (PREFETCH + 1)
        assert kept[-1].keys == ("0028",)  # a smaller one
        for got, wanted in zip(kept, expected, strict=True):
            assert got.images is None or got.images.stride() == wanted.images.stride()
            assert equal(got, wanted if got.images is not None else replace(wanted, images=None))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("edges", ["none", "labels"])
def test_the_loader_finds_the_neighbourhoods_for_a_gpu(tiny_folder, edges, num_workers):
    crop = AugmentationConfig(random_crop_h_w=(64, 64), horizontal_flip=True)
    data = LabelMapDataset(tiny_folder(size=(70, 80), keys=9), LABELS, edges=edges, augmentations=crop, seed=1)
    loader = training_loader(data, 2, seed=0, num_workers=num_workers, look_ahead=((3,), 2))
    for batch in itertools.islice(loader, 8):  # more than there are slots
        assert len(batch.ahead) == 2
        for piece in batch.split(2):
            assert list(piece.layout.ahead) == [(3, 64, 64)]
            found, own = piece.layout.neighbourhoods(3), piece.layout[:].neighbourhoods(3)
            assert torch.equal(found.pixels.index.long(), own.pixels.index)
            assert torch.equal(found.labels.index.long(), own.labels.index)
            assert found.edges is None or torch.equal(found.edges, own.edges)


def test_too_little_shared_memory(tiny_folder, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    for augmentations in (CROPPED, AugmentationConfig()):  # for all batches beforehand, and for each in its worker
        data = LabelMapDataset(tiny_folder(keys=2), LABELS, augmentations=augmentations)
        with pytest.raises(DataError, match=r"--shm-size=8g.*data\.num_workers: 0 \(unable to allocate"):
            next(sequential_batches(data, range(2), 1, num_workers=1))


def test_different_sizes_do_not_make_a_batch(tiny_folder):
    roots = [tiny_folder("a", keys=1), tiny_folder("b", keys=["x"], size=(40, 48))]
    data = LabelMapDataset(roots, LABELS)
    with pytest.raises(DataError, match=r"(?s)\[40, 56\].*\[40, 48\].*random_crop_h_w.*batch_size: 1"):
        list(sequential_batches(data, [0, 1], 2))
    assert [b.layout.width for b in sequential_batches(data, [0, 1], 1)] == [56, 48]


# ------------------------------------------------------------------------------------------------ order


def take_order(count: int, *arguments, **options) -> list[tuple[int, int]]:
    """The first (index, position) of ``training_order``, whatever the batches."""
    return list(itertools.islice(itertools.chain.from_iterable(training_order(*arguments, **options)), count))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.none() | st.integers(1, 4), st.integers(1, 5),
    st.integers(1, 4), st.integers(0, 100),
)  # fmt: skip
def test_ranks_together_are_one_process_and_resume_goes_on(shards, mixed, batch_size, world_size, images_seen):
    def take(count: int, batch: int, **keys: int) -> list[tuple[int, int]]:
        return take_order(count, shards, batch, seed=7, shuffle_shards=mixed, **keys)

    iterations = 5
    whole = take(images_seen + iterations * batch_size * world_size, batch_size * world_size)
    assert [position for _, position in whole] == list(range(len(whole)))
    ranks = [
        take(iterations * batch_size, batch_size, images_seen=images_seen, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [
        item for t in range(iterations) for rank in ranks for item in rank[t * batch_size : (t + 1) * batch_size]
    ]
    assert together == whole[images_seen:]


def test_every_sample_once_per_epoch_in_changing_order():
    order = [index for index, _ in take_order(150, [50], 8, seed=0)]
    epochs = [order[:50], order[50:100], order[100:]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [i for i, _ in take_order(50, [50], 8, seed=1)] != epochs[0]


def test_shards_are_taken_in_turns_and_mixed(tiny_folder, tmp_path):
    sizes = [5, 9, 1, 7, 4]
    shard_of = np.repeat(np.arange(5), sizes)
    orders = []
    for epoch in range(6):
        order = [i for i, _ in take_order(26, sizes, 2, seed=3, images_seen=26 * epoch, shuffle_shards=2)]
        assert sorted(order) == list(range(26))
        for shard in range(5):  # all its samples come within a stretch of two shards' length
            places = np.flatnonzero(shard_of[order] == shard)
            assert places[-1] - places[0] < 9 + 7
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 6
    assert any(len([*itertools.groupby(shard_of[order].tolist())]) > 5 for order in orders)  # mixed, not one by one

    root = tiny_folder(keys=12)
    build_dataset(root, tmp_path / "lmdb", LABELS, num_shards=4, num_workers=0)
    data = LabelMapDataset([tmp_path / "lmdb", tiny_folder("other", keys=["x", "y"])], LABELS)
    assert data.shard_sizes == [3, 3, 3, 3, 2]
    batches = itertools.islice(training_loader(data, 1, seed=0, num_workers=0, shuffle_shards=1), 14)
    places = [data.keys.index(batch.keys[0]) for batch in batches]
    assert sorted(places) == list(range(14)) and places != sorted(places)
    shards = [shard for shard, _ in itertools.groupby(np.repeat(np.arange(5), data.shard_sizes)[places].tolist())]
    assert sorted(shards) == list(range(5))  # each in one piece
    with pytest.warns(UserWarning, match="shuffle_shards: 5 mixes all samples, since the training data has 5"):
        next(training_loader(data, 1, seed=0, num_workers=0, shuffle_shards=5))


def test_files_are_read_ahead_where_that_fits_memory(tiny_folder, tmp_path, monkeypatch):
    build_dataset(tiny_folder(keys=12), tmp_path / "lmdb", LABELS, num_shards=4, num_workers=0)
    in_all = sum(path.stat().st_size for t in ("images", "seg_maps") for path in tmp_path.glob(f"lmdb/*/{t}/data.mdb"))
    opened = []
    opening = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *a, **keys: opened.append(keys["readahead"]) or opening(*a, **keys))

    def read_ahead(memory: float, shuffle_shards: int | None) -> bool:
        monkeypatch.setattr(dataset_module, "usable_memory", lambda: memory)
        lmdb_module._environments.clear()
        opened.clear()
        data = LabelMapDataset(tmp_path / "lmdb", LABELS)
        next(training_loader(data, 12, seed=0, num_workers=0, shuffle_shards=shuffle_shards))
        assert len(opened) == 8 and len(set(opened)) == 1
        return opened[0]

    assert read_ahead(2.1 * in_all, None) and not read_ahead(1.9 * in_all, None)
    assert read_ahead(1.1 * in_all, 2) and not read_ahead(0.9 * in_all, 2)
    lmdb_module._environments.clear()
    opened.clear()
    monkeypatch.setattr(dataset_module, "usable_memory", lambda: 0)
    list(sequential_batches(LabelMapDataset(tmp_path / "lmdb", LABELS), range(12), 4))
    assert opened == [True] * 8  # in order: what comes next is always wanted


def equal(a: Batch, b: Batch) -> bool:
    drawn = (a.layout.edges is None) == (b.layout.edges is None)  # and from now on among the tensors
    return (
        drawn
        and (a.keys, a.positions) == (b.keys, b.positions)
        and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    )


def test_workers_change_nothing_and_resume_is_exact(tiny_folder, tmp_path):
    build_dataset(tiny_folder(keys=7), tmp_path / "out", LABELS, num_workers=0)
    data = LabelMapDataset(tmp_path / "out", LABELS, edges="file", augmentations=CROPPED, seed=4)
    data[0]  # the LMDB is open when the workers fork

    def take(count: int, **keys) -> list[Batch]:
        return list(itertools.islice(training_loader(data, 2, seed=4, **keys), count))

    straight = take(9, num_workers=0)
    assert all(map(equal, straight, take(9, num_workers=2)))
    assert all(map(equal, straight[4:], take(5, num_workers=0, images_seen=8)))
    ranks = [take(4, num_workers=0, rank=rank, world_size=2) for rank in range(2)]
    assert all(map(equal, straight[:8], itertools.chain.from_iterable(zip(*ranks, strict=True))))


@pytest.mark.timeout(60)
def test_workers_start_after_opencv_was_used_in_the_main_process(tiny_folder, tmp_path):
    # OpenCV's thread pool in a forked child is a hang for ever, so there must be no pool.
    root = tiny_folder(keys=40, size=(300, 400), types=("images", "seg_maps"))
    data = LabelMapDataset(root, LABELS, augmentations=AugmentationConfig(resize_h_w=(701, 903)))
    expected = next(training_loader(data, 2, seed=0, num_workers=0))
    assert cv2.getNumThreads() == 1
    assert equal(next(training_loader(data, 2, seed=0, num_workers=2)), expected)
    build_dataset(root, tmp_path / "out", LABELS, num_workers=2)


@pytest.mark.timeout(120)
def test_a_worker_ends_though_its_main_process_was_killed_before_it_started(tiny_folder, monkeypatch):
    data = LabelMapDataset(tiny_folder(keys=2), LABELS)
    start, (alive, held) = loader_module.start_worker, os.pipe()
    main = os.fork()
    if main == 0:
        main = os.getpid()

        def start_late(worker: int) -> None:
            os.kill(main, signal.SIGKILL)
            while os.getppid() == main:
                time.sleep(0.01)
            start(worker)

        monkeypatch.setattr(loader_module, "start_worker", start_late)
        next(sequential_batches(data, range(2), 1, num_workers=1))
        os._exit(0)
    os.close(held)
    assert os.waitstatus_to_exitcode(os.waitpid(main, 0)[1]) == -signal.SIGKILL
    assert select.select([alive], [], [], 60)[0], "the worker lives on, and holds what it inherited open"
    os.close(alive)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_is_told_without_a_traceback(tiny_folder, num_workers):
    root = tiny_folder(keys=3)
    write_png(root / "seg_maps/0001.png", np.full((40, 56), 9, np.uint8))
    data = LabelMapDataset(root, LABELS)
    with pytest.raises(LabelError) as caught:
        list(itertools.islice(training_loader(data, 3, seed=0, num_workers=num_workers), 2))
    assert "0001.png: label value(s) 9" in str(caught.value) and "Traceback" not in str(caught.value)


def test_sequential_batches_are_exactly_the_indices(tiny_folder):
    data = LabelMapDataset(tiny_folder(keys=7), LABELS)
    for num_workers in (0, 1):
        batches = list(sequential_batches(data, [6, 0, 3, 4, 1], 2, num_workers=num_workers))
        assert [b.keys for b in batches] == [("0006", "0000"), ("0003", "0004"), ("0001",)]
    assert list(sequential_batches(data, [], 2)) == []


def test_prefetcher_passes_through_and_counts_the_wait(tiny_folder):
    data = LabelMapDataset(tiny_folder(keys=3), LABELS)

    def slow():
        for batch in sequential_batches(data, range(3), 1):
            time.sleep(0.02)
            yield batch

    prefetcher = Prefetcher(slow(), "cpu")
    assert [b.keys for b in prefetcher] == [("0000",), ("0001",), ("0002",)]
    assert 0.06 <= prefetcher.wait_s < 5
    assert next(prefetcher, None) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_prefetcher_on_a_gpu(tiny_folder):
    data = LabelMapDataset(tiny_folder(keys=5), LABELS, edges="file")
    batches = Prefetcher(sequential_batches(data, range(5), 2, num_workers=1, pin_memory=True), "cuda")
    for got, expected in zip(batches, sequential_batches(data, range(5), 2), strict=True):
        assert got.images.is_cuda and equal(got.to("cpu"), expected)


def test_default_num_workers_is_shared_between_processes():
    assert 0 <= default_num_workers(2) <= default_num_workers(1) <= 8
    assert default_num_workers(10_000) == 0


def test_a_jpeg_decoded_small_stays_aligned(tmp_path):
    """A ramp of 427 x 611 pixels (no multiples of 8): its values tell where every pixel came from."""
    height, width = 427, 611
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 255 / height, columns * 255 / width, np.zeros((height, width))], 2).round().astype(np.uint8)
    write_jpg(tmp_path / "raw/images/a.jpg", ramp)
    write_png(tmp_path / "raw/seg_maps/a.png", np.zeros((height, width), np.uint8))
    for side, factor in ((300, 1), (200, 2), (100, 4), (50, 8)):
        for flip in (False, True):
            config = AugmentationConfig(resize_smallest_side=side, random_scale_limit=0.05, horizontal_flip=flip)
            g = draw_geometry(height, width, config, uniform_draws(3, 0, "augmentation"), "x")
            assert g.reduction == factor
            image = LabelMapDataset(tmp_path / "raw", LABELS, augmentations=config, seed=3)[0].image.numpy()
            expected = apply_to_image(ramp, g, any_area=True).transpose(2, 0, 1)
            inside = np.s_[:, 2:-2, 2:-2]
            assert np.abs(image[inside].astype(int) - expected[inside]).max() <= 3
    write_jpg(tmp_path / "raw/images/a.jpg", ramp[:-1])
    with pytest.raises(DataError, match=r"a\.jpg is 426 x 611"):
        LabelMapDataset(tmp_path / "raw", LABELS, augmentations=AugmentationConfig(resize_smallest_side=50))[0]


def test_ctrl_c_is_one_even_if_a_worker_ended_first(monkeypatch):
    """torch's handler of SIGCHLD may raise while the workers are told to end."""
    kind = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    shut_down = kind._shutdown_workers

    def one_ended_first(self) -> None:
        shut_down(self)
        monkeypatch.setattr(kind, "_shutdown_workers", shut_down)
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly with exit code 1")

    with pytest.raises(KeyboardInterrupt), loader_module.generate_in_workers(_twice, [1, 2], 1) as results:
        assert next(results) == 2
        monkeypatch.setattr(kind, "_shutdown_workers", one_ended_first)
        raise KeyboardInterrupt


def _twice(number: int) -> Iterator[int]:
    yield 2 * number
