"""Raw folders -> LMDB shards: what is written, what is refused, what survives a crash."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import namedtuple

import lmdb
import numpy as np
import pytest
from conftest import write_jpg, write_png
from PIL import Image
from test_lmdb_source import LABELS, TYPES, encoded, read_all
from tqdm import tqdm

from imaginaire_spade.commands import build_lmdb, inspect_lmdb
from imaginaire_spade.data.image_files import decode_edges, decode_image, decode_instances, decode_label
from imaginaire_spade.data.lmdb_source import open_source
from imaginaire_spade.distributed import rank_from_environment
from imaginaire_spade.errors import EXIT_CODE, ConfigError, DataError, UserError, run_command_line
from imaginaire_spade.labels import LabelSpec
from imaginaire_spade.lmdb_builder import build as build_module
from imaginaire_spade.lmdb_builder import output as output_module
from imaginaire_spade.lmdb_builder import sample as check_module
from imaginaire_spade.lmdb_builder.build import build_dataset
from imaginaire_spade.lmdb_builder.output import hold_shards


@pytest.fixture(autouse=True)
def bars_of_ones_own(monkeypatch):
    """Forked processes share tqdm's lock: one that is killed while it holds it would let us wait for ever."""
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)


def png_rows(data: bytes) -> list[bytes]:
    """The rows of an 8- or 16-bit PNG as they are stored, each with its filter's number first."""
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    place, packed = 8, b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    stride = 1 + width * bits // 8 * (3 if colour == 2 else 1)
    rows = zlib.decompress(packed)
    assert len(rows) == stride * height
    return [rows[i : i + stride] for i in range(0, len(rows), stride)]


def test_a_shard_is_in_imaginaires_format_and_deterministic(tiny_folder, tmp_path):
    root = tiny_folder(keys=["b", "a", "s-t/x", "s/x", "s/ä"])
    (root / "images/b.jpg").rename(root / "images/b.jpeg")
    first = build_dataset(root, tmp_path / "one", LABELS, num_workers=0)
    build_dataset(root, tmp_path / "two", LABELS, num_workers=1)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert [str(f) for f in files] == sorted(
        ["all_filenames.json", "metadata.json", "manifest.json", *(f"{t}/data.mdb" for t in TYPES)]
    )
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert json.loads((tmp_path / "one/all_filenames.json").read_text()) == {
        ".": ["a", "b"], "s": ["x", "ä"], "s-t": ["x"]
    }  # fmt: skip
    assert json.loads((tmp_path / "one/metadata.json").read_text()) == {
        "images": "jpg", "seg_maps": "png", "edge_maps": "png", "inst_maps": "png"
    }  # fmt: skip
    with lmdb.open(str(tmp_path / "one/images"), readonly=True, lock=False) as env, env.begin() as transaction:
        stored = {key.decode(): bytes(value) for key, value in transaction.cursor()}
    assert stored["./b"] == (root / "images/b.jpeg").read_bytes()
    assert set(stored) == {"./a", "./b", "s/x", "s/ä", "s-t/x"}
    assert first["num_samples"] == 5 and first["sizes_h_w"] == {"40x56": 5}
    assert sum(first["class_pixels"]) == 5 * 40 * 56 and first["class_pixels"][5] == 0
    assert first["data_types"]["images"]["other_extensions"] == {"b": "jpeg"}
    digest = hashlib.sha256((tmp_path / "one/images/data.mdb").read_bytes()).hexdigest()
    assert first["shards"][0]["files"]["images/data.mdb"]["sha256"] == digest


def test_every_bad_file_is_named_in_one_message(tiny_folder, tmp_path):
    root = tiny_folder(keys=12)
    good = np.zeros((40, 56), np.uint8)
    outside, binary = good.copy(), good.copy()
    outside[3, 3], binary[0] = 77, 255
    write_png(root / "seg_maps/0000.png", outside)
    write_png(root / "seg_maps/0001.png", np.full((40, 56, 3), 9, np.uint8))
    write_png(root / "seg_maps/0002.png", binary)
    write_png(root / "seg_maps/0003.png", good[:20])
    (root / "images/0004.jpg").write_bytes(b"")
    (root / "images/0005.jpg").write_bytes((root / "images/0006.jpg").read_bytes()[:500])
    write_png(root / "edge_maps/0007.png", good[:, :8])
    (root / "seg_maps/0008.png").write_bytes(encoded(good, "JPEG"))
    bomb = encoded(good)[:16] + struct.pack(">II", 60_000, 60_000) + encoded(good)[24:]
    (root / "images/0009.jpg").write_bytes(bomb)
    (root / "inst_maps/0010.png").write_bytes(bomb)
    with pytest.raises(DataError) as caught:
        build_dataset(root, tmp_path / "out", LABELS, num_workers=1)
    message = str(caught.value)
    for part in ("2 of 12 label maps checked (", "0000.png, ", "0002.png): label value(s) 77, 255", "0001.png: an RGB",
                 "0003.jpg is 40 x 56", "0003.png is 20 x 56", "0004.jpg: the file is empty", "0005.jpg",
                 "0007.png is 40 x 8", "0008.png: a label map stored as JPEG, whose compression changes ids",
                 "0009.jpg: 60000 x 60000 pixels by its header", "0010.png: 60000 x 60000 pixels"):  # fmt: skip
        assert part in message, part
    assert "0006" not in message and "nothing was built" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_checking_stops_after_twenty_problems(tiny_folder, tmp_path, monkeypatch):
    root = tiny_folder(keys=30, num_classes=200, types=("images", "seg_maps"))
    with pytest.raises(DataError, match=r"20 problem\(s\).*stopped after sample 20 of 30") as caught:
        build_dataset(root, tmp_path / "out", LabelSpec(num_classes=1), num_workers=0)
    _, only = str(caught.value).splitlines()  # one line for all of them, with the values of all
    named = ", ".join(f"{root}/seg_maps/{i:04}.png" for i in range(3))
    assert only.startswith(f"  20 of 20 label maps checked ({named}, ...): label value(s) 1, 2, ")
    assert " 199 outside the table (num_classes: 1). Write data.labels.ignore" in only
    (tmp_path / "one.yaml").write_text("data: {labels: {num_classes: 1}}")
    verify = ["inspect_lmdb.py", str(root), "--verify", "--num_workers=0", "--config", str(tmp_path / "one.yaml")]
    monkeypatch.setattr(sys, "argv", verify)
    with pytest.raises(DataError, match=r"30 problem\(s\):\n  30 of 30 label maps checked .*199 outside the table.*$"):
        inspect_lmdb.main()


def test_colours_outside_the_palette_are_one_line(tiny_folder, tmp_path):
    root = tiny_folder(keys=4, types=("images", "seg_maps"))
    for i in range(3):
        write_png(root / f"seg_maps/{i:04}.png", np.full((40, 56, 3), i + 1, np.uint8))
    write_png(root / "seg_maps/0003.png", np.zeros((40, 56, 3), np.uint8))
    labels = LabelSpec(num_classes=2, palette=((0, 0, 0), (9, 9, 9)))
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            build_dataset(root, tmp_path / "out", labels, num_workers=workers)
        _, only = str(caught.value).splitlines()
        assert only.startswith("  3 of 4 label maps checked (") and "nearest_color" in only
        assert (
            "0002.png): 3 colour(s) that data.labels.palette does not have: (1, 1, 1), (2, 2, 2), (3, 3, 3). A" in only
        )


def test_refused_before_any_work(tiny_folder, tmp_path):
    root = tiny_folder(keys=2)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for output, options, message in (
        (occupied, {}, "thesis.tex.*no data set of this script"),
        (occupied, {"overwrite": True}, "thesis.tex.*not overwritten"),
        (occupied, {"resume": True}, "thesis.tex"),
        (tmp_path / "file", {}, "is a file"),
        (tmp_path / "file/out", {}, "is a file"),
        (root / "images/lmdb", {}, "among the raw files"),
        (root, {"overwrite": True}, "contains --data_root"),
        (tmp_path, {"overwrite": True}, "contains --data_root"),
        (tmp_path / "x", {"num_shards": 3}, "more shards than samples"),
        (tmp_path / "x", {"num_shards": 0}, r"at least 1 shard\(s\)"),
    ):
        with pytest.raises(DataError, match=message):
            build_dataset(root, output, LABELS, num_workers=0, **options)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(DataError, match="not writable"):
            build_dataset(root, tmp_path / "locked/out", LABELS, num_workers=0)
    with pytest.raises(DataError, match="no such folder"):
        build_dataset(tmp_path / "absent", tmp_path / "x", LABELS)
    assert not (tmp_path / "x").exists()


def test_existing_output_overwritten_resumed_or_refused(tiny_folder, tmp_path):
    root, out = tiny_folder(keys=4), tmp_path / "out"
    first = build_dataset(root, out, LABELS, num_workers=0)
    source = open_source(out, TYPES)
    source.read("0000", "images")
    with pytest.raises(DataError, match="exists and holds a data set"):
        build_dataset(root, out, LABELS, num_workers=0, resume=False)
    assert build_dataset(root, out, LABELS, num_workers=0) == first
    with pytest.raises(DataError, match="another label table"):
        build_dataset(root, out, LabelSpec(num_classes=6), num_workers=0, resume=True)
    shutil.rmtree(root)
    root = tiny_folder(keys=3, seed=1)
    with pytest.raises(DataError, match="another set of samples or files"):
        build_dataset(root, out, LABELS, num_workers=0, resume=True)
    build_dataset(root, out, LABELS, num_workers=0, num_shards=3, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]
    again = open_source(out, TYPES)
    assert again.keys == ["0000", "0001", "0002"]
    assert again.read("0000", "images") == (root / "images/0000.jpg").read_bytes()


def test_drop_unpaired_and_input_list(tiny_folder, tmp_path, capsys):
    root = tiny_folder(keys=["a", "b", "c", "s/d"], types=("images", "seg_maps"))
    (root / "seg_maps/b.png").unlink()
    manifest = build_dataset(root, tmp_path / "dropped", LABELS, num_workers=0, drop_unpaired=True)
    assert manifest["num_samples"] == 3
    assert "b: dropped, no file in seg_maps" in capsys.readouterr().out
    assert manifest["left_out"] == ["b: dropped, no file in seg_maps"]
    (tmp_path / "list.txt").write_text("./a\ns/d.jpg\n\n")
    build_dataset(root, tmp_path / "listed", LABELS, num_workers=0, input_list=tmp_path / "list.txt")
    assert open_source(tmp_path / "listed", ["images"]).keys == ["a", "s/d"]
    (tmp_path / "list.txt").write_text("a\nb\nzebra\n")
    with pytest.raises(DataError, match=r"2 name.*: b, zebra"):
        build_dataset(root, tmp_path / "x", LABELS, num_workers=0, input_list=tmp_path / "list.txt")


def test_too_little_space(tiny_folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    root = tiny_folder(keys=4)
    with monkeypatch.context() as patch:
        patch.setattr(output_module.shutil, "disk_usage", lambda path: usage(10, 9, 1000))
        with pytest.raises(DataError, match=r"1,000 bytes are free there, about .* needed"):
            build_dataset(root, tmp_path / "out", LABELS, num_workers=0)
    assert not (tmp_path / "out").exists()

    def limited(num_shards: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # write() fails beyond
        try:
            build_dataset(root, tmp_path / "out", LABELS, num_workers=0, num_shards=num_shards)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    for num_shards in (1, 2):
        with pytest.raises(DataError, match=r"(?s)writing failed: .*bytes are free"):
            limited(num_shards)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system of its own cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_the_disk_fills_up_in_the_middle(tiny_folder, tmp_path, small_disk, monkeypatch, num_shards):
    root, out, hog = tiny_folder(keys=8), small_disk / "out", small_disk / "hog"

    def fill(plan: check_module.Plan, key: str) -> check_module.LoadedSample:
        if key == "0005":
            with hog.open("wb") as file:
                file.write(bytes(shutil.disk_usage(small_disk).free // 4096 * 4096))
        return check_module.load_sample(plan, key)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "load_sample", fill)
        with pytest.raises(DataError) as caught:
            build_dataset(root, out, LABELS, num_workers=0, num_shards=num_shards)
    message = str(caught.value)
    assert message.startswith(f"--output_root {out}: writing failed: ") and "No space left" in message
    assert "run the same command again: finished shards are kept" in message
    assert sorted(p.name for p in small_disk.iterdir()) == (["hog"] if num_shards == 1 else ["hog", "out"])
    if num_shards > 1:
        assert sorted(p.name for p in out.iterdir()) == ["shard_00000", "shard_00001"]
    hog.unlink()
    build_dataset(root, out, LABELS, num_workers=0, num_shards=num_shards)
    build_dataset(root, tmp_path / "whole", LABELS, num_workers=0, num_shards=num_shards)
    assert tree_of(out) == tree_of(tmp_path / "whole")
    assert [p.name for p in small_disk.iterdir()] == ["out"]


def run_here(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["build_lmdb.py", *map(str, arguments)])
    run_command_line(build_lmdb.main)


def test_command_line(tiny_folder, tiny_config, tmp_path, monkeypatch, capsys):
    root = tiny_folder(keys=5, num_classes=6)
    (root / "images/readme.txt").write_text("x")
    arguments = ["--config", tiny_config(edges="instances"), "--data_root", root, "--output_root", tmp_path / "o/out",
                 "--paired", "--num_workers", 0]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        run_here(monkeypatch, *arguments)
    assert left.value.code == EXIT_CODE and "label value(s) 5 outside the table" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    run_here(monkeypatch, *arguments, "--set", "data.labels.num_classes=6")
    printed = capsys.readouterr().out
    for part in ("5 samples of images, seg_maps, edge_maps, inst_maps", "40x56 (5)", "class 5", "readme.txt"):
        assert part in printed
    assert len(open_source(tmp_path / "o/out", TYPES).keys) == 5


def tree_of(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_killed_in_the_middle_then_resumed(tiny_folder, tiny_config, tmp_path, monkeypatch, capsys):
    root, out = tiny_folder(keys=40, size=(16, 16)), tmp_path / "out"
    arguments = ["--config", tiny_config(), "--data_root", root, "--output_root", out, "--num_shards", 40]
    builder = os.fork()
    if builder == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        with contextlib.suppress(BaseException):
            run_here(monkeypatch, *arguments)
        os._exit(0)
    deadline = time.monotonic() + 120
    while len([*out.glob("shard_?????")]) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(builder, signal.SIGKILL)
    os.waitpid(builder, 0)
    finished = sorted(p for p in out.glob("shard_?????"))
    assert 3 <= len(finished) < 40 and not (out / "manifest.json").exists()
    with pytest.raises(DataError, match=r"unfinished build.*same scripts/build_lmdb"):
        open_source(out, TYPES)
    with pytest.raises(DataError, match="leave out --no-resume to finish"):
        build_dataset(root, out, LABELS, num_shards=40, resume=False)
    with pytest.raises(DataError, match="another --num_shards"):
        build_dataset(root, out, LABELS, num_shards=2)
    made_at = {p: (p / "manifest.json").stat().st_mtime_ns for p in finished}
    damaged = finished[1] / "seg_maps/data.mdb"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    run_here(monkeypatch, *arguments)
    # (A worker may have finished one more shard after the list was made.)
    kept = int(re.search(r"resuming: (\d+) of 40", capsys.readouterr().out)[1])
    assert kept >= len(finished) - 1
    rebuilt = [p for p, at in made_at.items() if (p / "manifest.json").stat().st_mtime_ns != at]
    assert rebuilt == [finished[1]]
    build_dataset(root, tmp_path / "whole", LABELS, num_shards=40, num_workers=0)
    assert tree_of(out) == tree_of(tmp_path / "whole")
    assert open_source(out, TYPES).keys == open_source(root, TYPES).keys
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out", "raw", "whole"]


def test_a_killed_worker_is_noticed(tiny_folder, tmp_path, monkeypatch):
    root, out, builder = tiny_folder(keys=40, size=(16, 16)), tmp_path / "out", os.getpid()

    def die(plan: check_module.Plan, key: str) -> check_module.LoadedSample:
        if key == "0030" and os.getpid() != builder:
            os.kill(os.getpid(), signal.SIGKILL)
        return check_module.load_sample(plan, key)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "load_sample", die)
        with pytest.raises(DataError, match=r"a worker process was killed .*smaller --num_workers"):
            build_dataset(root, out, LABELS, num_shards=10, num_workers=2)
    assert not [path for path in (*tmp_path.iterdir(), *out.glob("*")) if path.name.endswith((".tmp", ".lock"))]
    build_dataset(root, out, LABELS, num_shards=10, num_workers=2)
    build_dataset(root, tmp_path / "whole", LABELS, num_shards=10, num_workers=0)
    assert tree_of(out) == tree_of(tmp_path / "whole")


def test_ctrl_c_keeps_the_finished_shards(tiny_folder, tiny_config, tmp_path, monkeypatch, capsys):
    root, out = tiny_folder(keys=200, size=(16, 16)), tmp_path / "out"
    arguments = ["--config", tiny_config(), "--data_root", root, "--output_root", out, "--num_shards", 200]
    builder = os.fork()
    if builder == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background has it ignored
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            run_here(monkeypatch, *arguments)
        except SystemExit as left:
            os._exit(left.code)
        finally:
            os._exit(0)  # whatever it was: no second pytest goes on from here
    deadline = time.monotonic() + 120
    while len([*out.glob("shard_?????")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(builder, signal.SIGINT)  # to the workers too, as a terminal does
    assert os.waitstatus_to_exitcode(os.waitpid(builder, 0)[1]) == 130
    finished = sorted(path.name for path in out.iterdir())
    assert 2 <= len(finished) < 200 and all(re.fullmatch(r"shard_\d{5}", name) for name in finished)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out", "raw"]
    run_here(monkeypatch, *arguments)
    assert f"resuming: {len(finished)} of 200" in capsys.readouterr().out


@pytest.mark.timeout(60)
def test_a_builder_killed_while_it_draws_its_bar_stops_nobody(tiny_folder, tmp_path):
    child = os.fork()
    if child == 0:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert build_dataset(tiny_folder(keys=2), tmp_path / "out", LABELS, num_workers=0)["num_samples"] == 2


def test_twenty_kills_lose_nothing(tiny_folder, tmp_path):
    """Killed with SIGKILL at random moments, with whole shards and one shard, replacing another set or not."""
    root = tiny_folder(keys=24, size=(16, 16))
    older = tiny_folder("older", keys=2)
    draw = random.Random(0)
    for num_shards, overwrite in ((12, False), (1, False), (12, True), (1, True)):
        out, whole = tmp_path / f"out{num_shards}{overwrite}", tmp_path / f"whole{num_shards}"
        if overwrite:
            build_dataset(older, out, LABELS, num_workers=0)
        else:
            build_dataset(root, whole, LABELS, num_workers=0, num_shards=num_shards)
        options = {"num_shards": num_shards, "num_workers": 2, "overwrite": overwrite}
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                build_dataset(root, out, LABELS, **options)
                os._exit(0)
            time.sleep(draw.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if overwrite and out.exists():
                assert len(open_source(out, TYPES).keys) in (2, 24)
        build_dataset(root, out, LABELS, **options)
        assert tree_of(out) == tree_of(whole)
        assert [p.name for p in tmp_path.iterdir() if ".tmp" in p.name or ".lock" in p.name] == []


def test_two_builders_on_one_output(tiny_folder, tmp_path):
    root, out = tiny_folder(keys=2), tmp_path / "out"
    ready, done = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        with hold_shards(out, [0]):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    for options in ({}, {"num_shards": 2}, {"overwrite": True}):
        with pytest.raises(UserError, match=rf"--output_root {out}: process {holder} on .* writes there"):
            build_dataset(root, out, LABELS, num_workers=0, **options)
    # Another process's shards are no hindrance.
    assert build_dataset(root, out, LABELS, num_workers=0, num_shards=2, rank=1, world_size=2) is None
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    manifest = build_dataset(root, out, LABELS, num_workers=0, num_shards=2)
    assert manifest["num_samples"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]


def test_many_processes_build_what_one_builds(tiny_folder, tiny_config, tmp_path, monkeypatch):
    root = tiny_folder(keys=9, size=(16, 16))
    out, whole, ranks = tmp_path / "out", tmp_path / "whole", tmp_path / "ranks"
    arguments = ["--config", tiny_config(), "--data_root", root, "--output_root", out, "--num_shards", 5]
    children = []
    for rank in range(2):  # as torchrun starts them, at the same time
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with contextlib.suppress(BaseException):
                run_here(monkeypatch, *arguments)
                os._exit(0)
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    build_dataset(root, whole, LABELS, num_shards=5, num_workers=0)
    assert tree_of(out) == tree_of(whole)
    # As a job array does, in any order, once to build and once to replace.
    for overwrite in (False, True):
        for rank in (2, 0, 1):
            options = {"num_shards": 5, "num_workers": 0, "world_size": 3, "overwrite": overwrite}
            assert (build_dataset(root, ranks, LABELS, rank=rank, **options) is None) == (rank != 1)
        assert tree_of(ranks) == tree_of(whole)


def test_leftovers_of_another_number_of_shards(tiny_folder, tmp_path):
    """One process clears them away with --overwrite; of several none may, since the others may be at work there."""
    root, out = tiny_folder(keys=6, size=(16, 16)), tmp_path / "out"
    build_dataset(root, out, LABELS, num_workers=0, num_shards=6, rank=0, world_size=2)
    for rank in (0, 1):
        options = {"num_workers": 0, "num_shards": 2, "rank": rank, "world_size": 2}
        with pytest.raises(DataError, match=r"shard_00004, which is no part of this build \(another --num_shards\?\)"):
            build_dataset(root, out, LABELS, **options)
        with pytest.raises(DataError, match=rf"Of several processes none may .*: remove {out} yourself"):
            build_dataset(root, out, LABELS, overwrite=True, **options)
    assert sorted(p.name for p in out.iterdir()) == ["shard_00000", "shard_00002", "shard_00004"]
    with pytest.raises(DataError, match="another --num_shards"):
        build_dataset(root, out, LABELS, num_workers=0, num_shards=2)
    assert build_dataset(root, out, LABELS, num_workers=0, num_shards=2, overwrite=True)["num_samples"] == 6
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "shard_00000", "shard_00001"]


def test_rank_of_a_job_array(monkeypatch):
    assert rank_from_environment() == (0, 1)
    for name, value in (("ID", "7"), ("MIN", "1"), ("MAX", "15"), ("STEP", "2"), ("COUNT", "8")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert rank_from_environment() == (3, 8)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")  # --array=1,7,15
    with pytest.raises(ConfigError, match=r"3 task ids from 1 to 15 have gaps: write --array=0-2"):
        rank_from_environment()
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "6"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert rank_from_environment() == (5, 6)


def test_workers_and_shards_change_no_value(tiny_folder, tmp_path):
    root = tiny_folder(keys=40, size=(16, 16))
    sources = []
    for number, (num_shards, num_workers) in enumerate(((1, 0), (1, 2), (3, 2), (2, 3))):
        out = tmp_path / str(number)
        build_dataset(root, out, LABELS, num_shards=num_shards, num_workers=num_workers)
        sources.append(open_source(out, TYPES))
    assert tree_of(tmp_path / "0") == tree_of(tmp_path / "1")
    assert len({read_all(source) for source in sources}) == 1


def test_one_bad_file_keeps_the_other_shards(tiny_folder, tmp_path):
    root, out = tiny_folder(keys=8), tmp_path / "out"
    good = (root / "images/0005.jpg").read_bytes()
    (root / "images/0005.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"(?s)1 problem\(s\), 3 finished shard\(s\) are kept.*0005\.jpg: the file is empty"
    ):
        build_dataset(root, out, LABELS, num_shards=4, num_workers=0)
    assert sorted(p.name for p in out.iterdir()) == ["shard_00000", "shard_00001", "shard_00003"]
    (root / "images/0005.jpg").write_bytes(good)
    build_dataset(root, out, LABELS, num_shards=4, num_workers=0)
    build_dataset(root, tmp_path / "whole", LABELS, num_shards=4, num_workers=0)
    assert tree_of(out) == tree_of(tmp_path / "whole")


def test_shrinking_while_building(tiny_folder, tmp_path):
    root = tiny_folder(keys=["a", "b"], size=(40, 56))
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    write_jpg(root / "images/a.jpg", noise // np.array([1, 2, 4], np.uint8))  # red, less green, little blue
    small = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2), np.ones((8, 9), np.uint8))
    for folder, array in (
        ("images", np.stack([small] * 3, 2)),
        ("seg_maps", small),
        ("edge_maps", small),
        ("inst_maps", small),
    ):
        (root / folder / f"b.{'jpg' if folder == 'images' else 'png'}").unlink()
        write_png(root / folder / "b.png", array)
    manifest = build_dataset(root, tmp_path / "out", LABELS, num_workers=0, resize_smallest_side=20, quality=80)
    assert manifest["sizes_h_w"] == {"16x18": 1, "20x28": 1}
    assert sum(manifest["class_pixels"]) == 20 * 28 + 16 * 18
    store, raw = open_source(tmp_path / "out", TYPES), open_source(root, TYPES)
    for data_type in TYPES:
        assert store.read("b", data_type) == raw.read("b", data_type)  # small enough: the file itself
    ids = decode_label(raw.read("a", "seg_maps"), "x")
    assert np.array_equal(decode_label(store.read("a", "seg_maps"), "x"), ids[1::2, 1::2])
    instances = decode_instances(raw.read("a", "inst_maps"), "x")
    assert np.array_equal(decode_instances(store.read("a", "inst_maps"), "x"), instances[1::2, 1::2])
    photo, before = (decode_image(source.read("a", "images"), "x") for source in (store, raw))
    assert photo.shape == (20, 28, 3)
    assert np.abs(photo.mean((0, 1)) - before.mean((0, 1))).max() < 5
    assert len(store.read("a", "images")) < len(raw.read("a", "images")) / 2
    with pytest.raises(DataError, match="another --resize_smallest_side"):
        build_dataset(root, tmp_path / "out", LABELS, num_workers=0, resize_smallest_side=20, quality=90)


def test_recoding_maps_while_building(tiny_folder, tmp_path):
    """The same samples, whatever kind of file a map was; photos stay the files they are."""
    table = LabelSpec(num_classes=5, palette=tuple((i, 2 * i, 3 * i) for i in range(5)))
    root = tiny_folder(keys=["grey", "indices", "colours", "wide", "tiff"])
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 5, (5, 7), dtype=np.uint8), np.ones((8, 8), np.uint8))
    indices = Image.new("P", ids.shape[::-1])
    indices.putdata(ids.ravel().tolist())
    indices.putpalette(np.array(table.palette, np.uint8).ravel().tolist())
    indices.save(root / "seg_maps/indices.png")
    write_png(root / "seg_maps/colours.png", np.array(table.palette, np.uint8)[ids])
    write_png(root / "seg_maps/wide.png", ids.astype(np.uint16))
    (root / "seg_maps/tiff.png").unlink()
    Image.fromarray(ids).save(root / "seg_maps/tiff.tif")
    write_png(root / "inst_maps/wide.png", np.stack([ids, ids, ids], 2))  # R + 256 G + 65536 B
    plain, recoded = tmp_path / "plain", tmp_path / "recoded"
    build_dataset(root, plain, table, num_workers=0)
    manifest = build_dataset(root, recoded, table, num_workers=0, recode_maps=True)
    assert manifest["recoded_maps"] and manifest["data_types"]["seg_maps"]["other_extensions"] == {}
    one, other = open_source(plain, TYPES), open_source(recoded, TYPES)
    for key, data_type in itertools.product(one.keys, TYPES):
        a, b = one.read(key, data_type), other.read(key, data_type)
        if data_type == "images":
            assert a == b == (root / f"images/{key}.jpg").read_bytes()
            continue
        assert {row[0] for row in png_rows(b)} == {0}  # no filter
        decode = {"seg_maps": decode_label, "edge_maps": decode_edges, "inst_maps": decode_instances}[data_type]
        assert np.array_equal(decode(a, key), decode(b, key))
    for recode, message in ((False, "--recode_maps"), (True, "recode_maps decodes every map")):
        with pytest.raises(DataError, match=message):
            build_dataset(root, recoded, table, num_workers=0, recode_maps=recode, check=not recode)
    shrunk = build_dataset(root, tmp_path / "shrunk", table, num_workers=0, recode_maps=True, resize_smallest_side=20)
    assert shrunk["sizes_h_w"] == {"20x28": 5} and shrunk["recoded_maps"]
    build_dataset(root, tmp_path / "small", table, num_workers=0, recode_maps=True, resize_smallest_side=50)
    assert open_source(tmp_path / "small", TYPES).read("wide", "images") == one.read("wide", "images")


def test_chosen_types_and_no_check(tiny_folder, tmp_path):
    root = tiny_folder(keys=2, num_classes=9)
    manifest = build_dataset(
        root, tmp_path / "a", LABELS, num_workers=0, data_types=["seg_maps", "images"], check=False
    )
    assert manifest["class_pixels"] is None and list(manifest["data_types"]) == ["seg_maps", "images"]
    photos = build_dataset(root, tmp_path / "b", LABELS, num_workers=0, data_types=["images"])
    assert photos["class_pixels"] is None and photos["sizes_h_w"] == {"40x56": 2}
    (root / "images/0001.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"0001\.jpg: the file is empty"):
        build_dataset(root, tmp_path / "c", LABELS, num_workers=0, check=False)


def test_overlong_names(tiny_folder, tmp_path):
    long = "/".join(["d" * 200] * 2 + ["f" * 200])
    root = tiny_folder(keys=["a", long], types=("images", "seg_maps"))
    with pytest.raises(DataError, match="511 bytes"):
        build_dataset(root, tmp_path / "out", LABELS, num_workers=0)
    assert not (tmp_path / "out").exists()
