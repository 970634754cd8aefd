"""Image files, contact sheets, curves and the gallery: what is drawn, and that files are complete or absent."""

import errno
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest

from imaginaire_spade.errors import UserError
from imaginaire_spade.files import write_image
from imaginaire_spade.inference import output as output_folder
from imaginaire_spade.inference.output import Output, write_gallery
from imaginaire_spade.labels import LabelSpec
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
