"""The benchmarks run and compare like with like; what they measure is nobody's promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data as data_benchmark
from benchmarks.__main__ import main as benchmarks_main
from imaginaire_spade.errors import run_command_line

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_quick_form_runs_and_its_paths_agree(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "generator", "inference", "iteration", "--quick", "--repeats", "1",
               "--threads", "1", "--json", str(file)]  # fmt: skip
    environment = os.environ | {"IMAGINAIRE_SPADE_SHARED": str(tmp_path)}  # drawn label maps
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    rows = {(row["section"], row["variant"]): row for row in content["rows"]}
    assert content["facts"]["label_maps"] == "drawn"
    assert rows["generator", "SPADE"]["difference"] < 2e-5
    assert rows["inference", "fp32"]["difference"] < 2 / 127.5  # of rounded pixel values
    assert rows["iteration", "SPADE"]["difference"] < 1e-8  # in double precision
    assert all(row["ms"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label_maps", "empty"], r"--label_maps empty: no PNG there"),
        (["--data_root", "empty"], r"empty: no folder images/ there; expected"),
        (["--data_root", "empty", "--data_config", "none.yaml"], r"none\.yaml"),
        (["--repeats", "0"], "'0' is not a whole number of at least 1"),
        (["norm"], "unknown section norm; there are norms, generator"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_command_line(benchmarks_main)
    assert stopped.value.code != 0
    printed = capsys.readouterr()
    assert re.search(message, printed.err) and not printed.out


def test_the_data_benchmark_runs_all_its_contestants(tiny_folder, tiny_config, monkeypatch, capsys):
    root = tiny_folder(keys=8, size=(40, 56))
    arguments = ["--data_root", root, "--config", tiny_config(), "--rounds", 1, "--num_workers", 1, "--samples", 8]
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    data_benchmark.main()
    printed = capsys.readouterr().out
    for line in ("copy the files (cp)", "checked, 1 worker", "loader, 1 worker", "PIL + torchvision, 1 workers"):
        assert f"\n{line}" in printed
    assert "webdataset is not installed" in printed or "\nwebdataset + OpenCV, 1 workers" in printed
    assert "loader, 1 worker / decode only, 1 process" in printed
