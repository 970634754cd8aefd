"""Label maps and names as users bring them: read as they are meant, or refused with the line to write."""

import io
import json
import re
import struct
import sys
import tempfile
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_jpg, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from imaginaire_spade.build import build_split
from imaginaire_spade.commands import inspect_lmdb
from imaginaire_spade.config_files import load_config, load_labels
from imaginaire_spade.data.batch import Batch, Sample
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_image, decode_label, encode_map
from imaginaire_spade.data.loader import leave_out_bad
from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.labels import EdgeSource, LabelSpec
from imaginaire_spade.layout import LayoutSpec
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.lmdb_builder.shard import summary
from imaginaire_spade.training.health import doubt_labels

SIGNED = np.array([[0, 1, -1], [2, -1, 0]])
COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
RGB = LabelSpec(num_classes=3, palette=COLOURS, ignore=(255,), names=("red", "green", "blue"))


def changed(labels: LabelSpec, **keys) -> LabelSpec:
    return LabelSpec(**labels.model_dump() | keys)


def array_file(array, *, archive: bool = False, **others) -> bytes:
    file = io.BytesIO()
    np.savez(file, array, **others) if archive else np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray) -> bytes:
    return cv2.imencode(".tif", array)[1].tobytes()


def indexed(ids: np.ndarray, colours, kind: str = "PNG") -> bytes:
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    colours = [*colours, *[(7, 7, 7)] * (int(ids.max()) + 1 - len(colours))]  # (PIL writes few bits for few colours)
    image.putpalette([value for colour in colours for value in colour])
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def folder(root: Path, maps: dict[str, bytes], *, extension: str = "png") -> Path:
    """A raw data set of these label maps, by name, with noise photos of their sizes."""
    for number, (name, data) in enumerate(maps.items()):
        path = root / "seg_maps" / f"{name}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with Image.open(io.BytesIO(data)) if not data.startswith((b"\x93", b"PK")) else Image.new("L", (8, 6)) as image:
            size = (image.height, image.width, 3)
        write_jpg(root / "images" / f"{name}.jpg", np.random.default_rng(number).integers(0, 256, size, np.uint8))
    return root


def png(ids: np.ndarray) -> bytes:
    return cv2.imencode(".png", ids)[1].tobytes()


def train_ids(root: Path, labels: LabelSpec, **keys) -> list[list[list[int]]]:
    dataset = LabelMapDataset(str(root), labels, **keys)
    return [dataset[i].labels.tolist() for i in range(len(dataset))]


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "data",
    [
        tiff(SIGNED.astype(np.int8)), tiff(SIGNED.astype(np.int16)), tiff(SIGNED.astype(np.int32)),
        array_file(SIGNED), array_file(SIGNED.astype(np.int8)[..., None]), array_file(SIGNED[None], archive=True),
        encode_map(SIGNED.astype(np.int32)),
    ],
)  # fmt: skip
def test_signed_label_maps_are_read(data):
    decoded = decode_label(data, "x")
    assert decoded.tolist() == SIGNED.tolist()
    assert LabelSpec(num_classes=3, ignore=(-1,)).to_train_ids(decoded, "x").tolist() == [[0, 1, 3], [2, 3, 0]]
    with pytest.raises(DataError, match=r"x: .*-1 .*ignore: \[-1\]"):
        LabelSpec(num_classes=3, ignore=(255,)).to_train_ids(decoded, "x")


def bare_tiff(ids: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """A TIFF of one strip of grey samples of 2, 4 or 8 bits (GDAL: NBITS=4), whose 0 is white (0) or black (1)."""
    samples = np.unpackbits(ids.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(len(ids), -1)
    strip = np.packbits(samples, axis=1).tobytes()
    tags = {256: ids.shape[1], 257: len(ids), 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: len(ids),
            279: len(strip)}  # fmt: skip
    tags[273] = 10 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + strip


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tiffs_give_the_samples_that_they_hold(bits):
    ids = np.arange(7 * 11).reshape(7, 11) % (1 << bits)
    assert decode_label(bare_tiff(ids, bits), "x").tolist() == ids.tolist()  # PIL spreads 0..15 over 0..255
    with pytest.raises(DataError, match=r"x: a label map in a TIFF whose 0 is white.*save it"):
        decode_label(bare_tiff(ids, bits, 0), "x")


def test_colours_of_16_bits_are_refused_in_every_format():
    colours = np.full((4, 5, 3), 0x1234, np.uint16)
    for suffix in (".png", ".tif"):  # PIL reads the upper half of a TIFF's colours, and does not say so
        with pytest.raises(DataError, match="x: a label map of pixel format RGB, 16 bits per channel"):
            decode_label(cv2.imencode(suffix, colours)[1].tobytes(), "x")


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, ">u2", np.int64, np.uint32])
@pytest.mark.parametrize("archive", [False, True])
def test_arrays_are_read(dtype, archive):
    ids = np.asfortranarray(np.array([[0, 1], [1, 0], [1, 1]], dtype))
    assert decode_label(array_file(ids, archive=archive), "x").tolist() == ids.astype(int).tolist()


@pytest.mark.parametrize(
    "data, message",
    [
        (array_file(np.zeros((2, 2))), r"float64 \[2, 2\].*astype\(np.uint8\)"),
        (array_file(np.zeros((2, 2, 4), np.uint8)), r"uint8 \[2, 2, 4\]"),
        (array_file(np.zeros((0, 2), np.uint8)), r"\[0, 2\]"),
        (
            array_file(np.zeros((2, 2), np.uint8), archive=True, other=np.zeros(3)),
            "other, arr_0; one array|arr_0, other",
        ),
        (array_file(np.zeros((20, 20), np.uint8))[:-7], "not readable as a NumPy file"),
        (array_file(np.zeros((20, 20), np.uint8), archive=True)[:-30], "not readable as a NumPy file"),
        (array_file(np.array([[None]], object)), "not readable as a NumPy file"),
        (array_file(np.full((2, 2), 2**40)), "1099511627776"),
        (array_file(np.full((2, 2), -40_000)), "-40000"),
    ],
)
def test_arrays_that_are_no_label_map_are_refused(data, message):
    with pytest.raises(DataError, match=rf"a\.npy: .*({message})"):
        decode_label(data, "a.npy")


def test_gif_and_jfif(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 200)]
    for name, others in (("still", []), ("moving", frames[1:])):
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=others)
    assert decode_image((tmp_path / "still.gif").read_bytes(), "x").max() == 0
    for decode in (decode_image, decode_label):
        with pytest.raises(DataError, match="moving: an animated GIF"):
            decode((tmp_path / "moving.gif").read_bytes(), "moving")
    assert decode_label(indexed(np.eye(4), COLOURS, "GIF"), "x").tolist() == np.eye(4).tolist()
    photo = np.full((64, 80, 3), 90, np.uint8)
    for extension, shrunk in (("jfif", "jpg"), ("gif", "png")):
        root = folder(tmp_path / extension, {"a": png(np.zeros((64, 80), np.uint8))})
        (root / "images/a.jpg").unlink()
        Image.fromarray(photo).save(root / f"images/a.{extension}", "JPEG" if extension == "jfif" else "GIF")
        for side in (None, 32):
            out = tmp_path / f"{extension}{side}"
            built = build_dataset(root, out, RGB, num_workers=0, resize_smallest_side=side)
            assert built["data_types"]["images"]["extension"] == (shrunk if side else extension)
            assert abs(LabelMapDataset(str(out), RGB)[0].image.numpy().astype(int) - 90).max() <= 1


def test_animations_among_generated_images_are_no_images(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.webp")
    source = FolderSource(tmp_path, ["images"], bare=True)
    assert source.extension("a", "images") == "png" and source.keys == ["a", "still"]


def test_signed_maps_survive_a_build_that_encodes_them_again(tmp_path):
    signed = np.kron(SIGNED, np.ones((16, 16))).astype(np.int16)
    root, labels = (
        folder(tmp_path / "raw", {"a": tiff(signed)}, extension="tif"),
        LabelSpec(num_classes=3, ignore=(-1,)),
    )
    plain = build_dataset(root, tmp_path / "plain", labels, num_workers=0)
    assert plain["label_table"] == {"-1": "ignored", "0": 0, "1": 1, "2": 2}
    recoded = build_dataset(root, tmp_path / "recoded", labels, num_workers=0, recode_maps=True)
    assert recoded["class_pixels"] == plain["class_pixels"] == [512, 256, 256, 512]
    assert recoded["data_types"]["seg_maps"]["extension"] == "npy"
    assert train_ids(tmp_path / "recoded", labels) == train_ids(tmp_path / "plain", labels) == train_ids(root, labels)


# ------------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP"])
def test_a_colour_table_that_contradicts_the_palette_is_refused(tmp_path, kind):
    ids = np.array([[0, 1], [2, 0]])
    root = folder(
        tmp_path / "raw", {"a": indexed(ids, (COLOURS[1], COLOURS[0], COLOURS[2]), kind)}, extension=kind.lower()
    )
    message = (
        r"seg_maps.a\.\w+: .*palette disagree: id 0 has the colour \(0, 200, 0\) of green, but is red by the table"
    )
    with pytest.raises(DataError, match=message) as refused:
        build_dataset(root, tmp_path / "out", RGB, num_workers=0)
    with pytest.raises(DataError, match=message):
        train_ids(root, RGB)
    remap = json.loads(re.sub(r"(\d+):", r'"\1":', re.search(r"remap: (\{.*?\})", str(refused.value))[1]))
    meant = changed(RGB, remap={int(raw): train for raw, train in remap.items()})
    build_dataset(root, tmp_path / "out", meant, num_workers=0)
    assert train_ids(tmp_path / "out", meant) == [[[1, 0], [2, 1]]]


@pytest.mark.parametrize(
    "colours",
    [COLOURS, [(i, i, i) for i in range(200)], [(1, 2, 3), (4, 5, 6), (0, 0, 0)], [*COLOURS, COLOURS[0]]],
    ids=["the same", "a ramp of greys", "other colours", "a colour that does not occur"],
)
def test_colour_tables_that_say_nothing_else_are_accepted(tmp_path, colours):
    labels = changed(RGB, palette=(*COLOURS[:2], (5, 5, 5))) if len(colours) == 200 else RGB
    root = folder(tmp_path / "raw", {"a": indexed(np.array([[0, 1], [2, 0]]), colours)})
    assert train_ids(root, labels) == [[[0, 1], [2, 0]]]


def blended_scene() -> tuple[np.ndarray, np.ndarray]:
    """A label map and its colours, with blended borders: uint8 [48, 64], [48, 64, 3]."""
    ids = np.zeros((48, 64), np.uint8)
    ids[:, 20:40], ids[30:, 40:] = 1, 2
    sharp = np.array(COLOURS, np.uint8)[ids]
    return ids, cv2.resize(
        cv2.resize(sharp, (96, 72), interpolation=cv2.INTER_LINEAR), (64, 48), interpolation=cv2.INTER_AREA
    )


def test_blended_borders_are_read_by_the_nearest_colour(tmp_path):
    ids, blended = blended_scene()
    jpeg = cv2.imencode(".jpg", np.array(COLOURS, np.uint8)[ids][..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[
        1
    ].tobytes()
    root = folder(tmp_path / "raw", {"a": png(blended[..., ::-1]), "b": jpeg})
    with pytest.raises(
        DataError, match=r"(?s)a\.png: .*% of the pixels.*nearest_color: 442.*b\.png: .*JPEG.*nearest_color"
    ):
        build_dataset(root, tmp_path / "out", RGB, num_workers=0)
    near = changed(RGB, nearest_color=442.0)
    built = build_dataset(root, tmp_path / "out", near, num_workers=0)
    assert built["doubts"]["blended"] >= (~(blended[..., None, :] == COLOURS).all(-1).any(-1)).sum() > 0
    assert re.search(
        r"nearest_color: \d+ pixels \([\d.]+ %\) had a colour between", summary(built, near, tmp_path / "out")
    )
    for read in train_ids(tmp_path / "out", near):
        wrong = np.asarray(read) != ids
        assert wrong.mean() < 0.05 and not wrong[:, [*range(16), *range(24, 36), *range(46, 64)]][:26].any()
    strict = changed(RGB, nearest_color=20.0)
    with pytest.raises(DataError, match=r"a\.png, .*: 60 colour\(s\) that data\.labels\.palette does not have"):
        build_dataset(root, tmp_path / "strict", strict, num_workers=0)


def test_near_black_is_no_class_where_black_is():
    near = changed(RGB, nearest_color=60.0)
    rgb = np.array([[(10, 10, 10), (190, 10, 10), (0, 0, 0)]], np.uint8)
    assert near.to_train_ids(rgb, "x").tolist() == [[3, 0, 3]]
    with pytest.raises(ValidationError, match="nearest_color: needs the colours"):
        LabelSpec(num_classes=2, nearest_color=10.0)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_binary_masks_under_a_table_that_ignores_255_are_refused(tmp_path, num_classes):
    mask = np.kron([[0, 255], [0, 0]], np.ones((8, 8))).astype(np.uint8)
    root = folder(tmp_path / "raw", {"a": png(mask), "b": png(mask * 0), "c": png(255 - mask * 0)})
    ignoring = LabelSpec(num_classes=num_classes, ignore=(255,))
    for shards in (1, 2):
        with pytest.raises(DataError, match=r"raw: .*0 and 255 alone.*ignore: \[255\].*remap: \{255: 1\}"):
            build_dataset(root, tmp_path / f"out{shards}", ignoring, num_workers=0, num_shards=shards)
        assert not (tmp_path / f"out{shards}/manifest.json").exists()
    meant = LabelSpec(num_classes=num_classes, remap={255: 1})
    built = build_dataset(root, tmp_path / "out1", meant, num_workers=0)
    assert built["class_pixels"][:2] == [64 * 3 + 256, 64 + 256]
    alone = LabelSpec(num_classes=1, ignore=(255,))
    assert build_dataset(root, tmp_path / "alone", alone, num_workers=0)["class_pixels"] == [448, 320]
    with pytest.raises(DataError, match=r"no pixel of any label map has a class: data\.labels\.ignore: \[0, 255\]"):
        build_dataset(root, tmp_path / "none", LabelSpec(num_classes=2, ignore=(0, 255)), num_workers=0)


def test_binary_masks_of_16_bits_too(tmp_path):
    root = folder(tmp_path / "raw", {"a": png(np.eye(8, dtype=np.uint16) * 65535)})
    with pytest.raises(DataError, match=r"0 and 65535 alone.*remap: \{65535: 1\}"):
        build_dataset(root, tmp_path / "out", LabelSpec(num_classes=2, ignore=(65535,)), num_workers=0)


def test_training_on_a_folder_of_binary_masks_says_so():
    def batches(*maps):
        spec = LayoutSpec.of(labels, EdgeSource.NONE, False)
        samples = [Sample(None, torch.from_numpy(ids), None, None, "k", ids.shape, 0) for ids in maps]
        return [Batch.collate(spec, [sample]) for sample in samples]

    labels = LabelSpec(num_classes=3, ignore=(255,), names=("road", "sky", "car"))
    road, void, sky = (np.full((4, 4), i, np.uint8) for i in (0, 3, 1))
    assert re.search(
        r"warning: .* road and don't care alone, .*remap: \{255: 1\}", doubt_labels(labels, batches(road, void))
    )
    assert doubt_labels(labels, batches(road, void, sky)) is None
    assert doubt_labels(labels, batches(road)) is None and doubt_labels(labels, []) is None
    assert doubt_labels(changed(labels, num_classes=1, names=()), batches(road, road + 1)) is None


def test_blended_binary_masks_are_named_as_such(tmp_path):
    mask = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    with pytest.raises(DataError, match=r"a\.png: .*0 and 255 with blended borders\? Threshold it"):
        build_dataset(folder(tmp_path / "raw", {"a": png(mask)}), tmp_path / "out", RGB, num_workers=0)


def test_the_summary_doubts_what_may_be_a_mistake(tmp_path):
    one = {f"{i}": png(np.full((8, 8), i % 2, np.uint8)) for i in range(3)}
    mixed = np.zeros((200, 200), np.uint8)
    mixed[0, :3], mixed[100:] = 2, 1
    labels = LabelSpec(num_classes=4, names=("a", "b", "rare", "never"))

    def told(maps, shards=1):
        root = folder(tmp_path / f"raw{len(list(tmp_path.iterdir()))}", maps)
        return summary(
            build_dataset(root, root.with_suffix(".out"), labels, num_workers=0, num_shards=shards), labels, root
        )

    assert "note: 3 of 3 label maps are copies" in told(dict.fromkeys("abc", one["0"]), shards=3)
    text = told(one)
    assert "note: 3 of 3 label maps hold one class only" in text and "note: 2 of 3 label maps are copies of one" in text
    assert "rarer than" not in text and "never occur: rare, never" in text
    text = told({"a": png(mixed), "b": png(mixed[::-1].copy()), "c": png(mixed.T.copy())})
    assert "note:" not in text and "rarer than 0.01 % of the pixels: rare\n" in text + "\n"


# ------------------------------------------------------------------------------------------------ sides


EYES = LabelSpec(num_classes=4, names=("skin", "left eye", "right eye", "l_brow"), mirror={"left eye": "right eye"})


def test_a_flip_swaps_the_sides(tmp_path, tiny_config):
    ids = np.zeros((16, 16), np.uint8)
    ids[4:8, 2:5], ids[4:8, 11:14], ids[0], ids[15, 3] = 1, 2, 3, 255
    root = folder(tmp_path / "raw", {"a": png(ids)})
    table = {"names": list(EYES.names), "ignore": [255]}
    flipped = []
    for mirror in ({}, {"left eye": "right eye"}, {2: 1}, {"1": "2", "2": "1"}):
        path = tiny_config(num_classes=4, **table, mirror=mirror)
        config = load_config(path, [f"data.train.roots=[{root}]", "data.train.augmentations.horizontal_flip=true"])
        dataset = build_split(config, config.data.train)
        views = [dataset[(0, position)].labels.numpy() for position in range(12)]
        sides = [{i: bool((view[:, :8] == i).any()) for i in (1, 2)} for view in views]
        flipped.append([side[2] for side in sides])
        plain = np.where(ids == 255, 4, ids)
        swapped = np.where(plain == 1, 2, np.where(plain == 2, 1, plain))[:, ::-1] if mirror else plain[:, ::-1]
        assert all(np.array_equal(view, plain) or np.array_equal(view, swapped) for view in views)
    assert 0 < sum(flipped[0]) < 12 and not any(map(any, flipped[1:]))


@pytest.mark.parametrize(
    "mirror, message",
    [
        ({"left eye": "nose"}, "'nose' is no class"), ({"skin": "skin"}, "another class"),
        ({"skin": "4"}, "another class"), ({"skin": "left eye", "left eye": "right eye"}, "one counterpart"),
        ({"skin": "1", "l_brow": "1"}, "counterpart"),
    ],
)  # fmt: skip
def test_impossible_mirrors_are_refused(mirror, message):
    with pytest.raises(ValidationError, match=f"mirror: .*{message}"):
        LabelSpec(num_classes=4, names=EYES.names, mirror=mirror)


@pytest.mark.parametrize(
    "names, pairs",
    [
        (("left eye", "right eye", "nose"), {"left eye": "right eye"}),
        (("r_brow", "skin", "l_brow"), {"r_brow": "l_brow"}),
        (("arm_l", "arm_r"), {"arm_l": "arm_r"}),
        (("L. ear", "R. ear"), {"L. ear": "R. ear"}),
        (("Left-shoe", "Right-shoe", "Left-arm"), {"Left-shoe": "Right-shoe"}),
        (("leg right", "leg left"), {"leg right": "leg left"}),
        (("upright", "bright", "lake", "rake", "left lane", "road"), {}),
    ],
)
def test_names_that_have_a_side_are_found(names, pairs):
    assert LabelSpec(num_classes=len(names), names=names).sided_classes() == pairs
    assert LabelSpec(num_classes=len(names), names=names, mirror=pairs).sided_classes() == {}


# ------------------------------------------------------------------------------------------------ names


def rename(root: Path, data_type: str, name) -> None:
    for path in sorted((root / data_type).iterdir()):
        target = root / data_type / (name(path.stem) + path.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


@pytest.mark.parametrize(
    "named, suffixes",
    [
        ({"seg_maps": "{}_mask"}, {"seg_maps": "_mask"}),
        ({"seg_maps": "mask-{}"}, {"seg_maps": "mask-*"}),
        ({"images": "{}_leftImg8bit", "seg_maps": "{}_gtFine_labelIds"},
         {"images": "_leftImg8bit", "seg_maps": "_gtFine_labelIds"}),
        ({"images": "photo_{}.rgb", "seg_maps": "s/{}_x"}, {"images": "photo_*.rgb", "seg_maps": "_x"}),
    ],
)  # fmt: skip
def test_names_with_a_suffix_or_prefix_pair_up(tiny_folder, tmp_path, named, suffixes):
    root, labels = tiny_folder(types=("images", "seg_maps")), LabelSpec(num_classes=5)
    expected = train_ids(root, labels)
    for data_type, form in named.items():
        rename(root, data_type, form.format)
    write_png(root / "seg_maps/0000_gtFine_color.png", np.zeros((40, 56, 3), np.uint8))
    with pytest.raises(DataError, match=r"(?s)raw: files do not pair up.*data\.suffixes") as refused:
        FolderSource(root, ["images", "seg_maps"])
    if all(suffix.startswith("_") for suffix in suffixes.values()):
        assert all(f'{t}: "{suffix}"' in str(refused.value) for t, suffix in suffixes.items())
    assert train_ids(root, labels, suffixes=suffixes) == expected
    build_dataset(root, tmp_path / "out", labels, suffixes=suffixes, num_workers=0)
    assert train_ids(tmp_path / "out", labels) == expected
    keys = LabelMapDataset(str(tmp_path / "out"), labels).keys
    assert [key.rpartition("/")[2] for key in keys] == [f"{i:04d}" for i in range(6)]


@pytest.mark.parametrize(
    "suffixes", [{"maps": "_m"}, {"images": ""}, {"images": "*"}, {"images": "a*b*"}, {"images": "a/"}]
)
def test_impossible_suffixes_are_refused(tiny_config, suffixes):
    path = tiny_config()
    with pytest.raises(ConfigError, match=r"data\.suffixes: .*write one of images"):
        load_config(path, [f"data.suffixes={json.dumps(suffixes)}"])


def test_names_pair_up_whatever_their_normal_form(tiny_folder, tmp_path):
    names = ["Grün", "Straße/Ärger", "plain"]
    root, labels = tiny_folder(keys=names, types=("images", "seg_maps")), LabelSpec(num_classes=5)
    expected = train_ids(root, labels)
    moved = sorted((root / "seg_maps").rglob("*.png"))
    for path in moved:
        target = Path(unicodedata.normalize("NFD", str(path)))
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    source = FolderSource(root, ["images", "seg_maps"])
    assert set(source.keys) == {"Grün", "Straße/Ärger", "plain"}, "spelled as the photos are"
    assert train_ids(root, labels) == expected
    (tmp_path / "list.txt").write_text(unicodedata.normalize("NFD", "Grün"), "utf-8")
    assert (
        build_dataset(root, tmp_path / "out", labels, input_list=tmp_path / "list.txt", num_workers=0)["num_samples"]
        == 1
    )


@pytest.mark.parametrize("flat", ["images", "seg_maps"])
def test_flat_files_belong_to_those_in_sub_folders(tiny_folder, flat):
    root, labels = (
        tiny_folder(keys=["a/1", "b/2", "b/c/3", "4"], types=("images", "seg_maps")),
        LabelSpec(num_classes=5),
    )
    expected, keys = train_ids(root, labels), LabelMapDataset(str(root), labels).keys
    for path in sorted((root / flat).rglob("*.*")):
        path.rename(root / flat / path.name)
    assert LabelMapDataset(str(root), labels).keys == keys
    assert train_ids(root, labels) == expected


def test_flat_files_are_not_guessed(tiny_folder):
    root = tiny_folder(keys=["a/1", "b/1", "a/2"], types=("images", "seg_maps"))
    for number, path in enumerate(sorted((root / "seg_maps").rglob("*.png"))):
        path.rename(root / f"seg_maps/{(1, 2, 3)[number]}.png")
    with pytest.raises(DataError, match=r"seg_maps: 3 missing that other folders have: a/1, a/2, b/1"):
        FolderSource(root, ["images", "seg_maps"])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf0000\r\ns/1\r\n", "0000\r\ns/1\r\n".encode("utf-16"), b"0000.png\ns\\1.jpg\n",
        b"images/0000.jpg\nseg_maps\\s\\1.png\n", b"# chosen\n./0000\n\"s/1\"\n",
        b"{root}/images/0000.jpg\n{root}/images/s/1.jpg",
    ],
)  # fmt: skip
def test_lists_are_read_as_programs_write_them(tiny_folder, tmp_path, content):
    root, labels = tiny_folder(keys=["0000", "s/1", "s/2"]), LabelSpec(num_classes=5)
    (tmp_path / "list.txt").write_bytes(content.replace(b"{root}", str(root).encode()))
    built = build_dataset(root, tmp_path / "out", labels, input_list=tmp_path / "list.txt", num_workers=0)
    assert built["num_samples"] == 2 and LabelMapDataset(str(tmp_path / "out"), labels).keys == ["0000", "s/1"]


@pytest.mark.parametrize("ending", [".heic", ".dng", ""])
def test_files_with_an_unknown_ending_are_not_called_missing(tiny_folder, ending):
    root = tiny_folder(keys=3, types=("images", "seg_maps"))
    rename(root, "images", lambda stem: f"{stem}.x")  # (nothing of it is left)
    for number, path in enumerate(sorted((root / "images").iterdir())):
        path.rename(root / "images" / (f"{number:04d}" + (ending if number else ".jpg")))
    with pytest.raises(DataError) as refused:
        FolderSource(root, ["images", "seg_maps"])
    text = str(refused.value)
    assert "images: 2 file(s) with an ending that is not read (those are jpg jpeg jfif png" in text
    assert f"0001{ending}, 0002{ending}" in text and "missing that" not in text
    (root / "images").rename(root / "depth")
    with pytest.raises(DataError, match=rf"depth: 2 file\(s\) with an ending that is not read .*0001{ending}"):
        FolderSource(root, ["seg_maps", "depth"])
    (root / "depth").rename(root / "images")
    (root / "images/0000.jpg").unlink()
    with pytest.raises(DataError, match=rf"0001{ending}"):
        FolderSource(root, ["images", "seg_maps"])


# ------------------------------------------------------------------------------------------------ bad files


def damage(root: Path, every: int, count: int) -> set[str]:
    photos = sorted((root / "images").rglob("*.jpg"))[::every][:count]
    for path in photos:
        path.write_bytes(path.read_bytes()[:-20])
    return {path.stem for path in photos}


@pytest.mark.parametrize("shards, workers", [(1, 0), (4, 0), (4, 2)])
def test_bad_samples_are_left_out_and_listed(tiny_folder, tmp_path, shards, workers):
    root, labels = tiny_folder(keys=60, size=(8, 8)), LabelSpec(num_classes=5)
    bad = damage(root, 1, 15) | damage(root, 3, 20)  # all of the first shard
    expected = [key for key in FolderSource(root, ["images"]).keys if key not in bad]
    with pytest.raises(DataError, match=r"20 problem\(s\).*--skip_bad builds without them"):
        build_dataset(root, tmp_path / "out", labels, num_workers=workers, num_shards=shards)
    built = build_dataset(root, tmp_path / "out", labels, num_workers=workers, num_shards=shards, skip_bad=True)
    assert built["num_bad"] == len(built["bad"]) == len(bad) and built["num_samples"] == 60 - len(bad)
    assert LabelMapDataset(str(tmp_path / "out"), labels).keys == expected
    listed = (tmp_path / "out.bad_files.txt").read_text().splitlines()
    assert {line.partition("\t")[0] for line in listed} == bad and all("cut off" in line for line in listed)
    assert f"left out {len(bad)} sample(s)" in summary(built, labels, tmp_path / "out")
    again = build_dataset(root, tmp_path / "out", labels, num_workers=0, num_shards=shards, skip_bad=True)
    assert again == json.loads(json.dumps(built))
    with pytest.raises(DataError, match="built with --skip_bad"):
        build_dataset(root, tmp_path / "out", labels, num_workers=0, num_shards=shards)


def test_a_data_set_without_a_good_sample_is_refused(tiny_folder, tmp_path):
    root, labels = tiny_folder(keys=4, size=(8, 8)), LabelSpec(num_classes=5)
    damage(root, 1, 4)
    for shards in (1, 2):
        with pytest.raises(DataError, match=r"raw: no sample can be used: .*0000\.jpg: a JPEG that is cut off"):
            build_dataset(
                root, tmp_path / "out", labels, num_workers=0, num_shards=shards, skip_bad=True, overwrite=True
            )


def test_inspection_lists_all_that_is_bad(tiny_folder, monkeypatch, capsys):
    root = tiny_folder(keys=30, size=(8, 8), types=("images", "seg_maps"))
    bad = damage(root, 1, 25)
    monkeypatch.setattr(sys, "argv", ["inspect_lmdb.py", str(root), "--verify", "--num_workers", "0"])
    with pytest.raises(DataError, match=r"(?s)25 problem.*--skip_bad lists all of them in a file"):
        inspect_lmdb.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--skip_bad"])
    inspect_lmdb.main()
    assert "25 problem(s), listed in" in capsys.readouterr().out
    listed = (root.parent / "raw.bad_files.txt").read_text().splitlines()
    assert len(listed) == 25 and {Path(line.partition(": ")[0]).stem for line in listed} == bad


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_folders_goes_on_without_bad_samples(tiny_folder, tiny_config, workers):
    root = tiny_folder(keys=12, types=("images", "seg_maps"))
    bad = damage(root, 3, 3)
    write_png(root / "seg_maps/0001.png", np.full((40, 56), 77, np.uint8))
    sets = [f"data.train.roots=[{root}]", f"data.num_workers={workers}", "data.train.augmentations.resize_h_w=[16, 16]"]
    config = load_config(tiny_config(), [*sets, "data.skip_bad=true"])
    dataset = build_split(config, config.data.train)
    assert dataset.keys == [f"{i:04d}" for i in range(12) if f"{i:04d}" not in bad | {"0001"}]
    assert dataset.shard_sizes == [8] and len(dataset.bad) == 4 and "cut off" in dataset.bad[0]
    assert [dataset[i].key for i in range(8)] == dataset.keys
    assert build_split(config, config.data.train, with_images=False).keys == dataset.keys
    clean = build_split(load_config(tiny_config(), sets), config.data.train)
    assert len(clean) == 12 and clean.bad == []
    damage(root, 1, 12)
    with pytest.raises(DataError, match=r"skip_bad: no sample can be used: .*0000\.jpg"):
        leave_out_bad(clean, workers)


# ------------------------------------------------------------------------------------------------ tables, and anything


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_table_names_its_classes(path):
    if path.stem.startswith("_"):
        return
    labels = load_labels(path)
    assert len(labels.names) == labels.num_classes and len(set(labels.names)) == labels.num_classes


@st.composite
def situations(draw):
    num_classes = draw(st.integers(2, 4))
    return {
        "num_classes": num_classes,
        "seed": draw(st.integers(0, 99)),
        "form": draw(st.sampled_from(["ids", "indexed", "rgb", "blended", "binary"])),
        "file_colours": draw(st.sampled_from(["own", "permuted", "foreign", "ramp"])),
        "has_palette": draw(st.booleans()),
        "nodata": draw(st.sampled_from([None, 255, -1, -9999, 65535])),
        "knows_nodata": draw(st.booleans()),
        "nearest": draw(st.booleans()),
        "extension": draw(st.sampled_from(["png", "npy", "npz"])),
        "names": draw(st.sampled_from(["{}", "{}_mask", "m_{}", "NFD", "sub", "heic"])),
        "knows_names": draw(st.booleans()),
    }


@settings(max_examples=60)
@given(situations())
def test_a_sample_is_the_truth_or_the_build_is_refused(situation):
    """Whatever comes together: what is trained on is what the files mean, or the message names file and key."""
    s, rng = situation, np.random.default_rng(situation["seed"])
    n = s["num_classes"]
    palette = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)], np.uint8)[:n]
    truths, files = [], []
    for _ in range(3):
        ids = np.kron(rng.integers(0, n, (3, 4)), np.ones((2, 2), int))
        ids[0, :n], ids[5, :n] = range(n), range(n)
        truth = ids.copy()
        if s["form"] == "binary":
            ids, truth = (ids > 0) * 255, (ids > 0).astype(int)
        elif s["nodata"] is not None and s["form"] in ("ids", "indexed"):
            ids[2:4, :2], truth[2:4, :2] = s["nodata"], n
        if s["form"] in ("rgb", "blended"):
            picture = palette[ids]
            if s["form"] == "blended":
                picture[3, 3] = (0.7 * palette[0] + 0.3 * palette[1]).astype(np.uint8)
                truth[3, 3] = 0
            files.append(png(picture[..., ::-1]))
        elif s["form"] == "indexed" and ids.min() >= 0 and ids.max() < 256:
            order = {"own": range(n), "permuted": [*range(1, n), 0], "foreign": [], "ramp": []}[s["file_colours"]]
            colours = [tuple(palette[i]) for i in order] or [(i, i, i) for i in range(256)]
            files.append(indexed(ids, [(9, 8, 7)] * 3 if s["file_colours"] == "foreign" else colours))
            if s["file_colours"] == "permuted" and s["has_palette"]:
                truth = np.where(truth < n, (truth + 1) % n, n)  # as an image viewer shows it
        elif s["extension"] == "png" and ids.min() >= 0:
            files.append(png(ids.astype(np.uint16 if ids.max() > 255 else np.uint8)))
        elif s["extension"] == "png":
            files.append(tiff(ids.astype(np.int16)))
        else:
            files.append(array_file(ids, archive=s["extension"] == "npz"))
        truths.append(truth.tolist())
    keys = {"num_classes": n, "ignore": (255,)}
    if s["nodata"] is not None and s["knows_nodata"]:
        keys["ignore"] = (s["nodata"],)
    if s["has_palette"]:
        keys["palette"] = tuple(map(tuple, palette.tolist()))
        keys["nearest_color"] = 200.0 if s["nearest"] else None
    labels = LabelSpec(**keys)
    with tempfile.TemporaryDirectory() as scratch:
        root = folder(Path(scratch, "raw"), dict(zip(["bäa", "bäb", "bäc"], files, strict=True)))
        for path in (root / "images").iterdir():
            write_jpg(path, np.zeros((6, 8, 3), np.uint8))
        for path in (root / "seg_maps").iterdir():
            magic, ending = path.read_bytes()[:2], s["names"] if s["names"] == "heic" else None
            path.rename(
                path.with_suffix("." + (ending or {b"\x93N": "npy", b"PK": "npz", b"II": "tif"}.get(magic, "png")))
            )
        form = s["names"] if "{}" in s["names"] else "{}"
        rename(
            root,
            "seg_maps",
            lambda stem: unicodedata.normalize("NFD", stem) if s["names"] == "NFD" else form.format(stem),
        )
        if s["names"] == "sub":
            rename(root, "images", "photos/{}".format)
        suffixes = {"seg_maps": form.replace("{}", "*")} if form != "{}" and s["knows_names"] else {}
        try:
            build_dataset(root, Path(scratch, "out"), labels, num_workers=0, suffixes=suffixes)
        except DataError as error:
            named = r"bä[abc]|raw: (every|no pixel)"
            key = r"data\.(labels|suffixes)|ending that is not read|no samples"
            assert re.search(named, unicodedata.normalize("NFC", str(error))) and re.search(key, str(error)), str(error)
            return
        read = train_ids(Path(scratch, "out"), labels)
    assert read == truths
