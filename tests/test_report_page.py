"""evaluate.py with label maps: segmentation scores of given pictures, and the page that shows them."""

import base64
import re
import unicodedata
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import blocky_labels, write_png
from test_evaluation import RANDOM, checkpoint, run  # noqa: F401 (fixtures)

from imaginaire_spade.errors import ConfigError, DataError
from imaginaire_spade.evaluation import segmentation
from imaginaire_spade.evaluation.images import StoredImages
from imaginaire_spade.evaluation.report import Protocol, Report, load_report, write_report_page
from imaginaire_spade.pretrained.segmenters import Segmenter

NAMES = ["sky", "<b>road</b> & path", "tree"]


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.sources, self.labels, self.text = [], [], [], ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        self.labels += [value for name, value in attributes if name == "aria-label"]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def scene(tmp_path):
    """Folders of label maps, photos of twice their size, generated pictures, and id maps "predicted" of both."""
    for number in range(5):
        key, rng = f"seq/{number:03}", np.random.default_rng(number)
        truth = blocky_labels(rng, 32, 48, 2)
        truth[:8, :8] = 255
        found = truth.copy()
        found[16:] = 2 - found[16:]  # the lower half: 0 is taken for 2, and 1 is found
        found[truth == 255] = 0
        for folder, array in (("seg_maps", truth), ("of_fake", found), ("of_real", np.where(truth == 255, 0, truth))):
            write_png(tmp_path / folder / f"{key}.png", array)
        write_png(tmp_path / "fake" / f"{key}.png", rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
        write_png(tmp_path / "real" / f"{key}.png", rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    table = {"data": {"labels": {"num_classes": 3, "ignore": [255], "names": NAMES}}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    return tmp_path


def flags(scene) -> list:
    return ["--real", scene / "real", "--fake", scene / "fake", "--reference_split", "val", "--metrics", "segmentation",
            "--predictions", scene / "of_fake", scene / "of_real", "--label_maps", scene / "seg_maps",
            "--label_table", scene / "table.yaml"]  # fmt: skip


def test_stored_id_maps_are_scored_and_shown(run, scene, capsys):  # noqa: F811
    report = run(*flags(scene), "--html", scene / "page.html")
    truths = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted((scene / "seg_maps").rglob("*.png"))]
    upper, whole = [np.concatenate([t[:n].ravel() for t in truths]) for n in (16, 32)]
    zeros, kept, ones = (whole == 0).sum(), (upper == 0).sum(), (whole == 1).sum()
    assert report.scores["miou_real"] == report.scores["pixel_accuracy_real"] == 1.0
    assert report.scores["pixel_accuracy"] == pytest.approx((kept + ones) / (zeros + ones))
    assert report.scores["miou"] == pytest.approx((kept / zeros + 1.0) / 2)  # class 2 never occurs in the label maps
    assert report.protocol.segmentation.startswith("id maps, ") and "left out" in report.protocol.ignore
    # Label maps whose names have a suffix of their own.
    for path in [*(scene / "seg_maps").rglob("*.png")]:
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    table = (scene / "table.yaml").read_text()
    (scene / "table.yaml").write_text(f"{table}  suffixes: {{seg_maps: _mask}}\n")
    whole_set = [scene if given == scene / "seg_maps" else given for given in flags(scene)]
    assert run(*whole_set).scores == report.scores
    details = report.details["segmentation"]
    assert details["absent_classes"] == ["tree"] and details["ignored_pixels"] == 5 * 64
    assert details["classes"][0]["mistaken_for"] == "tree"
    assert "miou_real: 1" in capsys.readouterr().out

    page = Page(scene / "page.html")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == len(page.sources) == 5 * 3 + 2  # the grid, and the one class behind the photos
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR) is not None
    text = (scene / "page.html").read_text()
    assert not re.search(r"https?:|url\(", text) and "default-src 'none'" in text
    assert page.tags.count("svg") == 2 and f'width="{100 * kept / zeros:.2f}%"' in text
    for part in (*NAMES[:2], "Never in the label maps: tree", "most often taken for", "seq/004", "id maps, "):
        assert part in page.text


def test_a_checkpoint_is_judged_beside_the_photos_of_its_label_maps(run, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    def scores(photo):
        levels = torch.from_numpy(photo.mean(2) // 52).long().clamp(max=4)
        return torch.nn.functional.one_hot(levels, 5).permute(2, 0, 1).float()

    monkeypatch.setattr(
        segmentation, "hugging_face_segmenter", lambda model, *_: Segmenter(tuple("abcde"), scores, model, "5" * 64)
    )
    given = ("--checkpoint", checkpoint(), "--metrics", "fid,segmentation", "--segmenter", "levels", *RANDOM)
    of_val = run(*given, "--html", tmp_path / "page.html")
    of_train = run(*given, "--reference_split", "train")
    for name in ("miou", "miou_real", "pixel_accuracy_real"):
        assert of_val.scores[name] == of_train.scores[name]  # whatever the reference of the other scores
    assert of_val.scores["random_feature_distance"] != of_train.scores["random_feature_distance"]
    assert of_val.details["segmentation"]["segmenter"] == "levels"
    assert f"sha256 {'5' * 64}" in of_val.protocol.segmentation
    assert Page(tmp_path / "page.html").tags.count("img") >= 5 * 3


def test_a_page_without_label_maps_shows_the_pictures(run, scene):  # noqa: F811
    pictures = ("--real", scene / "real", "--fake", scene / "fake", *RANDOM)
    run(*pictures, "--html", scene / "page.html")
    page = Page(scene / "page.html")
    assert page.tags.count("img") == 5 * 2 and "svg" not in page.tags
    assert "is an untrained network" in page.text and "random feature distance" in page.text


def test_a_class_that_real_photos_lack_has_a_dash(tmp_path):
    classes = [{"id": 0, "name": "sky", "share": 1.0, "iou": 0.5, "iou_real": float("nan"), "mistaken_for": None}]
    details = {"segmentation": {"classes": classes, "absent_classes": [], "unscored_classes": []}}
    protocol = Protocol("1.0.0", "val", "0" * 64, 2, 2, "8x8", "8x8", "PNG", "PNG")
    write_png(tmp_path / "fake/0.png", np.zeros((8, 8, 3), np.uint8))
    report = Report({"miou": 0.5}, protocol, {"fake": "<i>"}, details=details)
    write_report_page(tmp_path / "page.html", report, StoredImages(tmp_path / "fake"))
    page = Page(tmp_path / "page.html")
    assert "0.50 / –" in page.text and "Evaluation of <i>" in page.text
    assert page.labels == ["sky: IoU 0.500 generated, – real"] and 'class=tick x="' not in page.source


def test_a_damaged_label_map_of_stored_images_is_named_or_left_out_of_both_sides(run, scene):  # noqa: F811
    (scene / "seg_maps/seq/002.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"seg_maps/seq/002\.png: .*--skip_bad leaves such images out"):
        run(*flags(scene))
    report = run(*flags(scene), "--skip_bad")
    assert (report.protocol.num_fake, report.protocol.num_real, len(report.problems)) == (4, 4, 2)
    assert report.details["segmentation"]["pictures"] == 4 and report.scores["miou_real"] == 1.0


def test_names_of_pictures_and_label_maps_may_differ_in_their_normal_form(run, scene):  # noqa: F811
    expected = run(*flags(scene)).scores
    for number, folder in enumerate(("fake", "seg_maps", "real", "of_real", "of_fake")):
        name = unicodedata.normalize(("NFC", "NFD")[number % 2], "séq")
        (scene / folder / "seq").rename(scene / folder / name)
    assert run(*flags(scene)).scores == expected


def test_what_does_not_go_together_is_said(run, scene, tmp_path):  # noqa: F811
    given = flags(scene)
    for changed, message in (
        (given[:8], r"--metrics segmentation and --segmenter MODEL .* belong together"),
        ([*given[:6], "--metrics", "fid", *given[8:]], "belong together: write both or neither"),
        (given[:11], r"needs the label maps .* --label_maps DIR --label_table C\.yaml"),
        (given[:13], "--label_maps DIR and --label_table"),
        ([*given, "--segmenter_labels", "x.yaml"], r"--segmenter_labels says what .* that is missing"),
        ([*given[:-1], scene / "nowhere.yaml"], r"nowhere\.yaml: no such config file"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(*changed)
    (scene / "of_real/seq/003.png").unlink()
    with pytest.raises(DataError, match=r"of_real: no predicted id map for 1 of 5 samples, such as seq/003"):
        run(*given)
    (scene / "real/seq/002.png").unlink()
    with pytest.raises(DataError, match=r"real: no photo for 1 of the 5 images of .*fake, such as seq/002"):
        run(*given)
    (scene / "seg_maps/seq/001.png").unlink()
    with pytest.raises(DataError, match=r"seg_maps: no label map for 1 of the 5 images of .*fake, such as seq/001"):
        run(*given)
    (scene / "table.yaml").write_text("data: {labels: {num_clases: 3}}")
    with pytest.raises(ConfigError, match=r"table\.yaml:1: data\.labels\.num_clases: unknown key"):
        run(*given)


def test_reports_of_other_segmenters_are_not_compared(run, scene):  # noqa: F811
    run(*flags(scene))
    (scene / "report.json").rename(scene / "a.json")
    for path in (scene / "of_real").rglob("*.png"):
        write_png(path, np.zeros((32, 48), np.uint8))
    run(*flags(scene))
    assert load_report(scene / "a.json").scores["miou"] == load_report(scene / "report.json").scores["miou"]
    with pytest.raises(ValueError, match="segmentation: id maps"):
        run("--compare", str(scene / "a.json"), str(scene / "report.json"))
