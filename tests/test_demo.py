"""The painting page: its requests and their limits over HTTP, and one round in a real browser."""

import base64
import http.client
import io
import json
import re
import socket
import struct
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import blocky_labels, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_inference import TREE, changed, save

from imaginaire_spade import Synthesizer
from imaginaire_spade.data.dataset import LabelMapDataset
from imaginaire_spade.demo import __main__ as command_line
from imaginaire_spade.demo.server import HEADERS, MAX_JSON_BYTES, MAX_UPLOAD_BYTES, PAGE_FILES, PaintingServer
from imaginaire_spade.demo.service import (
    MAX_CANVAS_PIXELS,
    MAX_JOBS,
    MAX_SIDE,
    Budget,
    BusyError,
    PaintingService,
    _raw_ids,
    shrink,
)
from imaginaire_spade.errors import CheckpointError, ConfigError, DataError
from imaginaire_spade.files import resize_image
from imaginaire_spade.labels import LabelSpec

# Raw ids are not train ids here: 7 means class 1, 255 "don't care", and no id means class 2.
NAMES = ["sky", "<img src=x onerror=alert(1)>", "unreachable", "sea & sand", "tree"]
PALETTE = [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [7, 8, 9]]
TABLE = {"num_classes": 5, "ignore": [255], "remap": {7: 1, 1: 0, 2: 0}, "names": NAMES, "palette": PALETTE}
RAW = {0: 0, 1: 7, 3: 3, 4: 4, 5: 255}
SIZE = (64, 64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """With style code, encoder and edges."""
    return save(tmp_path_factory.mktemp("checkpoints") / "styled.pt", changed(TREE, data__labels=TABLE))


@pytest.fixture(scope="module")
def synthesizer(checkpoint) -> Synthesizer:
    return Synthesizer.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Synthesizer:
    """Without style code, encoder and edges."""
    tree = changed(TREE, gen__style_dims=0, encoder=None, data__edges="none")
    return Synthesizer.load(save(tmp_path_factory.mktemp("checkpoints") / "plain.pt", tree), device="cpu")


@pytest.fixture(scope="module")
def oasis(tmp_path_factory) -> Synthesizer:
    """Takes noise in parts of an image."""
    gen = {"type": "oasis", "num_filters": 2, "style_dims": 4, "norm": {"type": "spade", "hidden_channels": 8}}
    tree = changed(TREE, gen=gen, encoder=None, data__edges="none", data__labels__palette=PALETTE)
    return Synthesizer.load(save(tmp_path_factory.mktemp("checkpoints") / "oasis.pt", tree), device="cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for number in range(2):
        labels = blocky_labels(np.random.default_rng(number), 48, 80, 4)
        write_png(folder / f"{number}.png", np.where(labels == 2, 7, labels).astype(np.uint8))
    return folder


class Client:
    """Requests to a server; the server stops when the test module is done."""

    def __init__(self, service: PaintingService) -> None:
        self.server = PaintingServer(service, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            given = {"Content-Length": str(len(body))} if body or method == "POST" else {}
            for name, value in (given | {key.replace("_", "-"): value for key, value in headers.items()}).items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, path: str, fields: object) -> tuple[int, bytes]:
        status, _, content = self.ask("POST", path, json.dumps(fields).encode(), Content_Type="application/json")
        return status, content

    def send(self, path: str, content: bytes) -> tuple[int, bytes]:
        status, _, answer = self.ask("POST", path, content, Content_Type="application/octet-stream")
        return status, answer


@pytest.fixture(scope="module")
def client(synthesizer, samples):
    client = Client(PaintingService(synthesizer, "a <name>", LabelMapDataset(str(samples), synthesizer.labels,
                                                                             with_images=False)))  # fmt: skip
    yield client
    client.stop()


@pytest.fixture(scope="module")
def plain_client(plain):
    client = Client(PaintingService(plain, "plain"))
    yield client
    client.stop()


def fields_of(train_ids: np.ndarray, **more: object) -> dict[str, object]:
    labels = base64.b64encode(train_ids.tobytes()).decode()
    return {"height": train_ids.shape[0], "width": train_ids.shape[1], "labels": labels, **more}


def map_of(answer: bytes) -> np.ndarray:
    fields = json.loads(answer)
    return np.frombuffer(base64.b64decode(fields["labels"]), np.uint8).reshape(fields["height"], fields["width"])


def decoded(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]


def file_of(array: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, array[..., ::-1] if array.ndim == 3 else array)[1].tobytes()


def some_map(seed: int = 0, height: int = 64, width: int = 64) -> np.ndarray:
    """Train ids that the table has."""
    return np.array([0, 1, 3, 4, 5], np.uint8)[blocky_labels(np.random.default_rng(seed), height, width, 5)]


def as_raw(train_ids: np.ndarray) -> np.ndarray:
    return np.array([RAW.get(i, 0) for i in range(6)], np.uint8)[train_ids]


# ------------------------------------------------------------------------------------------------ what is promised


def test_the_page_its_files_and_the_model(client):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for path, name in PAGE_FILES.items():
        content_type = f"{types[Path(name).suffix]}; charset=utf-8"
        status, headers, content = client.ask("GET", path)
        assert status == 200 and headers["Content-Type"] == content_type and len(content) > 500, name
        assert HEADERS.items() <= dict(headers).items()
    page = Path(command_line.__file__).parent / "page"
    assert {path.name for path in page.iterdir()} == set(PAGE_FILES.values())
    status, headers, content = client.ask("GET", "/api/model")
    model = json.loads(content)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert model["sizes"] == [[64, 64], [128, 128], [256, 256], [512, 512]] and model["trained_size"] == [64, 64]
    assert model["style_dims"] == 4 and model["has_style_encoder"] and model["num_samples"] == 2
    # A class that no raw id means can neither be trained nor saved: it is not offered.
    assert [one["id"] for one in model["classes"]] == [0, 1, 3, 4, 5]
    assert model["classes"][1] == {"id": 1, "name": NAMES[1], "colour": PALETTE[1]}
    assert model["classes"][4]["name"] == "don't care" and model["dont_care"] == 5


def test_a_picture_is_the_synthesizers(client, plain_client, synthesizer, plain):
    for shape in ((64, 64), (33, 50), (1, 1)):
        train_ids = some_map(1, *shape)
        status, content = client.post("/api/picture", fields_of(train_ids, seed=5))
        assert status == 200
        np.testing.assert_array_equal(decoded(content), synthesizer(as_raw(train_ids), seed=5, resize_back=True))
        assert decoded(content).shape == (*shape, 3)
    other = client.post("/api/picture", fields_of(train_ids, seed=6))[1]
    assert (decoded(other) != decoded(content)).any()
    status, content = plain_client.post("/api/picture", fields_of(np.full(SIZE, 3, np.uint8)))
    assert status == 200
    np.testing.assert_array_equal(decoded(content), plain(np.full(SIZE, 3, np.uint8)))


def test_a_canvas_far_from_the_trained_size_is_generated_at_that_and_resized_back(client, synthesizer):
    for shape, made in ((SIZE, SIZE), ((96, 64), (96, 64)), ((97, 64), SIZE), ((256, 256), SIZE)):
        fields = fields_of(some_map(1, *shape), seed=5)
        _, headers, content = client.ask("POST", "/api/picture", json.dumps(fields).encode(),
                                         Content_Type="application/json")  # fmt: skip
        assert headers["Generated-Size"] == f"{made[0]}x{made[1]}" and decoded(content).shape == (*shape, 3)
    train_ids = some_map(1, 128, 128)
    for size, made in (("own", (128, 128)), ("trained", SIZE), ("32x96", (32, 96))):
        service = PaintingService(Synthesizer(synthesizer.model, size=size), "a model")
        service.warm_up()
        fields = fields_of(train_ids, seed=5)
        assert service.generated_size(fields) == made
        expected = resize_image(synthesizer(as_raw(train_ids), seed=5, size=made), 128, 128)
        np.testing.assert_array_equal(decoded(service.generate(fields)), expected)


def test_the_style_of_a_photo(client, synthesizer):
    photo = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    status, answer = client.send("/api/style", file_of(photo))
    assert status == 200
    np.testing.assert_allclose(json.loads(answer)["style"], synthesizer.encode(photo))
    train_ids = some_map()
    status, content = client.post("/api/picture", fields_of(train_ids, **json.loads(answer)))
    np.testing.assert_array_equal(decoded(content), synthesizer(as_raw(train_ids), style=photo))


def test_a_saved_label_map_opens_again(client):
    train_ids = some_map(3)
    status, content = client.post("/api/label_map_file", fields_of(train_ids))
    image = Image.open(io.BytesIO(content))
    assert status == 200 and image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), as_raw(train_ids))  # ids as the data set's files have them
    colours = np.array([*PALETTE, [0, 0, 0]], np.uint8)[train_ids]
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colours)
    for file in (content, file_of(as_raw(train_ids)), file_of(colours)):
        status, answer = client.send("/api/label_map", file)
        assert status == 200
        np.testing.assert_array_equal(map_of(answer), train_ids)


def test_ids_of_two_bytes(tmp_path):
    tree = changed(TREE, data__labels={"num_classes": 300}, gen__style_dims=0, encoder=None, data__edges="none")
    service = PaintingService(Synthesizer.load(save(tmp_path / "many.pt", tree), device="cpu"), "many")
    assert service.describe()["bytes_per_id"] == 2
    train_ids = np.arange(64 * 64, dtype="<u2").reshape(SIZE) % 300
    file = service.encode_label_map(fields_of(train_ids))
    assert np.asarray(Image.open(io.BytesIO(file))).max() == 299
    again = service.read_label_map(file)
    assert base64.b64decode(again["labels"]) == train_ids.tobytes()
    assert decoded(service.generate(fields_of(train_ids))).shape == (*SIZE, 3)
    with pytest.raises(DataError, match="ids 300, which are no class"):
        service.generate(fields_of(np.full(SIZE, 300, "<u2")))


def test_samples_come_whole(client, samples):
    for number in (0, 1, 2):  # counted round
        status, _, answer = client.ask("GET", f"/api/sample?number={number}")
        stored = cv2.imread(str(samples / f"{number % 2}.png"), cv2.IMREAD_UNCHANGED)
        assert status == 200
        np.testing.assert_array_equal(as_raw(map_of(answer)), np.where(stored == 1, 0, stored))
        assert json.loads(answer)["original_size"] == [48, 80]


def test_a_label_map_opens_in_its_own_shape(client):
    wide = some_map(2, 37, 90)
    answer = json.loads(client.send(UPLOAD, file_of(as_raw(wide)))[1])
    assert (answer["height"], answer["width"], answer["original_size"]) == (37, 90, [37, 90])
    # One that no canvas holds is shrunk, and nothing is cut off.
    large = np.zeros((1024, 4096), np.uint8)
    large[:, -4:], large[-2:] = 3, 4
    answer = client.send(UPLOAD, file_of(as_raw(large)))[1]
    assert json.loads(answer)["original_size"] == [1024, 4096]
    np.testing.assert_array_equal(map_of(answer), large[::2, ::2])
    assert client.post(PICTURE, fields_of(map_of(answer), seed=0))[0] == 200


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_a_shrunk_map_fits_the_canvas_and_keeps_its_borders_and_proportions(height, width):
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    row, column = (
        shrink(np.broadcast_to(rows, (height, width)))[:, 0],
        shrink(np.broadcast_to(columns, (height, width)))[0],
    )
    size = len(row), len(column)
    assert max(size) <= MAX_SIDE and size[0] * size[1] <= MAX_CANVAS_PIXELS
    if height <= MAX_SIDE >= width and height * width <= MAX_CANVAS_PIXELS:
        assert size == (height, width)
    steps = height / size[0], width / size[1]
    assert abs(steps[0] - steps[1]) <= max(steps) / min(size)
    for places, length, step in zip((row, column), (height, width), steps, strict=True):
        assert (np.diff(places) > 0).all() and places[0] <= step / 2 and length - 1 - places[-1] <= step / 2


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_raw_ids_are_the_tables_inverse(data):
    count = data.draw(st.integers(1, 300))
    raw = st.integers(0, 400)
    ignore = data.draw(st.sets(raw, max_size=5))
    remap = data.draw(st.dictionaries(raw.filter(lambda i: i not in ignore), st.integers(0, count - 1), max_size=9))
    spec = LabelSpec(num_classes=count, ignore=tuple(ignore), remap=remap)
    raw_ids = _raw_ids(spec)
    meant, smallest = np.unique(spec.table, return_index=True)
    expected = np.full(count + 1, -1)
    valid = (meant >= 0) & (meant <= count)
    expected[meant[valid]] = smallest[valid]
    np.testing.assert_array_equal(raw_ids, expected)


# ------------------------------------------------------------------------------------------------ bad input

PICTURE, UPLOAD = "/api/picture", "/api/label_map"
GOOD = fields_of(np.zeros(SIZE, np.uint8), seed=1)
JSON, FILE = {"Content_Type": "application/json"}, {"Content_Type": "application/octet-stream"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**GOOD, "labels": "%%%"}, "labels: not base64"),
        ({**GOOD, "labels": None}, "labels: not base64"),
        ({**GOOD, "height": 63}, "4096 bytes; 63 x 64 ids take 4032"),
        ({**GOOD, "height": 64.0}, "height: a whole number from 1 to 2048"),
        ({**GOOD, "height": 2048, "width": 2048}, "2048 x 2048 pixels; at most 2097152"),
        ({**GOOD, "height": True}, "height: a whole number"),
        ({**GOOD, "width": 0}, "width: a whole number from 1"),
        ({**GOOD, "width": 10**30}, "width: a whole number"),
        (fields_of(np.full(SIZE, 2, np.uint8)), "ids 2, which are no class"),
        (fields_of(np.full(SIZE, 200, np.uint8)), "ids 200, which are no class"),
        ({**GOOD, "seed": -1}, "seed: a whole number"),
        ({**GOOD, "seed": "1"}, "seed: a whole number"),
        ({**GOOD, "style": [0, 0, 0]}, "style: 4 numbers"),
        ({**GOOD, "style": [0, 0, 0, "0"]}, "style: 4 numbers"),
        ({**GOOD, "style": [0, 0, 0, float("nan")]}, "style: 4 numbers"),
        ({**GOOD, "style": [0, 0, 0, 1e30]}, "style: 4 numbers"),
        ({**GOOD, "style": "0000"}, "style: 4 numbers"),
        ({**GOOD, "path": "/etc/passwd"}, "the request has path"),
        ({"height": 64}, "the request lacks labels, width"),
        ([GOOD], "not a JSON object"),
        ("text", "not a JSON object"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(client, fields, words):
    status, content = client.post(PICTURE, fields)
    assert status == 400 and words in json.loads(content)["error"]


def test_a_model_without_style_or_samples_says_so(plain_client):
    status, content = plain_client.post(PICTURE, GOOD)
    assert status == 400 and "seed, which this model does not take" in json.loads(content)["error"]
    status, content = plain_client.send("/api/style", file_of(np.zeros((8, 8, 3), np.uint8)))
    assert status == 400 and "without a style encoder" in json.loads(content)["error"]
    status, _, content = plain_client.ask("GET", "/api/sample?number=0")
    assert status == 400 and "--samples" in json.loads(content)["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("GET", "/nothing", b"", {}, 404, "no such page"),
        ("GET", "/../server.py", b"", {}, 404, "no such page"),
        ("GET", "/page.css/../../server.py", b"", {}, 404, "no such page"),
        ("GET", PICTURE, b"", {}, 405, "POST is wanted"),
        ("POST", "/", b"{}", JSON, 405, "GET is wanted"),
        ("PUT", PICTURE, b"{}", JSON, 501, "Unsupported method"),
        ("OPTIONS", PICTURE, b"", {}, 501, "Unsupported method"),  # a foreign page asking for leave
        ("POST", PICTURE, b"{", JSON, 400, "not JSON"),
        ("POST", PICTURE, b"\xff\xfe", JSON, 400, "not JSON"),
        ("POST", PICTURE, b"[" * 100_000, JSON, 400, "not JSON"),
        ("POST", PICTURE, b"[" + b"[]," * 10_000 + b"[]]", JSON, 400, "not JSON, or not such as the page sends"),
        ("POST", PICTURE, b"{}", {"Content_Type": "text/plain"}, 415, "application/json is wanted"),
        ("POST", PICTURE, b"{}", {}, 415, "application/json is wanted"),
        ("POST", PICTURE, b"", {**JSON, "Content_Length": str(MAX_JSON_BYTES + 1)}, 413, "at most 6 MiB"),
        ("POST", UPLOAD, b"", {**FILE, "Content_Length": str(MAX_UPLOAD_BYTES + 1)}, 413, "at most 32 MiB"),
        ("POST", UPLOAD, b"", {**FILE, "Content_Length": "9" * 5000}, 413, "at most 32 MiB"),
        ("POST", UPLOAD, b"", {**FILE, "Content_Length": "-1"}, 400, "no number"),
        ("POST", UPLOAD, b"", {**FILE, "Content_Length": "²"}, 400, "no number"),
        ("POST", UPLOAD, b"0\r\n\r\n", {**FILE, "Transfer_Encoding": "chunked"}, 411, "Content-Length"),
        ("POST", UPLOAD, b"<html>", {"Content_Type": "text/html"}, 415, "not text/html"),
        ("POST", UPLOAD, b"", FILE, 400, "empty"),
        ("POST", UPLOAD, b"no image", FILE, 400, "not readable as an image"),
        ("POST", UPLOAD, file_of(np.zeros((8, 8, 3), np.uint8), ".jpg"), FILE, 400, "JPEG"),
        ("POST", UPLOAD, file_of(np.full((8, 8), 99, np.uint8)), FILE, 400, "label value(s) 99"),
        ("POST", UPLOAD, file_of(np.full((8, 8, 3), 9, np.uint8)), FILE, 400, "colour(s)"),
        ("POST", UPLOAD, file_of(np.zeros((8, 8), np.uint8))[:60], FILE, 400, "not readable"),
        ("POST", UPLOAD, b"GIF89a" + bytes(50), FILE, 400, "PNG, JPEG, WebP, TIFF and BMP"),
        ("POST", UPLOAD, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", FILE, 400, "PNG, JPEG, WebP"),
        ("POST", UPLOAD, b"PK\x05\x06" + bytes(50), FILE, 400, "PNG, JPEG, WebP"),
        ("POST", "/api/style", b"no image", FILE, 400, "not readable as an image"),
        ("GET", "/api/sample?number=1&path=/etc", b"", {}, 400, "whole numbers number"),
        ("GET", "/api/sample?number=1e9", b"", {}, 400, "whole numbers"),
        ("GET", "/api/sample?number=-4", b"", {}, 400, "whole numbers"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_in_words(client, method, path, body, headers, status, words):
    got, answered, content = client.ask(method, path, body, **headers)
    assert (got, answered["Content-Type"]) == (status, "application/json")
    assert words in json.loads(content)["error"]
    assert HEADERS.items() <= dict(answered).items()


def test_a_picture_that_promises_too_many_pixels_is_not_decoded(client):
    for side, words in ((8000, "at most 50 million"), (2**30, "pixels by its header")):
        header = bytearray(file_of(np.zeros((8, 8), np.uint8)))
        header[16:24] = side.to_bytes(4, "big") * 2
        status, content = client.send(UPLOAD, bytes(header))
        assert status == 400 and words in json.loads(content)["error"]
        assert client.send("/api/style", bytes(header))[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:9999"}, 200),  # a forwarded port
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "192.168.0.7:7860"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "[::1]evil.example"}, 403),
        ({"Host": "evil.example@localhost"}, 403),
        ({"Host": "localhost:abc"}, 403),
        ({"Host": "localhost:70000"}, 403),
        ({"Host": "localhost/evil.example"}, 403),
        ({"Host": "localhost?evil.example"}, 403),
        ({"Host": "localhost#evil.example"}, 403),
        ({"Host": "localhost evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "LocalHost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "https://localhost:1"}, 200),  # a server with TLS in front
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": ""}, 403),
        ({"Host": "localhost:1", "Origin": "http://["}, 403),
        ({"Host": "localhost:1", "Origin": "http://[::1"}, 403),
        ({"Host": "localhost:1", "Origin": "ftp://localhost:1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1/"}, 403),
        ({"Host": "localhost:1", "Origin": "http://evil.example@localhost:1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1 http://localhost:2"}, 403),
    ],
)
def test_pages_from_elsewhere_are_refused(client, headers, status):
    assert client.ask("GET", "/", **headers)[0] == status
    body = json.dumps(GOOD).encode()
    assert client.ask("POST", PICTURE, body, **JSON, **headers)[0] == status


def test_after_a_refusal_the_connection_is_closed_and_the_server_goes_on(client):
    # The refused body is a request in itself: it must not be answered.
    inner = b"GET /api/model HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = f"POST /api/picture HTTP/1.1\r\nHost: evil.example\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
    for request in (head + inner, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=30) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))
        assert b" 403 " in answer.partition(b"\r\n")[0]
        assert answer.count(b"Content-Security-Policy") == 1 and b"num_samples" not in answer
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=30) as connection:
        connection.sendall(b"POST /api/picture HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100\r\n\r\n{")  # fmt: skip
    assert client.ask("GET", "/")[0] == 200


@pytest.mark.parametrize("line", [b"no colon", b"x y: z", b" leading", b"\rno colon"])
def test_headers_that_are_none_hide_no_others(client, line):
    # Headers end there for the standard library: it would not see the foreign origin.
    request = b"GET /api/model HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\nOrigin: http://evil.example\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.partition(b"\r\n")[0].split()[1] in (b"400", b"403")


def test_a_server_for_others_answers_to_any_name_but_not_to_pages_of_other_origins(plain):
    server = PaintingServer(PaintingService(plain, "plain"), "0.0.0.0", 0)
    server.server_close()
    assert not server.local_only and server.url.startswith("http://0.0.0.0:")
    for host in ("127.0.0.1", "localhost", "127.8.8.8"):
        server = PaintingServer(PaintingService(plain, "plain"), host, 0)
        server.server_close()
        assert server.local_only


def test_an_address_that_cannot_be_had(client, plain):
    service = PaintingService(plain, "plain")
    taken = client.server.server_port
    for host, port, words in (
        ("127.0.0.1", taken, f"--port {taken}: taken by another program.*write --port {taken + 1}"),
        ("127.0.0.1", 70000, "--port 70000: ports are 0 to 65535"),
        ("no.such.host.invalid", 0, "--host no.such.host.invalid: cannot listen"),
        ("192.0.2.1", 0, "--host 192.0.2.1: cannot listen"),
    ):
        with pytest.raises(ConfigError, match=words):
            PaintingServer(service, host, port)


# ------------------------------------------------------------------------------------------------ under load


class Slow:
    """A synthesizer that waits to be let go, and counts how many callers are in it."""

    def __init__(self, synthesizer: Synthesizer) -> None:
        self._synthesizer = synthesizer
        self.inside, self.most = 0, 0
        self.go = threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._synthesizer, name)

    def __call__(self, *_: object, **__: object) -> np.ndarray:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.go.wait(30)
        self.inside -= 1
        return np.zeros((*SIZE, 3), np.uint8)


def test_one_picture_at_a_time_and_no_endless_queue(synthesizer):
    slow = Slow(synthesizer)
    client = Client(PaintingService(slow, "slow"))  # type: ignore[arg-type]
    try:
        with ThreadPoolExecutor(MAX_JOBS + 1) as pool:
            answers = [pool.submit(client.post, PICTURE, GOOD) for _ in range(MAX_JOBS + 1)]
            first = next(as_completed(answers, timeout=60)).result()
            assert first[0] == 503 and "try again" in json.loads(first[1])["error"]
            assert client.ask("GET", "/api/model")[0] == 200  # the page itself does not wait
            slow.go.set()
            assert sorted(answer.result()[0] for answer in answers) == [200] * MAX_JOBS + [503]
        assert slow.most == 1 and client.post(PICTURE, GOOD)[0] == 200
    finally:
        slow.go.set()
        client.stop()


def big_png(side: int, times: int = 1) -> bytes:
    """An RGB label map of ``side`` squared pixels in a few bytes; its first header says: that much smaller."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    headers = [chunk(b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0)) for n in sorted({side // times, side})]
    row, pack = b"\0" + bytes(PALETTE[3]) * side, zlib.compressobj(1)
    pixels = b"".join(pack.compress(row) for _ in range(side)) + pack.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(headers) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def memory(key: str) -> int:
    """MiB of this process now (VmRSS), or at most since the last time that it was asked for (VmHWM)."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) >> 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_ten_hostile_uploads_take_no_more_memory_than_one(client):
    upload = big_png(7000)
    assert len(upload) < 2**20
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(lambda _: client.send(UPLOAD, upload), range(10))]
    assert memory("VmHWM") - before < 1500
    assert {status for status, _ in answers} == {200, 503}
    np.testing.assert_array_equal(map_of(next(a for status, a in answers if status == 200)), np.full((1448, 1448), 3))


def test_memory_is_counted_before_a_file_is_decoded(client, monkeypatch):
    service = client.server.service
    monkeypatch.setattr(service, "budget", Budget(num_bytes=10**6))
    status, answer = client.send(UPLOAD, big_png(300))
    assert status == 400 and "300 x 300 pixels of 3 bytes; at most 0 million" in json.loads(answer)["error"]
    monkeypatch.setattr(service, "budget", Budget(num_bytes=4 * 10**6))
    with service.budget.take(3 * 10**6):
        status, headers, answer = client.ask("POST", UPLOAD, big_png(300), **FILE)
    assert status == 503 and headers["Retry-After"] == "2" and "try again" in json.loads(answer)["error"]
    assert client.send(UPLOAD, big_png(300))[0] == 200
    # PIL decodes what the second header of a PNG says.
    assert "contradict" in json.loads(client.send(UPLOAD, big_png(500, times=50))[1])["error"]
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 322: 2**14, 323: 2**14, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert "tiles of 16384" in json.loads(client.send(UPLOAD, tiff)[1])["error"]
    # What is held is given back, whatever happens.
    client.send(UPLOAD, b"")
    with service.budget.take(4 * 10**6, jobs=MAX_JOBS), pytest.raises(BusyError), service.budget.take(0, jobs=1):
        pass


def test_a_hundred_requests_at_once_are_all_answered(synthesizer):
    slow = Slow(synthesizer)
    client = Client(PaintingService(slow, "slow"))  # type: ignore[arg-type]
    content = bytes(2**20)
    try:
        with ThreadPoolExecutor(100) as pool:
            asked = [pool.submit(client.post, PICTURE, GOOD) for _ in range(60)]
            asked += [pool.submit(client.send, "/api/style", content) for _ in range(40)]
            done = as_completed(asked, timeout=60)
            statuses = Counter(
                next(done).result()[0] for _ in range(100 - MAX_JOBS)
            )  # the others wait for the generator
            slow.go.set()
            statuses += Counter(answer.result()[0] for answer in done)
    finally:
        slow.go.set()
        client.stop()
    assert statuses.total() == 100 and statuses.keys() <= {200, 400, 503} and statuses[503] > 50


def test_an_unfinished_upload_holds_its_memory(client, monkeypatch):
    monkeypatch.setattr(client.server.service, "budget", Budget(num_bytes=10**6))
    head = f"POST {UPLOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 450000\r\n\r\n"
    good = file_of(np.zeros((8, 8), np.uint8)) + bytes(60_000)
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=30) as connection:
        connection.sendall(head.encode() + b"x")
        while client.send(UPLOAD, good)[0] != 503:
            pass
    while client.send(UPLOAD, good)[0] != 200:  # that client went away
        pass


def test_a_fault_of_ours_is_not_told_in_detail(synthesizer, capsys):
    slow = Slow(synthesizer)
    slow.go = None  # type: ignore[assignment]
    client = Client(PaintingService(slow, "faulty"))  # type: ignore[arg-type]
    try:
        status, content = client.post(PICTURE, GOOD)
    finally:
        client.stop()
    assert status == 500 and "NoneType" not in content.decode() and "terminal" in content.decode()
    assert "AttributeError" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def start(monkeypatch):
    """The command line up to the moment it waits for requests; there Ctrl-C comes."""

    def interrupted(server: PaintingServer) -> None:
        raise KeyboardInterrupt

    def call(*arguments: object) -> None:
        monkeypatch.setattr(PaintingServer, "serve_forever", interrupted)
        monkeypatch.setattr(sys, "argv", ["demo", "--device", "cpu", *map(str, arguments)])
        command_line.main()

    return call


def test_the_command_line(start, checkpoint, samples, client, tmp_path, capsys):
    start("--checkpoint", checkpoint, "--port", 0, "--samples", samples, "--size", "own")
    out, err = capsys.readouterr()
    assert out.startswith("painting page: http://127.0.0.1:") and out.endswith("ended\n") and not err
    start("--checkpoint", checkpoint, "--port", 0, "--host", "0.0.0.0")
    assert "asks for no password" in capsys.readouterr().err
    for arguments, error, words in (
        (("--checkpoint", tmp_path / "none.pt"), CheckpointError, "no such file or folder"),
        (("--checkpoint", checkpoint, "--samples", tmp_path / "none"), DataError, "none"),
        (("--checkpoint", checkpoint, "--size", "big"), ConfigError, "--size big: write trained, own, or HEIGHTxWIDTH"),
        (("--checkpoint", checkpoint, "--port", client.server.server_port), ConfigError, "taken by another program"),
    ):
        with pytest.raises(error, match=words):
            start(*arguments)


# ------------------------------------------------------------------------------------------------ in a browser


class Page:
    """The page as somebody at the screen sees it."""

    def __init__(self, browser, client: Client) -> None:
        self.browser = browser
        browser.get(f"http://127.0.0.1:{client.server.server_port}/")
        self.wait(lambda: self.element("main").is_displayed())

    def settled(self) -> None:
        """Wait for the first picture."""
        self.wait(lambda: self.ask("return document.querySelector('#result img').naturalWidth > 0"))
        self.wait(lambda: self.ask("return document.getElementById('busy').hidden"))

    def wait(self, condition) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: condition())

    def ask(self, script: str, *arguments: object):
        return self.browser.execute_script(script, *arguments)

    def element(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def colours(self) -> np.ndarray:
        """Of the canvas, uint8 [H, W, 3]."""
        data = self.ask(
            "const c = document.querySelector('canvas');"
            "return [c.height, c.width, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
        )
        return np.array(data[2], np.uint8).reshape(data[0], data[1], 4)[..., :3]

    def picture(self) -> str:
        return self.ask("return document.querySelector('#result img').src")

    def after(self, action) -> None:
        """Do something, and wait until the picture of it is there."""
        before = self.picture()
        action()
        self.wait(lambda: self.picture() != before and self.ask("return document.getElementById('busy').hidden"))

    def pointer(self, x: int = 0, y: int = 0):
        """Actions that begin at a place of the map, in pixels of the screen from its middle."""
        from selenium.webdriver import ActionChains

        return ActionChains(self.browser, duration=20).move_to_element_with_offset(self.element("#easel"), x, y)

    def at(self, x: int, y: int):
        """Actions that begin at a pixel of a map of 64x64."""
        scale = self.element("#easel").size["width"] / 64
        return self.pointer(*(round((place - 31.5) * scale) for place in (x, y)))

    def keys(self, *keys: str) -> None:
        """Type with the focus on the map."""
        self.ask("document.querySelector('#easel canvas').focus()")
        self.browser.switch_to.active_element.send_keys(*keys)

    def drag(self, *moves: tuple[int, int]) -> None:
        chain = self.pointer().click_and_hold()
        for x, y in moves:
            chain.move_by_offset(x, y)
        chain.release().perform()

    def downloaded(self, button: str, name: str) -> bytes:
        self.element(button).click()
        path = self.browser.downloads / name
        self.wait(path.exists)  # under its name it is whole
        return path.read_bytes()


def test_painting_in_a_browser(browser, client, synthesizer, tmp_path):
    page = Page(browser, client)
    page.settled()
    assert page.element("#model").text.startswith("a <name>, trained on 64 × 64")
    labels = browser.find_elements("css selector", "#list span")
    assert [label.text for label in labels] == [NAMES[0], NAMES[1], *NAMES[3:], "don't care"]  # names are text
    start = page.colours()  # a sample

    # A stroke with the second class changes the map along it, in that class's colour alone, and the picture.
    labels[1].click()
    page.after(lambda: page.drag((60, 0), (0, 60)))
    painted = page.colours()
    changed_at = (painted != start).any(2)
    assert (painted[changed_at] == PALETTE[1]).all() and (painted[24, 40:44] == PALETTE[1]).all()
    assert 20 < changed_at.sum() < 600

    # What the picture shows is what the library makes of the saved map.
    saved = np.asarray(Image.open(io.BytesIO(page.downloaded("#save_map", "label_map.png"))))
    np.testing.assert_array_equal(synthesizer.labels.colourise(synthesizer.train_ids(saved)), painted)
    picture = decoded(page.downloaded("#save_picture", "picture.png"))
    np.testing.assert_array_equal(picture, synthesizer(saved, seed=0))

    page.after(lambda: page.element("#undo").click())
    np.testing.assert_array_equal(page.colours(), start)
    page.after(lambda: page.element("body").send_keys("\ue009\ue008z"))  # Ctrl+Shift+Z
    np.testing.assert_array_equal(page.colours(), painted)

    page.after(lambda: page.element("#clear").click())
    assert (page.colours() == PALETTE[1]).all()
    page.element("body").send_keys("f4")  # fill, with the fourth class
    page.after(lambda: page.drag())
    assert (page.colours() == PALETTE[4]).all()

    opened = write_png(tmp_path / "opened.png", as_raw(some_map(7)))
    page.after(lambda: page.element("#open").send_keys(str(opened)))
    np.testing.assert_array_equal(page.colours(), synthesizer.labels.colourise(some_map(7)))
    page.after(lambda: page.element("#dice").click())
    photo = write_png(tmp_path / "photo.png", np.full((50, 50, 3), 200, np.uint8))
    page.after(lambda: page.element("#photo").send_keys(str(photo)))
    picture = page.downloaded("#save_picture", "picture (1).png")
    np.testing.assert_array_equal(
        decoded(picture), synthesizer(as_raw(some_map(7)), style=np.asarray(Image.open(photo)))
    )

    # A mistake is said in the page, and changes nothing.
    page.element("#open").send_keys(str(write_png(tmp_path / "wrong.png", np.full((8, 8), 99, np.uint8))))
    page.wait(page.element("#error").is_displayed)
    assert "label value(s) 99" in page.element("#error").text
    np.testing.assert_array_equal(page.colours(), synthesizer.labels.colourise(some_map(7)))

    page = Page(browser, client)  # a reload keeps the map
    page.settled()
    np.testing.assert_array_equal(page.colours(), synthesizer.labels.colourise(some_map(7)))
    assert "made at" not in page.element("#status").text

    # Far from the trained size the picture still has the canvas's size, and the page says at which it was made.
    page.after(page.element('#canvas_size option[value="128x128"]').click)
    assert page.element("#status").text.startswith("128 × 128 (made at 64 × 64), ")
    size = page.ask("const i = document.querySelector('#result img'); return [i.naturalHeight, i.naturalWidth]")
    assert size == [128, 128] == list(page.colours().shape[:2])
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("/api/label_map" in complaint for complaint in complaints) and len(complaints) == 1
    assert page.ask("return document.querySelectorAll('#list img').length") == 0


@pytest.fixture
def page(browser, client) -> Page:
    """A page with a map of class 0, 64x64, and class 1 to draw with."""
    page = Page(browser, client)
    page.settled()
    page.keys("1")
    page.after(page.element("#clear").click)
    page.element('#canvas_size option[value="64x64"]').click()
    page.keys("2")
    page.settled()
    assert (page.colours() == PALETTE[0]).all()
    yield page
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_undo_in_the_middle_of_a_stroke_takes_that_stroke_back(page):
    page.after(lambda: page.drag((0, 100)))
    before = page.colours()
    control, z = "\ue009", "z"
    page.pointer(-100, -50).click_and_hold().move_by_offset(60, 0).perform()
    assert (page.colours() != before).any()
    page.browser.switch_to.active_element.send_keys(control, z)
    page.pointer(0, -50).move_by_offset(60, 0).release().perform()  # the button is still down, and nothing is drawn
    np.testing.assert_array_equal(page.colours(), before)
    assert page.element("#undo").is_enabled() and page.element("#redo").is_enabled()
    page.after(page.element("#undo").click)
    assert (page.colours() == PALETTE[0]).all() and not page.element("#list label small").text.startswith("<")


def test_lines_polygons_and_the_eraser_by_mouse_and_keys(page):
    left, right, up, down, enter, back, escape, shift = (*"\ue012\ue014\ue013\ue015\ue007\ue003\ue00c\ue008",)
    page.ask("document.getElementById('size').value = 1")
    page.keys("l")
    page.at(12, 32).click_and_hold().perform()
    page.after(lambda: page.at(52, 32).release().perform())
    by_mouse = (page.colours() == PALETTE[1]).all(2)
    assert by_mouse.sum() == by_mouse[32].sum() == 41 and by_mouse[32, 12] and by_mouse[32, 52]
    page.after(page.element("#undo").click)
    page.keys(*[left] * 40, " ", *[right] * 40)  # from where the pointer was
    assert (page.colours() == PALETTE[0]).all()
    page.after(lambda: page.keys(" "))
    np.testing.assert_array_equal((page.colours() == PALETTE[1]).all(2), by_mouse)
    page.keys(" ", down, escape, " ", escape)  # one that is given up
    page.after(page.element("#undo").click)
    assert (page.colours() == PALETTE[0]).all()

    page.keys("p")
    for x, y in ((0, 0), (63, 0), (63, 63), (0, 63)):
        page.at(x, y).click().perform()
    page.after(lambda: page.at(1, 1).click().perform())  # about the first corner
    assert (page.colours() == PALETTE[1]).all()  # corners beside the border mean the border
    page.after(page.element("#undo").click)
    page.at(12, 12).perform()
    page.keys(" ", *[right] * 20, " ", *[down] * 20, " ", *[up] * 5, " ", back)  # the last one is taken back
    assert (page.colours() == PALETTE[0]).all()
    page.after(lambda: page.keys(enter))
    triangle = (page.colours() == PALETTE[1]).all(2)
    assert 180 <= triangle.sum() <= 220 and triangle[15, 25] and not triangle[25, 15]

    page.ask("document.getElementById('size').value = 3")
    page.keys("e")
    page.at(32, 34).click_and_hold().perform()
    page.after(lambda: page.at(32, 14).release().perform())
    assert (page.colours()[14:35, 32] == 0).all()  # black: don't care
    page.keys("b")
    page.after(lambda: page.keys(*[right] * 9, shift, " "))
    assert (page.colours() == PALETTE[1]).all(2)[14, 32:50].all()  # straight on from the last stroke


def test_zoom_and_pan_move_map_and_picture_and_strokes_follow(page):
    page.ask("document.getElementById('size').value = 1")
    page.keys("+", "+")
    assert page.element("#zoom").text == "225 %"
    place = "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.x, b.y, b.width]"
    easel = page.ask(place, "#easel")
    canvas, picture, frame = (page.ask(place, s) for s in ("#easel canvas", "#result img", "#result"))
    np.testing.assert_allclose(np.subtract(canvas, easel), np.subtract(picture, frame), atol=0.1)
    assert canvas[2] == pytest.approx(2.25 * easel[2])
    page.after(lambda: page.pointer(3, 3).click().perform())
    painted = (page.colours() == PALETTE[1]).all(2)
    assert painted.sum() == painted[32, 32] == 1
    page.browser.execute_cdp_cmd("Input.dispatchMouseEvent", {
        "type": "mouseWheel", "x": easel[0] + 10, "y": easel[1] + 10, "deltaX": 0, "deltaY": -120
    })  # fmt: skip
    page.wait(lambda: page.element("#zoom").text == "336 %")
    page.keys(*["\ue012"] * 60)  # the arrows move the view along
    assert page.ask(place, "#easel canvas")[0] == pytest.approx(easel[0], abs=1)
    page.element("#zoom").click()
    assert page.ask(place, "#easel canvas") == easel

    def touch(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": easel[0] + x, "y": easel[1] + y, "id": i} for i, (x, y) in enumerate(points)]
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    before = page.colours()
    touch("touchStart", (100, 100))  # a finger draws, two move the map and leave no stroke
    touch("touchMove", (110, 100))
    touch("touchStart", (110, 100), (200, 100))
    touch("touchMove", (110, 100), (290, 100))
    touch("touchEnd")
    page.wait(lambda: page.element("#zoom").text == "200 %")
    np.testing.assert_array_equal(page.colours(), before)


def test_maps_open_in_their_own_shape_and_a_notice_stays(page, tmp_path):
    wide = some_map(5, 36, 90)
    page.after(lambda: page.element("#open").send_keys(str(write_png(tmp_path / "wide.png", as_raw(wide)))))
    np.testing.assert_array_equal(page.colours(), np.array([*PALETTE, [0, 0, 0]])[wide])
    assert not page.element("#notice").is_displayed()
    large = write_png(tmp_path / "large.png", np.repeat(as_raw(some_map(6, 30, 100)), 30, 0).repeat(30, 1))
    page.after(lambda: page.element("#open").send_keys(str(large)))
    shape = "const c = document.querySelector('#easel canvas'); return [c.height, c.width]"
    assert page.ask(shape) == [614, 2048]
    notice = "large.png is 3000 × 900; no canvas is as large, so it was shrunk to 2048 × 614."
    page.after(lambda: page.element("#canvas_size option").click())
    assert page.element("#notice").text.startswith(notice)
    page.element("#notice button").click()
    assert not page.element("#notice").is_displayed()


def test_several_styles_and_the_comparison(page, synthesizer):
    chosen = int(page.ask("return document.getElementById('seed').value"))
    page.keys("v", "c")
    page.wait(lambda: len(page.browser.find_elements("css selector", "#variants button span")) == 3)
    page.after(page.element("#variants button").click)
    assert page.ask("return document.getElementById('seed').value") == str(chosen + 1)
    picture = page.ask(
        "const i = document.querySelector('#result img'), c = document.createElement('canvas');"
        "c.width = c.height = 64; const g = c.getContext('2d'); g.drawImage(i, 0, 0);"
        "return Array.from(g.getImageData(0, 0, 64, 64).data)"
    )
    expected = synthesizer(np.zeros(SIZE, np.uint8), seed=chosen + 1)
    np.testing.assert_array_equal(np.reshape(picture, (64, 64, 4))[..., :3], expected)
    covered = "return getComputedStyle(document.getElementById('compared')).clipPath"
    assert page.element("#compared").is_displayed() and "50%" in page.ask(covered)
    page.element("#compare_at").send_keys("\ue010")  # End
    assert "50%" not in page.ask(covered)
    page.element("#compare").click()
    assert not page.element("#compared").is_displayed()


def test_the_history_brings_maps_styles_and_pictures_back(page, synthesizer, tmp_path):
    enter, tab = "\ue007\ue004"

    def entries() -> list:
        return page.browser.find_elements("css selector", "#pictures button")

    def state() -> tuple[np.ndarray, str, np.ndarray]:
        (page.browser.downloads / "picture.png").unlink(missing_ok=True)
        seed = page.ask("return document.getElementById('seed').value")
        return page.colours(), seed, decoded(page.downloaded("#save_picture", "picture.png"))

    def use(seed: int) -> None:
        script = (
            "const s = document.getElementById('seed'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
        )
        page.after(lambda: page.ask(script, seed))

    use(40)
    page.after(lambda: page.drag((0, 100)))
    first, name = state(), entries()[0].text
    assert re.fullmatch(r"Picture \d+, style 40", name) and entries()[0].accessible_name == name
    use(41)
    photo = write_png(tmp_path / "photo.png", np.full((50, 50, 3), 200, np.uint8))
    page.after(lambda: page.element("#photo").send_keys(str(photo)))
    page.after(lambda: page.drag((80, 0)))
    second = state()
    assert entries()[0].text.endswith("style of a photo") and entries()[3].text == name
    shown = page.ask(
        "return Array.from(document.querySelectorAll('#pictures button:first-child canvas'), (c) =>"
        " Array.from(c.getContext('2d').getImageData(0, 0, 64, 64).data))"
    )
    for thumbnail, whole in zip(shown, (second[0], second[2]), strict=True):
        np.testing.assert_array_equal(np.reshape(thumbnail, (64, 64, 4))[..., :3], whole)

    # By keys to the fourth, without asking the server again; undo takes the map back, and nothing is noted twice.
    count, asked = len(entries()), "return performance.getEntriesByName(location.origin + '/api/picture').length"
    before = page.ask(asked)
    page.keys("h")
    for _ in range(3):
        page.browser.switch_to.active_element.send_keys(tab)
    page.after(lambda: page.browser.switch_to.active_element.send_keys(enter))
    assert all(np.array_equal(a, b) for a, b in zip(state(), first, strict=True))
    assert page.ask(asked) == before and page.element("#status").text == "64 × 64, generated before"
    assert (
        page.element("#pictures [aria-current=true]").text == name and not page.element("#photo_shown").is_displayed()
    )
    page.after(entries()[0].click)
    assert all(np.array_equal(a, b) for a, b in zip(state(), second, strict=True))
    assert page.element("#photo_shown").is_displayed() and len(entries()) == count
    page.after(page.element("#undo").click)
    np.testing.assert_array_equal(page.colours(), first[0])

    # In the middle of a stroke pictures come and go; the history has whole strokes, and at most twelve.
    count = page.ask("return document.querySelector('#pictures button').innerText")
    page.pointer(-100, -50).click_and_hold().perform()
    page.after(lambda: page.pointer(-60, 50).perform())
    assert entries()[0].text == count and not page.browser.find_elements(
        "css selector", "#pictures [aria-current=true]"
    )
    page.after(lambda: page.pointer(-60, 60).release().perform())
    assert entries()[0].text != count
    for seed in range(12):
        use(50 + seed)
    assert [entry.text.partition(", ")[2] for entry in entries()] == [f"style {seed}" for seed in range(61, 49, -1)]
    assert all(min(entry.size.values()) >= 44 for entry in entries())
    kept = page.browser.execute_async_script("""
        const done = arguments[0];
        import("/history.js").then(({ History, thumbnail }) => {
          document.getElementById("pictures").replaceChildren();
          const history = new History(() => {}), drawn = () => thumbnail(document.querySelector("canvas"), 64, 64);
          const image = document.querySelector("#result img");
          const counts = [20, 20, 20, 20, 100, 1].map((size, seed) => {
            const map = { height: 1, width: 1, ids: new Uint8Array(2 ** 20), anew: [], drawn: drawn() };
            history.add({ ...map, seed, style: null, made: { file: { size: size * 2 ** 20 } } }, image, "");
            return document.querySelectorAll("#pictures button").length;
          });
          done(counts);
        });
    """)
    assert kept == [1, 2, 3, 3, 1, 1]  # at most 64 MiB, or one


def test_new_noise_for_a_region(browser, oasis, client):
    page = Page(browser, client)
    page.settled()
    assert not page.element("#renew").is_displayed()  # this model takes no noise in parts of an image
    own = Client(PaintingService(oasis, "oasis"))

    def parts() -> list[dict[str, int]]:
        return json.loads(page.ask("return sessionStorage.getItem('label map')"))["anew"]

    def picture() -> bytes:
        (browser.downloads / "picture.png").unlink(missing_ok=True)
        return page.downloaded("#save_picture", "picture.png")

    try:
        page = Page(browser, own)
        page.settled()
        page.keys("2")
        page.after(lambda: page.drag((0, 60)))
        (browser.downloads / "label_map.png").unlink(missing_ok=True)
        labels = np.asarray(Image.open(io.BytesIO(page.downloaded("#save_map", "label_map.png"))))
        pictures = [picture()]
        page.keys("a")
        for x, y in ((5, 6), (32, 40)):
            page.after(page.at(x, y).click().perform)
            pictures.append(picture())
            assert [(part["x"], part["y"], part["id"]) for part in parts()][-1] == (x, y, int(labels[y, x]))
            wanted = oasis(labels, seed=0, anew={(part["x"], part["y"]): part["seed"] for part in parts()})
            np.testing.assert_array_equal(decoded(pictures[-1]), wanted)
        assert len(set(pictures)) == 3
        page.after(page.element("#undo").click)
        assert picture() == pictures[1]
        page.after(page.element("#redo").click)
        assert picture() == pictures[2]
        page = Page(browser, own)  # a reload keeps it
        page.settled()
        assert picture() == pictures[2]
        # A part whose pixel has another class by now counts no more.
        page.keys("3")
        page.after(page.element("#clear").click)
        assert not parts()
        page.after(page.element("#undo").click)
        page.keys("f3")
        page.after(page.at(32, 40).click().perform)
        filled = np.where((page.colours() == PALETTE[2]).all(2), 2, labels)
        first, _ = parts()
        np.testing.assert_array_equal(decoded(picture()), oasis(filled, seed=0, anew={(5, 6): first["seed"]}))
    finally:
        own.stop()


def test_wrong_parts_with_new_noise_are_named(oasis):
    service = PaintingService(oasis, "oasis")
    assert service.describe()["takes_local_noise"]
    good = fields_of(some_map(), seed=1)
    one = service.generate({**good, "anew": [[3, 4, 5]]})
    assert one == service.generate({**good, "anew": [[3, 4, 9], [3, 4, 5]]}) != service.generate(good)
    for wrong, words in (
        ([[3, 4]], r"each part is \[x, y, seed\]"), ("all", "a list of at most 100"), ([[64, 0, 1]], "anew: x"),
        ([[0, 0, -1]], "anew: seed"), ([[0, 0, 1]] * 101, "a list of at most 100"), ([[0, 0.5, 1]], "anew: y"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            service.generate({**good, "anew": wrong})


def test_a_slow_generator_says_so_and_can_be_stopped(browser, synthesizer):
    slow = Slow(synthesizer)
    client = Client(PaintingService(slow, "slow"))  # type: ignore[arg-type]
    try:
        page = Page(browser, client)
        assert "no label maps to start from" in page.element("#notice").text
        page.wait(page.element("#stop").is_displayed)
        assert page.element("#seconds").text.startswith("generating … 1 s")
        assert page.element("#result").get_attribute("aria-busy") == "true"
        page.element("#stop").click()
        page.wait(lambda: page.element("#result").get_attribute("aria-busy") == "false")
        assert page.element("#status").text.startswith("stopped")
        slow.go.set()
        page.after(page.element("#clear").click)  # the next change asks anew
    finally:
        slow.go.set()
        client.stop()


def test_strokes_and_regions(browser, client):
    """The page's own drawing code against plain references."""
    browser.get(f"http://127.0.0.1:{client.server.server_port}/page.css")  # any page of this origin
    rng = np.random.default_rng(0)
    height, width = 23, 31
    strokes = [[*rng.uniform(-5, 35, 4).round(2).tolist(), int(size)] for size in rng.integers(1, 12, 40)]
    regions = [[rng.integers(0, 3, (height, width)).tolist(), int(rng.integers(width)), int(rng.integers(height))]
               for _ in range(20)]  # fmt: skip
    script = """
        const [strokes, regions, polygons, height, width, done] = arguments;
        import("/label_map.js").then(({ LabelMap }) => {
          const stroked = strokes.map((stroke) => {
            const map = new LabelMap(height, width, 1, 0);
            map.stroke(...stroke, 1);
            return [...map.ids];
          });
          const filled = regions.map(([rows, x, y]) => {
            const map = new LabelMap(height, width, 2, 0);
            map.ids.set(rows.flat());
            map.fill(x + 0.5, y + 0.5, 9);
            return [...map.ids];
          });
          const covered = polygons.map((corners) => {
            const map = new LabelMap(height, width, 1, 0);
            map.polygon(corners.map(([x, y]) => ({ x, y })), 1);
            return [...map.ids];
          });
          const map = new LabelMap(4, 4, 1, 0);
          for (const [height, width] of [[2, 2], [8, 4]]) map.resize(height, width);
          map.undo();
          const sizes = [map.height, map.width, map.ids.length, map.canUndo, map.canRedo];
          map.undo(); map.redo(); map.redo();
          done([stroked, filled, covered, sizes, [map.height, map.width, map.ids.length]]);
        });
    """
    polygons = [rng.uniform(-5, 35, (number, 2)).round(2).tolist() for number in rng.integers(3, 8, 20)]
    stroked, filled, covered, undone, redone = browser.execute_async_script(
        script, strokes, regions, polygons, height, width
    )
    middles = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1)
    for (x0, y0, x1, y1, size), ids in zip(strokes, stroked, strict=True):
        start, line = np.array([x0, y0]), np.array([x1 - x0, y1 - y0])
        along = ((middles - start) @ line / (line @ line)).clip(0, 1)
        distance = np.linalg.norm(middles - start - along[..., None] * line, axis=2)
        painted = np.reshape(ids, (height, width)) == 1
        if size > 1:
            assert painted[distance <= size / 2].all()
        assert not painted[distance > max(size / 2, np.sqrt(0.5)) + 1e-9].any()  # or the line passes through it
        assert cv2.connectedComponents(painted.astype(np.uint8), connectivity=8)[0] <= 2  # without gaps
    for (rows, x, y), ids in zip(regions, filled, strict=True):
        before = np.array(rows, np.uint8)
        region = cv2.connectedComponents((before == before[y, x]).astype(np.uint8), connectivity=4)[1]
        np.testing.assert_array_equal(np.reshape(ids, (height, width)), np.where(region == region[y, x], 9, before))
    for corners, ids in zip(polygons, covered, strict=True):
        inside = np.zeros((height, width), bool)  # by the number of sides to the right of a pixel's middle
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            x, y = middles[..., 0], middles[..., 1]
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        np.testing.assert_array_equal(np.reshape(ids, (height, width)) == 1, inside)
    assert undone == [2, 2, 4, True, True] and redone == [8, 4, 32]
