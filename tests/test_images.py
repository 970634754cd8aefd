"""Images: files, photos of any depth, contact sheets, curves and the gallery; files are complete or absent."""

import base64
import errno
import io
import json
import re
import struct
import unicodedata
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
from conftest import blocky_labels, write_png
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from test_training import TINY

from imaginaire_spade.build import build_losses, check_run, with_measured_range
from imaginaire_spade.config import ImageSpec
from imaginaire_spade.config_diff import explain_mismatch, list_changes
from imaginaire_spade.config_files import parse_config
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.data.image_files import decode_label, encode_map
from imaginaire_spade.data.photos import decode_photo
from imaginaire_spade.demo.service import PaintingService
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import ConfigError, DataError, UserError
from imaginaire_spade.export.generator import metadata
from imaginaire_spade.files import encode_image, write_bytes, write_image
from imaginaire_spade.inference import output as output_folder
from imaginaire_spade.inference.folder import FolderOptions, generate_folder
from imaginaire_spade.inference.images_to_score import checkpoint_images
from imaginaire_spade.inference.model import Model
from imaginaire_spade.inference.output import Output, _write_animation, write_gallery
from imaginaire_spade.inference.synthesizer import Synthesizer
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.lmdb_builder.shard import summary
from imaginaire_spade.pages import _count_columns
from imaginaire_spade.sheets import BACKGROUND, draw_contact_sheet, legend_of
from imaginaire_spade.training import loop, run_log
from imaginaire_spade.training.checkpoint import load_checkpoint, newest_checkpoint
from imaginaire_spade.training.setup import MEANING, prepare

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


def test_a_sheet_names_samples_and_the_classes_that_occur():
    names = ("sky", "sea", "a name that is longer than all of a narrow sheet", "never there")
    table = LabelSpec(num_classes=4, names=names, palette=((250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 90, 9)))
    maps = [np.repeat([[0, 1], [2, 4]], 64, 0).repeat(64, 1), np.zeros((128, 128), np.uint8)]
    legend = legend_of(table, maps)
    assert legend == [
        (names[0], (250, 0, 0)), (names[1], (0, 250, 0)), (names[2], (0, 0, 250)), ("don't care", (0, 0, 0)),
    ]  # fmt: skip
    assert legend_of(table.model_copy(update={"names": ()}), maps) == []

    blank = [[np.full((128, 128, 3), BACKGROUND, np.uint8)] * 2] * 2
    bare, named = (draw_contact_sheet(blank, [""] * 2, given) for given in ((), [["a"], ["long " * 50]]))
    assert named.shape[1] == bare.shape[1] and (bare == BACKGROUND).all()
    lines = [(part != BACKGROUND).any(2) for part in np.split(named, [named.shape[0] - 128])]
    assert lines[0].any(1).sum() < 20 > lines[0].any(0).sum() > 0  # a letter; the long name fills the row, cut
    assert 200 < np.ptp(np.flatnonzero(lines[1].any(0))) < named.shape[1] - 24
    halves = draw_contact_sheet(blank[:1], [""] * 2, [["a", "b"]])
    assert all((half != BACKGROUND).any() for half in np.array_split(halves, 2, axis=1))

    # The legend: below all else, swatches sharp and whole, in columns where there is room, lines where there is none.
    for columns, num_lines in ((2, 4), (12, 1)):
        rows = [row * (columns // 2) for row in blank]
        plain = draw_contact_sheet(rows, [""] * columns)
        drawn = draw_contact_sheet(rows, [""] * columns, legend=legend)
        assert drawn.shape[1] == plain.shape[1] and (drawn[: plain.shape[0] - 12] == BACKGROUND).all()
        swatches = [np.argwhere((drawn == colour).all(2)) for _, colour in legend[:3]]
        assert all(len(pixels) == 10 * 10 for pixels in swatches)
        assert len({pixels[0, 0] for pixels in swatches}) == min(num_lines, 3)
        ink = np.flatnonzero((drawn != BACKGROUND).any((1, 2)))
        assert 20 * (num_lines - 1) < np.ptp(ink) < 20 * num_lines <= drawn.shape[0] - plain.shape[0]


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


def test_every_loss_has_a_panel_of_its_own_and_no_cell_is_empty(monkeypatch):
    record = {"images_seen": 1, "loss/gan": 0.6, "loss/g_total": 20.0, "loss/d_fake": 1.0, "loss/l1": 0.2,
              "lr/gen": 1.0, "lr/dis": 2.0, "memory/peak_gib": 1.2}  # fmt: skip
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    monkeypatch.setattr(run_log, "write_bytes", lambda path, content: None)
    run_log.write_curves([record, {**record, "images_seen": 2, "memory/peak_gib": 1.22}], Path("curves.png"))
    panels = {panel.get_title("left"): panel for panel in figures[0].get_axes()}
    titles = ["loss: gan", "loss: g total", "loss: d fake", "loss: l1", "lr", "memory"]
    assert list(panels) == titles and all(panel.lines for panel in panels.values())
    assert [len(part.get_axes()) for part in figures[0].subfigs] == [3, 3]
    assert panels["memory"].get_ylim()[0] == 0 and panels["loss: g total"].get_ylim()[0] > 0


def test_smoothing_leaves_out_what_is_not_finite():
    y = np.ones(400)
    y[17] = np.nan
    assert np.array_equal(run_log._smooth(y), np.ones(400))


class Page(HTMLParser):
    """Links of a page; fails on anything that is fetched besides images and films."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("link", "iframe") and not (tag == "script" and values)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.links += [values["href"] or ""] if "href" in values else []

    def handle_data(self, data: str) -> None:
        self.text += data


LABELS = LabelSpec(num_classes=1, names=("<sky>",), palette=((1, 2, 3),))


def test_gallery_links_lead_to_files_whatever_the_names(tmp_path):
    keys = ["plain", "seq/ü ö", "a b/c#d%20?&<i>\"'", "x:y/z", "日本"]
    outputs = [
        Output(k, i, (f"{k}_00.png", f"{k}_01.png"), f"_labels/{k}.png", photo=f"_labels/{k}.photo.jpg")
        for i, k in enumerate(keys)
    ]
    for output in outputs:
        for file in filter(None, (output.label_map, output.photo, *output.images)):
            write_image(tmp_path / file, PHOTO)
    path = write_gallery(tmp_path, outputs, "<b>title & more</b>", LABELS, ["seed 7", "<seed> 8"])
    page = Page(path)
    assert len(page.images) == 4 * len(keys)
    assert "5 label maps, 2 generated images each" in page.text and page.text.count("<seed> 8") == 5
    for url in page.images:
        assert url.startswith("./")
        assert (tmp_path / unquote(url)).is_file() and "#" not in url and "?" not in url
    for key in keys:
        assert key in page.text
    assert "<b>title" in page.text and "<sky>" in page.text and "rgb(1,2,3)" in page.source
    assert "http" not in page.source and not re.search(r"(?<!\s)//", page.source)


def test_a_large_gallery_has_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "OUTPUTS_PER_PAGE", 2)
    write_gallery(tmp_path, [Output(str(i), i, (f"{i}.png",), f"_labels/{i}.png") for i in range(5)], "many", LABELS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index-2.html", "index-3.html", "index.html"]
    pages = [Page(tmp_path / name) for name in ("index.html", "index-2.html", "index-3.html")]
    assert [len(page.images) for page in pages] == [4, 4, 2]
    assert all("index-3.html" in page.links for page in pages)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_the_gallery_shows_every_kind_of_animation(tmp_path, suffix):
    output = Output("a", 0, ("a_00.png", "a_01.png"), "_labels/a.png", f"a{suffix}")
    page = Page(write_gallery(tmp_path, [output], "moving", LABELS, ["seed 1", "seed 2"]))
    assert f'src="./a{suffix}"' in page.source and page.source.count("<video") == (suffix == ".mp4")
    assert "seed 1 to seed 2" in page.text and "1 label map\n" in page.text


def test_rows_of_the_gallery_are_full_or_lack_the_place_that_the_label_map_takes():
    columns = [_count_columns(cells) for cells in range(2, 22)]
    assert columns[:5] == [2, 3, 4, 5, 6] and max(columns) == 6
    assert [cells for cells, number in enumerate(columns, 2) if -cells % number > 1] == [13]


def test_the_gallery_in_a_browser(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    outputs = [
        Output(k, i, tuple(f"{k}_{j}.png" for j in range(4)), f"_labels/{k}.png", film, photo=f"_labels/{k}.photo.jpg")
        for i, (k, film) in enumerate([("a", None), ("b", None), ("c", "c.webp"), ("d", "d.mp4")])
    ]
    for output in outputs:
        for file in (output.label_map, *output.images, *([output.photo] if output.key != "b" else [])):
            write_image(tmp_path / str(file), PHOTO)
        if output.animation:
            _write_animation(tmp_path / output.animation, [PHOTO, PHOTO // 2, PHOTO // 3])
    write_gallery(tmp_path, outputs, "looked at", LABELS, [f"seed {j}" for j in range(4)])
    browser.get((tmp_path / "index.html").as_uri())
    ask = browser.execute_script

    def press(key):
        ActionChains(browser).send_keys(key).perform()

    def wait(script):
        WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: ask(f"return {script}"))

    # One row per label map without holes; the photo that is not there is left out.
    wait("document.images.length > 15 && [...document.images].every((image) => image.naturalWidth)")
    rows = ask("return [...document.querySelectorAll('figure')].map((figure) => [...figure.querySelectorAll('.cell')]"
               ".map((cell) => cell.offsetTop))")  # fmt: skip
    assert [len(row) for row in rows] == [6, 5, 3, 3] and all(len(set(row)) == 1 for row in rows)
    assert ask("return getComputedStyle(document.querySelector('.map img')).imageRendering") == "pixelated"

    # Arrows go through the label maps, to the ends; Esc closes, and the focus is where it closed.
    ask("document.querySelector('#p0 .cell:last-child').click()")
    keys = []
    for key in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.END, Keys.ARROW_RIGHT):
        press(key)
        keys.append(ask("return document.querySelector('dialog[open] output').textContent"))
    assert keys == ["a", "b", "d", "d"]
    wait("document.querySelector('dialog video').readyState === 4")
    film = ask("const v = document.querySelector('dialog video'); return [v.error, v.videoWidth, v.videoHeight]")
    assert film == [None, PHOTO.shape[1] + PHOTO.shape[1] % 2, PHOTO.shape[0] + PHOTO.shape[0] % 2]
    assert ask("const d = document.querySelector('dialog'); return d.scrollHeight - d.clientHeight") == 0
    press(Keys.ESCAPE)
    wait("!document.querySelector('dialog').open && document.activeElement.closest('figure')?.id === 'p3'")

    # On a telephone: two columns, nothing to scroll sideways, room for a finger.
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    try:
        assert ask("return document.documentElement.scrollWidth") <= 400
        tops = ask("return [...document.querySelectorAll('#p1 .cell')].map((cell) => cell.offsetTop)")
        assert [tops.count(top) for top in sorted(set(tops))] == [1, 2, 2]
        small = ask(
            "return [...document.querySelectorAll('main a, summary')].filter((a) => a.offsetHeight < 44).length"
        )
        assert small == 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
    """[H, W, C] as training must see it: uint8, or floats of 0..255."""
    is_right: bool
    """Whether the config says what the files are, so that the build must not refuse them."""
    tolerance: float = 1e-4
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
        truth = ((truth.astype(np.float64) - bottom) / (float(top) - float(bottom)) * 255).clip(0, 255)
    lossy = suffix == "jpg"
    label_map = encode_map(np.arange(seen.shape[0] * seen.shape[1]).reshape(seen.shape[:2]).astype(np.uint8) % 3)
    files = {f"images/a.{suffix}": content, "seg_maps/a.png": label_map}
    return Case(files, spec, truth, is_right, 6 if lossy else 1e-4)


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


MAPS = {"plain": "", "suffix": "data.suffixes", "nodata": "ignore", "colours": "remap", "two Unicode forms": ""}
"""Form of the label map and its name -> the key that it needs."""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=photos(), form=st.sampled_from([*MAPS]), is_said=st.booleans())
def test_photo_and_label_map_of_any_forms_are_the_truth_or_are_refused(case, form, is_said, tmp_path_factory):
    root = tmp_path_factory.mktemp("case")
    ((photo, content),) = ((name, content) for name, content in case.files.items() if name.startswith("images/"))
    ids = decode_label(case.files["seg_maps/a.png"], "x").astype(np.int16)
    stem, label_map, keys, suffixes = "a", encode_map(ids.astype(np.uint8)), {}, None
    train_ids = ids.copy()
    if form == "suffix":
        stem, suffixes = "a_mask", {"seg_maps": "_mask"} if is_said else None
    elif form == "nodata":
        label_map = cv2.imencode(".tif", np.where(ids == 2, np.int16(-1), ids))[1].tobytes()
        train_ids[ids == 2] = 3
        keys = {"ignore": (-1,)} if is_said else {}
    elif form == "colours":
        colours = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
        indexed, stream = Image.fromarray(ids.astype(np.uint8), mode="P"), io.BytesIO()
        indexed.putpalette([value for place in (1, 0, 2) for value in colours[place]])
        indexed.save(stream, "png")
        label_map, train_ids = stream.getvalue(), np.array([1, 0, 2])[ids]
        keys = {"palette": colours} | ({"remap": {0: 1, 1: 0}} if is_said else {})
    elif form == "two Unicode forms":
        photo, stem = photo.replace("/a.", "/\u00e9."), "e\u0301"
    write_bytes(root / "raw" / photo, content)
    write_bytes(root / "raw/seg_maps" / f"{stem}.{'tif' if form == 'nodata' else 'png'}", label_map)
    labels = LabelSpec(num_classes=3, **keys)
    faults = {case.key} - ({case.key} if case.is_right else set()) | ({MAPS[form]} - {""} if not is_said else set())
    try:
        build_dataset(root / "raw", root / "lmdb", labels, images=case.images, num_workers=0, suffixes=suffixes)
    except DataError as error:
        assert any(fault in str(error) for fault in faults), error
        assert any(name in unicodedata.normalize("NFC", str(error)) for name in ("a.", "a_mask", "\u00e9.")), error
        return
    assert not faults
    sample = LabelMapDataset(root / "lmdb", labels, images=case.images)[0]
    assert (sample.labels.numpy() == train_ids).all()
    assert np.abs(sample.image.permute(1, 2, 0).numpy().astype(np.float64) - case.truth).max() <= case.tolerance


def write_bands(folder: Path, make, suffix: str, *, count: int = 4) -> None:
    """A data set of 32x32 samples: ``make`` gives the photo [H, W, C] of a label map."""
    for i in range(count):
        labels = blocky_labels(np.random.default_rng(i), 32, 32, 5)
        write_png(folder / "seg_maps" / f"s{i}.png", labels)
        write_bytes(folder / "images" / f"s{i}{suffix}", encode_image(make(labels), suffix))


GREY = ({"channels": 1, "range": "auto"}, lambda ids: 700 + 200 * ids[..., None].astype(np.uint16), ".png")
BANDS = (
    {"channels": 5, "range": [0.0, 8.0], "preview": [4, 0, 1]},
    lambda ids: ids[..., None] + np.arange(5, dtype=np.float32) / 8, ".npy",
)  # fmt: skip


@pytest.fixture(params=[GREY, BANDS], ids=["grey16", "bands"])
def deep_run(request, tmp_path, monkeypatch, one_thread):
    """(config, checkpoint) of two iterations on photos that are not 8-bit RGB."""
    images, make, suffix = request.param
    write_bands(tmp_path / "raw", make, suffix)
    tree = json.loads(json.dumps(TINY))
    tree["data"] |= {"images": images, "train": {
        "roots": [str(tmp_path / "lmdb")], "batch_size": 2, "augmentations": {"resize_h_w": [32, 32]},
    }}  # fmt: skip
    tree["gen"]["style_dims"], tree["encoder"] = 4, {"type": "conv", "num_filters": 2, "image_size": 128}
    tree["losses"] |= {"kl": 0.05, "l1": 1.0}
    config = parse_config(tree)
    manifest = build_dataset(
        tmp_path / "raw", tmp_path / "lmdb", config.data.labels, images=config.data.images, num_workers=0, num_shards=2
    )
    monkeypatch.setattr(run_log, "write_curves", lambda *_: None)
    config = with_measured_range(config)
    run = prepare(config, build_losses(config), ProcessInfo(), torch.device("cpu"), 2)
    loop.train(run, tmp_path / "log", None)
    return config, newest_checkpoint(tmp_path / "log"), manifest, tmp_path


def test_photos_of_any_depth_and_bands_train_and_generate_in_kind(deep_run):
    config, checkpoint, manifest, folder = deep_run
    spec, is_grey = config.data.images, config.data.images.channels == 1
    # What was measured is in the manifest, its summary, and the config of the run.
    values = manifest["images"]["values"]
    assert values == ([700, 1500] if is_grey else [0.0, 4.5])
    assert spec.range == ((700, 1500) if is_grey else (0.0, 8.0))
    lines = summary(manifest, config.data.labels, folder)
    assert f"values {values}" in lines and f"4 of {'uint16' if is_grey else 'float32'}: s0, s1, s2, s3" in lines
    stored = load_checkpoint(checkpoint)["config"]["data"]["images"]
    assert stored["range"] == list(spec.range) and stored["channels"] == spec.channels
    # A file and an array, in the values of the data.
    model = Model.load(checkpoint)
    maps = LabelMapDataset(folder / "raw/seg_maps", config.data.labels, edges="labels", with_images=False)
    generate_folder(model, maps, folder / "out", FolderOptions())
    path = folder / "out" / ("s0.png" if is_grey else "s0.npy")
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., None] if is_grey else np.load(path)
    assert image.dtype == spec.dtype == ("uint16" if is_grey else "float32")
    assert image.shape == (32, 32, spec.channels)
    assert spec.range[0] <= image.min() < image.max() <= spec.range[1]
    preview = read(folder / "out/_labels/s0.preview.png")
    assert preview.shape == (32, 32, 3) and "_labels/s0.preview.png" in (folder / "out/index.html").read_text()
    shown = (image.astype(float) - spec.range[0]) / (spec.range[1] - spec.range[0]) * 255
    assert np.abs(shown[..., list(spec.preview or (0, 0, 0))] - preview).max() <= 1
    ids = decode_label((folder / "raw/seg_maps/s0.png").read_bytes(), "s0")
    style = folder / "raw/images" / f"s1.{'png' if is_grey else 'npy'}"
    made = Synthesizer(model)(ids, style=style)
    assert made.shape == ((32, 32) if is_grey else (32, 32, 5)) and made.dtype == spec.dtype
    with pytest.raises(DataError, match=rf"give {spec.dtype} \[H, W, {spec.channels}\]"):
        Synthesizer(model).encode(np.zeros((8, 8, 2), np.uint8))
    with pytest.raises(ConfigError, match="--format jpg does not hold images"):
        generate_folder(model, maps, folder / "other", FolderOptions(suffix=".jpg"))
    # The preview of training, the painting page, and the metadata of an export.
    assert cv2.imread(str(next((folder / "log/images").iterdir()))).ndim == 3
    labels = base64.b64encode(bytes(32 * 32)).decode()
    page = PaintingService(Synthesizer(model), "tiny").generate({"height": 32, "width": 32, "labels": labels})
    assert cv2.imdecode(np.frombuffer(page, np.uint8), cv2.IMREAD_UNCHANGED).shape == (32, 32, 3)
    assert f"[N, {spec.channels}, H, W]" in metadata(model)["images"]
    # Scores: of grey as RGB, and said; of bands none.
    photos = checkpoint_images if is_grey else None
    val = config.data.model_copy(update={"val": config.data.train})
    given = config.model_copy(update={"data": val})
    how = {"real": None, "reference_split": "val", "num_samples": 1, "seed": 0, "batch_size": 2, "with_photos": True}
    if photos is None:
        with pytest.raises(ConfigError, match="5 channels"):
            checkpoint_images(checkpoint, model, given, **how)
        return
    for source in (found := checkpoint_images(checkpoint, model, given, **how)).fake, found.real:
        (_, scored), *_ = source.read([0])
        assert scored.pixels.shape == (3, 32, 32) and scored.pixels.dtype == torch.uint8
        assert scored.remark == "1 channel(s) of uint16 shown as RGB"


@pytest.mark.parametrize("change", [{"channels": 3}, {"range": (0, 65535)}, {"drop_alpha": True}])
def test_a_run_goes_on_with_the_meaning_of_photos_that_it_began_with(change):
    before, after = (
        parse_config(TINY | {"data": TINY["data"] | {"images": {"channels": 1, "range": (0, 4095)} | images}})
        for images in ({}, {key: list(value) if isinstance(value, tuple) else value for key, value in change.items()})
    )
    if "channels" in change:
        assert "trained on images of 1 channels, this config has 3" in explain_mismatch(before, after)[0]
    else:
        assert set(list_changes(before, after)) <= set(MEANING) and not explain_mismatch(before, after)


def test_deep_photos_without_a_range_are_refused_with_the_line_to_write(tmp_path):
    labels = LabelSpec(num_classes=5)
    write_bands(tmp_path / "raw", GREY[1], ".png")
    with pytest.raises(DataError, match=r"s0\.png: a photo of 16 bits.*write data\.images: {channels: 1, range: auto}"):
        build_dataset(tmp_path / "raw", tmp_path / "lmdb", labels, num_workers=0)
    with pytest.raises(DataError, match=r"s0\.png: a photo of 16 bits per channel, and no range is given"):
        LabelMapDataset(tmp_path / "raw", labels)[0]
    grey = ImageSpec(channels=1, range="auto")
    with pytest.raises(DataError, match=r"range: auto: scripts/build_lmdb\.py measured no values of .*raw"):
        LabelMapDataset(tmp_path / "raw", labels, images=grey)
    build_dataset(tmp_path / "raw", tmp_path / "lmdb", labels, images=grey, num_workers=0)
    with pytest.raises(DataError, match=r'built with other data\.images: write {"channels": 1, "range": "auto"}'):
        LabelMapDataset(tmp_path / "lmdb", labels)
    with pytest.raises(DataError, match=r"another data\.images: use --overwrite"):
        build_dataset(tmp_path / "raw", tmp_path / "lmdb", labels, num_workers=0)
    write_bytes(tmp_path / "raw/images/s1.png", encode_image(np.zeros((32, 32, 1), np.uint8), ".png"))
    with pytest.raises(DataError, match=r"photos of 8 bits among deeper ones.*s1"):
        build_dataset(tmp_path / "raw", tmp_path / "mixed", labels, images=grey, num_workers=0)
    assert not (tmp_path / "mixed").exists()


def test_what_the_builder_did_is_counted_and_named(tmp_path, capsys):
    for i, orientation in enumerate([6, 1, 6]):
        photo = RNG.integers(0, 256, (24, 40, 4), dtype=np.uint8)
        write_bytes(tmp_path / f"raw/images/s{i}.tif", tiff(photo, orientation, alpha=True))
        size = (40, 24) if i == 0 else (24, 40)  # s0's label map is of the photo as shown, s2's of the stored pixels
        write_png(tmp_path / f"raw/seg_maps/s{i}.png", np.zeros(size, np.uint8))
    spec = ImageSpec(range=(0, 200), drop_alpha=True)
    manifest = build_dataset(tmp_path / "raw", tmp_path / "lmdb", LABELS, images=spec, num_workers=0)
    text = summary(manifest, LABELS, tmp_path / "lmdb")
    assert "3 whose alpha channel is left out: s0, s1, s2" in text
    assert "1 with an EXIF orientation, taken upright: s0\n" in text
    assert "1 with an EXIF orientation, taken as stored: s2\n" in text
    assert "3 with values beyond data.images.range, which are clipped: s0, s1, s2" in text
    # Shrunk photos keep no EXIF: they are written as they are taken.
    build_dataset(tmp_path / "raw", tmp_path / "small", LABELS, images=spec, num_workers=0, resize_smallest_side=12)
    sizes = [tuple(LabelMapDataset(tmp_path / "small", LABELS, images=spec)[i].image.shape) for i in range(3)]
    assert sizes == [(3, 20, 12), (3, 12, 20), (3, 12, 20)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((8, 8, 1), np.nan, np.float32), "64 value.s. are not finite"),
        (np.zeros((4, 20, 20), np.float32), "bands come last"),
        (np.zeros((8, 8, 1), np.complex64), "a photo is numbers"),
        (b"\x93NUMPY cut off", "not readable as a NumPy file"),
        (b"PK\x03\x04 cut off", "not readable as a NumPy file"),
    ],
    ids=["nan", "axes", "complex", "cut off", "cut off archive"],
)
def test_numpy_files_that_are_no_photos(content, message):
    data = content if isinstance(content, bytes) else encode_image(content, ".npy")
    with pytest.raises(DataError, match=message):
        decode_photo(data, "a.npy", ImageSpec(channels=1, range=(0.0, 1.0)))


def test_networks_for_rgb_refuse_bands_before_the_work_starts():
    def check(*, images: dict, **sections) -> None:
        tree = json.loads(json.dumps(TINY)) | sections
        tree["data"]["images"] = images
        check_run(parse_config(tree), 1)

    perceptual = {"losses": {"gan": 1.0, "perceptual": 10.0}}
    check(images={"channels": 1}, **perceptual)
    with pytest.raises(ConfigError, match=r"write losses\.perceptual\.weight: 0"):
        check(images={"channels": 4}, **perceptual)
    for entry, message in (
        ({"range": [5, 5]}, "the lowest value comes first"),
        ({"channels": 2, "preview": [0, 1, 2]}, r"channels are 0\.\.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(images=entry)


def test_grey_with_alpha_is_two_channels_or_one(tmp_path):
    array, stream = np.random.default_rng(0).integers(0, 255, (48, 64, 2), np.uint8), io.BytesIO()
    Image.fromarray(array, mode="LA").save(stream, "png")
    content = stream.getvalue()
    write_bytes(tmp_path / "raw/images/a.png", content)
    write_png(tmp_path / "raw/seg_maps/a.png", np.zeros((48, 64), np.uint8))
    both, one = ImageSpec(channels=2), ImageSpec(channels=1, drop_alpha=True)
    assert (decode_photo(content, "x", both) == array).all()
    assert (decode_photo(content, "x", one) == array[..., :1]).all()
    with pytest.raises(DataError, match=r"drop_alpha: true to leave it out, or data\.images\.channels: 2"):
        decode_photo(content, "x", ImageSpec())
    built = build_dataset(
        tmp_path / "raw", tmp_path / "small", LabelSpec(num_classes=1), images=both, num_workers=0,
        resize_smallest_side=24,
    )  # fmt: skip
    assert built["data_types"]["images"]["extension"] == "npy" and built["sizes_h_w"] == {"24x32": 1}


def test_grey_with_a_transparent_colour_and_cmyk(tmp_path):
    stream = io.BytesIO()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(stream, "png", transparency=9)
    decoded = decode_photo(stream.getvalue(), "x", ImageSpec(channels=2))
    assert (decoded[..., 0] == grey).all() and (decoded[..., 1] == np.where(grey == 9, 0, 255)).all()
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a TIFF of CMYK colours: convert it to RGB"):
        decode_photo((tmp_path / "a.tif").read_bytes(), "x", ImageSpec(channels=4))
