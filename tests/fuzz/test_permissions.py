"""Every command, where a file or folder may not be read or written: one message, exit code 2."""

import ctypes
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import blocky_labels, write_png

from imaginaire_spade.config_files import dump_yaml
from imaginaire_spade.evaluation.report import Protocol, Report
from imaginaire_spade.training.checkpoint import write_checkpoint

from .fuzzer import outcome_of
from .kinds import REPOSITORY, architecture, tiny_config, tiny_content

CONFIG = "--config", "c.yaml"
COMMANDS = {
    "train, data": ("raw", "train.py", *CONFIG, "--logdir", "new", "--device", "cpu"),
    "train, checkpoints": ("log/checkpoints", "train.py", *CONFIG, "--logdir", "log", "--device", "cpu"),
    "train, a checkpoint": ("log/checkpoints/checkpoint_000000000004.pt", "train.py", *CONFIG, "--logdir", "log"),
    "train, log dir": ("log", "train.py", *CONFIG, "--logdir", "log"),
    "train, config": ("c.yaml", "train.py", *CONFIG, "--logdir", "new"),
    "train, --init_from": ("log/checkpoints", "train.py", *CONFIG, "--logdir", "new", "--init_from", "log"),
    "inference, label maps": ("raw/seg_maps", "inference.py", "--checkpoint", "p.pt", "--input_dir", "raw/seg_maps",
                              "--output_dir", "out"),
    "inference, a label map": ("raw/seg_maps/1.png", "inference.py", "--checkpoint", "p.pt", "--input_dir",
                               "raw/seg_maps", "--output_dir", "out"),
    "inference, checkpoint": ("p.pt", "inference.py", "--checkpoint", "p.pt", "--input_dir", "raw/seg_maps",
                              "--output_dir", "out"),
    "inference, log dir": ("log", "inference.py", "--checkpoint", "log", "--input_dir", "raw/seg_maps",
                           "--output_dir", "out"),
    "inference, --logdir": ("log/checkpoints", "inference.py", "--logdir", "log", "--input_dir", "raw/seg_maps",
                            "--output_dir", "out"),
    "inference, output": ("shut", "inference.py", "--checkpoint", "p.pt", "--input_dir", "raw/seg_maps",
                          "--output_dir", "shut/out"),
    "evaluate, photos": ("raw/images", "evaluate.py", "--real", "raw/images", "--fake", "raw/images",
                         "--reference_split", "val", "--inception_weights", "random:0", "--feature_dim", "64"),
    "evaluate, --compare": ("r.json", "evaluate.py", "--compare", "r.json", "r.json"),
    "build, data": ("raw", "scripts/build_lmdb.py", *CONFIG, "--data_root", "raw", "--output_root", "out"),
    "build, a photo": ("raw/images/1.png", "scripts/build_lmdb.py", *CONFIG, "--data_root", "raw",
                       "--output_root", "out"),
    "build, output": ("shut", "scripts/build_lmdb.py", *CONFIG, "--data_root", "raw", "--output_root", "shut/out"),
    "statistics, photos": ("raw/images", "scripts/compute_fid_stats.py", "--real", "raw/images", "--reference_split",
                           "val", "--output", "s.npz", "--inception_weights", "random:0", "--feature_dim", "64"),
    "export_checkpoint": ("p.pt", "scripts/export_checkpoint.py", "--checkpoint", "p.pt", "--target", "nvlabs_spade",
                          "--output_dir", "out"),
    "export_checkpoint, output": ("shut", "scripts/export_checkpoint.py", "--checkpoint", "p.pt", "--target",
                                  "nvlabs_spade", "--output_dir", "shut/out"),
    "export_generator": ("p.pt", "scripts/export_generator.py", "--checkpoint", "p.pt", "--output", "m.safetensors"),
    "export_generator, output": ("shut", "scripts/export_generator.py", "--checkpoint", "p.pt", "--output",
                                 "shut/m.safetensors"),
    "export_onnx": ("p.pt", "scripts/export_onnx.py", "--checkpoint", "p.pt", "--output", "m.onnx"),
    "import_checkpoint": ("w.pth", "scripts/import_checkpoint.py", "--source", "nvlabs_spade", "--weights", "w.pth",
                          "--architecture", "a.json", "--output", "q.pt"),
    "import_checkpoint, architecture": ("a.json", "scripts/import_checkpoint.py", "--source", "nvlabs_spade",
                                        "--weights", "w.pth", "--architecture", "a.json", "--output", "q.pt"),
    "import_config": ("c.yaml", "scripts/import_config.py", "c.yaml", "--source", "imaginaire"),
    "inspect, folder": ("raw", "scripts/inspect_lmdb.py", "raw", *CONFIG),
    "inspect, maps": ("raw/seg_maps", "scripts/inspect_lmdb.py", "raw", *CONFIG),
    "contact sheet": ("raw/images", "scripts/make_contact_sheet.py", *CONFIG, "--data_root", "raw", "--generated",
                      "raw/images", "--output", "s.png"),
    "contact sheet, output": ("shut", "scripts/make_contact_sheet.py", *CONFIG, "--data_root", "raw", "--generated",
                              "raw/images", "--output", "shut/s.png"),
    "distance maps": ("raw/seg_maps", "scripts/make_distance_maps.py", *CONFIG, "--data_root", "raw"),
    "edge maps": ("raw/seg_maps", "scripts/make_edge_maps.py", "--data_root", "raw", "--of", "labels"),
    "sample data": ("shut", "scripts/make_sample_data.py", "--output_root", "shut/raw", "--num_train", "1"),
    "prepare": ("raw/images", "scripts/prepare_dataset.py", "landscapes", "--source", "raw/images", "--output", "out"),
    "parity": ("raw", "scripts/verify_parity.py", "raw"),
    "painting page": ("p.pt", "-m", "imaginaire_spade.demo", "--checkpoint", "p.pt", "--port", "0"),
    "download": ("r.json", "scripts/download_test_data.py", "--manifest", "r.json", "--output_dir", "out"),
}  # fmt: skip


SHORT = ("train, checkpoints", "train, a checkpoint", "inference, label maps", "export_checkpoint, output", "prepare")
"""What ``make test`` tries."""


def obey_permissions() -> None:
    """Give up root's right to read and write everything (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = ctypes.create_string_buffer(struct.pack("II", 0x20080522, 0)), ctypes.create_string_buffer(24)
    assert not libc.capget(header, data)
    words = list(struct.unpack("6I", data.raw))
    words[:3] = [word & ~0b110 for word in words[:3]]
    assert not libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *words)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permissions") / "files"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        write_png(folder / f"raw/images/{number}.png", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        write_png(folder / f"raw/seg_maps/{number}.png", blocky_labels(rng, 64, 64, 5))
    config = tiny_config()
    data = config.data.model_copy(
        update={"train": config.data.train.model_copy(update={"roots": ("raw",)}), "num_workers": 0}
    )
    trainer = config.trainer.model_copy(update={"max_iterations": 1, "model_average": None})
    (folder / "c.yaml").write_text(dump_yaml(config.model_copy(update={"data": data, "trainer": trainer})))
    write_checkpoint(folder / "p.pt", tiny_content())
    write_checkpoint(folder / "log/checkpoints/checkpoint_000000000004.pt", tiny_content())
    Report({"fid": 1.0}, Protocol("0", "val", "0", 4, 4, "8x8", "8x8", "png", "png"), {}).save(folder / "r.json")
    architecture(folder)
    (folder / "w.pth").write_bytes(b"")
    (folder / "shut").mkdir()
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_a_command_that_may_not_is_one_message(place, name, one_thread):
    shut, script, *arguments = COMMANDS[name]
    said = place.parent / "said.txt"
    said.write_text("")

    def use() -> None:
        obey_permissions()
        sys.stderr = said.open("w", buffering=1)
        sys.argv = [script, *arguments]
        if script == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")

    mode = (place / shut).stat().st_mode
    (place / shut).chmod(0o500 if shut == "shut" else 0)
    try:
        outcome, text = outcome_of(use, place)
    finally:
        (place / shut).chmod(mode)
    message = said.read_text()
    assert outcome == "refused", f"{outcome}: {text}\n{message}"
    assert "Traceback" not in message and "ermission" in message, message
    assert sum(line.startswith("error: ") for line in message.splitlines()) == 1, message
    assert not Path(place / "out").exists() or not list((place / "out").rglob("*.png")), "it began all the same"
