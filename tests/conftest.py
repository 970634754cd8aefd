"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from fork_server import ForkServer
from hypothesis import settings

# On a busy machine any example may take long.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

os.environ["IMAGINAIRE_SPADE_CHOICES"] = ""  # measure nothing, write nothing into the user's cache

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "scripts"))  # of which one holds code of its own: download_test_data

MakeFolder = Callable[..., Path]

LONG_FILES = {"test_distributed", "test_user_commands", "test_notebook", "test_fuzz", "test_permissions"}
"""Files of few tests that take a minute and more: first, so that no process ends with one while the other waits."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files of tests for ``make test``: long ones first, then those of most tests."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG_FILES, -tests[item.path], item.path))


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs command lines as processes of their own, without the seconds that importing torch takes."""
    with ForkServer(tmp_path_factory.mktemp("commands")) as server:
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The networks are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, driven by selenium; ``downloads`` is the folder of what it saves."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e .[dev])")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    folder = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.downloads = folder
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium: Any) -> Any:
    """Chromium, without what it logged in other tests."""
    chromium.get_log("browser")
    return chromium


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and fixtures, or a skip."""
    folder = Path(os.environ.get("IMAGINAIRE_SPADE_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set IMAGINAIRE_SPADE_SHARED)")
    return folder


def write_png(path: Path, array: np.ndarray) -> Path:
    """Write an array (RGB, if of three channels) as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = array[..., ::-1] if array.ndim == 3 else array
    path.write_bytes(cv2.imencode(".png", stored)[1].tobytes())
    return path


def write_jpg(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", array[..., ::-1])[1].tobytes())
    return path


def blocky_labels(rng: np.random.Generator, height: int, width: int, num_classes: int) -> np.ndarray:
    """Label map of constant blocks: uint8 [height, width]."""
    blocks = rng.integers(0, num_classes, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no small disk here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> MakeFolder:
    """Makes a raw data set: noise photos, blocky labels, edges and 16-bit instances that agree with each other."""

    def make(
        name: str = "raw",
        *,
        keys: int | list[str] = 6,
        size: tuple[int, int] = (40, 56),
        num_classes: int = 5,
        types: tuple[str, ...] = ("images", "seg_maps", "edge_maps", "inst_maps"),
        seed: int = 0,
    ) -> Path:
        root = tmp_path / name
        for number, key in enumerate([f"{i:04d}" for i in range(keys)] if isinstance(keys, int) else keys):
            rng = np.random.default_rng((seed, number))
            labels = blocky_labels(rng, *size, num_classes)
            if "images" in types:
                write_jpg(root / "images" / f"{key}.jpg", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            if "seg_maps" in types:
                write_png(root / "seg_maps" / f"{key}.png", labels)
            if "edge_maps" in types:
                write_png(root / "edge_maps" / f"{key}.png", (rng.random(size) < 0.1).astype(np.uint8) * 255)
            if "inst_maps" in types:
                write_png(root / "inst_maps" / f"{key}.png", labels.astype(np.uint16) * 1000 + 7)
        return root

    return make


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes the smallest full configuration for the data of ``tiny_folder``."""

    def make(*, num_classes: int = 5, edges: str = "none", **labels: object) -> Path:
        tree = {
            "gen": {"type": "spade", "norm": {"type": "spade"}},
            "dis": "multiscale_patch",
            "losses": {"gan": 1.0},
            "gen_opt": {"lr": 1e-4},
            "dis_opt": {"lr": 1e-4},
            "trainer": {"max_iterations": 1},
            "data": {"edges": edges, "labels": {"num_classes": num_classes, **labels}, "train": {"roots": ["unused"]}},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return make
