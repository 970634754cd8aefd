"""Files -> arrays, folders and LMDB shards: what is read and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor

import hypothesis.extra.numpy
import lmdb
import numpy as np
import pytest
from conftest import write_jpg, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import (
    decode_edges,
    decode_image,
    decode_instances,
    decode_label,
    encode_map,
    image_size,
)
from imaginaire_spade.data.lmdb_source import open_source, store_key, usable_memory
from imaginaire_spade.errors import DataError, LabelError
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.lmdb_builder.sample import check_photo
from imaginaire_spade.lmdb_builder.shard import EnvironmentWriter

LABELS = LabelSpec(num_classes=5)
TYPES = ("images", "seg_maps", "edge_maps", "inst_maps")


def encoded(array: np.ndarray, image_format: str = "PNG", mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, image_format, **options)
    return buffer.getvalue()


def raw_png(rows: list[bytes], width: int, bits: int, colour_type: int) -> bytes:
    """A PNG with any header (PIL and OpenCV write no 2- or 4-bit greys)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------ decoding

IDS = (np.arange(35).reshape(5, 7) % 4).astype(np.uint8)


def test_label_maps_keep_their_integers():
    palette = Image.fromarray(IDS).convert("P")
    palette.putpalette([255, 255, 255, 9, 9, 9, 1, 2, 3, 0, 0, 0])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    wide = IDS.astype(np.uint16) * 300
    rgb = np.stack([IDS, IDS + 1, IDS + 2], 2)
    for data, expected in (
        (encoded(IDS), IDS),
        (encoded(IDS, "BMP"), IDS),
        (encoded(IDS, "TIFF"), IDS),
        (buffer.getvalue(), IDS),
        (encoded(wide), wide),
        (encoded(wide, "TIFF"), wide),
        (encoded(IDS.astype(np.int32) * 300, "TIFF"), wide),
        (encoded(rgb), rgb),
        (encoded(IDS > 1), (IDS > 1).astype(np.uint8)),
        (raw_png([b"\x1b"], 4, 2, 0), np.array([[0, 1, 2, 3]])),
        (raw_png([b"\x0f"], 2, 4, 0), np.array([[0, 15]])),
    ):
        decoded = decode_label(data, "x")
        assert decoded.dtype in (np.uint8, np.uint16)
        assert np.array_equal(decoded, expected)
        assert image_size(data, "x") == expected.shape[:2]


@pytest.mark.parametrize(
    "data, message",
    [
        (encoded(IDS, "JPEG"), "JPEG, whose compression changes ids"),
        (encoded(IDS, "WEBP", "RGB", quality=80), "lossy WebP"),
        (encoded(IDS, "PNG", "RGBA"), "alpha"),
        (encoded(IDS, "PNG", "LA"), "alpha"),
        (raw_png([b"\0" * 6], 1, 16, 2), "16 bits per channel"),
        (encoded(IDS.astype(np.float32), "TIFF"), "a label map of floats"),
        (encoded(IDS.astype(np.int32) - 40_000, "TIFF"), "label values -40000..-39997"),
        (b"", "empty"),
        (b"not an image", "not readable"),
        (encoded(IDS)[:60], "not readable"),
        (
            encoded(IDS)[:16] + struct.pack(">II", 60_000, 60_000) + encoded(IDS)[24:],
            "60000 x 60000 pixels by its header",
        ),
    ],
    ids=range(11),
)
def test_unfit_label_maps_are_refused(data, message):
    with pytest.raises(DataError, match=rf"(?s)f\.png.*{message}"):
        decode_label(data, "f.png")


def test_photos_become_rgb_as_stored():
    rgb = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    grey = rgb[..., 0]
    assert np.array_equal(decode_image(encoded(rgb), "x"), rgb)
    assert np.array_equal(decode_image(encoded(grey), "x"), np.stack([grey] * 3, 2))
    assert np.array_equal(decode_image(encoded(rgb, "PNG", "RGBA"), "x"), rgb)
    assert decode_image(encoded(grey.astype(np.uint16) * 256), "x").dtype == np.uint8
    orientation = Image.Exif()
    orientation[0x0112] = 6  # "turn by 90 degrees"
    assert decode_image(encoded(rgb, "JPEG", exif=orientation), "x").shape == rgb.shape
    jpeg = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    for broken in (b"", b"\xff\xd8\xff", jpeg[: len(jpeg) // 2], jpeg[:-40], encoded(rgb)[:80]):
        with pytest.raises(DataError, match="photo"):
            decode_image(broken, "photo")


@given(st.data(), st.booleans(), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_photo_is_checked_as_if_it_were_decoded(data, progressive, height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    photo = bytearray(encoded(pixels, "JPEG", progressive=progressive))
    assert check_photo(bytes(photo), "a", ImageSpec(), None, False)[1] == (height, width)
    start = data.draw(st.integers(0, len(photo) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "hole", "cut, but with an end"]))
    if kind == "cut":
        del photo[start:]
    elif kind == "flip":
        photo[start] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "hole":
        photo[start : start + 30] = bytes(30)
    else:
        photo[start:] = b"\xff\xd9"
    try:
        expected = decode_image(bytes(photo), "a").shape[:2]
    except DataError as error:
        with pytest.raises(DataError, match=f"^{re.escape(str(error))}$"):
            check_photo(bytes(photo), "a", ImageSpec(), None, False)
    else:
        assert check_photo(bytes(photo), "a", ImageSpec(), None, False)[1] == expected


def test_edges_and_instances():
    assert decode_edges(encoded(np.array([[0, 1, 254, 255]], np.uint8)), "x").tolist() == [[0, 1, 1, 1]]
    assert decode_edges(encoded(np.array([[[0, 0, 0], [0, 9, 0]]], np.uint8)), "x").tolist() == [[0, 1]]
    wide = np.array([[0, 255, 256, 26007, 65535]], np.uint16)
    assert decode_instances(encoded(wide), "x").tolist() == wide.tolist()
    assert decode_instances(encoded(np.array([[[1, 2, 3]]], np.uint8)), "x").tolist() == [[1 + 2 * 256 + 3 * 65536]]
    assert decode_instances(encoded(wide), "x").dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_maps_come_back_as_they_were_encoded(data, height, width):
    def numbers(largest: int, dtype: type, *channels: int) -> np.ndarray:
        values = st.integers(0, largest)
        return data.draw(hypothesis.extra.numpy.arrays(dtype, (height, width, *channels), elements=values))

    for ids in (numbers(255, np.uint8), numbers(65535, np.uint16), numbers(255, np.uint8, 3)):
        back = decode_label(encode_map(ids), "x")
        assert back.dtype == ids.dtype and np.array_equal(back, ids)
    for largest in (65535, 2**24 - 1):
        ids = numbers(largest, np.int32)
        assert np.array_equal(decode_instances(encode_map(ids), "x"), ids)
    edges = numbers(1, np.uint8)
    assert np.array_equal(decode_edges(encode_map(edges * np.uint8(255)), "x"), edges)


def test_pixels_are_counted_as_they_are_mapped(tiny_folder):
    spec = LabelSpec(num_classes=4, ignore=(255,), remap={7: 2}, palette=((0, 0, 0), (9, 9, 9), (1, 2, 3), (4, 5, 6)))
    rng = np.random.default_rng(0)
    for raw in (
        rng.choice(np.array([0, 1, 2, 3, 7, 255], np.uint8), (9, 13)),
        rng.choice(np.array([0, 7, 255], np.uint16), (1, 1)),
        np.array(spec.palette, np.uint8)[rng.integers(0, 4, (5, 6))],
    ):
        ids, counts = np.unique(spec.to_train_ids(raw, "x"), return_counts=True)
        assert spec.count_pixels(raw, "x") == dict(zip(ids.tolist(), counts.tolist(), strict=True))
    wrong = np.array([[0, 9, 200]], np.uint8)
    messages = []
    for method in (spec.to_train_ids, spec.count_pixels):
        with pytest.raises(LabelError) as caught:
            method(wrong, "x")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_label_error_is_a_data_error():
    with pytest.raises(DataError):
        raise LabelError("x")


# ------------------------------------------------------------------------------------------------ folders


def test_folder_joins_any_extensions_case_and_sequences(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    for name in ("a.JPG", "seq/b.jpeg", "seq/deep/c.c.bmp", "Größe 图.webp"):
        write_jpg(tmp_path / "images" / name, picture)
    for name in ("a.png", "seq/b.PNG", "seq/deep/c.c.tiff", "Größe 图.png", ".hidden.png"):
        write_png(tmp_path / "seg_maps" / name, picture[..., 0])
    (tmp_path / "images" / "notes.txt").write_text("x")
    source = FolderSource(tmp_path, ["images", "seg_maps"])
    assert source.keys == ["Größe 图", "a", "seq/b", "seq/deep/c.c"]
    assert source.read("seq/b", "seg_maps") == (tmp_path / "seg_maps/seq/b.PNG").read_bytes()
    assert [path.name for path in source.skipped] == ["notes.txt"]
    assert store_key("a") == b"./a" and store_key("seq/b") == b"seq/b"


def test_names_that_differ_by_normal_form_are_two(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    for number, name in enumerate((composed, decomposed)):
        write_png(tmp_path / "raw/images" / f"{name}.png", np.full((2, 2, 3), number, np.uint8))
        write_png(tmp_path / "raw/seg_maps" / f"{name}.png", np.full((2, 2), number, np.uint8))
    build_dataset(tmp_path / "raw", tmp_path / "out", LABELS, num_workers=0)
    for root in ("raw", "out"):
        source = open_source(tmp_path / root, ["images", "seg_maps"])
        assert sorted(source.keys) == sorted([composed, decomposed])
        assert decode_label(source.read(composed, "seg_maps"), "x").max() == 0
        assert decode_label(source.read(decomposed, "seg_maps"), "x").max() == 1


def test_unpaired_files_are_listed_or_dropped(tiny_folder):
    root = tiny_folder(keys=14)
    for number in range(12):
        (root / "seg_maps" / f"{number:04d}.png").unlink()
    shutil.copy(root / "seg_maps/0012.png", root / "seg_maps/extra.png")
    with pytest.raises(DataError) as caught:
        FolderSource(root, ["images", "seg_maps"])
    message = str(caught.value)
    assert "images: 1 missing that other folders have: extra" in message
    assert "seg_maps: 12 missing" in message and "0009 ..." in message and "0010" not in message
    assert "--drop_unpaired" in message
    source = FolderSource(root, ["images", "seg_maps"], drop_unpaired=True)
    assert source.keys == ["0012", "0013"] and len(source.unpaired["seg_maps"]) == 12


def test_one_name_with_two_extensions(tiny_folder):
    root = tiny_folder()
    write_png(root / "images" / "0003.png", np.zeros((40, 56, 3), np.uint8))
    with pytest.raises(DataError, match=r"0003\.(jpg|png) and 0003\.(jpg|png)"):
        FolderSource(root, ["images", "seg_maps"])


def test_what_no_data_set_is(tmp_path, tiny_folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data set there\. Looked for"):
        open_source(tmp_path / "empty", ["images", "seg_maps"])
    (tmp_path / "empty" / "a.AVIF").write_bytes(b"")
    with pytest.raises(DataError, match=r"Images end in jpg .*, the files there in \.avif: convert them"):
        open_source(tmp_path / "empty", ["images"], bare=True)
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "a.gif").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"no samples .*extensions jpg jpeg jfif png bmp webp tif tiff npy.*not read: a\.gif"
    ):
        open_source(tmp_path / "film", ["images"], bare=True)
    with pytest.raises(DataError, match="no such folder"):
        open_source(tmp_path / "absent", ["seg_maps"])
    with pytest.raises(DataError, match="no folder images/"):
        open_source(tiny_folder(types=("seg_maps",)), ["images", "seg_maps"])
    with pytest.raises(DataError, match=r"data\.edges: labels"):
        open_source(tiny_folder("b", types=("images", "seg_maps")), ["images", "seg_maps", "inst_maps"])
    (tmp_path / "c/images").mkdir(parents=True)
    (tmp_path / "c/seg_maps").mkdir()
    with pytest.raises(DataError, match="no samples"):
        open_source(tmp_path / "c", ["images", "seg_maps"])


# ------------------------------------------------------------------------------------------------ LMDB


def test_imaginaire_lmdb_is_read_bit_for_bit(shared_dir):
    fixture = shared_dir / "parity" / "imaginaire_lmdb"
    facts = json.loads((fixture / "config.json").read_text())
    source = open_source(fixture / "lmdb", ["images", "seg_maps", "edge_maps"])
    assert [store_key(key).decode() for key in source.keys] == facts["sample"]["order"]
    arrays = load_file(fixture / "outputs.safetensors")
    for name, value in facts["values"].items():
        data_type, key = name.split(":./")
        data = source.read(key, data_type)
        assert hashlib.sha256(data).hexdigest() == value["sha256"]
        expected = arrays[f"decoded/{data_type}/./{key}"]
        if data_type == "images":
            assert np.abs(decode_image(data, name).astype(int) - expected).max() <= 2
        elif data_type == "seg_maps":
            assert np.array_equal(decode_label(data, name), expected)
        else:
            assert np.array_equal(decode_edges(data, name), expected > 0)


def test_map_grows_when_it_is_full_and_has_the_umasks_mode(tmp_path):
    values = {f"{i:03d}".encode(): os.urandom(300_000) for i in range(12)}
    umask = os.umask(0o002)
    try:
        writer = EnvironmentWriter(tmp_path)
    finally:
        os.umask(umask)
    for key, value in values.items():
        writer.put(key, value)
    writer.finish(len(values))
    writer.close()
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as env, env.begin() as transaction:
        assert dict(transaction.cursor()) == values
    assert (tmp_path / "data.mdb").stat().st_mode & 0o777 == 0o664  # the group of a shared folder may write it


def test_several_shards_read_as_one(tiny_folder, tmp_path):
    root = tiny_folder(keys=["b", "a", "s/x", "s/y", "t/z"])
    build_dataset(root, tmp_path / "out", LABELS, num_shards=2, num_workers=0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "shard_00000", "shard_00001"]
    folder, shards = open_source(root, TYPES), open_source(tmp_path / "out", TYPES)
    assert shards.keys == folder.keys
    for key in folder.keys:
        for data_type in TYPES:
            assert shards.read(key, data_type) == folder.read(key, data_type)
    assert open_source(tmp_path / "out/shard_00000", TYPES).keys == folder.keys[:2]
    assert max(decode_instances(shards.read("a", "inst_maps"), "x").ravel()) > 255


def test_strange_lmdbs_are_refused(tiny_folder, tmp_path):
    out = tmp_path / "out"
    build_dataset(tiny_folder(keys=3), out, LABELS, num_workers=0)
    assert open_source(out, ["seg_maps"]).has("edge_maps")

    def index(content: object) -> None:
        (out / "all_filenames.json").write_text(json.dumps(content))

    for content, message in (
        ({"images": {".": ["0000"]}, "seg_maps": {".": ["0000"]}}, "unpaired"),
        ({"../..": ["etc"]}, "no plain relative path"),
        ({"": ["x"]}, "no plain relative path"),
        ({".": ["a/../../x"]}, "no plain relative path"),
        (["0000"], "expected an object"),
        ({".": [1]}, "expected an object"),
        ({}, "no samples"),
        ({".": ["0000", "0000"]}, "twice"),
    ):
        index(content)
        with pytest.raises(DataError, match=message):
            open_source(out, ["seg_maps"])
    index({".": ["0000", "absent"]})
    with pytest.raises(DataError, match="lacks this key"):
        open_source(out, ["seg_maps"]).read("absent", "seg_maps")
    (out / "all_filenames.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        open_source(out, ["seg_maps"])
    (out / "all_filenames.json").unlink()
    with pytest.raises(DataError, match=r"but no all_filenames\.json"):
        open_source(out, ["seg_maps"])
    index({".": ["0000"]})
    data = (out / "images/data.mdb").read_bytes()
    for broken in (data[: len(data) // 2], b"x" * 10000, b""):
        (out / "images/data.mdb").unlink()
        (out / "images/data.mdb").write_bytes(broken)
        with pytest.raises(DataError, match=r"data\.mdb"):
            open_source(out, ["images"]).read("0000", "images")
    (out / "images/data.mdb").unlink()
    with pytest.raises(DataError, match="no LMDB images/"):
        open_source(out, ["images"])
    (out / "m").mkdir()
    (out / "m/manifest.json").write_text(json.dumps({"shards": [{"path": "../.."}]}))
    with pytest.raises(DataError, match="leads out"):
        open_source(out / "m", ["images"])


def read_all(source) -> str:
    return hashlib.sha256(b"".join(source.read(key, t) for key in source.keys for t in TYPES)).hexdigest()


def test_reading_in_other_processes(tiny_folder, tmp_path):
    build_dataset(tiny_folder(keys=4), tmp_path / "out", LABELS, num_workers=0)
    source = open_source(tmp_path / "out", TYPES)
    expected = read_all(source)  # the handle is open here when the others start
    assert read_all(pickle.loads(pickle.dumps(source))) == expected  # noqa: S301 (our own bytes)
    with contextlib.ExitStack() as stack:
        methods = ("fork", "spawn", "forkserver")
        pools = [stack.enter_context(multiprocessing.get_context(method).Pool(1)) for method in methods]
        results = [pool.apply_async(read_all, (source,)) for pool in pools]
        assert [result.get() for result in results] == [expected] * 3
    assert read_all(source) == expected


def test_usable_memory_is_what_a_container_leaves(tmp_path):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    of, cgroups = tmp_path / "cgroup", tmp_path / "fs"

    def usable(groups: str, files: dict[str, int | str]) -> int:
        shutil.rmtree(cgroups, ignore_errors=True)
        of.write_text(groups)
        for name, content in files.items():
            (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / name).write_text(f"{content}\n")
        return usable_memory(cgroups, of)

    assert usable_memory(cgroups, tmp_path / "none") == machine  # not Linux
    assert usable("0::/\n", {}) == machine
    assert usable("0::/job\n", {"job/memory.max": "max"}) == machine
    assert usable("0::/job\n", {"job/memory.max": 1_000_000}) == 1_000_000
    assert usable("0::/elsewhere\n", {"memory.max": 2_000_000}) == 2_000_000  # a container's own view
    name = "memory.limit_in_bytes"
    old = {f"memory/job/{name}": 3_000_000, f"memory/{name}": 2**63 - 4096}
    assert usable("5:cpu:/job\n4:memory:/job\n0::/\n", old) == 3_000_000
    assert usable_memory() <= machine


def test_reading_in_several_threads_at_once(tiny_folder, tmp_path, monkeypatch):
    build_dataset(tiny_folder(keys=2), tmp_path / "out", LABELS, num_workers=0)
    source = open_source(tmp_path / "out", TYPES)
    opening = lmdb.open

    def slowly(*arguments, **options):
        environment = opening(*arguments, **options)
        time.sleep(0.05)  # time for another thread to ask for the same file
        return environment

    monkeypatch.setattr(lmdb, "open", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: read_all(source), range(4)))) == 1
