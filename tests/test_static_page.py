"""The painting page of static files: what the folder holds, its code in a browser, and a whole generator there."""

import base64
import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import blocky_labels, write_png
from PIL import Image
from test_export import shortened
from test_inference import TREE, changed, save

from imaginaire_spade import Synthesizer
from imaginaire_spade.commands import export_onnx as command_line
from imaginaire_spade.demo.static import RUNTIME, read_runtime, write_page
from imaginaire_spade.errors import ConfigError
from imaginaire_spade.export.generator import export_model
from imaginaire_spade.inference.model import Model
from imaginaire_spade.labels import edges_from_ids

NAMES = ["sky", "<b>sea</b>", "unreachable", "sand", "tree"]
PALETTE = [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [7, 8, 9]]
TABLE = {"num_classes": 5, "ignore": [255], "remap": {7: 1, 1: 0, 2: 0}, "names": NAMES, "palette": PALETTE}
RAW = np.array([0, 7, 0, 3, 4, 255], np.uint8)

STUB = """
export const env = { wasm: {} };
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
export const InferenceSession = { create: async () => ({ run: async ({ labels, edges, z }) => {
  globalThis.fed = { labels, edges, z };
  const [, height, width] = labels.dims, size = height * width;
  const value = (i) => labels.data[i % size] / 50 - 0.5 * Math.floor(i / size);
  const data = Float32Array.from({ length: 3 * size }, (_, i) => value(i));
  return { images: new Tensor("float32", data, [1, 3, height, width]) };
} }) };
"""
"""Stands in for onnxruntime-web: its images are functions of the labels."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "c.pt", changed(TREE, data__labels=TABLE))


def package(path: Path, runtime: str = STUB) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in RUNTIME:
            member = tarfile.TarInfo(f"package/dist/{name}")
            content = runtime.encode() if name == "ort.wasm.min.mjs" else b"..."
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "page"
    model = Model.load(checkpoint, for_inference=False)
    folder.mkdir()
    (folder / "some.onnx").write_bytes(b"no model")
    write_page(model, folder / "some.onnx", read_runtime(package(folder.parent / "stub.tgz")))
    return folder


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def opened(browser):
    """Opens a folder's page, served as any static host would, and waits for its first picture."""
    servers = []

    def open_page(folder: Path) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        # Below another folder: no path of the page may begin at the root.
        handler = functools.partial(QuietHandler, directory=folder.parent)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        browser.get(f"http://127.0.0.1:{servers[-1].server_port}/{folder.name}/")
        script = (
            "return document.querySelector('#result img').naturalWidth > 0 || !document.getElementById('error').hidden"
        )
        WebDriverWait(browser, 120, poll_frequency=0.1).until(lambda _: browser.execute_script(script))
        assert not browser.find_element("css selector", "#error").is_displayed()

    yield open_page
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(browser, body: str, *arguments: object):
    """Run code in the page, with its Server started; arguments that are bytes arrive as base64."""
    sent = [base64.b64encode(a).decode() if isinstance(a, bytes) else a for a in arguments]
    done, failed, value = browser.execute_async_script(
        "const args = [...arguments], done = args.pop(), bytes = (text) => Uint8Array.from(atob(text), (c) =>"
        " c.charCodeAt(0)), content = async (blob) => new Uint8Array(await blob.arrayBuffer()),"
        " text = async (blob) => btoa(String.fromCharCode(...(await content(blob))));"
        "(async () => { const { Server } = await import('./server.js');"
        f"const server = new Server(); await server.start(); {body} }})()"
        ".then((value) => done([true, '', value]), (error) => done([false, error.message, null]))", *sent
    )  # fmt: skip
    assert done, failed
    return value


def test_the_folder_holds_all_that_the_page_needs(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names > {"index.html", "main.js", "page.css", "png.js", "model.json", "some.onnx"}
    assert {name for name in names if "/" in name} == {f"onnxruntime/{name}" for name in RUNTIME}
    for path in folder.glob("*.js"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("import "):
                assert (folder / line.split('"')[1]).is_file(), line
    about = json.loads((folder / "model.json").read_text())
    assert about["inputs"] == ["labels", "edges", "z"] and about["file"] == "some.onnx"
    assert about["train_ids"] == {"0": 0, "1": 0, "2": 0, "3": 3, "4": 4, "7": 1, "255": 5}
    assert [one["id"] for one in about["classes"]] == [0, 1, 3, 4, 5]
    # The factors by which the generator shrinks a label map are powers of two at every size that the page offers: ONNX
    # Runtime's nearest resizing goes wrong at 7, 13, 14, 15.
    step = about["size_multiple"]
    assert step & (step - 1) == 0 and all(side % step == 0 for size in about["sizes"] for side in size)


def test_what_cannot_become_a_page_is_refused_before_the_export(checkpoint, tmp_path, monkeypatch):
    def export(checkpoint: Path, output: str, page: Path) -> None:
        flags = ["--checkpoint", checkpoint, "--output", tmp_path / output, "--page", page]
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, flags)])
        command_line.main()

    good = package(tmp_path / "good.tgz")
    with pytest.raises(ConfigError, match=r"browsers run ONNX: write --output FOLDER/model\.onnx"):
        export(checkpoint, "m.pt2", good)
    (tmp_path / "text.tgz").write_text("no archive")
    with tarfile.open(tmp_path / "other.tgz", "w:gz"):
        pass
    for wrong in ("none.tgz", "text.tgz", "other.tgz"):
        with pytest.raises(ConfigError, match=rf"{wrong}: not the npm package onnxruntime-web .*; npm pack onnx"):
            export(checkpoint, "m.onnx", tmp_path / wrong)
    tree = changed(TREE, gen__norm={"type": "clade_icpe"}, data__labels=TABLE)
    with pytest.raises(ConfigError, match=r"takes distances \(CLADE-ICPE\).*the page cannot\s+paint that"):
        export(save(tmp_path / "icpe.pt", tree), "m.onnx", good)
    assert not (tmp_path / "m.onnx").exists()


def test_label_map_files_in_the_page(browser, opened, folder, tmp_path):
    opened(folder)
    labels = blocky_labels(np.random.default_rng(0), 21, 35, 6)
    raw = RAW[labels]
    palette = np.zeros((256, 3), np.uint8)
    palette[RAW] = [*PALETTE, [0, 0, 0]]
    palette[0] = PALETTE[0]
    indexed = Image.fromarray(raw)
    indexed.putpalette(palette.tobytes())
    expected = np.where(labels == 2, 0, labels)
    few = np.where(np.isin(expected, (1, 5)), 0, expected)
    four_bits = Image.fromarray(few)
    four_bits.putpalette(palette[:16].tobytes())
    files = [(Image.fromarray(raw), expected), (indexed, expected), (Image.fromarray(raw.astype(np.uint16)), expected),
             (Image.fromarray(palette[raw]), expected), (four_bits, few)]  # fmt: skip
    for number, (image, train_ids) in enumerate(files):
        stream = io.BytesIO()
        image.save(stream, "PNG", **({"bits": 4} if number == 4 else {}))
        found = ask(browser, "const { ids, ...size } = await server.openMap(new File([bytes(args[0])], 'a.png'));"
                             "return [[...ids], size]", stream.getvalue())  # fmt: skip
        assert found[1] == {"height": 21, "width": 35, "original_size": [21, 35]}, number
        np.testing.assert_array_equal(np.reshape(found[0], (21, 35)), train_ids)
    filtered = cv2.imencode(".png", palette[raw][..., ::-1], [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH])[1]
    found = ask(
        browser, "return [...(await server.openMap(new File([bytes(args[0])], 'a.png'))).ids]", filtered.tobytes()
    )
    np.testing.assert_array_equal(np.reshape(found, (21, 35)), expected)
    saved = ask(browser, "const { height, width, ids } = await server.openMap(new File([bytes(args[0])], 'a.png'));"
                         "return text(await server.mapFile({ height, width, ids }))", stream.getvalue())  # fmt: skip
    written = Image.open(io.BytesIO(base64.b64decode(saved)))
    assert written.mode == "P"
    np.testing.assert_array_equal(np.asarray(written), RAW[few])
    np.testing.assert_array_equal(np.asarray(written.convert("RGB")), palette[RAW[few]])
    wrong = cv2.imencode(".png", np.full((4, 4), 99, np.uint8))[1].tobytes()
    for content, words in ((wrong, "label value(s) 99"), (b"GIF89a", "no PNG"), (wrong[:60], "damaged")):
        with pytest.raises(AssertionError, match=f"b.png cannot be opened as a label map. .*{words.partition('(')[0]}"):
            ask(browser, "return server.openMap(new File([bytes(args[0])], 'b.png'))", content)


def test_what_the_generator_is_given_in_the_page(browser, opened, folder):
    opened(folder)
    labels = np.where((made := blocky_labels(np.random.default_rng(1), 70, 90, 6)) == 2, 0, made)
    fed = ask(
        browser,
        "const made = await server.generate({ height: 70, width: 90, ids: Uint8Array.from(args[0]) }, { seed: 3 });"
        "const { labels, edges, z } = globalThis.fed;"
        "return [labels.dims, [...labels.data], [...edges.data], [...z.data], made.height, made.width,"
        " await text(made.file)]",
        labels.ravel().tolist(),
    )
    assert fed[0] == [1, 96, 96] and fed[4:6] == [70, 90]
    padded = np.full((96, 96), 5)
    padded[:70, :90] = labels
    np.testing.assert_array_equal(np.reshape(fed[1], (96, 96)), padded)
    np.testing.assert_array_equal(np.reshape(fed[2], (96, 96))[:70, :90], edges_from_ids(labels))
    assert not np.reshape(fed[2], (96, 96))[70:].any() and len(fed[3]) == 4
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(fed[6]))).convert("RGB"))
    expected = np.round((labels[..., None] / 50 - [0, 0.5, 1] + 1) * 127.5)
    assert shown.shape == (70, 90, 3) and np.abs(shown - expected).max() <= 1
    # Far from the trained size it is generated at that, and shown at the canvas's.
    far = ask(
        browser,
        "const made = await server.generate({ height: 128, width: 64, ids: new Uint8Array(8192) }, { seed: 3 });"
        "return [made.height, made.width, globalThis.fed.labels.dims, await text(made.file)]",
    )
    assert far[:3] == [64, 64, [1, 64, 64]]
    assert Image.open(io.BytesIO(base64.b64decode(far[3]))).size == (64, 128)


@pytest.mark.slow
def test_a_whole_generator_in_a_browser(browser, opened, checkpoint, tmp_path):
    """The picture that the page shows of a label map is the Synthesizer's."""
    from selenium.webdriver.support.ui import WebDriverWait

    if (npm := shutil.which("npm")) is None:
        pytest.skip("no npm, which fetches onnxruntime-web")
    fetched = subprocess.run([npm, "pack", "onnxruntime-web@1.30.0"], cwd=tmp_path, capture_output=True, text=True,
                             timeout=240, check=False)  # fmt: skip
    if fetched.returncode:
        pytest.skip(f"npm pack onnxruntime-web: {fetched.stderr[-200:]}")
    model = shortened(Model.load(checkpoint, for_inference=False))
    page = tmp_path / "page"
    export_model(model, page / "model.onnx", lambda name, difference: None)
    write_page(model, page / "model.onnx", read_runtime(next(tmp_path.glob("*.tgz"))))
    opened(page)
    train_ids = blocky_labels(np.random.default_rng(3), 64, 64, 6)
    train_ids[train_ids == 2] = 0
    before = browser.execute_script("return document.querySelector('#result img').src")
    browser.find_element("css selector", "#open").send_keys(str(write_png(tmp_path / "map.png", RAW[train_ids])))
    script = (
        "return document.querySelector('#result img').src !== arguments[0] && document.getElementById('busy').hidden"
    )
    WebDriverWait(browser, 120, poll_frequency=0.1).until(lambda _: browser.execute_script(script, before))
    shown, z = ask(
        browser,
        "const { src } = document.querySelector('#result img');"
        "return [await text(await (await fetch(src)).blob()), server.styleOfSeed(0)]",
    )
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert("RGB")).astype(int)
    expected = Synthesizer(model)(RAW[train_ids], style=np.array(z, np.float32))
    assert expected.std() > 2 and np.abs(picture - expected).max() <= 1
