# ruff: noqa: F811 (the fixture tiny_run is imported)
"""Data that is damaged, stale or no file at all: it is refused by name, or counts as what it is."""

from __future__ import annotations

import io
import json
import os
import random
import socket
import struct
import sys
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
from conftest import write_png
from PIL import Image
from test_faults import SMALL
from test_lmdb_source import LABELS, encoded, raw_png
from test_training import tiny_run  # noqa: F401

from imaginaire_spade.commands import inspect_lmdb
from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data import lmdb_source
from imaginaire_spade.data.folders import FolderSource
from imaginaire_spade.data.image_files import decode_image, decode_label, encode_map
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.data.photos import decode_photo, decode_stored
from imaginaire_spade.dataset_prep.prepare import DATASETS, TOOLS, Options, prepare
from imaginaire_spade.errors import DataError
from imaginaire_spade.evaluation.images import StoredImages
from imaginaire_spade.lmdb_builder.build import build_dataset, look_through

ROW, COLUMN = np.mgrid[:48, :64]
IDS = ((np.sin(COLUMN / 9.0) * 10 + ROW) // 6 % 11).astype(np.uint8)
PHOTO = np.stack([COLUMN * 4, ROW * 5, COLUMN + ROW], -1).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def animated(pixels: np.ndarray) -> bytes:
    """An APNG of two frames, ``pixels`` and their mirror image."""
    packed = [zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)) for rows in (pixels, pixels[::-1])]
    height, width = pixels.shape[:2]
    frames = [chunk(b"fcTL", struct.pack(">IIIIIHHBB", n, width, height, 0, 0, 1, 10, 0, 0)) for n in (0, 1)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0))
    still = chunk(b"acTL", struct.pack(">II", 2, 0)) + frames[0] + chunk(b"IDAT", packed[0])
    moving = frames[1] + chunk(b"fdAT", struct.pack(">I", 2) + packed[1])
    return b"\x89PNG\r\n\x1a\n" + header + still + moving + chunk(b"IEND", b"")


def indexed(bits: int = 8, transparency: int | None = None) -> bytes:
    image = Image.frombytes("P", (64, 48), IDS.tobytes())
    image.putpalette([i * 20 % 256 for i in range(33)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", bits=bits, **({} if transparency is None else {"transparency": transparency}))
    return buffer.getvalue()


FORMS = {
    "grey": encoded(IDS),
    "16 bits": encoded(IDS.astype(np.uint16) * 300),
    "1 bit": encoded(IDS > 5),
    "indexed": indexed(),
    "indexed, 4 bits": indexed(4),
    "indexed, transparent": indexed(transparency=3),
    "RGB": encoded(np.stack([IDS * 20, IDS, 255 - IDS], -1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_bit_changes_no_map_and_no_photo(form):
    data, draw = FORMS[form], random.Random(0)
    stored, photo = decode_label(data, "x"), decode_image(data, "x")
    for _ in range(150):
        changed = bytearray(data)
        changed[draw.randrange(33, len(data))] ^= 1 << draw.randrange(8)
        for decode, truth in ((decode_label, stored), (decode_image, photo)):
            try:
                found = decode(bytes(changed), "damaged.png")
            except DataError as error:
                assert str(error).startswith("damaged.png: not readable")
            else:
                assert np.array_equal(found, truth)


@pytest.mark.parametrize("bits, colour", [(1, 0), (4, 3), (8, 0), (8, 2), (8, 3), (16, 0)])
def test_rows_that_are_not_there_are_not_made_up(bits, colour):
    row = bytes(24 * bits // 8 * (3 if colour == 2 else 1))
    palette = chunk(b"PLTE", bytes(33)) if colour == 3 else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 96, bits, colour, 0, 0, 0)) + palette
    whole = raw_png([row] * 96, 24, bits, colour)
    short = raw_png([row] * 24, 24, bits, colour)
    assert decode_label(whole[:8] + header + whole[33:], "x").shape[:2] == (96, 24)
    for decode in (decode_label, decode_image):
        with pytest.raises(DataError, match=r"f\.png: not readable"):
            decode(short[:8] + header + short[33:], "f.png")


def test_an_animation_is_no_map_and_its_still_image_a_photo():
    data = animated(PHOTO)
    with pytest.raises(DataError, match=r"f\.png: an animated PNG"):
        decode_label(animated(IDS), "f.png")
    assert np.array_equal(decode_photo(data, "x", ImageSpec()), PHOTO)
    assert np.array_equal(decode_photo(animated(PHOTO[..., 0]), "x", ImageSpec())[..., 0], PHOTO[..., 0])
    for place in range(data.index(b"IDAT") + 4, data.index(b"fdAT") - 46, 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(DataError, match=r"f\.png: not readable"):
            decode_image(bytes(changed), "f.png")
    buffer = io.BytesIO()
    frames = [Image.fromarray(a) for a in (PHOTO, 255 - PHOTO)]
    frames[0].save(buffer, "WEBP", lossless=True, save_all=True, append_images=frames[1:])
    for decode in (decode_label, decode_image):
        with pytest.raises(DataError, match="w: an animated WEBP"):
            decode(buffer.getvalue(), "w")


def test_pages_are_refused_and_overviews_are_none():
    def tiff(*pages: tuple[np.ndarray, int]) -> bytes:
        buffer = io.BytesIO()
        first, *others = (Image.fromarray(array) for array, _ in pages)
        for image, (_, kind) in zip([first, *others], pages, strict=True):
            image.encoderinfo = {"tiffinfo": {254: kind}}
        first.save(buffer, "TIFF", save_all=True, append_images=others, tiffinfo={254: pages[0][1]})
        return buffer.getvalue()

    for pixels, decode in ((IDS, decode_label), (PHOTO, lambda data, where: decode_photo(data, where, ImageSpec()))):
        assert np.array_equal(decode(tiff((pixels, 0)), "x"), pixels)
        mask = (np.ones_like(IDS), 4)
        assert np.array_equal(decode(tiff((pixels, 0), (pixels[::2, ::2], 1), mask), "x"), pixels)
        for pages in (((pixels, 0), (pixels, 0)), ((pixels, 2), (pixels[::2], 1), (pixels, 2))):
            with pytest.raises(DataError, match=r"m\.tif: a TIFF of 2 pages"):
                decode(tiff(*pages), "m.tif")
    with pytest.raises(DataError, match=r"m\.tif: a TIFF of 2 pages"):
        decode_stored(tiff((IDS, 0), (IDS, 0)), "m.tif")


# ------------------------------------------------------------------------------------------------ stale shards


def rewrite(path: Path, data: bytes, newer_by_ns: int = 1) -> None:
    """Give a file of the same size other contents and a time stamp that differs by nanoseconds."""
    assert len(data) == path.stat().st_size
    stamp = path.stat().st_mtime_ns + newer_by_ns
    path.write_bytes(data)
    os.utime(path, ns=(stamp, stamp))


def other_ids(path: Path) -> bytes:
    """The PNG of a map with other ids and as many bytes."""
    ids, size = decode_label(path.read_bytes(), "x"), path.stat().st_size
    data = encode_map((ids + 1) % 5)
    padding = chunk(b"tEXt", b"x" * (size - len(data) - 12))
    return data[:33] + padding + data[33:]


def padded_folder(tiny_folder) -> Path:
    """A raw folder whose label maps have room for other contents."""
    root = tiny_folder(keys=6, types=("images", "seg_maps"))
    for path in (root / "seg_maps").iterdir():
        data = encode_map(decode_label(path.read_bytes(), "x"))
        path.write_bytes(data[:33] + chunk(b"tEXt", b"y" * 500) + data[33:])
    return root


def stored(out: Path, key: str) -> np.ndarray:
    return decode_label(open_source(out, ["seg_maps"]).read(key, "seg_maps"), "x")


@pytest.mark.parametrize("recode", [False, True])
def test_a_corrected_file_of_the_same_size_is_built_again(tiny_folder, tmp_path, capsys, recode):
    root, out = padded_folder(tiny_folder), tmp_path / "out"

    def build(**options):
        return build_dataset(root, out, LABELS, num_workers=0, num_shards=3, recode_maps=recode, **options)

    first, path = build(), root / "seg_maps/0002.png"
    rewrite(path, other_ids(path))
    assert build() != first
    printed = capsys.readouterr().out
    assert "shard_00001 was built before its source changed" in printed and "2 of 3 shard(s) are complete" in printed
    assert np.array_equal(stored(out, "0002"), decode_label(path.read_bytes(), "x"))
    once = out.with_name("once")
    build_dataset(root, once, LABELS, num_workers=0, num_shards=3, recode_maps=recode)
    for file in (p.relative_to(once) for p in once.rglob("*") if p.is_file()):
        assert (once / file).read_bytes() == (out / file).read_bytes(), file
    build()
    assert "3 of 3 shard(s) are complete" in capsys.readouterr().out


def test_a_single_shard_is_not_replaced_unasked(tiny_folder, tmp_path):
    root, out = padded_folder(tiny_folder), tmp_path / "out"
    build_dataset(root, out, LABELS, num_workers=0)
    path = root / "seg_maps/0002.png"
    rewrite(path, other_ids(path), 10**10)
    with pytest.raises(DataError, match=r"out was built before its source changed \(1 newer file\(s\), such as .*0002"):
        build_dataset(root, out, LABELS, num_workers=0)
    build_dataset(root, out, LABELS, num_workers=0, overwrite=True)
    assert np.array_equal(stored(out, "0002"), decode_label(path.read_bytes(), "x"))


def test_touched_files_are_read_once_and_keep_their_shards(tiny_folder, tmp_path, capsys, monkeypatch):
    root, out = padded_folder(tiny_folder), tmp_path / "out"
    built = build_dataset(root, out, LABELS, num_workers=0, num_shards=3)
    for path in root.rglob("*.*"):
        os.utime(path)
    inodes = {path: path.stat().st_ino for path in out.rglob("data.mdb")}
    touched = build_dataset(root, out, LABELS, num_workers=0, num_shards=3)
    assert {path: path.stat().st_ino for path in out.rglob("data.mdb")} == inodes
    assert {name for name in built if built[name] != touched[name]} == {"source_stamps_sha256"}
    monkeypatch.setattr(FolderSource, "read", None)  # nothing is in doubt any more
    assert build_dataset(root, out, LABELS, num_workers=0, num_shards=3) == touched
    assert capsys.readouterr().out.count("3 of 3 shard(s) are complete") == 2


def test_a_manifest_of_an_earlier_version_judges_by_its_own_age(tiny_folder, tmp_path, capsys):
    root, out = padded_folder(tiny_folder), tmp_path / "out"
    build_dataset(root, out, LABELS, num_workers=0, num_shards=3)
    for path in out.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k[:10] not in ("source_sta", "source_con")}))
    build_dataset(root, out, LABELS, num_workers=0, num_shards=3)
    assert "3 of 3 shard(s) are complete" in capsys.readouterr().out
    path = root / "seg_maps/0002.png"
    rewrite(path, other_ids(path), 10**11)
    build_dataset(root, out, LABELS, num_workers=0, num_shards=3)
    assert "shard_00001 was built before its source changed (1 newer file(s), such as" in capsys.readouterr().out
    assert np.array_equal(stored(out, "0002"), decode_label(path.read_bytes(), "x"))


# ------------------------------------------------------------------------------------------------ other LMDB files


def test_an_lmdb_of_another_size_is_not_mapped(tiny_folder, tmp_path):
    out = tmp_path / "out"
    build_dataset(tiny_folder(keys=4), out, LABELS, num_workers=0, num_shards=2)
    path = out / "shard_00001/images/data.mdb"
    data = path.read_bytes()
    for other in (data[:-4096], data + bytes(4096), b""):
        path.write_bytes(other)
        with pytest.raises(DataError, match=rf"{path}: cut off or replaced \({len(other)} bytes, not {len(data)}\)"):
            open_source(out, ["images"])
        assert open_source(out, ["seg_maps"]).keys
    path.write_bytes(data[:-1] + b"x")
    [problem] = map(str, look_through(out, LABELS, 0).problems)
    assert problem.startswith(f"{path}: its checksum differs")


def test_an_lmdb_in_the_working_directory_is_judged_too(tiny_folder, tmp_path, monkeypatch):
    build_dataset(tiny_folder(keys=2), tmp_path / "out", LABELS, num_workers=0)
    monkeypatch.chdir(tmp_path / "out")
    path = Path("images/data.mdb")
    assert open_source(Path(), ["images"]).keys
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(DataError, match=r"images/data\.mdb: cut off or replaced"):
        open_source(Path(), ["images"])


@pytest.mark.parametrize("error", [lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.BadValsizeError])
def test_what_lmdb_raises_is_a_data_error(tiny_folder, tmp_path, monkeypatch, error):
    build_dataset(tiny_folder(keys=1), tmp_path / "out", LABELS, num_workers=0)
    source = open_source(tmp_path / "out", ["images"])

    class Damaged:
        def begin(self):
            raise error("page 7")

    monkeypatch.setattr(lmdb_source, "_environment", lambda data_file, readahead: Damaged())
    with pytest.raises(DataError, match=r"images key \./0000: the LMDB is damaged \(page 7\): copy it again"):
        source.read("0000", "images")


@pytest.mark.parametrize(
    "name, value", [("class_pixels", "x"), ("num_samples", None), ("sizes_h_w", [1]), ("shards", 5), ("images", 3)]
)
def test_a_manifest_of_other_types_is_named(tiny_folder, tmp_path, monkeypatch, name, value):
    out = tmp_path / "out"
    build_dataset(tiny_folder(keys=1), out, LABELS, num_workers=0)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {name: value}
    manifest = {key: entry for key, entry in manifest.items() if entry is not None}
    (out / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["", str(out)])
    with pytest.raises(DataError, match=r"manifest\.json: "):
        inspect_lmdb.main()


@pytest.mark.parametrize("name", ["1" * 5000, "../../x", "", "a\0b", 5])
def test_names_of_files_in_a_manifest_are_plain_and_short(tiny_folder, tmp_path, name):
    out = tmp_path / "out"
    build_dataset(tiny_folder(keys=2), out, LABELS, num_workers=0, num_shards=2)
    manifest = json.loads((out / "manifest.json").read_text())
    for shards in ([manifest["shards"][0] | {"path": name}], [manifest["shards"][0] | {"files": {name: {}}}], []):
        (out / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
        with pytest.raises(DataError, match=r"manifest\.json: lists no files: build") as refused:
            look_through(out, LABELS, 0)
        assert len(str(refused.value)) < 500


def test_a_name_that_no_file_can_have_is_refused_in_short(tiny_folder, tmp_path):
    build_dataset(tiny_folder(keys=1), tmp_path / "out", LABELS, num_workers=0)
    (tmp_path / "out/all_filenames.json").write_text(json.dumps({".": ["1" * 5000]}))
    with pytest.raises(DataError, match="is no plain relative path") as refused:
        open_source(tmp_path / "out", ["images"])
    assert len(str(refused.value)) < 500


def test_names_that_are_no_utf8_are_refused(tiny_folder, tmp_path):
    build_dataset(tiny_folder(keys=1), tmp_path / "out", LABELS, num_workers=0)
    (tmp_path / "out/all_filenames.json").write_text(r'{".": ["\ud800"]}')
    with pytest.raises(DataError, match="is not UTF-8"):
        open_source(tmp_path / "out", ["images"])


# ------------------------------------------------------------------------------------------------ resuming


def test_resuming_warns_of_other_contents_under_the_same_names(tiny_run, tmp_path, capsys):
    _, run = tiny_run
    root = tmp_path / "raw"
    run("log", *SMALL, stop_after=1)
    (root / "images/0003.jpg").write_bytes((root / "images/0004.jpg").read_bytes())
    os.utime(root / "seg_maps/0001.png")
    content = run("log", *SMALL, stop_after=2)
    told = (
        f"warning: {root}: 2 of 10 samples (or LMDB files) have changed under their names since: 0001, 0003 (1 in size"
    )
    assert told in capsys.readouterr().out
    [stamps] = content["run"]["data_stamps"]  # so the next start is silent
    assert stamps.tolist() == FolderSource(root, ["images", "seg_maps"]).stamps()[1].tolist()


def test_lmdbs_are_told_apart_by_what_their_manifests_state(tiny_folder, tmp_path):
    root = tiny_folder(keys=4, types=("images", "seg_maps"))

    def stamps(name: str) -> list[list[int]]:
        build_dataset(root, tmp_path / name, LABELS, num_workers=0, num_shards=2)
        return open_source(tmp_path / name, ["images", "seg_maps"]).stamps()[1].tolist()

    first = stamps("a")
    assert stamps("b") == first and len(first) == 4  # a copy, later
    (root / "images/0003.jpg").write_bytes((root / "images/0002.jpg").read_bytes())
    assert [one == other for one, other in zip(stamps("c"), first, strict=True)] == [True, True, False, True]


# ------------------------------------------------------------------------------------------------ what is no file


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:  # (a name has to be short)
        here = Path.cwd()
        os.chdir(path.parent)
        server.bind(path.name)
        os.chdir(here)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make, kind", [(make_pipe, "named pipe"), (make_socket, "socket"), (make_device, "device")])
def test_what_never_ends_is_refused_by_name(tiny_folder, tmp_path, make, kind):
    root = tiny_folder(keys=2, types=("images", "seg_maps"))
    for folder, name in (("seg_maps", "0001.png"), ("images/more", "x")):
        path = root / folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)
        message = rf"{name}: a {kind}, no file: remove it"
        with pytest.raises(DataError, match=message):
            build_dataset(root, tmp_path / "out", LABELS, num_workers=0)
        with pytest.raises(DataError, match=message):
            open_source(path.parent, ["seg_maps"], bare=True)  # inference.py
        with pytest.raises(DataError, match=message):
            StoredImages(path.parent)
        path.unlink()
        (root / "seg_maps/0001.png").write_bytes((root / "seg_maps/0000.png").read_bytes())
    (root / "labels").mkdir()
    make(root / "labels/0000.png")
    for name in ("custom", "celebamask_hq", "labelme", "coco"):
        if name in TOOLS:
            make(root / f"{name}.json")
        folder = root if name == "custom" else root / "faces"
        for part in ("CelebA-HQ-img", "CelebAMask-HQ-mask-anno") * (name == "celebamask_hq"):
            (folder / part).mkdir(parents=True)
            make(folder / part / "1_skin.png")
        assert name in DATASETS or name in TOOLS
        with pytest.raises(DataError, match=rf": a {kind}, no file: remove it"):
            prepare(name, folder if name in DATASETS else root, tmp_path / "prepared", Options(), num_workers=0)


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    write_png(tmp_path / "seg_maps/a.png", IDS)
    for name in ("b.png", "c.webp"):
        (tmp_path / "seg_maps" / name).symlink_to(name)
    source = FolderSource(tmp_path, ["seg_maps"])
    for key, fails in (("a", False), ("b", True)):
        for read in (lambda key: source.read(key, "seg_maps"), lambda key: source.file_stamps([key], "seg_maps")):
            if fails:
                with pytest.raises(DataError, match=r"b\.png: cannot be read"):
                    read(key)
            else:
                assert len(read(key))
    assert FolderSource(tmp_path / "seg_maps", ["images"], bare=True).keys == ["a", "b", "c"]  # (c may be an animation)


@pytest.mark.parametrize("size", [(0, 0), (-1, 5), (1 << 31, 1)])
def test_photos_are_not_resized_to_nothing(tiny_folder, tmp_path, size):
    source = tiny_folder(keys=1, types=("images", "seg_maps"))
    (source / "seg_maps").rename(source / "labels")
    with pytest.raises(DataError, match="--resize_h_w: "):
        prepare("custom", source, tmp_path / "out", Options(size), num_workers=0)
    assert not (tmp_path / "out").exists()
