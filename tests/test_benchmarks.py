"""The benchmarks run and compare like with like; what they measure is nobody's promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
