"""The kinds of data that the fuzzer changes: image files, LMDB roots, folders, and requests to the painting page."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imaginaire_spade import Synthesizer
from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.conditions import decode_condition
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.image_files import DECODERS
from imaginaire_spade.data.photos import decode_photo, decode_stored
from imaginaire_spade.dataset_prep.prepare import Options, prepare
from imaginaire_spade.demo.server import PaintingServer
from imaginaire_spade.demo.service import PaintingService
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset, look_through
from imaginaire_spade.training.checkpoint import write_checkpoint

from .fuzzer import Use, change
from .kinds import tiny_content

ROW, COLUMN = np.mgrid[:24, :32]
IDS = ((np.sin(COLUMN / 5.0) * 10 + ROW) // 6 % 5).astype(np.uint8)
PHOTO = np.stack([COLUMN * 4, ROW * 9, COLUMN + ROW], -1).astype(np.uint8)
COLOURS = np.stack([IDS * 20, IDS * 7, 255 - IDS], -1).astype(np.uint8)
LABELS = LabelSpec(num_classes=5)
TYPES = ("images", "seg_maps", "edge_maps", "inst_maps")


# ------------------------------------------------------------------------------------------------ image files


def _saved(image: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, form, **options)
    return stream.getvalue()


def _array(array: np.ndarray, save: Any = np.save) -> bytes:
    stream = io.BytesIO()
    save(stream, array)
    return stream.getvalue()


def _indexed(indices: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([i * 20 % 256 for i in range(99)])
    return image


GREY16 = IDS.astype(np.uint16) * 300
TIFFS = {"raw": {}, "lzw": {"compression": "tiff_lzw"}, "zip": {"compression": "tiff_adobe_deflate"},
         "pack": {"compression": "packbits"}}  # fmt: skip
CHECKED_MAPS = {
    "grey.png": _saved(IDS, "PNG"), "grey16.png": _saved(GREY16, "PNG"), "bit.png": _saved(IDS > 2, "PNG"),
    "pal.png": _saved(_indexed(IDS), "PNG"), "pal4.png": _saved(_indexed(IDS), "PNG", bits=4),
    "pal2.png": _saved(_indexed(IDS % 4), "PNG", bits=2), "clear.png": _saved(_indexed(IDS), "PNG", transparency=3),
    "rgb.png": _saved(COLOURS, "PNG"), "z.npz": _array(IDS, np.savez_compressed), "s.npz": _array(GREY16, np.savez),
}  # fmt: skip
"""Map files that have checksums of their own."""
OTHER_MAPS = {
    "grey.bmp": _saved(IDS, "BMP"), "rgb.bmp": _saved(COLOURS, "BMP"), "pal.bmp": _saved(_indexed(IDS), "BMP"),
    "bit.bmp": _saved(IDS > 2, "BMP"), "pal.gif": _saved(_indexed(IDS), "GIF"), "bit.tif": _saved(IDS > 2, "TIFF"),
    "rgb.webp": _saved(COLOURS, "WEBP", lossless=True), "8.npy": _array(IDS), "16.npy": _array(GREY16),
    "i.npy": _array(IDS.astype(np.int64) - 1), "b.npy": _array(IDS > 2), "rgb.npy": _array(COLOURS),
    **{f"{name}.tif": _saved(IDS, "TIFF", **how) for name, how in TIFFS.items()},
    **{f"{name}16.tif": _saved(GREY16, "TIFF", **how) for name, how in TIFFS.items()},
    **{f"{name}rgb.tif": _saved(COLOURS, "TIFF", **how) for name, how in TIFFS.items()},
    **{f"{name}pal.tif": _saved(_indexed(IDS), "TIFF", **how) for name, how in TIFFS.items()},
}  # fmt: skip
FEW = _indexed(PHOTO[..., 1] // 9)
ALPHA = np.dstack([PHOTO, 255 - PHOTO[..., :1]])
CHECKED_PHOTOS = {
    "rgb.png": _saved(PHOTO, "PNG"), "grey.png": _saved(PHOTO[..., 0], "PNG"), "pal.png": _saved(FEW, "PNG"),
    "grey16.png": _saved(GREY16, "PNG"), "alpha.png": _saved(ALPHA, "PNG"), "rgb.npz": _array(PHOTO, np.savez),
    "la.png": _saved(Image.fromarray(ALPHA).convert("LA"), "PNG"), "f.npz": _array(PHOTO / 9, np.savez_compressed),
    "clear.png": _saved(FEW, "PNG", transparency=3),
}  # fmt: skip
TURNED = Image.Exif()
TURNED[274] = 6
OTHER_PHOTOS = {
    "rgb.jpg": _saved(PHOTO, "JPEG"), "prog.jpg": _saved(PHOTO, "JPEG", progressive=True),
    "grey.jpg": _saved(PHOTO[..., 0], "JPEG"), "turned.jpg": _saved(PHOTO, "JPEG", exif=TURNED),
    "cmyk.jpg": _saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"), "rgb.bmp": _saved(PHOTO, "BMP"),
    "rgb.webp": _saved(PHOTO, "WEBP"), "exact.webp": _saved(PHOTO, "WEBP", lossless=True),
    "alpha.webp": _saved(ALPHA, "WEBP"), "pal.gif": _saved(FEW, "GIF"), "rgb.npy": _array(PHOTO),
    "f.npy": _array((PHOTO / 9).astype(np.float16)), "grey.npy": _array(GREY16), "pal.bmp": _saved(FEW, "BMP"),
    "jpg.tif": _saved(PHOTO, "TIFF", compression="jpeg"), "f.tif": _saved((IDS / 9).astype(np.float32), "TIFF"),
    **{f"{name}.tif": _saved(PHOTO, "TIFF", **how) for name, how in TIFFS.items()},
    **{f"{name}16.tif": _saved(GREY16, "TIFF", **how) for name, how in TIFFS.items()},
    **{f"{name}alpha.tif": _saved(ALPHA, "TIFF", **how) for name, how in TIFFS.items()},
}  # fmt: skip


def _written(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _arrays(folder: Path, files: dict[str, bytes], read: Callable[[Path], list[Any]]) -> tuple[list[Path], Use]:
    paths = _written(folder, files)

    def use() -> list[tuple[tuple[int, ...], bytes]]:
        arrays = [array for path in paths for array in read(path)]
        return [(array.shape, array.astype(np.float64).tobytes()) for array in arrays]

    return paths, use


def _as_maps(path: Path) -> list[Any]:
    """Read a file as a label map, as an edge map, as an instance map, and some as a condition."""
    data = path.read_bytes()
    conditions = [decode_condition] if path.stem.startswith(("grey", "raw", "lzw", "z")) else []
    return [decode(data, path.name) for decode in (*(DECODERS[t] for t in TYPES[1:]), *conditions)]


def _as_photos(path: Path) -> list[Any]:
    """Read a file as it is stored, and one of 8-bit RGB as a data set's photo, too."""
    data = path.read_bytes()
    photo = [decode_photo(data, path.name, ImageSpec())] if path.name.startswith(("rgb", "prog", "exact")) else []
    return [decode_stored(data, path.name), *photo]


def maps_with_checksums(folder: Path) -> tuple[list[Path], Use]:
    return _arrays(folder, CHECKED_MAPS, _as_maps)


def maps_without_checksums(folder: Path) -> tuple[list[Path], Use]:
    return _arrays(folder, OTHER_MAPS, _as_maps)


def maps_cut_off(folder: Path) -> tuple[list[Path], Use]:
    return _arrays(folder, CHECKED_MAPS | OTHER_MAPS, _as_maps)


def photos_with_checksums(folder: Path) -> tuple[list[Path], Use]:
    return _arrays(folder, CHECKED_PHOTOS, _as_photos)


def photos_without_checksums(folder: Path) -> tuple[list[Path], Use]:
    return _arrays(folder, OTHER_PHOTOS, _as_photos)


def photos_cut_off(folder: Path) -> tuple[list[Path], Use]:
    return _arrays(folder, CHECKED_PHOTOS | OTHER_PHOTOS, _as_photos)


# ------------------------------------------------------------------------------------------------ data sets


def _raw_folder(folder: Path) -> Path:
    """Four samples in two sequences, of all data types."""
    for key, ids in {"a/0": IDS, "a/1": IDS[::-1], "b/0": IDS[:, ::-1], "b/1": IDS[::-1, ::-1]}.items():
        other = np.ascontiguousarray(ids)
        _written(folder, {
            f"images/{key}.jpg": _saved(np.roll(PHOTO, int(key[-1]), 0), "JPEG"),
            f"seg_maps/{key}.png": _saved(_indexed(other), "PNG"),
            f"edge_maps/{key}.png": _saved((other == 2).astype(np.uint8), "PNG"),
            f"inst_maps/{key}.png": _saved(other.astype(np.uint16) * 1000, "PNG"),
        })  # fmt: skip
    return folder


def _samples(root: Path) -> dict[str, list[bytes]]:
    """Read all samples as training does."""
    read = dict[str, list[bytes]]()
    for edges in ("file", "instances"):
        dataset = LabelMapDataset(root, LABELS, edges=edges)
        for sample in map(dataset.__getitem__, range(len(dataset))):
            parts = sample.image, sample.labels, sample.edges
            read.setdefault(sample.key, []).extend(part.numpy().tobytes() for part in parts if part is not None)
    return read


@cache
def _built() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        build_dataset(_raw_folder(Path(place, "raw")), Path(place, "out"), LABELS, num_workers=0, num_shards=2)
        out = Path(place, "out")
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def lmdb_verified(folder: Path) -> tuple[list[Path], Use]:
    """An LMDB root that ``inspect_lmdb --verify`` looks through before it is read."""
    root = folder / "lmdb"

    def use() -> Any:
        if problems := look_through(root, LABELS, 0).problems:
            raise problems[0]
        return _samples(root)

    return _written(root, _built()), use


def lmdb_read(folder: Path) -> tuple[list[Path], Use]:
    """An LMDB root that is read as it is."""
    root = folder / "lmdb"
    return _written(root, _built()), lambda: _samples(root)


def _change_tree(root: Path, rng: random.Random) -> None:
    """Change a file below ``root``, or something about its name or its place."""
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    other = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    name = rng.choice(
        ("x", ".hidden", "a b", "\u00e9", "e\u0301", "\udcff", "n" * 200, "a.b.c", "-", "a\nb", "0", "\\")
    )
    match rng.randrange(14):
        case 0 | 1 | 2 | 3:
            path.write_bytes(change(path.read_bytes(), rng))
        case 4:
            path.unlink()
        case 5:
            path.write_bytes(other.read_bytes())
        case 6:
            path.rename(path.with_name(name + path.suffix))
        case 7:
            path.rename(path.with_suffix(rng.choice((".jpg", ".PNG", ".npy", ".txt", ".gif", ""))))
        case 8:
            path.with_suffix(rng.choice((".bmp", ".png", ".jpg", ".tif"))).write_bytes(path.read_bytes())
        case 9:
            path.unlink()
            path.symlink_to(rng.choice((other, path, path.parent, Path("/dev/zero"), Path("/none"))))
        case 10:
            path.unlink()
            rng.choice((os.mkfifo, Path.mkdir))(path)
        case 11:
            shutil.rmtree(path.parent)
        case 12:
            path.parent.rename(path.parent.with_name(name))
        case 13:
            (path.parent / name).mkdir()
            shutil.copy(other, path.parent / name)


def raw_folder(folder: Path) -> tuple[Path, Use]:
    """A folder that is built: its file says how it is changed. The data set must hold what the folder does."""
    path = folder / "choice.txt"
    path.write_bytes(b"")

    def use() -> bool:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            raw, out = _raw_folder(Path(place, "raw")), Path(place, "out")
            if choice := path.read_bytes():
                _change_tree(raw, random.Random(choice))
            build_dataset(raw, out, LABELS, edges="file", num_workers=0, num_shards=2)
            return _samples(out) == _samples(raw)

    return path, use


def custom_tree(folder: Path) -> tuple[Path, Use]:
    """A folder for ``prepare_dataset custom``, changed likewise. What is prepared must be what is there."""
    path = folder / "choice.txt"
    path.write_bytes(b"")

    def use() -> bool:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            raw, out = _raw_folder(Path(place, "raw")), Path(place, "out")
            if choice := path.read_bytes():
                _change_tree(raw, random.Random(choice))
            options = Options(None, images=Path("images"), labels=Path("seg_maps"), instances=Path("inst_maps"))
            counts = prepare("custom", raw, out, options, num_workers=0)
            written = [p for p in out.glob("train/**/*") if p.is_file()]
            there = {p.with_suffix(p.suffix.lower()): p for p in raw.rglob("*")}
            same = all(p.read_bytes() == there[raw / p.relative_to(out / "train")].read_bytes() for p in written)
            return same and len(written) == 3 * sum(counts.values())

    return path, use


# ------------------------------------------------------------------------------------------------ painting page


@cache
def _model() -> Synthesizer:
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place, "p.pt"), tiny_content())
        return Synthesizer.load(Path(place, "p.pt"), device="cpu")


LOCAL = re.compile(rb"^host:[ \t]*(localhost|127\.0\.0\.1|\[::1\])(:\d*)?[ \t]*(\r|$)", re.IGNORECASE | re.MULTILINE)


def page_request(folder: Path) -> tuple[list[Path], Use]:
    """Whole requests, as they come in. None is a fault of the page, and none that names another host is answered."""
    fields = {"height": 24, "width": 32, "labels": base64.b64encode(IDS.tobytes()).decode()}
    sent = {
        "/": b"", "/api/model": b"", "/api/sample?number=1": b"", "/api/picture": json.dumps(fields).encode(),
        "/api/label_map_file": json.dumps(fields).encode(), "/api/label_map": CHECKED_MAPS["pal.png"],
        "/api/style": OTHER_PHOTOS["rgb.jpg"],
    }  # fmt: skip
    requests = {}
    for number, (target, body) in enumerate(sent.items()):
        form = "application/json" if body[:1] == b"{" else "application/octet-stream"
        head = [f"{'POST' if body else 'GET'} {target} HTTP/1.1", "Host: 127.0.0.1:7860", "Accept: */*"]
        head += [f"Content-Type: {form}", f"Content-Length: {len(body)}", "Origin: http://127.0.0.1:7860"] * bool(body)
        requests[f"{number}.txt"] = "\r\n".join([*head, "Connection: close", "", ""]).encode() + body
    paths = _written(folder, requests)

    def use() -> list[int]:
        with PaintingServer(PaintingService(_model(), "tiny"), "127.0.0.1", 0) as server:
            contents = [path.read_bytes() for path in paths]
            changed = [content for content in contents if content not in requests.values()]
            return [_ask(server, content) for content in changed or contents]

    return paths, use


def _ask(server: PaintingServer, request: bytes) -> int:
    """Send a request; return the status of the (first) answer, 0: the connection is closed without one."""
    ours, theirs = socket.socketpair()
    server.process_request(theirs, ("local", 0))

    def send() -> None:
        try:
            ours.sendall(request)
            ours.shutdown(socket.SHUT_WR)
        except OSError:  # they hang up
            pass

    sending = threading.Thread(target=send)
    sending.start()
    answer = b"".join(iter(lambda: ours.recv(2**16), b""))
    ours.close()
    sending.join()
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.[01] (\d+)", answer, re.MULTILINE)]
    if 500 in statuses:
        raise AssertionError(f"the page has a fault: {answer[-300:]!r}")
    if 200 in statuses and not LOCAL.search(request):
        raise AssertionError("the page answers a request to another host")
    return statuses[0] if statuses else 0


CUT = "cut"
KINDS: dict[Any, bool | str] = {
    maps_with_checksums: True, maps_without_checksums: False, maps_cut_off: CUT,
    photos_with_checksums: True, photos_without_checksums: False, photos_cut_off: CUT,
    lmdb_verified: True, lmdb_read: False, raw_folder: True, custom_tree: True, page_request: False,
}  # fmt: skip
"""Kind -> whether a changed file must be refused or understood as before: always, never, or where it is cut off."""
