"""The house rules that a machine can check."""

import argparse
import ast
import graphlib
import io
import re
import runpy
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "imaginaire_spade"

CORE = [
    {"command_names", "errors", "version", "files", "labels", "registry", "noise", "cli", "processes"},
    {"config_trainer"}, {"config"}, {"config_files"}, {"config_diff"},
    {"distributed"}, {"neighbourhoods", "layout", "layout_spec"}, {"sheets"}, {"pages"}, {"data"}, {"models"},
    {"pretrained"}, {"losses", "optimizer"}, {"build"}, {"evaluation"}, {"training"}, {"inference"},
]  # fmt: skip
WINGS = [{"lmdb_builder"}, {"dataset_prep"}, {"interop"}, {"export"}, {"demo"}, {"scenes"}]
ROOMS = [*CORE, *WINGS, {"commands"}, {"imaginaire_spade", "__main__", "train"}]
"""A module imports only from its own room and those before it; so no module of the core imports a wing. The package's
own names, for users, come last."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def room_of(module: str) -> int:
    name = module.split(".")[1] if "." in module else module
    return next(index for index, room in enumerate(ROOMS) if name in room)


def imports_of(module: str, text: str) -> set[str]:
    """The modules of the package that a module names: anywhere in it, in functions and under TYPE_CHECKING too."""
    is_package = MODULES[module].name == "__init__.py"
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            names |= {name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value in MODULES and "." in node.value:
            names.add(node.value)  # importlib.import_module("imaginaire_spade.x")
    return {name for name in names if name.split(".")[0] == "imaginaire_spade"}


def written_imports(module: str) -> set[str]:
    """Those of its file. The registry alone may name modules after it: they register themselves there."""
    named = imports_of(module, MODULES[module].read_text(encoding="utf-8"))
    return named - REGISTERING if module == "imaginaire_spade.registry" else named


REGISTERING = {
    module
    for module, path in MODULES.items()
    if re.search(r"^@[A-Z_]+\.register\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import imaginaire_spade", {"imaginaire_spade"}),
        ("import torch, imaginaire_spade.data.lmdb_source as s", {"imaginaire_spade.data.lmdb_source"}),
        ("from imaginaire_spade import Synthesizer, losses", {"imaginaire_spade", "imaginaire_spade.losses"}),
        ("from imaginaire_spade.data import lmdb_source", {"imaginaire_spade.data.lmdb_source"}),
        ("from imaginaire_spade.config import RunConfig", {"imaginaire_spade.config"}),
        ("from .checkpoint import BEST", {"imaginaire_spade.training.checkpoint"}),
        ("from . import checkpoint", {"imaginaire_spade.training.checkpoint"}),
        ("from ..data.lmdb_source import FILENAMES", {"imaginaire_spade.data.lmdb_source"}),
        ("from .. import losses, LayoutSpec", {"imaginaire_spade", "imaginaire_spade.losses"}),
        ("def f():\n    import imaginaire_spade.losses", {"imaginaire_spade.losses"}),
        ("if TYPE_CHECKING:\n    from imaginaire_spade.training.setup import Run", {"imaginaire_spade.training.setup"}),
        ('importlib.import_module("imaginaire_spade.losses")', {"imaginaire_spade.losses"}),
        ("import json", set()),
    ],
)
def test_every_kind_of_import_is_seen(text, named):
    assert imports_of("imaginaire_spade.training.loop", text) == named


def test_a_package_imports_relative_to_itself():
    assert imports_of("imaginaire_spade.interop", "from . import configs") == {"imaginaire_spade.interop.configs"}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_before_it(module):
    named = written_imports(module)
    assert not {name for name in named if name not in MODULES}
    assert not {name for name in named if room_of(name) > room_of(module)}


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: written_imports(module) for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def loaded_after(statement: str) -> set[str]:
    """What is imported in a new interpreter after a statement: torch, and modules of the package (not its version)."""
    script = f"{statement}\nimport sys\nprint(*(m for m in sys.modules if m == 'torch' or m.startswith('imaginaire_')))"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {name.removeprefix("imaginaire_spade.") for name in result.stdout.split()} - {"imaginaire_spade", "version"}


def test_a_module_loads_what_it_needs_and_no_more():
    assert loaded_after("from imaginaire_spade.labels import LabelSpec") == {"command_names", "errors", "labels"}
    assert loaded_after("from imaginaire_spade.config_files import load_labels") == {
        "command_names", "config", "config_files", "config_trainer", "errors", "labels", "registry"
    }  # fmt: skip
    assert loaded_after("import imaginaire_spade; assert imaginaire_spade.__version__") == set()


def test_the_packages_names_are_there_when_asked_for():
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    (guard,) = (node for node in ast.parse(text).body if isinstance(node, ast.If))
    for_type_checkers = {alias.asname for node in guard.body for alias in node.names}
    loaded = loaded_after(
        "import imaginaire_spade as package\n"
        f"assert set(package.__all__) == {for_type_checkers} <= set(dir(package)), dir(package)\n"
        "from imaginaire_spade import *\n"
        "from imaginaire_spade import SemanticLayout, Synthesizer, build_discriminator, build_generator, load_config\n"
        "assert package.load_config is load_config and callable(Synthesizer.load)\n"
        "assert not hasattr(package, 'no_such_name')"
    )
    assert {"inference.synthesizer", "build", "torch"} <= loaded


def test_each_registry_names_the_modules_that_fill_it():
    from imaginaire_spade import registry

    filled = set()
    for module in REGISTERING:
        names = re.findall(r"^@([A-Z_]+)\.register\(", MODULES[module].read_text(encoding="utf-8"), re.MULTILINE)
        filled |= {(name, module) for name in names}
    found = {
        (name, module)
        for name, filled_one in vars(registry).items()
        if isinstance(filled_one, registry.Registry)
        for module in filled_one.modules
    }
    assert found == filled


def test_components_are_known_without_an_import_of_theirs():
    loaded_after(
        "from imaginaire_spade.config_files import load_config\n"
        "load_config('configs/projects/spade/cocostuff/base128_bs4.yaml')\n"
        "load_config('configs/projects/clade/camvid/small96x128_icpe.yaml')"
    )
    loaded_after(
        "from imaginaire_spade.registry import GENERATORS\n"
        "try:\n"
        "    GENERATORS.register('pix2pixhd')(int)\n"
        "except ValueError as error:\n"
        "    assert 'registered twice' in str(error)\n"
        "else:\n"
        "    raise AssertionError('a name of ours was taken')"
    )


def test_the_version_is_stated_once():
    from imaginaire_spade.version import __version__

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "imaginaire_spade.version.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    stated = [path for path in SOURCES if f'"{__version__}"' in path.read_text(encoding="utf-8")]
    assert stated == [PACKAGE / "version.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_default_is_written_once_and_errors_are_not_swallowed(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(hasattr|getattr)\((cfg|config)\b|\b(cfg|config)\.get\(", text)
    assert not re.search(r"except\s*:", text)
    assert not re.search(r"\bexit\(0\)", text)
    assert path.stem not in ("utils", "misc", "base", "helpers")


def test_models_import_torch_and_each_other_only():
    allowed = {"models", "layout", "neighbourhoods", "registry", "errors", "distributed"}
    for path in (PACKAGE / "models").glob("*.py"):
        named = written_imports(module_name(path))
        assert {name.split(".")[1] for name in named} <= allowed, path


def test_a_script_without_a_process_group_works_in_job_arrays_too():
    names = {path.name for path in (REPOSITORY / "scripts").glob("*.py")}
    for path in (path for path in (PACKAGE / "commands").glob("*.py") if path.name in names):
        text = path.read_text(encoding="utf-8")
        if "process_info_from_environment" in text:
            assert "init_process_group" in text or "rank_from_environment" in text, path


def test_the_configuration_reference_is_the_schemas():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    import write_config_reference

    written = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
    assert written == write_config_reference.reference(), "run python scripts/write_config_reference.py"


def test_every_file_of_the_package_and_every_recipe_is_installed():
    """setuptools installs the folders that are listed, and of them what a pattern names."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    (place,) = setuptools["package-dir"].items()
    assert place == ("imaginaire_spade.configs", "configs")
    installed, listed = set(), set()
    for package in setuptools["packages"]:
        folder = REPOSITORY / package.replace("imaginaire_spade.configs", "configs").replace(".", "/")
        listed.add(folder)
        installed |= {path for pattern in setuptools["package-data"]["*"] for path in folder.glob(pattern)}
    files = [path for top in (PACKAGE, REPOSITORY / "configs") for path in top.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".pyc"]
    assert {path.parent for path in files} | {REPOSITORY / "configs", REPOSITORY / "configs/projects"} == listed
    assert {path for path in files if path.suffix != ".py"} == installed
    assert {PACKAGE / "pages" / name for name in ("gallery.html", "report.html", "style.css")} < installed


def test_the_package_imports_nothing_of_the_repository_around_it():
    """Neither the modules of ``projects/`` nor those of ``tests/`` are installed."""
    around = re.compile(r"^\s*(?:from|import) (?:projects|tests|benchmarks|scripts)\b", re.MULTILINE)
    assert not [path for path in SOURCES if around.search(path.read_text(encoding="utf-8"))]


def test_the_lowest_versions_are_those_that_install_md_names_and_the_tests_versions_are_not_lower():
    """Who lowers or raises a bound runs the tests with the lowest versions (INSTALL.md says which were run)."""
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lowest = dict(dependency.split(">=") for dependency in dependencies)
    line = re.search(r"Lowest versions: ([^:]+?)\.\s", (REPOSITORY / "INSTALL.md").read_text(encoding="utf-8"))
    assert line and dict(item.split() for item in line[1].split(",")) == lowest
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split("\n") if "==" in line)
    assert all(Version(pinned[name]) >= Version(version) for name, version in lowest.items())


def test_extras_are_installed_from_the_checkout():
    """The package is on no index, so pip cannot find imaginaire_spade[eval]; and every extra that is named exists, and
    every package that a message names belongs to one."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folders = ("docs", "projects", "imaginaire_spade", "scripts", "benchmarks", "tests", "configs")
    paths = [*REPOSITORY.glob("*"), *(path for folder in folders for path in (REPOSITORY / folder).rglob("*"))]
    named, packages = set[str](), set[str]()
    for path in paths:
        if path.suffix in (".py", ".md", ".ipynb", ".yaml", ".html", ".sbatch", ".sh", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"pip install (-\S+ )*\W*imaginaire_spade", text), path
            assert not re.search(r"imaginaire_spade\\?\[[\w,]+\\?\]['\"]", text), path
            named |= {extra for match in re.findall(r"['\"]\.\[([\w,]+)\]['\"]", text) for extra in match.split(",")}
            named |= set(re.findall(r"extra [\"`](\w+)", text))
            packages |= set(" ".join(re.findall(r"how_to_install\([\"']([\w -]+)", text)).split())
    extras = project["optional-dependencies"]
    assert {"data", "export"} <= named <= set(extras)
    wanted = {re.split(r"\W*[\[>]", item)[0] for extra in extras.values() for item in extra}
    assert {"av", "pycocotools", "transformers"} <= packages <= wanted | {"torch-fidelity"}  # (of torchmetrics[image])


def test_ruff_and_mypy_find_nothing():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_the_readmes_tree_is_true():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Repository layout")[2]
    tree = tree.partition("\n## ")[0]
    named = set(re.findall(r"[\w/]+(?:/|\.py)(?=\s|:|,)", tree))
    for name in named:
        places = (REPOSITORY, PACKAGE, REPOSITORY / "configs", REPOSITORY / "projects", REPOSITORY / "scripts")
        assert any((place / name).exists() for place in places), name
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= named, f"not in the README: {folders - named}"


BUDGET = {
    "top level": 2704, "pages": 19, "data": 2084, "models": 2344, "pretrained": 638, "training": 2294,
    "inference": 1533, "evaluation": 1012,
    "lmdb_builder": 905, "dataset_prep": 844, "interop": 1161, "export": 168, "demo": 547, "scenes": 736,
    "commands": 1396,
}  # fmt: skip
"""Code lines that a room may have: who lets one grow changes a number here, which a reviewer sees. Docstrings, comments
and blank lines do not count."""


def code_lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in silent
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - docstrings)


CORE_BUDGET = {room: BUDGET[room] for room in ("top level", "data", "models", "pretrained", "training", "inference")}


def test_rooms_keep_their_budget():
    lines = Counter()
    for path in SOURCES:
        parts = path.relative_to(PACKAGE).parts
        lines[parts[0] if len(parts) > 1 else "top level"] += code_lines(path)
        assert code_lines(path) <= 300, path
    assert lines.keys() == BUDGET.keys()
    over = {room: f"{number} of {BUDGET[room]}" for room, number in lines.items() if number > BUDGET[room]}
    assert not over
    assert sum(BUDGET.values()) <= 18_394 and sum(CORE_BUDGET.values()) <= 11_610


def test_folders_are_two_deep():
    assert all(len(path.relative_to(PACKAGE).parts) <= 2 for path in SOURCES)


class ParserBuiltError(Exception):
    """Ends a command line when it is about to parse its arguments."""


def options_of(path: Path) -> list[str]:
    """The flags that a command line accepts: those of its parser."""

    def stop(parser: argparse.ArgumentParser) -> None:
        raise ParserBuiltError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParserBuiltError) as built:
            runpy.run_path(str(path), run_name="__main__")
    (parser,) = built.value.args
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    return sorted(flags - {"--help"})


def test_the_list_of_options_is_frozen():
    """A new flag is a decision: who adds one adds it to ``options.txt``, where a reviewer asks who would set it. (The
    keys of a config stand in docs/config.md, which the schema writes.)"""
    paths = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("scripts/*.py"), PACKAGE / "demo/__main__.py"]
    found = {str(p.relative_to(REPOSITORY)): options_of(p) for p in sorted(paths)}
    lines = [f"{name}: {' '.join(options)}\n" for name, options in found.items() if options]
    assert "".join(lines) == (REPOSITORY / "tests/options.txt").read_text(encoding="utf-8")


def test_modules_load_where_unix_modules_and_signals_are_missing():
    """As on Windows; torch and the other packages are loaded before those are taken away."""
    code = """
import importlib, signal, sys
import filelock, lmdb, torch.distributed.run, torch.utils.tensorboard, tqdm, matplotlib.pyplot, http.server
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "alarm"):
    delattr(signal, name)
for module in sys.argv[1:]:
    importlib.import_module(module)
print("loaded", len(sys.argv) - 1)
"""
    done = subprocess.run([sys.executable, "-c", code, *MODULES], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == f"loaded {len(MODULES)}\n", done.stderr
