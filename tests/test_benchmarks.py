"""The benchmarks run and compare like with like; what they measure is nobody's promise."""

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fork_server import TORCHRUN

from benchmarks import data as data_benchmark
from benchmarks import gpu, gpu_graphs, long_runs, measure, pictures
from benchmarks import norms as norms_benchmark
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.growth import distinct_share, grown_layout
from benchmarks.iteration import Case
from benchmarks.measure import BUSY, rows_of, take_turns
from imaginaire_spade.distributed import ProcessInfo
from imaginaire_spade.errors import run_command_line
from imaginaire_spade.layout import LayoutSpec, SemanticLayout
from imaginaire_spade.models import layers
from imaginaire_spade.models.norms import SPADE

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_quick_form_runs_and_its_paths_agree(tmp_path):
    file = tmp_path / "figures.json"
    sections = ("generator", "inference", "iteration", "oasis", "growth")
    command = [sys.executable, "-m", "benchmarks", *sections, "--quick", "--repeats", "1", "--threads", "1",
               "--json", str(file)]  # fmt: skip
    environment = os.environ | {"IMAGINAIRE_SPADE_SHARED": str(tmp_path)}  # drawn label maps
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    rows = {(row["section"], row["variant"]): row for row in content["rows"]}
    assert content["facts"]["label_maps"] == "drawn"
    assert rows["generator", "SPADE"]["difference"] < 2e-5
    assert rows["inference", "fp32"]["difference"] < 2 / 127.5  # of rounded pixel values
    assert rows["iteration", "SPADE"]["difference"] < 1e-8  # in double precision
    assert (
        rows["oasis inference", "OASIS"]["difference"] < 1e-5 and rows["oasis iteration", "OASIS"]["difference"] < 1e-8
    )
    assert all(row["ms"] > 0 for row in rows.values())
    growth = [row["case"].split(",")[0] for row in content["rows"] if row["section"] == "growth"]
    assert list(dict.fromkeys(growth)) == ["size 64", "classes 8", "distinct 2%"]


def test_load_takes_turns_with_none_and_never_stays_behind(monkeypatch, capsys, one_thread):
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    now, others = [0.0], []

    def runs(ms, beside_load):
        """As long as the clock says: 8 without and 16 beside load for the dense path."""

        def run():
            others.append(sum(process.poll() is None for process in started))
            now[0] += (beside_load if others[-1] else ms) / 1000

        return run

    monkeypatch.setattr(measure.subprocess, "Popen", start)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "norms", "--quick", "--load", "--threads", "1", "--repeats", "2"])
    with monkeypatch.context() as patch:
        variants = {"dense": runs(8, 16), "ours": runs(2, 5)}
        norms = lambda *_: rows_of("norms", "case", take_turns(variants, 2, torch.device("cpu")), {})  # noqa: E731
        patch.setattr(norms_benchmark, "measure", norms)
        benchmarks_main()
        assert others == [0, 1] * 6  # a warm-up and two rounds of two variants
        printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert printed == [
            ["case", "dense", "8.0", "ms", "1.00x"], ["case", "ours", "2.0", "ms", "4.00x"],
            ["case", "dense,", "beside", "load", "16.0", "ms", "1.00x"],
            ["case", "ours,", "beside", "load", "5.0", "ms", "3.20x", "0.80", "of", "the", "ratio", "without", "load"],
        ]  # fmt: skip
        variants["ours"] = lambda: pytest.fail("stopped") if others[-1] else None
        with pytest.raises(pytest.fail.Exception):
            benchmarks_main()
        assert all(process.poll() is not None for process in started)
    # Where nothing can be stopped any more, as with SIGKILL, the other process sees that its parent is gone.
    assert subprocess.run([sys.executable, "-c", BUSY, "0"], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_map_has_as_many_distinct_neighbourhoods_as_wanted(share):
    case = Case(None, torch.device("cpu"), 8, 64, batch=1, bf16=False, vgg=False)
    layout = grown_layout(case, 400, share)
    assert distinct_share(layout) == pytest.approx(share, abs=0.02)
    assert layout.labels.max() <= layout.spec.num_classes == 400


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


def test_the_check_of_a_gpu_runs_in_two_processes(commands, tmp_path):
    launcher = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
    result = commands.run(*launcher, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert all(result["ok"] is not False for result in results.values())
    assert {f"statistics of all processes, {path}" for path in ("dense", "table", "auto")} < results.keys()
    assert {f"order of collectives, {path}" for path in ("dense", "table", "auto")} < results.keys()
    for precision in ("fp64", "fp32", "bf16", "fp16"):
        assert results[f"one norm, {precision}, upsample 2, slope 0.2"]["ok"]
    for recipe in ("SPADE dense", "SPADE tables", "CLADE"):
        assert results[f"iteration as on the CPU, {recipe}"]["ok"]
        assert results[f"{recipe}, batch 2"]["detail"]["images/s"] > 0
    assert results["sample, 2 iterations, bf16"]["ok"]
    page = (tmp_path / "gpu.txt").read_text()
    assert page in result.stdout and page.endswith("0 failed\n")
    assert re.search(r"^SPADE tables, batch 2 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ ", page, re.MULTILINE)


@pytest.fixture
def gpu_check(tmp_path, one_thread):
    options = argparse.Namespace(quick=True, label_maps=None, out=tmp_path, budget_s=60)
    return gpu.Check(options, torch.device("cpu"), ProcessInfo(), tmp_path)


def test_a_part_of_the_check_that_fails_is_reported_and_ends_no_other(gpu_check, tmp_path):
    def broken(check, name):
        check.say(f"{name}, begun", True, "so far")
        torch.zeros(2) + torch.zeros(3)

    gpu_check.part("broken", broken)
    gpu_check.part("whole", lambda check, name: check.say(name, None, {"ms": 2.5, "syncs": 1}))
    gpu_check.quick, gpu_check.options.budget_s = False, 5
    gpu_check.part("late", broken, needs_s=10)
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert list(results) == ["broken, begun", "broken, stopped", "whole", "late"]
    assert results["broken, stopped"]["ok"] is False
    assert re.search(
        r"RuntimeError at elsewhere, test_benchmarks.py:\d+: The size of tensor", results["broken, stopped"]["detail"]
    )
    assert re.fullmatch(r"left out: \d s of --budget_s left, 10 s needed", results["late"]["detail"])
    page = (tmp_path / "gpu.txt").read_text()
    assert "FAIL  broken, stopped: RuntimeError" in page and page.endswith("1 failed: broken, stopped\n")
    assert re.search(r"^whole +2.5 +1 *$", page, re.MULTILINE)


def test_the_check_finds_tables_and_gradients_that_are_wrong(gpu_check, monkeypatch):
    right = SPADE._table

    def wrong(self, view):
        table, pixels = right(self, view)
        return table + 0.1, pixels

    monkeypatch.setattr(SPADE, "_table", wrong)
    monkeypatch.setattr(gpu, "BOUNDS", {"fp32": 1e-5})
    gpu_check.recipes = ["SPADE dense", "SPADE tables"]
    gpu_check.part("norm", gpu.norms)
    gpu_check.part("iteration", gpu.same_as_on_the_cpu)
    assert {name: result["ok"] for name, result in gpu_check.found.items()} == {
        "norm, fp32, upsample 2, slope 0.2": False,
        "iteration, SPADE dense": True,
        "iteration, SPADE tables": False,
    }


def test_synchronisations_are_counted_by_the_line_of_the_package(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    layout = SemanticLayout(LayoutSpec(2), torch.zeros(1, 2, 2, dtype=torch.uint8))

    def wait(tensor: torch.Tensor) -> torch.Tensor:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        return tensor

    def step() -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        wait(layout.map(wait).map(wait).labels)

    (twice, there), (once, elsewhere) = ((number, place) for place, number in gpu.syncs(step).items())
    assert (twice, once, elsewhere) == (2, 1, "elsewhere") and re.fullmatch(r"layout\.py:\d+", there)
    assert modes == ["warn", "default"]


def test_variants_of_a_compiled_function_are_counted_and_the_limit_is_heard(gpu_check):
    compiled = torch.compile(layers.enlarge, backend="eager", dynamic=False)

    def run(check: gpu.Check, name: str) -> None:
        for width in range(2, 2 + int(name)):
            compiled(torch.ones(1, 1, 1, width), 2)

    gpu.listen(gpu_check)
    for sizes in (3, 12):
        gpu_check.part(str(sizes), run)
        gpu.compiled_variants(gpu_check, f"compiled for {sizes}")
    few, many = (gpu_check.found[f"compiled for {sizes}"] for sizes in (3, 12))
    assert few == {"ok": True, "detail": {"limit": 8, "enlarge": 3, "warnings": "none"}}
    assert many["ok"] is False and many["detail"]["enlarge"] == 8
    (warning,) = many["detail"]["warnings"]
    assert re.search(r"hit config\.\w+ \(8\) function: 'enlarge'", warning)


def test_a_capture_that_fails_is_the_last_of_its_process(gpu_check, capsys):
    gpu_graphs.try_graphs(gpu_check, ["SPADE dense:1", "CLADE:1"])  # there is no GPU, or the check is of the CPU
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert answer["graph"] == "SPADE dense, batch 1" and "Error" in answer["fails"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label_maps", "maps"], r"--label_maps \S+maps: name a folder seg_maps that has images/ and inst_maps/"),
        (["--out", "file"], "--out file is a file; name a folder"),
        (["--budget_s", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_wrong_arguments_of_the_check_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("maps").mkdir()
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_command_line(gpu.main)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_long_runs_compare_what_a_kill_left_with_what_it_would_have_been(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_runs, "SCENES", 8)
    long_runs.build(tmp_path, [4, 12])
    small, large, killed, rest = map(str.split, capsys.readouterr().out.splitlines()[1:5])
    assert small[:3] == ["build", "4", "samples"] and float(small[3]) > 0
    assert large[1] == killed[1] == "12" and killed[-1] == "killed" and rest[3:5] == ["the", "rest"]
    digests = long_runs.digests(tmp_path / "built")
    assert digests == long_runs.digests(tmp_path / "resumed")
    with next((tmp_path / "resumed").rglob("data.mdb")).open("ab") as file:
        file.write(b"x")
    assert digests != long_runs.digests(tmp_path / "resumed")


def test_long_runs_compare_checkpoints_by_every_number():
    state = {"config": 1, "weights": [torch.ones(3), torch.zeros(2)], "images_seen": 8}
    assert long_runs.same(state, {"config": 2, "weights": [torch.ones(3), torch.zeros(2)], "images_seen": 8})
    assert not long_runs.same(state, {"config": 1, "weights": [torch.ones(3), torch.ones(2)], "images_seen": 8})
    assert not long_runs.same(state, {"config": 1, "weights": [torch.ones(3)], "images_seen": 8})
    assert not long_runs.same(state, {"config": 1, "weights": state["weights"]})


def test_long_runs_name_the_command_that_failed(tmp_path):
    with pytest.raises(RuntimeError, match=r"score failed with 2; its output: .*output.txt"):
        long_runs.run(tmp_path, "score", "evaluate.py", "--metrics", "beauty")
    assert b"--metrics" in (tmp_path / "output.txt").read_bytes()


def test_stripes_and_grids_are_told_from_noise():
    noise = torch.randint(0, 256, (8, 3, 96, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    lines = noise.clone()
    lines[:, :, ::8], lines[0, :, :, ::8] = 255, 0
    assert 0.9 < pictures.stripes(noise) < 1.1 < 1.4 < pictures.stripes(lines)
    assert 0.9 < pictures.fixed_pattern(noise) < 1.1 < 1.4 < pictures.fixed_pattern(lines)
    assert 0.9 < pictures.seams(noise) < 1.3 < 2 < pictures.seams(lines)
