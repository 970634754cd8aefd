"""The house rules that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "imaginaire_spade"

ROOMS = [
    {"errors", "labels", "registry", "noise"}, {"config"}, {"compatibility"}, {"distributed"}, {"patterns"},
    {"layout"}, {"pictures"}, {"data"}, {"models"}, {"losses"}, {"build"}, {"evaluation"}, {"training"}, {"inference"},
    {"interop"}, {"demo"},
]  # fmt: skip
"""A module imports only from its own room and those before it."""

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def room_of(name: str) -> int:
    return next(index for index, room in enumerate(ROOMS) if name in room)


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "imaginaire_spade":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imaginaire_spade."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_before_it(path):
    own = room_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    later = {name for name in imported_rooms(path) if room_of(name) > own}
    assert not later


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_default_is_written_once_and_errors_are_not_swallowed(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(hasattr|getattr)\((cfg|config)\b|\b(cfg|config)\.get\(", text)
    assert not re.search(r"except\s*:", text)
    assert not re.search(r"\bexit\(0\)", text)
    assert path.stem not in ("utils", "misc", "base", "helpers")


def test_models_import_torch_and_each_other_only():
    allowed = {"models", "layout", "patterns", "registry", "errors", "distributed"}
    for path in (PACKAGE / "models").glob("*.py"):
        assert imported_rooms(path) <= allowed, path


def test_the_configuration_reference_is_the_schemas():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    import write_config_reference

    written = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
    assert written == write_config_reference.reference(), "run python scripts/write_config_reference.py"


def test_ruff_and_mypy_find_nothing():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_the_readmes_file_tree_is_true():
    tree = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## What lies where")[2].partition("\n## ")[0]
    )
    named = set(re.findall(r"[\w]+\.(?:py|md)", tree))
    present = {path.name for path in SOURCES if path.name != "__init__.py" and path.parent.name != "scenes"}
    assert present <= named, f"not in the README: {sorted(present - named)}"
    everywhere = {path.name for folder in (".", "docs", "imaginaire_spade") for path in (REPOSITORY / folder).rglob("*")
                  if ".venv" not in path.parts}  # fmt: skip
    assert named <= everywhere, f"only in the README: {sorted(named - everywhere)}"
