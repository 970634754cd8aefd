"""Image files, photos of any depth, sheets, curves, the gallery: what is drawn, and files are complete or absent."""

import errno
import io
import struct
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from imaginaire_spade.config import ImageSpec
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.image_files import encode_map
from imaginaire_spade.errors import DataError, UserError
from imaginaire_spade.files import encode_image, write_bytes, write_image
from imaginaire_spade.inference import output as output_folder
from imaginaire_spade.inference.output import Output, write_gallery
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.sheets import BACKGROUND, draw_contact_sheet
from imaginaire_spade.training import run_log

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def test_png_comes_back_as_it_was_and_jpg_nearly(tmp_path):
    write_image(tmp_path / "a" / "ü #%.png", PHOTO)
    assert np.array_equal(read(tmp_path / "a" / "ü #%.png"), PHOTO)
    smooth = np.full((24, 40, 3), (200, 30, 90), np.uint8)
    write_image(tmp_path / "b.jpg", smooth)
    assert np.abs(read(tmp_path / "b.jpg").astype(int) - smooth).max() < 8
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b.jpg", "ü #%.png"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, code):
    path = tmp_path / "a.png"
    write_image(path, PHOTO)
    before = path.read_bytes()

    def fail(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(code, "cannot")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match=r"a\.png: cannot be written: cannot"):
        write_image(path, PHOTO[:8])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_sheet_shows_every_image_unchanged_in_equal_cells():
    assert_sheet_shows([[RNG.integers(0, 200, (30, 128, 3), dtype=np.uint8) for _ in range(3)] for _ in range(2)], 1)


def test_narrow_images_are_enlarged_by_a_whole_number_pixel_for_pixel():
    assert_sheet_shows([[RNG.integers(0, 200, (30, 48, 3), dtype=np.uint8) for _ in range(3)] for _ in range(2)], 3)


def assert_sheet_shows(rows, factor):
    sheet = draw_contact_sheet(rows, ["label map", "real", "generated"])
    assert sheet.dtype == np.uint8
    assert sheet[0, 0].tolist() == list(BACKGROUND)
    for cell in [cell for row in rows for cell in row]:
        shown = np.kron(cell, np.ones((factor, factor, 1), np.uint8))
        windows = np.lib.stride_tricks.sliding_window_view(sheet, shown.shape)[:, :, 0]
        found = (windows[:, :, 0, 0] == shown[0, 0]).all(-1) & (windows[:, :, -1, -1] == shown[-1, -1]).all(-1)
        assert any(np.array_equal(windows[y, x], shown) for y, x in zip(*np.nonzero(found), strict=True))


@pytest.mark.parametrize("rows", [[], [[]], [[PHOTO], [PHOTO[:5], PHOTO[:, :7]]]])
def test_a_sheet_of_anything(rows):
    sheet = draw_contact_sheet(rows, ["a" * 300, "b"])
    assert sheet.ndim == 3 and sheet.shape[2] == 3
    assert (sheet != np.array(BACKGROUND)).any()  # the titles at least


def records(count: int) -> list[dict]:
    return [
        {"images_seen": 10 * i, "iteration": i, "loss/gan": 1 / (i + 1), "loss/d_fake": float("nan") if i == 3 else i,
         "lr/gen": 1e-4, "images_per_s": 5.0}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 200])
def test_curves_are_drawn_from_any_number_of_records(tmp_path, count):
    run_log.write_curves(records(count), tmp_path / "curves.png")
    assert read(tmp_path / "curves.png").std() > 1


def test_every_evaluation_score_has_a_panel_of_its_own():
    names = ("fid", "kid", "kid_std", "miou", "miou_real")
    groups = run_log._group([{"images_seen": 1} | {f"evaluation/{name}": 1.0 for name in names}])
    assert {title: list(series) for title, series in groups.items()} == {
        "evaluation: fid": ["fid"], "evaluation: kid": ["kid", "kid_std"], "evaluation: miou": ["miou", "miou_real"],
    }  # fmt: skip


def test_smoothing_leaves_out_what_is_not_finite():
    y = np.ones(400)
    y[17] = np.nan
    assert np.array_equal(run_log._smooth(y), np.ones(400))


class Page(HTMLParser):
    """Links of a page; fails on scripts and on anything that is fetched from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.links += [values["href"] or ""] if "href" in values else []

    def handle_data(self, data: str) -> None:
        self.text += data


LABELS = LabelSpec(num_classes=1, names=("<sky>",), palette=((1, 2, 3),))


def test_gallery_links_lead_to_files_whatever_the_names(tmp_path):
    keys = ["plain", "seq/ü ö", "a b/c#d%20?&<i>\"'", "x:y/z", "日本"]
    outputs = [Output(k, i, (f"{k}_00.png", f"{k}_01.png"), f"_labels/{k}.png") for i, k in enumerate(keys)]
    for output in outputs:
        for file in (output.label_map, *output.images):
            write_image(tmp_path / file, PHOTO)
    path = write_gallery(tmp_path, outputs, "<b>title & more</b>", LABELS)
    page = Page(path)
    assert len(page.images) == 3 * len(keys)
    for url in page.images:
        assert url.startswith("./")
        assert (tmp_path / unquote(url)).is_file() and "#" not in url and "?" not in url
    for key in keys:
        assert key in page.text
    assert "<b>title" in page.text and "<sky>" in page.text and "rgb(1,2,3)" in page.source
    assert "http" not in page.source and "//" not in page.source


def test_a_large_gallery_has_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "OUTPUTS_PER_PAGE", 2)
    write_gallery(tmp_path, [Output(str(i), i, (f"{i}.png",), f"_labels/{i}.png") for i in range(5)], "many", LABELS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index-2.html", "index-3.html", "index.html"]
    pages = [Page(tmp_path / name) for name in ("index.html", "index-2.html", "index-3.html")]
    assert [len(page.images) for page in pages] == [4, 4, 2]
    assert all("index-3.html" in page.links for page in pages)


def test_an_empty_gallery(tmp_path):
    assert Page(write_gallery(tmp_path, [], "none", LABELS)).images == []


# ------------------------------------------------------------------------------------------------ photos of data sets


@dataclass
class Case:
    """One data set of one sample: what its owner has, what the config says, and what must come of it."""

    files: dict[str, bytes]
    """Path below the data set -> content."""
    images: ImageSpec
    truth: np.ndarray
    """[H, W, C] as training must see it: uint8, or floats in [-1, 1]."""
    is_right: bool
    """Whether the config says what the files are, so that the build must not refuse them."""
    tolerance: float = 1e-6
    key: str = "data.images"
    """Of the config, which a refusal names."""


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels as EXIF 2.3 (4.6.4, tag 274) shows them: by its row and column of the stored picture's corner."""
    turns = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90,
    }  # fmt: skip
    return turns[orientation](array)


def tiff(array: np.ndarray, orientation: int = 1, *, alpha: bool = False) -> bytes:
    """A TIFF of any type, bands and orientation, [H, W, C]; PIL writes few of them, OpenCV no orientation."""
    height, width, channels = array.shape
    pixels, extra = array.tobytes(), max(0, channels - 3)
    entries = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [8 * array.itemsize] * channels), 259: ("H", [1]),
        262: ("H", [2 if channels >= 3 else 1]), 273: ("I", [8]), 274: ("H", [orientation]), 277: ("H", [channels]),
        278: ("I", [height]), 279: ("I", [len(pixels)]), 284: ("H", [1]),
        **({338: ("H", [2 if alpha else 0] * extra)} if extra else {}),
        339: ("H", [{"u": 1, "i": 2, "f": 3}[array.dtype.kind]] * channels),
    }  # fmt: skip
    directory, values = struct.pack("<H", len(entries)), b""
    after = 8 + len(pixels) + 2 + 12 * len(entries) + 4
    for tag, (form, numbers) in entries.items():
        value = struct.pack(f"<{len(numbers)}{form}", *numbers)
        if len(value) > 4:
            value, values = struct.pack("<I", after + len(values)), values + value + b"\0" * (len(value) % 2)
        directory += struct.pack("<HHI", tag, {"H": 3, "I": 4}[form], len(numbers)) + value.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + bytes(4) + values


def encoded_photo(array: np.ndarray, suffix: str, orientation: int, alpha: bool) -> bytes | None:
    """A photo [H, W, C] as a file; None where the format does not hold it."""
    kind, channels = array.dtype, array.shape[2]
    if suffix == "tif":
        return tiff(array, orientation, alpha=alpha) if channels <= 4 else None
    if suffix in ("npy", "npz"):
        return None if alpha or orientation != 1 else encode_image(array, f".{suffix}")
    if channels not in (1, 3, 4) or kind not in ("uint8", "uint16") or (channels == 4) != alpha:
        return None
    exif, stream = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    if kind == np.uint16:
        return encode_image(array, ".png") if suffix == "png" and orientation == 1 else None
    if suffix == "jpg" and channels == 4:
        return None
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True, "exact": True}}.get(suffix, {})
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    picture.save(stream, {"jpg": "JPEG"}.get(suffix, suffix), exif=exif.tobytes(), **options)
    return stream.getvalue()


@st.composite
def photos(draw) -> Case:
    """Bit depth, channels and orientation, and a config that may or may not say so."""
    suffix = draw(st.sampled_from(["png", "tif", "tif", "npy", "npz", "jpg", "webp"]))
    dtype = np.dtype(draw(st.sampled_from(["uint8", "uint16", "int16", "float32"])))
    channels, orientation = draw(st.sampled_from([1, 3, 4, 5])), draw(st.integers(1, 8))
    height, width = draw(st.sampled_from([(12, 20), (16, 16)]))
    alpha = channels == 4 and draw(st.booleans())
    low, high = {"uint8": (0, 255), "uint16": (700, 3900), "int16": (-900, 900), "float32": (-2.5, 2.5)}[dtype.name]
    # Smooth, without any symmetry, and different in every channel.
    y, x, c = np.mgrid[:height, :width, :channels]
    steps = (y / height * 0.55 + (x / width) ** 2 * 0.35 + c / 10) / 1.4
    stored = (low + (high - low) * steps).astype(dtype)
    content = encoded_photo(stored, suffix, orientation, alpha)
    assume(content is not None)
    # The label map is of the photo as shown or of the pixels as stored.
    upright = draw(st.booleans())
    seen = turned(stored, orientation) if upright else stored
    # What the config says.
    given_range = draw(st.sampled_from([None, "auto", (low, high)]))
    spec = ImageSpec(
        channels=draw(st.sampled_from([3, channels])), range=given_range, drop_alpha=draw(st.booleans()),
        orientation=draw(st.sampled_from([None, "upright" if upright else "stored"])),
    )  # fmt: skip
    values = seen[..., :3] if alpha and spec.drop_alpha else seen
    fits = values.shape[2] == spec.channels or (values.shape[2] == 1 and spec.channels == 3)
    tells = orientation == 1 or spec.orientation or turned(stored, orientation).shape[:2] != stored.shape[:2]
    is_right = fits and bool(tells) and (given_range is not None or dtype == np.uint8)
    truth = values.repeat(3, 2) if values.shape[2] == 1 and spec.channels == 3 else values
    if given_range is not None:
        bottom, top = (stored.min(), stored.max()) if given_range == "auto" else given_range
        if given_range == "auto" and alpha and spec.drop_alpha:
            bottom, top = values.min(), values.max()
        truth = ((truth.astype(np.float64) - bottom) / (float(top) - float(bottom)) * 2 - 1).clip(-1, 1)
    lossy = suffix == "jpg"
    label_map = encode_map(np.arange(seen.shape[0] * seen.shape[1]).reshape(seen.shape[:2]).astype(np.uint8) % 3)
    files = {f"images/a.{suffix}": content, "seg_maps/a.png": label_map}
    return Case(files, spec, truth, is_right, (0.05 if given_range else 5) if lossy else 1e-6)


KINDS: list[st.SearchStrategy[Case]] = [photos()]
"""Kinds of data; who adds one adds what it may look like, what the config may say, and the truth."""


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=st.one_of(KINDS))
def test_a_sample_is_the_truth_or_the_build_names_file_and_key(case, tmp_path_factory):
    root = tmp_path_factory.mktemp("case")
    for name, content in case.files.items():
        write_bytes(root / "raw" / name, content)
    labels = LabelSpec(num_classes=3)
    try:
        build_dataset(root / "raw", root / "lmdb", labels, images=case.images, num_workers=0)
    except DataError as error:
        assert not case.is_right, error
        assert case.key in str(error) and any(name in str(error) for name in case.files), error
        # A folder that is trained on as it is must say the same.
        if case.images.range != "auto":
            with pytest.raises(DataError, match=case.key.replace(".", r"\.")):
                LabelMapDataset(root / "raw", labels, images=case.images)[0]
        return
    assert case.is_right
    image = LabelMapDataset(root / "lmdb", labels, images=case.images)[0].image.permute(1, 2, 0).numpy()
    assert image.dtype == (np.uint8 if case.images.range is None else np.float32)
    assert image.shape == case.truth.shape
    assert np.abs(image.astype(np.float64) - case.truth).max() <= case.tolerance
